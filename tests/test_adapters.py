"""What trains: the right modules in every family, in float32, and saved so that stock PEFT gives the same model."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tiny_runs import disturb, logits, make_run, save_base, seen_by_stock_libraries
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from longlora.errors import UserError
from longlora.model.adapters import (
    add_adapters,
    add_adapters_from,
    attention_projections,
    merge_adapters,
    norm_modules,
    parameter_groups,
    trainable_summary,
)
from longlora.model.saving import save_adapter
from longlora.settings import TrainableSettings, TrainingSettings

PROJECTIONS = {
    "gpt_neox": {"query_key_value", "dense"},
    "gpt2": {"c_attn", "c_proj"},
    "phi3": {"qkv_proj", "o_proj"},
    "deepseek_v3": {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"},
}
SEPARATE = {"q_proj", "k_proj", "v_proj", "o_proj"}
"""By family, the last part of the names of its attention's linear layers (transformers' own names)."""

FURTHER: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "mixtral": {"num_key_value_heads": 2, "num_local_experts": 3, "sliding_window": None},
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "q_lora_rank": 12,
        "kv_lora_rank": 12,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "n_routed_experts": 4,
        "n_group": 2,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 1,
        "n_shared_experts": 1,
    },
}
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def further_model(architecture: str, **overrides: Any) -> Any:
    """A tiny model of a family that the shared fixture does not make."""
    fields = {"vocab_size": 97, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0}
    sizes = {} if architecture == "gpt2" else SIZES
    config = AutoConfig.for_model(architecture, **fields, **sizes, **FURTHER[architecture], **overrides)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture
def any_model(tiny_model: Any) -> Any:
    return lambda name, **overrides: (further_model if name in FURTHER else tiny_model)(name, **overrides)


EVERY = ["llama", "mistral", "qwen2", "qwen3", "phi3", "gpt_neox", "olmo2", "gemma", *FURTHER]


@pytest.mark.parametrize("name", EVERY)
def test_finds_the_projections_and_the_norms(any_model: Any, name: str) -> None:
    model = any_model(name)
    found = {path.split(".")[-1] for path in attention_projections(model)}
    assert found == PROJECTIONS.get(name, SEPARATE)
    assert not any("mlp" in path for path in attention_projections(model))
    by_name = {path.rpartition(".")[0] for path, _ in model.named_parameters() if "norm" in path or ".ln_" in path}
    assert set(norm_modules(model)) == by_name


@pytest.mark.parametrize("name", EVERY)
def test_only_the_named_parts_train(any_model: Any, name: str) -> None:
    model = add_adapters(any_model(name), rank=3)
    embedding = {"gpt2": "wte", "gpt_neox": "embed_in"}.get(name, "embed_tokens")
    for path, parameter in model.named_parameters():
        original = ".original_module." in path
        retrained = "norm" in path or ".ln_" in path or f".{embedding}." in path
        expected = "lora_" in path or (retrained and not original)
        assert parameter.requires_grad == expected, path
    layers = model.config.num_hidden_layers
    adapted = {path.rpartition(".lora_A")[0] for path, _ in model.named_parameters() if "lora_A" in path}
    assert len(adapted) == layers * len(PROJECTIONS.get(name, SEPARATE))
    assert not any("mlp" in path for path in adapted)


def cases() -> list[tuple[str, bool]]:
    return [(name, tied) for name in EVERY for tied in (False, True)]


@pytest.fixture(scope="module")
def stock(tiny_model: Any, tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What one process without longlora sees of an adapter of each family, untied and tied."""
    folders = []
    for name, tied in cases():
        folder = tmp_path_factory.mktemp("case") / f"{name}-{tied}"
        make = further_model if name in FURTHER else tiny_model
        base = save_base(folder / "base", make(name, tie_word_embeddings=tied), tiny_tokenizer())
        if name == "gpt2":  # no rotary positions to extend
            model = add_adapters(AutoModelForCausalLM.from_pretrained(base))
            disturb(model)
            save_adapter(model, folder / "run" / "adapter", tiny_tokenizer())
        else:
            model = make_run(folder / "run", base, tiny_tokenizer())
        expected = logits(model.eval())
        with model.disable_adapter():
            assert (logits(model) - expected).abs().max() > 1e-2, "a change too small to test anything"
        torch.save(expected, folder / "expected.pt")
        folders.append(folder)
    return seen_by_stock_libraries(folders)


