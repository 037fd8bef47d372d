"""Sliding-window perplexity at several context lengths (LongLoRA section 4.2; Press et al., arXiv 2108.12409).

Windows of L tokens slide over a document by S tokens; the last one is cut at the document's end. With L = 8, S = 3 and
a document of 16 tokens, `.` read and `#` scored:

    --score last      ·#######                   --score window    ·#######
                         .....###                                     ·#######
                            .....###                                     ·#######
                               .....##                                      ·######

`last` scores each token once, with at least L - S tokens before it from the second window on. The first token of a
window (`·`) has nothing to be predicted from. Loss is weighted by token over all documents.
"""

import logging
import math
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedConfig

from longlora.errors import UserError
from longlora.evaluation.trials import TrialLog
from longlora.model.lm_head import IGNORED, mixed_precision, run_token_losses, unwrapped
from longlora.model.positions import original_context, present_context
from longlora.progress import Progress
from longlora.settings import PerplexitySettings

logger = logging.getLogger(__name__)

TOKENS_A_PASS = 8192
"""Tokens of a forward pass where `evaluation_batch` leaves the choice open."""

TOKENS_A_TRIAL = 2**18
"""Tokens read for one line of a log: what a kill costs at most."""


class Documents(Protocol):
    """Documents as token ids, any one at a time: what `TokenizedCorpus` is."""

    def __len__(self) -> int: ...

    def document(self, index: int) -> np.ndarray: ...


