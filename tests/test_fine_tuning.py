"""`longlora sft` on a tiny model: examples, packing, the loss against stock transformers, runs, and mistakes."""

import copy
import json
import math
import os
import random
import signal
import time

import chat_tokenizers as tokenizers
import numpy as np
import pyarrow
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from safetensors.torch import load_file
from several_processes import start as start_processes
from several_processes import together, wait

from longlora.attention.transformers_backend import use_shifted_attention
from longlora.cli import main
from longlora.corpus.conversations import ConversationFormat, Example
from longlora.errors import UserError
from longlora.longqa.pair_files import write_pairs
from longlora.longqa.pairs import question_and_answer
from longlora.model.adapters import add_adapters
from longlora.model.lm_head import causal_lm_loss
from longlora.run_directory import RunDirectory
from longlora.settings import CorpusSettings
from longlora.training.fine_tuning.answer_loss import answer_loss
from longlora.training.fine_tuning.examples import hold_out, read_examples
from longlora.training.fine_tuning.packing import collate, pack_examples

IGNORED = -100


def make_pairs(count=24, seed=0):
    """Questions about the words of short texts, of 20 to 200 characters, two on each text."""
    draw = random.Random(seed)
    words = "whale ship captain ocean rope sail storm anchor harbour".split()
    pairs = []
    for number in range(count // 2):
        text = " ".join(draw.choice(words) for _ in range(draw.randrange(2, 24)))
        source = {"document": f"text-{number}"}
        pairs.append(question_and_answer(f"{text}\nThe first word?", text.split()[0], "details", source))
        pairs.append(question_and_answer(f"{text}\nThe last word?", text.split()[-1], "details", source))
    return pairs


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory, tiny_model):
    """A chat model with a window of 64 tokens."""
    folder = tmp_path_factory.mktemp("base") / "model"
    tokenizer = tokenizers.chatml()
    model = tiny_model("llama", vocab_size=len(tokenizer), tie_word_embeddings=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pairs_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    write_pairs(file, make_pairs())
    return file


def read_file(file, tokenizer, context, **options):
    return read_examples(CorpusSettings(data=(str(file),)), ConversationFormat(tokenizer), context, **options)


@pytest.fixture(scope="module")
def examples(pairs_file):
    return read_file(pairs_file, tokenizers.chatml(), 256).examples


def command(model, pairs, output, **changes):
    options = {
        "data": str(pairs),
        "context": 256,
        "output": str(output),
        "batch": 4,
        "lr": "1e-2",
        "warmup-steps": 1,
        "dtype": "float32",
        "save-every": 2,
        "epochs": 1,
    } | {name.replace("_", "-"): value for name, value in changes.items()}
    words = ["sft", str(model)]
    for name, value in options.items():
        words += [f"--{name}"] if value is True else [] if value is None else [f"--{name}", *str(value).split()]
    return words


# ------------------------------------------------------------------------------------------------------ examples


def test_an_example_whose_answer_would_be_cut_is_left_out_and_named(tmp_path, caplog):
    pairs = [question_and_answer("word " * times + "?", "yes") for times in (1, 30, 2, 40)]
    file = tmp_path / "pairs.jsonl"
    write_pairs(file, pairs)
    conversations = ConversationFormat(tokenizers.chatml())
    lengths = [len(conversations.example(pair.conversation()).tokens) for pair in pairs]
    for context in (lengths[1], lengths[1] - 1):  # the last token fits, or would be cut
        read = read_file(file, tokenizers.chatml(), context)
        kept = [number for number, length in enumerate(lengths, start=1) if length <= context]
        assert [example.where for example in read.examples] == [f"{file}:{number}" for number in kept]
        assert read.facts["too_long"] == {
            "pairs": 4 - len(kept),
            "where": [f"{file}:{number}" for number in (1, 2, 3, 4) if number not in kept],
        }
        assert read.facts["longest"] == max(lengths)
        assert all(example.answer_tokens == len(b"yes") + 1 for example in read.examples)
    assert "2 of 4 pairs do not fit" in caplog.text
    assert f"{file}:2, {file}:4" in caplog.text


def test_held_out_examples_are_whole_documents_drawn_by_the_seed(pairs_file):
    documents = read_file(pairs_file, tokenizers.chatml(), 256).documents
    drawn = []
    for seed in range(8):
        training, held_out = hold_out(documents, 0.25, seed)
        assert sorted([*training, *held_out]) == list(range(24))
        assert len(held_out) == 6
        assert not set(documents[training]) & set(documents[held_out])
        drawn.append(tuple(held_out))
        assert drawn[-1] == tuple(hold_out(documents, 0.25, seed)[1])
    assert len(set(drawn)) > 1
    assert len(hold_out(documents, 0.0, 0)[1]) == 0
    assert len(hold_out(documents, 0.01, 0)[1]) == 2  # one document, the least there is


def held_out_of(documents, share):
    training, held_out = hold_out(np.array(list(documents)), share, 0)
    assert sorted([*training, *held_out]) == list(range(len(documents)))
    return len(held_out)


def test_questions_on_one_document_are_held_out_one_by_one():
    assert held_out_of("a" * 24, 0.25) == 6
    assert held_out_of("abc", 0.1) == 0


def test_documents_with_many_questions_are_not_held_out_whole(caplog):
    """A sixteenth of the pairs was asked for: a whole document of two would be a half, one of six a sixth."""
    assert held_out_of("a" * 12 + "b" * 12, 1 / 16) == 2
    assert "the same are trained on and measured on" in caplog.text
    caplog.clear()
    assert held_out_of("aaaabbbbccccddddeeeeffff", 1 / 16) == 4
    assert not caplog.text


@pytest.mark.parametrize("documents", ["a" * 24, "abcdefghijklmnopqrstuvwx"])
def test_something_is_always_left_to_train_on(documents):
    assert held_out_of(documents, 0.99) == 23


def test_questions_are_grouped_by_how_the_prompt_begins(tmp_path):
    """LongAlpaca's records do not name their document."""
    for times, documents in ((300, 9), (2500, 3)):  # 300 characters are all of the prompt
        records = [
            {"instruction": f"{book * times} Question {n}?", "output": "Yes."} for book in "abc" for n in range(3)
        ]
        file = tmp_path / f"{times}.json"
        file.write_text(json.dumps(records))
        assert len(set(read_file(file, tokenizers.chatml(), 4096).documents)) == documents


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.json", "pairs.parquet"])
def test_conversations_come_from_the_cache_as_they_were_made(tmp_path, monkeypatch, name):
    """Also where a run ended at a record that is none; a template that rewrites answers makes two examples of one."""
    tokenizer = tokenizers.chatml()
    tokenizer.chat_template = tokenizers.FORGETFUL
    said = ["Who?", "perhaps</think>A captain.", "Why?", "He is.", "Where?", "At sea."]
    turns = [{"role": ("user", "assistant")[at % 2], "content": content} for at, content in enumerate(said)]
    conversations = [turns[:4], turns[:2], [], turns]
    records = [{"messages": each} for each in conversations]
    if name.endswith(".jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    elif name.endswith(".json"):
        (tmp_path / name).write_text(json.dumps(records))
    else:
        parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / name)
    expected = [each for turns in conversations if turns for each in ConversationFormat(tokenizer).examples(turns)]
    written = []
    write = ConversationFormat.examples
    monkeypatch.setattr(
        ConversationFormat, "examples", lambda self, turns, **how: written.append(turns) or write(self, turns, **how)
    )
    with pytest.raises(UserError, match=rf"{name}', (line|record|row) 3: its roles are none.*--skip-malformed"):
        read_file(tmp_path / name, tokenizer, 4096)
    for _ in range(2):
        corpus = CorpusSettings(data=(str(tmp_path / name),), skip_malformed=1)
        read = read_examples(corpus, ConversationFormat(tokenizer), 4096)
        assert len(written) == 3  # each once
        assert (read.facts["pairs"], read.facts["answers_without_loss"]) == (3, 0)
        assert [example.where for example in read.examples] == [f"{tmp_path / name}:{n}" for n in (1, 1, 2, 4, 4)]
        for ours, theirs in zip(read.examples, expected, strict=True):
            assert ours.tokens.dtype == theirs.tokens.dtype
            assert ours.tokens.tolist() == theirs.tokens.tolist()
            assert ours.answers == theirs.answers


def test_what_changes_examples_is_no_longer_found_in_the_cache(pairs_file, examples):
    """The template, the format, and whether every answer is learned."""
    tokenizer = tokenizers.chatml()
    assert read_file(pairs_file, tokenizer, 256, every_answer=False).examples[0].answers == examples[0].answers
    tokenizer.chat_template = tokenizer.chat_template.replace("\n", " ")
    assert read_file(pairs_file, tokenizer, 256).examples[0].tokens.tolist() != examples[0].tokens.tolist()
    inst = read_examples(CorpusSettings(data=(str(pairs_file),)), ConversationFormat(tokenizer, "inst"), 256).examples
    assert tokenizer.decode(inst[0].tokens).startswith("[INST]")


# ------------------------------------------------------------------------------------------------------- packing


def numbered(lengths):
    """Examples of these lengths whose last token is the answer; no two have a token in common."""
    starts = np.cumsum([0, *lengths])
    return [
        Example(np.arange(start, start + length, dtype=np.int32), ((length - 1, length),))
        for start, length in zip(starts[:-1], lengths, strict=True)
    ]


def test_rows_are_those_drawn_in_the_docstring():
    examples = [
        Example(np.array([1, 1, 1, 1, 7, 7], dtype=np.int32), ((4, 6),)),
        Example(np.array([2, 2, 8], dtype=np.int32), ((2, 3),)),
        Example(np.array([3, 9], dtype=np.int32), ((1, 2),)),
    ]
    rows = pack_examples(examples, 6, seed=1)
    found = {tuple(row["input_ids"].tolist()): row for row in (rows[index] for index in range(len(rows)))}
    assert set(found) == {(1, 1, 1, 1, 7, 7), (2, 2, 8, 3, 9)}
    assert found[1, 1, 1, 1, 7, 7]["labels"].tolist() == [-100, -100, -100, -100, 7, 7]
    assert found[2, 2, 8, 3, 9]["labels"].tolist() == [-100, -100, 8, -100, 9]
    assert found[2, 2, 8, 3, 9]["position_ids"].tolist() == [0, 1, 2, 0, 1]
    assert rows.tokens == 11


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(2, 40), min_size=1, max_size=60), st.integers(0, 3))
def test_each_example_is_whole_in_exactly_one_row(lengths, seed):
    rows = pack_examples(numbered(lengths), 40, seed)
    seen = []
    for index in range(len(rows)):
        row = rows[index]
        assert {len(values) for values in row.values()} == {sum(len(rows.examples[i].tokens) for i in rows.rows[index])}
        assert len(row["input_ids"]) <= 40
        starts = (row["position_ids"] == 0).nonzero()[:, 0].tolist()
        for start, stop in zip(starts, [*starts[1:], len(row["input_ids"])], strict=True):
            assert row["position_ids"][start:stop].tolist() == list(range(stop - start))
            assert (row["labels"][start : stop - 1] == IGNORED).all()
            assert row["labels"][stop - 1] == row["input_ids"][stop - 1]
            seen.append(tuple(row["input_ids"][start:stop].tolist()))
    assert sorted(seen) == [tuple(example.tokens.tolist()) for example in numbered(lengths)]
    # no two rows could have been one
    sizes = sorted(len(rows[index]["input_ids"]) for index in range(len(rows)))
    assert len(sizes) < 2 or sizes[0] + sizes[1] > 40


