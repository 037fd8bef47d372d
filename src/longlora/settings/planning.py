"""Knobs of `longlora plan`."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import tyro

from longlora.errors import UserError
from longlora.settings.extension import ExtensionSettings
from longlora.settings.fields import AtLeast, choice

DEVICES: dict[str, tuple[int, float]] = {
    "a100": (80, 312e12),
    "a100-40gb": (40, 312e12),
    "a6000": (48, 154.8e12),
    "b200": (180, 2250e12),
    "h100": (80, 989e12),
    "h200": (141, 989e12),
    "l40s": (48, 362e12),
    "mi300x": (192, 1307e12),
    "rtx3090": (24, 71e12),
    "rtx4090": (24, 165.2e12),
    "rtx5090": (32, 209.5e12),
}
"""GPU -> its memory in GB and its peak rate in bfloat16, dense, accumulating in float32, in FLOP/s (data sheets)."""

MEASURES = ("auto", "gpu", "fake", "process")


@dataclass(frozen=True, kw_only=True)
class PlanSettings(ExtensionSettings):
    """What extending MODEL would cost: operations, memory by part, the longest context that fits, time, a recipe.

    Takes what `longlora extend` takes, so that a recipe can be planned as it stands (`--config`).
    """

    everyday: ClassVar = tuple(
        "context device gpus shard method train steps batch memory measure data evaluation_data config json".split()
    )

    model: tyro.conf.Positional[str]
    """A built-in shape (`llama2-7b`, `llama3-8b`, `qwen3-8b`, `smollm2-135m`, …), `demo`, a hub id, a folder, a .gguf
    file, or a run directory; only the config is read."""

    gpus: Annotated[int, AtLeast(1)] = 1
    """GPUs that train together."""

    device: Annotated[str, choice(tuple(DEVICES))] = "a100"
    """GPU whose memory and peak rate are planned with."""

    flops_per_second: float | None = None
    """Peak rate of one GPU in FLOP/s; default that of `device`."""

    utilisation: float = 0.4
    """Share of the peak rate that training reaches; `--measure` on a GPU shows the real one."""

    shard: bool = False
    """Divide weights, gradients and optimizer over the GPUs (FSDP2); default each GPU has them all."""

    link_bytes_per_second: float = 50e9
    """Bytes a second from one GPU to its neighbour, for what `sequence_parallel` passes on; default InfiniBand at 400
    Gbit/s. Give what your machines measure."""

    measure: bool = False
    """Run training steps on a randomly initialised model of this shape, at contexts that double, and print what they
    take beside what was predicted."""

    measure_by: Annotated[str, choice(MEASURES)] = "auto"
    """`gpu` is CUDA's allocator; `fake` is PyTorch's fake tensors, which hold no data and take no memory; `process` is
    the peak of this process on the CPU; `auto` is the GPU where there is one, else `fake`."""

    measure_layers: Annotated[int | None, AtLeast(1)] = None
    """Measure a model of this many layers, beside a prediction for as many; default all."""

    measure_limit: Annotated[int | None, AtLeast(1)] = None
    """Longest context to measure, in tokens; default `--context`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        pieces = self.training.sequence_parallel
        if self.gpus % pieces:
            raise UserError(
                f"--sequence-parallel is {pieces}: it must divide --gpus, {self.gpus}, so that each row has its GPUs."
            )
        if self.shard and self.gpus == 1:
            raise UserError("--shard divides over GPUs, and --gpus is 1: give at least 2, or leave --shard out.")
        rows = self.training.device_batch * (self.gpus // pieces)
        if self.training.batch % rows:
            raise UserError(
                f"--batch is {self.training.batch}: it must be a multiple of the rows that the GPUs hold at a time, "
                f"{rows}."
            )
        training, train = self.training, self.trainable.train
        self.memory.check(training.gradient_checkpointing, train)
        if not 0 < self.utilisation <= 1:
            raise UserError(f"--utilisation is {self.utilisation:g}: it must be a share from 0 to 1, and above 0.")
        if not self.link_bytes_per_second > 0:
            raise UserError(f"--link-bytes-per-second is {self.link_bytes_per_second}: it must be above 0.")
        if self.flops_per_second is not None and not self.flops_per_second > 0:
            raise UserError(f"--flops-per-second is {self.flops_per_second}: it must be above 0.")
        self._check_measuring()

    def _check_measuring(self) -> None:
        for name in ("measure_by", "measure_layers", "measure_limit"):
            flag, given = name.replace("_", "-"), getattr(self, name)
            if given not in (None, "auto") and not self.measure:
                raise UserError(f"--{flag} is for --measure: give that too, or leave it out.")
        if self.measure_by == "process" and (self.memory.offload_activations or self.memory.offload_optimizer):
            raise UserError(
                "--measure-by process runs on the CPU, whose memory is the host's, and there is nowhere to offload to: "
                "give fake or gpu."
            )
        if self.measure_by == "fake" and self.memory.base_bits:
            raise UserError("a 4-bit base is made of real numbers, not of fake ones: give --measure-by process or gpu.")

    @property
    def gpu_bytes(self) -> int:
        """Memory of one GPU in bytes."""
        return self.memory.bytes_to_fit or DEVICES[self.device][0] * 10**9

    @property
    def rate(self) -> float:
        """Operations a second of one GPU that training is expected to reach."""
        return (self.flops_per_second or DEVICES[self.device][1]) * self.utilisation
