"""LongPPL against a loop over full logits in float64, token by token, and the promises around it."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_runs import save_base
from transformers import GPT2Config, GPT2LMHeadModel

from longlora.errors import UserError
from longlora.evaluation import long_perplexity as rooms
from longlora.evaluation.long_perplexity import LongPerplexity, find_key_tokens, long_perplexity, with_lengths
from longlora.evaluation.long_perplexity_command import evaluate_long_perplexity
from longlora.model.positions import extend_positions
from longlora.settings import CorpusSettings, EvaluateLongPerplexitySettings, LongPerplexitySettings

VOCABULARY = 97
LENGTHS = (39, 40, 41, 85, 17)
"""With L = 40: one too short, one and two whole pieces, and rests that are not read."""

LOOSE = {"alpha": 0.2, "beta": -6.0}
"""Thresholds at which a random model has key tokens, and more than a few."""


def make_documents(seed: int = 3) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [random.integers(0, VOCABULARY, length).astype(np.uint16) for length in LENGTHS]


@torch.no_grad()
def loss_of(model: Any, before: list[int], token: int) -> float:
    """The oracle's loss of one token after others: all logits, float64."""
    return -float(model(torch.tensor([before])).logits[0, -1].double().log_softmax(-1)[token])


def loop(model: Any, documents: list[np.ndarray], context: int, short: int, stride: int) -> list[tuple[float, float]]:
    """The oracle: for each judged token its loss with the long and with the short context."""
    losses = []
    for document in documents:
        for piece in range(len(document) // context):
            tokens = document[piece * context : (piece + 1) * context].tolist()
            for at in range(short, context):
                begin = (at - short) // stride * stride  # the authors' code: `stride` tokens share a short context
                losses.append((loss_of(model, tokens[:at], tokens[at]), loss_of(model, tokens[begin:at], tokens[at])))
    return losses


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Any]) -> Any:
    return tiny_model("llama")


@pytest.mark.parametrize(("short", "stride"), [(12, 5), (13, 9), (1, 1), (39, 4), (13, 100)])
def test_equals_a_loop_over_full_logits(model: Any, short: int, stride: int) -> None:
    settings = LongPerplexitySettings(context=40, short_context=short, short_stride=stride, **LOOSE)
    found = long_perplexity(model, make_documents(), settings, progress=False)
    losses = loop(model, make_documents(), 40, short, stride)
    key = [long for long, without in losses if without - long > LOOSE["alpha"] and -long > LOOSE["beta"]]
    assert found.tokens == len(losses) == 4 * (40 - short)
    assert found.key_tokens == len(key)
    assert found.perplexity == pytest.approx(math.exp(np.mean([long for long, _ in losses])), rel=1e-5)
    if key:
        assert found.longppl == pytest.approx(math.exp(np.mean(key)), rel=1e-5)
    else:
        assert found.longppl is None
    assert (found.documents, found.skipped_documents) == (3, 2)


def test_the_cases_above_are_no_empty_ones(model: Any) -> None:
    for short, stride, at_least in [(12, 5, 15), (13, 9, 15), (1, 1, 15)]:
        settings = LongPerplexitySettings(context=40, short_context=short, short_stride=stride, **LOOSE)
        found = long_perplexity(model, make_documents(), settings, progress=False)
        assert at_least <= found.key_tokens < found.tokens - at_least


@pytest.mark.parametrize(("alpha", "beta"), [(0.0, -9.0), (0.2, -3.0), (2.0, -2.0), (0.2, -math.inf)])
def test_both_thresholds_count(model: Any, alpha: float, beta: float) -> None:
    settings = LongPerplexitySettings(context=40, short_context=12, short_stride=5, alpha=alpha, beta=beta)
    losses = loop(model, make_documents(), 40, 12, 5)
    expected = [without - long > alpha and -long > beta for long, without in losses]
    assert np.concatenate(find_key_tokens(model, make_documents(), settings, progress=False)).tolist() == expected


def test_an_evaluator_chooses_the_tokens(model: Any, tiny_model: Callable[..., Any]) -> None:
    judge = tiny_model("llama", seed=5)
    settings = LongPerplexitySettings(context=40, short_context=12, short_stride=5, **LOOSE)
    keys = find_key_tokens(judge, make_documents(), settings, progress=False)
    found = long_perplexity(model, make_documents(), settings, keys, progress=False)
    judged = loop(judge, make_documents(), 40, 12, 5)
    chosen = [without - long > LOOSE["alpha"] and -long > LOOSE["beta"] for long, without in judged]
    own = [long for (long, _), key in zip(loop(model, make_documents(), 40, 12, 5), chosen, strict=True) if key]
    assert found.key_tokens == sum(chosen) > 5
    assert found.longppl == pytest.approx(math.exp(np.mean(own)), rel=1e-5)
    alone = long_perplexity(model, make_documents(), settings, progress=False)
    assert alone.perplexity == pytest.approx(found.perplexity, rel=1e-6)
    assert alone.longppl != pytest.approx(found.longppl, rel=1e-2)


