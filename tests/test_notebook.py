"""The notebook runs and shows what its code does; the illustrated page shows that too, and states measured figures.

The cells are run here in one namespace, in their order, as a kernel does. They have no magics, so a Jupyter kernel
would add a dozen packages and a process to start, and find nothing that this does not.
"""

import ast
import io
import json
import logging
import re
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from test_house import PRIVATE, check_command, longlora_commands

from longlora.reproduction.paper import PAPER

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "notebooks" / "longlora.ipynb"
PAGE = ROOT / "docs" / "longlora.md"
SVG = "image/svg+xml"
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def code_cells() -> list[dict[str, Any]]:
    return [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]


def is_measured(cell: dict[str, Any]) -> bool:
    """Whether what comes out depends on this run: on a training, or on this Python's standard library."""
    return "measured" in cell["metadata"].get("tags", [])


def stored(cell: dict[str, Any], kind: str) -> str:
    """The cell's stored text of one kind, "" where there is none."""
    found = [part["text"] for part in cell["outputs"] if part["output_type"] == "stream" and kind == part["name"]]
    found += [part["data"][kind] for part in cell["outputs"] if kind in part.get("data", {})]
    return "".join(line for lines in found for line in lines)


def run_cell(cell: dict[str, Any], names: dict[str, Any]) -> tuple[str, Any]:
    """What a cell prints, and the value of the expression it ends with."""
    tree = ast.parse("".join(cell["source"]))
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    printed = io.StringIO()
    with redirect_stdout(printed):
        exec(compile(tree, cell["id"], "exec"), names)
        value = eval(compile(ast.Expression(last.value), cell["id"], "eval"), names) if last else None
    return printed.getvalue(), value


def assert_same_picture(svg: str, expected: str) -> None:
    """Equal but for the last digit of a coordinate, which may round differently on another machine."""
    assert NUMBER.sub("#", svg) == NUMBER.sub("#", expected)
    ours, theirs = ([float(number) for number in NUMBER.findall(text)] for text in (svg, expected))
    assert ours == pytest.approx(theirs, abs=0.11)


@pytest.fixture
def pictures(monkeypatch):
    monkeypatch.syspath_prepend(str(NOTEBOOK.parent))
    import pictures

    return pictures


# ------------------------------------------------------------------------------------------------------ notebook


@pytest.mark.slow
def test_every_cell_runs_and_gives_what_is_stored(pictures, monkeypatch):
    from transformers.utils.logging import enable_progress_bar

    monkeypatch.setenv("LONGLORA_NOTEBOOK_QUICK", "1")
    # where it is installed it says on stdout that there is no GPU, with whatever test imports PEFT first
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    names: dict[str, Any] = {"__name__": "__main__"}
    try:
        for cell in code_cells():
            printed, value = run_cell(cell, names)
            if isinstance(value, pictures.Picture):
                ElementTree.fromstring(value.svg)
            assert isinstance(value, pictures.Picture) == bool(stored(cell, SVG)), cell["id"]
            if is_measured(cell):
                continue
            assert printed == stored(cell, "stdout"), cell["id"]
            if isinstance(value, pictures.Picture):
                assert_same_picture(value.svg, stored(cell, SVG))
    finally:
        enable_progress_bar()  # the notebook turns transformers' off
    longest = names["CONTEXT"]
    assert names["measured"]["longlora"][longest] < names["measured"]["as it is"][longest]


def test_the_stored_outputs_are_of_one_whole_run_without_errors():
    cells = code_cells()
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert [cell["id"] for cell in cells if any(part["output_type"] == "error" for part in cell["outputs"])] == []
    assert "".join(stored(cell, "stderr") for cell in cells) == ""
    assert sum(bool(stored(cell, SVG)) for cell in cells) >= 10
    assert NOTEBOOK.stat().st_size < 1e6


def test_the_notebook_names_no_machine():
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert not PRIVATE.search(text)
    assert set(json.loads(text)["metadata"]) == {"kernelspec", "language_info"}
    for cell in json.loads(text)["cells"]:
        assert set(cell["metadata"]) <= {"tags", "execution"}
        assert not PRIVATE.search("".join(cell["source"]))


# ------------------------------------------------------------------------------------------------------ pictures


