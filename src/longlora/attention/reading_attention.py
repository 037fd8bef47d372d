"""Blocks that also read earlier tokens: partial attentions over disjoint sets of keys, merged as if they were one.

A query's keys are its own block (causal) and what its reads name. Attention over part of the keys gives an output and
the logarithm of its softmax denominator, `lse`; with `lse = log(sum of exp(lse_p))` over the parts p,

    output   = sum over p of exp(lse_p - lse) * output_p
    gradient of the scores of part p = exp(score - lse) * (dO . V - dO . output)

so the fused backward of each part, given the *whole* output and lse, is exact. A weight w on a part's keys adds
log(w) to its lse, and its backward takes lse - log(w). The same identity joins the blocks of FlashAttention
(arXiv 2205.14135, section 3.1) and the devices of Ring Attention (arXiv 2310.01889).

Shapes: R rows, h query heads, k KV heads, N tokens, D width.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from longlora.attention.kernels import Kernel, SdpaKernel
from longlora.attention.layout import RowPlan, Run
from longlora.attention.patterns import Read


def reading_attention(plan: RowPlan, q: Tensor, k: Tensor, v: Tensor, heads: slice, kernel: Kernel) -> Tensor:
    """(R, h, N, D), (R, k, N, D), (R, k, N, D) rows laid out as `plan` -> (R, N, h, D); padding tokens get zeros.

    The fused flash kernel serves what it can and the parts are merged; elsewhere (dropout, soft caps, values of
    another width, devices without it) each block goes through `kernel` with its keys side by side and a mask.
    """
    if isinstance(kernel, SdpaKernel) and not kernel.dropout and _has_flash(q, k, v):
        scale = q.shape[-1] ** -0.5 if kernel.scale is None else kernel.scale
        return _MergedAttention.apply(q, k, v, plan, scale)
    return _masked(plan, q, k, v, heads, kernel)


def _has_flash(q: Tensor, k: Tensor, v: Tensor) -> bool:
    if q.shape[-1] != v.shape[-1] or not q.dtype == k.dtype == v.dtype:
        return False
    if q.device.type == "cpu":
        return True
    return q.device.type == "cuda" and q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] <= 256


def _flash(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
    """Output (b, h, L, D), lse (b, h, L), and what the backward of this device needs besides."""
    if q.device.type == "cpu":
        output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
        return output, lse, ()
    found = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)
    return found[0], found[1], found[2:8]


def _flash_backward(
    gradient: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    output: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
    more: tuple[Any, ...],
) -> tuple[Tensor, Tensor, Tensor]:
    if q.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            gradient, q, k, v, output, lse, 0.0, causal, scale=scale
        )
    cum_q, cum_k, max_q, max_k, philox_seed, philox_offset = more
    return torch.ops.aten._scaled_dot_product_flash_attention_backward(
        gradient, q, k, v, output, lse.contiguous(), cum_q, cum_k, max_q, max_k, 0.0, causal,
        philox_seed, philox_offset, scale=scale,
    )  # fmt: skip


class _MergedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: RowPlan, scale: float) -> Tensor:
        rows, heads, length, width = q.shape
        output = v.new_zeros(rows, length, heads, width).transpose(1, 2)
        lse = q.new_zeros(rows, heads, length, dtype=torch.promote_types(q.dtype, torch.float32))
        more: list[tuple[Any, ...]] = []
        for run in plan.runs:
            part, part_lse, extra = _flash(_blocks(q, run), _blocks(k, run), _blocks(v, run), True, scale)
            _put(output, run, part)
            _put(lse.unsqueeze(-1), run, part_lse.unsqueeze(-1))
            more.append(extra)
        for read in plan.reads:
            here = slice(read.query_start, read.query_stop)
            part, part_lse, extra = _flash(q[:, :, here], _pieces(k, read), _pieces(v, read), False, scale)
            part_lse = part_lse + math.log(read.weight)
            whole = torch.logaddexp(lse[:, :, here], part_lse)
            kept = (lse[:, :, here] - whole).exp_().unsqueeze(-1)
            added = (part_lse - whole).exp_().unsqueeze(-1)
            output[:, :, here] = (output[:, :, here] * kept).add_(part * added)
            lse[:, :, here] = whole
            more.append(extra)
        ctx.save_for_backward(q, k, v, output, lse)
        ctx.plan, ctx.scale, ctx.more = plan, scale, more
        return output.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, output, lse = ctx.saved_tensors
        gradient = gradients[0].transpose(1, 2)
        wide = torch.promote_types(q.dtype, torch.float32)
        dq, dk, dv = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (q, k, v))
        more = iter(ctx.more)
        for run in ctx.plan.runs:
            g_blocks, q_blocks, k_blocks, v_blocks, o_blocks = (_blocks(x, run) for x in (gradient, q, k, v, output))
            lse_blocks = _blocks(lse.unsqueeze(-1), run).squeeze(-1)
            parts = _flash_backward(
                g_blocks, q_blocks, k_blocks, v_blocks, o_blocks, lse_blocks, True, ctx.scale, next(more)
            )
            for total, part in zip((dq, dk, dv), parts, strict=True):
                _put(total, run, part)
        for read in ctx.plan.reads:
            here = slice(read.query_start, read.query_stop)
            dq_part, dk_part, dv_part = _flash_backward(
                gradient[:, :, here],
                q[:, :, here],
                _pieces(k, read),
                _pieces(v, read),
                output[:, :, here],
                lse[:, :, here] - math.log(read.weight),
                False,
                ctx.scale,
                next(more),
            )
            dq[:, :, here] += dq_part
            at = 0
            for start, stop in read.pieces:
                for total, part in ((dk, dk_part), (dv, dv_part)):
                    total[:, :, start:stop] += part[:, :, at : at + stop - start]
                at += stop - start
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None


def _blocks(x: Tensor, run: Run) -> Tensor:
    """(R, h, N, D) -> (R * count, h, L, D), the run's blocks as a batch: a view for one row, or one block."""
    part = x[:, :, run.start : run.stop]
    if run.count == 1:
        return part
    return part.unflatten(2, (run.count, run.length)).transpose(1, 2).flatten(0, 1)


