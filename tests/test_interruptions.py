"""What can happen to a run: damage, full disks, changed data, signals, a second start, a clock that is wrong.

A run ends in the result of the run that nothing happened to, or in a sentence; never in another result.
"""

import errno
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors import SafetensorError
from several_processes import slowly_after, start, wait
from test_cluster import assert_same, command, cut_back, losses, one, place, result  # noqa: F401

from longlora.cli import main
from longlora.errors import REQUEUE
from longlora.run_directory import RunDirectory


@pytest.fixture(scope="module")
def whole(one) -> Path:  # noqa: F811
    """A run of one process from end to end, with checkpoints 3 and 5."""
    return one["tied", "lora,norm,embed"]


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(words)
    error = " ".join(capsys.readouterr().err.split())
    assert stop.value.code == 2, error
    assert "Traceback" not in error
    return error


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, lambda file: file.write_bytes(b""), flip, Path.unlink])
def test_a_checkpoint_with_any_file_damaged_is_passed_over(whole, tmp_path, damage):
    files = [file.relative_to(whole) for file in (whole / "checkpoint-5").rglob("*") if file.is_file()]
    assert len(files) >= 7
    for name in files:
        run = tmp_path / "run"
        shutil.copytree(whole, run)
        damage(run / name)
        assert RunDirectory(run).last_checkpoint(verify=True) == run / "checkpoint-3", name
        shutil.rmtree(run)


def test_a_run_goes_back_to_the_last_whole_checkpoint_and_says_so(place, whole, tmp_path, caplog):  # noqa: F811
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    shutil.rmtree(run / "adapter")
    flip(next((run / "checkpoint-5" / "state").iterdir()))
    flip(run / "evaluation" / "perplexity-base.json")
    (run / "evaluation" / "perplexity-untrained.json").write_text("{")
    main([*command(place, run), "--resume"])
    assert "checkpoint-5 is not whole" in caplog.text
    assert_same(run, whole)


def test_checkpoints_go_by_their_steps_whatever_the_clock_says(place, whole, tmp_path):  # noqa: F811
    run = cut_back(whole, tmp_path / "run", 3)
    for file in run.rglob("*"):
        os.utime(file, (4e9, 4e9))  # the clock was ahead, and has stepped back
    for name in ("checkpoint-10", "checkpoint-9"):
        shutil.copytree(run / "checkpoint-3", run / name, copy_function=shutil.copyfile)
    assert RunDirectory(run).last_checkpoint(verify=True) == run / "checkpoint-10"
    for name in ("checkpoint-10", "checkpoint-9"):
        shutil.rmtree(run / name)
    main([*command(place, run, save_every=1), "--resume"])
    assert [folder.name for folder in RunDirectory(run).checkpoints()] == ["checkpoint-5", "checkpoint-4"]
    assert_same(run, whole)


def test_a_moved_run_goes_on_and_changed_documents_are_noticed(place, whole, tmp_path, capsys):  # noqa: F811
    moved = cut_back(whole, tmp_path / "moved", 3)
    main([*command(place, moved), "--resume"])
    assert_same(moved, whole)
    changed = cut_back(whole, tmp_path / "changed", 3)
    words = [*command(place, changed), "--resume"]
    more = place / "documents" / "more.txt"
    more.write_text("another document " * 20)
    error = refused(words, capsys)
    assert "the text to train on is not what this run began with" in error
    assert "--accept-changes" in error
    measured = changed / "evaluation" / "perplexity-base.json"
    before = measured.stat().st_mtime_ns
    main([*words, "--accept-changes"])
    more.unlink()
    assert measured.stat().st_mtime_ns > before  # measured anew, on whatever is held out now
    assert "has no effect without --resume" in refused([*command(place, tmp_path / "x"), "--accept-changes"], capsys)


def test_a_changed_setting_is_refused_or_accepted(place, whole, tmp_path, capsys):  # noqa: F811
    run = cut_back(whole, tmp_path / "run", 3)
    words = [*command(place, run, lr="1e-2"), "--resume"]
    assert "'lr' was 0.001" in refused(words, capsys)
    main([*words, "--accept-changes"])
    never = [*command(place, run, rank=4), "--resume", "--accept-changes"]
    assert "'rank' was 8" in refused(never, capsys)


