"""The longest context that trains, switch by switch: measured, not believed.

Two steps on short rows tell what a rung holds anyway and what it takes a token; from these follows the longest row
that the device (and for offloading its host) can hold, and one step on it proves it, or a shorter one.
"""

import resource
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedConfig

from longlora.bench.machine import free_bytes, peak_bytes
from longlora.bench.step import planned_bytes, planned_step, read_config
from longlora.bench.trainers import Taken, Way, make_ways, random_rows
from longlora.model.memory_saving.four_bit_base import four_bit_is_here
from longlora.planner.memory import host_bytes
from longlora.planner.reading import read_anatomy
from longlora.settings import AttentionSettings, BenchStepSettings, MemorySettings

RUNGS: dict[str, tuple[str, tuple[str, ...]]] = {
    "nothing": ("plain", ()),
    "loss": ("s2", ()),
    "checkpointing": ("s2", ("gradient_checkpointing",)),
    "tiled": ("s2", ("gradient_checkpointing", "tiled_mlp")),
    "activations": ("s2", ("gradient_checkpointing", "tiled_mlp", "offload_activations")),
    "optimizer": ("s2", ("gradient_checkpointing", "tiled_mlp", "offload_activations", "offload_optimizer")),
    "base": ("s2", ("gradient_checkpointing", "tiled_mlp", "offload_activations", "offload_optimizer", "base_bits")),
}
"""Way to take the step (`nothing` is a plain Trainer with stock PEFT) and switches; from `loss` on it is in chunks."""

SHARES = (0.97, 0.92, 0.85)
"""Of the longest context that the two short steps promise, tried one after the other until one fits."""

HOST_SHARE = 0.85
"""Of the host's free memory that pinned activations may take."""

MULTIPLE = 1024
"""Tokens that contexts are multiples of."""


