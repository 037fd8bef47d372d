"""What a comparison is about: run directories and folders of results, each under a short name of its own."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from longlora.errors import UserError
from longlora.report.changes import change, direction, interval
from longlora.report.reading import Evaluated, Recorded, baseline_of_run, is_results_folder, read_results, read_run
from longlora.report.ways import joined
from longlora.report.wording import change as size
from longlora.results import Change, Measured, Short
from longlora.run_directory import RunDirectory


@dataclass(frozen=True)
class Subject:
    """One model of the page."""

    path: str
    """The folder as it was given, or the one found below it."""
    evaluated: Evaluated
    run: Recorded | None
    """None where the folder holds results and no run."""

    @property
    def name(self) -> str:
        return self.evaluated.name

    @property
    def model(self) -> str:
        """MODEL for another evaluation."""
        return self.path if self.run else self.evaluated.model or "MODEL"


def is_run(path: str) -> bool:
    return RunDirectory(Path(path).expanduser()).settings_file.is_file()


def read_subjects(paths: Sequence[str]) -> list[Subject]:
    """The models in `paths`, in their order; baselines that were kept inside runs come first.

    Raises:
        UserError: a folder that holds neither a run nor results, or one that is named twice.
    """
    found = [subject for path in paths for subject in _subjects(path)]
    places = [subject.evaluated.folder.resolve() for subject in found]
    for place, subject in zip(places, found, strict=True):
        if places.count(place) > 1:
            raise UserError(f"'{subject.path}' is named twice: leave one of them out.")
    names = _short_names([_named(subject) for subject in found])
    named = [
        replace(subject, evaluated=replace(subject.evaluated, name=name))
        for subject, name in zip(found, names, strict=True)
    ]
    return sorted(named, key=lambda subject: not subject.evaluated.is_baseline)


def _subjects(path: str) -> Iterator[Subject]:
    folder = Path(path).expanduser()
    if is_run(path):
        baseline = baseline_of_run(folder)
        if baseline is not None:
            yield Subject(str(baseline.folder), baseline, None)
        run = read_run(folder)
        own = None if run.evaluated.of(Short) else _own_comparison(run)
        documents = {**run.evaluated.documents, **({"short": own} if own else {})}
        yield Subject(path, replace(run.evaluated, documents=documents), run)
        return
    inside = sorted(each for each in folder.iterdir() if is_results_folder(each)) if folder.is_dir() else []
    if is_results_folder(folder):
        inside = [folder]
    if not folder.exists():
        raise UserError(
            f"'{path}' does not exist: give run directories, or folders that `longlora eval … --output FOLDER` wrote."
        )
    if not inside:
        raise UserError(
            f"'{path}' holds no results: give run directories, or folders that `longlora eval … --output FOLDER` wrote."
        )
    for each in inside:
        yield Subject(str(each), read_results(each, "", is_baseline=each.name == "baseline"), None)


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


def _named(subject: Subject) -> tuple[str, ...]:
    """The parts of the subject's name, of which the last come first."""
    path = Path(subject.path).expanduser().resolve()
    if subject.evaluated.is_baseline:
        return *path.parts[1:-1], f"{_last(subject.evaluated.model or 'baseline')} (baseline)"
    return path.parts[1:]


def _last(model: str) -> str:
    """The name at the end of a path, or the hub id as it is."""
    return Path(model).name if model.startswith((".", "/", "~")) else model


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
