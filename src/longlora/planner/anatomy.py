"""What a model is made of, in numbers: widths, weights, layers, and what trains. Nothing depends on the context."""

from collections import Counter
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class LayerShape:
    """One decoder layer. Weights are counts of numbers, which are multiply-adds a token; widths are numbers a token."""

    projection_weights: int
    """Of the linear layers in attention."""

    feedforward_weights: int
    """Of the feed-forward part; of experts those that serve a token."""

    weights: int
    """Everything the layer holds, all experts among it."""

    largest_weight: int
    """The largest single tensor."""

    query: int
    key: int
    value: int
    """Widths of Q, K and V over all heads."""

    output: int
    """Width of what attention hands to its output projection."""

    projection_inputs: int
    """Sum of the widths that the linear layers in attention read, the output projection left out."""

    projection_sources: int
    """The same, where what several of them read counts once."""

    fused: bool
    """Q, K and V come out of one linear layer, and V stays a view of its whole output."""

    up: int
    """Width of what the feed-forward part computes first: twice `middle` where one half gates the other."""

    middle: int
    """Width that it projects down from. Both times the experts that serve a token."""

    experts: int
    """Experts that serve a token; 0 where there are none."""

    hidden_norms: int
    """Norms of hidden states."""

    late_norms: int
    """Those of them after the feed-forward part (OLMo-2, Gemma 2 and 3)."""

    head_norms: int
    """Width of the norms inside attention."""

    norm_operations: int
    """Elementwise operations of all norms, a token."""

    centred_norms: bool
    """LayerNorm, one operation to autograd; an RMSNorm is written out in several."""

    window: int | None
    """Tokens that a sliding-window layer sees; None for full attention."""


@dataclass(frozen=True)
class Trainees:
    """What trains; each trainable number is float32 (`longlora.model.adapters`)."""

    groups: dict[str, int]
    """Trainable numbers by group: lora, norm, embed; or full and bias."""

    frozen: int
    """Numbers that do not train, with the originals that PEFT keeps beside retrained norms and embeddings."""

    frozen_linear: int
    """Those of them in linear layers other than the LM head, which a 4-bit base quantises."""

    largest: int
    """Numbers of the largest trainable tensor."""

    @property
    def numbers(self) -> int:
        return sum(self.groups.values())

    @property
    def whole(self) -> bool:
        """Every weight trains."""
        return "full" in self.groups


@dataclass(frozen=True)
class Anatomy:
    """A model's sizes, in numbers; nothing here depends on the context."""

    architecture: str
    parameters: int
    """All weights, tied ones once."""

    hidden: int
    heads: int
    key_heads: int
    head_width: int
    value_width: int
    vocabulary: int
    """Rows of the LM head."""

    window: int | None
    """Tokens that the config declares."""

    rotary: int
    """Numbers a token that rotary positions turn in one layer, queries and keys together."""

    tied: bool
    """The LM head is the embedding."""

    written_out: bool
    """Soft-capped scores: no fused kernel serves them, so scores of a tile exist."""

    tiles: bool
    """The feed-forward parts can run a tile of tokens at a time."""

    layer_tiles: bool
    """Whole layers can."""

    checkpoints: bool
    """Transformers has gradient checkpointing of it."""

    final_norm_operations: int
    layers: tuple[LayerShape, ...]
    trainees: Trainees

    @cached_property
    def kinds(self) -> tuple[tuple[LayerShape, int], ...]:
        """Layers that differ, with how many there are of each."""
        return tuple(Counter(self.layers).items())

    @property
    def head_weights(self) -> int:
        """Multiply-adds a token of the LM head."""
        return self.hidden * self.vocabulary
