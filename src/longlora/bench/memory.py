"""`longlora bench memory`: what training steps hold at their peak, by context and switch, beside the plan's prediction.

Real steps are taken by Trainers (`longlora.bench.trainers`) and counted by PyTorch's allocator: on a GPU what CUDA's
gives, on a CPU every allocation that the profiler records. Where they do not fit, `longlora plan --measure` counts
tensors without data.
"""

import gc
import tempfile
from typing import Any

import torch
from transformers import PreTrainedConfig

from longlora.bench.machine import choose_device, free_bytes, hardware, peak_bytes
from longlora.bench.step import planned_step, read_config
from longlora.bench.tables import memory_table
from longlora.bench.trainers import make_ways, random_rows
from longlora.errors import UserError
from longlora.planner.anatomy import Anatomy
from longlora.planner.memory import peak, step_memory
from longlora.planner.reading import read_anatomy
from longlora.progress import Progress
from longlora.settings import BenchMemorySettings

WARM_UP_TOKENS = 64
"""Of the step that makes AdamW's moments before the one that counts."""

Case = tuple[int, str, tuple[str, ...]]
"""Context, way (of `settings.STEP_WAYS`), switches."""


def bench_memory(settings: BenchMemorySettings) -> dict[str, Any]:
    """Run `longlora bench memory`.

    Returns:
        `{"hardware", "torch", "model", "layers", "of_layers", "dtype", "rows", "pattern", "results": [{"context",
        "way", "switches", "predicted_bytes", "measured_bytes", "ratio", "note"}]}`. `way` is `plain` (stock Trainer and
        PEFT, all logits), `full` or `s2`; `ratio` is predicted over measured; where nothing was measured, `note` says
        why. The plan knows no plain PEFT that keeps trained norms and embeddings in bfloat16: it takes them as float32.

    Raises:
        UserError: a model that is not there or has fewer layers, or nothing in it can train as asked.
    """
    device = choose_device("auto")
    config, of_layers = read_config(settings)
    anatomy = read_anatomy(config, settings.trainable, settings.loading.trust_remote_code)
    cases = _cases(settings)
    results = []
    with Progress("measuring memory", "cases", len(cases)) as progress:
        for number, case in enumerate(cases):
            context, way, switches = case
            progress.show(number, f"{way} at {context:,} tokens, {len(switches)} switches")
            predicted = predict(anatomy, settings, case, foreach=device.type == "cuda")
            measured, note = _measured(settings, config, case, device, predicted)
            results.append(
                {
                    "context": context,
                    "way": way,
                    "switches": list(switches),
                    "predicted_bytes": predicted,
                    "measured_bytes": measured,
                    "ratio": predicted / measured if measured else None,
                    "note": note,
                }
            )
    document = {
        "hardware": hardware(device),
        "torch": torch.__version__,
        "model": settings.model,
        "layers": len(anatomy.layers),
        "of_layers": of_layers,
        "dtype": settings.dtype,
        "rows": settings.rows,
        "pattern": settings.attention.pattern,
        "results": results,
    }
    if not settings.json:
        print(memory_table(document))
    return document


def predict(anatomy: Anatomy, settings: BenchMemorySettings, case: Case, foreach: bool) -> int:
    """Bytes at the peak, as the plan has them; for `foreach` see `planned_step`."""
    context, way, switches = case
    moments = step_memory(anatomy, planned_step(settings.step(context, switches), context, way, foreach))
    return moments[peak(moments)].total


def _cases(settings: BenchMemorySettings) -> list[Case]:
    """The plain Trainer without and with gradient checkpointing, full attention with it, S2-Attn switch by switch."""
    checkpointing = tuple(name for name in settings.switches if name == "gradient_checkpointing")
    cases: list[Case] = []
    for context in settings.context:
        cases += [(context, "plain", switches) for switches in dict.fromkeys(((), checkpointing))]
        cases.append((context, "full", checkpointing))
        cases += [(context, "s2", switches) for switches in settings.ladder()]
    return cases


def _measured(
    settings: BenchMemorySettings, config: PreTrainedConfig, case: Case, device: torch.device, predicted: int
) -> tuple[int | None, str | None]:
    """Bytes at the peak, or None and why nothing was measured."""
    free = free_bytes(device)
    if device.type == "cpu" and predicted > free:
        return None, f"{free / 1e9:.1f} GB are free"
    try:
        return _step_bytes(settings, config, case, device), None
    except torch.OutOfMemoryError:
        return None, "out of memory"
    except UserError as error:
        return None, str(error)
    finally:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _step_bytes(settings: BenchMemorySettings, config: PreTrainedConfig, case: Case, device: torch.device) -> int:
    context, name, switches = case
    step = settings.step(context, switches)
    if device.type == "cpu" and (step.memory.offload_activations or step.memory.offload_optimizer):
        raise UserError("on the CPU there is nowhere to offload to")
    with tempfile.TemporaryDirectory() as folder:
        (way,) = make_ways(config, step, device, folder, (name,)).values()
        way.step(random_rows(config, settings.rows, min(WARM_UP_TOKENS, context), settings.seed))
        rows = random_rows(config, settings.rows, context, settings.seed)
        return way.standing_bytes() + peak_bytes(lambda: way.step(rows), device)
