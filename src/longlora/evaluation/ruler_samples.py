"""RULER's tasks as lm-eval ships them: its samples, made for any tokenizer, and its scoring ("RULER: What's the Real
Context Size of Your Long-Context Language Models?", arXiv 2404.06654).

lm-eval makes 500 samples a task for a tokenizer that it loads by name, and its searches for the right size do not end
where a template cannot fit. Here its own functions make as many samples as are asked for, with the tokenizer that is
loaded, and give up where they would search for ever.
"""

import io
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lm_eval.tasks
import nltk
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from longlora.errors import check_choice
from longlora.evaluation.harness import replaced, seeded
from longlora.model.source import first_line

logging.getLogger("lm_eval").setLevel(logging.ERROR)

FOLDER = Path(lm_eval.tasks.__file__).parent / "ruler"

ESSAYS = "baber/paul_graham_essays"

ESSAY_TASKS = ("niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multivalue", "niah_multiquery")
"""Tasks whose filler is Paul Graham's essays, cut into sentences by NLTK."""

QUESTION_TASKS = {"ruler_qa_squad": "SQuAD", "ruler_qa_hotpot": "HotpotQA"}
"""Tasks that ask the questions of a data set, which lm-eval fetches anew each time."""

MAKERS = ("generate_samples", "sys_vartrack_w_noise_random", "sys_word_pair_random", "sys_kwext")
"""The functions of lm-eval that make `num_samples` samples."""


DRAWER = "generate_input_output"
"""The function of lm-eval that draws one sample of a given size; some rooms of it import it, some have it."""


class NoSampleError(Exception):
    """A task cannot be sampled at a context; says why."""


class RulerTask(ConfigurableTask):
    """One of RULER's tasks at one context, with its samples.

    Args:
        name: lm-eval's name of the task.
        tokenizer: what its samples are sized with.
        context: tokens of a prompt and its answer.
        trials: samples.
        seed: of the samples; with 0 they are the first of those that lm-eval makes by default for this task and
            context alone.

    Raises:
        NoSampleError: not even the smallest sample fits, or its data cannot be had.
    """

    def __init__(self, name: str, tokenizer: Any, context: int, trials: int, seed: int) -> None:
        self.name, self.context = name, context
        self._search, self._trials = _Search(tokenizer, context, trials), trials
        try:
            with seeded(seed):
                config = _config(name)
                made_for = {"max_seq_lengths": [context], "tokenizer": "as loaded"}
                super().__init__(config={**config, "metadata": made_for})
        except Exception as error:  # whatever lm-eval, a download or a search without an end may raise
            raise NoSampleError(self._why_not(error)) from error
        if self._search.gave_up or not all(sample["outputs"] for sample in self.eval_docs):
            raise NoSampleError(self._why_not())

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **_: Any) -> None:
        """Makes the samples (lm-eval's word for it)."""
        functions = self.config.custom_dataset.__globals__
        with replaced(functions, self._fewer(functions)), _silence():
            super().download(dataset_kwargs)

    def _fewer(self, functions: dict[str, Any]) -> dict[str, Any]:
        """lm-eval's functions with our tokenizer and our number of samples."""

        def fewer(make: Callable[..., Any]) -> Callable[..., Any]:
            def made(*given: Any, num_samples: int = 500, **named: Any) -> Any:
                return make(*given, num_samples=min(num_samples, self._trials), **named)

            return made

        own = {name: fewer(functions[name]) for name in MAKERS if name in functions}
        own |= {name: self._search.drawing(functions[name]) for name in (DRAWER,) if name in functions}
        return {**own, "len": self._search.length, "get_tokenizer": lambda *_, **__: self._search.measure}

    def _why_not(self, error: Exception | None = None) -> str:
        if self._search.gave_up or error is None or str(error).startswith("Could not generate any"):
            return f"its smallest sample does not fit into {self.context:,} tokens with this tokenizer"
        return f"its samples cannot be made ({type(error).__name__}: {first_line(error)})"


def ruler_tasks() -> list[str]:
    """The names of RULER's tasks in lm-eval, in RULER's order."""
    return list(load_yaml(FOLDER / "ruler.yaml")["task"])


