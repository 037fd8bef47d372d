"""`longlora eval tasks`: any of lm-eval's tasks at any window, the new one too, with lm-eval's own standard errors."""

import logging
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from longlora.evaluation.loading import require_lm_eval, stretching
from longlora.evaluation.perplexity import check_positions
from longlora.evaluation.results import (
    Document,
    Evaluated,
    evaluate_each,
    keep,
    say_where_results_go,
    weights_fingerprint,
)
from longlora.evaluation.retrieval import window_of
from longlora.evaluation.trials import TrialLog
from longlora.settings import EvaluateTasksSettings

logger = logging.getLogger(__name__)


def evaluate_tasks(settings: EvaluateTasksSettings) -> Document:
    """Run `longlora eval tasks`.

    Returns:
        For one model `{"model", "label", "task": "tasks", "context", "limit", …, "results": [{"task", "metric",
        "value", "low", "high", "higher_is_better", "samples", "scores", "cut"}], "seconds"}`; for several, or with a
        baseline, as `longlora.evaluation.results.evaluate_each`. `cut` counts the requests that are longer than the
        context, of which only the end was read.

    Raises:
        UserError: lm-eval is not installed, a task that it does not have or whose data cannot be had, a model or
            context that does not serve, or results that cannot be kept.
    """
    require_lm_eval("longlora eval tasks")

    def evaluate(model: Evaluated, file: Path | None) -> Document:
        return _evaluate(model.name, file, model.settings(settings))

    return evaluate_each("tasks", settings, evaluate, tasks_table)


def tasks_table(documents: Sequence[Document]) -> str:
    """For people: a line a task, metric and model."""
    rows = [
        (
            f"{row['task']}, {row['metric']}",
            document["label"],
            f"{row['value']:.4f}" + ("" if row["low"] is None else f" ({row['low']:.4f} to {row['high']:.4f})"),
            f"{row['samples'] or 0:,} samples" + (f", {row['cut']:,} requests cut on the left" if row["cut"] else ""),
        )
        for document in documents
        for row in document["results"]
    ]
    widths = [max(len(row[at]) for row in rows) + 2 for at in range(3)] if rows else []
    lines = ["".join(cell.ljust(width) for cell, width in zip(row, [*widths, 0], strict=True)) for row in sorted(rows)]
    return "\n".join([*lines, f"context {documents[0]['context']:,}; in brackets 95% intervals"])


@contextmanager
def metadata(tokenizer: Any, context: int) -> Iterator[dict[str, Any]]:
    """What lm-eval makes the samples of long tasks for: lengths, and the folder of a tokenizer to measure them with."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        yield {"max_seq_lengths": [context], "tokenizer": folder, "pretrained": folder}


def _evaluate(name: str, file: Path | None, settings: EvaluateTasksSettings) -> Document:
    """The results document of one model, which goes beside its log `file`."""
    from longlora.evaluation.harness import load_tasks, run_tasks, whom_to_ask

    asked = whom_to_ask(name, settings)
    context = settings.context or window_of(asked.config, "--context")
    check_positions(asked.config, [context])
    about = {
        "task": "tasks",
        "model": name,
        "label": asked.label,
        **stretching(settings),
        "dtype": asked.dtype,
        **asked.form.description,
        "context": context,
        "limit": settings.limit,
    }
    weights = weights_fingerprint(name, settings.loading.revision)
    rows: list[dict[str, Any]] = []
    with (
        TrialLog.opened(file, {**about, "weights": weights}, settings.resume) as log,
        metadata(asked.tokenizer, context) as made_for,
    ):
        missing = [task for task in settings.tasks if task not in log.records]
        say_where_results_go(file, "task", len(settings.tasks) - len(missing), len(missing))
        loaded = load_tasks(missing, made_for) if missing else {}
        for task in settings.tasks:
            if task not in log.records:
                logger.info("lm-eval task of %s: %s", asked.label, task)
                began, lm = time.monotonic(), asked.window(context)
                found, _ = run_tasks(lm, loaded[task], settings.limit, chat=asked.form.chat, system=settings.system)
                cut, seconds = getattr(lm, "cut", 0), round(time.monotonic() - began, 3)
                log.append(task, {"rows": [row | {"cut": cut} for row in found], "seconds": seconds})
            rows += log.records[task]["rows"]
        seconds = round(sum(log.records[task]["seconds"] for task in settings.tasks), 1)
        return keep({**about, "results": rows, "seconds": seconds}, file)
