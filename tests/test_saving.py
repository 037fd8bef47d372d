"""What is saved is what was trained: whoever saves an adapter, its positions come back with it."""

import json
import re
from pathlib import Path
from typing import Any

import huggingface_hub
import peft.utils.save_and_load as peft_saving
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny_runs import disturb, logits, save_base
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments

import longlora
from longlora import UserError, cli

README = Path(__file__).resolve().parents[1] / "README.md"


@pytest.fixture
def base(tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path) -> Path:
    """A tied Llama with a window of 64 tokens."""
    return save_base(tmp_path / "base", tiny_model("llama", vocab_size=257, tie_word_embeddings=True), tiny_tokenizer())


def stretched(base: Path, context: int = 256) -> Any:
    model = AutoModelForCausalLM.from_pretrained(base)
    longlora.extend_positions(model, context, "yarn")
    return model


def with_adapters(model: Any, maker: str) -> PeftModel:
    """By our `add_adapters`, or as PEFT and TRL do it, on a model whose positions we stretched."""
    if maker == "longlora":
        model = longlora.add_adapters(model)
    else:
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"]))
    disturb(model)
    return model


def assert_comes_back(folder: Path, trained: Any) -> None:
    again, _ = longlora.load(folder)
    assert again.config.max_position_embeddings == 256
    assert again.config.rope_parameters == trained.config.rope_parameters
    assert again.config.rope_parameters["rope_type"] == "yarn"
    torch.testing.assert_close(logits(again), logits(trained.eval()), rtol=0, atol=1e-5)


@pytest.mark.parametrize("maker", ["longlora", "peft"])
def test_pefts_own_save_keeps_the_positions(base: Path, tmp_path: Path, maker: str) -> None:
    model = with_adapters(stretched(base), maker)
    model.save_pretrained(str(tmp_path / "adapter"))
    assert_comes_back(tmp_path / "adapter", model)


def test_the_readmes_script_comes_back_with_its_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (script,) = [b for b in re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL) if "add_adapters" in b]
    monkeypatch.chdir(tmp_path)
    exec(compile(script, "README.md", "exec"), {})
    model, tokenizer = longlora.load("adapter")
    assert model.config.max_position_embeddings == tokenizer.model_max_length == 4096
    assert model.config.rope_parameters["rope_type"] == "yarn"
    longlora.merge("adapter", "merged")
    assert AutoConfig.from_pretrained("merged").rope_parameters == model.config.rope_parameters


def test_a_trainers_checkpoint_keeps_the_positions_and_asks_no_hub(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(*_: Any, **__: Any) -> None:
        pytest.fail("the hub was asked")

    monkeypatch.setattr(peft_saving, "check_file_exists_on_hf_hub", ask)
    model = with_adapters(stretched(base), "longlora")
    model.peft_config["default"].base_model_name_or_path = "owner/on-the-hub"
    ids = torch.arange(32)
    arguments = TrainingArguments(
        str(tmp_path / "out"), max_steps=2, save_steps=2, use_cpu=True, report_to=[], disable_tqdm=True
    )
    Trainer(model, arguments, train_dataset=[{"input_ids": ids, "labels": ids}] * 4).train()
    saved = tmp_path / "out" / "checkpoint-2"
    settings = json.loads((saved / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "owner/on-the-hub"
    (saved / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": str(base)}))
    assert_comes_back(saved, model)
    assert longlora.load(saved)[0].config.use_cache, "the Trainer switches it off for itself"


def test_push_to_hub_keeps_the_positions(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub that is a local folder."""

    def commit(_hub: Any, operations: Any, **_: Any) -> Any:
        for operation in operations:
            target = tmp_path / "hub" / operation.path_in_repo
            target.parent.mkdir(parents=True, exist_ok=True)
            with operation.as_file() as file:
                target.write_bytes(file.read())
        return huggingface_hub.CommitInfo("https://huggingface.co/owner/adapter/commit/1", "", "", "1")

    address = huggingface_hub.RepoUrl("https://huggingface.co/owner/adapter")
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda *_, **__: address)
    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", commit)
    model = with_adapters(stretched(base), "longlora")
    model.push_to_hub("owner/adapter")
    assert_comes_back(tmp_path / "hub", model)


def test_save_adapter_is_peft_s_with_the_tokenizer(base: Path, tiny_tokenizer: Any, tmp_path: Path) -> None:
    model = with_adapters(stretched(base), "longlora")
    longlora.save_adapter(torch.compile(model), tmp_path / "adapter", tiny_tokenizer())
    assert_comes_back(tmp_path / "adapter", model)
    assert (tmp_path / "adapter" / "tokenizer.json").is_file()
    with pytest.raises(UserError, match=r"LlamaForCausalLM has no adapter to save: add one with longlora.add_adapters"):
        longlora.save_adapter(stretched(base), tmp_path / "plain")


def test_each_adapter_of_several_has_the_config_and_only_the_main_process_writes(base: Path, tmp_path: Path) -> None:
    model = with_adapters(stretched(base), "longlora")
    model.add_adapter("second", LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    model.save_pretrained(str(tmp_path / "others"), is_main_process=False)
    assert not (tmp_path / "others" / "config.json").exists()
    model.save_pretrained(str(tmp_path / "both"))
    for folder in (tmp_path / "both", tmp_path / "both" / "second"):
        assert AutoConfig.from_pretrained(folder).max_position_embeddings == 256
    model.save_pretrained(str(tmp_path / "one"), selected_adapters=["second"])
    assert not (tmp_path / "one" / "config.json").exists()
    assert (tmp_path / "one" / "second" / "config.json").is_file()


def test_embeddings_of_a_changed_vocabulary_are_still_saved(base: Path, tmp_path: Path) -> None:
    for added, saved in ((0, False), (8, True)):
        model = stretched(base)
        model.resize_token_embeddings(257 + added)
        model = with_adapters(model, "peft")
        model.save_pretrained(str(tmp_path / str(added)))
        names = load_file(tmp_path / str(added) / "adapter_model.safetensors")
        assert any("embed_tokens" in name for name in names) == saved


def test_an_adapter_without_positions_is_refused_with_exit_2(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with_adapters(stretched(base), "longlora").save_pretrained(str(tmp_path / "adapter"))
    (tmp_path / "adapter" / "config.json").unlink()
    with pytest.raises(SystemExit) as ended:
        cli.main(["merge", str(tmp_path / "adapter"), "--output", str(tmp_path / "merged")])
    assert ended.value.code == 2
    assert "no config.json beside it, so nobody knows the window" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()
