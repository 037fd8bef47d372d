"""`shifted_attention`: S2-Attn and every other pattern on plain tensors (paper section 3.2)."""

from collections.abc import Callable

from torch import Tensor

from longlora.attention.backends import attend, check_backend
from longlora.attention.block_attention import Halo
from longlora.attention.kernels import Scoring
from longlora.attention.layout import Documents, documents_from_segments, first_key, plan
from longlora.attention.patterns import FIRST_DRAW, PLAIN, Draw, warn_of_leak
from longlora.errors import UserError
from longlora.settings import PatternOptions


def shifted_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    group_size: int,
    segment_ids: Tensor | None = None,
    pattern: str = "shift",
    backend: str = "auto",
    *,
    layer: int = 0,
    scale: float | None = None,
    options: PatternOptions = PLAIN,
    draw: Draw = FIRST_DRAW,
) -> Tensor:
    """Shifted sparse attention: causal inside groups, half of the heads with the groups moved by half a group.

    Any length, group size, head count and mix of documents is valid; nothing of size N x N is allocated.

    Args:
        query: (B, H, N, D), H a multiple of Hkv.
        key: (B, Hkv, N, D).
        value: (B, Hkv, N, Dv).
        group_size: G, tokens a group, at least 2. A document of at most G tokens gets plain causal attention.
        segment_ids: (B, N) whole numbers; neighbouring tokens of one id are a document, negative ids are padding
            (its output is zero). Default: each row is one document.
        pattern: a name of `longlora.settings.PATTERNS`.
        backend: a name of `longlora.settings.ATTENTION_BACKENDS`; `longlora.attention.backends` says what each needs.
        layer: ordinal of the layer, for `shift-layers` and random choices.
        scale: factor of the scores; default 1 / sqrt(D).
        options: additions to the pattern.
        draw: what the random choices of `scatter` and `vary_offset` are drawn from.

    Returns:
        (B, H, N, Dv).

    Raises:
        UserError: shapes that do not fit each other, a group below 2, an unknown pattern or backend, an
            option that the pattern cannot have, or a backend that cannot act here.
    """
    check_backend(backend)
    warn_of_leak(pattern)
    _check_shapes(query, key, value, group_size)
    rows, _, length, _ = query.shape
    documents = _documents(rows, length, segment_ids)
    plans = plan(documents, length, query.shape[1], key.shape[1], group_size, pattern, layer, options, draw)
    return attend(query, key, value, plans, Scoring(scale), backend)


def piece_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    group_size: int,
    start: int,
    length: int,
    earlier: Callable[[int, slice], tuple[Tensor, Tensor]],
    segment_ids: Tensor | None = None,
    pattern: str = "shift",
    backend: str = "auto",
    *,
    layer: int = 0,
    scale: float | None = None,
    options: PatternOptions = PLAIN,
    draw: Draw = FIRST_DRAW,
) -> Tensor:
    """`shifted_attention` of tokens [start, start + T) of rows of `length` tokens, from those and their halo alone.

        output = piece_attention(q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], group_size, a, n, earlier)

    where `earlier(first, heads)` gives keys (B, k, start - first, D) and values of the k KV heads `heads`, tokens
    [first, start); gradients flow back into both. It is asked once, for all that the pattern reads of earlier tokens,
    or not at all. Layers of a model find the same through `longlora.model.pieces.Piece`.

    Args:
        query: (B, H, T, D), H a multiple of Hkv; key: (B, Hkv, T, D); value: (B, Hkv, T, Dv): the piece's own.
        group_size, pattern, backend, layer, scale, options, draw: as for `shifted_attention`.
        start: the piece's first token.
        length: N, tokens of the whole row.
        segment_ids: (B, N), of the whole row.

    Returns:
        (B, H, T, Dv), the rows [start, start + T) of what the whole row gives.

    Raises:
        UserError: as `shifted_attention`, and for `cyclic`, whose early tokens read the end of the row.
    """
    check_backend(backend)
    _check_shapes(query, key, value, group_size)
    rows, heads, tokens, _ = query.shape
    documents = _documents(rows, length, segment_ids)
    sizes = (documents, length, heads, key.shape[1], group_size, pattern, layer, options, draw)
    plans = plan(*sizes, piece=(start, start + tokens))
    halo, needed = None, first_key(plans, start)
    if needed is not None:
        first, first_head, last_head = needed
        halo = Halo(first, first_head, *earlier(first, slice(first_head, last_head)))
    return attend(query, key, value, plans, Scoring(scale), backend, start=start, halo=halo)


def _documents(rows: int, length: int, segment_ids: Tensor | None) -> Documents:
    if segment_ids is None:
        return (((0, length),),) * rows
    if tuple(segment_ids.shape) != (rows, length):
        raise UserError(f"segment_ids is {tuple(segment_ids.shape)}: it must be (B, N) = {(rows, length)}.")
    return documents_from_segments(segment_ids)


def _check_shapes(query: Tensor, key: Tensor, value: Tensor, group_size: int) -> None:
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    if not query.ndim == key.ndim == value.ndim == 4:
        raise UserError(f"{shapes}: each must have four dimensions, (B, heads, N, D).")
    fits = (
        key.shape[:3] == value.shape[:3]
        and query.shape[0] == key.shape[0]
        and query.shape[2:] == key.shape[2:]
        and query.shape[2] > 0
    )
    if not fits:
        raise UserError(f"{shapes}: B, N and D must agree (N at least 1), and key and value have the same heads.")
    if not isinstance(group_size, int) or isinstance(group_size, bool) or group_size < 2:
        raise UserError(f"group_size is {group_size}: it must be a whole number of at least 2 tokens.")