@pytest.mark.parametrize(("name", "tied"), cases())
def test_stock_peft_gives_the_same_logits(stock: dict[str, dict[str, Any]], name: str, tied: bool) -> None:
    seen = stock[f"{name}-{tied}"]
    assert seen["adapter"] <= 1e-5
    assert seen["unloaded"] <= 1e-5
    assert seen["unloaded_tied"] == tied


def test_adapter_folder_holds_the_extended_config_and_the_tokenizer(
    tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    base = save_base(tmp_path / "base", tiny_model("llama", vocab_size=257), tiny_tokenizer())
    make_run(tmp_path / "run", base, tiny_tokenizer())
    config = AutoConfig.from_pretrained(tmp_path / "run" / "adapter")
    assert config.max_position_embeddings == 256
    assert config.rope_parameters["factor"] == 4.0
    assert config.architectures == ["LlamaForCausalLM"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "adapter")
    assert tokenizer("déjà vu")["input_ids"] == tiny_tokenizer()("déjà vu")["input_ids"]


@pytest.mark.parametrize("parts", [("norm",), ("embed",), ("norm", "embed")])
def test_without_lora_too_it_is_a_stock_adapter(tiny_model: Any, tmp_path: Path, parts: tuple[str, ...]) -> None:
    model = add_adapters(tiny_model("llama"), rank=None, train=parts)
    assert set(trainable_summary(model)["groups"]) == set(parts)
    disturb(model)
    save_adapter(model, tmp_path)
    again = PeftModel.from_pretrained(tiny_model("llama"), str(tmp_path))
    assert torch.equal(logits(again), logits(model.eval()))


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gemma", "phi3"])  # Gemma's is tied
def test_low_precision_model_trains_in_float32(any_model: Any, name: str) -> None:
    ids = torch.arange(12)[None]
    reference = add_adapters(any_model(name))
    disturb(reference)
    exact = logits(reference.eval())
    reference(ids, labels=ids).loss.backward()
    rounded = copy.deepcopy(reference).to(torch.bfloat16)  # what plain bfloat16 does to it
    allowed = (logits(rounded) - exact).norm()

    model = add_adapters(any_model(name).to(torch.bfloat16)).eval()
    for (path, parameter), wanted in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else torch.bfloat16), path
        parameter.data.copy_(wanted)
    assert (logits(model) - exact).norm() < 1.1 * allowed
    with torch.autocast("cpu", torch.bfloat16):
        assert (logits(model) - exact).norm() < 1.1 * allowed
        states = model(ids, output_hidden_states=True).hidden_states
        assert {state.dtype for state in states} == {torch.bfloat16}
        model(ids, labels=ids).loss.backward()
    for (path, parameter), wanted in zip(model.named_parameters(), reference.parameters(), strict=True):
        if parameter.requires_grad:
            assert parameter.grad is not None, path
            assert parameter.grad.dtype == torch.float32
            error = (parameter.grad - wanted.grad).norm() / wanted.grad.norm()
            assert error < 0.15, f"{path}: {error}"


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("recomputed", [False, True])
def test_q_k_and_v_keep_one_copy_of_their_input(
    tiny_model: Any, dtype: torch.dtype, autocast: bool, recomputed: bool
) -> None:
    """Counted by a saved-tensors hook around one layer's attention; three, if each casts for itself."""
    model = add_adapters(tiny_model("llama", num_hidden_layers=1).to(dtype), train=()).train()
    attention = model.get_base_model().model.layers[0].self_attn
    projections = [attention.q_proj, attention.k_proj, attention.v_proj]
    kept: list[set[int]] = []
    alive = []

    def look(module: torch.nn.Module, inputs: Any) -> None:
        hook = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        kept.append(set())
        hook.__enter__()
        module.hook = hook

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.shape == (23, 64) or tensor.shape == (1, 23, 64):
            kept[-1].add(tensor.untyped_storage().data_ptr())
            alive.append(tensor)  # so that no address is given twice
        return tensor

    for projection in projections:
        projection.register_forward_pre_hook(look)
        projection.register_forward_hook(lambda module, *_: module.hook.__exit__(None, None, None))
    if recomputed:
        model.gradient_checkpointing_enable({"use_reentrant": True})
        model.enable_input_require_grads()
    ids = torch.arange(23)[None]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(ids, labels=ids).loss
    loss.backward()
    assert len(kept) == (6 if recomputed else 3)
    assert len(set.union(*kept[-3:])) == 1


