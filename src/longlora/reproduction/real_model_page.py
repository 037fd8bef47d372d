"""The page of `longlora reproduce real-model`: a table a measurement, each figure with its interval and its change."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longlora.evaluation.results import in_words
from longlora.evaluation.statistics import Estimate
from longlora.tables import markdown

MEASURES = ("perplexity", "passkey", "ruler")


def tables(document: Mapping[str, Any]) -> list[list[list[str]]]:
    """A table a measurement: arms down, contexts across, each figure with its interval and its change."""
    found = []
    for measure in MEASURES:
        entries = [entry for entry in document["arms"] if measure in entry]
        if not entries:
            continue
        contexts = sorted({point["context"] for entry in entries for point in entry[measure]})
        heads = [measure, *(f"{context:,}" for context in contexts), f"change at {contexts[-1]:,}"]
        rows = []
        for entry in entries:
            points = {point["context"]: point for point in entry[measure]}
            last = points.get(contexts[-1], {}).get("change")
            cells = [_figure(points[context]) if context in points else "" for context in contexts]
            rows.append([entry["label"], *cells, _change(last, measure)])
        found.append([heads, *rows])
    costs = [["cost", "steps", "seconds", "pairs of a query and a key"]]
    for entry in document["arms"]:
        if entry["training"]:
            took = entry["training"]
            costs.append([entry["label"], f"{took['steps']:,}", f"{took['seconds']:,.0f}", f"{entry['pairs']:.3g}"])
    return [*found, *([costs] if len(costs) > 1 else [])]


def _figure(point: Mapping[str, Any]) -> str:
    if "perplexity" in point:
        between = "" if point["low"] is None else f" ({point['low']:.2f}–{point['high']:.2f})"
        return f"{point['perplexity']:.2f}{between}"
    return f"{point['accuracy']:.0%} ({point['low']:.0%}–{point['high']:.0%})"


def _change(change: Mapping[str, Any] | None, measure: str) -> str:
    if change is None:
        return ""
    said = in_words(Estimate(**change), "%" if measure == "perplexity" else " points")
    return said if change["low"] is not None else f"{said}, not judged"


def sentences(document: Mapping[str, Any]) -> list[str]:
    parts = []
    if document["left"]:
        parts.append(f"Not run yet: {'; '.join(document['left'])}. The same command goes on with them.")
    if document["missing"]:
        parts.append(f"Cannot be run here: {'; '.join(document['missing'])}.")
    return parts


def page_text(document: Mapping[str, Any]) -> str:
    """The study as a Markdown page."""
    libraries = ", ".join(f"{name} {document['versions'][name]}" for name in ("torch", "transformers", "peft"))
    training = "Nothing is trained yet"
    if any(entry["training"] for entry in document["arms"]):
        training = (
            f"Trained on {document['rows']:,} rows of {document['context']:,} tokens from {document['data']}, one seed "
            "each: how much another seed would differ is not in the intervals"
        )
    parts = [
        f"# {Path(document['model']).stem}, {document['window']:,} → {document['context']:,} tokens",
        f"{document['date']}, {document['machine']}; {libraries}. {training}. Measured on "
        f"{document['evaluation_data']}, the same text and prompts for every arm. Intervals are 95%: over documents "
        "for perplexity, over prompts for retrieval. Changes of trained arms are from full attention with the same "
        "positions, of others from the model as it is.",
        *(markdown(table) for table in tables(document)),
        *sentences(document),
    ]
    return "\n\n".join(parts) + "\n"


def numbers(document: Mapping[str, Any]) -> list[list[Any]]:
    """Every figure in a line of its own."""
    lines: list[list[Any]] = [
        ["arm", "measure", "context", "value", "low", "high", "change", "change_low", "change_high"]
    ]
    for entry in document["arms"]:
        for measure in MEASURES:
            for point in entry.get(measure, []):
                change = point["change"] or {"value": None, "low": None, "high": None}
                value = point.get("perplexity", point.get("accuracy"))
                lines.append([entry["name"], measure, point["context"], value, point["low"], point["high"]])
                lines[-1] += [change["value"], change["low"], change["high"]]
    return lines
