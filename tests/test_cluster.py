"""Several processes against one: the same losses and weights on every engine, and any number goes on from any."""

import importlib.util
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from several_processes import die_at, slowly_after, start, together, wait
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from longlora.cli import main
from longlora.run_directory import RunDirectory

ENGINES = {
    "ddp": {},
    "fsdp2": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"},
    "zero2": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2", "DS_ACCELERATOR": "cpu"},
    "zero3": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3", "DS_ACCELERATOR": "cpu"},
}
WITHOUT_DEEPSPEED = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="DeepSpeed is not installed: DS_BUILD_OPS=0 pip install --no-build-isolation deepspeed",
)
STEPS = 5


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_model, tiny_tokenizer) -> Path:
    """A folder with `tied`, `untied` (models) and `documents`."""
    folder = tmp_path_factory.mktemp("cluster")
    for name in ("tied", "untied"):
        model = tiny_model("llama", vocab_size=257, tie_word_embeddings=name == "tied")
        model.save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    (folder / "documents").mkdir()
    words = "tree sum node left right token window group head value long short read write".split()
    draw = random.Random(0)
    for number in range(14):
        text = " ".join(draw.choice(words) for _ in range(60 if number % 2 else draw.randrange(4, 60)))
        (folder / "documents" / f"{number:02}.txt").write_text(text)
    return folder


def command(place: Path, output: Path, base: str = "tied", **changes: object) -> list[str]:
    options = {
        "data": place / "documents",
        "context": 128,
        "output": output,
        "steps": STEPS,
        "batch": 4,
        "lr": "1e-3",
        "warmup-steps": 2,
        "dtype": "float32",
        "stride": 128,
        "contexts": 128,
        "save-every": 3,
    } | {name.replace("_", "-"): value for name, value in changes.items()}
    words = ["extend", str(place / base)]
    for name, value in options.items():
        words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return words


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in RunDirectory(run).read_metrics() if "loss" in record]


def result(run: Path) -> dict[str, torch.Tensor]:
    return load_file(next(file for part in ("adapter", "model") for file in (run / part).glob("*model.safetensors")))


def assert_same(run: Path, other: Path) -> None:
    assert losses(run) == pytest.approx(losses(other), abs=1e-5)
    ours, theirs = result(run), result(other)
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        torch.testing.assert_close(weight, theirs[name], rtol=0, atol=1e-5)


def cut_back(run: Path, to: Path, step: int) -> Path:
    """A copy of `run` as a kill -9 after `step` and before the next checkpoint leaves it."""
    shutil.copytree(run, to)
    for folder in (to / "adapter", to / "model", *to.glob("checkpoint-*")):
        if folder.name != f"checkpoint-{step}":
            shutil.rmtree(folder, ignore_errors=True)
    return to


@pytest.fixture(scope="module")
def one(place) -> "Iterator[dict[tuple[str, str], Path]]":
    """The run of one process for each (base, what trains), made when it is first asked for."""

    class Runs(dict):
        def __missing__(self, key: tuple[str, str]) -> Path:
            run = place / "-".join(("one", *key))
            main(command(place, run, key[0], train=key[1]))
            return self.setdefault(key, run)

    return Runs()


def no_compiling() -> None:
    """DeepSpeed would compile an extension for processes that share memory."""
    if "deepspeed" in sys.modules or os.environ.get("ACCELERATE_USE_DEEPSPEED"):
        import deepspeed  # noqa: F401

        sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None


def note_shards(file: Path) -> None:
    """Has `shard` note for each layer whether it is a unit, and the share of its numbers that this process holds."""
    from torch.distributed.fsdp import FSDPModule

    import longlora.training.extension as extension
    from longlora.model.lm_head import unwrapped
    from longlora.model.memory_saving.tiled_mlp import decoder_layers

    own = extension.shard

    def noting(model: torch.nn.Module) -> torch.nn.Module:
        own(model)
        layers = decoder_layers(unwrapped(model))
        parts = [[(p.to_local().numel(), p.numel()) for p in layer.parameters()] for layer in layers]
        shares = [sum(mine for mine, _ in part) / sum(whole for _, whole in part) for part in parts]
        file.write_text(json.dumps([[isinstance(x, FSDPModule) for x in layers], shares]))
        return model

    extension.shard = noting


