"""Tokens of a prompt in, tokens of an answer out, one at a time: read in pieces, stopped at any moment.

The model's own full attention, and its cache from one question to the next (`longlora.chat.prefix_cache`).
"""

import inspect
import logging
import threading
from collections.abc import Collection, Generator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn

from longlora.chat.attention_sinks import SinkWindow
from longlora.chat.prefix_cache import PrefixCaches, ReadTokens
from longlora.chat.sampling import Sampler
from longlora.model.lm_head import mixed_precision, unwrapped
from longlora.model.positions import follow_each_length, frequencies_change_at

logger = logging.getLogger(__name__)

PIECE_TOKENS = 256
"""A prompt is read so many tokens at a time: between pieces it says how far it is, and can be stopped."""


@dataclass(frozen=True)
class Reading:
    """How far the prompt has been read, in tokens."""

    done: int
    total: int
    reused: int
    """Of `done`, those that had been read for an earlier question."""


@dataclass(frozen=True)
class Ended:
    """Why an answer ended: `end` (the model ended it), `length` (of the answer), or `stopped` (the person did)."""

    reason: str


class Answerer:
    """Answers with one model, one prompt at a time.

    Args:
        model: decoder of transformers in evaluation mode, possibly wrapped.
        caches: what it has read before.
        sinks: lets old tokens leave; None keeps all, however many.
    """

    def __init__(self, model: nn.Module, caches: PrefixCaches, sinks: SinkWindow | None = None) -> None:
        self.caches, self.sinks = caches, sinks
        self._model = cast(Any, unwrapped(model))
        takes = inspect.signature(self._model.forward).parameters
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
        self._changes_at = frequencies_change_at(model)
        follow_each_length(model)
        self._reads = "in pieces" if sinks is not None else self._tried()
        self._piece = PIECE_TOKENS if sinks is None else max(1, min(PIECE_TOKENS, sinks.recent // 2))

    def answer(
        self,
        prompt: list[int],
        *,
        max_new_tokens: int,
        stop_tokens: Collection[int],
        sampler: Sampler,
        stop: threading.Event,
    ) -> Generator[Reading | int | Ended, None, None]:
        """What happens, as it happens: `Reading` at the start and after each piece, each token of the answer, `Ended`.

        A token of `stop_tokens` ends the answer and does not belong to it. What was read stays cached, even when the
        answer is stopped or the iterator is closed.

        Args:
            prompt: token ids (N,), at least one.
            stop: set from any thread, it ends the answer before the next piece or token.
        """
        # keys of frequencies that change with the length belong together only where they were read in one go
        changes = self._changes_at is not None and len(prompt) > self._changes_at
        at_once = changes or self._reads != "in pieces"
        read = self.caches.fresh() if at_once else self.caches.take(prompt)
        piece = len(prompt) if at_once else self._piece
        whole = True
        try:
            reused = len(read.tokens)
            yield Reading(reused, len(prompt), reused)
            logits = None
            while len(read.tokens) < len(prompt):
                if stop.is_set():
                    yield Ended("stopped")
                    return
                whole = False
                logits = self._read(read, prompt[len(read.tokens) : len(read.tokens) + piece])
                whole = True
                yield Reading(len(read.tokens), len(prompt), reused)
            assert logits is not None, "a prompt has at least one token that is read"
            for count in range(max_new_tokens):
                token = sampler.choose(logits)
                if token in stop_tokens:
                    yield Ended("end")
                    return
                yield token
                if stop.is_set():
                    yield Ended("stopped")
                    return
                if count < max_new_tokens - 1:
                    whole = False
                    logits = self._read(read, [token])
                    whole = True
            yield Ended("length")
        finally:
            # in the middle of a pass some layers have the new keys and others do not
            keeps = self._reads == "in pieces" and (self._changes_at is None or len(read.tokens) <= self._changes_at)
            if whole and keeps:
                self.caches.keep(read)

    def _tried(self) -> str:
        """How the model reads right, found on a few tokens, as the code of some families drops a recurrent state or
        has no cache: `in pieces`; `whole`, the prompt in one go and then token by token; or `anew` for every token."""
        tokens = [number % self._model.config.get_text_config().vocab_size for number in range(1, 13)]

        def last(cuts: tuple[int, ...]) -> Tensor:
            read = self.caches.fresh()
            return [self._read(read, tokens[begin:end]) for begin, end in pairwise(cuts)][-1].float()

        self._reads = "anew"
        expected = last((0, 12))
        allowed = (1e-3 if self._model.dtype == torch.float32 else 0.05) * expected.abs().max()
        for way, cuts in (("in pieces", (0, 6, 11, 12)), ("whole", (0, 11, 12))):
            self._reads = way
            try:
                if (last(cuts) - expected).abs().max() <= allowed:
                    return way
            except (ValueError, TypeError, IndexError, AttributeError, RuntimeError) as error:
                logger.debug("this model's cache cannot be used: %s", error)
        logger.warning("this model's cache does not give what it gives without: every token is read anew, slowly")
        return "anew"

    @torch.no_grad()
    def _read(self, read: ReadTokens, tokens: list[int]) -> Tensor:
        """Logits (V,) after `tokens`, whose keys and values go into the cache."""
        if self.sinks is not None:
            self.sinks.make_room(read, len(tokens))
        anew = self._reads == "anew"
        given = read.tokens + tokens if anew else tokens
        cache: dict[str, Any] = {"use_cache": False} if anew else {"past_key_values": read.cache, "use_cache": True}
        with mixed_precision(self._model):
            output = self._model(input_ids=torch.tensor([given], device=self._model.device), **cache, **self._last_only)
        read.tokens += tokens
        return cast(Tensor, output.logits[0, -1])
