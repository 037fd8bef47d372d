"""The pictures of longlora.ipynb and of docs/longlora.md, each drawn from what the code itself does.

    python notebooks/pictures.py      # draws docs/longlora/*.svg anew

Every picture is an SVG that stands by itself on a ground of its own, light or dark, so that it can be read on any page;
colours and strokes are those of the report.
"""

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import cast
from xml.etree import ElementTree

import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from longlora.attention.layout import plan
from longlora.attention.patterns import PLAIN, Draw
from longlora.attention.state import ShiftedAttentionState
from longlora.model.loading import load_config
from longlora.model.positions import extend_positions
from longlora.planner.flops import forward_flops
from longlora.planner.reading import read_anatomy
from longlora.planner.shapes import find_config
from longlora.report.attention_picture import panels
from longlora.report.axes import Axis, context_axis, linear_axis, measured_axis, step_axis
from longlora.report.charts import Line, Point, line_chart
from longlora.report.svg import Drawing, text_width
from longlora.settings import LoadSettings, PatternOptions, TrainableSettings

WIDTH = 720
"""Pixels of a picture."""

MARGIN = 14
"""Pixels around what is drawn."""

PANEL, GAP = 150, 22
"""Side of one small attention picture, and the room between two, in pixels."""

DOCS = Path(__file__).resolve().parents[1] / "docs"

GALLERY = {
    "full": "full",
    "plain": "plain (“only P1”)",
    "shifted": "shifted (“only P2”)",
    "shift": "shift: S²-Attn, across heads",
    "shift-layers": "shift-layers: across layers",
    "dilated": "dilated",
    "strided": "strided",
    "cyclic": "cyclic; red: later tokens",
    "scatter": "scatter: half-groups, and earlier ones drawn at random",
}
"""The patterns in the order in which they are shown, with their titles."""


METHODS = {"none": "as it is", "linear": "PI", "ntk": "NTK", "yarn": "YaRN"}

SLOW_PAIR = 20
"""A rotary pair of the demo model that turns by a quarter within its window of 512 tokens, counted from 0."""


class Picture:
    """An SVG picture as Jupyter shows it."""

    def __init__(self, svg: str):
        self.svg = svg

    def __repr__(self) -> str:
        return "Picture"

    def _repr_svg_(self) -> str:
        return self.svg


# --------------------------------------------------------------------------------------------- what each head sees


def attention_gallery(patterns: Mapping[str, str], options: PatternOptions = PLAIN, group: int = 4) -> Picture:
    """What the heads of four see under each of `patterns` (name -> title), as the training's own plan cuts 16 tokens.

    Args:
        options: additions to the patterns.
        group: tokens a group.
    """
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    drawing = Drawing(WIDTH - 2 * MARGIN, 0, f"What each head sees: {', '.join(patterns.values())}.")
    left, top = 0, 0
    for pattern, title in patterns.items():
        found = panels(pattern, group, heads, options)
        if left and left + len(found) * (PANEL + GAP) - GAP > drawing.width:
            left, top = 0, top + PANEL + 100
        drawing.text(left, top + 13, title, class_="strong")
        for panel in found:
            _place(drawing, panel.svg, left, top + 24, PANEL)
            for line, words in enumerate([panel.who, *_wrapped(panel.what, PANEL + GAP - 6)]):
                drawing.text(left, top + PANEL + 40 + 15 * line, words, class_="" if line else "title")
            left += PANEL + GAP
    return _standing(drawing, top + PANEL + 86)


def sees(pattern: str, length: int, group: int, layer: int = 0, heads: int = 4) -> torch.Tensor:
    """(H, N, N) whether in head h token i sees token j, read off the plan that the attention kernels follow."""
    seen = torch.zeros(heads, length, length, dtype=torch.bool)
    for head_set in plan((((0, length),),), length, heads, heads, group, pattern, layer):
        for rows in head_set.rows:
            mask = torch.zeros(length, length, dtype=torch.bool)
            for part in (one for parts in rows.parts for one in parts):
                see = torch.ones(len(part.queries), len(part.keys), dtype=torch.bool)
                mask[torch.tensor(part.queries)[:, None], torch.tensor(part.keys)] = (
                    see if part.sees == "all" else see.tril()
                )
            seen[head_set.heads.query_start : head_set.heads.query_stop] = mask
    return seen


