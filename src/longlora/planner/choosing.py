"""`--memory auto`: the cheapest switches with which a run fits this device; and switches that cannot act here, refused.

What is chosen is what `longlora plan` would recommend for the memory that is free now. Nothing is left out in
silence: each switch that cannot act on this device, on this model or in this installation is named with its reason.
"""

import logging
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from transformers import PreTrainedConfig

from longlora import ranks
from longlora.errors import UserError
from longlora.model.memory_saving.four_bit_base import four_bit_is_here
from longlora.model.memory_saving.liger_loss import refuse_liger_here
from longlora.planner.fitting import Fit, with_switches
from longlora.planner.reading import read_anatomy
from longlora.planner.table import SAYS
from longlora.settings import (
    AttentionSettings,
    MemorySettings,
    PlanSettings,
    PositionSettings,
    TrainableSettings,
    TrainingSettings,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MemoryNeed:
    """What the choice depends on."""

    name: str
    """MODEL, for messages."""
    config: PreTrainedConfig
    context: int
    """Tokens of the longest row."""
    attention: AttentionSettings
    trainable: TrainableSettings
    training: TrainingSettings
    memory: MemorySettings
    trust_remote_code: bool = False
    four_bit: bool = True
    """The base can be quantised: no adapter on it goes on training."""


@dataclass(frozen=True)
class Choice:
    """The switches of a run, all given by hand now."""

    memory: MemorySettings
    gradient_checkpointing: bool


def choose_memory(run: MemoryNeed) -> Choice:
    """The switches that `run` trains with: as given, or with `--memory auto` the cheapest with which it fits; logged.

    Raises:
        UserError: a switch that was asked for cannot act here, or nothing makes the run fit.
    """
    lacking = not_here()
    if not run.four_bit:
        lacking["base_bits"] = "an adapter goes on training"
    for switch, flag in _FLAGS.items():
        if getattr(run.memory, switch) and switch in lacking:
            raise UserError(f"{flag} cannot act here: {lacking[switch]}. Leave it out.")
    if run.memory.loss_kernel == "liger":
        refuse_liger_here()
    given = Choice(run.memory, run.training.gradient_checkpointing)
    return given if run.memory.memory == "manual" else _cheapest(run, lacking)


_FLAGS = {
    "offload_activations": "--offload-activations",
    "offload_optimizer": "--offload-optimizer",
    "base_bits": "--base-bits 4",
}


def not_here() -> dict[str, str]:
    """Switches that this machine, or the way this process was launched, has no use for, with the reason in words."""
    found: dict[str, str] = {}
    if not torch.cuda.is_available():
        nowhere = "training runs on the CPU, so that the host's memory is the only one"
        found |= {"offload_activations": nowhere, "offload_optimizer": nowhere}
    if not four_bit_is_here():
        found["base_bits"] = "bitsandbytes is not installed (pip install 'longlora[quant]')"
    if engine := ranks.engine():
        found["offload_optimizer"] = f"{engine} holds the optimizer and has offloading of its own (accelerate config)"
        found["base_bits"] = f"{engine} would have to divide 4-bit weights"
    return found


def device_bytes() -> tuple[int, str]:
    """Bytes that are free where training runs, and what they are, in words."""
    if torch.cuda.is_available():
        device = ranks.local_rank()
        return torch.cuda.mem_get_info(device)[0], f"free on {torch.cuda.get_device_name(device)}"
    return psutil.virtual_memory().available, "of this machine's memory is free"


def _cheapest(run: MemoryNeed, lacking: dict[str, str]) -> Choice:
    size, words = device_bytes()
    if run.memory.bytes_to_fit is not None:
        size, words = run.memory.bytes_to_fit, "as --gpu-memory says"
    fit = Fit(_anatomy(run), _planned(run), size)
    able = {name for name in fit.possible() if name not in lacking}
    chosen = fit.cheapest(able)
    usable = f"{_gb(size)} {words}, {_gb(fit.budget)} of it to use after the reserve"
    unable = "; ".join(f"{SAYS[name]}: {reason}" for name, reason in lacking.items())
    if "tiled_mlp" not in fit.possible():
        unable = f"{SAYS['tiled_mlp']}: this model's layers cannot be tiled" + (f"; {unable}" if unable else "")
    unable = f" (not to be had here: {unable})" if unable else ""
    if chosen is None:
        within = [names for names in fit.all_combinations() if fit.asked() <= set(names) <= able | fit.asked()]
        everything = max(within, key=fit.longest)
        raise UserError(
            f"--memory auto: rows of {run.context:,} tokens take {_gb(fit.peak_bytes(run.context, everything))} with "
            f"{_said(everything)}{unable}, and there are {usable}. {fit.longest(everything):,} tokens would fit: "
            "shorten --context, lower --device-batch, free memory, or choose the switches with --memory manual."
        )
    plain = tuple(name for name in fit.given() if name in fit.asked())
    needed = fit.peak_bytes(run.context, plain)
    logger.info("memory: %s", usable)
    if chosen == plain:
        logger.info("  needs %s as it is: no switch is turned on, nor is gradient checkpointing", _gb(needed))
    else:
        logger.info("  needs %s without a switch that was not asked for%s", _gb(needed), unable)
        took = _gb(fit.peak_bytes(run.context, chosen))
        logger.info("  chosen, as the cheapest that fits: %s; needs %s", _said(chosen), took)
    settings = with_switches(fit.settings, chosen)
    return Choice(settings.memory.resolved(), settings.training.gradient_checkpointing)


def _anatomy(run: MemoryNeed) -> Any:
    return read_anatomy(run.config, run.trainable, run.trust_remote_code)


def _planned(run: MemoryNeed) -> PlanSettings:
    """The run as `longlora plan` would be asked about it."""
    gpus = ranks.world_size()
    return PlanSettings(
        model=run.name,
        positions=PositionSettings(context=run.context),
        attention=run.attention,
        trainable=run.trainable,
        training=run.training,
        memory=run.memory,
        gpus=gpus,
        shard=gpus > 1 and ranks.engine() is not None,
    )


def _said(switches: tuple[str, ...]) -> str:
    return " + ".join(SAYS[name] for name in switches)


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
