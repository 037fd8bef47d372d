"""FlexAttention as a kernel for variable lengths: a mask for each set of heads, told tile by tile from the layout.

A query's keys are neighbours among the gathered keys, from its sequence's first to its own. So the keys of a tile of
queries are neighbours too, and which tiles are empty, full or masked follows from each query's first and last key: the
N x N mask, which `create_block_mask` evaluates, never exists. (Dong et al., arXiv 2412.05496, section 3.)
"""

from collections.abc import Callable
from functools import lru_cache
from typing import cast

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from longlora.attention.varlen_layout import VarlenLayout

TILE = 128
"""Tokens a side of a tile, FlexAttention's own default."""


def flex_kernel(query: Tensor, key: Tensor, value: Tensor, layout: VarlenLayout, scale: float) -> Tensor:
    """(Tq, h, D), (Tk, k, D), (Tk, k, Dv) -> (Tq, h, Dv), compiled where there is a GPU."""
    output = (_compiled() if query.is_cuda else cast(Callable[..., Tensor], flex_attention))(
        *(x.transpose(0, 1).unsqueeze(0) for x in (query, key, value)),
        block_mask=layout_mask(layout),
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output.squeeze(0).transpose(0, 1)


@lru_cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(flex_attention)


def first_and_last_key(layout: VarlenLayout) -> tuple[Tensor, Tensor]:
    """(Tq,) and (Tq,) int32: a query sees every key from its first to its last."""
    starts, ends = layout.query_starts[:-1], layout.query_starts[1:]
    sequence = torch.repeat_interleave(ends - starts)
    behind = ends[sequence] - 1 - torch.arange(len(sequence), dtype=torch.int32, device=ends.device)
    return layout.key_starts[:-1][sequence], layout.key_starts[1:][sequence] - 1 - behind


@lru_cache(maxsize=256)
@torch.inference_mode(False)
def layout_mask(layout: VarlenLayout) -> BlockMask:
    """The mask of the queries and keys of `layout`, for every head and row alike."""
    first, last = first_and_last_key(layout)
    keys = int(layout.key_starts[-1])
    tiles = -(-keys // TILE)

    def seen(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key >= first[query]) & (key <= last[query])

    lowest, highest = (_by_tile(x, pick) for x, pick in ((first, torch.amin), (last, torch.amax)))
    surely_first, surely_last = (_by_tile(x, pick) for x, pick in ((first, torch.amax), (last, torch.amin)))
    tile = torch.arange(tiles, dtype=torch.int32, device=first.device)
    touched = (tile >= lowest[:, None] // TILE) & (tile <= highest[:, None] // TILE)
    full = (tile * TILE >= surely_first[:, None]) & (tile * TILE + TILE - 1 <= surely_last[:, None])
    masked_count, masked = _counted(touched & ~full)
    full_count, whole = _counted(full)
    return BlockMask.from_kv_blocks(
        masked_count, masked, full_count, whole, BLOCK_SIZE=TILE, mask_mod=seen, seq_lengths=(len(first), keys)
    )


def _by_tile(x: Tensor, pick: Callable[[Tensor, int], Tensor]) -> Tensor:
    """(Tq,) -> (tiles,), the least or greatest of each tile; the last tile is filled up with its last number."""
    missing = -len(x) % TILE
    return pick(torch.cat([x, x[-1:].expand(missing)]).view(-1, TILE), 1)


def _counted(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """(Q, K) bool -> how many key tiles each query tile has (1, 1, Q), and which, those first (1, 1, Q, K)."""
    order = tiles.to(torch.int8).argsort(dim=1, descending=True, stable=True)
    return tiles.sum(1, dtype=torch.int32)[None, None], order.to(torch.int32)[None, None]
