"""A table as it stands: means over seeds, what the paper says of them, and how that is written down."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from longlora.reproduction.entries import Check, Table
from longlora.reproduction.paper import PaperTable
from longlora.reproduction.statistics import Estimate, estimate
from longlora.reproduction.table_runs import placed, value
from longlora.settings import ExtendSettings

FAR = 1.5
"""Times as much that is far above."""

SURE = 2.0
"""Standard errors from where on a difference between seeds is taken for one."""

BEYOND_DOUBT = 20.0
"""Standard errors above which their number says nothing more."""

Values = dict[tuple[str, int], dict[int, float]]
"""(row's key, column) -> seed -> number."""


def gather(table: Table, base: ExtendSettings, seeds: Sequence[int], folder: Path) -> Values:
    """Every number of the table that is there."""
    found: Values = {}
    for row in table.rows:
        for column, entry in enumerate(row.entries):
            if entry is None:
                continue
            for seed in seeds:
                number = value(entry, placed(entry, base, seed, folder))
                if number is not None:
                    found.setdefault((row.key, column), {})[seed] = number
    return found


def judged(check: Check, values: Values) -> dict[str, Any]:
    """Whether the paper's claim holds here, on the seeds that have both numbers.

    Returns:
        `{"claim", "verdict": "holds" | "does not hold" | "undecided" | "not run", "left", "right", "seeds", "errors"}`
        where `errors` is the distance from the boundary in standard errors; `undecided` is within `SURE` of them.
    """
    left, right = values.get(check.left, {}), values.get(check.right, {})
    seeds = sorted(set(left) & set(right))
    if not seeds:
        return {"claim": check.claim, "verdict": "not run", "left": None, "right": None, "seeds": [], "errors": None}
    factor = {"above": 1.0, "far above": FAR, "near": 1 + check.near}[check.relation]
    sign = -1 if check.relation == "near" else 1
    margin = estimate([sign * (left[seed] - factor * right[seed]) for seed in seeds])
    errors = margin.mean / margin.error if margin.error else None
    sure = errors is None or abs(errors) >= SURE
    verdict = ("holds" if margin.mean > 0 else "does not hold") if sure else "undecided"
    return {
        "claim": check.claim,
        "verdict": verdict,
        "left": estimate([left[seed] for seed in seeds]).mean,
        "right": estimate([right[seed] for seed in seeds]).mean,
        "relation": check.relation,
        "near": check.near if check.relation == "near" else None,
        "seeds": seeds,
        "errors": errors,
    }


def document_of(table: Table, values: Values, paper: PaperTable | None) -> dict[str, Any]:
    """`{"title", "columns", "rows": [{"key", "label", "entries": [{"mean", "error", "seeds"} | None], "paper"}],
    "checks", "notes", "paper": {"says", "columns", "only_there", "left_out"}}`."""
    rows = []
    for row in table.rows:
        entries = []
        for column in range(len(row.entries)):
            known = values.get((row.key, column), {})
            found = estimate(list(known.values())) if known else None
            by_seed = {str(seed): number for seed, number in known.items()}
            entries.append(found and {"mean": found.mean, "error": found.error, "seeds": by_seed})
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
    paper = document["paper"]
    beside = bool(paper and any(figure is not None for row in document["rows"] for figure in row["paper"]))
    of_paper = [f"paper: {column}" for column in paper["columns"]] if beside else []
    lines = [["", *document["columns"], *of_paper]]
    for row in document["rows"]:
        line = [row["label"], *(_shown(entry, document["number"]) for entry in row["entries"])]
        lines.append(line + ([_figure(figure) for figure in row["paper"]] if beside else []))
    if beside:
        blank = [""] * len(document["columns"])
        lines += [[label, *blank, *map(_figure, figures)] for label, figures in paper["only_there"].items()]
    return lines


def paper_grid(document: dict[str, Any]) -> list[list[str]]:
    """The paper's own rows, where none of them is one of ours."""
    paper = document["paper"]
    if not paper or not paper["only_there"] or any(figure for row in document["rows"] for figure in row["paper"]):
        return []
    rows = [[label, *map(_figure, figures)] for label, figures in paper["only_there"].items()]
    return [["paper", *paper["columns"]], *rows]


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """The grid for a terminal."""
    if not lines:
        return ""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(t.rjust(w) for t, w in zip(line[1:], widths[1:], strict=True))]).rstrip()
        for line in lines
    )


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """The grid as a Markdown table."""
    if not lines:
        return ""
    rule = ["---", *["---:"] * (len(lines[0]) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (lines[0], rule, *lines[1:]))


def sentence(check: dict[str, Any], number: str) -> str:
    """A judged check in words: `S² near full: holds, 10.16 against 10.125 (3 seeds, 14.0 standard errors …)`."""
    if check["verdict"] == "not run":
        return f"{check['claim']}: not run"
    form = number if number.endswith("%") else ".5g"
    seeds = f"{len(check['seeds'])} seed" + ("s" if len(check["seeds"]) > 1 else "")
    errors = abs(check["errors"]) if check["errors"] is not None else 0.0
    said = f"{errors:.1f}" if errors < BEYOND_DOUBT else f"more than {BEYOND_DOUBT:.0f}"
    sure = "" if check["errors"] is None else f", {said} standard errors from the boundary"
    return (
        f"{check['claim']}: {check['verdict']}, {format(check['left'], form)} against {format(check['right'], form)} "
        f"({seeds}{sure})"
    )


def about_paper(document: dict[str, Any]) -> str:
    """What the paper's figures are of, and which are left out."""
    paper = document["paper"]
    if not paper:
        return ""
    left_out = f" Left out here, because we could not read it with certainty: {paper['left_out']}."
    return f"The paper: {paper['says']}." + (left_out if paper["left_out"] else "")


def _shown(entry: dict[str, Any] | None, number: str) -> str:
    if entry is None:
        return "–"
    found = Estimate(entry["mean"], entry["error"])
    if number.endswith("%"):
        form = number
    elif found.mean and (abs(found.mean) < 0.1 or abs(found.mean) >= 1000):
        form = ".3g" if abs(found.mean) < 0.1 else ",.0f"
    else:
        form = number if abs(found.mean) < 100 else ".1f"
    return format(found.mean, form) + ("" if not found.error else f" ± {format(found.error, form)}")


def _figure(figure: float | None) -> str:
    return "–" if figure is None else f"{figure:.2f}"
