"""Pieces of work for `longlora.reproduction.processes`, in a module of their own: each process imports it."""

import os
import signal
import time
from pathlib import Path

from longlora.errors import UserError


class Item:
    def __init__(self, folder: Path, number: int):
        self.label = str(number)
        self.file = folder / self.label


def note(item: Item, wrong: str) -> None:
    """Write the item's file, unless its name is the first letter of `wrong`, whose rest says what goes wrong."""
    if item.label != wrong[0]:
        item.file.write_text("begun")
        time.sleep(0 if item.label == "0" else 600)
    elif "mistake" in wrong:
        while item.label != "0" and not item.file.with_name("0").exists():
            time.sleep(0.01)
        raise UserError("--steps is 0.")
    elif "killed" in wrong:
        os.kill(os.getpid(), signal.SIGKILL)
    elif "odd" in wrong:
        raise OddError(1, 2)


class OddError(Exception):
    """Cannot be sent to another process."""

    def __init__(self, first: int, second: int):
        super().__init__("odd")
