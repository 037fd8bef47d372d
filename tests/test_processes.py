"""Two processes evaluate what one does, each about half of it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from longlora.evaluation import processes

ALONE = [sys.executable, "-m", "longlora"]
TOGETHER = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "longlora"]


def run(launch: list[str], words: list[str]) -> dict:
    environment = {**os.environ, "PYTHONPATH": "src", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, *words], capture_output=True, text=True, timeout=600, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.slow
def test_two_processes_find_what_one_does(tmp_path: Path) -> None:
    text = tmp_path / "text.py"
    text.write_text(Path(processes.__file__).read_text())
    words = ["eval", "perplexity", "demo", "--data", str(text), "--contexts", "256,512", "--stride", "128", "--json"]
    words += ["--evaluation-batch", "2", "--output"]
    alone, together = run(ALONE, [*words, str(tmp_path / "1")]), run(TOGETHER, [*words, str(tmp_path / "2")])
    for one, other in zip(alone["results"], together["results"], strict=True):
        assert other["nll"] == pytest.approx(one["nll"], abs=1e-6)
        assert {**other, "nll": 0, "perplexity": 0, "document_nll": 0} == {
            **one, "nll": 0, "perplexity": 0, "document_nll": 0
        }  # fmt: skip
    logs = [(tmp_path / folder / "perplexity.jsonl").read_text().splitlines() for folder in "12"]
    assert [json.loads(line).get("trial") for line in logs[1]] == [json.loads(line).get("trial") for line in logs[0]]


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("parts", [0, 1, 4, 5, 6])
def test_each_part_once_and_as_many_passes_everywhere(monkeypatch: pytest.MonkeyPatch, count: int, parts: int) -> None:
    """All processes of the launch, one after another, with what the others did in their turn."""
    work = list(range(10, 10 + parts))
    monkeypatch.setattr(processes, "processes", lambda: count)
    done: list[list[int]] = []
    for rank in range(count):
        monkeypatch.setattr(processes.dist, "get_rank", lambda rank=rank: rank)
        done.append([])
        first = 0

        def gather(found: list, mine: int, rank: int = rank) -> None:
            nonlocal first
            each = [work[min(first + other, len(work) - 1)] ** 2 for other in range(count)]
            assert each[rank] == mine
            found[:] = each
            first += count

        def square(part: int, rank: int = rank) -> int:
            done[rank].append(part)
            return part**2

        monkeypatch.setattr(processes.dist, "all_gather_object", gather)
        assert list(processes.shared_out(work, square)) == [(part, part**2) for part in work]
    assert len({len(each) for each in done}) == 1, "as many forward passes everywhere, for FSDP"
    assert {part for each in done for part in each} == set(work)
    assert sum(map(len, done)) < len(work) + count
