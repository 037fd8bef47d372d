"""`s2_attn` as an attention implementation of transformers: S2 while training, the model's own attention otherwise.

No class is patched, and transformers' `set_attn_implementation` has the last word. The paper trains with S2-Attn and
keeps full attention for inference (section 3.2).
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from longlora.attention.backends import check_backend
from longlora.attention.kernels import Scoring
from longlora.attention.patterns import FIRST_DRAW, PLAIN, Draw, warn_of_leak
from longlora.attention.state import (
    ForwardPass,
    LayerCall,
    ShiftedAttentionState,
    layer_attention,
    refuse_changed_masks,
)
from longlora.errors import UserError, check_choice
from longlora.model.pieces import piece_at_work
from longlora.model.positions import window
from longlora.settings import PATTERNS, PatternOptions

IMPLEMENTATION = "s2_attn"

_STATE = "shifted_attention_state"

_WITHOUT_EFFECT = frozenset(
    "position_ids position_embeddings cache_position use_cache is_causal return_dict num_items_in_batch "
    "output_attentions output_hidden_states output_router_logits "
    "cu_seq_lens_q cu_seq_lens_k max_length_q max_length_k".split()
)
"""Keywords models hand on that do not change what attention computes here; packing is read from position_ids."""

_HONOURED = frozenset("scaling dropout sliding_window softcap s_aux".split())


def use_shifted_attention(
    model: nn.Module,
    group_size: int | None = None,
    pattern: str | None = None,
    *,
    inference: bool = False,
    options: PatternOptions = PLAIN,
    full_layers: Sequence[int] = (),
    full_layers_share: float = 0.0,
    draw: Draw = FIRST_DRAW,
    backend: str = "auto",
) -> nn.Module:
    """Let `model` train with S2-Attn: `model.train()` uses it, `model.eval()` the model's ordinary full attention.

    May be called again to change the group size or the pattern. `model.set_attn_implementation("sdpa")` ends it. The
    same without this call: `from_pretrained(..., attn_implementation="s2_attn")`, with the defaults below.

    Args:
        model: a transformers decoder, also one wrapped by PEFT.
        group_size: G in tokens; default what the config says, as in `config.s2_attn = {"group_size": 2048, "pattern":
            "shift"}`, else a quarter of the model's window.
        pattern: a name of `longlora.settings.PATTERNS`; `full` is causal attention through the same code. Default what
            the config says, else `shift`.
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
    models = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    if not models:
        raise UserError(f"{type(model).__name__} is not a transformers model: S2-Attn needs a PreTrainedModel.")
    base = models[0]
    _check_served(base)
    config = base.config.get_text_config()
    layers = _global_layers(config)
    group_size, pattern = _group_and_pattern(config, group_size, pattern)
    options.check(pattern)
    warn_of_leak(pattern)
    check_backend(backend)
    previous = _states(base)
    present = config._attn_implementation
    state = ShiftedAttentionState(
        group_size=group_size,
        pattern=pattern,
        inference=inference,
        ordinary=present if present != IMPLEMENTATION else previous[0].ordinary if previous else _default_of(base),
        global_layers=layers,
        options=options,
        full_layers=_counted_from_first(full_layers, len(layers)),
        full_layers_share=full_layers_share,
        backend=backend,
        next_draw=draw,
    )
    for module in base.modules():
        if hasattr(module, "layer_idx"):
            setattr(module, _STATE, state)
    base.set_attn_implementation({"": IMPLEMENTATION})
    config._attn_implementation = IMPLEMENTATION  # the towers for pictures and sound keep theirs
    if not any(isinstance(hook, _ProveServed) for hook in base._forward_hooks.values()):
        base.register_forward_hook(_ProveServed())
    return model


def draw_from(model: nn.Module, draw: Draw) -> None:
    """Let the next forward passes of `model` in training draw from `draw`, with its `turn` counted up at each.

    A pass keeps what it drew: however many passes begin before its backward, gradient checkpointing computes it again
    with the same. Call it at the beginning of an optimiser step, so that a run which is resumed draws alike:

        longlora.draw_from(model, longlora.Draw(seed=0, step=step))

    Raises:
        UserError: `model` does not train with S2-Attn.
    """
    for module in model.modules():
        if hasattr(module, "layer_idx") and _implementation(module) == IMPLEMENTATION:
            _state_of(module)
    states = _states(model)
    if not states:
        raise UserError(f"{type(model).__name__} has no S2-Attn: call longlora.use_shifted_attention(model) first.")
    for state in states:
        state.next_draw = draw


