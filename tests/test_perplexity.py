"""Sliding-window perplexity against a loop over full logits, and the promises around it."""

import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel

from longlora.errors import UserError
from longlora.evaluation.perplexity import default_contexts, perplexity, perplexity_report
from longlora.evaluation.windows import Window, windows
from longlora.model.lm_head import causal_lm_loss
from longlora.model.positions import extend_positions
from longlora.settings import PerplexitySettings

VOCABULARY = 97
# with L = 16: n < L, n = L, n = L + 1, n = L + kS for S = 5 and 8, and others
LENGTHS = (15, 16, 17, 26, 32, 47, 61)


def make_documents(lengths: Sequence[int] = LENGTHS) -> list[np.ndarray]:
    random = np.random.default_rng(3)
    return [random.integers(0, VOCABULARY, length).astype(np.uint16) for length in lengths]


class Corpus:
    """Documents one at a time, as `TokenizedCorpus` gives them."""

    def __init__(self, documents: list[np.ndarray]) -> None:
        self.documents = documents

    def __len__(self) -> int:
        return len(self.documents)

    def document(self, index: int) -> np.ndarray:
        return self.documents[index]


@torch.no_grad()
def loop(model: Any, documents: list[np.ndarray], context: int, stride: int, score: str) -> tuple[float, int]:
    """The oracle: one window at a time, all logits, token by token; mean loss and count."""
    total, count = 0.0, 0
    for document in documents:
        begin, known = 0, 0
        while len(document) >= context:
            window = document[begin : begin + context].tolist()
            probabilities = model(torch.tensor([window])).logits[0].double().softmax(-1).numpy()
            for i in range(1, len(window)):
                if score == "window" or begin + i >= known:
                    total -= math.log(probabilities[i - 1, window[i]])
                    count += 1
            if begin + context >= len(document):
                break
            known, begin = begin + context, begin + stride
    return total / count, count


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Any]) -> Any:
    return tiny_model("llama")


@pytest.mark.parametrize("score", ["last", "window"])
@pytest.mark.parametrize("stride", [3, 5, 8, 16])
def test_equals_a_loop_over_full_logits(model: Any, stride: int, score: str) -> None:
    documents = make_documents()
    settings = PerplexitySettings(contexts=(16, 26, 17), stride=stride, score=score, texts="each")
    results = perplexity(model, documents, settings, progress=False)
    assert [result.context for result in results] == [16, 26, 17]
    for result in results:
        nll, tokens = loop(model, documents, result.context, stride, score)
        assert result.tokens == tokens
        assert result.nll == pytest.approx(nll, abs=1e-6)
        assert result.perplexity == pytest.approx(math.exp(nll), rel=1e-5)
        assert result.documents == sum(length >= result.context for length in LENGTHS)
        assert result.skipped_documents == len(LENGTHS) - result.documents


@pytest.mark.parametrize("score", ["last", "window"])
def test_the_batch_size_changes_nothing(model: Any, score: str) -> None:
    found = []
    for batch in (1, 3, 1000, 0):
        settings = PerplexitySettings(contexts=(16, 24), stride=5, score=score, evaluation_batch=batch, texts="each")
        found.append(perplexity(model, Corpus(make_documents()), settings, progress=False))
    for results in found[1:]:
        for result, alone in zip(results, found[0], strict=True):
            assert result.nll == pytest.approx(alone.nll, abs=1e-6)
            assert result.tokens == alone.tokens


def test_windows_are_batched_across_documents(model: Any) -> None:
    shapes: Counter[tuple[int, ...]] = Counter()
    hook = model.model.embed_tokens.register_forward_hook(lambda _module, args, _output: shapes.update([args[0].shape]))
    settings = PerplexitySettings(contexts=(16,), stride=8, evaluation_batch=4)
    perplexity(model, make_documents([16, 24, 20, 16, 24, 16]), settings, progress=False)
    hook.remove()
    # six first windows, two whole later ones, one cut to 12 tokens
    assert shapes == {(4, 16): 1, (2, 16): 2, (1, 12): 1}


