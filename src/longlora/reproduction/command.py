"""`longlora reproduce NAME`: run what a table or study lacks, print it, and judge what is claimed of it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from longlora.reproduction import figures
from longlora.reproduction.base import about, base_settings, refuse_mistakes, window_of
from longlora.reproduction.entries import Table, size
from longlora.reproduction.flops_table import flops_table
from longlora.reproduction.page import output_folders, write_result
from longlora.reproduction.paper import PAPER
from longlora.reproduction.real_model import real_model
from longlora.reproduction.table_document import about_paper, document_of, gather, grid, numbers, paper_grid, words
from longlora.reproduction.table_runs import jobs_of, run_jobs
from longlora.reproduction.tables import TABLES
from longlora.settings import STUDIES, ReproduceSettings
from longlora.tables import aligned, markdown


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
    base = base_settings(settings, sizes.top)
    tables = TABLES[settings.name](sizes)
    seeds = settings.seeds or ((0, 1, 2) if settings.name in STUDIES else (0,))
    everything = jobs_of(tables, base, seeds, folder)
    refuse_mistakes(settings, dict.fromkeys(job.cell.name for job in everything))
    chosen = [job for job in everything if not settings.only or job.cell.name in settings.only]
    run_jobs(chosen, settings.jobs, settings.minutes, settings.reuse)
    shared = about(settings) | {
        "method": settings.method,
        "contexts": list(sizes.contexts),
        "tokens": settings.steps * base.training.batch * sizes.top,
        "seeds": list(seeds),
        "command": _command(settings),
        "left": [f"{job.cell.name}, seed {job.cell.seed}" for job in everything if not job.is_finished()],
    }
    paper = PAPER.get(settings.name)
    made = [shared | document_of(table, gather(table, base, seeds, folder), paper) for table in tables]
    document = made[0]
    if settings.name in STUDIES:
        own = [{name: value for name, value in each.items() if name not in shared} for each in made]
        document = shared | {"tables": [{"part": table.part, **each} for table, each in zip(tables, own, strict=True)]}
    _write(document, made, tables, folder, settings)
    return document


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
    grids, drawn = {}, []
    for table, each in zip(tables, made, strict=True):
        name = table.part or settings.name
        grids[name] = numbers(each)
        saved = [figures.save(each, table.figure, place / name) for place in output_folders(settings, folder)]
        drawn.append(name if all(saved) else "")
    write_result(settings, folder, document, page_text(made, drawn), grids)
    if not settings.json:
        parts = [_left(document)]
        for each in reversed(made):
            printed = [aligned(grid(each)), aligned(paper_grid(each))]
            parts = [each["title"], *printed, about_paper(each), *each["notes"], "\n".join(words(each)), *parts]
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
