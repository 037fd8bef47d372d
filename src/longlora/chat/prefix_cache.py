"""Keys and values of what was read, kept so that a prompt that begins alike is read only from where it differs.

    read before   | document …………………………………… | question 1 | answer 1 |
    asked now     | document …………………………………… | question 2 |
                  ╰──────── shared: kept ───────╯╰─ read ──╯

A cache that loses little is cut down to what is shared; one that would lose more than the prompt gains (another
document behind the same first words) stays whole, and the shared beginning is copied.
"""

from dataclasses import dataclass, field
from typing import Any, cast

from torch import nn
from transformers import DynamicCache

from longlora.model.lm_head import unwrapped

_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}


@dataclass
class ReadTokens:
    """Tokens that the model has read, and their keys and values."""

    cache: DynamicCache
    """A slot for each token that was not evicted."""

    tokens: list[int] = field(default_factory=list)
    """All of them in order, evicted ones too."""

    evicted: int = 0
    """Tokens after the sinks that have left the cache (`longlora.chat.attention_sinks`)."""

    @property
    def slots(self) -> int:
        """Tokens in the cache."""
        return len(self.tokens) - self.evicted


class PrefixCaches:
    """The caches of one model, at most `capacity` tokens in all; the least recently used go first.

    Args:
        model: decoder of transformers, possibly wrapped.
        capacity: tokens.
        sinks: tokens at the beginning that are never evicted.
    """

    def __init__(self, model: nn.Module, capacity: int, sinks: int = 0) -> None:
        self.capacity, self.sinks = capacity, sinks
        self._config = unwrapped(model).config.get_text_config()
        self._kept: list[ReadTokens] = []

    @property
    def kept_tokens(self) -> int:
        """Tokens whose keys and values are kept now."""
        return sum(read.slots for read in self._kept)

    def fresh(self) -> ReadTokens:
        """A cache of nothing."""
        return ReadTokens(self._new_cache())

    def take(self, prompt: list[int]) -> ReadTokens:
        """A cache of the longest kept beginning of `prompt`, always less than the whole; it is the caller's now."""
        best, shared = None, 0
        for read in self._kept:
            length = self._usable(read, prompt)
            if length > shared:
                best, shared = read, length
        if best is None:
            return self.fresh()
        if len(best.tokens) - shared > shared:
            return self._copied(best, shared)
        self._kept = [read for read in self._kept if read is not best]
        surplus = len(best.tokens) - shared
        if surplus:
            best.cache.crop(-surplus)
            del best.tokens[shared:]
        return best

    def keep(self, read: ReadTokens) -> None:
        """Keep `read` for later prompts, as the most recently used."""
        if not read.tokens:
            return
        # what begins a longer one is of no use beside it
        self._kept = [other for other in self._kept if other.tokens != read.tokens[: len(other.tokens)]]
        self._kept.append(read)
        while self._kept and self.kept_tokens > self.capacity:
            del self._kept[0]

    def _usable(self, read: ReadTokens, prompt: list[int]) -> int:
        """How many tokens of `prompt` a cache made from `read` would hold."""
        shared = min(common_prefix(read.tokens, prompt), len(prompt) - 1)
        if shared < len(read.tokens) and not all(layer.is_croppable for layer in read.cache.layers):
            return 0
        # a slot that was evicted does not come back
        return 0 if read.evicted and shared < self.sinks + read.evicted else shared

    def _copied(self, read: ReadTokens, length: int) -> ReadTokens:
        slots = length - read.evicted
        copy = self._new_cache()
        for number, layer in enumerate(cast(Any, read.cache).layers):
            copy.update(layer.keys[..., :slots, :].clone(), layer.values[..., :slots, :].clone(), number)
        return ReadTokens(copy, read.tokens[:length], read.evicted)

    def _new_cache(self) -> DynamicCache:
        """With every token in every layer, windowed ones too (their mask still hides what is outside), so that it can
        be cut; a model of other layers (Mamba's) brings its own kind, which cannot."""
        kinds: set[Any] = set(getattr(self._config, "layer_types", None) or ())
        return DynamicCache() if kinds <= _ATTENTION else DynamicCache(config=self._config)


def common_prefix(one: list[int], other: list[int]) -> int:
    """Tokens at the beginning in which two lists agree.

    >>> common_prefix([1, 2, 3], [1, 2, 4, 5]), common_prefix([1], [1, 2]), common_prefix([], [1])
    (2, 1, 0)
    """
    for at, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return at
    return min(len(one), len(other))
