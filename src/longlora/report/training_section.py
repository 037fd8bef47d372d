"""How the training went and what it took: loss and learning rate, what trained, time and memory."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from longlora.report import wording
from longlora.report.axes import drawable, linear_axis, measured_axis, step_axis
from longlora.report.charts import Bar, Bars, Line, Point, Share, at_both_widths, bar_chart, line_chart, share_chart
from longlora.report.reading import Content, Recorded, at, number, rows, whole

_PARTS = {"lora": "LoRA", "norm": "norms", "embed": "embeddings", "full": "weights", "bias": "biases"}
_MOST_POINTS = 400


def training(run: Recorded) -> Content:
    """Loss, held-out loss and learning rate over the steps."""

    def column(name: str) -> list[tuple[int, float]]:
        found = {
            step: value
            for record in run.metrics
            if (step := whole(record.get("step"))) and (value := number(record.get(name))) is not None
        }
        return sorted(found.items())

    loss, held_out = (
        [(step, value) for step, value in column(name) if drawable(value)] for name in ("loss", "eval_loss")
    )
    rate = column("learning_rate")
    lost = sum("loss" in record and not drawable(number(record["loss"]) or math.nan) for record in run.metrics)
    if not loss and not held_out:
        why = f"none of the {lost} recorded losses is a number" if lost else "no step was recorded"
        return f"Loss curve: {why} in metrics.jsonl."
    points = loss + held_out
    steps = [step for step, _ in points + rate]
    x = step_axis("step", min(steps), max(steps))
    y = measured_axis("loss, nats a token", [value for _, value in points])
    smooth = _smoothed(loss)
    raw = _thinned(loss)

    def draw(width: int) -> str:
        lines = [
            _curve(raw, "tone-0", "faint" if smooth else "strong"),
            _curve(_thinned(smooth), "tone-0", "strong"),
            _curve(held_out, "tone-2", "", dots=True, name="held-out text, step"),
        ]
        description = f"Training loss over {len(loss)} recorded steps." + (
            f" From {wording.plain(loss[0][1])} at step {loss[0][0]} to {wording.plain(loss[-1][1])} at step {loss[-1][0]}."
            if loss
            else ""
        )
        return line_chart([line for line in lines if line.runs], x, y, width=width, height=260, description=description)

    def draw_rate(width: int) -> str:
        highest = max(value for _, value in rate)
        axis = linear_axis("learning rate", 0, highest or 1e-5, ticks=2)
        description = f"Learning rate, at most {wording.plain(highest)}."
        return line_chart(
            [_curve(_thinned(rate), "tone-3", "")], x, axis, width=width, height=130, description=description
        )

    shown = loss or held_out
    some = [
        shown[round(index * (len(shown) - 1) / min(7, max(len(shown) - 1, 1)))] for index in range(min(8, len(shown)))
    ]
    held_at, rate_at = dict(held_out), dict(rate)
    return {
        "chart": at_both_widths(draw),
        "rate_chart": at_both_widths(draw_rate) if len(rate) > 1 else None,
        "smoothed": bool(smooth),
        "held_out": bool(held_out),
        "lost": lost,
        "rows": [(step, dict(loss).get(step), held_at.get(step), rate_at.get(step)) for step, _ in some],
        "rates": _rates(run),
    }


def _curve(points: Sequence[tuple[int, float]], tone: str, style: str, dots: bool = False, name: str = "step") -> Line:
    run = [Point(step, value, f"{name} {wording.whole(step)}: {wording.plain(value)}") for step, value in points]
    return Line(tone=tone, runs=[run] if run else [], style=style, dots=dots)


def _smoothed(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Centred mean over a thirtieth of the points to each side; nothing where there are too few to smooth."""
    reach = len(points) // 30
    if not reach:
        return []
    values = [value for _, value in points]
    windows = ((index, values[max(0, index - reach) : index + reach + 1]) for index in range(len(points)))
    return [(points[index][0], sum(window) / len(window)) for index, window in windows]


def _thinned(points: Sequence[tuple[int, float]]) -> Sequence[tuple[int, float]]:
    """At most about `_MOST_POINTS` of the points, evenly, the last among them."""
    stride = math.ceil(len(points) / _MOST_POINTS) or 1
    return points if stride == 1 else [*points[:-1:stride], points[-1]]


