"""A plan as variable-length sequences: what kernels with `cu_seqlens` take, whose causal mask is bottom-right.

The B rows of N tokens are one line of B * N tokens. Each block of a head set is a sequence: its queries are the
block's tokens, its keys are the earlier tokens that it reads and then the same tokens, so that the last query sees
every key, the one before all but the last, and so on. Where the blocks are neighbouring tokens and
nothing is padding, queries and keys stand in the line as they are, and nothing is moved.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from longlora.attention.layout import HeadSetPlan
from longlora.attention.patterns import Read


@dataclass(frozen=True, eq=False)
class VarlenLayout:
    """The sequences of one head set; S of them, Tq queries and Tk keys in all.

    Attributes:
        query_order: (Tq,) places in the line of the queries, or None where they are the whole line in order.
        key_order: (Tk,) places of the keys, or None likewise.
        query_starts, key_starts: (S + 1,) int32, where sequences begin among the queries and the keys (cu_seqlens).
        longest_query, longest_key: tokens.
        keys_repeat: whether a token is a key of several sequences.
    """

    query_order: Tensor | None
    key_order: Tensor | None
    query_starts: Tensor
    key_starts: Tensor
    longest_query: int
    longest_key: int
    keys_repeat: bool

    @property
    def sequences(self) -> int:
        return len(self.query_starts) - 1


def can_be_laid_out(plan: HeadSetPlan) -> bool:
    """Whether every key counts once: kernels for variable lengths know no weights."""
    return all(read.weight == 1.0 for rows in plan.rows for read in rows.reads)


@lru_cache(maxsize=256)
@torch.inference_mode(False)  # a layout outlives the pass that made it
def varlen_layout(plan: HeadSetPlan, length: int, device: torch.device) -> VarlenLayout:
    """The sequences of `plan` for rows of `length` tokens, on `device`; made once for each plan."""
    query_sizes: list[int] = []
    key_sizes: list[int] = []
    queries: list[Tensor] = []
    keys: list[Tensor] = []
    for rows in plan.rows:
        reads: dict[int, list[Read]] = {}
        for read in rows.reads:
            reads.setdefault(read.query_start, []).append(read)
        order = torch.arange(length) if rows.order is None else rows.order
        row_queries, row_keys = [], []
        for run in rows.runs:
            for start in range(run.start, run.stop, run.length):
                own = order[start : start + run.length]
                earlier = [order[a:b] for read in reads.get(start, ()) for a, b in read.pieces]
                row_queries.append(own)
                row_keys += [*earlier, own]
                query_sizes.append(len(own))
                key_sizes.append(len(own) + sum(map(len, earlier)))
        of_rows = len(row_queries)
        for row in range(rows.row_start, rows.row_stop):
            queries += [part + row * length for part in row_queries]
            keys += [part + row * length for part in row_keys]
        for sizes in (query_sizes, key_sizes):
            sizes += sizes[len(sizes) - of_rows :] * (rows.row_stop - rows.row_start - 1)
    tokens = length * (plan.rows[-1].row_stop if plan.rows else 0)
    repeat = any(rows.reads for rows in plan.rows)
    query_order = _unless_in_order(queries, tokens)
    key_order = _unless_in_order(keys, tokens) if repeat else query_order

    def on_device(order: Tensor | None) -> Tensor | None:
        return None if order is None else order.to(device)

    return VarlenLayout(
        query_order=on_device(query_order),
        key_order=on_device(key_order),
        query_starts=_starts(query_sizes).to(device),
        key_starts=_starts(key_sizes).to(device),
        longest_query=max(query_sizes, default=0),
        longest_key=max(key_sizes, default=0),
        keys_repeat=repeat,
    )


def _unless_in_order(parts: list[Tensor], tokens: int) -> Tensor | None:
    order = torch.cat(parts) if parts else torch.empty(0, dtype=torch.long)
    return None if torch.equal(order, torch.arange(tokens)) else order


def _starts(sizes: list[int]) -> Tensor:
    return torch.tensor([0, *sizes]).cumsum(0).to(torch.int32)
