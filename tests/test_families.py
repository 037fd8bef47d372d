"""Every family, every command: works, or says in a sentence why not; and what a vision tower is to a text batch."""

import copy
import threading
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny_runs import save_base
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from longlora.attention.transformers_backend import use_shifted_attention
from longlora.chat.answering import Answerer
from longlora.chat.prefix_cache import PrefixCaches
from longlora.chat.sampling import Sampler
from longlora.errors import UserError
from longlora.model.adapters import add_adapters
from longlora.model.loading import load
from longlora.settings import AnswerSettings

DOCUMENT = Path(__file__).parent.parent / "docs" / "models.md"
TEXT: dict[str, Any] = {name: families.SMALL[name] for name in ("vocab_size", "hidden_size", "intermediate_size")} | {
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "head_dim": 16,
}


def check(name: str, folder: Path, only: tuple[str, ...]) -> None:
    model = families.build(name)
    if model is None:
        pytest.skip(f"{name} takes sizes of its own")
    answers = families.commands_of(model, folder, only)
    assert not any("TRACEBACK" in answer for answer in answers.values()), answers
    if "extend" in answers:
        assert (answers["plan"] == "yes") <= (answers["extend"] == "yes"), answers


@pytest.mark.parametrize("name", families.families()[7::60])
def test_a_sample_of_families_works_or_says_why(name, tmp_path):
    """The sample moves with transformers' table, so that a new version brings new families here."""
    check(name, tmp_path, ("plan", "chat"))


@pytest.mark.parametrize(
    ("name", "commands"),
    [
        ("gemma3n_text", ("eval",)),  # widths in lists, a layer each
        ("gemma4_text", ("eval",)),  # a config that refuses to be asked for all layers at once
        ("llama4_text", ("eval",)),  # its get_decoder is the whole model
        ("modernbert-decoder", ("eval",)),  # and its is the head
        ("jetmoe", ("plan", "sft")),  # no gradient checkpointing
        ("doge", ("plan", "extend")),  # it changes the mask itself
        ("git", ("sft",)),  # attention of its own
    ],
)
def test_families_that_are_unlike_others(name, commands, tmp_path):
    check(name, tmp_path, commands)


@pytest.mark.slow
@pytest.mark.skipif("not config.getoption('-m')", reason="the whole sweep: an hour; pytest -m slow")
@pytest.mark.parametrize("name", families.families())
def test_every_family_works_or_says_why(name, tmp_path):
    check(name, tmp_path, tuple(families.COMMANDS))