def test_windows_by_hand() -> None:
    assert list(windows(8, 8, 3, "last")) == [Window(0, 8, 1)]
    assert list(windows(9, 8, 3, "last")) == [Window(0, 8, 1), Window(3, 9, 5)]
    assert list(windows(11, 8, 3, "last")) == [Window(0, 8, 1), Window(3, 11, 5)]
    assert list(windows(12, 8, 3, "last")) == [Window(0, 8, 1), Window(3, 11, 5), Window(6, 12, 5)]
    assert list(windows(12, 8, 3, "window")) == [Window(0, 8, 1), Window(3, 11, 1), Window(6, 12, 1)]
    assert list(windows(6, 2, 1, "last")) == [Window(begin, begin + 2, 1) for begin in range(5)]
    # windows end to end: the first token of each has nothing before it, and one alone at the end is no window
    assert list(windows(12, 4, 4, "last")) == [Window(0, 4, 1), Window(4, 8, 1), Window(8, 12, 1)]
    assert list(windows(9, 4, 4, "last")) == [Window(0, 4, 1), Window(4, 8, 1)]


@pytest.mark.parametrize("context", [2, 3, 8, 13])
def test_last_scores_each_token_once_with_the_promised_tokens_before_it(context: int) -> None:
    for stride in range(1, context):
        for tokens in range(context, 4 * context):
            scored = Counter[int]()
            for window in windows(tokens, context, stride, "last"):
                assert window.end - window.begin <= context
                scored.update(range(window.begin + window.first, window.end))
                if window.begin:
                    assert window.first >= context - stride
            assert scored == Counter(range(1, tokens))


@pytest.mark.parametrize("score", ["last", "window"])
def test_only_scored_tokens_go_through_the_head(tiny_model: Callable[..., Any], score: str) -> None:
    model = tiny_model("llama")
    seen: list[int] = []
    model.lm_head.register_forward_hook(lambda _module, args, _output: seen.append(args[0].shape[:-1].numel()))
    passes: list[int] = []
    model.model.register_forward_hook(lambda _module, _args, output: passes.append(output[0].shape[0]))
    settings = PerplexitySettings(contexts=(16,), stride=4, score=score, evaluation_batch=3)
    result = perplexity(model, make_documents(), settings, progress=False)[0]
    # besides the scored tokens each pass makes the logits of its rows' last token, and the first one proves them
    assert sum(seen) == result.tokens + sum(passes) + passes[0]


def test_weighted_by_token_over_documents(model: Any) -> None:
    """A long document that the model finds easy and two short ones that it finds hard: a mean of means would differ."""
    easy = [5]
    with torch.no_grad():
        while len(easy) < 64:
            easy.append(int(model(torch.tensor([easy[-16:]])).logits[0, -1].argmax()))
    documents = [np.array(easy), *make_documents([16, 17])]
    settings = PerplexitySettings(contexts=(16,), stride=4)
    together = perplexity(model, documents, settings, progress=False)[0]
    alone = [perplexity(model, [document], settings, progress=False)[0] for document in documents]
    assert together.tokens == sum(result.tokens for result in alone)
    by_token = sum(result.nll * result.tokens for result in alone) / together.tokens
    assert together.nll == pytest.approx(by_token, abs=1e-6)
    assert abs(sum(result.nll for result in alone) / 3 - by_token) > 0.5
    assert together.nll == pytest.approx(loop(model, documents, 16, 4, "last")[0], abs=1e-6)


def test_which_documents_are_scored(model: Any) -> None:
    documents = make_documents()
    settings = PerplexitySettings(contexts=(16, 32), stride=16, min_document_tokens=32)
    for result in perplexity(model, documents, settings, progress=False):
        assert (result.documents, result.skipped_documents) == (3, 4)
        assert result.nll == pytest.approx(loop(model, documents[4:], result.context, 16, "last")[0], abs=1e-6)
    settings = PerplexitySettings(contexts=(16,), stride=16, max_documents=2)
    result = perplexity(model, iter(documents), settings, progress=False)[0]
    assert (result.documents, result.skipped_documents) == (2, 1)
    assert result.nll == pytest.approx(loop(model, documents[:3], 16, 16, "last")[0], abs=1e-6)


