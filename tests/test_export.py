"""`longlora export`: weights, positions and tokenizer come back from the GGUF, and llama.cpp says the same."""

import errno
import itertools
import json
import math
import random

import chat_tokenizers as tokenizers
import numpy as np
import pytest
import torch
import transformers
from llama_cpp import LlamaCpp
from packaging import version
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_runs import disturb, make_run, save_base

import longlora.model.gguf_positions as gguf_positions
from longlora.cli import main
from longlora.errors import UserError
from longlora.model.exporting import command
from longlora.model.exporting.vocabulary import SPLITS, vocabulary
from longlora.model.loading import load, load_config, load_tokenizer
from longlora.model.positions import extend_positions
from longlora.model.saving import save_adapter

WINDOW, CONTEXT = 64, 256

reads_tokenizers = pytest.mark.skipif(
    version.parse(transformers.__version__) < version.parse("5.23"),
    reason="transformers below 5.23 cannot read tokenizers with one merge, or without a beginning token, from a GGUF",
)


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizers.chatml()


def make_model(folder, tiny_model, tokenizer, architecture="llama", method="yarn", **overrides):
    """A folder with a tiny model stretched from 64 to 256 tokens, and 3 rows of its embedding that no token has."""
    extension = overrides.pop("extension", {})
    model = tiny_model(architecture, vocab_size=len(tokenizer) + 3, **overrides)
    if method != "none":
        extend_positions(model, CONTEXT, method, **extension)
    save_base(folder, model, tokenizer)
    return model


def export(model, file, **options):
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    main(["export", str(model), "--gguf", str(file), *words])


def token_ids(vocabulary, length=200):
    """Well beyond the original window, so that positions stretched otherwise would show."""
    return torch.randint(0, vocabulary, (1, length), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def logits(model):
    return model.eval()(token_ids(200)).logits.double()


def header(file):
    """Keys and tensors by gguf's own reader."""
    from gguf import GGUFReader

    reader = GGUFReader(file)
    keys = {name: field.contents() for name, field in reader.fields.items()}
    return keys, {tensor.name: tensor for tensor in reader.tensors}


CASES = [
    ("llama", "none", {}),
    ("llama", "linear", {}),
    ("llama", "yarn", {}),
    ("llama", "yarn", {"extension": {"attention_factor": 1.5}, "tie_word_embeddings": True}),
    ("llama", "yarn", {"extension": {"beta_fast": 8.0, "truncate": False}}),
    ("llama", "ntk", {"num_key_value_heads": 4}),
    ("llama", "llama3", {}),
    ("llama", "linear", {"attention_bias": True, "mlp_bias": True}),
    ("mistral", "yarn", {}),
    ("qwen2", "linear", {"tie_word_embeddings": True}),
    ("qwen2", "yarn", {"extension": {"mscale": 0.8, "mscale_all_dim": 0.4}}),
    ("qwen3", "yarn", {}),
]


@pytest.mark.parametrize(("architecture", "method", "overrides"), CASES)
@reads_tokenizers
def test_what_is_read_back_is_the_model(architecture, method, overrides, tmp_path, tiny_model, tokenizer, monkeypatch):
    """By our own words in the file, by llama.cpp's keys alone, and by transformers given the positions."""
    from transformers import AutoModelForCausalLM

    model = make_model(tmp_path / "model", tiny_model, tokenizer, architecture, method, **dict(overrides))
    with torch.no_grad():  # biases are zero at first
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(generator=torch.Generator().manual_seed(2))
    save_base(tmp_path / "model", model, tokenizer)
    export(tmp_path / "model", tmp_path / "model.gguf")
    expected = logits(model)
    stretched = 0.0 if method == "none" else 1e-3
    plain, _ = load(tmp_path / "model")
    if stretched:  # the test can fail: with the first positions the logits are others
        plain.model.rotary_emb = type(plain.model.rotary_emb)(tiny_model(architecture).config)
        assert (logits(plain) - expected).abs().max() > stretched

    back, words = load(tmp_path / "model.gguf")
    torch.testing.assert_close(logits(back), expected, rtol=0, atol=2e-5)
    assert back.config.rope_parameters == model.config.rope_parameters
    assert back.config.max_position_embeddings == model.config.max_position_embeddings
    assert words.chat_template == tokenizer.chat_template
    assert "lm_head.weight" in back.state_dict()
    assert (back.lm_head.weight is back.model.embed_tokens.weight) == overrides.get("tie_word_embeddings", False)

    stock = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", config=back.config)
    torch.testing.assert_close(logits(stock), expected, rtol=0, atol=2e-5)

    if architecture == "qwen3" or "mlp_bias" in overrides:
        return  # transformers takes every Qwen3's heads to have 128 numbers, and every Llama to have no biases
    monkeypatch.setattr(gguf_positions, "OWN_KEY", "someone.elses")
    (tmp_path / "model.gguf").rename(tmp_path / "foreign.gguf")
    foreign, _ = load(tmp_path / "foreign.gguf")
    torch.testing.assert_close(logits(foreign), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("method", "keys"),
    [
        ("none", {"rope.freq_base": 10000.0, "rope.scaling.type": None, "context_length": 64}),
        ("linear", {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0, "context_length": 256}),
        (
            "yarn",
            {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 4.0,
                "rope.scaling.original_context_length": 64,
                "rope.scaling.attn_factor": None,
                "context_length": 256,
            },
        ),
        ("ntk", {"rope.freq_base": 10000.0 * 4 ** (16 / 14), "rope.scaling.type": None, "context_length": 256}),
        ("llama3", {"rope.scaling.type": None, "rope.freq_base": 10000.0, "context_length": 256}),
    ],
)
def test_llama_cpp_finds_the_positions_where_it_looks(method, keys, tmp_path, tiny_model, tokenizer):
    make_model(tmp_path / "model", tiny_model, tokenizer, method=method)
    export(tmp_path / "model", tmp_path / "model.gguf")
    found, tensors = header(tmp_path / "model.gguf")
    for key, value in keys.items():
        assert found.get(f"llama.{key}") == (pytest.approx(value) if isinstance(value, float) else value), key
    assert found["llama.rope.dimension_count"] == 16
    assert ("rope_freqs.weight" in tensors) == (method == "llama3")
    if method == "llama3":  # llama.cpp's converter, conversion/llama.py, in its own terms
        expected = []
        for index in range(8):
            wavelength = 2 * math.pi * 10000 ** (index / 8)
            if wavelength < 64 / 4:
                expected.append(1)
            elif wavelength > 64 / 1:
                expected.append(4)
            else:
                smooth = (64 / wavelength - 1) / (4 - 1)
                expected.append(1 / ((1 - smooth) / 4 + smooth))
        assert tensors["rope_freqs.weight"].data == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("kind", "error"), [("f32", 0), ("f16", 4e-3), ("bf16", 4e-2), ("q8_0", 1e-1)])
