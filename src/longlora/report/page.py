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
    return write_page(Path(output) if output else RunDirectory(run).report, render(run))


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


def render(run: str | Path) -> str:
    """The page's HTML.

    Raises:
        UserError: `run` is no run directory.
    """
    recorded = read_run(run)
    contents = {name: content for name, section in SECTIONS.items() if (content := section(recorded)) is not None}
    return fill(
        "report.html.j2",
        finding=answers_finding(recorded) if recorded.fine_tuned else finding(recorded),
        done=what_was_done(recorded),
        sections={name: content for name, content in contents.items() if not isinstance(content, str)},
        left_out=[content for content in contents.values() if isinstance(content, str)],
        unreadable=[*recorded.unreadable, *recorded.evaluated.unreadable],
        model=str(recorded.settings.get("model") or "a model"),
        context=recorded.context,
    )


def fill(template: str, *folders: Path, **values: Any) -> str:
    """The HTML of a template of this room, or of `folders`, which may use the templates of this room."""
    html = with_files(_templates(*folders).get_template(template).render(**values))
    return _NOT_HTML.sub("\N{REPLACEMENT CHARACTER}", html)


@cache
def _templates(*folders: Path) -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([*folders, Path(__file__).parent / "templates"]),
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
        "capitalize_first": wording.capital,
    }
    return environment
