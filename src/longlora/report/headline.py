"""What the comparison comes to, in sentences made from the numbers and from nothing else."""

from collections.abc import Sequence

from longlora.report import wording
from longlora.report.axes import drawable
from longlora.report.benchmark_sections import effective_length, is_good, named
from longlora.report.changes import change, direction, interval, said
from longlora.report.models import Model, compared
from longlora.report.perplexity_section import Curve, curves, groups
from longlora.report.retrieval_section import found_at, in_percent
from longlora.report.ways import alike, way_of
from longlora.results import Measured, Ruler, Short


def headline(models: Sequence[Model]) -> str:
    """The first sentence."""
    about = compared(models)
    if len(about) == 1:
        return f"What was measured of {about[0].name}"
    return f"{len(about)} models compared: {wording.listed([model.name for model in about])}"


def conclusions(models: Sequence[Model]) -> list[str]:
    """A sentence a measure, each over the models that were measured in the same way."""
    return [sentence for say in (_perplexity, _passkey, _ruler, _short) if (sentence := say(models))]


def _perplexity(models: Sequence[Model]) -> str:
    """The order at the longest context that most models share."""
    group = next(iter(groups(curves(models))), [])
    group = [curve for curve in group if all(drawable(result.perplexity) for result in curve.measured.results)]
    about = [curve for curve in group if curve.is_compared]
    contexts = [{result.context for result in curve.measured.results} for curve in about]
    shared = set.intersection(*contexts) if contexts else set()
    if not shared:
        return ""
    far = max(shared)

    def at_far(curve: Curve) -> Measured:
        found = curve.measured.at(far)
        assert found is not None
        return found

    def value(curve: Curve) -> float:
        return at_far(curve).perplexity

    about.sort(key=value)
    values = [f"{wording.perplexity(value(curve))} for {curve.measured.label}" for curve in about]
    sentence = f"Perplexity at {far:,} tokens: {wording.listed(values)}"
    # of what the runs began with, and of that stretched in several ways, the best is the one to beat
    for kind, what in (
        ([curve for curve in group if curve.is_base], "for what they were made from"),
        ([curve for curve in group if curve.is_stretched], "for that with stretched positions, not trained"),
    ):
        if others := [curve for curve in kind if curve.measured.at(far)]:
            beaten = min(others, key=value)
            sentence += f"; {wording.perplexity(value(beaten))} {what}"
            found = change(at_far(about[0]), at_far(beaten))
            if found and found.low is not None:
                sentence += f", than which {about[0].measured.label} is {said(found)}"
    if len(about) > 1:
        best, second = about[:2]
        found = change(at_far(second), at_far(best))
        if found and found.low is None:
            sentence += ". No file has an interval: small differences are not judged" if direction(found) == 0 else ""
        elif found:
            shown = "above" if direction(found) else "not shown to differ from"
            sentence += f". {second.measured.label} is {shown} {best.measured.label}{interval(found)}"
    return sentence + "."


def _passkey(models: Sequence[Model]) -> str:
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


def _ruler(models: Sequence[Model]) -> str:
    asked = [(model, found) for model in models if (found := model.of(Ruler)) and found.averages]
    if not asked:
        return ""
    group = alike(asked, lambda each: way_of(each[1]))[0]
    words = [f"{effective_length(found)} for {model.name}" for model, found in group]
    return f"RULER’s effective length in tokens: {wording.listed(words)}."


def _short(models: Sequence[Model]) -> str:
    words = []
    for model in models:
        found = model.of(Short)
        if not found:
            continue
        rows = [*found.results, *found.tasks]
        lost = [row for row in rows if is_good(row) is False]
        if lost:
            worst = max(lost, key=lambda row: abs(row.after / row.before - 1) if row.before else 0)
            words.append(f"{model.name} {worst.verdict} ({named(worst)})")
        else:
            words.append(f"{model.name} is not shown to lose anything")
    return f"At short length: {'; '.join(words)}." if words else ""
