"""RULER, what is lost at short length, and LongPPL: a table for the models that were measured in the same way."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from longlora.report import wording
from longlora.report.models import Kind, Model
from longlora.report.reading import Content
from longlora.report.ways import Group, grouped
from longlora.results import Change, LongPPL, Ruler, Short


def effective_length(found: Ruler) -> str:
    """In tokens, or below which context it lies; of how many tasks, where those are not all of the paper's thirteen."""
    tasks = len({cell.task for cell in found.results})
    of = "" if tasks >= 13 else f", of {tasks} tasks"
    if found.effective_length:
        return wording.whole(found.effective_length) + of
    shortest = min((average.context for average in found.averages), default=None)
    return f"below {shortest:,}{of}" if shortest else "–"


def counted(row: Change) -> str:
    return f"{row.samples or row.tokens:,} {'samples' if row.task else 'tokens'}"


def named(row: Change) -> str:
    """What was measured, in words."""
    return f"{row.task}, {row.metric or '–'}" if row.task else f"perplexity at {row.context or 0:,}"


def is_good(row: Change) -> bool | None:
    """None where nothing changed, or no change is shown."""
    return True if row.verdict.startswith("improved") else False if row.verdict.startswith("regressed") else None


def _ruler_group(group: Group[Ruler]) -> dict[str, Any]:
    contexts = sorted({cell.context for _, found in group for cell in found.results})
    tasks = list(dict.fromkeys(cell.task for _, found in group for cell in found.results))
    left_out = (
        f"{each.task}{f' at {each.context:,}' if each.context else ''}: {each.reason}"
        for _, found in group
        for each in found.left_out
    )
    return {
        "contexts": contexts,
        "rows": [
            {
                "name": model.name,
                "averages": [{each.context: each for each in found.averages}.get(context) for context in contexts],
                "length": effective_length(found),
            }
            for model, found in group
        ],
        "threshold": group[0][1].threshold,
        "tasks": [
            {
                "name": task,
                "rows": [
                    {
                        "name": model.name,
                        "shares": [
                            {(each.context, each.task): each for each in found.results}.get((context, task))
                            for context in contexts
                        ],
                    }
                    for model, found in group
                ],
            }
            for task in tasks
        ],
        "skipped": [
            f"{model.name}: {skipped:,} prompts did not fit"
            for model, found in group
            if (skipped := sum(cell.skipped for cell in found.results))
        ],
        "left_out": list(dict.fromkeys(left_out)),
    }


def _short_group(group: Group[Short]) -> dict[str, Any]:
    return {
        "baseline": group[0][1].baseline or "–",
        "models": [
            {
                "name": model.name,
                "rows": [
                    {"row": row, "what": named(row), "counted": counted(row), "good": is_good(row)}
                    for row in (*found.results, *found.tasks)
                ],
            }
            for model, found in group
        ],
    }


def _longppl_group(group: Group[LongPPL]) -> dict[str, Any]:
    rows = [(model.name, found.results[0]) for model, found in group]
    own = group[0][1].evaluator is None
    values = [row.longppl for _, row in rows if row.longppl]
    best = min(values) if len(values) > 1 and not own else math.nan
    return {
        "rows": [
            {
                "name": name,
                "row": row,
                "longppl": row.longppl or None,
                "best": row.longppl == best,
                "perplexity": row.perplexity if row.perplexity > 0 else math.nan,
                "share": row.key_tokens / row.tokens,
            }
            for name, row in rows
        ],
        "own": own,
    }


def _section(
    kind: type[Kind], draw: Callable[[Group[Kind]], dict[str, Any]]
) -> Callable[[Sequence[Model]], Content | None]:
    """What `draw` makes of each group of models that were measured alike in that kind of result."""

    def section(models: Sequence[Model]) -> Content | None:
        done = [(model, found) for model in models if (found := model.of(kind))]
        return {"groups": grouped(done, draw)} if done else None

    return section


ruler, short, longppl = _section(Ruler, _ruler_group), _section(Short, _short_group), _section(LongPPL, _longppl_group)
