"""Knobs of `longlora eval short` and `longppl`."""

from dataclasses import dataclass
from typing import Annotated

from longlora.errors import UserError
from longlora.settings.evaluation import EvaluatedModelsSettings, PerplexitySettings
from longlora.settings.fields import AtLeast, Checked, Names
from longlora.settings.model import CorpusSettings


@dataclass(frozen=True, kw_only=True)
class EvaluateShortSettings(EvaluatedModelsSettings):
    """What an extension costs inside the old window: perplexity, and any lm-eval task, before and after."""

    baseline: str | None = None
    """MODEL to compare with; default what a run or an adapter was trained from, or the model before `extend_to`."""

    corpus: CorpusSettings = CorpusSettings(data=("stdlib",))

    perplexity: PerplexitySettings = PerplexitySettings()
    """Contexts are by default the shorter window of the two, a half and a quarter of it, documents those that are long
    enough for the longest."""

    tasks: Names = ()
    """lm-eval tasks to run on both models, by name, or .yaml files of tasks; they fetch their own data sets."""

    limit: Annotated[int | None, AtLeast(1, "samples")] = None
    """Only the first this many samples of each task."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.limit is not None and not self.tasks:
            raise UserError(f"--limit is {self.limit}, and there are no --tasks to limit: name some or leave it out.")


@dataclass(frozen=True, kw_only=True)
class LongPerplexitySettings(Checked):
    """Which tokens are key tokens (LongPPL, arXiv 2410.23771, section 3.2)."""

    context: Annotated[int | None, AtLeast(1, "tokens")] = None
    """The long context L: documents of at least as many tokens are read up to there; default the longest window among
    the models."""

    short_context: Annotated[int | None, AtLeast(1, "tokens")] = None
    """Tokens before a token that count as short context, K; default the authors' 4,096 where the long context is twice
    that, else three quarters of the original window."""

    short_stride: Annotated[int | None, AtLeast(1, "tokens")] = None
    """Tokens that share a short context, so that each sees K up to K + this many; default the authors' 1,024 with their
    short context, else a third of it."""

    alpha: float = 2.0
    """A key token's loss falls by more than this between short and long context, in nats (the paper's 2)."""

    beta: float = -2.0
    """A key token's log-probability with the long context is above this (the paper's -2)."""

    max_documents: Annotated[int | None, AtLeast(1)] = None
    """Evaluate only the first this many documents that are long enough."""


@dataclass(frozen=True, kw_only=True)
class EvaluateLongPerplexitySettings(EvaluatedModelsSettings):
    """LongPPL, the perplexity of the tokens that need the long context, beside plain perplexity."""

    evaluator: str | None = None
    """MODEL that says which tokens need the long context, a strong one, whatever its tokenizer; default each model for
    itself."""

    corpus: CorpusSettings = CorpusSettings()
    long_perplexity: LongPerplexitySettings = LongPerplexitySettings()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.corpus.data:
            raise UserError("--data is missing: name files, folders, hub:NAME, or stdlib to evaluate on.")
