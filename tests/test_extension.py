"""`longlora extend` from end to end on a tiny model: result, resume, equivalence with a plain Trainer, and mistakes."""

import json
import os
import random
import shutil
import signal

import pytest
import torch
import yaml
from several_processes import die_at, together
from transformers import AutoConfig

from longlora.cli import main
from longlora.evaluation import perplexity
from longlora.run_directory import RunDirectory


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory, tiny_model, tiny_tokenizer):
    folder = tmp_path_factory.mktemp("base") / "model"
    tiny_model("llama", vocab_size=257, tie_word_embeddings=True).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    folder = tmp_path_factory.mktemp("documents")
    words = "tree sum node left right token window group head value long short read write".split()
    draw = random.Random(0)
    for number in range(60):
        length = 120 if number % 2 else draw.randrange(4, 60)
        (folder / f"{number:02}.txt").write_text(" ".join(draw.choice(words) for _ in range(length)))
    return folder


def command(base_folder, documents, output, **changes):
    options = {
        "data": str(documents),
        "context": 256,
        "output": str(output),
        "steps": 4,
        "batch": 2,
        "lr": "1e-2",
        "warmup-steps": 1,
        "dtype": "float32",
        "contexts": 256,
        "stride": 128,
        "evaluation-tokens": 2048,
        "save-every": 2,
    } | {name.replace("_", "-"): value for name, value in changes.items()}
    words = ["extend", str(base_folder)]
    for name, value in options.items():
        words += [f"--{name}"] if value is True else [] if value is None else [f"--{name}", *str(value).split()]
    return words


def test_a_run_holds_everything_a_user_relies_on(base_folder, documents, tmp_path, capsys):
    run = tmp_path / "run"
    main([*command(base_folder, documents, run, contexts="64,128,256", stride=64), "--json"])
    out = capsys.readouterr()
    summary = json.loads(out.out)
    assert summary["positions"]["factor"] == 4.0
    assert summary["training"]["steps"] == 4
    assert set(summary["trainable"]["groups"]) == {"lora", "norm", "embed"}
    assert [r["context"] for r in summary["evaluation"]["trained"]["results"]] == [64, 128, 256]
    assert summary["evaluation"]["trained"]["results"][-1]["perplexity"] < 200
    settings = yaml.safe_load((run / "settings.yaml").read_text())
    assert settings["lr"] == 0.01
    assert settings["versions"]["torch"] == torch.__version__
    metrics = RunDirectory(run).read_metrics()
    assert [m["step"] for m in metrics if "loss" in m] == [1, 2, 3, 4]
    assert {"loss", "learning_rate", "tokens_per_second", "memory_bytes", "tokens"} <= set(metrics[0])
    config = json.loads((run / "adapter" / "config.json").read_text())
    assert config["max_position_embeddings"] == 256
    assert config["rope_parameters"]["rope_type"] == "yarn"
    assert config["rope_parameters"]["factor"] == 4.0
    assert (run / "report.html").stat().st_size > 1000
    checkpoint = json.loads((run / "checkpoint-4" / "config.json").read_text())
    assert checkpoint["rope_parameters"] == config["rope_parameters"]

    read = ["--data", str(documents / "00.txt"), "--stride", "64", "--json", "--contexts"]
    main(["eval", "perplexity", str(run), *read, "256"])
    assert json.loads(capsys.readouterr().out)["results"][0]["context"] == 256
    main(["merge", str(run), "--output", str(tmp_path / "merged")])
    main(["eval", "perplexity", str(tmp_path / "merged"), *read, "64"])


def test_full_fine_tuning_saves_a_model(base_folder, documents, tmp_path):
    main(command(base_folder, documents, tmp_path / "run", train="full", steps=1))
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()
    assert AutoConfig.from_pretrained(tmp_path / "run" / "model").use_cache, "generation would read everything anew"
    assert not (tmp_path / "run" / "adapter").exists()


