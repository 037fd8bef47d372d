"""Dense-mask reference of every attention pattern, written from the definitions alone, in float64.

Deliberately shares no code with `longlora.attention`: token by token `who sees whom`, then masked softmax.
"""

import math

import torch


def cut_of_head(pattern: str, head: int, heads: int, key_heads: int, layer: int) -> tuple[str, int]:
    """(kind, dilation) of one query head."""
    repeats = heads // key_heads
    upper = head >= heads // 2 if key_heads == 1 else head // repeats >= key_heads // 2
    if pattern == "shift":
        return ("shifted" if upper else "plain"), 1
    if pattern == "shift-layers":
        return ("shifted" if layer % 2 == 1 else "plain"), 1
    if pattern == "cyclic":
        return ("cyclic" if upper else "plain"), 1
    if pattern == "strided":
        return ("strided" if upper else "plain"), 1
    if pattern == "dilated":
        unit, units = (head // repeats, key_heads) if key_heads >= 4 else (head, heads)
        return "dilated", unit * 4 // units + 1
    return pattern, 1


def sees(kind: str, dilation: int, n: int, group: int) -> torch.Tensor:
    """(n, n) bool: may position i (row) see position j (column) of a document of n tokens."""
    i = torch.arange(n)
    before = i[None, :] <= i[:, None]
    if kind == "full" or n <= group:
        return before
    shift = group // 2
    if kind == "plain":
        block = i // group
    elif kind == "shifted":
        block = (i + group - shift) // group
    elif kind == "strided":
        block = i % math.ceil(n / group)
    elif kind == "dilated":
        block = (i // (group * dilation)) * dilation + i % dilation
    elif kind == "cyclic":
        rolled = (i - shift) % n
        return (rolled[None, :] <= rolled[:, None]) & ((rolled // group)[None, :] == (rolled // group)[:, None])
    else:
        raise AssertionError(kind)
    return before & (block[None, :] == block[:, None])


def attention_reference(query, key, value, group, segment_ids=None, pattern="shift", layer=0, scale=None):
    """(B, H, N, Dv) in the inputs' dtype, from (N, N) masks."""
    rows, heads, length, width = query.shape
    key_heads = key.shape[1]
    scale = width**-0.5 if scale is None else scale
    if segment_ids is None:
        segment_ids = torch.zeros(rows, length, dtype=torch.long)
    per_row = []
    for b in range(rows):
        per_head = []
        for h in range(heads):
            kind, dilation = cut_of_head(pattern, h, heads, key_heads, layer)
            mask = torch.zeros(length, length, dtype=torch.bool)
            for document in segment_ids[b].unique().tolist():
                if document < 0:
                    continue
                at = (segment_ids[b] == document).nonzero().flatten()
                mask[at[:, None], at[None, :]] = sees(kind, dilation, len(at), group)
            scores = query[b, h] @ key[b, h * key_heads // heads].T * scale
            weights = torch.softmax(scores.masked_fill(~mask, float("-inf")), -1)
            weights = torch.where(mask.any(-1, keepdim=True), weights, torch.zeros_like(weights))
            per_head.append(weights @ value[b, h * key_heads // heads])
        per_row.append(torch.stack(per_head))
    return torch.stack(per_row)


def key_weights(plans, rows, heads, length):
    """(B, H, N, N) how often each query counts each key, told by the plan part by part."""
    weights = torch.zeros(rows, heads, length, length, dtype=torch.float64)
    for head_set in plans:
        h = slice(head_set.heads.query_start, head_set.heads.query_stop)
        for row in head_set.rows:
            b = slice(row.row_start, row.row_stop)
            for part in (one for parts in row.parts for one in parts):
                queries, keys = torch.tensor(part.queries)[:, None], torch.tensor(part.keys)
                index = (
                    torch.arange(b.start, b.stop)[:, None, None, None],
                    torch.arange(h.start, h.stop)[:, None, None],
                )
                seen = torch.ones(len(part.queries), len(part.keys), dtype=torch.float64)
                seen = {"causal": seen.tril(), "later": seen.triu(), "all": seen}[part.sees]
                assert not (weights[(*index, queries, keys)] * seen).any(), "a key read twice"
                weights[(*index, queries, keys)] += seen * part.weight
    return weights


def masked_attention(q, k, v, weights, scale=None, sinks=None, softcap=None):
    """(B, H, N, Dv), where each query counts each key as often as `weights` (B, H, N, N) says."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    repeats = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(repeats, 1).transpose(-1, -2) * scale
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    scores = scores.exp() * weights.to(q.dtype)
    total = scores.sum(-1, keepdim=True)
    if sinks is not None:
        total = torch.where(total > 0, total + sinks.exp()[:, None, None], total)
    return (scores / torch.where(total > 0, total, 1)) @ v.repeat_interleave(repeats, 1)
