"""One grid of text, heads first, written three ways: aligned for a terminal, as Markdown, and as CSV."""

import csv as csv_format
import io
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

Grid = Sequence[Sequence[str]]
"""Rows of as many cells each, the heads first."""

WIDEST = 1000
"""Characters of a terminal's line, so that no table is folded."""


def aligned(grid: Grid, words: int = 1) -> str:
    """The grid for a terminal: the first `words` columns to the left, the others, numbers, to the right.

    >>> print(aligned([["perplexity at", "512", "1,024"], ["base", "24.40", "310.27"]]))
    perplexity at    512   1,024
    base           24.40  310.27
    """
    if not grid:
        return ""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    for column in range(len(grid[0])):
        table.add_column(justify="left" if column < words else "right", no_wrap=True)
    for row in grid:
        table.add_row(*row)
    console = Console(file=io.StringIO(), width=WIDEST, color_system=None, markup=False, emoji=False, highlight=False)
    with console.capture() as printed:
        console.print(table)
    return "\n".join(line.rstrip() for line in printed.get().rstrip("\n").split("\n"))


def markdown(grid: Grid, words: int = 1) -> str:
    """The grid as a Markdown table.

    >>> print(markdown([["", "512"], ["base", "24.40"]]))
    |  | 512 |
    | --- | ---: |
    | base | 24.40 |
    """
    if not grid:
        return ""
    rule = ["---"] * words + ["---:"] * (len(grid[0]) - words)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (grid[0], rule, *grid[1:]))


def csv(grid: Sequence[Sequence[object]]) -> str:
    """The grid as CSV (RFC 4180), each value as it is; nothing for None.

    >>> csv([["model", "low"], ["a, b", 1.5], ["c", None]])
    'model,low\\r\\n"a, b",1.5\\r\\nc,\\r\\n'
    """
    written = io.StringIO()
    csv_format.writer(written).writerows(grid)
    return written.getvalue()