LORA, FULL = "lora,norm,embed", "full"


@pytest.mark.parametrize(
    ("engine", "base", "train"),
    [
        ("ddp", "tied", LORA),
        ("ddp", "untied", FULL),
        ("fsdp2", "tied", LORA),
        ("fsdp2", "untied", FULL),
        ("fsdp2", "tied", FULL),
        *(
            pytest.param(engine, base, train, marks=WITHOUT_DEEPSPEED)
            for engine in ("zero2", "zero3")
            for base, train in (("tied", LORA), ("untied", FULL))
        ),
    ],
)
def test_two_processes_are_one(place, one, tmp_path, engine, base, train):
    """Losses and weights; what they wrote one goes on from, and they from what one wrote."""
    run, log, shards = tmp_path / "two", tmp_path / "log", tmp_path / "shards"
    from_one = cut_back(one[base, train], tmp_path / "from-one", 3)

    def work(*words: str) -> None:
        no_compiling()
        note_shards(shards)
        main(list(words))

    if engine.startswith("zero"):
        import deepspeed  # noqa: F401  # once, and not in each of the processes

    for words in (command(place, run, base, train=train), [*command(place, from_one, base, train=train), "--resume"]):
        statuses = together(2, lambda words=words: work(*words), log, **ENGINES[engine])
        assert statuses == [0, 0], log.read_text()[-4000:]
    assert_same(run, one[base, train])
    assert_same(from_one, one[base, train])
    if engine == "fsdp2":
        units, shares = json.loads(shards.read_text())
        assert units == [True, True]
        assert shares == pytest.approx([0.5, 0.5], abs=0.02)
    lines = log.read_text().splitlines()
    assert sum("perplexity of base model" in line for line in lines) == 1
    alone = cut_back(run, tmp_path / "alone", 3)
    main([*command(place, alone, base, train=train), "--resume"])
    assert_same(alone, one[base, train])


def test_what_several_processes_save_stock_peft_loads(place, tmp_path):
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForCausalLM

    run, log = tmp_path / "run", tmp_path / "log"
    words = command(place, run, "untied", steps=2, evaluation_tokens=0)
    statuses = together(4, lambda: main(words), log, **ENGINES["fsdp2"])
    assert statuses == [0] * 4, log.read_text()[-4000:]
    main(["merge", str(run / "checkpoint-2"), "--output", str(tmp_path / "merged")])
    config = AutoConfig.from_pretrained(run / "adapter")
    base = AutoModelForCausalLM.from_pretrained(place / "untied", config=config, dtype=torch.float32)
    stock = PeftModel.from_pretrained(base, run / "adapter").eval()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    ids = torch.arange(200)[None]
    with torch.no_grad():
        torch.testing.assert_close(stock(ids).logits, merged(ids).logits, rtol=0, atol=1e-3)


def test_the_last_step_of_an_epoch_repeats_no_row(place, tmp_path):
    """Rows that do not divide: 7 documents' worth over 4 at a time, three epochs."""
    options = {"steps": 7, "max_tokens": 1700, "evaluation_tokens": 0}
    main(command(place, tmp_path / "one", **options))
    log = tmp_path / "log"
    assert together(2, lambda: main(command(place, tmp_path / "two", **options)), log) == [0, 0], log.read_text()
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, "FSDP version 1"),
        (
            {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_CP_SIZE": "2"},
            "context parallelism (size 2)",
        ),
        ({"WORLD_SIZE": "3"}, "--batch is 4: it must be a multiple of --device-batch x processes, 1 x 3"),
    ],
)
def test_what_cannot_train_is_refused_before_anything_is_loaded(
    place, tmp_path, monkeypatch, capsys, environment, sentence
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match="2"):
        main(command(place, tmp_path / "run"))
    assert sentence in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()


