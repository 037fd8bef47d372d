"""What a config says of its rotary positions: the layers they are of, their frequencies, and the windows in tokens.

The windows, as vLLM reads them in `vllm/config/model.py` (max = `max_position_embeddings`, declared =
`original_max_position_embeddings` of the config or of `rope_parameters`, else max):

| rope_type                       | present window                  |
|---------------------------------|---------------------------------|
| default, llama3, longrope, …    | max                             |
| yarn, linear, dynamic           | declared * factor, at least max |
| linear, layer by layer (Gemma 3)| max                             |

The *original* window is what factors count from: the declared one, or present window / largest divisor where that is
less. Llama 3.2 went from 8k to 128k (x 16) with its slow frequencies divided by 32, and Phi-3.5's lists do more than
its window too; counted from the declared window, their next factor would turn those frequencies further than they were
trained to.
"""

import contextlib
import copy
import math
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from longlora.errors import UserError

RopeParameters = dict[str, Any]

GLOBAL_LAYERS, LOCAL_LAYERS = "full_attention", "sliding_attention"
"""The one entry of layer-by-layer `rope_parameters` that sees the whole context; the others keep their RoPE."""

_GROWING = ("yarn", "linear", "dynamic")
"""Types whose factor tells the window."""

_ROUNDING = 1e-6
"""Share by which the float32 divisors of transformers may be off."""


def original_context(config: PreTrainedConfig) -> int:
    """The window in tokens that factors count from (the text at the top of this file).

    An extended config from elsewhere that hides it (a `linear` one whose `max_position_embeddings` is the extended
    window) is read rightly once its `original_max_position_embeddings` is set.

    Raises:
        UserError: the config has no rotary positions or no `max_position_embeddings`.
    """
    config = text_config(config)
    declared = declared_context(config)
    if global_rope(config)["rope_type"] in ("default", "dynamic", "proportional"):
        return declared
    divisors, _ = frequency_divisors(config)
    reach = present_context(config) / max(divisors)
    whole = round(reach) if abs(reach - round(reach)) <= _ROUNDING * reach else math.floor(reach)
    return min(declared, max(whole, 1))


def declared_context(config: PreTrainedConfig) -> int:
    """The first window as the config's own keys give it, in tokens. Raises as `original_context`."""
    config = text_config(config)
    rope, window = global_rope(config), _window(config)
    # transformers, too, prefers the config's own key to the one inside rope_parameters (standardize_rope_params).
    declared = getattr(config, "original_max_position_embeddings", None) or rope.get("original_max_position_embeddings")
    # Phi-3 configs always have the key, even with a shorter window.
    return min(declared or window, window)


def present_context(config: PreTrainedConfig) -> int:
    """The window in tokens that the config declares now, extended or not (the table at the top of this file).

    Raises:
        UserError: the config has no rotary positions or no `max_position_embeddings`.
    """
    config = text_config(config)
    rope, window = global_rope(config), _window(config)
    declared = declared_context(config)
    if rope["rope_type"] not in _GROWING or not rope.get("factor"):
        return window
    if is_layered(config) and rope["rope_type"] == "linear" and declared == window:
        return window
    return max(window, round(declared * rope["factor"]))


def frequency_divisors(config: PreTrainedConfig) -> tuple[list[float], float]:
    """What the positions of `config` divide each of the d/2 plain rotary frequencies by, and their attention factor.

    Of positions that change with the length of the input, those beyond the original window.

    Raises:
        UserError: the config has no rotary positions.
    """
    config = text_config(config)
    rope = global_rope(config)
    if rope["rope_type"] == "default":
        rope |= {"rope_type": "linear", "factor": 1.0}
    if rope.get("factor") is None:
        rope["factor"] = present_context(config) / declared_context(config)
    return divisors_of(config, rope)


def divisors_of(config: PreTrainedConfig, rope: RopeParameters) -> tuple[list[float], float]:
    """`frequency_divisors` of `config` with other `rope` parameters (transformers' formulas)."""
    layer_type = GLOBAL_LAYERS if is_layered(config) else None
    if "long_factor" in rope:
        rope = {**rope, "short_factor": rope["long_factor"]}  # which is what transformers takes without a length
    with torch.device("cpu"):
        plain, _ = ROPE_INIT_FUNCTIONS["linear"](trial(config, {**rope, "factor": 1.0}), layer_type=layer_type)
        stretched, attention_factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](trial(config, rope), layer_type=layer_type)
    return (plain.double() / stretched.double()).tolist(), attention_factor


