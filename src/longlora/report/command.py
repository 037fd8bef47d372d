"""`longlora report`: the page of one run, or one page on which models stand side by side."""

from pathlib import Path
from typing import Any

from longlora.report.missing import missing
from longlora.report.models import is_run, read_models
from longlora.report.page import render, write_page, write_report
from longlora.settings import ReportSettings

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
        models = read_models(settings.models)
        document = {
            "report": str(write_page(Path(settings.output or PAGE), render(models))),
            "models": [model.name for model in models],
            "missing": [{"what": each.what, "commands": each.commands} for each in missing(models)],
        }
    if not settings.json:
        print(document["report"])
    return document
