"""How positions are stretched, how attention trains, and which documents are read."""

import codecs
import math
from dataclasses import dataclass, fields
from typing import Annotated

from longlora.errors import UserError
from longlora.settings.fields import AtLeast, Checked, CommandSettings, Names, Tokens, choice

PATTERNS = ("shift", "shift-layers", "plain", "shifted", "cyclic", "dilated", "strided", "scatter", "full")
CONTIGUOUS = ("shift", "shift-layers", "plain", "shifted", "scatter")
"""Patterns whose blocks are neighbouring tokens, so that they can have sinks and a varying offset."""

ATTENTION_BACKENDS = ("auto", "sdpa", "varlen", "flex", "flash", "eager")
"""What computes attention inside the blocks; see `longlora.attention.backends`."""

METHODS = ("yarn", "linear", "ntk", "dynamic", "llama3", "longrope", "none")
PACKINGS = ("concatenate", "isolate")


@dataclass(frozen=True, kw_only=True)
class PositionSettings(Checked):
    """How the rotary positions are stretched (paper section 3.3)."""

    context: Annotated[int, AtLeast(2, "tokens")]
    """Context length to train for and to write into the model's config, in tokens."""

    method: Annotated[str, choice(METHODS)] = "yarn"
    """RoPE extension: `linear` is the paper's Position Interpolation (arXiv 2306.15595), `yarn` is arXiv 2309.00071."""

    row_tokens: int | None = None
    """Train on rows of this many tokens whose positions skip, so that they reach over the whole context (PoSE, arXiv
    2309.10400); default rows of `context` tokens, whose positions do not."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.row_tokens is not None and not 2 <= self.row_tokens <= self.context:
            raise UserError(
                f"--row-tokens is {self.row_tokens:,}: it must be from 2 tokens to the context, {self.context:,}."
            )

    @property
    def tokens_per_row(self) -> int:
        """Tokens of a training row."""
        return self.row_tokens or self.context


@dataclass(frozen=True, kw_only=True)
class PatternOptions(Checked):
    """What may be added to a pattern of attention; the defaults add nothing."""

    scatter_pieces: Annotated[int | None, AtLeast(1, "pieces")] = None
    """Earlier pieces that every block reads besides itself, drawn anew for each step, layer and set of heads; default
    1 for `scatter`, none for the others."""

    scatter_piece_size: Annotated[int | None, AtLeast(1, "tokens")] = None
    """Tokens a piece; default half a group."""

    scatter_heads: Annotated[str, choice(("all", "half"))] = "all"
    """Heads that scatter; with `half` the lower half of them stays `plain`."""

    scatter_weighted: bool = False
    """Let a drawn piece count for all those it was drawn from, as an unbiased estimate of full attention does."""

    sink_tokens: Annotated[int, AtLeast(0, "tokens")] = 0
    """Tokens at the start of a document that every block reads (StreamingLLM, arXiv 2309.17453)."""

    vary_offset: bool = False
    """Begin the groups at a place drawn anew for each step and layer, instead of at a document's first token."""

    def check(self, pattern: str) -> None:
        """Raises UserError where an option was given that `pattern` cannot have."""
        for field in fields(self):
            if getattr(self, field.name) == field.default:
                continue
            flag = "--" + field.name.replace("_", "-")
            able = ("scatter",) if field.name == "scatter_heads" else CONTIGUOUS
            if pattern not in able:
                raise UserError(f"{flag} is for the patterns {', '.join(able)}: the pattern is '{pattern}'.")
            if field.name in ("scatter_piece_size", "scatter_weighted") and not self.pieces(pattern):
                raise UserError(
                    f"{flag} says what scattered pieces are like, and there are none: give --scatter-pieces."
                )

    def pieces(self, pattern: str) -> int:
        """Earlier pieces that a block of `pattern` reads."""
        return int(pattern == "scatter") if self.scatter_pieces is None else self.scatter_pieces


