"""Gradient checkpointing as settings have it: of whole layers or of tiles, its saved inputs on the device or the host.

For whole layers transformers does the work (`offload` of its gradient checkpointing, over
`torch.autograd.graph.save_on_cpu`): the copy goes to pinned memory in the forward pass and comes back when its layer is
computed anew. Layers in tiles do both by themselves.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn

from longlora.errors import UserError
from longlora.settings import MemorySettings


def checkpointing_arguments(gradient_checkpointing: bool, memory: MemorySettings) -> dict[str, Any]:
    """What `TrainingArguments` are told of it."""
    offload = {"offload": True} if memory.offload_activations else {}
    return {
        "gradient_checkpointing": gradient_checkpointing and not memory.layer_tile,
        "gradient_checkpointing_kwargs": {"use_reentrant": False} | offload,
    }


def refuse_checkpointing(name: str, can: bool, asked: bool) -> None:
    """Raises UserError where gradient checkpointing is `asked` of a model, called `name`, that has none."""
    if asked and not can:
        raise UserError(f"{name} has no gradient checkpointing in transformers: give --no-gradient-checkpointing.")


def checkpoint_layers(model: nn.Module, offload: bool = False) -> None:
    """What the Trainer does at its start with `checkpointing_arguments`, for a step without a Trainer."""
    # the newer name; transformers before 5.20 has the older alone
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    cast(Any, enable)({"use_reentrant": False}, offload=offload)


def to_host(tensor: Tensor) -> Tensor:
    """A copy in the host's memory, pinned where `tensor` is on a GPU; it need not be whole before its stream is."""
    empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=tensor.is_cuda)
    return empty.copy_(tensor, non_blocking=True)


def from_host(tensor: Tensor, device: torch.device) -> Tensor:
    """What `to_host` gave, on `device` again."""
    return tensor.to(device, non_blocking=True)
