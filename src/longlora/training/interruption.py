"""SIGTERM and SIGUSR1, by which Slurm and Kubernetes announce the end: a checkpoint after the step, then stop."""

import signal
import threading
from types import FrameType
from typing import Any

from transformers import TrainerCallback

from longlora import ranks
from longlora.errors import Interrupted

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Interruption(TrainerCallback):
    """While it is entered, a signal to any of the processes ends training in all of them after the step they are in."""

    def __init__(self) -> None:
        self.received: str | None = None
        self.stopped: str | None = None

    def __enter__(self) -> "Interruption":
        self.before: dict[signal.Signals, Any] = {}
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name

    def on_step_end(self, args, state, control, **_):  # type: ignore[no-untyped-def]
        self.stopped = next(filter(None, ranks.everyones(self.received)), None)
        if self.stopped:
            control.should_save = control.should_training_stop = True

    def raise_if_stopped(self, step: int, steps: int) -> None:
        """Raises Interrupted where training ended before its last step."""
        if self.stopped and step < steps:
            raise Interrupted(
                f"stopped by {self.stopped} after step {step:,} of {steps:,}, which checkpoint-{step} holds: the same "
                "command with --resume goes on."
            )
