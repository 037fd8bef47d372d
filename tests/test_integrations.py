"""longlora in other people's trainers: the scripts of docs/integrations.md, and that loss and gradients are ours."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

import longlora
from longlora.attention import transformers_backend

trl = pytest.importorskip("trl", reason="TRL is not installed: pip install -e '.[dev]'")

PAGE = Path(__file__).resolve().parents[1] / "docs" / "integrations.md"
PARTS = re.split(r"^## (.*)\n", PAGE.read_text(), flags=re.MULTILINE)
SCRIPTS = {
    heading: found[1]
    for heading, text in zip(PARTS[1::2], PARTS[2::2], strict=True)
    if (found := re.search(r"```python\n(.*?)```", text, re.DOTALL))
}


@pytest.fixture
def s2_calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """One entry for each layer that S2-Attn computes."""
    calls: list[bool] = []
    inner = transformers_backend.layer_attention

    def counted(*arguments: Any, **keywords: Any) -> Any:
        calls.append(True)
        return inner(*arguments, **keywords)

    monkeypatch.setattr(transformers_backend, "layer_attention", counted)
    return calls


def test_the_page_has_a_script_for_each() -> None:
    assert len(SCRIPTS) == 4


def test_the_page_knows_every_public_name_and_no_other() -> None:
    named = re.findall(r"^\| `longlora\.(\w+)", PAGE.read_text(), re.MULTILINE)
    assert sorted({*named, "Draw"}) == sorted(longlora.__all__)
    used = set(re.findall(r"\blonglora\.([a-zA-Z_]+)\b", PAGE.read_text())) - {"__all__"}
    assert used <= set(longlora.__all__)
    assert all(hasattr(longlora, name) for name in longlora.__all__)


@pytest.mark.slow
@pytest.mark.parametrize("heading", SCRIPTS)
def test_a_script_of_the_page_trains_with_s2_and_comes_back(
    heading: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, s2_calls: list[bool]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(SCRIPTS[heading], f"docs/integrations.md: {heading}", "exec"), names)
    layers = names["model"].config.num_hidden_layers
    assert len(s2_calls) >= 2 * layers
    folder = tmp_path / ("adapter" if (tmp_path / "adapter").is_dir() else "out/checkpoint-2")
    trained = {name: p for name, p in names["model"].named_parameters() if p.requires_grad}
    assert {parameter.dtype for parameter in trained.values()} == {torch.float32}
    again, _ = longlora.load(folder, dtype="float32")
    assert again.config.max_position_embeddings == 2048
    assert again.config.rope_parameters["rope_type"] == "yarn"
    ids = torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, names["model"].eval()(ids).logits, rtol=0, atol=1e-4)


def prepared(tiny_model: Any, tied: bool) -> Any:
    model = tiny_model("llama", vocab_size=257, tie_word_embeddings=tied)
    longlora.extend_positions(model, 256)
    longlora.use_shifted_attention(model, group_size=32)
    return longlora.add_adapters(model).train()


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def batch() -> dict[str, torch.Tensor]:
    """Two rows of 90 tokens, a prompt without loss in the second."""
    ids = torch.randint(0, 257, (2, 90), generator=torch.Generator().manual_seed(3))
    labels = ids.clone()
    labels[1, :40] = -100
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}


def trainer_of(kind: str, model: Any, tokenizer: Any, folder: Path) -> Any:
    plain = {"max_steps": 1, "use_cpu": True, "report_to": [], "gradient_checkpointing": True}
    if kind == "SFTTrainer":
        from datasets import Dataset

        rows = Dataset.from_list([{"input_ids": [1, 2, 3]}])
        arguments = trl.SFTConfig(str(folder), bf16=False, **plain)
        return trl.SFTTrainer(model, arguments, train_dataset=rows, processing_class=tokenizer)
    loss = longlora.ChunkedLoss(model, chunk=7)
    return Trainer(model, TrainingArguments(str(folder), **plain), compute_loss_func=loss)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["Trainer", "SFTTrainer"])
@pytest.mark.parametrize("items", [None, 211])
def test_loss_and_gradients_are_those_of_causal_lm_loss(
    tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path, kind: str, tied: bool, items: int | None
) -> None:
    model = prepared(tiny_model, tied)
    expected = longlora.causal_lm_loss(model, batch(), num_items=items)
    if items is None:  # an oracle that is nobody's here
        torch.testing.assert_close(expected, model(**batch()).loss)
    wanted = gradients(model, expected)
    trainer = trainer_of(kind, model, tiny_tokenizer(), tmp_path)
    number = None if items is None else torch.tensor(items)
    loss = trainer.compute_loss(model, batch(), num_items_in_batch=number)
    torch.testing.assert_close(loss, expected)
    found = gradients(model, loss)
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("tied", [False, True])
def test_dpo_s_loss_and_gradients_are_its_formula_s(
    tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path, tied: bool, s2_calls: list[bool]
) -> None:
    """Oracle: equation 7 of Rafailov et al. (arXiv 2305.18290) over S²-Attn's own log-probabilities."""
    from datasets import Dataset

    def log_probability(model: Any, ids: torch.Tensor, completion: torch.Tensor) -> torch.Tensor:
        longlora.draw_from(model, longlora.Draw(0, 0))
        each = torch.log_softmax(model(input_ids=ids).logits[:, :-1], dim=-1)
        return (each.gather(-1, ids[:, 1:, None])[..., 0] * completion[:, 1:]).sum(1)

    rows = Dataset.from_list([{"prompt": "What is it? " * 9, "chosen": "that and that", "rejected": "this or this "}])
    arguments = trl.DPOConfig(
        str(tmp_path), max_steps=1, use_cpu=True, bf16=False, report_to=[], beta=0.5, gradient_checkpointing=False
    )
    model = prepared(tiny_model, tied)
    trainer = trl.DPOTrainer(model, args=arguments, train_dataset=rows, processing_class=tiny_tokenizer())
    model = trainer.model
    inputs = next(iter(trainer.get_train_dataloader()))
    ids, completion = inputs["input_ids"], inputs["completion_mask"]
    assert ids.shape[0] == 2
    assert bool(inputs["attention_mask"].all())
    with torch.no_grad():
        reference = log_probability(model, ids, completion)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                draw = torch.Generator().manual_seed(len(name))
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=draw))
    s2_calls.clear()
    policy = log_probability(model, ids, completion)
    gained = policy - reference  # of the chosen answer, and of the rejected one
    expected = -torch.nn.functional.logsigmoid(0.5 * (gained[0] - gained[1]))
    assert expected.item() != pytest.approx(0.6931, abs=1e-3)
    wanted = gradients(model, expected)
    assert len(s2_calls) == 2
    loss = trainer.compute_loss(model, inputs)
    assert len(s2_calls) == 6  # the policy's pass and the reference's
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    found = gradients(model, loss)
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-3, atol=1e-5)


