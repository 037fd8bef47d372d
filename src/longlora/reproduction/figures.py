"""Figures of the studies and tables as SVG files that stand by themselves, for documents and for a README."""

from collections.abc import Sequence
from typing import Any

from longlora.report.axes import Axis, linear_axis
from longlora.report.svg import text_width
from longlora.report.wording import plain
from longlora.reproduction.entries import Figure
from longlora.reproduction.plotting import (
    BOTTOM,
    FAINT,
    HEIGHT,
    INK,
    RIGHT,
    TONES,
    TOP,
    WIDTH,
    Line,
    Point,
    across,
    canvas,
    draw_lines,
    frame,
    percent,
    stacked,
    text,
    up,
    whole,
)

ROW_HEIGHT = 26


def trade_off(entries: Sequence[dict[str, Any]]) -> str:
    """Perplexity at the target context against the share of full attention's query-key pairs, with standard errors.

    Args:
        entries: as `longlora.reproduction.attention_study.summary` returns them.
    """
    target = list(entries[0]["perplexity"])[-1]
    found = [(entry, entry["perplexity"][target]) for entry in entries]
    low = min(point["mean"] - (point["error"] or 0) for _, point in found)
    high = max(point["mean"] + (point["error"] or 0) for _, point in found)
    x = linear_axis("query-key pairs, of full attention's", 0, 1, ticks=5)
    y = linear_axis(f"held-out perplexity at {int(target):,} tokens, tested with full attention", low, high)
    drawing = frame(x, y, f"{y.title}, against {x.title}.")
    places = [(across(x, entry["share"]), up(y, point["mean"])) for entry, point in found]
    taken = [(left - 6, left + 6, top) for left, top in places]
    for number, ((entry, point), (left, top)) in enumerate(zip(found, places, strict=True)):
        tone = TONES[number % len(TONES)]
        if point["error"]:
            ends = (up(y, point["mean"] - point["error"]), up(y, point["mean"] + point["error"]))
            drawing.add("path", d=f"M{left:.1f} {ends[0]:.1f}V{ends[1]:.1f}", stroke=tone, stroke_width=2)
        drawing.add("circle", f"{entry['label']}: {point['mean']:.3f}", cx=left, cy=top, r=4.5, fill=tone)
        width = text_width(entry["label"])
        right = left + 9 + width < WIDTH - RIGHT
        begin = left + 9 if right else left - 9 - width
        height = next(
            top + away
            for away in sorted(range(-HEIGHT, HEIGHT, 2), key=abs)
            if all(
                abs(top + away - other) >= 13 for first, last, other in taken if first < begin + width and begin < last
            )
        )
        taken.append((begin, begin + width, height))
        text(drawing, left + (9 if right else -9), height + 4, entry["label"], "start" if right else "end", tone)
    return str(drawing)


def recall_by_distance(entries: Sequence[dict[str, Any]], group: int) -> str:
    """Share of a repeated passage that is found again, against its distance in tokens; the group is marked."""
    lines = [
        Line(entry["label"], tuple(Point(point["distance"], point["mean"]) for point in entry["recall"]))
        for entry in entries
    ]
    means = [point.mean for line in lines for point in line.points]
    farthest = max(point.x for point in lines[0].points)
    x = linear_axis("tokens from a passage to its repetition", 0, farthest * 1.25, ticks=6, label=whole)
    y = linear_axis("share of the passage's tokens ranked first", min(means) - 0.02, max(means) + 0.02, label=percent)
    drawing = frame(x, y, f"{y.title}, against {x.title}.")
    edge = across(x, group)
    drawing.add("path", d=f"M{edge:.1f} {TOP}V{HEIGHT - BOTTOM}", stroke=INK, stroke_dasharray="4 4")
    text(drawing, edge + 5, HEIGHT - BOTTOM - 8, f"one group, {group:,} tokens", "start", INK)
    draw_lines(drawing, x, y, lines, "{:.1%}".format)
    return str(drawing)


def of_table(document: dict[str, Any], figure: Figure | None) -> str | None:
    """The table's figure, or None where it has none or something that it shows was not run.

    Args:
        document: of `longlora.reproduction.table_command.reproduce_table`.
        figure: how its table is drawn.
    """
    if figure is None:
        return None
    rows = [row for row in document["rows"] if not figure.rows or row["key"] in figure.rows]
    columns = figure.columns or tuple(range(len(document["columns"])))
    if any(row["entries"][column] is None for row in rows for column in columns):
        return None
    return {"lines": _by_column, "dots": _by_row, "panels": _quality_and_cost}[figure.kind](
        document, figure, rows, columns
    )