def reach(patterns: Mapping[str, str], length: int = 32, group: int = 8, layers: int = 7) -> Picture:
    """From which tokens the last one can have heard after each layer, under each of `patterns` (name -> title)."""
    side = (WIDTH - 2 * MARGIN - 74) / length
    drawing = Drawing(WIDTH - 2 * MARGIN, 0, f"Tokens that the last of {length} can have heard from, layer by layer.")
    top = 0.0
    for pattern, title in patterns.items():
        drawing.text(0, top + 13, title, class_="strong")
        heard = torch.eye(length, dtype=torch.bool)
        for layer in range(layers):
            heard = (sees(pattern, length, group, layer).any(0).float() @ heard.float()) > 0
            y = top + 24 + layer * 18
            drawing.text(62, y + 12, f"{layer + 1} layer{'s' if layer else ''}", "end")
            for token in range(length):
                tone = f"group-{token // group % 4}" if heard[-1, token] else "unseen"
                drawing.add("rect", x=74 + token * side, y=y, width=side - 1.5, height=16, class_=tone)
        top += 24 + layers * 18 + 18
    return _standing(drawing, top - 12)


def layers_drawn_anew(share: float, passes: int = 24, layers: int = 6) -> Picture:
    """Which layers have full attention in each of the first forward passes of a training with seed 0."""
    side = (WIDTH - 2 * MARGIN - 74) / passes
    drawing = Drawing(WIDTH - 2 * MARGIN, 0, f"Layers drawn for full attention in {passes} forward passes.")
    state = ShiftedAttentionState(
        group_size=2,
        pattern="shift",
        inference=False,
        ordinary="sdpa",
        global_layers={layer: layer for layer in range(layers)},
        options=PLAIN,
        full_layers=frozenset(),
        full_layers_share=share,
    )
    for turn, layer in itertools.product(range(passes), range(layers)):
        tone = "tone-2 fill" if state.is_full(layer, Draw(seed=0, turn=turn)) else "unseen"
        drawing.add("rect", x=74 + turn * side, y=layer * 20, width=side - 2, height=18, class_=tone)
    for layer in range(layers):
        drawing.text(62, layer * 20 + 13, f"layer {layer + 1}", "end")
    drawing.text(74, layers * 20 + 16, "forward pass 1, 2, 3 …   filled: full attention; pale: S²-Attn")
    return _standing(drawing, layers * 20 + 24)


# ------------------------------------------------------------------------------------------------------- positions


def frequencies(method: str, context: int) -> torch.Tensor:
    """(D / 2,) radians that each rotary pair of the demo model turns a token, stretched to `context` by `method`."""
    config = cast(LlamaConfig, load_config("demo"))
    if method != "none":
        extend_positions(config, context, method)
    return LlamaRotaryEmbedding(config).inv_freq.double()


def angles(methods: Mapping[str, str], context: int, pair: int) -> Picture:
    """How far rotary pair `pair` has turned at each position, under each of `methods` (name -> label)."""
    window = load_config("demo").max_position_embeddings
    lines = []
    for method, label in methods.items():
        speed = frequencies(method, context)[pair].item()
        lines.append(Line(_tone(method), [[Point(0, 0), Point(context, context * speed)]], label))
    known = window * frequencies("none", context)[pair].item()
    lines.append(Line("tone-7", [[Point(0, known), Point(context, known)]], "furthest in pretraining", "dashed"))
    furthest = max(line.runs[0][-1].y for line in lines)
    x = step_axis("position, in tokens", 0, context)
    y = linear_axis(f"angle of rotary pair {pair + 1}, in radians", 0, furthest)
    marks = [(float(window), f"the window, {window} tokens")]
    return _chart(lines, x, y, "Angle of one rotary pair against the position, by method.", marks)


def divisors(methods: Mapping[str, str], context: int) -> Picture:
    """By how much each method slows each rotary pair down, from the fastest to the slowest."""
    plain = frequencies("none", context)
    lines = []
    for method, label in methods.items():
        slower = (plain / frequencies(method, context)).tolist()
        points = [
            Point(pair + 1, factor, f"{label}: pair {pair + 1}, {factor:.2f}") for pair, factor in enumerate(slower)
        ]
        lines.append(Line(_tone(method), [points], label))
    highest = max(point.y for line in lines for point in line.runs[0])
    x = step_axis("rotary pair, fast to slow", 0, len(plain))
    y = linear_axis("times slower than before", 0, highest)
    return _chart(lines, x, y, "How much slower each rotary pair turns, by method.")


# ---------------------------------------------------------------------------------------------------- measurements