def test_the_shared_cast_changes_nothing_and_holds_nothing(tiny_model: Any) -> None:
    ids = torch.arange(23)[None]
    found = []
    for shared in (True, False):
        torch.manual_seed(0)
        model = add_adapters(tiny_model("llama").to(torch.bfloat16)).train()
        disturb(model)
        attention = model.get_base_model().model.layers[0].self_attn
        if not shared:
            for module in model.modules():
                vars(module).pop("_cast_input_dtype", None)
        copy.deepcopy(model)
        loss = model(ids, labels=ids).loss
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
        if shared:
            assert attention.q_proj._cast_input_dtype is attention.v_proj._cast_input_dtype
            assert attention.q_proj._cast_input_dtype.given is None
    assert torch.equal(found[0][0], found[1][0])
    for ours, pefts in zip(*found, strict=True):  # PEFT rounds three gradients to bfloat16 and adds them, ours once
        assert (ours - pefts).norm() <= 0.02 * pefts.norm()


def test_small_steps_are_not_lost(tiny_model: Any) -> None:
    model = add_adapters(tiny_model("llama").to(torch.bfloat16))
    norm = next(p for path, p in model.named_parameters() if p.requires_grad and "input_layernorm" in path)
    optimizer = torch.optim.AdamW([norm], lr=2e-5, weight_decay=0.0)
    model(torch.arange(12)[None], labels=torch.arange(12)[None]).loss.backward()
    before = norm.detach().clone()
    optimizer.step()
    # Adam's first step is the learning rate in each entry; bfloat16 cannot tell 1 + 2e-5 from 1
    assert torch.allclose((norm - before).abs(), torch.full_like(norm, 2e-5), rtol=0.02)


def test_switched_off_it_is_the_base_to_the_bit(tiny_model: Any) -> None:
    before = logits(tiny_model("llama").to(torch.bfloat16))
    model = add_adapters(tiny_model("llama").to(torch.bfloat16)).eval()
    disturb(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), before)


@pytest.mark.parametrize("tied", [False, True])
def test_merging_rounds_once(tiny_model: Any, tied: bool) -> None:
    model = add_adapters(tiny_model("llama", tie_word_embeddings=tied).to(torch.bfloat16), rank=3, alpha=5.0)
    disturb(model)
    layer = model.get_base_model().model.layers[1].self_attn.k_proj
    update = 5.0 / 3 * layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()
    expected = (layer.base_layer.weight.double() + update).to(torch.bfloat16)
    plain = merge_adapters(model)
    merged = plain.model.layers[1].self_attn.k_proj.weight
    assert merged.dtype == torch.bfloat16
    # float64 and float32 sums may fall to different sides of a bfloat16 tie, hardly ever
    assert (merged != expected).float().mean() < 0.01
    assert (plain.lm_head.weight is plain.model.embed_tokens.weight) == tied


def test_full_makes_every_weight_trainable_in_float32(tiny_model: Any) -> None:
    model = add_adapters(tiny_model("llama", tie_word_embeddings=True).to(torch.bfloat16), train=("full",))
    assert not isinstance(model, PeftModel)
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_summary_counts_by_hand(tiny_model: Any) -> None:
    # hidden 64, 4 heads of 16, 2 KV heads, feed-forward 80, 2 layers, vocabulary 97, tied
    projections, feed_forward, norms, embed = 2 * (2 * 64 * 64 + 2 * 64 * 32), 2 * 3 * 64 * 80, 5 * 64, 97 * 64
    lora = 2 * 3 * ((64 + 64) * 2 + (64 + 32) * 2)
    model = add_adapters(tiny_model("llama", tie_word_embeddings=True), rank=3)
    assert trainable_summary(model) == {
        "parameters": projections + feed_forward + norms + embed + lora,
        "trainable": lora + norms + embed,
        "share": (lora + norms + embed) / (projections + feed_forward + norms + embed + lora),
        "groups": {"lora": lora, "norm": norms, "embed": embed},
    }
    full = trainable_summary(add_adapters(tiny_model("llama", tie_word_embeddings=True), train="full"))
    assert full["share"] == 1.0
    assert full["groups"] == {"full": projections + feed_forward, "norm": norms, "embed": embed}


