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
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from transformers import PreTrainedConfig

from longlora.errors import UserError
from longlora.evaluation import statistics
from longlora.evaluation.generation import generate_each
from longlora.evaluation.loading import load_evaluated, load_served, stretching
from longlora.evaluation.perplexity import check_positions
from longlora.evaluation.prompting import PromptFormat
from longlora.evaluation.results import (
    Document,
    Evaluated,
    evaluate_each,
    keep,
    say_where_results_go,
    weights_fingerprint,
)
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
) -> Document:
    """Ask each of `settings.models` the questions that `make_task` makes for it, and print `table` of the results.

    Returns:
        For one model `{"model", "label", "task", …, "window", "seconds", "results"}`; for several, or with a baseline,
        as `longlora.evaluation.results.evaluate_each`. A result has its cell, `accuracy` (None where nothing was asked)
        with its 95% interval `low` to `high`, `trials`, `scores` (of each prompt asked), `skipped` (prompts that do not
        fit) and `tokens` (mean prompt length, which is also `context` where the cell has none).

    Raises:
        UserError: a model or tokenizer that does not serve, no question that fits, or results that cannot be kept.
    """

    def ask(model: Evaluated, file: Path | None) -> Document:
        return _ask(task_name, model.name, file, model.settings(settings), make_task)

    return evaluate_each(task_name, settings, ask, table)


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


def _ask(task_name: str, name: str, file: Path | None, settings: RetrievalSettings, make_task: MakeTask) -> Document:
    """The results document of one model, which goes beside its log `file`."""
    model: Any = None
    if settings.server:
        config, tokenizer, label = load_served(name, settings)
    else:
        model, tokenizer, label = load_evaluated(name, settings)
        config = unwrapped(model).config
    form = PromptFormat(tokenizer, chat=settings.chat, bos=settings.bos, system=settings.system)
    task = make_task(form, config)
    asked = _questions_that_fit(task_name, task)
    check_positions(config, [max(len(question.tokens) for question in asked) + task.max_new_tokens])

    dtype = "the server's" if settings.server else str(unwrapped(model).dtype).removeprefix("torch.")
    about = {"task": task_name, "model": name, "label": label, **stretching(settings), "dtype": dtype}
    about |= {**form.description, **task.about}
    weights = weights_fingerprint(name, settings.loading.revision)
    with TrialLog.opened(file, {**about, "weights": weights}, settings.resume) as log:
        pending = [question for question in asked if question.trial not in log.records]
        say_where_results_go(file, "trial", len(asked) - len(pending), len(pending))
        _answer(f"{task_name} of {label}", model, form, task, pending, settings, log)
        records = {question.trial: log.records[question.trial] for question in asked}
        document = {
            **about,
            "window": window(config),
            "max_new_tokens": task.max_new_tokens,
            "seconds": round(sum(record["seconds"] for record in records.values()), 1),
            "results": summarize(task, records),
        }
        return keep(document, file)


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


def _answer(
    title: str,
    model: nn.Module | None,
    form: PromptFormat,
    task: Task,
    pending: list[Question],
    settings: RetrievalSettings,
    log: TrialLog,
) -> None:
    """Let `model`, or the server, answer the questions, and keep what each comes to."""
    prompts, most, batch = [question.tokens for question in pending], task.max_new_tokens, settings.evaluation_batch
    if model is None:
        assert settings.server is not None
        answered = answers(settings.server, form.tokenizer, prompts, most, batch=batch, title=title)
    else:
        stop_tokens = form.stop_tokens(unwrapped(model))
        answered = generate_each(
            model, prompts, most, stop_tokens=stop_tokens, stop=task.stop, batch=batch, progress=title
        )
    before = time.monotonic()
    for index, tokens in answered:
        question, now = pending[index], time.monotonic()
        record = {
            **question.cell,
            "correct": question.right(tokens),
            "expected": question.expected,
            "answer": form.text(tokens),
            "tokens": len(question.tokens),
            "seconds": round(now - before, 3),  # since the trial before: those of one pass come together
        }
        log.append(question.trial, record)
        before = now
