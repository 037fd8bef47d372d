"""Extended positions in a GGUF file: what llama.cpp reads, written from a config, and read back into one.

transformers reads weights and tokenizer of a GGUF but passes over its RoPE scaling, so a stretched model would come
back with its first window's positions. Keys, with `ARCH.` before them, and one tensor (llama.cpp, src/llama-model.cpp):

| method                      | rope.scaling.type | factor, original_context_length | tensor `rope_freqs.weight` |
|-----------------------------|-------------------|---------------------------------|----------------------------|
| none, ntk                   | -                 | -                               | -                          |
| linear                      | linear            | yes                             | -                          |
| yarn with its usual ramp    | yarn              | yes                             | -                          |
| llama3, yarn with another   | -                 | -                               | a divisor a frequency      |

llama.cpp reads no ramp (`yarn_beta_fast`) for these architectures, whatever the file says. It multiplies cosine and
sine by `rope.scaling.attn_factor`, for yarn by (0.1 ln factor + 1) as well; that key is written where the model's
attention factor is another. One more, `longlora.config`, which llama.cpp passes over, holds as JSON the config's own
words, and what else of it transformers does not read from a GGUF, so that nothing is lost on the way back.
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedConfig

from longlora.errors import UserError
from longlora.model.rope import (
    GLOBAL_LAYERS,
    LOCAL_LAYERS,
    RopeParameters,
    accepts,
    divisors_of,
    fixed_divisors,
    frequency_divisors,
    global_rope,
    head_dimension,
    is_layered,
    rotary_dimension,
    text_config,
    write_rope,
)

OWN_KEY = "longlora.config"

FREQUENCIES = "rope_freqs.weight"
"""Tensor (d/2,) that divides each rotary frequency."""

_KEPT = ("original_max_position_embeddings", "original_rope_theta", "head_dim", "attention_bias", "mlp_bias")
"""Config fields, beside `rope_parameters`, that transformers does not read from every GGUF."""

_LISTS = ("rope_factors_short.weight", "rope_factors_long.weight")
"""Tensors (d/2,) of longrope: divisors up to the original window and beyond it."""

_RAMP = ("beta_fast", "beta_slow")

_UNDERSTOOD = {
    *("freq_base", "dimension_count", "dimension_sections", "scale_linear"),
    *(f"scaling.{name}" for name in ("type", "factor", "attn_factor", "original_context_length", "finetuned")),
    *(f"scaling.yarn_{name}" for name in _RAMP),
}
"""Keys after `ARCH.rope.`; `dimension_sections` part the axes of pictures, and text has one."""

_NEUTRAL = {"scaling.yarn_ext_factor": 1.0, "scaling.yarn_attn_factor": 1.0, "scaling.yarn_log_multiplier": 0.0}
"""Values at which the keys not read here change nothing."""

_LAYERS_OF_27B = {"gemma2": 46, "gemma3_text": 62}
"""The size whose softmax is scaled by the width divided by the heads; the others go by the width of a head."""

_STILL = 1e20
"""A divisor above this stands for no turning at all."""

_TOLERANCE = 1e-6


@dataclass(frozen=True)
class GgufPositions:
    """RoPE as llama.cpp's `ARCH.rope.*` keys."""

    keys: dict[str, str | int | float] = field(default_factory=dict)
    """By name after `ARCH.rope.`."""

    frequencies: np.ndarray | None = None
    """(d/2,) float32 divisors for `rope_freqs.weight`."""

    own: str = ""
    """Value of `OWN_KEY`."""