def test_the_chunked_loss_of_a_trainer_never_holds_all_logits(tiny_model: Any) -> None:
    model = prepared(tiny_model, True)
    loss = longlora.ChunkedLoss(model, chunk=7)
    largest = 0

    def watch(_head: Any, _inputs: Any, logits: torch.Tensor) -> None:
        nonlocal largest
        largest = max(largest, logits.numel() // logits.shape[-1])

    model.get_output_embeddings().register_forward_hook(watch)
    inputs = batch()
    labels = inputs.pop("labels")
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(**inputs)
    loss(outputs, labels).backward()
    assert largest == 7
    model.eval()
    expected = model(**inputs, labels=labels).loss
    with torch.no_grad():
        outputs = model(**inputs)
    assert outputs.logits.shape == (2, 90, 257)
    torch.testing.assert_close(loss(outputs, labels), expected)


def test_a_router_s_loss_is_refused_where_it_would_be_lost() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = AutoConfig.for_model("mixtral", vocab_size=97, num_local_experts=2, output_router_logits=True, **sizes)
    with pytest.raises(longlora.UserError, match=r"router.*override the Trainer's compute_loss"):
        longlora.ChunkedLoss(AutoModelForCausalLM.from_config(config))


@pytest.mark.parametrize("kind", ["SFTTrainer", "DPOTrainer"])
def test_trl_leaves_the_float32_masters_of_a_4_bit_base(
    tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path, kind: str
) -> None:
    from datasets import Dataset

    base = tiny_model("llama", vocab_size=257).to(torch.bfloat16)
    base.is_loaded_in_4bit = True  # what TRL, and PEFT with bitsandbytes, tell it by
    longlora.extend_positions(base, 256)
    longlora.use_shifted_attention(base, group_size=32)
    model = longlora.add_adapters(base)
    if kind == "SFTTrainer":
        rows = Dataset.from_list([{"input_ids": list(range(1, 60))}])
        arguments = trl.SFTConfig(str(tmp_path), max_steps=1, use_cpu=True, report_to=[])
        trainer = trl.SFTTrainer(model, arguments, train_dataset=rows, processing_class=tiny_tokenizer())
    else:
        rows = Dataset.from_list([{"prompt": "What?" * 9, "chosen": "that", "rejected": "this"}])
        arguments = trl.DPOConfig(str(tmp_path), max_steps=1, use_cpu=True, report_to=[])
        trainer = trl.DPOTrainer(model, args=arguments, train_dataset=rows, processing_class=tiny_tokenizer())
    trainer.train()
    assert base.is_loaded_in_4bit
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert {parameter.dtype for parameter in trained.values()} == {torch.float32}