def by_context(title: str, measured: Mapping[str, Mapping[int, float]], strong: str = "") -> Picture:
    """Lines of `{label: {context in tokens: value}}`; the one named `strong` is drawn thicker."""
    lines = [
        Line(
            f"tone-{tone % 8}",
            [[Point(context, value, f"{label}, {context:,} tokens: {value:.2f}") for context, value in values.items()]],
            label,
            "strong" if label == strong else "",
            dots=True,
        )
        for tone, (label, values) in enumerate(measured.items())
    ]
    contexts = [context for values in measured.values() for context in values]
    everything = [value for values in measured.values() for value in values.values()]
    return _chart(lines, context_axis("tokens of context", contexts), measured_axis(title, everything), f"{title}.")


def by_step(title: str, values: Sequence[float]) -> Picture:
    """One value an optimiser step, as a line."""
    points = [Point(step, value, f"step {step}: {value:.3f}") for step, value in enumerate(values, 1)]
    x = step_axis("optimiser step", 0, len(values))
    y = linear_axis(title, min(values), max(values))
    return _chart([Line("tone-0", [points], dots=True)], x, y, f"{title}, step by step.")


def heat_map(
    title: str, columns: Sequence[str], rows: Mapping[str, Sequence[float | None]], heading: str = ""
) -> Picture:
    """Shares from 0 to 1 as shaded squares, a row for each label; None is a square that could not be measured."""
    named = max(text_width(label) for label in [*rows, heading]) + 14
    step = (WIDTH - 2 * MARGIN - named) / len(columns)
    drawing = Drawing(WIDTH - 2 * MARGIN, 0, f"{title}.")
    drawing.text(0, 13, title, class_="strong")
    drawing.text(named - 10, 40, heading, "end")
    for place, column in enumerate(columns):
        drawing.text(named + (place + 0.5) * step, 40, column, "middle", "title")
    for row, (label, values) in enumerate(rows.items()):
        top = 50 + 34 * row
        drawing.text(named - 10, top + 21, label, "end", "title")
        for place, value in enumerate(values):
            left = named + place * step
            drawing.add("rect", x=left + 1, y=top + 1, width=step - 2, height=32, rx=3, class_="unseen")
            if value is not None:
                shade = 0.5 * value  # so that the number on it can be read in light and in dark
                cell = drawing.add("rect", x=left + 1, y=top + 1, width=step - 2, height=32, rx=3, class_="tone-0 fill")
                cell.set("fill-opacity", f"{shade:.2f}")
            drawing.text(left + step / 2, top + 21, "–" if value is None else f"{value:.0%}", "middle", "title")
    return _standing(drawing, 50 + 34 * len(rows))


