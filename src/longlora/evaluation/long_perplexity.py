"""LongPPL: perplexity of the key tokens, those that need the long context ("What is Wrong with Perplexity for
Long-context Language Modeling?", arXiv 2410.23771, section 3).

Averaged over all tokens, perplexity hardly shows whether a model uses its context, because few tokens need it. With the
log-probability of a token given the long context l, and given only the K or so tokens before it, s, a token x is key if

    LSD = log p(x | l) - log p(x | s)  > alpha = 2      the long context helps,
    LCL = log p(x | l)                 > beta = -2      and helps enough,

and LongPPL = exp(mean of -log p(x | l) over the key tokens). As in the authors' code, S tokens share a short context,
so that each has K to K + S - 1 tokens before it. With L = 8, K = 2, S = 3, `.` read and `#` judged:

    long     ..######        short    ..###
                                         ..###

A document is cut into pieces of L tokens, and what is left at its end is not read: every piece judges L - K tokens.
A model that judges for itself leaves out what it does badly, and stays below exp(-beta) = 7.4 whatever it does: models
are compared by one evaluator's key tokens.
"""

import math
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedConfig

from longlora.errors import UserError
from longlora.evaluation.cost import tokens_a_pass
from longlora.evaluation.perplexity import check_positions, evaluating
from longlora.evaluation.trials import Record, TrialLog
from longlora.evaluation.windows import Documents, as_documents, windows
from longlora.model.lm_head import IGNORED, run_token_losses, unwrapped
from longlora.model.loading import window
from longlora.model.positions import original_context
from longlora.progress import Progress
from longlora.settings import LongPerplexitySettings


