"""What the page cannot show, each with the command that would make it: the one that the others were measured by."""

import itertools
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from longlora.report.models import Model
from longlora.report.perplexity_section import curves, groups
from longlora.report.ways import alike, way_of
from longlora.report.wording import capital, joined, listed
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


def missing(models: Sequence[Model]) -> list[Missing]:
    """What was not measured of a model, or not in the way of the others."""
    found = []
    for measure in MEASURES:
        done, usual, options = _done(measure, models)
        # a model that all are compared with has not lost anything itself
        expected = [each for each in models if measure != "short" or not each.is_baseline]
        absent = [model for model in expected if model.path not in done]
        others = [model for model in models if model.path in done and model.path not in usual]
        name = capital(NAMES[measure])
        if absent:
            of = listed([model.name for model in absent]) if done else "any of these models"
            found.append(Missing(f"{name} of {of}", list(_commands(measure, absent, options))))
        if others:
            of = listed([model.name for model in others])
            found.append(Missing(f"{name} of {of} in the way of the others", list(_commands(measure, others, options))))
    return found


def _done(measure: str, models: Sequence[Model]) -> tuple[set[str], set[str], Sequence[str]]:
    """Paths of the models that were measured, of those measured in the most usual way, and the options of that way."""
    if measure == "perplexity":
        together = groups([curve for curve in curves(models) if curve.model])
        done = {curve.model.path for group in together for curve in group if curve.model}
        if not together:
            return done, done, ()
        first = [curve.measured for curve in together[0]]
        contexts = ",".join(str(result.context) for result in first[0].results)
        by_hand = ("--data", *joined(first[0].data).split(", "), "--contexts", contexts)
        options = _options(first) or by_hand  # what a run measured of itself was made by no such command
        return done, {curve.model.path for curve in together[0] if curve.model}, options
    measured = [(model.path, document) for model in models if (document := model.documents.get(measure))]
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


def _commands(measure: str, models: Sequence[Model], options: Sequence[str]) -> Iterator[str]:
    """One command for all runs, and one for each folder of results."""
    start, rest = ("longlora", "eval", measure), options or USUAL.get(measure, ())
    if runs := [model.model for model in models if model.run]:
        yield shlex.join([*start, *runs, *rest])
    for model in models:
        if not model.run:
            context, method = model.said("extend_to"), model.said("method")
            own = ["--extend-to", str(context), "--method", method] if context and method else []
            yield shlex.join([*start, model.model, "--output", model.path, *own, *rest])