def _states(model: nn.Module) -> list[ShiftedAttentionState]:
    """One, or one a layer where the layers made them for themselves."""
    found = {id(state): state for module in model.modules() if (state := getattr(module, _STATE, None)) is not None}
    return list(found.values())


def _state_of(layer: nn.Module) -> ShiftedAttentionState:
    """The state of an attention layer; one that `use_shifted_attention` never saw makes one from its config."""
    state: ShiftedAttentionState | None = getattr(layer, _STATE, None)
    if state is None:
        config = cast(PreTrainedConfig, layer.config).get_text_config()
        group_size, pattern = _group_and_pattern(config, None, None)
        warn_of_leak(pattern)
        ordinary, layers = _default_of(layer), _global_layers(config)
        state = ShiftedAttentionState(group_size, pattern, False, ordinary, layers, PLAIN, frozenset())
        setattr(layer, _STATE, state)
    return state


def _implementation(layer: nn.Module) -> str | None:
    return getattr(getattr(layer, "config", None), "_attn_implementation", None)


def _group_and_pattern(config: PreTrainedConfig, group_size: int | None, pattern: str | None) -> tuple[int, str]:
    """What is given, else what the text config says, else the defaults."""
    told = getattr(config, "s2_attn", None) or {}
    if not isinstance(told, dict) or set(told) - {"group_size", "pattern"}:
        raise UserError(
            f"s2_attn in the model's config is {told!r}: it may hold group_size and pattern, as in "
            '{"group_size": 2048, "pattern": "shift"}.'
        )
    pattern = pattern or told.get("pattern", "shift")
    check_choice("pattern", pattern, PATTERNS)
    size = group_size if group_size is not None else told.get("group_size")
    if size is None and (context := window(config)) is not None:
        size = max(2, context // 4)
    if not isinstance(size, int) or size < 2:
        raise UserError(f"group_size is {size}: it must be a whole number of at least 2 tokens.")
    return size, pattern


def _default_of(module: nn.Module) -> str:
    """The attention implementation that transformers takes by itself for the models that `module` is or belongs to."""
    homes = [vars(sys.modules[each.__module__]) for each in type(module).__mro__ if each.__module__ in sys.modules]
    kinds = [kind for home in homes for kind in home.values() if isinstance(kind, type)]
    models = [kind for kind in kinds if issubclass(kind, PreTrainedModel) and kind is not PreTrainedModel]
    return "sdpa" if any(kind._supports_sdpa for kind in models) else "eager"


def _check_served(model: PreTrainedModel) -> None:
    name, config = type(model).__name__, model.config.get_text_config()
    if getattr(config, "alibi", False) or not type(model)._can_set_attn_implementation():
        raise UserError(
            f"{name} does not take an attention implementation from transformers (AttentionInterface; models with "
            "ALiBi such as Bloom, MPT and Falcon do not): S2-Attn cannot serve it. Use a decoder with rotary positions "
            "such as Llama, Mistral, Qwen, Phi-3, GPT-NeoX, OLMo-2 or Gemma."
        )
    if any(hasattr(module, "prepare_dynamic_mask") for module in model.modules()):  # Doge
        refuse_changed_masks()
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


@contextmanager
def inference_with_pattern(model: nn.Module) -> Iterator[None]:
    """The pattern in `eval()` too, where `model` trains with one."""
    before = {state: state.inference for state in _states(model)}
    try:
        for state in before:
            state.inference = True
        yield
    finally:
        for state, inference in before.items():
            state.inference = inference


def _counted_from_first(layers: Sequence[int], count: int) -> frozenset[int]:
    for layer in layers:
        if not -count <= layer < count:
            raise UserError(
                f"full-attention layer {layer} is not there: the model has {count} layers with full attention, from 0 "
                f"to {count - 1}, or from -1 back to -{count}."
            )
    return frozenset(layer % count for layer in layers)


class _ProveServed:
    """Post-forward hook: a training pass that never reached S2-Attn is an error, not silent full attention."""

    def __call__(self, module: PreTrainedModel, arguments: tuple[Any, ...], output: object) -> None:
        wanted = module.config.get_text_config()._attn_implementation == IMPLEMENTATION
        if torch.compiler.is_compiling() or not wanted or not module.training:
            return
        states = _states(module)
        if not any(state.served for state in states):
            raise UserError(
                f"{type(module).__name__} never called the attention implementation '{IMPLEMENTATION}': its layers "
                "compute attention themselves, so S2-Attn cannot serve it."
            )
        for state in states:
            state.served = 0


@torch.compiler.disable
def shifted_attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **keywords: Any
) -> tuple[Tensor, Tensor | None]:
    """The attention function of transformers' AttentionInterface.

    Args:
        query: (B, H, N, D); key: (B, Hkv, N, D); value: (B, Hkv, N, Dv).
        attention_mask: a `ForwardPass`, from `begin_pass`.
        keywords: what models hand on; `position_ids` (B, N) or (1, N) show packed documents by restarting.

    Returns:
        (B, N, H, Dv), and no attention weights; outside training what the model's own attention returns.

    Raises:
        UserError: a keyword, mask or cache that S2-Attn cannot honour.
    """
    is_of_a_decoder = hasattr(module, "layer_idx")
    if not is_of_a_decoder and not getattr(module, "is_causal", True):  # it reads pictures or sound
        return _ordinary_attention(_default_of(module), module, query, key, value, attention_mask, keywords)
    state = _state_of(module)
    if not (module.training or state.inference):
        return _ordinary_attention(state.ordinary, module, query, key, value, attention_mask, keywords)
    _refuse_what_cannot_be_honoured(query, key, attention_mask, module, keywords)
    rows, _, length, _ = query.shape
    piece = piece_at_work() or attention_mask.piece
    window = keywords.get("sliding_window")
    dropout = keywords.get("dropout", 0.0) if module.training else 0.0
    call = LayerCall(
        cast(int, module.layer_idx),
        attention_mask.documents_of(rows, length, keywords.get("position_ids"), piece),
        attention_mask.draw_for(state, module.training),
        Scoring(keywords.get("scaling"), dropout, keywords.get("softcap"), keywords.get("s_aux")),
        window if window is not None and (length if piece is None else piece.length) > window else None,
        piece,
    )
    state.served += 1
    return layer_attention(state, call, query, key, value), None


