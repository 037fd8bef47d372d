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
from longlora.model.positions import frequency_divisors

OWN_KEY = "longlora.config"

FREQUENCIES = "rope_freqs.weight"
"""Tensor (d/2,) that divides each rotary frequency."""

_KEPT = ("original_max_position_embeddings", "original_rope_theta", "head_dim", "attention_bias", "mlp_bias")
"""Config fields, beside `rope_parameters`, that transformers does not read from every GGUF."""

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
        UserError: it states positions of a kind that transformers does not have.
    """
    # here and not above: it is no public part of transformers (gguf's own reader takes seconds for each file)
    from transformers.integrations.gguf.reader import GgufHeader, load_gguf_state_dict, read_gguf_metadata

    text = config.get_text_config()
    if not getattr(text, "rope_parameters", None):
        return
    metadata, tensors = read_gguf_metadata(str(file))
    if own := metadata.get(OWN_KEY):
        for name, value in json.loads(own).items():
            setattr(text, name, value)
        return
    prefix = f"{metadata['general.architecture']}.rope.scaling."
    scaling = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    kind, factor = scaling.get("type", "none"), scaling.get("factor")
    rope = {key: value for key, value in text.rope_parameters.items() if key != "rope_type"}
    original = scaling.get("original_context_length")
    if FREQUENCIES in tensors:
        stored = load_gguf_state_dict(GgufHeader.from_file(str(file)))[FREQUENCIES]
        divisors = stored[...].double().tolist()
        rope |= {
            "rope_type": "longrope",
            "factor": 1.0,
            "original_max_position_embeddings": original or text.max_position_embeddings,
            "short_factor": divisors,
            "long_factor": divisors,
            "attention_factor": scaling.get("attn_factor", 1.0),
        }
    elif kind in ("linear", "yarn") and factor:
        rope |= {"rope_type": kind, "factor": factor}
        if original:
            text.original_max_position_embeddings = original
        if kind == "yarn":
            rope["original_max_position_embeddings"] = original or round(text.max_position_embeddings / factor)
            if "attn_factor" in scaling:
                rope["attention_factor"] = scaling["attn_factor"] * _yarn_attention(factor)
    elif kind not in ("none", "linear", "yarn"):
        raise UserError(f"'{file}' has {kind} positions, which cannot be read from a GGUF: give the model's folder.")
    else:
        return
    text.rope_parameters = rope


def _has_usual_ramp(rope: dict[str, Any]) -> bool:
    usual = {"beta_fast": 32, "beta_slow": 1, "truncate": True}
    return all(rope.get(name) in (None, value) for name, value in usual.items())


def _yarn_attention(factor: float) -> float:
    """What YaRN itself multiplies cosine and sine by (arXiv 2309.00071, section 3.4)."""
    return 0.1 * math.log(factor) + 1.0
