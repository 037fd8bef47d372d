"""`longlora reproduce real-model`: a pretrained model beyond its window, positions × training attention × data.

    OUTPUT/arms/NAME/                an arm's run directory; of an arm that does not train, only evaluation/
    OUTPUT/arms/NAME/evaluation/     what `longlora eval perplexity`, `passkey` and `ruler` keep, each trial as it comes
    OUTPUT/real-model.json, .md, .csv

Every arm is measured by the commands that people use, on the same text and the same prompts, so that two arms are
compared document by document and prompt by prompt; `longlora report OUTPUT/arms/…` draws any of them. The cheap and
telling work comes first: arms that do not train, then one training after the other. A killed study goes on with the
trial it was at.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from longlora.errors import UserError
from longlora.evaluation import statistics
from longlora.evaluation.command import evaluate_perplexity, perplexity_changes
from longlora.evaluation.passkey import evaluate_passkey
from longlora.evaluation.results import Document
from longlora.evaluation.retrieval import accuracy_changes
from longlora.evaluation.ruler import evaluate_ruler
from longlora.evaluation.statistics import Estimate
from longlora.model.precision import quick_training_dtype
from longlora.reproduction.base import about, base_settings, refuse_mistakes, window_of
from longlora.reproduction.cells import Cell, finished
from longlora.reproduction.page import write_result
from longlora.reproduction.real_model_page import numbers, page_text, sentences, tables
from longlora.reproduction.table_runs import Job, run_job
from longlora.reproduction.ways import Way
from longlora.run_directory import RunDirectory
from longlora.settings import (
    CorpusSettings,
    EvaluatePerplexitySettings,
    ExtendSettings,
    PasskeySettings,
    PerplexitySettings,
    ReproduceSettings,
    RulerSettings,
)
from longlora.tables import aligned

DOCUMENTS = 8
"""Held-out documents that perplexity is measured on: the first that are as long as the context, and of each a quarter
of a window's tokens, the last before the context is full; the window slides by as many, so that every context takes one
row a document."""

DEPTHS, TRIALS = 5, 20
"""Places of a pass key, and prompts for each: 100 a context, whose interval is at most 20 points wide."""

RULER_TASKS = ("niah_single_1", "ruler_vt", "ruler_cwe", "ruler_fwe")
"""RULER's tasks whose text is made, not downloaded."""

RULER_TRIALS = 50

CHECKPOINTS = 16
"""How often an arm's training is saved: a step of it takes minutes on a CPU."""

BEST_SHARE = 1 / 3
"""Of the layers, drawn anew for each pass, that train with full attention in `--recipe best`."""


