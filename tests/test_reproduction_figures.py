"""The tables' figures: every number drawn where its axis puts it, and no figure of half a table."""

import re
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from longlora.reproduction.entries import Figure, size
from longlora.reproduction.figures import of_table
from longlora.reproduction.tables import TABLES

SVG = "{http://www.w3.org/2000/svg}"


def entry(mean, error=None):
    return {"mean": mean, "error": error, "seeds": {"0": mean}}


def document(rows):
    columns = ["1,024", "2,048", "4,096"]
    entries = [{"key": key, "label": f"way {key}", "entries": found} for key, found in rows.items()]
    return {"title": "Ways", "columns": columns, "number": ".3f", "contexts": [1024, 2048, 4096], "rows": entries}


def circles(drawing):
    """(x, y) of each dot by what it says when it is pointed at."""
    found = [
        each for each in ElementTree.fromstring(drawing).iter(f"{SVG}circle") if each.find(f"{SVG}title") is not None
    ]
    return {each.find(f"{SVG}title").text: (float(each.get("cx")), float(each.get("cy"))) for each in found}


def scale(drawing, axis):
    """Pixels to values, from the ticks' labels (which lie to the left of the axis, or below it)."""
    texts = [
        (each.text, float(each.get("x")), float(each.get("y")))
        for each in ElementTree.fromstring(drawing).iter(f"{SVG}text")
    ]
    ticks = [(x if axis == "x" else y - 4, float(text)) for text, x, y in texts if re.fullmatch(r"\d+(\.\d+)?", text)]
    (p0, v0), (p1, v1) = ticks[0], ticks[-1]
    return lambda pixel: v0 + (pixel - p0) * (v1 - v0) / (p1 - p0)


def test_lines_by_column():
    rows = {
        "a": [entry(12.0), entry(11.0, 0.25), entry(10.5)],
        "b": [entry(12.5), entry(11.5), entry(10.0)],
        "c": [None] * 3,
    }
    drawing = of_table(document(rows), Figure(kind="lines", across="context", rows=("a", "b")))
    dots, value = circles(drawing), scale(drawing, "y")
    for key in "ab":
        points = [dots[f"way {key}: {each['mean']:.4g}"] for each in rows[key]]
        assert [value(y) for _, y in points] == pytest.approx([each["mean"] for each in rows[key]], abs=0.01)
        steps = [right[0] - left[0] for left, right in pairwise(points)]
        assert steps[0] == pytest.approx(steps[1])
        assert steps[0] > 100
    assert "way c" not in drawing
    (bar,) = re.findall(r'd="M[\d.]+ ([\d.]+)V([\d.]+)"', drawing)
    assert sorted(value(float(end)) for end in bar) == pytest.approx([10.75, 11.25], abs=0.01)


def test_dots_by_row():
    rows = {"a": [entry(8.0), entry(9.0), None], "b": [entry(24.0, 1.0), entry(8.5), None]}
    drawing = of_table(document(rows), Figure(kind="dots", columns=(0, 1)))
    dots, value = circles(drawing), scale(drawing, "x")
    for key, found in rows.items():
        points = [dots[f"way {key}: {each['mean']:.4g}"] for each in found[:2]]
        assert [value(x) for x, _ in points] == pytest.approx([each["mean"] for each in found[:2]], abs=0.05)
        assert points[0][1] == points[1][1]
    assert "4,096" not in drawing
    (bar,) = re.findall(r'd="M([\d.]+) [\d.]+H([\d.]+)" stroke="#2563eb"', drawing)
    assert [value(float(end)) for end in bar] == pytest.approx([23.0, 25.0], abs=0.05)


@pytest.mark.parametrize("kind", ["lines", "dots", "panels"])
def test_half_a_table_has_no_figure(kind):
    rows = {"a": [entry(8.0), None, entry(9.0)]}
    assert of_table(document(rows), Figure(kind=kind)) is None
    assert of_table(document(rows), None) is None


@pytest.mark.parametrize("name", TABLES)
def test_what_is_drawn_is_there(name):
    table = TABLES[name](size(512, None, 30))
    assert table.figure is not None
    drawn = [row for row in table.rows if not table.figure.rows or row.key in table.figure.rows]
    assert len(drawn) == (len(table.figure.rows) or len(table.rows))
    for row in drawn:
        for column in table.figure.columns or range(len(table.columns)):
            assert row.entries[column] is not None
