"""Knobs of what makes a long row fit: switches that trade time, the host's memory or precision for the device's."""

import re
from dataclasses import dataclass, replace
from typing import Annotated

from longlora.errors import UserError
from longlora.settings.fields import AtLeast, Checked, choice

MEMORY = ("manual", "auto")

LOSS_KERNELS = ("auto", "chunked", "liger")

LAYER_TILE = 8192
"""Tokens of a layer's tile that `--memory auto` takes: enough to keep a GPU busy."""

_UNITS = {"MB": 10**6, "MIB": 2**20, "GB": 10**9, "GIB": 2**30}


@dataclass(frozen=True, kw_only=True)
class MemorySettings(Checked):
    """What makes a longer context fit, besides `--gradient-checkpointing` and `--loss-chunk`."""

    memory: Annotated[str, choice(MEMORY)] = "manual"
    """`auto` turns on the cheapest switches with which the context fits, gradient checkpointing among them, and says
    what it chose and why; `manual` takes the switches as they are given."""

    offload_activations: bool = False
    """Keep in the host's memory what gradient checkpointing saves."""

    layer_tile: Annotated[int | None, AtLeast(1, "tokens")] = None
    """Tokens of a row that a decoder layer takes at a time, forward and backward; default all. It is gradient
    checkpointing cut finer; 8192 keeps a GPU busy."""

    tiled_mlp: bool = False
    """Run the feed-forward part of a layer on a tile of tokens at a time (ALST, arXiv 2506.13996)."""

    mlp_tile: Annotated[int | None, AtLeast(1, "tokens")] = None
    """Tokens of such a tile; default the width of the hidden states, as in ALST."""

    offload_optimizer: bool = False
    """Keep AdamW's moments in the host's memory and step there."""

    base_bits: int | None = None
    """4 for a frozen base in 4-bit NormalFloat (QLoRA, arXiv 2305.14314; needs longlora[quant]); default the precision
    of `--dtype`."""

    loss_kernel: Annotated[str, choice(LOSS_KERNELS)] = "auto"
    """`chunked` computes the logits of `--loss-chunk` tokens, and again in the backward pass; `liger` computes them
    once, with Liger's fused kernel (CUDA, longlora[gpu]); `auto` takes liger where it can serve the model."""

    gpu_memory: str | None = None
    """Memory to fit into, such as 80GB or 24GiB; default what is free on the GPU, or on the CPU in this machine (for
    `plan` what `--device` has)."""

    reserve: float = 0.1
    """Share of that memory left free, for CUDA's context, fragmentation and the error of the prediction."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.base_bits not in (None, 4):
            raise UserError(f"--base-bits is {self.base_bits}: it must be 4, or left out for a base as --dtype says.")
        if self.mlp_tile is not None and not self.tiled_mlp and self.memory == "manual":
            raise UserError("--mlp-tile is the tile of --tiled-mlp: give that too, or leave it out.")
        if self.layer_tile is not None and self.tiled_mlp:
            raise UserError("--tiled-mlp has no effect with --layer-tile, whose tiles hold the MLP: leave it out.")
        if not 0 <= self.reserve < 1:
            raise UserError(f"--reserve is {self.reserve:g}: it must be a share from 0 up to, not including, 1.")
        _ = self.bytes_to_fit

    @property
    def bytes_to_fit(self) -> int | None:
        """`gpu_memory` in bytes.

        Raises:
            UserError: it is no size.

        >>> MemorySettings(gpu_memory="1.5GiB").bytes_to_fit
        1610612736
        """
        if self.gpu_memory is None:
            return None
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([MG]i?B)", self.gpu_memory.strip(), re.IGNORECASE)
        size = round(float(found[1]) * _UNITS[found[2].upper()]) if found else 0
        if size <= 0:
            raise UserError(f"--gpu-memory is '{self.gpu_memory}': it must be a size such as 80GB or 24GiB.")
        return size

    def check(self, gradient_checkpointing: bool, train: tuple[str, ...], trains: bool = False) -> None:
        """Raises UserError where a switch does not go with what trains, or no gradient checkpointing.

        Args:
            gradient_checkpointing: it is on.
            train: parts that train.
            trains: of a command that trains, for which sizes say something only where switches are chosen by them.
        """
        manual = self.memory == "manual"
        for name, does in (("layer_tile", "is it in tiles"), ("offload_activations", "moves what it saves")):
            if getattr(self, name) and not gradient_checkpointing and manual:
                raise UserError(
                    f"--{name.replace('_', '-')} has no effect without gradient checkpointing ({does}): leave out "
                    "--no-gradient-checkpointing."
                )
        if self.base_bits == 4 and "full" in train:
            raise UserError("--base-bits is 4 but every weight trains: leave it out, or train lora, norm and embed.")
        for name in ("gpu_memory", "reserve"):
            if trains and manual and getattr(self, name) != getattr(type(self), name):
                flag = "--" + name.replace("_", "-")
                raise UserError(f"{flag} is for --memory auto, which fits into it: give that too, or leave it out.")

    def resolved(self) -> "MemorySettings":
        """The same switches as given by hand, with nothing left to choose by memory."""
        tile = self.mlp_tile if self.tiled_mlp else None
        usual = type(self)
        return replace(self, memory="manual", mlp_tile=tile, gpu_memory=usual.gpu_memory, reserve=usual.reserve)
