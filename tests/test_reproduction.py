"""`longlora reproduce`: cells run once, gaps are paired by seed, costs are counted in closed form."""

import json
from dataclasses import replace

import pytest
from test_extension import base_folder as base_folder  # fixtures
from test_extension import documents as documents

from longlora.attention.cost import attention_cost
from longlora.cli import main
from longlora.reproduction import attention_study
from longlora.reproduction.measuring import contexts
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


def test_a_study_runs_each_cell_once_and_pairs_its_seeds(base_folder, documents, held_out, tmp_path, capsys):
    main([*words(base_folder, documents, tmp_path), "--json"])
    document = json.loads(capsys.readouterr().out)
    assert document == json.loads((tmp_path / "attention-study.json").read_text())
    full, rotating = document["methods"]
    assert (full["name"], rotating["name"]) == ("full", "shift-rotating")
    assert full["seeds"] == rotating["seeds"] == [0, 1]
    assert full["gap"]["256"] == {"mean": 0, "error": 0}
    assert full["share"] == 1
    assert 0.2 < rotating["share"] < 0.7
    assert list(full["perplexity"]) == ["64", "128", "256"]
    cells = {path: path.read_text() for path in (tmp_path / "cells").glob("*/evaluation/cell.json")}
    assert len(cells) == 4
    own = [json.loads(text) for path, text in sorted(cells.items()) if "shift-rotating" in str(path)]
    others = [json.loads(text) for path, text in sorted(cells.items()) if "shift-rotating" not in str(path)]
    gaps = [one["perplexity"]["256"] / other["perplexity"]["256"] - 1 for one, other in zip(own, others, strict=True)]
    assert rotating["gap"]["256"]["mean"] == pytest.approx(sum(gaps) / 2)
    assert rotating["gap"]["256"]["error"] == pytest.approx(abs(gaps[0] - gaps[1]) / 2)

    stamps = {path: path.stat().st_mtime_ns for path in cells}
    main(words(base_folder, documents, tmp_path))
    assert {path: path.stat().st_mtime_ns for path in cells} == stamps
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("training attention")
    assert len(printed) == 3

    with pytest.raises(SystemExit) as stop:
        main(words(base_folder, documents, tmp_path, steps=3))
    assert stop.value.code == 2
    assert "was run with steps 2 and is now asked for with 3" in capsys.readouterr().err


def test_an_unknown_cell_and_a_short_context_are_named(base_folder, documents, tmp_path, capsys):
    for changes, said in (
        ({"only": "shfit"}, "--only names 'shfit', which is no cell of attention-study"),
        ({"context": 64}, "--context is 64: it must be above the window"),
    ):
        with pytest.raises(SystemExit):
            main(words(base_folder, documents, tmp_path / "new", **changes))
        assert said in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


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
    from longlora.demo import recipe

    base = replace(recipe("x", 0), training=replace(recipe("x", 0).training, steps=30))
    cells = attention_study.cells(base, (0, 1), ())
    assert len(cells) == 2 * len(attention_study.methods(4096, 30))
    assert all(cell.name.replace("-", "").isalnum() for cell in cells)
    assert len({(cell.name, cell.seed) for cell in cells}) == len(cells)


def test_contexts_double_from_the_window_to_the_target():
    assert contexts(512, 4096) == (512, 1024, 2048, 4096)
    assert contexts(8192, 32768) == (8192, 16384, 32768)
    assert contexts(512, 3000) == (512, 1024, 2048, 3000)
