"""Decoder layers on a tile of tokens at a time, forward and backward: gradient checkpointing cut finer.

Of the row's size there are the layer's input and output, their gradients, and its keys and values with theirs. A tile
takes the layer's own forward, whatever that is; its attention finds which piece is at work (`longlora.model.pieces`),
leaves its keys and values, and takes those of earlier tiles:

    forward    tiles first to last, no graph; keys and values are kept while the layer lasts
    backward   keys and values of all tiles again; then the tiles last to first, each computed anew under autograd.
               What a tile gives the keys and values of earlier tiles waits for them, summed in float32

So one computation of keys and values (and of the queries beside them) comes on top of gradient checkpointing's.

Shapes: B rows, N tokens, T tokens of a tile, E hidden size, Hkv KV heads, D width.
"""

import inspect
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import get_device_states, set_device_states
from transformers import PreTrainedModel

from longlora.errors import UserError
from longlora.model.adapters import norm_modules
from longlora.model.memory_saving import offloaded_activations
from longlora.model.memory_saving.tiled_mlp import casts_of_its_own, decoder_layers, in_tiles
from longlora.model.pieces import Cut, Earlier, Piece, Reads


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
        super().__init__(*cut, row.length, row.padding, row.positions)
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
            self.row.keep(self.start, key, value)
        if self.only_keys:
            raise _KeysAreKnown
        if (needed := reads((self.start, self.stop))) is None:
            return key, value, None
        first, first_head, last_head = needed
        heads = slice(first_head, last_head)
        earlier_key, earlier_value = (x[:, heads, first : self.start].detach() for x in self.row.pair())
        if torch.is_grad_enabled():
            earlier_key, earlier_value = earlier_key.requires_grad_(), earlier_value.requires_grad_()
            self.taken.append((first, heads, earlier_key, earlier_value))
        return key, value, (first, first_head, earlier_key, earlier_value)


class Row:
    """One pass of one layer over rows of N tokens.

    Attributes:
        padding: (B, N), nonzero where there is a token, or None.
        positions: (B, N) or (1, N), or None.
    """

    def __init__(self, layer: "TiledLayer", arguments: inspect.BoundArguments, length: int):
        self.layer, self.arguments, self.length = layer, arguments, length
        self.tiles = [(start, min(start + layer.tile, length)) for start in range(0, length, layer.tile)]
        named = _named(arguments)
        mask, self.positions = named.get("attention_mask"), named.get("position_ids")
        self.padding = mask if mask is None or isinstance(mask, Tensor) else mask.padding
        self._pair: tuple[Tensor, Tensor] | None = None

    def run(self, hidden: Tensor, tile: Tile) -> Tensor:
        """The layer's own forward of a tile's `hidden (B, T, E)`."""

        cut = self.length, tile.start, tile.stop
        keywords = {name: _of_tile(x, *cut) for name, x in self.arguments.kwargs.items()}
        with tile.work():
            output = self.layer.forward(hidden, *(_of_tile(x, *cut) for x in self.arguments.args[1:]), **keywords)
        name = type(self.layer.module).__name__
        if tile.own is None:
            raise UserError(
                f"{name} computes no attention that knows of tiles: --layer-tile serves layers that train with S2-Attn "
                "(longlora.use_shifted_attention); leave it out."
            )
        hidden, *rest = output if isinstance(output, tuple) else (output,)
        if any(isinstance(x, Tensor) for x in rest):
            raise UserError(f"{name} gives more than hidden states: --layer-tile cannot serve it; leave it out.")
        self.layer.gives = type(output), len(rest)
        return hidden

    def keep(self, start: int, key: Tensor, value: Tensor) -> None:
        """Keys and values of the tokens from `start` on, for later tiles."""
        if len(self.tiles) == 1:
            return
        if self._pair is None:
            self._pair = _of_length(key, self.length, key.dtype), _of_length(value, self.length, value.dtype)
        for whole, part in zip(self._pair, (key, value), strict=True):
            whole[:, :, start : start + part.shape[2]] = part

    def pair(self) -> tuple[Tensor, Tensor]:
        """Keys (B, Hkv, N, D) and values (B, Hkv, N, Dv), right before the tile at work."""
        assert self._pair is not None, "attention asks for earlier tokens only where there are some"
        return self._pair

    def keep_all(self, tiles: Callable[[int], Tensor]) -> list[Tensor]:
        """Keys and values of all `tiles` but the last, which no other reads; returns zeros for their gradients."""
        with torch.no_grad():
            for index, cut in enumerate(self.tiles[:-1]):
                try:
                    self.run(tiles(index), Tile(self, cut, only_keys=True))
                except _KeysAreKnown as known:
                    known.__traceback__ = None  # its frames hold tensors, and a reference to it
        kept = [] if self._pair is None else self._pair
        return [_of_length(x, self.length, torch.promote_types(x.dtype, torch.float32)).zero_() for x in kept]

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