def test_rows_that_share_a_batch_are_padded_and_say_so():
    rows = pack_examples(numbered([5, 3, 4]), 5, seed=0)
    batch = collate([rows[index] for index in range(3)])
    lengths = [len(rows[index]["input_ids"]) for index in range(3)]
    assert batch["attention_mask"].sum(1).tolist() == lengths
    for number, length in enumerate(lengths):
        for name in ("input_ids", "labels", "position_ids"):
            assert batch[name][number, :length].equal(rows[number][name])
        assert (batch["labels"][number, length:] == IGNORED).all()
    assert "attention_mask" not in collate([rows[0]])


# ------------------------------------------------------------------------------------------------ loss and gradient


def own_loss(model, example):
    """Summed loss of an example's answers by stock transformers: whole logits, no packing, no chunks."""
    logits = model(torch.tensor(example.tokens[None].astype(np.int64))).logits[0].float()
    labels = torch.tensor(example.labels(IGNORED))
    return torch.nn.functional.cross_entropy(logits[:-1], labels[1:], ignore_index=IGNORED, reduction="sum")


@pytest.mark.parametrize("device_batch", [1, 3])
@pytest.mark.parametrize("pattern", ["shift", "full"])
def test_packed_loss_and_gradient_are_those_of_the_examples_alone(examples, tiny_model, pattern, device_batch):
    """Each example alone, in training mode with the same pattern; with `full` by stock transformers as well."""
    rows = pack_examples(examples, 256, seed=0)
    assert len(rows) < len(examples) / 2
    tokens = sum(example.answer_tokens for example in examples)
    torch.manual_seed(0)  # of LoRA's first matrix
    packed = add_adapters(tiny_model("llama", vocab_size=len(tokenizers.chatml()), tie_word_embeddings=True))
    for parameter in packed.parameters():
        if not parameter.any():  # LoRA's second matrix is 0 at first
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(3))
    alone = copy.deepcopy(packed)
    for model in (packed, alone):
        use_shifted_attention(model.train(), 32, pattern)
    loss = 0.0
    for start in range(0, len(rows), device_batch):
        batch = collate([rows[index] for index in range(start, min(start + device_batch, len(rows)))])
        part = causal_lm_loss(packed, batch, 16, tokens)
        part.backward()
        loss += part.item()
    expected = 0.0
    for example in examples:
        inputs = {"input_ids": torch.tensor(example.tokens[None].astype(np.int64))}
        part = causal_lm_loss(alone, {**inputs, "labels": torch.tensor(example.labels(IGNORED))[None]}, 16, tokens)
        part.backward()
        expected += part.item()
    assert loss == pytest.approx(expected, rel=1e-5)
    theirs = dict(alone.named_parameters())
    for name, parameter in packed.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-4, atol=1e-5)
    stock = sum(own_loss(alone.eval(), example).item() for example in examples) / tokens
    if pattern == "full":
        assert loss == pytest.approx(stock, rel=1e-5)
    else:  # the longer examples have more than a group, so that the comparison above is of S2-Attn
        assert abs(loss - stock) > 1e-3 * stock


