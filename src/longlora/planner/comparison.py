"""`longlora plan --measure`: what a step takes, beside what was predicted, at contexts that double."""

from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedConfig

from longlora.errors import UserError
from longlora.planner.fitting import Fit
from longlora.planner.measure import Trainee, free_bytes, measure, with_layers
from longlora.planner.memory import peak, step_memory
from longlora.planner.reading import read_anatomy
from longlora.settings import PlanSettings

SHORTEST = 1024
"""Tokens of the first context."""


def predicted_and_measured(config: PreTrainedConfig, settings: PlanSettings) -> dict[str, Any]:
    """Steps on one device, on a model of `measure_layers` layers, beside the prediction for just that.

    Returns:
        `{"by", "layers", "of_layers", "results": [{"context", "predicted_bytes", "measured_bytes", "ratio",
        "seconds"}]}`; `measured_bytes` is None for the context that did not fit, `seconds` for fake tensors.

    Raises:
        UserError: the model has fewer layers, or this machine lacks the way of measuring.
    """
    way = settings.measure_by
    if way == "auto":
        way = "gpu" if torch.cuda.is_available() else "process" if settings.memory.base_bits else "fake"
    of_layers = config.get_text_config().num_hidden_layers
    layers = settings.measure_layers or of_layers
    smaller = with_layers(config, layers)
    fit = Fit(
        read_anatomy(smaller, settings.trainable, settings.loading.trust_remote_code),
        replace(settings, gpus=1, shard=False, training=replace(settings.training, sequence_parallel=1)),
    )

    def predicted(context: int) -> int:
        moments = step_memory(fit.anatomy, replace(fit.step(context, fit.given()), foreach=way == "gpu"))
        return moments[peak(moments)].total

    contexts = _contexts(settings.measure_limit or settings.positions.context)
    if way == "process":
        free = free_bytes()
        contexts = [context for context in contexts if predicted(context) < free]
        if not contexts:
            raise UserError(
                f"--measure-by process: a step on {SHORTEST:,} tokens would take {predicted(SHORTEST) / 1e9:.1f} GB, "
                f"and {free / 1e9:.1f} GB are free here: give --measure-layers, or fake."
            )
    accumulates = fit.step(contexts[0], fit.given()).accumulates
    memory = settings.memory.resolved()
    trainee = Trainee(smaller, settings.trainable, settings.training, settings.attention, accumulates, memory)
    return {
        "by": way,
        "layers": layers,
        "of_layers": of_layers,
        "results": [
            {
                "context": result.context,
                "predicted_bytes": predicted(result.context),
                "measured_bytes": result.bytes,
                "ratio": predicted(result.context) / result.bytes if result.bytes else None,
                "seconds": result.seconds,
            }
            for result in measure(trainee, way, contexts, settings.gpu_bytes)
        ],
    }


def _contexts(limit: int) -> list[int]:
    doubling = [SHORTEST * 2**count for count in range(limit.bit_length())]
    return [context for context in doubling if context < limit] + [limit]
