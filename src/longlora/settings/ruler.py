"""Knobs of `longlora eval ruler` and `longlora eval tasks`."""

from dataclasses import dataclass
from typing import Annotated

from longlora.errors import UserError
from longlora.settings.fields import AtLeast, Names, Tokens, choice
from longlora.settings.retrieval import CHOICES, RetrievalSettings

RULER_BARS = {True: 85.6, False: 79.4}
"""RULER's bars for an effective length, in percent: Llama-2-7B-chat at 4k for chat models (arXiv 2404.06654), and
Llama-2-7B at 4k for base models (its appendix)."""


@dataclass(frozen=True, kw_only=True)
class RulerSettings(RetrievalSettings):
    """RULER's synthetic tasks at any lengths, and the effective length (arXiv 2404.06654); needs `longlora[eval]`."""

    contexts: Annotated[Tokens, AtLeast(2, "tokens")] = ()
    """Lengths of prompt and answer in tokens; default every doubling from the original window to the present one."""

    tasks: Names = ()
    """RULER tasks by lm-eval's names, such as niah_single_1 or ruler_vt; default all whose data is at hand."""

    trials: Annotated[int, AtLeast(1)] = 20
    """Samples of each task at each context (the paper: 500)."""

    threshold: str = "auto"
    """Percent that the average over the tasks must reach up to the effective length; `auto` the paper's, 85.6 for chat
    models and 79.4 for base models, or `own`: what the model itself reaches at the shortest context."""

    download: bool = False
    """Let lm-eval fetch what some tasks need: Paul Graham's essays and NLTK's sentence splitter, SQuAD, HotpotQA."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.bar(chat=True)

    def bar(self, chat: bool) -> float | None:
        """The threshold in percent, or None for the model's own.

        Args:
            chat: the model is asked through a chat template.

        Raises:
            UserError: neither a number from 0 to 100 nor `auto` or `own`.
        """
        if self.threshold == "auto":
            return RULER_BARS[chat]
        if self.threshold == "own":
            return None
        try:
            percent = float(self.threshold)
        except ValueError:
            percent = -1.0
        if not 0 <= percent <= 100:
            raise UserError(f"--threshold is '{self.threshold}': it must be a percentage from 0 to 100, auto or own.")
        return percent


@dataclass(frozen=True, kw_only=True)
class EvaluateTasksSettings(RetrievalSettings):
    """Any of lm-eval's tasks (RULER, LongBench, BABILong, MMLU, …) at any window; needs `longlora[eval]`."""

    tasks: Names = ()
    """lm-eval tasks, groups or tags by name (`lm-eval ls tasks`), or .yaml files; they fetch their own data sets."""

    context: Annotated[int | None, AtLeast(2, "tokens")] = None
    """Tokens that a request and its answer may have; default the model's window."""

    limit: Annotated[int | None, AtLeast(1, "samples")] = None
    """Only the first this many samples of each task."""

    chat: Annotated[str, choice(CHOICES)] = "no"
    """Ask through the tokenizer's chat template; `auto` does where it has one."""

    def __post_init__(self) -> None:
        if not self.tasks:
            raise UserError("--tasks is missing: name tasks of lm-eval, such as longbench_qasper or hellaswag.")
        super().__post_init__()
        if self.seed:
            raise UserError("--seed has no effect on lm-eval's tasks, which have seeds of their own: leave it out.")