def losses(run):
    return [record["loss"] for record in RunDirectory(run).read_metrics() if "loss" in record]


def adapter_weights(run):
    from safetensors.torch import load_file

    return load_file(run / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize("drawn", [False, True])
def test_a_killed_run_resumes_to_the_same_result(base_folder, documents, tmp_path, drawn):
    random_choices = {"pattern": "scatter", "vary_offset": True, "full_layers_share": 0.5} if drawn else {}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    main(command(base_folder, documents, whole, steps=6, **random_choices))
    words = command(base_folder, documents, killed, steps=6, **random_choices)

    def work() -> None:
        die_at(5)
        main(words)

    assert together(1, work, tmp_path / "log") == [-signal.SIGKILL]
    assert not (killed / "adapter").exists()
    main([*words, "--resume"])
    assert losses(killed) == pytest.approx(losses(whole), rel=1e-6)
    theirs = adapter_weights(whole)
    for name, weight in adapter_weights(killed).items():
        torch.testing.assert_close(weight, theirs[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("train", ["lora,norm,embed", "full"])
def test_a_run_killed_after_its_last_step_trains_no_more(base_folder, documents, tmp_path, train):
    words = command(base_folder, documents, tmp_path / "run", steps=4, train=train, save_every=2)
    main(words)
    part = tmp_path / "run" / ("model" if train == "full" else "adapter")
    weights = next(part.glob("*model.safetensors"))
    before, trained = weights.read_bytes(), losses(tmp_path / "run")
    shutil.rmtree(part)  # as if killed between the last checkpoint and the saving of the result
    main([*words, "--resume"])
    assert losses(tmp_path / "run") == trained
    assert weights.read_bytes() == before


def test_fewer_steps_than_are_trained_is_an_error(base_folder, documents, tmp_path, capsys):
    main(command(base_folder, documents, tmp_path / "run", steps=4, save_every=4))
    shutil.rmtree(tmp_path / "run" / "adapter")
    words = command(base_folder, documents, tmp_path / "run", steps=2, save_every=4)
    with pytest.raises(SystemExit, match="2"):
        main([*words, "--resume"])
    assert "has trained 4 steps and --steps is 2" in capsys.readouterr().err


@pytest.mark.parametrize("packing", ["concatenate", "isolate"])
def test_full_pattern_equals_a_plain_trainer_with_peft(base_folder, documents, tmp_path, packing):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, set_seed

    from longlora.corpus.packing import pack
    from longlora.corpus.tokens import tokenize_corpus
    from longlora.model.positions import extend_positions
    from longlora.settings import CorpusSettings

    run = tmp_path / "run"
    options = {"pattern": "full", "train": "lora", "packing": packing, "evaluation_data": str(documents)}
    main(command(base_folder, documents, run, **options))

    model = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    extend_positions(model, 256, "yarn")
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    rows = pack(tokenize_corpus(tokenizer, CorpusSettings(data=(str(documents),))), context=256, packing=packing)
    # Stock attention tells packed documents apart by their positions, and only where no padding mask is given.
    rows = [{name: x for name, x in rows[index].items() if name != "attention_mask"} for index in range(len(rows))]
    set_seed(0)
    target = ["q_proj", "k_proj", "v_proj", "o_proj"]
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=target, task_type="CAUSAL_LM"))
    arguments = TrainingArguments(
        str(tmp_path / "plain"),
        max_steps=4,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=1,
        weight_decay=0.0,
        adam_beta2=0.95,
        seed=0,
        data_seed=0,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        remove_unused_columns=False,
        disable_tqdm=True,
        use_cache=False,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    plain = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses(run) == pytest.approx(plain, rel=1e-5)


def test_the_whole_logits_never_exist_while_training(base_folder, documents, tmp_path):
    """With a chunk of 64 tokens, no call of the LM head sees more than 64 tokens of a row of 256."""
    seen = []

    def watch(module, inputs, output):
        if torch.is_grad_enabled() and isinstance(output, torch.Tensor) and output.shape[-1] == 257:
            seen.append(output[..., 0].numel())

    handle = torch.nn.modules.module.register_module_forward_hook(watch)
    try:
        main(command(base_folder, documents, tmp_path / "run", steps=1, loss_chunk=64))
    finally:
        handle.remove()
    assert seen
    assert max(seen) <= 64


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
        ({"context": 64}, "--context is 64: it must be above the window"),
        ({"context": 32}, "--context is 32: it must be above the window"),
        ({"group_size": 1}, "--group-size is 1: it must be at least 2"),
        ({"group_size": 512}, "--group-size is 512: it must be at most the tokens of a row, 256"),
        ({"pattern": "shfit"}, "Did you mean 'shift'?"),
        ({"method": "linaer"}, "Did you mean 'linear'?"),
        ({"train": "lora,nrom"}, "Did you mean 'norm'?"),
        ({"rank": 0}, "--rank is 0: it must be at least 1"),
        ({"data": "/nowhere/at/all"}, "/nowhere/at/all"),
        ({"data": None}, "--data is missing"),
        ({"batch": 3, "device_batch": 2}, "--batch is 3: it must be a multiple"),
        ({"steps": 0}, "--steps is 0"),
        ({"contexts": "64,256"}, "--stride is 128"),
        ({"train": "lora", "norm_lr": "1e-3"}, "--norm-lr is 0.001 but 'norm' does not train"),
        ({"report_to": "tensorbord"}, "--report-to names 'tensorbord', which is not installed here"),
        ({"lr": "fast"}, "fast"),
    ],
)
def test_mistakes_get_a_sentence_and_leave_nothing(base_folder, documents, tmp_path, capsys, changes, sentence):
    run = tmp_path / "run"
    assert sentence in failing(command(base_folder, documents, run, **changes), capsys)
    assert not run.exists()


