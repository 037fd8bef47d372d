"""Knobs of `longlora extend`, `merge` and `demo`. "Paper" is LongLoRA, arXiv 2309.12307."""

import sys
from dataclasses import dataclass
from typing import Annotated, ClassVar

import tyro

from longlora.errors import UserError, check_choice
from longlora.settings.evaluation import PerplexitySettings
from longlora.settings.fields import DTYPES, AtLeast, Checked, CommandSettings, LoadSettings, Names, choice
from longlora.settings.memory import MemorySettings
from longlora.settings.model import AttentionSettings, CorpusSettings, PositionSettings

RECIPES = ("best", "paper")
"""Recipes in the package, `assets/recipes/NAME.yaml`."""

TRAINABLE = ("lora", "norm", "embed", "full")


@dataclass(frozen=True, kw_only=True)
class TrainableSettings(Checked):
    """What trains: LoRA plus norm and embedding layers by default (paper section 3.3, table 3)."""

    train: Names = ("lora", "norm", "embed")
    """Parts that train: any of lora, norm, embed together, or full for every weight."""

    rank: Annotated[int, AtLeast(1)] = 8
    """LoRA rank (paper section 4.1)."""

    alpha: float = 16.0
    """LoRA alpha; the update is scaled by alpha / rank (the original code's 16)."""

    lora_dropout: float = 0.0
    """Dropout before the LoRA matrices, a share from 0 to 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.train:
            check_choice("--train part", name, TRAINABLE)
        if not self.train or ("full" in self.train and len(self.train) > 1):
            raise UserError(
                f"--train is '{','.join(self.train)}': give any of lora, norm, embed together, or full alone."
            )
        if not 0 <= self.lora_dropout < 1:
            raise UserError(f"--lora-dropout is {self.lora_dropout}: it must be from 0 up to, not including, 1.")


@dataclass(frozen=True, kw_only=True)
class OptimisationSettings(Checked):
    """Optimisation, by default the paper's recipe (section 4.1 and appendix B.2)."""

    batch: Annotated[int, AtLeast(1)] = 64
    """Rows of `context` tokens an optimiser step, over all devices (paper section 4.1: global batch 64)."""

    device_batch: Annotated[int, AtLeast(1)] = 1
    """Rows a device holds at a time; gradients accumulate up to `batch`."""

    sequence_parallel: Annotated[int, AtLeast(1)] = 1
    """Processes that share each row, a piece of it in every one; it divides their number, and what remains are groups
    with rows of their own (data parallelism)."""

    lr: float = 2e-5
    """Peak learning rate of LoRA, or of every weight with `--train full` (paper section 4.1)."""

    norm_lr: float | None = None
    """Peak learning rate of norm layers; default `lr`."""

    embed_lr: float | None = None
    """Peak learning rate of embeddings; default `lr`, which suits `linear` positions. Short runs with YaRN at a high
    `lr` want about a tenth of it."""

    schedule: Annotated[str, choice(("constant", "linear", "cosine"))] = "constant"
    """Learning rate after warm-up (paper section 4.1: constant)."""

    warmup_steps: int = 20
    """Steps of linear warm-up (the original code's 20)."""

    weight_decay: float = 0.0
    """AdamW weight decay (paper section 4.1: 0)."""

    beta1: float = 0.9
    """AdamW first moment decay (paper section 4.1)."""

    beta2: float = 0.95
    """AdamW second moment decay (paper section 4.1)."""

    max_grad_norm: float = 1.0
    """Gradient clipping by global norm; 0 turns it off."""

    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass: less memory, about a third more time."""

    dtype: Annotated[str, choice(("float32", "bfloat16", "float16"))] = "bfloat16"
    """Arithmetic of the forward and backward pass; what trains is kept in float32."""

    loss_chunk: Annotated[int, AtLeast(1)] = 1024
    """Tokens whose logits exist at one time (memory: this many times the vocabulary, in float32)."""

    seed: int = 0
    """Seed of the data order, of new LoRA weights and of dropout."""

    save_every: Annotated[int, AtLeast(1)] = 100
    """Steps between checkpoints."""

    evaluate_every: int | None = None
    """Steps between evaluations of the held-out loss; default none but the last."""

    report_to: Names = ()
    """Trackers the Trainer reports to: tensorboard, wandb, …"""

    resume: bool = False
    """Go on from the last checkpoint in the output folder that is whole."""

    accept_changes: bool = False
    """With `resume`: go on although documents or settings changed, and measure anew; default they are refused."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch % self.device_batch:
            raise UserError(f"--batch is {self.batch}: it must be a multiple of --device-batch, {self.device_batch}.")
        if self.accept_changes and not self.resume:
            raise UserError("--accept-changes has no effect without --resume: a new run takes what it is given.")


