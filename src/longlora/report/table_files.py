"""The CSV of each table of a page, linked beside it: the page stays one file that needs nothing else."""

import re
from collections.abc import Iterator
from html import unescape
from urllib.parse import quote

from longlora.tables import csv

_TABLE = re.compile(r"<table\b(?P<head>[^>]*)>(?P<body>.*?)</table>\s*</div>", re.DOTALL)
_ROW = re.compile(r"<tr\b[^>]*>(.*?)</tr>", re.DOTALL)
_CELL = re.compile(r"<(t[hd])\b[^>]*>(.*?)</\1>", re.DOTALL)
_DATA = re.compile(r'<data value="([^"]*)"(?: data-low="([^"]*)" data-high="([^"]*)")?>')


def with_files(html: str) -> str:
    """`html` with a link to its CSV behind each table that lies in a scrolling `<div>`."""
    numbers: Iterator[int] = iter(range(1, 10**6))

    def linked(table: re.Match[str]) -> str:
        named = re.search(r'\bid="([^"]*)"', table["head"])
        name = named[1] if named else f"table-{next(numbers)}"
        href = f"data:text/csv;charset=utf-8,{quote(csv(cells(table['body'])))}"
        return f'{table[0]}\n<p class="csv"><a download="{name}.csv" href="{href}">CSV</a></p>'

    return _TABLE.sub(linked, html)


def cells(table: str) -> list[list[str]]:
    """The numbers of a table's HTML as they are, its words as they are read; a column that has intervals has two more.

    >>> cells('<tr><th>model</th><th>512</th></tr>'
    ...       '<tr><th>a &amp; b</th><td><data value="24.371" data-low="24.1" data-high="24.6">24.37</data></td></tr>')
    [['model', '512', '512 low', '512 high'], ['a & b', '24.371', '24.1', '24.6']]
    """
    rows = [[_cell(cell) for _, cell in _CELL.findall(row)] for row in _ROW.findall(table)]
    wide = {place for row in rows for place, cell in enumerate(row) if len(cell) > 1}
    grid = []
    for number, row in enumerate(rows):
        line: list[str] = []
        for place, cell in enumerate(row):
            ends = [f"{cell[0]} low", f"{cell[0]} high"] if number == 0 else cell[1:] or ["", ""]
            line += [cell[0], *(ends if place in wide else [])]
        grid.append(line)
    return grid


def _cell(html: str) -> list[str]:
    """Its number with the ends of its interval, or its words."""
    if found := _DATA.search(html):
        return [unescape(part) for part in found.groups() if part is not None]
    return [unescape(" ".join(re.sub(r"<[^>]*>", " ", html).split()))]
