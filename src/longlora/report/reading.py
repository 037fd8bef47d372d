"""What a run directory and a folder of results hold, read with care: any piece may be missing or of an older shape."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

from longlora.results import (
    KINDS,
    MEASURES,
    Answers,
    Perplexities,
    Result,
    Retrieval,
    number,
    read,
    whole,
)
from longlora.run_directory import RunDirectory

Content = dict[str, Any] | str
"""What a section's template draws, or the sentence that says why the section is left out."""

OfARun = TypeVar("OfARun", Perplexities, Answers)
Kind = TypeVar("Kind", bound=Result)


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
    evaluated: "Evaluated"
    """What `longlora eval` left in the run."""
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


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """One model's results, by measure; each document has results."""

    name: str
    folder: Path
    documents: Mapping[str, Result] = field(default_factory=dict)
    unreadable: tuple[str, ...] = ()
    is_baseline: bool = False

    def _first(self, name: str) -> Any:
        return next((found for document in self.documents.values() if (found := getattr(document, name))), None)

    @property
    def model(self) -> str | None:
        """MODEL as the evaluations were given it."""
        return self._first("model")

    @property
    def label(self) -> str | None:
        """What they call it, with how its positions were stretched."""
        return self._first("label")

    @property
    def options(self) -> str:
        """Those that stretch it."""
        context, method = self._first("extend_to"), self._first("method")
        return f"--extend-to {context} --method {method}" if context and method else ""

    def of(self, kind: type[Kind]) -> Kind | None:
        """The result of that kind; of retrievals see `retrievals`."""
        return next((document for document in self.documents.values() if isinstance(document, kind)), None)

    @property
    def retrievals(self) -> dict[str, Retrieval]:
        return {task: each for task, each in self.documents.items() if isinstance(each, Retrieval)}


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
        evaluated=read_results(run.evaluation, run.path.resolve().name),
        unreadable=unreadable,
    )


def is_results_folder(folder: Path) -> bool:
    """Whether an evaluation left its results in `folder`."""
    return any((folder / f"{measure}.json").is_file() for measure in MEASURES)


def read_results(folder: Path, name: str, *, is_baseline: bool = False) -> Evaluated:
    """Every result in `folder`, of the model that the page calls `name`."""
    unreadable: list[str] = []
    documents: dict[str, Result] = {}
    for measure, kind in KINDS.items():
        file = folder / f"{measure}.json"
        value = read_object(file, f"{file.parent.name}/{file.name}", unreadable)
        document: Any = read(kind, value)
        if document is not None:
            if isinstance(document, Perplexities):
                document = _named("measured", document)
            elif isinstance(document, Retrieval):
                known = [cell for cell in document.results if measure == "passkey" or cell.number]
                asked = tuple(cell if cell.trials else replace(cell, accuracy=None) for cell in known)
                document = replace(document, task=measure, results=asked)
            if document.results or getattr(document, "tasks", ()):
                documents[measure] = document
    return Evaluated(
        name=name, folder=folder, documents=documents, unreadable=tuple(unreadable), is_baseline=is_baseline
    )


def baseline_of_run(run: Path) -> Evaluated | None:
    """What `longlora eval … --baseline MODEL` left inside the run directory `run`, of a MODEL that is no run itself."""
    folder = run / "evaluation" / "baseline"
    if not is_results_folder(folder):
        return None
    found = read_results(folder, "", is_baseline=True)
    return replace(found, name=f"{found.model or 'the baseline'} (baseline)")


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
    return _object(partial(_json, path), name, unreadable) if path.exists() else {}


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _object(parse: Callable[[], Any], name: str, unreadable: list[str]) -> dict[str, Any]:
    try:
        document = parse()
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
