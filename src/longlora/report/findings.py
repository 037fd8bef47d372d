"""What the measurements say, in sentences made from the numbers and from nothing else."""

from collections.abc import Sequence

from longlora.report import wording
from longlora.report.answers_section import answers_finding
from longlora.report.axes import drawable
from longlora.report.changes import change, direction, interval, said
from longlora.report.headline import conclusions, headline
from longlora.report.models import Model, only_run
from longlora.report.reading import Finding, Recorded
from longlora.results import Measured, Perplexities


def finding(models: Sequence[Model]) -> Finding:
    """Of one run what it came to, of several models how they compare."""
    run = only_run(models)
    if run is None:
        return Finding(headline(models), conclusions(models))
    return answers_finding(run) if run.fine_tuned else _of_perplexity(run)


def _of_perplexity(run: Recorded) -> Finding:
    """The perplexity of the trained model at its longest measured context, beside the models it has to beat."""
    trained, base = run.measured("trained"), run.measured("base")
    if trained is None:
        return _not_measured(run)
    far = trained.results[-1]
    where = f"{far.context:,} tokens"
    if not drawable(far.perplexity):
        sentence = f"After training, perplexity on held-out text at {where} is {_value(far)}: this run did not work."
        return Finding(sentence, ["Try a lower learning rate."], good=False)
    home, beyond = _home(run, base), base.at(far.context) if base else None
    stretched, label = _stretched(run, far)
    at_home = trained.at(home.context) if home else None
    verdicts, good = _judge(far, home if home and home.context < far.context else None, beyond)
    against = change(far, stretched) if stretched else None
    if against and direction(against) >= 0:
        verdict = "made it worse" if direction(against) else "made no difference"
        verdicts.append(f"Against positions stretched alone ({label}), training {verdict}.")
        good = None if good else good
    if run.context and far.context < run.context:
        verdicts.append(f"The model was trained for {run.context:,} tokens; nothing was measured beyond {where}.")
    own = "its own " if home and home.context == run.whole("positions", "original_context") else ""
    others = [f"{_value(home)} at {own}{home.context:,}"] if home and home is not beyond else []
    others += [f"{_value(beyond)} at {far.context:,}"] if beyond else []
    has = f"; the base model has {' and '.join(others)}" if others else ""
    decisive = [
        _compared(f"gain at {where} over positions stretched alone ({label})", far, stretched),
        _compared(f"gain at {where} over the base model", far, beyond),
        _compared(f"gain at {where} over the base model in its own window", far, home if home is not beyond else None),
        _compared("change in the old window", at_home, home if at_home is not far else None),
        ("cost", _cost(run)),
    ]
    return Finding(
        f"Perplexity on held-out text at {where} is {_value(far)} after training{has}.",
        verdicts,
        good,
        [(name, told) for name, told in decisive if told],
    )


def _compared(name: str, one: Measured | None, other: Measured | None) -> tuple[str, str]:
    """What a person decides by, under its name; nothing where one of the two was not measured."""
    if one is None or other is None:
        return name, ""
    difference = change(one, other)
    if difference is None:
        return name, f"from {_value(other)}" + (
            ", other text: not to be compared" if drawable(other.perplexity) else ""
        )
    sure = "" if interval(difference) else "; no interval: one document, or an old file"
    return name, f"perplexity {said(difference)}, from {_value(other)}{sure}"


def _cost(run: Recorded) -> str:
    seconds, tokens = run.number("training", "seconds"), run.whole("training", "tokens")
    size = run.whole("training", "memory_bytes")
    found = (
        wording.duration(seconds) if seconds else "",
        f"{tokens:,} tokens" if tokens else "",
        f"{wording.memory(size)} of memory" if size else "",
    )
    return ", ".join(filter(None, found))


def _value(result: Measured) -> str:
    return wording.perplexity(result.perplexity)


def _home(run: Recorded, base: Perplexities | None) -> Measured | None:
    """The base model at its original window, or at the longest context measured inside it."""
    original = run.whole("positions", "original_context")
    inside = [result for result in base.results if original and result.context <= original] if base else []
    return inside[-1] if inside and drawable(inside[-1].perplexity) else None


def _judge(far: Measured, home: Measured | None, beyond: Measured | None) -> tuple[list[str], bool | None]:
    """Against the base model: at the same length it must win, against its own window it is worth saying by how much."""
    against = change(far, beyond) if beyond else None
    if against and direction(against) >= 0:
        where = f"{wording.whole(far.context)} tokens"
        return [f"This run did not help: at {where} the base model, not trained for that, is as good or better."], False
    found = change(far, home) if home else None
    if home is None or found is None:
        return [], True if beyond else None
    there = f"the base model’s at {wording.whole(home.context)}"
    if direction(found) < 0:
        return [f"The longer window helps: perplexity is {said(found)} than {there}."], True
    if direction(found) == 0:
        return [
            "The model reads the longer window without loss but does not gain from it: perplexity is "
            f"{there}{interval(found)}."
        ], None
    return [f"The model does not gain from the longer window: perplexity is {said(found)} than {there}."], False


def _stretched(run: Recorded, far: Measured) -> tuple[Measured | None, str]:
    """The best of the models whose positions were stretched alone, and its name."""
    others = [
        (result, each.label)
        for each in run.perplexities
        if each.name.startswith("untrained") and (result := each.at(far.context)) and drawable(result.perplexity)
    ]
    return min(others, key=lambda other: other[0].perplexity, default=(None, ""))


def _not_measured(run: Recorded) -> Finding:
    for each in run.perplexities:
        if each.results:
            first = f"{_value(each.results[-1])} at {wording.whole(each.results[-1].context)} tokens"
            return Finding(f"The trained model has not been measured; {each.label} has perplexity {first}.", [])
    name = str(run.settings.get("model") or run.word("model") or "A model")
    to = f" {'extended' if run.summary else 'to be extended'} to {run.context:,} tokens" if run.context else ""
    return Finding(f"{'The demo model' if name == 'demo' else name}{to}: no perplexity was measured.", [])
