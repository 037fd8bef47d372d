"""What a table of the paper is made of: rows and columns of entries, each one number of one cell, and checks.

A row's `key` is how checks and `longlora.reproduction.paper` name it.
"""

from dataclasses import dataclass

from longlora.errors import UserError
from longlora.reproduction.ways import Way


@dataclass(frozen=True)
class Entry:
    """A number: of the cell of `way`, the one called `what`.

    `perplexity-N` and `own-N` are perplexity at N tokens, with full attention and with the training attention;
    `recall-N` is recall over N tokens, `step-N` the perplexity after N steps; `seconds`, `gigabytes`, `millions` (of
    trainable parameters), `rate` and `embed-rate` are what training took.
    """

    way: Way
    what: str

    @property
    def measure(self) -> str | None:
        """The measurement that the number comes from; None where training itself tells it."""
        kind, _, number = self.what.partition("-")
        if kind == "recall":
            return "recall"
        if kind == "step":
            return "start" if number == "0" else None
        return self.what if kind in ("perplexity", "own") else None


@dataclass(frozen=True)
class Row:
    """One line of a table; `entries` are as many as the columns, None where there is nothing to measure."""

    key: str
    label: str
    entries: tuple[Entry | None, ...]


@dataclass(frozen=True)
class Check:
    """What the paper says of two numbers of the table, each the row's key and the column.

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
    """How a table is drawn: `lines` is a line a row by column, `dots` a row of dots a row, `panels` is figure 1's."""

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
    """A table of the paper at our size."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    checks: tuple[Check, ...]
    number: str = ".3f"
    notes: tuple[str, ...] = ()
    figure: Figure | None = None


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
