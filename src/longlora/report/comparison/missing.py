"""What the page cannot show, each with the command that would make it: the one that the others were measured by."""

import itertools
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from longlora.report.comparison.perplexity_lines import groups, lines
from longlora.report.comparison.subjects import Subject
from longlora.report.ways import alike, joined, way_of
from longlora.report.wording import capital, listed
from longlora.results import MEASURES, Result

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
    "perplexity": ("--data", "DOCUMENTS"),
    "short": ("--data", "DOCUMENTS"),
    "longppl": ("--data", "DOCUMENTS", "--evaluator", "MODEL"),
}
"""Options where no file says how others were measured."""

OF_ONE_MODEL = {
    "--output": 1,
    "--baseline": 1,
    "--extend-to": 1,
    "--method": 1,
    "--revision": 1,
    "--resume": 0,
    "--json": 0,
}
"""Options that are about one model or one call -> how many words follow."""


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
        # a model that all are compared with has not lost anything itself
        expected = [each for each in subjects if measure != "short" or not each.evaluated.is_baseline]
        absent = [subject for subject in expected if subject.path not in done]
        others = [subject for subject in subjects if subject.path in done and subject.path not in usual]
        name = capital(NAMES[measure])
        if absent:
            of = listed([subject.name for subject in absent]) if done else "any of these models"
            found.append(Missing(f"{name} of {of}", list(_commands(measure, absent, options))))
        if others:
            of = listed([subject.name for subject in others])
            found.append(Missing(f"{name} of {of} in the way of the others", list(_commands(measure, others, options))))
    return found


def _done(measure: str, subjects: Sequence[Subject]) -> tuple[set[str], set[str], Sequence[str]]:
    """Paths of the models that were measured, of those measured in the most usual way, and the options of that way."""
    if measure == "perplexity":
        together = groups([line for line in lines(subjects) if line.subject])
        done = {line.subject.path for group in together for line in group if line.subject}
        if not together:
            return done, done, ()
        first = [line.measured for line in together[0]]
        contexts = ",".join(str(result.context) for result in first[0].results)
        by_hand = ("--data", *joined(first[0].data).split(", "), "--contexts", contexts)
        options = _options(first) or by_hand  # what a run measured of itself was made by no such command
        return done, {line.subject.path for line in together[0] if line.subject}, options
    measured = [
        (subject.path, document) for subject in subjects if (document := subject.evaluated.documents.get(measure))
    ]
    if not measured:
        return set(), set(), ()
    usual = alike(measured, lambda each: way_of(each[1]))[0]
    return {path for path, _ in measured}, {path for path, _ in usual}, _options([document for _, document in usual])


def _options(documents: Sequence[Result]) -> list[str]:
    """The options of the command that one of `documents` keeps, without those of its own model."""
    command = next((document.command for document in documents if document.command), ())
    words = itertools.dropwhile(lambda word: not word.startswith("-"), command)
    kept = []
    for word in words:
        flag, given, _ = word.partition("=")
        if flag in OF_ONE_MODEL:
            for _ in range(0 if given else OF_ONE_MODEL[flag]):
                next(words, None)
        else:
            kept.append(word)
    return kept


def _commands(measure: str, subjects: Sequence[Subject], options: Sequence[str]) -> Iterator[str]:
    """One command for all runs, and one for each folder of results."""
    start, rest = ("longlora", "eval", measure), options or USUAL.get(measure, ())
    runs = [subject.model for subject in subjects if subject.run]
    if runs:
        yield shlex.join([*start, *runs, *rest])
    for subject in subjects:
        if not subject.run:
            own = shlex.split(subject.evaluated.options)
            yield shlex.join([*start, subject.model, "--output", subject.path, *own, *rest])
