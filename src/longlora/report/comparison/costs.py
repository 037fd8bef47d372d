"""What each training took: seconds, tokens, memory, and pairs of a query and a key that attention looked at."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from transformers import PreTrainedConfig

from longlora.attention.cost import attention_cost
from longlora.errors import UserError
from longlora.report import wording
from longlora.report.charts import Bar, Bars, at_both_widths, bar_chart
from longlora.report.comparison.subjects import Subject
from longlora.report.reading import Recorded, at, read_object
from longlora.results import number, whole
from longlora.settings import AttentionSettings, PatternOptions, TrainingSettings

STEPS_COUNTED = 100
"""Steps whose pairs are counted one by one; a longer run repeats them in proportion."""


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
    pairs, share = _pairs(run, at(cell, "attention_cost"))
    return Cost(
        name=name,
        steps=whole(training.get("steps")) or whole(training.get("step")),
        seconds=number(training.get("seconds")),
        tokens=whole(training.get("tokens")),
        memory_bytes=whole(training.get("memory_bytes")),
        trainable=whole(at(trainable, "trainable")),
        parameters=whole(at(trainable, "parameters")),
        pairs=pairs,
        share=share,
    )


def _share(row: Cost) -> str:
    return f"{wording.scientific(row.pairs)}, {wording.percent(row.share or 0)}" if row.pairs else "–"


def _bars(bars: Sequence[Bar]) -> dict[str, str]:
    said = "; ".join(f"{bar.label}: {bar.text}" for bar in bars)
    return at_both_widths(lambda width: bar_chart([Bars("", bars)], width=width, description=f"{said}."))


def _pairs(run: Recorded, counted: Any) -> tuple[float | None, float | None]:
    """Pairs of the whole run and their share; as a study counted them, or from the run's settings."""
    pairs, share = number(at(counted, "pairs")), number(at(counted, "share"))
    if pairs is not None and share is not None:
        return pairs, share
    try:
        return _counted(run)
    # settings of another version, or written by hand, may hold anything: the page says nothing of what it cannot count
    except (UserError, TypeError, ValueError, KeyError, AttributeError, ZeroDivisionError):
        return None, None


def _counted(run: Recorded) -> tuple[float | None, float | None]:
    context = run.context
    if context is None or "pattern" not in run.settings or not run.config:
        return None, None
    options = PatternOptions(**_given(run, PatternOptions))
    attention = AttentionSettings(options=options, **_given(run, AttentionSettings))
    training = TrainingSettings(**_given(run, TrainingSettings))
    config = PreTrainedConfig.from_dict(run.config)
    row = whole(run.settings.get("row_tokens")) or context
    full_steps = attention.full_attention_steps
    other_steps = training.steps - full_steps
    counted = min(other_steps, STEPS_COUNTED)
    sparse = replace(attention, full_attention_steps=0)
    found = attention_cost(sparse, replace(training, steps=max(1, counted)), row, config)
    share = (found["share"] * other_steps + full_steps) / training.steps
    return share * found["full_pairs"] / max(1, counted) * training.steps, share


def _given(run: Recorded, kind: type) -> dict[str, Any]:
    """The run's settings that are plain fields of `kind`."""
    plain = {field.name for field in fields(kind)} - {"options"}
    return {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in run.settings.items()
        if name in plain
    }
