"""Line charts as SVG, drawn to be read at the width they are given in pixels."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from scipy.optimize import isotonic_regression

from longlora.report.axes import Axis
from longlora.report.svg import Drawing, clipped, text_width

WIDTHS = {"wide": 720, "narrow": 340}
"""Each chart is drawn for a page and for a phone, so that its text is as large on both; pixels."""

LINE_HEIGHT = 16
"""Pixels from one label to the next below it."""


@dataclass(frozen=True)
class Point:
    x: float
    y: float
    note: str = ""
    """Shown when the pointer rests on the point."""
    low: float | None = None
    high: float | None = None
    """Ends of its interval, drawn as a bar."""


@dataclass(frozen=True)
class Line:
    """A line in one of the page's tones; it is broken where a run of points ends."""

    tone: str
    runs: Sequence[Sequence[Point]]
    label: str = ""
    """Written at the line's end."""
    style: str = ""
    """`strong`, `faint`, or as it comes."""
    dots: bool = False
    """Mark every point, not only lonely ones."""

    @property
    def last(self) -> Point | None:
        return next((run[-1] for run in reversed(self.runs) if run), None)


def at_both_widths(draw: Callable[[int], str]) -> dict[str, str]:
    """The chart for each of `WIDTHS`, by its name."""
    return {name: draw(width) for name, width in WIDTHS.items()}


def line_chart(
    lines: Sequence[Line],
    x: Axis,
    y: Axis,
    *,
    width: int,
    height: int,
    description: str,
    marks: Sequence[tuple[float, str]] = (),
) -> str:
    """Lines over a grid, each with its label at its end, kept apart from one another.

    A line that leaves the range of `y` is cut off there, and has its label only if it comes back.

    Args:
        marks: values of `x` that get a vertical line with a name.
    """
    drawing = Drawing(width, height, description)
    named = max((text_width(line.label) for line in lines), default=0)
    last_tick = max((text_width(label) / 2 for _, label in x.ticks[-1:]), default=7)
    frame = _Frame(
        x,
        y,
        left=max(42.0, 14 + max((text_width(label) for _, label in y.ticks), default=0)),
        right=width - (min(named + 18, 0.42 * width) if named else last_tick + 1),
        top=30 + LINE_HEIGHT * len(marks),
        bottom=height - 42,
    )
    _draw_axes(drawing, frame)
    for row, (value, name) in enumerate(marks):
        at, baseline = frame.across(value), 30 + LINE_HEIGHT * row
        drawing.add("line", x1=at, x2=at, y1=baseline + 4, y2=frame.bottom, class_="mark")
        before = at + text_width(name) > width and at - text_width(name) > 0
        drawing.text(at + (2 if before else -2), baseline, name, "end" if before else "start", "mark-name")
    for line in lines:
        _draw_line(drawing, frame, line)
    _draw_ends(drawing, frame, lines)
    return str(drawing)


@dataclass(frozen=True)
class _Frame:
    """Where on the picture, in pixels, the axes lie."""

    x: Axis
    y: Axis
    left: float
    right: float
    top: float
    bottom: float

    def across(self, value: float) -> float:
        return self.left + self.x.place(value) * (self.right - self.left)

    def down(self, value: float) -> float:
        return self.bottom - self.y.place(value) * (self.bottom - self.top)


def _draw_axes(drawing: Drawing, frame: _Frame) -> None:
    left, right, bottom = frame.left, frame.right, frame.bottom
    for value, label in frame.y.ticks:
        y = frame.down(value)
        drawing.add("line", x1=left, x2=right, y1=y, y2=y, class_="grid")
        drawing.text(left - 7, y + 4, label, "end")
    drawing.text(2, 12, frame.y.title, class_="title")
    drawing.add("line", x1=left, x2=right, y1=bottom, y2=bottom, class_="axis")
    for x, label in _apart([(frame.across(value), label) for value, label in frame.x.ticks]):
        drawing.add("line", x1=x, x2=x, y1=bottom, y2=bottom + 5, class_="axis")
        drawing.text(x, bottom + 18, label, "middle")
    drawing.text((left + right) / 2, bottom + 38, frame.x.title, "middle", "title")


