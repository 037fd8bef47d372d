"""Longer rotary positions: RoPE extension written into a model's config, so that any library that reads it agrees.

A method is data: the `rope_parameters` of transformers, which vLLM and llama.cpp's converter read too. One rule:
the factor is context / *original* window (`longlora.model.rope`), whatever was done to the model in between, so 4k ->
8k -> 32k is x8. Two more keys, which those libraries ignore, keep what the first may lose:
`original_max_position_embeddings` and `original_rope_theta`.
"""

import logging
import sys
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from longlora.errors import UserError, check_choice
from longlora.model.rope import (
    RopeParameters,
    accepts,
    declared_context,
    divisors_of,
    fixed_divisors,
    frequency_divisors,
    global_rope,
    name_head_dimension,
    original_context,
    present_context,
    rotary_dimension,
    text_config,
    write_rope,
)
from longlora.settings import METHODS

__all__ = ["PositionExtension", "extend_positions", "frequency_divisors", "original_context", "present_context"]

logger = logging.getLogger(__name__)

SHAPE_PARAMETERS = {
    "yarn": ("beta_fast", "beta_slow", "truncate", "mscale", "mscale_all_dim"),
    "llama3": ("low_freq_factor", "high_freq_factor"),
    "longrope": ("short_factor",),
}
"""What a method takes besides the factor, and keeps from a model that arrives extended by the same method."""

FACTOR_PARAMETERS = {"yarn": ("attention_factor",), "longrope": ("attention_factor", "long_factor")}
"""What a method takes that fits one factor only, and so is never kept."""

_SCALING_KEYS = {"type", "rope_type", "factor", "original_max_position_embeddings"}.union(
    *SHAPE_PARAMETERS.values(), *FACTOR_PARAMETERS.values()
)


@dataclass(frozen=True)
class PositionExtension:
    """What `extend_positions` did; the windows are in tokens."""

    method: str
    original_context: int
    """The window before any extension."""
    previous_context: int
    """The window before this call."""
    context: int
    """The window now: the one asked for, or `previous_context` where nothing changed."""
    factor: float
    """`context / original_context`, exact."""
    changed: bool
    message: str


def extend_positions(
    config_or_model: PreTrainedConfig | nn.Module, context: int, method: str = "yarn", **parameters: Any
) -> PositionExtension:
    """Stretch the rotary positions to a window of `context` tokens, in place, and say what changed.

    The config's `rope_parameters` and `max_position_embeddings` are rewritten; a model's rotary embeddings are rebuilt
    from them, so that it computes what a model freshly loaded with that config does. With s = context / original
    window, d the rotary dimension and θ the original `rope_theta`:

    - `linear`: Position Interpolation, every frequency / s (arXiv 2306.15595, equation 4).
    - `ntk`: θ · s^(d/(d-2)), written as a plain larger `rope_theta` (NTK-aware, arXiv 2309.00071, definition 1).
    - `dynamic`: the same with s growing with the sequence, none up to the original window (arXiv 2309.00071, section
      3.3, in the form of transformers). Here `max_position_embeddings` stays the original window, because the formula
      starts from it; the window is that times the factor, as vLLM reads it.
    - `yarn`: high frequencies kept, low ones / s, a ramp between, attention × (0.1 ln s + 1)² (arXiv 2309.00071,
      definition 3; the ramp is linear in the dimension, as in the authors' code). Takes `beta_fast` (32), `beta_slow`
      (1), `truncate`, `mscale`, `mscale_all_dim`, `attention_factor`.
    - `llama3`: the same idea with a ramp in 1 / wavelength (Llama 3.1). Takes `low_freq_factor` (1) and
      `high_freq_factor` (4).
    - `longrope`: one divisor a frequency, `short_factor` up to the original window and `long_factor` beyond it (arXiv
      2402.13753). The paper searches for the lists, starting from PI, NTK and YaRN; without a search `long_factor` is
      YaRN's and `short_factor` all ones. Takes both lists (d/2 numbers each) and `attention_factor`.
    - `none`: only `max_position_embeddings` changes.

    A config class that knows only `longrope` (Phi-3) gets `linear`, `yarn` and `llama3` written as `longrope`, with
    lists and attention factor such that transformers computes the method asked for (vLLM and llama.cpp ignore that
    attention factor and use LongRoPE's own).

    In a model with RoPE layer by layer (Gemma 3) the global layers are stretched and the local ones left alone.
    A context not above the present window changes nothing.

    Raises:
        UserError: unknown method or parameter, a context that is no whole number above 1, a config without rotary
            positions or without `max_position_embeddings`, or one that cannot express the method.
    """
    check_choice("method", method, METHODS)
    if not isinstance(context, int) or context < 2:
        raise UserError(f"context is {context!r}: it must be a whole number of tokens, at least 2.")
    model = config_or_model if isinstance(config_or_model, nn.Module) else None
    if model is not None:
        # here, for it imports PEFT, which whoever has only a config can do without
        import longlora.model.saving  # noqa: F401  (whoever adds adapters and saves them, these positions go along)
    config = text_config(config_or_model)
    _check_parameters(method, parameters)
    rotary = _rotary_modules(model, config) if model is not None else []

    original, previous = original_context(config), present_context(config)
    if context <= previous:
        message = (
            f"nothing changed: the window is {previous} tokens already (originally {original}), "
            f"so there is nothing to extend to {context}."
        )
        logger.warning(message)
        return PositionExtension(method, original, previous, previous, previous / original, False, message)

    theta = getattr(config, "original_rope_theta", global_rope(config)["rope_theta"])
    stretched = _stretch(config, method, context, parameters)
    write_rope(config, stretched)
    config.max_position_embeddings = original if method == "dynamic" else context
    config.original_max_position_embeddings = stretched.get("original_max_position_embeddings", original)
    config.original_rope_theta = theta
    name_head_dimension(config)
    for module in rotary:
        _rebuild(module, config)
    if model is not None:
        _rescale_latent_attention(model, config)
        follow_each_length(model)

    factor = context / original
    message = f"window {previous} -> {context} tokens with {method}, {factor:g} times the original {original}."
    logger.info(message)
    return PositionExtension(method, original, previous, context, factor, True, message)


