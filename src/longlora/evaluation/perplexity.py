"""Perplexity in sliding windows at several context lengths (LongLoRA section 4.2; Press et al., arXiv 2108.12409), all
on one text, with the sums of each document and the 95% interval that follows from them.

What is read and scored is in `longlora.evaluation.windows`. Loss is weighted by token over all documents.
"""

import logging
import math
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedConfig

from longlora import ranks
from longlora.errors import UserError
from longlora.evaluation import statistics
from longlora.evaluation.cost import announce, tokens_a_pass
from longlora.evaluation.trials import TrialLog
from longlora.evaluation.windows import Documents, Reading, as_documents, readings
from longlora.model.lm_head import IGNORED, mixed_precision, run_token_losses, unwrapped
from longlora.model.positions import original_context, window
from longlora.progress import Progress
from longlora.results import Measured
from longlora.settings import PerplexitySettings

logger = logging.getLogger(__name__)

TOKENS_A_TRIAL = 2**18
"""Tokens read for one line of a log: what a kill costs at most."""


@dataclass(frozen=True, kw_only=True)
class ContextPerplexity(Measured):
    """Perplexity at one context length; with `--score stream` a document has the windows that begin in it."""

    nll: float
    """Mean negative log-likelihood of the scored tokens, in nats."""

    tokens_read: int
    """Tokens of all forward passes."""

    skipped_documents: int
    """Documents left out because they are too short."""

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, for JSON."""
        return asdict(self) | {"document_nll": [*self.document_nll], "document_tokens": [*self.document_tokens]}


def default_contexts(config: PreTrainedConfig) -> tuple[int, ...]:
    """Context lengths to test where none are given, in tokens, rising to the model's window.

    Every doubling from the original window where it has been extended; else a quarter, a half and the whole of it.

    Raises:
        UserError: the config does not tell its window.
    """
    present = window(config)
    if present is None:
        raise UserError(f"the {config.model_type} config does not tell its window: give --contexts.")
    try:
        original = original_context(config)
    except UserError:  # what cannot be stretched was not
        original = present
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
    bos: int | None = None,
) -> list[ContextPerplexity]:
    """Perplexity at each of `settings.contexts`, in their order.

    The model runs in evaluation mode, with its ordinary full attention, and is left in the mode it was in. Only scored
    tokens go through the LM head. Processes of one launch share the windows out.

    Args:
        model: a causal language model of transformers, possibly wrapped (PEFT).
        documents: token ids (n,) of each document.
        settings: context lengths (default `default_contexts`, of those not below the stride) and the rest.
        progress: say what it will take, and show on stderr how far it is.
        log: keeps the sums of every few windows as they come; what it holds already is not computed again.
        trials: what the names of this model's trials in `log` begin with.
        bos: token to read in place of a window's first one, which is never scored, for models that cannot do without it
            (Gemma); not with `--score stream`.

    Raises:
        UserError: the stride is above a context; no document is long enough; a token is not in the model's vocabulary;
            a context is beyond learned positions; the model cannot be scored (`longlora.model.lm_head`); the loss is
            not finite.
    """
    config = unwrapped(model).config
    contexts = settings.contexts or tuple(c for c in default_contexts(config) if c >= settings.stride_at(c))
    contexts = contexts or default_contexts(config)
    every = readings(as_documents(documents), contexts, settings)
    check_positions(config, contexts)
    log = log or TrialLog()
    bos = None if settings.score == "stream" else bos
    with evaluating(model):
        if progress:
            rows = [
                window.end - window.begin
                for reading in every
                for first in range(0, len(reading.windows), _piece(reading))
                if _trial(trials, reading, first) not in log.records
                for _, window in reading.windows[first : first + _piece(reading)]
            ]
            announce("perplexity", model, rows)
        return [_result(reading, *_score(model, reading, settings, progress, log, trials, bos)) for reading in every]


def perplexity_report(
    model_name: str, data_name: str, settings: PerplexitySettings, results: Sequence[ContextPerplexity]
) -> dict[str, Any]:
    """The JSON document of `longlora eval perplexity`; `stride` is None where contexts have strides of their own."""
    strides = {result.stride for result in results}
    return {
        "model": model_name,
        "data": data_name,
        "stride": strides.pop() if len(strides) == 1 else None,
        "score": settings.score,
        "texts": settings.texts,
        "last_tokens": settings.last_tokens,
        "results": [result.to_dict() for result in results],
    }


def check_positions(config: PreTrainedConfig, contexts: Sequence[int]) -> None:
    """Say when a context is beyond the window, and refuse where positions beyond it do not exist."""
    text_config = config.get_text_config()
    rotary = bool(getattr(text_config, "rope_parameters", None))
    declared = window(config)
    if declared is None or max(contexts) <= declared:
        return
    if not rotary:
        raise UserError(
            f"context {max(contexts)} is beyond the {declared} positions that this {text_config.model_type} model has "
            f"learned; give --contexts of at most {declared}."
        )
    logger.warning("context %d is beyond the model's window of %d tokens, untrained", max(contexts), declared)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, under autocast where precisions mix; each module's own mode comes back."""
    training = [module for module in model.modules() if module.training]
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    model.eval()
    try:
        # no inference mode: weights that FSDP2 or ZeRO-3 gathered in it could not be trained any more
        with torch.no_grad(), mixed_precision(model):
            yield
    finally:
        for unit in units:
            unit.reshard()
        for module in training:
            module.training = True


