"""Positions that arrive in a GGUF, against the folder that the file was made from; the writer here is gguf's own."""

import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from longlora.errors import UserError
from longlora.model.loading import load_config
from longlora.model.positions import extend_positions, original_context, present_context
from longlora.model.rope import frequency_divisors

WINDOW = 64
SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 4 * WINDOW,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}
PLUS_ONE = ("gemma2", "gemma3", "nemotron")
"""Architectures whose norm weights llama.cpp stores as weight + 1."""


def rope(kind: str = "default", theta: float = 10000.0, **more: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": theta, **more}


def write(
    path: Path,
    architecture: str,
    model: Any,
    keys: dict[str, Any],
    tensors: dict[str, list[float]] | None = None,
) -> None:
    """A float32 GGUF of `model` with `ARCH.KEY` of `keys`, without a tokenizer worth the name."""
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    epsilon = next(
        getattr(config, name)
        for name in ("rms_norm_eps", "norm_epsilon", "layer_norm_eps", "norm_eps")
        if hasattr(config, name)
    )
    known = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head,
        "attention.layer_norm_rms_epsilon": epsilon,
        "attention.layer_norm_epsilon": epsilon,
        "rope.dimension_count": head,
        "vocab_size": config.vocab_size,
    }
    for key, value in (known | keys).items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
        add(f"{architecture}.{key}", value)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    for add in (writer.add_bos_token_id, writer.add_eos_token_id, writer.add_pad_token_id):
        add(0)
    writer.add_token_list([f"t{number}" for number in range(config.vocab_size)])
    names = gguf.get_tensor_name_map(
        {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}[architecture], config.num_hidden_layers
    )
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    for name, tensor in model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        array = tensor.float().numpy()
        if architecture in PLUS_ONE and "norm" in name and name.endswith("weight"):
            array = array + 1
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if architecture == "llama" and heads:  # llama.cpp turns pairs of neighbours
            array = array.reshape(heads, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), np.ascontiguousarray(array))
    for name, values in (tensors or {}).items():
        writer.add_tensor(name, np.array(values, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def logits(model: Any) -> list[torch.Tensor]:
    """Of a row within the first window and of one beyond it."""
    tokens = torch.randint(1, 97, (1, 3 * WINDOW), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return [model(input_ids=tokens[:, :length]).logits for length in (WINDOW // 2, 3 * WINDOW)]


DIVISORS = [1.0, 1.0, 1.0, 1.3, 1.9, 2.5, 3.1, 3.5, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0]
"""A divisor for each of the 16 frequencies of a head of 32."""


def llama3_divisors(factor: float) -> list[float]:
    """By hand: frequencies of more than 4 turns in the first window stay, those of less than one are divided."""
    divisors = []
    for i in range(16):
        turns = WINDOW * 10000.0 ** (-i / 16) / (2 * math.pi)
        kept = min(max((turns - 1) / 3, 0.0), 1.0)
        divisors.append(1 / (kept + (1 - kept) / factor))
    return divisors


YARN = {"factor": 4.0, "original_max_position_embeddings": WINDOW}
YARN_KEYS = {
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 4.0,
    "rope.scaling.original_context_length": WINDOW,
}
LAYERED = {
    "head_dim": 32,
    "sliding_window": 16,
    "num_hidden_layers": 6,
    "tie_word_embeddings": True,
}
LLAMA3 = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": WINDOW}
THETA = {"rope.freq_base": 10000.0}

FILES: dict[str, tuple[str, str, dict[str, Any], dict[str, Any], dict[str, list[float]]]] = {
    # name: (transformers' model type, llama.cpp's architecture, config, keys, tensors)
    "llama, its own frequencies": (
        "llama",
        "llama",
        {"rope_parameters": rope("llama3", **LLAMA3)},
        THETA,
        {"rope_freqs.weight": llama3_divisors(4.0)},
    ),
    "llama, linear": (
        "llama",
        "llama",
        {"rope_parameters": rope("linear", factor=4.0), "max_position_embeddings": WINDOW},
        THETA | {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
        {},
    ),
    "llama, a factor without a type": (
        "llama",
        "llama",
        {"rope_parameters": rope("linear", factor=4.0), "max_position_embeddings": WINDOW},
        THETA | {"rope.scaling.factor": 4.0},
        {},
    ),
    "llama, the old name of the factor": (
        "llama",
        "llama",
        {"rope_parameters": rope("linear", factor=4.0), "max_position_embeddings": WINDOW},
        THETA | {"rope.scale_linear": 4.0},
        {},
    ),
    "llama, a factor of no effect": (
        "llama",
        "llama",
        {"rope_parameters": rope(theta=5000.0)},
        {"rope.freq_base": 5000.0, "rope.scaling.type": "none", "rope.scaling.factor": 4.0},
        {},
    ),
    "llama, yarn with its ramp": (
        "llama",
        "llama",
        {"rope_parameters": rope("yarn", **YARN, beta_fast=8.0, beta_slow=0.5)},
        THETA
        | YARN_KEYS
        | {
            "rope.scaling.yarn_beta_fast": 8.0,
            "rope.scaling.yarn_beta_slow": 0.5,
            "rope.scaling.yarn_ext_factor": 1.0,
            "rope.scaling.yarn_log_multiplier": 0.0,
        },
        {},
    ),
    "qwen2, yarn with another attention": (
        "qwen2",
        "qwen2",
        {"rope_parameters": rope("yarn", theta=1e6, **YARN, attention_factor=1.5)},
        {"rope.freq_base": 1e6, **YARN_KEYS, "rope.scaling.attn_factor": 1.5 / (0.1 * math.log(4) + 1)},
        {},
    ),
    "qwen3, heads that are no share of the width": (
        "qwen3",
        "qwen3",
        {"head_dim": 48, "rope_parameters": rope("yarn", theta=1e6, **YARN)},
        {"rope.freq_base": 1e6, **YARN_KEYS},
        {},
    ),
    "phi3, two lists": (
        "phi3",
        "phi3",
        {
            "original_max_position_embeddings": WINDOW,
            "rope_parameters": rope("longrope", short_factor=[1.0 + i / 16 for i in range(16)], long_factor=DIVISORS),
        },
        THETA
        | {
            "rope.scaling.original_context_length": WINDOW,
            "rope.scaling.attn_factor": math.sqrt(1 + math.log(4) / math.log(WINDOW)),
            "attention.sliding_window": 0,
        },
        {"rope_factors_short.weight": [1.0 + i / 16 for i in range(16)], "rope_factors_long.weight": DIVISORS},
    ),
    "phi3, three quarters of a head and a sliding window": (
        "phi3",
        "phi3",
        {
            "sliding_window": 20,
            "rope_parameters": rope(partial_rotary_factor=0.75),
            "original_max_position_embeddings": 4 * WINDOW,
        },
        THETA | {"rope.dimension_count": 24, "attention.sliding_window": 20},
        {},
    ),
    "gemma3, linear in its global layers": (
        "gemma3_text",
        "gemma3",
        LAYERED
        | {
            "query_pre_attn_scalar": 256,
            "rope_parameters": {
                "full_attention": rope("linear", theta=1e6, factor=8.0),
                "sliding_attention": rope(theta=5000.0),
            },
        },
        {
            "rope.freq_base": 1e6,
            "rope.freq_base_swa": 5000.0,
            "rope.scaling.type": "linear",
            "rope.scaling.factor": 8.0,
            "attention.sliding_window": 16,
        },
        {},
    ),
    "gemma2": (
        "gemma2",
        "gemma2",
        LAYERED | {"query_pre_attn_scalar": 256, "rope_parameters": rope(theta=20000.0)},
        {"rope.freq_base": 20000.0, "attention.sliding_window": 16},
        {},
    ),
    "starcoder2": (
        "starcoder2",
        "starcoder2",
        {"rope_parameters": rope(theta=999999.0), "sliding_window": None},
        {"rope.freq_base": 999999.0},
        {},
    ),
    "stablelm, a half of a head": (
        "stablelm",
        "stablelm",
        {"rope_parameters": rope(theta=30000.0, partial_rotary_factor=0.5)},
        {"rope.freq_base": 30000.0, "rope.dimension_count": 16},
        {},
    ),
    "nemotron, a quarter of a head": (
        "nemotron",
        "nemotron",
        {"rope_parameters": rope(theta=30000.0, partial_rotary_factor=0.25)},
        {"rope.freq_base": 30000.0, "rope.dimension_count": 8},
        {},
    ),
}


def made(name: str, folder: Path) -> tuple[Any, Path]:
    model_type, architecture, changes, keys, tensors = FILES[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(model_type, **(SIZES | changes)), dtype=torch.float32
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases too, which start as ones and zeros
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    path = folder / "model.gguf"
    write(path, architecture, model, keys, tensors)
    return model, path


@pytest.mark.parametrize("name", FILES)
def test_a_file_gives_the_logits_of_the_model_it_was_made_from(name, tmp_path):
    """In a row within the first window and in one beyond it."""
    model, path = made(name, tmp_path)
    config = load_config(path)
    found = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, config=config).eval()
    for theirs, ours in zip(logits(model), logits(found), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5 * theirs.abs().max().item())
    assert present_context(config) == present_context(model.config)


def header(path: Path, architecture: str, keys: dict[str, Any], tensors: dict[str, list[float]]) -> Path:
    """What a config is read from, without the weights."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in keys.items():
        add = {int: writer.add_uint32, float: writer.add_float32}[type(value)]
        add(f"{architecture}.{key}", value)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["a", "b"])
    for name, values in (tensors or {"output_norm.weight": [1.0]}).items():
        writer.add_tensor(name, np.array(values, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


SHAPE = {
    "context_length": 1024, "embedding_length": 64, "feed_forward_length": 96, "attention.head_count": 2,
    "attention.head_count_kv": 1, "attention.layer_norm_rms_epsilon": 1e-6, "attention.sliding_window": 16,
}  # fmt: skip


def test_gemma4_has_wider_heads_that_see_all_and_turns_a_share_of_them(tmp_path):
    """As llama.cpp writes it: heads of 64 of which a quarter turns, and heads of 32 in the local layers."""
    keys = SHAPE | {
        "block_count": 6, "attention.key_length": 64, "attention.key_length_swa": 32, "rope.dimension_count": 64,
        "rope.dimension_count_swa": 32, "rope.freq_base": 2e6, "rope.freq_base_swa": 5000.0,
    }  # fmt: skip
    turning = {"rope_freqs.weight": [1.0] * 8 + [1e30] * 24}
    config = load_config(header(tmp_path / "gemma4.gguf", "gemma4", keys, turning))
    assert config.per_layer_config["sliding_attention"].head_dim == 32
    assert config.per_layer_config["full_attention"].head_dim == 64
    assert config.rope_parameters == {
        "sliding_attention": rope(theta=5000.0),
        "full_attention": rope("proportional", theta=2e6, partial_rotary_factor=0.25),
    }
    scaled = header(tmp_path / "scaled.gguf", "gemma4", keys | {"rope.scaling.factor": 4.0}, turning)
    with pytest.raises(UserError, match="scaled positions beside"):
        load_config(scaled)


@pytest.mark.parametrize(
    ("architecture", "layers", "scalar"), [("gemma3", 62, 32), ("gemma2", 46, 32), ("gemma3", 34, 256)]
)
def test_the_largest_gemma_scales_its_softmax_otherwise(architecture, layers, scalar, tmp_path):
    """27B: by the width divided by the heads (64 / 2), which is in no key; llama.cpp goes by the number of layers."""
    keys = SHAPE | {"block_count": layers, "attention.key_length": 128, "rope.dimension_count": 128}
    config = load_config(header(tmp_path / "gemma.gguf", architecture, keys, {}))
    assert config.query_pre_attn_scalar == scalar


def test_frequencies_of_their_own_and_a_factor_multiply(tmp_path):
    """As llama.cpp computes them: the angle is divided by the list, and then by the factor."""
    model, path = made("llama, its own frequencies", tmp_path)
    write(
        path,
        "llama",
        model,
        THETA | {"rope.scaling.type": "linear", "rope.scaling.factor": 2.0, "rope.scaling.attn_factor": 1.5},
        {"rope_freqs.weight": DIVISORS},
    )
    divisors, attention_factor = frequency_divisors(load_config(path))
    assert divisors == pytest.approx([2 * divisor for divisor in DIVISORS], rel=1e-6)
    assert attention_factor == pytest.approx(1.5)


@pytest.mark.parametrize("method", ["linear", "yarn"])
def test_frequencies_that_came_in_a_file_are_stretched_further(method, tmp_path):
    """Llama 3.1's GGUF says neither its first window nor its factor, only what each frequency was divided by."""
    _, path = made("llama, its own frequencies", tmp_path)
    config = load_config(path)
    assert original_context(config) == WINDOW
    assert extend_positions(config, 16 * WINDOW, method).factor == 16
    slowest = frequency_divisors(config)[0][-1]
    assert slowest == pytest.approx(16, rel=1e-6)  # 16 windows further, 4 of them trained with a divisor of 4


@pytest.mark.parametrize(
    ("name", "keys", "tensors", "what"),
    [
        ("llama, linear", {"rope.scaling.type": "longrope"}, {}, "longrope positions without"),
        ("llama, linear", {"rope.scaling.type": "banana"}, {}, "banana positions"),
        ("llama, linear", {"rope.scaling.alpha": 1000.0}, {}, "rope.scaling.alpha = 1000.0"),
        ("llama, linear", {"rope.scaling.yarn_log_multiplier": 0.1}, {}, "yarn_log_multiplier"),
        ("qwen2, yarn with another attention", {"rope.dimension_count": 16}, {}, "heads of 32 of which 16 turn"),
        ("llama, linear", {"rope.freq_base_swa": 777.0}, {}, "freq_base_swa = 777"),
        ("phi3, two lists", {}, {"rope_factors_long.weight": DIVISORS}, "without rope_factors_short"),
    ],
)
def test_positions_that_cannot_be_read_are_refused(name, keys, tensors, what, tmp_path):
    model, path = made(name, tmp_path)
    write(path, FILES[name][1], model, FILES[name][3] | keys, tensors)
    with pytest.raises(UserError, match=what):
        load_config(path)
