"""What a page is about: models, each a run directory or a folder of results, under a short name of its own."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from longlora.errors import UserError
from longlora.report.changes import change, direction, interval
from longlora.report.reading import Recorded, is_results_folder, read_results, read_run
from longlora.report.wording import change as size
from longlora.report.wording import joined
from longlora.results import Change, Measured, Result, Retrieval, Short
from longlora.run_directory import RunDirectory

Kind = TypeVar("Kind", bound=Result)


@dataclass(frozen=True, kw_only=True)
class Model:
    """One model of the page."""

    path: str
    """The folder as it was given, or the one found below it."""
    folder: Path
    """Where its results are."""
    documents: Mapping[str, Result]
    """Results by measure; none is empty."""
    unreadable: tuple[str, ...] = ()
    run: Recorded | None = None
    """None where the folder holds results and no run."""
    name: str = ""

    def said(self, name: str) -> Any:
        """What its results say of themselves under `name`: the first that say anything."""
        return next((found for document in self.documents.values() if (found := getattr(document, name))), None)

    @property
    def model(self) -> str:
        """MODEL for another evaluation."""
        return self.path if self.run else self.said("model") or "MODEL"

    @property
    def is_baseline(self) -> bool:
        """Whether it is there for others to be compared with."""
        return self.run is None and self.folder.name == "baseline"

    def of(self, kind: type[Kind]) -> Kind | None:
        """The result of that kind; of retrievals see `retrievals`."""
        return next((document for document in self.documents.values() if isinstance(document, kind)), None)

    @property
    def retrievals(self) -> dict[str, Retrieval]:
        return {task: each for task, each in self.documents.items() if isinstance(each, Retrieval)}


def is_run(path: str) -> bool:
    return RunDirectory(Path(path).expanduser()).settings_file.is_file()


def read_models(paths: Sequence[str | Path]) -> list[Model]:
    """The models in `paths`, in their order; baselines, those that were kept inside runs among them, come first.

    Raises:
        UserError: a folder that holds neither a run nor results, or one that is named twice.
    """
    found = [model for path in paths for model in _models(str(path))]
    places = [model.folder.resolve() for model in found]
    for place, model in zip(places, found, strict=True):
        if places.count(place) > 1:
            raise UserError(f"'{model.path}' is named twice: leave one of them out.")
    names = _short_names([_named(model) for model in found])
    named = [replace(model, name=name) for model, name in zip(found, names, strict=True)]
    return sorted(named, key=lambda model: not model.is_baseline)


def compared(models: Sequence[Model]) -> list[Model]:
    """Those that the page is about."""
    return [model for model in models if not model.is_baseline]


def only_run(models: Sequence[Model]) -> Recorded | None:
    """The run that the page is about, where it is about one and nothing else."""
    about = compared(models)
    return about[0].run if len(about) == 1 else None


def _models(path: str) -> Iterator[Model]:
    folder = Path(path).expanduser()
    inside = sorted(each for each in folder.iterdir() if is_results_folder(each)) if folder.is_dir() else []
    if is_run(path):
        run = read_run(folder)
        inside = [found] if is_results_folder(found := folder / "evaluation" / "baseline") else []
        documents, unreadable = read_results(folder / "evaluation")
        if "short" not in documents and (own := _own_comparison(run)):
            documents["short"] = own
        yield Model(path=path, folder=folder / "evaluation", documents=documents, unreadable=tuple(unreadable), run=run)
    elif is_results_folder(folder):
        inside = [folder]
    elif not inside:
        raise UserError(
            f"'{path}' {'holds no results' if folder.exists() else 'does not exist'}: give run directories, or folders "
            "that `longlora eval … --output FOLDER` wrote."
        )
    for each in inside:
        documents, unreadable = read_results(each)
        yield Model(path=str(each), folder=each, documents=documents, unreadable=tuple(unreadable))


def _own_comparison(run: Recorded) -> Short | None:
    """Before and after inside the old window, from what the run measured itself."""
    base, trained, window = run.measured("base"), run.measured("trained"), run.whole("positions", "original_context")
    if base is None or trained is None or window is None:
        return None
    if (base.data, base.stride, base.score) != (trained.data, trained.stride, trained.score):
        return None
    pairs = [(one, trained.at(one.context)) for one in base.results if one.context <= window]
    rows = tuple(row for one, other in pairs if other and (row := _changed(one, other)))
    stride = f"{base.stride:,}" if base.stride else ""
    model = str(run.settings.get("model") or "its base")
    data = joined(base.data)
    return Short(baseline=model, data=data, stride=stride, score=base.score, results=rows) if rows else None


def _changed(before: Measured, after: Measured) -> Change | None:
    found = change(after, before)
    if found is None:
        return None
    verdict = ("improved by", "unchanged", "regressed by")[direction(found) + 1]
    verdict += f" {size(found.value)}" if direction(found) else ""
    return Change(
        before=before.perplexity,
        after=after.perplexity,
        verdict=verdict + interval(found),
        context=before.context,
        tokens=before.tokens or 0,
        low=found.low,
        high=found.high,
    )


def _named(model: Model) -> tuple[str, ...]:
    """The parts of the model's name, of which the last come first."""
    parts = Path(model.path).expanduser().resolve().parts[1:]
    if not model.is_baseline:
        return parts
    said = str(model.said("model") or "baseline")
    # a path's last name, or a hub id as it is
    return *parts[:-1], f"{Path(said).name if said.startswith(('.', '/', '~')) else said} (baseline)"


def _short_names(paths: Sequence[tuple[str, ...]]) -> list[str]:
    """As little of each path's end as tells it from the others.

    >>> _short_names([("runs", "a", "seed0"), ("runs", "b", "seed0"), ("runs", "c")])
    ['a/seed0', 'b/seed0', 'c']
    """
    names = []
    for parts in paths:
        others = [other for other in paths if other != parts]
        length = next(
            (n for n in range(1, len(parts)) if all(other[-n:] != parts[-n:] for other in others)), len(parts)
        )
        names.append("/".join(parts[-length:]))
    return names
