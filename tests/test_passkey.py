"""Passkey: the original's prompts to the letter, the grid filled to the token, scoring, resuming, and the command."""

import json
import os
import re
import signal
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from several_processes import start as start_processes
from several_processes import wait
from tiny_runs import make_run, save_base

from longlora.cli import main
from longlora.errors import UserError
from longlora.evaluation import loading, passkey, passkey_prompts, retrieval
from longlora.evaluation.passkey import evaluate_passkey, grid_task, original_task, passkey_table
from longlora.evaluation.passkey_prompts import draw_keys, filled, original_prompt, prompt
from longlora.evaluation.prompting import PromptFormat
from longlora.settings import PasskeySettings

# ------------------------------------------------------------------------------------------------ the original's words


def as_the_original_writes_it(n_garbage, seed):
    """`generate_prompt_landmark` of dvlab-research/LongLoRA, read again: the prompt and the key."""
    np.random.seed(seed)
    before = np.random.randint(0, n_garbage)
    endless = " ".join(
        ["The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."] * 5000
    )
    key = np.random.randint(1, 50000)
    parts = (
        "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. I will quiz you "
        "about the important information there.",
        endless[:before],
        f"The pass key is {key}. Remember it. {key} is the pass key.",
        endless[: n_garbage - before],
        "What is the pass key? The pass key is",
    )
    return "\n".join(parts), key


@pytest.mark.parametrize("n_garbage", [1, 88, 89, 90, 1024, 3072, 119_808])
def test_the_originals_prompts_to_the_letter(n_garbage):
    for seed in range(10):
        hidden, text = original_prompt(n_garbage, seed)
        expected, key = as_the_original_writes_it(n_garbage, seed)
        assert f"{text} {hidden.opening}" == expected
        assert hidden.key == key


