"""How positions are stretched, how attention trains, and which documents are read."""

from dataclasses import dataclass
from typing import Annotated

from longlora.errors import check_choice
from longlora.settings.fields import at_least, choice

PATTERNS = ("shift", "shift-layers", "plain", "shifted", "cyclic", "dilated", "strided", "full")
METHODS = ("yarn", "linear", "ntk", "dynamic", "llama3", "longrope", "none")
PACKINGS = ("concatenate", "isolate")


@dataclass(frozen=True, kw_only=True)
class PositionSettings:
    """How the rotary positions are stretched (paper section 3.3 and DESIGN section 3)."""

    context: int
    """Context length to train for and to write into the model's config, in tokens."""

    method: Annotated[str, choice(METHODS)] = "yarn"
    """RoPE extension: `linear` is the paper's Position Interpolation (arXiv 2306.15595), `yarn` is arXiv 2309.00071."""

    def __post_init__(self) -> None:
        at_least("context", self.context, 2, "tokens")
        check_choice("--method", self.method, METHODS)


@dataclass(frozen=True, kw_only=True)
class AttentionSettings:
    """Attention while training (paper section 3.2). Evaluation always uses the model's own full attention."""

    pattern: Annotated[str, choice(PATTERNS)] = "shift"
    """Which tokens each head sees; `shift` is the paper's S2-Attn (table 2 names the others)."""

    group_size: int | None = None
    """Tokens a group; default a quarter of the context (paper section 4.1, table 11)."""

    full_attention_steps: int = 0
    """Optimiser steps at the end of training with full attention, so that every distance is met at least then."""

    def __post_init__(self) -> None:
        check_choice("--pattern", self.pattern, PATTERNS)
        at_least("full-attention-steps", self.full_attention_steps, 0, "steps")
        if self.group_size is not None:
            at_least("group-size", self.group_size, 2, "tokens")

    def tokens_per_group(self, context: int) -> int:
        """The group size in tokens for a training context of `context` tokens."""
        return self.group_size or max(2, context // 4)


@dataclass(frozen=True, kw_only=True)
class CorpusSettings:
    """Documents and how they become training rows (paper section 4.1 concatenates)."""

    data: tuple[str, ...] = ()
    """Files, folders (txt, md, source code, PDF, jsonl, jsonl.gz, jsonl.zst, parquet), `hub:NAME`, or `stdlib`."""

    text_field: str = "text"
    """Field of a JSONL, parquet or hub record that holds the text."""

    packing: Annotated[str, choice(PACKINGS)] = "concatenate"
    """`concatenate` joins documents end to end and cuts (the paper); `isolate` keeps documents apart in a row."""

    prefer_long: bool = False
    """Train first on documents of at least `context` tokens; shorter ones follow when those run out."""

    max_tokens: int | None = None
    """Stop reading after this many tokens; for streamed corpora that never end."""

    cache: str | None = None
    """Folder of the tokenised corpus; default `$LONGLORA_CACHE`, else `~/.cache/longlora`."""

    def __post_init__(self) -> None:
        check_choice("--packing", self.packing, PACKINGS)
        if self.max_tokens is not None:
            at_least("max-tokens", self.max_tokens, 1, "tokens")