class _InTiles(torch.autograd.Function):
    """(Row, hidden (B, N, E), parameters that train) -> (B, N, E)."""

    @staticmethod
    def forward(ctx: Any, row: Row, hidden: Tensor, *parameters: Tensor) -> Tensor:
        ctx.row, ctx.parameters, ctx.kind = row, parameters, (hidden.dtype, hidden.device)
        device = hidden.device.type
        ctx.autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        ctx.random_states = []
        hidden = hidden.detach()
        whole: Tensor | None = None
        with casts_of_its_own(device):
            for start, stop in row.tiles:
                ctx.random_states.append(_random_state(hidden))
                output = row.run(hidden[:, start:stop], Tile(row, (start, stop)))
                if whole is None:
                    whole = output.new_empty(hidden.shape)
                whole[:, start:stop] = output
                del output
        row.forget()
        if row.layer.offload:
            ctx.on_host = [offloaded_activations.to_host(hidden[:, start:stop]) for start, stop in row.tiles]
        else:
            ctx.save_for_backward(hidden)
        return cast(Tensor, whole)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        row, (gradient,), (dtype, device) = ctx.row, gradients, ctx.kind
        saved = None if row.layer.offload else ctx.saved_tensors[0]
        sums = {i: _Sum(ctx.parameters[i]) for i, needed in enumerate(ctx.needs_input_grad[2:]) if needed}
        of_hidden = torch.empty(gradient.shape, dtype=dtype, device=device) if ctx.needs_input_grad[1] else None

        def hidden_of(index: int) -> Tensor:
            start, stop = row.tiles[index]
            _set_random_state(ctx.random_states[index])
            return (
                offloaded_activations.from_host(ctx.on_host[index], device) if saved is None else saved[:, start:stop]
            )

        with (
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            torch.autocast(device.type, ctx.autocast, enabled=ctx.autocast is not None, cache_enabled=False),
        ):
            of_pair = row.keep_all(hidden_of)
            for index in reversed(range(len(row.tiles))):
                of_tile = None if of_hidden is None else of_hidden[:, slice(*row.tiles[index])]
                _through(row, row.tiles[index], hidden_of(index), gradient, of_tile, of_pair, list(sums.values()))
        row.forget()
        return None, of_hidden, *(sums[i].taken() if i in sums else None for i in range(len(ctx.parameters)))


def _through(
    row: Row,
    cut: Cut,
    hidden: Tensor,
    gradient: Tensor,
    of_hidden: Tensor | None,
    of_pair: list[Tensor],
    sums: list["_Sum"],
) -> None:
    """The backward pass of one tile.

    Args:
        hidden: (B, T, E), the layer's input; its gradient is written to `of_hidden`.
        gradient: (B, N, E), of the layer's output.
        of_pair: gradients of the row's keys and values. Those of the tile's own are whole; its earlier ones' are added.
    """
    (start, stop), tile = cut, Tile(row, cut)
    hidden = hidden.detach().requires_grad_(of_hidden is not None)
    with torch.enable_grad():
        # a view, because hooks on modules (FlopCounterMode's) cannot follow leaves in here
        outputs, of_outputs = [row.run(hidden.view_as(hidden), tile)], [gradient[:, start:stop]]
    if stop < row.length:
        for own, total in zip(cast(Any, tile.own), of_pair, strict=True):
            if own.requires_grad:
                outputs.append(own)
                of_outputs.append(total[:, :, start:stop].to(own.dtype))
    earlier = [x for _, _, *pair in tile.taken for x in pair]
    inputs = [*earlier, *([] if of_hidden is None else [hidden]), *(each.parameter for each in sums)]
    found = torch.autograd.grad(outputs, inputs, of_outputs, allow_unused=True)
    for place, (first, heads, *_) in enumerate(tile.taken):
        for total, part in zip(of_pair, found[2 * place : 2 * place + 2], strict=True):
            if part is not None:
                total[:, heads, first:start] += part
    if of_hidden is not None:
        of_hidden.copy_(found[len(earlier)])


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
        self.gives: tuple[type, int] = (Tensor, 0)

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
        output = _InTiles.apply(Row(self, arguments, hidden.shape[1]), hidden, *parameters)
        kind, rest = self.gives
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
    for child in model.get_decoder().children():
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
