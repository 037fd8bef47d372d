"""Rows of tokens as documents, and what each head does in them as parts: queries, and keys that they read.

A part is what one call of a kernel computes. A whole row, a piece of one, sliding windows and blocks that read others
are all lists of parts; where several parts have the same queries, their results are merged by the logarithms of their
softmax denominators. So nothing but the tokens of parts is ever named, as ranges, and nothing is permuted or masked.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from longlora.attention.patterns import FIRST_DRAW, PLAIN, Cut, Draw, HeadSet, head_sets, partition
from longlora.errors import UserError
from longlora.settings import PatternOptions

Document = tuple[int, int]
"""(start, length) of a document inside its row, in tokens."""

Documents = tuple[tuple[Document, ...], ...]
"""The documents of every row of a batch; tokens outside them are padding."""


@dataclass(frozen=True)
class Part:
    """`count` times queries with keys of their own, `hop` tokens from one to the next.

    Attributes:
        queries, keys: tokens of the row, of the first of them.
        sees: `causal`: query i reads keys 0 … i, and the two are the same tokens; `all`; or `later`: query i reads
            keys i …, the half of a sliding window that stands before a chunk.
        weight: how often each key counts in the softmax.
    """

    queries: range
    keys: range
    sees: str = "causal"
    weight: float = 1.0
    count: int = 1
    hop: int = 0

    def __iter__(self) -> Iterator["Part"]:
        """The same one by one."""
        return (self.some(number, 1) for number in range(self.count))

    def some(self, first: int, count: int) -> "Part":
        """`count` of them, from number `first` on."""
        by = first * self.hop
        return replace(self, queries=moved(self.queries, by), keys=moved(self.keys, by), count=count)


@dataclass(frozen=True)
class RowPlan:
    """What a set of heads does in rows `[row_start, row_stop)`, which are laid out alike.

    Attributes:
        parts: first `causal` ones, of which each query that is no padding is in one; then others.
    """

    row_start: int
    row_stop: int
    parts: tuple[Part, ...]


@dataclass(frozen=True, eq=False)
class HeadSetPlan:
    """What one set of heads does with the rows of a batch. Two are equal only where they are the same object."""

    heads: HeadSet
    rows: tuple[RowPlan, ...]


def documents_from_segments(segment_ids: torch.Tensor) -> Documents:
    """Documents of `segment_ids` (B, N): neighbouring equal ids are a document, negative ids are padding.

    Raises:
        UserError: an id appears in two places of a row.
    """
    documents = []
    for row, ids in enumerate(segment_ids.cpu()):
        values, lengths = torch.unique_consecutive(ids, return_counts=True)
        named = values[values >= 0]
        if len(named) != len(torch.unique(named)):
            raise UserError(
                f"segment_ids row {row}: an id stands in two places; the tokens of a document must be neighbours."
            )
        starts = lengths.cumsum(0) - lengths
        documents.append(
            tuple(
                (start, length)
                for value, start, length in zip(values.tolist(), starts.tolist(), lengths.tolist(), strict=True)
                if value >= 0
            )
        )
    return tuple(documents)


def documents_from_model_inputs(
    rows: int, length: int, padding_mask: torch.Tensor | None, position_ids: torch.Tensor | None
) -> Documents:
    """Documents as a transformers model states them.

    Args:
        rows: B.
        length: N, tokens a row.
        padding_mask: (B, N), nonzero where there is a token, or None when there is no padding.
        position_ids: (B, N) or (1, N); a position that is not above the one before it starts a document. Or None.

    Raises:
        UserError: a document has padding inside it.
    """
    if padding_mask is not None and bool(padding_mask.all()):
        padding_mask = None
    if padding_mask is None and (position_ids is None or bool((position_ids[:, 1:] > position_ids[:, :-1]).all())):
        return (((0, length),),) * rows
    real = torch.ones(rows, length, dtype=torch.bool)
    if padding_mask is not None:
        real = padding_mask.cpu() != 0
    restarts = torch.zeros(rows, length, dtype=torch.bool)
    if position_ids is not None:
        positions = position_ids.cpu().expand(rows, length)
        restarts[:, 1:] = positions[:, 1:] <= positions[:, :-1]
    previous = torch.zeros_like(real)
    previous[:, 1:] = real[:, :-1]
    if position_ids is not None and bool((real & ~previous & ~restarts)[:, 1:].any()):
        begun = real.cumsum(1) > 1
        if bool((real & ~previous & ~restarts & begun).any()):
            raise UserError(
                "the attention mask has padding inside a document: padding may only stand before, between or after "
                "documents (position_ids restart where a document begins)."
            )
    segments = torch.where(real, (restarts | (real & ~previous)).cumsum(1), -1)
    return documents_from_segments(segments)


@lru_cache(maxsize=64)
def plan(
    documents: Documents,
    length: int,
    heads: int,
    key_heads: int,
    group_size: int,
    pattern: str,
    layer: int = 0,
    options: PatternOptions = PLAIN,
    draw: Draw = FIRST_DRAW,
    *,
    window: int | None = None,
    piece: tuple[int, int] | None = None,
) -> tuple[HeadSetPlan, ...]:
    """What each set of heads of `pattern` does with a batch of rows of `length` tokens that hold `documents`.

    Args:
        window: let every head read the last `window` tokens instead, whatever the pattern.
        piece: (start, stop) of the queries wanted; no part then has keys on both sides of `start`. Default all.

    Raises:
        UserError: as `longlora.attention.patterns.head_sets`, or a piece of a pattern that reads later tokens.
    """
    if pattern == "cyclic" and window is None and piece not in (None, (0, length)):
        raise UserError(
            "pattern 'cyclic' lets early tokens see the end of the row, so a piece of a row cannot have it."
        )
    if window is None:
        sets = head_sets(pattern, heads, key_heads, layer, options, draw)
    else:
        sets = [HeadSet(0, heads, 0, key_heads, Cut("full"))]
    return tuple(
        HeadSetPlan(each, tuple(_row_plans(each.cut, documents, group_size, window, piece or (0, length))))
        for each in sets
    )


def first_key(plans: Iterable[HeadSetPlan], start: int) -> tuple[int, int, int] | None:
    """The halo of a piece that begins at token `start`: what it reads of earlier tokens.

    Returns:
        (first token, first KV head, KV head after the last) of the keys before `start` that `plans` read; None where
        they read none.
    """
    found = [
        (part.keys.start, each.heads.key_start, each.heads.key_stop)
        for each in plans
        for row in each.rows
        for part in row.parts
        if part.keys.start < start
    ]
    if not found:
        return None
    tokens, first, last = zip(*found, strict=True)
    return min(tokens), min(first), max(last)


def query_key_pairs(plans: Sequence[HeadSetPlan]) -> int:
    """Pairs of a query and a key that `plans` look at, over all rows and query heads: what attention costs."""
    pairs = 0
    for each in plans:
        for row in each.rows:
            for part in row.parts:
                n = len(part.queries)
                once = n * len(part.keys) if part.sees == "all" else n * (n + 1) // 2
                heads = each.heads.query_stop - each.heads.query_start
                pairs += heads * (row.row_stop - row.row_start) * part.count * once
    return pairs


def _row_plans(
    cut: Cut, documents: Documents, group_size: int, window: int | None, piece: tuple[int, int]
) -> Iterator[RowPlan]:
    first = 0
    for row in range(1, len(documents) + 1):
        if row == len(documents) or documents[row] != documents[first]:
            parts = [
                within
                for start, size in documents[first]
                for part in (_parts(cut, size, group_size) if window is None else _window_parts(size, window))
                for within in _inside(
                    Part(moved(part.queries, start), moved(part.keys, start), part.sees, part.weight), *piece
                )
            ]
            yield RowPlan(first, row, tuple(_together(parts, piece[0])))
            first = row


def _parts(cut: Cut, size: int, group_size: int) -> Iterator[Part]:
    """What a set of heads does in a document of `size` tokens."""
    found = partition(cut, size, group_size)
    yield from (Part(block, block) for block in found.blocks)
    for read in found.reads:
        yield from (
            Part(range(read.query_start, read.query_stop), range(*piece), "all", read.weight) for piece in read.pieces
        )


def _window_parts(size: int, window: int) -> Iterator[Part]:
    """The same for a sliding window: token i reads tokens i - window + 1 … i, chunk by chunk of `window` tokens.

    A chunk reads itself, and of the chunk before it each token the later part: all of what is later for the chunk's
    last token, and a triangle.
    """
    for start in range(0, size, window):
        stop = min(start + window, size)
        yield Part(range(start, stop), range(start, stop))
        if start and stop - start > 1:
            triangle = range(start - window + 1, stop - window)
            yield Part(range(start, start + len(triangle)), triangle, "later")
        if start and stop - window < start:
            yield Part(range(start, stop), range(stop - window, start), "all")


def _inside(part: Part, start: int, stop: int) -> Iterator[Part]:
    """`part` for queries in `[start, stop)` alone, cut so that its keys are all before `start` or none."""
    i, j = (_index(part.queries, token) for token in (start, stop))
    if i >= j:
        return
    queries, keys = part.queries[i:j], part.keys
    if part.sees == "causal":
        yield replace(part, queries=queries, keys=keys[i:j])
        if i:
            yield replace(part, queries=queries, keys=keys[:i], sees="all")
        return
    edge = _index(keys, start)
    if part.sees == "all":
        for some in (keys[:edge], keys[edge:]):
            if some:
                yield replace(part, queries=queries, keys=some)
        return
    middle = min(max(edge, i), j)
    for a, b in ((i, middle), (middle, j)):
        if a < b:
            yield replace(part, queries=part.queries[a:b], keys=keys[a:b])
            for some in (keys[b : max(edge, b)], keys[max(edge, b) :]):
                if some:
                    yield replace(part, queries=part.queries[a:b], keys=some, sees="all")


def _together(parts: Iterable[Part], start: int) -> Iterator[Part]:
    """Causal parts first, by length, and neighbours that differ by a hop alone, on one side of `start`, as one.

    So are the two half groups at the ends of a shifted row.
    """
    present: Part | None = None
    for part in sorted(parts, key=lambda part: (part.sees != "causal", part.sees == "causal" and len(part.queries))):
        if present is not None:
            hop = present.hop or part.queries.start - present.queries.start
            by = hop * present.count
            alike = (part.sees, part.weight) == (present.sees, present.weight)
            alike = alike and (part.keys.start < start) == (present.keys.start < start)
            if (
                alike
                and hop > 0
                and (part.queries, part.keys)
                == (
                    moved(present.queries, by),
                    moved(present.keys, by),
                )
            ):
                present = replace(present, count=present.count + 1, hop=hop)
                continue
            yield present
        present = part
    if present is not None:
        yield present


def moved(tokens: range, by: int) -> range:
    return range(tokens.start + by, tokens.stop + by, tokens.step)


def _index(tokens: range, token: int) -> int:
    """How many of `tokens` come before `token`."""
    return min(len(tokens), max(0, -((tokens.start - token) // tokens.step)))