PLACES = {
    "settings": ("longlora.run_directory.write_whole", OSError(errno.ENOSPC, "No space left on device", "settings")),
    "tokens": ("longlora.corpus.tokens._write_entry", OSError(errno.ENOSPC, "No space left on device")),
    "metrics": ("longlora.run_directory.json", OSError(errno.EDQUOT, "Disk quota exceeded")),
    "weights": (
        "longlora.training.checkpoints.save_adapter",
        SafetensorError("I/O error: No space left (os error 28)"),
    ),
    "state": (
        "longlora.training.checkpoints.dcp.save",
        RuntimeError("unexpected pos 64 vs 0: No space left on device"),
    ),
    "random": ("longlora.training.checkpoints.save_file", SafetensorError("Error while serializing: os error 28")),
    "manifest": ("longlora.training.checkpoints.write_manifest", OSError(errno.ENOSPC, "No space left on device")),
    "trainer": ("transformers.TrainerState.save_to_json", OSError(errno.ENOSPC, "No space left on device")),
    "result": ("longlora.training.common.save_model", SafetensorError("I/O error: No space left on device")),
    "report": ("longlora.training.extension.write_report", OSError(errno.EFBIG, "File too large")),
}


@pytest.mark.parametrize("at", PLACES)
def test_a_full_disk_is_a_sentence_and_resumes(place, whole, tmp_path, capsys, monkeypatch, at):  # noqa: F811
    run = tmp_path / "run"
    name, error = PLACES[at]
    fresh = at in ("settings", "tokens")
    if not fresh:
        cut_back(whole, run, 3)
    words = command(place, run, data=place / "documents" if not fresh else place / "documents" / "01.txt", steps=4)

    def full(*_: object, **__: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setenv("LONGLORA_CACHE", str(tmp_path / "cache"))
        patch.setattr(name, SimpleNamespace(**(vars(json) | {"dumps": full})) if at == "metrics" else full)
        assert "disk is full" in refused(words if fresh else [*words, "--resume"], capsys)
    if not fresh:
        last = RunDirectory(run).last_checkpoint(verify=True)
        assert last is not None
        assert last.name == ("checkpoint-4" if at in ("result", "report") else "checkpoint-3")
        assert not list(run.glob(".checkpoint-*"))
    if at in ("weights", "result"):
        main([*words, "--resume"])
        assert losses(run) == pytest.approx(losses(whole)[:4], abs=1e-6)


def test_an_output_folder_that_disappears_is_a_sentence(place, tmp_path, capsys, monkeypatch):  # noqa: F811
    import longlora.training.trainer as trainer

    run = tmp_path / "run"
    own = trainer.MetricsCallback.on_step_end

    def losing(self, args, state, *rest, **more):  # type: ignore[no-untyped-def]
        own(self, args, state, *rest, **more)
        if state.global_step == 2:
            run.rename(tmp_path / "elsewhere")

    monkeypatch.setattr(trainer.MetricsCallback, "on_step_end", losing)
    assert f"--output {run} is gone" in refused(command(place, run), capsys)


@pytest.mark.parametrize(("number", "processes"), [(signal.SIGTERM, 1), (signal.SIGUSR1, 2)])
def test_a_signal_writes_a_checkpoint_after_the_step(place, whole, tmp_path, number, processes):  # noqa: F811
    run, log = tmp_path / "run", tmp_path / "log"
    words = command(place, run, save_every=100)
    children = start(processes, lambda: slowly_after(2, words), log)
    until = time.monotonic() + 120
    while len(losses(run)) < 2 and time.monotonic() < until:
        time.sleep(0.01)
    os.kill(children[-1], number)
    assert wait(children, 60) == [REQUEUE] * processes, log.read_text()[-3000:]
    assert log.read_text().count(f"stopped by {signal.Signals(number).name} after step") == 1
    assert RunDirectory(run).last_checkpoint(verify=True) is not None
    main([*words, "--resume"])
    assert_same(run, whole)


def bits(run: Path) -> dict[str, bytes]:
    return {name: weight.numpy().tobytes() for name, weight in result(run).items()}


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_kills_at_random_moments_change_no_bit(place, tmp_path, processes):  # noqa: F811
    """More of them with LONGLORA_KILLS=25."""
    kills, log = int(os.environ.get("LONGLORA_KILLS", "1")), tmp_path / "log"

    def begin(run: Path, *resume: str) -> list[int]:
        return start(processes, lambda: main([*command(place, run, save_every=1), *resume]), log)

    began = time.monotonic()
    assert wait(begin(tmp_path / "whole"), 300) == [0] * processes, log.read_text()[-3000:]
    seconds = time.monotonic() - began
    expected = bits(tmp_path / "whole")
    draw, run = random.Random(processes), tmp_path / "run"

    def resume() -> list[str]:
        return ["--resume"] if (run / "settings.yaml").exists() else []

    while kills:
        children = begin(run, *resume())
        time.sleep(seconds * draw.random())
        for child in children:
            os.kill(child, signal.SIGKILL)
        if wait(children, 10) == [-signal.SIGKILL] * processes:
            kills -= 1
        if kills == 0 or (run / "report.html").exists():
            assert wait(begin(run, *resume()), 300) == [0] * processes, log.read_text()[-3000:]
            assert bits(run) == expected
            assert losses(run) == losses(tmp_path / "whole")
            shutil.rmtree(run)
