"""Attention patterns as data: which heads cut a document into which causal blocks (paper section 3.2, table 2).

A pattern splits the heads into sets; each set cuts a document of `n` tokens into blocks, and a token sees the
earlier tokens of its own block. With `G` the group size and `s = G // 2`:

    plain    block(i) = i // G                      |0 … G)|G … 2G)|…
    shifted  block(i) = (i + G - s) // G            |0 … s)|s … s+G)|…
    rolled   block(i) = ((i - s) mod n) // G        Algorithm 1: the first tokens share the last block (a leak)
    dilated  block(i) = (i // (G r), i mod r)       every r-th token, G of them, r = 1 … 4
    strided  block(i) = i mod ceil(n / G)

A document of at most G tokens is one block in every head.
"""

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from longlora.errors import UserError, check_choice
from longlora.settings import PATTERNS

logger = logging.getLogger(__name__)


def warn_of_leak(pattern: str) -> None:
    """Say in the log what is wrong with `cyclic`, which is kept for comparison with the original code."""
    if pattern == "cyclic":
        logger.warning(
            "pattern 'cyclic' (Algorithm 1 to the letter) lets the first tokens of a row see the last ones, so its "
            "training loss is too good to be true; 'shift' is the same cost without the leak."
        )


@dataclass(frozen=True)
class Cut:
    """How one set of heads cuts a document: `kind` as in the table above, `dilation` tokens apart for `dilated`."""

    kind: str
    dilation: int = 1


@dataclass(frozen=True)
class HeadSet:
    """Query heads `[query_start, query_stop)` and the KV heads they read, which cut documents alike.

    The query heads are a whole multiple of the KV heads, so that kernels for grouped queries serve them as they are.
    """

    query_start: int
    query_stop: int
    key_start: int
    key_stop: int
    cut: Cut


@dataclass(frozen=True)
class Partition:
    """A document cut into causal blocks.

    Attributes:
        lengths: tokens of each block, in order.
        order: (n,) positions in the order in which the blocks take them, or None for their own order.
    """

    lengths: tuple[int, ...]
    order: torch.Tensor | None = None


def head_sets(pattern: str, heads: int, key_heads: int, layer: int = 0) -> list[HeadSet]:
    """The sets of heads of `pattern`, in the order of their query heads.

    Args:
        pattern: a name of `longlora.settings.PATTERNS`.
        heads: number of query heads H, a multiple of `key_heads`.
        key_heads: number of KV heads Hkv.
        layer: ordinal of the layer; only `shift-layers` depends on it (odd layers shift).

    Raises:
        UserError: unknown pattern, or `heads` is not a multiple of `key_heads`.
    """
    check_choice("pattern", pattern, PATTERNS)
    if key_heads < 1 or heads % key_heads:
        raise UserError(
            f"{heads} query heads and {key_heads} key/value heads: the first must be a multiple of the second."
        )
    plain, shifted = Cut("plain"), Cut("shifted")
    if pattern == "shift":
        return _halves(heads, key_heads, plain, shifted)
    if pattern == "cyclic":
        return _halves(heads, key_heads, plain, Cut("rolled"))
    if pattern == "strided":
        return _halves(heads, key_heads, plain, Cut("strided"))
    if pattern == "dilated":
        return _quarters(heads, key_heads)
    if pattern == "shift-layers":
        pattern = "shifted" if layer % 2 else "plain"
    return [HeadSet(0, heads, 0, key_heads, Cut(pattern))]


def partition(cut: Cut, length: int, group_size: int) -> Partition:
    """The causal blocks into which `cut` divides a document of `length` tokens with groups of `group_size` tokens.

    >>> partition(Cut("shifted"), 10, 4).lengths
    (2, 4, 4)
    >>> partition(Cut("plain"), 10, 4).lengths
    (4, 4, 2)
    """
    if cut.kind == "full" or length <= group_size:
        return Partition((length,))
    half = group_size // 2
    if cut.kind == "plain":
        return Partition(_chunks(length, group_size))
    if cut.kind == "shifted":
        return Partition((half, *_chunks(length - half, group_size)))
    if cut.kind == "rolled":
        return Partition(_chunks(length, group_size), torch.arange(length).roll(-half))
    if cut.kind == "strided":
        return _by_residue(0, length, math.ceil(length / group_size))
    parts = [
        _by_residue(start, min(start + group_size * cut.dilation, length), cut.dilation)
        for start in range(0, length, group_size * cut.dilation)
    ]
    lengths = tuple(size for part in parts for size in part.lengths)
    return Partition(lengths, torch.cat([part.order for part in parts if part.order is not None]))


def _chunks(length: int, size: int) -> tuple[int, ...]:
    whole, rest = divmod(length, size)
    return (size,) * whole + ((rest,) if rest else ())


def _by_residue(start: int, stop: int, stride: int) -> Partition:
    """Tokens `[start, stop)` in blocks of equal position modulo `stride`, as `dilated` and `strided` take them."""
    columns = [torch.arange(start + residue, stop, stride) for residue in range(min(stride, stop - start))]
    return Partition(tuple(len(column) for column in columns), torch.cat(columns))


def _halves(heads: int, key_heads: int, first: Cut, second: Cut) -> list[HeadSet]:
    """The lower half of the KV heads cuts as `first`, the upper as `second`; with one KV head, the query heads."""
    middle = heads // 2 if key_heads == 1 else key_heads // 2 * (heads // key_heads)
    return [*_aligned(0, middle, heads, key_heads, first), *_aligned(middle, heads, heads, key_heads, second)]


def _quarters(heads: int, key_heads: int) -> list[HeadSet]:
    """Four sets, as equal as can be, with dilations 1 to 4: of KV heads where there are four, else of query heads."""
    units, width = (key_heads, heads // key_heads) if key_heads >= 4 else (heads, 1)
    edges = [math.ceil(quarter * units / 4) * width for quarter in range(5)]
    return [
        head_set
        for quarter in range(4)
        for head_set in _aligned(edges[quarter], edges[quarter + 1], heads, key_heads, Cut("dilated", quarter + 1))
    ]


def _aligned(start: int, stop: int, heads: int, key_heads: int, cut: Cut) -> Iterator[HeadSet]:
    """Query heads `[start, stop)` as sets that each read whole KV heads or share a single one."""
    repeats = heads // key_heads
    while start < stop:
        key = start // repeats
        if start % repeats or stop - start < repeats:
            next_start, next_key = min(stop, (key + 1) * repeats), key + 1
        else:
            next_key = stop // repeats
            next_start = next_key * repeats
        yield HeadSet(start, next_start, key, next_key, cut)
        start = next_start