@reads_tokenizers
def test_smaller_numbers_cost_their_precision_and_no_more(kind, error, tmp_path, tiny_model, tokenizer):
    model = make_model(tmp_path / "model", tiny_model, tokenizer)
    export(tmp_path / "model", tmp_path / "model.gguf", type=kind)
    _, tensors = header(tmp_path / "model.gguf")
    types = {name: tensor.tensor_type.name for name, tensor in tensors.items()}
    assert types["blk.0.attn_q.weight"] == kind.upper()
    assert types["blk.0.attn_norm.weight"] == "F32"
    # its rows have 80 numbers, no whole number of blocks of 32
    assert types["blk.0.ffn_down.weight"] == ("F32" if kind == "q8_0" else kind.upper())
    back, _ = load(tmp_path / "model.gguf")
    expected = logits(model)
    share = ((logits(back) - expected).norm() / expected.norm()).item()
    assert share <= error
    assert share >= error / 20


@reads_tokenizers
def test_auto_keeps_the_models_own_numbers(tmp_path, tiny_model, tokenizer):
    model = tiny_model("llama", vocab_size=len(tokenizer)).bfloat16()
    save_base(tmp_path / "model", model, tokenizer)
    export(tmp_path / "model", tmp_path / "model.gguf")
    _, tensors = header(tmp_path / "model.gguf")
    assert tensors["token_embd.weight"].tensor_type.name == "BF16"
    back, _ = load(tmp_path / "model.gguf")
    for name, weight in back.state_dict().items():
        assert weight.equal(model.state_dict()[name].float()), name