@pytest.mark.parametrize(("length", "group"), [(16, 4), (29, 6), (30, 7), (5, 8)])
def test_what_heads_see_is_the_definition_of_the_pattern(pictures, length, group):
    def block(i: int, shifted: bool) -> int:
        if length <= group:
            return 0
        return (i + group - group // 2) // group if shifted else i // group

    for pattern, shifted in {"plain": [0, 0, 0, 0], "shifted": [1, 1, 1, 1], "shift": [0, 0, 1, 1]}.items():
        seen = pictures.sees(pattern, length, group)
        for head, moved in enumerate(shifted):
            expected = [[j <= i and block(i, moved) == block(j, moved) for j in range(length)] for i in range(length)]
            assert seen[head].tolist() == expected


def test_the_positions_drawn_are_those_of_the_methods(pictures):
    plain = 10_000.0 ** -(torch.arange(0, 64, 2, dtype=torch.float64) / 64)
    assert pictures.frequencies("none", 4096).tolist() == pytest.approx(plain.tolist(), rel=1e-5)
    assert pictures.frequencies("linear", 4096).tolist() == pytest.approx((plain / 8).tolist(), rel=1e-5)
    slower = plain / pictures.frequencies("ntk", 4096)
    assert slower[[0, -1]].tolist() == pytest.approx([1, 8], rel=1e-5)


def test_a_table_is_read_by_its_row(pictures):
    text = (
        "| a | 1,024 |\n|---|---|\n| x | 2 |\n\nwords\n\n| | 512 | 4,096 |\n|---|---|---|\n| **y** | 1.5 | **2.5** |\n"
    )
    assert pictures.table_of(text, "y") == {"y": {512: 1.5, 4096: 2.5}}
    with pytest.raises(KeyError):
        pictures.table_of(text, "z")


# ---------------------------------------------------------------------------------------------------------- page


def test_the_page_shows_what_the_code_draws(pictures):
    shown = set(re.findall(r"\(longlora/([\w-]+\.svg)\)", PAGE.read_text(encoding="utf-8")))
    drawn = pictures.pictures_of_the_page()
    assert shown == set(drawn) == {path.name for path in (PAGE.parent / "longlora").iterdir()}
    for name, picture in drawn.items():
        file = (PAGE.parent / "longlora" / name).read_text(encoding="utf-8")
        assert_same_picture(picture.svg + "\n", file)


@pytest.mark.parametrize("name", ["longlora.md", "paper_to_code.md"])
def test_what_a_page_names_is_there(name):
    page = PAGE.with_name(name)
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\(((?!https?:)[^)#]+)", text)
    code = re.findall(r"`((?:[a-z_]+/)+(?:[a-z_]+\.py)?|[a-z_]+\.py)`", text) if name == "paper_to_code.md" else []
    assert links
    assert [link for link in links if not (page.parent / link).exists()] == []
    folders = (ROOT, ROOT / "src" / "longlora")
    assert [path for path in code if not any((folder / path).exists() for folder in folders)] == []


def test_the_commands_of_the_page_are_understood():
    commands = longlora_commands(PAGE.read_text(encoding="utf-8"))
    assert len(commands) >= 3
    for arguments in commands:
        check_command(arguments)


def test_every_figure_of_the_page_is_one_that_was_measured():
    """Numbers with a decimal point stand in the pages of the measurements or among the paper's own."""
    sources = "".join(
        (PAGE.parent / name).read_text(encoding="utf-8") for name in ("attention-study.md", "experiments.md")
    )
    known = set(re.findall(r"\d+\.\d+", sources))
    for table in PAPER.values():
        rows = [*table.rows.values(), *table.only_there.values()]
        known |= {f"{figure:.2f}" for row in rows for figure in row if figure is not None}
    text = re.sub(r"\(https?:[^)]*\)", "", PAGE.read_text(encoding="utf-8"))
    stated = re.findall(r"\d+\.\d+", text)
    assert len(stated) >= 15
    assert [figure for figure in stated if figure not in known] == []
    with_errors = re.findall(r"[\d.]+% ± [\d.]+%", text)
    assert len(with_errors) >= 2
    assert [figure for figure in with_errors if figure not in sources] == []