def test_bad_documents_get_a_sentence_and_leave_nothing(base_folder, tmp_path, capsys):
    run = tmp_path / "run"
    cases = {
        "empty.txt": (b"", "empty"),
        "binary.txt": (bytes(range(256)) * 8, "binary.txt"),
        "short.txt": (b"a few words", "256"),
        "broken.jsonl": (b'{"text": "good"}\n{"text": \n', "line 2"),
        "fields.jsonl": (b'{"body": "good"}\n', "body"),
    }
    for name, (content, sentence) in cases.items():
        (tmp_path / name).write_bytes(content)
        assert sentence in failing(command(base_folder, tmp_path / name, run), capsys), name
        assert not run.exists(), name


def test_output_folders_are_protected(base_folder, documents, tmp_path, capsys):
    run = tmp_path / "run"
    words = command(base_folder, documents, run)
    assert "holds no run to go on with" in failing([*words, "--resume"], capsys)
    main(words)
    assert "already holds a run: give --resume" in failing(words, capsys)
    changed = command(base_folder, documents, run, rank=4)
    assert "'rank' was 8" in failing([*changed, "--resume"], capsys)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("mine")
    assert "is not empty and holds no run" in failing(command(base_folder, documents, foreign), capsys)
    assert sorted(os.listdir(foreign)) == ["thesis.txt"]
    log = tmp_path / "log"
    with RunDirectory(run).locked():
        for _ in range(2):  # the refused one leaves the lock of the one that runs
            assert together(1, lambda: main([*words, "--resume"]), log) == [2]
    assert log.read_text().count("is in use by another run") == 2


