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
    """Whether every key counts once, and none is out of reach: kernels for variable lengths know nothing else."""
    return all(part.weight == 1.0 and part.sees != "later" for rows in plan.rows for part in rows.parts)


@lru_cache(maxsize=256)
@torch.inference_mode(False)  # a layout outlives the pass that made it
def varlen_layout(plan: HeadSetPlan, length: int, device: torch.device, start: int = 0) -> VarlenLayout:
    """The sequences of `plan` for rows of `length` tokens from `start` on, on `device`; made once for each plan."""
    queries: list[Tensor] = []
    keys: list[Tensor] = []
    repeat = False
    for rows in plan.rows:
        sequences: dict[int, list[range]] = {}
        for part in (one for parts in rows.parts for one in parts):
            if part.sees == "causal":
                sequences[part.queries.start] = [part.queries]
            else:
                sequences[part.queries.start].insert(-1, part.keys)
                repeat = True
        for row in range(rows.row_start, rows.row_stop):
            for _, tokens in sorted(sequences.items()):
                places = [torch.arange(each.start, each.stop, each.step) + row * length - start for each in tokens]
                queries.append(places[-1])
                keys.append(torch.cat(places))
    query_sizes, key_sizes = ([len(each) for each in line] for line in (queries, keys))
    tokens_in_all = length * (plan.rows[-1].row_stop if plan.rows else 0)
    query_order = _unless_in_order(queries, tokens_in_all)
    key_order = _unless_in_order(keys, tokens_in_all) if repeat else query_order

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
