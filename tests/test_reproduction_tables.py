"""`longlora reproduce tableN`: cells shared, gone on with and taken over; checks judged; the paper's figures beside."""

import json
import math
import multiprocessing
from dataclasses import replace
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from process_work import Item, note
from test_extension import base_folder as base_folder  # fixtures
from test_extension import documents as documents
from transformers import AutoModelForCausalLM

from longlora import cli
from longlora.cli import main
from longlora.errors import UserError
from longlora.report.recipe import defaults
from longlora.reproduction import command, measuring, table_runs
from longlora.reproduction.base import base_settings
from longlora.reproduction.cells import differences
from longlora.reproduction.entries import Check, Entry, Size, size
from longlora.reproduction.page import LIST_BEGINS, LIST_ENDS, OWN_WORDS, with_list, write_page
from longlora.reproduction.paper import PAPER, TABLE_7
from longlora.reproduction.processes import in_processes
from longlora.reproduction.table_document import ONE_SEED, document_of, grid, judged, numbers, paper_grid, sentence
from longlora.reproduction.table_runs import jobs_of, run_job
from longlora.reproduction.tables import PAPERS as TABLES
from longlora.reproduction.tables import TABLES as ALL
from longlora.reproduction.ways import Way
from longlora.run_directory import RunDirectory, plain
from longlora.settings import PAPER_TABLES, STUDIES, ExtendSettings, ReproduceSettings

DEMO = Size(512, (1024, 2048, 4096), 30)


@pytest.fixture
def inline(monkeypatch):
    """Cells in this process, where starting one takes longer than a tiny cell; the names of those that were run."""
    done = []

    def run(todo, work, jobs, minutes=None):
        for item in todo:
            work(item)
            done.append(item.cell.name)

    monkeypatch.setattr(table_runs, "in_processes", run)
    return done


@pytest.fixture(scope="module")
def held_out(documents):
    folder = documents.parent / "measured"
    folder.mkdir(exist_ok=True)
    for number in range(2):
        (folder / f"{number}.txt").write_text((documents / "01.txt").read_text() + f" {number} " + "abc " * 60)
    return folder


@pytest.fixture
def words(base_folder, documents, held_out, tmp_path):
    def make(name, output="out", **changes):
        options = {"steps": 2, "context": 128, "lr": "1e-3", "output": tmp_path / output} | changes
        flags = [word for option, given in options.items() for word in (f"--{option}", str(given))]
        where = ["--model", str(base_folder), "--data", str(documents), "--evaluation-data", str(held_out)]
        return ["reproduce", name, *where, *flags]

    return make


def demo_base() -> ExtendSettings:
    return base_settings(ReproduceSettings(name="table1"), DEMO.top)


# ------------------------------------------------------------------------------------------------------ whole tables


def test_tables_share_cells_and_finished_ones_are_never_run_again(words, inline, tmp_path, capsys):
    cells = [f"yarn-128-{pattern}-lora-norm-embed" for pattern in ("full", "plain", "shift")]
    table2 = words("table2", only=",".join(cells))
    main([*table2, "--json"])
    document = json.loads(capsys.readouterr().out)
    assert document == json.loads((tmp_path / "out" / "table2.json").read_text())
    assert sorted(inline) == cells
    assert len(document["left"]) == 4
    rows = {row["key"]: row for row in document["rows"]}
    full, own = (rows["shift"]["entries"][column]["mean"] for column in (0, 1))
    assert full != own
    assert rows["full"]["entries"][0]["mean"] == rows["full"]["entries"][1]["mean"]
    assert rows["shift"]["paper"] == [8.12, 8.64]
    assert [check["verdict"] == "not run" for check in document["checks"]].count(True) == 4

    main(words("table1"))
    printed = capsys.readouterr().out
    assert "paper: 32,768" in printed
    # the context of 128 is twice the window, so there is one context and three cells of table 2 serve table 1
    assert inline[3:] == ["untrained-linear-128", "untrained-ntk-128", "untrained-yarn-128"]
    page = (tmp_path / "out" / "table1.md").read_text()
    assert "## What the paper says, and what is so here" in page
    assert "--context 128" in page

    before = list(inline)
    main(table2)
    assert inline == before
    capsys.readouterr()


