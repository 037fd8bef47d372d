"""Merging: stock transformers gets the same model from the folder, and a failure leaves nothing behind."""

import errno
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny_runs import FACTOR, logits, make_run, save_base, seen_by_stock_libraries
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

import longlora
from longlora.errors import UserError
from longlora.model.merging import merge

TEMPLATE = "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}"
FULL = {"train": ("full",)}
CASES: dict[str, tuple[str, bool, dict[str, Any]]] = {
    "llama": ("llama", False, {}),
    "llama-tied": ("llama", True, {}),
    "gemma-tied": ("gemma", True, {}),
    "gpt_neox": ("gpt_neox", False, {}),
    "phi3-tied": ("phi3", True, {}),
    "llama-lora-alone": ("llama", True, {"train": ()}),
    "llama-full": ("llama", False, FULL),
    "llama-full-tied": ("llama", True, FULL),
}
"""Name -> architecture, tied, arguments of add_adapters."""


@pytest.fixture
def tokenizer(tiny_tokenizer: Any) -> Any:
    made = tiny_tokenizer()
    made.chat_template = TEMPLATE
    made.model_max_length = 64
    return made


@pytest.fixture(scope="module")
def stock(
    tiny_model: Any, tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]]:
    """By case: what merge returned, what a process without longlora sees in the folder, the settings of the run."""
    results, folders, ropes = {}, [], {}
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    for name, (architecture, tied, adapters) in CASES.items():
        folder = tmp_path_factory.mktemp("case") / name
        model = tiny_model(architecture, vocab_size=257, tie_word_embeddings=tied)
        base = save_base(folder / "base", model, tokenizer)
        trained = make_run(folder / "run", base, tokenizer, **adapters)
        torch.save(logits(trained), folder / "expected.pt")
        results[name] = merge(str(folder / "run"), folder / "merged")
        ropes[name] = trained.config.rope_parameters
        folders.append(folder)
    seen = seen_by_stock_libraries(folders)
    return {name: (results[name], seen[name], ropes[name]) for name in CASES}


def test_a_merged_model_stops_where_its_template_ends_a_turn(tmp_path: Path, tiny_model: Any, tokenizer: Any) -> None:
    """A base model's generation_config names the end of a text alone; stock generate reads no other."""
    tokenizer.add_tokens(["<|im_end|>"], special_tokens=True)
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    )
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    base = save_base(tmp_path / "base", tiny_model("llama", vocab_size=258), tokenizer)
    assert GenerationConfig.from_pretrained(base).eos_token_id == 0
    make_run(tmp_path / "run", base, tokenizer)
    merge(str(tmp_path / "run"), tmp_path / "merged")
    assert GenerationConfig.from_pretrained(tmp_path / "merged").eos_token_id == [0, end]

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    # an answer of <|im_end|> and nothing else
    model.lm_head.register_forward_hook(lambda head, given, logits: logits.index_fill(-1, torch.tensor([end]), 9.0))
    answer = model.generate(torch.tensor([[5, 6]]), max_new_tokens=5, do_sample=False)
    assert answer[0, 2:].tolist() == [end]


@pytest.mark.parametrize("name", CASES)
def test_stock_transformers_gets_the_same_model(stock: Any, name: str) -> None:
    _, tied, adapters = CASES[name]
    result, seen, rope = stock[name]
    assert seen["merged"] <= 1e-5
    if adapters != FULL:
        assert seen["adapter"] <= 1e-5
    assert seen["merged_tied"] == result["tied"] == tied
    assert seen["rope"] == result["rope_parameters"] == rope
    assert seen["context"] == result["context"] == 64 * FACTOR
    assert seen["tokenizer"] == [64 * FACTOR, TEMPLATE]
    assert result["dtype"] == "float32"