def test_an_unknown_recipe_key_names_the_nearest(base_folder, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("contxt: 256\n")
    words = ["extend", str(base_folder), "--config", str(recipe), "--output", str(tmp_path / "run")]
    assert "Did you mean 'context'?" in failing(words, capsys)
    recipe.write_text("context: [256\n")
    assert "is not YAML" in failing(words, capsys)
    recipe.write_text("context: many\ndata: stdlib\n")
    assert "many" in failing(words, capsys)
    assert "cannot be read" in failing([*words[:3], "nowhere.yaml", *words[4:]], capsys)


def test_flags_override_the_recipe(tmp_path):
    from longlora.cli import parse

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "model: demo\ncontext: 256\ndata: [a, b]\ncontexts: [64, 128]\ntrain: [lora, norm]\n"
        "gradient_checkpointing: false\nlr: 1.0e-3\n"
    )
    _, settings = parse(["extend", "--config", str(recipe), "--output", "x", "--lr", "5e-4"])
    assert (settings.model, settings.corpus.data, settings.perplexity.contexts) == ("demo", ("a", "b"), (64, 128))
    assert settings.trainable.train == ("lora", "norm")
    assert settings.training.gradient_checkpointing is False
    assert settings.training.lr == 5e-4
    _, settings = parse(["extend", "other", "--config", str(recipe), "--output", "x", "--data", "c"])
    assert (settings.model, settings.corpus.data) == ("other", ("c",))


def test_a_diverging_loss_is_said_to_be_one(base_folder, documents, tmp_path, capsys):
    words = command(base_folder, documents, tmp_path / "run", lr="1e30", train="full", max_grad_norm=0, steps=20)
    assert "lower --lr" in failing(words, capsys)
    assert not (tmp_path / "run" / "settings.yaml").exists() or RunDirectory(tmp_path / "run").last_checkpoint()


def test_full_attention_comes_last_and_also_after_a_resume(base_folder, documents, tmp_path, monkeypatch):
    import longlora.attention.state as backend

    patterns = []
    plan = backend.plan

    def watched(*arguments, **named):
        patterns.append(arguments[5])
        return plan(*arguments, **named)

    monkeypatch.setattr(backend, "plan", watched)
    options = {"full_attention_steps": 2, "save_every": 3, "gradient_checkpointing": None}
    words = [w for w in command(base_folder, documents, tmp_path / "run", **options) if w]
    main([*words, "--no-gradient-checkpointing"])
    calls = len(patterns) // 4  # steps
    assert patterns == ["shift"] * (2 * calls) + ["full"] * (2 * calls)
    patterns.clear()
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    main([*words, "--no-gradient-checkpointing", "--resume"])
    assert patterns == ["full"] * calls


