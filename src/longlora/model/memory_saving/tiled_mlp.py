"""The feed-forward part of a layer on a tile of tokens at a time (ALST, arXiv 2506.13996, section 3.1).

A feed-forward part keeps several times the width of the hidden states for each token of a row. It treats each token
alone, so a tile at a time is the same function; each tile is computed anew in its backward pass, and what it keeps
lives no longer than that:

    hidden (B, N, E) ──► tiles (1, tile, E) ──► up, gate, down ──► joined (B, N, E)

Gradients are exact, those of LoRA matrices and of trained weights inside too: autograd sums them over the tiles.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from longlora.errors import UserError
from longlora.model.lm_head import decoder_of

NAMES = ("mlp", "feed_forward", "feedforward", "ffn")
"""What families call the feed-forward part of a layer."""


class TiledForward:
    """Stands for the forward of a feed-forward module; a class, so that the model can still be pickled."""

    def __init__(self, forward: Callable[[Tensor], Tensor], tile: int):
        self.forward, self.tile = forward, tile

    def __call__(self, hidden: Tensor) -> Tensor:
        """Takes and returns `(…, E)`; a row of one tile takes the module's own forward."""
        tokens = hidden.flatten(0, -2)
        if len(tokens) <= self.tile:
            return self.forward(hidden)
        tiles = tokens.unsqueeze(0).split(self.tile, dim=1)
        if torch.is_grad_enabled():
            with casts_of_its_own(hidden.device.type):
                done = [checkpoint(self.forward, tile, use_reentrant=False) for tile in tiles]
        else:
            done = [self.forward(tile) for tile in tiles]
        return torch.cat(done, dim=1).view(*hidden.shape[:-1], -1)


def casts_of_its_own(device: str) -> AbstractContextManager:
    """Autocast as it is, but for its cache of weights: gradients of a shared cast would be summed in its precision."""
    if not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, dtype=torch.get_autocast_dtype(device), cache_enabled=False)


def tile_mlp(model: PreTrainedModel, tile: int | None = None) -> int:
    """Make each feed-forward part of `model` run a tile of tokens at a time, in training and in evaluation.

    Args:
        model: a plain decoder, before or after adapters were added to it; changed in place.
        tile: tokens of a tile; default the width of the hidden states (ALST cuts a row into ceil(N / E) tiles).

    Returns:
        Tokens of a tile.

    Raises:
        UserError: as `feedforward_modules`.
    """
    tile = tile or model.config.get_text_config().hidden_size
    for module in feedforward_modules(model):
        in_tiles(module, tile)
    return tile


def in_tiles(module: nn.Module, tile: int) -> None:
    """Make `module`, which treats each token alone, run `tile` tokens at a time."""
    own = module.forward.forward if isinstance(module.forward, TiledForward) else module.forward
    module.forward = TiledForward(own, tile)


def feedforward_modules(model: PreTrainedModel) -> list[nn.Module]:
    """The feed-forward module of each layer, by name: what takes hidden states and gives hidden states.

    Raises:
        UserError: a layer has none under a name that is known, or its experts choose among tokens.
    """
    found = []
    for layer in decoder_layers(model):
        module = next((child for name, child in layer.named_children() if name in NAMES), None)
        if any(True for _ in _experts(layer)):
            raise UserError(
                f"--tiled-mlp cannot serve {type(model).__name__}: its experts route the tokens of a whole row, which "
                "tiles would hide from the router's loss; leave it out."
            )
        if module is None or not any(isinstance(part, nn.Linear | Conv1D) for part in module.modules()):
            raise UserError(
                f"--tiled-mlp cannot serve {type(model).__name__}: its layers have no module called "
                f"{', '.join(NAMES[:-1])} or {NAMES[-1]}; leave it out."
            )
        found.append(module)
    return found


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The layers of the decoder.

    Raises:
        UserError: they are not in one list.
    """
    count = model.config.get_text_config().num_hidden_layers
    for module in decoder_of(model).children():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise UserError(f"{type(model).__name__} does not keep its {count} layers in one list: its layers cannot be told.")


def _experts(layer: nn.Module) -> Iterator[str]:
    """Names of what makes a mixture: experts, stacked or listed."""
    for name, module in layer.named_modules():
        if name.rpartition(".")[2] == "experts" or "experts" in type(module).__name__.lower():
            yield name
