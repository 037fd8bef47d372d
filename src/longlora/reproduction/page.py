"""A result's files; and its page in the documents: what was run, the table, and what people make of it; their list."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from longlora.settings import ReproduceSettings
from longlora.tables import csv
from longlora.whole_files import write_json, write_whole

OWN_WORDS = "## What we make of it"
"""From this heading on a page is written by hand, and stays when the page is written anew."""

LIST_BEGINS, LIST_ENDS = "<!-- the pages in this folder -->\n", "<!-- end of the pages -->\n"
"""Between these lines of README.md beside the pages they are listed."""


def write_result(
    settings: ReproduceSettings,
    folder: Path,
    document: Mapping[str, Any],
    text: str,
    tables: Mapping[str, Sequence[Sequence[object]]],
) -> None:
    """Write NAME.json, NAME.md and a CSV for each of `tables` in `folder`; with `--pages` also the page and CSVs there.

    Args:
        text: the page, Markdown.
        tables: by the name of their file.
    """
    everywhere = output_folders(settings, folder)
    write_json(folder / f"{settings.name}.json", document, ascii=False)
    write_whole(folder / f"{settings.name}.md", text)
    if settings.pages:
        write_page(Path(settings.pages) / f"{settings.name}.md", text)
    for place in everywhere:
        for name, grid in tables.items():
            write_whole(place / f"{name}.csv", csv(grid))


def output_folders(settings: ReproduceSettings, folder: Path) -> list[Path]:
    """The folders, made where they are not there, that hold what people read: OUTPUT, and that of `--pages`."""
    found = [folder, *([Path(settings.pages)] if settings.pages else [])]
    for place in found:
        place.mkdir(parents=True, exist_ok=True)
    return found


def write_page(file: Path, text: str) -> None:
    """Write `text` into `file`, keeping what stands there from `OWN_WORDS` on, and list it in README.md beside it."""
    before = file.read_text(encoding="utf-8") if file.exists() else ""
    _, heading, words = before.partition(OWN_WORDS)
    write_whole(file, text.rstrip() + "\n\n" + (heading + words if heading else f"{OWN_WORDS}\n\n(Not written yet.)\n"))
    readme = file.parent / "README.md"
    if readme.exists():
        write_whole(readme, with_list(readme.read_text(encoding="utf-8"), file.parent))


def with_list(text: str, folder: Path) -> str:
    """`text` with the pages in `folder` listed between its two lines; as it is where it lacks them."""
    before, begins, rest = text.partition(LIST_BEGINS)
    _, ends, after = rest.partition(LIST_ENDS)
    if not ends:
        return text
    lines = ["| page | shows |", "|---|---|"]
    # table2 stands before table11
    for page in sorted(folder.glob("*.md"), key=lambda page: (len(page.stem), page.stem)):
        if page.name != "README.md":
            heading = page.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")
            lines.append(f"| [{page.stem}]({page.name}) | {heading} |")
    return before + begins + "\n" + "\n".join(lines) + "\n\n" + ends + after
