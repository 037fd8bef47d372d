"""Knobs of `longlora reproduce`."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from longlora.errors import UserError
from longlora.settings.fields import AtLeast, CommandSettings, Names, Tokens, choice
from longlora.settings.model import METHODS

STUDIES = ("attention-study",)

PAPER_TABLES = tuple("table1 table2 table3 table4 table6 table7 table8 table9 table11 figure1".split())

REPRODUCTIONS = (*PAPER_TABLES, *STUDIES, "real-model")


@dataclass(frozen=True, kw_only=True)
class ReproduceSettings(CommandSettings):
    """Run a table or figure cell by cell, each cell once, and print it; the same command goes on where it stopped."""

    name: tyro.conf.Positional[Annotated[str, choice(REPRODUCTIONS)]]
    """A table of the paper, printed beside the paper's figures: `table1` positions and attention by context, `table2`
    attention patterns, `table3` what trains, `table4` and `table9` training by evaluation context, `table6` retrieval,
    `table7` FLOPs, `table8` perplexity by steps, `table11` group sizes, `figure1` quality, time and memory; or a study
    of ours: `attention-study` compares training attentions with full attention, `real-model` takes a pretrained model
    beyond its window by several positions, attentions and mixes of data."""

    model: str = "demo"
    """Base model: `demo`, a hub id, a folder, or a .gguf file."""

    data: tuple[str, ...] = ("stdlib",)
    """Documents to train on, as for `longlora extend`."""

    evaluation_data: tuple[str, ...] = ()
    """Documents to measure on; default a part of the standard library, which is held out from training."""

    output: str | None = None
    """Folder of the cells' run directories and of the result; default `runs/reproduce`, which all tables share, or
    `runs/NAME` for a study."""

    context: Annotated[int | None, AtLeast(2, "tokens")] = None
    """Longest context to extend to, in tokens; default eight times the model's window. Tables that vary the context
    have its half and its quarter too."""

    method: Annotated[str, choice(METHODS)] = "yarn"
    """How positions are stretched in the cells that train; the paper's is `linear`."""

    steps: Annotated[int, AtLeast(1)] = 30
    """Optimiser steps a cell."""

    batch: Annotated[int, AtLeast(1)] = 2
    """Rows of the longest context a step; shorter rows are as many as make as many tokens."""

    lr: float | None = None
    """Peak learning rate of LoRA and norms; embeddings train at a twentieth of it. Default the demo's, 2e-3."""

    seeds: Tokens = ()
    """Seeds of data order, new weights and random choices; each cell runs once with each. Default 0 for a table, 0,1,2
    for a study."""

    only: Names = ()
    """Cells to run, by name; default all of them. What others have left in `output` is shown beside them."""

    reuse: tuple[str, ...] = ()
    """Outputs of other reproductions whose trained cells are taken over where their settings are the same."""

    minutes: Annotated[float | None, AtLeast(0)] = None
    """Begin no new cell after this many minutes; the same command goes on with what is left."""

    jobs: Annotated[int, AtLeast(1)] = 1
    """Cells at a time, each in a process of its own; on several GPUs each takes one."""

    pages: str | None = None
    """Folder, such as docs/results, to write the page, its CSV and its figures into; what people wrote under its last
    heading stays."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lr is not None and not self.lr > 0:
            raise UserError(f"--lr is {self.lr}: it must be above 0.")
