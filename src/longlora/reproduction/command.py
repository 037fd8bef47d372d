"""`longlora reproduce NAME`: run what a table or study lacks, print it, and judge what is claimed of it."""

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from longlora.bench.machine import choose_device, hardware
from longlora.errors import UserError, nearest
from longlora.reproduction import figures
from longlora.reproduction.base import base_settings, window_of
from longlora.reproduction.entries import Table, size
from longlora.reproduction.flops_table import flops_table
from longlora.reproduction.page import write_page
from longlora.reproduction.paper import PAPER
from longlora.reproduction.real_model import real_model
from longlora.reproduction.table_document import about_paper, document_of, gather, grid, numbers, paper_grid, words
from longlora.reproduction.table_runs import Job, jobs_of, run_jobs
from longlora.reproduction.tables import TABLES
from longlora.run_directory import versions, write_whole
from longlora.settings import STUDIES, ReproduceSettings
from longlora.tables import aligned, csv, markdown


def reproduce(settings: ReproduceSettings) -> dict[str, Any]:
    """Run `longlora reproduce`.

    Returns:
        `{"name", "model", "data", "evaluation_data", "method", "contexts", "steps", "tokens", "seeds", "command",
        "date", "machine", "versions", "left": [names of cells that were not run]}` with what `document_of` returns; of
        a study with `"tables"`, one such for each. It is also written to OUTPUT/NAME.json, with a page, CSV and figures
        (SVG and PDF) beside it. `table7`: as `flops_table` does.

    Raises:
        UserError: `--only` names no cell of the table; several contexts would be measured on different documents; or
            what `run_jobs` raises.
    """
    if settings.name == "table7":
        return flops_table(settings)
    if settings.name == "real-model":
        return real_model(settings)
    folder = Path(settings.output or ("runs/" + (settings.name if settings.name in STUDIES else "reproduce")))
    sizes = size(window_of(settings), settings.context, settings.steps)
    _refuse_documents_that_differ(settings)
    base = base_settings(settings, sizes.top)
    tables = TABLES[settings.name](sizes)
    seeds = settings.seeds or ((0, 1, 2) if settings.name in STUDIES else (0,))
    everything = jobs_of(tables, base, seeds, folder)
    run_jobs(_chosen(everything, settings), settings.jobs, settings.minutes, settings.reuse)
    about: dict[str, Any] = {
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
    }
    paper = PAPER.get(settings.name)
    made = [about | document_of(table, gather(table, base, seeds, folder), paper) for table in tables]
    document = made[0]
    if settings.name in STUDIES:
        own = [{name: value for name, value in each.items() if name not in about} for each in made]
        document = about | {"tables": [{"part": table.part, **each} for table, each in zip(tables, own, strict=True)]}
    _write(document, made, tables, folder, settings)
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
            between = "," if name == "seeds" else " "
            value = between.join(map(str, given)) if isinstance(given, tuple) else given
            words.append(f"--{name.replace('_', '-')} {value}")
    return " ".join(words)


def _write(
    document: dict[str, Any],
    made: Sequence[dict[str, Any]],
    tables: Sequence[Table],
    folder: Path,
    settings: ReproduceSettings,
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / f"{settings.name}.json", json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    places = [folder, *([Path(settings.pages)] if settings.pages else [])]
    drawn = []
    for place in places:
        place.mkdir(parents=True, exist_ok=True)
        files = [place / (table.part or settings.name) for table in tables]
        for file, table, each in zip(files, tables, made, strict=True):
            write_whole(file.with_suffix(".csv"), csv(numbers(each)))
            drawn.append(file.name if figures.save(each, table.figure, file) else "")
    text = page_text(made, drawn[: len(tables)])
    write_whole(folder / f"{settings.name}.md", text)
    if settings.pages:
        write_page(Path(settings.pages) / f"{settings.name}.md", text)
    if not settings.json:
        parts = [_left(document)]
        for each in reversed(made):
            grids = [aligned(grid(each)), aligned(paper_grid(each))]
            parts = [each["title"], *grids, about_paper(each), *each["notes"], "\n".join(words(each)), *parts]
        print("\n\n".join(filter(None, parts)))


def page_text(made: Sequence[dict[str, Any]], drawn: Sequence[str]) -> str:
    """The tables as a Markdown page: what was run, on what, when, the table, the paper's beside it, the checks.

    Args:
        made: a document for each table.
        drawn: name of each table's figure, empty where it has none.
    """
    document = made[0]
    contexts = ", ".join(f"{context:,}" for context in document["contexts"])
    libraries = ", ".join(f"{name} {document['versions'][name]}" for name in ("torch", "transformers", "peft"))
    seeds = ", ".join(map(str, document["seeds"]))
    parts = [
        f"# {document['title']}",
        f"`{document['command']}`",
        f"{document['date']}, {document['machine']}; {libraries}. Model {document['model']}, trained on "
        f"{document['data']}, measured on {document['evaluation_data']}; contexts {contexts}; {document['steps']} "
        f"steps, {document['tokens']:,} tokens a cell; positions {document['method']}; seed"
        f"{'s' if len(document['seeds']) > 1 else ''} {seeds}. ± is half of the 95% interval over seeds (Student's t).",
    ]
    for place, (each, figure) in enumerate(zip(made, drawn, strict=True)):
        parts += [f"## {each['title']}"] if place else []
        parts += [markdown(grid(each)), markdown(paper_grid(each))]
        parts += [f"![{each['title']}]({figure}.svg)" if figure else "", about_paper(each), *each["notes"]]
        if each["checks"]:
            parts += ["## What the paper says, and what is so here", "\n".join(f"- {said}" for said in words(each))]
    return "\n\n".join(filter(None, [*parts, _left(document)])) + "\n"


def _left(document: dict[str, Any]) -> str:
    if not document["left"]:
        return ""
    return f"Not run yet ({len(document['left'])}): {'; '.join(document['left'])}. The same command goes on with them."
