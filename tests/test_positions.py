"""RoPE extension against the papers' formulas, written anew here in float64, on random models of every architecture."""

import copy
import itertools
import logging
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.version import Version
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, Phi3Config, PreTrainedConfig

from longlora.errors import UserError
from longlora.model.positions import extend_positions, original_context, present_context
from longlora.settings import METHODS

ORIGINAL = 64
CONTEXT = 320  # not a power of two times the original window, on purpose: the factor is 5
FACTOR = 5.0
STATIC = ("linear", "ntk", "yarn", "llama3", "longrope")

SMALL = {
    "vocab_size": 61,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": ORIGINAL,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
HEAD = {"head_dim": 16}
LATENT = {
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "num_key_value_heads": 4,
    "num_mtp_layers": 0,
}
PLAIN_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 150000.0}}
LOCAL_AND_GLOBAL = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}
ARCHITECTURES = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "mixtral": EXPERTS,
    "qwen2": {},
    "qwen3": HEAD,
    "qwen3_moe": HEAD | EXPERTS,
    "phi3": {},
    "phi": {},
    "gpt_neox": {},
    "olmo2": {},
    "gemma": HEAD,
    "gemma2": HEAD | LOCAL_AND_GLOBAL,
    "gemma3_text": HEAD | LOCAL_AND_GLOBAL,
    "stablelm": {},
    "starcoder2": {},
    "granite": {},
    "cohere": {},
    "deepseek_v3": LATENT,
    "gpt_oss": HEAD | EXPERTS | LOCAL_AND_GLOBAL | PLAIN_ROPE,
}
ROTARY_DIMENSION = {"phi": 8, "gpt_neox": 4, "stablelm": 4}  # of head dimension 16: a half, a quarter, a quarter


def small_config(name: str, **changes: object) -> PreTrainedConfig:
    return AutoConfig.for_model(name, **(SMALL | ARCHITECTURES[name] | changes))


def build(config: PreTrainedConfig) -> torch.nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # big enough for positions to matter in the logits
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    return model