def test_a_model_that_cannot_be_served_is_refused_before_any_work(documents, tmp_path, tiny_tokenizer, capsys):
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path / "gpt2"
    GPT2LMHeadModel(GPT2Config(vocab_size=257, n_embd=8, n_layer=1, n_head=2, n_positions=64)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    failing(command(folder, documents, tmp_path / "run"), capsys)
    assert not (tmp_path / "run").exists()


def test_held_out_perplexity_is_measured_while_training(base_folder, documents, tmp_path):
    run = tmp_path / "run"
    main(command(base_folder, documents, run, evaluate_every=2))
    measured = [record for record in RunDirectory(run).read_metrics() if "eval_loss" in record]
    assert [record["step"] for record in measured] == [2, 4]
    assert measured[1]["eval_perplexity"] < measured[0]["eval_perplexity"]


def test_more_steps_on_resume_are_measured_anew(base_folder, documents, tmp_path, capsys):
    run = tmp_path / "run"
    main(command(base_folder, documents, run, steps=1))
    first = RunDirectory(run).read_evaluation("perplexity-trained")
    main([*command(base_folder, documents, run, steps=6), "--resume"])
    second = RunDirectory(run).read_evaluation("perplexity-trained")
    assert second["results"][-1]["perplexity"] < first["results"][-1]["perplexity"]


def test_a_killed_run_does_not_measure_again(base_folder, documents, tmp_path, monkeypatch):
    """Killed while it measures the stretched model: nothing is read again but what a line of the log holds."""
    run, real, read, killed = tmp_path / "run", perplexity._score_batch, {}, []

    def counted(model, reading, places, bos):
        measured = len(list((run / "evaluation").glob("perplexity-*.json")))
        if measured == 1 and read.get(1, 0) > 600 and not killed:
            killed.append(dict(read))
            raise KeyboardInterrupt
        read[measured] = read.get(measured, 0) + sum(
            reading.windows[place][1].end - reading.windows[place][1].begin for place in places
        )
        return real(model, reading, places, bos)

    monkeypatch.setattr(perplexity, "TOKENS_A_TRIAL", 256)
    monkeypatch.setattr(perplexity, "_score_batch", counted)
    words = command(base_folder, documents, run, steps=1, stride=64, evaluation_tokens=None)
    with pytest.raises(SystemExit, match="130"):
        main(words)
    main([*words, "--resume"])
    known = [RunDirectory(run).read_evaluation(f"perplexity-{name}") for name in ("base", "untrained", "trained")]
    (once,) = {sum(result["tokens_read"] for result in each["results"]) for each in known}
    assert once > 1000
    assert (read[0], read[2]) == (once, once)
    assert killed[0][1] > 600
    assert once <= read[1] <= once + 256


def test_running_out_of_memory_is_a_sentence(base_folder, documents, tmp_path, capsys, monkeypatch):
    import longlora.training.extension as extension

    def exhausted(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(extension, "train", exhausted)
    error = failing(command(base_folder, documents, tmp_path / "run"), capsys)
    assert "out of memory (CUDA out of memory)" in error
    assert "lower --device-batch" in error
    assert "--kept-tokens" not in error


def test_short_rows_with_skipping_positions_train_for_the_whole_context(base_folder, documents, tmp_path, capsys):
    run = tmp_path / "run"
    main([*command(base_folder, documents, run, row_tokens=64, full_layers_share=0.5), "--json"])
    summary = json.loads(capsys.readouterr().out)
    assert summary["training"]["tokens"] == 4 * 2 * 64
    assert summary["attention"]["group_size"] == 16
    assert json.loads((run / "adapter" / "config.json").read_text())["max_position_embeddings"] == 256
    main([*command(base_folder, documents, tmp_path / "plain", context=256), "--json"])
    assert losses(run) != losses(tmp_path / "plain")


def test_row_tokens_that_do_not_fit_are_refused(base_folder, documents, tmp_path, capsys):
    words = command(base_folder, documents, tmp_path / "run", row_tokens=300)
    assert "--row-tokens is 300: it must be from 2 tokens to the context, 256" in failing(words, capsys)
    words = command(base_folder, documents, tmp_path / "run", row_tokens=64, packing="isolate")
    assert "give --packing concatenate with it" in failing(words, capsys)


@pytest.mark.parametrize("name", ["best", "paper"])
def test_a_recipe_of_the_package_is_where_settings_start(name):
    from longlora.cli import parse
    from longlora.settings import RECIPES

    assert name in RECIPES
    words = f"extend demo --data stdlib --context 4096 --output x --recipe {name}".split()
    settings = parse(words)[1]
    assert settings.recipe == name
    assert (settings.positions.method == "linear") == (name == "paper")
    assert (settings.attention.full_layers_share > 0) == (name == "best")
    assert parse([*words, "--method", "ntk"])[1].positions.method == "ntk"


def test_an_unknown_recipe_names_the_nearest(capsys):
    assert "Did you mean 'best'?" in failing(
        "extend demo --recipe bset --data x --context 9 --output x".split(), capsys
    )


def test_memory_counts_from_the_start_of_training_and_ddp_searches_for_nothing(tmp_path):
    from longlora.settings import MemorySettings, TrainingSettings
    from longlora.training.callbacks import forget_peak_memory, peak_memory
    from longlora.training.trainer import _trainer_arguments

    evaluated = b"x" * 300_000_000
    before = peak_memory()
    del evaluated
    forget_peak_memory()
    assert peak_memory() < before - 200e6
    arguments = _trainer_arguments(TrainingSettings(), tmp_path, evaluates=False, memory=MemorySettings())
    assert arguments.ddp_find_unused_parameters is False
