"""Sliding-window attention for the local layers of mixed models, which keep their window while S2 serves the rest."""

import torch
from torch import Tensor

from longlora.attention.kernels import Kernel
from longlora.attention.layout import Document, Documents


def local_attention(
    query: Tensor, key: Tensor, value: Tensor, documents: Documents, window: int, kernel: Kernel
) -> Tensor:
    """Each token sees itself and the `window - 1` tokens before it in its document; padding tokens get zeros.

    Args:
        query: (B, H, N, D); key: (B, Hkv, N, D); value: (B, Hkv, N, Dv).
        documents: the documents of each row.
        window: tokens.
        kernel: dense attention that takes a mask.

    Returns:
        (B, H, N, Dv). The largest score matrix is (window, 2 * window) a head.
    """
    rows = [
        _attend_row(q, k, v, row, window, kernel)
        for row, q, k, v in zip(documents, query.split(1), key.split(1), value.split(1), strict=True)
    ]
    return torch.cat(rows)


def _attend_row(q: Tensor, k: Tensor, v: Tensor, row: tuple[Document, ...], window: int, kernel: Kernel) -> Tensor:
    heads = slice(0, q.shape[1])
    sizes, chunks = _chunks(row, window, q.shape[2])
    pieces = list(zip(q.split(sizes, 2), k.split(sizes, 2), v.split(sizes, 2), strict=True))
    outputs = []
    for index, (kind, (q_piece, k_piece, v_piece)) in enumerate(zip(chunks, pieces, strict=True)):
        if kind == "padding":
            outputs.append(v_piece.new_zeros(*q_piece.shape[:3], v_piece.shape[3]))
        elif kind == "first":
            outputs.append(kernel(q_piece, k_piece, v_piece, heads))
        else:
            _, k_before, v_before = pieces[index - 1]
            queries = torch.arange(q_piece.shape[2], device=q.device)[:, None] + window
            keys = torch.arange(window + k_piece.shape[2], device=q.device)[None, :]
            seen = (keys <= queries) & (queries - keys < window)
            joined = (torch.cat([k_before, k_piece], 2), torch.cat([v_before, v_piece], 2))
            outputs.append(kernel(q_piece, *joined, heads, seen))
    return torch.cat(outputs, 2)


def _chunks(row: tuple[Document, ...], window: int, length: int) -> tuple[list[int], list[str]]:
    """The row as padding and chunks of at most `window` tokens; later chunks of a document read the one before."""
    sizes: list[int] = []
    kinds: list[str] = []
    at = 0
    for start, size in row:
        if start > at:
            sizes.append(start - at)
            kinds.append("padding")
        for offset in range(0, size, window):
            sizes.append(min(window, size - offset))
            kinds.append("later" if offset else "first")
        at = start + size
    if at < length:
        sizes.append(length - at)
        kinds.append("padding")
    return sizes, kinds
