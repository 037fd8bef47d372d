"""A table's cells: each trains one model in a run directory of its own, once, and is never run again.

    OUTPUT/cells/NAME-seed0/          a run directory: settings, checkpoints, adapter
    OUTPUT/cells/NAME-seed0/evaluation/cell.json   what was measured; its presence means the cell is finished

A killed table goes on with the cell it was in, from that cell's last checkpoint.
"""

import logging
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from longlora.errors import UserError
from longlora.extension import flat, load_for_training, prepare_data, train_extension
from longlora.logs import quiet_libraries
from longlora.positions import extend_positions
from longlora.progress import Progress
from longlora.reproduction.attention_cost import attention_cost
from longlora.run_directory import RunDirectory, plain
from longlora.settings import ExtendSettings

logger = logging.getLogger(__name__)

Measure = Callable[[Any, Any, ExtendSettings], dict[str, Any]]
"""(model, what `prepare_data` returned, settings) -> what to keep of the cell."""


@dataclass(frozen=True)
class Cell:
    """One entry of a table: `name` is a file's name, `settings.training.seed` its seed; `output` is filled in."""

    name: str
    label: str
    settings: ExtendSettings

    @property
    def seed(self) -> int:
        return self.settings.training.seed

    def placed(self, folder: Path) -> "Cell":
        """The cell with the run directory it has below `folder`."""
        path = folder / "cells" / f"{self.name}-seed{self.seed}"
        return replace(self, settings=replace(self.settings, output=str(path)))


def finished(cell: Cell) -> dict[str, Any] | None:
    """What a finished cell measured, or None.

    Raises:
        UserError: the folder holds a cell of this name that was run with other settings.
    """
    run = RunDirectory(cell.settings.output)
    result = run.read_evaluation("cell")
    if result is None:
        return None
    before = run.read_settings()
    for name, value in flat(cell.settings).items():
        if name not in ("output", "resume", "cache") and before.get(name) != plain(value):
            raise UserError(
                f"{run.path} was run with {name} {before.get(name)!r} and is now asked for with {value!r}: name "
                "another --output, or delete that folder."
            )
    return result


def run_cells(cells: Sequence[Cell], measure: Measure, jobs: int) -> list[dict[str, Any]]:
    """Run what is not finished, `jobs` at a time, and return what every cell measured, in order.

    Args:
        cells: placed cells.
        measure: a module's function, since cells run in processes of their own.
        jobs: processes; on several GPUs process i takes GPU i modulo their number.

    Raises:
        UserError: as `finished`, or whatever a cell met.
    """
    todo = [cell for cell in cells if finished(cell) is None]
    if todo:
        context = multiprocessing.get_context("spawn")
        places = context.Queue()
        for place in range(jobs):
            places.put(place)
        threads = max(1, torch.get_num_threads() // jobs)
        # a process a cell: its peak memory is its own, and nothing of one cell reaches the next
        pool = ProcessPoolExecutor(jobs, context, _begin, (places, threads), max_tasks_per_child=1)
        with pool, Progress("cells", "cells", len(todo)) as progress:
            running = {pool.submit(run_cell, cell, measure): cell for cell in todo}
            try:
                for done, future in enumerate(as_completed(running), 1):
                    future.result()
                    cell = running[future]
                    logger.info("finished %s, seed %d (%d of %d)", cell.label, cell.seed, done, len(todo))
                    progress.show(done, f"{done} of {len(todo)} finished")
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    results = [finished(cell) for cell in cells]
    assert all(result is not None for result in results)
    return [result for result in results if result is not None]


def run_cell(cell: Cell, measure: Measure) -> None:
    """Train and measure one placed cell, going on from its last checkpoint where there is one."""
    settings = cell.settings
    run = RunDirectory(settings.output)
    with run.locked():
        resume = run.settings_file.exists()
        settings = replace(settings, training=replace(settings.training, resume=resume))
        run.begin("reproduce", flat(settings), resume)
        model, tokenizer = load_for_training(settings)
        data = prepare_data(settings, tokenizer, model)
        cost = attention_cost(settings.attention, settings.training, settings.positions.tokens_per_row, model.config)
        extension = extend_positions(model, settings.positions.context, settings.positions.method)
        trained, summary = train_extension(model, tokenizer, settings, run, data, extension)
        began = time.monotonic()
        measured = measure(trained, data, settings)
        result = {
            "name": cell.name,
            "label": cell.label,
            "seed": cell.seed,
            "training": summary["training"],
            "trainable": summary["trainable"],
            "attention_cost": cost,
            **measured,
            "measuring_seconds": time.monotonic() - began,
        }
        run.write_evaluation("cell", result)


def _begin(places: Any, threads: int) -> None:
    """What a cell's process sets up before anything else: its GPU, its share of the cores, its log."""
    place = places.get()
    places.put(place)
    if torch.cuda.device_count() > 1:
        os.environ["LOCAL_RANK"] = str(place % torch.cuda.device_count())
    torch.set_num_threads(threads)
    quiet_libraries()