def test_the_head_sees_judged_tokens_only_and_a_chunk_at_a_time(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama", max_position_embeddings=4096)
    seen: list[int] = []
    model.lm_head.register_forward_hook(lambda _module, args, _output: seen.append(args[0].shape[:-1].numel()))
    document = np.random.default_rng(0).integers(0, VOCABULARY, 4096)
    settings = LongPerplexitySettings(context=4096, short_context=1024, short_stride=512)
    found = long_perplexity(model, [document], settings, progress=False)
    assert max(seen) <= 1024
    # long and short losses of each judged token, the last token of each row, and once the proof of the first pass
    windows = 1 + (4096 - 1024 - 512) // 512
    assert found.tokens == 3072
    assert sum(seen) == 2 * 3072 + 1 + windows + 1


def test_lengths_by_default(tiny_model: Callable[..., Any]) -> None:
    config = tiny_model("llama").config
    chosen = with_lengths(LongPerplexitySettings(), [config])
    assert (chosen.context, chosen.short_context, chosen.short_stride) == (64, 48, 16)
    extended = tiny_model("llama").config
    extend_positions(extended, 256, "yarn")
    chosen = with_lengths(LongPerplexitySettings(), [config, extended])
    assert (chosen.context, chosen.short_context, chosen.short_stride) == (256, 48, 16)
    chosen = with_lengths(LongPerplexitySettings(short_context=100), [config, extended])
    assert (chosen.context, chosen.short_context, chosen.short_stride) == (256, 100, 33)
    learned = GPT2Config(n_positions=32)
    assert with_lengths(LongPerplexitySettings(), [learned]).short_context == 24
    # the paper's: nothing of it is taken from the model
    given = LongPerplexitySettings(context=32768, short_context=4096, short_stride=1024)
    assert with_lengths(given, []) == given


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"context": 40, "short_context": 40}, "--short-context is 40: it must be below the long one, 40"),
        ({"context": 86}, "no document has the 86 tokens of --context: the longest of 5 has 85"),
    ],
)
def test_lengths_that_do_not_fit(model: Any, settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        long_perplexity(model, make_documents(), LongPerplexitySettings(**settings), progress=False)


def test_what_cannot_be_measured_is_refused(tiny_model: Callable[..., Any]) -> None:
    settings = LongPerplexitySettings(context=40, short_context=12)
    learned = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_positions=32, n_embd=32, n_layer=1, n_head=2))
    with pytest.raises(UserError, match="context 40 is beyond the 32 positions"):
        long_perplexity(learned, make_documents(), settings, progress=False)
    broken = tiny_model("llama")
    broken.model.norm.weight.data[3] = math.nan
    with pytest.raises(UserError, match="loss at context 40 is not a number"):
        long_perplexity(broken, make_documents(), settings, progress=False)


