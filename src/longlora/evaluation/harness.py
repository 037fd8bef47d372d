"""lm-eval (EleutherAI's lm-evaluation-harness) on a loaded model: its own wrapper, `HFLM`, its tasks, its scores.

What is longer than the window is cut on the left, as lm-eval does; here it is counted as well.
"""

import io
import logging
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from aiohttp import ClientError
from lm_eval import evaluator
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.models.openai_completions import LocalCompletionsAPI
from lm_eval.tasks import TaskManager
from torch import nn

from longlora import ranks
from longlora.errors import UserError, nearest
from longlora.evaluation.cost import tokens_a_pass
from longlora.evaluation.loading import Asked
from longlora.evaluation.perplexity import evaluating
from longlora.evaluation.server import AT_A_TIME, SECONDS, served_model
from longlora.evaluation.trials import TrialLog
from longlora.model.lm_head import unwrapped
from longlora.model.positions import frequencies_change_at
from longlora.model.source import first_line
from longlora.settings import RetrievalSettings

logger = logging.getLogger(__name__)

for noisy in ("lm_eval", "huggingface_hub"):
    logging.getLogger(noisy).setLevel(logging.ERROR)

NUMPY_SEED = 1234
"""lm-eval's default seed of numpy beside its default 0 of Python's random."""

Row = dict[str, Any]


class LoadedModel(HFLM):
    """A loaded model for lm-eval's evaluator.

    Args:
        model: a causal language model of transformers, possibly wrapped (PEFT).
        tokenizer: its tokenizer.
        window: tokens that a request and its answer may have.
        batch: requests a pass; 0 chooses for the memory that is free.
        bos: whether texts begin with BOS; None leaves it to the tokenizer.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, window: int, batch: int = 0, bos: bool | None = None) -> None:
        changes_at = frequencies_change_at(model)
        if changes_at is not None and changes_at < window:
            batch = 1  # padded together, all rows would have the longest one's frequencies
        super().__init__(
            pretrained=unwrapped(model),
            tokenizer=tokenizer,
            backend="causal",
            max_length=window,
            batch_size=batch or max(1, tokens_a_pass(model, window, cached=True) // window),
            add_bos_token=bos,
        )
        self.requests = 0
        """Requests so far."""
        self.cut = 0
        """Of those, the ones cut on the left because they are longer than the window."""
        if ranks.together() > 1:  # lm-eval shares the requests out
            self.accelerator = Accelerator()
            self._rank, self._world_size = self.accelerator.process_index, ranks.together()

    def tok_batch_encode(
        self, strings: list[str], *given: Any, left_truncate_len: int | None = None, **named: Any
    ) -> Any:
        """As `HFLM`."""
        if left_truncate_len:
            lengths = super().tok_batch_encode(strings, *given, **named)[1].sum(1)
            self.requests, self.cut = self.requests + len(strings), self.cut + int((lengths > left_truncate_len).sum())
        return super().tok_batch_encode(strings, *given, left_truncate_len=left_truncate_len, **named)

    def _loglikelihood_tokens(self, requests: Any, *given: Any, **named: Any) -> Any:
        requests = list(requests)
        self.requests += len(requests)
        self.cut += sum(len(context) + len(scored) > self.max_length + 1 for _, context, scored in requests)
        return super()._loglikelihood_tokens(requests, *given, **named)


class ServedModel(LocalCompletionsAPI):
    """The model of the server at `url` for lm-eval's evaluator, otherwise as `LoadedModel`; prompts go as token ids."""

    def __init__(self, url: str, tokenizer: Any, window: int, batch: int = 0, bos: bool | None = None) -> None:
        super().__init__(
            base_url=f"{url.rstrip('/')}/completions",
            model=served_model(url),
            tokenizer_backend="none",  # it would load one by the server's name of the model
            max_length=window + 1,  # lm-eval takes one off
            num_concurrent=batch or AT_A_TIME,
            timeout=SECONDS,
        )
        self.tokenizer, self.tokenizer_backend, self.tokenized_requests = tokenizer, "huggingface", True
        self.add_bos_token = bos is not False
        self.requests = self.cut = 0

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """As `LocalCompletionsAPI`."""
        for prompt, how in (request.args for request in requests):
            room = self.max_length - how.get("max_gen_toks", self._max_gen_toks)
            self.cut += len(self.tok_encode(prompt)) > room
        self.requests += len(requests)
        return super().generate_until(requests, disable_tqdm)

    def _loglikelihood_tokens(self, requests: Any, **named: Any) -> Any:
        self.requests += len(requests)
        self.cut += sum(len(context) + len(scored) >= self.max_length for _, context, scored in requests)
        self.max_length -= 1  # a server goes on for a token
        try:
            return super()._loglikelihood_tokens(requests, **named)
        finally:
            self.max_length += 1


