"""`longlora eval short`: is anything lost at the lengths that the model could do before?

Perplexity inside the old window and any lm-eval tasks, of a model and of what it was made from, on the same documents
and samples, with a verdict for each: "regressed by 3.5%".
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from longlora.corpus.tokens import TokenizedCorpus, tokenize_corpus
from longlora.errors import UserError
from longlora.evaluation import statistics
from longlora.evaluation.loading import data_name, held_out, load_evaluated, require_lm_eval, same_tokens, stretching
from longlora.evaluation.perplexity import perplexity
from longlora.evaluation.results import (
    Document,
    data_fingerprint,
    evaluate_each,
    in_words,
    trials_kept,
    weights_fingerprint,
)
from longlora.evaluation.statistics import Estimate
from longlora.evaluation.trials import TrialLog
from longlora.model.loading import load_config, load_tokenizer, locate, window
from longlora.settings import EvaluateShortSettings, PerplexitySettings
from longlora.tables import aligned

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """What a model is compared with, and where."""

    baseline: str
    revision: str | None
    """Of a baseline on the hub."""
    perplexity: PerplexitySettings
    window: int
    """Tokens that a sample of a task and its answer may have."""


@dataclass(frozen=True)
class Measured:
    """What one model scores."""

    label: str
    perplexities: list[dict[str, Any]]
    """For each context `{"context", "perplexity", "nll", "tokens", "documents", "skipped_documents"}`."""
    tasks: list[dict[str, Any]]
    """For each task and metric `{"task", "metric", "value", "higher_is_better", "samples", "cut"}`."""


def evaluate_short(settings: EvaluateShortSettings) -> Document:
    """Run `longlora eval short`.

    Returns:
        For one model `{"model", "label", "baseline", "data", "stride", "score", …, "results": [{"context", "before",
        "after", "change_percent", "low", "high", "verdict", "stride", "text", "tokens", "documents",
        "skipped_documents"}], "tasks": [{"task", "metric", "before", "after", "change_points" or "change_percent",
        "low", "high", "verdict", "samples", "cut"}], "seconds"}`; for several `{"models": [one such document each]}`.
        `before` and `after` are perplexities, or values of the metric; `low` and `high` are the 95% interval of the
        change; `cut` counts the requests that are longer than the window, of which only the end was read.

    Raises:
        UserError: a model whose base is unknown, a baseline with another tokenizer, a document, context or task that
            does not fit, or results that cannot be kept.
    """
    # What is missing should come up now, not after hours.
    plans = {name: _plan(name, settings) for name in settings.models}
    tasks = _tasks(settings)
    before: dict[Plan, Measured] = {}

    def evaluate(name: str, settings: EvaluateShortSettings, file: Path | None) -> Document:
        plan = plans[name]
        corpus = _documents(name, plan, settings)
        about = {
            "task": "short",
            "model": name,
            **stretching(settings),
            "baseline": plan.baseline,
            "data": data_name(settings.corpus),
            "stride": settings.perplexity.stride if isinstance(settings.perplexity.stride, int) else None,
            "score": settings.perplexity.score,
            "data_fingerprint": data_fingerprint(corpus),
            "max_documents": plan.perplexity.max_documents,
            "min_document_tokens": plan.perplexity.min_document_tokens,
            "last_tokens": plan.perplexity.last_tokens,
        }
        only_in_the_log = {
            "dtype": settings.dtype,
            "window": plan.window,
            "baseline_weights": weights_fingerprint(plan.baseline, plan.revision),
        }
        with trials_kept(file, settings, about, "part", None, only_in_the_log) as log:
            if plan not in before:
                untouched = replace(settings, extend_to=None, loading=replace(settings.loading, revision=plan.revision))
                before[plan] = _measure(plan.baseline, "before", untouched, plan, corpus, tasks, log)
            after = _measure(name, "after", settings, plan, corpus, tasks, log)
            seconds = round(sum(record["seconds"] for record in log.records.values()), 1)
            return {**about, **_compare(before[plan], after), "seconds": seconds}

    # each model has a baseline of its own, which is no further model with results of its own
    return evaluate_each("short", replace(settings, baseline=None), evaluate, short_tables)


def baseline_of(name: str, settings: EvaluateShortSettings) -> tuple[str, str | None]:
    """MODEL and hub revision to compare `name` with.

    Raises:
        UserError: it is not given, and `name` neither says what it was made from nor is stretched by this command.
    """
    if settings.baseline is not None:
        return settings.baseline, None
    if settings.extend_to:
        return name, settings.loading.revision
    source = locate(name, settings.loading.revision)
    if source.base is None:
        raise UserError(
            f"MODEL '{name}' does not say what it was made from: give the model to compare it with, --baseline MODEL."
        )
    return source.base, source.base_revision


def verdict(change: Estimate, higher_is_better: bool, unit: str) -> str:
    """A change in words: none, where zero is inside its interval.

    >>> verdict(Estimate(0.035, 0.02, 0.05), higher_is_better=False, unit="%")
    'regressed: +3.5% (+2.0 to +5.0)'
    >>> verdict(Estimate(0.02, -0.08, 0.12), higher_is_better=True, unit=" points")
    'no difference shown: +2.0 points (-8.0 to +12.0)'
    """
    if change.value == 0:
        return "unchanged"
    if change.is_zero:
        said = "no difference shown"
    else:
        said = "improved" if (change.value > 0) == higher_is_better else "regressed"
    return f"{said}: {in_words(change, unit)}" + ("" if change.is_zero is not None else ", how sure is not known")


def short_tables(documents: Sequence[Document]) -> str:
    """The comparisons for people."""
    return "\n\n".join(short_table(document) for document in documents)


def short_table(document: Document) -> str:
    """One model's comparison for people."""
    lines = [f"{document['label']}, against {document['baseline']}"]
    rows = [(f"perplexity at {row['context']:,}", row) for row in document["results"]]
    rows += [(f"{row['task']}, {row['metric']}", row) for row in document["tasks"]]
    grid = [["", "before", "after", "change"]]
    for what, row in rows:
        digits = 2 if "context" in row else 4
        counted = f"{row['tokens']:,} tokens" if "context" in row else f"{row['samples']:,} samples"
        numbers = [f"{row[side]:.{digits}f}" for side in ("before", "after")]
        grid.append([what, *numbers, f"{row['verdict']} ({counted})"])
    lines.append(aligned(grid))
    lines += [
        f"{row['task']}: {row['cut']:,} requests are longer than the window and were cut on the left"
        for row in document["tasks"]
        if row["cut"]
    ]
    counts, skipped = (
        ", ".join(f"{count:,}" for count in sorted({row[name] for row in document["results"]}))
        for name in ("documents", "skipped_documents")
    )
    lines.append(
        f"{document['data']}; {counts} documents, {skipped} too short, stride {document['stride']}, "
        f"score {document['score']}"
    )
    return "\n".join(lines)


