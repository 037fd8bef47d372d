"""`longlora demo` in little: one step on a few generated documents, and what it leaves behind."""

import json
import random
from dataclasses import replace

import pytest

from longlora import demo
from longlora.cli import main
from longlora.settings import CorpusSettings


@pytest.fixture
def small_demo(tmp_path, monkeypatch):
    """The demo's own recipe for a quarter of its context, with one step and documents of its own."""
    folder = tmp_path / "documents"
    folder.mkdir()
    draw = random.Random(0)
    for number in range(5):
        lines = [f"def function_{draw.randrange(99)}(x): return x + {draw.randrange(99)}" for _ in range(150)]
        (folder / f"{number}.py").write_text("\n".join(lines))
    recipe = demo.recipe

    def small(output, seed):
        settings = recipe(output, seed)
        return replace(
            settings,
            corpus=CorpusSettings(data=(str(folder),)),
            training=replace(settings.training, steps=1, batch=1),
            perplexity=replace(settings.perplexity, contexts=(512, 1024), max_documents=1),
        )

    monkeypatch.setattr(demo, "recipe", small)
    monkeypatch.setattr(demo, "CONTEXT", 1024)
    return tmp_path / "demo"


@pytest.mark.slow
def test_the_demo_leaves_a_run_with_every_line_of_the_table(small_demo, capsys):
    small_demo.mkdir()
    (small_demo / "settings.yaml").write_text("command: demo\n")
    (small_demo / "left-over.txt").write_text("of an earlier demo")
    main(["demo", "--output", str(small_demo)])
    assert not (small_demo / "left-over.txt").exists()
    story = capsys.readouterr().out
    assert "longlora extend YOUR_MODEL" in story
    assert "report.html" in story
    summary = json.loads((small_demo / "evaluation" / "summary.json").read_text())
    assert list(summary["evaluation"]) == ["base", "untrained-linear", "untrained-yarn", "paper", "trained"]
    for document in summary["evaluation"].values():
        assert [result["context"] for result in document["results"]] == [512, 1024]
        assert [result["stride"] for result in document["results"]] == [256, 512]
    assert summary["costs"]["rows"][0]["length"] == demo.CONTEXT
    assert (small_demo / "adapter" / "adapter_model.safetensors").exists()
    assert (small_demo / "paper-recipe" / "adapter" / "adapter_model.safetensors").exists()
    page = (small_demo / "report.html").read_text()
    assert "paper&#39;s recipe" in page or "paper's recipe" in page


def test_a_folder_that_is_no_demo_is_left_alone(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(SystemExit) as stop:
        main(["demo", "--output", str(tmp_path)])
    assert stop.value.code == 2
    assert "holds no demo" in capsys.readouterr().err
    assert (tmp_path / "thesis.txt").read_text() == "mine"