def test_several_gpus_under_one_process_are_refused(place, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    with pytest.raises(SystemExit, match="2"):
        main(command(place, tmp_path / "run"))
    assert "8 GPUs are visible and one process was started" in capsys.readouterr().err


def test_processes_that_see_different_folders_are_told(place, tmp_path):
    """Each process has an output folder of its own, as two machines without a shared disk have."""
    log = tmp_path / "log"

    def work() -> None:
        machine = tmp_path / f"machine-{os.environ['RANK']}"
        machine.mkdir()
        os.chdir(machine)
        main(command(place, Path("run")))

    assert together(2, work, log) == [2, 2]
    assert log.read_text().count("is not one folder for all processes") == 1


def test_a_process_that_dies_is_named(place, tmp_path):
    log = tmp_path / "log"

    def work() -> None:
        die_at(2, rank=1)
        main(command(place, tmp_path / "run"))

    began = time.monotonic()
    assert together(2, work, log) == [1, -signal.SIGKILL]
    assert "process 1 of 2" in log.read_text()
    assert time.monotonic() - began < 120


@pytest.mark.slow
def test_sigterm_to_the_launcher_writes_a_checkpoint(place, one, tmp_path):
    """torchrun's own launcher, whose two processes are forked from this one."""
    run, log = tmp_path / "run", tmp_path / "log"
    words = command(place, run, save_every=100)

    def launch() -> None:
        where = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "run_id": "sigterm"}
        elastic_launch(LaunchConfig(1, 1, 2, start_method="fork", **where), slowly_after)(2, words)

    (launcher,) = start(1, launch, log)
    while len(losses(run)) < 2 and psutil.Process(launcher).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.02)
    os.kill(launcher, signal.SIGTERM)
    assert wait([launcher], 120) != [0]
    checkpoint = RunDirectory(run).last_checkpoint(verify=True)
    assert checkpoint is not None, log.read_text()[-3000:]
    assert log.read_text().count("stopped by SIGTERM after step") == 1
    main([*words, "--resume"])
    assert_same(run, one["tied", LORA])


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts the pages of processes as Linux does")
def test_two_processes_load_one_copy_between_them(place, tmp_path, tiny_model, tiny_tokenizer):
    """Peak of the pages of both, shared ones counted once, above what they had before; the kernel counts."""
    from longlora.cli import parse
    from longlora.training.common import load_for_training
    from longlora.training.sharding import shard

    sizes = {"vocab_size": 4096, "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 8}
    make = lambda: tiny_model("llama", num_hidden_layers=6, **sizes).save_pretrained(tmp_path / "base")  # noqa: E731
    assert together(1, make, tmp_path / "log") == [0]
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    size = (tmp_path / "base" / "model.safetensors").stat().st_size
    assert 390e6 < size < 460e6
    small, large = (
        parse(["extend", str(model), "--data", ".", "--context", "128", "--dtype", "float32", "--output", "run"])[1]
        for model in (place / "untied", tmp_path / "base")
    )

    def work() -> None:
        from longlora import ranks

        ranks.join()
        shard(load_for_training(small)[0])  # for what is imported on the way
        ranks.wait_for_all()
        (tmp_path / f"waits-{ranks.rank()}").touch()
        while not (tmp_path / "go").exists():
            time.sleep(0.01)
        model, _ = load_for_training(large)
        shard(model)
        ranks.wait_for_all()
        (tmp_path / "loaded").touch()
        time.sleep(0.5)

    def pages() -> int:
        return sum(psutil.Process(child).memory_full_info().pss for child in children)

    children = start(2, work, tmp_path / "log", **ENGINES["fsdp2"])
    until = time.monotonic() + 120
    while len(list(tmp_path.glob("waits-*"))) < 2 and time.monotonic() < until:
        time.sleep(0.05)
    before = peak = pages()
    (tmp_path / "go").touch()
    while not (tmp_path / "loaded").exists() and time.monotonic() < until:
        peak = max(peak, pages())
    after = pages()
    assert wait(children, 60) == [0, 0], (tmp_path / "log").read_text()[-3000:]
    assert peak - before < 1.3 * size
    assert after - before < 1.15 * size
