"""Perplexity against context: the chart, the table beside it, and what must be known to compare the rows."""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from longlora.report import wording
from longlora.report.axes import LOGARITHMIC_FROM, Axis, context_axis, drawable, linear_axis, measured_axis
from longlora.report.changes import same_text
from longlora.report.charts import LINE_HEIGHT, WIDTHS, Line, Point, at_both_widths, line_chart
from longlora.report.reading import Content, Recorded
from longlora.report.ways import joined
from longlora.results import Measured, Perplexities

Mark = tuple[float, str]
"""A context and what it is: a vertical line in the chart."""

CLOSE_UP = 1.35
"""The close-up shows perplexities up to this many times the best of the lines drawn strong."""

_TONES = 8


def perplexity(run: Recorded) -> Content:
    """A line and a row for each `evaluation/perplexity-*.json`."""
    measured = [each for each in run.perplexities if each.results]
    if not measured:
        return "Perplexity: nothing was measured in this run (longlora eval perplexity measures any model)."
    return drawn(measured, _tones(measured), frozenset({"trained"}), _windows(run))


def drawn(
    measured: Sequence[Perplexities], tones: Mapping[str, str], strong: Collection[str], marks: Sequence[Mark]
) -> dict[str, Any]:
    """What the templates' macro `measured` draws: charts and a table.

    Args:
        measured: lines, each with a name of its own and results.
        tones: the colour of each, by name.
        strong: names of the lines that the page is about.
        marks: contexts with a name.
    """
    contexts = sorted({result.context for each in measured for result in each.results})
    table = [
        {"label": each.label, "tone": tones[each.name], "cells": [each.at(context) for context in contexts]}
        for each in measured
    ]
    best = []
    for context in contexts:
        found = [result for each in measured if (result := each.at(context))]
        values = [result.perplexity for result in found if math.isfinite(result.perplexity)]
        alike = len(found) > 1 and all(same_text(found[0], result) for result in found)
        best.append(min(values, default=None) if alike else None)
    undrawn = [
        f"{each.label} at {wording.whole(result.context)} tokens"
        for each in measured
        for result in each.results
        if not drawable(result.perplexity)
    ]
    return {
        "charts": _charts(measured, tones, strong, marks),
        "contexts": contexts,
        "rows": table,
        "best": best,
        "undrawn": undrawn,
        "methods": sorted({(joined(each.data), _strides(each), each.score) for each in measured}),
        "documents": [_common(measured, context, "documents") for context in contexts],
        "tokens": [_common(measured, context, "tokens") for context in contexts],
        "comparable": _comparable(measured, contexts),
        "same_text": all(len(_joined(each.results)) <= 1 for each in measured),
        "intervals": any(result.low is not None for each in measured for result in each.results),
    }


def _tones(measured: Sequence[Perplexities]) -> dict[str, str]:
    """The trained model in the page's own colour, the base model in grey, the others in turn, then dashed."""
    fixed = {"trained": "tone-0", "base": "tone-1"}
    others = [each.name for each in measured if each.name not in fixed]
    colours = _TONES - len(fixed)
    return fixed | {
        name: f"tone-{len(fixed) + index % colours}{' dashed' if index >= colours else ''}"
        for index, name in enumerate(others)
    }


def _charts(
    measured: Sequence[Perplexities], tones: Mapping[str, str], strong: Collection[str], marks: Sequence[Mark]
) -> list[dict[str, str]]:
    """All lines at once; and where one of them dwarfs the rest, a close-up of those around the strong ones."""
    values = [r.perplexity for each in measured for r in each.results if drawable(r.perplexity)]
    if not values:
        return []

    def chart(y: Axis, height: int) -> dict[str, str]:
        return _chart(measured, tones, strong, marks, y, height)

    charts = [chart(measured_axis("perplexity, lower is better", values), 320)]
    own = [r.perplexity for each in measured if each.name in strong for r in each.results if drawable(r.perplexity)]
    near = _near(own, values)
    if near:
        charts.append(chart(linear_axis("the same, close up", min(near), max(near)), 280))
    return charts


def _near(own: Sequence[float], values: Sequence[float]) -> list[float]:
    """The perplexities worth a chart of their own: up to `CLOSE_UP` times the best of `own`; mostly none."""
    if not own or max(values) <= LOGARITHMIC_FROM * min(values) or max(own) > CLOSE_UP * min(own):
        return []
    near = [value for value in values if value <= CLOSE_UP * min(own)]
    return near if max(near) <= LOGARITHMIC_FROM * min(near) else []


