"""Questions about something hidden in a long prompt, asked of one model after another: what passkey and LongEval share.

A task is a list of questions, prompts as tokens. Those that fit are answered greedily, shortest first; each answer is
judged and appended to a log as it comes; accuracy is the mean over the questions of a cell, such as one context and
depth. Questions that do not fit are counted, never cut.
"""

import itertools
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedConfig

from longlora.errors import UserError
from longlora.evaluation import statistics
from longlora.evaluation.generation import generate_each
from longlora.evaluation.loading import Asked, whom_to_ask
from longlora.evaluation.perplexity import check_positions
from longlora.evaluation.prompting import PromptFormat
from longlora.evaluation.results import Document, evaluate_each, trials_kept
from longlora.evaluation.server import answers
from longlora.evaluation.statistics import Estimate
from longlora.evaluation.trials import Record, TrialLog
from longlora.model.lm_head import unwrapped
from longlora.model.loading import window
from longlora.settings import RetrievalSettings

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Question:
    """One prompt and what its answer should be."""

    trial: str
    """Its name, unlike any other's of the task; with the task's `about` it determines the prompt."""

    cell: Mapping[str, Any]
    """What its result is averaged over, such as `{"context": 1024, "depth": 0.5}`."""

    tokens: np.ndarray
    """The prompt's token ids (N,)."""

    limit: int
    """Tokens that the prompt and its answer may take together."""

    expected: str

    right: Callable[[list[int]], bool]
    """Whether the answer with these tokens is right."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """The questions of one evaluation and how they are answered."""

    questions: Sequence[Question]

    max_new_tokens: int
    """Tokens an answer has at most."""

    about: Mapping[str, Any]
    """What all the questions depend on, such as the seed."""

    stop: Callable[[list[int]], bool] | None = None
    """Whether an answer is over after these tokens, besides the usual stop tokens."""

    def fits(self, question: Question) -> bool:
        return len(question.tokens) + self.max_new_tokens <= question.limit


MakeTask = Callable[[PromptFormat, PreTrainedConfig], Task]


def ask_models(
    task_name: str,
    settings: RetrievalSettings,
    make_task: MakeTask,
    table: Callable[[Sequence[Document]], str],
    key: str = "context",
) -> Document:
    """Ask each of `settings.models` the questions that `make_task` makes for it, and print `table` of the results, with
    a baseline also how far accuracy is from its own by `key` of the cells.

    Returns:
        For one model `{"model", "label", "task", …, "window", "seconds", "results"}`; for several, or with a baseline,
        as `longlora.evaluation.results.evaluate_each`. A result has its cell, `accuracy` (None where nothing was asked)
        with its 95% interval `low` to `high`, `trials`, `scores` (of each prompt asked), `skipped` (prompts that do not
        fit) and `tokens` (mean prompt length, which is also `context` where the cell has none).

    Raises:
        UserError: a model or tokenizer that does not serve, no question that fits, or results that cannot be kept.
    """
    return evaluate_each(
        task_name, settings, partial(_ask, task_name, make_task), table, partial(accuracy_changes, key=key)
    )


def window_of(config: PreTrainedConfig, flag: str) -> int:
    """The window in tokens that `config` declares.

    Raises:
        UserError: it declares none; the sentence asks for `flag`.
    """
    found = window(config)
    if found is None:
        raise UserError(f"this {config.model_type} model's config does not tell its window: give {flag}.")
    return found


def summarize(task: Task, records: Mapping[str, Record]) -> list[dict[str, Any]]:
    """One result for each cell, in the order of the questions, from what the trials came to."""
    cells: dict[str, list[Question]] = {}
    for question in task.questions:
        cells.setdefault(json.dumps(question.cell), []).append(question)
    results = []
    for questions in cells.values():
        asked = [question for question in questions if question.trial in records]
        scores = [int(records[question.trial]["correct"]) for question in asked]
        found = statistics.share(sum(scores) / len(scores), len(scores)) if scores else None
        tokens = round(float(np.mean([len(question.tokens) for question in asked or questions])))
        results.append(
            {
                "context": tokens,
                **questions[0].cell,
                "accuracy": found.value if found else None,
                "low": found.low if found else None,
                "high": found.high if found else None,
                "trials": len(asked),
                "scores": scores,
                "skipped": len(questions) - len(asked),
                "tokens": tokens,
            }
        )
    return results


def footing(document: Document, source: str) -> str:
    """The line below a table: where the questions come from, how many they were, how they were asked."""
    trials, skipped = (sum(result[key] for result in document["results"]) for key in ("trials", "skipped"))
    return (
        f"{source}; {trials:,} trials, {'chat template' if document['chat'] else 'plain text'}, "
        f"window {document['window'] or 0:,}, {document['seconds']:,.0f} s"
        + (f"; {skipped:,} prompts did not fit" if skipped else "")
    )


def accuracy_changes(
    document: Mapping[str, Any], before: Mapping[str, Any], key: str = "context"
) -> dict[int, Estimate]:
    """By `key` of the cells, how far accuracy is from what it was, as a share, where both models were asked."""

    def scores(of: Mapping[str, Any]) -> dict[int, list[list[float]]]:
        found: dict[int, list[list[float]]] = {}
        for result in of["results"]:
            found.setdefault(result[key], []).append(result["scores"])
        return found

    found = {}
    earlier = scores(before)
    for at, cells in scores(document).items():
        one, other = (list(itertools.chain(*each)) for each in (cells, earlier.get(at, [])))
        if not one or not other:
            continue
        if [len(cell) for cell in cells] == [len(cell) for cell in earlier[at]]:
            found[at] = statistics.share_change(one, other)
        else:
            means = (sum(each) / len(each) for each in (one, other))
            found[at] = statistics.share_change_apart(next(means), len(one), next(means), len(other))
    return found


def _ask(task_name: str, make_task: MakeTask, name: str, settings: RetrievalSettings, file: Path | None) -> Document:
    """The results document of one model, which goes beside its log `file`."""
    asked = whom_to_ask(name, settings)
    task = make_task(asked.form, asked.config)
    questions = _questions_that_fit(task_name, task)
    check_positions(asked.config, [max(len(question.tokens) for question in questions) + task.max_new_tokens])
    about = {"task": task_name, **asked.about, **task.about}
    trials = [question.trial for question in questions]
    with trials_kept(file, settings, about, "trial", trials) as log:
        _answer(asked, task, [question for question in questions if question.trial not in log.records], settings, log)
        records = {trial: log.records[trial] for trial in trials}
        return {
            **about,
            "window": window(asked.config),
            "max_new_tokens": task.max_new_tokens,
            "seconds": round(sum(record["seconds"] for record in records.values()), 1),
            "results": summarize(task, records),
        }


def _questions_that_fit(task_name: str, task: Task) -> list[Question]:
    asked = [question for question in task.questions if task.fits(question)]
    if not asked:
        closest = min(task.questions, key=lambda question: len(question.tokens) - question.limit)
        raise UserError(
            f"no prompt of {task_name} fits: the closest takes {len(closest.tokens) + task.max_new_tokens:,} tokens "
            f"with its answer, and {closest.limit:,} are allowed; ask for shorter ones, or allow more where the "
            "model's window does."
        )
    if left_out := len(task.questions) - len(asked):
        logger.warning(
            "%s: %d of %d prompts do not fit with their answers and are not asked",
            task_name,
            left_out,
            len(task.questions),
        )
    return asked


def _answer(asked: Asked, task: Task, pending: list[Question], settings: RetrievalSettings, log: TrialLog) -> None:
    """Let the model, or the server, answer the questions, and keep what each comes to."""
    prompts, most, batch = [question.tokens for question in pending], task.max_new_tokens, settings.evaluation_batch
    title = f"questions to {asked.about['label']}"
    if settings.server is not None:
        answered = answers(settings.server, asked.tokenizer, prompts, most, batch=batch, title=title)
    else:
        stop_tokens = asked.form.stop_tokens(unwrapped(asked.model))
        answered = generate_each(
            asked.model, prompts, most, stop_tokens=stop_tokens, stop=task.stop, batch=batch, progress=title
        )
    before = time.monotonic()
    for index, tokens in answered:
        question, now = pending[index], time.monotonic()
        record = {
            **question.cell,
            "correct": question.right(tokens),
            "expected": question.expected,
            "answer": asked.form.text(tokens),
            "tokens": len(question.tokens),
            "seconds": round(now - before, 3),  # since the trial before: those of one pass come together
        }
        log.append(question.trial, record)
        before = now
