"""Every knob, once: its unit, default and source. The command line and YAML recipes are both made from these.

This file imports nothing heavy, so that `longlora --help` answers at once. "Paper" is LongLoRA, arXiv 2309.12307.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from longlora.errors import UserError, check_choice

PATTERNS = ("shift", "shift-layers", "plain", "shifted", "cyclic", "dilated", "strided", "full")
METHODS = ("yarn", "linear", "ntk", "dynamic", "llama3", "longrope", "none")
TRAINABLE = ("lora", "norm", "embed", "full")
PACKINGS = ("concatenate", "isolate")
SCORES = ("last", "window")
DTYPES = ("auto", "float32", "bfloat16", "float16")


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.replace("+", ",").split(",") if part.strip()]


def _whole_numbers(words: list[str]) -> tuple[int, ...]:
    return tuple(int(part.replace("_", "")) for word in words for part in _split(word))


def _names(words: list[str]) -> tuple[str, ...]:
    return tuple(part for word in words for part in _split(word))


def _comma(value: Iterable[object]) -> list[str]:
    return [",".join(str(part) for part in value)]


def _is_tuple(value: object) -> bool:
    return isinstance(value, tuple)


Tokens = Annotated[
    tuple[int, ...],
    PrimitiveConstructorSpec(
        nargs=1, metavar="N,N,…", instance_from_str=_whole_numbers, is_instance=_is_tuple, str_from_instance=_comma
    ),
]
"""Whole numbers written with commas, `512,1024,2048`."""

Names = Annotated[
    tuple[str, ...],
    PrimitiveConstructorSpec(
        nargs=1, metavar="NAME,NAME,…", instance_from_str=_names, is_instance=_is_tuple, str_from_instance=_comma
    ),
]
"""Names written with commas or plus signs, `lora,norm,embed`."""


def _choice(names: tuple[str, ...]) -> object:
    return tyro.conf.arg(metavar="{" + ",".join(names) + "}")


def _at_least(thing: str, given: float, least: float, unit: str = "") -> None:
    if given < least:
        raise UserError(f"--{thing} is {given}: it must be at least {least}{' ' + unit if unit else ''}.")


@dataclass(frozen=True, kw_only=True)
class PositionSettings:
    """How the rotary positions are stretched (paper section 3.3 and DESIGN section 3)."""

    context: int
    """Context length to train for and to write into the model's config, in tokens."""

    method: Annotated[str, _choice(METHODS)] = "yarn"
    """RoPE extension: `linear` is the paper's Position Interpolation (arXiv 2306.15595), `yarn` is arXiv 2309.00071."""

    def __post_init__(self) -> None:
        _at_least("context", self.context, 2, "tokens")
        check_choice("--method", self.method, METHODS)


