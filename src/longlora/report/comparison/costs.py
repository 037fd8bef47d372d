"""What each training took: seconds, tokens, memory, and pairs of a query and a key that attention looked at."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from longlora.report import wording
from longlora.report.charts import Bar, Bars, at_both_widths, bar_chart
from longlora.report.comparison.subjects import Subject
from longlora.report.reading import Recorded, at, read_object
from longlora.results import number, whole


@dataclass(frozen=True, kw_only=True)
class Cost:
    """None for what a run has not recorded."""

    name: str
    steps: int | None = None
    seconds: float | None = None
    tokens: int | None = None
    memory_bytes: float | None = None
    trainable: int | None = None
    parameters: int | None = None
    pairs: float | None = None
    share: float | None = None
    """Pairs over those of the same run with full attention."""


def costs(subjects: Sequence[Subject]) -> dict[str, Any] | None:
    """A row a run, and bars of time and of attention."""
    rows = [cost(subject.name, subject.run) for subject in subjects if subject.run]
    rows = [row for row in rows if row != Cost(name=row.name)]
    if not rows:
        return None
    charts = {}
    if sum(row.seconds is not None for row in rows) > 1:
        bars = [
            Bar(row.name, "tone-0", row.seconds, wording.duration(row.seconds) if row.seconds else "–") for row in rows
        ]
        charts["Time to train"] = _bars(bars)
    if sum(row.pairs is not None for row in rows) > 1:
        bars = [Bar(row.name, "tone-2", row.pairs, _share(row)) for row in rows]
        charts["Pairs of tokens that attention looked at, and their share of full attention’s"] = _bars(bars)
    tokens = {row.tokens for row in rows if row.tokens}
    return {"rows": rows, "charts": charts, "same_tokens": len(tokens) <= 1}


def cost(name: str, run: Recorded) -> Cost:
    """What `run` recorded: in its summary, as a cell of a study, or in the last of its metrics."""
    unreadable: list[str] = []
    file = run.path / "evaluation" / "cell.json"
    cell = read_object(file, file.name, unreadable) if file.is_file() else {}
    steps = [record for record in run.metrics if number(record.get("seconds")) is not None]
    training: dict[str, Any] = next(
        (
            found
            for found in (at(run.summary, "training"), at(cell, "training"), *steps[-1:])
            if isinstance(found, dict)
        ),
        {},
    )
    trainable = at(run.summary, "trainable") or at(cell, "trainable")
    looked_at = at(run.summary, "attention_cost") or at(cell, "attention_cost")
    return Cost(
        name=name,
        steps=whole(training.get("steps")) or whole(training.get("step")),
        seconds=number(training.get("seconds")),
        tokens=whole(training.get("tokens")),
        memory_bytes=whole(training.get("memory_bytes")),
        trainable=whole(at(trainable, "trainable")),
        parameters=whole(at(trainable, "parameters")),
        pairs=number(at(looked_at, "pairs")),
        share=number(at(looked_at, "share")),
    )


def _share(row: Cost) -> str:
    return f"{wording.scientific(row.pairs)}, {wording.percent(row.share or 0)}" if row.pairs else "–"


def _bars(bars: Sequence[Bar]) -> dict[str, str]:
    said = "; ".join(f"{bar.label}: {bar.text}" for bar in bars)
    return at_both_widths(lambda width: bar_chart([Bars("", bars)], width=width, description=f"{said}."))
