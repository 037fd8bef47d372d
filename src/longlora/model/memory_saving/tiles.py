"""One pass of one decoder layer in tiles: what each tile is given, and what it leaves.

Shapes: B rows, N tokens (of the piece), T tokens of a tile, E hidden size, Hkv KV heads, D width.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from longlora.errors import UserError
from longlora.model.pieces import Cut, Earlier, Piece, Reads, piece_at_work


class _KeysAreKnown(Exception):  # noqa: N818, it tells of no mistake
    """Ends a layer's forward pass of which only keys and values were wanted."""


class Tile(Piece):
    """Tokens `[start, stop)` of the rows in one layer.

    Attributes:
        row: the pass of the layer that the tile belongs to.
        own: its keys and values.
        taken: what attention took of earlier tokens: the first of them, KV heads, keys and values.
    """

    def __init__(self, row: "Row", cut: Cut, only_keys: bool = False):
        super().__init__(*cut, row.piece.length, row.piece.padding, row.piece.positions)
        self.row, self.only_keys = row, only_keys
        self.own: tuple[Tensor, Tensor] | None = None
        self.taken: list[tuple[int, slice, Tensor, Tensor]] = []

    def with_earlier(
        self, key: Tensor, value: Tensor, reads: Callable[[Cut], Reads | None]
    ) -> tuple[Tensor, Tensor, Earlier | None]:
        if self.own is not None:
            raise UserError("a layer computes attention twice: --layer-tile cannot serve it; leave it out.")
        self.own = key, value
        if not torch.is_grad_enabled():
            self.row.keep(self.start, key, value, reads)
        if self.only_keys:
            raise _KeysAreKnown
        if (needed := reads((self.start, self.stop))) is None:
            return key, value, None
        first, first_head, last_head = needed
        heads = slice(first_head, last_head)
        pair = (self.row.of_tokens(x, first, self.start) for x in self.row.pair())
        earlier_key, earlier_value = (x[:, heads].detach() for x in pair)
        if torch.is_grad_enabled():
            earlier_key, earlier_value = earlier_key.requires_grad_(), earlier_value.requires_grad_()
            self.taken.append((first, heads, earlier_key, earlier_value))
        return key, value, (first, first_head, earlier_key, earlier_value)