@dataclass(frozen=True, kw_only=True)
class AttentionSettings(Checked):
    """Attention while training (paper section 3.2). Evaluation always uses the model's own full attention."""

    pattern: Annotated[str, choice(PATTERNS)] = "shift"
    """Which tokens each head sees; `shift` is the paper's S2-Attn (table 2 names the others), `scatter` adds earlier
    pieces drawn at random."""

    group_size: Annotated[int | None, AtLeast(2, "tokens")] = None
    """Tokens a group; default a quarter of the context (paper section 4.1, table 11)."""

    options: PatternOptions = PatternOptions()

    final_group_size: int | None = None
    """Let the group grow to this many tokens, doubling in equal parts of the training; default it does not grow."""

    full_attention_steps: Annotated[int, AtLeast(0, "steps")] = 0
    """Optimiser steps at the end of training with full attention, so that every distance is met at least then."""

    full_attention_layers: Tokens = ()
    """Layers that train with full attention throughout, counted from 0; negative ones from the last, -1."""

    full_layers_share: float = 0.0
    """Share of the layers, drawn anew for each forward pass, that have full attention in it (0 to 1)."""

    attention_backend: Annotated[str, choice(ATTENTION_BACKENDS)] = "auto"
    """What computes it while training: PyTorch's SDPA, varlen or FlexAttention, an installed flash-attn, or attention
    written out (eager). One that cannot act here is an error; `auto` takes the first that can."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.full_layers_share <= 1:
            raise UserError(f"--full-layers-share is {self.full_layers_share}: it must be a share from 0 to 1.")
        self.options.check(self.pattern)
        if self.group_size is not None:
            not_less = AtLeast(self.group_size, "tokens, the first --group-size")
            not_less.check("--final-group-size", self.final_group_size)

    def tokens_per_group(self, context: int) -> int:
        """The group size in tokens for a training context of `context` tokens, at the start of training."""
        return self.group_size or max(2, context // 4)


@dataclass(frozen=True, kw_only=True)
class CorpusSettings(Checked):
    """Documents and how they become training rows (paper section 4.1 concatenates)."""

    data: tuple[str, ...] = ()
    """Files, folders (txt, md, HTML, EPUB, PDF, source code, json, jsonl, ndjson, parquet; .gz and .zst of text and
    JSON), `hub:NAME`, or `stdlib`."""

    text_field: str = "text"
    """Field of a JSON, parquet or hub record that holds the text; `doc.text` for one within another."""

    encoding: str = "auto"
    """Encoding of text and HTML files, such as `cp1252`; `auto` looks at each."""

    special_tokens: bool = False
    """Take the letters of a special token (`<|endoftext|>`) in a document for that token; else they are letters."""

    skip_malformed: Annotated[int, AtLeast(0, "records")] = 0
    """Malformed records (no JSON, no text in the field) to pass over, counted and named; one more is an error."""

    packing: Annotated[str, choice(PACKINGS)] = "concatenate"
    """`concatenate` joins documents end to end and cuts (the paper); `isolate` keeps documents apart in a row."""

    prefer_long: bool = False
    """Train first on documents of at least `context` tokens; shorter ones follow when those run out."""

    mix: Names = ()
    """Shares of the training rows by kind of document: `long=0.6,short=0.4` (documents of at least a row's tokens, and
    the others; ProLong, arXiv 2410.02660, found 60% long best), or by source as named in `data`,
    `books/=0.7,hub:NAME=0.3`. Training ends an epoch where one of them runs out. Default: as the data comes."""

    max_tokens: Annotated[int | None, AtLeast(1, "tokens")] = None
    """Stop reading after this many tokens; for streamed corpora that never end."""

    cache: str | None = None
    """Folder of the tokenised corpus; default `$LONGLORA_CACHE`, else `~/.cache/longlora`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mix and self.prefer_long:
            raise UserError("--mix and --prefer-long both say which documents come first: leave one of them out.")
        if self.mix:
            self.shares()
        if self.encoding != "auto":
            try:
                codecs.lookup(self.encoding)
            except LookupError as error:
                raise UserError(
                    f"--encoding {self.encoding} is unknown: give auto, or a name such as utf-8, cp1252 or gb18030."
                ) from error

    @property
    def in_order(self) -> bool:
        """Whether rows are read in the order they are packed in, since that order is meant."""
        return self.prefer_long or bool(self.mix)

    def shares(self) -> dict[str, float]:
        """`mix` as shares that sum to 1, by kind (`long`, `short`) or by source.

        >>> CorpusSettings(mix=("long=3", "short=1")).shares()
        {'long': 0.75, 'short': 0.25}

        Raises:
            UserError: a part is no NAME=SHARE, a name is no kind or no source of `data`, or a share is not above 0.
        """
        shares: dict[str, float] = {}
        for part in self.mix:
            name, separator, share = part.rpartition("=")
            try:
                shares[name] = float(share)
            except ValueError:
                separator = ""
            if not separator or not 0 < shares[name] < math.inf:
                raise UserError(f"--mix has '{part}': give NAME=SHARE with a share above 0, as in long=0.6,short=0.4.")
        if len(shares) < len(self.mix):
            raise UserError(f"--mix is '{','.join(self.mix)}': each name may stand there once.")
        kinds = {"long", "short"}
        if set(shares) != kinds and set(shares) != set(self.data):
            raise UserError(
                f"--mix names {', '.join(shares)}: name long and short, or every source of --data as it is named there"
                f"{' (' + ', '.join(self.data) + ')' if self.data else ''}."
            )
        total = sum(shares.values())
        return {name: share / total for name, share in shares.items()}


@dataclass(frozen=True, kw_only=True)
class CacheSettings(CommandSettings):
    """List the tokenised data that is kept, and remove what is no longer used."""

    cache: str | None = None
    """The folder; default `$LONGLORA_CACHE`, else `~/.cache/longlora`."""

    unused_days: Annotated[float | None, AtLeast(0, "days")] = None
    """Remove what was not used for so many days; 0 removes all."""

    unfinished: bool = False
    """Remove what was begun and not finished, which would be gone on with."""