def fixed_divisors(
    plain: RopeParameters, divisors: list[float], attention_factor: float, original: int, factor: float
) -> RopeParameters:
    """`plain` rope parameters with each frequency divided by its own of `divisors` (d/2), at every length.

    Written as longrope with two equal lists, the one type of transformers that takes a divisor a frequency.
    """
    return plain | {
        "rope_type": "longrope",
        "factor": factor,
        "original_max_position_embeddings": original,
        "short_factor": divisors,
        "long_factor": divisors,
        "attention_factor": attention_factor,
    }


def text_config(config_or_model: PreTrainedConfig | nn.Module) -> PreTrainedConfig:
    """The config of the decoder inside that of a multimodal model; a text model's is its own."""
    config: Any = config_or_model.config if isinstance(config_or_model, nn.Module) else config_or_model
    return config.get_text_config(decoder=True)


def is_layered(config: PreTrainedConfig) -> bool:
    """Whether `rope_parameters` has an entry for each type of layer."""
    return any(isinstance(value, dict) for value in config.rope_parameters.values())


def global_rope(config: PreTrainedConfig) -> RopeParameters:
    """A copy of the `rope_parameters` of the layers that see the whole context, with its `rope_type`.

    Raises:
        UserError: there are none.
    """
    rope = getattr(config, "rope_parameters", None)
    if not rope or getattr(config, "alibi", False):
        alibi = config.model_type in ("bloom", "mpt") or getattr(config, "alibi", False)
        raise UserError(
            f"the positions of a {config.model_type} model cannot be stretched: "
            f"it uses {'ALiBi' if alibi else 'no rotary positions that its config describes (rope_parameters)'}. "
            "Take a model with RoPE, such as Llama, Mistral, Qwen, Gemma, Phi-3 or GPT-NeoX."
        )
    if is_layered(config):
        layers, rope = list(rope), rope.get(GLOBAL_LAYERS)
        if not rope:
            raise UserError(
                f"the {config.model_type} config has RoPE for {', '.join(layers)} but none for '{GLOBAL_LAYERS}' "
                "layers: only those can be stretched."
            )
    return {**rope, "rope_type": rope.get("rope_type", "default")}


def write_rope(config: PreTrainedConfig, rope: RopeParameters, layer_type: str = GLOBAL_LAYERS) -> None:
    """Make `rope` the `rope_parameters` of the layers of `layer_type`, or of all where all have the same."""
    config.rope_parameters = {**config.rope_parameters, layer_type: rope} if is_layered(config) else rope


def head_dimension(config: PreTrainedConfig, layers: str = GLOBAL_LAYERS) -> int:
    """Of the layers of type `layers`, where they have widths of their own (Gemma 4)."""
    if is_layered(config):
        with contextlib.suppress(AttributeError, KeyError, ValueError):
            config = cast(Any, config).per_layer_config[layers]
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def name_head_dimension(config: PreTrainedConfig) -> None:
    """Write out a `head_dim` of None (Mixtral), which the yarn, dynamic and longrope of transformers cannot read."""
    if vars(config).get("head_dim", 0) is None:
        config.head_dim = head_dimension(config)


def rotary_dimension(config: PreTrainedConfig, rope: RopeParameters) -> int:
    return int(head_dimension(config) * rope.get("partial_rotary_factor", 1.0))


def accepts(config: PreTrainedConfig, rope: RopeParameters) -> bool:
    """Whether stock transformers can load this config with these `rope_parameters`."""
    try:
        trial(config, rope).validate_rope()
    except (ValueError, KeyError, TypeError):
        return False
    return True


def trial(config: PreTrainedConfig, rope: RopeParameters) -> PreTrainedConfig:
    """A copy of `config` with `rope`, and the windows that belong to it."""
    tried = copy.deepcopy(config)
    write_rope(tried, dict(rope))
    name_head_dimension(tried)
    if "original_max_position_embeddings" in rope:
        tried.original_max_position_embeddings = rope["original_max_position_embeddings"]
        tried.max_position_embeddings = round(rope["original_max_position_embeddings"] * rope.get("factor", 1.0))
    return tried


def _window(config: PreTrainedConfig) -> int:
    window = getattr(config, "max_position_embeddings", None)
    if not window:
        raise UserError(
            f"the {config.model_type} config has no max_position_embeddings, so its window is unknown: "
            "set it to the length the model was trained with."
        )
    return window
