"""Passkeys, topics and lines found: tables with coloured squares, all on one scale, and what each model was asked."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from longlora.evaluation.statistics import Estimate, share
from longlora.report import wording
from longlora.report.models import Model
from longlora.report.reading import Content
from longlora.report.ways import grouped
from longlora.results import RETRIEVALS, Answered, Retrieval

TITLES = {
    "passkey": "Pass keys found",
    "topics": "First topics named",
    "lines": "Lines read out",
}

EXPLAINED = {
    "passkey": "A number is hidden in filler at some depth of the prompt (0% is its beginning) and asked for at the "
    "end; it counts when the answer begins with just that number.",
    "topics": "A long conversation goes through many topics; the model is asked which came first (LongEval).",
    "lines": "A prompt lists many named numbers; the model is asked for one of them (LongEval).",
}

OF = {"topics": "topics a prompt", "lines": "lines a prompt"}

Asked = tuple[Model, Retrieval]


def retrieval(models: Sequence[Model]) -> Content | None:
    """Every task that any of `models` was asked, the models that were asked the same together."""
    tasks = []
    for task in RETRIEVALS:
        asked = [(model, model.retrievals[task]) for model in models if task in model.retrievals]
        if asked:
            groups = grouped(asked, partial(_group, task))
            tasks.append({"title": TITLES[task], "explained": EXPLAINED[task], "groups": groups})
    return {"tasks": tasks} if tasks else None


def found_at(retrieval: Retrieval, context: int) -> Estimate | None:
    """Share found over all prompts of `context`, with Wilson's interval; None where none was asked."""
    cells = [cell for cell in retrieval.results if cell.context == context]
    trials = sum(cell.trials for cell in cells)
    return share(sum((cell.accuracy or 0) * cell.trials for cell in cells) / trials, trials) if trials else None


def _group(task: str, group: Sequence[Asked]) -> dict[str, Any]:
    draw = _by_depth if task == "passkey" else _by_number
    return {
        "panels": draw(task, group),
        "lengths": _lengths(task, group),
        "skipped": [
            f"{model.name}: {count:,} of {_asked(found) + count:,} prompts do not fit with their answers"
            for model, found in group
            if (count := sum(cell.skipped for cell in found.results))
        ],
    }


def in_percent(found: Estimate) -> str:
    """
    >>> in_percent(share(0.8, 15))
    '80% (55 to 93)'
    """
    ends = "" if found.low is None or found.high is None else f" ({100 * found.low:.0f} to {100 * found.high:.0f})"
    return wording.percent(found.value) + ends


def _asked(found: Retrieval) -> int:
    return sum(cell.trials for cell in found.results)


def _by_depth(task: str, group: Sequence[Asked]) -> list[dict[str, Any]]:
    """A table a model: contexts across, depths down, the same for all."""
    contexts = sorted({cell.context for _, found in group for cell in found.results})
    depths: list[float | None] = [
        *sorted({c.depth for _, found in group for c in found.results if c.depth is not None})
    ]
    panels = []
    for model, found in group:
        cells = {(cell.context, cell.depth): cell for cell in found.results}
        own = [*depths, *([None] if any(cell.depth is None for cell in found.results) else [])]
        rows: list[tuple[str, list[Estimate | str | None]]] = [
            ("any" if depth is None else f"{depth:.0%}", [_square(cells.get((context, depth))) for context in contexts])
            for depth in own
        ]
        if len(depths) > 1:
            rows.append(("all", [found_at(found, context) for context in contexts]))
        panels.append({"name": model.name, "across": "depth, by context", "columns": contexts, "rows": rows})
    return panels


def _by_number(task: str, group: Sequence[Asked]) -> list[dict[str, Any]]:
    """One table: the number of topics or lines across, a row a model."""
    numbers = sorted({cell.number for _, found in group for cell in found.results if cell.number is not None})
    by_number = [(model.name, {cell.number: cell for cell in found.results}) for model, found in group]
    rows = [(name, [_square(cells.get(number)) for number in numbers]) for name, cells in by_number]
    return [{"name": "", "across": OF[task], "columns": numbers, "rows": rows}]


def _lengths(task: str, group: Sequence[Asked]) -> str:
    """Mean tokens of a prompt, by the number of topics or lines."""
    if task == "passkey":
        return ""
    tokens: dict[int, set[int]] = {}
    for cell in (cell for _, found in group for cell in found.results if cell.number is not None):
        tokens.setdefault(cell.number or 0, set()).add(cell.context)
    said = [
        f"{number:,} {task} take {wording.spread(sorted(lengths))} tokens" for number, lengths in sorted(tokens.items())
    ]
    return f"Prompts with {wording.listed(said)} on average."


def _square(cell: Answered | None) -> Estimate | str | None:
    """A share with its interval; `×` for what does not fit; None where nothing was asked."""
    if cell is None or cell.accuracy is None:
        return "×" if cell and cell.skipped else None
    return share(cell.accuracy, cell.trials)
