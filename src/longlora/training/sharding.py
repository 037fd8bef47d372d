"""FSDP2: the weights divided over the processes, every decoder layer a unit, handed out by the first process.

    process 0    whole model in the host's memory ──► unit by unit: broadcast ──► its own part, the rest is freed
    the others   model without weights (meta)      ──►              receive   ──► their own part

So the machines hold one copy of the model among them and a device never more than its part and one unit. A unit is
gathered when it is computed and given back after; embedding, last norm and LM head are one unit that stays gathered
for a step, as the chunks of the loss want.
"""

import ctypes
import mmap
import os
import sys
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from longlora import ranks
from longlora.model.lm_head import unwrapped
from longlora.model.memory_saving.tiled_mlp import decoder_layers


def is_sharded(model: nn.Module) -> bool:
    """Whether this process holds only a part of the weights, by FSDP2."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def is_to_be_sharded() -> bool:
    """Whether this run divides its model with FSDP2."""
    return ranks.engine() == "FSDP" and ranks.world_size() > 1


def loads_weights() -> bool:
    """Whether this process reads the weights from disk; the others get theirs from the first in `shard`."""
    return ranks.rank() == 0 or not is_to_be_sharded()


def device() -> torch.device:
    """Where this process trains."""
    return torch.device("cuda", ranks.local_rank()) if torch.cuda.is_available() else torch.device("cpu")


def shard(model: nn.Module) -> nn.Module:
    """Divide `model`, adapters and all, over the processes; changes it in place and returns it.

    Args:
        model: on the CPU; in processes that do not read the weights its parameters may be on the meta device.

    Raises:
        UserError: its decoder does not keep its layers in one list.
    """
    place = device()
    mesh = init_device_mesh(place.type, (ranks.world_size(),))
    options: dict[str, Any] = {"mesh": mesh}
    if os.environ.get("FSDP_OFFLOAD_PARAMS", "false").lower() == "true":
        options["offload_policy"] = CPUOffloadPolicy()
    again = os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() != "false"
    give_back_large_blocks()
    for layer in decoder_layers(unwrapped(model)):
        whole_weights = _hand_out(layer, place)
        fully_shard(layer, reshard_after_forward=again, **options)
        _forget(whole_weights, model)
    whole_weights = _hand_out(model, place)
    fully_shard(model, **options)
    _forget(whole_weights, model)
    return model


def whole(parameter: Tensor) -> Tensor:
    """All of a parameter that may be sharded, on its device; every process must call."""
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def give_back_large_blocks() -> None:
    """Has glibc take each large block from the system and return it, instead of a heap that is riddled by and by.

    Where a CPU trains one layer of width 32 on 1,000,000 tokens, the chunks of the loss take 2.75 GB so, and 20.9 GB
    of holes otherwise; where weights are handed out, what was freed is there for the next unit.
    """
    m_mmap_threshold = -3  # malloc.h
    if sys.platform.startswith("linux"):
        with suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL(None).mallopt(m_mmap_threshold, 2**16)


def _hand_out(unit: nn.Module, place: torch.device) -> list[Tensor]:
    """Put what of `unit` is not sharded yet on `place`, as it is in the first process.

    Returns:
        The weights that were in the host's memory before.
    """
    before = []
    for tensor in _waiting(unit):
        if tensor.is_meta:
            empty = torch.empty_like(tensor, device=place)
            mine = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
            torch.utils.swap_tensors(tensor, mine)
        else:
            if tensor.device.type == "cpu" and isinstance(tensor, nn.Parameter):
                before.append(tensor.detach())
            tensor.data = tensor.data.to(place)
        distributed.broadcast(tensor.data, src=0)
    return before


def _forget(weights: list[Tensor], model: nn.Module) -> None:
    """Let the system have back the pages of `weights`, which are sharded now.

    A file that is mapped stays mapped until the last tensor in it has gone, and what was read of it would stay in
    memory as long. `weights` are the last to hold these pages, so that nothing else can have taken their place; what
    the rest of `model` shares with them stays.
    """
    if not sys.platform.startswith("linux"):
        return
    page, madv_dontneed = mmap.PAGESIZE, 4
    kept = [(t.data_ptr(), t.data_ptr() + t.nbytes) for t in _waiting(model) if t.device.type == "cpu"]
    with suppress(OSError, AttributeError):
        advise = ctypes.CDLL(None).madvise
        for weight in weights:
            first = -(-weight.data_ptr() // page) * page
            last = (weight.data_ptr() + weight.nbytes) // page * page
            if last > first and not any(begin < last and first < end for begin, end in kept):
                advise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), madv_dontneed)


def _waiting(unit: nn.Module) -> Iterable[Tensor]:
    return [tensor for tensor in (*unit.parameters(), *unit.buffers()) if not isinstance(tensor, DTensor)]