class Row:
    """One pass of one layer over rows, or over this process's piece of them.

    Attributes:
        piece: the tokens that this process has.
        shared: other processes have pieces of the same rows.
        tiles: of the piece, each its first token in the row and the first after it.
        gives: the type of the layer's output, and how many of its parts come after the hidden states.
        first: the first token whose keys and values are kept: what the piece reads of other processes', if anything.
    """

    def __init__(self, forward: Callable[..., Any], arguments: inspect.BoundArguments, length: int, tile: int):
        named = _named(arguments)
        mask, positions = named.get("attention_mask"), named.get("position_ids")
        padding = mask if mask is None or isinstance(mask, Tensor) else mask.padding
        given = piece_at_work() or getattr(mask, "piece", None)
        self.forward, self.arguments, self.shared = forward, arguments, given is not None
        self.piece = given or Piece(0, length, length, padding, positions)
        start, stop = self.piece.start, self.piece.stop
        self.tiles = [(first, min(first + tile, stop)) for first in range(start, stop, tile)]
        self.first = start
        self.gives: tuple[type, int] = (Tensor, 0)
        self._pair: tuple[Tensor, Tensor] | None = None
        self._reads: Callable[[Cut], Reads | None] | None = None

    def of_piece(self, x: Tensor, cut: Cut) -> Tensor:
        """A tile of `x (B, N, …)`."""
        return x[:, cut[0] - self.piece.start : cut[1] - self.piece.start]

    def of_tokens(self, x: Tensor, start: int, stop: int) -> Tensor:
        """Tokens `[start, stop)` of something like the kept keys, `(B, Hkv, tokens, D)`."""
        return x[:, :, start - self.first : stop - self.first]

    def run(self, hidden: Tensor, tile: Tile) -> Tensor | None:
        """The layer's own forward of a tile's `hidden (B, T, E)`; None where only keys and values were wanted."""
        piece = self.piece
        cut = piece.stop - piece.start, tile.start - piece.start, tile.stop - piece.start
        keywords = {name: _of_tile(x, *cut) for name, x in self.arguments.kwargs.items()}
        try:
            with tile.work():
                output = self.forward(hidden, *(_of_tile(x, *cut) for x in self.arguments.args[1:]), **keywords)
        except _KeysAreKnown as known:
            known.__traceback__ = None  # its frames hold tensors, and a reference to it
            return None
        name = type(cast(Any, self.forward).__self__).__name__
        if tile.own is None:
            raise UserError(
                f"{name} computes no attention that knows of tiles: --layer-tile serves layers that train with S2-Attn "
                "(longlora.use_shifted_attention); leave it out."
            )
        hidden, *rest = output if isinstance(output, tuple) else (output,)
        if any(isinstance(x, Tensor) for x in rest):
            raise UserError(f"{name} gives more than hidden states: --layer-tile cannot serve it; leave it out.")
        self.gives = type(output), len(rest)
        return hidden

    def keep(self, start: int, key: Tensor, value: Tensor, reads: Callable[[Cut], Reads | None]) -> None:
        """Keys and values of the tokens from `start` on, for later tiles and other processes."""
        if len(self.tiles) == 1 and not self.shared:
            return
        if self._pair is None:
            needed = reads((self.piece.start, self.piece.stop)) if self.shared else None
            self._reads, self.first = reads, needed[0] if needed else self.piece.start
            length = self.piece.stop - self.first
            self._pair = _of_length(key, length, key.dtype), _of_length(value, length, value.dtype)
        for whole, part in zip(self._pair, (key, value), strict=True):
            self.of_tokens(whole, start, start + part.shape[2]).copy_(part)

    def pair(self) -> tuple[Tensor, Tensor]:
        """Keys (B, Hkv, tokens, D) and values (B, Hkv, tokens, Dv) from token `first` on, right before the tile at
        work."""
        assert self._pair is not None, "attention asks for earlier tokens only where there are some"
        return self._pair

    @torch.no_grad()
    def keep_all(self, tiles: Callable[[int], Tensor], indices: Sequence[int]) -> None:
        """Keys and values of the tiles `indices`."""
        for index in indices:
            self.run(tiles(index), Tile(self, self.tiles[index], only_keys=True))

    def read_by_others(self) -> list[int]:
        """The tiles with tokens that later pieces of the row read; known when any keys are."""
        stop, length = self.piece.stop, self.piece.length
        needed = self._reads((stop, length)) if self.shared and self._reads is not None and stop < length else None
        return [index for index, cut in enumerate(self.tiles) if needed is not None and cut[1] > needed[0]]

    def exchange(self) -> Callable[[list[Tensor]], list[Tensor]]:
        """Put what the piece reads of other processes' keys and values before its own; all processes at once.

        Returns:
            From gradients of all kept keys and values to what other processes have for this piece's own.
        """
        reads, start = self._reads, self.piece.start
        assert reads is not None, "the keys of one tile at least are known"
        # .data, which does not count what is written beside it as a change of it
        own = [self.of_tokens(x, start, self.piece.stop).data for x in self.pair()]
        with torch.enable_grad():
            own = [x.requires_grad_() for x in own]
            key, value, earlier = self.piece.with_earlier(own[0], own[1], reads)
        if earlier is None:
            heads, halo = slice(0, 0), []
        else:
            _, head, *halo = earlier
            heads = slice(head, head + halo[0].shape[1])
            with torch.no_grad():
                for whole, part in zip(self.pair(), halo, strict=True):
                    self.of_tokens(whole, self.first, start).zero_()[:, heads] = part

        def back(gradients: list[Tensor]) -> list[Tensor]:
            if key is own[0]:  # nobody reads anything of another process
                return [torch.zeros_like(x) for x in own]
            nothing = [x.new_zeros(()).expand_as(x) for x in own]
            of_halo = [self.of_tokens(x, self.first, start)[:, heads].to(own[0].dtype) for x in gradients[: len(halo)]]
            return list(torch.autograd.grad([key, value, *halo], own, [*nothing, *of_halo]))

        return back

    def zeros(self) -> list[Tensor]:
        """Of the kept keys and values, for their gradients."""
        kept = [] if self._pair is None else self._pair
        return [_of_length(x, x.shape[2], torch.promote_types(x.dtype, torch.float32)).zero_() for x in kept]

    def forget(self) -> None:
        self._pair = None


def _named(arguments: inspect.BoundArguments) -> dict[str, Any]:
    """All arguments by name, those that a layer hands on to its attention among them."""
    found: dict[str, Any] = {}
    for name, value in arguments.arguments.items():
        kind = arguments.signature.parameters[name].kind
        found |= value if kind is inspect.Parameter.VAR_KEYWORD else {name: value}
    return found


def _of_tile(x: Any, length: int, start: int, stop: int) -> Any:
    """An argument of a layer, of which tensors over a row's tokens are cut."""
    if isinstance(x, tuple | list):
        return type(x)(_of_tile(part, length, start, stop) for part in x)
    if isinstance(x, Tensor) and x.ndim > 1 and x.shape[1] == length:
        return x[:, start:stop]
    return x[start:stop] if isinstance(x, Tensor) and x.shape == (length,) else x


def _of_length(x: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """Room for keys or values of a row, tokens before heads in memory, as models make them."""
    rows, heads, _, width = x.shape
    return x.new_empty(rows, length, heads, width, dtype=dtype).transpose(1, 2)
