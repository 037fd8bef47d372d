"""A loaded model as lm-eval sees it (EleutherAI's lm-evaluation-harness), and its tasks for `longlora eval short`.

One loaded model answers every request: no reload, the KV cache for generation, prompts batched by length, and logits of
the continuations only. What is longer than the window is cut on the left, as lm-eval does, and counted.
"""

import io
import logging
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows
from torch import nn

from longlora.corpus.encoding import beginning
from longlora.errors import UserError, nearest
from longlora.evaluation.generation import generate_each, passes
from longlora.evaluation.perplexity import evaluating
from longlora.evaluation.prompting import PromptFormat
from longlora.model.lm_head import IGNORED, run_token_losses, unwrapped
from longlora.model.source import first_line
from longlora.progress import Progress

logger = logging.getLogger(__name__)

for noisy in ("lm_eval", "huggingface_hub"):
    logging.getLogger(noisy).setLevel(logging.ERROR)

ANSWER_TOKENS = 256
"""Tokens of an answer where the task does not say (lm-eval's own default)."""


class LoadedModel(TemplateLM):
    """A loaded model for lm-eval's evaluator.

    Args:
        model: a causal language model of transformers, possibly wrapped (PEFT).
        tokenizer: its tokenizer.
        window: tokens that a request and its answer may have.
        batch: requests a pass; 0 chooses about 8,192 tokens a pass.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, window: int, batch: int = 0) -> None:
        super().__init__()
        self.model, self.tokenizer, self.window, self.batch = model, tokenizer, window, batch
        self.form = PromptFormat(tokenizer, chat="no")
        self.requests = 0
        """Requests so far."""
        self.cut = 0
        """Of those, the ones cut on the left because they are longer than the window."""

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; with the tokenizer's own BOS unless the text brings it or `add_special_tokens` is off."""
        tokens = list(self.tokenizer(string, add_special_tokens=False, verbose=False)["input_ids"])
        first = beginning(self.tokenizer) if add_special_tokens is not False else []
        return tokens if tokens[: len(first)] == first else first + tokens

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy answers to `(context, generation settings)`.

        Raises:
            UserError: a task asks for sampling.
        """
        answers = [""] * len(requests)
        alike: defaultdict[tuple[int, tuple[str, ...]], list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            settings = normalize_gen_kwargs(request.args[1], ANSWER_TOKENS)
            if settings.get("do_sample"):
                raise UserError(f"task {request.task_name} asks for sampled answers: only greedy ones are made here.")
            alike[settings["max_gen_toks"], tuple(settings["until"])].append(index)
        for (most, until), indices in alike.items():
            prompts = [self._fitted(self.tok_encode(requests[index].args[0]), self.window - most) for index in indices]

            def ends(tokens: list[int], until: tuple[str, ...] = until) -> bool:
                text = self.tokenizer.decode(tokens)
                return any(word and word in text for word in until)

            answered = generate_each(
                self.model,
                prompts,
                most,
                stop_tokens=self.form.stop_tokens(unwrapped(self.model)),
                stop=ends if until else None,
                batch=self.batch,
                progress=None if disable_tqdm else "answers",
            )
            for at, tokens in answered:
                index = indices[at]
                answers[index] = postprocess_generated_text(self.form.text(tokens), list(until), None)
                self.cache_hook.add_partial("generate_until", requests[index].args, answers[index])
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each whole text `(string,)`, in windows end to end (lm-eval's rule)."""
        texts = [self.tok_encode(request.args[0]) for request in requests]
        found = []
        with evaluating(self.model), Progress("whole texts", "tokens", sum(map(len, texts))) as bar:
            for number, tokens in enumerate(texts, start=1):
                total = 0.0
                for read, scored in get_rolling_token_windows(tokens, self.prefix_token_id, self.window, 1):
                    input_ids = torch.tensor([read], device=self._place())
                    labels = torch.full_like(input_ids, IGNORED)
                    labels[0, len(read) - len(scored) :] = torch.tensor(scored)
                    losses, _ = run_token_losses(self.model, {"input_ids": input_ids}, labels)
                    total -= losses.double().sum().item()
                found.append(total)
                bar.show(sum(map(len, texts[:number])), f"{number:,} of {len(texts):,} texts")
        return found

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """For each `(…, context ids, continuation ids)` the continuation's log-likelihood, and whether it is greedy."""
        longest = max((len(scored) for _, _, scored in requests), default=0)
        if longest > self.window:
            raise UserError(
                f"a continuation of {longest:,} tokens alone is longer than the window of {self.window:,}: leave the "
                "task out."
            )
        found: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        rows = [self._fitted([*context, *scored], self.window + 1) for _, context, scored in requests]
        with evaluating(self.model), Progress("continuations", "requests", len(requests)) as bar:
            done = 0
            for indices in passes([len(row) for row in rows], self.batch):
                scored = [requests[index][2] for index in indices]
                results = self._continuations([rows[index] for index in indices], scored)
                for index, result in zip(indices, results, strict=True):
                    found[index] = result
                done += len(indices)
                bar.show(done, f"{done:,} of {len(requests):,} requests")
        return found

    def _continuations(self, rows: list[list[int]], scored: list[list[int]]) -> list[tuple[float, bool]]:
        """One pass over `rows`, each of which ends with its part of `scored`; padded on the left."""
        width, longest = max(len(row) for row in rows) - 1, max(len(part) for part in scored)
        input_ids = torch.zeros(len(rows), width, dtype=torch.long)
        mask = torch.zeros_like(input_ids)
        for at, row in enumerate(rows):
            input_ids[at, width - len(row) + 1 :] = torch.tensor(row[:-1])
            mask[at, width - len(row) + 1 :] = 1
        inputs = {
            "input_ids": input_ids,
            "attention_mask": mask,
            "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
        }
        logits = self.model(
            **{name: tensor.to(self._place()) for name, tensor in inputs.items()},
            use_cache=False,
            logits_to_keep=longest,
        ).logits
        results = []
        for row_logits, part in zip(logits, scored, strict=True):
            own = row_logits[longest - len(part) :].float().log_softmax(-1)
            labels = torch.tensor(part, device=own.device)
            likelihood = own.gather(-1, labels[:, None]).double().sum().item()
            results.append((likelihood, bool((own.argmax(-1) == labels).all())))
        return results

    def _fitted(self, tokens: list[int], most: int) -> list[int]:
        if most < 1:
            raise UserError(f"a task's answers alone fill the window of {self.window:,} tokens: leave it out.")
        self.requests += 1
        self.cut += len(tokens) > most
        return tokens[-most:]

    def _place(self) -> torch.device:
        return next(self.model.parameters()).device


