"""What the comparison comes to, in sentences made from the numbers and from nothing else."""

from collections.abc import Sequence

from longlora.report import wording
from longlora.report.axes import drawable
from longlora.report.benchmark_sections import effective_length, is_good, named
from longlora.report.changes import change, direction, interval, said
from longlora.report.comparison.perplexity_lines import Line, groups, is_of_a_model, is_stretched, lines
from longlora.report.comparison.subjects import Subject
from longlora.report.reading import Evaluated
from longlora.report.retrieval_section import found_at, in_percent
from longlora.report.ways import alike, way_of
from longlora.results import Measured, Ruler, Short


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

    def result(line: Line) -> Measured:
        found = line.measured.at(far)
        assert found is not None
        return found

    def at_far(line: Line) -> float:
        return result(line).perplexity

    def value(line: Line) -> str:
        return f"{wording.perplexity(at_far(line))} for {line.measured.label}"

    models.sort(key=at_far)
    sentence = f"Perplexity at {far:,} tokens: {wording.listed([value(line) for line in models])}"
    # of what the runs began with, and of that stretched in several ways, the best is the one to beat
    for stretched, what in (
        (False, "for what they were made from"),
        (True, "for that with stretched positions, not trained"),
    ):
        others = [line for line in group if is_stretched(line) is stretched and line.measured.at(far)]
        if others:
            beaten = min(others, key=at_far)
            sentence += f"; {wording.perplexity(at_far(beaten))} {what}"
            found = change(result(models[0]), result(beaten))
            if found and found.low is not None:
                sentence += f", than which {models[0].measured.label} is {said(found)}"
    if len(models) > 1:
        best, second = models[:2]
        found = change(result(second), result(best))
        if found and found.low is None:
            sentence += ". No file has an interval: small differences are not judged" if direction(found) == 0 else ""
        elif found:
            shown = "above" if direction(found) else "not shown to differ from"
            sentence += f". {second.measured.label} is {shown} {best.measured.label}{interval(found)}"
    return sentence + "."


def _drawable(line: Line) -> bool:
    return all(drawable(result.perplexity) for result in line.measured.results)


def _passkey(models: Sequence[Evaluated]) -> str:
    asked = [(model, model.retrievals["passkey"]) for model in models if "passkey" in model.retrievals]
    if not asked:
        return ""
    group = alike(asked, lambda each: way_of(each[1]))[0]
    contexts = set.intersection(*({cell.context for cell in found.results} for _, found in group))
    if not contexts:
        return ""
    far = max(contexts)
    shares = [(model.name, found_at(found, far)) for model, found in group]
    words = [f"{in_percent(share)} by {name}" for name, share in shares if share is not None]
    return f"Pass keys found at {far:,} tokens: {wording.listed(words)}." if words else ""


def _ruler(models: Sequence[Evaluated]) -> str:
    asked = [(model, found) for model in models if (found := model.of(Ruler)) and found.averages]
    if not asked:
        return ""
    group = alike(asked, lambda each: way_of(each[1]))[0]
    words = [f"{effective_length(found)} for {model.name}" for model, found in group]
    return f"RULER’s effective length in tokens: {wording.listed(words)}."


def _short(subjects: Sequence[Subject]) -> str:
    words = []
    for subject in subjects:
        found = subject.evaluated.of(Short)
        if not found:
            continue
        rows = [*found.results, *found.tasks]
        lost = [row for row in rows if is_good(row) is False]
        if lost:
            worst = max(lost, key=lambda row: abs(row.after / row.before - 1) if row.before else 0)
            words.append(f"{subject.name} {worst.verdict} ({named(worst)})")
        else:
            words.append(f"{subject.name} is not shown to lose anything")
    return f"At short length: {'; '.join(words)}." if words else ""
