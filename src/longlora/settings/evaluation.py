"""Knobs of `longlora eval`. "Paper" is LongLoRA, arXiv 2309.12307."""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from longlora.errors import UserError, check_choice
from longlora.settings.fields import DTYPES, AtLeast, Checked, CommandSettings, LoadSettings, Tokens, choice
from longlora.settings.model import METHODS, CorpusSettings

SCORES = ("last", "window", "stream")

TEXTS = ("one", "each")

DEVICE_MAPS = ("one", "auto")

PAPER_STRIDE = 256
"""Tokens that the paper's windows slide by (section 4.1)."""

STRIDES_A_CONTEXT = 8
"""How often a window slides before it has passed a token, where the stride is chosen for the context."""


@dataclass(frozen=True, kw_only=True)
class PerplexitySettings(Checked):
    """Sliding-window perplexity (paper section 4.2)."""

    contexts: Annotated[Tokens, AtLeast(2, "tokens")] = ()
    """Context lengths to test, in tokens; default every doubling from the original window to the present one."""

    texts: Annotated[str, choice(TEXTS)] = "one"
    """`one` scores the same documents at all contexts, those as long as the longest; `each` at each context all that
    are as long as that one, so that a curve runs through different texts."""

    stride: Annotated[int | Literal["auto", "paper"], AtLeast(1, "tokens")] = "auto"
    """Tokens the window slides by; `auto` an eighth of the context, at least 256 and at most half of it, so that no
    token is read more than nine times; `paper` 256 at every context (paper section 4.1), as with `--score stream`."""

    score: Annotated[str, choice(SCORES)] = "last"
    """`last` scores the newest tokens of each window, each token once; `window` averages whole windows; `stream` is the
    paper's own script: whole windows over all documents end to end."""

    evaluation_batch: Annotated[int, AtLeast(0, "windows")] = 0
    """Windows a forward pass; 0 chooses for the memory that is free."""

    max_documents: Annotated[int | None, AtLeast(1)] = None
    """Evaluate only the first this many documents that are long enough."""

    min_document_tokens: int | None = None
    """Leave out documents shorter than this, too."""

    last_tokens: Annotated[int | None, AtLeast(1, "tokens")] = None
    """Score only this many tokens of a document, the same at every context: the last ones before the longest context
    (or `min_document_tokens`, where that is more) is full; what comes after them is not read. A context at least twice
    this reads one window a document, so that long contexts can be measured where passes are dear."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.stride, int):
            check_choice("--stride", self.stride, ("auto", "paper"))
        if self.last_tokens is not None and (self.score, self.texts) != ("last", "one"):
            raise UserError(
                "--last-tokens scores each of the same tokens once at all contexts: leave --score and --texts out."
            )

    def stride_at(self, context: int) -> int:
        """Tokens that a window of `context` tokens slides by."""
        if isinstance(self.stride, int):
            return self.stride
        if self.stride == "paper" or self.score == "stream":
            return PAPER_STRIDE
        if self.last_tokens is not None and self.last_tokens <= context // 2:
            return self.last_tokens
        # windows that overlap score every token but a document's first, so as many at each context
        return min(context // 2, max(PAPER_STRIDE, context // STRIDES_A_CONTEXT))


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
    """Arithmetic of the weights; `auto` is the checkpoint's own, or float32 on a CPU that has no arithmetic of it and
    memory enough."""

    device_map: Annotated[str, choice(DEVICE_MAPS)] = "one"
    """`one` puts the model on this process's GPU; `auto` spreads its layers over all GPUs, where one is too small."""

    output: str | None = None
    """Folder for the results, each appended as it comes, which `longlora report` reads; for several models it gets a
    folder for each. Default `evaluation/` of a run directory, else none."""

    resume: bool = False
    """Go on with the results of an evaluation that was stopped; also with more contexts or trials."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.models:
            raise UserError("MODEL is missing: name at least one model to evaluate.")


@dataclass(frozen=True, kw_only=True)
class EvaluatePerplexitySettings(EvaluatedModelsSettings):
    """Sliding-window perplexity of one or more models at any context lengths."""

    corpus: CorpusSettings = CorpusSettings()
    perplexity: PerplexitySettings = PerplexitySettings()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.corpus.data:
            raise UserError("--data is missing: name files, folders, hub:NAME, or stdlib to evaluate on.")
