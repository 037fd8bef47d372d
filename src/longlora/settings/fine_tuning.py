"""Knobs of `longlora sft` and `longlora export`. "Paper" is LongLoRA, arXiv 2309.12307."""

import math
from dataclasses import dataclass, fields
from typing import Annotated, ClassVar

import tyro

from longlora.errors import UserError
from longlora.settings.extension import OptimisationSettings, TrainableSettings, TrainingSettings
from longlora.settings.fields import AtLeast, CommandSettings, LoadSettings, choice
from longlora.settings.memory import MemorySettings
from longlora.settings.model import METHODS, AttentionSettings

PROMPT_FORMATS = ("auto", "template", "inst")

LOSS_ON = ("every", "last")

EXPORT_TYPES = ("auto", "f32", "f16", "bf16", "q8_0")


@dataclass(frozen=True, kw_only=True)
class FineTuningSettings(OptimisationSettings):
    """How long it trains and how it learns: by default 3 epochs of the paper's recipe (section 4.1, appendix B.2)."""

    epochs: float = 3.0
    """Times the training goes through all examples (the original fine-tunes for 3 to 5)."""

    steps: Annotated[int | None, AtLeast(1)] = None
    """Optimiser steps, instead of `epochs`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.epochs < math.inf:
            raise UserError(f"--epochs is {self.epochs}: it must be above 0.")
        if self.steps is not None and self.epochs != type(self).epochs:
            raise UserError(f"--epochs {self.epochs:g} has no effect beside --steps {self.steps}: give one of them.")

    def for_rows(self, rows: int) -> TrainingSettings:
        """The training of so many packed rows; each epoch ends with a step on the rows that are left.

        >>> [FineTuningSettings(batch=4, epochs=epochs).for_rows(10).steps for epochs in (3, 0.5)]
        [9, 2]
        """
        shared = {field.name: getattr(self, field.name) for field in fields(OptimisationSettings)}
        return TrainingSettings(steps=self.steps or math.ceil(self.epochs * math.ceil(rows / self.batch)), **shared)


@dataclass(frozen=True, kw_only=True)
class SftSettings(CommandSettings):
    """Fine-tune MODEL on questions about long documents, with loss on the answers, and extend its window if asked."""

    everyday: ClassVar = tuple(
        "output data context evaluation_data method train epochs batch lr memory resume config json".split()
    )

    model: tyro.conf.Positional[str]
    """`demo`, a hub id, a folder, a .gguf file, or a run directory or adapter folder: its adapter goes on training."""

    output: str
    """Run directory to create."""

    data: tuple[str, ...] = ()
    """Pairs: chat messages (also ShareGPT's form, prompt and completion, tools) or LongAlpaca's, in JSON, JSONL (also
    compressed) or parquet, or `hub:NAME`; `longlora longqa build` writes either."""

    evaluation_data: tuple[str, ...] = ()
    """Files of pairs to measure on; default a share of `data`."""

    held_out: float = 0.0625
    """Share of `data` to hold out from training and measure on, by document, 0 for none."""

    context: Annotated[int | None, AtLeast(2, "tokens")] = None
    """Tokens of the longest example that trains, default the model's window; above that the window is extended."""

    method: Annotated[str, choice(METHODS)] = "yarn"
    """How positions are stretched where `context` is above the window; `linear` is the paper's."""

    prompt_format: Annotated[str, choice(PROMPT_FORMATS)] = "auto"
    """`template` is the tokenizer's own chat template, `inst` the original code's [INST]question[/INST]; `auto` is the
    template where there is one."""

    loss_on: Annotated[str, choice(LOSS_ON)] = "every"
    """`every` learns each answer of a conversation, `last` only the last."""

    skip_malformed: Annotated[int, AtLeast(0, "records")] = 0
    """Records that are no conversation, or that the chat template cannot write, to pass over; one more is an error."""

    cache: str | None = None
    """Folder of the tokenised pairs; default `$LONGLORA_CACHE`, else `~/.cache/longlora`."""

    attention: AttentionSettings = AttentionSettings()
    trainable: TrainableSettings = TrainableSettings()
    training: FineTuningSettings = FineTuningSettings()
    memory: MemorySettings = MemorySettings()
    loading: LoadSettings = LoadSettings()

    def __post_init__(self) -> None:
        super().__post_init__()
        training, train = self.training, self.trainable.train
        self.memory.check(training.gradient_checkpointing, train, trains=True)
        if not self.data:
            raise UserError("--data is missing: name the files of question-answer pairs to train on.")
        if not 0 <= self.held_out < 1:
            raise UserError(f"--held-out is {self.held_out:g}: it is a share, from 0 up to, not including, 1.")
        if self.evaluation_data and self.held_out != type(self).held_out:
            raise UserError(f"--held-out {self.held_out:g} has no effect beside --evaluation-data: give one of them.")


@dataclass(frozen=True, kw_only=True)
class ExportSettings(CommandSettings):
    """Write MODEL, adapter merged and window as extended, as one GGUF file for llama.cpp and Ollama."""

    model: tyro.conf.Positional[str]
    """A run directory, an adapter folder, or any other model."""

    gguf: str
    """File to create, NAME.gguf."""

    type: Annotated[str, choice(EXPORT_TYPES)] = "auto"
    """Numbers of the matrices in the file; `auto` keeps the model's own. Norms are always f32."""

    lora: bool = False
    """Write MODEL's LoRA alone, for llama.cpp to put on its base's GGUF; `auto` is then f32."""

    loading: LoadSettings = LoadSettings()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.gguf.endswith(".gguf"):
            raise UserError(f"--gguf {self.gguf} must end in .gguf.")