def rung(
    model: str,
    device: str,
    group_size: int,
    probes: list[int],
    rung: str,
    seconds_left: float,
    layers: int | None = None,
    limit: int | None = None,
) -> dict[str, Any]:
    """One rung.

    Args:
        group_size: G in tokens, the same at every context, so that time grows no faster than the context.
        probes: contexts of the steps from which the longest is found, in tokens, growing.
        limit: bytes to stay within; default what is free on the device.

    Returns:
        `{"rung", "way", "switches", "group_size", "limit_bytes", "host_bytes", "steps": [{"context", "predicted_bytes",
        "measured_bytes", "seconds"}], "planned", "host_limit", "longest", "would_fit", "note"}`. `planned` is the
        longest context that the plan, corrected by what was measured, lets fit; `longest` the longest that was
        trained; `would_fit` where the last two steps, drawn on, meet the limit.
    """
    deadline = time.monotonic() + seconds_left
    place, (name, switches) = torch.device(device), RUNGS[rung]
    usable = limit if limit is not None else free_bytes(place)
    assert usable is not None
    step = BenchStepSettings(
        model=model,
        context=(max(probes),),
        layers=layers,
        attention=AttentionSettings(group_size=group_size),
        gradient_checkpointing="gradient_checkpointing" in switches,
        memory=MemorySettings(
            offload_activations="offload_activations" in switches,
            tiled_mlp="tiled_mlp" in switches,
            offload_optimizer="offload_optimizer" in switches,
            base_bits=4 if "base_bits" in switches else None,
        ),
    )
    config, _ = read_config(step)
    anatomy = read_anatomy(config, step.trainable)
    if place.type == "cpu" and (step.memory.offload_activations or step.memory.offload_optimizer):
        return _told(rung, name, switches, note="on the CPU there is nowhere to offload to")
    if step.memory.base_bits and not four_bit_is_here():
        return _told(rung, name, switches, note="bitsandbytes is not installed")
    exact_pins = _pin_without_rounding() if step.memory.offload_activations else True
    steps: list[dict[str, Any]] = []

    def predicted(context: int) -> int:
        return planned_bytes(anatomy, step, context, name, foreach=place.type == "cuda")

    def offloaded(context: int) -> int:
        """Bytes on the host; where PyTorch pins blocks of powers of two, as many as those take."""
        whole = host_bytes(anatomy, planned_step(step, context, name, foreach=True))
        block = 2 * context * anatomy.hidden
        return whole if exact_pins else whole + len(anatomy.layers) * (2 ** (block - 1).bit_length() - block)

    with tempfile.TemporaryDirectory() as folder:
        (way,) = make_ways(config, step, place, folder, (name,)).values()
        way.step(random_rows(config, 1, min(64, *probes), 0))
        for context in probes:
            if not _take(way, config, context, predicted(context), place, steps):
                return _told(rung, name, switches, steps=steps, note=f"out of memory at {context:,} tokens already")
        right = steps[-1]["predicted_bytes"] / steps[-1]["measured_bytes"]
        planned = _longest(lambda context: predicted(context) / right <= usable, max(probes))
        room = free_bytes(torch.device("cpu"))
        host = None
        if step.memory.offload_activations and room:
            host = _longest(lambda context: offloaded(context) <= HOST_SHARE * room, max(probes))
        most = planned if host is None else min(planned, host)
        note = None
        for share in SHARES:
            context = max(MULTIPLE, int(most * share) // MULTIPLE * MULTIPLE) if most > MULTIPLE else int(most * share)
            if context <= max(probes):
                break
            needed = 1.3 * steps[-1]["seconds"] * context / steps[-1]["context"]
            if time.monotonic() + needed > deadline:
                note = f"{context:,} tokens would take {needed:,.0f} s, and less was left: not tried"
                break
            if _take(way, config, context, predicted(context), place, steps):
                break
    fitted = [each for each in steps if each["measured_bytes"]]
    return _told(
        rung,
        name,
        switches,
        steps=steps,
        note=note,
        group_size=group_size,
        limit_bytes=usable,
        planned=planned,
        host_limit=host,
        longest=fitted[-1]["context"],
        would_fit=_drawn_on(fitted[-2:], usable),
        host_bytes=host_bytes(anatomy, planned_step(step, fitted[-1]["context"], name, foreach=True)),
        host_peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )


def _take(
    way: Way, config: PreTrainedConfig, context: int, predicted: int, place: torch.device, steps: list[dict[str, Any]]
) -> bool:
    """One step, written down in `steps`; whether it fitted."""
    taken: list[Taken] = []
    rows = random_rows(config, 1, context, 0)
    try:
        size: int | None = way.standing_bytes() + peak_bytes(lambda: taken.append(way.step(rows)), place)
    except (torch.OutOfMemoryError, MemoryError):
        way.forget()
        size = None
    steps.append(
        {
            "context": context,
            "predicted_bytes": predicted,
            "measured_bytes": size,
            "seconds": taken[0].seconds if taken else None,
        }
    )
    return size is not None


def _longest(fits: Callable[[int], bool], first: int) -> int:
    """The longest context that fits, found by doubling and halving, to 256 tokens; `first` fits."""
    low, high = first, 2 * first
    while fits(high) and high < 2**26:
        low, high = high, 2 * high
    while high - low > 256:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _drawn_on(steps: list[dict[str, Any]], limit: int) -> int | None:
    """The context at which the line through two steps' bytes meets `limit`."""
    if len(steps) < 2:
        return None
    (one, other) = steps
    a_token = (other["measured_bytes"] - one["measured_bytes"]) / (other["context"] - one["context"])
    return round(other["context"] + (limit - other["measured_bytes"]) / a_token) if a_token > 0 else None


def _pin_without_rounding() -> bool:
    """Ask PyTorch to pin blocks of just the size that is wanted, not of the next power of two; whether it knows how."""
    try:
        # names the other setting too, which else would go back to its default
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True,pinned_max_round_threshold_mb:1")
    except (AttributeError, RuntimeError, ValueError):
        return False
    return True


def _told(rung: str, way: str, switches: tuple[str, ...], **rest: Any) -> dict[str, Any]:
    return {"rung": rung, "way": way, "switches": list(switches), **rest}
