"""Knobs of `longlora eval ruler`."""

from dataclasses import dataclass

from longlora.errors import UserError
from longlora.settings.fields import Names, Tokens, at_least
from longlora.settings.retrieval import RetrievalSettings

RULER_BAR = 85.6
"""RULER's bar for an effective length, in percent: what Llama-2-7B scores at 4k (arXiv 2404.06654, section 4)."""


@dataclass(frozen=True, kw_only=True)
class RulerSettings(RetrievalSettings):
    """RULER's synthetic tasks at any lengths, and the effective length (arXiv 2404.06654); needs `longlora[eval]`."""

    contexts: Tokens = ()
    """Lengths of prompt and answer in tokens; default every doubling from the original window to the present one."""

    tasks: Names = ()
    """RULER tasks by lm-eval's names, such as niah_single_1 or ruler_vt; default all whose data is at hand."""

    trials: int = 20
    """Samples of each task at each context (the paper: 500)."""

    threshold: str = str(RULER_BAR)
    """Percent that the average over the tasks must reach up to the effective length (the paper's 85.6), or `own`: what
    the model itself reaches at the shortest context."""

    download: bool = False
    """Let lm-eval fetch what some tasks need: Paul Graham's essays and NLTK's sentence splitter, SQuAD, HotpotQA."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for context in self.contexts:
            at_least("contexts", context, 2, "tokens")
        at_least("trials", self.trials, 1)
        if self.server is not None:
            raise UserError("--server answers passkey, topics and lines, not RULER: leave it out.")
        self.bar()

    def bar(self) -> float | None:
        """The threshold in percent, or None for the model's own.

        Raises:
            UserError: neither a number from 0 to 100 nor `own`.
        """
        if self.threshold == "own":
            return None
        try:
            percent = float(self.threshold)
        except ValueError:
            percent = -1.0
        if not 0 <= percent <= 100:
            raise UserError(f"--threshold is '{self.threshold}': it must be a percentage from 0 to 100, or own.")
        return percent
