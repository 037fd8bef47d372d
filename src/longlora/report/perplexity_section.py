"""Perplexity against context: what a run began with, that with stretched positions, its result; a chart and a table
for those that were measured in the same way.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from longlora.report import wording
from longlora.report.axes import LOGARITHMIC_FROM, Axis, context_axis, drawable, linear_axis, measured_axis
from longlora.report.changes import same_text
from longlora.report.charts import LINE_HEIGHT, WIDTHS, Line, Point, at_both_widths, line_chart
from longlora.report.models import Model, only_run
from longlora.report.reading import Content
from longlora.report.ways import difference
from longlora.results import Measured, Perplexities

Mark = tuple[float, str]
"""A context and what it is: a vertical line in the chart."""

CLOSE_UP = 1.35
"""The close-up shows perplexities up to this many times the best of the models that the page is about."""

TONES = (0, 2, 3, 4, 5, 6, 7)
BASE_TONE = "tone-1"


@dataclass(frozen=True)
class Curve:
    """One line of a chart."""

    measured: Perplexities
    """With a label of its own."""
    model: Model | None
    """Whose it is; None for what a run was measured beside, which several may share."""
    tone: str = BASE_TONE

    @property
    def is_compared(self) -> bool:
        """Whether it is of a model that the page is about, not of what they are compared with."""
        return self.model is not None and not self.model.is_baseline

    @property
    def is_base(self) -> bool:
        """Whether it is of what models were made from, as it was."""
        return self.model.is_baseline if self.model else self.measured.name == "base"

    @property
    def is_stretched(self) -> bool:
        """Whether it is of that with stretched positions, not trained."""
        return self.model is None and self.measured.name.startswith("untrained")


def perplexity(models: Sequence[Model]) -> Content | None:
    """The section's charts and tables."""
    found = _toned(curves(models))
    if not found:  # a fine-tuning is measured by its answers, and need not have any
        run = only_run(models)
        said = "Perplexity: nothing was measured in this run (longlora eval perplexity measures any model)."
        return said if run and not run.fine_tuned else None
    together, marks = groups(found), _windows(models)
    return {
        "groups": [
            {"drawn": _drawn(group, marks), "apart": "" if group is together[0] else _apart(group[0], together[0][0])}
            for group in together
        ]
    }


def curves(models: Sequence[Model]) -> list[Curve]:
    """Every perplexity that was measured, once."""
    found: list[Curve] = []
    for model in models:
        own = [_of_run(model, each) for each in model.run.perplexities if each.results] if model.run else []
        if measured := model.of(Perplexities):
            evaluated = Curve(replace(measured, label=model.name), model)
            own = [curve for curve in own if curve.model is None or not may_be_compared(curve, evaluated)] + [evaluated]
        found += [curve for curve in own if curve.model or curve not in found]
    return found


def groups(found: Sequence[Curve]) -> list[list[Curve]]:
    """Curves that may stand in one chart together, the chart with most models first."""
    together: list[list[Curve]] = []
    for curve in found:
        home = next((group for group in together if all(may_be_compared(curve, other) for other in group)), None)
        if home is None:
            together.append([curve])
        else:
            home.append(curve)
    return sorted(together, key=lambda group: -len({curve.model.path for curve in group if curve.model}))


def may_be_compared(one: Curve, other: Curve) -> bool:
    """Measured in the same way, on as many tokens of text of the same name (and content, where that is known)."""
    return _way(one, other) == _way(other, one) and bool(_common(one, other))


def _of_run(model: Model, measured: Perplexities) -> Curve:
    """A run's own `perplexity-NAME.json`: what it began with, that stretched, or its result."""
    assert model.run is not None
    if measured.name == "trained":
        return Curve(replace(measured, label=model.name), model)
    base = str(model.run.settings.get("model") or "the base model")
    said = "as it was" if measured.name == "base" else measured.label
    return Curve(replace(measured, label=f"{base}, {said}"), None)


def _toned(found: Sequence[Curve]) -> list[Curve]:
    """Each model in a colour of its own and then what else there is, what they began with in grey, stretched dashed."""

    def key(curve: Curve) -> str:
        return curve.model.path if curve.model else curve.measured.label

    coloured = sorted((curve for curve in found if not curve.is_base), key=lambda curve: not curve.is_compared)
    places = {name: place for place, name in enumerate(dict.fromkeys(map(key, coloured)))}
    tones = {name: f"tone-{TONES[place % len(TONES)]}" for name, place in places.items()}
    return [
        replace(curve, tone=tones.get(key(curve), BASE_TONE) + (" dashed" if curve.is_stretched else ""))
        for curve in found
    ]


def _common(one: Curve, other: Curve) -> list[int]:
    return [result.context for result in one.measured.results if other.measured.at(result.context)]


def _way(curve: Curve, other: Curve) -> dict[str, str]:
    """How `curve` was measured, as far as it matters beside `other`."""
    measured = curve.measured
    way = {"text": wording.joined(measured.data) or "–", "score": measured.score or "–"}
    if measured.data_fingerprint and other.measured.data_fingerprint:
        way["fingerprint"] = measured.data_fingerprint
    for context in _common(curve, other):
        result, beside = measured.at(context), other.measured.at(context)
        assert result is not None
        assert beside is not None
        if result.text and beside.text:
            way["fingerprint"] = way.get("fingerprint", "") + result.text
        stride = result.stride or measured.stride
        way[f"stride at {context:,}"] = wording.whole(stride) if stride else "–"
        way[f"tokens at {context:,}"] = wording.whole(result.tokens) if result.tokens else "–"
    return way


