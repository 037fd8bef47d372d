"""Gradient checkpointing whose saved activations, one input a layer, wait in the host's memory.

transformers does the work (`offload` of its gradient checkpointing, over `torch.autograd.graph.save_on_cpu`): the copy
goes to pinned memory in the forward pass and comes back when its layer is computed anew.
"""

from typing import Any, cast

from torch import nn


def checkpointing_arguments(offload: bool) -> dict[str, Any]:
    """`TrainingArguments.gradient_checkpointing_kwargs`."""
    return {"use_reentrant": False} | ({"offload": True} if offload else {})


def checkpoint_layers(model: nn.Module, offload: bool = False) -> None:
    """What the Trainer does at its start with `checkpointing_arguments`, for a step without a Trainer."""
    # the newer name; transformers before 5.20 has the older alone
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    cast(Any, enable)({"use_reentrant": False}, offload=offload)