@contextmanager
def without_bars_in_a_log() -> Iterator[None]:
    """Hides what lm-eval draws on stderr where that is no terminal; our own progress is log lines there."""
    with nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO()):
        yield


def load_tasks(names: Sequence[str]) -> dict[str, list[Any]]:
    """lm-eval's tasks or groups of these names, with their data, by name.

    Args:
        names: tasks, groups and tags of lm-eval, or .yaml files of tasks.

    Raises:
        UserError: no such task, or its data set cannot be had.
    """
    # Without names to look up, lm-eval need not read its fourteen thousand task files.
    manager = TaskManager(include_defaults=not all(name.endswith(".yaml") for name in names))
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
        with without_bars_in_a_log():
            loaded = manager.load([name])
    except Exception as error:  # a data set may fail in any way
        raise UserError(
            f"--tasks: the data of '{name}' cannot be had ({type(error).__name__}: {first_line(error)}): lm-eval "
            "fetches it from the hub, so run it once with a network, or name a task whose data is here."
        ) from error
    groups: dict[str, Any] = dict(loaded.get("groups", {}))
    return [groups[name]] if name in groups else list(loaded["tasks"].values())


def run_tasks(lm: LoadedModel, tasks: Sequence[Any], limit: int | None) -> list[dict[str, Any]]:
    """lm-eval's results of `load_tasks`.

    Args:
        lm: the model.
        tasks: what to run, of `load_tasks`.
        limit: samples a task; None for all.

    Returns:
        For each task and metric `{"task", "metric", "value", "higher_is_better", "samples"}`.
    """
    found: Any
    with without_bars_in_a_log():
        found = simple_evaluate(
            model=lm,
            tasks=list(tasks),
            limit=limit,
            bootstrap_iters=0,
            log_samples=False,
            task_manager=TaskManager(include_defaults=False),  # the tasks are loaded: no need to index them all
        )
    rows = []
    for task, metrics in found["results"].items():
        for key, value in metrics.items():
            metric, _, answers = key.partition(",")
            if not answers or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            better = found["higher_is_better"].get(task, {}).get(metric)
            row = {"task": task, "metric": key.removesuffix(",none"), "value": value}
            samples = found["n-samples"].get(task, {}).get("effective")
            rows.append({**row, "higher_is_better": better is not False, "samples": samples})
    if lm.cut:
        logger.warning("%d of %d requests are longer than the window and were cut on the left", lm.cut, lm.requests)
    return rows