def _apart(curve: Curve, first: Curve) -> str:
    if not _common(curve, first):
        return "no context was measured of both"
    way, usual = _way(curve, first), _way(first, curve)
    names = [name for name in way if way[name] != usual[name]]
    # one context says it all where the others say the same
    kept = {name for kind in ("stride", "tokens") for name in [n for n in names if n.startswith(kind)][:1]}
    kept |= {name for name in names if " at " not in name}
    return difference({n: way[n] for n in way if n in kept}, {n: usual[n] for n in usual if n in kept})


def _windows(models: Sequence[Model]) -> list[Mark]:
    """The base model's window where all runs began with the same, and a run's own before it."""
    found = {
        (run.whole("positions", "original_context"), run.whole("positions", "previous_context"))
        for model in models
        if (run := model.run)
    }
    original, previous = found.pop() if len(found) == 1 else (None, None)
    named = [(float(original), "base model’s window")] if original else []
    return named + ([(float(previous), "window before this run")] if previous and previous != original else [])


def _drawn(group: Sequence[Curve], marks: Sequence[Mark]) -> dict[str, Any]:
    """What the template draws of curves that were measured alike: charts and a table."""
    measured = [curve.measured for curve in group]
    contexts = sorted({result.context for each in measured for result in each.results})
    at = {context: [found for each in measured if (found := each.at(context))] for context in contexts}
    return {
        "charts": _charts(group, marks),
        "contexts": contexts,
        "rows": [(curve, [curve.measured.at(context) for context in contexts]) for curve in group],
        "best": [_best(found) for found in at.values()],
        "undrawn": [
            f"{each.label} at {wording.whole(result.context)} tokens"
            for each in measured
            for result in each.results
            if not drawable(result.perplexity)
        ],
        "methods": sorted({(wording.joined(each.data), _strides(each), each.score) for each in measured}),
        "counts": {
            name: [_spread(getattr(result, field) for result in found) for found in at.values()]
            for name, field in (("documents", "documents"), ("tokens scored", "tokens"))
        },
        "same_text": all(len(_joined(each.results)) <= 1 for each in measured),
        "intervals": any(result.low is not None for each in measured for result in each.results),
    }


def _best(found: Sequence[Measured]) -> float | None:
    """The lowest perplexity of several on one text."""
    values = [result.perplexity for result in found if math.isfinite(result.perplexity)]
    alike = len(found) > 1 and all(same_text(found[0], result) for result in found)
    return min(values, default=None) if alike else None


def _charts(group: Sequence[Curve], marks: Sequence[Mark]) -> list[dict[str, str]]:
    """All curves at once; and where one of them dwarfs the rest, a close-up of those around the page's models."""

    def values(of: Sequence[Curve]) -> list[float]:
        return [r.perplexity for curve in of for r in curve.measured.results if drawable(r.perplexity)]

    every, own = values(group), values([curve for curve in group if curve.is_compared])
    if not every:
        return []
    charts = [_chart(group, marks, measured_axis("perplexity, lower is better", every), 320)]
    if own and max(every) > LOGARITHMIC_FROM * min(every) and max(own) <= CLOSE_UP * min(own):
        near = [value for value in every if value <= CLOSE_UP * min(own)]
        if max(near) <= LOGARITHMIC_FROM * min(near):
            charts.append(_chart(group, marks, linear_axis("the same, close up", min(near), max(near)), 280))
    return charts


def _chart(group: Sequence[Curve], marks: Sequence[Mark], y: Axis, height: int) -> dict[str, str]:
    contexts = [r.context for curve in group for r in curve.measured.results if drawable(r.perplexity)]
    x = context_axis("context, tokens (doubling)", contexts)
    marks = [(window, name) for window, name in marks if min(contexts) <= window <= max(contexts)]
    description = f"{y.title.capitalize()}, against context length. " + " ".join(
        f"{each.label}: {', '.join(f'{_value(r)} at {wording.whole(r.context)}' for r in each.results)}."
        for each in (curve.measured for curve in group)
    )

    def line(curve: Curve, width: int) -> Line:
        each = curve.measured
        runs = [
            [Point(r.context, r.perplexity, _note(each, r), r.low, r.high) for r in part]
            for part in _unbroken(each.results)
        ]
        value = wording.perplexity(runs[-1][-1].y) if runs else ""
        label = f"{value} {each.label}" if width > WIDTHS["narrow"] else value
        return Line(curve.tone, runs, label, style="strong" if curve.is_compared else "", dots=True)

    def draw(width: int) -> str:
        lines = [line(curve, width) for curve in group]
        room = max(height, LINE_HEIGHT * len(lines) + 120)
        return line_chart(lines, x, y, width=width, height=room, description=description, marks=marks)

    return at_both_widths(draw)


def _note(each: Perplexities, result: Measured) -> str:
    spread = "" if result.low is None or result.high is None else f" ({result.low:.4g} to {result.high:.4g})"
    return f"{each.label}, {wording.whole(result.context)} tokens: {_value(result)}{spread}"


def _unbroken(results: Sequence[Measured]) -> list[list[Measured]]:
    """Runs of neighbours that a line may join: all of one text, and each with a place in the chart."""
    return [
        list(run)
        for text in _joined(results)
        for has_a_place, run in itertools.groupby(text, lambda result: drawable(result.perplexity))
        if has_a_place
    ]


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


def _spread(counts: Iterable[int | None]) -> str:
    """One number where the models agree, else the least and the most."""
    known = [count for count in counts if count]
    return wording.spread(known) if known else "–"
