"""LongPPL: perplexity of the key tokens, those that need the long context ("What is Wrong with Perplexity for
Long-context Language Modeling?", arXiv 2410.23771, section 3), as the authors' package `longppl` has it.

Averaged over all tokens, perplexity hardly shows whether a model uses its context, because few tokens need it. With the
log-probability that an evaluator gives a token after all of the document before it, l, and after the K or so tokens
before it, s, a token x is key if

    LSD = log p(x | l) - log p(x | s)  > alpha = 2      the long context helps,
    LCL = log p(x | l)                 > beta = -2      and helps enough,

and LongPPL = exp(mean of -log p(x | l) over the key tokens) under the model that is measured. S tokens share a short
context, so that each has K to K + S - 1 tokens before it. With a document of 8 tokens, K = 2, S = 3, `.` read and `#`
judged:

    long     ..######        short    ..###
                                         ..###

Key tokens are kept as places in the text: a model with another tokenizer has those of its tokens for key tokens that
lie inside. So one strong evaluator serves all models. A document is read once, up to the first L tokens; the mean is
over the key tokens of all documents. A model that judges for itself leaves out what it does badly, and stays below
exp(-beta) = 7.4 whatever it does.
"""

import math
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import nn
from transformers import PreTrainedConfig

from longlora import ranks
from longlora.errors import UserError
from longlora.evaluation import statistics
from longlora.evaluation.cost import announce, tokens_a_pass
from longlora.evaluation.perplexity import check_positions, evaluating, losses_from
from longlora.evaluation.trials import Record, TrialLog
from longlora.evaluation.windows import windows
from longlora.model.lm_head import unwrapped
from longlora.model.loading import window
from longlora.model.positions import original_context
from longlora.progress import Progress
from longlora.results import LongPPLRow
from longlora.settings import LongPerplexitySettings

CHARACTERS_A_TOKEN = 16
"""More than any text needs on average for a token: what of a text is tokenised for its first L tokens."""

AUTHORS_SHORT_CONTEXT, AUTHORS_STRIDE = 4096, 1024
"""K and S of the authors' code."""

Places = list[tuple[int, int]]
"""Characters `[begin, end)` of a text."""


@dataclass(frozen=True, kw_only=True)
class LongPerplexity(LongPPLRow):
    """LongPPL beside plain perplexity, with the sums of each document."""

    documents: int
    """Documents read."""

    document_key_nll: list[float]
    document_key_tokens: list[int]
    """Of each document, its key tokens' summed loss in nats, and how many they are."""


