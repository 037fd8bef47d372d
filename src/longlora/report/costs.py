"""What training took: seconds, tokens, memory, and pairs of a query and a key that attention looked at."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from longlora.report.models import Model, only_run
from longlora.report.reading import Content, Recorded, at, read_object, rows
from longlora.results import number, whole


def cost(run: Recorded) -> Content:
    """Time and memory of the pattern against full attention, and what the training took."""
    measured: list[dict[str, Any]] = []
    for row in rows(run.costs.get("rows")):
        sizes = {
            what: {kind: number(at(row, kind, what)) for kind in ("full", "s2")} for what in ("seconds", "memory_bytes")
        }
        known = [value for size in sizes.values() for value in size.values() if value is not None]
        if known and (length := whole(row.get("length"))):
            measured.append({"length": length, "group": whole(row.get("group_size")), **sizes})
    took = {name: run.number("training", name) for name in ("seconds", "tokens_per_second", "memory_bytes", "tokens")}
    if not measured and not any(took.values()):
        return "Cost: neither the training’s time and memory nor those of S²-Attn against full attention were recorded."
    most = {
        what: max((value for row in measured for value in row[what].values() if value is not None), default=0.0)
        for what in ("seconds", "memory_bytes")
    }
    facts = [str(run.costs[name]) for name in ("what", "hardware", "dtype") if run.costs.get(name)]
    return {"rows": measured, "most": most, "facts": facts, "took": took}


@dataclass(frozen=True, kw_only=True)
class Cost:
    """None for what a run has not recorded."""

    name: str
    seconds: float | None = None
    tokens: int | None = None
    memory_bytes: float | None = None
    trainable: int | None = None
    pairs: float | None = None
    share: float | None = None
    """Pairs over those of the same run with full attention."""


def costs(models: Sequence[Model]) -> Content | None:
    """A row a run, where there are several."""
    if only_run(models):
        return None
    found = [cost_of(model.name, model.run) for model in models if model.run]
    found = [row for row in found if row != Cost(name=row.name)]
    tokens = {row.tokens for row in found if row.tokens}
    return {"rows": found, "same_tokens": len(tokens) <= 1} if found else None


def cost_of(name: str, run: Recorded) -> Cost:
    """What `run` recorded: in its summary, as a cell of a study, or in the last of its metrics."""
    file = run.path / "evaluation" / "cell.json"
    cell = read_object(file, file.name, [])
    steps = [record for record in run.metrics if number(record.get("seconds")) is not None]
    possible = (at(run.summary, "training"), at(cell, "training"), *steps[-1:])
    training: dict[str, Any] = next((found for found in possible if isinstance(found, dict)), {})
    trainable = at(run.summary, "trainable") or at(cell, "trainable")
    looked_at = at(run.summary, "attention_cost") or at(cell, "attention_cost")
    return Cost(
        name=name,
        seconds=number(training.get("seconds")),
        tokens=whole(training.get("tokens")),
        memory_bytes=whole(training.get("memory_bytes")),
        trainable=whole(at(trainable, "trainable")),
        pairs=number(at(looked_at, "pairs")),
        share=number(at(looked_at, "share")),
    )
