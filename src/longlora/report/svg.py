"""A drawing as SVG text: shapes that take their colours from the page's style sheet by class name."""

import unicodedata
from xml.etree import ElementTree

TEXT_SIZE = 12
"""Pixels; the same as `svg text` in style.css."""


class Drawing:
    """An SVG picture of `width` x `height` pixels; `description` is what a screen reader says in its place.

    Attribute names are written with `_` for `-`, and `class_` for `class`. Text is escaped by ElementTree.
    """

    def __init__(self, width: int, height: float, description: str):
        self.width, self.height = width, height
        self.root = ElementTree.Element(
            "svg", {"viewBox": f"0 0 {width} {height:g}", "role": "img", "aria-label": description}
        )

    def add(self, tag: str, note: str = "", **attributes: str | float) -> ElementTree.Element:
        """A shape; `note` shows when the pointer rests on it."""
        named = {
            name.rstrip("_").replace("_", "-"): value
            if isinstance(value, str)
            else f"{value:.2f}".rstrip("0").rstrip(".")
            for name, value in attributes.items()
        }
        shape = ElementTree.SubElement(self.root, tag, named)
        if note:
            ElementTree.SubElement(shape, "title").text = note
        return shape

    def text(self, x: float, y: float, words: str, anchor: str = "start", class_: str = "") -> None:
        """`words` with their baseline at `y`, starting, centred (`middle`) or ending (`end`) at `x`."""
        attributes = {"class": class_} if class_ else {}
        self.add("text", x=x, y=y, text_anchor=anchor, **attributes).text = words

    def __str__(self) -> str:
        return ElementTree.tostring(self.root, encoding="unicode")


def text_width(words: str) -> float:
    """Pixels that `words` take in a broad sans-serif font of `TEXT_SIZE`, estimated letter by letter."""
    return TEXT_SIZE * sum(_letter_width(letter) for letter in words)


def clipped(words: str, width: float) -> str:
    """`words`, or as much of their beginning as fits into `width` pixels and an ellipsis.

    >>> clipped("yarn, not trained", 60)
    'yarn, n…'
    """
    if text_width(words) <= width:
        return words
    room, kept = width - text_width("…"), ""
    for letter in words:
        room -= text_width(letter)
        if room < 0:
            break
        kept += letter
    return kept.rstrip() + "…"


def _letter_width(letter: str) -> float:
    if unicodedata.east_asian_width(letter) in "WF":
        return 1.05
    return 0.75 if letter.isupper() else 0.64 if letter.isdigit() else 0.57
