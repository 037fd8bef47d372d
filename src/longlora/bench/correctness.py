"""Is an attention pattern's result right? Its output and gradients against the definition, before its speed is told.

The expected numbers are written out from the definition of the pattern (paper section 3.2, table 2), token by token
who sees whom, in float64. That shares no code with `longlora.attention`, and holds no N x N scores: some two dozen
query positions of every head are looked at.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from longlora.attention.patterns import head_sets, partition

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Query (B, H, N, D), key and value (B, Hkv, N, D) -> (B, H, N, D)."""

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 6e-2, torch.float16: 8e-3}
"""Error allowed in a number, as a share of the sum of the absolute values of the products that it is the sum of.

Measured on eight shapes up to 8,192 tokens: at most 1.7e-6, 2.8e-2 and 2.1e-3. A key too few or too many makes 1.
"""

MOST_POSITIONS = 25


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
                if pattern == "scatter":
                    seen = _sees_scattered(head, heads, key_heads, layer, at, length, group_size)
                else:
                    seen = _sees(_cut_of_head(pattern, head, heads, key_heads, layer), at, length, group_size)
                q, w = (x[row, head, at].detach().double() for x in (query, weights))
                out, dq, dk, dv = _reference(q, k, v, w, seen)
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


def _cut_of_head(pattern: str, head: int, heads: int, key_heads: int, layer: int) -> str | int:
    """How one query head cuts a row: a kind that `_sees` knows, or a dilation."""
    key_head = head * key_heads // heads
    upper = head >= heads // 2 if key_heads == 1 else key_head >= key_heads // 2
    if pattern == "shift-layers":
        return "shifted" if layer % 2 else "plain"
    if pattern == "dilated":
        return 1 + (4 * key_head // key_heads if key_heads >= 4 else 4 * head // heads)
    if pattern in ("shift", "cyclic", "strided"):
        return "plain" if not upper else "shifted" if pattern == "shift" else pattern
    return pattern


def _sees(cut: str | int, queries: Tensor, length: int, group_size: int) -> Tensor:
    """(P, N) bool: which keys each of P query positions reads."""
    i = torch.arange(length, device=queries.device)
    order, half = i, group_size // 2
    if cut == "full" or length <= group_size:
        block = torch.zeros_like(i)
    elif cut == "plain":
        block = i // group_size
    elif cut == "shifted":
        block = (i + group_size - half) // group_size
    elif cut == "strided":
        block = i % math.ceil(length / group_size)
    elif cut == "cyclic":
        order = (i - half) % length
        block = order // group_size
    else:
        block = i // (group_size * int(cut)) * int(cut) + i % int(cut)
    return (block == block[queries, None]) & (order <= order[queries, None])


def _sees_scattered(
    head: int, heads: int, key_heads: int, layer: int, queries: Tensor, length: int, group_size: int
) -> Tensor:
    """As `_sees`, for `scatter`: the half-group itself, and what was drawn for it, which only the draw can tell."""
    i = torch.arange(length, device=queries.device)
    if length <= group_size:
        return i <= queries[:, None]
    block = i // (group_size // 2)
    seen = (block == block[queries, None]) & (i <= queries[:, None])
    sets = head_sets("scatter", heads, key_heads, layer)
    (cut,) = {each.cut for each in sets if each.query_start <= head < each.query_stop}
    for read in partition(cut, length, group_size).reads:
        inside = (queries >= read.query_start) & (queries < read.query_stop)
        for start, stop in read.pieces:
            seen |= inside[:, None] & (i >= start) & (i < stop)
    return seen


def _reference(query: Tensor, key: Tensor, value: Tensor, weight: Tensor, seen: Tensor) -> list[Tensor]:
    """Attention of one head and its gradients, written out.

    Args:
        query: (P, D) at the positions looked at; key, value: (N, D); weight: (P, D), the output's gradient.
        seen: (P, N) bool.

    Returns:
        output and query gradient (2, P, D), key and value gradient (2, N, D). The second half is the same sum taken of
        absolute values, which rounding errors scale with and which is zero where nothing may arrive.
    """
    scale = query.shape[1] ** -0.5
    share = torch.softmax((query @ key.T * scale).masked_fill(~seen, float("-inf")), -1)
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