def arms(steps: int) -> dict[str, Way]:
    """The study's arms by name, in the order in which they run."""
    last = max(1, steps // 10)
    best = {"full_layers_share": BEST_SHARE}
    pairs = BEST_SHARE + (1 - BEST_SHARE) / 4  # of full attention's, as groups of a quarter take a quarter of them
    untrained = {
        "base": ("as it is", "none", 1),
        "yarn": ("YaRN, not trained", "yarn", 1),
        "ntk": ("NTK, not trained", "ntk", 1),
        "ntk-twice": ("NTK for twice the context, not trained", "ntk", 2),
        "llama3": ("Llama 3's rule, not trained", "llama3", 1),
        "linear": ("Position Interpolation, not trained", "linear", 1),
    }
    trained: dict[str, tuple[str, dict[str, Any]]] = {
        "best": ("a third of the layers full", {"attention": best}),
        "full": ("full attention", {"pattern": "full"}),
        "shift": ("S²", {}),
        "full-pairs": ("full attention, as many pairs", {"pattern": "full", "steps": pairs}),
        "best-last": (f"a third full, last {last} steps full", {"attention": best | {"full_attention_steps": last}}),
        "best-mix": ("a third full, 60% long documents", {"attention": best, "mix": ("long=0.6", "short=0.4")}),
    }
    found = [
        Way(name=name, label=label, trained=False, method=method, stretch=stretch)
        for name, (label, method, stretch) in untrained.items()
    ] + [
        Way(name=f"{method}-{name}", label=f"{said}, {label}", method=method, **chosen)
        for method, said in (("yarn", "YaRN"), ("ntk", "NTK"))
        for name, (label, chosen) in trained.items()
    ]
    return {arm.name: arm for arm in found}


@dataclass(frozen=True)
class Study:
    """The study at one size: its settings, the model's window, and where everything goes."""

    settings: ReproduceSettings
    window: int
    base: ExtendSettings
    folder: Path
    known: Mapping[str, Way]

    def cell(self, name: str) -> Cell:
        """The training of an arm as a cell, placed."""
        cell = self.known[name].cell(self.base, self.base.training.seed)
        return replace(cell, settings=replace(cell.settings, output=str(self.folder / "arms" / name)))

    def result_file(self, name: str, measure: str) -> Path:
        """The document of a measurement."""
        return self.folder / "arms" / name / "evaluation" / f"{measure}.json"

    def evaluated(self, name: str) -> dict[str, Any]:
        """What every evaluation of an arm is told: the model, how its positions are stretched, where results go."""
        arm, context = self.known[name], self.base.positions.context
        dtype = self.base.training.dtype
        own = {"output": str(self.result_file(name, "").parent), "resume": True, "json": True, "dtype": dtype}
        if arm.trained:
            return own | {"models": (str(self.folder / "arms" / name),)}
        return own | {"models": (self.settings.model,), "extend_to": context * arm.stretch, "method": arm.method}


def _perplexity(study: Study, name: str) -> Document:
    window, context = study.window, study.base.positions.context
    contexts = (window // 4, window, context)
    last = window // 4
    way = PerplexitySettings(contexts=contexts, stride=last, max_documents=DOCUMENTS, last_tokens=last)
    corpus = CorpusSettings(data=study.settings.evaluation_data or ("stdlib",))
    return evaluate_perplexity(EvaluatePerplexitySettings(**study.evaluated(name), corpus=corpus, perplexity=way))


def _passkey(study: Study, name: str) -> Document:
    window, context = study.window, study.base.positions.context
    asked = (window // 2, window, (window + context) // 2, context)
    return evaluate_passkey(PasskeySettings(**study.evaluated(name), contexts=asked, depths=DEPTHS, trials=TRIALS))


def _ruler(study: Study, name: str) -> Document:
    contexts = (study.window // 2, study.window, study.base.positions.context)
    return evaluate_ruler(
        RulerSettings(**study.evaluated(name), contexts=contexts, tasks=RULER_TASKS, trials=RULER_TRIALS)
    )


MEASURES: dict[str, Callable[[Study, str], Document]] = {
    "perplexity": _perplexity,
    "passkey": _passkey,
    "ruler": _ruler,
}
"""Each made for all arms before the next begins, since the first tells which arms are worth the others."""


def real_model(settings: ReproduceSettings) -> dict[str, Any]:
    """Run `longlora reproduce real-model`.

    Returns:
        `{"name", "model", "data", "evaluation_data", "window", "context", "steps", "rows", "date", "machine",
        "versions", "arms": [{"name", "label", "training", "pairs", "perplexity", "passkey", "ruler"}], "left":
        [what was not run], "missing": [what cannot be run here]}`; measurements as their commands' `results`, each with
        `change`: from full attention's arm with the same positions, at the same context. It is also written to
        OUTPUT/real-model.json, with a page and a CSV beside it.

    Raises:
        UserError: an unknown arm, no evaluation data, or whatever training and evaluations raise.
    """
    study = _study(settings)
    chosen = [name for name in study.known if not settings.only or name in settings.only]
    left = []
    missing = [] if find_spec("lm_eval") else ["ruler, which needs longlora[eval]"]
    began = time.monotonic()
    for measure, make in MEASURES.items():
        for name in chosen:
            if study.result_file(name, measure).exists() or (measure == "ruler" and missing):
                continue
            if settings.minutes is not None and time.monotonic() - began > 60 * settings.minutes:
                left.append(f"{measure} of {name}")
                continue
            _trained(study, name)
            make(study, name)
            _write(study, left, missing)  # what stands so far, whenever it is stopped
    document = _write(study, left, missing)
    if not settings.json:
        print("\n\n".join([aligned(table) for table in tables(document)] + sentences(document)))
    return document


def _study(settings: ReproduceSettings) -> Study:
    for flag, given in (
        ("method", settings.method != "yarn"),
        ("seeds", settings.seeds),
        ("reuse", settings.reuse),
        ("jobs", settings.jobs > 1),
    ):
        if given:
            raise UserError(
                f"--{flag} has no effect on real-model, whose arms say how positions are stretched and run with one "
                "seed, one after the other: leave it out."
            )
    window = window_of(settings)
    context = settings.context or 2 * window
    known = arms(settings.steps)
    refuse_mistakes(settings, known)
    folder = Path(settings.output or "runs/real-model")
    base = base_settings(settings, context)
    training = replace(
        base.training,
        dtype=quick_training_dtype(),
        gradient_checkpointing=True,
        save_every=max(1, settings.steps // CHECKPOINTS),
    )
    base = replace(base, training=training)
    return Study(settings, window, base, folder, known)


def _trained(study: Study, name: str) -> None:
    """Train the arm where that is not done, going on from its last checkpoint."""
    if study.known[name].trained and finished(cell := study.cell(name)) is None:
        run_job(Job(cell, ()))


def _write(study: Study, left: Sequence[str], missing: Sequence[str]) -> dict[str, Any]:
    """Gather what stands, and write it."""
    settings, base = study.settings, study.base
    found = {
        name: {
            each: json.loads(file.read_text()) for each in MEASURES if (file := study.result_file(name, each)).exists()
        }
        for name in study.known
    }
    document: dict[str, Any] = {
        **about(settings),
        "window": study.window,
        "context": base.positions.context,
        "rows": settings.steps * base.training.batch,
        "arms": [_entry(study, name, found) for name in study.known if found[name]],
        "left": list(left),
        "missing": list(missing),
    }
    write_result(settings, study.folder, document, page_text(document), {"real-model": numbers(document)})
    return document


def _entry(study: Study, name: str, found: Mapping[str, Mapping[str, Document]]) -> dict[str, Any]:
    arm = study.known[name]
    entry: dict[str, Any] = {"name": name, "label": arm.label, "training": None, "pairs": None}
    if arm.trained and (result := RunDirectory(study.folder / "arms" / name).read_evaluation("cell")):
        entry |= {"training": result["training"], "pairs": result["attention_cost"]["pairs"]}
    other = f"{arm.method}-full" if arm.trained else "base"
    for measure, document in found[name].items():
        before = found.get(other, {}).get(measure)
        changes: Mapping[int, Estimate] = {}
        if before is not None and name != other:
            changes = (perplexity_changes if measure == "perplexity" else accuracy_changes)(document, before)
        entry[measure] = [_shown(document, context, changes.get(context)) for context in _contexts(document)]
    return entry


def _contexts(document: Document) -> list[int]:
    return sorted({result["context"] for result in document["results"]})


def _shown(document: Document, context: int, change: Estimate | None) -> dict[str, Any]:
    """A measurement at one context, over all its depths and tasks."""
    results = [result for result in document["results"] if result["context"] == context]
    found: dict[str, Any] = {"context": context, "change": change._asdict() if change else None}
    if "perplexity" in results[0]:
        return found | {key: results[0][key] for key in ("perplexity", "low", "high", "tokens", "documents")}
    scores = [score for result in results for score in result.get("scores", [])]
    share = statistics.share(sum(scores) / len(scores), len(scores))
    return found | {"accuracy": share.value, "low": share.low, "high": share.high, "trials": len(scores)}