def _put(whole: Tensor, run: Run, blocks: Tensor) -> None:
    """The inverse of `_blocks`: write (R * count, h, L, D) where the run stands in (R, h, N, D)."""
    place = whole[:, :, run.start : run.stop].unflatten(2, (run.count, run.length)).transpose(1, 2)
    place.copy_(blocks.unflatten(0, (-1, run.count)))


def _pieces(x: Tensor, read: Read) -> Tensor:
    """The tokens a read names, (R, k, K, D): a view where they are one piece."""
    parts = [x[:, :, start:stop] for start, stop in read.pieces]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def _masked(plan: RowPlan, q: Tensor, k: Tensor, v: Tensor, heads: slice, kernel: Kernel) -> Tensor:
    """The same block by block, the keys side by side under a mask (additive, where keys have weights)."""
    rows, width, length, _ = q.shape
    by_start: dict[int, list[Read]] = {}
    for read in plan.reads:
        by_start.setdefault(read.query_start, []).append(read)
    outputs, at = [], 0
    for run in plan.runs:
        for start in range(run.start, run.stop, run.length):
            outputs.append(v.new_zeros(rows, start - at, width, v.shape[-1]))
            stop, reads = start + run.length, by_start.get(start, ())
            own = Read(start, stop, ((start, stop),))
            keys, values = (torch.cat([_pieces(x, read) for read in (*reads, own)], 2) for x in (k, v))
            mask = _mask(reads, run.length, q)
            outputs.append(kernel(q[:, :, start:stop], keys, values, heads, mask).transpose(1, 2))
            at = stop
    outputs.append(v.new_zeros(rows, length - at, width, v.shape[-1]))
    return torch.cat(outputs, 1)


def _mask(reads: Sequence[Read], length: int, like: Tensor) -> Tensor | None:
    """(length, K + length) logarithms of the keys' weights, minus infinity where a key is not seen; or None: causal."""
    if not reads:
        return None
    earlier = sum(stop - start for read in reads for start, stop in read.pieces)
    mask = like.new_full((length, earlier + length), float("-inf")).triu(earlier + 1)
    at = 0
    for read in reads:
        size = sum(stop - start for start, stop in read.pieces)
        mask[:, at : at + size] = math.log(read.weight)
        at += size
    return mask
