"""`longlora eval ruler`: RULER's tasks at any lengths, and the longest at which the model still does them.

Samples and scores are lm-eval's (`longlora.evaluation.ruler_samples`), the answers greedy, with the KV cache, from one
loaded model. A cell is one task at one context; it is kept as it comes, and a run that was stopped goes on after it.
"""

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from longlora.errors import UserError
from longlora.evaluation import statistics
from longlora.evaluation.generation import generate_each
from longlora.evaluation.loading import load_evaluated, require_lm_eval, stretching
from longlora.evaluation.perplexity import check_positions, default_contexts
from longlora.evaluation.prompting import PromptFormat
from longlora.evaluation.results import (
    Document,
    Evaluated,
    change_lines,
    evaluate_each,
    keep,
    say_where_results_go,
    weights_fingerprint,
)
from longlora.evaluation.retrieval import accuracy_changes
from longlora.evaluation.statistics import Estimate
from longlora.evaluation.trials import TrialLog
from longlora.model.lm_head import unwrapped
from longlora.model.loading import window
from longlora.progress import Progress
from longlora.settings import RULER_BAR, RulerSettings

Cell = dict[str, Any]

TASKS = 13
"""RULER's tasks, over which its published averages are."""


def evaluate_ruler(settings: RulerSettings) -> Document:
    """Run `longlora eval ruler`.

    Returns:
        For one model `{"model", "label", "task": "ruler", …, "results": [{"context", "task", "accuracy", "trials",
        "skipped", "tokens", "seconds"}], "average_over", "averages": [{"context", "accuracy"}], "threshold",
        "effective_length", "left_out": [{"task", "context", "reason"}]}`; for several, or with a baseline, as
        `longlora.evaluation.results.evaluate_each`. `accuracy` is the mean share of the expected words found, from 0 to
        1; `skipped` counts the prompts that do not fit; `average_over` names the tasks that ran at every context;
        `threshold` is a share, too; `effective_length` is None where the shortest context is below it already;
        `context` is None in `left_out` where a task was left out everywhere.

    Raises:
        UserError: lm-eval is not installed, a model, tokenizer, task or context that does not serve, or results that
            cannot be kept.
    """
    require_lm_eval("longlora eval ruler")

    def evaluate(model: Evaluated, file: Path | None) -> Document:
        return _evaluate(model.name, file, model.settings(settings))

    def tables(documents: Sequence[Document]) -> str:
        each = [ruler_table(document) for document in documents]
        changes = change_lines(documents, _average_changes, " points") if settings.baseline else []
        return "\n\n".join([*each, *(["\n".join(changes)] if changes else [])])

    return evaluate_each("ruler", settings, evaluate, tables)


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


def ruler_table(document: Document) -> str:
    """The cells, averages and effective length of one model, for people."""
    results = document["results"]
    contexts = sorted({cell["context"] for cell in results})
    names = list(dict.fromkeys(cell["task"] for cell in results))
    found = {(cell["context"], cell["task"]): cell["accuracy"] for cell in results}
    average = f"average of {len(document['average_over'])}"
    width = max(len(name) for name in (*names, average)) + 2
    lines = [f"{document['label']}: RULER, % right", " " * width + "".join(f"{context:>10,}" for context in contexts)]
    lines += [
        f"{name:<{width}}" + "".join(_percent(found.get((context, name))) for context in contexts) for name in names
    ]
    means = {mean["context"]: mean["accuracy"] for mean in document["averages"]}
    if means:
        lines.append(f"{average:<{width}}" + "".join(_percent(means.get(context)) for context in contexts))
    partial = [name for name in names if name not in document["average_over"]]
    if means and partial:
        lines.append(f"not in the average, for want of a length: {', '.join(partial)}")
    lines.append(_effective_length_in_words(document))
    skipped = sum(cell["skipped"] for cell in results)
    lines.append(
        f"{document['trials']:,} trials a task and length, seed {document['seed']}, "
        f"{'chat template' if document['chat'] else 'plain text'}, window {document['window'] or 0:,}, "
        f"{document['seconds']:,.0f} s" + (f"; {skipped:,} prompts did not fit" if skipped else "")
    )
    for where, reason, tasks in _grouped(document["left_out"]):
        lines.append(f"left out{where}: {', '.join(tasks)}: {reason}")
    return "\n".join(lines)


def _evaluate(name: str, file: Path | None, settings: RulerSettings) -> Document:
    """The results document of one model, which goes beside its log `file`."""
    from longlora.evaluation.ruler_samples import NoSampleError, RulerTask, choose_tasks

    tasks, left_out = choose_tasks(settings.tasks, settings.download)
    if not tasks:
        reasons = "; ".join(f"{entry['task']} {entry['reason']}" for entry in left_out)
        raise UserError(f"--tasks: {reasons}.")
    model, tokenizer, label = load_evaluated(name, settings)
    config = unwrapped(model).config
    contexts = sorted(settings.contexts or default_contexts(config))
    check_positions(config, contexts)
    form = PromptFormat(tokenizer, chat=settings.chat, bos=settings.bos, system=settings.system)
    about = {
        "task": "ruler",
        "model": name,
        "label": label,
        **stretching(settings),
        "dtype": str(unwrapped(model).dtype).removeprefix("torch."),
        **form.description,
        "seed": settings.seed,
        "trials": settings.trials,
    }
    weights = weights_fingerprint(name, settings.loading.revision)
    results: list[Cell] = []
    with (
        TrialLog.opened(file, {**about, "weights": weights}, settings.resume) as log,
        Progress(f"ruler of {label}", "tokens", len(tasks) * sum(contexts)) as bar,
    ):
        cells = [f"{context}/{task_name}" for context in contexts for task_name in tasks]
        there = sum(cell in log.records for cell in cells)
        say_where_results_go(file, "cell", there, len(cells) - there)
        done = 0
        for context in contexts:
            for task_name in tasks:
                cell = f"{context}/{task_name}"
                try:
                    if cell not in log.records:
                        task = RulerTask(task_name, tokenizer, context, settings.trials, settings.seed)
                        log.append(cell, _ask(task, model, form, max(context, window(config) or 0), settings))
                    results.append({key: value for key, value in log.records[cell].items() if key != "answers"})
                except NoSampleError as error:
                    left_out.append({"task": task_name, "context": context, "reason": str(error)})
                done += context
                bar.show(done, f"{task_name} at {context:,} tokens")
    document = {**about, "window": window(config), **_summary(results, left_out, settings)}
    return keep(document, file)


