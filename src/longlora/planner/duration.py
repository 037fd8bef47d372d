"""Time of training at a given rate: operations of an optimiser step over what the GPUs compute in a second."""

import sys
from collections import Counter
from typing import Any

from longlora.attention.schedule import attention_at
from longlora.planner.anatomy import Anatomy
from longlora.planner.flops import causal_flops, training_flops
from longlora.settings import PlanSettings


def duration(anatomy: Anatomy, settings: PlanSettings, gradient_checkpointing: bool) -> dict[str, Any]:
    """Seconds by the attention of the run and by full attention; communication and offloading are not in it.

    Returns:
        `{"rate", "s2": {"flops_per_step", "seconds_per_step", "tokens_per_second", "seconds"}, "full": …}`; rate in
        FLOP/s over all GPUs, operations of what causal kernels compute.
    """
    training, attention, context = settings.training, settings.attention, settings.positions.context
    rate = settings.rate * settings.gpus
    ways = Counter(attention_at(attention, context, step, training.steps) for step in range(training.steps))
    full = Counter({("full", context): training.steps})
    found: dict[str, Any] = {"rate": rate}
    for name, schedule in (("s2", ways), ("full", full)):
        row = 0.0
        for (pattern, group_size), steps in schedule.items():
            forward = causal_flops(anatomy, context, attention, pattern, min(group_size, context))
            operations = training_flops(anatomy, forward, context, gradient_checkpointing)
            operations += forward.ffn if settings.memory.tiled_mlp else 0  # each tile once more
            operations += forward.projection if settings.memory.layer_tile else 0  # keys and values once more
            row += operations * steps / training.steps
        flops = row * training.batch
        found[name] = {
            "flops_per_step": round(flops),
            "seconds_per_step": flops / rate,
            "tokens_per_second": training.batch * context / (flops / rate),
            "seconds": training.steps * flops / rate,
        }
    return found


def evaluation(anatomy: Anatomy, settings: PlanSettings) -> dict[str, Any]:
    """What `longlora extend` measures before, stretched and after: forward passes with full attention.

    Returns:
        `{"tokens", "flops", "seconds"}` over all GPUs, at most: as if all were read at the longest context; None where
        the settings name what is read, not how much.
    """
    tokens = settings.tokens_to_evaluate()
    if tokens == sys.maxsize:
        return {"tokens": None, "flops": None, "seconds": None}
    context = max(settings.perplexity.contexts or (settings.positions.context,))
    row = causal_flops(anatomy, context, settings.attention, "full", context).total
    flops = row * tokens / context
    return {"tokens": tokens, "flops": round(flops), "seconds": flops / (settings.rate * settings.gpus)}