@pytest.mark.parametrize(
    ("name", "way"),
    [("llama", "in pieces"), ("qwen3_next", "in pieces"), ("recurrent_gemma", "whole, anew"), ("mamba", "anew"),
     ("minimax", "anew"), ("rwkv", "anew")],
)  # fmt: skip
def test_an_answer_is_the_one_without_a_cache_whatever_the_family_does_with_it(name, way, monkeypatch):
    """Recurrent states that are dropped between pieces, caches of a family's own, and none at all."""
    model = families.build(name)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)  # so that what was read long ago counts
    answerer = Answerer(model, PrefixCaches(model, 1000))
    assert answerer._reads in way
    monkeypatch.setattr(answerer, "_piece", 16)
    said = torch.randint(5, 250, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    for _ in range(2):  # the second goes on from what was kept
        happened = answerer.answer(
            said,
            max_new_tokens=4,
            stop_tokens=(),
            sampler=Sampler(AnswerSettings(temperature=0.0)),
            stop=threading.Event(),
        )
        answered = [each for each in happened if isinstance(each, int)]
        for token in answered:
            with torch.no_grad():
                assert int(model(torch.tensor([said])).logits[0, -1].argmax()) == token
            said.append(token)
        said += [7, 8, 9]


def test_layers_of_a_window_alone_are_refused_however_the_config_says_so():
    """As `plan` refuses them: Mistral's one window, and Gemma's list of layers in which none sees all."""
    config = AutoConfig.for_model(
        "gemma3_text", **TEXT | {"sliding_window": 32, "layer_types": ["sliding_attention"] * 2}
    )
    model = use_shifted_attention(AutoModelForCausalLM.from_config(config), 16).train()
    with pytest.raises(UserError, match="no full attention for S2-Attn to replace"):
        model(input_ids=torch.arange(64)[None])


def test_the_document_knows_every_family():
    """A family that transformers has gained is missing there: `python tests/families.py` writes it anew."""
    written = DOCUMENT.read_text(encoding="utf-8").replace("|", " ").replace(",", " ").replace(".", " ").split()
    assert set(families.families()) <= set(written)
    assert "TRACEBACK" not in DOCUMENT.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def gemma3() -> Any:
    """Gemma 3 from 4B on: a language model beside a vision tower."""
    vision = {"model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 48}
    vision |= {"num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    tokens = {"image_token_index": 310, "boi_token_index": 311, "eoi_token_index": 312, "mm_tokens_per_image": 4}
    config = AutoConfig.for_model("gemma3", text_config=TEXT | {"sliding_window": 32}, vision_config=vision, **tokens)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


@pytest.mark.parametrize("train", [("norm", "embed"), ("full",)])
def test_all_that_trains_gets_a_gradient_from_text(gemma3, train):
    model = add_adapters(copy.deepcopy(gemma3), train=train).train()
    ids = torch.randint(5, 300, (1, 50), generator=torch.Generator().manual_seed(0))
    model(input_ids=ids, labels=ids).loss.backward()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any("layers.1" in name for name in trained)
    assert not [name for name, parameter in trained.items() if parameter.grad is None]
    assert not [name for name in trained if "vision" in name]


def test_the_text_model_inside_a_multimodal_checkpoint_loads(tmp_path, tiny_tokenizer):
    """As every published Qwen3.5 is: stock AutoModelForCausalLM takes the text model out of it."""
    delta = {name: families.SMALL[name] for name in families.SMALL if name.startswith("linear_")}
    delta |= {"num_hidden_layers": 4}  # the fourth has attention
    vision = {"hidden_size": 32, "depth": 2, "num_heads": 2, "intermediate_size": 48, "out_hidden_size": 64}
    config = AutoConfig.for_model("qwen3_5", text_config=TEXT | delta, vision_config=vision)
    torch.manual_seed(0)
    whole = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    save_base(tmp_path, whole, tiny_tokenizer())
    model, _ = load(tmp_path, dtype="float32")
    ids = torch.randint(5, 250, (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, whole(ids).logits, rtol=0, atol=0)


@pytest.fixture
def original(tmp_path, tiny_model, tiny_tokenizer) -> tuple[Path, Any]:
    """An adapter as LongLoRA's authors released theirs: LoRA and, apart, norms and embeddings, all of them pickles."""
    base = save_base(tmp_path / "base", tiny_model("llama", vocab_size=257), tiny_tokenizer())
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    )
    folder = tmp_path / "adapter"
    model.save_pretrained(str(folder))
    weights = folder / "adapter_model.safetensors"
    torch.save(load_file(weights), folder / "adapter_model.bin")
    weights.unlink()
    inner = model.get_base_model()
    trained = {
        n: p.data + 0.1 for n, p in inner.named_parameters() if n.endswith(("norm.weight", "embed_tokens.weight"))
    }
    for name, parameter in inner.named_parameters():
        if name in trained:
            parameter.data.copy_(trained[name])
    pad = torch.zeros(1, trained["model.embed_tokens.weight"].shape[1])  # which their training added
    trained["model.embed_tokens.weight"] = torch.cat([trained["model.embed_tokens.weight"], pad])
    torch.save(trained, folder / "trainable_params.bin")
    return folder, model.eval()


def test_the_original_adapters_norms_and_embeddings_are_read(original):
    folder, expected = original
    model, _ = load(folder)
    ids = torch.randint(0, 257, (1, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, expected(ids).logits, rtol=0, atol=1e-5)
    with pytest.raises(UserError, match="merge it first"):
        load(folder, trainable=True)


def test_what_lies_beside_an_adapter_is_read_or_named(original):
    folder, _ = original
    torch.save({"optimizer": torch.zeros(1)}, folder / "optimizer.pt")
    load(folder)
    torch.save({"model.nowhere.weight": torch.zeros(3)}, folder / "trainable_params.bin")
    with pytest.raises(UserError, match=r"model\.nowhere\.weight is \(3,\) there and nowhere in the base"):
        load(folder)

    class Runs:
        def __reduce__(self):
            return print, ("this would have run",)

    torch.save({"model.norm.weight": Runs()}, folder / "trainable_params.bin")
    with pytest.raises(UserError, match=r"trainable_params.bin' cannot be read"):
        load(folder)
    torch.save({}, folder / "non_lora_trainables.bin")
    with pytest.raises(UserError, match=r"non_lora_trainables\.bin beside it"):
        load(folder)
