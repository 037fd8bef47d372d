"""Knobs of `longlora bench`."""

from dataclasses import dataclass
from typing import Annotated

from longlora.errors import check_choice
from longlora.settings.fields import DTYPES, AtLeast, CommandSettings, Names, Tokens, choice
from longlora.settings.model import ATTENTION_BACKENDS, PATTERNS


@dataclass(frozen=True, kw_only=True)
class BenchAttentionSettings(CommandSettings):
    """Time S2-Attn against full causal attention, forward and backward, in one process, alternating."""

    length: Annotated[Tokens, AtLeast(2, "tokens")] = (8192,)
    """Tokens N a row; several with commas."""

    group: Annotated[int | None, AtLeast(2, "tokens")] = None
    """Tokens a group; default a quarter of each length."""

    heads: Annotated[int, AtLeast(1)] = 8
    """Query heads."""

    key_heads: int | None = None
    """KV heads; default as many as query heads."""

    head_dim: Annotated[int, AtLeast(1)] = 64
    """Width of a head."""

    rows: Annotated[int, AtLeast(1)] = 1
    """Rows a batch."""

    dtype: Annotated[str, choice(DTYPES[1:])] = "bfloat16"
    """Arithmetic."""

    pattern: Annotated[str, choice(PATTERNS)] = "shift"
    """Attention pattern measured against full attention."""

    backends: Names = ()
    """Attention backends measured beside the one that `auto` takes; default all that can act here but `eager`."""

    repeats: Annotated[int, AtLeast(1)] = 5
    """Timed rounds after one warm-up; medians are reported."""

    device: str = "auto"
    """cpu, cuda, cuda:N, or auto."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for backend in self.backends:
            check_choice("--backends", backend, ATTENTION_BACKENDS[1:])
