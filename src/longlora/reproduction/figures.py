"""Figures of tables, for documents and papers: SVG and PDF, with the seeds' 95% intervals as bars."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Plot
from matplotlib.ticker import FuncFormatter

from longlora.report.charts import spread
from longlora.reproduction.entries import Figure

INK, FAINT = "#4b5563", "#d1d5db"
TONES = ("#2563eb", "#d97706", "#059669", "#db2777", "#7c3aed", "#0891b2", "#65a30d", "#dc2626", "#475569", "#92400e")
LABEL_HEIGHT = 11
"""Points from one label to the next below it."""

STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "longlora",
    "pdf.fonttype": 42,
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.grid": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.5,
}

Rows = Sequence[dict[str, Any]]


def save(document: dict[str, Any], figure: Figure | None, file: Path) -> bool:
    """Write the table's figure as `file`.svg and `file`.pdf; False where it has none or something of it was not run.

    Args:
        document: as `longlora.reproduction.table_document.document_of` returns it.
        figure: how its table is drawn.
        file: path without an ending.
    """
    with matplotlib.rc_context(STYLE):
        plot = of_table(document, figure)
        if plot is None:
            return False
        for ending, dated in (("svg", "Date"), ("pdf", "CreationDate")):
            plot.savefig(file.with_suffix(f".{ending}"), bbox_inches="tight", metadata={dated: None})
    return True


def of_table(document: dict[str, Any], figure: Figure | None) -> Plot | None:
    """The table's figure, or None where it has none or something that it shows was not run; see `save`."""
    if figure is None:
        return None
    rows = [row for row in document["rows"] if not figure.rows or row["key"] in figure.rows]
    columns = figure.columns or tuple(range(len(document["columns"])))
    if figure.kind == "points":  # a study of many ways is drawn as far as it has been run
        rows = [row for row in rows if all(row["entries"][column] for column in columns)]
    if not rows or any(row["entries"][column] is None for row in rows for column in columns):
        return None
    draw = {"lines": _by_column, "dots": _by_row, "points": _by_cost, "panels": _quality_and_cost}[figure.kind]
    return draw(document, figure, rows, columns)


def _by_column(document: dict[str, Any], figure: Figure, rows: Rows, columns: Sequence[int]) -> Plot:
    """A line a row; the columns stand at equal distances."""
    plot = Plot(figsize=(7.2, 4.2))
    axes = plot.subplots()
    _lines(axes, rows, list(range(len(columns))), columns)
    axes.set_xticks(range(len(columns)), [document["columns"][column] for column in columns])
    _name(axes, document, figure.across, figure.up)
    return plot


def _by_row(document: dict[str, Any], figure: Figure, rows: Rows, columns: Sequence[int]) -> Plot:
    """A line of dots a row, in a tone for each column."""
    plot = Plot(figsize=(6, 0.6 + 0.28 * len(rows)))
    axes = plot.subplots()
    for tone, column in zip(TONES, columns, strict=False):
        entries = [row["entries"][column] for row in rows]
        means = [entry["mean"] for entry in entries]
        axes.errorbar(means, range(len(rows)), xerr=_halves(entries), fmt="o", color=tone, markersize=5)
        if len(columns) > 1:
            axes.plot([], [], "o", color=tone, label=document["columns"][column])
    axes.set_yticks(range(len(rows)), [row["label"] for row in rows])
    axes.invert_yaxis()
    if len(columns) > 1:
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(columns), frameon=False)
    axes.set_xlabel(figure.up)
    return plot


def _by_cost(document: dict[str, Any], figure: Figure, rows: Rows, columns: Sequence[int]) -> Plot:
    """A dot a row: what it costs across, what it gives up."""
    plot = Plot(figsize=(7.2, 4.2))
    axes = plot.subplots()
    ends = []
    for row, tone in zip(rows, TONES * len(rows), strict=False):
        x, y = (row["entries"][column] for column in columns)
        axes.errorbar([x["mean"]], [y["mean"]], yerr=_halves([y]), fmt="o", color=tone, markersize=5)
        ends.append((x["mean"], y["mean"], row["label"], tone))
    axes.set_xlim(left=0)
    _name(axes, document, figure.across, f"{figure.up}, {document['columns'][columns[1]]} tokens")
    _label(axes, ends)
    return plot


def _quality_and_cost(document: dict[str, Any], figure: Figure, rows: Rows, _: Sequence[int]) -> Plot:
    """Figure 1: a panel each for perplexity, seconds and gigabytes, by context, one line a way to train."""
    contexts = document["contexts"]
    plot = Plot(figsize=(7.2, 9), layout="constrained")
    for number, (axes, title) in enumerate(
        zip(plot.subplots(3), ("perplexity", "seconds of training", "memory, GB"), strict=True)
    ):
        columns = range(number * len(contexts), (number + 1) * len(contexts))
        _lines(axes, rows, contexts, columns)
        axes.set_ylim(bottom=0 if number else None)
        axes.set_xticks(contexts, [f"{context:,}" for context in contexts])
        _name(axes, document, figure.across, title)
    return plot


def _lines(axes: Axes, rows: Rows, places: Sequence[float], columns: Sequence[int]) -> None:
    ends = []
    for row, tone in zip(rows, TONES * len(rows), strict=False):
        entries = [row["entries"][column] for column in columns]
        means = [entry["mean"] for entry in entries]
        axes.errorbar(places, means, yerr=_halves(entries), fmt="o-", color=tone, markersize=4, linewidth=1.6)
        ends.append((places[-1], means[-1], row["label"], tone))
    _label(axes, ends)


def _label(axes: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Write each (x, y, label, tone) to the right of the axes at its height or as near as may be, tied to its point."""
    axes.autoscale_view()  # or places are those of an empty axis
    scale = 72 / axes.figure.dpi
    box = axes.get_window_extent()
    heights = [scale * axes.transData.transform((x, y))[1] for x, y, *_ in ends]
    places = spread(heights, scale * box.y0, scale * box.y1, LABEL_HEIGHT)
    for (x, y, label, tone), place in zip(ends, places, strict=True):
        axes.annotate(
            label,
            (x, y),
            (1.02, (place / scale - box.y0) / box.height),
            textcoords="axes fraction",
            color=tone,
            va="center",
            arrowprops={"arrowstyle": "-", "color": tone, "linewidth": 0.5, "linestyle": ":", "relpos": (0, 0.5)},
        )


def _name(axes: Axes, document: dict[str, Any], across: str, up: str) -> None:
    axes.set_xlabel(across)
    axes.set_title(up, loc="left", fontsize=9, color=INK)
    if document["number"].endswith("%"):
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))


def _halves(entries: Rows) -> list[float]:
    """Half of each interval; nothing for one seed."""
    return [0.0 if entry["low"] is None else entry["high"] - entry["mean"] for entry in entries]
