"""The page's sections: from what is known of its models to what a template of the same name draws, or why it cannot.

To add one, write its function and `templates/NAME.html.j2`, and list it in `SECTIONS` where it should stand.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

from longlora.errors import UserError
from longlora.report import attention_picture, recipe
from longlora.report.answers_section import answers
from longlora.report.benchmark_sections import longppl, ruler, short
from longlora.report.costs import cost, costs
from longlora.report.models import Model, only_run
from longlora.report.perplexity_section import perplexity
from longlora.report.reading import Content, Recorded
from longlora.report.retrieval_section import retrieval
from longlora.report.training_section import trainable, training
from longlora.results import whole
from longlora.settings import PatternOptions


def of_the_run(section: Callable[[Recorded], Content | None]) -> Callable[[Sequence[Model]], Content | None]:
    """`section` of the run that the page is about; nothing where it is about several models, or none that was run."""

    def drawn(models: Sequence[Model]) -> Content | None:
        run = only_run(models)
        return section(run) if run else None

    return drawn


def attention(run: Recorded) -> Content:
    """What the heads see under the pattern, sixteen tokens small."""
    pattern, group, context = run.word("attention", "pattern"), run.whole("attention", "group_size"), run.context
    pattern = pattern or (run.settings["pattern"] if isinstance(run.settings.get("pattern"), str) else None)
    if pattern is None or context is None:
        return "Attention: the run does not say which pattern it trained with."
    group = group or whole(run.settings.get("group_size")) or max(2, context // 4)
    small = attention_picture.group_in_picture(group, context)
    try:
        panels = attention_picture.panels(pattern, small, run.config, _options_in_picture(run, context))
    except UserError as error:
        return f"Attention: the pattern cannot be drawn ({error})"
    exact = small * context == attention_picture.TOKENS * group
    return {
        "pattern": pattern,
        "panels": panels,
        "group": group,
        "context": context,
        "small": small,
        "exact": exact,
        "tokens": attention_picture.TOKENS,
        "leaks": any(panel.leaks for panel in panels),
        "grouped": pattern != "full",
        "mixed": len(panels) > 1,
    }


def _options_in_picture(run: Recorded, context: int) -> PatternOptions:
    """The run's additions to its pattern, sizes scaled to the picture but never to nothing."""
    given = {field.name: run.settings[field.name] for field in fields(PatternOptions) if field.name in run.settings}
    for name in ("scatter_pieces", "scatter_piece_size", "sink_tokens"):
        if given.get(name) and whole(given[name]) is None:
            raise UserError(f"{name} is {given[name]!r}, no whole number")
    for name in ("scatter_piece_size", "sink_tokens"):
        if given.get(name):
            given[name] = max(1, round(given[name] * attention_picture.TOKENS / context))
    try:
        return PatternOptions(**given)
    except TypeError as error:
        raise UserError(f"settings.yaml has an option of the wrong kind: {error}") from error


def do_it(run: Recorded) -> Content:
    """The command for another model."""
    if run.context is None:
        return "The command to do the same: the run does not say which context it was for."
    return {"command": recipe.command(run.settings, run.context), "pairs": run.fine_tuned}


def use_it(run: Recorded) -> Content:
    """The result in stock transformers and PEFT, and merged."""
    if not run.adapter and not (run.path / "model").is_dir():
        return "How to use the result: this run has no adapter/ or model/ yet."
    return {"merge": recipe.merge_command(run), "loading": recipe.loading(run), "adapter": bool(run.adapter)}


def settings(run: Recorded) -> Content:
    """Every setting, beside its default where it has another value; versions; commit."""
    usual, differing = dict(recipe.defaults(recipe.kind(run.settings))), recipe.differing(run.settings)
    versions = run.settings.get("versions")
    return {
        "rows": [
            (name, _said(value), _said(usual[name]) if name in differing else "")
            for name, value in run.settings.items()
            if name not in ("versions", "commit")
        ],
        "versions": versions if isinstance(versions, dict) else {},
        "commit": run.settings.get("commit"),
        "folder": str(run.path),
    }


def _said(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(str(part) for part in value) or "none"
    if isinstance(value, dict):
        return json.dumps(value, default=str)
    return "–" if value is None else str(value)


SECTIONS: dict[str, Callable[[Sequence[Model]], Content | None]] = {
    "answers": of_the_run(answers),
    "perplexity": perplexity,
    "retrieval": retrieval,
    "ruler": ruler,
    "short": short,
    "longppl": longppl,
    "attention": of_the_run(attention),
    "training": of_the_run(training),
    "trainable": of_the_run(trainable),
    "cost": of_the_run(cost),
    "costs": costs,
    "do_it": of_the_run(do_it),
    "use_it": of_the_run(use_it),
    "settings": of_the_run(settings),
}
"""Name of each section's template -> what fills it, in the order of the page; None where a page is not about that."""