def test_short_examples_in_a_row_get_full_attention(examples, tiny_model):
    """None is longer than a group, so S2-Attn on packed rows is stock transformers on each alone, in float64."""
    group = max(len(example.tokens) for example in examples)
    rows = pack_examples(examples, 4 * group, seed=0)
    assert len(rows) < len(examples) / 4
    model = tiny_model("llama", vocab_size=len(tokenizers.chatml())).double()
    tokens = sum(example.answer_tokens for example in examples)
    with torch.no_grad():
        stock = sum(own_loss(model, example).item() for example in examples) / tokens
        for pattern, size in (("shift", group), ("shift", group // 3)):
            use_shifted_attention(model.train(), size, pattern)
            batches = [collate([rows[index]]) for index in range(len(rows))]
            packed = sum(causal_lm_loss(model, batch, 16, tokens).item() for batch in batches)
            assert (packed == pytest.approx(stock, rel=1e-5)) == (size == group)


def test_answer_loss_is_stock_transformers_loss(examples, tiny_model):
    model = tiny_model("llama", vocab_size=len(tokenizers.chatml()))
    model.train()
    use_shifted_attention(model, 16)
    measured = answer_loss(model, examples, chunk=7, progress=False)
    assert model.training
    with torch.no_grad():
        expected = sum(own_loss(model.eval(), example).item() for example in examples)
    assert measured.tokens == sum(example.answer_tokens for example in examples)
    assert measured.nll == pytest.approx(expected / measured.tokens, rel=1e-5)
    assert measured.perplexity == pytest.approx(math.exp(measured.nll))


def test_the_recorded_loss_of_the_first_step_is_that_of_the_examples_alone(base_folder, pairs_file, tmp_path):
    """All rows are one step, by the whole way of the command."""
    main(
        command(base_folder, pairs_file, tmp_path / "run", pattern="full", batch=100, held_out=0, context=None, steps=1,
                epochs=None, warmup_steps=0)
    )  # fmt: skip
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(base_folder)
    conversations = ConversationFormat(AutoTokenizer.from_pretrained(base_folder))
    fitting = read_examples(CorpusSettings(data=(str(pairs_file),)), conversations, 64).examples
    assert 0 < len(fitting) < 24
    with torch.no_grad():
        expected = sum(own_loss(model, each).item() for each in fitting) / sum(each.answer_tokens for each in fitting)
    (record,) = [record for record in RunDirectory(tmp_path / "run").read_metrics() if "loss" in record]
    assert record["loss"] == pytest.approx(expected, rel=1e-4)  # logged with four decimals
    assert record["tokens"] == sum(len(example.tokens) for example in fitting)


# ---------------------------------------------------------------------------------------------------------- runs


def test_a_run_extends_learns_and_holds_everything(base_folder, pairs_file, tmp_path, capsys):
    run = tmp_path / "run"
    main([*command(base_folder, pairs_file, run, epochs=12, held_out=0.2, evaluate_every=5), "--json"])
    summary = json.loads(capsys.readouterr().out)
    assert summary["positions"]["factor"] == 4.0
    assert summary["data"]["examples"] + summary["data"]["held_out"] == 24
    assert summary["data"]["prompt_format"] == "template"
    steps = 12 * math.ceil(summary["data"]["rows"] / 4)
    assert summary["training"]["steps"] == steps
    assert summary["training"]["tokens"] == pytest.approx(12 * summary["data"]["tokens"], rel=0.01)
    answers = summary["answers"]
    assert [answers[name]["order"] for name in ("base", "untrained", "trained")] == [0, 1, 2]
    assert answers["trained"]["nll"] < 0.6 * answers["base"]["nll"]
    assert answers["trained"]["tokens"] == answers["base"]["tokens"]
    settings = yaml.safe_load((run / "settings.yaml").read_text())
    assert (settings["command"], settings["epochs"]) == ("sft", 12)
    assert "base" not in settings
    metrics = RunDirectory(run).read_metrics()
    assert [m["step"] for m in metrics if "loss" in m] == list(range(1, steps + 1))
    assert {*range(5, steps + 1, 5)} <= {m["step"] for m in metrics if "eval_loss" in m}
    assert [m["eval_loss"] for m in metrics if "eval_loss" in m][-1] < answers["base"]["nll"]
    config = json.loads((run / "adapter" / "config.json").read_text())
    assert config["rope_parameters"]["rope_type"] == "yarn"
    assert config["max_position_embeddings"] == 256
    page = (run / "report.html").read_text()
    assert f"{answers['base']['nll']:.3f} to {answers['trained']['nll']:.3f} nats" in page
    assert "longlora sft YOUR_MODEL" in page
    assert "Perplexity: nothing was measured" not in page


def test_a_killed_run_resumes_to_the_same_result(base_folder, pairs_file, tmp_path):
    from safetensors.torch import load_file

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    options = {"epochs": 2, "device_batch": 2, "held_out": 0}
    main(command(base_folder, pairs_file, whole, **options))
    words = command(base_folder, pairs_file, killed, **options)
    (process,) = start_processes(1, lambda: main(words), tmp_path / "log")
    until = time.monotonic() + 120
    while RunDirectory(killed).last_checkpoint() is None and time.monotonic() < until:
        time.sleep(0.01)
    os.kill(process, signal.SIGKILL)
    assert wait([process], 10) == [-signal.SIGKILL]
    assert not (killed / "adapter").exists()
    main([*words, "--resume"])
    losses = [[m["loss"] for m in RunDirectory(run).read_metrics() if "loss" in m] for run in (whole, killed)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    theirs = load_file(whole / "adapter" / "adapter_model.safetensors")
    for name, weight in load_file(killed / "adapter" / "adapter_model.safetensors").items():
        torch.testing.assert_close(weight, theirs[name], rtol=0, atol=1e-6)


def test_the_adapter_of_a_run_goes_on_and_stock_peft_loads_it_on_the_first_base(base_folder, pairs_file, tmp_path):
    """Twice over: a fine-tuning of a fine-tuning of an extension still goes on the model that was extended."""
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForCausalLM

    from longlora.model.loading import load

    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    main(command(base_folder, pairs_file, first, rank=4, method="linear", held_out=0))
    main(command(first, pairs_file, second, context=None, held_out=0))
    main(command(second, pairs_file, third, context=512, held_out=0))
    tokens = torch.arange(40)[None]
    for run, window in ((second, 256), (third, 512)):
        record = json.loads((run / "adapter" / "adapter_config.json").read_text())
        assert record["base_model_name_or_path"] == str(base_folder)
        assert record["r"] == 4
        config = AutoConfig.from_pretrained(run / "adapter")
        assert config.max_position_embeddings == window
        stock = AutoModelForCausalLM.from_pretrained(base_folder, config=config)
        stock = PeftModel.from_pretrained(stock, run / "adapter")
        ours, _ = load(run)
        merged, _ = load(run, merge=True)
        with torch.no_grad():
            expected = stock.eval()(tokens).logits
            torch.testing.assert_close(ours(tokens).logits, expected, rtol=0, atol=1e-5)
            torch.testing.assert_close(merged(tokens).logits, expected, rtol=0, atol=1e-3)
            before, _ = load(first)
            assert (before(tokens).logits - expected).abs().max() > 1e-2  # it did go on training
    assert yaml.safe_load((second / "settings.yaml").read_text())["base"] == str(base_folder)


def test_the_originals_format_can_be_chosen_for_a_chat_model(base_folder, pairs_file, tmp_path, capsys):
    from longlora.model.loading import load_tokenizer

    long = tmp_path / "long.jsonl"
    write_pairs(long, [*make_pairs(4, seed=1), question_and_answer("word " * 80 + "?", "yes")])
    words = command(
        base_folder, pairs_file, tmp_path / "run", prompt_format="inst", steps=1, epochs=None, evaluation_data=long
    )
    main([*words, "--json"])
    data = json.loads(capsys.readouterr().out)["data"]
    assert data["prompt_format"] == "inst"
    assert (data["examples"], data["held_out"], data["too_long"]["pairs"]) == (24, 4, 0)
    assert data["held_out_too_long"] == {"pairs": 1, "where": [f"{long}:5"]}
    asked = load_tokenizer(tmp_path / "run").apply_chat_template([{"role": "user", "content": "Who?"}], tokenize=False)
    assert asked == "[INST]Who?[/INST]"


def test_a_model_without_a_template_is_taught_the_originals_and_keeps_it(pairs_file, tiny_model, tmp_path, capsys):
    from longlora.model.loading import load_tokenizer

    tokenizer = tokenizers.untemplated()
    tiny_model("llama", vocab_size=len(tokenizer), max_position_embeddings=256).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    main(command(tmp_path / "base", pairs_file, tmp_path / "run", context=None, train="full"))
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()
    saved = load_tokenizer(tmp_path / "run")
    asked = saved.apply_chat_template([{"role": "user", "content": "Who?"}], tokenize=False)
    assert asked == "<s>[INST]Who?[/INST]"
    assert saved.model_max_length == 256
    assert "before" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------ mistakes


def failing(words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return " ".join(error.split())


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"data": None}, "--data is missing: name the files of question-answer pairs"),
        ({"data": "/nowhere.jsonl"}, "'/nowhere.jsonl' does not exist"),
        ({"context": 8}, "none of the 24 pairs"),
        ({"context": 1}, "--context is 1: it must be at least 2 tokens"),
        ({"context": 64, "method": "linear"}, "--method linear has no effect: 64 tokens fit the window"),
        ({"group_size": 512}, "--group-size is 512: it must be at most the tokens of a row"),
        ({"held_out": 1}, "--held-out is 1: it is a share"),
        ({"held_out": 0.5, "evaluation_data": "DATA"}, "--held-out 0.5 has no effect beside --evaluation-data"),
        ({"epochs": 0}, "--epochs is 0"),
        ({"epochs": 2, "steps": 5}, "--epochs 2 has no effect beside --steps 5"),
        ({"steps": 0, "epochs": None}, "--steps is 0"),
        ({"prompt_format": "tempalte"}, "Did you mean 'template'?"),
        ({"full_attention_steps": 99}, "--full-attention-steps is 99: it must be at most the steps"),
        ({"train": "lora", "norm_lr": "1e-3"}, "--norm-lr is 0.001 but 'norm' does not train"),
        ({"report_to": "tensorbord"}, "--report-to names 'tensorbord'"),
    ],
)
def test_mistakes_get_a_sentence_and_leave_nothing(base_folder, pairs_file, tmp_path, capsys, changes, sentence):
    run = tmp_path / "run"
    changes = {name: str(pairs_file) if value == "DATA" else value for name, value in changes.items()}
    assert sentence in failing(command(base_folder, pairs_file, run, **changes), capsys)
    assert not run.exists()


