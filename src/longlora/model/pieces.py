"""Which piece of its rows a model computes now: tokens [start, stop) of longer rows, in space or in time.

A query of S2-Attn reads nothing before the beginning of its own block, so a piece needs little of what came before:
its halo. Attention (`longlora.attention.state.layer_attention`) looks here for the piece at work. In each layer it

1. leaves the piece's own keys and values, `piece.leave(key, value)`, with their graph;
2. asks for the halo, `piece.earlier(first, heads)`, where its blocks read any: keys and values of the KV heads `heads`
   of tokens `[first, start)`. They are what attention differentiates by, so their gradients come back to whoever
   made them: an autograd function that exchanges with other processes, or leaves.

Whoever runs pieces derives from `Piece` and computes inside `with piece.work():`. Positions and rotary embeddings
handed to the model are the piece's; attention reads documents from the whole row's, which the piece names. Full layers
ask for all that came before, layers with S2-Attn for less than a group, and in plain heads for nothing where pieces end
with groups. What is drawn belongs to the `ForwardPass` that stands in the mask's place: hand every piece the same one.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

_at_work: ContextVar["Piece | None"] = ContextVar("piece", default=None)


def piece_at_work() -> "Piece | None":
    """The piece that is computed now; None where layers see whole rows."""
    return _at_work.get()


class Piece:
    """Tokens `[start, stop)` of rows of `length` tokens.

    Attributes:
        padding: (B, length), nonzero where there is a token, or None.
        positions: (B, length) or (1, length) position ids of the whole rows, or None.
    """

    def __init__(
        self, start: int, stop: int, length: int, padding: Tensor | None = None, positions: Tensor | None = None
    ):
        self.start, self.stop, self.length = start, stop, length
        self.padding, self.positions = padding, positions

    def leave(self, key: Tensor, value: Tensor) -> None:
        """Take a layer's own keys (B, Hkv, stop - start, D) and values (…, Dv), before its attention computes."""

    def earlier(self, first: int, heads: slice) -> tuple[Tensor, Tensor]:
        """Keys (B, k, start - first, D) and values (…, Dv) of the k KV heads `heads`, tokens `[first, start)`."""
        raise NotImplementedError

    @contextmanager
    def work(self) -> Iterator[None]:
        token = _at_work.set(self)
        try:
            yield
        finally:
            _at_work.reset(token)
