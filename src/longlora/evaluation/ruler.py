"""`longlora eval ruler`: RULER's tasks at any lengths, and the longest at which the model still does them.

Samples, prompts, answers and scores are lm-eval's (`longlora.evaluation.ruler_samples`, `longlora.evaluation.harness`).
A cell is one task at one context; it is kept as it comes, and a run that was stopped goes on after it.
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from longlora.errors import UserError
from longlora.evaluation import statistics
from longlora.evaluation.loading import Asked, require_lm_eval, whom_to_ask
from longlora.evaluation.perplexity import check_positions, default_contexts
from longlora.evaluation.results import Document, evaluate_each, trials_kept
from longlora.evaluation.retrieval import accuracy_changes, footing
from longlora.evaluation.statistics import Estimate
from longlora.evaluation.tables import result_table, shown
from longlora.model.loading import window
from longlora.progress import Progress
from longlora.settings import RulerSettings

Cell = dict[str, Any]

TASKS = 13
"""RULER's tasks, over which its published averages are."""

TEMPLATE_TOKENS = 256
"""Room for a chat template around a prompt that fills its context, so that nothing is cut."""

DEVIATIONS = {"ruler_cwe": "ruler_cwe: lm-eval leaves out the worked example that RULER's own prompt begins with"}
"""Where lm-eval departs from the paper's code."""


def evaluate_ruler(settings: RulerSettings) -> Document:
    """Run `longlora eval ruler`.

    Returns:
        For one model `{"model", "label", "task": "ruler", …, "results": [{"context", "task", "accuracy", "low", "high",
        "trials", "scores", "skipped", "cut", "tokens", "seconds"}], "average_over", "of_tasks", "averages":
        [{"context", "accuracy", "low", "high"}], "weighted_averages": {"increasing", "decreasing"}, "threshold",
        "threshold_from", "effective_length", "left_out": [{"task", "context", "reason"}], "deviations": {task: how}}`;
        for several, or with a baseline, as `longlora.evaluation.results.evaluate_each`. `accuracy` is the mean share of
        the expected words found, from 0 to 1; `cut` counts the prompts whose beginning did not fit the window;
        `average_over` names the tasks that ran at every context, of 13; the weights of the weighted averages rise or
        fall linearly with the length; `threshold` is a share, too; `effective_length` is None where the shortest
        context is below it already; `context` is None in `left_out` where a task was left out everywhere.

    Raises:
        UserError: lm-eval is not installed, a model, tokenizer, task or context that does not serve, or results that
            cannot be kept.
    """
    require_lm_eval("longlora eval ruler")
    return evaluate_each("ruler", settings, _evaluate, ruler_tables, _average_changes)


def averages(results: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[dict[str, Any]]]:
    """The tasks that have an accuracy at every context, and their mean at each, contexts rising.

    A task that ran only at some contexts would make their averages incomparable.
    """
    found = {(cell["context"], cell["task"]): cell["accuracy"] for cell in results if cell["accuracy"] is not None}
    contexts = sorted({cell["context"] for cell in results})
    names = dict.fromkeys(cell["task"] for cell in results)
    common = [name for name in names if all((context, name) in found for context in contexts)]
    if not common:
        return [], []
    return common, [
        _average(context, [cell for cell in results if cell["context"] == context and cell["task"] in common])
        for context in contexts
    ]


