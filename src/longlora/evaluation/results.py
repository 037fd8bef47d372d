"""Where the results of an evaluation live, one model after another.

RUN/evaluation/passkey.jsonl, passkey.json       of a run directory as it is (no --extend-to), without --output
RUN/evaluation/baseline/                         of a --baseline that is no run, beside the first run compared with it
FOLDER/passkey.jsonl, passkey.json               --output FOLDER, one model
FOLDER/1-NAME/, FOLDER/2-NAME/, FOLDER/baseline/ --output FOLDER, several

`longlora report` reads any of these folders.
"""

import gc
import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from longlora import ranks
from longlora.corpus.tokens import TokenizedCorpus
from longlora.evaluation.statistics import Estimate
from longlora.evaluation.trials import TrialLog
from longlora.evaluation.windows import text_fingerprint
from longlora.model.source import resolve
from longlora.results import COMMAND
from longlora.run_directory import write_whole
from longlora.settings import EvaluatedModelsSettings

logger = logging.getLogger(__name__)

Document = dict[str, Any]

Settings = TypeVar("Settings", bound=EvaluatedModelsSettings)

Changes = Callable[[Document, Document], Mapping[int, Estimate]]


@dataclass(frozen=True)
class Evaluated:
    """One MODEL of an evaluation."""

    name: str
    folder: Path | None
    """Where its results go; None where they are not kept."""
    is_baseline: bool = False

    def log(self, what: str) -> Path | None:
        """The file of its trials in the evaluation `what`; the document is beside it."""
        return self.folder / f"{what}.jsonl" if self.folder else None

    def settings(self, settings: Settings) -> Settings:
        """`settings` as they are for this model: a baseline is neither stretched nor a hub model of that revision."""
        if not self.is_baseline:
            return settings
        return replace(settings, extend_to=None, loading=replace(settings.loading, revision=None))


def evaluated_models(settings: EvaluatedModelsSettings) -> list[Evaluated]:
    """The models to evaluate and the places of their results, a baseline first."""
    several = len(settings.models) > 1 or settings.baseline is not None
    models = []
    for place, name in enumerate(settings.models, 1):
        folder = _folder(name, settings.output, f"{place}-{Path(name).stem or 'model'}" if several else "")
        # stretched without training it is another model than the run's
        models.append(Evaluated(name, None if settings.extend_to and settings.output is None else folder))
    if settings.baseline is None:
        return models
    folder = _folder(settings.baseline, settings.output, "baseline")
    if folder is None:
        folder = next((model.folder / "baseline" for model in models if model.folder), None)
    return [Evaluated(settings.baseline, folder, is_baseline=True), *models]


def evaluate_each(
    what: str,
    settings: Settings,
    evaluate: Callable[[str, Settings, Path | None], Document],
    table: Callable[[Sequence[Document]], str],
    changes: Changes | None = None,
    unit: str = " points",
) -> Document:
    """Evaluate one model after another, and print `table` of their documents, a baseline's first.

    Args:
        what: the evaluation's name and its files'.
        settings: the models and where results go.
        evaluate: makes the document of one model: its name, the settings as they are for it, the file of its trials.
        table: of all documents, for people.
        changes: with a baseline, how far the others are from it, in `unit`; see `change_lines`.

    Returns:
        The document of one model; `{"models": [documents]}` of several; with a baseline `{"baseline": its document,
        "models": [documents]}`.

    Raises:
        UserError: before any work, where the trials of an evaluation that was stopped would be lost.
    """
    ranks.join()
    models = evaluated_models(settings)
    for model in models:
        TrialLog.refuse_to_drop(model.log(what), settings.resume)
    documents = []
    for model in models:
        document = evaluate(model.name, model.settings(settings), model.log(what))
        documents.append(_kept(document, model.log(what)))
        gc.collect()  # the weights of one model go before the next one's come
    if not settings.json and ranks.rank() == 0:
        print(
            "\n".join(
                [table(documents), *(change_lines(documents, changes, unit) if settings.baseline and changes else [])]
            )
        )
    if settings.baseline is not None:
        return {"baseline": documents[0], "models": documents[1:]}
    return documents[0] if len(documents) == 1 else {"models": documents}


