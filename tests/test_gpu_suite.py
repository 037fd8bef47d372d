"""`benchmarks/gpu_suite`, which runs blind on a GPU: tried here on a CPU in little, with what may go wrong there."""

import inspect
import json
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

from gpu_suite import ladder, parity, parts
from gpu_suite.cases import PARTS, Case, gpu_cases, small_cases
from gpu_suite.command import Results, main
from gpu_suite.summary import summary
from gpu_suite.worker import Worker

QUICK = "environment,attention,step"


def lines(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("suite")
    status = main(["--small", "--only", QUICK, "--output", str(folder)])
    return folder, status


# -------------------------------------------------------------------------------------------------- one go, in little


def test_every_case_leaves_a_line_and_the_summary_its_tables(finished):
    folder, status = finished
    assert status == 0
    assert [(each["part"], each["case"]) for each in lines(folder)] == [
        ("environment", "environment"),
        ("attention", "64"),
        ("step", "96"),
    ]
    for each in lines(folder):
        assert each["seconds"] >= 0
        assert "error" not in each
    text = (folder / "summary.md").read_text(encoding="utf-8")
    for title in ("What was asked", "Attention, forward + backward", "A whole training step"):
        assert f"## {title}" in text
    assert "Not measured" not in text
    assert "cannot be told" not in text


def test_what_is_done_is_not_run_again_and_a_torn_line_does_no_harm(finished, monkeypatch, capsys):
    folder, _ = finished
    with (folder / "results.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"part": "step", "case": "96", "resu')  # the machine went away here
    monkeypatch.setattr(Worker, "run", lambda *_: pytest.fail("a case that is done was run"))
    assert main(["--small", "--only", QUICK, "--output", str(folder)]) == 0
    assert "done before" in capsys.readouterr().err
    results = Results(folder / "results.jsonl")
    assert len(results.records) == 3
    again = Case("parity", "again", "parity:parity", {}, 1, 1)
    results.add(again, {"result": {}}, 0.5)
    assert Results(folder / "results.jsonl").is_done(again)  # not swallowed by the torn line


def test_no_time_left_begins_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(Worker, "run", lambda *_: pytest.fail("begun"))
    assert main(["--small", "--minutes", "0.01", "--output", str(tmp_path)]) == 1
    assert not (tmp_path / "results.jsonl").exists()
    text = (tmp_path / "summary.md").read_text(encoding="utf-8")
    assert all(f"- {case.key}: not run" in text for case in small_cases())


def test_without_a_gpu_it_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["--output", str(tmp_path)]) == 2
    assert "--small" in capsys.readouterr().err


def test_a_part_that_there_is_not(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["--small", "--only", "atention", "--output", str(tmp_path)])
    assert "no part 'atention'" in capsys.readouterr().err


def test_what_fails_is_written_down_and_tried_again(tmp_path, monkeypatch):
    answers = iter([{"error": "RuntimeError: illegal memory access", "trace": "…"}, {"result": {"hardware": "x"}}])
    monkeypatch.setattr(Worker, "run", lambda *_: next(answers))
    arguments = ["--small", "--only", "environment", "--output", str(tmp_path)]
    assert main(arguments) == 1
    assert "- environment/environment: RuntimeError: illegal" in (tmp_path / "summary.md").read_text(encoding="utf-8")
    assert main(arguments) == 0
    assert "Not measured" not in (tmp_path / "summary.md").read_text(encoding="utf-8")


# --------------------------------------------------------------------------------------------------------- the worker


def test_a_case_that_raises_hangs_or_dies_does_not_stop_the_next():
    def case(limit=60.0, **arguments):
        return Case("environment", "environment", "environment:environment", arguments, 1, limit)

    def deadline():
        return time.monotonic() + 300

    worker = Worker()
    try:
        assert "result" in worker.run(case(), deadline())
        assert worker.run(case(limit=0.0), deadline())["error"] == "took longer than 0 s, and was stopped"
        answer = worker.run(case(wrong=1), deadline())
        assert answer["error"].startswith("TypeError: environment() got an unexpected keyword argument 'wrong'")
        assert "Traceback" in answer["trace"]
        assert worker._start() is None
        worker._process.kill()
        worker._process.join()
        assert "its process ended" in worker.run(case(), deadline())["error"]
    finally:
        worker.stop()


# ------------------------------------------------------------------------------------------- what will run on the GPU


@pytest.mark.parametrize("case", gpu_cases() + small_cases(), ids=lambda case: case.key)
def test_every_case_can_be_called(case, monkeypatch):
    module, _, name = case.function.partition(":")
    function = getattr(import_module(f"gpu_suite.{module}"), name)
    inspect.signature(function).bind(**case.arguments, seconds_left=1.0)
    assert case.part in PARTS
    assert 0 < case.seconds <= case.limit
    json.dumps(case.arguments)
    if module == "parts":  # what the package's benchmarks are given is valid
        asked = []
        for bench in ("bench_attention", "bench_step"):
            monkeypatch.setattr(parts, bench, lambda settings: asked.append(settings) or {})
        function(**case.arguments, seconds_left=1.0)
        assert asked[0].json


def test_what_is_asked_first_fits_into_nine_minutes():
    cases = gpu_cases()
    keys = [case.key for case in cases]
    assert len(set(keys)) == len(keys)
    needed = {
        "attention/32768",
        "scatter/32768",
        "step/32768",
        "step/102400",
        "ladder/checkpointing",
        "ladder/optimizer",
    }
    last = max(keys.index(key) for key in needed)
    assert sum(case.seconds for case in cases[: last + 1]) <= 9 * 60
    assert {case.part for case in cases} == set(PARTS)
    rungs = {case.name for case in cases if case.part == "ladder"}
    assert rungs == set(ladder.RUNGS)


def test_backends_that_parity_found_wrong_are_not_timed(tmp_path, monkeypatch):
    given = []

    def run(self, case, deadline):
        given.append(case)
        return {"result": {"right": case.name in ("sdpa", "eager", "varlen"), "hardware": "x", "results": []}}

    monkeypatch.setattr(Worker, "run", run)
    main(["--small", "--only", "parity,attention", "--output", str(tmp_path)])
    assert given[-1].part == "attention"
    assert given[-1].arguments["backends"] == ["sdpa", "varlen"]


def test_a_backend_that_breaks_the_measurement_leaves_sdpa(monkeypatch):
    def bench(settings):
        if settings.backends != ("sdpa",):
            raise RuntimeError("no kernel image is available")
        return {"results": []}

    monkeypatch.setattr(parts, "bench_attention", bench)
    found = parts.attention(64, 1.0, backends=["sdpa", "flex"], heads=2)
    assert found == {"results": [], "without": "RuntimeError: no kernel image is available"}


# ------------------------------------------------------------------------------------------------------------- parity


def test_parity_finds_the_right_right_and_the_wrong_wrong(monkeypatch):
    monkeypatch.setattr(parity, "_combinations", lambda: [(torch.float32, "grouped queries", "shift", True)])
    assert parity.parity("sdpa", "cpu", 29, 60.0)["right"] is True
    right = parity.shifted_attention

    def shifted_by_one(q, k, v, group, *given, **named):
        return right(q, k, v, group + 1, *given, **named)

    monkeypatch.setattr(parity, "shifted_attention", shifted_by_one)
    found = parity.parity("sdpa", "cpu", 29, 60.0)
    assert found["right"] is False
    assert max(found["results"][0]["errors"].values()) > 1


def test_parity_covers_patterns_types_and_documents():
    combinations = parity._combinations()
    assert {name for _, _, name, _ in combinations} == set(parity.PATTERNS)
    assert {dtype for dtype, *_ in combinations} == {torch.bfloat16, torch.float16, torch.float32}
    assert {cut for *_, cut in combinations} == {True, False}
    assert parity.parity("sdpa", "cpu", 29, -1.0)["not_run"] == len(combinations)
    refused = parity.parity("varlen", "cpu", 29, 60.0)
    assert refused["right"] is None
    assert refused["refused"]


# --------------------------------------------------------------------------------------------------------- the ladder


def test_the_longest_is_found_and_the_line_drawn_on():
    assert 99_744 <= ladder._longest(lambda context: context <= 100_000, 512) <= 100_000
    assert ladder._longest(lambda context: context <= 600, 512) in range(512, 601)
    steps = [{"context": 1000, "measured_bytes": 3_000}, {"context": 2000, "measured_bytes": 5_000}]
    assert ladder._drawn_on(steps, 21_000) == 10_000  # 1,000 + 2 a token
    assert ladder._drawn_on(steps[:1], 21_000) is None


def test_a_rung_is_climbed_and_stays_within_the_limit():
    limit = 60_000_000
    found = ladder.rung("demo", "cpu", 32, [64, 256], "loss", 500.0, layers=1, limit=limit)
    assert found["longest"] > 256
    assert found["longest"] <= found["planned"]
    last = found["steps"][-1]
    assert last["context"] == found["longest"]
    assert 0.7 * limit < last["measured_bytes"] <= limit
    assert last["predicted_bytes"] == pytest.approx(last["measured_bytes"], rel=0.1)


def test_a_rung_with_no_time_says_so_and_one_that_cannot_act_too():
    found = ladder.rung("demo", "cpu", 32, [32, 64], "checkpointing", 0.0, layers=1, limit=60_000_000)
    assert found["longest"] == 64
    assert "less was left: not tried" in found["note"]
    assert "nowhere to offload" in ladder.rung("demo", "cpu", 32, [64], "activations", 9.0, layers=1)["note"]


# -------------------------------------------------------------------------------------------------------- the summary


def test_the_summary_tells_what_it_can_of_anything():
    records = [
        {"part": "attention", "case": "1", "result": {"results": [{}]}},
        {"part": "step", "case": "2", "result": None},
        {"part": "ladder", "case": "base", "result": {"rung": "base", "switches": [], "note": "no | bitsandbytes"}},
        {"part": "parity", "case": "flex", "error": "Boom:\nline"},
    ]
    text = summary(records, [Case("ladder", "x", "ladder:rung", {}, 1, 1)])
    assert "cannot be told: KeyError" in text
    assert "no \\| bitsandbytes" in text
    assert "- parity/flex: Boom: line" in text
    assert "- ladder/x: not run" in text


def test_the_verdicts():
    def attention(length, bound, full):
        one = {"backend": "sdpa", "s2": {"seconds": 1.0}, "full": {"seconds": 4.0}, "ratio_to_bound": bound}
        one |= {"ratio_to_fastest_full": full, "length": length, "pattern": "shift", "bound": {"seconds": 1.0}}
        other = one | {"backend": "flex", "s2": {"seconds": 9.0}, "ratio_to_bound": 9.0}
        return {"part": "attention", "case": str(length), "result": {"results": [one | {"others": [other]}]}}

    text = summary([attention(32768, 1.05, 0.25), attention(131072, 1.2, 0.5)], [])
    assert "| S² / bound, 32,768 tokens, sdpa | ≤ 1.10 | 1.05 | yes |" in text
    assert "| faster than the fastest full, 32,768 tokens, sdpa | ≥ 3.3 | 4.00 | yes |" in text
    assert "| S² / bound, 131,072 tokens, sdpa | ≤ 1.10 | 1.20 | NO |" in text
    assert "| faster than the fastest full, 131,072 tokens, sdpa | ≥ 3.3 | 2.00 | NO |" in text
