"""`longlora eval tasks`: any of lm-eval's tasks at any window, the new one too, with lm-eval's own standard errors."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from longlora.evaluation.loading import require_lm_eval, whom_to_ask
from longlora.evaluation.perplexity import check_positions
from longlora.evaluation.results import Document, evaluate_each, trials_kept
from longlora.evaluation.retrieval import window_of
from longlora.evaluation.tables import shown
from longlora.settings import EvaluateTasksSettings
from longlora.tables import aligned


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
    return evaluate_each("tasks", settings, _evaluate, tasks_table)


def tasks_table(documents: Sequence[Document]) -> str:
    """For people: a line a task, metric and model."""
    rows = [
        (
            f"{row['task']}, {row['metric']}",
            document["label"],
            shown(row, "value", 4),
            f"{row['samples'] or 0:,} samples" + (f", {row['cut']:,} requests cut on the left" if row["cut"] else ""),
        )
        for document in documents
        for row in document["results"]
    ]
    return f"{aligned(sorted(rows), words=4)}\ncontext {documents[0]['context']:,}; in brackets 95% intervals"


@contextmanager
def metadata(tokenizer: Any, context: int) -> Iterator[dict[str, Any]]:
    """What lm-eval makes the samples of long tasks for: lengths, and the folder of a tokenizer to measure them with."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        yield {"max_seq_lengths": [context], "tokenizer": folder, "pretrained": folder}


def _evaluate(name: str, settings: EvaluateTasksSettings, file: Path | None) -> Document:
    """The results document of one model, which goes beside its log `file`."""
    from longlora.evaluation.harness import for_lm_eval, load_tasks, task_rows

    asked = whom_to_ask(name, settings)
    context = settings.context or window_of(asked.config, "--context")
    check_positions(asked.config, [context])
    about = {"task": "tasks", **asked.about, "context": context, "limit": settings.limit}
    with (
        trials_kept(file, settings, about, "task", settings.tasks) as log,
        metadata(asked.tokenizer, context) as made_for,
    ):
        missing = [task for task in settings.tasks if task not in log.records]
        loaded = dict.fromkeys(settings.tasks, ()) | (load_tasks(missing, made_for) if missing else {})
        make = partial(for_lm_eval, asked, context, settings)
        rows = task_rows(make, loaded, settings.limit, log, chat=asked.form.chat, system=settings.system)
        seconds = round(sum(log.records[task]["seconds"] for task in settings.tasks), 1)
        return {**about, "results": rows, "seconds": seconds}
