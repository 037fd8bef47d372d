"""The primitive: attention over the parts of a plan, for whole rows and for pieces of rows.

Nothing of size N x N exists, keys and values are read through views, nothing is copied to be joined. Shapes: B rows,
H query heads, Hkv KV heads, N tokens of the piece (or row), D width.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from longlora.attention.kernels import Kernel, WrittenKernel, sum_type
from longlora.attention.layout import HeadSetPlan, Part


@dataclass(frozen=True)
class Halo:
    """Keys and values of tokens before a piece.

    Attributes:
        start: their first token in the row; they end where the piece begins.
        first_head: the KV head that the first of them is.
        key: (B, k, …, D); value: (B, k, …, Dv).
    """

    start: int
    first_head: int
    key: Tensor
    value: Tensor


def block_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plans: Sequence[HeadSetPlan],
    kernel: Kernel,
    *,
    sinks: Tensor | None = None,
    start: int = 0,
    halo: Halo | None = None,
) -> Tensor:
    """Attention over the parts of `plans`; padding tokens get zeros.

    Args:
        query: (B, H, N, D); key: (B, Hkv, N, D); value: (B, Hkv, N, Dv), of tokens [start, start + N) of the row.
        plans: from `longlora.attention.layout.plan`, with `piece=(start, start + N)`.
        kernel: computes a part.
        sinks: (H,) one more logit a head, without a value.
        start: the piece's first token.
        halo: the earlier keys and values that `longlora.attention.layout.first_key` asks for. Their gradients come
            back.

    Returns:
        (B, H, N, Dv), a view of a contiguous (B, N, H, Dv), which is what the output projection reads.
    """
    earlier = (None, None) if halo is None else (halo.key, halo.value)
    place = start, (halo.start, halo.first_head) if halo is not None else None
    seed = int(torch.randint(2**62, ())) if getattr(kernel, "dropout", 0.0) else 0
    return _BlockAttention.apply(query, key, value, *earlier, sinks, plans, kernel, place, seed)


@dataclass(frozen=True)
class _Call:
    """One call of a kernel: rows, heads, and where in the tensors its tokens are."""

    rows: slice
    heads: slice
    key_heads: slice
    part: Part
    is_earlier: bool
    query_offset: int
    key_offset: int

    def queries(self, x: Tensor) -> Tensor:
        """(B, H, N, D) -> (b, h, L, D)"""
        return self._blocks(_taken(x[self.rows, self.heads], self.part.queries, self.part, self.query_offset))

    def keys(self, x: Tensor) -> Tensor:
        """(B, Hkv, …, D) -> (b, k, S, D)"""
        return self._blocks(_taken(x[self.rows, self.key_heads], self.part.keys, self.part, self.key_offset))

    def place_of_queries(self, x: Tensor) -> Tensor:
        return _taken(x[self.rows, self.heads], self.part.queries, self.part, self.query_offset)

    def place_of_keys(self, x: Tensor) -> Tensor:
        return _taken(x[self.rows, self.key_heads], self.part.keys, self.part, self.key_offset)

    def placed(self, blocks: Tensor, place: Tensor) -> Tensor:
        """What `blocks` and their kind are to `place`."""
        return (blocks.flip(2) if self.part.sees == "later" else blocks).view(place.shape)

    def _blocks(self, taken: Tensor) -> Tensor:
        blocks = taken.flatten(0, 1) if taken.ndim == 5 else taken
        return blocks.flip(2) if self.part.sees == "later" else blocks  # the causal order of the last, reversed


def _taken(x: Tensor, tokens: range, part: Part, offset: int) -> Tensor:
    """A view of `tokens` of (R, h, N, D): (R, h, L, D), or of all `count` of them (1, count, h, L, D)."""
    start = tokens.start - offset
    if part.count == 1:
        return x[:, :, start : start + (len(tokens) - 1) * tokens.step + 1 : tokens.step]
    rows, heads, _, width = x.shape
    of_rows, of_heads, of_tokens, of_width = x.stride()
    return x.as_strided(
        (rows, part.count, heads, len(tokens), width),
        (of_rows, part.hop * of_tokens, of_heads, tokens.step * of_tokens, of_width),
        x.storage_offset() + start * of_tokens,
    )


def calls_take(device: torch.device, kernel: Kernel) -> tuple[int, int | None]:
    """Queries of a head that a call of `kernel` takes at least; on a CPU also its threads.

    Of those each takes a KV head of a block (PyTorch's flash attention, whose forward pass alone takes a query head).
    """
    if device.type == "cpu":
        return 512, torch.get_num_threads()
    return 1 if isinstance(kernel, WrittenKernel) else 16384, None


def _calls(
    plans: Sequence[HeadSetPlan], kernel: Kernel, device: torch.device, start: int, halo: tuple[int, int] | None
) -> Iterator[_Call]:
    """What `plans` come to, in calls that are just large enough for the device to be busy.

    What a kernel returns is copied to its place, and stands beside it until then.
    """
    at_least, threads = calls_take(device, kernel)
    if len(plans) == 1 and [part.count for row in plans[0].rows for part in row.parts] == [1]:
        threads = None  # one call, whose results are the results
    for each in plans:
        heads = each.heads
        repeats = (heads.query_stop - heads.query_start) // (heads.key_stop - heads.key_start)
        for row in each.rows:
            for part in row.parts:
                is_earlier = halo is not None and part.keys.start < start
                first, moved = halo if halo is not None and is_earlier else (start, 0)
                together = heads.key_stop - heads.key_start
                size = max(1, at_least // len(part.queries), -(-(threads or 1) // together))
                rows = 1 if part.count > 1 else row.row_stop - row.row_start  # equal blocks of one row are a batch
                blocks = min(size, part.count) * rows
                if threads:
                    together = min(together, -(-threads // blocks))
                for number in range(0, part.count, size):
                    some = part.some(number, min(size, part.count - number))
                    for top in range(row.row_start, row.row_stop, rows):
                        for head in range(heads.key_start, heads.key_stop, together):
                            last = min(head + together, heads.key_stop)
                            queries = (heads.query_start + (x - heads.key_start) * repeats for x in (head, last))
                            yield _Call(
                                slice(top, top + rows),
                                slice(*queries),
                                slice(head - moved, last - moved),
                                some,
                                is_earlier,
                                start,
                                first,
                            )


class _Sum:
    """What calls add up to in a tensor like `like`; a single call that fills it is it.

    Args:
        several: calls may share a place.
    """

    def __init__(self, like: Tensor, several: bool):
        self.like, self.several = like, several
        self.total: Tensor | None = None
        self.dtype = sum_type(like.dtype) if several else like.dtype

    def add(self, place: Any, blocks: Tensor, call: _Call) -> None:
        if self.total is None:
            if blocks.shape == self.like.shape and call.part.sees != "later":
                self.total = blocks.to(self.dtype)
                return
            rows, heads, length, width = self.like.shape
            self.total = self.like.new_zeros(rows, length, heads, width, dtype=self.dtype).transpose(1, 2)
        target = place(self.total)
        placed = call.placed(blocks, target)
        target.add_(placed) if self.several else target.copy_(placed)

    def result(self) -> Tensor:
        return torch.zeros_like(self.like) if self.total is None else self.total.to(self.like.dtype)


class _BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        earlier_key: Tensor | None,
        earlier_value: Tensor | None,
        sinks: Tensor | None,
        plans: Sequence[HeadSetPlan],
        kernel: Kernel,
        place: tuple[int, tuple[int, int] | None],
        seed: int,
    ) -> Tensor:
        rows, heads, length, _ = query.shape
        output: Tensor | None = None
        lse: Tensor | None = None
        for number, call in enumerate(_calls(plans, kernel, query.device, *place)):
            keys, values = (earlier_key, earlier_value) if call.is_earlier else (key, value)
            k, v = (call.keys(cast(Tensor, x)) for x in (keys, values))
            part, part_lse = kernel.forward(call.queries(query), k, v, call.part.sees != "all", seed + number)
            if output is None or lse is None:
                if part.shape[:3] == query.shape[:3] and part.transpose(1, 2).is_contiguous():
                    output, lse = part, part_lse.unsqueeze(-1)  # one call serves all, or most
                    continue
                output = value.new_zeros(rows, length, heads, value.shape[3]).transpose(1, 2)
                lse = query.new_zeros(rows, heads, length, 1, dtype=sum_type(query.dtype))
            target, target_lse = call.place_of_queries(output), call.place_of_queries(lse)
            part, part_lse = call.placed(part, target), call.placed(part_lse.unsqueeze(-1), target_lse)
            if call.part.sees == "causal":
                target.copy_(part)
                target_lse.copy_(part_lse)
                continue
            if call.part.weight != 1:
                part_lse = part_lse + math.log(call.part.weight)
            whole = torch.logaddexp(target_lse, part_lse)
            target.copy_(target * (target_lse - whole).exp_() + part * (part_lse - whole).exp_())
            target_lse.copy_(whole)
        if output is None or lse is None:  # nothing but padding
            output = value.new_zeros(rows, length, heads, value.shape[3]).transpose(1, 2)
            lse = query.new_zeros(rows, heads, length, 1, dtype=sum_type(query.dtype))
        if sinks is not None:
            whole = torch.logaddexp(lse, sinks.to(lse.dtype).view(1, -1, 1, 1))
            output, lse = (output * (lse - whole).exp_()).to(output.dtype), whole
        ctx.save_for_backward(query, key, value, earlier_key, earlier_value, sinks, output, lse)
        ctx.plans, ctx.kernel, ctx.place, ctx.seed = plans, kernel, place, seed
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, sinks, output, lse = ctx.saved_tensors
        inputs = [x for x in inputs if x is not None]
        gradient = gradients[0]
        of_query, of_key, of_earlier = _several(ctx.plans, ctx.place[0])
        kinds = (of_query, of_key, of_key, of_earlier, of_earlier)
        sums = [_Sum(x, several) for x, several in zip(inputs, kinds, strict=False)]

        def add(call: _Call, seed: int) -> None:
            which = slice(3, 5) if call.is_earlier else slice(1, 3)
            of_lse = call.queries(lse).squeeze(-1)
            if call.part.weight != 1:
                of_lse = of_lse - math.log(call.part.weight)
            dq, *pair = ctx.kernel.backward(
                call.queries(gradient),
                call.queries(inputs[0]),
                *(call.keys(x) for x in inputs[which]),
                call.queries(output),
                of_lse,
                call.part.sees != "all",
                seed,
            )
            sums[0].add(call.place_of_queries, dq, call)
            for total, part in zip(sums[which], pair, strict=True):
                total.add(call.place_of_keys, part, call)

        for number, call in enumerate(_calls(ctx.plans, ctx.kernel, output.device, *ctx.place)):
            add(call, ctx.seed + number)  # in a function, so that nothing of one call lives in the next
        of_sinks = None
        if sinks is not None:
            share = (sinks.to(lse.dtype).view(1, -1, 1) - lse.squeeze(-1)).exp_()
            of_sinks = -(share * (gradient * output).sum(-1)).sum((0, 2)).to(sinks.dtype)
        found = [each.result() for each in sums]
        return *found, *[None] * (5 - len(found)), of_sinks, None, None, None, None


def _several(plans: Sequence[HeadSetPlan], start: int) -> tuple[bool, bool, bool]:
    """Whether a query, a key of the piece, and one before it get gradients from several calls: then summed in float32.

    Causal parts share no token.
    """
    shared = sum(each.heads.key_stop - each.heads.key_start for each in plans) > max(
        (each.heads.key_stop for each in plans), default=0
    )
    others = [part for each in plans for row in each.rows for part in row.parts if part.sees != "causal"]
    before = [sum(part.count for part in row.parts if part.keys.start < start) for each in plans for row in each.rows]
    return (
        bool(others),
        shared or any(part.keys.start >= start for part in others),
        shared or any(n > 1 for n in before),
    )