def test_a_new_measurement_of_a_finished_cell_loads_what_training_left(words, inline, tmp_path, capsys):
    """The model as saved and loaded gives the perplexity that the model in memory gave, and is not trained again."""
    name = "yarn-128-shift-lora-norm-embed"
    main([*words("table2", only=name), "--json"])
    document = json.loads(capsys.readouterr().out)
    assert len(document["left"]) == 6
    folder = tmp_path / "out" / "cells" / f"{name}-seed0"
    weights = (folder / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns
    kept = {}
    for measurement in ("perplexity-128", "own-128"):
        file = folder / "evaluation" / f"{measurement}.json"
        kept[file] = json.loads(file.read_text())["perplexity"]
        file.unlink()
    main([*words("table2", only=name), "--json"])
    for file, perplexity in kept.items():
        assert json.loads(file.read_text())["perplexity"] == pytest.approx(perplexity, rel=1e-3)
    assert (folder / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns == weights


def test_a_killed_cell_goes_on_from_its_checkpoint(words, inline, tmp_path, capsys, monkeypatch):
    name = "yarn-128-shift-lora-norm-embed"
    arguments = words("table2", only=name, steps=6)
    settings = cli.parse(arguments)[1]
    killed = []

    def die(*_):
        killed.append(1)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("longlora.training.extension.save_result", die)
        with pytest.raises(KeyboardInterrupt):
            command.reproduce(settings)
    run = RunDirectory(tmp_path / "out" / "cells" / f"{name}-seed0")
    assert killed
    assert run.read_evaluation("cell") is None
    assert run.last_checkpoint().name == "checkpoint-6"
    stamps = [record["seconds"] for record in run.read_metrics()]
    main(arguments)
    # the last checkpoint is taken over as it is: not a step is trained again, and none too many
    assert [record["seconds"] for record in run.read_metrics()] == stamps
    assert len(stamps) == 6
    assert run.read_evaluation("cell")["training"]["steps"] == 6
    capsys.readouterr()


def test_cells_of_other_reproductions_are_taken_over_where_their_settings_are_the_same(words, inline, tmp_path, capsys):
    name = "yarn-128-shift-lora-norm-embed"
    main(words("table2", only=name))
    (tmp_path / "out" / "cells" / f"{name}-seed0").rename(tmp_path / "out" / "cells" / "shift-seed0")
    main(words("table2", "new", only=name, reuse=tmp_path / "out"))
    result = RunDirectory(tmp_path / "new" / "cells" / f"{name}-seed0").read_evaluation("cell")
    assert result["from"].endswith("shift-seed0")
    assert result["name"] == name
    main([*words("table2", "other", only=name, steps=3, reuse=tmp_path / "out"), "--json"])
    assert "from" not in RunDirectory(tmp_path / "other" / "cells" / f"{name}-seed0").read_evaluation("cell")
    capsys.readouterr()


@pytest.mark.parametrize("name", ["table6", "table8"])
def test_retrieval_and_perplexity_on_the_way(words, inline, capsys, monkeypatch, name):
    monkeypatch.setattr(measuring, "PASSAGES", 2)
    main([*words(name, context=512, steps=6), "--json"])
    document = json.loads(capsys.readouterr().out)
    entries = {row["key"]: row["entries"] for row in document["rows"]}
    if name == "table6":
        assert document["columns"] == ["96", "192", "320", "416"]
        assert all(0 <= entry["mean"] <= 1 for row in entries.values() for entry in row)
    else:
        assert document["columns"] == [str(step) for step in range(7)]
        assert entries["full"][0] == entries["norm-embed"][0]
        assert all(row[6]["mean"] < row[0]["mean"] for row in entries.values())


def test_what_trains_contexts_group_sizes_and_figure_1_are_made_of_the_same_cells(words, inline, tmp_path, capsys):
    lora, best = "yarn-128-shift-lora", "yarn-128-shift-lora-norm-embed"
    everything, both = "yarn-128-shift-full-rate0_15", "yarn-128-full-full-rate0_15"
    chosen = {
        "table3": [everything, lora, f"{lora}-r256", best],
        "table4": [],
        "table11": ["yarn-128-full-lora-norm-embed", "yarn-128-shift-6-groups-lora-norm-embed", best],
        "figure1": [],
    }
    found = {}
    for name, only in chosen.items():
        main([*words(name, **({"only": ",".join(only)} if only else {})), "--json"])
        found[name] = json.loads(capsys.readouterr().out)
    trained = [*chosen["table3"], both, *chosen["table11"][:2], "yarn-128-full-lora"]
    # table 4 measures two of table 3's cells at the old window too
    assert sorted(inline) == sorted([*trained, everything, best])

    rows = {name: {row["key"]: row["entries"] for row in document["rows"]} for name, document in found.items()}
    same = [rows["table3"]["norm-embed"][0], rows["table4"]["shift-lora-0"][1], rows["table11"]["128"][2]]
    assert [entry["mean"] for entry in same] == [rows["figure1"]["longlora"][0]["mean"]] * 3
    assert found["table4"]["columns"] == ["64", "128"]
    assert [entry is None for entry in rows["table11"]["128"]] == [False, True, False, False, True]

    perplexity, millions, rate, embed_rate = zip(
        *(rows["table3"][key] for key in ("full", "rank-8", "rank-256")), strict=True
    )
    assert len({entry["mean"] for entry in perplexity}) == 3
    assert millions[2]["mean"] == pytest.approx(32 * millions[1]["mean"])
    whole = AutoModelForCausalLM.from_pretrained(found["table3"]["model"]).num_parameters()
    assert millions[0]["mean"] == whole / 1e6
    assert [entry["mean"] for entry in rate] == [1.5e-4, 1e-3, 1e-3]
    assert [entry and entry["mean"] for entry in embed_rate] == [1.5e-4, None, None]

    assert found["figure1"]["left"] == []
    assert all(entry["mean"] > 0 for entries in rows["figure1"].values() for entry in entries)
    assert (tmp_path / "out" / "figure1.pdf").read_bytes().startswith(b"%PDF")
    assert (tmp_path / "out" / "figure1.csv").read_text().startswith("row,column,mean,low,high,seeds")
    drawing = ElementTree.parse(tmp_path / "out" / "figure1.svg").getroot()
    said = " ".join(drawing.itertext())
    assert all(label in said for label in ("perplexity", "seconds of training", "memory, GB", "LongLoRA"))


def test_mistakes_are_named(words, inline, tmp_path, capsys):
    for arguments, said in (
        (words("table2", only="shfit"), "unknown cell of --only 'shfit'"),
        (words("table2", context=64), "--context is 64: it must be above the model's window, 64"),
        (words("table2", reuse=tmp_path), "holds no cells"),
        (["reproduce", "table1", "--data", str(tmp_path)], "--evaluation-data is missing"),
        (words("table2", context=2048, only="yarn-2048-shift-lora-norm-embed"), "documents to measure on has 2,048"),
        (["reproduce", "table5"], "table5"),
        (words("attention-study", only="shfit"), "unknown cell of --only 'shfit'"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2
        assert said in capsys.readouterr().err
    assert inline == []


# ------------------------------------------------------------------------------------------------- cells and budgets


def test_nothing_is_begun_after_the_minutes(tmp_path):
    in_processes([Item(tmp_path, 0)], partial(note, wrong="-"), jobs=1, minutes=0)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("wrong", "items", "error", "said"),
    [
        ("1 is a mistake", 3, UserError, "^--steps is 0.$"),
        ("0 is killed", 1, UserError, "the process of 0 was killed: where memory ran out"),
        ("0 is odd", 1, RuntimeError, "OddError.*\\n.*process_work.py"),
    ],
)
def test_what_goes_wrong_in_a_process_is_raised_here_and_stops_the_others(tmp_path, wrong, items, error, said):
    """Where there are three, item 0 ends at once, and item 2, begun beside item 1, would work for ten minutes."""
    with pytest.raises(error, match=f"(?s){said}"):
        in_processes([Item(tmp_path, number) for number in range(items)], partial(note, wrong=wrong), jobs=2)
    assert (tmp_path / "0").exists() == (items == 3)
    assert multiprocessing.active_children() == []


def test_a_flag_that_a_run_did_not_state_had_what_is_its_default_now():
    base = demo_base()
    assert differences(base, {}).keys() >= {"context", "lr"}
    stated = {name: plain(given) for name, (_, given) in differences(base, {}).items()}
    assert differences(base, stated) == {}
    usual = dict(defaults(ExtendSettings))
    assert (usual["rank"], usual["weight_decay"], usual["packing"]) == (8, 0.0, "concatenate")
    weighed = replace(base, training=replace(base.training, weight_decay=0.1))
    assert differences(weighed, stated) == {"weight_decay": (0.0, 0.1)}


def test_every_cell_has_one_name_and_a_name_one_cell():
    base = demo_base()
    seen = {}
    for name, make in TABLES.items():
        for job in jobs_of([make(DEMO)], base, (0, 1), Path("x")):
            cell = job.cell
            assert cell.name.replace("-", "").replace("_", "").isalnum()
            known = seen.setdefault((cell.name, cell.seed), cell)
            assert known.settings == cell.settings, (name, cell.name)
            rows = cell.settings.training.batch * cell.settings.positions.context
            assert rows == 8192
    # every difference between two cells is in their names
    kept = [str(replace(cell.settings, output="")) + str(cell.trained) for cell in seen.values()]
    assert len(set(kept)) == len(kept)


def test_rates_follow_what_trains():
    base = demo_base()
    rates = {}
    for name, way in {
        "lora": Way(context=4096, train=("lora",)),
        "both": Way(context=4096),
        "one": Way(context=4096, one_rate=True),
        "full": Way(context=4096, train=("full",), rate=0.15),
    }.items():
        training = way.cell(base, 3).settings.training
        rates[name] = (training.lr, training.norm_lr, training.embed_lr)
        assert training.seed == 3
    assert rates == {
        "lora": (2e-3, None, None),
        "both": (2e-3, 2e-3, 1e-4),
        "one": (2e-3, None, None),
        "full": (3e-4, None, None),
    }


def test_contexts_are_halves_above_the_window():
    assert size(512, None, 30) == DEMO
    assert size(8192, 32768, 30).contexts == (16384, 32768)


# ------------------------------------------------------------------------------------------------------- what is said


def test_claims_are_judged_by_students_t_over_seeds():
    near = Check("near", ("a", 0), "near", ("b", 0), 0.1)
    values = {("a", 0): {0: 10.5}, ("b", 0): {0: 10.0, 1: 3.0}}
    assert judged(near, values)["verdict"] == ONE_SEED
    assert sentence(judged(near, values), ".3f") == "near: one seed: not judged, 10.5 against 10"
    assert judged(replace(near, right=("c", 0)), values)["verdict"] == "not run"
    # differences 1, 2, 3: mean 2, standard error 1 / sqrt(3), t = 3.46, which two degrees of freedom reach by chance
    three = {("a", 0): {0: 2.0, 1: 4.0, 2: 6.0}, ("b", 0): {0: 1.0, 1: 2.0, 2: 3.0}}
    found = judged(replace(near, relation="above"), three)
    # the tail of Student's t with two degrees of freedom in closed form
    t = 2 * 3**0.5
    assert found["p"] == pytest.approx(1 - t / (2 + t * t) ** 0.5)
    assert found["verdict"] == "undecided"
    assert (found["left"], found["right"], found["seeds"]) == (4.0, 2.0, [0, 1, 2])
    assert sentence(found, ".3f") == "near: undecided, 4 against 2 (3 seeds, p = 0.074)"
    close = {("a", 0): {0: 2.0, 1: 3.1, 2: 4.0}, ("b", 0): {0: 1.0, 1: 2.0, 2: 3.0}}
    assert judged(replace(near, relation="above"), close)["verdict"] == "holds"
    assert judged(replace(near, relation="far above"), close)["verdict"] == "undecided"
    assert judged(replace(near, near=0.01), close)["verdict"] == "does not hold"


def test_runs_of_one_distribution_are_called_different_in_a_twentieth_of_the_cases():
    """And a difference of three standard errors between ten seeds a side is found."""
    check = Check("above", ("a", 0), "above", ("b", 0))
    rng = np.random.default_rng(0)

    def called(shift: float, seeds: int, times: int = 1000) -> float:
        verdicts = []
        for own, other in zip(rng.normal(shift, 1, (times, seeds)), rng.normal(0, 1, (times, seeds)), strict=True):
            values = {("a", 0): dict(enumerate(own)), ("b", 0): dict(enumerate(other))}
            verdicts.append(judged(check, values)["verdict"])
        return sum(verdict in ("holds", "does not hold") for verdict in verdicts) / times

    for seeds in (2, 3, 10):
        assert 0.035 <= called(0, seeds) <= 0.065
    assert called(3 * (2 / 10) ** 0.5, 10) > 0.7


@pytest.mark.parametrize("name", TABLES)
def test_every_check_and_every_figure_of_the_paper_is_about_a_row_there_is(name):
    table = TABLES[name](DEMO)
    keys = {row.key: row for row in table.rows}
    assert len(keys) == len(table.rows)
    for row in table.rows:
        assert len(row.entries) == len(table.columns)
    for check in table.checks:
        for key, column in (check.left, check.right):
            assert isinstance(keys[key].entries[column], Entry), (check.claim, key, column)
    paper = PAPER[name]
    assert set(paper.rows) <= set(keys)
    for figures in (*paper.rows.values(), *paper.only_there.values()):
        assert len(figures) == len(paper.columns)


def test_the_papers_figures_stand_beside_ours():
    table = TABLES["table2"](DEMO)
    values = {("shift", 0): {0: 10.0, 1: 10.2}, ("shift", 1): {0: 11.0}}
    document = document_of(table, values, PAPER["table2"])
    lines = grid(document)
    assert lines[0] == ["", "full attention", "its own", "paper: full attention", "paper: its own"]
    # two seeds: the standard error, 0.1, times the quantile of Cauchy's distribution
    assert lines[2] == ["S², across heads", "10.100 ± 1.271", "11.000", "8.12", "8.64"]
    low, high = (10.1 + sign * 0.1 * math.tan(0.475 * math.pi) for sign in (-1, 1))
    first, second = (line for line in numbers(document)[1:])
    assert first == [
        "S², across heads",
        "full attention",
        pytest.approx(10.1),
        pytest.approx(low),
        pytest.approx(high),
        2,
    ]
    assert second == ["S², across heads", "its own", 11.0, None, None, 1]
    assert lines[-1] == ["block sparse", "", "", "8.30", "–"]
    assert paper_grid(document) == []
    groups = document_of(TABLES["table11"](DEMO), {}, PAPER["table11"])
    assert paper_grid(groups)[1] == ["8,192", "8.02", "8.04", "8.04", "8.10", "8.16"]


def test_table_7_equals_the_paper_in_every_cell(tmp_path, capsys):
    main(["reproduce", "table7", "--output", str(tmp_path), "--pages", str(tmp_path / "pages"), "--json"])
    document = json.loads(capsys.readouterr().out)
    assert document["equal"] is True
    assert {row["context"]: row["ours"] for row in document["rows"]} == TABLE_7
    assert "3,118.0" in (tmp_path / "pages" / "table7.md").read_text()


def test_a_page_keeps_what_people_wrote(tmp_path):
    file = tmp_path / "table1.md"
    write_page(file, "# One\n\nfirst\n")
    assert file.read_text().startswith("# One\n\nfirst\n\n" + OWN_WORDS)
    file.write_text(file.read_text().replace("(Not written yet.)", "It agrees."))
    write_page(file, "# One\n\nsecond\n")
    assert file.read_text() == f"# One\n\nsecond\n\n{OWN_WORDS}\n\nIt agrees.\n"


def test_pages_are_listed_beside_them(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"Ours\n\n{LIST_BEGINS}old\n{LIST_ENDS}\nEnd\n")
    for name in ("table11", "table2"):
        write_page(tmp_path / f"{name}.md", f"# The title of {name}\n\ntext\n")
    listed = "| [table2](table2.md) | The title of table2 |\n| [table11](table11.md) | The title of table11 |"
    text = f"Ours\n\n{LIST_BEGINS}\n| page | shows |\n|---|---|\n{listed}\n\n{LIST_ENDS}\nEnd\n"
    assert readme.read_text() == text
    readme.write_text("no list\n")
    write_page(tmp_path / "table2.md", "# Anew\n")
    assert readme.read_text() == "no list\n"


def test_the_list_of_our_results_is_of_the_pages_there_are():
    folder = Path(__file__).parents[1] / "docs" / "results"
    text = (folder / "README.md").read_text()
    assert LIST_BEGINS in text
    assert with_list(text, folder) == text


def test_the_command_knows_every_table():
    assert set(PAPER_TABLES) == {*TABLES, "table7"}
    assert set(ALL) == {*TABLES, *STUDIES}
    assert run_job.__module__ == "longlora.reproduction.table_runs"
