"""Running what tables ask for: each cell is trained once, and each measurement of it made once.

    OUTPUT/cells/NAME-seed0/evaluation/cell.json           what training took; its presence means that it is finished
    OUTPUT/cells/NAME-seed0/evaluation/MEASUREMENT.json    one measurement of the trained model

A table that asks a finished cell for something new loads its model and measures that alone.
"""

import logging
import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedModel

from longlora.attention.transformers_backend import use_shifted_attention
from longlora.errors import UserError
from longlora.evaluation.copying import recall
from longlora.model.loading import load
from longlora.model.positions import extend_positions
from longlora.reproduction.cells import Cell, differences, finished, train_cell
from longlora.reproduction.entries import Entry, Table
from longlora.reproduction.measuring import PASSAGES, perplexities
from longlora.reproduction.processes import in_processes
from longlora.reproduction.tables import RECALL_PLACES
from longlora.run_directory import RunDirectory
from longlora.settings import ExtendSettings
from longlora.training.extension import Data, flat, load_for_training, prepare_data
from longlora.training.trainer import document_loss

logger = logging.getLogger(__name__)

WATCHED_DOCUMENTS = 8
"""Held-out documents of the perplexity on the way, as `longlora.training.extension.train_extension` takes them."""


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


def jobs_of(table: Table, base: ExtendSettings, seeds: Sequence[int], folder: Path) -> list[Job]:
    """What the table needs, seed by seed; first what its checks are about, so that a budget goes to that."""
    checked = {key for check in table.checks for key, _ in (check.left, check.right)}
    rows = sorted(table.rows, key=lambda row: row.key not in checked)
    found: dict[tuple[str, int], Job] = {}
    for seed in seeds:
        for row in rows:
            for entry in row.entries:
                if entry is not None:
                    cell = placed(entry, base, seed, folder)
                    known = found.get((cell.name, cell.seed))
                    measures = dict.fromkeys((*(known.measures if known else ()), *filter(None, [entry.measure])))
                    found[cell.name, cell.seed] = Job(cell, tuple(measures))
    return list(found.values())


def placed(entry: Entry, base: ExtendSettings, seed: int, folder: Path) -> Cell:
    """The entry's cell with its run directory; without training the seed draws nothing, so one cell serves all."""
    return entry.way.cell(base, seed if entry.way.trained else 0).placed(folder)


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
            RunDirectory(beside).write_evaluation(
                "cell", {"name": cell.name, "label": cell.label, "seed": cell.seed, **kept, "from": str(place)}
            )
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
    run.write_evaluation("cell", {"name": cell.name, "label": cell.label, "seed": cell.seed, "training": None})
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


def measured(name: str, model: Any, data: Data, settings: ExtendSettings) -> dict[str, Any]:
    """The measurement `name` (see `entries.Entry`) of a trained model, as JSON."""
    kind, _, number = name.partition("-")
    context = settings.positions.context
    longest = settings.perplexity.min_document_tokens or context
    if kind == "recall":
        distances = [context * places // 16 for places in RECALL_PLACES]
        found = recall(model, data.held_out, distances, PASSAGES, settings.training.seed, context)
        return {"recall": [point.to_dict() for point in found]}
    if kind == "start":
        long = [ids for ids in data.held_out if len(ids) >= context][:WATCHED_DOCUMENTS]
        return {"perplexity": math.exp(document_loss(long, context)(model))}
    if kind == "own" and settings.attention.pattern != "full":
        own = (settings.attention.tokens_per_group(context), settings.attention.pattern)
        use_shifted_attention(model, *own, inference=True)
        try:
            return {"perplexity": perplexities(model, data.held_out, [int(number)], longest)[number]}
        finally:
            use_shifted_attention(model, *own)
    return {"perplexity": perplexities(model, data.held_out, [int(number)], longest)[number]}


def value(entry: Entry, cell: Cell) -> float | None:
    """The entry's number from its placed cell, or None where that has not been run."""
    run = RunDirectory(cell.settings.output)
    result = finished(cell)
    if result is None:
        return None
    kind, _, number = entry.what.partition("-")
    training = cell.settings.training
    if entry.measure is not None:
        document = run.read_evaluation(entry.measure)
        if document is None:
            return None
        if kind == "recall":
            return next(point["accuracy"] for point in document["recall"] if point["distance"] == int(number))
        return document["perplexity"]
    if kind == "step":
        steps = {record["step"]: record["eval_perplexity"] for record in run.read_metrics() if "eval_loss" in record}
        return steps.get(int(number))
    if kind == "rate":
        return training.lr
    if kind == "embed":
        return training.embed_lr or (training.lr if {"embed", "full"} & set(cell.settings.trainable.train) else None)
    return {
        "seconds": result["training"]["seconds"],
        "gigabytes": result["training"]["memory_bytes"] / 1e9,
        "millions": result["trainable"]["trainable"] / 1e6,
    }[kind]