def losses_from(model: nn.Module, rows: np.ndarray, first: int, bos: int | None = None) -> torch.Tensor:
    """(B, N - first) losses in nats of the tokens from `first` on in `rows` (B, N), with `bos` in place of token 0."""
    input_ids = torch.from_numpy(rows.astype(np.int64)).to(next(model.parameters()).device)
    labels = torch.full_like(input_ids, IGNORED)
    labels[:, first - 1 : -1] = input_ids[:, first:]
    if bos is not None:
        input_ids[:, 0] = bos
    return run_token_losses(model, {"input_ids": input_ids}, labels)[0][:, first - 1 : -1]


def _result(reading: Reading, nll: np.ndarray, tokens: np.ndarray) -> ContextPerplexity:
    """From the sums (windows,) of each window."""
    of_documents = [np.bincount(reading.owners, weights=sums, minlength=reading.documents) for sums in (nll, tokens)]
    scored = of_documents[1] > 0  # with a stream, no window may begin in the last documents
    document_nll, document_tokens = (sums[scored].tolist() for sums in of_documents)
    counts = [int(count) for count in document_tokens]
    found = statistics.perplexity(document_nll, counts)
    mean = float(nll.sum() / tokens.sum())
    if not mean < math.log(np.finfo(np.float64).max):
        raise UserError(
            f"the loss at context {reading.context} is {mean}, not a usable number: the model is damaged, or "
            "overflows in float16; load it in bfloat16 or float32."
        )
    return ContextPerplexity(
        context=reading.context,
        stride=reading.stride,
        perplexity=math.exp(mean),
        low=found.low,
        high=found.high,
        nll=mean,
        tokens=int(tokens.sum()),
        tokens_read=reading.tokens_read,
        documents=reading.documents,
        skipped_documents=reading.skipped,
        text=reading.text,
        document_nll=tuple(document_nll),
        document_tokens=tuple(counts),
    )


def _piece(reading: Reading) -> int:
    """Windows of one line in a log."""
    return max(1, TOKENS_A_TRIAL // reading.context)


def _trial(trials: str, reading: Reading, first: int) -> str:
    """The name of such a line; with longer contexts the text may be another one."""
    return f"{trials}{reading.context}/{reading.text}/{first}"


def _score(
    model: nn.Module,
    reading: Reading,
    settings: PerplexitySettings,
    progress: bool,
    log: TrialLog,
    trials: str,
    bos: int | None,
) -> tuple[np.ndarray, np.ndarray]:
    """(windows,) summed negative log-likelihoods in nats, in float64, and counts of scored tokens."""
    todo, piece = reading.windows, _piece(reading)
    nll, tokens = np.zeros(len(todo)), np.array([window.end - window.begin - window.first for _, window in todo])
    missing = []
    for first in range(0, len(todo), piece):
        record = log.records.get(_trial(trials, reading, first))
        if record is None:
            missing.append(first)
        else:
            nll[first : first + piece] = record["nll"]
    done = len(todo) - sum(len(todo[first : first + piece]) for first in missing)
    known = np.zeros(len(todo), dtype=bool)
    batch = settings.evaluation_batch
    title = f"perplexity at {reading.context}"
    with Progress(title, "windows", len(todo)) if progress and ranks.rank() == 0 else nullcontext() as bar:
        for begin in range(0, len(missing), ranks.together()):
            began, firsts = time.monotonic(), missing[begin : begin + ranks.together()]
            places = [at for first in firsts for at in range(first, min(first + piece, len(todo)))]
            passes = list(_batches(reading, places, batch, model))
            for ats, sums in ranks.shared_out(passes, lambda ats: _score_batch(model, reading, ats, bos)):
                nll[ats], known[ats], done = sums, True, done + len(ats)
                if bar is not None:
                    so_far = math.exp(min(nll[known].sum() / tokens[known].sum(), 100))
                    bar.show(done, f"{so_far:.2f} so far")
            seconds = round((time.monotonic() - began) / len(firsts), 3)
            for first in firsts:
                record = {"nll": nll[first : first + piece].tolist(), "seconds": seconds}
                log.append(_trial(trials, reading, first), record)
    return nll, tokens


def _score_batch(model: nn.Module, reading: Reading, places: Sequence[int], bos: int | None) -> list[float]:
    """The sum of each window, for windows of one length and one place of the first scored token."""
    batch = [reading.windows[place] for place in places]
    first = batch[0][1].first
    rows = np.stack([reading.rows.document(index)[window.begin : window.end] for index, window in batch])
    vocabulary = unwrapped(model).config.get_text_config().vocab_size
    if rows.max() >= vocabulary:
        raise UserError(
            f"token {rows.max()} is not in the model's vocabulary of {vocabulary}: the data was made with "
            "another tokenizer; make it anew with the model's own."
        )
    return losses_from(model, rows, first, bos).double().sum(1).tolist()


def _batches(reading: Reading, places: Sequence[int], batch: int, model: nn.Module) -> Iterator[list[int]]:
    """Windows of one length and one place of the first scored token together, at most `batch` (0: automatic)."""
    waiting: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
    most = 0 if batch else tokens_a_pass(model, reading.context)
    for place in places:
        window = reading.windows[place][1]
        length = window.end - window.begin
        group = waiting[length, window.first]
        group.append(place)
        if len(group) == (batch or max(1, most // length)):
            yield group
            del waiting[length, window.first]
    yield from waiting.values()
