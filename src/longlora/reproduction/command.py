"""`longlora reproduce NAME`: a table or study as one command that goes on where it stopped."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from longlora.demo import recipe
from longlora.errors import UserError, nearest
from longlora.models import load_config
from longlora.positions import original_context
from longlora.reproduction import attention_study, figures
from longlora.reproduction.cells import finished, run_cells
from longlora.reproduction.measuring import quality_and_reach
from longlora.run_directory import versions, write_whole
from longlora.settings import ExtendSettings, ReproduceSettings


def reproduce(settings: ReproduceSettings) -> dict[str, Any]:
    """Run `longlora reproduce`.

    Returns:
        `{"name", "model", "data", "context", "steps", "tokens", "versions", "methods": [as
        `attention_study.summary`]}`, also written to OUTPUT/NAME.json, with tables.md and figures beside it.

    Raises:
        UserError: an unknown cell, a finished cell of other settings, or whatever a cell's run meets.
    """
    folder = Path(settings.output or f"runs/{settings.name}")
    base = base_settings(settings)
    known = attention_study.methods(base.positions.context, settings.steps)
    for name in settings.only:
        if name not in known:
            raise UserError(
                f"--only names '{name}', which is no cell of {settings.name}: it has {', '.join(known)}. "
                f"{nearest(name, known)}".rstrip()
            )
    cells = [cell.placed(folder) for cell in attention_study.cells(base, settings.seeds, settings.only)]
    run_cells(cells, quality_and_reach, settings.jobs)
    everything = [cell.placed(folder) for cell in attention_study.cells(base, settings.seeds, ())]
    results = [result for cell in everything if (result := finished(cell)) is not None]
    document: dict[str, Any] = {
        "name": settings.name,
        "model": settings.model,
        "data": ", ".join(settings.data),
        "context": base.positions.context,
        "steps": settings.steps,
        "tokens": settings.steps * base.training.batch * base.positions.context,
        "versions": versions(),
        "methods": attention_study.summary(results, known),
    }
    methods = document["methods"]
    write_whole(folder / f"{settings.name}.json", json.dumps(document, indent=1) + "\n")
    write_whole(folder / "tables.md", attention_study.markdown(methods) + "\n")
    write_whole(folder / "trade-off.svg", figures.trade_off(methods))
    write_whole(folder / "recall.svg", figures.recall_by_distance(methods, base.positions.context // 4))
    if not settings.json:
        print(attention_study.table(methods))
    return document


def base_settings(settings: ReproduceSettings) -> ExtendSettings:
    """What all cells share: the demo's recipe, on the model, documents and context asked for."""
    window = original_context(load_config(settings.model))
    context = settings.context or 8 * window
    if context <= window:
        raise UserError(
            f"--context is {context:,}: it must be above the window of {settings.model}, {window:,} tokens."
        )
    ours = recipe("", 0)
    return replace(
        ours,
        model=settings.model,
        evaluation_data=settings.evaluation_data,
        positions=replace(ours.positions, context=context),
        corpus=replace(ours.corpus, data=settings.data),
        training=replace(ours.training, steps=settings.steps, save_every=max(1, settings.steps // 3)),
    )
