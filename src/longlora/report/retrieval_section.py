"""Passkeys, topics and lines found: a picture for each model, all on one scale, and what each was asked."""

from collections.abc import Sequence
from typing import Any

from longlora.evaluation.statistics import Estimate, share
from longlora.report import wording
from longlora.report.charts import WIDTHS
from longlora.report.heat_map import heat_map, scale
from longlora.report.reading import Content, Evaluated
from longlora.report.ways import alike, difference, in_words, way_of
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

Asked = tuple[Evaluated, Retrieval]


def retrieval(models: Sequence[Evaluated]) -> Content | None:
    """Every task that any of `models` was asked, the models that were asked the same together."""
    tasks = []
    for task in RETRIEVALS:
        asked = [(model, model.retrievals[task]) for model in models if task in model.retrievals]
        if asked:
            groups = alike(asked, lambda each: way_of(each[1]))
            tasks.append(
                {
                    "title": TITLES[task],
                    "explained": EXPLAINED[task],
                    "groups": [_group(task, group, groups[0]) for group in groups],
                }
            )
    return {"tasks": tasks, "scale": scale(WIDTHS["narrow"])} if tasks else None


def found_at(retrieval: Retrieval, context: int) -> Estimate | None:
    """Share found over all prompts of `context`, with Wilson's interval; None where none was asked."""
    cells = [cell for cell in retrieval.results if cell.context == context]
    trials = sum(cell.trials for cell in cells)
    return share(sum((cell.accuracy or 0) * cell.trials for cell in cells) / trials, trials) if trials else None


def _group(task: str, group: Sequence[Asked], first: Sequence[Asked]) -> dict[str, Any]:
    draw = _by_depth if task == "passkey" else _by_number
    way, usual = way_of(group[0][1]), way_of(first[0][1])
    return {
        "panels": draw(task, group),
        "totals": _totals(task, group),
        "way": in_words(way),
        "lengths": _lengths(task, group),
        "apart": difference(way, usual) if group is not first else "",
        "skipped": [
            f"{model.name}: {count:,} of {_asked(found) + count:,} prompts do not fit with their answers"
            for model, found in group
            if (count := sum(cell.skipped for cell in found.results))
        ],
        "seconds": wording.listed(
            [f"{wording.duration(found.seconds)} for {model.name}" for model, found in group if found.seconds]
        ),
    }


def in_percent(found: Estimate) -> str:
    """
    >>> in_percent(share(0.8, 15))
    '80% (55 to 93)'
    """
    ends = "" if found.low is None or found.high is None else f" ({100 * found.low:.0f} to {100 * found.high:.0f})"
    return wording.percent(found.value) + ends


def _totals(task: str, group: Sequence[Asked]) -> dict[str, Any]:
    """For each model the share found at each length over all depths, with its interval."""
    if task == "passkey":
        columns = sorted({cell.context for _, found in group for cell in found.results})
        rows = [(model.name, [found_at(found, context) for context in columns]) for model, found in group]
        return {"heading": "context, tokens", "columns": columns, "rows": rows}
    columns = sorted({cell.number for _, found in group for cell in found.results if cell.number})
    by_number = [(model.name, {cell.number: cell for cell in found.results}) for model, found in group]
    rows = [(name, [_estimate(cells.get(number)) for number in columns]) for name, cells in by_number]
    return {"heading": OF[task], "columns": columns, "rows": rows}


def _estimate(cell: Answered | None) -> Estimate | None:
    return None if cell is None or cell.accuracy is None else share(cell.accuracy, cell.trials)


def _asked(found: Retrieval) -> int:
    return sum(cell.trials for cell in found.results)


def _by_depth(task: str, group: Sequence[Asked]) -> list[dict[str, str]]:
    """A picture a model: contexts across, depths down, the same for all."""
    contexts = sorted({cell.context for _, found in group for cell in found.results})
    depths = sorted({cell.depth for _, found in group for cell in found.results if cell.depth is not None})
    panels = []
    for model, found in group:
        cells = {(cell.context, cell.depth): cell for cell in found.results}
        rows: list[tuple[str, list[float | str | None]]] = [
            (f"{depth:.0%}", [_shade(cells.get((context, depth))) for context in contexts]) for depth in depths
        ]
        if any(cell.depth is None for cell in found.results):
            rows.append(("any", [_shade(cells.get((context, None))) for context in contexts]))
        means = [found_at(found, context) for context in contexts]
        if len(depths) > 1:
            rows.append(("all", [mean and mean.value for mean in means]))
        said = ", ".join(
            f"{in_percent(mean)} at {context:,}"
            for context, mean in zip(contexts, means, strict=True)
            if mean is not None
        )
        panels.append(
            {
                "name": model.name,
                "svg": heat_map(
                    contexts,
                    rows,
                    width=WIDTHS["narrow"],
                    column_title="context, tokens",
                    row_title="depth",
                    description=f"{TITLES[task]} by {model.name}: {said or 'nothing was asked'}.",
                ),
            }
        )
    return panels


def _by_number(task: str, group: Sequence[Asked]) -> list[dict[str, str]]:
    """One picture: the number of topics or lines across, a row a model."""
    numbers = sorted({cell.number for _, found in group for cell in found.results if cell.number is not None})
    rows = []
    said = []
    for model, found in group:
        cells = {cell.number: cell for cell in found.results}
        rows.append((model.name, [_shade(cells.get(number)) for number in numbers]))
        shares = [
            f"{wording.percent(cell.accuracy)} of {number:,}"
            for number in numbers
            if (cell := cells.get(number)) and cell.accuracy is not None
        ]
        said.append(f"{model.name}: {', '.join(shares) or 'nothing was asked'}")
    picture = heat_map(
        numbers,
        rows,
        width=WIDTHS["narrow"],
        column_title=OF[task],
        row_title="model",
        description=f"{TITLES[task]}. {'; '.join(said)}.",
    )
    return [{"name": "", "svg": picture}]


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


def _shade(cell: Answered | None) -> float | str | None:
    if cell is None:
        return None
    return "does not fit" if cell.accuracy is None and cell.skipped else cell.accuracy
