"""Knobs of `longlora bench`."""

from dataclasses import dataclass
from typing import Annotated

from longlora.errors import check_choice
from longlora.settings.fields import DTYPES, CommandSettings, Names, Tokens, at_least, choice
from longlora.settings.model import ATTENTION_BACKENDS, PATTERNS


@dataclass(frozen=True, kw_only=True)
class BenchAttentionSettings(CommandSettings):
    """Time S2-Attn against full causal attention, forward and backward, in one process, alternating."""

    length: Tokens = (8192,)
    """Tokens N a row; several with commas."""

    group: int | None = None
    """Tokens a group; default a quarter of each length."""

    heads: int = 8
    """Query heads."""

    key_heads: int | None = None
    """KV heads; default as many as query heads."""

    head_dim: int = 64
    """Width of a head."""

    rows: int = 1
    """Rows a batch."""

    dtype: Annotated[str, choice(DTYPES[1:])] = "bfloat16"
    """Arithmetic."""

    pattern: Annotated[str, choice(PATTERNS)] = "shift"
    """Attention pattern measured against full attention."""

    backends: Names = ()
    """Attention backends measured beside the one that `auto` takes; default all that can act here but `eager`."""

    repeats: int = 5
    """Timed rounds after one warm-up; medians are reported."""

    device: str = "auto"
    """cpu, cuda, cuda:N, or auto."""

    def __post_init__(self) -> None:
        for name in ("heads", "head_dim", "rows", "repeats"):
            at_least(name.replace("_", "-"), getattr(self, name), 1)
        for length in self.length:
            at_least("length", length, 2, "tokens")
        if self.group is not None:
            at_least("group", self.group, 2, "tokens")
        check_choice("--dtype", self.dtype, DTYPES[1:])
        check_choice("--pattern", self.pattern, PATTERNS)
        for backend in self.backends:
            check_choice("--backends", backend, ATTENTION_BACKENDS[1:])
