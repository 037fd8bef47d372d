"""Floating-point operations of a forward pass and of a training step, by part, in closed form.

The paper's convention (table 7): 2 for each multiply-add, every query meets every key of its row or group (causality
is not halved), so S2-Attn costs `group / context` of full attention. Its numbers come out, to 0.1 TFLOP, with

    attention    query times key, weight times value
    projection   the linear layers in attention
    ffn          the linear layers of the feed-forward part, and 1 for each product of gate and value
    other        the LM head; 4 for each number that a norm writes (square, sum, scale, weigh), 3 for each that rotary
                 positions turn, 1 for each that a residual connection adds

and the paper's totals are the sums of its rounded parts. Softmax and activation functions are left out. What a causal
kernel really computes is counted besides, in query-key pairs.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache

from longlora.attention.layout import plan, query_key_pairs
from longlora.attention.patterns import layers_drawn
from longlora.planner.anatomy import Anatomy, LayerShape
from longlora.settings import AttentionSettings, PatternOptions

FLASH_BACKWARD = 2.5
"""Backward of fused attention over its forward: five matrix products, two of them anew, against two."""


@dataclass(frozen=True)
class Flops:
    """Operations of one forward pass of one row, by part."""

    attention: int
    projection: int
    ffn: int
    other: int

    @property
    def total(self) -> int:
        return self.attention + self.projection + self.ffn + self.other

    def document(self) -> dict[str, int]:
        return {**asdict(self), "total": self.total}

    def table7(self) -> dict[str, float]:
        """TFLOP to 0.1, where the total adds up the rounded parts, as the paper prints them."""
        parts = {name: round(value / 1e12, 1) for name, value in asdict(self).items()}
        return parts | {"total": round(sum(parts.values()), 1)}


def forward_flops(anatomy: Anatomy, context: int, group_size: int | None = None) -> Flops:
    """Operations of a forward pass over a row of `context` tokens, in the paper's convention.

    Args:
        group_size: tokens that attend to each other in S2-Attn or another pattern of its cost; None for full attention.
    """
    reach = min(group_size or context, context)
    keys = sum(count * min(layer.window or reach, context) for layer, count in anatomy.kinds)
    return _with_linear(anatomy, context, _a_pair(anatomy) * anatomy.heads * context * keys)


def causal_flops(anatomy: Anatomy, context: int, attention: AttentionSettings, pattern: str, group_size: int) -> Flops:
    """The same with attention as causal kernels compute it: only the pairs that are seen."""
    pairs = attention_pairs(anatomy, context, attention, pattern, group_size)
    return _with_linear(anatomy, context, _a_pair(anatomy) * pairs)


def attention_pairs(anatomy: Anatomy, context: int, attention: AttentionSettings, pattern: str, group_size: int) -> int:
    """Query-key pairs seen in a row of `context` tokens that is one document, over all query heads and layers.

    Args:
        attention: which layers keep full attention, and additions to its own pattern.
        pattern: `attention.pattern`, or `full`.
    """
    row = (((0, context),),)
    options = attention.options if pattern == attention.pattern else PatternOptions()

    @cache
    def pairs(kind: str, layer: int, window: int | None) -> int:
        if window is not None:
            seen = min(window, context)
            return anatomy.heads * (seen * (seen + 1) // 2 + (context - seen) * seen)
        own = options if kind == pattern else PatternOptions()
        return query_key_pairs(plan(row, context, anatomy.heads, anatomy.key_heads, group_size, kind, layer, own))

    return round(sum(count * pairs(*kind) for count, *kind in attention_kinds(anatomy, attention, pattern)))


def attention_kinds(
    anatomy: Anatomy, attention: AttentionSettings, pattern: str
) -> Iterator[tuple[float, str, int, int | None]]:
    """(layers, pattern, ordinal as far as it matters, sliding window) of each kind of attention in the model.

    Layers are a mean over forward passes where those with full attention are drawn: each is as likely as another.
    """
    for layer, count in anatomy.kinds:
        if layer.window is not None:
            yield count, "full", 0, layer.window
    layers = [layer.window for layer in anatomy.layers].count(None)
    full = {layer % layers for layer in attention.full_attention_layers} if layers else set()
    others = [layer for layer in range(layers) if layer not in full]
    drawn = layers_drawn(attention.full_layers_share, len(others))
    if drawn or full:
        yield len(full) + drawn, "full", 0, None
    for parity in (0, 1):
        if count := sum(layer % 2 == parity for layer in others):
            yield count * (1 - drawn / len(others)), pattern, parity, None


def training_flops(anatomy: Anatomy, forward: Flops, context: int, gradient_checkpointing: bool) -> int:
    """Operations of forward and backward over one row, with what is computed anew.

    Frozen matrices pass gradients on but have none of their own; the LM head always runs twice, chunk by chunk.
    """
    head = 2 * context * anatomy.head_weights
    layers = forward.total - head
    linear = layers - forward.attention
    backward = FLASH_BACKWARD * forward.attention + linear + head
    if anatomy.trainees.whole:
        backward += linear + head
    elif anatomy.tied and "embed" in anatomy.trainees.groups:
        backward += head
    adapters = 2 * context * anatomy.trainees.groups.get("lora", 0)
    anew = head + (layers if gradient_checkpointing else 0)
    return round(forward.total + backward + anew + adapters * (4 if gradient_checkpointing else 3))


def _a_pair(anatomy: Anatomy) -> int:
    """Operations for one query and one key of one head."""
    return 2 * (anatomy.head_width + anatomy.value_width)


def _with_linear(anatomy: Anatomy, context: int, attention: int) -> Flops:
    def total(value: Callable[[LayerShape], int]) -> int:
        return sum(value(layer) * count for layer, count in anatomy.kinds)

    def elementwise(layer: LayerShape) -> int:
        return layer.norm_operations + 3 * anatomy.rotary + 2 * anatomy.hidden

    other = 2 * anatomy.head_weights + anatomy.final_norm_operations + total(elementwise)
    return Flops(
        attention=attention,
        projection=context * 2 * total(lambda layer: layer.projection_weights),
        ffn=context * total(lambda layer: 2 * layer.feedforward_weights + layer.up - layer.middle),
        other=context * other,
    )
