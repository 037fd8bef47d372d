"""A fine-tuned model's loss on held-out answers: what it says in words, and the table that shows it."""

from longlora.report import wording
from longlora.report.changes import SAME
from longlora.report.reading import Content, Finding, Recorded
from longlora.results import Answers

_FEW = 1000
"""Tokens of answers below which their loss is a rough measure."""


def answers_finding(run: Recorded) -> Finding:
    """The loss of held-out answers after the training, beside that before it."""
    measured = {each.name: each for each in run.answers}
    before, after = measured.get("base"), measured.get("trained")
    if before is None or after is None:
        examples = run.whole("data", "examples")
        on = f" on {wording.whole(examples)} examples" if examples else ""
        done = "fine-tuned" if run.summary else "to be fine-tuned"
        why = "no held-out answers were measured" if before is None else "its held-out answers are not measured yet"
        return Finding(f"A model {done}{on}; {why}.", [])
    share = after.nll / before.nll - 1 if before.nll else 0.0
    fell = "hardly changed" if abs(share) <= SAME else "fell" if share < 0 else "rose"
    said = f"The loss of held-out answers {fell}, from {before.nll:.3f} to {after.nll:.3f} nats a token"
    conclusions = [_against_stretched(measured.get("untrained"), after)]
    if share > SAME:
        conclusions.append("This run did not help: try a lower learning rate, or fewer epochs.")
    if after.tokens and after.tokens < _FEW:
        conclusions.append(
            f"It is a rough measure: {wording.whole(after.tokens)} tokens of answers were held out, give more with "
            "--held-out or --evaluation-data."
        )
    return Finding(said + ".", [each for each in conclusions if each], None if abs(share) <= SAME else share < 0)


def _against_stretched(untrained: Answers | None, after: Answers) -> str:
    if untrained is None or not untrained.nll:
        return ""
    share = after.nll / untrained.nll - 1
    verdict = "made no difference" if abs(share) <= SAME else "made it worse" if share > 0 else ""
    verdict = verdict or f"brings it down by {wording.change(share)}"
    return f"Stretching the positions without training gives {untrained.nll:.3f}; training {verdict}."


def answers(run: Recorded) -> Content | None:
    """A row for each `evaluation/answers-*.json`, and the examples; None for a run that is no fine-tuning."""
    if not run.fine_tuned:
        return None
    if not run.answers:
        return "Held-out answers: none were measured in this run (--held-out or --evaluation-data gives some)."
    names = ("pairs", "examples", "tokens", "answer_tokens", "rows", "longest")
    return {
        "rows": run.answers,
        "data": sorted({each.data for each in run.answers if each.data}),
        "facts": {name: run.whole("data", name) for name in names},
        "left_out": run.whole("data", "too_long", "pairs"),
        "format": run.word("data", "prompt_format"),
    }
