"""Knobs of `longlora eval`. "Paper" is LongLoRA, arXiv 2309.12307."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from longlora.errors import UserError, check_choice
from longlora.settings.fields import DTYPES, CommandSettings, LoadSettings, Tokens, at_least, choice
from longlora.settings.model import METHODS, CorpusSettings

SCORES = ("last", "window")


@dataclass(frozen=True, kw_only=True)
class PerplexitySettings:
    """Sliding-window perplexity (paper section 4.2 with its stride of 256)."""

    contexts: Tokens = ()
    """Context lengths to test, in tokens; default every doubling from the original window to the present one."""

    stride: int = 256
    """Tokens the window slides by (paper section 4.1: 256)."""

    score: Annotated[str, choice(SCORES)] = "last"
    """`last` scores the newest tokens of each window, each token once; `window` averages whole windows (the paper)."""

    evaluation_batch: int = 0
    """Windows a forward pass; 0 chooses about 8,192 tokens a pass."""

    max_documents: int | None = None
    """Evaluate only the first this many documents that are long enough."""

    min_document_tokens: int | None = None
    """Leave out documents shorter than this at every context, so that all contexts see the same text; default: each
    context its own length."""

    def __post_init__(self) -> None:
        for context in self.contexts:
            at_least("contexts", context, 2, "tokens")
        at_least("stride", self.stride, 1, "tokens")
        at_least("evaluation-batch", self.evaluation_batch, 0, "windows")
        if self.max_documents is not None:
            at_least("max-documents", self.max_documents, 1)
        check_choice("--score", self.score, SCORES)


@dataclass(frozen=True, kw_only=True)
class EvaluatedModelsSettings(CommandSettings):
    """Which models an evaluation takes, how they are loaded, and where the results go."""

    models: tyro.conf.Positional[tuple[str, ...]]
    """One or more of: `demo`, a hub id, a folder, a .gguf file, a run directory, an adapter folder."""

    baseline: str | None = None
    """MODEL to compare them with: evaluated first, in the same way, and never stretched by `extend_to`."""

    loading: LoadSettings = LoadSettings()

    extend_to: int | None = None
    """Stretch the positions to this context first, without training, in tokens."""

    method: Annotated[str, choice(METHODS)] = "yarn"
    """How positions are stretched with `extend_to`."""

    dtype: Annotated[str, choice(DTYPES)] = "auto"
    """Arithmetic of the weights; `auto` keeps the checkpoint's own."""

    output: str | None = None
    """Folder for the results, each appended as it comes, which `longlora report` reads; for several models it gets a
    folder for each. Default `evaluation/` of a run directory, else none."""

    resume: bool = False
    """Go on with the results of an evaluation that was stopped; also with more contexts or trials."""

    def __post_init__(self) -> None:
        if not self.models:
            raise UserError("MODEL is missing: name at least one model to evaluate.")
        check_choice("--method", self.method, METHODS)
        check_choice("--dtype", self.dtype, DTYPES)


@dataclass(frozen=True, kw_only=True)
class EvaluatePerplexitySettings(EvaluatedModelsSettings):
    """Sliding-window perplexity of one or more models at any context lengths."""

    corpus: CorpusSettings = CorpusSettings()
    perplexity: PerplexitySettings = PerplexitySettings()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.corpus.data:
            raise UserError("--data is missing: name files, folders, hub:NAME, or stdlib to evaluate on.")
