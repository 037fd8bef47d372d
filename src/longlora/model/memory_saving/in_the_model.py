"""The switches that are part of the model while it trains and is measured: a 4-bit base, a tiled MLP."""

import os

import torch
from transformers import PreTrainedModel

from longlora.model.memory_saving.four_bit_base import quantise_base
from longlora.model.memory_saving.tiled_mlp import tile_mlp
from longlora.settings import MemorySettings


def save_memory_in(model: PreTrainedModel, memory: MemorySettings) -> PreTrainedModel:
    """Give a plain `model` what `memory` has of the two; changes it in place and returns it.

    Args:
        model: on its device, or on the CPU if its base is to be quantised: it then moves to this process's GPU, if any.

    Raises:
        UserError: bitsandbytes is missing, or a switch cannot serve this model.
    """
    if memory.base_bits:
        gpu = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        quantise_base(model, gpu if torch.cuda.is_available() else "cpu")
    if memory.tiled_mlp:
        tile_mlp(model, memory.mlp_tile)
    return model
