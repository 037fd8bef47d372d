"""What the figures are made of: a frame with its axes, lines with error bars, and labels that stand apart."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from longlora.report.axes import Axis
from longlora.report.svg import Drawing

WIDTH, HEIGHT = 760, 420
LEFT, RIGHT, TOP, BOTTOM = 64, 24, 20, 52
INK, FAINT = "#4b5563", "#d1d5db"
TONES = ("#2563eb", "#d97706", "#059669", "#db2777", "#7c3aed", "#0891b2", "#65a30d", "#dc2626", "#475569", "#92400e")
FONT = "system-ui, sans-serif"
LABEL_HEIGHT = 14


@dataclass(frozen=True)
class Point:
    """A mean with its standard error, None where there is one run, at `x`."""

    x: float
    mean: float
    error: float | None = None


@dataclass(frozen=True)
class Line:
    label: str
    points: tuple[Point, ...]


def canvas(width: int, height: float, description: str) -> Drawing:
    """An empty picture that stands by itself."""
    drawing = Drawing(width, height, description)
    drawing.root.set("xmlns", "http://www.w3.org/2000/svg")
    drawing.root.set("font-family", FONT)
    drawing.root.set("font-size", "12")
    drawing.add("rect", x=0, y=0, width=width, height=height, fill="#ffffff")
    return drawing


def frame(x: Axis, y: Axis, description: str) -> Drawing:
    """A picture of the usual size with both axes drawn."""
    drawing = canvas(WIDTH, HEIGHT, description)
    for value, label in y.ticks:
        height = up(y, value)
        drawing.add("path", d=f"M{LEFT} {height:.1f}H{WIDTH - RIGHT}", stroke=FAINT)
        text(drawing, LEFT - 8, height + 4, label, "end", INK)
    for value, label in x.ticks:
        text(drawing, across(x, value), HEIGHT - BOTTOM + 18, label, "middle", INK)
    text(drawing, (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 10, x.title, "middle", INK)
    text(drawing, LEFT, TOP - 6, y.title, "start", INK)
    return drawing


def draw_lines(drawing: Drawing, x: Axis, y: Axis, lines: Sequence[Line], number: Callable[[float], str]) -> None:
    """Draw each line in its tone, with its errors, and write its label beside its last point."""
    labels = []
    for place, line in enumerate(lines):
        tone = TONES[place % len(TONES)]
        path = "M" + "L".join(f"{across(x, point.x):.1f} {up(y, point.mean):.1f}" for point in line.points)
        drawing.add("path", d=path, stroke=tone, stroke_width=2, fill="none")
        for point in line.points:
            if point.error:
                ends = (up(y, point.mean - point.error), up(y, point.mean + point.error))
                bar = f"M{across(x, point.x):.1f} {ends[0]:.1f}V{ends[1]:.1f}"
                drawing.add("path", d=bar, stroke=tone, stroke_width=2)
            note = f"{line.label}: {number(point.mean)}"
            drawing.add("circle", note, cx=across(x, point.x), cy=up(y, point.mean), r=3.5, fill=tone)
        labels.append((up(y, line.points[-1].mean) + 4, line.label, tone))
    _label_ends(drawing, across(x, max(line.points[-1].x for line in lines)) + 8, labels)


def _label_ends(drawing: Drawing, left: float, labels: Sequence[tuple[float, str, str]]) -> None:
    """Write (height, label, tone) one below the other, as near to their heights as there is room above the axis."""
    ordered = sorted(labels)
    heights: list[float] = []
    for height, _, _ in ordered:
        heights.append(max(height, heights[-1] + LABEL_HEIGHT) if heights else height)
    floor = HEIGHT - BOTTOM - 4.0
    for place in reversed(range(len(heights))):
        heights[place] = min(heights[place], floor)
        floor = heights[place] - LABEL_HEIGHT
    for height, (_, label, tone) in zip(heights, ordered, strict=True):
        text(drawing, left, height, label, "start", tone)


def stacked(panels: Sequence[Drawing], description: str) -> Drawing:
    """Pictures of the usual size, one below the other."""
    whole = canvas(WIDTH, len(panels) * HEIGHT, description)
    for number, panel in enumerate(panels):
        for name, value in (("y", number * HEIGHT), ("width", WIDTH), ("height", HEIGHT)):
            panel.root.set(name, str(value))
        whole.root.append(panel.root)
    return whole


def text(drawing: Drawing, x: float, y: float, words: str, anchor: str, tone: str) -> None:
    drawing.add("text", x=x, y=y, text_anchor=anchor, fill=tone).text = words


def across(axis: Axis, value: float) -> float:
    """Pixels from the left edge."""
    return LEFT + axis.place(value) * (WIDTH - LEFT - RIGHT)


def up(axis: Axis, value: float) -> float:
    """Pixels from the top edge."""
    return HEIGHT - BOTTOM - axis.place(value) * (HEIGHT - TOP - BOTTOM)


def whole(value: float) -> str:
    return f"{value:,.0f}"


def percent(value: float) -> str:
    return f"{value:.0%}"
