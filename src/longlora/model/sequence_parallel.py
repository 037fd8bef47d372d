"""Rows over P processes, a piece of each row in every one: the halo comes from the neighbours, its gradient goes back.

The processes `[kP, kP + P)` are given the same rows. Each computes its piece of them with the row's own positions and
with the next piece's first token as its last label. Only attention looks beyond a piece: each layer asks
`_Exchange` for the keys and values that its blocks read of earlier pieces, from however many processes hold them.

    process r    own keys and values ──► what later pieces read of them, heads that read it alone ──► all_to_all
                 halo of its piece   ◄──          from each process that has a part of it          ◄──
    backward     gradients of the halo the same way back, summed in float32 by whoever the tokens belong to

Shapes: B rows, N tokens of a piece, Hkv KV heads, D width.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers import PreTrainedConfig, PreTrainedModel

from longlora.errors import UserError
from longlora.model.pieces import Cut, Earlier, Piece, Reads
from longlora.model.rope import global_rope


class _Parcel(NamedTuple):
    """What process `sender` sends to process `receiver`: tokens `[first, stop)` of KV heads `heads`."""

    sender: int
    receiver: int
    first: int
    stop: int
    heads: slice


def cuts_of(length: int, pieces: int) -> list[Cut]:
    """A row of `length` tokens in pieces as equal as can be.

    >>> cuts_of(10, 3)
    [(0, 3), (3, 6), (6, 10)]
    """
    return list(pairwise(length * piece // pieces for piece in range(pieces + 1)))


def parcels(cuts: Sequence[Cut], reads: Callable[[Cut], Reads | None]) -> list[_Parcel]:
    """All that the pieces `cuts` of a row hand on in one layer.

    Args:
        reads: what a piece reads of earlier tokens (`longlora.attention.layout.first_key`).
    """
    found = []
    for receiver, cut in enumerate(cuts):
        if (needed := reads(cut)) is not None:
            first, *heads = needed
            found += [
                _Parcel(sender, receiver, max(first, start), stop, slice(*heads))
                for sender, (start, stop) in enumerate(cuts[:receiver])
                if max(first, start) < stop
            ]
    return found


class SequenceGroup:
    """The processes that share rows with this one. All processes make theirs at the same time.

    Attributes:
        size: P.
        index: which piece is this process's.
        sent_bytes: what this process has sent in forward passes so far, those computed again among them, and backward.
    """

    def __init__(self, size: int):
        self.size, self.sent_bytes = size, 0
        self.group, _ = distributed.new_subgroups(size)
        self.index = distributed.get_rank(self.group)

    def piece_of(self, inputs: dict[str, Any]) -> tuple["SequencePiece", dict[str, Any]]:
        """This process's piece of a batch, and what the model is given of it.

        Args:
            inputs: `input_ids` and `labels` (B, N), not shifted; `attention_mask` (B, N) and `position_ids` (B, N) or
                (1, N) where there are any.

        Returns:
            The piece; its `input_ids` and `position_ids`, and its `labels`, with the next piece's first.
        """
        if (lacking := self.size - inputs["input_ids"].shape[1]) > 0:
            inputs = _filled_up(inputs, lacking)
        length = inputs["input_ids"].shape[1]
        start, stop = cuts_of(length, self.size)[self.index]
        positions = inputs.get("position_ids")
        piece = SequencePiece(self, (start, stop), length, inputs.get("attention_mask"), positions)
        if positions is None:
            positions = torch.arange(length, device=inputs["input_ids"].device)[None]
        return piece, {
            "input_ids": inputs["input_ids"][:, start:stop],
            "position_ids": positions[:, start:stop],
            "labels": inputs["labels"][:, start : stop + 1],
        }

    def all_to_all(self, sent: Sequence[Tensor], received: Sequence[int]) -> list[Tensor]:
        """`sent[r]` goes to process r; from process s come `received[s]` bytes. Tensors of bytes."""
        self.sent_bytes += sum(len(part) for part in sent)
        found = sent[0].new_empty(sum(received))
        distributed.all_to_all_single(
            found, torch.cat(list(sent)), list(received), [len(part) for part in sent], group=self.group
        )
        return list(found.split(list(received)))


class SequencePiece(Piece):
    """This process's piece of its group's rows."""

    def __init__(
        self, group: SequenceGroup, cut: Cut, length: int, padding: Tensor | None, positions: Tensor | None
    ) -> None:
        super().__init__(*cut, length, padding, positions)
        self.group = group

    def with_earlier(
        self, key: Tensor, value: Tensor, reads: Callable[[Cut], Reads | None]
    ) -> tuple[Tensor, Tensor, Earlier | None]:
        cuts = cuts_of(self.length, self.group.size)
        found = parcels(cuts, reads)
        if not found:
            return key, value, None
        key, value, *pair = _Exchange.apply(key, value, self.group, found, self.start)
        needed = reads((self.start, self.stop))
        return key, value, None if needed is None else (needed[0], needed[1], *pair)


class _Exchange(torch.autograd.Function):
    """Own keys and values -> the same, and the halo's: (B, k, tokens, D) and (…, Dv), empty where there is none.

    The own ones go through, so that every process of the group takes part in the backward pass too.
    """

    @staticmethod
    def forward(
        ctx: Any, key: Tensor, value: Tensor, group: SequenceGroup, found: list[_Parcel], start: int
    ) -> tuple[Tensor, ...]:
        ctx.group, ctx.found, ctx.start = group, found, start
        ctx.kinds = [(x.dtype, x.shape) for x in (key, value)]
        sent = [_bytes_of(_own((key, value), p, start)) for p in found if p.sender == group.index]
        mine = [p for p in found if p.receiver == group.index]
        sizes = [[_shape(kind, p) for kind in ctx.kinds] for p in mine]
        parts = _exchanged(group, found, sent, [_size(each) for each in sizes], back=False)
        pairs = [_tensors_of(part, each) for part, each in zip(parts, sizes, strict=True)]
        if pairs:
            halo = [torch.cat(each, 2) for each in zip(*pairs, strict=True)]
        else:
            halo = [x.new_empty(len(x), 0, 0, x.shape[3]) for x in (key, value)]
        return key.view_as(key), value.view_as(value), *halo

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        group, found, start = ctx.group, ctx.found, ctx.start
        own, halo = gradients[:2], gradients[2:]
        mine = [p for p in found if p.receiver == group.index]
        first = min((p.first for p in mine), default=0)
        sent = [_bytes_of([x[:, :, p.first - first : p.stop - first] for x in halo]) for p in mine]
        others = [p for p in found if p.sender == group.index]
        sizes = [[_shape(kind, p) for kind in ctx.kinds] for p in others]
        parts = _exchanged(group, found, sent, [_size(each) for each in sizes], back=True)
        if not others:
            return *own, None, None, None
        sums = [x.to(torch.promote_types(x.dtype, torch.float32), copy=True) for x in own]
        for p, part, each in zip(others, parts, sizes, strict=True):
            for total, gradient in zip(_own(sums, p, start), _tensors_of(part, each), strict=True):
                total += gradient
        return *(total.to(x.dtype) for total, x in zip(sums, own, strict=True)), None, None, None


def _exchanged(
    group: SequenceGroup, found: list[_Parcel], sent: list[Tensor], sizes: list[int], back: bool
) -> list[Tensor]:
    """The bytes that come for this process, parcel by parcel; one process sends another one parcel at most.

    Args:
        sent: bytes of this process's own parcels, in the order of `found`.
        sizes: bytes of those that it gets, in the same order.
        back: from receiver to sender.
    """
    outward = [(p.sender, p.receiver) if not back else (p.receiver, p.sender) for p in found]
    targets = [target for source, target in outward if source == group.index]
    sources = [source for source, target in outward if target == group.index]
    nothing = torch.empty(0, dtype=torch.uint8, device=_device(group))
    by_target = dict(zip(targets, sent, strict=True))
    by_source = dict(zip(sources, sizes, strict=True))
    parts = group.all_to_all(
        [by_target.get(rank, nothing) for rank in range(group.size)],
        [by_source.get(rank, 0) for rank in range(group.size)],
    )
    return [parts[source] for source in sources]


def _device(group: SequenceGroup) -> torch.device:
    on_gpu = distributed.get_backend(group.group) == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


def _own(tensors: Sequence[Tensor], parcel: _Parcel, start: int) -> list[Tensor]:
    """What `parcel` holds of tensors whose first token is `start` of the row; views."""
    return [x[:, parcel.heads, parcel.first - start : parcel.stop - start] for x in tensors]


_Shape = tuple[torch.dtype, tuple[int, int, int, int]]


def _shape(kind: tuple[torch.dtype, torch.Size], parcel: _Parcel) -> _Shape:
    dtype, (rows, _, _, width) = kind
    return dtype, (rows, parcel.heads.stop - parcel.heads.start, parcel.stop - parcel.first, width)


def _size(shapes: list[_Shape]) -> int:
    return sum(dtype.itemsize * torch.Size(shape).numel() for dtype, shape in shapes)


def _bytes_of(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([x.contiguous().view(-1).view(torch.uint8) for x in tensors])


def _tensors_of(data: Tensor, shapes: list[_Shape]) -> list[Tensor]:
    parts = data.split([_size([shape]) for shape in shapes])
    return [part.clone().view(dtype).view(shape) for part, (dtype, shape) in zip(parts, shapes, strict=True)]


def _filled_up(inputs: dict[str, Any], count: int) -> dict[str, Any]:
    """`inputs` with `count` tokens of padding more, so that no piece is empty."""
    ids = inputs["input_ids"]
    fill = {"labels": -100, "attention_mask": 0, "input_ids": 0, "position_ids": 0}
    inputs = {"attention_mask": torch.ones_like(ids)} | inputs
    return {name: functional.pad(x, (0, count), value=fill[name]) for name, x in inputs.items()}


def refuse_sequence_parallel(
    model: PreTrainedModel, config: PreTrainedConfig, pattern: str, keeps_documents_apart: bool
) -> None:
    """Raises UserError where a piece of a row cannot be computed by itself but for the halo of its attention.

    Args:
        config: what the model trains with, its positions stretched.
        pattern: a name of `longlora.settings.PATTERNS`.
    """
    name, config = type(model).__name__, config.get_text_config()
    reason = None
    if pattern == "cyclic":
        reason = "with --pattern cyclic the first tokens of a row see its end; --pattern shift has no such leak"
    elif getattr(config, "output_router_logits", False):
        reason = "its router's loss looks at whole rows; set output_router_logits to false in its config.json"
    elif not keeps_documents_apart:
        reason = "it has layers, recurrent or convolutional, that carry a state from token to token"
    elif getattr(config, "rope_parameters", None) and global_rope(config)["rope_type"] in ("dynamic", "longrope"):
        reason = "its positions change with the length of the row (rope_type dynamic or longrope)"
    if reason:
        raise UserError(f"--sequence-parallel cannot serve {name}: {reason}. Leave it out.")
