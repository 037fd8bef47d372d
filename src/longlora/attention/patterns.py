"""Attention patterns as data: which heads cut a document into which causal blocks (paper section 3.2, table 2).

A pattern splits the heads into sets; each set cuts a document of `n` tokens into blocks, and a token sees the
earlier tokens of its own block. With `G` the group size and `s = G // 2`:

    plain    block(i) = i // G                      |0 … G)|G … 2G)|…
    shifted  block(i) = (i + G - s) // G            |0 … s)|s … s+G)|…
    rolled   block(i) = ((i - s) mod n) // G        Algorithm 1: the first tokens share the last block (a leak)
    dilated  block(i) = (i // (G r), i mod r)       every r-th token, G of them, r = 1 … 4
    strided  block(i) = i mod ceil(n / G)
    scatter  block(i) = i // s                      and each block also reads earlier tokens, drawn at random

A document of at most G tokens is one block in every head.

`scatter` with one piece of half a group (`#`: read, block by block, a document of 4 G tokens; the row above itself is
its own block, causal, the other an earlier one drawn anew for each step, layer and quarter of the heads):

    #.......
    ##......
    .##.....
    #..#....
    .#..#...
    ...#.#..
    .#....#.
    ..#....#

so training meets every distance up to the whole context at 3/4 G tokens a query.
"""

import logging
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from longlora.errors import UserError, check_choice
from longlora.settings import PATTERNS, PatternOptions

logger = logging.getLogger(__name__)


def warn_of_leak(pattern: str) -> None:
    """Say in the log what is wrong with `cyclic`, which is kept for comparison with the original code."""
    if pattern == "cyclic":
        logger.warning(
            "pattern 'cyclic' (Algorithm 1 to the letter) lets the first tokens of a row see the last ones, so its "
            "training loss is too good to be true; 'shift' is the same cost without the leak."
        )


@dataclass(frozen=True)
class Draw:
    """What random choices are drawn from; equal draws choose alike, on every machine."""

    seed: int = 0
    """Seed of the run."""

    step: int = 0
    """Optimiser step."""

    turn: int = 0
    """Forward pass within the step."""

    def place(self, *where: object) -> str:
        """The seed of one place: a layer, a set of heads."""
        return "/".join(str(part) for part in (self.seed, self.step, self.turn, *where))


FIRST_DRAW = Draw()


PLAIN = PatternOptions()
"""A pattern as it is."""


def random_choices(pattern: str, options: PatternOptions) -> bool:
    """Whether anything of `pattern` is drawn at random."""
    return options.pieces(pattern) > 0 or options.vary_offset


def layers_drawn(share: float, layers: int) -> int:
    """How many of `layers` are drawn for full attention at each forward pass; one at least, where `share` is not 0.

    >>> layers_drawn(0.17, 6), layers_drawn(0.17, 32), layers_drawn(0.01, 6), layers_drawn(0, 6)
    (1, 5, 1, 0)
    """
    return min(layers, max(1, round(share * layers))) if share else 0


@dataclass(frozen=True)
class Cut:
    """How one set of heads cuts a document.

    Attributes:
        kind: as in the table above.
        dilation: tokens apart, for `dilated`.
        offset_seed: what the place where the groups begin is drawn from; "" is none, they begin at the first token.
        sink_tokens: tokens at the start that every block reads.
        pieces, piece_size, weighed: of `scatter`, as in `PatternOptions`.
        seed: what the pieces are drawn from.
    """

    kind: str
    dilation: int = 1
    offset_seed: str = ""
    sink_tokens: int = 0
    pieces: int = 0
    piece_size: int | None = None
    weighed: bool = False
    seed: str = ""


@dataclass(frozen=True)
class HeadSet:
    """Query heads `[query_start, query_stop)` and the KV heads they read, which cut documents alike.

    The query heads are a whole multiple of the KV heads, so that kernels for grouped queries serve them as they are.
    """

    query_start: int
    query_stop: int
    key_start: int
    key_stop: int
    cut: Cut


@dataclass(frozen=True)
class Read:
    """Queries `[query_start, query_stop)` of a document also read earlier tokens, all of them.

    Attributes:
        pieces: (start, stop) of the tokens read, in order, none of them in the queries' own block.
        weight: how often each of these keys counts in the softmax.
    """

    query_start: int
    query_stop: int
    pieces: tuple[tuple[int, int], ...]
    weight: float = 1.0


