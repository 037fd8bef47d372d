"""`longlora eval short`: the same documents and samples before and after, and a verdict that can go either way."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import make_run, save_base

from longlora.corpus.tokens import tokenize_corpus
from longlora.errors import UserError
from longlora.evaluation import perplexity as rooms
from longlora.evaluation.perplexity import perplexity
from longlora.evaluation.short import baseline_of, evaluate_short, verdict
from longlora.evaluation.statistics import Estimate
from longlora.model.loading import load
from longlora.settings import CorpusSettings, EvaluateShortSettings, PerplexitySettings

TEXT = "The sky is blue and the grass is green; here we go, there and back again. "


@pytest.fixture(scope="module")
def places(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Any], tiny_tokenizer: Callable[[], Any]
) -> Path:
    """`base` (window 64) and `run` (256, disturbed), and documents of which three have 64 tokens, one has not."""
    folder, tokenizer = tmp_path_factory.mktemp("short"), tiny_tokenizer()
    base = save_base(folder / "base", tiny_model("llama", vocab_size=len(tokenizer)), tokenizer)
    make_run(folder / "run", base, tokenizer)
    (folder / "data").mkdir()
    for name, length in (("a", 100), ("b", 64), ("c", 63), ("d", 40)):  # and a token for the end of each
        (folder / "data" / f"{name}.txt").write_text((TEXT * 2)[:length])
    return folder


def settings(places: Path, *models: str, **given: Any) -> EvaluateShortSettings:
    given.setdefault("perplexity", PerplexitySettings(stride=16))
    given.setdefault("json", True)
    corpus = CorpusSettings(data=(str(places / "data"),))
    return EvaluateShortSettings(models=tuple(str(places / name) for name in models), corpus=corpus, **given)


def measured(model: str, places: Path, context: int) -> float:
    network, tokenizer = load(model)
    corpus = tokenize_corpus(tokenizer, CorpusSettings(data=(str(places / "data"),)))
    long_enough = [corpus.document(index) for index in range(len(corpus)) if len(corpus.document(index)) >= 64]
    assert len(long_enough) == 3
    (result,) = perplexity(network, long_enough, PerplexitySettings(contexts=(context,), stride=16), progress=False)
    return result.perplexity


def test_before_and_after_on_the_same_documents(places: Path) -> None:
    document = json.loads(json.dumps(evaluate_short(settings(places, "run"))))
    results = document.pop("results")
    assert json.loads((places / "run" / "evaluation" / "short.json").read_text()) == document | {"results": results}
    assert document.pop("seconds") >= 0
    assert len(document.pop("data_fingerprint")) == 16
    assert document == {
        "task": "short",
        "model": str(places / "run"),
        "label": str(places / "run"),
        "baseline": str(places / "base"),
        "data": "data",
        "stride": 16,
        "score": "last",
        "max_documents": None,
        "min_document_tokens": 64,
        "last_tokens": None,
        "tasks": [],
    }
    assert [result["context"] for result in results] == [16, 32, 64]
    for result in results:
        before = measured(str(places / "base"), places, result["context"])
        after = measured(str(places / "run"), places, result["context"])
        assert result["before"] == pytest.approx(before, rel=1e-6)
        assert result["after"] == pytest.approx(after, rel=1e-6)
        assert result["change_percent"] == pytest.approx(100 * (after - before) / before, abs=1e-4)
        assert result["low"] < result["change_percent"] < result["high"]
        shown = not result["low"] <= 0 <= result["high"]
        assert result["verdict"].startswith(
            "no difference shown" if not shown else "improved" if after < before else "regressed"
        )
        assert (result["documents"], result["skipped_documents"]) == (3, 1)
    assert results[2]["tokens"] == 100 + 64 + 63


def test_the_other_way_round(places: Path) -> None:
    there = evaluate_short(settings(places, "run"))["results"]
    back = evaluate_short(settings(places, "base", baseline=str(places / "run")))["results"]
    assert [result["context"] for result in back] == [16, 32, 64], "the window that both have"
    opposite = {"improved:": "regressed:", "regressed:": "improved:", "no": "no"}
    for one, other in zip(there, back, strict=True):
        assert (one["before"], one["after"]) == (other["after"], other["before"])
        assert other["verdict"].split()[0] == opposite[one["verdict"].split()[0]]
    same = evaluate_short(settings(places, "base", baseline=str(places / "base")))
    assert {result["verdict"] for result in same["results"]} == {"unchanged"}


@pytest.mark.parametrize(
    ("change", "higher", "expected"),
    [
        (Estimate(0.1, 0.05, 0.15), False, "regressed: +10.0% (+5.0 to +15.0)"),
        (Estimate(-0.1, -0.15, -0.05), False, "improved: -10.0% (-15.0 to -5.0)"),
        (Estimate(0.1, 0.05, 0.15), True, "improved: +10.0% (+5.0 to +15.0)"),
        (Estimate(-0.1, -0.3, 0.1), True, "no difference shown: -10.0% (-30.0 to +10.0)"),
        (Estimate(0.1, None, None), False, "regressed: +10.0%, how sure is not known"),
        (Estimate(0.0, 0.0, 0.0), True, "unchanged"),
    ],
)
def test_verdicts(change: Estimate, higher: bool, expected: str) -> None:
    assert verdict(change, higher, "%") == expected


def test_what_a_model_is_compared_with(places: Path) -> None:
    base, run = str(places / "base"), str(places / "run")
    assert baseline_of(run, settings(places, "run")) == (base, None)
    assert baseline_of(f"{run}/adapter", settings(places, "run")) == (base, None)
    assert baseline_of(run, settings(places, "run", baseline="demo")) == ("demo", None)
    assert baseline_of(base, settings(places, "base", extend_to=128)) == (base, None)
    with pytest.raises(UserError, match="'.*base' does not say what it was made from: give .* --baseline MODEL"):
        evaluate_short(settings(places, "run", "base"))


def test_stretched_without_training(places: Path) -> None:
    document = evaluate_short(settings(places, "base", extend_to=256, method="linear"))
    assert document["label"] == f"{places / 'base'}, linear to 256, not trained"
    network, tokenizer = load(str(places / "base"))
    from longlora.model.positions import extend_positions

    extend_positions(network, 256, "linear")
    corpus = tokenize_corpus(tokenizer, CorpusSettings(data=(str(places / "data"),)))
    wanted = PerplexitySettings(contexts=(64,), stride=16)
    expected = perplexity(network, corpus, wanted, progress=False)[0].perplexity
    assert document["results"][-1]["after"] == pytest.approx(expected, rel=1e-6)
    assert document["results"][-1]["before"] == pytest.approx(measured(str(places / "base"), places, 64), rel=1e-6)


def test_a_killed_comparison_goes_on(places: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = evaluate_short(settings(places, "base", baseline=str(places / "run")))
    real, passes = rooms._score_batch, [0]

    def killed(*given: Any) -> Any:
        passes[0] += 1
        if passes[0] == 5:
            raise KeyboardInterrupt
        return real(*given)

    asked = {"baseline": str(places / "run"), "output": str(tmp_path)}
    monkeypatch.setattr(rooms, "_score_batch", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate_short(settings(places, "base", **asked))
    kept = (tmp_path / "short.jsonl").read_text().splitlines()
    assert len(kept) > 1
    with pytest.raises(UserError, match="that was stopped: give --resume"):
        evaluate_short(settings(places, "base", **asked))
    again = evaluate_short(settings(places, "base", **asked, resume=True))
    lines = (tmp_path / "short.jsonl").read_text().splitlines()
    assert lines[: len(kept)] == kept
    assert len({json.loads(line).get("trial") for line in lines}) == len(lines) == 1 + 2 * 3
    assert again["results"] == whole["results"]
    done = passes[0]
    assert evaluate_short(settings(places, "base", **asked, resume=True))["results"] == whole["results"]
    assert passes[0] == done, "all was there"


def test_several_models_share_a_baseline(
    places: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from longlora.evaluation import short

    loaded = []
    load_evaluated = short.load_evaluated
    monkeypatch.setattr(short, "load_evaluated", lambda name, given: loaded.append(name) or load_evaluated(name, given))
    given = dataclasses.replace(settings(places, "run", "run"), json=False)
    documents = evaluate_short(given)["models"]
    assert loaded == [str(places / "base"), str(places / "run"), str(places / "run")]
    assert documents[0]["results"] == documents[1]["results"]
    printed = capsys.readouterr().out
    row = documents[0]["results"][-1]
    words = ["perplexity", "at", "64", f"{row['before']:.2f}", f"{row['after']:.2f}", *row["verdict"].split()]
    assert [*words, "(227", "tokens)"] in [line.split() for line in printed.splitlines()]
    assert printed.count("3 documents, 1 too short, stride 16, score last") == 2


def test_another_tokenizer_cannot_be_compared(
    places: Path, tmp_path: Path, tiny_model: Callable[..., Any], tiny_tokenizer: Callable[[], Any]
) -> None:
    other = tiny_tokenizer()
    other.add_tokens(["green"])
    base = save_base(tmp_path / "other", tiny_model("llama", vocab_size=len(other)), other)
    with pytest.raises(UserError, match="'.*run' and its baseline '.*other' have different tokenizers"):
        evaluate_short(settings(places, "run", baseline=str(base)))


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"perplexity": PerplexitySettings(stride=65)}, "--stride is 65: it must be at most the shorter window, 64"),
        ({"perplexity": PerplexitySettings(contexts=(102,), stride=16)}, "no document has the 102 tokens"),
    ],
)
def test_contexts_that_do_not_fit(places: Path, given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        evaluate_short(settings(places, "run", **given))


def test_settings_that_have_no_effect(places: Path) -> None:
    with pytest.raises(UserError, match="--limit is 3, and there are no --tasks"):
        settings(places, "run", limit=3)


def test_tasks_before_and_after(places: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A task of lm-eval's from a file: its log-likelihoods are those of full logits, of both models."""
    pytest.importorskip("lm_eval", reason="the [eval] extra is not installed")
    samples = [("The sky is", " blue"), ("the grass", " is green"), ("here we go", ", there")]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps({"question": asked, "answer": answer}) for asked, answer in samples))
    task = tmp_path / "likely.yaml"
    task.write_text(
        "task: likely\ndataset_path: json\noutput_type: loglikelihood\ntest_split: test\n"
        f"dataset_kwargs: {{data_files: {{test: {data}}}}}\n"
        'doc_to_text: "{{question}}"\ndoc_to_target: "{{answer}}"\n'
        "metric_list:\n  - metric: perplexity\n    aggregation: perplexity\n    higher_is_better: false\n"
    )
    document = evaluate_short(settings(places, "run", tasks=(str(task),), limit=2, json=False))
    (row,) = document["tasks"]
    assert {key: row[key] for key in ("task", "metric", "samples", "cut")} == {
        "task": "likely",
        "metric": "perplexity",
        "samples": 2,
        "cut": 0,
    }
    for name, key in (("base", "before"), ("run", "after")):
        model, tokenizer = load(str(places / name))
        likelihoods = []
        for asked, answer in samples[:2]:
            ids, first = tokenizer(asked + answer)["input_ids"], len(tokenizer(asked)["input_ids"])
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
            likelihoods.append(sum(float(logits[at - 1, ids[at]]) for at in range(first, len(ids))))
        assert row[key] == pytest.approx(math.exp(-sum(likelihoods) / 2), rel=1e-4)
    assert f"{row['verdict']} (2 samples)" in capsys.readouterr().out
