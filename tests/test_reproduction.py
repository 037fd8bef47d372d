"""`longlora reproduce`: cells run once, gaps are paired by seed, costs are counted in closed form."""

import json
import math
from dataclasses import replace

import pytest
from test_extension import base_folder as base_folder  # fixtures
from test_extension import documents as documents

from longlora.attention.cost import attention_cost
from longlora.cli import main
from longlora.demo import recipe
from longlora.reproduction import attention_study, table_runs
from longlora.reproduction.entries import size
from longlora.run_directory import RunDirectory
from longlora.settings import AttentionSettings, TrainingSettings


def words(base_folder, documents, output, **changes):
    options = {"steps": 2, "seeds": "0,1", "only": "full,shift-rotating", "context": 256, "output": output} | changes
    flags = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    held_out = ["--evaluation-data", str(documents.parent / "held-out")]
    return ["reproduce", "attention-study", "--model", str(base_folder), "--data", str(documents), *held_out, *flags]


@pytest.fixture(scope="module")
def held_out(documents):
    folder = documents.parent / "held-out"
    folder.mkdir(exist_ok=True)
    for number in range(3):
        (folder / f"{number}.txt").write_text((documents / "01.txt").read_text() + f" {number} " + "abc " * 300)


@pytest.fixture
def inline(monkeypatch):
    """Cells in this process, where starting one takes longer than a tiny cell."""
    monkeypatch.setattr(table_runs, "in_processes", lambda todo, work, *_: [work(item) for item in todo])


def test_a_study_runs_each_cell_once_and_pairs_its_seeds(base_folder, documents, held_out, inline, tmp_path, capsys):
    main([*words(base_folder, documents, tmp_path), "--json"])
    document = json.loads(capsys.readouterr().out)
    assert document == json.loads((tmp_path / "attention-study.json").read_text())
    quality, copies, recalled = document["tables"]
    assert quality["columns"] == ["64", "128", "256", "seconds", "gap %", "pairs"]
    entries = {row["key"]: row["entries"] for row in quality["rows"]}
    full, rotating = entries["full"], entries["shift-rotating"]
    assert full[4]["seeds"] == {"0": 0, "1": 0}
    assert full[5]["mean"] == 1
    assert 0.2 < rotating[5]["mean"] < 0.7
    assert entries["shift"] == [None] * 6
    gaps = [rotating[2]["seeds"][seed] / full[2]["seeds"][seed] - 1 for seed in "01"]
    assert rotating[4]["mean"] == pytest.approx(sum(gaps) / 2)
    # two seeds: half of their distance is the standard error, and the t quantile is Cauchy's
    half = abs(gaps[0] - gaps[1]) / 2 * math.tan(0.475 * math.pi)
    assert rotating[4]["high"] - rotating[4]["mean"] == pytest.approx(half)
    # all sorts of tokens together are the perplexity at the longest context, here with the same windows
    sorts = RunDirectory(tmp_path / "cells" / "full-seed0").read_evaluation("copies")["by_distance"]
    nll = sum(sort["nll"] for sort in sorts) / sum(sort["tokens"] for sort in sorts)
    assert full[2]["seeds"]["0"] == pytest.approx(math.exp(nll))
    assert [row["entries"][0]["seeds"]["0"] for row in copies["rows"][:1]] == [pytest.approx(sorts[0]["perplexity"])]
    assert all(0 <= entry["mean"] <= 1 for entry in recalled["rows"][0]["entries"])
    written = {path.name for path in tmp_path.iterdir()}
    for name in ("attention-study.md", "trade-off.csv", "trade-off.svg", "trade-off.pdf", "copies.csv", "recall.csv"):
        assert name in written
    assert "recall.svg" not in written, "half of a table is not drawn"

    cells = list((tmp_path / "cells").glob("*/evaluation/cell.json"))
    assert len(cells) == 4
    stamps = {path: path.stat().st_mtime_ns for path in cells}
    main(words(base_folder, documents, tmp_path))
    assert {path: path.stat().st_mtime_ns for path in cells} == stamps
    assert "S², 1/3 of layers full, drawn anew" in capsys.readouterr().out

    with pytest.raises(SystemExit) as stop:
        main(words(base_folder, documents, tmp_path, steps=3))
    assert stop.value.code == 2
    assert "was run with steps 2 and is now asked for with 3" in capsys.readouterr().err


class TestAttentionCost:
    FULL = 4096 * 4097 // 2
    TRAINING = TrainingSettings(steps=12, batch=2)

    def share(self, tiny_model, **chosen):
        config = tiny_model("llama", num_hidden_layers=6).config
        return attention_cost(AttentionSettings(group_size=1024, **chosen), self.TRAINING, 4096, config)

    def test_of_each_pattern_is_the_closed_form(self, tiny_model):
        plain = 4 * (1024 * 1025 // 2)
        shifted = 2 * (512 * 513 // 2) + 3 * (1024 * 1025 // 2)
        s2 = (plain + shifted) / 2 / self.FULL
        assert self.share(tiny_model)["share"] == pytest.approx(s2)
        assert self.share(tiny_model, pattern="full")["share"] == 1
        scatter = (8 * (512 * 513 // 2) + 7 * 512 * 512) / self.FULL
        assert self.share(tiny_model, pattern="scatter")["share"] == pytest.approx(scatter)
        assert self.share(tiny_model, full_attention_steps=3)["share"] == pytest.approx(s2 * 0.75 + 0.25)
        assert self.share(tiny_model, full_attention_layers=(0, -1))["share"] == pytest.approx((4 * s2 + 2) / 6)
        assert self.share(tiny_model, full_layers_share=1 / 3)["share"] == pytest.approx((4 * s2 + 2) / 6, rel=1e-6)

    def test_counts_rows_layers_and_heads(self, tiny_model):
        config = tiny_model("llama", num_hidden_layers=6).config
        whole = self.share(tiny_model, pattern="full")
        assert whole["pairs"] == whole["full_pairs"] == self.FULL * config.num_attention_heads * 6 * 12 * 2


def test_every_method_is_made_into_settings_and_its_name_is_a_file_name():
    base = replace(recipe("x", 0), training=replace(recipe("x", 0).training, steps=30))
    known = attention_study.methods(4096, 30)
    cells = [method.cell(base, seed) for method in known.values() for seed in (0, 1)]
    assert all(cell.name.replace("-", "").isalnum() for cell in cells)
    assert len({(cell.name, cell.seed) for cell in cells}) == len(cells)
    assert known["full-half"].cell(base, 0).settings.training.steps == 15


def test_contexts_double_from_the_window_to_the_target():
    quality = attention_study.tables(size(512, 4096, 30))[0]
    assert quality.columns[:4] == ("512", "1,024", "2,048", "4,096")
