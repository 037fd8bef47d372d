"""Bytes that a training step holds on one device, by part, at the moments where memory peaks: a formula, nothing runs.

What `longlora.training.trainer` does is written down term by term: a base in the precision of the run, whatever trains
in float32 (weight, gradient, two moments of AdamW), autocast, each layer computed anew in its backward pass, the LM
head on some tokens at a time. Memory peaks at one of four moments:

    loss        backward of one chunk of logits, all that the layers keep still there
    layer       backward of a layer, most often of the last one's feed-forward part
    embedding   the gradient of the embedding, as large as the embedding
    optimizer   AdamW's temporaries, no activations

`longlora.planner.measure` runs the step and counts; the two agree within a few per cent (docs/performance.md).
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields

from longlora.planner.anatomy import Anatomy, LayerShape
from longlora.planner.layer_memory import LayerBytes, Step, layer_bytes, norm_bytes, stream_bytes

QUANTISED = (4 + 8 / 64 + 32 / (64 * 256)) / 8
"""Bytes of a number in 4-bit NormalFloat: 64 share an 8-bit scale, 256 scales a float32 (QLoRA, arXiv 2305.14314)."""

LOSS_BYTES = 12
"""Of a logit in the backward of cross-entropy: log-softmax, its gradient and the loss's, each in float32."""

NORM_BYTES = 25
"""Of a hidden number in the backward of an RMSNorm, which is written out in float32."""

LOSS_FORWARD_BYTES = 8
"""Of a logit in the forward pass: the float32 logit and its log-softmax."""


@dataclass(frozen=True)
class Memory:
    """Bytes by part."""

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    logits: int = 0
    """Of a chunk of tokens, and what the gradient of a head that trains takes while it is summed."""

    workspace: int = 0
    """Weights gathered, unpacked or cast, and the optimizer's temporaries."""

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


def step_memory(anatomy: Anatomy, step: Step) -> dict[str, Memory]:
    """Bytes by part at each moment of `step`; the step needs the largest total of them."""
    return _Device(anatomy, step).moments()


def peak(moments: dict[str, Memory]) -> str:
    """The moment that needs most."""
    return max(moments, key=lambda name: moments[name].total)


def host_bytes(anatomy: Anatomy, step: Step) -> int:
    """Bytes that offloading moves to the host, for each device."""
    device = _Device(anatomy, step)
    inputs = len(anatomy.layers) * device.layer_input if step.offload_activations else 0
    return round(inputs + (8 * device.trainable if step.offload_optimizer else 0))