@pytest.mark.parametrize(
    ("settings", "lengths", "sentence"),
    [
        ({"contexts": (32, 16), "stride": 17}, LENGTHS, "--stride is 17.*at most the shortest context, 16"),
        ({"contexts": (), "stride": 65}, LENGTHS, "--stride is 65.*shortest context, 16"),
        ({"contexts": (16, 62), "stride": 4}, LENGTHS, "62 tokens.*longest of 7 has 61"),
        ({"contexts": (16,), "stride": 4, "min_document_tokens": 80}, LENGTHS, "80 tokens.*longest of 7 has 61"),
        ({"contexts": (16,), "stride": 4}, (), "longest of 0 has 0"),
    ],
)
def test_settings_that_do_not_fit(model: Any, settings: dict[str, Any], lengths: Sequence[int], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        perplexity(model, make_documents(lengths), PerplexitySettings(**settings), progress=False)


def test_tokens_of_another_tokenizer_are_refused(model: Any) -> None:
    documents = [np.array([0, 96, 97, 5] * 4)]
    with pytest.raises(UserError, match="token 97 is not in the model's vocabulary of 97"):
        perplexity(model, documents, PerplexitySettings(contexts=(16,), stride=4), progress=False)


def test_a_loss_that_is_no_number_is_refused(tiny_model: Callable[..., Any]) -> None:
    broken = tiny_model("llama")
    broken.model.norm.weight.data[3] = math.nan
    with pytest.raises(UserError, match="loss at context 16 is nan"):
        perplexity(broken, make_documents(), PerplexitySettings(contexts=(16,), stride=4), progress=False)


def test_beyond_the_window(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    documents = make_documents([100])
    settings = PerplexitySettings(contexts=(64, 80), stride=40)
    with caplog.at_level(logging.WARNING):
        result = perplexity(model, documents, settings, progress=False)[1]
    assert "context 80 is beyond the model's window of 64 tokens" in caplog.text
    assert result.nll == pytest.approx(loop(model, documents, 80, 40, "last")[0], abs=1e-6)

    learned = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=1, n_head=2))
    with pytest.raises(UserError, match="context 80 is beyond the 64 positions"):
        perplexity(learned, documents, settings, progress=False)
    assert perplexity(learned, documents, PerplexitySettings(contexts=(64,), stride=40), progress=False)


def test_the_model_is_left_as_it_was(tiny_model: Callable[..., Any]) -> None:
    """In training as the Trainer has it: dropout, gradient checkpointing and an input that asks for gradients."""
    model = tiny_model("llama", attention_dropout=0.3)
    settings = PerplexitySettings(contexts=(16,), stride=4)
    expected = perplexity(model, make_documents(), settings, progress=False)[0]
    extend_positions(model, 128, "dynamic")  # rotary embeddings that change with the length of what they last saw
    lora = LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.3)
    trained = get_peft_model(model, lora)
    trained.enable_input_require_grads()
    model.gradient_checkpointing_enable()
    trained.train()
    model.model.layers[0].eval()
    modes = [module.training for module in trained.modules()]
    result = perplexity(trained, make_documents(), settings, progress=False)[0]
    assert result.nll == pytest.approx(expected.nll, abs=1e-6)
    assert perplexity(trained, make_documents([100]), PerplexitySettings(contexts=(100,), stride=4), progress=False)
    assert [module.training for module in trained.modules()] == modes
    input_ids = torch.randint(0, VOCABULARY, (1, 30))
    causal_lm_loss(trained, {"input_ids": input_ids, "labels": input_ids}).backward()
    assert any(parameter.grad is not None for parameter in trained.parameters())

    with pytest.raises(UserError):
        perplexity(trained, [np.full(16, VOCABULARY)], settings, progress=False)
    assert [module.training for module in trained.modules()] == modes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_trained_parts_in_float32_inside_a_half_precision_model(
    tiny_model: Callable[..., Any], dtype: torch.dtype
) -> None:
    model = tiny_model("llama")
    settings = PerplexitySettings(contexts=(16,), stride=4)
    expected = perplexity(model, make_documents(), settings, progress=False)[0]
    lora = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "norm", "input_layernorm"])
    trained = get_peft_model(model, lora)
    for parameter in trained.parameters():
        parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else dtype)
    result = perplexity(trained, make_documents(), settings, progress=False)[0]
    assert result.nll == pytest.approx(expected.nll, abs=0.05)
    assert result.nll != expected.nll
    assert not torch.is_autocast_enabled("cpu")


def test_one_text_for_all_contexts(model: Any) -> None:
    documents = make_documents()
    results = perplexity(model, documents, PerplexitySettings(contexts=(16, 32), stride=8), progress=False)
    long_enough = [document for document in documents if len(document) >= 32]
    for result in results:
        assert (result.documents, result.skipped_documents) == (3, 4)
        assert result.tokens == sum(len(document) - 1 for document in long_enough)
        assert result.nll == pytest.approx(loop(model, long_enough, result.context, 8, "last")[0], abs=1e-6)
        # the sums of each document are its own perplexity
        for at, document in enumerate(long_enough):
            nll, tokens = loop(model, [document], result.context, 8, "last")
            assert result.document_tokens[at] == tokens
            assert result.document_nll[at] == pytest.approx(nll * tokens, rel=1e-6)
        assert result.low is not None
        assert result.high is not None
        assert result.low < result.perplexity < result.high
        assert result.tokens_read == sum(
            len(document[begin : begin + result.context])
            for document in long_enough
            for begin in range(0, len(document), 8)
            if begin == 0 or begin + result.context - 8 < len(document)
        )
    assert results[0].text == results[1].text
    each = PerplexitySettings(contexts=(16, 32), stride=8, texts="each")
    apart = perplexity(model, documents, each, progress=False)
    assert [result.documents for result in apart] == [6, 3]
    assert apart[0].text != apart[1].text == results[1].text