@dataclass(frozen=True, kw_only=True)
class TrainingSettings(OptimisationSettings):
    """How long it trains and how it learns, by default the paper's recipe (section 4.1 and appendix B.2)."""

    steps: Annotated[int, AtLeast(1)] = 1000
    """Optimiser steps (paper section 4.1)."""


@dataclass(frozen=True, kw_only=True)
class ExtensionSettings(CommandSettings):
    """How a context is extended, and what is measured before and after: what is planned is what runs."""

    evaluation_data: tuple[str, ...] = ()
    """Documents to measure on, as for `data`; default a sixteenth of `data`, held out from training by name."""

    evaluation_tokens: Annotated[int | None, AtLeast(0, "tokens")] = None
    """Tokens of all forward passes of the measurements before and after; 0 measures nothing. Default a tenth of the
    tokens trained on, or without limit where `stride` or `max_documents` says what is to be read."""

    positions: PositionSettings
    attention: AttentionSettings = AttentionSettings()
    trainable: TrainableSettings = TrainableSettings()
    corpus: CorpusSettings = CorpusSettings()
    training: TrainingSettings = TrainingSettings()
    memory: MemorySettings = MemorySettings()
    perplexity: PerplexitySettings = PerplexitySettings()
    loading: LoadSettings = LoadSettings()

    def tokens_to_evaluate(self) -> int:
        """Tokens of all forward passes of the measurements, at most; `sys.maxsize` where there is no limit."""
        if self.evaluation_tokens is not None:
            return self.evaluation_tokens
        if self.perplexity.stride != "auto" or self.perplexity.max_documents is not None:
            return sys.maxsize
        return self.training.steps * self.training.batch * self.positions.tokens_per_row // 10


@dataclass(frozen=True, kw_only=True)
class ExtendSettings(ExtensionSettings):
    """Give MODEL a longer context: stretch its positions, train with S2-Attn on long documents, measure."""

    everyday: ClassVar = tuple(
        "output data context recipe evaluation_data method train mix steps batch lr memory resume config json".split()
    )

    model: tyro.conf.Positional[str]
    """`demo`, a hub id, a folder, a .gguf file, a run directory, or an adapter folder."""

    output: str
    """Run directory to create."""

    recipe: Annotated[str | None, choice(RECIPES)] = None
    """Settings to start from: `best`, the training attention that came nearest to full attention in our study, or
    `paper`, the paper's own choices; `config` and flags override them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        training, train = self.training, self.trainable.train
        self.memory.check(training.gradient_checkpointing, train, trains=True)
        if not self.corpus.data:
            raise UserError("--data is missing: name files, folders, hub:NAME, or stdlib to train on.")
        if self.positions.row_tokens is not None and self.corpus.packing == "isolate":
            raise UserError(
                "--row-tokens skips positions in rows that are one text: give --packing concatenate with it."
            )


@dataclass(frozen=True, kw_only=True)
class MergeSettings(CommandSettings):
    """Fold a run's adapter into its base: a plain Hugging Face folder that anything can load."""

    model: tyro.conf.Positional[str]
    """A run directory or an adapter folder."""

    output: str
    """Folder to create."""

    dtype: Annotated[str, choice(DTYPES)] = "auto"
    """Arithmetic of the saved weights; `auto` keeps the base model's own."""

    keep_lora: bool = False
    """Fold in norms, embeddings and positions only, and leave the LoRA in FOLDER/adapter: for vLLM, SGLang and
    llama.cpp, which take adapters of linear layers alone."""


@dataclass(frozen=True, kw_only=True)
class DemoSettings(CommandSettings):
    """Extend the shipped model 512 -> 4096 tokens on the standard library's source, and draw what changed."""

    output: str = "runs/demo"
    """Run directory; an earlier demo there is replaced."""

    seed: int = 0
    """Seed of data order and new weights."""


@dataclass(frozen=True, kw_only=True)
class ReportSettings(CommandSettings):
    """Draw the page of a run directory anew, or one page that compares several models."""

    models: tyro.conf.Positional[tuple[str, ...]]
    """Run directories, and folders that `longlora eval` wrote with `--output`."""

    output: str | None = None
    """Page to write; default `report.html` in a single run directory, else `comparison.html`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.models:
            raise UserError("MODEL is missing: name a run directory, or several to compare.")