def gguf_positions(config: PreTrainedConfig, architecture: str, takes_frequencies: bool) -> GgufPositions:
    """The positions of `config` for a GGUF file.

    Args:
        config: of a text model with rotary positions, the same in each layer.
        architecture: llama.cpp's name, for the error.
        takes_frequencies: whether llama.cpp reads `rope_freqs.weight` for that architecture.

    Raises:
        UserError: llama.cpp has no such positions.
    """
    rope = dict(config.rope_parameters)
    kind = rope["rope_type"]
    own = json.dumps(
        {"rope_parameters": rope} | {name: getattr(config, name) for name in _KEPT if hasattr(config, name)}
    )
    keys: dict[str, Any] = {"freq_base": float(rope["rope_theta"])}
    if kind == "default":
        return GgufPositions(keys, None, own)
    if kind == "dynamic":
        raise UserError(
            "llama.cpp has no dynamic NTK, whose frequencies change with the length: extend the model with another "
            "--method, such as yarn, to export it."
        )
    if kind == "longrope" and not np.allclose(rope["short_factor"], rope["long_factor"]):
        raise UserError(
            "a GGUF of this kind holds one divisor a frequency, and this model has two lists (longrope): llama.cpp's "
            "own convert_hf_to_gguf.py writes both for a merged folder (`longlora merge`)."
        )
    divisors, attention_factor = frequency_divisors(config)
    scale = 1.0
    frequencies = None
    if kind == "linear" or (kind == "yarn" and _has_usual_ramp(rope)):
        keys |= {"scaling.type": kind, "scaling.factor": float(rope["factor"]), "scaling.finetuned": True}
        original = rope.get("original_max_position_embeddings") or getattr(config, _KEPT[0], None)
        if original:
            keys["scaling.original_context_length"] = int(original)
        scale = _yarn_attention(rope["factor"]) if kind == "yarn" else 1.0
    elif takes_frequencies:
        frequencies = np.array(divisors, dtype=np.float32)
    else:
        raise UserError(
            f"llama.cpp cannot read these {kind} positions in a {architecture} model: extend it with --method yarn, "
            "linear or ntk, as they come, to export it."
        )
    if abs(attention_factor / scale - 1) > _TOLERANCE:
        keys["scaling.attn_factor"] = attention_factor / scale
    return GgufPositions(keys, frequencies, own)


def read_positions(config: PreTrainedConfig, file: Path) -> None:
    """Give `config`, as transformers made it from the GGUF `file`, the positions that the file states.

    Raises:
        UserError: it states positions of a kind that transformers does not have, or in words not known here.
    """
    # here and not above: it is no public part of transformers (gguf's own reader takes seconds for each file)
    from transformers.integrations.gguf.reader import GgufHeader, load_gguf_state_dict, read_gguf_metadata

    text = text_config(config)
    metadata, names = read_gguf_metadata(str(file))
    architecture = f"{metadata['general.architecture']}."
    stated = {key.removeprefix(architecture): value for key, value in metadata.items() if key.startswith(architecture)}
    _read_shape(text, stated)
    if not getattr(text, "rope_parameters", None):
        return  # learned positions, ALiBi, none
    if own := metadata.get(OWN_KEY):
        for name, value in json.loads(own).items():
            setattr(text, name, value)
        return
    keys = {key.removeprefix("rope."): value for key, value in stated.items() if key.startswith("rope.")}
    neutral: dict[str, Any] = _NEUTRAL | {"dimension_count_swa": head_dimension(text, LOCAL_LAYERS)}
    if not is_layered(text):
        neutral["freq_base_swa"] = keys.get("freq_base")
    for key, value in keys.items():
        if key not in _UNDERSTOOD and value != neutral.get(key) and not (key == "freq_base_swa" and is_layered(text)):
            raise _unreadable(file, f"{architecture}rope.{key} = {value}")
    tensors = load_gguf_state_dict(GgufHeader.from_file(str(file)))
    lists = {name: tensors[name][...].double().tolist() for name in (FREQUENCIES, *_LISTS) if name in names}
    if "freq_base_swa" in keys and is_layered(text):
        write_rope(text, text.rope_parameters[LOCAL_LAYERS] | {"rope_theta": keys["freq_base_swa"]}, LOCAL_LAYERS)
    rope = global_rope(text)
    if "freq_base" in keys:
        rope["rope_theta"] = keys["freq_base"]
    if rope["rope_type"] == "proportional":
        if keys.get("scaling.type", "none") != "none" or keys.get("scaling.factor", 1.0) not in (0.0, 1.0):
            raise _unreadable(file, "scaled positions beside those that turn a share of each head")
        _read_turned_share(rope, lists, file)
    else:
        _read_turned_width(text, rope, keys, file)
        rope = _read_scaling(text, rope, keys, lists, file)
    write_rope(text, rope)


def _read_shape(config: PreTrainedConfig, stated: dict[str, Any]) -> None:
    """What decides which tokens a head sees, and how wide it is, where transformers passes over it."""
    if "attention.sliding_window" in stated and hasattr(config, "sliding_window"):
        config.sliding_window = stated["attention.sliding_window"] or None  # 0 is Phi-4's "none"
    widths = getattr(config, "rope_parameters", None) and {
        head_dimension(config, layers) for layers in (GLOBAL_LAYERS, LOCAL_LAYERS)
    }
    # Gemma 4's local layers have narrower heads, and transformers reads those of the others
    key_length = "attention.key_length_swa" if widths and len(widths) > 1 else "attention.key_length"
    if key_length in stated and "head_dim" in vars(config):
        config.head_dim = stated[key_length]
    if config.num_hidden_layers == _LAYERS_OF_27B.get(config.model_type):
        # which no file says, and llama.cpp tells by the layers, too
        config.query_pre_attn_scalar = config.hidden_size // config.num_attention_heads