def _chart(
    measured: Sequence[Perplexities],
    tones: Mapping[str, str],
    strong: Collection[str],
    marks: Sequence[Mark],
    y: Axis,
    height: int,
) -> dict[str, str]:
    contexts = [r.context for each in measured for r in each.results if drawable(r.perplexity)]
    x = context_axis("context, tokens (doubling)", contexts)
    marks = [(window, name) for window, name in marks if min(contexts) <= window <= max(contexts)]
    description = f"{y.title.capitalize()}, against context length. " + " ".join(
        f"{each.label}: {', '.join(f'{_value(r)} at {wording.whole(r.context)}' for r in each.results)}."
        for each in measured
    )

    def line(each: Perplexities, width: int) -> Line:
        runs = [
            [Point(r.context, r.perplexity, _note(each, r), r.low, r.high) for r in part]
            for part in _unbroken(each.results)
        ]
        value = wording.perplexity(runs[-1][-1].y) if runs else ""
        label = f"{value} {each.label}" if width > WIDTHS["narrow"] else value
        return Line(tones[each.name], runs, label, style="strong" if each.name in strong else "", dots=True)

    def draw(width: int) -> str:
        lines = [line(each, width) for each in measured]
        room = max(height, LINE_HEIGHT * len(lines) + 120)
        return line_chart(lines, x, y, width=width, height=room, description=description, marks=marks)

    return at_both_widths(draw)


def _note(each: Perplexities, result: Measured) -> str:
    spread = "" if result.low is None or result.high is None else f" ({result.low:.4g} to {result.high:.4g})"
    return f"{each.label}, {wording.whole(result.context)} tokens: {_value(result)}{spread}"


def _windows(run: Recorded) -> list[Mark]:
    original, previous = run.whole("positions", "original_context"), run.whole("positions", "previous_context")
    named = [(float(original), "base model’s window")] if original else []
    return named + ([(float(previous), "window before this run")] if previous and previous != original else [])


def _unbroken(results: Sequence[Measured]) -> list[list[Measured]]:
    """Runs of neighbours that a line may join: all of one text, and each with a place in the chart."""
    runs: list[list[Measured]] = []
    for text in _joined(results):
        runs.append([])
        for result in text:
            if drawable(result.perplexity):
                runs[-1].append(result)
            elif runs[-1]:
                runs.append([])
    return [run for run in runs if run]


def _joined(results: Sequence[Measured]) -> list[list[Measured]]:
    """Runs of neighbours that were measured on the same text."""
    runs: list[list[Measured]] = []
    for result in results:
        if runs and same_text(runs[-1][-1], result):
            runs[-1].append(result)
        else:
            runs.append([result])
    return runs


def _strides(each: Perplexities) -> str:
    """Tokens that windows slide by: one number, or one a context."""
    known = {result.stride or each.stride for result in each.results} - {None}
    if len(known) == 1:
        return f"{wording.whole(known.pop() or 0)} tokens"
    own = [f"{wording.whole(r.stride)} at {wording.whole(r.context)}" for r in each.results if r.stride]
    return wording.listed(own)


def _value(result: Measured) -> str:
    return wording.perplexity(result.perplexity)


def _common(measured: Sequence[Perplexities], context: int, field: str) -> str:
    """Documents or tokens at a context: one number where the models agree, else the least and the most."""
    counts = {getattr(r, field) for each in measured if (r := each.at(context))} - {None}
    if not counts:
        return "–"
    least, most = min(counts), max(counts)
    return wording.whole(least) if least == most else f"{wording.whole(least)}–{wording.whole(most)}"


def _comparable(measured: Sequence[Perplexities], contexts: Sequence[int]) -> bool:
    """Whether the rows were measured in the same way on the same amount of the same text."""
    ways = {(each.data, each.stride, each.score) for each in measured}
    found = [[r for each in measured if (r := each.at(context))] for context in contexts]
    amounts = [{r.tokens for r in results if r.tokens} for results in found]
    texts = all(same_text(results[0], r) for results in found for r in results)
    return len(ways) == 1 and texts and all(len(amount) <= 1 for amount in amounts)
