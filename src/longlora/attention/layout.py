"""Rows of tokens as documents, and documents as runs of equal blocks: the plan that a kernel follows."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from longlora.attention.patterns import FIRST_DRAW, PLAIN, Draw, HeadSet, Read, head_sets, partition
from longlora.errors import UserError
from longlora.settings import PatternOptions

Document = tuple[int, int]
"""(start, length) of a document inside its row, in tokens."""

Documents = tuple[tuple[Document, ...], ...]
"""The documents of every row of a batch; tokens outside them are padding."""


@dataclass(frozen=True)
class Run:
    """`count` neighbouring causal blocks of `length` tokens each, from token `start` of the (reordered) row."""

    start: int
    length: int
    count: int

    @property
    def stop(self) -> int:
        return self.start + self.length * self.count


@dataclass(frozen=True)
class RowPlan:
    """What a set of heads does in rows `[row_start, row_stop)`, which are laid out alike.

    Attributes:
        runs: runs in order of `start`; tokens between them are padding.
        order: (N,) token permutation to apply before the runs, or None.
        reads: what queries read besides their own block, in tokens of the row.
    """

    row_start: int
    row_stop: int
    runs: tuple[Run, ...]
    order: torch.Tensor | None
    reads: tuple[Read, ...] = ()


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
@torch.inference_mode(False)  # a plan outlives the pass that made it, and its tensors are saved for backward
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
) -> tuple[HeadSetPlan, ...]:
    """What each set of heads of `pattern` does with a batch of rows of `length` tokens that hold `documents`."""
    return tuple(
        HeadSetPlan(heads=head_set, rows=tuple(_row_plans(head_set, documents, length, group_size)))
        for head_set in head_sets(pattern, heads, key_heads, layer, options, draw)
    )


def query_key_pairs(plans: Sequence[HeadSetPlan]) -> int:
    """Pairs of a query and a key that `plans` look at, over all rows and query heads: what attention costs."""
    pairs = 0
    for head_set in plans:
        heads = head_set.heads.query_stop - head_set.heads.query_start
        for rows in head_set.rows:
            inside = sum(run.count * run.length * (run.length + 1) // 2 for run in rows.runs)
            across = sum(
                (read.query_stop - read.query_start) * (stop - start)
                for read in rows.reads
                for start, stop in read.pieces
            )
            pairs += heads * (rows.row_stop - rows.row_start) * (inside + across)
    return pairs


def _row_plans(head_set: HeadSet, documents: Documents, length: int, group_size: int) -> list[RowPlan]:
    plans: list[RowPlan] = []
    first = 0
    for row in range(1, len(documents) + 1):
        if row == len(documents) or documents[row] != documents[first]:
            plans.append(_row_plan(head_set, documents[first], length, group_size, first, row))
            first = row
    return plans


def _row_plan(
    head_set: HeadSet, row: Sequence[Document], length: int, group_size: int, row_start: int, row_stop: int
) -> RowPlan:
    runs: list[Run] = []
    reads: list[Read] = []
    order = None
    for start, size in row:
        cut = partition(head_set.cut, size, group_size)
        reads += [read.moved(start) for read in cut.reads]
        if cut.order is not None:
            order = torch.arange(length) if order is None else order
            order[start : start + size] = cut.order + start
        for block in cut.lengths:
            last = runs[-1] if runs else None
            if last and last.length == block and last.stop == start:
                runs[-1] = Run(last.start, block, last.count + 1)
            else:
                runs.append(Run(start, block, 1))
            start += block
    return RowPlan(row_start, row_stop, tuple(runs), order, tuple(reads))