def with_lengths(settings: LongPerplexitySettings, configs: Sequence[PreTrainedConfig]) -> LongPerplexitySettings:
    """`settings` with its three lengths filled in, for models of `configs`.

    The long context is the longest of their windows. The short one and its stride are the authors', 4,096 and 1,024,
    where the long one is at least twice that; else three quarters of the shortest original window and a third of it.

    Raises:
        UserError: a config does not tell its window, or the lengths do not fit each other.
    """
    context, short, stride = settings.context, settings.short_context, settings.short_stride
    if context is None:
        windows_known = [found for config in configs if (found := window(config))]
        if not windows_known:
            raise UserError("the model's config does not tell its window: give --context and --short-context.")
        context = max(windows_known)
    if short is None and context >= 2 * AUTHORS_SHORT_CONTEXT:
        short, stride = AUTHORS_SHORT_CONTEXT, stride or AUTHORS_STRIDE
    elif short is None:
        short = max(1, min(min(_original_window(config) for config in configs), context) * 3 // 4)
    if short >= context:
        raise UserError(
            f"--short-context is {short:,}: it must be below the long one, {context:,} tokens; lower it or give a "
            "longer --context."
        )
    return replace(settings, context=context, short_context=short, short_stride=stride or max(1, short // 3))


def long_enough(texts: Iterable[str], tokenizer: Any, settings: LongPerplexitySettings) -> tuple[list[str], int]:
    """The texts of at least L tokens of the evaluator's `tokenizer`, cut there, and how many are shorter.

    Raises:
        UserError: none has L tokens, or the tokenizer does not know where its tokens stand.
    """
    assert settings.context is not None
    found: list[str] = []
    short, longest = 0, 0
    for text in texts:
        offsets = _tokenized(tokenizer, text[: CHARACTERS_A_TOKEN * settings.context])[1]
        longest = max(longest, len(offsets))
        if len(offsets) < settings.context:
            short += 1
        elif settings.max_documents is None or len(found) < settings.max_documents:
            found.append(text[: offsets[settings.context - 1][1]])
    if not found:
        raise UserError(
            f"no document has the {settings.context:,} tokens of --context: the longest of {short:,} has {longest:,}; "
            "give longer documents or a shorter --context."
        )
    return found, short


def find_key_places(
    evaluator: nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    settings: LongPerplexitySettings,
    *,
    progress: bool = True,
    log: TrialLog | None = None,
) -> list[Places]:
    """Where in each text the key tokens of `evaluator` stand, neighbours joined.

    Args:
        evaluator: a causal language model of transformers, possibly wrapped (PEFT).
        tokenizer: its tokenizer.
        texts: of at least K tokens each.
        settings: with all lengths.
        progress: say what it will take, and show on stderr how far it is.
        log: keeps what is found document by document; what it holds already is not read again.

    Raises:
        UserError: a context is beyond learned positions; the model cannot be scored (`longlora.model.lm_head`); its
            loss is not finite; the tokenizer does not know where its tokens stand.
    """
    short, stride = settings.short_context, settings.short_stride
    assert short is not None
    assert stride is not None

    def judge(text: str) -> Record:
        ids, offsets = _tokenized(tokenizer, text)
        rows = np.array(ids)
        long = _losses(evaluator, rows[None], short)
        slices = [rows[begin:end] for begin, end, _ in windows(len(ids), short + stride, stride, "last")]
        batch = max(1, tokens_a_pass(evaluator, short + stride) // (short + stride))
        whole = [each for each in slices if len(each) == short + stride]
        parts = [_losses(evaluator, np.stack(whole[at : at + batch]), short) for at in range(0, len(whole), batch)] + [
            _losses(evaluator, each[None], short) for each in slices[len(whole) :]
        ]
        key = (np.concatenate(parts) - long > settings.alpha) & (long < -settings.beta)
        return {"places": joined([offsets[at + short] for at in np.flatnonzero(key)])}

    found = _each_text("key tokens", "key", evaluator, tokenizer, texts, judge, progress, log)
    return [[(begin, end) for begin, end in record["places"]] for record in found]


def long_perplexity(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    places: Sequence[Places],
    settings: LongPerplexitySettings,
    *,
    progress: bool = True,
    log: TrialLog | None = None,
) -> LongPerplexity:
    """LongPPL and perplexity of `model`, in evaluation mode with its full attention.

    The LM head sees some thousand tokens at a time: context × vocabulary logits never exist.

    Args:
        model: a causal language model of transformers, possibly wrapped (PEFT).
        tokenizer: its tokenizer; as in the authors' code, no special token is added.
        texts: the documents, of `long_enough`.
        places: where their key tokens stand, of `find_key_places`.
        settings: with all lengths.
        progress: say what it will take, and show on stderr how far it is.
        log: keeps the sums of each document; what it holds already is not read again.

    Raises:
        UserError: as `find_key_places`.
    """
    where = dict(zip(texts, places, strict=True))

    def judge(text: str) -> Record:
        ids, offsets = _tokenized(tokenizer, text, add_special_tokens=False)
        losses = _losses(model, np.array(ids)[None], 1).astype(np.float64)
        key = losses[np.array([at - 1 for at in inside(offsets, where[text])], dtype=int)]
        return {"nll": losses.sum(), "tokens": len(losses), "key_nll": key.sum(), "key_tokens": len(key)}

    found = _each_text("LongPPL", "document", model, tokenizer, texts, judge, progress, log)
    scored = [record for record in found if record["key_tokens"]]
    sums, counts = ([record[name] for record in scored] for name in ("key_nll", "key_tokens"))
    longppl = statistics.perplexity(sums, counts) if scored else None
    assert settings.context is not None
    return LongPerplexity(
        context=settings.context,
        longppl=longppl.value if longppl else None,
        low=longppl.low if longppl else None,
        high=longppl.high if longppl else None,
        perplexity=math.exp(sum(record["nll"] for record in found) / sum(record["tokens"] for record in found)),
        key_tokens=sum(counts),
        tokens=sum(record["tokens"] for record in found),
        documents=len(found),
        document_key_nll=[record["key_nll"] for record in found],
        document_key_tokens=[record["key_tokens"] for record in found],
    )


def joined(places: Iterable[tuple[int, int]]) -> Places:
    """Rising places, those that touch as one.

    >>> joined([(0, 3), (3, 5), (6, 7)])
    [(0, 5), (6, 7)]
    """
    found: Places = []
    for begin, end in places:
        if found and found[-1][1] == begin:
            found[-1] = (found[-1][0], end)
        else:
            found.append((begin, end))
    return found


def inside(offsets: Sequence[tuple[int, int]], places: Places) -> list[int]:
    """Which tokens, at `offsets` in the text, lie inside one of `places`.

    >>> inside([(0, 2), (2, 4), (4, 6)], [(1, 4)])
    [1]
    """
    begins = [begin for begin, _ in places]
    last = np.searchsorted(begins, [begin for begin, _ in offsets], side="right") - 1
    return [at for at, place in enumerate(last) if at and place >= 0 and offsets[at][1] <= places[place][1]]


def _original_window(config: PreTrainedConfig) -> int:
    try:
        return original_context(config)
    except UserError:  # positions that are learned, not rotary
        return window(config) or sys.maxsize


def _tokenized(tokenizer: Any, text: str, **options: Any) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids of `text`, and the characters of each."""
    try:
        found = tokenizer(text, return_offsets_mapping=True, verbose=False, **options)
    except NotImplementedError as error:
        raise UserError(
            "LongPPL needs to know where in the text tokens stand, and this tokenizer is one without a fast version: "
            "give models and an --evaluator with fast tokenizers."
        ) from error
    return found["input_ids"], found["offset_mapping"]


def _each_text(
    title: str,
    trials: str,
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    judge: Callable[[str], Record],
    progress: bool,
    log: TrialLog | None,
) -> list[Record]:
    """What `judge` makes of each text, or the log has of it; processes of one launch share the texts out."""
    log = log or TrialLog()
    missing = [number for number in range(len(texts)) if f"{trials}/{number}" not in log.records]
    lengths = [len(_tokenized(tokenizer, texts[number])[0]) for number in missing]
    if lengths:
        check_positions(unwrapped(model).config, [max(lengths)])

    def timed(number: int) -> Record:
        began = time.monotonic()
        record = judge(texts[number])
        return {name: _plain(value) for name, value in record.items()} | {"seconds": round(time.monotonic() - began, 3)}

    shown = progress and ranks.rank() == 0
    with evaluating(model), Progress(title, "documents", len(texts)) if shown else nullcontext() as bar:
        if progress:
            announce(title, model, lengths)
        for number, record in ranks.shared_out(missing, timed):
            log.append(f"{trials}/{number}", record)
            if bar is not None:
                bar.show(len(texts) - len(missing) + number + 1, f"{number + 1:,} of {len(texts):,} documents")
    return [log.records[f"{trials}/{number}"] for number in range(len(texts))]


def _plain(value: Any) -> Any:
    """A number of numpy's as Python has it, for JSON."""
    return value.item() if isinstance(value, np.generic) else value


def _losses(model: nn.Module, rows: np.ndarray, first: int) -> np.ndarray:
    """`losses_from`, row after row: (B * (N - first),) float32."""
    found = losses_from(model, rows, first).float().cpu().numpy().ravel()
    if not np.isfinite(found).all():
        raise UserError(
            f"the loss of a row of {rows.shape[1]:,} tokens is not a number: the model is damaged, or overflows in "
            "float16; load it in bfloat16 or float32."
        )
    return found
