"""Results as a table for a terminal: what was varied across, models down, each figure with its 95% interval."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from longlora.tables import aligned

Result = Mapping[str, Any]


def result_table(
    documents: Sequence[Result],
    heading: str,
    figure: Callable[[Result], str],
    column: str = "context",
    row: Callable[[Result], str] | None = None,
) -> str:
    """A column for each value of `column` in the results and a line a model, or one for each `row` of its results.

    Args:
        documents: with `label` and `results`.
        heading: what the figures are.
        figure: of one result, such as `shown` makes it.
        column: a key of the results.
        row: the name of a result's line.
    """
    columns = sorted({result[column] for document in documents for result in document["results"]})
    grid = [[heading, *(f"{at:,}" for at in columns)]]
    for document in documents:
        lines: dict[str, dict[int, str]] = {}
        for result in document["results"]:
            named = [] if row and len(documents) == 1 else [document.get("label") or document["model"]]
            name = ", ".join([*named, *([row(result)] if row else [])])
            lines.setdefault(name, {})[result[column]] = figure(result)
        grid += [[name, *(found.get(at, "–") for at in columns)] for name, found in lines.items()]
    return aligned(grid)


def shown(result: Result, key: str, digits: int, factor: float = 1) -> str:
    """The figure under `key` with its interval, `low` to `high`.

    >>> shown({"accuracy": 0.8, "low": 0.548, "high": 0.93}, "accuracy", 0, 100)
    '80 (55–93)'
    """
    if result[key] is None:
        return "–"
    ends = [f"{factor * result[end]:.{digits}f}" for end in ("low", "high") if result.get(end) is not None]
    between = f" ({'–'.join(ends)})" if ends else ""
    return f"{factor * result[key]:.{digits}f}{between}"


def spread(counts: Sequence[int]) -> str:
    """
    >>> spread([7, 7]), spread([1024, 5])
    ('7', '5 to 1,024')
    """
    return " to ".join(f"{count:,}" for count in dict.fromkeys((min(counts), max(counts))))
