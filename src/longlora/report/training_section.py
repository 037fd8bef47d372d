"""How the training went: loss and learning rate, and what trained."""

import math
from collections.abc import Sequence

from scipy.ndimage import uniform_filter1d

from longlora.report import wording
from longlora.report.axes import Axis, drawable, linear_axis, measured_axis, step_axis
from longlora.report.charts import Line, Point, at_both_widths, line_chart
from longlora.report.reading import Content, Recorded, at
from longlora.results import number, whole

_PARTS = {"lora": "LoRA", "full": "weights", "norm": "norms", "embed": "embeddings", "bias": "biases"}
"""Groups of parameters and their names here, in the order of the optimiser: metrics.jsonl has the first one's rate."""

_MOST_POINTS = 400

Recording = tuple[int, float]
"""A step and what was recorded there."""


def training(run: Recorded) -> Content:
    """Loss, held-out loss and learning rate over the steps."""

    def column(name: str) -> list[Recording]:
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
    rates = _rates(run)
    first_rate = next(iter(rates.values()), None)
    every_step = [step for step, _ in loss + held_out + rate]
    x = step_axis("step", min(every_step), max(every_step))
    return {
        "chart": _loss_chart(x, loss, held_out),
        "rate_chart": _rate_chart(x, rate) if len(rate) > 1 else None,
        "smoothed": bool(_smoothed(loss)),
        "held_out": bool(held_out),
        "lost": lost,
        "rows": [
            (step, dict(loss).get(step), dict(held_out).get(step), dict(rate).get(step))
            for step, _ in _some(loss or held_out, 8)
        ],
        "other_rates": {_PARTS.get(name, name): value for name, value in rates.items() if value != first_rate},
    }


def _loss_chart(x: Axis, loss: Sequence[Recording], held_out: Sequence[Recording]) -> dict[str, str]:
    y = measured_axis("loss, nats a token", [value for _, value in [*loss, *held_out]])
    smooth = _smoothed(loss)
    lines = [
        _curve(_some(loss, _MOST_POINTS), "tone-0", "faint" if smooth else "strong"),
        _curve(_some(smooth, _MOST_POINTS), "tone-0", "strong"),
        _curve(held_out, "tone-2", "", dots=True, name="held-out text, step"),
    ]
    description = f"Training loss over {len(loss)} recorded steps."
    if loss:
        (first, before), (last, after) = loss[0], loss[-1]
        description += f" From {wording.plain(before)} at step {first} to {wording.plain(after)} at step {last}."
    return at_both_widths(lambda width: line_chart(lines, x, y, width=width, height=260, description=description))


def _rate_chart(x: Axis, rate: Sequence[Recording]) -> dict[str, str]:
    highest = max(value for _, value in rate)
    y = linear_axis("learning rate", 0, highest, ticks=2)
    lines = [_curve(_some(rate, _MOST_POINTS), "tone-3", "")]
    description = f"Learning rate, at most {wording.plain(highest)}."
    return at_both_widths(lambda width: line_chart(lines, x, y, width=width, height=130, description=description))


def _some(points: Sequence[Recording], most: int) -> list[Recording]:
    """At most `most` of the points, evenly, the first and the last among them."""
    count = min(most, len(points))
    return [points[round(index * (len(points) - 1) / max(count - 1, 1))] for index in range(count)]


def _curve(points: Sequence[Recording], tone: str, style: str, dots: bool = False, name: str = "step") -> Line:
    run = [Point(step, value, f"{name} {wording.whole(step)}: {wording.plain(value)}") for step, value in points]
    return Line(tone=tone, runs=[run] if run else [], style=style, dots=dots)


def _smoothed(points: Sequence[Recording]) -> list[Recording]:
    """Centred mean over a thirtieth of the points to each side; nothing where there are too few to smooth."""
    reach = len(points) // 30
    if not reach:
        return []
    means = uniform_filter1d([value for _, value in points], 2 * reach + 1, mode="nearest").tolist()
    return [(step, mean) for (step, _), mean in zip(points, means, strict=True)]


def _rates(run: Recorded) -> dict[str, float]:
    """Peak learning rate of each group that trained, the first of them the one that metrics.jsonl follows."""
    general = number(run.settings.get("lr"))
    own = {"norm": number(run.settings.get("norm_lr")), "embed": number(run.settings.get("embed_lr"))}
    found = {name: own.get(name) or general for name in _groups(run)}
    return {name: rate for name, rate in found.items() if rate}


def _groups(run: Recorded) -> dict[str, int]:
    """Parameters of each group that trained, in the optimiser's order."""
    groups = at(run.summary, "trainable", "groups")
    counts = {name: whole(value) for name, value in groups.items()} if isinstance(groups, dict) else {}
    order = [*_PARTS, *counts]
    return {name: count for name, count in sorted(counts.items(), key=lambda item: order.index(item[0])) if count}


def trainable(run: Recorded) -> Content:
    """Trained parameters by group, beside those that stayed."""
    counts = _groups(run)
    total, trained = run.whole("trainable", "parameters"), sum(counts.values())
    if not counts or not total or trained > total:
        return "What trained: the run has no summary of its parameters."
    return {
        "rows": [(_PARTS.get(name, name), count, _rates(run).get(name)) for name, count in counts.items()],
        "total": total,
        "trained": trained,
        "frozen": total - trained,
        "rates": bool(_rates(run)),
    }