def _by_column(document: dict[str, Any], figure: Figure, rows: Sequence[dict[str, Any]], columns: Sequence[int]) -> str:
    """A line a row; the columns stand at equal distances."""
    is_share = document["number"].endswith("%")
    lines = [
        Line(row["label"], tuple(_point(place, row["entries"][column]) for place, column in enumerate(columns)))
        for row in rows
    ]
    room = 0.35 * (len(columns) - 1)
    ticks = tuple((float(place), document["columns"][column]) for place, column in enumerate(columns))
    x = Axis(figure.across, -0.1, len(columns) - 1 + room, ticks)
    y = _axis(figure.up, lines, is_share)
    drawing = frame(x, y, f"{y.title}, by {x.title}.")
    draw_lines(drawing, x, y, lines, "{:.1%}".format if is_share else "{:,.4g}".format)
    return str(drawing)


def _by_row(document: dict[str, Any], figure: Figure, rows: Sequence[dict[str, Any]], columns: Sequence[int]) -> str:
    """A line of dots a row, in a tone for each column."""
    lines = [Line(document["columns"][c], tuple(_point(0, row["entries"][c]) for row in rows)) for c in columns]
    axis = _axis(figure.up, lines, document["number"].endswith("%"))
    left = max(text_width(row["label"]) for row in rows) + 20
    height = TOP + ROW_HEIGHT * (len(rows) + 1) + BOTTOM
    drawing = canvas(WIDTH, height, f"{axis.title}, by {document['title']}.")

    def place(value: float) -> float:
        return left + axis.place(value) * (WIDTH - left - RIGHT)

    bottom = height - BOTTOM
    for value, label in axis.ticks:
        drawing.add("path", d=f"M{place(value):.1f} {TOP + ROW_HEIGHT / 2}V{bottom}", stroke=FAINT)
        text(drawing, place(value), bottom + 18, label, "middle", INK)
    text(drawing, (left + WIDTH - RIGHT) / 2, height - 10, axis.title, "middle", INK)
    heights = [TOP + ROW_HEIGHT * (number + 1) for number in range(len(rows))]
    for row, top in zip(rows, heights, strict=True):
        text(drawing, left - 10, top + 4, row["label"], "end", INK)
    begin = float(left)
    for tone, line in zip(TONES, lines, strict=False):
        if len(lines) > 1:
            drawing.add("circle", cx=begin + 4, cy=TOP - 6, r=4, fill=tone)
            text(drawing, begin + 13, TOP - 2, line.label, "start", tone)
            begin += text_width(line.label) + 40
        for row, top, point in zip(rows, heights, line.points, strict=True):
            if point.error:
                ends = f"M{place(point.mean - point.error):.1f} {top}H{place(point.mean + point.error):.1f}"
                drawing.add("path", d=ends, stroke=tone, stroke_width=2)
            drawing.add("circle", f"{row['label']}: {point.mean:,.4g}", cx=place(point.mean), cy=top, r=4.5, fill=tone)
    return str(drawing)


def _quality_and_cost(
    document: dict[str, Any], figure: Figure, rows: Sequence[dict[str, Any]], columns: Sequence[int]
) -> str:
    """Figure 1: a panel each for perplexity, seconds and gigabytes, by context, one line a way to train."""
    contexts = document["contexts"]
    panels = []
    for number, title in enumerate(("perplexity", "seconds of training", "memory, GB")):
        first = number * len(contexts)
        lines = [
            Line(
                row["label"],
                tuple(_point(context, row["entries"][first + place]) for place, context in enumerate(contexts)),
            )
            for row in rows
        ]
        means = [point.mean for line in lines for point in line.points]
        x = linear_axis(figure.across, 0, max(contexts) * 1.35, ticks=6, label=whole)
        y = linear_axis(title, 0 if number else min(means) * 0.98, max(means) * 1.02)
        panels.append(frame(x, y, f"{title} by {x.title}."))
        draw_lines(panels[-1], x, y, lines, "{:,.4g}".format)
    return str(stacked(panels, f"{document['title']}."))


def _point(x: float, entry: dict[str, Any]) -> Point:
    return Point(x, entry["mean"], entry["error"])


def _axis(title: str, lines: Sequence[Line], is_share: bool) -> Axis:
    ends = [point.mean + sign * (point.error or 0) for line in lines for point in line.points for sign in (-1, 1)]
    return linear_axis(title, min(ends), max(ends), label=percent if is_share else plain)