def _draw_line(drawing: Drawing, frame: _Frame, line: Line) -> None:
    for run in line.runs:
        places = [(frame.across(point.x), frame.down(point.y)) for point in run]
        path = "".join(_cut(start, stop, frame.top, frame.bottom) for start, stop in pairwise(places))
        if path:
            drawing.add("path", d=path, class_=f"{line.tone} line {line.style}".rstrip())
        for point, (x, y) in zip(run, places, strict=True) if line.dots or len(run) == 1 else ():
            if point.low is not None and point.high is not None and frame.y.has(point.low) and frame.y.has(point.high):
                ends = sorted(min(max(frame.down(end), frame.top), frame.bottom) for end in (point.low, point.high))
                drawing.add("line", x1=x, x2=x, y1=ends[0], y2=ends[1], class_=f"{line.tone} bar")
            if frame.top <= y <= frame.bottom:
                radius = 4 if line.style == "strong" else 3
                drawing.add("circle", note=point.note, cx=x, cy=y, r=radius, class_=f"{line.tone} dot")


def _draw_ends(drawing: Drawing, frame: _Frame, lines: Sequence[Line]) -> None:
    """Labels at the right, each on the height of its line's last point or, tied to it by dots, as near as may be."""
    named = [(line, line.last) for line in lines if line.label]
    ends = [(line, frame.across(last.x), frame.down(last.y)) for line, last in named if last]
    ends = [end for end in ends if frame.top <= end[2] <= frame.bottom]
    places = spread([y for _, _, y in ends], frame.top - 6, frame.bottom + 6)
    for (line, x, y), place in zip(ends, places, strict=True):
        if x < frame.right - 12 or abs(place - y) > 6:
            drawing.add("line", x1=x + 5, y1=y, x2=frame.right + 10, y2=place, class_=f"leader {line.tone}")
        words = clipped(line.label, drawing.width - frame.right - 14)
        drawing.text(frame.right + 13, place + 4, words, class_=f"{line.tone} ink {line.style}".rstrip())


def _cut(start: tuple[float, float], stop: tuple[float, float], top: float, bottom: float) -> str:
    """The part of a stroke that lies between `top` and `bottom`, as SVG path commands.

    >>> _cut((0, 50), (10, -50), 0, 100)
    'M0.0,50.0L5.0,0.0'
    """
    (x, y), (across, down) = start, (stop[0] - start[0], stop[1] - start[1])
    shares = sorted(((edge - y) / down) for edge in (top, bottom)) if down else [0.0, 1.0]
    first, last = max(0.0, shares[0]), min(1.0, shares[1])
    if first > last or not min(y, stop[1]) <= bottom or not max(y, stop[1]) >= top:
        return ""
    return f"M{x + first * across:.1f},{y + first * down:.1f}L{x + last * across:.1f},{y + last * down:.1f}"


def _apart(ticks: Sequence[tuple[float, str]]) -> list[tuple[float, str]]:
    """The ticks whose labels do not run into one another, the last one first of all."""
    kept: list[tuple[float, str]] = []
    for at, label in reversed(ticks):
        if not kept or at + text_width(label) / 2 + 8 < kept[-1][0] - text_width(kept[-1][1]) / 2:
            kept.append((at, label))
    return kept[::-1]


def spread(places: Sequence[float], top: float, bottom: float, height: float = LINE_HEIGHT) -> list[float]:
    """`places` moved as little as needed (least squares) to lie `height` apart between `top` and `bottom`.

    >>> spread([50, 52, 10], 0, 100)
    [43.0, 59.0, 10.0]
    """
    if not places:
        return []
    order = np.argsort(places, kind="stable")
    offsets = height * np.arange(len(places))
    # less its offset, each place may be no less than the one before
    free = isotonic_regression(np.asarray(places, dtype=float)[order] - offsets).x
    result = np.empty(len(places))
    result[order] = np.clip(free, top, max(top, bottom - offsets[-1])) + offsets
    return result.tolist()
