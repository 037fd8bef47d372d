"""report.html and comparison.html: what run directories and folders of results hold, on one self-contained page."""

import re
from functools import cache
from pathlib import Path

import jinja2

from longlora.errors import UserError
from longlora.report import wording
from longlora.report.findings import finding
from longlora.report.missing import missing
from longlora.report.models import Model, compared, only_run, read_models
from longlora.report.sections import SECTIONS
from longlora.report.table_files import with_files
from longlora.run_directory import RunDirectory, write_whole

_NOT_HTML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")
"""Characters that a page cannot hold."""


def write_report(run: str | Path, output: str | Path | None = None) -> Path:
    """Write the page of the run directory `run`, in one step, and return its path: `output`, or `report.html` in it.

    The page needs no network and no script. What the run has not recorded is left out, with a sentence saying so.

    Raises:
        UserError: `run` is no run directory, or the page cannot be written there.
    """
    return write_page(Path(output) if output else RunDirectory(run).report, render(read_models([run])))


def write_page(target: Path, text: str) -> Path:
    """Write the HTML `text` as `target`, in one step.

    Raises:
        UserError: it cannot be written there.
    """
    try:
        write_whole(target, text)
    except OSError as error:
        raise UserError(f"{target} cannot be written ({error.strerror}): make room there, or allow writing.") from error
    return target


def render(models: list[Model]) -> str:
    """The HTML of the page of `models`."""
    run = only_run(models)
    contents = {name: content for name, section in SECTIONS.items() if (content := section(models)) is not None}
    html = (
        _templates()
        .get_template("report.html.j2")
        .render(
            finding=finding(models),
            run=run,
            models=models if run is None else [],
            sections={name: content for name, content in contents.items() if not isinstance(content, str)},
            left_out=[content for content in contents.values() if isinstance(content, str)],
            missing=missing(models) if run is None else [],
            unreadable=[
                name if run else f"{model.name}, {name}"
                for model in models
                for name in (*(model.run.unreadable if model.run else ()), *model.unreadable)
            ],
            about=compared(models),
        )
    )
    return _NOT_HTML.sub("\N{REPLACEMENT CHARACTER}", with_files(html))


@cache
def _templates() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        extensions=["jinja2.ext.do"],
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "perplexity": wording.perplexity,
        "plain": wording.plain,
        "whole": wording.whole,
        "percent": wording.percent,
        "duration": wording.duration,
        "memory": wording.memory,
        "listed": wording.listed,
        "capitalize_first": wording.capital,
    }
    return environment