def logits(model: torch.nn.Module) -> list[torch.Tensor]:
    """A sequence beyond the original window, one within it, and the long one again: dynamic and longrope keep state."""
    tokens = torch.randint(3, SMALL["vocab_size"], (1, 100), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return [model(input_ids=tokens[:, :length]).logits for length in (100, 30, 100)]


def rope_of(config: PreTrainedConfig) -> dict:
    return config.rope_parameters.get("full_attention", config.rope_parameters)


def skip_inexpressible(name: str, method: str) -> None:
    if name == "phi3" and method == "dynamic":
        pytest.skip("Phi-3 configs have no dynamic RoPE")


def skip_broken_upstream(name: str, method: str) -> None:
    if name == "gemma3_text" and method == "longrope" and Version(transformers.__version__) < Version("5.23"):
        pytest.skip("transformers 5.17 fails at the second long row of a model with longrope layer by layer")


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Models this small lose most of their time to threads waiting for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def transformers_log() -> Iterator[list[str]]:
    """Warnings about RoPE from transformers while the test runs."""
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    handler.addFilter(lambda record: "rope" in record.getMessage().lower())
    transformers.utils.logging.warning_once.cache_clear()
    root = logging.getLogger("transformers")
    root.addHandler(handler)
    yield messages
    root.removeHandler(handler)


# The papers' formulas. d: rotary dimension, theta: base, s: factor, original: window in tokens.


def plain_frequencies(d: int, theta: float) -> np.ndarray:
    return np.array([theta ** (-2 * i / d) for i in range(d // 2)])


def ntk_frequencies(d: int, theta: float, s: float) -> np.ndarray:
    return plain_frequencies(d, theta * s ** (d / (d - 2)))


def dynamic_frequencies(d: int, theta: float, s: float, length: int, original: int) -> np.ndarray:
    alpha = s * length / original - (s - 1) if length > original else 1.0
    return ntk_frequencies(d, theta, alpha)


def yarn_frequencies(
    d: int, theta: float, s: float, original: int, fast: float = 32, slow: float = 1, truncate: bool = True
) -> np.ndarray:
    def dimension_that_turns(rotations: float) -> float:  # original * theta^(-2i/d) = 2 pi rotations, solved for i
        return d / 2 * math.log(original / (2 * math.pi * rotations), theta)

    first, last = dimension_that_turns(fast), dimension_that_turns(slow)
    if truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, d - 1)
    plain = plain_frequencies(d, theta)
    kept = [1 - min(max((i - first) / (last - first), 0.0), 1.0) for i in range(d // 2)]
    return np.array([f * k + f / s * (1 - k) for f, k in zip(plain, kept, strict=True)])


def llama3_frequencies(d: int, theta: float, s: float, original: int, low: float = 1, high: float = 4) -> np.ndarray:
    def stretched(frequency: float) -> float:
        turns = original * frequency / (2 * math.pi)
        if turns > high:
            return frequency
        if turns < low:
            return frequency / s
        kept = (turns - low) / (high - low)
        return (1 - kept) * frequency / s + kept * frequency

    return np.array([stretched(frequency) for frequency in plain_frequencies(d, theta)])


def expected(method: str, d: int, theta: float, length: int) -> tuple[np.ndarray, float]:
    """Frequencies and factor on cos and sin for a row of `length` tokens."""
    if method == "linear":
        return plain_frequencies(d, theta) / FACTOR, 1.0
    if method == "ntk":
        return ntk_frequencies(d, theta, FACTOR), 1.0
    if method == "dynamic":
        return dynamic_frequencies(d, theta, FACTOR, length, ORIGINAL), 1.0
    if method == "yarn":
        return yarn_frequencies(d, theta, FACTOR, ORIGINAL), 0.1 * math.log(FACTOR) + 1
    if method == "llama3":
        return llama3_frequencies(d, theta, FACTOR, ORIGINAL), 1.0
    if method == "longrope":
        beyond = length > ORIGINAL
        frequencies = yarn_frequencies(d, theta, FACTOR, ORIGINAL) if beyond else plain_frequencies(d, theta)
        return frequencies, math.sqrt(1 + math.log(FACTOR) / math.log(ORIGINAL))
    return plain_frequencies(d, theta), 1.0


def rotary_tables(
    model: torch.nn.Module, length: int, layer_type: str = "full_attention"
) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin `(N, d/2)` as the model's rotary embedding hands them to attention."""
    (rotary,) = [module for module in model.modules() if type(module).__name__.endswith("RotaryEmbedding")]
    layered = [layer_type] if hasattr(rotary, "layer_types") else []
    cos, sin = rotary(torch.zeros(1, dtype=torch.float32), torch.arange(length)[None], *layered)
    if "Cohere" in type(rotary).__name__:  # pairs of neighbours turn together
        columns = slice(0, None, 2)
    else:  # the first half turns with the second (gpt-oss gives the first half only)
        half = cos.shape[-1] if "GptOss" in type(rotary).__name__ else cos.shape[-1] // 2
        columns = slice(0, half)
    return cos[0, :, columns].double().numpy(), sin[0, :, columns].double().numpy()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_tables_follow_the_paper_and_the_model_equals_a_fresh_one(name, method, tmp_path, transformers_log):
    skip_inexpressible(name, method)
    skip_broken_upstream(name, method)
    config = small_config(name)
    theta, d = rope_of(config)["rope_theta"], ROTARY_DIMENSION.get(name, 16)
    model = build(config)
    before = logits(model)
    report = extend_positions(model, CONTEXT, method)
    assert (report.changed, report.factor, report.context) == (True, FACTOR, CONTEXT)
    assert (report.original_context, report.previous_context) == (ORIGINAL, ORIGINAL)
    assert (original_context(model.config), present_context(model.config)) == (ORIGINAL, CONTEXT)
    assert model.config.max_position_embeddings == (ORIGINAL if method == "dynamic" else CONTEXT)

    for length in (ORIGINAL - 1, 200, CONTEXT, 17):
        frequencies, attention_factor = expected(method, d, theta, length)
        cos, sin = rotary_tables(model, length)
        angles = np.outer(np.arange(length), frequencies)
        # float32 angles up to 320 radians: half a unit in the last place is 1.5e-5.
        np.testing.assert_allclose(cos, np.cos(angles) * attention_factor, atol=1e-4)
        np.testing.assert_allclose(sin, np.sin(angles) * attention_factor, atol=1e-4)

    in_place = logits(model)
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert reloaded.config.rope_parameters == model.config.rope_parameters
    assert reloaded.config.max_position_embeddings == model.config.max_position_embeddings
    for mine, theirs in zip(in_place, logits(reloaded), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
    assert (in_place[0] - before[0]).abs().max() > 1e-3 or method == "none"
    assert not transformers_log


def test_mutated_models_equal_fresh_ones_after_many_changes():
    """One model through every method, each time against a new model with its weights: nothing of the last one stays."""
    model = build(small_config("llama"))
    for step, method in enumerate(["longrope", "dynamic", "yarn", "longrope", "linear", "dynamic", "ntk", "llama3"]):
        logits(model)  # leaves state in the rotary embedding
        extend_positions(model, CONTEXT * (step + 1), method)
        fresh = AutoModelForCausalLM.from_config(copy.deepcopy(model.config)).eval()
        fresh.load_state_dict(model.state_dict())
        for mine, theirs in zip(logits(model), logits(fresh), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


def test_buffers_stay_out_of_the_state_dict_and_in_float32():
    model = build(small_config("llama")).to(torch.bfloat16)
    keys = set(model.state_dict())
    extend_positions(model, CONTEXT)
    assert set(model.state_dict()) == keys
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32  # as from_pretrained(dtype=bfloat16) has it


def test_a_peft_model_and_a_model_on_the_meta_device():
    from peft import LoraConfig, get_peft_model

    plain = build(small_config("llama"))
    adapted = get_peft_model(copy.deepcopy(plain), LoraConfig(target_modules=["q_proj"]))
    extend_positions(plain, CONTEXT)
    assert extend_positions(adapted, CONTEXT).changed
    torch.testing.assert_close(logits(adapted), logits(plain), rtol=0, atol=0)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(small_config("llama"))
        extend_positions(skeleton, CONTEXT)
    assert skeleton.model.rotary_emb.inv_freq.device.type == "meta"


@pytest.mark.parametrize("method", METHODS)
def test_local_layers_keep_their_positions(method):
    config = small_config("gemma3_text")
    local = copy.deepcopy(config.rope_parameters["sliding_attention"])
    model = build(config)
    before = rotary_tables(model, 100, "sliding_attention")
    extend_positions(model, CONTEXT, method)
    assert model.config.rope_parameters["sliding_attention"] == local
    np.testing.assert_array_equal(rotary_tables(model, 100, "sliding_attention"), before)


def test_the_text_part_of_a_multimodal_config():
    config = AutoConfig.for_model("gemma3", text_config=SMALL | ARCHITECTURES["gemma3_text"])
    assert extend_positions(config, CONTEXT, "linear").factor == FACTOR
    assert config.text_config.rope_parameters["full_attention"]["factor"] == FACTOR
    assert present_context(config) == CONTEXT


# Composition: the original window counts, whatever came between.


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gemma3_text", "phi3"])
@pytest.mark.parametrize(("first", "second"), list(itertools.product(METHODS, METHODS)))
def test_composition_of_every_pair(name, first, second):
    for method in (first, second):
        skip_inexpressible(name, method)
    direct, composed = small_config(name), small_config(name)
    extend_positions(direct, 8 * ORIGINAL, second)
    extend_positions(composed, 2 * ORIGINAL, first)
    after_first = copy.deepcopy(rope_of(composed))
    # Through a file, where keys that transformers does not know could get lost.
    composed = type(composed).from_dict(copy.deepcopy(composed.to_dict()))
    report = extend_positions(composed, 8 * ORIGINAL, second)
    assert (report.previous_context, report.context, report.factor) == (2 * ORIGINAL, 8 * ORIGINAL, 8.0)
    assert rope_of(composed) == (after_first if second == "none" else rope_of(direct))
    assert composed.max_position_embeddings == direct.max_position_embeddings
    assert (original_context(composed), present_context(composed)) == (ORIGINAL, 8 * ORIGINAL)


def test_what_a_method_needs_besides_the_factor_is_kept_by_the_same_method():
    config = small_config("llama")
    extend_positions(config, 128, "yarn", beta_fast=24, truncate=False, attention_factor=1.5)
    assert config.rope_parameters["attention_factor"] == 1.5
    extend_positions(config, 256, "yarn")
    assert config.rope_parameters["beta_fast"] == 24
    assert config.rope_parameters["truncate"] is False
    assert "attention_factor" not in config.rope_parameters  # it belonged to the factor of two


ARRIVALS = {
    # name: (config.json as on the hub, in its own dialect; original window; present window)
    "Llama 3.1": (
        "llama",
        {
            "max_position_embeddings": 131072,
            "rope_theta": 500000.0,
            "rope_scaling": {
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
        },
        8192,
        131072,
    ),
    "Llama 3.2": (
        "llama",
        {
            "max_position_embeddings": 131072,
            "rope_theta": 500000.0,
            "rope_scaling": {
                "factor": 32.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
        },
        4096,  # 131072 / 32: its slow frequencies have been divided by more than its window has grown
        131072,
    ),
    "Qwen2.5 as its README has it": (
        "qwen2",
        {
            "max_position_embeddings": 32768,
            "rope_theta": 1e6,
            "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"},
        },
        32768,
        131072,
    ),
    "Qwen3": (
        "qwen3",
        {
            "max_position_embeddings": 40960,
            "rope_theta": 1e6,
            "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
        },
        32768,
        131072,
    ),
    "Phi-3-mini-4k": ("phi3", {"max_position_embeddings": 4096, "rope_scaling": None}, 4096, 4096),
    "Phi-3-mini-128k": (
        "phi3",
        {
            "max_position_embeddings": 131072,
            "original_max_position_embeddings": 4096,
            "rope_scaling": {
                "type": "longrope",
                "short_factor": [1.05, 1.05, 1.05, 1.1, 1.1, 1.15, 2.0, 2.1],
                "long_factor": [1.1, 1.2, 1.6, 3.0, 14.0, 40.0, 60.0, 64.0],
            },
        },
        2048,  # 131072 / 64, the largest divisor: not the 4096 that it declares
        131072,
    ),
    "the original LongLoRA": (
        "llama",
        {"max_position_embeddings": 4096, "rope_scaling": {"factor": 8.0, "type": "linear"}},
        4096,
        32768,
    ),
    "Gemma 3": (
        "gemma3_text",
        {
            "max_position_embeddings": 131072,
            "rope_theta": 1e6,
            "rope_local_base_freq": 10000.0,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        },
        16384,
        131072,
    ),
    "DeepSeek-V3": (
        "deepseek_v3",
        {
            "max_position_embeddings": 163840,
            "rope_scaling": {
                "beta_fast": 32,
                "beta_slow": 1,
                "factor": 40,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "original_max_position_embeddings": 4096,
                "type": "yarn",
            },
        },
        4096,
        163840,
    ),
    "gpt-oss": ("gpt_oss", {"max_position_embeddings": 131072, "rope_parameters": None}, 4096, 131072),
    "dynamic": (
        "llama",
        {"max_position_embeddings": 4096, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
        4096,
        8192,
    ),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("arrival", ARRIVALS)
def test_models_that_arrive_extended(arrival, method):
    name, written, original, present = ARRIVALS[arrival]
    skip_inexpressible(name, method)
    config = small_config(name, **copy.deepcopy(written))
    rope = copy.deepcopy(rope_of(config))
    assert (original_context(config), present_context(config)) == (original, present)
    context = 4 * present
    report = extend_positions(config, context, method)
    assert (report.changed, report.factor) == (True, context / original)
    if method == "none":  # the window has grown under unchanged divisors: up to what the config declares
        original = {"Phi-3-mini-128k": 4096, "Llama 3.2": 8192}.get(arrival, original)
    assert (original_context(config), present_context(config)) == (original, context)
    if method == "ntk":
        d = ROTARY_DIMENSION.get(name, 16)
        assert rope_of(config)["rope_theta"] == pytest.approx(rope["rope_theta"] * report.factor ** (d / (d - 2)))
    else:
        assert rope_of(config)["rope_theta"] == rope["rope_theta"]
    if method == "none":
        assert {key: value for key, value in rope_of(config).items() if key in rope} == rope
    elif rope["rope_type"] == method:
        for kept in ("truncate", "mscale", "mscale_all_dim", "low_freq_factor", "short_factor"):
            assert rope_of(config).get(kept) == rope.get(kept)


def frequencies_at(config: PreTrainedConfig, length: int) -> np.ndarray:
    """What transformers turns the heads by in a row of `length` tokens (a model would round them to float32 too)."""
    rope = rope_of(config)
    layer = "full_attention" if rope is not config.rope_parameters else None
    if rope["rope_type"] == "default":
        return plain_frequencies(16, rope["rope_theta"])
    compute = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS[rope["rope_type"]]
    return compute(config, "cpu", seq_len=length, layer_type=layer)[0].double().numpy()


@pytest.mark.parametrize("method", [method for method in METHODS if method != "none"])
@pytest.mark.parametrize("arrival", [*ARRIVALS, *(f"by {method}" for method in METHODS)])
def test_no_slow_frequency_turns_further_than_it_was_trained_to(arrival, method):
    """Whatever a model was stretched by before: the largest angle of each frequency, length times frequency."""
    if arrival in ARRIVALS:
        name, written, _, present = ARRIVALS[arrival]
        config = small_config(name, **copy.deepcopy(written))
    else:
        name, present = "llama", 8192
        config = small_config("llama", max_position_embeddings=2048)
        extend_positions(config, present, arrival.removeprefix("by "))
    skip_inexpressible(name, method)
    trained = present * frequencies_at(config, present)
    if rope_of(config)["rope_type"] == "dynamic":  # whose angles are largest at the end of the first window
        first_window = config.max_position_embeddings
        trained = np.maximum(trained, first_window * frequencies_at(config, first_window))
    for context in (2 * present, 8 * present):
        stretched = copy.deepcopy(config)
        extend_positions(stretched, context, method)
        angles = context * frequencies_at(stretched, context)
        first = 0 if method == "linear" else len(angles) - 1  # ntk's interpolates fully at the slowest alone
        if method in ("yarn", "llama3", "longrope"):  # which do where less than a turn fits in the first window
            turns = original_context(config) * plain_frequencies(16, rope_of(stretched)["rope_theta"]) / (2 * math.pi)
            first = int((turns >= 1).sum())
        assert first < len(angles)
        assert (angles <= trained * (1 + 1e-5))[first:].all(), angles / trained


def test_none_leaves_the_frequencies_of_a_model_that_takes_its_factor_from_the_window():
    """Phi-3 on the hub has no factor: transformers takes it, for the attention factor, from the two windows."""
    name, written, _, _ = ARRIVALS["Phi-3-mini-128k"]
    small = {"max_position_embeddings": 256, "original_max_position_embeddings": ORIGINAL}
    model = build(small_config(name, **(copy.deepcopy(written) | small)))
    before = rotary_tables(model, 200)
    assert "factor" not in model.config.rope_parameters
    extend_positions(model, 1024, "none")
    np.testing.assert_array_equal(rotary_tables(model, 200), before)


@pytest.mark.parametrize("method", METHODS)
def test_deepseek_attention_scale_follows(method):
    """DeepSeek's attention takes a softmax scale from YaRN's mscale_all_dim when it is built."""
    name, written, _, _ = ARRIVALS["DeepSeek-V3"]
    model = build(small_config(name, **(copy.deepcopy(written) | {"max_position_embeddings": 256})))
    model.config.rope_parameters["original_max_position_embeddings"] = ORIGINAL
    extend_positions(model, 64 * 64, method)
    fresh = AutoModelForCausalLM.from_config(copy.deepcopy(model.config)).eval()
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(logits(model), logits(fresh), rtol=0, atol=0)
    kept = method in ("yarn", "none")
    mscale = 0.1 * math.log(64 if method == "yarn" else 40) + 1 if kept else 1.0
    assert model.model.layers[0].self_attn.scaling == pytest.approx(24**-0.5 * mscale**2)


@settings(max_examples=100, deadline=None)
@given(st.integers(8, 5000), st.integers(1, 30000), st.sampled_from(METHODS))
def test_the_factor_is_exact_and_linear_stays_inside_the_trained_angles(original, more, method):
    config = LlamaConfig(**(SMALL | {"max_position_embeddings": original}))
    context = original + more
    extend_positions(config, context, method)
    assert present_context(config) == context
    if "factor" in config.rope_parameters:
        assert config.rope_parameters["factor"] == context / original
    if method == "linear":
        (frequencies, _) = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["linear"](config)
        # Position Interpolation maps the last position, context - 1, below the original window for every frequency.
        largest = (context - 1) * frequencies.double().numpy()
        assert (largest < original * plain_frequencies(16, 10000.0) * (1 + 1e-6)).all()
    extend_positions(config, 2 * context, "yarn")
    assert config.rope_parameters["factor"] == 2 * context / original
    assert config.rope_parameters["rope_theta"] == 10000.0


def test_yarn_and_llama3_parameters_reach_the_frequencies():
    model = build(small_config("llama"))
    extend_positions(model, CONTEXT, "yarn", beta_fast=4, beta_slow=0.5, truncate=False, attention_factor=2.0)
    angles = np.outer(np.arange(200), yarn_frequencies(16, 10000.0, FACTOR, ORIGINAL, 4, 0.5, truncate=False))
    np.testing.assert_allclose(rotary_tables(model, 200)[0], 2 * np.cos(angles), atol=1e-4)
    extend_positions(model, 2 * CONTEXT, "llama3", low_freq_factor=0.5, high_freq_factor=2.0)
    angles = np.outer(np.arange(200), llama3_frequencies(16, 10000.0, 2 * FACTOR, ORIGINAL, 0.5, 2.0))
    np.testing.assert_allclose(rotary_tables(model, 200)[0], np.cos(angles), atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_longrope_takes_lists(name):
    short, long = [1.0 + i / 10 for i in range(8)], tuple(range(1, 9))
    model = build(small_config(name))
    extend_positions(model, CONTEXT, "longrope", short_factor=short, long_factor=long, attention_factor=1.25)
    for length, divisors in ((50, short), (65, long)):
        angles = np.outer(np.arange(length), plain_frequencies(16, 10000.0) / divisors)
        np.testing.assert_allclose(rotary_tables(model, length)[0], 1.25 * np.cos(angles), atol=1e-4)


@pytest.mark.parametrize("context", [2, ORIGINAL - 1, ORIGINAL])
@pytest.mark.parametrize("method", METHODS)
def test_a_context_not_above_the_window_changes_nothing(method, context, caplog):
    model = build(small_config("llama"))
    written, before = model.config.to_dict(), logits(model)
    report = extend_positions(model, context, method)
    assert not report.changed
    assert (report.context, report.previous_context, report.factor) == (ORIGINAL, ORIGINAL, 1.0)
    assert "nothing changed" in report.message
    assert str(ORIGINAL) in report.message
    assert report.message in caplog.text
    assert model.config.to_dict() == written
    torch.testing.assert_close(logits(model), before, rtol=0, atol=0)


# A user's mistakes.


@pytest.mark.parametrize(
    ("name", "reason"),
    [("gpt2", "rotary"), ("bloom", "ALiBi"), ("mpt", "ALiBi"), ("opt", "rotary"), ("gptj", "rotary")],
)
def test_a_model_without_rope_is_refused(name, reason):
    with pytest.raises(UserError, match=reason) as error:
        extend_positions(AutoConfig.for_model(name), 1 << 20)
    assert name in str(error.value)


def test_falcon_with_alibi_is_refused():
    with pytest.raises(UserError, match="ALiBi"):
        extend_positions(AutoConfig.for_model("falcon", alibi=True), 1 << 20)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"context": 128, "method": "yarm"}, "Did you mean 'yarn'"),
        ({"context": 128.5}, "whole number"),
        ({"context": -4}, "at least 2"),
        ({"context": 128, "method": "linear", "beta_fast": 3}, "takes no parameters"),
        ({"context": 128, "method": "yarn", "beta_fats": 3}, "Did you mean 'beta_fast'"),
        ({"context": 128, "method": "longrope", "long_factor": [1.0] * 7}, "list of 8 numbers above 0.*7 values"),
        ({"context": 128, "method": "longrope", "short_factor": 3}, "short_factor.*3 was given"),
    ],
)
def test_mistakes_get_a_sentence_and_change_nothing(arguments, sentence):
    config = small_config("llama")
    written = config.to_dict()
    with pytest.raises(UserError, match=sentence):
        extend_positions(config, **arguments)
    assert config.to_dict() == written


class WindowlessConfig(PreTrainedConfig):
    model_type = "windowless"
    rope_parameters: dict | None = None


def test_configs_that_cannot_be_stretched():
    with pytest.raises(UserError, match="phi3 config cannot express method 'dynamic'"):
        extend_positions(small_config("phi3"), CONTEXT, "dynamic")
    with pytest.raises(UserError, match="windowless config has no max_position_embeddings"):
        extend_positions(WindowlessConfig(rope_parameters={"rope_type": "default", "rope_theta": 1e4}), CONTEXT)
    strange = small_config("llama")
    strange.rope_parameters = {"rope_type": "proportional", "rope_theta": 1e4}
    with pytest.raises(UserError, match="rope_type 'proportional'"):
        extend_positions(strange, CONTEXT)
    narrow = small_config("llama", head_dim=2)
    with pytest.raises(UserError, match="rotary dimension"):
        extend_positions(narrow, CONTEXT, "ntk")


def test_phi3_reads_every_fixed_method_back_from_its_file(transformers_log):
    """transformers accepts only default and longrope from a Phi-3 config, and takes yarn for longrope."""
    for method in STATIC:
        config = small_config("phi3")
        extend_positions(config, CONTEXT, method)
        read = Phi3Config.from_dict(config.to_dict())
        assert read.rope_parameters == config.rope_parameters
        assert read.rope_parameters["rope_type"] == ("default" if method == "ntk" else "longrope")
    assert not transformers_log
