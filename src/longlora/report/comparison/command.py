"""`longlora report`: the page of one run, or one page on which models stand side by side."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from longlora.report.benchmark_sections import longppl, ruler, short
from longlora.report.comparison.costs import costs
from longlora.report.comparison.headline import conclusions, headline
from longlora.report.comparison.missing import missing
from longlora.report.comparison.perplexity_lines import perplexity
from longlora.report.comparison.subjects import Subject, is_run, read_subjects
from longlora.report.page import fill, write_page, write_report
from longlora.report.retrieval_section import retrieval
from longlora.settings import ReportSettings

logger = logging.getLogger(__name__)

PAGE = "comparison.html"


def report(settings: ReportSettings) -> dict[str, Any]:
    """Run `longlora report`.

    Returns:
        `{"report": path of the page}`; of a comparison also `"models"`, their names on the page, and `"missing":
        [{"what", "commands"}]`, what would make it whole.

    Raises:
        UserError: a folder that holds neither a run nor results, or a page that cannot be written.
    """
    if len(settings.models) == 1 and is_run(settings.models[0]):
        document: dict[str, Any] = {"report": str(write_report(settings.models[0], settings.output))}
    else:
        subjects = read_subjects(settings.models)
        page = write_page(Path(settings.output or PAGE), render_comparison(subjects))
        document = {
            "report": str(page),
            "models": [subject.name for subject in subjects],
            "missing": [{"what": each.what, "commands": each.commands} for each in missing(subjects)],
        }
    if not settings.json:
        print(document["report"])
    return document


def render_comparison(subjects: Sequence[Subject]) -> str:
    """The HTML of the page that compares `subjects`."""
    evaluated = [subject.evaluated for subject in subjects]
    sections = {
        "compared_perplexity": perplexity(subjects),
        "retrieval": retrieval(evaluated),
        "ruler": ruler(evaluated),
        "short": short(evaluated),
        "longppl": longppl(evaluated),
        "compared_costs": costs(subjects),
    }
    return fill(
        "comparison.html.j2",
        Path(__file__).parent / "templates",
        headline=headline(subjects),
        conclusions=conclusions(subjects),
        models=[_introduced(subject) for subject in subjects],
        sections={name: content for name, content in sections.items() if content},
        missing=missing(subjects),
        unreadable=[
            f"{subject.name}, {name}"
            for subject in subjects
            for name in [*subject.evaluated.unreadable, *(subject.run.unreadable if subject.run else [])]
        ],
    )


def _introduced(subject: Subject) -> dict[str, str]:
    """A row of the table of models."""
    run = subject.run
    if run is None:
        label = subject.evaluated.label or subject.model
        what = f"{label}, as it is" if label == subject.model else label
        return {"name": subject.name, "what": what, "seed": "–", "folder": subject.path}
    base = run.settings.get("model")
    parts = [f"{base} extended to {run.context:,} tokens" if run.context else f"made from {base}"]
    method, pattern = run.settings.get("method"), run.settings.get("pattern")
    parts += [f"positions by {method}"] if isinstance(method, str) else []
    parts += [f"trained with {pattern} attention"] if isinstance(pattern, str) else []
    share = run.settings.get("full_layers_share")
    parts += [f"{share:.0%} of the layers full"] if isinstance(share, float) and 0 < share <= 1 else []
    steps, seed = run.settings.get("steps"), run.settings.get("seed")
    parts += [f"{steps:,} steps"] if isinstance(steps, int) else []
    return {
        "name": subject.name,
        "what": ", ".join(parts),
        "seed": str(seed) if isinstance(seed, int) else "–",
        "folder": subject.path,
    }