def _kept(document: Document, file: Path | None) -> Document:
    """`document` with the command line that made it, written beside the trials in `file`."""
    document = document | ({"command": [*command]} if (command := COMMAND.get()) else {})
    if file is not None and ranks.rank() == 0:
        write_whole(file.with_suffix(".json"), json.dumps(document, indent=1) + "\n")
    return document


@contextmanager
def trials_kept(
    file: Path | None,
    settings: EvaluatedModelsSettings,
    about: Document,
    what: str,
    trials: Sequence[str] | None = None,
    only_in_the_log: Mapping[str, Any] | None = None,
) -> Iterator[TrialLog]:
    """The log of one model's trials, after a word on what is there and how to go on.

    Args:
        file: of the trials.
        settings: as they are for the model.
        about: what the results document says of the model and the way it is measured; new weights make new trials.
        what: what a line of the log is, such as `trial`.
        trials: the names of all that there will be; None where that is not known.
        only_in_the_log: what the trials depend on besides.

    Raises:
        UserError: as `TrialLog.opened`.
    """
    weights = weights_fingerprint(about["model"], settings.loading.revision)
    with TrialLog.opened(file, {**about, **(only_in_the_log or {}), "weights": weights}, settings.resume) as log:
        there = len(log.records) if trials is None else sum(trial in log.records for trial in trials)
        _say_where_results_go(file, what, there, None if trials is None else len(trials) - there)
        yield log


def _say_where_results_go(file: Path | None, what: str, there: int, missing: int | None) -> None:
    if file is None:
        logger.info("results are kept nowhere: give --output FOLDER to be able to go on after a stop")
        return
    if there:
        of_all = "" if missing is None else f" of {there + missing:,}"
        logger.info("%s%s %ss are there already", f"{there:,}", of_all, what)
    if missing != 0:
        logger.info("each %s goes into %s; if this stops, the same command with --resume goes on", what, file)


def weights_fingerprint(name: str, revision: str | None) -> str:
    """Changes when the model's own files do, so that old trials are not taken for a new model's."""
    source = resolve(name, revision)
    place = Path(source.location)
    files: Iterable[Path] = []
    if source.kind != "hub":
        files = [place] if place.is_file() else [*place.glob("*.safetensors"), *place.glob("*config.json")]
    found = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(files)]
    return hashlib.sha256(json.dumps([source.location, source.revision, found]).encode()).hexdigest()[:16]


def data_fingerprint(corpus: TokenizedCorpus) -> str:
    """Changes with any token or the end of any document: results with the same one are of the same text."""
    return text_fingerprint(corpus.document(index) for index in range(len(corpus)))


def change_lines(documents: Sequence[Document], changes: Changes, unit: str) -> list[str]:
    """For people: how far each document's values are from the first one's, the baseline's, where both have any.

    Args:
        documents: the baseline's first.
        changes: of one document from the baseline's, as shares, by context.
        unit: `%` of the baseline's value, or ` points`.
    """
    lines = []
    for document in documents[1:]:
        parts = [f"{context:,} {in_words(change, unit)}" for context, change in changes(document, documents[0]).items()]
        if parts:
            lines.append(f"{document['label']} against {documents[0]['label']}: {', '.join(parts)}")
    return lines


def in_words(change: Estimate, unit: str) -> str:
    """A change in hundredths with its interval.

    >>> in_words(Estimate(-0.031, -0.045, -0.017), "%"), in_words(Estimate(0.2, None, None), " points")
    ('-3.1% (-4.5 to -1.7)', '+20.0 points')
    """
    said = f"{100 * change.value:+.1f}{unit}"
    if change.low is None or change.high is None:
        return said
    return f"{said} ({100 * change.low:+.1f} to {100 * change.high:+.1f})"


def _folder(name: str, output: str | None, beside: str) -> Path | None:
    if output is not None:
        return Path(output) / beside
    return Path(name).expanduser() / "evaluation" if resolve(name).kind == "run" else None