def _ordinary_attention(
    implementation: str, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, keywords: Any
) -> tuple[Tensor, Tensor | None]:
    """What transformers computes under another attention implementation."""
    if isinstance(mask, ForwardPass):
        mask = mask.ordinary_mask(implementation)
    homes = (sys.modules[kind.__module__] for kind in type(module).__mro__)
    written_out = next(
        (home.eager_attention_forward for home in homes if hasattr(home, "eager_attention_forward")), None
    )
    compute = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, cast(Any, written_out))
    return cast(tuple[Tensor, Tensor | None], compute(module, query, key, value, mask, **keywords))


def _refuse_what_cannot_be_honoured(
    query: Tensor, key: Tensor, mask: Any, module: nn.Module, keywords: dict[str, Any]
) -> None:
    name = type(module).__name__
    unknown = sorted(
        keyword
        for keyword, given in keywords.items()
        if keyword not in _WITHOUT_EFFECT | _HONOURED and given is not None and given is not False
    )
    if unknown:
        raise UserError(
            f"{name} hands attention the keyword '{unknown[0]}', which S2-Attn does not honour; the model cannot be "
            "trained with it."
        )
    if keywords.get("is_causal") is False or getattr(module, "is_causal", True) is False:
        raise UserError(f"{name} is not causal: S2-Attn serves causal self-attention only.")
    if key.shape[2] != query.shape[2]:
        raise UserError(
            f"{query.shape[2]} queries and {key.shape[2]} keys: S2-Attn has no KV cache; pass use_cache=False, or call "
            "model.eval(), which uses the model's full attention."
        )
    padding = mask.padding if isinstance(mask, ForwardPass) else mask
    if not isinstance(mask, ForwardPass) or (padding is not None and padding.ndim != 2):
        given = tuple(padding.shape) if isinstance(padding, Tensor) else padding
        raise UserError(
            f"the attention mask is {given}: S2-Attn takes a padding mask of shape (B, N), through the model; give "
            "packed documents through position_ids that restart."
        )
    position_ids = keywords.get("position_ids")
    if position_ids is not None and position_ids.ndim != 2:
        raise UserError(f"position_ids is {tuple(position_ids.shape)}: S2-Attn takes (B, N).")


@torch.compiler.disable
def begin_pass(kv_length: int, attention_mask: Tensor | None = None, **arguments: Any) -> ForwardPass:
    """The mask function of transformers' AttentionMaskInterface, called once a pass for each kind of layer."""
    padding = None if attention_mask is None else attention_mask[:, -kv_length:]
    arguments |= {"kv_length": kv_length, "attention_mask": attention_mask}
    return ForwardPass(padding, arguments, piece=piece_at_work())


AttentionInterface.register(IMPLEMENTATION, shifted_attention_forward)
AttentionMaskInterface.register(IMPLEMENTATION, begin_pass)
