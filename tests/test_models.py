"""MODEL in all its forms: what it names, that it loads as stock libraries load it, and a sentence when it cannot."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_runs import FACTOR, disturb, extend, logits, make_run, save_base
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BertConfig, BertForMaskedLM

from longlora.errors import UserError
from longlora.evaluation.loading import load_evaluated
from longlora.model import precision
from longlora.model.adapters import add_adapters, merge_adapters
from longlora.model.loading import load, load_config, load_tokenizer
from longlora.model.saving import save_adapter
from longlora.model.source import locate, resolve
from longlora.settings import PasskeySettings


@pytest.fixture
def base(tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path) -> Path:
    """A tied Llama with a window of 64 tokens."""
    return save_base(tmp_path / "base", tiny_model("llama", vocab_size=257, tie_word_embeddings=True), tiny_tokenizer())


@pytest.fixture
def run(base: Path, tiny_tokenizer: Any, tmp_path: Path) -> Path:
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 64
    make_run(tmp_path / "run", base, tokenizer)
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("computes", "free", "dtype"),
    [(False, 2**40, torch.float32), (True, 2**40, torch.bfloat16), (False, 2**10, torch.bfloat16)],
)
def test_a_model_is_turned_to_what_the_cpu_computes_where_it_fits(
    tiny_model: Any, monkeypatch: Any, computes: bool, free: int, dtype: torch.dtype
) -> None:
    memory = SimpleNamespace(virtual_memory=lambda: SimpleNamespace(available=free))
    monkeypatch.setattr(precision, "psutil", memory)
    monkeypatch.setattr(precision, "cpu_computes", lambda asked: computes or asked == torch.float32)
    model = tiny_model("llama").bfloat16()
    precision.to_quick_dtype(model)
    assert {weight.dtype for weight in model.parameters()} == {dtype}
    assert model.dtype == dtype


@pytest.mark.parametrize(("dtype", "found"), [("auto", torch.float32), ("bfloat16", torch.bfloat16)])
def test_evaluations_compute_in_what_the_cpu_has(monkeypatch: Any, dtype: str, found: torch.dtype) -> None:
    monkeypatch.setattr(precision, "cpu_computes", lambda asked: asked == torch.float32)
    model, _, _ = load_evaluated("demo", PasskeySettings(models=("demo",), dtype=dtype))
    assert model.dtype == found


def edit_json(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_resolve_tells_what_a_name_is(base: Path, run: Path, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    assert resolve("demo").kind == "demo"
    assert resolve("owner/name", revision="v1").kind == "hub"
    assert resolve("gpt2").kind == "hub"
    assert (resolve(base).kind, resolve(base).base) == ("folder", None)
    assert resolve(tmp_path / "model.gguf").kind == "gguf"
    found = resolve(run)
    assert (found.kind, found.is_adapter, found.base) == ("run", True, str(base))
    assert found.location == str(run / "adapter")
    assert resolve(run / "adapter").kind == "adapter"
    assert resolve(run / "adapter").base == str(base)


def test_demo_loads(tiny_tokenizer: Any) -> None:
    model, tokenizer = load("demo")
    assert model.dtype == torch.bfloat16
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert tokenizer.model_max_length == load_config("demo").max_position_embeddings == 512
    text = "def f(x):\n    return x"
    assert tokenizer.decode(load_tokenizer("demo")(text)["input_ids"]) == text


def test_a_run_loads_as_stock_peft_loads_it(base: Path, run: Path) -> None:
    config = AutoConfig.from_pretrained(run / "adapter")
    stock = AutoModelForCausalLM.from_pretrained(base, config=config)
    untrained = logits(stock)
    stock = PeftModel.from_pretrained(stock, str(run / "adapter"))
    for name in (run, run / "adapter", str(run)):
        model, tokenizer = load(name)
        assert torch.equal(logits(model), logits(stock))
        assert model.config.max_position_embeddings == tokenizer.model_max_length == 64 * FACTOR
        assert not any(parameter.requires_grad for parameter in model.parameters())
    plain, _ = load(run, adapters=False)
    assert torch.equal(logits(plain), untrained)
    merged, _ = load(run, merge=True)
    assert not isinstance(merged, PeftModel)
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    torch.testing.assert_close(logits(merged), logits(stock), rtol=0, atol=2e-5)


def test_trainable_goes_on_in_float32(tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", tiny_model("llama", vocab_size=257).to(torch.bfloat16), tiny_tokenizer())
    trained = make_run(tmp_path / "run", base, tiny_tokenizer())
    wanted = {path: p for path, p in trained.named_parameters() if p.requires_grad}
    model, _ = load(tmp_path / "run", trainable=True)
    found = {path: p for path, p in model.named_parameters() if p.requires_grad}
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[path], wanted[path]) for path in wanted)  # not rounded to bfloat16 on the way
    model(torch.arange(9)[None], labels=torch.arange(9)[None]).loss.backward()
    assert all(parameter.grad is not None for parameter in found.values())
    frozen, _ = load(tmp_path / "run")
    assert frozen.get_input_embeddings().weight.dtype == torch.bfloat16


def test_dtype_is_the_base_models_unless_given(tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", tiny_model("llama", vocab_size=257).to(torch.bfloat16), tiny_tokenizer())
    make_run(tmp_path / "run", base, tiny_tokenizer())
    edit_json(tmp_path / "run" / "adapter" / "config.json", dtype="float32")  # as trained, say
    assert load(tmp_path / "run", adapters=False)[0].dtype == torch.bfloat16
    assert load(tmp_path / "run", adapters=False, dtype="float32")[0].dtype == torch.float32
    with pytest.raises(UserError, match=r"unknown dtype 'bf16'.*Did you mean 'bfloat16'"):
        load(base, dtype="bf16")
    with pytest.raises(UserError, match=r"device 'gpu' cannot be used"):
        load(base, device="gpu")


def test_a_run_on_a_run(run: Path, tiny_tokenizer: Any, tmp_path: Path) -> None:
    first, _ = load(run, merge=True)
    extend(first.config)
    second = add_adapters(first)
    disturb(second, seed=2)
    (tmp_path / "second").mkdir()
    (tmp_path / "second" / "settings.yaml").write_text(yaml.safe_dump({"model": str(run)}))
    save_adapter(second, tmp_path / "second" / "adapter", tiny_tokenizer())
    again, _ = load(tmp_path / "second")
    assert again.config.max_position_embeddings == 64 * FACTOR**2
    # The same weights, in a model made anew with the second positions
    plain = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path / "second" / "adapter")).eval()
    plain.load_state_dict(merge_adapters(second).state_dict())
    torch.testing.assert_close(logits(again), logits(plain), rtol=0, atol=5e-5)


def test_an_adapter_from_elsewhere_needs_its_config_but_no_tokenizer(base: Path, run: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(run / "adapter" / name, elsewhere)
    for reader in (load, load_config, load_tokenizer):
        with pytest.raises(UserError, match=r"no config.json beside it.*window.*save there the config of the model"):
            reader(elsewhere)
    AutoConfig.from_pretrained(base).save_pretrained(elsewhere)  # "its base's own", as that sentence advises
    model, tokenizer = load(elsewhere)
    assert model.config.max_position_embeddings == 64
    assert tokenizer("déjà")["input_ids"] == AutoTokenizer.from_pretrained(base)("déjà")["input_ids"]


def test_a_moved_run_finds_its_base_by_the_absolute_path(run: Path, base: Path, tmp_path: Path) -> None:
    (run / "settings.yaml").write_text("model: no/such/relative/base\n")
    moved = shutil.move(run, tmp_path / "elsewhere")
    assert resolve(moved).base == str(base)


def write_gguf(model: Any, tokenizer: Any, path: Path) -> None:
    """A Llama as llama.cpp stores it: float32, with its layout of the rotary dimensions in q and k."""
    import gguf
    import numpy as np

    config, weights = model.config, model.state_dict()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get))
    writer.add_token_types([gguf.TokenType.CONTROL] + [gguf.TokenType.NORMAL] * (config.vocab_size - 1))
    writer.add_token_scores([0.0] * config.vocab_size)
    for add in (writer.add_bos_token_id, writer.add_eos_token_id):
        add(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in weights.items():
        array = weight.numpy()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if heads:
            array = array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_gives_the_logits_of_the_model_in_it(
    tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = tiny_model("llama", vocab_size=257)
    write_gguf(model, tiny_tokenizer(), tmp_path / "tiny.gguf")
    found, tokenizer = load(tmp_path / "tiny.gguf")
    torch.testing.assert_close(logits(found), logits(model), rtol=0, atol=1e-5)
    assert tokenizer("plain text")["input_ids"] == tiny_tokenizer()("plain text")["input_ids"]
    assert "it/s" not in capfd.readouterr().err
    found.save_pretrained(tmp_path / "saved")  # it is an ordinary model, no longer a quantised one
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    assert found.name_or_path == str(tmp_path / "tiny.gguf")

    make = add_adapters(found)
    disturb(make)
    save_adapter(make, tmp_path / "adapter", tokenizer)
    again, _ = load(tmp_path / "adapter")
    assert torch.equal(logits(again), logits(make.eval()))


@pytest.mark.slow
@pytest.mark.skipif("LONGLORA_SMOLLM2" not in os.environ, reason="LONGLORA_SMOLLM2 names no SmolLM2 GGUF file")
def test_a_real_gguf_answers() -> None:
    model, tokenizer = load(os.environ["LONGLORA_SMOLLM2"])
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :])


def put_in_hub_cache(folder: Path, name: str) -> None:
    """A folder as the hub library leaves it after a download."""
    cached = Path(huggingface_hub.constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    shutil.copytree(folder, cached / "snapshots" / ("0" * 40))


def test_hub_models_and_adapters_load_from_the_cache_without_a_network(base: Path, run: Path) -> None:
    put_in_hub_cache(base, "tiny/base")
    put_in_hub_cache(run / "adapter", "tiny/adapter")
    assert locate("tiny/base").local_only
    model, tokenizer = load("tiny/base")
    assert torch.equal(logits(model), logits(load(base)[0]))
    assert model.name_or_path == "tiny/base"
    assert len(tokenizer) == 257
    adapted, _ = load("tiny/adapter")
    assert isinstance(adapted, PeftModel)
    assert torch.equal(logits(adapted), logits(load(run)[0]))
    with pytest.raises(UserError, match=r"'tiny/bse' is no file or folder here, and the hub cannot be reached"):
        load("tiny/bse")


def hub_answers(monkeypatch: pytest.MonkeyPatch, answer: Any) -> None:
    def model_info(*_: Any, **__: Any) -> Any:
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)


def test_what_the_hub_says_becomes_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    errors = huggingface_hub.errors

    def refusal(kind: type[Exception]) -> Exception:
        return kind.__new__(kind)  # their constructors want the HTTP response

    hub_answers(monkeypatch, refusal(errors.RepositoryNotFoundError))
    with pytest.raises(UserError, match=r"the hub has no such model.*Did you mean 'demo'\?"):
        load("dmeo")
    hub_answers(monkeypatch, refusal(errors.GatedRepoError))
    with pytest.raises(UserError, match=r"is gated"):
        load("owner/name")
    hub_answers(monkeypatch, refusal(errors.RevisionNotFoundError))
    with pytest.raises(UserError, match=r"has no revision 'v9'"):
        load("owner/name", revision="v9")
    sibling = huggingface_hub.hf_api.RepoSibling
    hub_answers(monkeypatch, type("Info", (), {"siblings": [sibling("config.json"), sibling("pytorch_model.bin")]})())
    with pytest.raises(UserError, match=r"no safetensors weights"):
        load("owner/name")


def bad(path: Path, text: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_names_that_lead_nowhere(base: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is not there.*Did you mean '.*/base'\?"):
        load(tmp_path / "bsae")
    with pytest.raises(UserError, match=r"is not there"):
        load("a/b/c")
    with pytest.raises(UserError, match=r"is a file, but not a .gguf"):
        load(bad(tmp_path / "notes.txt"))
    with pytest.raises(UserError, match=r"holds no model \(it has no config.json\)"):
        load(bad(tmp_path / "empty" / "notes.txt").parent)
    with pytest.raises(UserError, match=r"holds GGUF files and no config.json: name the file"):
        load(bad(tmp_path / "quants" / "a.gguf").parent)
    with pytest.raises(UserError, match=r"revision 'v1' was given, but MODEL .* is not on the hub"):
        load(base, revision="v1")


def test_files_that_cannot_be_read(base: Path, tmp_path: Path) -> None:
    def copy(name: str) -> Path:
        return Path(shutil.copytree(base, tmp_path / name))

    with pytest.raises(UserError, match=r"the config of .* cannot be read: .*not a GGUF file"):
        load(bad(tmp_path / "broken.gguf", "hello"))
    bad(copy("json") / "config.json", "{")
    with pytest.raises(UserError, match=r"the config of .* cannot be read: .*not a valid JSON"):
        load(tmp_path / "json")
    weights = copy("cut") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(UserError, match=r"the weights of .* cannot be read"):
        load(tmp_path / "cut")
    edit_json(copy("deeper") / "config.json", num_hidden_layers=3)
    with pytest.raises(UserError, match=r"are incomplete: 9 tensors"):
        load(tmp_path / "deeper")
    edit_json(copy("wider") / "config.json", intermediate_size=96)
    with pytest.raises(UserError, match=r"down_proj.weight is \(64, 80\) in the file and \(64, 96\) by the config"):
        load(tmp_path / "wider")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "no-tokenizer" if name[9] == "_" else copy("no-tokenizer")).joinpath(name).unlink()
    with pytest.raises(UserError, match=r"has no tokenizer"):
        load(tmp_path / "no-tokenizer")
    edit_json(copy("code") / "config.json", model_type="own", auto_map={"AutoConfig": "own.Config"})
    with pytest.raises(UserError, match=r"Python code of its own.*--trust-remote-code"):
        load(tmp_path / "code")


def test_weights_are_never_unpickled(base: Path, run: Path, tmp_path: Path) -> None:
    weights = base / "model.safetensors"
    torch.save(load_file(weights), base / "pytorch_model.bin")
    torch.save(load_file(weights), tmp_path / "kept.bin")
    weights.unlink()
    with pytest.raises(UserError, match=r"pickles only \(pytorch_model.bin\).*save_pretrained"):
        load(base)
    (base / "pytorch_model.bin").unlink()
    with pytest.raises(UserError, match=r"no weights: it needs model.safetensors"):
        load(base)
    (run / "adapter").rename(tmp_path / "adapter")
    save_file(torch.load(tmp_path / "kept.bin"), weights, {"format": "pt"})
    torch.save({"weight": Path("/")}, tmp_path / "adapter" / "adapter_model.bin")  # more than tensors
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"more than tensors in its adapter_model.bin"):
        load(tmp_path / "adapter")


def test_only_decoders_with_a_head(base: Path, tiny_tokenizer: Any, tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    bert = BertForMaskedLM(BertConfig(vocab_size=257, **sizes))
    with pytest.raises(UserError, match=r"is a BertForMaskedLM: it must be a decoder with a language-model head"):
        load(save_base(tmp_path / "bert", bert, tiny_tokenizer()))
    edit_json(base / "config.json", architectures=["LlamaModel"])
    with pytest.raises(UserError, match=r"is a LlamaModel"):
        load(base)
    edit_json(base / "config.json", architectures=["T5ForConditionalGeneration"], model_type="t5")
    with pytest.raises(UserError, match=r"is a T5ForConditionalGeneration"):
        load(base)


def test_tokenizer_must_fit_the_embedding(tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has 257 tokens but its embedding 97 rows"):
        load(save_base(tmp_path / "small", tiny_model("llama", vocab_size=97), tiny_tokenizer()))
    padded = tiny_tokenizer()
    padded.add_special_tokens({"pad_token": "[PAD]"})
    with pytest.raises(UserError, match=r"has 258 tokens but its embedding 257 rows"):
        load(save_base(tmp_path / "padded", tiny_model("llama", vocab_size=257), padded))
    # Gemma 3 has a token for images, which no text contains, outside its text model's embedding
    image = tiny_tokenizer()
    image.add_tokens("<image>", special_tokens=True)
    load(save_base(tmp_path / "image", tiny_model("llama", vocab_size=257), image))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"num_hidden_layers": 3}, r"num_hidden_layers is 3 there and 2 in the adapter's config.json"),
        ({"hidden_size": 32}, r"hidden_size is 32 there and 64"),
        ({"vocab_size": 300}, r"vocab_size is 300 there and 257"),
    ],
)
def test_adapter_of_another_base(
    tiny_model: Any, tiny_tokenizer: Any, base: Path, run: Path, change: dict[str, Any], sentence: str
) -> None:
    shutil.rmtree(base)
    fields = {"vocab_size": 257, "tie_word_embeddings": True} | change
    save_base(base, tiny_model("llama", **fields), tiny_tokenizer())
    with pytest.raises(UserError, match=rf"does not fit its base '.*': {sentence}"):
        load(run)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"num_hidden_layers": 3}, r"0 of its tensors have no place there and 8 lack, such as .*layers\.2"),
        ({"num_hidden_layers": 1}, r"8 of its tensors have no place there and 0 lack, such as .*layers\.1"),
        ({"num_key_value_heads": 4}, r"size mismatch for .*k_proj.lora_B"),
        ({"vocab_size": 300}, r"size mismatch for .*embed_tokens"),
    ],
)
def test_stock_adapter_of_another_base(
    tiny_model: Any, tiny_tokenizer: Any, base: Path, run: Path, tmp_path: Path, change: dict[str, Any], sentence: str
) -> None:
    # With its base's own config.json, so that only the tensors tell: PEFT itself warns of them, or says nothing.
    (run / "adapter").rename(tmp_path / "adapter")
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    if "num_hidden_layers" in change:
        weights = {name: weight for name, weight in weights.items() if "layernorm" not in name}
        edit_json(tmp_path / "adapter" / "adapter_config.json", modules_to_save=["model.embed_tokens", "model.norm"])
        save_file(weights, tmp_path / "adapter" / "adapter_model.safetensors")
    shutil.rmtree(base)
    fields = {"vocab_size": 257, "tie_word_embeddings": True} | change
    save_base(base, tiny_model("llama", **fields), tiny_tokenizer())
    shutil.copy(base / "config.json", tmp_path / "adapter")
    with pytest.raises(UserError, match=rf"does not fit its base '.*': .*{sentence}"):
        load(tmp_path / "adapter")


@pytest.mark.parametrize("lost", ["q_proj.lora_A", "model.norm"])
def test_adapter_with_a_tensor_lost(run: Path, lost: str) -> None:
    path = run / "adapter" / "adapter_model.safetensors"
    save_file({name: weight for name, weight in load_file(path).items() if lost not in name}, path)
    with pytest.raises(UserError, match=rf"does not fit its base .*{lost}"):
        load(run)


def test_adapters_that_do_not_say_enough(run: Path, base: Path, tmp_path: Path) -> None:
    adapter = Path(shutil.copytree(run / "adapter", tmp_path / "adapter"))
    edit_json(adapter / "adapter_config.json", base_model_name_or_path=None)
    with pytest.raises(UserError, match=r"does not say its base: set base_model_name_or_path"):
        load(adapter)
    edit_json(adapter / "adapter_config.json", base_model_name_or_path=str(adapter))
    with pytest.raises(UserError, match=r"names itself as its base"):
        load(adapter)
    edit_json(adapter / "adapter_config.json", base_model_name_or_path=str(tmp_path / "gone"))
    with pytest.raises(UserError, match=r"gone' is not there"):
        load(adapter)
    bad(adapter / "adapter_config.json", "{")
    with pytest.raises(UserError, match=r"is not an adapter's JSON"):
        load(adapter)


def test_run_directories_that_are_not_finished(run: Path) -> None:
    checkpoint = run / "checkpoint-100"
    shutil.copytree(run / "adapter", run / "checkpoint-20")
    shutil.copytree(run / "adapter", checkpoint)
    assert torch.equal(logits(load(checkpoint)[0]), logits(load(run)[0]))
    (checkpoint / "config.json").unlink()
    with pytest.raises(UserError, match=r"has no config.json beside it"):
        load(checkpoint)
    (run / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"has not finished.*its last checkpoint is checkpoint-100.*--resume"):
        load(run)
    shutil.rmtree(run / "adapter")
    with pytest.raises(UserError, match=r"has not finished"):
        load(run)
    bad(run / "settings.yaml", "model: [")
    with pytest.raises(UserError, match=r"is not valid YAML"):
        load(run)