@torch.no_grad()
def last_tokens_loop(model: Any, document: np.ndarray, context: int, stride: int, first: int, end: int) -> float:
    """The oracle: the loss of tokens `first` to `end`, `stride` at a time, with the `context` that ends there."""
    total = 0.0
    for known in range(first, end, stride):
        reached = min(known + stride, end)
        begin = max(0, reached - context)
        logits = model(torch.from_numpy(document[begin:reached].astype(np.int64))[None]).logits[0].double()
        for at in range(known, reached):
            total -= float(logits[at - 1 - begin].log_softmax(-1)[document[at]])
    return total


@pytest.mark.parametrize(
    ("count", "stride", "reads"),
    [
        # one window where the context is at least twice what is scored, and at the longest context always
        (8, "auto", {8: (4, 2 * 8), 16: (8, 16), 48: (48, 48)}),
        (9, "auto", {8: (4, 3 * 8), 16: (8, 2 * 16), 48: (48, 48)}),
        (8, 3, {8: (3, 3 * 8), 16: (3, 3 * 16), 48: (48, 48)}),
        (40, 8, {8: (7, 6 * 8), 16: (8, 5 * 16), 48: (48, 48)}),
        (47, 16, {16: (15, 4 * 16), 48: (48, 48)}),
        (1, "auto", {8: (1, 8), 48: (48, 48)}),
    ],
)
def test_the_last_tokens_alone(
    model: Any, count: int, stride: Any, reads: dict[int, tuple[int, int]], caplog: pytest.LogCaptureFixture
) -> None:
    """The same tokens at each context: the last `count` of the longest context; what is announced is what is read."""
    documents = make_documents([60, 47, 48, 90])
    long_enough = [documents[at] for at in (0, 2, 3)]
    settings = PerplexitySettings(contexts=tuple(reads), stride=stride, last_tokens=count)
    passed: list[int] = []
    hook = model.model.embed_tokens.register_forward_hook(lambda _module, args, _output: passed.append(args[0].numel()))
    with caplog.at_level(logging.INFO):
        results = perplexity(model, documents, settings)
    hook.remove()
    for result, (context, (own, tokens)) in zip(results, reads.items(), strict=True):
        expected = [last_tokens_loop(model, each, context, own, 48 - count, 48) for each in long_enough]
        assert result.document_nll == pytest.approx(expected, rel=1e-6)
        assert result.document_tokens == (count,) * 3
        assert result.tokens_read == 3 * tokens
        assert (result.tokens, result.documents, result.skipped_documents) == (3 * count, 3, 1)
    assert f"{sum(result.tokens_read for result in results):,} tokens to read" in caplog.text
    assert sum(passed[2:]) == sum(result.tokens_read for result in results)  # after two passes that are timed
    assert len({result.text for result in results}) == 1
    # a shorter context alone is scored on the same tokens where --min-document-tokens says so
    alone = replace(settings, contexts=(16,), min_document_tokens=48)
    (again,) = perplexity(model, documents, alone, progress=False)
    assert (again.text, again.tokens) == (results[0].text, results[0].tokens)
    if 16 in reads:
        assert again == results[list(reads).index(16)]
    (other,) = perplexity(model, documents, replace(alone, last_tokens=2), progress=False)
    assert other.text != again.text


def test_last_tokens_that_do_not_fit(model: Any) -> None:
    for given in ({"score": "window"}, {"score": "stream"}, {"texts": "each"}):
        with pytest.raises(UserError, match="--last-tokens scores each of the same tokens once at all contexts"):
            PerplexitySettings(last_tokens=4, **given)
    with pytest.raises(UserError, match="last-tokens is 0"):
        PerplexitySettings(last_tokens=0)
    with pytest.raises(UserError, match="--last-tokens is 16: it must be below the longest context, 16 tokens"):
        perplexity(model, make_documents(), PerplexitySettings(contexts=(8, 16), stride=4, last_tokens=16))