def test_the_model_is_left_as_it_was(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama", attention_dropout=0.5)
    settings = LongPerplexitySettings(context=40, short_context=12, **LOOSE)
    expected = long_perplexity(model, make_documents(), settings, progress=False)
    model.train()
    assert long_perplexity(model, make_documents(), settings, progress=False) == expected
    assert model.training


@pytest.fixture
def bases(tmp_path: Path, tiny_model: Callable[..., Any], tiny_tokenizer: Callable[[], Any]) -> tuple[str, str, str]:
    """Two model folders and a file of text."""
    tokenizer = tiny_tokenizer()
    for name, seed in (("one", 0), ("two", 1)):
        save_base(tmp_path / name, tiny_model("llama", seed=seed, vocab_size=len(tokenizer)), tokenizer)
    text = tmp_path / "text.txt"
    text.write_text("The long context helps where a word comes again: context, window, token. " * 4)
    return str(tmp_path / "one"), str(tmp_path / "two"), str(text)


def command(models: tuple[str, ...], text: str, **settings: Any) -> dict[str, Any]:
    lengths = LongPerplexitySettings(context=100, **LOOSE)
    corpus = CorpusSettings(data=(text,))
    return evaluate_long_perplexity(
        EvaluateLongPerplexitySettings(models=models, corpus=corpus, long_perplexity=lengths, **settings)
    )


def test_the_command(bases: tuple[str, str, str], capsys: pytest.CaptureFixture[str]) -> None:
    one, two, text = bases
    document = json.loads(json.dumps(command((one,), text, json=True)))
    assert capsys.readouterr().out == ""
    (result,) = document.pop("results")
    assert document.pop("seconds") >= 0
    assert len(document.pop("data_fingerprint")) == 16
    assert document == {
        "task": "longppl",
        "dtype": "float32",
        "model": one,
        "label": one,
        "data": "text.txt",
        "evaluator": None,
        "short_context": 48,
        "short_stride": 16,
        "alpha": 0.2,
        "beta": -6.0,
        "max_documents": None,
    }
    assert set(result) == set(LongPerplexity.__dataclass_fields__)
    assert (result["context"], result["tokens"], result["documents"]) == (100, 2 * 52, 1)

    both = command((one, two), text, evaluator=two)["models"]
    assert [entry["results"][0]["key_tokens"] for entry in both] == [both[1]["results"][0]["key_tokens"]] * 2
    assert both[1]["results"] == command((two,), text, json=True)["results"]
    printed = capsys.readouterr().out
    assert f"key tokens chosen by {two}" in printed
    assert f"{both[0]['results'][0]['longppl']:.2f}" in printed


def test_a_killed_measurement_goes_on(
    bases: tuple[str, str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two, text = bases
    whole = command((one,), text, evaluator=two, json=True)
    real, passes = rooms._token_losses, [0]

    def killed_at(number: int) -> None:
        def killed(*given: Any) -> Any:
            passes[0] += 1
            if passes[0] == number:
                raise KeyboardInterrupt
            return real(*given)

        monkeypatch.setattr(rooms, "_token_losses", killed)

    kept: list[str] = []
    # two pieces for the evaluator, with long and short contexts, and two for the model
    for number, trials in ((5, ["key/0"]), (5, ["key/0", "key/1", "piece/0"])):
        passes[0] = 0
        killed_at(number)
        with pytest.raises(KeyboardInterrupt):
            command((one,), text, evaluator=two, json=True, output=str(tmp_path), resume=bool(kept))
        lines = (tmp_path / "longppl.jsonl").read_text().splitlines()
        assert lines[: len(kept)] == kept
        assert [json.loads(line)["trial"] for line in lines[1:]] == trials
        kept = lines
    killed_at(0)
    with pytest.raises(UserError, match="that was stopped: give --resume"):
        command((one,), text, evaluator=two, json=True, output=str(tmp_path))
    with pytest.raises(UserError, match="'evaluator' was '.*two'.* and is now None"):
        command((one,), text, json=True, output=str(tmp_path), resume=True)
    again = command((one,), text, evaluator=two, json=True, output=str(tmp_path), resume=True)
    assert again["results"] == whole["results"]
    assert json.loads((tmp_path / "longppl.json").read_text()) == again


def test_stretched_without_training(bases: tuple[str, str, str], tiny_model: Callable[..., Any]) -> None:
    one, _, text = bases
    lengths = LongPerplexitySettings(**LOOSE)
    settings = EvaluateLongPerplexitySettings(
        models=(one,), corpus=CorpusSettings(data=(text,)), long_perplexity=lengths, extend_to=128, json=True
    )
    document = evaluate_long_perplexity(settings)
    assert document["label"] == f"{one}, yarn to 128, not trained"
    assert document["results"][0]["context"] == 128
    assert document["short_context"] == 48


def test_an_evaluator_with_another_tokenizer_is_refused(
    bases: tuple[str, str, str], tmp_path: Path, tiny_model: Callable[..., Any], tiny_tokenizer: Callable[[], Any]
) -> None:
    one, _, text = bases
    other = tiny_tokenizer()
    other.add_tokens(["context"])
    judge = save_base(tmp_path / "judge", tiny_model("llama", vocab_size=len(other)), other)
    with pytest.raises(UserError, match=r"--evaluator .*judge has another tokenizer than '.*one'"):
        command((one,), text, evaluator=str(judge), json=True)


def test_settings() -> None:
    with pytest.raises(UserError, match="--data is missing"):
        EvaluateLongPerplexitySettings(models=("demo",))
    with pytest.raises(UserError, match="MODEL is missing"):
        EvaluateLongPerplexitySettings(models=(), corpus=CorpusSettings(data=("stdlib",)))
    with pytest.raises(UserError, match="--short-stride is 0: it must be at least 1 tokens"):
        LongPerplexitySettings(short_stride=0)
