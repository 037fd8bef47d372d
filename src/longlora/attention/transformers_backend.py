"""`s2_attn` as an attention implementation of transformers: S2 while training, the model's own attention otherwise.

No class is patched. A hook before each forward chooses the implementation by the model's mode, so `eval()` is the
model's ordinary attention itself. The paper trains with S2-Attn and keeps full attention for inference (section 3.2).
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel

from longlora.attention.backends import check_backend
from longlora.attention.compiled import compiled_layer_attention
from longlora.attention.kernels import Scoring
from longlora.attention.patterns import FIRST_DRAW, PLAIN, Draw, warn_of_leak
from longlora.attention.state import LayerCall, ShiftedAttentionState, layer_attention
from longlora.errors import UserError, check_choice
from longlora.model.positions import present_context
from longlora.settings import PATTERNS, PatternOptions

IMPLEMENTATION = "s2_attn"

_STATE = "shifted_attention_state"

_WITHOUT_EFFECT = frozenset(
    "position_ids position_embeddings cache_position use_cache is_causal return_dict num_items_in_batch "
    "output_attentions output_hidden_states output_router_logits "
    "cu_seq_lens_q cu_seq_lens_k max_length_q max_length_k".split()
)
"""Keywords models hand on that do not change what attention computes here; packing is read from position_ids."""


def use_shifted_attention(
    model: nn.Module,
    group_size: int | None = None,
    pattern: str = "shift",
    *,
    inference: bool = False,
    options: PatternOptions = PLAIN,
    full_layers: Sequence[int] = (),
    full_layers_share: float = 0.0,
    draw: Draw = FIRST_DRAW,
    backend: str = "auto",
) -> nn.Module:
    """Let `model` train with S2-Attn: `model.train()` uses it, `model.eval()` the model's ordinary full attention.

    May be called again to change the group size or the pattern.

    Args:
        model: a transformers decoder, also one wrapped by PEFT.
        group_size: G in tokens; default a quarter of the model's window.
        pattern: a name of `longlora.settings.PATTERNS`; `full` is causal attention through the same code.
        inference: use the pattern in `eval()` too, for ablations (paper table 2); without a KV cache.
        options: additions to the pattern.
        full_layers: layers that keep full attention, counted from 0 (negative: from the last, -1) among those that
            have it in the model itself.
        full_layers_share: share of the other layers, drawn anew for each forward pass, that has full attention in it.
        draw: what random choices are drawn from. Each forward pass in training takes the next `turn` of it.
        backend: what computes it, a name of `longlora.settings.ATTENTION_BACKENDS`; layers with a sliding window of
            their own keep PyTorch's SDPA.

    Returns:
        `model` itself.

    Raises:
        UserError: a model that takes no attention implementation (ALiBi among them), a group below 2 tokens, an
            unknown pattern or an option that it cannot have, a layer that there is not, or
            a backend that cannot act on this machine.
    """
    check_choice("pattern", pattern, PATTERNS)
    options.check(pattern)
    warn_of_leak(pattern)
    check_backend(backend)
    models = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    if not models:
        raise UserError(f"{type(model).__name__} is not a transformers model: S2-Attn needs a PreTrainedModel.")
    base = models[0]
    _check_served(base)
    config = base.config.get_text_config()
    if group_size is None:
        group_size = max(2, present_context(config) // 4)
    if not isinstance(group_size, int) or group_size < 2:
        raise UserError(f"group_size is {group_size}: it must be a whole number of at least 2 tokens.")

    previous: ShiftedAttentionState | None = getattr(base, _STATE, None)
    present = config._attn_implementation
    layers = _global_layers(config)
    full = _counted_from_first(full_layers, len(layers))
    state = ShiftedAttentionState(
        group_size=group_size,
        pattern=pattern,
        inference=inference,
        ordinary=previous.ordinary if previous else present if present != IMPLEMENTATION else "sdpa",
        global_layers=layers,
        options=options,
        full_layers=full,
        full_layers_share=full_layers_share,
        backend=backend,
        draw=replace(draw, turn=draw.turn - 1),
    )
    if previous:
        previous.become(state)  # the hooks know it, and so does a compiled graph
        return model
    for module in base.modules():
        if hasattr(module, "layer_idx") or module is base:
            setattr(module, _STATE, state)
    for module in models:
        module.register_forward_pre_hook(_ChooseImplementation(state, outermost=module is base))
    base.register_forward_hook(_ProveServed(state))
    return model


def _check_served(model: PreTrainedModel) -> None:
    name, config = type(model).__name__, model.config.get_text_config()
    if getattr(config, "alibi", False) or not type(model)._can_set_attn_implementation():
        raise UserError(
            f"{name} does not take an attention implementation from transformers (AttentionInterface; models with "
            "ALiBi such as Bloom, MPT and Falcon do not): S2-Attn cannot serve it. Use a decoder with rotary positions "
            "such as Llama, Mistral, Qwen, Phi-3, GPT-NeoX, OLMo-2 or Gemma."
        )
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    unknown = kinds - {"full_attention", "sliding_attention", "linear_attention"}
    if unknown:
        raise UserError(f"{name} has layers of type {', '.join(sorted(unknown))}, which S2-Attn does not serve.")
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(f"{name} is an encoder-decoder: S2-Attn serves decoder-only language models.")


def _global_layers(config: PreTrainedConfig) -> dict[int, int]:
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    layers = [index for index, kind in enumerate(kinds) if kind == "full_attention"]
    return {layer: ordinal for ordinal, layer in enumerate(layers)}


def draw_from(model: nn.Module, draw: Draw) -> None:
    """Let the next forward passes of `model` in training draw from `draw`, with its `turn` counted up at each.

    Raises:
        UserError: `model` does not train with S2-Attn.
    """
    state = next((getattr(module, _STATE) for module in model.modules() if hasattr(module, _STATE)), None)
    if state is None:
        raise UserError(f"{type(model).__name__} has no S2-Attn: call longlora.use_shifted_attention(model) first.")
    state.draw = replace(draw, turn=draw.turn - 1)


def _counted_from_first(layers: Sequence[int], count: int) -> frozenset[int]:
    for layer in layers:
        if not -count <= layer < count:
            raise UserError(
                f"full-attention layer {layer} is not there: the model has {count} layers with full attention, from 0 "
                f"to {count - 1}, or from -1 back to -{count}."
            )
    return frozenset(layer % count for layer in layers)


class _ChooseImplementation:
    """Pre-forward hook: S2 in training, the model's own attention in evaluation."""

    def __init__(self, state: ShiftedAttentionState, outermost: bool):
        self.state, self.outermost = state, outermost

    def __call__(self, module: PreTrainedModel, arguments: tuple[Any, ...]) -> None:
        wanted = IMPLEMENTATION if module.training or self.state.inference else self.state.ordinary
        if module.config._attn_implementation != wanted:
            module.config._attn_implementation = wanted
        if self.outermost:
            self.state.served = 0


