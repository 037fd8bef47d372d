"""A table's cells: each trains one model in a run directory of its own, once, and is never run again.

    OUTPUT/cells/NAME-seed0/          a run directory: settings, checkpoints, adapter
    OUTPUT/cells/NAME-seed0/evaluation/cell.json   what training took; its presence means the cell is finished

A killed table goes on with the cell it was in, from that cell's last checkpoint.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from longlora.errors import UserError
from longlora.model.positions import extend_positions
from longlora.report.recipe import defaults
from longlora.run_directory import RunDirectory, plain
from longlora.settings import ExtendSettings
from longlora.training.common import flat, load_for_training
from longlora.training.extension import prepare_data, train_extension
from longlora.training.measuring import Data


@dataclass(frozen=True)
class Cell:
    """One entry of a table: `name` is a file's name, `settings.training.seed` its seed; `output` is filled in."""

    name: str
    label: str
    settings: ExtendSettings
    trained: bool = True
    """False: the model has its positions stretched and is measured as it is."""

    @property
    def seed(self) -> int:
        return self.settings.training.seed

    def in_folder(self, folder: Path) -> "Cell":
        """The cell with the run directory it has below `folder`."""
        path = folder / "cells" / f"{self.name}-seed{self.seed}"
        return replace(self, settings=replace(self.settings, output=str(path)))


def finished(cell: Cell) -> dict[str, Any] | None:
    """What training a finished cell took, or None.

    Raises:
        UserError: the folder holds a cell of this name that was run with other settings.
    """
    run = RunDirectory(cell.settings.output)
    result = run.read_evaluation("cell")
    if result is None:
        return None
    for name, (before, value) in differences(cell.settings, run.read_settings()).items():
        raise UserError(
            f"{run.path} was run with {name} {before!r} and is now asked for with {value!r}: name another --output, or "
            "delete that folder."
        )
    return result


def differences(settings: ExtendSettings, stated: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What a run was `stated` to have (its settings.yaml) and `settings` have otherwise: flag -> (before, now).

    A flag that the file does not know was added since; the run had what is its default now.
    """
    usual = dict(defaults(ExtendSettings))
    found = {}
    for name, value in flat(settings).items():
        before = stated.get(name, plain(usual.get(name)))
        if name not in ("output", "resume", "cache") and before != plain(value):
            found[name] = (before, value)
    return found


def train_cell(cell: Cell, run: RunDirectory) -> tuple[Any, Data, dict[str, Any]]:
    """Train a placed cell in its run directory, which the caller has locked.

    Returns:
        The trained model in eval mode, its data, and `{"name", "label", "seed", "training", "trainable",
        "attention_cost"}`.

    Raises:
        UserError: before it trains, where no document is long enough to measure the cell on.
    """
    settings = cell.settings
    resume = run.settings_file.exists()
    settings = replace(settings, training=replace(settings.training, resume=resume))
    model, tokenizer = load_for_training(settings)
    data = prepare_data(settings, tokenizer, model)
    _refuse_short_documents(data, settings)
    run.begin("reproduce", flat(settings), resume)
    extension = extend_positions(model, settings.positions.context, settings.positions.method)
    trained, summary = train_extension(model, tokenizer, settings, run, data, extension)
    kept = {name: summary[name] for name in ("training", "trainable", "attention_cost")}
    return trained, data, {"name": cell.name, "label": cell.label, "seed": cell.seed, **kept}


def _refuse_short_documents(data: Data, settings: ExtendSettings) -> None:
    needed = settings.perplexity.min_document_tokens or settings.positions.context
    longest = max((len(ids) for ids in data.held_out), default=0)
    if longest < needed:
        raise UserError(
            f"none of the {len(data.held_out)} documents to measure on has {needed:,} tokens, the longest has "
            f"{longest:,}: give longer ones with --evaluation-data, or a shorter --context."
        )