def test_strides() -> None:
    chosen = {context: PerplexitySettings().stride_at(context) for context in (64, 512, 2048, 8192, 131072)}
    assert chosen == {64: 32, 512: 256, 2048: 256, 8192: 1024, 131072: 16384}
    assert {PerplexitySettings(stride="paper").stride_at(context) for context in (512, 131072)} == {256}
    assert PerplexitySettings(score="stream").stride_at(8192) == 256
    with pytest.raises(UserError, match="unknown --stride 'papr'.*Did you mean 'paper'"):
        PerplexitySettings(stride="papr")  # type: ignore[arg-type]


@torch.no_grad()
def original_script(model: Any, stream: np.ndarray, length: int, stride: int) -> float:
    """LongLoRA's `eval.py`, written anew: whole windows over one stream, the last one dropped, mean of their losses."""
    begins = list(range(0, len(stream) - length, stride))
    begins.pop()
    losses = []
    for begin in begins:
        ids = torch.from_numpy(stream[begin : begin + length].astype(np.int64))[None]
        losses.append(model(input_ids=ids, labels=ids).loss.item())
    return float(np.mean(losses))


@pytest.mark.parametrize(("length", "stride"), [(16, 5), (32, 8), (64, 64)])
def test_the_papers_script(model: Any, length: int, stride: int) -> None:
    documents = make_documents([5, 100, 61, 1, 80])
    settings = PerplexitySettings(contexts=(length,), stride=stride, score="stream")
    (result,) = perplexity(model, documents, settings, progress=False, bos=3)
    expected = original_script(model, np.concatenate(documents), length, stride)
    assert result.nll == pytest.approx(expected, abs=1e-6)
    assert result.perplexity == pytest.approx(math.exp(expected), rel=1e-6)
    assert (result.documents, result.skipped_documents) == (5, 0)
    assert sum(result.document_tokens) == result.tokens
    with pytest.raises(UserError, match="16 tokens, too few for --score stream at context 16"):
        perplexity(model, make_documents([16]), replace(settings, contexts=(16,), stride=8), progress=False)


def test_a_beginning_token_at_the_head_of_each_window(model: Any) -> None:
    (document,) = make_documents([40])
    settings = PerplexitySettings(contexts=(16,), stride=8)
    (result,) = perplexity(model, [document], settings, progress=False, bos=3)
    total = 0.0
    with torch.no_grad():
        for begin, end, first in windows(40, 16, 8, "last"):
            ids = torch.tensor([3, *document[begin + 1 : end].tolist()])[None]
            losses = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none")
            total += losses[first - 1 :].sum().item()
    assert result.nll == pytest.approx(total / 39, abs=1e-6)
    assert result.nll != perplexity(model, [document], settings, progress=False)[0].nll


def test_default_contexts(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama")
    assert default_contexts(model.config) == (16, 32, 64)
    for method, context, expected in [
        ("linear", 256, (64, 128, 256)),
        ("yarn", 200, (64, 128, 200)),
        ("dynamic", 512, (64, 128, 256, 512)),
        ("ntk", 100, (64, 100)),
    ]:
        model = tiny_model("llama")
        extend_positions(model, context, method)
        assert default_contexts(model.config) == expected
    # contexts that the stride would not fit into are left out
    model = tiny_model("llama")
    results = perplexity(model, make_documents([70]), PerplexitySettings(stride=20), progress=False)
    assert [result.context for result in results] == [32, 64]


def test_the_report_is_json(model: Any) -> None:
    settings = PerplexitySettings(contexts=(16, 32), stride=8, score="window")
    results = perplexity(model, make_documents(), settings, progress=False)
    report = json.loads(json.dumps(perplexity_report("some/model", "books", settings, results)))
    entries = report.pop("results")
    assert report == {"model": "some/model", "data": "books", "stride": 8, "score": "window", "texts": "one"} | {
        "last_tokens": None
    }
    assert [entry["context"] for entry in entries] == [16, 32]
    assert entries[0] == results[0].to_dict()
    assert set(entries[0]) == {
        *("context", "stride", "perplexity", "low", "high", "nll", "tokens", "tokens_read"),
        *("documents", "skipped_documents", "text", "document_nll", "document_tokens"),
    }


def test_progress_in_a_log(model: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longlora.progress.SECONDS_BETWEEN_LINES", 0.0)
    settings = PerplexitySettings(contexts=(16,), stride=4, evaluation_batch=8)
    with caplog.at_level(logging.INFO):
        perplexity(model, make_documents(), settings, progress=False)
        assert "perplexity at 16" not in caplog.text
        perplexity(model, make_documents(), settings)
    assert "perplexity at 16" in caplog.text
    assert "left" in caplog.text