@pytest.mark.parametrize(
    ("lora", "saved", "stays_tied"),
    [(["embed_tokens"], None, False), (["lm_head"], None, False), (["q_proj"], ["lm_head"], False),
     (["q_proj"], ["embed_tokens"], False), (["q_proj"], None, True)],
)  # fmt: skip
def test_an_adapter_that_unties_a_tied_model(
    lora: list[str], saved: list[str] | None, stays_tied: bool, tiny_model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    """Other people's adapters change one of the two; folded into the shared weight, it would change the other too."""
    base = save_base(tmp_path / "base", tiny_model("llama", vocab_size=257, tie_word_embeddings=True), tokenizer)
    torch.manual_seed(0)
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(target_modules=lora, modules_to_save=saved, init_lora_weights=False),
    )
    for name, parameter in adapted.named_parameters():
        if ".modules_to_save." in name:
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    adapted.save_pretrained(str(tmp_path / "adapter"))
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "adapter")).eval()
    for keep_lora in (False, True) if lora == ["q_proj"] else (False,):
        folder = tmp_path / f"merged-{keep_lora}"
        assert merge(str(tmp_path / "adapter"), folder, keep_lora=keep_lora)["tied"] == stays_tied
        merged = longlora.load(folder / "adapter" if keep_lora else folder)[0]
        torch.testing.assert_close(logits(merged), logits(stock), rtol=0, atol=1e-4)
        stored = json.loads((folder / "config.json").read_text())
        assert stored["tie_word_embeddings"] == stays_tied  # which others than transformers go by