@dataclass(frozen=True, kw_only=True)
class LongPerplexity:
    """LongPPL beside plain perplexity, over the judged tokens of all pieces."""

    context: int
    """The long context L, in tokens."""

    longppl: float | None
    """exp of the key tokens' mean loss; None when there are no key tokens."""

    perplexity: float
    """exp of all judged tokens' mean loss."""

    key_tokens: int
    """Judged tokens that are key tokens."""

    tokens: int
    """Tokens judged: the last L - K of each piece."""

    documents: int
    """Documents read."""

    skipped_documents: int
    """Documents left out because they are shorter than L."""

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, for JSON."""
        return asdict(self)


def with_lengths(settings: LongPerplexitySettings, configs: Sequence[PreTrainedConfig]) -> LongPerplexitySettings:
    """`settings` with its three lengths filled in, for models of `configs`.

    The long context is the longest of their windows; the short one is three quarters of the shortest of their original
    windows, and the stride the rest of it, so that the short contexts are ones that every model was pretrained for.

    Raises:
        UserError: a config does not tell its window, or the lengths do not fit each other.
    """
    if None in (settings.context, settings.short_context):
        windows_known = [found for config in configs if (found := window(config))]
        if not windows_known:
            raise UserError("the model's config does not tell its window: give --context and --short-context.")
        original = min(_original_window(config) for config in configs)
        settings = replace(
            settings,
            context=settings.context or max(windows_known),
            short_context=settings.short_context or max(1, original * 3 // 4),
        )
    assert settings.context is not None
    assert settings.short_context is not None
    if settings.short_context >= settings.context:
        raise UserError(
            f"--short-context is {settings.short_context:,}: it must be below the long one, {settings.context:,} "
            "tokens; lower it or give a longer --context."
        )
    stride = settings.short_stride or max(1, settings.short_context // 3)
    return replace(settings, short_stride=stride)


def long_perplexity(
    model: nn.Module,
    documents: Iterable[np.ndarray] | Documents,
    settings: LongPerplexitySettings,
    keys: Sequence[np.ndarray] | None = None,
    *,
    progress: bool = True,
    log: TrialLog | None = None,
) -> LongPerplexity:
    """LongPPL and perplexity of `model`, in evaluation mode with its full attention.

    The LM head sees the judged tokens only, some thousand at a time: context × vocabulary logits never exist.

    Args:
        model: a causal language model of transformers, possibly wrapped (PEFT).
        documents: token ids (n,) of each document.
        settings: lengths (default `with_lengths`) and thresholds.
        keys: what `find_key_tokens` of an evaluator found; None lets the model judge for itself.
        progress: show on stderr how far it is.
        log: keeps the sums of each piece as they come; a piece that it holds already is not read again.

    Raises:
        UserError: no document has L tokens; the lengths do not fit; a context is beyond learned positions; the model
            cannot be scored (`longlora.model.lm_head`); its loss is not finite.
    """
    settings = with_lengths(settings, [unwrapped(model).config])
    corpus, chosen, skipped = _choose(documents, settings)

    def judge(number: int, ids: torch.Tensor) -> Record:
        long = _long_losses(model, ids, settings)
        key = keys[number] if keys is not None else _is_key(long, _short_losses(model, ids, settings), settings)
        return {
            "nll": long.sum(dtype=np.float64).item(),
            "tokens": len(long),
            "key_nll": long[key].sum(dtype=np.float64).item(),
            "key_tokens": int(key.sum()),
        }

    title = "LongPPL" if keys is None else "LongPPL by the evaluator's key tokens"
    pieces = _each_piece(model, corpus, chosen, settings, judge, log or TrialLog(), "piece", title if progress else "")
    nll, tokens, key_nll, key_tokens = (
        sum(piece[name] for piece in pieces) for name in ("nll", "tokens", "key_nll", "key_tokens")
    )
    assert settings.context is not None
    return LongPerplexity(
        context=settings.context,
        longppl=math.exp(key_nll / key_tokens) if key_tokens else None,
        perplexity=math.exp(nll / tokens),
        key_tokens=key_tokens,
        tokens=tokens,
        documents=len(chosen),
        skipped_documents=skipped,
    )


def find_key_tokens(
    evaluator: nn.Module,
    documents: Iterable[np.ndarray] | Documents,
    settings: LongPerplexitySettings,
    *,
    progress: bool = True,
    log: TrialLog | None = None,
) -> list[np.ndarray]:
    """For each piece of the documents, (L - K,) bool: which of its judged tokens are key tokens to `evaluator`.

    As in `long_perplexity`, `log` keeps what is found piece by piece.

    Raises:
        UserError: as `long_perplexity`.
    """
    settings = with_lengths(settings, [unwrapped(evaluator).config])
    corpus, chosen, _ = _choose(documents, settings)
    assert settings.context is not None
    assert settings.short_context is not None
    judged = settings.context - settings.short_context

    def judge(number: int, ids: torch.Tensor) -> Record:
        key = _is_key(_long_losses(evaluator, ids, settings), _short_losses(evaluator, ids, settings), settings)
        return {"key": np.flatnonzero(key).tolist()}

    title = "key tokens" if progress else ""
    found = _each_piece(evaluator, corpus, chosen, settings, judge, log or TrialLog(), "key", title)
    keys = []
    for piece in found:
        keys.append(np.zeros(judged, dtype=bool))
        keys[-1][piece["key"]] = True
    return keys


def _original_window(config: PreTrainedConfig) -> int:
    try:
        return original_context(config)
    except UserError:  # positions that are learned, not rotary
        return window(config) or sys.maxsize


def _choose(
    documents: Iterable[np.ndarray] | Documents, settings: LongPerplexitySettings
) -> tuple[Documents, list[int], int]:
    """The documents, the indices of those to read, and how many are too short."""
    corpus = as_documents(documents)
    lengths = [len(corpus.document(index)) for index in range(len(corpus))]
    assert settings.context is not None
    long_enough = [index for index, length in enumerate(lengths) if length >= settings.context]
    if not long_enough:
        raise UserError(
            f"no document has the {settings.context:,} tokens of --context: the longest of {len(lengths):,} has "
            f"{max(lengths, default=0):,}; give longer documents or a shorter --context."
        )
    return corpus, long_enough[: settings.max_documents], len(lengths) - len(long_enough)


def _is_key(long: np.ndarray, short: np.ndarray, settings: LongPerplexitySettings) -> np.ndarray:
    """(L - K,) bool, from the losses (L - K,) with the long and the short context."""
    return (short - long > settings.alpha) & (-long > settings.beta)


def _each_piece(
    model: nn.Module,
    corpus: Documents,
    chosen: Sequence[int],
    settings: LongPerplexitySettings,
    judge: Callable[[int, torch.Tensor], Record],
    log: TrialLog,
    trials: str,
    title: str,
) -> list[Record]:
    """What `judge` makes of each piece's number and tokens (L,), or the log has of it.

    Args:
        trials: what the pieces' names in the log begin with.
        title: of the progress; empty for none.
    """
    context = settings.context
    assert context is not None
    check_positions(unwrapped(model).config, [context])
    pieces = [
        (index, begin) for index in chosen for begin in range(0, len(corpus.document(index)) - context + 1, context)
    ]
    found = []
    with evaluating(model), Progress(title, "pieces", len(pieces)) if title else nullcontext() as bar:
        for number, (index, begin) in enumerate(pieces):
            trial = f"{trials}/{number}"
            if trial not in log.records:
                began = time.monotonic()
                ids = torch.from_numpy(corpus.document(index)[begin : begin + context].astype(np.int64))
                log.append(trial, {**judge(number, ids), "seconds": round(time.monotonic() - began, 3)})
            found.append(log.records[trial])
            if bar is not None:
                bar.show(number + 1, f"{number + 1:,} of {len(pieces):,} pieces of {context:,} tokens")
    return found


def _long_losses(model: nn.Module, ids: torch.Tensor, settings: LongPerplexitySettings) -> np.ndarray:
    """Losses (L - K,) of the judged tokens of a piece (L,), with the long context."""
    assert settings.short_context is not None
    losses = _token_losses(model, ids[None], settings.short_context)
    if not np.isfinite(losses).all():
        raise UserError(
            f"the loss at context {settings.context:,} is not a number: the model is damaged, or overflows in float16; "
            "load it in bfloat16 or float32."
        )
    return losses


def _short_losses(model: nn.Module, ids: torch.Tensor, settings: LongPerplexitySettings) -> np.ndarray:
    """Losses (L - K,) of the tokens of a piece (L,) from K on, with a window of K + S tokens that slides by S."""
    short_context, stride = settings.short_context, settings.short_stride
    assert short_context is not None
    assert stride is not None
    slices = [ids[begin:end] for begin, end, _ in windows(len(ids), short_context + stride, stride, "last")]
    rows = max(1, tokens_a_pass(model, short_context + stride) // (short_context + stride))
    losses: list[np.ndarray] = []
    for first in range(0, len(slices), rows):
        batch = slices[first : first + rows]
        whole = [tokens for tokens in batch if len(tokens) == len(batch[0])]
        losses.append(_token_losses(model, torch.stack(whole), short_context))
        losses += [_token_losses(model, tokens[None], short_context) for tokens in batch[len(whole) :]]
    return np.concatenate(losses)


def _token_losses(model: nn.Module, rows: torch.Tensor, first: int) -> np.ndarray:
    """Losses of the tokens from `first` on in each of `rows` (B, N), row after row: (B * (N - first),) float32."""
    rows = rows.to(next(model.parameters()).device)
    labels = torch.full_like(rows, IGNORED)
    labels[:, first - 1 : -1] = rows[:, first:]
    losses, _ = run_token_losses(model, {"input_ids": rows}, labels)
    return losses[:, first - 1 : -1].float().cpu().numpy().ravel()
