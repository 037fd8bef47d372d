"""`longlora reproduce tableN`: run what the table lacks, print it beside the paper's, and judge the paper's claims."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from longlora.bench.machine import choose_device, hardware
from longlora.errors import UserError, nearest
from longlora.reproduction import figures
from longlora.reproduction.base import base_settings, window_of
from longlora.reproduction.entries import Table, size
from longlora.reproduction.page import write_page
from longlora.reproduction.paper import PAPER
from longlora.reproduction.table_document import (
    about_paper,
    aligned,
    document_of,
    gather,
    grid,
    markdown,
    paper_grid,
    sentence,
)
from longlora.reproduction.table_runs import Job, jobs_of, run_jobs
from longlora.reproduction.tables import TABLES
from longlora.run_directory import versions, write_whole
from longlora.settings import ReproduceSettings


def reproduce_table(settings: ReproduceSettings) -> dict[str, Any]:
    """Run one of the paper's tables.

    Returns:
        What `document_of` returns with `{"name", "model", "data", "evaluation_data", "method", "contexts", "steps",
        "tokens", "seeds", "command", "date", "machine", "versions", "left": [names of cells that were not run]}`, also
        written to OUTPUT/NAME.json, with NAME.md (and for figure1 an SVG) beside it.

    Raises:
        UserError: `--only` names no cell of the table; several contexts would be measured on different documents; or
            what `run_jobs` raises.
    """
    folder = Path(settings.output or "runs/reproduce")
    sizes = size(window_of(settings), settings.context, settings.steps)
    _refuse_documents_that_differ(settings)
    base = base_settings(settings, sizes.top)
    table, seeds = TABLES[settings.name](sizes), settings.seeds or (0,)
    everything = jobs_of(table, base, seeds, folder)
    chosen = _chosen(everything, settings)
    run_jobs(chosen, settings.jobs, settings.minutes, settings.reuse)
    document: dict[str, Any] = {
        "name": settings.name,
        "model": settings.model,
        "data": ", ".join(settings.data),
        "evaluation_data": ", ".join(settings.evaluation_data) or "a held-out part of the standard library",
        "method": settings.method,
        "contexts": list(sizes.contexts),
        "steps": settings.steps,
        "tokens": settings.steps * base.training.batch * sizes.top,
        "seeds": list(seeds),
        "command": _command(settings),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": hardware(choose_device("auto")),
        "versions": versions(),
        "left": [f"{job.cell.name}, seed {job.cell.seed}" for job in everything if not job.is_finished()],
    } | document_of(table, gather(table, base, seeds, folder), PAPER[settings.name])
    _write(document, table, folder, settings)
    return document


def _refuse_documents_that_differ(settings: ReproduceSettings) -> None:
    if "stdlib" not in settings.data and not settings.evaluation_data:
        raise UserError(
            f"--evaluation-data is missing: {settings.name} measures every cell on the same documents, and those held "
            "out of --data would change with the context; name some that are not in --data."
        )


def _chosen(jobs: list[Job], settings: ReproduceSettings) -> list[Job]:
    names = list(dict.fromkeys(job.cell.name for job in jobs))
    for name in settings.only:
        if name not in names:
            raise UserError(
                f"--only names '{name}', which is no cell of {settings.name}: it has {', '.join(names)}. "
                f"{nearest(name, names)}".rstrip()
            )
    return [job for job in jobs if not settings.only or job.cell.name in settings.only]


def _command(settings: ReproduceSettings) -> str:
    """The command that makes the table again, without where its files go."""
    usual = ReproduceSettings(name=settings.name)
    words = ["longlora reproduce", settings.name]
    for name in ("model", "data", "evaluation_data", "context", "method", "steps", "batch", "lr", "seeds"):
        given = getattr(settings, name)
        if given != getattr(usual, name):
            value = (
                ",".join(map(str, given)) if name == "seeds" else " ".join(given) if isinstance(given, tuple) else given
            )
            words.append(f"--{name.replace('_', '-')} {value}")
    return " ".join(words)


def _write(document: dict[str, Any], table: Table, folder: Path, settings: ReproduceSettings) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / f"{settings.name}.json", json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    picture = figures.of_table(document, table.figure)
    text = page_text(document, picture is not None)
    write_whole(folder / f"{settings.name}.md", text)
    places = [folder]
    if settings.pages:
        write_page(Path(settings.pages) / f"{settings.name}.md", text)
        places.append(Path(settings.pages))
    for place in places if picture else []:
        write_whole(place / f"{settings.name}.svg", f"{picture}\n")
    if not settings.json:
        parts = [document["title"], aligned(grid(document)), aligned(paper_grid(document)), about_paper(document)]
        parts += [*document["notes"], "\n".join(sentence(check, table.number) for check in document["checks"])]
        parts.append(_left(document))
        print("\n\n".join(filter(None, parts)))


def page_text(document: dict[str, Any], drawn: bool) -> str:
    """The table as a Markdown page: what was run, on what, when, the table, the paper's beside it, the checks."""
    left = _left(document)
    contexts = ", ".join(f"{context:,}" for context in document["contexts"])
    libraries = ", ".join(f"{name} {document['versions'][name]}" for name in ("torch", "transformers", "peft"))
    seeds = ", ".join(map(str, document["seeds"]))
    parts = [
        f"# {document['title']}",
        f"`{document['command']}`",
        f"{document['date']}, {document['machine']}; {libraries}. Model {document['model']}, trained on "
        f"{document['data']}, measured on {document['evaluation_data']}; contexts {contexts}; {document['steps']} "
        f"steps, {document['tokens']:,} tokens a cell; positions {document['method']}; seed"
        f"{'s' if len(document['seeds']) > 1 else ''} {seeds}. ± is the standard error over seeds.",
        markdown(grid(document)),
        markdown(paper_grid(document)),
        f"![{document['title']}]({document['name']}.svg)" if drawn else "",
        about_paper(document),
        *document["notes"],
        "## What the paper says, and what is so here",
        "\n".join(f"- {sentence(check, document['number'])}" for check in document["checks"]),
        left,
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _left(document: dict[str, Any]) -> str:
    if not document["left"]:
        return ""
    return f"Not run yet ({len(document['left'])}): {'; '.join(document['left'])}. The same command goes on with them."
