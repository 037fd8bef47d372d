"""LongPPL against the authors' package and against a loop over full logits, and the promises around it."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import save_base
from transformers import GPT2Config, GPT2LMHeadModel

from longlora.errors import UserError
from longlora.evaluation import long_perplexity as rooms
from longlora.evaluation.long_perplexity import (
    LongPerplexity,
    find_key_places,
    inside,
    joined,
    long_enough,
    long_perplexity,
    with_lengths,
)
from longlora.evaluation.long_perplexity_command import evaluate_long_perplexity
from longlora.model.positions import extend_positions
from longlora.settings import CorpusSettings, EvaluateLongPerplexitySettings, LongPerplexitySettings

LOOSE = {"alpha": 0.2, "beta": -6.0}
"""Thresholds at which a random model has key tokens, and more than a few."""

TEXT = "The long context helps where a word comes again: context, window, token; über 1,024 of them. "
LENGTHS = (39, 40, 41, 85, 17)


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer: Callable[[], Any]) -> Any:
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def other_tokenizer(tiny_tokenizer: Callable[[], Any]) -> Any:
    """With words that the other one cuts into letters."""
    other = tiny_tokenizer()
    other.add_tokens(["context", "window", " the", "in"])
    return other


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Any]) -> Any:
    return tiny_model("llama", vocab_size=257)


def texts() -> list[str]:
    return [(TEXT * 2)[at : at + length] for at, length in enumerate(LENGTHS)]


@torch.no_grad()
def losses_of(model: Any, ids: list[int]) -> list[float]:
    """The oracle's losses of a row, of its first token none: all logits, float64."""
    likely = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return [math.nan, *(-float(likely[at - 1, ids[at]]) for at in range(1, len(ids)))]


def loop(judge: Any, judges: Any, model: Any, tokens_of: Any, text: str, short: int, stride: int) -> list[float]:
    """The oracle: the losses of the key tokens, character by character."""
    read = judges(text, return_offsets_mapping=True)
    ids, long = read["input_ids"], losses_of(judge, read["input_ids"])
    key_characters: set[int] = set()
    for at in range(short, len(ids)):
        begin = (at - short) // stride * stride  # `stride` tokens share a short context
        without = losses_of(judge, ids[begin : at + 1])[-1]
        if without - long[at] > LOOSE["alpha"] and -long[at] > LOOSE["beta"]:
            key_characters |= set(range(*read["offset_mapping"][at]))
    own = tokens_of(text, add_special_tokens=False, return_offsets_mapping=True)
    losses = losses_of(model, own["input_ids"])
    return [
        losses[at]
        for at, (begin, end) in enumerate(own["offset_mapping"])
        if at and end > begin and set(range(begin, end)) <= key_characters
    ]


def measured(judge: Any, judges: Any, model: Any, own: Any, some: list[str], **given: Any) -> LongPerplexity:
    settings = with_lengths(LongPerplexitySettings(**{"context": 40, **LOOSE, **given}), [model.config])
    found, _ = long_enough(some, judges, settings)
    places = find_key_places(judge, judges, found, settings, progress=False)
    return long_perplexity(model, own, found, places, settings, progress=False)


@pytest.mark.parametrize(("short", "stride"), [(12, 5), (13, 9), (1, 1), (39, 4), (13, 100)])
@pytest.mark.parametrize("same", [True, False], ids=["alone", "by another"])
def test_equals_a_loop_over_full_logits(
    model: Any,
    tokenizer: Any,
    other_tokenizer: Any,
    tiny_model: Callable[..., Any],
    short: int,
    stride: int,
    same: bool,
) -> None:
    judge, judges = (model, tokenizer) if same else (tiny_model("llama", seed=5, vocab_size=300), other_tokenizer)
    found = measured(judge, judges, model, tokenizer, texts(), short_context=short, short_stride=stride)
    settings = LongPerplexitySettings(context=40)
    read, skipped = long_enough(texts(), judges, settings)
    assert len(read) + skipped == len(LENGTHS)
    expected = [loop(judge, judges, model, tokenizer, text, short, stride) for text in read]
    assert found.document_key_tokens == [len(losses) for losses in expected]
    assert found.document_key_nll == pytest.approx([sum(losses) for losses in expected], rel=1e-5)
    key = [loss for losses in expected for loss in losses]
    assert found.longppl == (pytest.approx(math.exp(sum(key) / len(key)), rel=1e-5) if key else None)
    every = [loss for text in read for loss in losses_of(model, tokenizer(text)["input_ids"])[1:]]
    assert found.perplexity == pytest.approx(math.exp(sum(every) / len(every)), rel=1e-5)
    assert (found.tokens, found.documents) == (len(every), len(read))
    # a stride that reaches from the first token to the last has no short context to compare with
    assert (found.key_tokens > 3) == (short < 39 and stride < 100), "no empty case"


