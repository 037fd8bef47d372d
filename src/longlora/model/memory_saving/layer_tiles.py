"""Decoder layers on a tile of tokens at a time, forward and backward: gradient checkpointing cut finer.

Of the row's size there are the layer's input and output, their gradients, and its keys and values with theirs. A tile
takes the layer's own forward, whatever that is; its attention finds which piece is at work (`longlora.model.pieces`),
leaves its keys and values, and takes those of earlier tiles:

    forward    tiles first to last, no graph; keys and values are kept while the layer lasts
    backward   keys and values of all tiles again; then the tiles last to first, each computed anew under autograd.
               What a tile gives the keys and values of earlier tiles waits for them, summed in float32

So one computation of keys and values (and of the queries beside them) comes on top of gradient checkpointing's.

Where several processes share rows (`longlora.model.sequence_parallel`), each tiles its piece. No process waits for
another's tiles: the keys and values that others read are computed before the tiles, and exchanged; the gradients that
come back for them when all tiles are done go through the projections by themselves.

Shapes: B rows, N tokens (of the piece), T tokens of a tile, E hidden size, Hkv KV heads, D width.
"""

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import get_device_states, set_device_states
from transformers import PreTrainedModel

from longlora.errors import UserError
from longlora.model.adapters import norm_modules
from longlora.model.lm_head import decoder_of
from longlora.model.memory_saving import offloaded_activations
from longlora.model.memory_saving.tiled_mlp import casts_of_its_own, decoder_layers, in_tiles
from longlora.model.memory_saving.tiles import Row, Tile


class _InTiles(torch.autograd.Function):
    """(Row, whether its input waits in the host's memory, hidden (B, N, E), parameters that train) -> (B, N, E)."""

    @staticmethod
    def forward(ctx: Any, row: Row, offload: bool, hidden: Tensor, *parameters: Tensor) -> Tensor:
        ctx.row, ctx.parameters, ctx.kind = row, parameters, (hidden.dtype, hidden.device)
        ctx.offload = offload
        device = hidden.device.type
        ctx.autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        ctx.random_states = {}
        hidden = hidden.detach()
        whole: Tensor | None = None

        def hidden_of(index: int) -> Tensor:
            if index in ctx.random_states:
                _set_random_state(ctx.random_states[index])
            else:
                ctx.random_states[index] = _random_state(hidden)
            return row.of_piece(hidden, row.tiles[index])

        with casts_of_its_own(device):
            if row.shared:
                row.keep_all(hidden_of, [last := len(row.tiles) - 1])
                row.keep_all(hidden_of, [index for index in row.read_by_others() if index != last])
                row.exchange()
            for index, cut in enumerate(row.tiles):
                with _random_apart(hidden.device) if index in ctx.random_states else nullcontext():
                    output = cast(Tensor, row.run(hidden_of(index), Tile(row, cut)))
                if whole is None:
                    whole = output.new_empty(hidden.shape)
                row.of_piece(whole, cut).copy_(output)
                del output
        row.forget()
        if offload:
            ctx.on_host = [offloaded_activations.to_host(row.of_piece(hidden, cut)) for cut in row.tiles]
        else:
            ctx.save_for_backward(hidden)
        return cast(Tensor, whole)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        row, (gradient,), (dtype, device) = ctx.row, gradients, ctx.kind
        saved = None if ctx.offload else ctx.saved_tensors[0]
        sums = {i: _Sum(ctx.parameters[i]) for i, needed in enumerate(ctx.needs_input_grad[3:]) if needed}
        of_hidden = torch.empty(gradient.shape, dtype=dtype, device=device) if ctx.needs_input_grad[2] else None

        def hidden_of(index: int) -> Tensor:
            _set_random_state(ctx.random_states[index])
            if saved is not None:
                return row.of_piece(saved, row.tiles[index])
            return offloaded_activations.from_host(ctx.on_host[index], device)

        def through(index: int, of_output: Tensor | None, of_pair: list[Tensor]) -> None:
            cut = row.tiles[index]
            of_tile = None if of_hidden is None else row.of_piece(of_hidden, cut)
            of_output = None if of_output is None else row.of_piece(of_output, cut)
            _through(Tile(row, cut, of_output is None), hidden_of(index), of_output, of_tile, of_pair, [*sums.values()])

        with (
            _random_apart(device),
            torch.autocast(device.type, ctx.autocast, enabled=ctx.autocast is not None, cache_enabled=False),
        ):
            row.keep_all(hidden_of, range(len(row.tiles) if row.shared else len(row.tiles) - 1))
            back = row.exchange() if row.shared else None
            of_pair = row.zeros()
            for index in reversed(range(len(row.tiles))):
                through(index, gradient, of_pair)
            if back is not None:
                others = back(of_pair)
                row.forget()
                row.first = row.piece.start
                del back, of_pair
                for index in row.read_by_others():
                    through(index, None, others)
        row.forget()
        return None, None, of_hidden, *(sums[i].taken() if i in sums else None for i in range(len(ctx.parameters)))


