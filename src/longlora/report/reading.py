"""What a run directory and a folder of results hold, read with care: any piece may be missing or of an older shape."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar, cast

from longlora.results import KINDS, MEASURES, Answers, Perplexities, Result, Retrieval, number, read, whole
from longlora.run_directory import RunDirectory

Content = dict[str, Any] | str
"""What a section's template draws, or the sentence that says why the section is left out."""

OfARun = TypeVar("OfARun", Perplexities, Answers)


@dataclass(frozen=True)
class Finding:
    """The page's first sentence and what follows from it; `good` is None where nothing follows."""

    headline: str
    conclusions: list[str]
    good: bool | None = None
    decisive: list[tuple[str, str]] = field(default_factory=list)
    """What a person decides by: a name and a figure each."""


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """Everything the page of a run is made from."""

    path: Path
    settings: dict[str, Any]
    metrics: list[dict[str, Any]]
    perplexities: list[Perplexities]
    answers: list[Answers]
    summary: dict[str, Any]
    costs: dict[str, Any]
    config: dict[str, Any]
    """config.json of the result, with the extended positions."""
    adapter: dict[str, Any]
    """adapter_config.json of the result; empty after full training."""
    unreadable: list[str] = field(default_factory=list)
    """Files that are there but are no JSON objects."""

    def number(self, *keys: str) -> float | None:
        """The finite number in the summary under `keys`, or None."""
        return number(at(self.summary, *keys))

    def word(self, *keys: str) -> str | None:
        """The non-empty string in the summary under `keys`, or None."""
        found = at(self.summary, *keys)
        return found if isinstance(found, str) and found else None

    def whole(self, *keys: str) -> int | None:
        """The whole number in the summary under `keys`, or None."""
        return whole(at(self.summary, *keys))

    @property
    def context(self) -> int | None:
        """The context trained for, in tokens."""
        return self.whole("positions", "context") or whole(self.settings.get("context"))

    @property
    def fine_tuned(self) -> bool:
        """Whether the run is one of `longlora sft`."""
        return self.settings.get("command") == "sft"

    def measured(self, name: str) -> Perplexities | None:
        """The perplexity file of that name, if it holds any result."""
        return next((each for each in self.perplexities if each.name == name and each.results), None)


def read_run(folder: str | Path) -> Recorded:
    """Everything that is there.

    Raises:
        UserError: `folder` is no run directory.
    """
    run = RunDirectory(folder)
    settings = run.read_settings()
    unreadable: list[str] = []

    def evaluation(name: str) -> dict[str, Any]:
        return read_object(run.evaluation / f"{name}.json", f"evaluation/{name}.json", unreadable)

    def beside_weights(name: str) -> dict[str, Any]:
        for path in (run.adapter / name, run.model / name):
            if path.is_file():
                return read_object(path, str(path.relative_to(run.path)), unreadable)
        return {}

    def every(kind: type[OfARun]) -> list[OfARun]:
        prefix = {Perplexities: "perplexity-", Answers: "answers-"}[kind]
        names = sorted(path.stem for path in run.evaluation.glob(f"{prefix}*.json"))
        found = [(name.removeprefix(prefix), read(kind, evaluation(name) or None)) for name in names]
        return sorted((_named(name, document) for name, document in found if document), key=_order)

    try:
        metrics = [record for record in run.read_metrics() if isinstance(record, dict)]
    except (OSError, ValueError, RecursionError):
        metrics = []
        unreadable.append(run.metrics_file.name)
    return Recorded(
        path=run.path,
        settings=settings,
        metrics=metrics,
        perplexities=every(Perplexities),
        answers=every(Answers),
        summary=evaluation("summary"),
        costs=evaluation("costs"),
        config=beside_weights("config.json"),
        adapter=beside_weights("adapter_config.json"),
        unreadable=unreadable,
    )


def is_results_folder(folder: Path) -> bool:
    """Whether an evaluation left its results in `folder`."""
    return any((folder / f"{measure}.json").is_file() for measure in MEASURES)


def read_results(folder: Path) -> tuple[dict[str, Result], list[str]]:
    """Every result in `folder` by measure, and the files there that are no JSON objects."""
    unreadable: list[str] = []
    documents: dict[str, Result] = {}
    for measure, kind in KINDS.items():
        file = folder / f"{measure}.json"
        document: Any = read(kind, read_object(file, f"{file.parent.name}/{file.name}", unreadable))
        if isinstance(document, Perplexities):
            document = _named("measured", document)
        elif isinstance(document, Retrieval):
            known = [cell for cell in document.results if measure == "passkey" or cell.number]
            asked = tuple(cell if cell.trials else replace(cell, accuracy=None) for cell in known)
            document = replace(document, task=measure, results=asked)
        if document and (document.results or getattr(document, "tasks", ())):
            documents[measure] = document
    return documents, unreadable


def at(document: Any, *keys: str) -> Any:
    """The value under nested keys, or None where one is missing."""
    for key in keys:
        document = document.get(key) if isinstance(document, dict) else None
    return document


def rows(value: Any) -> Iterator[dict[str, Any]]:
    """The tables in a list, whatever else may be in it."""
    yield from (row for row in (value if isinstance(value, list) else []) if isinstance(row, dict))


def read_object(path: Path, name: str, unreadable: list[str]) -> dict[str, Any]:
    """The table in the JSON file `path`; where it is there and holds none, `name` is noted as unreadable."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError):
        document = None
    if isinstance(document, dict):
        return document
    unreadable.append(name)
    return {}


def _named(name: str, document: OfARun) -> OfARun:
    """The document with its name and a label; of perplexities one result a context, shortest first."""
    named: Any = replace(document, name=name, label=document.label or document.model or name)
    if isinstance(named, Perplexities):
        by_context = {result.context: result for result in named.results}
        named = replace(named, results=tuple(by_context[context] for context in sorted(by_context)))
    return cast(OfARun, named)


def _order(document: Result) -> tuple[float, str]:
    """The place a file asks for; else the base model first and the trained one last."""
    name = str(getattr(document, "name", ""))
    usual = {"base": 0.0, "trained": 2.0}.get(name, 1.0)
    return (usual if document.order is None else document.order, name)