def choose_tasks(wanted: tuple[str, ...], download: bool) -> tuple[list[str], list[dict[str, Any]]]:
    """The tasks to run, and those left out, `{"task", "context": None, "reason"}`.

    Raises:
        UserError: `wanted` has a name that is no task of RULER's.
    """
    names = [check_choice("RULER task", name, ruler_tasks()) for name in wanted] or ruler_tasks()
    reasons = {} if download else {name: reason for name in names if (reason := _what_is_missing(name))}
    left_out = [{"task": name, "context": None, "reason": reason} for name, reason in reasons.items()]
    return [name for name in names if name not in reasons], left_out


def _what_is_missing(name: str) -> str | None:
    """The data that the task needs and that is not on this machine, in words; None when it needs none."""
    if name in QUESTION_TASKS:
        return f"asks questions of {QUESTION_TASKS[name]}, which lm-eval downloads (--download)"
    if name not in ESSAY_TASKS:
        return None
    missing = []
    try:
        snapshot_download(ESSAYS, repo_type="dataset", local_files_only=True)
    except LocalEntryNotFoundError:
        missing.append(f"Paul Graham's essays (data set {ESSAYS})")
    if not _has_sentence_splitter():
        missing.append("NLTK's punkt_tab")
    return f"needs {' and '.join(missing)}, which lm-eval downloads (--download)" if missing else None


def _has_sentence_splitter() -> bool:
    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError:
        return False
    return True


def _config(name: str) -> dict[str, Any]:
    """lm-eval's settings of a task, with its functions."""
    entry = TaskManager(include_defaults=False, include_path=FOLDER).task_index[name]
    assert entry.yaml_path is not None
    # Its NIAH room asks for NLTK's data when it is imported, whether the task needs it or not.
    needed = name in ESSAY_TASKS
    with _silence(), replaced(vars(nltk), {} if needed else {"download": lambda *_, **__: False}):
        return load_yaml(entry.yaml_path)


class _NoTokens(list[int]):
    """What a search that has given up measures; far less than nothing, so that whatever it is added to fits."""


class _Search:
    """lm-eval's functions for samples, measured by a tokenizer, that end even where no sample fits.

    They draw a sample, measure it, and search for the size that just fits. Where even the smallest is too large some
    loops never end: one kind lets exceptions out, the other catches whatever comes and waits for a sample that fits. So
    after as many calls as a search that ends could need, drawing gives the sample drawn last, and measuring raises an
    exception and says "far less than no tokens" in turn: the one ends the first kind, the other the second. What comes
    of it is thrown away.
    """

    def __init__(self, tokenizer: Any, context: int, trials: int) -> None:
        self.tokenizer = tokenizer
        # Samples grow by at least ten tokens a call, and then each takes a few calls.
        self.calls_left = context // 10 + 50 * trials + 500
        self._measured_since = 0
        self._drawn: Any = None

    @property
    def gave_up(self) -> bool:
        return self.calls_left < 0

    def measure(self, text: str) -> SimpleNamespace:
        """The tokenizer as lm-eval calls it."""
        self.calls_left -= 1
        if not self.gave_up:
            return SimpleNamespace(input_ids=self.tokenizer(text, verbose=False)["input_ids"])
        self._measured_since += 1
        if self._measured_since % 2:
            raise NoSampleError
        return SimpleNamespace(input_ids=_NoTokens())

    def drawing(self, draw: Callable[..., Any]) -> Callable[..., Any]:
        """lm-eval's function `draw`, which makes one sample."""

        def drawn(*given: Any, **named: Any) -> Any:
            self.calls_left -= 1
            if not self.gave_up or self._drawn is None:
                self._drawn = draw(*given, **named)
            return self._drawn

        return drawn

    @staticmethod
    def length(of: Any) -> int:
        """`len` as lm-eval's functions see it."""
        return -(10**9) if isinstance(of, _NoTokens) else len(of)


@contextmanager
def _silence() -> Iterator[None]:
    """Hides what lm-eval prints while it makes samples, some of it on stdout."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        yield
