"""Perplexity against context for all models: base, stretched without training, trained; comparable lines together."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from longlora.report import wording
from longlora.report.comparison.subjects import Subject
from longlora.report.perplexity_section import drawn
from longlora.report.ways import difference, joined
from longlora.results import Perplexities

TRAINED_TONES = (0, 2, 3, 4, 5, 6, 7)
BASE_TONE = "tone-1"


@dataclass(frozen=True)
class Line:
    """One line of a chart, under a name of its own."""

    measured: Perplexities
    model: str
    """What the line is of, in a results document or a run's settings."""
    subject: Subject | None
    """Whose model it is; None for what several runs share, a base or a base that was only stretched."""


def lines(subjects: Sequence[Subject]) -> list[Line]:
    """Every perplexity that was measured, once."""
    found: list[Line] = []
    for subject in subjects:
        own = [_of_run(subject, each) for each in subject.run.perplexities if each.results] if subject.run else []
        if measured := subject.evaluated.of(Perplexities):
            named = replace(measured, name=f"{subject.path}/measured", label=subject.name)
            evaluated = Line(named, subject.model, subject)
            own = [line for line in own if line.subject is None or not may_be_compared(line, evaluated)] + [evaluated]
        for line in own:
            if not any(_same(line, other) for other in found):
                found.append(line)
    return found


def groups(found: Sequence[Line]) -> list[list[Line]]:
    """Lines that may stand in one chart together, the chart with most models first."""
    together: list[list[Line]] = []
    for line in found:
        home = next((group for group in together if all(may_be_compared(line, other) for other in group)), None)
        if home is None:
            together.append([line])
        else:
            home.append(line)
    return sorted(together, key=lambda group: -len({line.subject.path for line in group if line.subject}))


def may_be_compared(one: Line, other: Line) -> bool:
    """Measured in the same way, on as many tokens of text of the same name (and content, where that is known)."""
    return dict(_way(one, other)) == dict(_way(other, one)) and bool(_common(one, other))


def perplexity(subjects: Sequence[Subject]) -> dict[str, Any] | None:
    """The section's charts and tables."""
    together = groups(lines(subjects))
    if not together:
        return None
    tones = {subject.path: f"tone-{tone}" for subject, tone in zip(_models(subjects), _cycle(), strict=False)}
    marks = _windows(subjects)
    return {
        "groups": [
            {
                "drawn": drawn(
                    [line.measured for line in group],
                    {line.measured.name: _tone(line, tones) for line in group},
                    frozenset(line.measured.name for line in group if is_of_a_model(line)),
                    marks,
                ),
                "apart": _apart(group[0], together[0][0]) if group is not together[0] else "",
            }
            for group in together
        ]
    }


def _models(subjects: Sequence[Subject]) -> list[Subject]:
    return [subject for subject in subjects if not subject.evaluated.is_baseline]


def is_of_a_model(line: Line) -> bool:
    """Whether the line is of a model that the page compares, not of what they are compared with."""
    return line.subject is not None and not line.subject.evaluated.is_baseline


def is_stretched(line: Line) -> bool | None:
    """Of what models are compared with: whether its positions were stretched without training; None of a model."""
    if is_of_a_model(line):
        return None
    return line.subject is None and not line.measured.name.endswith("/base")


def _cycle() -> list[int]:
    return list(TRAINED_TONES) * 8


def _tone(line: Line, tones: dict[str, str]) -> str:
    if line.subject is None:
        return f"{BASE_TONE} dashed" if is_stretched(line) else BASE_TONE
    return tones.get(line.subject.path, BASE_TONE)


def _of_run(subject: Subject, measured: Perplexities) -> Line:
    """A run's own `perplexity-NAME.json`: what it began with, that stretched, or its result."""
    assert subject.run is not None
    base = str(subject.run.settings.get("model") or "the base model")
    label = {"trained": subject.name, "base": f"{base}, as it was"}.get(measured.name, f"{base}, {measured.label}")
    named = replace(measured, name=f"{subject.path}/{measured.name}", label=label)
    return Line(named, base, subject if measured.name == "trained" else None)


def _same(one: Line, other: Line) -> bool:
    """Whether two runs recorded one and the same measurement of what they began with."""
    if one.subject or other.subject:
        return False
    return replace(one.measured, name="") == replace(other.measured, name="")


def _common(one: Line, other: Line) -> list[int]:
    return [result.context for result in one.measured.results if other.measured.at(result.context)]


def _way(line: Line, other: Line) -> dict[str, str]:
    """How `line` was measured, as far as it matters beside `other`."""
    measured = line.measured
    way = {"text": joined(measured.data) or "–", "score": measured.score or "–"}
    if measured.data_fingerprint and other.measured.data_fingerprint:
        way["fingerprint"] = measured.data_fingerprint
    for context in _common(line, other):
        result, beside = measured.at(context), other.measured.at(context)
        assert result is not None
        assert beside is not None
        if result.text and beside.text:
            way["fingerprint"] = way.get("fingerprint", "") + result.text
        stride = result.stride or measured.stride
        way[f"stride at {context:,}"] = wording.whole(stride) if stride else "–"
        way[f"tokens at {context:,}"] = wording.whole(result.tokens) if result.tokens else "–"
    return way


def _apart(line: Line, first: Line) -> str:
    if not _common(line, first):
        return "no context was measured of both"
    way, usual = _way(line, first), _way(first, line)
    names = [name for name in way if way[name] != usual[name]]
    # one context says it all where the others say the same
    kept = {name for kind in ("stride", "tokens") for name in [n for n in names if n.startswith(kind)][:1]}
    kept |= {name for name in names if " at " not in name}
    return difference({n: way[n] for n in way if n in kept}, {n: usual[n] for n in usual if n in kept})


def _windows(subjects: Sequence[Subject]) -> list[tuple[float, str]]:
    """The base model's window, where all runs began with the same."""
    found = {run.whole("positions", "original_context") for subject in subjects if (run := subject.run)}
    (window,) = found if len(found) == 1 else (None,)
    return [(float(window), "base model’s window")] if window else []