def _average(context: int, cells: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    mean = sum(cell["accuracy"] for cell in cells) / len(cells)
    found = statistics.share(mean, min(cell["trials"] for cell in cells) * len(cells))
    return {"context": context, "accuracy": mean, "low": found.low, "high": found.high}


def weighted_averages(means: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """RULER's two: weights that rise, or fall, linearly with the length.

    >>> weighted_averages([{"accuracy": 1.0}, {"accuracy": 0.4}])
    {'increasing': 0.6, 'decreasing': 0.8}
    """
    total = len(means) * (len(means) + 1) / 2
    return {
        name: round(sum(rank * mean["accuracy"] for rank, mean in enumerate(ordered, start=1)) / total, 6)
        for name, ordered in (("increasing", means), ("decreasing", means[::-1]))
    }


def effective_length(means: Sequence[Mapping[str, Any]], threshold: float) -> int | None:
    """The longest context up to which every average reaches `threshold`, a share; None where the first does not.

    >>> effective_length([{"context": 4096, "accuracy": 0.9}, {"context": 8192, "accuracy": 0.8}], 0.856)
    4096
    """
    longest = None
    for mean in means:
        if mean["accuracy"] < threshold:
            break
        longest = mean["context"]
    return longest


def ruler_tables(documents: Sequence[Document]) -> str:
    """Every model's for people."""
    return "\n\n".join(map(ruler_table, documents))


def ruler_table(document: Document) -> str:
    """The cells, averages and effective length of one model, for people."""
    results, means = document["results"], document["averages"]
    average = f"average of {len(document['average_over'])} tasks"
    told = document | {"results": [*results, *(mean | {"task": average} for mean in means)]}
    heading = f"{document['label']}: RULER, % right"
    figures = result_table([told], heading, lambda cell: shown(cell, "accuracy", 1, 100), row=lambda cell: cell["task"])
    lines = [figures]
    if len(means) > 1:
        both = document["weighted_averages"]
        lines.append(
            f"weighted averages: {100 * both['increasing']:.1f} where long lengths count most, "
            f"{100 * both['decreasing']:.1f} where short ones do"
        )
    partial = dict.fromkeys(cell["task"] for cell in results if cell["task"] not in document["average_over"])
    if means and partial:
        lines.append(f"not in the average, for want of a length: {', '.join(partial)}")
    lines += [_effective_length_in_words(document), footing(document, f"seed {document['seed']}")]
    if cut := sum(cell["cut"] for cell in results):
        lines.append(f"{cut:,} prompts were cut on the left")
    lines += list(document["deviations"].values())
    for where, reason, tasks in _grouped(document["left_out"]):
        lines.append(f"left out{where}: {', '.join(tasks)}: {reason}")
    return "\n".join(lines)


def _evaluate(name: str, settings: RulerSettings, file: Path | None) -> Document:
    """The results document of one model, which goes beside its log `file`."""
    from longlora.evaluation.ruler_samples import NoSampleError, RulerTask, choose_tasks

    tasks, left_out = choose_tasks(settings.tasks, settings.download)
    if not tasks:
        reasons = "; ".join(f"{entry['task']} {entry['reason']}" for entry in left_out)
        raise UserError(f"--tasks: {reasons}.")
    asked = whom_to_ask(name, settings)
    config, chat = asked.config, asked.form.chat
    contexts = sorted(settings.contexts or default_contexts(config))
    check_positions(config, contexts)
    about = {"task": "ruler", **asked.about, "seed": settings.seed, "trials": settings.trials}
    results: list[Cell] = []
    cells = {f"{context}/{task}": (context, task) for context in contexts for task in tasks}
    with (
        trials_kept(file, settings, about, "cell", [*cells]) as log,
        Progress(f"ruler of {about['label']}", "tokens", len(tasks) * sum(contexts)) as bar,
    ):
        done = 0
        for cell, (context, name_of_task) in cells.items():
            try:
                if cell not in log.records:
                    task = RulerTask(name_of_task, asked.tokenizer, context, settings.trials, settings.seed)
                    log.append(cell, _ask(task, asked, settings))
                results.append({key: value for key, value in log.records[cell].items() if key != "answers"})
            except NoSampleError as error:
                left_out.append({"task": name_of_task, "context": context, "reason": str(error)})
            done += context
            bar.show(done, f"{name_of_task} at {context:,} tokens")
    return {**about, "window": window(config), **_summary(results, left_out, chat, settings)}


def _summary(results: list[Cell], left_out: list[dict[str, Any]], chat: bool, settings: RulerSettings) -> Document:
    """What follows from the cells."""
    common, means = averages(results)
    bar = settings.bar(chat)
    threshold = bar / 100 if bar is not None else means[0]["accuracy"] if means else None
    return {
        "seconds": round(sum(cell["seconds"] for cell in results), 1),
        "results": results,
        "average_over": common,
        "of_tasks": len(common),
        "averages": means,
        "weighted_averages": weighted_averages(means),
        "threshold": threshold,
        "threshold_from": {"auto": "chat" if chat else "base", "own": "own"}.get(settings.threshold, "given"),
        "effective_length": effective_length(means, threshold) if means and threshold is not None else None,
        "left_out": left_out,
        "deviations": {task: DEVIATIONS[task] for task in DEVIATIONS if any(cell["task"] == task for cell in results)},
    }


def _ask(task: Any, asked_of: Asked, settings: RulerSettings) -> Cell:
    """One cell: the samples of `task`, answered and scored by lm-eval."""
    from longlora.evaluation.harness import for_lm_eval, run_tasks

    began, chat = time.monotonic(), asked_of.form.chat
    room = max(task.context + TEMPLATE_TOKENS * chat, window(asked_of.config) or 0)
    lm = for_lm_eval(asked_of, room, settings)
    _, samples = run_tasks(lm, [task], None, chat=chat, system=settings.system)
    (asked,) = samples.values()
    scores = [float(sample[str(task.context)]) for sample in asked]
    found = statistics.share(sum(scores) / len(scores), len(scores))
    prompts = [str(sample["arguments"][0][0]) for sample in asked]
    return {
        "context": task.context,
        "task": task.name,
        "accuracy": found.value,
        "low": found.low,
        "high": found.high,
        "trials": len(scores),
        "scores": scores,
        "skipped": 0,
        "cut": lm.cut,
        "tokens": round(sum(len(lm.tok_encode(prompt)) for prompt in prompts) / len(prompts)),
        "seconds": round(time.monotonic() - began, 3),
        "answers": [
            {"expected": sample["doc"]["outputs"], "answer": sample["resps"][0][0], "score": score}
            for sample, score in zip(asked, scores, strict=True)
        ],
    }


def _average_changes(document: Mapping[str, Any], before: Mapping[str, Any]) -> dict[int, Estimate]:
    common = set(document["average_over"]) & set(before["average_over"])
    kept = [{"results": [cell for cell in each["results"] if cell["task"] in common]} for each in (document, before)]
    return accuracy_changes(kept[0], kept[1])


def _effective_length_in_words(document: Document) -> str:
    if not document["averages"]:
        return "no effective length: no task ran at every context"
    bar = f"{100 * document['threshold']:.1f}%"
    bar += {
        "own": ", its own at the shortest",
        "chat": f", Llama-2-7B-chat at 4k over all {TASKS} tasks",
        "base": f", Llama-2-7B at 4k over all {TASKS} tasks",
    }.get(document["threshold_from"], "")
    tasks = document["of_tasks"]
    of = "" if tasks == TASKS else f" of {tasks} task{'s' * (tasks != 1)}, not {TASKS}"
    length = document["effective_length"]
    if length is None:
        return f"effective length{of}: below {document['averages'][0]['context']:,} (threshold {bar})"
    return f"effective length{of}: {length:,} (threshold {bar})"


def _grouped(left_out: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, list[str]]]:
    """Tasks left out for one reason together: where, why, which."""
    groups: dict[tuple[str, str], list[str]] = {}
    for entry in left_out:
        where = "" if entry["context"] is None else f" at {entry['context']:,}"
        groups.setdefault((where, entry["reason"]), []).append(entry["task"])
    return [(*key, tasks) for key, tasks in groups.items()]
