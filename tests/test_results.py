"""Where results go, in which order models are evaluated, and what a comparison with a baseline says."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_runs import make_run, save_base

from longlora.corpus.tokens import TokenizedCorpus
from longlora.errors import UserError
from longlora.evaluation import perplexity as rooms
from longlora.evaluation.command import evaluate_perplexity, perplexity_changes
from longlora.evaluation.results import change_lines, data_fingerprint, evaluated_models, weights_fingerprint
from longlora.evaluation.retrieval import accuracy_changes
from longlora.results import Answered, read
from longlora.settings import CorpusSettings, EvaluatePerplexitySettings, LoadSettings, PasskeySettings
from longlora.settings import PerplexitySettings as Way


@pytest.fixture(scope="module")
def places(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Any], tiny_tokenizer: Callable[[], Any]
) -> Path:
    """`base` (window 64), `run` and `other`, runs on it, and a text of some 400 tokens."""
    folder, tokenizer = tmp_path_factory.mktemp("results"), tiny_tokenizer()
    base = save_base(folder / "base", tiny_model("llama", vocab_size=len(tokenizer)), tokenizer)
    make_run(folder / "run", base, tokenizer)
    make_run(folder / "other", base, tokenizer)
    (folder / "text.txt").write_text("There and back again; the grass is green, the sky is blue. " * 7)
    return folder


def test_where_results_go(places: Path, tmp_path: Path) -> None:
    run, other, base, out = str(places / "run"), str(places / "other"), str(places / "base"), str(tmp_path / "out")

    def folders(*models: str, **given: Any) -> list[Any]:
        return [each.folder for each in evaluated_models(PasskeySettings(models=models, **given))]

    assert folders(run) == [Path(run) / "evaluation"]
    assert folders(base) == [None]
    assert folders(base, run) == [None, Path(run) / "evaluation"]
    assert folders(base, output=out) == [Path(out)]
    assert folders(run, base, output=out) == [Path(out) / "1-run", Path(out) / "2-base"]
    assert folders(run, baseline=base, output=out) == [Path(out) / "baseline", Path(out) / "1-run"]
    assert folders(base, run, other, baseline="demo")[0] == Path(run) / "evaluation" / "baseline"
    assert folders(run, baseline=other)[0] == Path(other) / "evaluation"
    assert folders(base, baseline="demo") == [None, None]
    assert folders(run, extend_to=512) == [None], "stretched further it is no longer the run"
    assert folders(run, extend_to=512, output=out) == [Path(out)]


def test_a_baseline_is_neither_stretched_nor_of_the_models_revision(places: Path) -> None:
    settings = PasskeySettings(
        models=("some/model",), baseline=str(places / "base"), extend_to=256, loading=LoadSettings(revision="v2")
    )
    baseline, model = evaluated_models(settings)
    assert (baseline.is_baseline, model.is_baseline) == (True, False)
    assert (baseline.settings(settings).extend_to, baseline.settings(settings).loading.revision) == (None, None)
    assert model.settings(settings) == settings


def settings(places: Path, *models: str, **given: Any) -> EvaluatePerplexitySettings:
    given = {"perplexity": Way(contexts=(32, 64), stride=16), "json": True} | given
    corpus = CorpusSettings(data=(str(places / "text.txt"),))
    names = tuple(str(places / name) for name in models)
    return EvaluatePerplexitySettings(models=names, corpus=corpus, **given)


def test_perplexity_of_a_run_beside_its_baseline(places: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = str(places / "base")
    found = evaluate_perplexity(settings(places, "run", baseline=base, json=False))
    printed = capsys.readouterr().out
    assert set(found) == {"baseline", "models"}
    for document, folder in ((found["baseline"], "baseline"), (found["models"][0], "")):
        assert json.loads((places / "run" / "evaluation" / folder / "perplexity.json").read_text()) == document
    assert found["baseline"]["data_fingerprint"] == found["models"][0]["data_fingerprint"]
    (before, _), (after, _) = (each["results"] for each in (found["baseline"], found["models"][0]))
    change = 100 * (after["perplexity"] / before["perplexity"] - 1)
    assert f"{places / 'run'} against {base}: 32 {change:+.1f}%, 64 " in printed
    assert before["tokens"] == after["tokens"] > 300


def test_a_killed_perplexity_goes_on(places: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rooms, "TOKENS_A_TRIAL", 128)
    whole = evaluate_perplexity(settings(places, "base"))
    real, passes = rooms._score_batch, [0]

    def killed(*given: Any) -> Any:
        passes[0] += 1
        if passes[0] == 6:
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr(rooms, "_score_batch", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate_perplexity(settings(places, "base", output=str(tmp_path)))
    kept = (tmp_path / "perplexity.jsonl").read_text().splitlines()[1:]
    assert len(kept) > 2
    with pytest.raises(UserError, match="that was stopped: give --resume"):
        evaluate_perplexity(settings(places, "base", output=str(tmp_path)))
    with pytest.raises(UserError, match="'stride' was 16 .* and is now 8"):
        way = Way(contexts=(32, 64), stride=8)
        evaluate_perplexity(settings(places, "base", output=str(tmp_path), resume=True, perplexity=way))

    passes[0] = 100
    again = evaluate_perplexity(settings(places, "base", output=str(tmp_path), resume=True))
    lines = (tmp_path / "perplexity.jsonl").read_text().splitlines()[1:]
    assert lines[: len(kept)] == kept
    names = [json.loads(line)["trial"] for line in lines]
    assert len(set(names)) == len(names) > len(kept)
    assert again["results"] == whole["results"]
    assert json.loads((tmp_path / "perplexity.json").read_text()) == again

    calls = passes[0]
    longer = Way(contexts=(32, 64, 48), stride=16)
    more = evaluate_perplexity(settings(places, "base", output=str(tmp_path), resume=True, perplexity=longer))
    assert more["results"][:2] == whole["results"]
    assert passes[0] > calls, "the new context alone was read"
    assert all(name.startswith("48/") for name in trials_after(tmp_path, names))


def trials_after(folder: Path, before: list[str]) -> list[str]:
    lines = (folder / "perplexity.jsonl").read_text().splitlines()[1:]
    return [json.loads(line)["trial"] for line in lines][len(before) :]


def test_evaluated_again_in_another_way_the_earlier_results_are_set_aside(places: Path, tmp_path: Path) -> None:
    first = evaluate_perplexity(settings(places, "base", output=str(tmp_path)))
    other = Way(contexts=(32,), stride=16, score="window")
    second = evaluate_perplexity(settings(places, "base", output=str(tmp_path), perplexity=other))
    assert json.loads((tmp_path / "perplexity.json").read_text()) == second
    assert json.loads((tmp_path / "perplexity.1.json").read_text()) == first


def test_changes_by_hand() -> None:
    def results(label: str, **nll: list[float]) -> dict[str, Any]:
        rows = [(int(context[1:]), sums) for context, sums in nll.items()]
        return {
            "label": label,
            "results": [
                {"context": n, "text": "t", "perplexity": 2.0, "document_nll": sums, "document_tokens": [10, 10, 10]}
                for n, sums in rows
            ],
        }

    documents = [results("base", c1=[7, 8, 9], c3=[20, 24, 28]), results("new", c3=[19, 22, 25], c4=[1, 2, 3])]
    # differences of -0.1, -0.2 and -0.3 nats a token: -0.2 ± 4.303 · 0.1 / √3
    low, high = (100 * math.expm1(-0.2 + end * 4.30265 * 0.1 / math.sqrt(3)) for end in (-1, 1))
    expected = [f"new against base: 3 -18.1% ({low:+.1f} to {high:+.1f})"]
    assert change_lines(documents, perplexity_changes, "%") == expected
    documents[1]["results"][0] |= {"text": "another", "perplexity": 1.5}
    assert change_lines(documents, perplexity_changes, "%") == ["new against base: 3 -25.0%"]

    before = {"label": "base", "results": [{"context": 1024, "scores": [0, 1, 0, 1]}]}
    after = {"label": "new", "results": [{"context": 1024, "scores": [1, 1, 0, 1]}, {"context": 9, "scores": [1]}]}
    none = {"label": "none", "results": []}
    # Bonett and Price: one better of six, none worse but the two that are added
    spread = 1.95996 * math.sqrt((3 / 6 - (1 / 6) ** 2) / 6)
    low, high = (100 * max(-1, min(1, 1 / 6 + end * spread)) for end in (-1, 1))
    expected = [f"new against base: 1,024 +25.0 points ({low:+.1f} to {high:+.1f})"]
    assert change_lines([before, after, none], accuracy_changes, " points") == expected


def corpus(*documents: list[int], dtype: Any = np.uint16) -> TokenizedCorpus:
    ends = np.cumsum([0, *map(len, documents)])
    tokens = np.array([token for document in documents for token in document], dtype=dtype)
    return TokenizedCorpus(tokens, ends, [str(index) for index in range(len(documents))], 9)


def test_fingerprints_of_text() -> None:
    fingerprint = data_fingerprint(corpus([1, 2], [3]))
    assert fingerprint == data_fingerprint(corpus([1, 2], [3]))
    others = [corpus([1], [2, 3]), corpus([1, 2], [4]), corpus([1, 2, 3]), corpus([1, 2], [3], [])]
    assert fingerprint not in {data_fingerprint(other) for other in others}


def test_fingerprints_of_weights(places: Path) -> None:
    file = places / "base" / "model.safetensors"
    before = weights_fingerprint(str(places / "base"), None)
    assert weights_fingerprint(str(places / "base"), None) == before
    os.utime(file, ns=(1, 1))
    assert weights_fingerprint(str(places / "base"), None) != before


@pytest.mark.parametrize("given", [-0.5, 1.5, True, "0.5", math.nan, math.inf, None])
def test_what_is_no_share_is_not_read_as_one(given: Any) -> None:
    assert read(Answered, {"context": 8, "accuracy": given}) == Answered(context=8)


@pytest.mark.parametrize("given", [0, 0.25, 1])
def test_a_share_is_read(given: float) -> None:
    assert read(Answered, {"context": 8, "accuracy": given}) == Answered(context=8, accuracy=given)