def _check_parameters(method: str, parameters: dict[str, Any]) -> None:
    allowed = SHAPE_PARAMETERS.get(method, ()) + FACTOR_PARAMETERS.get(method, ())
    for name in parameters:
        if not allowed:
            raise UserError(f"method '{method}' takes no parameters, but '{name}' was given: leave it out.")
        check_choice(f"parameter of method '{method}'", name, allowed)


def _stretch(config: PreTrainedConfig, method: str, context: int, parameters: dict[str, Any]) -> RopeParameters:
    """The `rope_parameters` (of the global layers) that stretch the original window to `context` tokens."""
    present, original = global_rope(config), original_context(config)
    if present["rope_type"] not in ("default", *ROPE_INIT_FUNCTIONS) or present["rope_type"] == "proportional":
        raise UserError(
            f"the {config.model_type} config has rope_type '{present['rope_type']}': "
            "it must be one of default, linear, dynamic, yarn, llama3, longrope to be stretched."
        )
    factor = context / original
    if method == "none":
        if present["rope_type"] in ("yarn", "longrope") and present.get("factor") is None:
            # Where no factor is written, transformers takes it from the window that is about to change.
            present["factor"] = present_context(config) / declared_context(config)
        return present
    plain = {key: value for key, value in present.items() if key not in _SCALING_KEYS}
    plain["rope_theta"] = getattr(config, "original_rope_theta", plain["rope_theta"])
    if method in ("ntk", "dynamic"):
        dimension = rotary_dimension(config, plain)
        if dimension < 4:
            raise UserError(f"method '{method}' needs a rotary dimension of 4 at least, not {dimension}: take linear.")
    if method == "ntk":
        return plain | {
            "rope_type": "default",
            "rope_theta": plain["rope_theta"] * factor ** (dimension / (dimension - 2)),
        }

    stretched = plain | {"rope_type": method, "factor": factor}
    if method in SHAPE_PARAMETERS:
        stretched["original_max_position_embeddings"] = original
        # Two equal lists are a fixed method written as longrope (below), whose factor is not the new one.
        own = present["rope_type"] == method and (
            "short_factor" not in present or present["short_factor"] != present["long_factor"]
        )
        if own:
            stretched |= {key: present[key] for key in SHAPE_PARAMETERS[method] if key in present}
    if method == "llama3":
        stretched = {"low_freq_factor": 1.0, "high_freq_factor": 4.0} | stretched
    stretched |= parameters
    if method == "longrope":
        yarn = plain | {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
        divisors, _ = divisors_of(config, yarn)
        stretched = {"short_factor": [1.0] * len(divisors), "long_factor": divisors} | stretched
        for name in ("short_factor", "long_factor"):
            stretched[name] = _checked_list(name, stretched[name], len(divisors))
        if own:  # its short_factor serves up to the window that it declares
            declared = declared_context(config)
            stretched |= {"original_max_position_embeddings": declared, "factor": context / declared}
    if not accepts(config, stretched) and method in ("linear", "yarn", "llama3"):
        divisors, attention_factor = divisors_of(config, stretched)
        stretched = fixed_divisors(plain, divisors, attention_factor, original, factor)
    if not accepts(config, stretched):
        raise UserError(
            f"a {config.model_type} config cannot express method '{method}' (transformers refuses it): "
            "take another, such as ntk."
        )
    return stretched


def _checked_list(name: str, given: Any, length: int) -> list[float]:
    numbers = list(given) if isinstance(given, (list, tuple)) else []
    if len(numbers) != length or not all(isinstance(number, (int, float)) and number > 0 for number in numbers):
        raise UserError(
            f"{name} must be a list of {length} numbers above 0, one a rotary frequency, "
            f"but {f'{len(numbers)} values were' if numbers else repr(given) + ' was'} given."
        )
    return [float(number) for number in numbers]


def _rotary_modules(model: nn.Module, config: PreTrainedConfig) -> list[nn.Module]:
    """The modules that hold `inv_freq` and compute it from the text config.

    Raises:
        UserError: there are none, so the model's positions are not its config's.
    """
    modules = [
        module
        for module in model.modules()
        if isinstance(getattr(module, "config", None), type(config))
        and any("inv_freq" in name for name, _ in module.named_buffers(recurse=False))
    ]
    if not modules:
        raise UserError(
            f"{type(model).__name__} has no rotary embedding that follows its config, so its positions "
            "cannot be stretched: take a model of an architecture that transformers itself supports."
        )
    return modules


def _rebuild(module: nn.Module, config: PreTrainedConfig) -> None:
    """Give a rotary embedding the state of a new one; the module stays, with whatever hooks hang on it."""
    device = next(module.buffers(recurse=False)).device
    with torch.device("cpu"):
        fresh = type(module)(config)
    # longrope and dynamic leave frequencies of the old config on the module (modeling_rope_utils.dynamic_rope_update).
    for name in [name for name in vars(module) if "inv_freq" in name or "max_seq_len_cached" in name]:
        delattr(module, name)
    for name, value in vars(fresh).items():
        if not name.startswith("_") and name != "training":
            setattr(module, name, value)
    for name, buffer in fresh.named_buffers(recurse=False):
        module.register_buffer(name, buffer.to(device), persistent=False)


def _rescale_latent_attention(model: nn.Module, config: PreTrainedConfig) -> None:
    """Set the softmax scale that DeepSeek's latent attention takes from YaRN's `mscale_all_dim` when it is built."""
    for module in model.modules():
        apply_mscale = getattr(sys.modules.get(type(module).__module__), "yarn_apply_mscale", None)
        if apply_mscale is not None and hasattr(module, "scaling") and hasattr(module, "qk_head_dim"):
            module.scaling = apply_mscale(global_rope(config), cast(int, module.qk_head_dim) ** -0.5)


def window(config: PreTrainedConfig) -> int | None:
    """The window in tokens that `config` declares, rotary or not (GPT-2's positions are learned); `None` if unknown."""
    try:
        return present_context(config)
    except UserError:
        return getattr(config.get_text_config(), "max_position_embeddings", None)


def frequencies_change_at(model: nn.Module) -> int | None:
    """The length in tokens above which the model's rotary frequencies are others than below it (longrope, dynamic NTK).

    Keys read below it and above it, or with dynamic NTK at two lengths above it, do not belong together, nor do rows of
    such lengths belong in one pass. None where the frequencies are the same at all lengths.
    """
    changes = []
    for rotary in _changing(model, "dynamic", "longrope"):
        for rope in _ropes(rotary):
            if rope["rope_type"] == "dynamic":
                changes.append(int(rotary.original_max_seq_len))
            elif rope["rope_type"] == "longrope" and rope["short_factor"] != rope["long_factor"]:
                changes.append(int(rope["original_max_position_embeddings"]))
    return min(changes, default=None)


def follow_each_length(model: nn.Module) -> None:
    """Give every pass the frequencies of its own length: dynamic NTK keeps those of the longest row so far, so that
    what a model makes of a text would depend on what it read before."""
    for rotary in _changing(model, "dynamic"):
        if _forget_lengths not in rotary._forward_pre_hooks.values():
            rotary.register_forward_pre_hook(_forget_lengths)


def _forget_lengths(rotary: Any, _: Any) -> None:
    buffers = dict(rotary.named_buffers(recurse=False))
    for name in [name for name in buffers if name.endswith("original_inv_freq")]:
        layers = name.removesuffix("original_inv_freq")
        setattr(rotary, f"{layers}inv_freq", buffers[name].clone())
        setattr(rotary, f"{layers}max_seq_len_cached", rotary.original_max_seq_len)


def _changing(model: nn.Module, *kinds: str) -> list[Any]:
    """The rotary embeddings with positions of one of these `kinds`."""
    rotaries = [module for module in model.modules() if hasattr(module, "rope_type")]
    return [rotary for rotary in rotaries if any(rope.get("rope_type") in kinds for rope in _ropes(rotary))]


def _ropes(rotary: Any) -> list[RopeParameters]:
    rope = rotary.config.rope_parameters
    return [rope[layers] for layers in rotary.rope_type] if isinstance(rotary.rope_type, dict) else [rope]
