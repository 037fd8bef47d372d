"""What the page cannot show, each with the command that would make it, in the way that the others were measured."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from longlora.report.comparison.perplexity_lines import Line, groups, lines
from longlora.report.comparison.subjects import Subject
from longlora.report.reading import PerplexityOf
from longlora.report.results import MEASURES, RETRIEVALS, Evaluated
from longlora.report.ways import alike
from longlora.report.wording import listed

NAMES = {
    "perplexity": "perplexity",
    "passkey": "pass keys",
    "topics": "topics",
    "lines": "lines",
    "ruler": "RULER",
    "short": "what is lost at short length",
    "longppl": "LongPPL",
}

USUAL = {
    "perplexity": "--data DOCUMENTS",
    "short": "--data DOCUMENTS",
    "longppl": "--data DOCUMENTS --evaluator MODEL",
}
"""Options where no model shows the way."""


@dataclass(frozen=True)
class Missing:
    what: str
    """A sentence."""
    commands: list[str]


def missing(subjects: Sequence[Subject]) -> list[Missing]:
    """What was not measured of a model, or not in the way of the others."""
    found = []
    for measure in MEASURES:
        done, usual, options = _done(measure, subjects)
        absent = [subject for subject in subjects if subject.path not in done and _expected(measure, subject)]
        others = [subject for subject in subjects if subject.path in done and subject.path not in usual]
        if absent:
            of = listed([subject.name for subject in absent]) if done else "any of these models"
            found.append(Missing(f"{_capital(NAMES[measure])} of {of}", _commands(measure, absent, options)))
        if others:
            of = listed([subject.name for subject in others])
            what = f"{_capital(NAMES[measure])} of {of} in the way of the others"
            found.append(Missing(what, _commands(measure, others, options)))
    return found


def _expected(measure: str, subject: Subject) -> bool:
    """A model that all are compared with has not lost anything itself."""
    return measure != "short" or not subject.evaluated.is_baseline


def _done(measure: str, subjects: Sequence[Subject]) -> tuple[set[str], set[str], str]:
    """Paths of the models that were measured, of those measured in the most usual way, and the options of that way."""
    if measure == "perplexity":
        together = groups([line for line in lines(subjects) if line.subject])
        done = {line.subject.path for group in together for line in group if line.subject}
        if not together:
            return done, done, ""
        return done, {line.subject.path for line in together[0] if line.subject}, _options(together[0])
    measured = [(subject.path, found) for subject in subjects if (found := _result(measure, subject.evaluated))]
    if not measured:
        return set(), set(), ""
    usual = alike(measured, lambda each: _way(each[1]))[0]
    return {path for path, _ in measured}, {path for path, _ in usual}, usual[0][1].command


def _result(measure: str, evaluated: Evaluated) -> Any:
    return evaluated.retrievals.get(measure) if measure in RETRIEVALS else getattr(evaluated, measure)


def _way(result: Any) -> Mapping[str, str]:
    return {"baseline": getattr(result, "baseline", ""), **result.way}


def _options(group: Sequence[Line]) -> str:
    """The options that measure another model as these were."""
    measured: PerplexityOf = group[0].measured
    contexts = ",".join(str(result.context) for result in measured.results)
    options = [f"--data {measured.data.replace(', ', ' ') or 'DOCUMENTS'}", f"--contexts {contexts}"]
    options += [f"--stride {measured.stride}"] if measured.stride else []
    options += [f"--score {measured.score}"] if measured.score == "window" else []
    options += [f"--max-documents {measured.max_documents}"] if measured.max_documents else []
    options += [f"--min-document-tokens {measured.min_document_tokens}"] if measured.min_document_tokens else []
    return " ".join(options)


def _commands(measure: str, subjects: Sequence[Subject], options: str) -> list[str]:
    """One command for all runs, and one for each folder of results."""
    rest = options or USUAL.get(measure, "")
    runs = [subject.model for subject in subjects if subject.run]
    commands = [f"longlora eval {measure} {shlex.join(runs)} {rest}".rstrip()] if runs else []
    for subject in subjects:
        if not subject.run:
            place = f"--output {shlex.quote(subject.path)}"
            words = [shlex.quote(subject.model), place, subject.evaluated.options, rest]
            commands.append(" ".join(["longlora eval", measure, *filter(None, words)]))
    return commands


def _capital(words: str) -> str:
    return words[:1].upper() + words[1:]