def _rates(run: Recorded) -> dict[str, float]:
    """Peak learning rate of each group that trained."""
    general = number(run.settings.get("lr"))
    own = {"norm": number(run.settings.get("norm_lr")), "embed": number(run.settings.get("embed_lr"))}
    found = {name: own.get(name) or general for name in at(run.summary, "trainable", "groups") or {}}
    return {name: rate for name, rate in found.items() if rate}


def trainable(run: Recorded) -> Content:
    """Trained parameters by group, beside those that stayed."""
    groups = at(run.summary, "trainable", "groups")
    counts = (
        {name: count for name, value in groups.items() if (count := whole(value))} if isinstance(groups, dict) else {}
    )
    total, trained = run.whole("trainable", "parameters"), sum(counts.values())
    if not counts or not total or trained > total:
        return "What trained: the run has no summary of its parameters."
    frozen = total - trained
    rates = _rates(run)
    parts = [
        Share(_PARTS.get(name, name), f"tone-{index}", count) for index, (name, count) in enumerate(counts.items())
    ]
    rest = Share(f"frozen {wording.percent(frozen / total)}", "tone-1", frozen)
    description = f"{wording.percent(trained / total)} of the parameters trained: " + ", ".join(
        f"{part.label} {wording.whole(part.value)}" for part in parts
    )
    return {
        "chart": at_both_widths(lambda width: share_chart(parts, rest, width=width, description=description)),
        "rows": [(part, part.value / total, rates.get(name)) for part, name in zip(parts, counts, strict=True)],
        "total": total,
        "trained": trained,
        "frozen": frozen,
        "rates": bool(rates),
    }


def cost(run: Recorded) -> Content:
    """Time and memory of the pattern against full attention, and what the training took."""
    measured = []
    for row in rows(run.costs.get("rows")):
        values = {
            f"{kind}_{what}": number(at(row, kind, what))
            for kind in ("full", "s2")
            for what in ("seconds", "memory_bytes")
        }
        if (length := whole(row.get("length"))) and any(value is not None for value in values.values()):
            measured.append({"length": length, "group": whole(row.get("group_size")), **values})
    took = {name: run.number("training", name) for name in ("seconds", "tokens_per_second", "memory_bytes", "tokens")}
    if not measured and not any(took.values()):
        return "Cost: neither the training's time and memory nor those of S²-Attn against full attention were recorded."
    charts = [
        (
            title,
            at_both_widths(
                lambda width, what=what, words=words, title=title: _cost_chart(measured, what, words, title, width)
            ),
        )
        for title, what, words in (
            ("Time", "seconds", wording.duration),
            ("Peak memory", "memory_bytes", wording.memory),
        )
        if any(row[f"{kind}_{what}"] is not None for row in measured for kind in ("full", "s2"))
    ]
    facts = [str(run.costs[name]) for name in ("what", "hardware", "dtype") if run.costs.get(name)]
    return {"rows": measured, "charts": charts, "facts": facts, "took": took, "ratio": ratio}


def ratio(row: dict[str, Any], what: str) -> float | None:
    """S²-Attn's share of what full attention takes, or None where one of them is unknown."""
    ours, full = row[f"s2_{what}"], row[f"full_{what}"]
    return ours / full if ours is not None and full else None


def _cost_chart(
    measured: Sequence[dict[str, Any]], what: str, words: Callable[[float], str], title: str, width: int
) -> str:
    groups, said = [], []
    for row in measured:
        values = [
            (name, tone, row[f"{kind}_{what}"])
            for name, tone, kind in (("full", "tone-1", "full"), ("S²", "tone-0", "s2"))
        ]
        bars = [
            Bar(name, tone, value, words(value) if value is not None else "not measured")
            for name, tone, value in values
        ]
        share = ratio(row, what)
        heading = f"{wording.whole(row['length'])} tokens"
        groups.append(Bars(heading, bars, f"{share:.2f} of full" if share is not None else ""))
        said.append(f"{heading}: " + ", ".join(f"{bar.label} {bar.text}" for bar in bars))
    return bar_chart(groups, width=width, description=f"{title}. {'; '.join(said)}.")