@reads_tokenizers
def test_the_adapter_of_a_run_is_merged_into_the_file(tmp_path, tiny_model, tokenizer, capsys):
    save_base(tmp_path / "base", tiny_model("llama", vocab_size=len(tokenizer), tie_word_embeddings=True), tokenizer)
    model = make_run(tmp_path / "run", tmp_path / "base", tokenizer)
    main(["export", str(tmp_path / "run"), "--gguf", str(tmp_path / "run.gguf"), "--json"])
    summary = json.loads(capsys.readouterr().out)
    assert summary["architecture"] == "llama"
    assert summary["type"] == "f32"
    assert summary["context"] == CONTEXT
    assert summary["tokenizer"] == {"model": "gpt2", "pre": "gpt-2"}
    assert summary["bytes"] == (tmp_path / "run.gguf").stat().st_size
    back, _ = load(tmp_path / "run.gguf")
    expected = logits(model)
    assert (logits(back) - expected).abs().max() < 1e-4 * expected.abs().max()


def test_a_gguf_can_be_extended_and_exported_again(tmp_path, tiny_model, tokenizer):
    """4 times, then 8 times the window that the model had at first, not 2 times 4."""
    make_model(tmp_path / "model", tiny_model, tokenizer, method="linear")
    export(tmp_path / "model", tmp_path / "first.gguf")
    config = load_config(tmp_path / "first.gguf")
    assert extend_positions(config, 512, "yarn").factor == 8.0
    assert config.rope_parameters["original_max_position_embeddings"] == WINDOW


# ----------------------------------------------------------------------------------------------------- tokenizers


def words_of(draw, count):
    letters = "abcdeé ßx1234567  \n\t.,'s"
    return ["".join(draw.choice(letters) for _ in range(draw.randrange(1, 30))) for _ in range(count)]


@reads_tokenizers
def test_a_byte_level_tokenizer_comes_back(tmp_path, tiny_model):
    tokenizer = tokenizers.llama3()
    save_base(tmp_path / "model", tiny_model("llama", vocab_size=len(tokenizer) + 5), tokenizer)
    export(tmp_path / "model", tmp_path / "model.gguf")
    _, back = load(tmp_path / "model.gguf")
    for text in [*words_of(random.Random(0), 50), "<|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"]:
        assert (
            back(text, add_special_tokens=False)["input_ids"] == tokenizer(text, add_special_tokens=False)["input_ids"]
        )
        assert back.decode(tokenizer(text)["input_ids"]) == tokenizer.decode(tokenizer(text)["input_ids"])
    keys, _ = header(tmp_path / "model.gguf")
    assert keys["tokenizer.ggml.add_bos_token"] is True
    assert keys["tokenizer.ggml.bos_token_id"] == tokenizer.bos_token_id
    assert keys["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id
    assert keys["tokenizer.chat_template"] == tokenizer.chat_template
    assert keys["tokenizer.ggml.tokens"][-1] == f"[PAD{len(tokenizer) + 4}]"
    # llama.cpp's llama_token_type: 1 normal, 3 control, 5 unused
    assert keys["tokenizer.ggml.token_type"] == [3] * 5 + [1] * (len(tokenizer) - 5) + [5] * 5
    tokenizer.add_tokens(["<word>"])
    assert vocabulary(tokenizer, len(tokenizer)).types[-1] == 4  # defined by the user


@reads_tokenizers
def test_a_tokenizer_without_a_beginning_token_comes_back(tmp_path, tiny_model):
    tokenizer = tokenizers.chatml()
    make_model(tmp_path / "model", tiny_model, tokenizer)
    export(tmp_path / "model", tmp_path / "model.gguf")
    _, back = load(tmp_path / "model.gguf")
    text = "<|im_start|>user\nhi é 12<|im_end|>"
    assert back(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert (back.bos_token, back.eos_token, back.chat_template) == (None, "<|im_end|>", tokenizer.chat_template)


def sentencepiece(words, text):
    """llama.cpp's llm_tokenizer_spm in short: join the best-scored neighbours, the leftmost first, then bytes."""
    ids = {token: number for number, token in enumerate(words.tokens)}
    pieces = list(((" " if words.add_space_prefix else "") + text).replace(" ", "▁"))
    while True:
        joined = [a + b for a, b in itertools.pairwise(pieces)]
        pairs = [(words.scores[ids[each]], -at) for at, each in enumerate(joined) if each in ids]
        if not pairs:
            break
        at = -max(pairs)[1]
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
    found = []
    for piece in pieces:
        found += [ids[piece]] if piece in ids else [ids[f"<0x{byte:02X}>"] for byte in piece.encode()]
    return found


@reads_tokenizers
def test_a_sentencepiece_vocabulary_merges_by_its_scores_as_the_tokenizer_does(tmp_path, tiny_model):
    """Merges with ties and conflicts: every way to make a token from two others is one of them, as in Llama 2's."""
    tokenizer = tokenizers.sentencepiece_like(tokenizers.LLAMA2, merges="ab bc ▁a 12 23")
    words = vocabulary(tokenizer, len(tokenizer) + 2)
    assert (words.model, words.pre, words.add_space_prefix, words.add_bos) == ("llama", "default", True, True)
    draw = random.Random(0)
    texts = ["a" + "".join(draw.choice("abc123 é") for _ in range(draw.randrange(20))) for _ in range(200)]
    for text in texts:
        assert sentencepiece(words, text) == tokenizer(text, add_special_tokens=False)["input_ids"], repr(text)
    save_base(tmp_path / "model", tiny_model("llama", vocab_size=len(tokenizer) + 2), tokenizer)
    export(tmp_path / "model", tmp_path / "model.gguf")
    _, back = load(tmp_path / "model.gguf")
    for text in texts:
        assert back(text)["input_ids"] == tokenizer(text)["input_ids"], repr(text)
    assert back.convert_ids_to_tokens([0, 1, 2]) == ["<unk>", "<s>", "</s>"]
    types = header(tmp_path / "model.gguf")[0]["tokenizer.ggml.token_type"]
    assert types[:3] == [2, 3, 3]  # unknown, control
    assert types[3:259] == [6] * 256  # bytes


@reads_tokenizers
def test_splits_have_the_names_that_transformers_reads_them_by():
    tables = pytest.importorskip("transformers.integrations.gguf.gguf_tokenizer_mapping")
    theirs = tables.GGUF_PRE_TOKENIZER_SPLITS
    assert {name: expression for expression, name in SPLITS.items()} == {
        name: theirs[name] for name in ("llama-bpe", "qwen2", "tekken")
    }


def test_each_split_is_told_from_the_tokenizers_own_rules():
    from tokenizers import Regex, pre_tokenizers

    tokenizer = tokenizers.chatml()
    backend = tokenizer.backend_tokenizer

    def name(before):
        backend.pre_tokenizer = before
        return vocabulary(tokenizer, len(tokenizer)).pre

    bytes_alone = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    with_regex = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert name(with_regex) == "gpt-2"
    assert name(pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), with_regex])) == "smollm"
    for expression, expected in SPLITS.items():
        split = pre_tokenizers.Split(Regex(expression), behavior="isolated")
        assert name(pre_tokenizers.Sequence([split, bytes_alone])) == expected
    for unknown in (
        bytes_alone,
        pre_tokenizers.ByteLevel(add_prefix_space=True),
        pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(r"\w+"), behavior="isolated"), bytes_alone]),
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=False), with_regex]),
        pre_tokenizers.Whitespace(),
    ):
        with pytest.raises(UserError, match="which llama.cpp does not know or longlora cannot name to it"):
            name(unknown)


