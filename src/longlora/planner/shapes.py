"""Built-in shapes by name, and the config of whatever else MODEL names; no weights are read or downloaded."""

import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from longlora.errors import UserError, nearest
from longlora.model.loading import load_config
from longlora.model.source import first_line
from longlora.settings import LoadSettings


def _sizes(hidden: int, middle: int, layers: int, heads: int, key_heads: int, vocabulary: int, window: int) -> dict:
    return {
        "hidden_size": hidden,
        "intermediate_size": middle,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": window,
    }


def _rope(theta: float, **scaling: Any) -> dict:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta} | scaling}


_LLAMA31 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_TIED = {"tie_word_embeddings": True}
_QWEN3 = {"head_dim": 128} | _rope(1e6)
_UNUSED = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}

SHAPES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama2-7b": ("meta-llama/Llama-2-7b-hf", "llama", _sizes(4096, 11008, 32, 32, 32, 32000, 4096)),
    "llama2-13b": ("meta-llama/Llama-2-13b-hf", "llama", _sizes(5120, 13824, 40, 40, 40, 32000, 4096)),
    "llama2-70b": ("meta-llama/Llama-2-70b-hf", "llama", _sizes(8192, 28672, 80, 64, 8, 32000, 4096)),
    "llama3-8b": (
        "meta-llama/Meta-Llama-3-8B",
        "llama",
        _sizes(4096, 14336, 32, 32, 8, 128256, 8192) | _rope(5e5),
    ),
    "llama3.1-8b": (
        "meta-llama/Llama-3.1-8B",
        "llama",
        _sizes(4096, 14336, 32, 32, 8, 128256, 131072) | _rope(5e5, **_LLAMA31),
    ),
    "llama3-70b": (
        "meta-llama/Meta-Llama-3-70B",
        "llama",
        _sizes(8192, 28672, 80, 64, 8, 128256, 8192) | _rope(5e5),
    ),
    "mistral-7b": (
        "mistralai/Mistral-7B-v0.3",
        "mistral",
        _sizes(4096, 14336, 32, 32, 8, 32768, 32768) | _rope(1e6) | {"sliding_window": None},
    ),
    "qwen3-0.6b": ("Qwen/Qwen3-0.6B", "qwen3", _sizes(1024, 3072, 28, 16, 8, 151936, 40960) | _QWEN3 | _TIED),
    "qwen3-4b": ("Qwen/Qwen3-4B", "qwen3", _sizes(2560, 9728, 36, 32, 8, 151936, 40960) | _QWEN3 | _TIED),
    "qwen3-8b": ("Qwen/Qwen3-8B", "qwen3", _sizes(4096, 12288, 36, 32, 8, 151936, 40960) | _QWEN3),
    "qwen3-14b": ("Qwen/Qwen3-14B", "qwen3", _sizes(5120, 17408, 40, 40, 8, 151936, 40960) | _QWEN3),
    "qwen3-30b-a3b": (
        "Qwen/Qwen3-30B-A3B",
        "qwen3_moe",
        _sizes(2048, 6144, 48, 32, 4, 151936, 40960)
        | _QWEN3
        | {"moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8},
    ),
    "smollm2-135m": (
        "HuggingFaceTB/SmolLM2-135M",
        "llama",
        _sizes(576, 1536, 30, 9, 3, 49152, 8192) | _rope(1e5) | _TIED,
    ),
    "smollm2-360m": (
        "HuggingFaceTB/SmolLM2-360M",
        "llama",
        _sizes(960, 2560, 32, 15, 5, 49152, 8192) | _rope(1e5) | _TIED,
    ),
    "smollm2-1.7b": (
        "HuggingFaceTB/SmolLM2-1.7B",
        "llama",
        _sizes(2048, 8192, 24, 32, 32, 49152, 8192) | _rope(1.3e5) | _TIED,
    ),
}
"""Name -> hub id, transformers' model type, and the fields of its config, from the published config.json."""


def find_config(model: str, loading: LoadSettings) -> PreTrainedConfig:
    """The config of a built-in shape by its name or hub id, of MODEL, or of a folder or file with a config.json alone.

    Raises:
        UserError: nothing of this name is there.
    """
    name = next((name for name, (hub, *_) in SHAPES.items() if hub == model and not loading.revision), model)
    if name in SHAPES:
        _, kind, fields = SHAPES[name]
        return AutoConfig.for_model(kind, **(_UNUSED | fields))
    path = Path(model).expanduser()
    alone = path if path.name == "config.json" else path / "config.json"
    if alone.is_file() and not any((alone.parent / name).exists() for name in ("settings.yaml", "adapter_config.json")):
        try:
            json.loads(alone.read_text(encoding="utf-8"))
            return AutoConfig.from_pretrained(alone.parent, trust_remote_code=loading.trust_remote_code)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"'{alone}' is not a model's config ({first_line(error)}).") from error
    try:
        return load_config(model, trust_remote_code=loading.trust_remote_code, revision=loading.revision)
    except UserError as error:
        if "/" in model or path.exists():
            raise
        hint = nearest(model, SHAPES) or f"Built-in shapes: {', '.join(SHAPES)}."
        raise UserError(f"{error} {hint}") from error


def model_name(model: str) -> str:
    """What `longlora extend` knows MODEL by: a built-in shape's hub id, otherwise the name itself."""
    return SHAPES[model][0] if model in SHAPES else model