def _through(
    tile: Tile,
    hidden: Tensor,
    of_output: Tensor | None,
    of_hidden: Tensor | None,
    of_pair: list[Tensor],
    sums: list["_Sum"],
) -> None:
    """The backward pass of one tile.

    Args:
        hidden: (B, T, E), the layer's input; its gradient is written to `of_hidden`.
        of_output: (B, T, E); None where a gradient goes through keys and values alone, and is added to `of_hidden`.
        of_pair: gradients of the row's keys and values. Those of the tile's own are whole; its earlier ones' are added.
    """
    row = tile.row
    hidden = hidden.detach().requires_grad_(of_hidden is not None)
    with torch.enable_grad():
        # a view, because hooks on modules (FlopCounterMode's) cannot follow leaves in here
        output = row.run(hidden.view_as(hidden), tile)
    outputs, gradients = ([], []) if output is None else ([output], [of_output])
    if of_output is None or tile.stop < row.piece.stop:
        for own, total in zip(cast(Any, tile.own), of_pair, strict=True):
            if own.requires_grad:
                outputs.append(own)
                gradients.append(row.of_tokens(total, tile.start, tile.stop).to(own.dtype))
    earlier = [x for _, _, *pair in tile.taken for x in pair]
    inputs = [*earlier, *([] if of_hidden is None else [hidden]), *(each.parameter for each in sums)]
    found = torch.autograd.grad(outputs, inputs, gradients, allow_unused=True)
    for place, (first, heads, *_) in enumerate(tile.taken):
        for total, part in zip(of_pair, found[2 * place : 2 * place + 2], strict=True):
            if part is not None:
                row.of_tokens(total, first, tile.start)[:, heads] += part
    if of_hidden is not None:
        (of_hidden.copy_ if of_output is not None else of_hidden.add_)(found[len(earlier)])


def _random_apart(device: torch.device) -> Any:
    """What is drawn inside changes nothing of what is drawn after it."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


class _Sum:
    """The gradient of a parameter, summed over tiles in float32 at least; a tile's own lives just to be added."""

    def __init__(self, parameter: Tensor):
        self.parameter = parameter
        self.total: Tensor | None = None
        self.hook = parameter.register_hook(self._add)

    def _add(self, gradient: Tensor) -> Tensor:
        if self.total is None:
            self.total = torch.zeros_like(gradient, dtype=torch.promote_types(gradient.dtype, torch.float32))
        self.total += gradient
        return gradient.new_zeros(()).expand_as(gradient)

    def taken(self) -> Tensor | None:
        self.hook.remove()
        return None if self.total is None else self.total.to(self.parameter.dtype)


def _random_state(like: Tensor) -> tuple[Tensor, Any]:
    return torch.get_rng_state(), get_device_states(like) if like.is_cuda else None


def _set_random_state(state: tuple[Tensor, Any]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        set_device_states(*state[1])


class TiledLayer:
    """Stands for the forward of a decoder layer; a class, so that the model can still be pickled."""

    def __init__(self, forward: Callable[..., Any], tile: int, offload: bool):
        self.forward, self.tile, self.offload = forward, tile, offload

    @property
    def module(self) -> nn.Module:
        return cast(Any, self.forward).__self__

    @torch.compiler.disable
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.module.training:  # its own full attention
            return self.forward(*args, **kwargs)
        arguments = inspect.signature(self.forward).bind(*args, **kwargs)
        name, hidden = next(iter(arguments.arguments.items()))
        arguments.arguments[name] = None  # else it would be kept for as long as the other arguments
        parameters = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        row = Row(self.forward, arguments, hidden.shape[1], self.tile)
        output = _InTiles.apply(row, self.offload, hidden, *parameters)
        kind, rest = row.gives
        return (output, *[None] * rest) if issubclass(kind, tuple) else output


def tile_layers(model: PreTrainedModel, tile: int, offload: bool = False) -> None:
    """Make each decoder layer of `model`, and its final norm, run on `tile` tokens of a row at a time in training.

    Stands in for gradient checkpointing of the layers, which must be off.

    Args:
        model: a decoder that trains with S2-Attn or will, with its adapters; changed in place.
        tile: T.
        offload: keep the layers' inputs in the host's memory.

    Raises:
        UserError: as `refuse_layer_tiles`.
    """
    refuse_layer_tiles(model)
    for layer in decoder_layers(model):
        own = layer.forward.forward if isinstance(layer.forward, TiledLayer) else layer.forward
        layer.forward = TiledLayer(own, tile, offload)
    norms = norm_modules(model)
    for child in decoder_of(model).children():
        if any(norm is part for norm in norms.values() for part in (child, getattr(child, "original_module", None))):
            in_tiles(child, tile)


def refuse_layer_tiles(model: PreTrainedModel) -> None:
    """Raises UserError where layers cannot be told, carry a state from token to token, or have a router with a loss."""
    name, config = type(model).__name__, model.config.get_text_config()
    decoder_layers(model)
    if getattr(config, "output_router_logits", False):
        raise UserError(
            f"--layer-tile cannot serve {name} with output_router_logits: its router's loss looks at whole rows. Set "
            "it to false in the model's config.json, or leave --layer-tile out."
        )
    if "linear_attention" in (getattr(config, "layer_types", None) or ()):
        raise UserError(
            f"--layer-tile cannot serve {name}: its linear attention carries a state from token to token; leave it out."
        )