def test_bad_pairs_are_named_by_line(base_folder, tmp_path, capsys):
    good = json.dumps({"messages": [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}]})
    file = tmp_path / "pairs.jsonl"
    for line, sentence in [
        ('{"messages": []}', "line 2"),
        ("{", "line 2: it is not valid JSON"),
        ('{"instruction": "a?", "output": ""}', "line 2: the answer is empty"),
    ]:
        file.write_text(f"{good}\n{line}\n")
        assert sentence in failing(command(base_folder, file, tmp_path / "run"), capsys)
        assert not (tmp_path / "run").exists()


def test_an_adapter_that_goes_on_takes_no_other_shape_until_it_is_merged(base_folder, pairs_file, tmp_path, capsys):
    first, second, merged = (tmp_path / name for name in ("first", "second", "merged"))
    once = {"steps": 1, "epochs": None, "held_out": 0, "rank": 4}
    main(command(base_folder, pairs_file, first, **(once | {"rank": 8})))
    words = command(first, pairs_file, second, context=None, **once)
    assert "--rank, --alpha and --lora-dropout have no effect" in failing(words, capsys)
    assert not second.exists()
    main(["merge", str(first), "--output", str(merged)])
    main(command(merged, pairs_file, second, context=None, **once))
    record = json.loads((second / "adapter" / "adapter_config.json").read_text())
    assert (record["base_model_name_or_path"], record["r"]) == (str(merged), 4)
    config = json.loads((second / "adapter" / "config.json").read_text())
    assert config["max_position_embeddings"] == 256  # the window of the first run


