"""Perplexity against context: the chart, the table beside it, and what must be known to compare the rows."""

import math
from collections.abc import Sequence
from typing import Any

from longlora.report import wording
from longlora.report.axes import context_axis, drawable, measured_axis
from longlora.report.charts import Line, Point, at_both_widths, line_chart
from longlora.report.reading import Content, Measured, PerplexityOf, Recorded

_TONES = 8


def perplexity(run: Recorded) -> Content:
    """A line and a row for each `evaluation/perplexity-*.json`."""
    measured = [each for each in run.perplexities if each.results]
    if not measured:
        return "Perplexity: nothing was measured in this run (longlora eval perplexity measures any model)."
    contexts = sorted({result.context for each in measured for result in each.results})
    tones = _tones(measured)
    table = []
    for each in measured:
        cells = [each.at(context) for context in contexts]
        table.append({"label": each.label, "tone": tones[each.name], "cells": cells, "file": f"{each.name}.json"})
    best = []
    for context in contexts:
        values = [result.perplexity for each in measured if (result := each.at(context))]
        best.append(min((value for value in values if math.isfinite(value)), default=None) if len(values) > 1 else None)
    undrawn = [
        f"{each.label} at {wording.whole(result.context)} tokens"
        for each in measured
        for result in each.results
        if not drawable(result.perplexity)
    ]
    return {
        "chart": _perplexity_chart(run, measured, tones),
        "contexts": contexts,
        "rows": table,
        "best": best,
        "undrawn": undrawn,
        "methods": sorted({(each.data, each.stride or 0, each.score) for each in measured}),
        "documents": [_common(measured, context, "documents") for context in contexts],
        "tokens": [_common(measured, context, "tokens") for context in contexts],
        "comparable": _comparable(measured, contexts),
        "same_text": all(len({r.documents for r in each.results} | {None}) <= 2 for each in measured),
    }


def _tones(measured: Sequence[PerplexityOf]) -> dict[str, str]:
    """The trained model in the page's own colour, the base model in grey, the others in turn."""
    fixed = {"trained": "tone-0", "base": "tone-1"}
    others = [each.name for each in measured if each.name not in fixed]
    return fixed | {name: f"tone-{2 + index % (_TONES - 2)}" for index, name in enumerate(others)}


def _perplexity_chart(run: Recorded, measured: Sequence[PerplexityOf], tones: dict[str, str]) -> dict[str, str] | None:
    drawn = [(each, [r for r in each.results if drawable(r.perplexity)]) for each in measured]
    values = [result.perplexity for _, results in drawn for result in results]
    if not values:
        return None
    marks = [
        (float(window), name)
        for window, name in _windows(run)
        if min(r.context for _, rs in drawn for r in rs) <= window <= max(r.context for _, rs in drawn for r in rs)
    ]
    x = context_axis("context, tokens (doubling)", [result.context for _, results in drawn for result in results])
    y = measured_axis("perplexity, lower is better", values)
    description = "Perplexity against context length. " + " ".join(
        f"{each.label}: {', '.join(f'{_value(r)} at {wording.whole(r.context)}' for r in each.results)}."
        for each in measured
    )

    def draw(width: int) -> str:
        lines = [
            Line(
                tone=tones[each.name],
                runs=[
                    [
                        Point(r.context, r.perplexity, f"{each.label}, {wording.whole(r.context)} tokens: {_value(r)}")
                        for r in run
                    ]
                    for run in _unbroken(each.results)
                ],
                label=f"{_value(results[-1])} {each.label}" if width > 500 else _value(results[-1]),
                style="strong" if each.name == "trained" else "",
                dots=True,
            )
            for each, results in drawn
            if results
        ]
        height = max(340 if width > 500 else 300, 16 * len(lines) + 120)
        return line_chart(lines, x, y, width=width, height=height, description=description, marks=marks)

    return at_both_widths(draw)


def _windows(run: Recorded) -> list[tuple[int, str]]:
    original, previous = run.whole("positions", "original_context"), run.whole("positions", "previous_context")
    named = [(original, "base model’s window")] if original else []
    return named + ([(previous, "window before this run")] if previous and previous != original else [])


def _unbroken(results: Sequence[Measured]) -> list[list[Measured]]:
    """Runs of neighbours that can be drawn; a value that cannot breaks the line."""
    runs: list[list[Measured]] = [[]]
    for result in results:
        if drawable(result.perplexity):
            runs[-1].append(result)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _value(result: Measured) -> str:
    return wording.perplexity(result.perplexity)


def _common(measured: Sequence[PerplexityOf], context: int, field: str) -> str:
    """Documents or tokens at a context: one number where the models agree, else the least and the most."""
    counts = {getattr(r, field) for each in measured if (r := each.at(context))} - {None}
    if not counts:
        return "–"
    least, most = min(counts), max(counts)
    return wording.whole(least) if least == most else f"{wording.whole(least)}–{wording.whole(most)}"


def _comparable(measured: Sequence[PerplexityOf], contexts: Sequence[int]) -> bool:
    """Whether the rows were measured in the same way on the same amount of the same text."""
    ways = {(each.data, each.stride, each.score) for each in measured}
    amounts = [{r.tokens for each in measured if (r := each.at(c)) and r.tokens} for c in contexts]
    return len(ways) == 1 and all(len(amount) <= 1 for amount in amounts)
