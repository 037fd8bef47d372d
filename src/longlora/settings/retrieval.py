"""Knobs of `longlora eval passkey`, `topics` and `lines`."""

from dataclasses import dataclass
from typing import Annotated

from longlora.errors import UserError
from longlora.settings.evaluation import EvaluatedModelsSettings
from longlora.settings.fields import AtLeast, Tokens, choice

CHOICES = ("auto", "yes", "no")

MOST_KEYS = 26
"""Pass keys of one prompt, each under a name of its own: alpha to zulu."""

SHORTEST_INTERVAL = 274
"""The original cuts its filler to multiples of 1,024 characters, at 3.75 a token: below this there would be none."""


@dataclass(frozen=True, kw_only=True)
class RetrievalSettings(EvaluatedModelsSettings):
    """What all questions about something hidden in a long prompt share."""

    chat: Annotated[str, choice(CHOICES)] = "auto"
    """Ask through the tokenizer's chat template; `auto` does where it has one."""

    system: str | None = None
    """Text of a system turn before the question; a template that takes none gets it at the head of the user's turn."""

    bos: Annotated[str, choice(CHOICES)] = "auto"
    """Begin the prompt with the tokenizer's BOS token; `auto` does what the tokenizer or the template does."""

    seed: Annotated[int, AtLeast(0)] = 0
    """Where the generated questions start from; one seed asks every model the same."""

    evaluation_batch: Annotated[int, AtLeast(0, "prompts")] = 0
    """Prompts a forward pass, or requests that a server has at a time; 0 chooses."""

    server: str | None = None
    """Ask an OpenAI-compatible server (vLLM) at this base URL, such as http://localhost:8000/v1, which has the weights;
    MODEL still names config and tokenizer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.server is not None and (len(self.models) > 1 or self.baseline or self.extend_to):
            raise UserError("--server has one model, as it is: leave further models, --baseline and --extend-to out.")
        if self.system is not None and self.chat == "no":
            raise UserError("--system is a turn of a chat, and --chat is no: leave one of them out.")


@dataclass(frozen=True, kw_only=True)
class PasskeySettings(RetrievalSettings):
    """Passkey retrieval: one number hidden in filler, asked for at the end (paper section 4.2)."""

    contexts: Annotated[Tokens, AtLeast(2, "tokens")] = ()
    """Lengths of prompt and answer in tokens; default every doubling from the original window to the present one.
    With `interval`, the longest length (one number)."""

    depths: Annotated[int | None, AtLeast(1)] = None
    """Places of the key, evenly spaced from the start (0) to the end (1) of the filler; default 5."""

    trials: Annotated[int, AtLeast(1)] = 5
    """Prompts for each context and depth; with `interval`, for each length (the original takes 10)."""

    keys: Annotated[int, AtLeast(1)] = 1
    """Keys in a prompt, each with a name; one of them is asked for."""

    interval: Annotated[int | None, AtLeast(SHORTEST_INTERVAL, "tokens")] = None
    """The original's prompts instead of the grid: lengths at each multiple of this many tokens (roughly, at 3.75
    characters of filler a token), the key anywhere, trial i drawn with seed i."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keys > MOST_KEYS:
            raise UserError(f"--keys is {self.keys}: a prompt holds at most {MOST_KEYS}, one for each name.")
        if self.interval is None:
            return
        for name, given in (("depths", self.depths is not None), ("keys", self.keys > 1), ("seed", self.seed != 0)):
            if given:
                raise UserError(
                    f"--{name} has no effect with --interval, which asks the original's questions: leave one out."
                )
        if len(self.contexts) > 1:
            raise UserError(f"--interval takes one length in --contexts, the longest, and {self.contexts} are given.")


@dataclass(frozen=True, kw_only=True)
class LongEvalSettings(RetrievalSettings):
    """What LongEval's two tasks share."""

    data: tuple[str, ...] = ()
    """Test-case files of LongChat (`10_topics.jsonl`, `200_lines.jsonl`, …); default: make new cases."""

    trials: Annotated[int, AtLeast(1)] = 50
    """Cases of each length (LongEval: 50), of a file its first."""

    max_context: Annotated[int | None, AtLeast(2, "tokens")] = None
    """Longest prompt with its answer, in tokens; longer cases are counted and not run. Default the model's window."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data and self.seed:
            raise UserError("--seed has no effect on the cases of --data: leave it out.")


@dataclass(frozen=True, kw_only=True)
class TopicsSettings(LongEvalSettings):
    """LongEval's coarse retrieval: which of many topics of a long conversation came first (paper table 6)."""

    topics: Annotated[Tokens, AtLeast(1)] = ()
    """Topics a conversation; default 5, 10, 15, 20, 25 (LongEval), with `data` whatever the files hold."""

    topic_list: str | None = None
    """Topics to make cases of: LongChat's `conversations.jsonl`, or a text file with a topic a line; default a list
    of our own, with plain conversations."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data and self.topic_list:
            raise UserError("--topic-list makes new cases and --data brings ready ones: leave one of them out.")


@dataclass(frozen=True, kw_only=True)
class LinesSettings(LongEvalSettings):
    """LongEval's fine retrieval: the number in one of many lines (the harder half of LongEval)."""

    lines: Annotated[Tokens, AtLeast(1)] = ()
    """Lines a prompt; default 200, 300, 400, 500, 600, 680 (LongEval), with `data` whatever the files hold."""
