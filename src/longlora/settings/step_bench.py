"""Knobs of `longlora bench step`: what the training step that it measures is like."""

from dataclasses import dataclass, fields
from typing import Annotated, ClassVar

import tyro

from longlora.errors import UserError, check_choice
from longlora.settings.extension import OptimisationSettings, TrainableSettings, TrainingSettings
from longlora.settings.fields import AtLeast, CommandSettings, LoadSettings, Names, Tokens, choice
from longlora.settings.memory import MemorySettings
from longlora.settings.model import AttentionSettings, PatternOptions

STEP_WAYS = ("s2", "full", "plain")
"""Ways to take a step: S2-Attn, full attention through the same code, and a plain Trainer with PEFT and full logits."""

STEP_DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class BenchStepSettings(CommandSettings):
    """Time whole training steps with S2-Attn, with full attention, and as a plain Trainer with PEFT takes them."""

    model: tyro.conf.Positional[str]
    """A built-in shape (`smollm2-135m`, `llama2-7b`, …) or MODEL; only the config is read, the weights are random."""

    context: Annotated[Tokens, AtLeast(2, "tokens")] = (8192,)
    """Tokens a row; several with commas."""

    layers: Annotated[int | None, AtLeast(1)] = None
    """Take a model of this many layers; default all."""

    rows: Annotated[int, AtLeast(1)] = 1
    """Rows a step, all on the device at a time."""

    attention: AttentionSettings = AttentionSettings()
    trainable: TrainableSettings = TrainableSettings()

    dtype: Annotated[str, choice(STEP_DTYPES)] = OptimisationSettings.dtype
    """Arithmetic of the forward and backward pass."""

    loss_chunk: Annotated[int, AtLeast(1)] = OptimisationSettings.loss_chunk
    """Tokens whose logits exist at one time in our steps; the plain one has all of them."""

    loading: LoadSettings = LoadSettings()

    seed: int = 0
    """Seed of the weights and of the tokens."""

    gradient_checkpointing: bool = OptimisationSettings.gradient_checkpointing
    """Recompute activations in the backward pass, in every way to take the step."""

    memory: MemorySettings = MemorySettings()

    everyday: ClassVar = tuple(
        "context layers rows pattern group_size train dtype memory ways repeats device config json".split()
    )

    ways: Names = STEP_WAYS
    """Which of s2, full and plain to time, in turn; our result is checked against plain's in any case."""

    repeats: Annotated[int, AtLeast(1)] = 3
    """Timed rounds after one warm-up; medians are reported."""

    device: str = "auto"
    """cpu, cuda, or auto."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.attention.pattern == "full":
            raise UserError("--pattern is full, which every pattern is measured against: give another one.")
        for name in ("full_attention_steps", "final_group_size"):
            if getattr(self.attention, name):
                flag = "--" + name.replace("_", "-")
                raise UserError(f"{flag} changes attention over a run, and this measures one step: leave it out.")
        for option in fields(PatternOptions):
            if getattr(self.attention.options, option.name) != option.default:
                flag = "--" + option.name.replace("_", "-")
                raise UserError(f"{flag} cannot be measured: there is no check of its result. Leave it out.")
        if self.trainable.lora_dropout:
            raise UserError("--lora-dropout makes results differ by chance, which cannot be checked: leave it 0.")
        for name in self.ways:
            check_choice("--ways part", name, STEP_WAYS)
        if not self.ways:
            raise UserError(f"--ways is empty: give any of {', '.join(STEP_WAYS)}.")
        self.memory.check(self.gradient_checkpointing, self.trainable.train, trains=True)
        if self.memory.memory == "auto":
            raise UserError("--memory auto chooses switches by what fits: give those to measure by hand.")

    @property
    def training(self) -> TrainingSettings:
        """The step as `longlora extend` would take it, at a learning rate of 0: the next one begins as it did."""
        return TrainingSettings(
            steps=1,
            batch=self.rows,
            device_batch=self.rows,
            lr=0.0,
            warmup_steps=0,
            gradient_checkpointing=self.gradient_checkpointing,
            dtype=self.dtype,
            loss_chunk=self.loss_chunk,
            seed=self.seed,
        )
