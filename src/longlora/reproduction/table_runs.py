"""Running what tables ask for: each cell is trained once, and each measurement of it made once.

    OUTPUT/cells/NAME-seed0/evaluation/cell.json           what training took; its presence means that it is finished
    OUTPUT/cells/NAME-seed0/evaluation/MEASUREMENT.json    one measurement of the trained model

A table that asks a finished cell for something new loads its model and measures that alone.
"""

import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedModel

from longlora.errors import UserError
from longlora.model.loading import load
from longlora.model.positions import extend_positions
from longlora.reproduction.cells import Cell, differences, finished, train_cell
from longlora.reproduction.entries import Entry, Ratio, Table
from longlora.reproduction.measuring import measure_file, measured
from longlora.reproduction.processes import in_processes
from longlora.run_directory import RunDirectory
from longlora.settings import ExtendSettings
from longlora.training.common import flat, load_for_training
from longlora.training.extension import prepare_data
from longlora.training.measuring import Data

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """A placed cell and what is to be measured on it."""

    cell: Cell
    measures: tuple[str, ...]

    @property
    def label(self) -> str:
        return f"{self.cell.label}, seed {self.cell.seed}"

    def is_finished(self) -> bool:
        """Raises UserError where the folder holds a cell of this name with other settings."""
        run = RunDirectory(self.cell.settings.output)
        return finished(self.cell) is not None and all(run.read_evaluation(name) for name in self.measures)


def jobs_of(tables: Sequence[Table], base: ExtendSettings, seeds: Sequence[int], folder: Path) -> list[Job]:
    """What the tables need, seed by seed; first what their checks are about, so that a budget goes to that."""
    rows = [
        (row.key not in {key for check in table.checks for key, _ in (check.left, check.right)}, row)
        for table in tables
        for row in table.rows
    ]
    entries = [
        entry
        for _, row in sorted(rows, key=lambda each: each[0])
        for each in row.entries
        for entry in ((each.own, each.other) if isinstance(each, Ratio) else (each,))
        if entry is not None
    ]
    found: dict[tuple[str, int], Job] = {}
    for seed in seeds:
        for entry in entries:
            cell = cell_of(entry, base, seed, folder)
            known = found.get((cell.name, cell.seed))
            name = measure_file(entry.kind, entry.number)
            measures = dict.fromkeys((*(known.measures if known else ()), *([name] if name else [])))
            found[cell.name, cell.seed] = Job(cell, tuple(measures))
    return list(found.values())


def cell_of(entry: Entry, base: ExtendSettings, seed: int, folder: Path) -> Cell:
    """The entry's cell with its run directory; without training the seed draws nothing, so one cell serves all."""
    return entry.way.cell(base, seed if entry.way.trained else 0).in_folder(folder)


def run_jobs(todo: Sequence[Job], jobs: int, minutes: float | None, reuse: Sequence[str]) -> None:
    """Run what is not finished, taking over cells of the same settings from the reproductions in `reuse`.

    Raises:
        UserError: a finished cell of other settings, or whatever a cell met.
    """
    for job in todo:
        if job.cell.trained and finished(job.cell) is None:
            _adopt(job.cell, reuse)
    in_processes([job for job in todo if not job.is_finished()], run_job, jobs, minutes)


def _adopt(cell: Cell, reuse: Sequence[str]) -> None:
    """Copy a finished cell of the same settings, without its checkpoints, from one of the folders `reuse`."""
    target = Path(cell.settings.output)
    for folder in reuse:
        if not (Path(folder) / "cells").is_dir():
            raise UserError(f"--reuse names '{folder}', which holds no cells: give the --output of a reproduction.")
        for place in sorted((Path(folder) / "cells").iterdir()):
            run = RunDirectory(place)
            result = run.read_evaluation("cell") if run.settings_file.exists() else None
            # a cell that was only measured has no training to take over
            if result is None or not result.get("training") or differences(cell.settings, run.read_settings()):
                continue
            if target.exists():
                return
            beside = target.with_name(f".{target.name}.{os.getpid()}")
            shutil.copytree(place, beside, ignore=shutil.ignore_patterns("checkpoint-*", ".lock"))
            kept = {name: result[name] for name in ("training", "trainable", "attention_cost")}
            RunDirectory(beside).write_evaluation("cell", {**_named(cell), **kept, "from": str(place)})
            beside.replace(target)
            logger.info("took over %s, seed %d, from %s", cell.label, cell.seed, place)
            return


def run_job(job: Job) -> None:
    """Train the cell where it is not, going on from its last checkpoint, and measure what is not measured."""
    run = RunDirectory(job.cell.settings.output)
    with run.locked():
        model, data = _stretched(job.cell, run) if not job.cell.trained else _trained(job.cell, run)
        for name in job.measures:
            if run.read_evaluation(name) is None:
                run.write_evaluation(name, measured(name, model, data, job.cell.settings))


def _stretched(cell: Cell, run: RunDirectory) -> tuple[Any, Data]:
    settings = cell.settings
    run.begin("reproduce", flat(settings), resume=run.settings_file.exists())
    model, tokenizer = load_for_training(settings)
    data = prepare_data(settings, tokenizer, model)
    extend_positions(model, settings.positions.context, settings.positions.method)
    run.write_evaluation("cell", {**_named(cell), "training": None})
    return model, data


def _trained(cell: Cell, run: RunDirectory) -> tuple[Any, Data]:
    settings = cell.settings
    if run.read_evaluation("cell") is None:
        model, data, result = train_cell(cell, run)
        run.write_evaluation("cell", result)
        return model, data
    # as training left it: the base in the training's precision, what trained in float32
    model, tokenizer = load(run.path, dtype=settings.training.dtype, device="auto", trainable=True)
    return model, prepare_data(settings, tokenizer, cast(PreTrainedModel, model))


def _named(cell: Cell) -> dict[str, Any]:
    return {"name": cell.name, "label": cell.label, "seed": cell.seed}
