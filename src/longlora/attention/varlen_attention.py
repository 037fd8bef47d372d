"""Block attention by kernels for variable lengths, one call a set of heads (`varlen`, `flex`, `flash`).

Queries, keys and values go in as views of the model's own tensors; tokens are gathered only where the pattern moves
them (dilated, strided, cyclic), where a row has padding, or where blocks read other blocks.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from longlora.attention.layout import HeadSetPlan
from longlora.attention.varlen_layout import VarlenLayout, varlen_layout


class VarlenKernel(Protocol):
    def __call__(self, query: Tensor, key: Tensor, value: Tensor, layout: VarlenLayout, scale: float) -> Tensor:
        """(Tq, h, D), (Tk, k, D), (Tk, k, Dv) -> (Tq, h, Dv): causal from the bottom right in each sequence."""


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plans: Sequence[HeadSetPlan],
    kernel: VarlenKernel,
    scale: float | None,
    start: int = 0,
) -> Tensor:
    """Causal attention inside the blocks of `plans` and over what they read; padding tokens get zeros.

    Args:
        query: (B, H, N, D); key: (B, Hkv, N, D); value: (B, Hkv, N, Dv).
        plans: from `longlora.attention.layout.plan`, without weights.
        kernel: attention over variable-length sequences.
        scale: factor of the scores; default 1 / sqrt(D).
        start: the first token's place in its row.

    Returns:
        (B, H, N, Dv), a view of a contiguous (B, N, H, Dv).
    """
    rows, _, length, width = query.shape
    scale = width**-0.5 if scale is None else scale
    lines = [_in_line(x) for x in (query, key, value)]
    outputs = []
    for plan in plans:
        q = lines[0][:, plan.heads.query_start : plan.heads.query_stop]
        k, v = (x[:, plan.heads.key_start : plan.heads.key_stop] for x in lines[1:])
        layout = varlen_layout(plan, length, query.device, start)
        if not layout.sequences:
            outputs.append(v.new_zeros(len(q), q.shape[1], v.shape[2]))
            continue
        k, v = (_take(x, layout.key_order, layout.keys_repeat) for x in (k, v))
        output = kernel(_take(q, layout.query_order, False), k, v, layout, scale)
        if layout.query_order is not None:
            nothing = output.new_zeros(rows * length, *output.shape[1:])
            output = nothing.index_copy(0, layout.query_order, output)
        outputs.append(output)
    return torch.cat(outputs, 1).unflatten(0, (rows, length)).transpose(1, 2)


def _in_line(x: Tensor) -> Tensor:
    """(B, h, N, D) -> (B * N, h, D): a view of what models hand over, which is stored (B, N, h, D)."""
    return x.transpose(1, 2).flatten(0, 1)


def _take(x: Tensor, order: Tensor | None, repeats: bool) -> Tensor:
    return x if order is None else _TakeTokens.apply(x, order, repeats)


class _TakeTokens(torch.autograd.Function):
    """`x[order]`; the gradients of a token taken several times are summed in float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, repeats: bool) -> Tensor:
        ctx.save_for_backward(order)
        ctx.tokens, ctx.repeats = len(x), repeats
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (order,), (gradient,) = ctx.saved_tensors, gradients
        shape = (ctx.tokens, *gradient.shape[1:])
        if not ctx.repeats:
            return gradient.new_zeros(shape).index_copy_(0, order, gradient), None, None
        wide = torch.promote_types(gradient.dtype, torch.float32)
        total = gradient.new_zeros(shape, dtype=wide).index_add_(0, order, gradient.to(wide))
        return total.to(gradient.dtype), None, None