class _Device:
    """The ledger of one device."""

    def __init__(self, anatomy: Anatomy, step: Step):
        self.anatomy, self.step = anatomy, step
        trainees = anatomy.trainees
        share = step.gpus if step.shard else 1
        frozen: float = trainees.frozen * step.number
        if step.base_bits == 4:
            frozen += trainees.frozen_linear * (QUANTISED - step.number)
        self.trainable = trainees.numbers / share
        self.weights = frozen / share + 4 * self.trainable
        copies = 2 if step.gpus > 1 and not step.shard else 1  # data parallelism sends gradients in buckets
        self.gradients = 4 * self.trainable * copies
        self.optimizer = 0 if step.offload_optimizer else 8 * self.trainable
        self.embedding = anatomy.head_weights
        self.embedding_trains = trainees.whole or "embed" in trainees.groups
        self.head_trains = trainees.whole or (anatomy.tied and self.embedding_trains)
        self.casts_weights = trainees.whole and step.low_precision
        self.layer_input = step.tokens * anatomy.hidden * stream_bytes(anatomy, step)
        self.kinds = [(layer_bytes(anatomy, layer, step), layer, count) for layer, count in anatomy.kinds]
        self.kept = self._kept()

    def moments(self) -> dict[str, Memory]:
        found = {"loss": self.loss(), "layer": self.layer()}
        if self.embedding_trains:
            found["embedding"] = self.embedding_gradient()
        return found | {"optimizer": self.optimizer_step()}

    def loss(self) -> Memory:
        """The backward of a chunk of logits; or its forward, while autocast still holds a copy of every weight."""
        anatomy, step = self.anatomy, self.step
        chunk = min(step.loss_chunk or step.tokens, step.tokens)
        logits: float = LOSS_BYTES * chunk * anatomy.vocabulary
        if self.head_trains:
            gradient = step.number * self.embedding
            if chunk == step.tokens:
                logits = max(logits, gradient) + (gradient if step.low_precision else 0)  # the weight's cast, as large
            else:  # a sum of gradients in float32 and the weight's cast; then a new gradient and the new sum
                summed, cast = 4 * self.embedding, gradient if step.low_precision else 0
                logits = max(logits + summed + cast, 3 * summed)
        gradients = self.gradients if step.accumulates else 0
        if step.layer_tile:  # what enters the norm and the head, or its gradient in chunks and whole; then the norm's
            inputs = self._inputs() + 3 * self.layer_input
            norm = self.layer_input + step.tile_tokens * NORM_BYTES * anatomy.hidden
            return _larger([self._memory(gradients, inputs, logits=logits), self._memory(gradients, inputs + norm)])
        activations = self.kept + step.tokens * anatomy.hidden * norm_bytes(anatomy, anatomy.layers[-1])
        if step.loss_chunk is not None:
            activations += 2 * self.layer_input  # the scored tokens and their gradient
        backward = self._memory(gradients, activations, logits=logits, workspace=self._kept_casts())
        if not (self.casts_weights and step.gradient_checkpointing):
            return backward
        casts = 2 * (anatomy.parameters - (0 if anatomy.tied else self.embedding))
        logits = (LOSS_FORWARD_BYTES + (2 if step.loss_chunk is None else 0)) * chunk * anatomy.vocabulary
        return _larger([backward, self._memory(gradients, activations, logits=logits, workspace=casts)])

    def layer(self) -> Memory:
        """The last layer's backward, or the first's where gradients come into being as activations go."""
        step = self.step
        waiting = 4 * self.embedding if self.head_trains and self.anatomy.tied else 0  # for the embedding's gradient
        present = self.gradients
        if not step.accumulates and self.embedding_trains:
            present -= min(present, 4 * self.embedding)
        inside, workspace = max((self._inside(*kind) for kind in self.kinds), key=sum)
        if step.base_bits == 4:  # one matrix at a time is unpacked
            workspace += step.number * max(layer.largest_weight for _, layer, _ in self.kinds)
        last = self._memory(
            (present if step.accumulates else 0) + waiting,
            (0 if step.offload_activations else self.kept) + inside + self._tables(),
            workspace=workspace + self._kept_casts(),
        )
        first = 0 if step.offload_activations else 2 * self.layer_input
        return _larger([last, self._memory(present + waiting, first + inside, workspace=workspace)])

    def embedding_gradient(self) -> Memory:
        step = self.step
        fresh = 4 * self.embedding * (2 if self.head_trains and self.anatomy.tied else 1)
        if not step.accumulates:
            fresh -= 4 * self.embedding
        widened = 4 * step.tokens * self.anatomy.hidden if stream_bytes(self.anatomy, step) == 2 else 0
        return self._memory(self.gradients + fresh, self.layer_input + widened)

    def optimizer_step(self) -> Memory:
        trainees, step = self.anatomy.trainees, self.step
        temporaries = 4 * max(trainees.groups.values()) if step.foreach else 8 * trainees.largest
        share = step.gpus if step.shard else 1
        return self._memory(self.gradients, workspace=0 if step.offload_optimizer else temporaries / share)

    def _memory(self, gradients: float, activations: float = 0, *, logits: float = 0, workspace: float = 0) -> Memory:
        parts = (self.weights, gradients, self.optimizer, activations, logits, workspace + self._gathered())
        return Memory(*(round(part) for part in parts))

    def _inputs(self) -> float:
        """Of all layers, as far as they are on the device."""
        return 0 if self.step.offload_activations else len(self.anatomy.layers) * self.layer_input

    def _kept(self) -> float:
        """By all layers when the last has run."""
        step, layers = self.step, len(self.anatomy.layers)
        if step.gradient_checkpointing:
            return self.layer_input * (1 if step.offload_activations else layers)
        inputs = self.layer_input * layers if stream_bytes(self.anatomy, step) == 4 else 0
        return inputs + step.tokens * sum(layer.kept * count for layer, _, count in self.kinds)

    def _kept_casts(self) -> float:
        """Autocast's copies of matrices, held by the graph of layers that are not computed anew."""
        if not self.casts_weights or self.step.gradient_checkpointing:
            return 0
        return 2 * sum(layer.weights for layer in self.anatomy.layers)

    def _gathered(self) -> float:
        """Weights made whole: two layers and what lies outside them under FSDP2."""
        anatomy, step = self.anatomy, self.step
        found: float = 0
        if step.shard and step.gpus > 1:
            outside = self.embedding * (1 if anatomy.tied else 2)
            largest = max(layer.weights for layer, _ in anatomy.kinds)
            found += (4 if anatomy.trainees.whole else step.number) * (outside + 2 * largest)
        return found

    def _inside(self, layer: LayerBytes, shape: LayerShape, _count: int) -> tuple[float, float]:
        """What the backward of one layer adds to what is kept, and its copies and gradients of matrices."""
        step = self.step
        if step.layer_tile:
            return self._inside_in_tiles(layer, shape)
        kept = 0 if step.gradient_checkpointing else layer.kept
        early = layer.attention + layer.norms
        a_token = [
            layer.kept,
            early + layer.feedforward + layer.feedforward_backward,
            early + layer.norm_backward,
            layer.attention + layer.attention_backward,
        ]
        if not self.anatomy.trainees.whole:
            return self.layer_input + step.tokens * (max(a_token) - kept), 0
        casts = 2 * shape.weights if step.low_precision and step.gradient_checkpointing else 0
        used = 2 * shape.largest_weight if casts else 0  # the cast of the matrix that is done with
        first = early + layer.feedforward + layer.feedforward_first
        candidates = [(max(a_token), casts - used), (first, casts + step.number * shape.largest_weight)]
        if step.tiled_mlp:  # the matrices' gradients are summed over the tiles before any is handed on
            sums = 4 * shape.feedforward_weights
            candidates.append((a_token[1], casts - used + sums))
        most, matrices = max(candidates, key=lambda part: step.tokens * part[0] + part[1])
        return self.layer_input + step.tokens * (most - kept), matrices

    def _inside_in_tiles(self, layer: LayerBytes, shape: LayerShape) -> tuple[float, float]:
        """The same of a layer in tiles: two gradients, keys and values with theirs in float32, and a tile's backward.

        A tile's attention sums the gradients of what it reads of earlier tokens in float32, and hands them on.
        """
        step, pair = self.step, shape.key + shape.value
        early = layer.attention + layer.norms
        later = max(layer.late_norms + layer.feedforward, layer.feedforward + layer.feedforward_backward)
        feedforward = early + max(later, layer.norm_backward)
        halo = max(0, min(step.group_size or step.context, step.context) - step.tile) * step.rows
        attention = step.tile_tokens * (layer.attention + layer.attention_backward) + halo * (4 + step.number) * pair
        inside = self.layer_input * 2 + max(step.tile_tokens * feedforward, attention)
        inside += step.tile_tokens * self.anatomy.hidden * 2 * stream_bytes(self.anatomy, step)  # its input and output
        if step.tile_tokens < step.tokens or step.halo:
            number = 4 + step.number
            kept = (step.tokens + step.halo * step.rows) * number * pair
            inside += kept + step.tile_tokens * step.number * pair
            if step.halo:  # what comes back to a piece's own keys and values, when all tiles are done
                inside = max(inside, self.layer_input * 2 + kept + step.tokens * number * pair)
        if not self.anatomy.trainees.whole:
            return inside, 0
        casts = 2 * shape.weights if step.low_precision else 0
        return inside, 4 * shape.weights + casts + step.number * shape.largest_weight

    def _tables(self) -> float:
        """Of the rotary positions, which layers in tiles share as all layers do; small beside what others keep."""
        anatomy, step = self.anatomy, self.step
        width = anatomy.rotary / (anatomy.heads + anatomy.key_heads)
        return step.tokens / step.rows * 2 * width * step.number if step.layer_tile else 0


def _larger(candidates: Iterable[Memory]) -> Memory:
    return max(candidates, key=lambda memory: memory.total)