def test_equals_the_authors_package(
    model: Any, tokenizer: Any, other_tokenizer: Any, tiny_model: Callable[..., Any]
) -> None:
    longppl = pytest.importorskip("longppl.longppl", reason="longppl is not installed")
    judge = tiny_model("llama", seed=5, vocab_size=300)
    for judges, judged in ((other_tokenizer, judge), (tokenizer, model)):
        found = measured(judged, judges, model, tokenizer, [TEXT], context=60, short_context=12, short_stride=5)
        (text,), _ = long_enough([TEXT], judges, LongPerplexitySettings(context=60))
        theirs = longppl.compute_longppl(
            text, model, judged, tokenizer, judges, trunc_len=12, sliding_window=5, **LOOSE
        )
        assert found.key_tokens == theirs["n_key_token"] > 5
        assert found.longppl == pytest.approx(float(theirs["longppl"]), rel=1e-4)
        assert found.perplexity == pytest.approx(float(theirs["ppl"]), rel=1e-4)


def test_places_by_hand() -> None:
    assert joined([(0, 1), (1, 2), (4, 6), (6, 6), (7, 8)]) == [(0, 2), (4, 6), (7, 8)]
    offsets = [(0, 4), (4, 5), (5, 8), (8, 9), (9, 12)]
    assert inside(offsets, [(4, 8), (9, 11)]) == [1, 2]
    assert inside(offsets, []) == []


def test_the_head_sees_a_chunk_at_a_time(tiny_model: Callable[..., Any], tokenizer: Any) -> None:
    model = tiny_model("llama", vocab_size=257, max_position_embeddings=4096)
    seen: list[int] = []
    model.lm_head.register_forward_hook(lambda _module, args, _output: seen.append(args[0].shape[:-1].numel()))
    found = measured(
        model, tokenizer, model, tokenizer, ["x" * 5000], context=4096, short_context=1024, short_stride=512
    )
    assert max(seen) <= 1024
    assert found.tokens == 4095


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
    # the authors' where they fit: nothing of it is taken from the model
    given = LongPerplexitySettings(context=32768, short_context=4096, short_stride=1024)
    assert with_lengths(LongPerplexitySettings(context=32768), []) == given


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"context": 40, "short_context": 40}, "--short-context is 40: it must be below the long one, 40"),
        ({"context": 87}, "no document has the 87 tokens of --context: the longest of 5 has 86"),
    ],
)
def test_lengths_that_do_not_fit(model: Any, tokenizer: Any, settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        measured(model, tokenizer, model, tokenizer, texts(), **settings)


def test_what_cannot_be_measured_is_refused(tiny_model: Callable[..., Any], tokenizer: Any) -> None:
    learned = GPT2LMHeadModel(GPT2Config(vocab_size=257, n_positions=32, n_embd=32, n_layer=1, n_head=2))
    with pytest.raises(UserError, match="context 40 is beyond the 32 positions"):
        measured(learned, tokenizer, learned, tokenizer, texts(), short_context=12)
    broken = tiny_model("llama", vocab_size=257)
    broken.model.norm.weight.data[3] = math.nan
    with pytest.raises(UserError, match="loss of a row of 40 tokens is not a number"):
        measured(broken, tokenizer, broken, tokenizer, texts(), short_context=12)


def test_the_model_is_left_as_it_was(tiny_model: Callable[..., Any], tokenizer: Any) -> None:
    model = tiny_model("llama", vocab_size=257, attention_dropout=0.5)
    expected = measured(model, tokenizer, model, tokenizer, texts(), short_context=12)
    model.train()
    assert measured(model, tokenizer, model, tokenizer, texts(), short_context=12) == expected
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
    assert set(result) == {*LongPerplexity.__dataclass_fields__, "skipped_documents"}
    assert (result["context"], result["tokens"], result["documents"]) == (100, 99, 1)

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
    real, passes = rooms._losses, [0]

    def killed_at(number: int) -> None:
        def killed(*given: Any) -> Any:
            passes[0] += 1
            if passes[0] == number:
                raise KeyboardInterrupt
            return real(*given)

        monkeypatch.setattr(rooms, "_losses", killed)

    killed_at(1 + 2 + 1)  # the evaluator's long context, its whole and its last short ones, and the model
    with pytest.raises(KeyboardInterrupt):
        command((one,), text, evaluator=two, json=True, output=str(tmp_path))
    kept = (tmp_path / "longppl.jsonl").read_text().splitlines()
    assert [json.loads(line)["trial"] for line in kept[1:]] == ["key/0"]
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


def test_an_evaluator_with_another_tokenizer(
    bases: tuple[str, str, str], tmp_path: Path, tiny_model: Callable[..., Any], other_tokenizer: Any
) -> None:
    one, two, text = bases
    judge = save_base(tmp_path / "judge", tiny_model("llama", vocab_size=300), other_tokenizer)
    first, second = command((one, two), text, evaluator=str(judge), json=True)["models"]
    assert first["results"][0]["document_key_tokens"] == second["results"][0]["document_key_tokens"]
    assert first["results"][0]["longppl"] != second["results"][0]["longppl"]
    assert first["data_fingerprint"] == second["data_fingerprint"]


def test_settings() -> None:
    with pytest.raises(UserError, match="--data is missing"):
        EvaluateLongPerplexitySettings(models=("demo",))
    with pytest.raises(UserError, match="MODEL is missing"):
        EvaluateLongPerplexitySettings(models=(), corpus=CorpusSettings(data=("stdlib",)))
    with pytest.raises(UserError, match="--short-stride is 0: it must be at least 1 tokens"):
        LongPerplexitySettings(short_stride=0)