def cost(model: str, contexts: Sequence[int]) -> Picture:
    """Operations of one forward pass of `model` with full attention and with S²-Attn, by the planner's count."""
    anatomy = read_anatomy(find_config(model, LoadSettings()), TrainableSettings())
    counts = {}
    for context in contexts:
        full, shifted = (forward_flops(anatomy, context, group).table7() for group in (None, context // 4))
        for way, tone, found in (("full", "tone-1", full), ("S²", "tone-0", shifted)):
            counts[context, f"{way}, in all"] = (tone, found["total"])
            counts[context, f"{way}, attention"] = (tone, found["attention"])
    named = max(text_width(label) for _, label in counts) + 10
    valued = max(text_width(f"{value:,.1f}") for _, value in counts.values()) + 10
    longest = max(value for _, value in counts.values())
    drawing = Drawing(WIDTH - 2 * MARGIN, 0, "Operations of one forward pass, in TFLOP.")
    top, last = -12, 0
    for (context, label), (tone, value) in counts.items():
        if context != last:
            drawing.text(0, top + 24, f"{context:,} tokens", class_="title")
            drawing.text(drawing.width, top + 24, "TFLOP", "end", "strong")
            top, last = top + 36, context
        length = (drawing.width - named - valued) * value / longest
        drawing.text(named - 10, top + 12, label, "end")
        drawing.add("rect", x=named, y=top, width=length, height=17, rx=2, class_=f"{tone} fill")
        drawing.text(named + length + 6, top + 13, f"{value:,.1f}")
        top += 22
    return _standing(drawing, top)


def table_of(document: str, first_cell: str) -> dict[str, dict[int, float]]:
    """The Markdown table of numbers in `document` that has a row `first_cell`, as `{row: {column: value}}`.

    Raises:
        KeyError: there is no such table.
    """
    for block in re.findall(r"(?:^\|.*\|\n)+", document, re.MULTILINE):
        head, _, *body = ([cell.strip(" *") for cell in line.strip("|").split("|")] for line in block.splitlines())
        if first_cell in {line[0] for line in body}:
            contexts = [int(cell.replace(",", "")) for cell in head[1:]]
            return {line[0]: dict(zip(contexts, map(float, line[1:]), strict=True)) for line in body}
    raise KeyError(first_cell)


# ------------------------------------------------------------------------------------------------- the SVG as such


def _chart(
    lines: Sequence[Line], x: Axis, y: Axis, description: str, marks: Sequence[tuple[float, str]] = ()
) -> Picture:
    width = WIDTH - 2 * MARGIN
    return _within(line_chart(lines, x, y, width=width, height=300, description=description, marks=marks), width)


def _within(svg: str, width: int) -> Picture:
    """A chart of the report on a ground of its own."""
    inner = ElementTree.fromstring(svg)
    height = float(inner.get("viewBox", "").split()[3])
    drawing = Drawing(width, height, inner.get("aria-label", ""))
    _place(drawing, svg, 0, 0, width, height)
    return _standing(drawing, height)


def _place(drawing: Drawing, svg: str, x: float, y: float, width: float, height: float | None = None) -> None:
    inner = ElementTree.fromstring(svg)
    for name in ("role", "aria-label"):
        inner.attrib.pop(name, None)
    inner.attrib.update(x=f"{x:g}", y=f"{y:g}", width=f"{width:g}", height=f"{height or width:g}", overflow="visible")
    drawing.root.append(inner)


def _standing(drawing: Drawing, height: float) -> Picture:
    """`drawing`, `height` pixels of it, as a file of its own: margin, ground and style sheet."""
    outer = Drawing(WIDTH, height + 2 * MARGIN, drawing.root.get("aria-label", ""))
    size = {"width": str(WIDTH), "height": f"{height + 2 * MARGIN:g}"}
    outer.root.attrib.update({"xmlns": "http://www.w3.org/2000/svg", "class": "longlora", **size})
    outer.add("style").text = _style()
    outer.add("rect", width=WIDTH, height=height + 2 * MARGIN, rx=8, class_="ground")
    shapes = outer.add("g", transform=f"translate({MARGIN} {MARGIN})")
    shapes.extend(list(drawing.root))
    return Picture(str(outer))


def _style() -> str:
    """The report's colours and strokes, for one picture only: a page may hold other pictures."""
    css = files("longlora.report").joinpath("templates/style.css").read_text(encoding="utf-8")
    colours = css[: css.index("* {")].replace(":root", ".longlora")
    rules = [line.replace("svg ", ".longlora ") for line in css.splitlines() if line.startswith(("svg ", ".tone-"))]
    own = ".longlora { font-family: system-ui, sans-serif; } .longlora .ground { fill: var(--page); }"
    return re.sub(r"\s*\n\s*", " ", "\n".join([colours, *rules, own]))


def _wrapped(words: str, width: float) -> Iterator[str]:
    line = ""
    for word in words.split():
        if line and text_width(f"{line} {word}") > width:
            yield line
            line = word
        else:
            line = f"{line} {word}".strip()
    yield line


def _tone(method: str) -> str:
    """A method has the same colour in every picture."""
    return f"tone-{list(METHODS).index(method)}"


def pictures_of_the_page() -> dict[str, Picture]:
    """The pictures of docs/longlora.md by file name."""
    experiments = (DOCS / "experiments.md").read_text(encoding="utf-8")
    demo = table_of(experiments, "the paper's recipe: PI, one learning rate (2e-3, constant)")
    labels = ("base model", "PI, not trained", "YaRN, not trained", "the paper's recipe", "longlora, S² alone")
    return {
        "shift.svg": attention_gallery({"full": "full attention", "shift": "S²-Attn"}),
        "reach.svg": reach({"plain": "groups side by side only", "shift": "S²-Attn"}),
        "patterns.svg": attention_gallery(GALLERY),
        "angles.svg": angles(METHODS, 4096, SLOW_PAIR),
        "divisors.svg": divisors({name: label for name, label in METHODS.items() if name != "none"}, 4096),
        "layers.svg": layers_drawn_anew(1 / 3),
        "cost.svg": cost("llama2-7b", (8192, 32768)),
        "demo.svg": by_context("held-out perplexity", dict(zip(labels, demo.values(), strict=True)), labels[-1]),
    }


if __name__ == "__main__":
    for name, picture in pictures_of_the_page().items():
        path = DOCS / "longlora" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(picture.svg + "\n", encoding="utf-8")
        print(path.relative_to(DOCS.parent))
