"""What a step of training leaves and needs: `metrics.jsonl`, progress, and the attention that the step is due."""

import math
import re
import sys
import time
from pathlib import Path
from typing import Any, cast

import psutil
import torch
from transformers import TrainerCallback

from longlora.attention.patterns import Draw
from longlora.attention.schedule import attention_at
from longlora.attention.transformers_backend import draw_from, use_shifted_attention
from longlora.errors import UserError
from longlora.progress import Progress
from longlora.run_directory import RunDirectory
from longlora.settings import AttentionSettings, PatternOptions

_STATUS = Path("/proc/self/status")


class MetricsCallback(TrainerCallback):
    """Writes `metrics.jsonl` (loss, rates, tokens a second, memory in bytes) and shows progress."""

    def __init__(self, run: RunDirectory, tokens_per_step: int):
        self.run, self.tokens_per_step = run, tokens_per_step
        self.began = 0.0
        self.first_step = 0
        self.loss = math.nan

    def on_train_begin(self, args, state, control, **_):  # type: ignore[no-untyped-def]
        self.began = time.monotonic()
        self.first_step = state.global_step
        state.compute_steps(args, state.max_steps)  # --save-every as it is now, not as a checkpoint had it
        self.progress = Progress("training", "steps", state.max_steps).__enter__()
        if state.is_world_process_zero:
            self.run.forget_metrics_after(state.global_step)

    def on_log(self, args, state, control, logs=None, **_):  # type: ignore[no-untyped-def]
        logs = dict(logs or {})
        self.loss = logs.get("loss", self.loss)
        if not math.isfinite(logs.get("loss", 0.0)):
            raise UserError(
                f"the training loss is {logs['loss']} at step {state.global_step}: lower --lr, or train with "
                "--dtype float32."
            )
        if not state.is_world_process_zero or "train_runtime" in logs:
            return
        seconds = time.monotonic() - self.began
        steps = state.global_step - self.first_step
        record = {
            "step": state.global_step,
            **{name: value for name, value in logs.items() if name != "epoch"},
            "tokens": state.global_step * self.tokens_per_step,
            "tokens_per_second": steps * self.tokens_per_step / seconds if seconds else 0.0,
            "memory_bytes": peak_memory(),
            "seconds": seconds,
        }
        self.run.record_metrics(record)

    def on_step_end(self, args, state, control, **_):  # type: ignore[no-untyped-def]
        loss = f", loss {self.loss:.3f}" if math.isfinite(self.loss) else ""  # the first is logged after its step
        self.progress.show(state.global_step, f"step {state.global_step} of {state.max_steps}{loss}")

    def on_train_end(self, args, state, control, **_):  # type: ignore[no-untyped-def]
        self.progress.__exit__(None, None, None)


class AttentionSchedule(TrainerCallback):
    """The attention of each optimiser step: pattern, group size, and what random choices are drawn from.

    All of it follows from the settings, the seed and the step alone, so a resumed run meets the same.
    """

    def __init__(self, attention: AttentionSettings, context: int, seed: int):
        self.attention, self.context, self.seed = attention, context, seed
        self.present: tuple[str, int] | None = None

    def on_step_begin(self, args, state, control, model=None, **_):  # type: ignore[no-untyped-def]
        wanted = attention_at(self.attention, self.context, state.global_step, state.max_steps)
        if wanted != self.present:
            pattern, group_size = wanted
            options = self.attention.options if pattern == self.attention.pattern else PatternOptions()
            use_shifted_attention(
                model,
                group_size,
                pattern,
                options=options,
                full_layers=self.attention.full_attention_layers,
                full_layers_share=self.attention.full_layers_share,
                backend=self.attention.attention_backend,
            )
            self.present = wanted
        draw_from(model, Draw(self.seed, state.global_step))


def peak_memory() -> int:
    """Bytes since `forget_peak_memory`: the most allocated on the CUDA device, or without one the process's peak."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if _STATUS.exists():
        return int(re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text(encoding="ascii"))[1]) * 1024  # type: ignore[index]
    try:
        import resource
    except ImportError:  # Windows
        return int(cast(Any, psutil.Process().memory_info()).peak_wset)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def forget_peak_memory() -> None:
    """What was allocated before, to evaluate the base say, is no part of what training takes."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif _STATUS.exists():
        _STATUS.with_name("clear_refs").write_text("5", encoding="ascii")  # man 5 proc