@dataclass(frozen=True, kw_only=True)
class AttentionSettings:
    """Attention while training (paper section 3.2). Evaluation always uses the model's own full attention."""

    pattern: Annotated[str, _choice(PATTERNS)] = "shift"
    """Which tokens each head sees; `shift` is the paper's S2-Attn (table 2 names the others)."""

    group_size: int | None = None
    """Tokens a group; default a quarter of the context (paper section 4.1, table 11)."""

    full_attention_steps: int = 0
    """Optimiser steps at the end of training with full attention, so that every distance is met at least then."""

    def __post_init__(self) -> None:
        check_choice("--pattern", self.pattern, PATTERNS)
        _at_least("full-attention-steps", self.full_attention_steps, 0, "steps")
        if self.group_size is not None:
            _at_least("group-size", self.group_size, 2, "tokens")

    def tokens_per_group(self, context: int) -> int:
        """The group size in tokens for a training context of `context` tokens."""
        return self.group_size or max(2, context // 4)


@dataclass(frozen=True, kw_only=True)
class TrainableSettings:
    """What trains: LoRA plus norm and embedding layers by default (paper section 3.3, table 3)."""

    train: Names = ("lora", "norm", "embed")
    """Parts that train: any of lora, norm, embed together, or full for every weight."""

    rank: int = 8
    """LoRA rank (paper section 4.1)."""

    alpha: float = 16.0
    """LoRA alpha; the update is scaled by alpha / rank (the original code's 16)."""

    lora_dropout: float = 0.0
    """Dropout before the LoRA matrices, a share from 0 to 1."""

    def __post_init__(self) -> None:
        for name in self.train:
            check_choice("--train part", name, TRAINABLE)
        if not self.train or ("full" in self.train and len(self.train) > 1):
            raise UserError(
                f"--train is '{','.join(self.train)}': give any of lora, norm, embed together, or full alone."
            )
        _at_least("rank", self.rank, 1)
        if not 0 <= self.lora_dropout < 1:
            raise UserError(f"--lora-dropout is {self.lora_dropout}: it must be from 0 up to, not including, 1.")


@dataclass(frozen=True, kw_only=True)
class CorpusSettings:
    """Documents and how they become training rows (paper section 4.1 concatenates)."""

    data: tuple[str, ...] = ()
    """Files, folders (txt, md, source code, PDF, jsonl, jsonl.gz, jsonl.zst, parquet), `hub:NAME`, or `stdlib`."""

    text_field: str = "text"
    """Field of a JSONL, parquet or hub record that holds the text."""

    packing: Annotated[str, _choice(PACKINGS)] = "concatenate"
    """`concatenate` joins documents end to end and cuts (the paper); `isolate` keeps documents apart in a row."""

    prefer_long: bool = False
    """Train first on documents of at least `context` tokens; shorter ones follow when those run out."""

    max_tokens: int | None = None
    """Stop reading after this many tokens; for streamed corpora that never end."""

    cache: str | None = None
    """Folder of the tokenised corpus; default `$LONGLORA_CACHE`, else `~/.cache/longlora`."""

    def __post_init__(self) -> None:
        check_choice("--packing", self.packing, PACKINGS)
        if self.max_tokens is not None:
            _at_least("max-tokens", self.max_tokens, 1, "tokens")


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """Optimisation, by default the paper's recipe (section 4.1 and appendix B.2)."""

    steps: int = 1000
    """Optimiser steps (paper section 4.1)."""

    batch: int = 64
    """Rows of `context` tokens an optimiser step, over all devices (paper section 4.1: global batch 64)."""

    device_batch: int = 1
    """Rows a device holds at a time; gradients accumulate up to `batch`."""

    lr: float = 2e-5
    """Peak learning rate of LoRA, or of every weight with `--train full` (paper section 4.1)."""

    norm_lr: float | None = None
    """Peak learning rate of norm layers; default `lr`."""

    embed_lr: float | None = None
    """Peak learning rate of embeddings; default `lr`. Short runs at a high `lr` want about a tenth of it."""

    schedule: Annotated[str, _choice(("constant", "linear", "cosine"))] = "constant"
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

    dtype: Annotated[str, _choice(("float32", "bfloat16", "float16"))] = "bfloat16"
    """Arithmetic of the forward and backward pass; what trains is kept in float32."""

    loss_chunk: int = 1024
    """Tokens whose logits exist at one time (memory: this many times the vocabulary, in float32)."""

    seed: int = 0
    """Seed of the data order, of new LoRA weights and of dropout."""

    save_every: int = 100
    """Steps between checkpoints."""

    evaluate_every: int | None = None
    """Steps between evaluations of the held-out loss; default none but the last."""

    report_to: Names = ()
    """Trackers the Trainer reports to: tensorboard, wandb, …"""

    resume: bool = False
    """Go on from the last checkpoint in the output folder."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "device_batch", "loss_chunk", "save_every"):
            _at_least(name.replace("_", "-"), getattr(self, name), 1)
        if self.batch % self.device_batch:
            raise UserError(f"--batch is {self.batch}: it must be a multiple of --device-batch, {self.device_batch}.")
        check_choice("--schedule", self.schedule, ("constant", "linear", "cosine"))
        check_choice("--dtype", self.dtype, ("float32", "bfloat16", "float16"))


@dataclass(frozen=True, kw_only=True)
class PerplexitySettings:
    """Sliding-window perplexity (DESIGN section 6; paper section 4.2 with its stride of 256)."""

    contexts: Tokens = ()
    """Context lengths to test, in tokens; default every doubling from the original window to the present one."""

    stride: int = 256
    """Tokens the window slides by (paper section 4.1: 256)."""

    score: Annotated[str, _choice(SCORES)] = "last"
    """`last` scores the newest tokens of each window, each token once; `window` averages whole windows (the paper)."""

    evaluation_batch: int = 0
    """Windows a forward pass; 0 chooses about 8,192 tokens a pass."""

    max_documents: int | None = None
    """Evaluate only the first this many documents that are long enough."""

    min_document_tokens: int | None = None
    """Leave out documents shorter than this at every context, so that all contexts see the same text; default: each
    context its own length."""

    def __post_init__(self) -> None:
        for context in self.contexts:
            _at_least("contexts", context, 2, "tokens")
        _at_least("stride", self.stride, 1, "tokens")
        _at_least("evaluation-batch", self.evaluation_batch, 0, "windows")
        if self.max_documents is not None:
            _at_least("max-documents", self.max_documents, 1)
        check_choice("--score", self.score, SCORES)


@dataclass(frozen=True, kw_only=True)
class LoadSettings:
    """How MODEL is found and loaded."""

    trust_remote_code: bool = False
    """Run Python code that comes with a hub model."""

    revision: str | None = None
    """Branch, tag or commit of a hub model."""


@dataclass(frozen=True, kw_only=True)
class CommandSettings:
    """What every command takes."""

    config: str | None = None
    """YAML recipe with the same names as the flags; flags override it."""

    json: bool = False
    """Print exactly one JSON object on standard output, everything else on standard error."""


@dataclass(frozen=True, kw_only=True)
class ExtendSettings(CommandSettings):
    """Give MODEL a longer context: stretch its positions, train with S2-Attn on long documents, measure."""

    model: tyro.conf.Positional[str]
    """`demo`, a hub id, a folder, a .gguf file, a run directory, or an adapter folder."""

    output: str
    """Run directory to create."""

    evaluation_data: tuple[str, ...] = ()
    """Documents to measure on, as for `data`; default a sixteenth of `data`, held out from training by name."""

    positions: PositionSettings
    attention: AttentionSettings = AttentionSettings()
    trainable: TrainableSettings = TrainableSettings()
    corpus: CorpusSettings = CorpusSettings()
    training: TrainingSettings = TrainingSettings()
    perplexity: PerplexitySettings = PerplexitySettings()
    loading: LoadSettings = LoadSettings()

    def __post_init__(self) -> None:
        if not self.corpus.data:
            raise UserError("--data is missing: name files, folders, hub:NAME, or stdlib to train on.")


@dataclass(frozen=True, kw_only=True)
class EvaluatePerplexitySettings(CommandSettings):
    """Sliding-window perplexity of one or more models at any context lengths."""

    models: tyro.conf.Positional[tuple[str, ...]]
    """One or more of: `demo`, a hub id, a folder, a .gguf file, a run directory, an adapter folder."""

    corpus: CorpusSettings = CorpusSettings()
    perplexity: PerplexitySettings = PerplexitySettings()
    loading: LoadSettings = LoadSettings()

    extend_to: int | None = None
    """Stretch the positions to this context first, without training, in tokens."""

    method: Annotated[str, _choice(METHODS)] = "yarn"
    """How positions are stretched with `extend_to`."""

    dtype: Annotated[str, _choice(DTYPES)] = "auto"
    """Arithmetic of the weights; `auto` keeps the checkpoint's own."""

    def __post_init__(self) -> None:
        if not self.models:
            raise UserError("MODEL is missing: name at least one model to evaluate.")
        if not self.corpus.data:
            raise UserError("--data is missing: name files, folders, hub:NAME, or stdlib to evaluate on.")
        check_choice("--method", self.method, METHODS)
        check_choice("--dtype", self.dtype, DTYPES)


@dataclass(frozen=True, kw_only=True)
class MergeSettings(CommandSettings):
    """Fold a run's adapter into its base: a plain Hugging Face folder that anything can load."""

    model: tyro.conf.Positional[str]
    """A run directory or an adapter folder."""

    output: str
    """Folder to create."""

    dtype: Annotated[str, _choice(DTYPES)] = "auto"
    """Arithmetic of the saved weights; `auto` keeps the base model's own."""

    def __post_init__(self) -> None:
        check_choice("--dtype", self.dtype, DTYPES)


@dataclass(frozen=True, kw_only=True)
class BenchAttentionSettings(CommandSettings):
    """Time S2-Attn against full causal attention, forward and backward, in one process, alternating."""

    length: Tokens = (8192,)
    """Tokens N a row; several with commas."""

    group: int | None = None
    """Tokens a group; default a quarter of each length."""

    heads: int = 8
    """Query heads."""

    key_heads: int | None = None
    """KV heads; default as many as query heads."""

    head_dim: int = 64
    """Width of a head."""

    rows: int = 1
    """Rows a batch."""

    dtype: Annotated[str, _choice(DTYPES[1:])] = "bfloat16"
    """Arithmetic."""

    pattern: Annotated[str, _choice(PATTERNS)] = "shift"
    """Attention pattern measured against full attention."""

    repeats: int = 5
    """Timed rounds after one warm-up; medians are reported."""

    device: str = "auto"
    """cpu, cuda, cuda:N, or auto."""

    def __post_init__(self) -> None:
        for name in ("heads", "head_dim", "rows", "repeats"):
            _at_least(name.replace("_", "-"), getattr(self, name), 1)
        for length in self.length:
            _at_least("length", length, 2, "tokens")
        if self.group is not None:
            _at_least("group", self.group, 2, "tokens")
        check_choice("--dtype", self.dtype, DTYPES[1:])
        check_choice("--pattern", self.pattern, PATTERNS)


@dataclass(frozen=True, kw_only=True)
class DemoSettings(CommandSettings):
    """Extend the shipped model 512 -> 4096 tokens on the standard library's source, and draw what changed."""

    output: str = "runs/demo"
    """Run directory; an earlier demo there is replaced."""

    seed: int = 0
    """Seed of data order and new weights."""


@dataclass(frozen=True, kw_only=True)
class ReportSettings(CommandSettings):
    """Draw report.html of a run directory anew."""

    model: tyro.conf.Positional[str]
    """A run directory."""
