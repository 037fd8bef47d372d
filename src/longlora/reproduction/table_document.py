"""A table as it stands: means over seeds with intervals, what the paper says of them, and how that is written down."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from scipy import stats

from longlora.evaluation.statistics import LEVEL, over_seeds
from longlora.reproduction.cells import finished
from longlora.reproduction.entries import Check, Entry, Ratio, Table
from longlora.reproduction.measuring import number_of
from longlora.reproduction.paper import PaperTable
from longlora.reproduction.table_runs import cell_of
from longlora.settings import ExtendSettings

FAR = 1.5
"""Times as much that is far above."""

ONE_SEED = "one seed: not judged"

Values = dict[tuple[str, int], dict[int, float]]
"""(row's key, column) -> seed -> number."""


def gather(table: Table, base: ExtendSettings, seeds: Sequence[int], folder: Path) -> Values:
    """Every number of the table that is there."""

    def number(entry: Entry, seed: int) -> float | None:
        cell = cell_of(entry, base, seed, folder)
        result = finished(cell)
        return None if result is None else number_of(entry.kind, entry.number, cell, result)

    def value(entry: Entry | Ratio, seed: int) -> float | None:
        if isinstance(entry, Entry):
            return number(entry, seed)
        own, other = number(entry.own, seed), number(entry.other, seed)
        return None if own is None or other is None else own / other - entry.gap

    found: Values = {}
    for row in table.rows:
        for column, entry in enumerate(row.entries):
            known = {seed: value(entry, seed) for seed in seeds} if entry else {}
            if kept := {seed: number for seed, number in known.items() if number is not None}:
                found[row.key, column] = kept
    return found


def judged(check: Check, values: Values) -> dict[str, Any]:
    """Whether a claim holds here, on the seeds that have both numbers.

    Returns:
        `{"claim", "verdict", "left", "right", "relation", "near", "seeds", "p"}`. The verdict is `holds` or `does not
        hold` where the distance from the boundary has an interval without zero (Student's t over seeds, `p` < 0.05),
        else `undecided`; `ONE_SEED`; or `not run`.
    """
    left, right = values.get(check.left, {}), values.get(check.right, {})
    seeds = sorted(set(left) & set(right))
    found: dict[str, Any] = {"claim": check.claim, "verdict": "not run", "left": None, "right": None, "p": None}
    found |= {"relation": check.relation, "near": check.near if check.relation == "near" else None, "seeds": seeds}
    if not seeds:
        return found
    factor = {"above": 1.0, "far above": FAR, "near": 1 + check.near}[check.relation]
    sign = -1 if check.relation == "near" else 1
    margins = [sign * (left[seed] - factor * right[seed]) for seed in seeds]
    found |= {side: math.fsum(each[s] for s in seeds) / len(seeds) for side, each in (("left", left), ("right", right))}
    found["p"] = _p_value(margins)
    if found["p"] is None:
        return found | {"verdict": ONE_SEED}
    sure = found["p"] < 1 - LEVEL
    return found | {"verdict": ("holds" if sum(margins) > 0 else "does not hold") if sure else "undecided"}


def document_of(table: Table, values: Values, paper: PaperTable | None) -> dict[str, Any]:
    """`{"title", "columns", "number", "rows": [{"key", "label", "entries": [{"mean", "low", "high", "seeds"} | None],
    "paper"}], "checks", "notes", "paper": {"says", "columns", "only_there", "left_out"}}`; `low` and `high` are the
    ends of the 95% interval over seeds, None for one."""
    rows = []
    for row in table.rows:
        entries = []
        for column in range(len(row.entries)):
            known = values.get((row.key, column))
            seeds = {str(seed): number for seed, number in (known or {}).items()}
            mean, low, high = over_seeds([*seeds.values()]) if seeds else (None, None, None)
            entries.append({"mean": mean, "low": low, "high": high, "seeds": seeds} if seeds else None)
        of_paper = list(paper.rows.get(row.key, (None,) * len(paper.columns))) if paper else []
        rows.append({"key": row.key, "label": row.label, "entries": entries, "paper": of_paper})
    return {
        "title": table.title,
        "columns": list(table.columns),
        "number": table.number,
        "rows": rows,
        "checks": [judged(check, values) for check in table.checks],
        "notes": list(table.notes),
        "paper": paper
        and {
            "says": paper.says,
            "columns": list(paper.columns),
            "only_there": {label: list(figures) for label, figures in paper.only_there.items()},
            "left_out": paper.left_out,
        },
    }


def grid(document: dict[str, Any]) -> list[list[str]]:
    """The table as cells of text, the heads first; the paper's columns stand to the right of ours."""
    paper, columns = document["paper"], document["columns"]
    beside = bool(paper and any(figure is not None for row in document["rows"] for figure in row["paper"]))
    forms = ["+.2%" if column.endswith("%") else document["number"] for column in columns]
    lines = [["", *columns, *([f"paper: {column}" for column in paper["columns"]] if beside else [])]]
    for row in document["rows"]:
        line = [row["label"], *map(_shown, row["entries"], forms)]
        lines.append(line + ([_figure(figure) for figure in row["paper"]] if beside else []))
    if beside:
        only_there = paper["only_there"].items()
        lines += [[label, *[""] * len(columns), *map(_figure, figures)] for label, figures in only_there]
    return lines


def paper_grid(document: dict[str, Any]) -> list[list[str]]:
    """The paper's own rows, where none of them is one of ours."""
    paper = document["paper"]
    if not paper or not paper["only_there"] or any(figure for row in document["rows"] for figure in row["paper"]):
        return []
    rows = [[label, *map(_figure, figures)] for label, figures in paper["only_there"].items()]
    return [["paper", *paper["columns"]], *rows]


def numbers(document: dict[str, Any]) -> list[list[object]]:
    """The table for machines, a line a number."""
    lines: list[list[object]] = [["row", "column", "mean", "low", "high", "seeds"]]
    for row in document["rows"]:
        for column, entry in zip(document["columns"], row["entries"], strict=True):
            if entry:
                interval = [entry[name] for name in ("mean", "low", "high")]
                lines.append([row["label"], column, *interval, len(entry["seeds"])])
    return lines


def sentence(check: dict[str, Any], number: str) -> str:
    """A judged check in words: `S² near full: holds, 10.16 against 10.125 (3 seeds, p = 0.005)`."""
    if check["verdict"] == "not run":
        return f"{check['claim']}: not run"
    form = number if number.endswith("%") else ".5g"
    values = f"{format(check['left'], form)} against {format(check['right'], form)}"
    if check["p"] is None:
        return f"{check['claim']}: {check['verdict']}, {values}"
    said = "p < 0.001" if check["p"] < 0.001 else f"p = {check['p']:.2g}"
    return f"{check['claim']}: {check['verdict']}, {values} ({len(check['seeds'])} seeds, {said})"


def about_paper(document: dict[str, Any]) -> str:
    """What the paper's figures are of, and which are left out."""
    paper = document["paper"]
    if not paper:
        return ""
    left_out = f" Left out here, because we could not read it with certainty: {paper['left_out']}."
    return f"The paper: {paper['says']}." + (left_out if paper["left_out"] else "")


def words(document: dict[str, Any]) -> Iterator[str]:
    """The checks, judged, a sentence each."""
    yield from (sentence(check, document["number"]) for check in document["checks"])


def _p_value(differences: Sequence[float]) -> float | None:
    """How often differences that are zero on average come out so far from it (Student's t, two sides); None for one.

    >>> round(_p_value([1.0, 2.0, 3.0]), 4)
    0.0742
    """
    if len(differences) < 2:
        return None
    if len(set(differences)) == 1:
        return 0.0 if differences[0] else 1.0
    return float(stats.ttest_1samp(differences, 0).pvalue)


def _shown(entry: dict[str, Any] | None, number: str) -> str:
    if entry is None:
        return "–"
    mean = entry["mean"]
    form = number
    if not number.endswith("%"):
        small, large = mean and abs(mean) < 0.1, abs(mean) >= 1000
        form = ".3g" if small else ",.0f" if large else number if abs(mean) < 100 else ".1f"
    half = "" if entry["low"] is None or entry["low"] == mean else f" ± {format(entry['high'] - mean, form)}"
    return format(mean, form) + half


def _figure(figure: float | None) -> str:
    return "–" if figure is None else f"{figure:.2f}"
