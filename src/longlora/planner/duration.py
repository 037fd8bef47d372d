"""Time of training at a given rate: operations of an optimiser step over what the GPUs compute in a second."""

import sys
from collections import Counter
from typing import Any

from longlora.attention.schedule import attention_at
from longlora.planner.anatomy import Anatomy
from longlora.planner.flops import FLASH_BACKWARD, causal_flops, training_flops
from longlora.planner.pieces import piece_costs
from longlora.settings import PlanSettings


def duration(anatomy: Anatomy, settings: PlanSettings, gradient_checkpointing: bool) -> dict[str, Any]:
    """Seconds by the attention of the run and by full attention; of communication only what rows in pieces pass on.

    Returns:
        `{"rate", "s2": {"flops_per_step", "seconds_per_step", "tokens_per_second", "seconds", "sent_bytes_per_step",
        "transfer_seconds", "imbalance"}, "full": …}`; rate in FLOP/s over all GPUs, operations of what causal kernels
        compute. `sent_bytes_per_step` is what all GPUs send of keys, values and their gradients for
        `--sequence-parallel`, `transfer_seconds` of a step are in `seconds_per_step`, and so is that GPUs wait for the
        one whose piece has most attention, `imbalance` times the mean.
    """
    training, attention, context = settings.training, settings.attention, settings.positions.context
    rate = settings.rate * settings.gpus
    ways = Counter(attention_at(attention, context, step, training.steps) for step in range(training.steps))
    full = Counter({("full", context): training.steps})
    found: dict[str, Any] = {"rate": rate}
    for name, schedule in (("s2", ways), ("full", full)):
        row, sent, waited, most, mean = 0.0, 0.0, 0.0, 0.0, 0.0
        for (pattern, group_size), steps in schedule.items():
            forward = causal_flops(anatomy, context, attention, pattern, min(group_size, context))
            operations = training_flops(anatomy, forward, context, gradient_checkpointing)
            operations += forward.ffn if settings.memory.tiled_mlp else 0  # each tile once more
            operations += forward.projection if settings.memory.layer_tile else 0  # keys and values once more
            share = steps / training.steps
            row += operations * share
            if training.sequence_parallel == 1:
                continue
            number = 4 if training.dtype == "float32" else 2
            sizes = (min(group_size, context), training.sequence_parallel, number)
            costs = piece_costs(anatomy, context, attention, pattern, *sizes)
            passes = 3 if gradient_checkpointing else 2  # forward, again, and gradients
            sent += costs.sent_bytes * passes * share
            waited += costs.busiest_bytes * passes * share
            of_attention = forward.attention * (passes - 1 + FLASH_BACKWARD)
            mean += of_attention * share
            most += of_attention * costs.imbalance * share
        flops, groups = row * training.batch, settings.gpus // training.sequence_parallel
        transfer = waited * training.batch / groups / settings.link_bytes_per_second
        seconds = (flops + (most - mean) * training.batch) / rate + transfer
        found[name] = {
            "flops_per_step": round(flops),
            "seconds_per_step": seconds,
            "tokens_per_second": training.batch * context / seconds,
            "seconds": training.steps * seconds,
            "sent_bytes_per_step": round(sent * training.batch),
            "transfer_seconds": transfer,
            "imbalance": most / mean if mean else 1.0,
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