def _read_turned_width(config: PreTrainedConfig, rope: RopeParameters, keys: dict[str, Any], file: Path) -> None:
    """The part of each head that turns."""
    width = keys.get("dimension_count") or rotary_dimension(config, rope)
    if width == rotary_dimension(config, rope):
        return
    if "partial_rotary_factor" not in rope:  # a class that turns whole heads
        raise _unreadable(file, f"heads of {head_dimension(config)} of which {width} turn")
    rope["partial_rotary_factor"] = width / head_dimension(config)


def _read_turned_share(rope: RopeParameters, lists: dict[str, list[float]], file: Path) -> None:
    """Gemma 4 turns the first frequencies of a head and holds the others still, by dividing them by 1e30."""
    if divisors := lists.get(FREQUENCIES):
        if any(divisor != 1 and divisor < _STILL for divisor in divisors):
            raise _unreadable(file, f"{FREQUENCIES} that scale frequencies beside some that stand still")
        rope["partial_rotary_factor"] = sum(divisor == 1 for divisor in divisors) / len(divisors)


def _read_scaling(
    config: PreTrainedConfig, rope: RopeParameters, keys: dict[str, Any], lists: dict[str, list[float]], file: Path
) -> RopeParameters:
    """`rope` with the scaling that llama.cpp would compute from `keys` and `lists`."""
    kept = ("rope_theta", "partial_rotary_factor", "mrope_section", "mrope_interleaved")
    plain = {key: value for key, value in rope.items() if key in kept}
    # without a type llama.cpp takes linear, without an original window the present one
    kind, factor = keys.get("scaling.type", "linear"), keys.get("scaling.factor", keys.get("scale_linear", 1.0))
    original = keys.get("scaling.original_context_length", config.max_position_embeddings)
    scale = keys.get("scaling.attn_factor", 1.0)
    if kind not in ("none", "linear", "yarn", "longrope"):
        raise _unreadable(file, f"{kind} positions")
    if kind == "longrope" or lists.keys() & set(_LISTS):
        if not lists.keys() >= set(_LISTS):
            raise _unreadable(file, f"{kind} positions without {' and '.join(_LISTS)}")
        config.original_max_position_embeddings = original
        growth = max(1.0, config.max_position_embeddings / original)
        short, long = (lists[name] for name in _LISTS)
        return fixed_divisors(plain, long, scale, original, growth) | {"short_factor": short}
    scaled = plain | {"rope_type": "default"}
    if kind != "none" and factor not in (0.0, 1.0):
        scaled |= {"rope_type": kind, "factor": factor}
        if "scaling.original_context_length" in keys:
            config.original_max_position_embeddings = original
        if kind == "yarn":
            scaled["original_max_position_embeddings"] = original
            scaled |= {name: rope[name] for name in ("truncate",) if name in rope}  # gpt-oss: no file says it
            scaled |= {name: keys[f"scaling.yarn_{name}"] for name in _RAMP if f"scaling.yarn_{name}" in keys}
            if scale != 1.0:
                scaled["attention_factor"], scale = scale * _yarn_attention(factor), 1.0
    if FREQUENCIES not in lists and scale == 1.0 and accepts(config, scaled):
        return scaled
    linear = {"rope_type": "linear", "factor": 1.0} if scaled["rope_type"] == "default" else {}
    divisors, attention_factor = divisors_of(config, scaled | linear)
    if FREQUENCIES in lists:
        divisors = [ours * theirs for ours, theirs in zip(divisors, lists[FREQUENCIES], strict=True)]
    return fixed_divisors(plain, divisors, attention_factor * scale, original, 1.0)


def _unreadable(file: Path, what: str) -> UserError:
    return UserError(f"'{file}' has {what}, which cannot be read from a GGUF: give the model's folder.")


def _has_usual_ramp(rope: dict[str, Any]) -> bool:
    usual = {"beta_fast": 32, "beta_slow": 1, "truncate": True}
    return all(rope.get(name) in (None, value) for name, value in usual.items())


def _yarn_attention(factor: float) -> float:
    """What YaRN itself multiplies cosine and sine by (arXiv 2309.00071, section 3.4)."""
    return 0.1 * math.log(factor) + 1.0
