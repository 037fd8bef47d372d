"""report.html: what a run directory holds, drawn on one self-contained page."""

import re
from functools import cache
from pathlib import Path
from typing import Any

import jinja2

from longlora.errors import UserError
from longlora.report import wording
from longlora.report.answers_section import answers_finding
from longlora.report.findings import finding, what_was_done
from longlora.report.reading import read_run
from longlora.report.sections import SECTIONS
from longlora.run_directory import RunDirectory, write_whole
from longlora.settings import ReportSettings

_NOT_HTML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")
"""Characters that a page cannot hold."""


def write_report(run: str | Path) -> Path:
    """Write `report.html` into the run directory `run`, in one step, and return its path.

    The page needs no network and no script. What the run has not recorded is left out, with a sentence saying so.

    Raises:
        UserError: `run` is no run directory, or the page cannot be written there.
    """
    target = RunDirectory(run).report
    text = render(run)
    try:
        write_whole(target, text)
    except OSError as error:
        raise UserError(f"{target} cannot be written ({error.strerror}): make room there, or allow writing.") from error
    return target


def report_run(settings: ReportSettings) -> dict[str, Any]:
    """Run `longlora report`: `{"report": path of the page}`. Raises as `write_report`."""
    page = write_report(settings.model)
    if not settings.json:
        print(page)
    return {"report": str(page)}


def render(run: str | Path) -> str:
    """The page's HTML.

    Raises:
        UserError: `run` is no run directory.
    """
    recorded = read_run(run)
    contents = {name: content for name, section in SECTIONS.items() if (content := section(recorded)) is not None}
    html = (
        _templates()
        .get_template("report.html.j2")
        .render(
            finding=answers_finding(recorded) if recorded.fine_tuned else finding(recorded),
            done=what_was_done(recorded),
            sections={name: content for name, content in contents.items() if not isinstance(content, str)},
            left_out=[content for content in contents.values() if isinstance(content, str)],
            unreadable=recorded.unreadable,
            model=str(recorded.settings.get("model") or "a model"),
            context=recorded.context,
        )
    )
    return _NOT_HTML.sub("\N{REPLACEMENT CHARACTER}", html)


@cache
def _templates() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
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
    }
    return environment