@pytest.mark.parametrize("more", [{"lora_bias": True}, {"alora_invocation_tokens": [5]}])
def test_an_adapter_that_cannot_be_folded_in(
    more: dict[str, Any], tiny_model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    base = save_base(tmp_path / "base", tiny_model("llama", vocab_size=257), tokenizer)
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], **more)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(str(tmp_path / "adapter"))
    with pytest.raises(UserError, match="cannot be merged"):
        merge(str(tmp_path / "adapter"), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_what_merge_returns_is_so(tiny_model: Any, tokenizer: Any, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", tiny_model("llama", vocab_size=257, tie_word_embeddings=True), tokenizer)
    make_run(tmp_path / "run", base, tokenizer)
    (tmp_path / "merged").mkdir()  # an empty folder may be there
    result = merge(str(tmp_path / "run"), tmp_path / "merged")
    files = [path for path in (tmp_path / "merged").rglob("*") if path.is_file()]
    weights = load_file(tmp_path / "merged" / "model.safetensors")
    assert result["model"] == str(tmp_path / "run")
    assert result["base"] == str(base)
    assert result["output"] == str(tmp_path / "merged")
    assert result["bytes"] == sum(path.stat().st_size for path in files)
    assert result["parameters"] == sum(weight.numel() for weight in weights.values())
    assert "lm_head.weight" not in weights
    assert {path.name for path in files} >= {"config.json", "generation_config.json", "tokenizer.json"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "merged", "run"]


@pytest.mark.parametrize("adapters", [{}, FULL])
def test_dtype_is_the_bases_unless_given(
    tiny_model: Any, tokenizer: Any, tmp_path: Path, adapters: dict[str, Any]
) -> None:
    base = save_base(tmp_path / "base", tiny_model("llama", vocab_size=257).to(torch.bfloat16), tokenizer)
    trained = make_run(tmp_path / "run", base, tokenizer, **adapters)
    for asked, dtype in (("auto", torch.bfloat16), ("float32", torch.float32)):
        result = merge(str(tmp_path / "run"), tmp_path / asked, dtype=asked)
        assert result["dtype"] == str(dtype).removeprefix("torch.")
        weights = load_file(tmp_path / asked / "model.safetensors")
        assert {weight.dtype for weight in weights.values()} == {dtype}
        assert AutoConfig.from_pretrained(tmp_path / asked).dtype == dtype
        norm = next(p for name, p in trained.named_parameters() if "model.norm" in name and p.requires_grad)
        assert torch.equal(weights["model.norm.weight"], norm.to(dtype))


def test_generation_config_is_kept_and_agrees_with_the_window(tiny_model: Any, tokenizer: Any, tmp_path: Path) -> None:
    # Llama 2's: up to its window, and a temperature that transformers does not let through without sampling.
    base = save_base(tmp_path / "base", tiny_model("llama", vocab_size=257), tokenizer)
    generation = {"max_length": 64, "temperature": 0.9, "top_p": 0.6, "eos_token_id": [0, 7], "bos_token_id": 1}
    (base / "generation_config.json").write_text(json.dumps(generation))
    make_run(tmp_path / "run", base, tokenizer)
    merge(str(tmp_path / "run"), tmp_path / "merged")
    written = GenerationConfig.from_pretrained(tmp_path / "merged")
    assert {name: getattr(written, name) for name in generation} == generation | {"max_length": 64 * FACTOR}
    AutoModelForCausalLM.from_pretrained(tmp_path / "merged")

    (base / "generation_config.json").write_text(json.dumps({"max_length": 20, "do_sample": True}))
    merge(str(tmp_path / "run"), tmp_path / "again")
    assert json.loads((tmp_path / "again" / "generation_config.json").read_text())["max_length"] == 20


def test_nothing_to_merge(tiny_model: Any, tokenizer: Any, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", tiny_model("llama", vocab_size=257), tokenizer)
    for name in ("demo", str(base)):
        with pytest.raises(UserError, match=r"has no adapter, there is nothing to merge"):
            merge(name, tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_output_that_is_there_stays_as_it_is(tiny_model: Any, tokenizer: Any, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", tiny_model("llama", vocab_size=257), tokenizer)
    make_run(tmp_path / "run", base, tokenizer)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=r"output '.*file' is there already"):
        merge(str(tmp_path / "run"), tmp_path / "file")
    with pytest.raises(UserError, match=r"output '.*base' is there already and not empty"):
        merge(str(tmp_path / "run"), base)
    assert (tmp_path / "file").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "file", "run"]


def test_a_full_disk_or_a_stop_leaves_nothing(
    tiny_model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = save_base(tmp_path / "base", tiny_model("llama", vocab_size=257), tokenizer)
    make_run(tmp_path / "run", base, tokenizer)
    raised: BaseException = OSError(errno.ENOSPC, "No space left on device")

    def half_written(self: PreTrainedModel, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise raised

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", half_written)
    with pytest.raises(UserError, match=r"cannot be written \(.*No space left on device"):
        merge(str(tmp_path / "run"), tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "run"]
    raised = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        merge(str(tmp_path / "run"), tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "run"]


def test_a_model_that_cannot_be_loaded_leaves_nothing(tiny_model: Any, tokenizer: Any, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", tiny_model("llama", vocab_size=257), tokenizer)
    make_run(tmp_path / "run", base, tokenizer)
    shutil.rmtree(base)
    with pytest.raises(UserError, match=r"base' is not there"):
        merge(str(tmp_path / "run"), tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


# ------------------------------------------------------------------------------------------- the LoRA kept apart


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "phi3"])  # separate projections, and one for all three
def test_folder_and_kept_lora_are_the_run(
    tiny_model: Any, tokenizer: Any, tmp_path: Path, architecture: str, tied: bool
) -> None:
    model = tiny_model(architecture, vocab_size=257, tie_word_embeddings=tied)
    base = save_base(tmp_path / "base", model, tokenizer)
    trained = make_run(tmp_path / "run", base, tokenizer, rank=3)
    result = merge(str(tmp_path / "run"), tmp_path / "folder", keep_lora=True)
    assert result["adapter"] == str(tmp_path / "folder" / "adapter")
    assert result["tied"] == tied
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "folder")
    assert stock.config.rope_parameters == trained.config.rope_parameters
    without = logits(stock)
    both = PeftModel.from_pretrained(stock, str(tmp_path / "folder" / "adapter"))
    expected = logits(trained)
    assert (logits(both) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (without - expected).abs().max() > 1e-2, "a LoRA too small to test anything"
    ours, _ = longlora.load(tmp_path / "folder" / "adapter")
    assert torch.equal(logits(ours), logits(both))
    assert torch.equal(logits(longlora.load(tmp_path / "folder")[0]), without)


def test_the_kept_lora_is_what_servers_take(tiny_model: Any, tokenizer: Any, tmp_path: Path) -> None:
    """The rules of vLLM (vllm/lora/peft_helper.py, utils.py) and SGLang (srt/lora/lora_config.py), in their terms."""
    base = save_base(tmp_path / "base", tiny_model("llama", vocab_size=257, tie_word_embeddings=True), tokenizer)
    make_run(tmp_path / "run", base, tokenizer, rank=3)
    merge(str(tmp_path / "run"), tmp_path / "folder", keep_lora=True)
    adapter = tmp_path / "folder" / "adapter"
    settings = json.loads((adapter / "adapter_config.json").read_text())
    assert not settings["modules_to_save"]
    assert (settings["use_dora"], settings["bias"], settings["use_rslora"]) == (False, "none", False)
    assert not settings["rank_pattern"]
    assert not settings["alpha_pattern"]
    assert settings["base_model_name_or_path"] == str(tmp_path / "folder")
    served = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert set(settings["target_modules"]) <= served
    assert not (adapter / "added_tokens.json").exists()
    folder = AutoModelForCausalLM.from_pretrained(tmp_path / "folder")
    weights = load_file(adapter / "adapter_model.safetensors")
    assert len(weights) == 2 * 4 * 2  # A and B, four projections, two layers
    for name, weight in weights.items():
        found = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", name)
        assert found, name
        module = folder.get_submodule(found[1])
        assert isinstance(module, torch.nn.Linear)
        width = module.in_features if found[2] == "A" else module.out_features
        assert weight.shape == ((3, width) if found[2] == "A" else (width, 3))
    size = sum(path.stat().st_size for path in adapter.iterdir())
    assert size < 200_000, "small: no copy of the embeddings"


def test_a_kept_lora_that_began_inside_the_base(tiny_model: Any, tokenizer: Any, tmp_path: Path) -> None:
    """PiSSA (arXiv 2404.02948) takes the LoRA's start out of the base; loading must not take it out a second time."""
    base = save_base(tmp_path / "base", tiny_model("llama", vocab_size=257), tokenizer)
    config = LoraConfig(r=3, target_modules=["q_proj", "v_proj"], init_lora_weights="pissa")
    trained = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    with torch.no_grad():
        for name, weight in trained.named_parameters():
            if "lora_B" in name:
                weight.add_(0.1 * torch.randn_like(weight))
    longlora.save_adapter(trained, tmp_path / "adapter", tokenizer)
    merge(str(tmp_path / "adapter"), tmp_path / "folder", keep_lora=True)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "folder")
    both = PeftModel.from_pretrained(stock, str(tmp_path / "folder" / "adapter"))
    expected = logits(trained.eval())
    assert (logits(both) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_folder_with_a_kept_lora_may_move(tiny_model: Any, tokenizer: Any, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", tiny_model("llama", vocab_size=257), tokenizer)
    trained = make_run(tmp_path / "run", base, tokenizer)
    merge(str(tmp_path / "run"), tmp_path / "folder", keep_lora=True)
    shutil.move(tmp_path / "folder", tmp_path / "moved")
    moved, _ = longlora.load(tmp_path / "moved" / "adapter")
    torch.testing.assert_close(logits(moved), logits(trained), rtol=0, atol=1e-4)


def test_keep_lora_needs_lora(tiny_model: Any, tokenizer: Any, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", tiny_model("llama", vocab_size=257), tokenizer)
    make_run(tmp_path / "norms", base, tokenizer, rank=None)
    make_run(tmp_path / "full", base, tokenizer, **FULL)
    for run in ("norms", "full"):
        with pytest.raises(UserError, match=r"--keep-lora: '.*' trained no LoRA that could be kept"):
            merge(str(tmp_path / run), tmp_path / "folder", keep_lora=True)
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], trainable_token_indices=[5, 6])
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(str(tmp_path / "tokens"))
    with pytest.raises(UserError, match=r"more than LoRA of linear layers \(.*trainable_tokens_delta\)"):
        merge(str(tmp_path / "tokens"), tmp_path / "folder", keep_lora=True)
    assert not (tmp_path / "folder").exists()
