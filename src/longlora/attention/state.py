"""What the attention layers of one model share, what the layers of one forward pass share, and what each computes."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from longlora.attention.backends import attend
from longlora.attention.block_attention import Halo
from longlora.attention.kernels import Scoring
from longlora.attention.layout import Documents, HeadSetPlan, documents_from_model_inputs, first_key, plan
from longlora.attention.patterns import FIRST_DRAW, Draw, layers_drawn, random_choices
from longlora.errors import UserError
from longlora.model.pieces import Piece
from longlora.settings import PatternOptions


@dataclass(eq=False)
class ShiftedAttentionState:
    """What the attention layers of one model share."""

    group_size: int
    pattern: str
    inference: bool
    ordinary: str
    """The model's own attention implementation, used outside training."""
    global_layers: dict[int, int]
    """Layer index -> ordinal among the layers with full attention."""
    options: PatternOptions
    full_layers: frozenset[int]
    """Ordinals of the layers that keep full attention."""
    full_layers_share: float = 0.0
    """Share of the other layers, drawn anew for each forward pass, that has full attention in it."""
    backend: str = "auto"
    """A name of `longlora.settings.ATTENTION_BACKENDS`."""
    next_draw: Draw = FIRST_DRAW
    """What the random choices of the next forward pass are drawn from."""
    served: int = 0
    """Layer calls answered in the present forward pass."""

    def is_full(self, ordinal: int, draw: Draw) -> bool:
        """Whether this layer has full attention in the forward pass that draws from `draw`."""
        if ordinal in self.full_layers:
            return True
        others = [layer for layer in range(len(self.global_layers)) if layer not in self.full_layers]
        chosen = random.Random(draw.place("full layers")).sample(
            others, layers_drawn(self.full_layers_share, len(others))
        )
        return ordinal in chosen

    def plans(
        self,
        layer: int,
        documents: Documents,
        length: int,
        heads: int,
        key_heads: int,
        draw: Draw,
        piece: tuple[int, int] | None = None,
    ) -> tuple[HeadSetPlan, ...]:
        """What each set of heads of layer `layer` does with rows of `length` tokens, or with a piece of them."""
        ordinal = self.global_layers.get(layer)
        sizes = (documents, length, heads, key_heads, self.group_size)
        if ordinal is None or self.pattern == "full" or self.is_full(ordinal, draw):
            return plan(*sizes, "full", piece=piece)
        drawn = draw if random_choices(self.pattern, self.options) else FIRST_DRAW
        return plan(*sizes, self.pattern, ordinal, self.options, drawn, piece=piece)


def refuse_changed_masks() -> NoReturn:
    """Raises UserError: the model works on what attention is told of padding and documents."""
    raise UserError(
        "this model's own code changes the attention mask, which S2-Attn does without: it cannot serve the model. "
        "Use another decoder with rotary positions, such as Llama, Mistral, Qwen, Phi-3, GPT-NeoX, OLMo-2 or Gemma."
    )


@dataclass(eq=False)
class ForwardPass:
    """What the layers of one forward pass share. It stands where transformers hands a mask to every layer.

    So it goes wherever a mask goes: to each layer, and through gradient checkpointing of either kind to the same layer
    computed again, which therefore draws as it did, whatever other passes have begun since.
    """

    padding: Tensor | None
    """(B, N), nonzero where there is a token, or None."""
    arguments: dict[str, Any]
    """What transformers' own mask functions are called with."""
    draw: Draw | None = None
    documents: Documents | None = None
    masks: dict[str, Any] = field(default_factory=dict)
    piece: Piece | None = None
    """Of its rows, where this process computes a piece of them."""

    @property
    def dtype(self) -> torch.dtype:
        """What a model asks for that works on the mask itself before attention gets it; raises UserError."""
        refuse_changed_masks()

    def __radd__(self, _scores: object) -> Any:
        """What a model asks for that computes attention by itself (GIT); raises UserError."""
        refuse_changed_masks()

    def draw_for(self, state: ShiftedAttentionState, training: bool) -> Draw:
        """What this pass draws from. The first training layer that asks takes the model's next turn for it."""
        if self.draw is None:
            self.draw = state.next_draw
            if training:
                state.next_draw = replace(self.draw, turn=self.draw.turn + 1)
        return self.draw

    def documents_of(self, rows: int, length: int, positions: Tensor | None, piece: Piece | None) -> Documents:
        """The documents of `rows` rows of `length` tokens, or of the rows that `piece` is of."""
        if self.documents is None:
            told = (
                (length, self.padding, positions) if piece is None else (piece.length, piece.padding, piece.positions)
            )
            self.documents = documents_from_model_inputs(rows, *told)
        return self.documents

    def ordinary_mask(self, implementation: str) -> Any:
        """The mask that transformers makes for another attention implementation."""
        if implementation not in self.masks:
            make = ALL_MASK_ATTENTION_FUNCTIONS.get(implementation)
            self.masks[implementation] = make(**self.arguments) if make else None
        return self.masks[implementation]


@dataclass(frozen=True)
class LayerCall:
    """One call of one layer's attention, but for query, key and value.

    Attributes:
        layer: the model's own index of the layer.
        documents: of every row.
        draw: of the forward pass.
        scoring: scale, dropout, softcap and sinks.
        window: tokens of the layer's sliding window where the row is longer, else None.
        piece: of the rows, or None where query, key and value are the whole rows'.
    """

    layer: int
    documents: Documents
    draw: Draw
    scoring: Scoring
    window: int | None = None
    piece: Piece | None = None


def layer_attention(state: ShiftedAttentionState, call: LayerCall, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """(B, H, N, D), (B, Hkv, N, D), (B, Hkv, N, Dv) -> (B, N, H, Dv), contiguous.

    Raises:
        UserError: a sliding window in a model of nothing else, or a backend that cannot act.
    """
    _, heads, length, _ = query.shape
    piece, key_heads = call.piece, key.shape[1]
    start, row = (0, length) if piece is None else (piece.start, piece.length)
    backend = state.backend
    plans_of: Callable[..., tuple[HeadSetPlan, ...]]
    if call.window is None:
        plans_of = partial(state.plans, call.layer, call.documents, row, heads, key_heads, call.draw)
    elif call.layer in state.global_layers or not state.global_layers:
        raise UserError(
            f"every layer of this model attends to the last {call.window:,} tokens only (sliding_window), and "
            f"the row has {row:,}: there is no full attention for S2-Attn to replace. Set sliding_window to "
            "null in the model's config.json to train it with a longer reach."
        )
    else:
        plans_of = partial(plan, call.documents, row, heads, key_heads, 2, "full", window=call.window)
        backend = "auto"  # parts of a window are for the kernels that `auto` takes, whatever serves the global layers
    halo = None
    if piece is not None:
        key, value, earlier = piece.with_earlier(key, value, lambda cut: first_key(plans_of(piece=cut), cut[0]))
        halo = None if earlier is None else Halo(*earlier)
    plans = plans_of(piece=(start, start + length))
    output = attend(query, key, value, plans, call.scoring, backend, start=start, halo=halo)
    return output.transpose(1, 2).contiguous()