class _ProveServed:
    """Post-forward hook: a training pass that never reached S2-Attn is an error, not silent full attention."""

    def __init__(self, state: ShiftedAttentionState):
        self.state = state

    def __call__(self, module: nn.Module, arguments: tuple[Any, ...], output: object) -> None:
        if module.training and not torch.compiler.is_compiling() and not self.state.served:
            raise UserError(
                f"{type(module).__name__} never called the attention implementation '{IMPLEMENTATION}': its layers "
                "compute attention themselves, so S2-Attn cannot serve it."
            )


def shifted_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_ids: Tensor | None = None,
    **keywords: Any,
) -> tuple[Tensor, None]:
    """The attention function of transformers' AttentionInterface.

    Args:
        query: (B, H, N, D); key: (B, Hkv, N, D); value: (B, Hkv, N, Dv).
        attention_mask: (B, N), nonzero where there is a token, or None.
        position_ids: (B, N) or (1, N); packed documents show as positions that restart.

    Returns:
        (B, N, H, Dv), and no attention weights.

    Raises:
        UserError: a keyword, mask or cache that S2-Attn cannot honour.
    """
    state: ShiftedAttentionState | None = getattr(module, _STATE, None)
    if state is None:
        raise UserError(
            f"attention implementation '{IMPLEMENTATION}' is set, but the group size is not known: call "
            "longlora.use_shifted_attention(model, group_size) first."
        )
    _refuse_what_cannot_be_honoured(query, key, attention_mask, position_ids, module, keywords)
    window = sliding_window if sliding_window is not None and query.shape[2] > sliding_window else None
    scoring = Scoring(scaling, dropout if module.training else 0.0, softcap, s_aux)
    call = LayerCall(cast(int, module.layer_idx), attention_mask, position_ids, scoring, window)
    if torch.compiler.is_compiling() and not scoring.dropout:
        return compiled_layer_attention(state, call, module.training, query, key, value), None
    return _outside_a_graph(state, call, module.training, query, key, value), None


@torch.compiler.disable
def _outside_a_graph(
    state: ShiftedAttentionState, call: LayerCall, training: bool, query: Tensor, key: Tensor, value: Tensor
) -> Tensor:
    draw = state.begin_layer(call.layer, training)
    state.served += 1
    return layer_attention(state, call, draw, query, key, value)


def _refuse_what_cannot_be_honoured(
    query: Tensor,
    key: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    module: nn.Module,
    keywords: dict[str, Any],
) -> None:
    unknown = sorted(
        name
        for name, given in keywords.items()
        if name not in _WITHOUT_EFFECT and given is not None and given is not False
    )
    if unknown:
        raise UserError(
            f"{type(module).__name__} hands attention the keyword '{unknown[0]}', which S2-Attn does not honour; "
            "the model cannot be trained with it."
        )
    if keywords.get("is_causal") is False or getattr(module, "is_causal", True) is False:
        raise UserError(f"{type(module).__name__} is not causal: S2-Attn serves causal self-attention only.")
    if key.shape[2] != query.shape[2]:
        raise UserError(
            f"{query.shape[2]} queries and {key.shape[2]} keys: S2-Attn has no KV cache; pass use_cache=False, or call "
            "model.eval(), which uses the model's full attention."
        )
    if attention_mask is not None and attention_mask.ndim != 2:
        raise UserError(
            f"the attention mask is {tuple(attention_mask.shape)}: S2-Attn takes a padding mask of shape (B, N); give "
            "packed documents through position_ids that restart."
        )
    if position_ids is not None and position_ids.ndim != 2:
        raise UserError(f"position_ids is {tuple(position_ids.shape)}: S2-Attn takes (B, N).")


def padding_mask(kv_length: int, attention_mask: Tensor | None = None, **_: Any) -> Tensor | None:
    """The mask function of transformers' AttentionMaskInterface: the padding mask (B, N) as it is, or None.

    transformers' own for flash attention asks whether there is padding at all, which would break a compiled graph.
    """
    return None if attention_mask is None else attention_mask[:, -kv_length:]


AttentionInterface.register(IMPLEMENTATION, shifted_attention_forward)
AttentionMaskInterface.register(IMPLEMENTATION, padding_mask)