@dataclass(frozen=True, kw_only=True)
class ContextPerplexity:
    """Perplexity at one context length."""

    context: int
    """Window length in tokens."""

    perplexity: float
    """exp(nll)."""

    nll: float
    """Mean negative log-likelihood of the scored tokens, in nats."""

    tokens: int
    """Tokens scored; with `--score window`, as often as they were."""

    documents: int
    """Documents scored."""

    skipped_documents: int
    """Documents left out because they are too short."""

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, for JSON."""
        return asdict(self)


class Window(NamedTuple):
    """Tokens `[begin, end)` of a document are read; those from `begin + first` on are scored."""

    begin: int
    end: int
    first: int


def windows(tokens: int, context: int, stride: int, score: str) -> Iterator[Window]:
    """The windows of a document of `tokens` tokens, in order.

    >>> list(windows(16, 8, 3, "last"))[1:]
    [Window(begin=3, end=11, first=5), Window(begin=6, end=14, first=5), Window(begin=9, end=16, first=5)]
    """
    previous_end = 0
    for begin in range(0, tokens, stride):
        end = min(begin + context, tokens)
        first = max(previous_end - begin, 1) if score == "last" else 1
        if first < end - begin:
            yield Window(begin, end, first)
        if end == tokens:
            return
        previous_end = end


def default_contexts(config: PreTrainedConfig) -> tuple[int, ...]:
    """Context lengths to test where none are given, in tokens, rising to the model's window.

    Every doubling from the original window where it has been extended; else a quarter, a half and the whole of it.

    Raises:
        UserError: the config does not tell its window.
    """
    original, present = original_context(config), present_context(config)
    if original >= present:
        return present // 4, present // 2, present
    doublings = math.ceil(math.log2(present / original))
    return *(original * 2**doubling for doubling in range(doublings)), present


def perplexity(
    model: nn.Module,
    documents: Iterable[np.ndarray] | Documents,
    settings: PerplexitySettings,
    *,
    progress: bool = True,
    log: TrialLog | None = None,
    trials: str = "",
) -> list[ContextPerplexity]:
    """Perplexity at each of `settings.contexts`, in their order.

    The model runs in evaluation mode, with its ordinary full attention, and is left in the mode it was in. Only scored
    tokens go through the LM head.

    Args:
        model: a causal language model of transformers, possibly wrapped (PEFT).
        documents: token ids (n,) of each document.
        settings: context lengths (default `default_contexts`, of those not below the stride) and the rest.
        progress: show on stderr how far it is.
        log: keeps the sums of every few windows as they come; what it holds already is not computed again.
        trials: what the names of this model's trials in `log` begin with.

    Raises:
        UserError: the stride is above a context; no document is long enough; a token is not in the model's vocabulary;
            a context is beyond learned positions; the model cannot be scored (`longlora.model.lm_head`); the loss is
            not finite.
    """
    config = unwrapped(model).config
    contexts = settings.contexts or tuple(c for c in default_contexts(config) if c >= settings.stride)
    if settings.stride > min(contexts, default=0):
        shortest = min(contexts or default_contexts(config))
        raise UserError(
            f"--stride is {settings.stride}: it must be at most the shortest context, {shortest} tokens, or tokens "
            "between windows would never be scored; give a smaller --stride or longer --contexts."
        )
    check_positions(config, contexts)
    corpus = cast(Documents, documents) if hasattr(documents, "document") else Listed(list(documents))
    lengths = [len(corpus.document(index)) for index in range(len(corpus))]
    chosen = {context: _long_enough(lengths, context, settings) for context in contexts}
    log = log or TrialLog()

    results = []
    with evaluating(model):
        for context in contexts:
            todo = [
                (index, window)
                for index in chosen[context]
                for window in windows(lengths[index], context, settings.stride, settings.score)
            ]
            nll, tokens = _score(model, corpus, todo, context, settings, progress, log, trials)
            if not nll / tokens < math.log(np.finfo(np.float64).max):
                raise UserError(
                    f"the loss at context {context} is {nll / tokens}, not a usable number: the model is damaged, or "
                    "overflows in float16; load it in bfloat16 or float32."
                )
            results.append(
                ContextPerplexity(
                    context=context,
                    perplexity=math.exp(nll / tokens),
                    nll=nll / tokens,
                    tokens=tokens,
                    documents=len(chosen[context]),
                    skipped_documents=sum(length < _threshold(context, settings) for length in lengths),
                )
            )
    return results


def perplexity_report(
    model_name: str, data_name: str, settings: PerplexitySettings, results: Sequence[ContextPerplexity]
) -> dict[str, Any]:
    """The JSON document of `longlora eval perplexity`."""
    return {
        "model": model_name,
        "data": data_name,
        "stride": settings.stride,
        "score": settings.score,
        "results": [result.to_dict() for result in results],
    }


class Listed:
    """Documents that are in memory already."""

    def __init__(self, documents: list[np.ndarray]) -> None:
        self.documents = documents

    def __len__(self) -> int:
        return len(self.documents)

    def document(self, index: int) -> np.ndarray:
        return self.documents[index]


def _threshold(context: int, settings: PerplexitySettings) -> int:
    return max(context, settings.min_document_tokens or 0)


def _long_enough(lengths: list[int], context: int, settings: PerplexitySettings) -> list[int]:
    """Indices of the documents to score at `context`."""
    threshold = _threshold(context, settings)
    chosen = [index for index, length in enumerate(lengths) if length >= threshold][: settings.max_documents]
    if not chosen:
        raise UserError(
            f"no document has the {threshold} tokens that context {context} asks for: the longest of {len(lengths)} "
            f"has {max(lengths, default=0)}; give longer documents, or lower --contexts and --min-document-tokens."
        )
    return chosen


def check_positions(config: PreTrainedConfig, contexts: Sequence[int]) -> None:
    """Say when a context is beyond the window, and refuse where positions beyond it do not exist."""
    text_config = config.get_text_config()
    rotary = bool(getattr(text_config, "rope_parameters", None))
    window = present_context(config) if rotary else getattr(text_config, "max_position_embeddings", None)
    if window is None or max(contexts) <= window:
        return
    if not rotary:
        raise UserError(
            f"context {max(contexts)} is beyond the {window} positions that this {text_config.model_type} model has "
            f"learned; give --contexts of at most {window}."
        )
    logger.warning("context %d is beyond the model's window of %d tokens, untrained", max(contexts), window)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, under autocast where precisions mix; each module's own mode comes back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.inference_mode(), mixed_precision(model):
            yield
    finally:
        for module in training:
            module.training = True


def _score(
    model: nn.Module,
    corpus: Documents,
    todo: Sequence[tuple[int, Window]],
    context: int,
    settings: PerplexitySettings,
    progress: bool,
    log: TrialLog,
    trials: str,
) -> tuple[float, int]:
    """Summed negative log-likelihood in nats, in float64, and the number of scored tokens, at one context length."""
    nll, tokens, done = 0.0, 0, 0
    piece = max(1, TOKENS_A_TRIAL // context)
    with Progress(f"perplexity at {context}", "windows", len(todo)) if progress else nullcontext() as bar:
        for first in range(0, len(todo), piece):
            part, trial = todo[first : first + piece], f"{trials}{context}/{first}"
            if trial not in log.records:
                began, added, scored = time.monotonic(), 0.0, 0
                for batch in _batches(part, settings.evaluation_batch):
                    batch_nll, batch_tokens = _score_batch(model, corpus, batch)
                    added, scored, done = added + batch_nll, scored + batch_tokens, done + len(batch)
                    if bar is not None:
                        so_far = math.exp(min((nll + added) / (tokens + scored), 100))
                        bar.show(done, f"{so_far:.2f} so far")
                seconds = round(time.monotonic() - began, 3)
                log.append(trial, {"nll": added, "tokens": scored, "windows": len(part), "seconds": seconds})
            nll, tokens = nll + log.records[trial]["nll"], tokens + log.records[trial]["tokens"]
            done = first + len(part)
    return nll, tokens


def _score_batch(model: nn.Module, corpus: Documents, batch: Sequence[tuple[int, Window]]) -> tuple[float, int]:
    """As `_score`, for windows of one length and one place of the first scored token."""
    first = batch[0][1].first
    rows = np.stack([corpus.document(index)[window.begin : window.end] for index, window in batch])
    vocabulary = unwrapped(model).config.get_text_config().vocab_size
    if rows.max() >= vocabulary:
        raise UserError(
            f"token {rows.max()} is not in the model's vocabulary of {vocabulary}: the data was made with "
            "another tokenizer; make it anew with the model's own."
        )
    input_ids = torch.from_numpy(rows.astype(np.int64)).to(next(model.parameters()).device)
    labels = torch.full_like(input_ids, IGNORED)
    labels[:, first - 1 : -1] = input_ids[:, first:]
    losses, _ = run_token_losses(model, {"input_ids": input_ids}, labels)
    return losses.double().sum().item(), int((labels != IGNORED).sum())


def _batches(todo: Sequence[tuple[int, Window]], batch: int) -> Iterator[list[tuple[int, Window]]]:
    """Windows of one length and one place of the first scored token together, at most `batch` (0: automatic)."""
    waiting: defaultdict[tuple[int, int], list[tuple[int, Window]]] = defaultdict(list)
    for index, window in todo:
        length = window.end - window.begin
        group = waiting[length, window.first]
        group.append((index, window))
        if len(group) == (batch or max(1, TOKENS_A_PASS // length)):
            yield group
            del waiting[length, window.first]
    yield from waiting.values()