def test_the_originals_lengths(tiny_tokenizer, tiny_model):
    """`int(3.75 * (i + 1) * args.interval // 1024 * 1024)` characters for i in range(max_tokens // interval)."""
    asked = PasskeySettings(models=("x",), interval=1000, contexts=(4500,), trials=2)
    task = original_task(asked, PromptFormat(tiny_tokenizer()), tiny_model("llama").config)
    assert [question.cell["context"] for question in task.questions] == [1000, 1000, 2000, 2000, 3000, 3000, 4000, 4000]
    around = len(as_the_original_writes_it(3072, 0)[0]) - 3072
    characters = [int(3.75 * (i + 1) * 1000 // 1024 * 1024) for i in range(4) for _ in range(2)]
    for question, expected in zip(task.questions, characters, strict=True):
        assert abs(len(question.tokens) - around - expected) <= 4  # a byte a token; a key has 1 to 5 digits, twice
    assert [task.fits(question) for question in task.questions] == [True] * 2 + [False] * 6


# ---------------------------------------------------------------------------------------------------------- the grid


def test_the_five_parts_of_a_grid_prompt():
    hidden = draw_keys(1, 0.25, np.random.default_rng(5))
    lines = prompt(hidden, hidden[0], 400).split("\n")
    key = hidden[0].key
    assert lines[0].startswith("There is an important info hidden")
    assert lines[4] == "What is the pass key?"
    assert lines[2] == f"The pass key is {key}. Remember it. {key} is the pass key."
    assert [len(lines[1]), len(lines[3])] == [100, 300]
    assert lines[1] == lines[3][:100]


def test_several_keys_lie_at_their_places_under_names_of_their_own():
    hidden = draw_keys(5, 0.5, np.random.default_rng(0))
    assert hidden[0].place == 0.5
    text = prompt(hidden, hidden[0], 2000)
    found = re.findall(
        r"^The pass key of (\w+) is (\d+)\. Remember it\. \2 is the pass key of \1\.$", text, re.MULTILINE
    )
    assert {name: int(key) for name, key in found} == {each.name: each.key for each in hidden}
    assert len(found) == len({key for _, key in found}) == 5
    assert text.endswith(f"What is the pass key of {hidden[0].name}?")
    assert hidden[0].opening == f"The pass key of {hidden[0].name} is"
    filler = [len(line) for line in text.split("\n")[1:-1] if not line.startswith("The pass key")]
    assert sum(filler) == 2000
    before = text[: text.index(hidden[0].line)]
    assert abs(sum(len(line) for line in before.split("\n")[1:] if not line.startswith("The pass key")) - 1000) <= 1


@given(st.integers(0, 2**30), st.integers(1, 26))
@settings(max_examples=50)
def test_keys_are_different_and_below_50000(seed, keys):
    hidden = draw_keys(keys, 1.0, np.random.default_rng(seed))
    assert len({each.key for each in hidden}) == len({each.name for each in hidden}) == keys
    assert all(1 <= each.key < 50_000 and 0 <= each.place <= 1 for each in hidden)


def test_every_key_can_be_drawn():
    drawn = {draw_keys(1, 0.5, np.random.default_rng(seed))[0].key for seed in range(3000)}
    assert len(drawn) > 2800
    assert max(drawn) > 49_900
    assert min(drawn) < 100


@pytest.mark.parametrize("chat", ["no", "yes"])
@pytest.mark.parametrize("keys", [1, 3])
def test_prompts_and_answers_fill_the_context_to_the_token(chat, keys):
    """With the shipped model's merges: 4,096 entries, where a character more is often no token more."""
    from longlora.model.loading import load_config, load_tokenizer

    tokenizer = load_tokenizer("demo")
    tokenizer.chat_template = "{% for m in messages %}\n{{ m['role'] }}: {{ m['content'] }}{% endfor %}"
    asked = PasskeySettings(models=("demo",), contexts=(509, 640), depths=3, trials=2, keys=keys)
    task = grid_task(asked, PromptFormat(tokenizer, chat=chat), load_config("demo"))
    assert [len(question.tokens) + 6 for question in task.questions] == [509] * 6 + [640] * 6
    assert task.max_new_tokens == 6
    assert all(task.fits(question) for question in task.questions)
    for question in task.questions:
        text = tokenizer.decode(question.tokens)
        assert f" is {question.expected}. Remember it." in text
        assert text.endswith(" is")


def test_a_trial_is_the_same_in_every_grid(tiny_tokenizer, tiny_model):
    form, config = PromptFormat(tiny_tokenizer()), tiny_model("llama").config
    small, large = (
        grid_task(PasskeySettings(models=("x",), contexts=contexts, depths=depths, trials=trials), form, config)
        for contexts, depths, trials in (((400,), 3, 1), ((500, 400), 5, 3))
    )
    found = {question.trial: question for question in large.questions}
    for question in small.questions:
        assert found[question.trial].tokens.tolist() == question.tokens.tolist()
    other = grid_task(PasskeySettings(models=("x",), contexts=(400,), depths=3, trials=1, seed=1), form, config)
    assert [question.expected for question in other.questions] != [question.expected for question in small.questions]


class Lumpy:
    """A tokenizer in which every third character begins a token, but for some that swallow the next one."""

    def __init__(self, swallowed):
        self.swallowed = swallowed

    def __call__(self, characters):
        return np.zeros(10 + characters // 3 - (characters % 50 in self.swallowed), dtype=np.int32)


@given(
    budget=st.integers(1, 3000),
    swallowed=st.sets(st.integers(0, 49), max_size=25),
    guess=st.none() | st.integers(1, 20_000),
)
def test_filling_meets_the_budget_or_comes_as_near_as_possible(budget, swallowed, guess):
    write = Lumpy(swallowed)
    tokens, _ = filled(write, budget, guess)
    lengths = [len(write(characters)) for characters in range(3 * budget + 60)]
    if len(write(0)) > budget:
        assert len(tokens) == len(write(0))
    else:
        assert len(tokens) <= budget
        assert len(tokens) == budget or budget - len(tokens) <= 1
        assert len(tokens) in lengths


def test_filling_a_long_prompt_takes_few_tries():
    tries = []

    def write(characters):
        tries.append(characters)
        return np.zeros(50 + round(characters / 4.4), dtype=np.int32)

    tokens, characters = filled(write, 131_000)
    assert len(tokens) == 131_000
    assert len(tries) <= 8
    tries.clear()
    filled(write, 131_000, characters)
    assert len(tries) == 2


# ------------------------------------------------------------------------------------------------------------- scoring


@pytest.mark.parametrize("key", [7, 123, 49999])
def test_right_are_answers_whose_first_tokens_are_the_keys(tiny_tokenizer, key):
    """As the original compares: the first tokens, as many as the key has (a byte each here, with its space)."""
    tokenizer = tiny_tokenizer()
    right = passkey._reads_as_key(PromptFormat(tokenizer), passkey_prompts.Hidden(key, 0.5))
    key_tokens = tokenizer(f" {key}").input_ids
    for answer in (
        f" {key}",
        f" {key}.",
        f" {key}9",
        f" {key} is",
        f"{key}",
        f"\n{key}",
        f" {key - 1}",
        "",
        f" 0{key}",
    ):
        tokens = tokenizer(answer).input_ids
        assert right(tokens) == (tokens[: len(key_tokens)] == key_tokens), answer
    assert right(key_tokens)
    assert not right(key_tokens[:-1])


def teach(model, answers):
    """Let `model` answer as told: logits that point at each prompt's answer, by the prompt's tokens."""

    def forward(module, arguments, keywords, output):
        ids = keywords["input_ids"]
        cache = keywords.get("past_key_values")
        if cache is None:  # the pass that tells how long the evaluation will take
            return output
        seen.setdefault(id(cache), []).append(ids.clone())
        rows = torch.cat(seen[id(cache)], dim=1).tolist()
        for at, row in enumerate(rows):
            for prompt_tokens, answer in answers:
                start = len(row) - len(prompt_tokens)
                for length in range(len(answer)):
                    given = [*prompt_tokens, *answer[:length]]
                    if row[-len(given) :] == given and start >= 0:
                        output.logits[at, -1] = torch.nn.functional.one_hot(
                            torch.tensor(answer[length]), output.logits.shape[-1]
                        ).float()
        return output

    seen = {}
    model.register_forward_hook(forward, with_kwargs=True)


@pytest.fixture
def learned(tmp_path, tiny_model, tiny_tokenizer, monkeypatch):
    """A saved byte-level model of window 640, and how to have it know the keys that a rule picks."""
    tokenizer = tiny_tokenizer()
    folder = save_base(tmp_path / "base", tiny_model("llama", vocab_size=257, max_position_embeddings=640), tokenizer)
    load = loading.load_evaluated

    def knowing(asked, rule):
        form = PromptFormat(tokenizer)

        def loaded(name, settings):
            model, own, label = load(name, settings)
            task = (original_task if asked.interval else grid_task)(asked, form, model.config)
            known = [question for question in task.questions if rule(question)]
            teach(model, [(q.tokens.tolist(), tokenizer(f" {q.expected}.").input_ids) for q in known])
            return model, own, label

        monkeypatch.setattr(loading, "load_evaluated", loaded)

    return str(folder), knowing


def test_accuracy_by_context_and_depth(learned, capsys):
    folder, knowing = learned
    asked = PasskeySettings(models=(folder,), contexts=(500, 640), depths=3, trials=4)
    knowing(asked, lambda q: q.cell["depth"] == 1.0 or (q.cell["context"] == 500 and q.trial.endswith("/0")))
    document = evaluate_passkey(asked)
    found = {(result["context"], result["depth"]): result for result in document["results"]}
    assert {cell: result["accuracy"] for cell, result in found.items()} == {
        (500, 0.0): 0.25,
        (500, 0.5): 0.25,
        (500, 1.0): 1.0,
        (640, 0.0): 0.0,
        (640, 0.5): 0.0,
        (640, 1.0): 1.0,
    }
    assert {result["trials"] for result in document["results"]} == {4}
    assert found[640, 0.5]["tokens"] == 634
    assert {key: document[key] for key in ("model", "task", "seed", "keys", "chat", "window", "max_new_tokens")} == {
        "model": folder,
        "task": "passkey",
        "seed": 0,
        "keys": 1,
        "chat": False,
        "window": 640,
        "max_new_tokens": 6,
    }
    rows = [re.split(r"\s{2,}", line) for line in capsys.readouterr().out.splitlines()[1:5]]
    assert [(name, *(figure.split()[0] for figure in figures)) for name, *figures in rows] == [
        ("0%", "25", "0"),
        ("50%", "25", "0"),
        ("100%", "100", "100"),
        ("all", "50", "33"),
    ]
    assert rows[2][1] == "100 (51–100)", "four of four, by Wilson"


def test_the_originals_way_reports_accuracy_and_mean_tokens(learned, capsys):
    folder, knowing = learned
    asked = PasskeySettings(models=(folder,), contexts=(2000,), interval=400, trials=3, extend_to=4096)
    knowing(asked, lambda q: q.cell["context"] == 800)
    document = evaluate_passkey(asked)
    assert [(r["context"], r["accuracy"], r["trials"], r["skipped"]) for r in document["results"]] == [
        (400, 0.0, 3, 0),  # 1,024 characters, a token each here
        (800, 1.0, 3, 0),  # 2,048
        (1200, None, 0, 3),  # 4,096, beyond the window with the other lines
        (1600, None, 0, 3),
        (2000, None, 0, 3),
    ]
    expected = [len(as_the_original_writes_it(1024, seed)[0]) for seed in range(3)]
    assert document["results"][0]["tokens"] == round(np.mean(expected))
    assert "any" in capsys.readouterr().out


def test_a_prompt_exactly_at_the_window_is_asked_and_one_beyond_is_not(learned, caplog):
    folder, knowing = learned
    for context, beyond in ((640, False), (641, True)):
        asked = PasskeySettings(models=(folder,), contexts=(context,), depths=1, trials=1, json=True)
        knowing(asked, lambda q: True)
        caplog.clear()
        document = evaluate_passkey(asked)
        assert document["results"][0] == {
            "context": context,
            "depth": 0.5,
            "accuracy": 1.0,
            "low": pytest.approx(1 / (1 + 1.959964**2)),  # Wilson's end for one of one
            "high": 1.0,
            "trials": 1,
            "scores": [1],
            "skipped": 0,
            "tokens": context - 6,
        }
        # a window that the config understates is the user's to use, with a warning
        assert ("beyond the model's window of 640" in caplog.text) is beyond


def test_prompts_that_do_not_fit_are_counted(learned, caplog):
    folder, _ = learned
    asked = PasskeySettings(models=(folder,), contexts=(100, 500), depths=2, trials=3, json=True)
    document = evaluate_passkey(asked)
    assert [(r["context"], r["trials"], r["skipped"]) for r in document["results"]] == [
        (100, 0, 3),
        (100, 0, 3),
        (500, 3, 0),
        (500, 3, 0),
    ]
    assert document["results"][0]["accuracy"] is None
    assert "6 of 12 prompts do not fit" in caplog.text
    assert "–" in passkey_table([document])
    assert "6 prompts did not fit" in passkey_table([document])
    with pytest.raises(UserError, match=r"no prompt of passkey fits: the closest takes \d+ tokens with its answer"):
        evaluate_passkey(PasskeySettings(models=(folder,), contexts=(100,), json=True))


def test_learned_positions_end_at_the_window(tmp_path, tiny_tokenizer):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=257, n_positions=500, n_embd=32, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    folder = save_base(tmp_path / "gpt2", GPT2LMHeadModel(config), tiny_tokenizer())
    at = evaluate_passkey(PasskeySettings(models=(str(folder),), contexts=(500,), depths=1, trials=1, json=True))
    assert at["results"][0]["trials"] == 1
    usual = evaluate_passkey(PasskeySettings(models=(str(folder),), depths=1, trials=1, json=True))
    assert [(result["context"], result["trials"]) for result in usual["results"]] == [(125, 0), (250, 0), (500, 1)]
    with pytest.raises(UserError, match="beyond the 500 positions"):
        evaluate_passkey(PasskeySettings(models=(str(folder),), contexts=(501,), depths=1, trials=1, json=True))


def test_a_config_that_claims_more_than_the_model_can_is_measured_as_asked(learned):
    """A window in a config is a claim: the default contexts follow it, given ones need not."""
    folder, _ = learned
    config = json.loads((retrieval.Path(folder) / "config.json").read_text())
    config["max_position_embeddings"] = 1_000_000
    (retrieval.Path(folder) / "config.json").write_text(json.dumps(config))
    document = evaluate_passkey(PasskeySettings(models=(folder,), contexts=(500,), depths=1, trials=1, json=True))
    assert document["window"] == 1_000_000
    assert [result["context"] for result in document["results"]] == [500]


def test_default_contexts_are_of_the_window(tiny_tokenizer, tiny_model):
    config = tiny_model("llama", max_position_embeddings=2048).config
    task = grid_task(PasskeySettings(models=("x",), trials=1), PromptFormat(tiny_tokenizer()), config)
    assert [question.cell["context"] for question in task.questions[::5]] == [512, 1024, 2048]
    assert [question.cell["depth"] for question in task.questions[:5]] == [0.0, 0.25, 0.5, 0.75, 1.0]


# ------------------------------------------------------------------------------------------------------ kept and killed


def trials(file):
    return [json.loads(line)["trial"] for line in file.read_text().splitlines()[1:]]


def test_a_killed_run_goes_on_where_it_stopped(learned, tmp_path, monkeypatch):
    folder, knowing = learned
    asked = {"models": (folder,), "contexts": (500, 640), "depths": 2, "trials": 2, "json": True, "evaluation_batch": 1}
    knowing(PasskeySettings(**asked), lambda q: q.trial.endswith("/1"))
    whole = evaluate_passkey(PasskeySettings(**asked))

    output = str(tmp_path / "out")
    real, count = retrieval.generate_each, [0]

    def killed_after_three(*arguments, **options):
        for answer in real(*arguments, **options):
            if count[0] == 3:
                raise KeyboardInterrupt
            count[0] += 1
            yield answer

    monkeypatch.setattr(retrieval, "generate_each", killed_after_three)
    with pytest.raises(KeyboardInterrupt):
        evaluate_passkey(PasskeySettings(**asked, output=output))
    log = tmp_path / "out" / "passkey.jsonl"
    kept = trials(log)
    assert len(kept) == 3
    assert not (tmp_path / "out" / "passkey.json").exists()

    monkeypatch.setattr(retrieval, "generate_each", real)
    with pytest.raises(UserError, match="holds 3 trials of an evaluation that was stopped: give --resume"):
        evaluate_passkey(PasskeySettings(**asked, output=output))
    with pytest.raises(UserError, match="--resume: 'seed' was 0"):
        evaluate_passkey(PasskeySettings(**asked, output=output, resume=True, seed=1))
    again = evaluate_passkey(PasskeySettings(**asked, output=output, resume=True))
    assert trials(log)[:3] == kept
    assert len(set(trials(log))) == len(trials(log)) == 8
    assert (
        again["results"] == whole["results"] == json.loads((tmp_path / "out" / "passkey.json").read_text())["results"]
    )

    monkeypatch.setattr(retrieval, "generate_each", lambda *_arguments, **_options: iter(()))
    done = evaluate_passkey(PasskeySettings(**asked, output=output, resume=True))
    assert done == again


def test_trials_of_a_model_that_has_changed_are_not_taken_for_the_new_ones(learned, tmp_path):
    folder, _ = learned
    asked = {"models": (folder,), "contexts": (500,), "depths": 1, "trials": 1, "json": True, "output": str(tmp_path)}
    evaluate_passkey(PasskeySettings(**asked))
    weights = retrieval.Path(folder) / "model.safetensors"
    weights.write_bytes(weights.read_bytes())
    with pytest.raises(UserError, match="--resume: 'weights' was"):
        evaluate_passkey(PasskeySettings(**asked, resume=True))


def test_results_of_a_run_go_into_it_and_several_models_beside_each_other(learned, tmp_path, tiny_tokenizer, capsys):
    folder, _ = learned
    run = tmp_path / "run"
    make_run(run, retrieval.Path(folder), tiny_tokenizer())
    asked = {"contexts": (500,), "depths": 1, "trials": 2}
    evaluate_passkey(PasskeySettings(models=(str(run),), **asked))
    document = json.loads((run / "evaluation" / "passkey.json").read_text())
    assert document["results"][0]["trials"] == 2
    assert document["window"] == 2560
    assert len(trials(run / "evaluation" / "passkey.jsonl")) == 2

    both = evaluate_passkey(PasskeySettings(models=(str(run), folder), output=str(tmp_path / "both"), **asked))
    assert [each["model"] for each in both["models"]] == [str(run), folder]
    assert (tmp_path / "both" / "1-run" / "passkey.json").exists()
    assert (tmp_path / "both" / "2-base" / "passkey.jsonl").exists()
    assert capsys.readouterr().out.count("% of pass keys found") == 2

    beside = evaluate_passkey(PasskeySettings(models=(str(run),), baseline=folder, **asked))
    kept = json.loads((run / "evaluation" / "baseline" / "passkey.json").read_text())
    assert beside == {"baseline": kept, "models": [json.loads((run / "evaluation" / "passkey.json").read_text())]}
    assert json.loads((run / "evaluation" / "passkey.1.json").read_text()) == document
    before, after = (each["results"][0]["accuracy"] for each in (kept, beside["models"][0]))
    assert f"{run} against {folder}: 500 {100 * (after - before):+.1f} points" in capsys.readouterr().out


@pytest.mark.slow
def test_a_process_killed_for_good_leaves_whole_lines(tmp_path, capsys, caplog):
    """The command itself, killed by signal 9 while it works."""
    words = ["eval", "passkey", "demo", "--contexts", "300,512", "--trials", "4", "--evaluation-batch", "1"]
    words += ["--output", str(tmp_path / "out"), "--json"]
    (process,) = start_processes(1, lambda: main(words), tmp_path / "said")
    log, until = tmp_path / "out" / "passkey.jsonl", time.monotonic() + 120
    while time.monotonic() < until and not (log.exists() and len(log.read_bytes().splitlines()) > 5):
        time.sleep(0.02)
    os.kill(process, signal.SIGKILL)
    assert wait([process], 10) == [-signal.SIGKILL]
    kept = len(log.read_bytes().splitlines()) - 2
    assert 4 <= kept < 40
    main([*words, "--resume"])
    document = json.loads(capsys.readouterr().out)
    assert sum(result["trials"] for result in document["results"]) == len(trials(log)) == 40
    assert re.search(r"(\d+) of 40 trials are there already", caplog.text)


@pytest.mark.slow
def test_a_hundred_trials_of_the_shipped_model_take_seconds():
    """Three minutes on two cores are promised; the processor's seconds are more than the clock's there."""
    began = time.process_time()
    document = evaluate_passkey(PasskeySettings(models=("demo",), contexts=(128, 256, 384, 512), json=True))
    assert sum(result["trials"] for result in document["results"]) == 100
    assert time.process_time() - began < 180


# ------------------------------------------------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--interval", "100"], "--interval is 100: it must be at least 274 tokens"),
        (["--interval", "1000", "--depths", "3"], "--depths has no effect with --interval"),
        (["--interval", "1000", "--keys", "2"], "--keys has no effect with --interval"),
        (["--interval", "1000", "--seed", "2"], "--seed has no effect with --interval"),
        (["--interval", "1000", "--contexts", "1,2000"], "--contexts is 1"),
        (["--interval", "1000", "--contexts", "1000,2000"], "--interval takes one length"),
        (["--interval", "1000"], "--interval is 1,000, beyond the longest length of 512 tokens"),
        (["--keys", "27"], "--keys is 27: a prompt holds at most 26"),
        (["--trials", "0"], "--trials is 0"),
        (["--chat", "maybe"], "unknown --chat 'maybe': it must be one of auto, yes, no"),
        (["--chat", "yes"], "the tokenizer has no chat template"),
        (["--chat", "no", "--system", "x"], "--system is a turn of a chat, and --chat is no"),
        (["--bos", "yes"], "the tokenizer has no BOS token"),
        (["--contexts", "40"], "no prompt of passkey fits"),
    ],
)
def test_mistakes_are_one_sentence(flags, sentence, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["eval", "passkey", "demo", *flags])
    assert stopped.value.code == 2
    assert sentence in capsys.readouterr().err.splitlines()[-1]


def test_the_command_prints_one_json_object(capsys):
    main(["eval", "passkey", "demo", "--contexts", "512", "--depths", "2", "--trials", "2", "--keys", "2", "--json"])
    document = json.loads(capsys.readouterr().out)
    assert [(r["context"], r["depth"], r["trials"], r["tokens"]) for r in document["results"]] == [
        (512, 0.0, 2, 506),
        (512, 1.0, 2, 506),
    ]
    assert document["keys"] == 2
