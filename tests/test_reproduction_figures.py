"""The tables' figures: every number drawn with its interval, labels apart, and no figure of half a table."""

from itertools import pairwise

import matplotlib
import pytest

from longlora.reproduction.entries import Figure, size
from longlora.reproduction.figures import LABEL_HEIGHT, STYLE, of_table, save
from longlora.reproduction.tables import TABLES


def entry(mean, half=None):
    low, high = (None, None) if half is None else (mean - half, mean + half)
    return {"mean": mean, "low": low, "high": high, "seeds": {"0": mean}}


def document(rows):
    columns = ["1,024", "2,048", "4,096"]
    entries = [{"key": key, "label": f"way {key}", "entries": found} for key, found in rows.items()]
    return {"title": "Ways", "columns": columns, "number": ".3f", "contexts": [1024, 2048, 4096], "rows": entries}


def drawn(axes):
    """Means of each series and the ends of its intervals."""
    found = []
    for series in axes.containers:
        line, _, (bars,) = series
        found.append((line.get_xdata(), line.get_ydata(), [segment.tolist() for segment in bars.get_segments()]))
    return found


def test_lines_by_column():
    rows = {
        "a": [entry(12.0), entry(11.0, 0.25), entry(10.5)],
        "b": [entry(12.5), entry(11.5), entry(10.0)],
        "c": [None] * 3,
    }
    (axes,) = of_table(document(rows), Figure(kind="lines", across="context", rows=("a", "b"))).axes
    (x, a, bars), (_, b, _) = drawn(axes)
    assert (list(x), list(a), list(b)) == ([0, 1, 2], [12.0, 11.0, 10.5], [12.5, 11.5, 10.0])
    assert bars[1] == [[1, 10.75], [1, 11.25]]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1,024", "2,048", "4,096"]
    assert [label.get_text() for label in axes.texts] == ["way a", "way b"]
    assert [label.xy for label in axes.texts] == [(2, 10.5), (2, 10.0)]


def test_dots_by_row_and_points_by_cost():
    rows = {"a": [entry(8.0), entry(9.0), None], "b": [entry(24.0, 1.0), entry(8.5), None]}
    (axes,) = of_table(document(rows), Figure(kind="dots", columns=(0, 1))).axes
    first, second = drawn(axes)
    assert (list(first[0]), list(second[0])) == ([8.0, 24.0], [9.0, 8.5])
    assert first[2][1] == [[23.0, 1], [25.0, 1]]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["way a", "way b"]
    (axes,) = of_table(document(rows), Figure(kind="points", columns=(1, 0), across="cost")).axes
    assert [(list(x), list(y)) for x, y, _ in drawn(axes)] == [([9.0], [8.0]), ([8.5], [24.0])]


def test_labels_of_close_lines_stand_apart():
    rows = {name: [entry(9.0 + place / 1000)] * 3 for place, name in enumerate("abcde")}
    with matplotlib.rc_context(STYLE):
        plot = of_table(document(rows), Figure(kind="lines"))
        plot.draw_without_rendering()
        boxes = sorted((each.get_window_extent() for each in plot.axes[0].texts), key=lambda box: box.y0)
    assert all(above.y0 - below.y0 >= LABEL_HEIGHT * plot.dpi / 72 - 1 for below, above in pairwise(boxes))


@pytest.mark.parametrize("kind", ["lines", "dots", "panels"])
def test_half_a_table_has_no_figure(kind, tmp_path):
    rows = {"a": [entry(8.0), None, entry(9.0)]}
    assert not save(document(rows), Figure(kind=kind), tmp_path / "x")
    assert not save(document(rows), None, tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_a_figure_is_the_same_file_each_time(tmp_path):
    rows = {"a": [entry(8.0, 0.5), entry(7.0), entry(9.0)]}
    written = []
    for _ in range(2):
        assert save(document(rows), Figure(kind="lines"), tmp_path / "x")
        written.append({path.name: path.read_bytes() for path in tmp_path.iterdir()})
    assert written[0] == written[1]
    assert set(written[0]) == {"x.svg", "x.pdf"}


@pytest.mark.parametrize("name", TABLES)
def test_what_is_drawn_is_there(name):
    tables = TABLES[name](size(512, None, 30))
    assert any(table.figure for table in tables)
    for table in tables:
        if table.figure is None:
            continue
        shown = [row for row in table.rows if not table.figure.rows or row.key in table.figure.rows]
        assert len(shown) == (len(table.figure.rows) or len(table.rows))
        for row in shown:
            for column in table.figure.columns or range(len(table.columns)):
                assert row.entries[column] is not None