def for_lm_eval(asked: Asked, window: int, settings: RetrievalSettings) -> LoadedModel | ServedModel:
    """The model as lm-eval takes it, with `window` tokens for a request and its answer."""
    bos = None if settings.bos == "auto" else settings.bos == "yes"
    if settings.server is not None:
        return ServedModel(settings.server, asked.tokenizer, window, settings.evaluation_batch, bos)
    return LoadedModel(asked.model, asked.tokenizer, window, settings.evaluation_batch, bos)


@contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    """Python's and numpy's generators as lm-eval seeds them before it loads a task, and afterwards as they were."""
    sys.modules.pop("lm_eval.tasks.ruler.cwe_utils", None)  # has a generator of its own: read anew, it starts anew
    states = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(NUMPY_SEED + seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


@contextmanager
def replaced(names: dict[str, Any], replacements: dict[str, Any]) -> Iterator[None]:
    """`names` with other values for a while."""
    before = {name: names[name] for name in replacements if name in names}
    names.update(replacements)
    try:
        yield
    finally:
        for name in replacements:
            del names[name]
        names.update(before)


@contextmanager
def without_bars_in_a_log() -> Iterator[None]:
    """Hides what lm-eval draws and prints, but for bars on a terminal."""
    bars = nullcontext() if sys.stderr.isatty() and ranks.rank() == 0 else redirect_stderr(io.StringIO())
    with redirect_stdout(io.StringIO()), bars:
        yield


def load_tasks(names: Sequence[str], metadata: Mapping[str, Any] | None = None) -> dict[str, list[Any]]:
    """lm-eval's tasks or groups of these names, with their data, by name; each as lm-eval makes it in a run of its own,
    so that samples drawn by chance are the same for every model.

    Args:
        names: tasks, groups and tags of lm-eval, or .yaml files of tasks.
        metadata: what tasks are made for, such as `{"max_seq_lengths": [16384], "tokenizer": folder}`.

    Raises:
        UserError: no such task, or its data set cannot be had.
    """
    # Without names to look up, lm-eval need not read its fourteen thousand task files.
    manager = TaskManager(
        include_defaults=not all(name.endswith(".yaml") for name in names), metadata=dict(metadata or {})
    )
    for name in names:
        if name not in manager.task_index and not Path(name).is_file():
            raise UserError(
                f"--tasks: lm-eval has no task '{name}': give names of `lm-eval ls tasks`, or a .yaml file. "
                f"{nearest(name, manager.all_tasks)}".rstrip()
            )
    return {name: _load(manager, name) for name in names}


def _load(manager: TaskManager, name: str) -> list[Any]:
    """The group, or the tasks, that `name` stands for."""
    try:
        with without_bars_in_a_log(), seeded():
            loaded = manager.load([name])
    except Exception as error:  # a data set may fail in any way
        raise UserError(
            f"--tasks: the data of '{name}' cannot be had ({type(error).__name__}: {first_line(error)}): lm-eval "
            "fetches it from the hub, so run it once with a network, or name a task whose data is here."
        ) from error
    groups: dict[str, Any] = dict(loaded.get("groups", {}))
    return [groups[name]] if name in groups else list(loaded["tasks"].values())


def run_tasks(
    lm: Any, tasks: Sequence[Any], limit: int | None, *, chat: bool = False, system: str | None = None
) -> tuple[list[Row], dict[str, list[Row]]]:
    """lm-eval's results of tasks, with its own standard errors; the same in every process.

    Args:
        lm: the model, for lm-eval.
        tasks: what to run, of `load_tasks`.
        limit: samples a task; None for all.
        chat: ask through the tokenizer's chat template.
        system: text of a system turn.

    Returns:
        For each task and metric `{"task", "metric", "value", "low", "high", "higher_is_better", "samples", "scores"}`,
        the 95% interval two standard errors (1.96) to either side, None where lm-eval knows none, `scores` of each
        sample where the metric has them; and lm-eval's records of the samples of each task.
    """
    # it would ask pip and git what is installed, for seconds, after each task
    quick = replaced(vars(evaluator), {"add_env_info": lambda _: None})
    try:
        with quick, without_bars_in_a_log(), evaluating(lm.model) if isinstance(lm, HFLM) else nullcontext():
            found: Any = simple_evaluate(
                model=lm,
                tasks=list(tasks),
                limit=limit,
                bootstrap_iters=1000,
                log_samples=True,
                apply_chat_template=chat,
                system_instruction=system,
                task_manager=TaskManager(include_defaults=False),  # the tasks are loaded: no need to index them all
            )
    except (ClientError, TimeoutError, LookupError, TypeError) as error:
        if isinstance(lm, ServedModel):
            raise UserError(
                f"{lm.base_url} did not answer lm-eval's requests ({type(error).__name__}: {error}): tasks "
                "that score given answers need a server that tells the log-probabilities of a prompt."
            ) from error
        raise
    rows, samples = ranks.first_alone(lambda: (_rows(found), found["samples"]))
    if cut := getattr(lm, "cut", 0):
        logger.warning("%d of %d requests are longer than the window and were cut on the left", cut, lm.requests)
    return rows, samples


def task_rows(
    make: Callable[[], Any],
    tasks: Mapping[str, Sequence[Any]],
    limit: int | None,
    log: TrialLog,
    trials: str = "{}",
    **prompts: Any,
) -> list[Row]:
    """The rows of all of `tasks`, each with `cut`: requests of which only the end was read.

    Args:
        make: makes the model, for lm-eval.
        tasks: of `load_tasks`.
        limit: as `run_tasks`, and `prompts`.
        log: keeps what a task came to; what it holds already is not asked again.
        trials: names of its lines, by the name of a task.
    """
    rows: list[Row] = []
    for name, loaded in tasks.items():
        trial = trials.format(name)
        if trial not in log.records:
            logger.info("lm-eval task %s", name)
            began, lm = time.monotonic(), make()
            found, _ = run_tasks(lm, loaded, limit, **prompts)
            seconds = round(time.monotonic() - began, 3)
            log.append(trial, {"rows": [row | {"cut": lm.cut} for row in found], "seconds": seconds})
        rows += log.records[trial]["rows"]
    return rows


def _rows(found: Mapping[str, Any]) -> list[Row]:
    rows = []
    for task, metrics in found["results"].items():
        for key, value in metrics.items():
            metric, _, answers = key.partition(",")
            if not answers or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            if metric.isdigit() and value == -1:  # RULER's, of a length that was not asked for
                continue
            error = metrics.get(f"{metric}_stderr,{answers}")
            half = 1.959964 * error if isinstance(error, int | float) else None
            scores = [
                sample.get(metric) for sample in found["samples"].get(task, []) if sample.get("filter") == answers
            ]
            rows.append(
                {
                    "task": task,
                    "metric": key.removesuffix(",none"),
                    "value": value,
                    "low": None if half is None else value - half,
                    "high": None if half is None else value + half,
                    "higher_is_better": found["higher_is_better"].get(task, {}).get(metric) is not False,
                    "samples": found["n-samples"].get(task, {}).get("effective"),
                    "scores": scores if all(isinstance(score, int | float) for score in scores) else [],
                }
            )
    return rows