def _summary(results: list[Cell], left_out: list[dict[str, Any]], settings: RulerSettings) -> Document:
    """What follows from the cells."""
    common, means = averages(results)
    bar = settings.bar()
    threshold = bar / 100 if bar is not None else means[0]["accuracy"] if means else None
    return {
        "seconds": round(sum(cell["seconds"] for cell in results), 1),
        "results": results,
        "average_over": common,
        "averages": means,
        "threshold": threshold,
        "threshold_from": "own" if bar is None else "given",
        "effective_length": effective_length(means, threshold) if means and threshold is not None else None,
        "left_out": left_out,
    }


def _ask(task: Any, model: Any, form: PromptFormat, limit: int, settings: RulerSettings) -> Cell:
    """One cell: the samples of `task`, answered and scored.

    A sample fits if its prompt and the expected answer have at most `limit` tokens; the answer given may fill the rest,
    up to the task's own length. (lm-eval sizes samples without the answer's beginning, and those of fwe without the
    answer, so that a prompt of exactly the window would leave no room for all of an answer's possible length.)
    """
    samples = task.samples
    prompts = [_prompt(task, form, sample) for sample in samples]
    rooms: defaultdict[int, list[int]] = defaultdict(list)
    for index, (sample, prompt) in enumerate(zip(samples, prompts, strict=True)):
        expected = form.tokenizer(" " + ", ".join(sample["outputs"]), add_special_tokens=False)["input_ids"]
        if len(prompt) + len(expected) <= limit:
            rooms[min(task.max_new_tokens, limit - len(prompt))].append(index)
    answers = {}
    began = time.monotonic()
    for room, indices in rooms.items():
        answered = generate_each(
            model,
            [prompts[index] for index in indices],
            room,
            stop_tokens=form.stop_tokens(unwrapped(model)),
            batch=settings.evaluation_batch,
        )
        for at, tokens in answered:
            sample, text = samples[indices[at]], form.text(tokens)
            score = task.score(sample, text)
            answers[indices[at]] = {"expected": sample["outputs"], "answer": text, "score": score}
    asked = sorted(answers)
    scores = [answers[index]["score"] for index in asked]
    found = statistics.share(sum(scores) / len(scores), len(scores)) if scores else None
    return {
        "context": task.context,
        "task": task.name,
        "accuracy": found.value if found else None,
        "low": found.low if found else None,
        "high": found.high if found else None,
        "trials": len(asked),
        "scores": scores,
        "skipped": len(samples) - len(asked),
        "tokens": round(sum(len(prompts[index]) for index in asked) / len(asked)) if asked else None,
        "seconds": round(time.monotonic() - began, 3),
        "answers": [answers[index] for index in asked],
    }


def _prompt(task: Any, form: PromptFormat, sample: dict[str, Any]) -> Any:
    """Token ids (N,): lm-eval's text, or in a chat its question, with its beginning of the answer."""
    if form.chat:
        return form.tokens(task.doc_to_text(sample), opening=task.doc_to_prefix(sample))
    return form.tokens(task.prompt_text(sample))


def _average_changes(document: Mapping[str, Any], before: Mapping[str, Any]) -> dict[int, Estimate]:
    common = set(document["average_over"]) & set(before["average_over"])
    kept = [{"results": [cell for cell in each["results"] if cell["task"] in common]} for each in (document, before)]
    return accuracy_changes(kept[0], kept[1])


def _percent(share: float | None) -> str:
    return f"{'–':>10}" if share is None else f"{100 * share:>10.1f}"


def _effective_length_in_words(document: Document) -> str:
    if not document["averages"]:
        return "no effective length: no task ran at every context"
    bar = f"{100 * document['threshold']:.1f}%"
    if document["threshold_from"] == "own":
        bar += ", its own at the shortest"
    elif document["threshold"] == RULER_BAR / 100:
        bar += f", Llama-2-7B at 4k over all {TASKS} tasks"
    length = document["effective_length"]
    if length is None:
        return f"effective length: below {document['averages'][0]['context']:,} (threshold {bar})"
    return f"effective length: {length:,} (threshold {bar})"


def _grouped(left_out: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, list[str]]]:
    """Tasks left out for one reason together: where, why, which."""
    groups: dict[tuple[str, str], list[str]] = {}
    for entry in left_out:
        where = "" if entry["context"] is None else f" at {entry['context']:,}"
        groups.setdefault((where, entry["reason"]), []).append(entry["task"])
    return [(*key, tasks) for key, tasks in groups.items()]
