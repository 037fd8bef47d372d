"""What a table is made of: rows and columns of entries, each one number of one cell, checks, and a figure.

To define a study of your own, write a function in a file of its own that takes a `Size` and returns its `Table`s, as
`longlora.reproduction.attention_study.tables` does, list it in `longlora.reproduction.tables.TABLES`, and name it in
`longlora.settings.reproduction.STUDIES`. Cells, runs, resuming, tables, CSV and figures come with that:

    a way      how a model is made; two entries whose ways make a cell of one name share it
    an entry   a way and the name of a number: one of `measuring.MEASURES` (a study adds its own there) or of
               `measuring.TOOK`
    a check    what is claimed of two entries; judged over seeds
"""

from dataclasses import dataclass

from longlora.errors import UserError
from longlora.reproduction.ways import Way


@dataclass(frozen=True)
class Entry:
    """A number of the cell of `way`: `what` is `MEASURE`, `MEASURE-N` or what training took."""

    way: Way
    what: str

    @property
    def kind(self) -> str:
        return self.what.partition("-")[0]

    @property
    def number(self) -> str:
        return self.what.partition("-")[2]


@dataclass(frozen=True)
class Ratio:
    """`own` over `other`, seed by seed, less one where it is a `gap`."""

    own: Entry
    other: Entry
    gap: bool = False


@dataclass(frozen=True)
class Row:
    """One line of a table; `entries` are as many as the columns, None where there is nothing to measure. `key` is how
    checks and `longlora.reproduction.paper` name it."""

    key: str
    label: str
    entries: tuple[Entry | Ratio | None, ...]


@dataclass(frozen=True)
class Check:
    """What is claimed of two numbers of the table, each the row's key and the column.

    `relation` is `above` (left > right), `far above` (left > 1.5 right), or `near` (left at most `near` above right,
    as a share of it).
    """

    claim: str
    left: tuple[str, int]
    relation: str
    right: tuple[str, int]
    near: float = 0.03


@dataclass(frozen=True, kw_only=True)
class Figure:
    """How a table is drawn.

    `lines`: a line a row by column; `dots`: a row of dots a row; `points`: a dot a row, the first of `columns` across
    and the second up; `panels`: figure 1's.
    """

    kind: str
    up: str = "perplexity, tested with full attention"
    """What the numbers are."""

    across: str = ""
    """What the columns are."""

    rows: tuple[str, ...] = ()
    """Keys of the rows that are drawn; default all."""

    columns: tuple[int, ...] = ()
    """Columns that are drawn; default all."""


@dataclass(frozen=True)
class Table:
    """A table at our size."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    checks: tuple[Check, ...] = ()
    number: str = ".3f"
    """How numbers are written; a column whose head ends in "%" holds shares."""

    notes: tuple[str, ...] = ()
    figure: Figure | None = None
    part: str = ""
    """What its files are named after, where a study has several; default the study's name."""


@dataclass(frozen=True)
class Size:
    """How large the tables are: the model's window, contexts to extend to (rising) in tokens, and steps a cell."""

    window: int
    contexts: tuple[int, ...]
    steps: int

    @property
    def top(self) -> int:
        return self.contexts[-1]


def size(window: int, context: int | None, steps: int) -> Size:
    """Contexts are `context` (default eight times the window), its half and its quarter, those above the window.

    Raises:
        UserError: `context` is not above the window.
    """
    top = context or 8 * window
    if top <= window:
        raise UserError(f"--context is {top:,}: it must be above the model's window, {window:,} tokens.")
    return Size(window, tuple(c for c in (top // 4, top // 2, top) if c > window), steps)