def test_vocabularies_that_llama_cpp_would_merge_otherwise_are_refused():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    # "abc" merges from ab + c only, but a + bc is in the vocabulary too
    core = json.loads(tokenizers.sentencepiece_like(None, merges="ab bc").backend_tokenizer.to_str())
    core["model"]["vocab"]["abc"] = len(core["model"]["vocab"])
    core["model"]["merges"].append(["ab", "c"])
    partial = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(core)))
    with pytest.raises(UserError, match="merges that leave out a pair of its vocabulary, a bc"):
        vocabulary(partial, 400)
    unigram = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.Unigram([("a", 0.0)], unk_id=0)))
    with pytest.raises(UserError, match="the tokenizer has a Unigram model"):
        vocabulary(unigram, 1)


# ------------------------------------------------------------------------------------------------------- mistakes


def failing(words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return " ".join(error.split())


@pytest.mark.parametrize(
    ("architecture", "method", "overrides", "sentence"),
    [
        ("gemma", "none", {}, "a gemma model cannot be exported, only llama, mistral, qwen2, qwen3"),
        ("llama", "dynamic", {}, "llama.cpp has no dynamic NTK"),
        ("llama", "longrope", {}, "two lists (longrope)"),
        ("qwen2", "llama3", {}, "llama.cpp cannot read these llama3 positions in a qwen2 model"),
        ("qwen3", "yarn", {"extension": {"beta_slow": 2.0}}, "llama.cpp cannot read these yarn positions"),
        ("mistral", "none", {"sliding_window": 32}, "attends to the last 32 tokens only (sliding_window)"),
        ("llama", "none", {"hidden_act": "gelu"}, "has hidden_act gelu, where llama.cpp has silu"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    architecture, method, overrides, sentence, tmp_path, tiny_model, tokenizer, capsys
):
    make_model(tmp_path / "model", tiny_model, tokenizer, architecture, method, **dict(overrides))
    words = ["export", str(tmp_path / "model"), "--gguf", str(tmp_path / "model.gguf")]
    assert sentence in failing(words, capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_files_are_protected(tmp_path, capsys, monkeypatch):
    def load_nothing(*_, **__):
        raise AssertionError("loaded, where the mistake shows at once")

    monkeypatch.setattr(command, "load", load_nothing)
    (tmp_path / "there.gguf").write_bytes(b"mine")
    assert "is there already" in failing(["export", "demo", "--gguf", str(tmp_path / "there.gguf")], capsys)
    assert (tmp_path / "there.gguf").read_bytes() == b"mine"
    assert "must end in .gguf" in failing(["export", "demo", "--gguf", str(tmp_path / "model.bin")], capsys)
    nowhere = str(tmp_path / "nowhere" / "model.gguf")
    assert "cannot be written (No such file or directory)" in failing(["export", "demo", "--gguf", nowhere], capsys)
    typed = ["export", "demo", "--gguf", str(tmp_path / "x.gguf"), "--type", "q4_0"]
    assert "unknown --type 'q4_0'" in failing(typed, capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["there.gguf"]


def test_a_full_disk_is_a_sentence_and_leaves_nothing(tmp_path, tiny_model, tokenizer, capsys, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    make_model(tmp_path / "model", tiny_model, tokenizer)
    monkeypatch.setattr(command, "write_tensors", full)
    words = ["export", str(tmp_path / "model"), "--gguf", str(tmp_path / "model.gguf")]
    assert "cannot be written (No space left on device): make room" in failing(words, capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


# ------------------------------------------------------------------------------------------------------ llama.cpp


def overrides_of_weights(overrides):
    return {name: value for name, value in overrides.items() if name != "extension"}


@pytest.mark.parametrize(("architecture", "method", "overrides"), CASES)
def test_llama_cpp_computes_the_same(architecture, method, overrides, tmp_path, tiny_model, tokenizer):
    model = make_model(tmp_path / "model", tiny_model, tokenizer, architecture, method, **dict(overrides))
    export(tmp_path / "model", tmp_path / "model.gguf")
    running = LlamaCpp(tmp_path / "model.gguf", CONTEXT)
    tokens = token_ids(200, 50 if method == "none" else 200)
    places = range(9, tokens.shape[1], 10)
    with torch.no_grad():
        ours = model.eval()(tokens).logits[0, places].log_softmax(-1)
        unstretched = tiny_model(architecture, vocab_size=len(tokenizer) + 3, **overrides_of_weights(overrides))
        elsewhere = unstretched(tokens).logits[0, places].log_softmax(-1)
    rows = [running.log_probabilities(tokens[0, : place + 1].tolist(), ours.shape[1]) for place in places]
    theirs = torch.from_numpy(np.array(rows)).to(ours.dtype)
    ours, elsewhere, theirs = (each - each.mean(-1, keepdim=True) for each in (ours, elsewhere, theirs))
    assert (theirs - ours).norm() < 5e-3 * ours.norm()  # its attention keeps keys and values in float16
    assert method == "none" or (theirs - elsewhere).norm() > 5e-2 * ours.norm()  # so positions do show
    assert (theirs.argmax(-1) == ours.argmax(-1)).float().mean() > 0.97


def test_llama_cpp_says_the_same_text(tmp_path):
    """The shipped model stretched, greedily: the same tokens from the same text, tokenised by llama.cpp itself."""
    model, tokenizer = load("demo", dtype="float32")
    extend_positions(model, 2048, "yarn")
    save_base(tmp_path / "model", model, tokenizer)
    export(tmp_path / "model", tmp_path / "model.gguf")
    running = LlamaCpp(tmp_path / "model.gguf", 2048)
    import argparse
    import inspect

    text = inspect.getsource(argparse)[:4000]
    tokens = tokenizer(text)["input_ids"]
    assert len(tokens) > 600  # beyond the window that the model was trained with
    said = running.said(tokens, 40)
    assert running.said(text, 40) == said  # its own tokens of the text are ours
    with torch.no_grad():
        ours = model.generate(torch.tensor([tokens]), max_new_tokens=40, do_sample=False)[0, len(tokens) :]
    assert said == tokenizer.decode(ours)


def kept_lora(tmp_path, model, words):
    """A run of LoRA, norms and embeddings, of which `merge --keep-lora` leaves a base and its LoRA."""
    from safetensors.torch import load_file, save_file

    make_run(tmp_path / "run", save_base(tmp_path / "first", model, words), words, rank=3)
    main(["merge", str(tmp_path / "run"), "--output", str(tmp_path / "base"), "--keep-lora"])
    file = tmp_path / "base" / "adapter" / "adapter_model.safetensors"
    larger = {name: weight * (4 if "lora_B" in name else 1) for name, weight in load_file(file).items()}
    save_file(larger, file, {"format": "pt"})
    return file.parent


def stock_lora(tmp_path, model, words):
    """PEFT's own, of every linear layer, with a rank and a scaling of their own in some."""
    save_base(tmp_path / "base", model, words)
    model.name_or_path = str(tmp_path / "base")
    patterns = {"rank_pattern": {"q_proj": 2, "down_proj": 8}, "alpha_pattern": {"o_proj": 4, "k_proj": 16}}
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", use_rslora=True, **patterns)
    adapted = get_peft_model(model, config)
    disturb(adapted)
    save_adapter(adapted, tmp_path / "adapter", words)
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    ("architecture", "tied", "make"),
    [("llama", True, kept_lora), ("llama", False, stock_lora), ("qwen2", False, stock_lora)],
)
def test_llama_cpp_says_the_same_with_the_lora_apart(architecture, tied, make, tmp_path, tiny_model):
    """What stock transformers and PEFT say with base and adapter, and not what the base says by itself."""
    from transformers import AutoModelForCausalLM

    words = load_tokenizer("demo")
    adapter = make(tmp_path, tiny_model(architecture, vocab_size=len(words), tie_word_embeddings=tied), words)
    export(tmp_path / "base", tmp_path / "base.gguf")
    main(["export", str(adapter), "--gguf", str(tmp_path / "lora.gguf"), "--lora"])
    prompt = words("def area(width, height):\n    return")["input_ids"]

    def ours(model):
        with torch.no_grad():
            said = model.eval().generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0, len(prompt) :]
        return words.decode(said)

    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    alone = ours(base)
    both = ours(PeftModel.from_pretrained(base, str(adapter)))
    assert both != alone, "a LoRA too small to test anything"
    assert LlamaCpp(tmp_path / "base.gguf", 64).said(prompt, 12) == alone
    assert LlamaCpp(tmp_path / "base.gguf", 64, tmp_path / "lora.gguf").said(prompt, 12) == both


def test_a_lora_that_llama_cpp_would_put_on_another_model_is_refused(tmp_path, tiny_model, tokenizer, capsys):
    def refused(model):
        return failing(["export", str(model), "--gguf", str(tmp_path / "lora.gguf"), "--lora"], capsys)

    tied = tiny_model("llama", vocab_size=len(tokenizer), tie_word_embeddings=True)
    base = save_base(tmp_path / "base", tied, tokenizer)
    assert "is no adapter: leave --lora out" in refused(base)
    make_run(tmp_path / "stretched", base, tokenizer, train=("norm",))
    sentence = refused(tmp_path / "stretched")
    assert f"has positions of its own, not those of '{base}'" in sentence
    assert "longlora merge RUN --output DIR --keep-lora" in sentence

    for name, sentence, options in (
        (
            "norm",
            "is more than LoRA of linear layers (base_model.model.model.",
            {"modules_to_save": ["norm"]},
        ),
        ("variant", "is a variant of LoRA", {"alora_invocation_tokens": [1, 2]}),
        ("dora", "is a variant of LoRA", {"use_dora": True}),
        ("bias", "is more than LoRA of linear layers (base_model.model.model.", {"lora_bias": True}),
        ("initial", "changes its base's weights (init_lora_weights pissa)", {"init_lora_weights": "pissa"}),
        ("head", "has LoRA of lm_head, for which llama.cpp has no place", {"target_modules": ["q_proj", "lm_head"]}),
    ):
        model = load(base)[0]
        config = LoraConfig(task_type="CAUSAL_LM", **({"target_modules": ["q_proj"]} | options))
        save_adapter(get_peft_model(model, config), tmp_path / name, tokenizer)
        assert sentence in refused(tmp_path / name), name
    torch.save({}, tmp_path / "norm" / "trainable_params.bin")
    assert "has norms and embeddings beside it (trainable_params.bin)" in refused(tmp_path / "norm")
    assert not list(tmp_path.glob("*.gguf*"))
    assert not list(tmp_path.glob(".*"))
