"""Sliding-window perplexity beside every window's full logits: the same number, less memory, and no speed if wrong."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_runs import save_base

from longlora.bench import perplexity as bench
from longlora.bench.perplexity import bench_perplexity, full_logits_loss
from longlora.errors import UserError
from longlora.settings import BenchPerplexitySettings, CorpusSettings


@pytest.fixture(scope="module")
def places(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Any], tiny_tokenizer: Callable[[], Any]
) -> Path:
    """A model whose logits of 1,024 tokens are far larger than anything else in it, and a text of 1,300 tokens."""
    folder = tmp_path_factory.mktemp("bench")
    model = tiny_model("llama", vocab_size=16384, hidden_size=16, intermediate_size=16, max_position_embeddings=1024)
    save_base(folder / "model", model, tiny_tokenizer())
    (folder / "short.txt").write_text("x" * 200)
    (folder / "text.txt").write_text(("The sky is blue. " * 80)[:1300])
    return folder


def settings(places: Path, **given: Any) -> BenchPerplexitySettings:
    corpus = CorpusSettings(data=(str(places / "short.txt"), str(places / "text.txt")))
    given = {"context": 1024, "stride": 64, "windows": 3, "repeats": 1, "json": True, **given}
    return BenchPerplexitySettings(model=str(places / "model"), corpus=corpus, **given)


def test_the_same_loss_without_the_logits_of_a_context(places: Path) -> None:
    result = bench_perplexity(settings(places))
    assert result["difference"] < 1e-5
    assert result["tokens"] == 1023 + 2 * 64
    assert result["logits_bytes"] == 1024 * 16384 * 4 == 64 * 2**20
    assert result["peak_bytes"]["full"] > result["logits_bytes"]
    assert result["ratio"] == pytest.approx(result["seconds"]["scored"] / result["seconds"]["full"])


def test_a_later_window_holds_the_logits_of_its_stride(places: Path) -> None:
    """`peak_bytes` of what comes after the first window, which alone scores a context of tokens."""
    from longlora.bench.machine import peak_bytes
    from longlora.model.lm_head import IGNORED, run_token_losses
    from longlora.model.loading import load

    model, _ = load(str(places / "model"))
    ids = torch.randint(0, 16384, (1, 1024), generator=torch.Generator().manual_seed(0))
    labels = torch.full_like(ids, IGNORED)
    labels[:, 1024 - 65 : -1] = ids[:, 1024 - 64 :]
    with torch.inference_mode():
        peak = peak_bytes(lambda: run_token_losses(model, {"input_ids": ids}, labels), torch.device("cpu"))
    assert 64 * 16384 * 4 <= peak < 64 * 2**20 / 4


@pytest.mark.slow
def test_the_default_model() -> None:
    """Perplexity of the shipped model at 4,096 tokens to 1e-4 of the plain way's."""
    corpus = CorpusSettings(data=(argparse.__file__,))
    result = bench_perplexity(
        BenchPerplexitySettings(
            corpus=corpus, context=4096, stride=256, windows=2, repeats=1, dtype="float32", json=True
        )
    )
    scored, full = (math.exp(result["nll"][name]) for name in ("scored", "full"))
    assert scored == pytest.approx(full, abs=1e-4)
    assert 5 < full < 50


def test_the_plain_way_is_what_it_says(places: Path) -> None:
    """By hand: each token's probability from the logits of the window that scores it."""
    from longlora.model.loading import load

    model, _ = load(str(places / "model"))
    document = np.random.default_rng(0).integers(0, 257, 50).astype(np.uint16)
    expected = []
    for at in range(1, 50):
        begin = 0 if at < 32 else (at - 32) // 6 * 6 + 6
        ids = torch.tensor(document[begin:at].astype(np.int64))
        with torch.no_grad():
            expected.append(-float(model(ids[None]).logits[0, -1].double().log_softmax(-1)[int(document[at])]))
    loss, tokens = full_logits_loss(model, document, 32, 6)
    assert tokens == 49
    assert loss == pytest.approx(np.mean(expected), abs=1e-6)


def test_no_speed_for_a_wrong_result(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "full_logits_loss", lambda *given: (full_logits_loss(*given)[0] + 2e-4, 1151))
    with pytest.raises(UserError, match="the two ways disagree: .* No speed is given for a wrong result"):
        bench_perplexity(settings(places))


def test_a_document_that_is_too_short(places: Path) -> None:
    with pytest.raises(UserError, match="no document has the 1,344 tokens of 6 windows: the longest of 2 has 1,301"):
        bench_perplexity(settings(places, windows=6))


def test_for_people(places: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = bench_perplexity(settings(places, json=False))
    printed = capsys.readouterr().out
    assert "context 1,024, stride 64, 3 windows, 1,151 tokens scored" in printed
    assert f"{result['nll']['full']:.6f}" in printed
    assert "64 MiB" in printed
