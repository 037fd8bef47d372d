"""Two processes evaluate what one does, each about half of it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from several_processes import together
from tiny_runs import save_base

from longlora import ranks
from longlora.cli import main
from longlora.evaluation import perplexity


def test_two_processes_find_what_one_does(
    tmp_path: Path, tiny_model: Callable[..., Any], tiny_tokenizer: Callable[[], Any]
) -> None:
    tokenizer, text = tiny_tokenizer(), tmp_path / "text.py"
    base = save_base(tmp_path / "base", tiny_model("llama", vocab_size=len(tokenizer)), tokenizer)
    text.write_text(Path(ranks.__file__).read_text()[:1000])
    words = ["eval", "perplexity", str(base), "--data", str(text), "--contexts", "32,64", "--stride", "16", "--json"]
    words += ["--evaluation-batch", "1"]

    def evaluate(count: int) -> None:
        """What `main` does, with the windows counted that this process reads."""
        seen, real = [], perplexity._score_batch
        perplexity._score_batch = lambda model, reading, places, bos: (
            seen.extend(places) or real(model, reading, places, bos)
        )
        main([*words, "--output", str(tmp_path / str(count))])
        (tmp_path / f"{count}-{ranks.rank()}").write_text(str(len(seen)))

    for count in (1, 2):
        log = tmp_path / f"{count}.log"
        assert together(count, lambda count=count: evaluate(count), log) == [0] * count, log.read_text()
    alone, both = (json.loads((tmp_path / str(count) / "perplexity.json").read_text()) for count in (1, 2))
    for one, other in zip(alone["results"], both["results"], strict=True):
        assert other["nll"] == pytest.approx(one["nll"], abs=1e-6)
        unsure = dict.fromkeys(("nll", "perplexity", "document_nll"))
        assert other | unsure == one | unsure
    logs = [(tmp_path / folder / "perplexity.jsonl").read_text().splitlines() for folder in "12"]
    assert [json.loads(line).get("trial") for line in logs[1]] == [json.loads(line).get("trial") for line in logs[0]]
    windows = {name: int((tmp_path / name).read_text()) for name in ("1-0", "2-0", "2-1")}
    assert windows["2-0"] == windows["2-1"] <= 0.5 * windows["1-0"] + 1


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("parts", [0, 1, 4, 5, 6])
def test_each_part_once_and_as_many_passes_everywhere(monkeypatch: pytest.MonkeyPatch, count: int, parts: int) -> None:
    """All processes of the launch, one after another, with what the others did in their turn."""
    work = list(range(10, 10 + parts))
    monkeypatch.setattr(ranks, "together", lambda: count)
    done: list[list[int]] = []
    for rank in range(count):
        monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
        done.append([])
        first = 0

        def everyones(mine: int, rank: int = rank) -> list[int]:
            nonlocal first
            each = [work[min(first + other, len(work) - 1)] ** 2 for other in range(count)]
            assert each[rank] == mine
            first += count
            return each

        def square(part: int, rank: int = rank) -> int:
            done[rank].append(part)
            return part**2

        monkeypatch.setattr(ranks, "everyones", everyones)
        assert list(ranks.shared_out(work, square)) == [(part, part**2) for part in work]
    assert len({len(each) for each in done}) == 1, "as many forward passes everywhere, for FSDP"
    assert {part for each in done for part in each} == set(work)
    assert sum(map(len, done)) < len(work) + count
