"""Knobs of `longlora reproduce`."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from longlora.errors import UserError, check_choice
from longlora.settings.fields import CommandSettings, Names, Tokens, at_least, choice

STUDIES = ("attention-study",)


@dataclass(frozen=True, kw_only=True)
class ReproduceSettings(CommandSettings):
    """Run a table or figure cell by cell, each cell once, and print it; the same command goes on where it stopped."""

    name: tyro.conf.Positional[Annotated[str, choice(STUDIES)]]
    """Table or study: `attention-study` compares training attentions with full attention."""

    model: str = "demo"
    """Base model: `demo`, a hub id, a folder, or a .gguf file."""

    data: tuple[str, ...] = ("stdlib",)
    """Documents to train on, as for `longlora extend`."""

    evaluation_data: tuple[str, ...] = ()
    """Documents to measure on; default a part of `data`, held out from training."""

    output: str | None = None
    """Folder of the cells' run directories and of the result; default `runs/NAME`."""

    context: int | None = None
    """Context to extend to, in tokens; default eight times the model's window."""

    steps: int = 30
    """Optimiser steps a cell."""

    seeds: Tokens = (0, 1, 2)
    """Seeds of data order, new weights and random choices; each cell runs once with each."""

    only: Names = ()
    """Cells to run, by name; default all of them. What others have left in `output` is shown beside them."""

    jobs: int = 1
    """Cells at a time, each in a process of its own; on several GPUs each takes one."""

    def __post_init__(self) -> None:
        check_choice("table or study", self.name, STUDIES)
        at_least("steps", self.steps, 1)
        at_least("jobs", self.jobs, 1)
        if self.context is not None:
            at_least("context", self.context, 2, "tokens")
        if not self.seeds:
            raise UserError("--seeds is empty: give at least one whole number.")