@dataclass(frozen=True)
class Partition:
    """A document cut into causal blocks.

    Attributes:
        blocks: the tokens of each block; together all tokens of the document, each once.
        reads: what blocks read besides themselves.
    """

    blocks: tuple[range, ...]
    reads: tuple[Read, ...] = ()


def head_sets(
    pattern: str, heads: int, key_heads: int, layer: int = 0, options: PatternOptions = PLAIN, draw: Draw = FIRST_DRAW
) -> list[HeadSet]:
    """The sets of heads of `pattern`, in the order of their query heads.

    Args:
        pattern: a name of `longlora.settings.PATTERNS`.
        heads: number of query heads H, a multiple of `key_heads`.
        key_heads: number of KV heads Hkv.
        layer: ordinal of the layer; `shift-layers` shifts odd ones, and each has random choices of its own.
        options: additions to the pattern.
        draw: what random choices are drawn from.

    Raises:
        UserError: unknown pattern, an option that the pattern cannot have, or `heads` is not a multiple of `key_heads`.
    """
    check_choice("pattern", pattern, PATTERNS)
    if key_heads < 1 or heads % key_heads:
        raise UserError(
            f"{heads} query heads and {key_heads} key/value heads: the first must be a multiple of the second."
        )
    options.check(pattern)
    offset = draw.place(layer, "offset") if options.vary_offset else ""

    def contiguous(kind: str, which: int = 0) -> Cut:
        cut = Cut(kind, offset_seed=offset, sink_tokens=options.sink_tokens)
        pieces = 0 if (pattern, kind) == ("scatter", "plain") else options.pieces(pattern)
        if not pieces:
            return cut
        return replace(
            cut,
            pieces=pieces,
            piece_size=options.scatter_piece_size,
            weighed=options.scatter_weighted,
            seed=draw.place(layer, which),
        )

    if pattern == "scatter":
        first_scattered = 2 if options.scatter_heads == "half" else 0
        cuts = [contiguous("scatter" if q >= first_scattered else "plain", q) for q in range(4)]
        return _joined(_quarters(heads, key_heads, cuts), heads // key_heads)
    if pattern == "shift":
        return _halves(heads, key_heads, contiguous("plain", 0), contiguous("shifted", 1))
    if pattern == "cyclic":
        return _halves(heads, key_heads, Cut("plain"), Cut("rolled"))
    if pattern == "strided":
        return _halves(heads, key_heads, Cut("plain"), Cut("strided"))
    if pattern == "dilated":
        return _quarters(heads, key_heads, [Cut("dilated", dilation) for dilation in (1, 2, 3, 4)])
    if pattern == "shift-layers":
        pattern = "shifted" if layer % 2 else "plain"
    return [HeadSet(0, heads, 0, key_heads, contiguous(pattern))]


def partition(cut: Cut, length: int, group_size: int) -> Partition:
    """The causal blocks into which `cut` divides a document of `length` tokens with groups of `group_size` tokens.

    >>> partition(Cut("shifted"), 10, 4).blocks
    (range(0, 2), range(2, 6), range(6, 10))
    >>> partition(Cut("dilated", 2), 10, 4).blocks
    (range(0, 8, 2), range(1, 8, 2), range(8, 10, 2), range(9, 10, 2))
    >>> partition(Cut("scatter", pieces=1, seed="0"), 6, 4).reads[0]
    Read(query_start=2, query_stop=4, pieces=((0, 2),), weight=1.0)
    """
    if cut.kind == "full" or length <= group_size:
        return Partition((range(length),))
    half = group_size // 2
    if cut.kind in ("plain", "shifted", "scatter"):
        size = half if cut.kind == "scatter" else group_size
        first = random.Random(cut.offset_seed).randrange(group_size) if cut.offset_seed else 0
        first = (first + (half if cut.kind == "shifted" else 0)) % size
        blocks = (*([range(first)] if first else ()), *_chunks(first, length, size))
        return Partition(blocks, tuple(_reads(cut, blocks, cut.piece_size or half)))
    if cut.kind == "rolled":
        rolled = _chunks(half, length + half, group_size)
        late = [range(block.start, min(block.stop, length)) for block in rolled]
        early = [range(max(block.start, length) - length, block.stop - length) for block in rolled]
        reads = (Read(b.start, b.stop, ((a.start, a.stop),)) for a, b in zip(late, early, strict=True) if a and b)
        return Partition(tuple(block for block in (*late, *early) if block), tuple(reads))
    if cut.kind == "strided":
        return Partition(tuple(_by_residue(0, length, math.ceil(length / group_size))))
    wide = _chunks(0, length, group_size * cut.dilation)
    return Partition(tuple(block for part in wide for block in _by_residue(part.start, part.stop, cut.dilation)))


def _reads(cut: Cut, blocks: Sequence[range], piece_size: int) -> Iterator[Read]:
    """What each block reads besides itself: the sinks, and pieces drawn from what stands between them and it."""
    generator = random.Random(cut.seed)
    for block in blocks:
        start, stop = block.start, block.stop
        sinks = min(cut.sink_tokens, start)
        drawn: list[tuple[int, int]] = []
        choices = math.ceil((start - sinks) / piece_size) if cut.pieces else 0
        if choices:
            chosen = sorted(generator.sample(range(choices), min(cut.pieces, choices)), reverse=True)
            drawn = [(max(sinks, start - (c + 1) * piece_size), start - c * piece_size) for c in chosen]
        weight = choices / len(drawn) if cut.weighed and drawn else 1.0
        certain = [(0, sinks)] if sinks else []
        if weight == 1.0:
            certain, drawn = certain + drawn, []
        for pieces, times in ((certain, 1.0), (drawn, weight)):
            if pieces:
                yield Read(start, stop, _without_seams(pieces), times)


def _without_seams(pieces: list[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Pieces in order, those that touch made one."""
    merged: list[tuple[int, int]] = []
    for start, stop in pieces:
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], stop)
        else:
            merged.append((start, stop))
    return tuple(merged)


def _chunks(start: int, stop: int, size: int) -> tuple[range, ...]:
    return tuple(range(first, min(first + size, stop)) for first in range(start, stop, size))


def _by_residue(start: int, stop: int, stride: int) -> Iterator[range]:
    """Tokens `[start, stop)` in blocks of equal position modulo `stride`, as `dilated` and `strided` take them."""
    return (range(first, stop, stride) for first in range(start, min(start + stride, stop)))


def _halves(heads: int, key_heads: int, first: Cut, second: Cut) -> list[HeadSet]:
    """The lower half of the KV heads cuts as `first`, the upper as `second`; with one KV head, the query heads."""
    middle = heads // 2 if key_heads == 1 else key_heads // 2 * (heads // key_heads)
    return [*_aligned(0, middle, heads, key_heads, first), *_aligned(middle, heads, heads, key_heads, second)]


def _quarters(heads: int, key_heads: int, cuts: Sequence[Cut]) -> list[HeadSet]:
    """Four sets, as equal as can be, one for each of `cuts`: of KV heads where there are four, else of query heads."""
    units, width = (key_heads, heads // key_heads) if key_heads >= 4 else (heads, 1)
    edges = [math.ceil(quarter * units / 4) * width for quarter in range(5)]
    return [
        head_set
        for quarter, cut in enumerate(cuts)
        for head_set in _aligned(edges[quarter], edges[quarter + 1], heads, key_heads, cut)
    ]


def _joined(sets: list[HeadSet], repeats: int) -> list[HeadSet]:
    """Neighbouring sets that cut alike made one where they own whole KV heads, so that one kernel call serves them."""
    joined = sets[:1]
    for present in sets[1:]:
        last = joined[-1]
        whole = last.query_stop == last.key_stop * repeats and present.query_start == present.key_start * repeats
        whole = whole and last.query_start == last.key_start * repeats
        if whole and last.cut == present.cut and present.query_stop == present.key_stop * repeats:
            joined[-1] = replace(last, query_stop=present.query_stop, key_stop=present.key_stop)
        else:
            joined.append(present)
    return joined


def _aligned(start: int, stop: int, heads: int, key_heads: int, cut: Cut) -> Iterator[HeadSet]:
    """Query heads `[start, stop)` as sets that each read whole KV heads or share a single one."""
    repeats = heads // key_heads
    while start < stop:
        key = start // repeats
        if start % repeats or stop - start < repeats:
            next_start, next_key = min(stop, (key + 1) * repeats), key + 1
        else:
            next_key = stop // repeats
            next_start = next_key * repeats
        yield HeadSet(start, next_start, key, next_key, cut)
        start = next_start