def _plan(name: str, settings: EvaluateShortSettings) -> Plan:
    """The comparison of one model: inside the window that both it and its baseline have."""
    baseline, revision = baseline_of(name, settings)
    places = ((baseline, revision), (name, settings.loading.revision))
    trust = settings.loading.trust_remote_code
    known = [window(load_config(place, trust_remote_code=trust, revision=revision)) for place, revision in places]
    both = min((tokens for tokens in known if tokens), default=None)
    perplexities = _with_contexts(settings.perplexity, both)
    return Plan(baseline, revision, perplexities, both or max(perplexities.contexts))


def _with_contexts(settings: PerplexitySettings, both: int | None) -> PerplexitySettings:
    """`settings` with contexts up to the window `both`, and with the same documents at each of them.

    Raises:
        UserError: neither contexts nor window are known, or the stride is longer than the window.
    """
    contexts = settings.contexts
    if not contexts and both is None:
        raise UserError("neither model's config tells its window: give --contexts.")
    if not contexts and both is not None:
        contexts = tuple(context for context in (both // 4, both // 2, both) if context >= settings.stride_at(context))
    if not contexts:
        raise UserError(f"--stride is {settings.stride}: it must be at most the shorter window, {both} tokens.")
    return replace(settings, contexts=contexts, min_document_tokens=settings.min_document_tokens or max(contexts))


def _tasks(settings: EvaluateShortSettings) -> dict[str, list[Any]]:
    """lm-eval's tasks, with their data, by the names that asked for them."""
    if not settings.tasks:
        return {}
    require_lm_eval("--tasks")
    from longlora.evaluation.harness import load_tasks

    return load_tasks(settings.tasks)


def _documents(name: str, plan: Plan, settings: EvaluateShortSettings) -> TokenizedCorpus:
    """What both the model `name` and its baseline read.

    Raises:
        UserError: their tokenizers differ.
    """
    corpus, other = (
        tokenize_corpus(
            load_tokenizer(each, trust_remote_code=settings.loading.trust_remote_code, revision=revision),
            settings.corpus,
            held_out=held_out(settings.corpus),
        )
        for each, revision in ((name, settings.loading.revision), (plan.baseline, plan.revision))
    )
    if not same_tokens(corpus, other):
        raise UserError(
            f"'{name}' and its baseline '{plan.baseline}' have different tokenizers, so their perplexities cannot be "
            "compared: give --baseline the model that it was made from."
        )
    return corpus


def _measure(
    name: str,
    side: str,
    settings: EvaluateShortSettings,
    plan: Plan,
    corpus: TokenizedCorpus,
    tasks: Mapping[str, list[Any]],
    log: TrialLog,
) -> Measured:
    """Scores of the model `name`; `side` is what its trials in the log begin with."""
    model, tokenizer, label = load_evaluated(name, settings)
    logger.info("short contexts of %s", label)
    results = perplexity(model, corpus, plan.perplexity, log=log, trials=f"{side}/")
    rows: list[dict[str, Any]] = []
    if tasks:
        from longlora.evaluation.harness import LoadedModel, task_rows

        trials = f"{side}/task/{{}}/{settings.limit or 'all'}"
        rows = task_rows(partial(LoadedModel, model, tokenizer, plan.window), tasks, settings.limit, log, trials)
    return Measured(label, [result.to_dict() for result in results], rows)


def _compare(before: Measured, after: Measured) -> Document:
    results = [
        {
            "context": one["context"],
            **_change(
                one["perplexity"],
                other["perplexity"],
                statistics.perplexity_change(other["document_nll"], one["document_nll"], one["document_tokens"]),
                "%",
                higher_is_better=False,
            ),
            **{name: one[name] for name in ("stride", "text", "tokens", "documents", "skipped_documents")},
        }
        for one, other in zip(before.perplexities, after.perplexities, strict=True)
    ]
    tasks = [
        {
            "task": one["task"],
            "metric": one["metric"],
            **_change(one["value"], other["value"], *_task_change(one, other), one["higher_is_better"]),
            "samples": one["samples"],
            "cut": other["cut"],
        }
        for one, other in zip(before.tasks, after.tasks, strict=True)
    ]
    return {
        "label": after.label,
        "results": results,
        "tasks": tasks,
    }


def _task_change(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[Estimate, str]:
    """The change of a metric and its unit: points of a share, sample by sample where there are scores, else percent."""
    both = before["scores"], after["scores"]
    values = before["value"], after["value"], *both[0], *both[1]
    share = all(0 <= value <= 1 for value in values)
    if share and both[0] and len(both[0]) == len(both[1]):
        return statistics.share_change(both[1], both[0]), " points"
    scale = 1.0 if share or not before["value"] else abs(before["value"])
    change = (after["value"] - before["value"]) / scale
    half = None
    if before["high"] is not None and after["high"] is not None:
        half = math.hypot(before["high"] - before["value"], after["high"] - after["value"]) / scale
    ends = (None, None) if half is None else (change - half, change + half)
    return Estimate(change, *ends), " points" if share else "%"


def _change(before: float, after: float, change: Estimate, unit: str, higher_is_better: bool) -> dict[str, Any]:
    hundred = [None if value is None else 100 * value for value in change]
    return {
        "before": before,
        "after": after,
        **dict(zip(("change_percent" if unit == "%" else "change_points", "low", "high"), hundred, strict=True)),
        "verdict": verdict(change, higher_is_better, unit),
    }
