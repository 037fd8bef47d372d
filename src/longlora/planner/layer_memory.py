"""What autograd keeps of one decoder layer for its backward pass, in bytes a token.

Read off what transformers' layers, PEFT's LoRA and `longlora.model.precision` do to a tensor, and checked against what
is counted (`tests/test_plan_memory.py`): RMSNorms work in float32, trained matrices read copies of their own.
"""

from dataclasses import dataclass

from longlora.attention.kernels import LARGEST
from longlora.planner.anatomy import Anatomy, LayerShape


@dataclass(frozen=True, kw_only=True)
class Step:
    """A training step as one device meets it."""

    context: int
    """Tokens a row."""

    rows: int = 1
    """Rows on the device at a time."""

    group_size: int | None = None
    """Tokens that attend to each other; None for full attention."""

    low_precision: bool = True
    """The base and the arithmetic are bfloat16 or float16; else float32."""

    loss_chunk: int | None = 1024
    """Tokens whose logits exist at a time; None for all of them in the model's own loss, as a plain Trainer has it."""

    accumulates: bool = True
    """Gradients of earlier rows of the same optimiser step are there already."""

    gradient_checkpointing: bool = True
    offload_activations: bool = False
    layer_tile: int | None = None
    """Tokens of a row that a layer takes at a time; default all."""

    tiled_mlp: bool = False
    mlp_tile: int | None = None
    """Tokens of a tile; default the width of the hidden states."""

    offload_optimizer: bool = False
    base_bits: int | None = None
    """4 for a quantised base."""

    gpus: int = 1
    shard: bool = False
    """Weights, gradients and optimizer divided over the devices (FSDP2), else copied (data parallelism)."""

    sequence_parallel: int = 1
    """Devices that share a row."""

    foreach: bool = True
    """AdamW steps all tensors of a group at once, PyTorch's way on GPUs; on CPUs one by one."""

    @property
    def tokens(self) -> int:
        """Tokens on the device at a time."""
        return -(-self.context // self.sequence_parallel) * self.rows

    @property
    def halo(self) -> int:
        """Tokens before a piece of a row that its attention reads, at most."""
        if self.sequence_parallel == 1:
            return 0
        own = self.tokens // self.rows
        return min(self.context - own, self.context if self.group_size is None else self.group_size - 1)

    @property
    def tile(self) -> int:
        """Tokens of a row that a layer takes at a time."""
        return min(self.layer_tile or self.context, self.context)

    @property
    def tile_tokens(self) -> int:
        """The same over the rows on the device."""
        return min(self.tile * self.rows, self.tokens)

    @property
    def number(self) -> int:
        """Bytes of a number of the base."""
        return 2 if self.low_precision else 4


@dataclass(frozen=True)
class LayerBytes:
    """Bytes a token that one layer keeps for its backward pass, and that the parts of this pass add."""

    attention: float
    """Kept by the first norm, the projections and attention."""

    norms: float
    """Kept by the norms between attention and the feed-forward part."""

    feedforward: float
    late_norms: float
    """Kept by the norms after the feed-forward part."""

    attention_backward: float
    norm_backward: float
    feedforward_backward: float
    feedforward_first: float
    """What the backward pass of the feed-forward part adds at its start, while the gradient of a matrix is made."""

    @property
    def kept(self) -> float:
        return self.attention + self.norms + self.feedforward + self.late_norms


def layer_bytes(anatomy: Anatomy, layer: LayerShape, step: Step) -> LayerBytes:
    """What autograd keeps of one layer, in bytes a token.

    A frozen matrix needs no input for its backward pass; the LoRA matrices of an attention module share one copy of
    what they read, while, under autocast, each whole matrix that trains takes one of its own.
    """
    hidden, number, whole = anatomy.hidden, step.number, anatomy.trainees.whole
    low = step.low_precision
    norm = norm_bytes(anatomy, layer)
    stream = stream_bytes(anatomy, step)

    attention: float = norm * hidden + norm * layer.head_norms
    if stream == 4:
        attention -= 4 * hidden  # the norm's input is the layer's input itself
    if whole or "lora" in anatomy.trainees.groups:
        copied = layer.projection_inputs if whole else layer.projection_sources
        attention += (2 * copied if low else 4 * hidden) + number * layer.output
    projected = layer.query + layer.key + layer.value
    attention += number * (projected + layer.output) + 4 * anatomy.heads
    if layer.fused and anatomy.rotary:
        attention += number * (layer.query + layer.key)
    # gradients of q, k and v, and beside them what a call returns: those of half of the heads, or of one block
    beside = 0 if anatomy.written_out else projected / 2
    attention_backward: float = number * (layer.output + projected + beside) + 8 * hidden
    pair = layer.key + layer.value
    if step.halo and not step.layer_tile:
        halo = number * pair * step.halo * step.rows / step.tokens
        attention += halo
        # its gradient; and what comes back to a piece's own keys and values is summed in float32
        attention_backward += halo + 4 * pair
    if layer.window is not None and layer.window < step.context:
        attention_backward += 4 * projected  # a token is read by two chunks: summed in float32
    if anatomy.written_out:  # scores before and after the cap, slopes, weights, their gradients, in float32
        attention_backward += 6 * 4 * min(LARGEST / step.tokens, anatomy.heads * step.context)
    gated = layer.up > layer.middle
    feedforward: float = number * (layer.up + (layer.middle if gated else 0))
    feedforward += 2 * number * hidden * layer.experts  # tokens gathered for each expert, and scattered again
    backward: float = number * (layer.middle + layer.up)
    first = 0.0
    if whole:
        feedforward += number * layer.middle + (2 * hidden * layer.up // layer.middle if low else 4 * hidden)
        backward = number * layer.up + (2 * hidden if low else 0)
        first = number * layer.middle + (2 * hidden if low else 0)
    if step.tiled_mlp:
        share = min(1.0, (step.mlp_tile or hidden) / step.tokens)
        backward = (feedforward + backward) * share + number * hidden
        feedforward, first = number * hidden, first * share
    return LayerBytes(
        attention=attention,
        norms=(layer.hidden_norms - layer.late_norms - 1) * norm * hidden,
        feedforward=feedforward,
        late_norms=layer.late_norms * norm * hidden,
        attention_backward=attention_backward,
        norm_backward=(17 if layer.centred_norms else 25 - norm) * hidden,  # what it keeps is freed on the way
        feedforward_backward=backward,
        feedforward_first=first,
    )


def norm_bytes(anatomy: Anatomy, layer: LayerShape) -> int:
    """An RMSNorm keeps its input in float32 and, if its weight trains, the normalised input too."""
    trains = anatomy.trainees.whole or "norm" in anatomy.trainees.groups
    return 8 if trains and not layer.centred_norms else 4


def stream_bytes(anatomy: Anatomy, step: Step) -> int:
    """Bytes of a number of the hidden states between layers: float32 where every weight trains."""
    return 4 if anatomy.trainees.whole else step.number
