"""Which piece of its rows a model computes now: tokens [start, stop) of longer rows, in space or in time.

A query of S2-Attn reads nothing before the beginning of its own block, so a piece needs little of what came before:
its halo. Attention (`longlora.attention.state.layer_attention`) looks here for the piece at work. In each layer it

gives the piece's own keys and values, with their graph, and says what pieces read of earlier tokens; it is given the
halo, `piece.with_earlier(key, value, reads)`: keys and values of some KV heads of tokens `[first, start)`. They are
what attention differentiates by, so their gradients come back to whoever made them: an autograd function that exchanges
with other processes (`longlora.model.sequence_parallel`), or leaves (`longlora.model.memory_saving.layer_tiles`).

Whoever runs pieces derives from `Piece` and computes inside `with piece.work():`. Positions and rotary embeddings
handed to the model are the piece's; attention reads documents from the whole row's, which the piece names. Full layers
ask for all that came before, layers with S2-Attn for less than a group, and in plain heads for nothing where pieces end
with groups. What is drawn belongs to the `ForwardPass` that stands in the mask's place: hand every piece the same one.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

Cut = tuple[int, int]
"""First token of a piece, and the first after it."""

Reads = tuple[int, int, int]
"""What a piece reads of earlier tokens: the first of them, the first KV head, and the KV head after the last."""

Earlier = tuple[int, int, Tensor, Tensor]
"""First token and first KV head of earlier keys (B, k, …, D) and values (B, k, …, Dv), which end where a piece begins.
"""

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

    def with_earlier(
        self, key: Tensor, value: Tensor, reads: Callable[[Cut], Reads | None]
    ) -> tuple[Tensor, Tensor, Earlier | None]:
        """A layer's own keys (B, Hkv, stop - start, D) and values (…, Dv), to compute with, and what came before them.

        Args:
            reads: what any piece of the row reads of earlier tokens.
        """
        raise NotImplementedError

    @contextmanager
    def work(self) -> Iterator[None]:
        token = _at_work.set(self)
        try:
            yield
        finally:
            _at_work.reset(token)
