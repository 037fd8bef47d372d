"""What the comparison comes to, in sentences made from the numbers and from nothing else."""

from collections.abc import Sequence

from longlora.report import wording
from longlora.report.axes import drawable
from longlora.report.benchmark_sections import effective_length
from longlora.report.comparison.perplexity_lines import Line, groups, is_of_a_model, is_stretched, lines
from longlora.report.comparison.subjects import Subject
from longlora.report.results import Evaluated
from longlora.report.retrieval_section import found_at
from longlora.report.ways import alike

SAME = 0.005
"""Perplexities that differ by less than this share are said to."""


def headline(subjects: Sequence[Subject]) -> str:
    """The first sentence."""
    models = [subject for subject in subjects if not subject.evaluated.is_baseline]
    if len(models) == 1:
        return f"What was measured of {models[0].name}"
    return f"{len(models)} models compared: {wording.listed([model.name for model in models])}"


def conclusions(subjects: Sequence[Subject]) -> list[str]:
    """A sentence a measure, each over the models that were measured in the same way."""
    evaluated = [subject.evaluated for subject in subjects]
    found = [_perplexity(subjects), _passkey(evaluated), _ruler(evaluated), _short(subjects)]
    return [sentence for sentence in found if sentence]


def _perplexity(subjects: Sequence[Subject]) -> str:
    """The order at the longest context that most models share."""
    together = groups(lines(subjects))
    group = [line for line in together[0] if _drawable(line)] if together else []
    models = [line for line in group if is_of_a_model(line)]
    if not models:
        return ""
    contexts = set.intersection(*({r.context for r in line.measured.results} for line in models))
    if not contexts:
        return ""
    far = max(contexts)

    def at_far(line: Line) -> float:
        result = line.measured.at(far)
        assert result is not None
        return result.perplexity

    def value(line: Line) -> str:
        return f"{wording.perplexity(at_far(line))} for {line.measured.label}"

    models.sort(key=at_far)
    said = f"Perplexity at {far:,} tokens: {wording.listed([value(line) for line in models])}"
    # of what the runs began with, and of that stretched in several ways, the best is the one to beat
    for stretched, what in (
        (False, "for what they were made from"),
        (True, "for that with stretched positions, not trained"),
    ):
        others = [line for line in group if is_stretched(line) is stretched and line.measured.at(far)]
        if others:
            said += f"; {wording.perplexity(min(map(at_far, others)))} {what}"
    if len(models) > 1 and at_far(models[-1]) <= at_far(models[0]) * (1 + SAME):
        said += f"; the models are less than {SAME:.1%} apart"
    return said + "."


def _drawable(line: Line) -> bool:
    return all(drawable(result.perplexity) for result in line.measured.results)


def _passkey(models: Sequence[Evaluated]) -> str:
    asked = [(model, model.retrievals["passkey"]) for model in models if "passkey" in model.retrievals]
    if not asked:
        return ""
    group = alike(asked, lambda each: each[1].way)[0]
    contexts = set.intersection(*({cell.context for cell in found.cells} for _, found in group))
    if not contexts:
        return ""
    far = max(contexts)
    shares = [(model.name, found_at(found, far)) for model, found in group]
    said = [f"{wording.percent(share)} by {name}" for name, share in shares if share is not None]
    return f"Pass keys found at {far:,} tokens: {wording.listed(said)}." if said else ""


def _ruler(models: Sequence[Evaluated]) -> str:
    asked = [(model, model.ruler) for model in models if model.ruler and model.ruler.averages]
    if not asked:
        return ""
    group = alike(asked, lambda each: each[1].way)[0]
    said = [f"{effective_length(found)} for {model.name}" for model, found in group]
    return f"RULER’s effective length in tokens: {wording.listed(said)}."


def _short(subjects: Sequence[Subject]) -> str:
    said = []
    for subject in subjects:
        if not subject.evaluated.short:
            continue
        rows = subject.evaluated.short.rows
        lost = [row for row in rows if row.good is False]
        if lost:
            worst = max(lost, key=lambda row: abs(row.after / row.before - 1) if row.before else 0)
            said.append(f"{subject.name} {worst.verdict} ({worst.what})")
        else:
            said.append(f"{subject.name} lost nothing")
    return f"At short length: {'; '.join(said)}." if said else ""