def test_steps_that_never_warm_up_are_said(base_folder, pairs_file, tmp_path, capsys, caplog):
    main(command(base_folder, pairs_file, tmp_path / "run", warmup_steps=20, batch=64))
    assert "fewer than --batch 64" in caplog.text
    assert "the learning rate never reaches --lr" in caplog.text


def test_two_processes_fine_tune_what_one_does(base_folder, pairs_file, tmp_path):
    """Also where the last step of an epoch has a row too few for both, and what is held out is shared out."""
    log = tmp_path / "log"
    options = {"epochs": 2, "batch": 2, "held_out": 0.2}
    main(command(base_folder, pairs_file, tmp_path / "one", **options))
    two = command(base_folder, pairs_file, tmp_path / "two", **options)
    assert together(2, lambda: main(two), log) == [0, 0], log.read_text()[-3000:]
    one, two = RunDirectory(tmp_path / "one"), RunDirectory(tmp_path / "two")
    losses = [[record["loss"] for record in run.read_metrics() if "loss" in record] for run in (one, two)]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    summaries = [run.read_evaluation("summary") for run in (one, two)]
    assert summaries[0]["data"]["rows"] % 2 == 1
    for name, measured in summaries[0]["answers"].items():
        assert summaries[1]["answers"][name]["nll"] == pytest.approx(measured["nll"], abs=1e-5)
    assert log.read_text().count("loss of 4 held-out answers") == 1
    ours, theirs = (load_file(run.adapter / "adapter_model.safetensors") for run in (one, two))
    for name, weight in ours.items():
        torch.testing.assert_close(weight, theirs[name], rtol=0, atol=1e-5)