def test_groups_have_their_rates_and_every_parameter_once(tiny_model: Any) -> None:
    settings = TrainingSettings(lr=1e-3, norm_lr=1e-4, embed_lr=1e-5, weight_decay=0.1)
    model = add_adapters(tiny_model("qwen2", tie_word_embeddings=True))
    groups = parameter_groups(model, settings)
    assert [(g["name"], g["lr"], g["weight_decay"]) for g in groups] == [
        ("lora", 1e-3, 0.1),
        ("norm", 1e-4, 0.0),
        ("embed", 1e-5, 0.1),
    ]
    given = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(given) == sorted({id(p) for p in model.parameters() if p.requires_grad})
    torch.optim.AdamW(groups)

    plain = parameter_groups(add_adapters(tiny_model("qwen2"), train=("full",)), settings)
    assert [(g["name"], g["lr"], g["weight_decay"]) for g in plain] == [
        ("full", 1e-3, 0.1),
        ("norm", 1e-4, 0.0),
        ("embed", 1e-5, 0.1),
        ("bias", 1e-3, 0.0),
    ]
    without = parameter_groups(add_adapters(tiny_model("llama")), TrainingSettings(lr=1e-3))
    assert {g["lr"] for g in without} == {1e-3}


def test_settings_mean_what_they_say(tiny_model: Any) -> None:
    def trained(*parts: str) -> set[str]:
        settings = TrainableSettings(train=parts, rank=5, alpha=10.0, lora_dropout=0.25)
        return set(trainable_summary(add_adapters_from(settings, tiny_model("qwen2")))["groups"])

    assert trained("lora") == {"lora"}
    assert trained("lora", "norm") == {"lora", "norm"}
    assert trained("embed", "norm") == {"embed", "norm"}
    assert trained("full") == {"full", "norm", "embed", "bias"}
    model = add_adapters_from(TrainableSettings(rank=5, alpha=10.0, lora_dropout=0.25), tiny_model("llama"))
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (5, 10, 0.25)


class NoAttention(torch.nn.Module):
    """Stands for a decoder whose attention has no linear layers that can be found."""

    def get_output_embeddings(self) -> None:
        return None


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"rank": 0}, r"rank is 0: it must be at least 1"),
        ({"train": ("nrom",)}, r"Did you mean 'norm'\?"),
        ({"train": ("full", "norm")}, r"give it alone"),
        ({"rank": None, "train": ()}, r"nothing would train"),
        ({"rank": None, "train": ("lora",)}, r"rank is None"),
    ],
)
def test_mistakes_get_a_sentence(tiny_model: Any, arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        add_adapters(tiny_model("llama"), **arguments)


def test_models_that_cannot_be_served_are_refused(tiny_model: Any) -> None:
    with pytest.raises(UserError, match=r"NoAttention has no linear layer inside an attention module"):
        add_adapters(NoAttention())
    with pytest.raises(UserError, match=r"already has adapters"):
        add_adapters(add_adapters(tiny_model("llama")))
    quantised = tiny_model("llama")
    quantised.is_quantized = True
    with pytest.raises(UserError, match=r"quantised model cannot be trained in full"):
        add_adapters(quantised, train="full")
    quantised.model.norm.weight = torch.nn.Parameter(torch.ones(64, dtype=torch.int8), requires_grad=False)
    with pytest.raises(UserError, match=r"LlamaRMSNorm is among the weights to train"):
        add_adapters(quantised)
    tied_bias = tiny_model("llama", tie_word_embeddings=True)
    tied_bias.lm_head.bias = torch.nn.Parameter(torch.zeros(97))
    with pytest.raises(UserError, match=r"LM head that has a bias"):
        add_adapters(tied_bias)
    with pytest.raises(UserError, match=r"--norm-lr is 0.1 but 'norm' does not train"):
        parameter_groups(add_adapters(tiny_model("llama"), train="embed"), TrainingSettings(norm_lr=0.1))
