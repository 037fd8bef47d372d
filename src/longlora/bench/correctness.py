"""Is an attention pattern's result right? Its output and gradients against the definition, before its speed is told.

The expected numbers are attention and its gradients written out in float64 for some two dozen query positions of every
head, so that no N x N scores are held. Who sees whom is the pattern's own partition of the row, which the tests hold
against the paper's definitions; every kernel, layout and gradient is checked against it.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from longlora.attention.patterns import Cut, head_sets, partition
from longlora.attention.shifted import shifted_attention
from longlora.errors import UserError

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Query (B, H, N, D), key and value (B, Hkv, N, D) -> (B, H, N, D)."""

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 6e-2, torch.float16: 8e-3}
"""Error allowed in a number, as a share of the sum of the absolute values of the products that it is the sum of.

Measured on eight shapes up to 8,192 tokens: at most 1.7e-6, 2.8e-2 and 2.1e-3. A key too few or too many makes 1.
"""

MOST_POSITIONS = 25


def attentions(pattern: str, group_size: int, backend: str = "auto") -> list[Attention]:
    """The pattern's attention for each kind of layer that it has; only `shift-layers` has two."""

    def attention(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return shifted_attention(q, k, v, group_size, pattern=pattern, layer=layer, backend=backend)

    return [partial(attention, layer) for layer in ((0, 1) if pattern == "shift-layers" else (0,))]


def refuse_wrong(
    layers: Sequence[Attention], inputs: Sequence[Tensor], gradient: Tensor, pattern: str, group_size: int, by: str = ""
) -> None:
    """Raises UserError unless the pattern is right in each of `layers`, output and gradients; see `find_wrong`."""
    for layer, attention in enumerate(layers):
        if wrong := find_wrong(attention, inputs, gradient, pattern, group_size, layer):
            dtype, backend = str(gradient.dtype).removeprefix("torch."), f" by backend '{by}'" if by else ""
            raise UserError(
                f"--pattern {pattern} is computed wrongly{backend} at {inputs[0].shape[1]:,} tokens in groups of "
                f"{group_size:,} and {dtype}: {wrong}. No speed is given for a wrong result; please report it."
            )


def find_wrong(
    attention: Attention, inputs: Sequence[Tensor], gradient: Tensor, pattern: str, group_size: int, layer: int = 0
) -> str | None:
    """What is wrong with the output or the gradients of `attention`, or None.

    The output's gradient is taken as zero but at the positions looked at. So the gradients of keys and values tell what
    those positions read: what they must not see, later tokens among it, has to get exactly nothing.

    Args:
        attention: what is checked.
        inputs: query (B, N, H, D), key and value (B, N, Hkv, D), leaves that require gradients.
        gradient: (B, H, N, D) of the output.
        pattern: a name of `longlora.settings.PATTERNS`; group_size: G in tokens; layer: for `shift-layers`.
    """
    rows, length, heads, _ = inputs[0].shape
    key_heads = inputs[1].shape[2]
    sets = head_sets(pattern, heads, key_heads, layer)
    cuts = {head: each.cut for each in sets for head in range(each.query_start, each.query_stop)}
    at = _positions(length, group_size).to(gradient.device)
    weights = torch.zeros_like(gradient)
    weights[:, :, at] = gradient[:, :, at]
    query, key, value = (x.transpose(1, 2) for x in inputs)
    output = attention(query, key, value)
    query_gradient, key_gradient, value_gradient = (
        x.transpose(1, 2) for x in torch.autograd.grad(output, inputs, weights)
    )
    for row in range(rows):
        for key_head in range(key_heads):
            k, v = (x[row, key_head].detach().double() for x in (key, value))
            key_sum, value_sum = torch.zeros_like(torch.stack([k, k])), torch.zeros_like(torch.stack([v, v]))
            for head in range(key_head * heads // key_heads, (key_head + 1) * heads // key_heads):
                visible = _visible_keys(cuts[head], at, length, group_size)
                q, w = (x[row, head, at].detach().double() for x in (query, weights))
                out, dq, dk, dv = _reference(q, k, v, w, visible)
                spread = dq.new_zeros(2, length, dq.shape[2]).index_copy(1, at, dq)
                wrong = _difference(output[row, head, at], out, at)
                if wrong:
                    return f"the output of head {head} in row {row} is wrong at {wrong}"
                if wrong := _difference(query_gradient[row, head], spread):
                    return f"the query's gradient of head {head} in row {row} is wrong at {wrong}"
                key_sum, value_sum = key_sum + dk, value_sum + dv
            if wrong := _difference(key_gradient[row, key_head], key_sum):
                return f"the key's gradient of KV head {key_head} in row {row} is wrong at {wrong}"
            if wrong := _difference(value_gradient[row, key_head], value_sum):
                return f"the value's gradient of KV head {key_head} in row {row} is wrong at {wrong}"
    return None


def _positions(length: int, group_size: int) -> Tensor:
    """Query positions to look at: the edges of the first groups and half-groups, the ends, and some at random."""
    half = group_size // 2
    edges = {0, 1, half - 1, half, group_size - 1, group_size, group_size + half - 1, group_size + half, length - 1}
    random = torch.randint(length, (MOST_POSITIONS - 9,), generator=torch.Generator().manual_seed(0)).tolist()
    return torch.tensor(sorted(i for i in edges | set(random) if i < length))


def _visible_keys(cut: Cut, queries: Tensor, length: int, group_size: int) -> Tensor:
    """(P, N) bool: which keys each of P query positions reads."""
    cuts = partition(cut, length, group_size)
    token = torch.arange(length, device=queries.device)
    block = torch.empty_like(token)
    for number, members in enumerate(cuts.blocks):
        block[members.start : members.stop : members.step] = number
    visible = (block == block[queries, None]) & (token <= queries[:, None])
    for read in cuts.reads:
        inside = (queries >= read.query_start) & (queries < read.query_stop)
        for start, stop in read.pieces:
            visible |= inside[:, None] & (token >= start) & (token < stop)
    return visible


def _reference(query: Tensor, key: Tensor, value: Tensor, weight: Tensor, visible: Tensor) -> list[Tensor]:
    """Attention of one head and its gradients, written out.

    Args:
        query: (P, D) at the positions looked at; key, value: (N, D); weight: (P, D), the output's gradient.
        visible: (P, N) bool.

    Returns:
        output and query gradient (2, P, D), key and value gradient (2, N, D). The second half is the same sum taken of
        absolute values, which rounding errors scale with and which is zero where nothing may arrive.
    """
    scale = query.shape[1] ** -0.5
    share = torch.softmax((query @ key.T * scale).masked_fill(~visible, float("-inf")), -1)
    through = weight @ value.T
    score = share * (through - (share * through).sum(-1, keepdim=True)) * scale
    through_size = weight.abs() @ value.abs().T
    score_size = share * (through_size + (share * through_size).sum(-1, keepdim=True)) * scale
    return [
        torch.stack([share @ value, share @ value.abs()]),
        torch.stack([score @ key, score_size @ key.abs()]),
        torch.stack([score.T @ query, score_size.T @ query.abs()]),
        torch.stack([share.T @ weight, share.T @ weight.abs()]),
    ]


def _difference(actual: Tensor, expected: Tensor, tokens: Tensor | None = None) -> str | None:
    """The worst number of `actual` (n, D) among those further from `expected` (2, n, D) than rounding explains."""
    number, size = expected
    error = (actual.detach().double() - number).abs()
    # float16 has numbers too small for its own precision; what must not be seen has size 0 and is allowed nothing.
    allowed = TOLERANCE[actual.dtype] * size + torch.finfo(actual.dtype).smallest_normal / 16 * (size > 0)
    wrong = ~(error <= allowed)  # so that NaN is wrong
    if not wrong.any():
        return None
    worst = int(torch.where(wrong, error.nan_to_num(math.inf), -1.0).argmax())
    row, column = divmod(worst, actual.shape[1])
    token = row if tokens is None else int(tokens[row])
    return f"token {token:,}: {actual[row, column]:.3g} instead of {number[row, column]:.3g}"
