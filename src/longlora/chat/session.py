"""A conversation about documents, apart from any interface: turns, the window, and what an answer cost.

`ChatModel` is loaded once and shared; a `ChatSession` is one conversation with it. Answers are made one at a time.
"""

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from longlora.chat.answering import Answerer, Ended, Reading
from longlora.chat.attention_sinks import SinkWindow
from longlora.chat.documents import ChatDocument
from longlora.chat.prefix_cache import PrefixCaches
from longlora.chat.prompting import AnswerText, ChatPrompts
from longlora.chat.sampling import Sampler
from longlora.errors import UserError
from longlora.model.loading import load, window
from longlora.model.precision import to_quick_dtype
from longlora.settings import AnswerSettings, ChatSettings

WINDOWS_KEPT = 2
"""As many windows of keys and values stay in memory by default; each may take as much of it as the weights do."""

DEFAULT_WINDOW = 32768
"""Of a model that declares none, for the sums that need one."""

JOINT_TOKENS = 8
"""More than a section's text can grow where it meets the words around it."""


@dataclass(frozen=True)
class Answer:
    """An answer and what it took; lengths in tokens, times in seconds."""

    text: str
    finish: str
    """`end` (the model ended it), `length` (--answer-tokens), `window` (no room left) or `stopped`."""
    prompt_tokens: int
    reused_tokens: int
    """Of the prompt, those that had been read before."""
    answer_tokens: int
    window: int | None
    first_token_seconds: float | None
    """From the question to the first token; None where there is none."""
    seconds: float
    evicted_tokens: int = 0
    """Tokens of prompt and answer that the model no longer sees (attention sinks)."""

    @property
    def used_tokens(self) -> int:
        """Tokens of the conversation so far."""
        return self.prompt_tokens + self.answer_tokens

    def meter(self) -> str:
        """Tokens used against the window, and the pace, in one line.

        >>> Answer("Yes.", "end", 4000, 3900, 96, 8192, 0.5, 4.5).meter()
        '4,096 of 8,192 tokens (50%) · read 100, kept 3,900 · first token 0.5 s · 24.0 tokens/s'
        """
        share = f" of {self.window:,} tokens ({self.used_tokens / self.window:.0%})" if self.window else " tokens"
        parts = [f"{self.used_tokens:,}{share}"]
        parts.append(f"read {self.prompt_tokens - self.reused_tokens:,}, kept {self.reused_tokens:,}")
        if self.evicted_tokens:
            parts.append(f"{self.evicted_tokens:,} no longer seen")
        if self.first_token_seconds is not None:
            parts.append(f"first token {self.first_token_seconds:.1f} s")
            if self.seconds > self.first_token_seconds:
                pace = self.answer_tokens / (self.seconds - self.first_token_seconds)
                parts.append(f"{pace:.1f} tokens/s")
        return " · ".join(parts)

    def document(self) -> dict[str, Any]:
        """The JSON of an answer."""
        return asdict(self) | {"used_tokens": self.used_tokens}


class ChatModel:
    """A model that answers, with what conversations about it share.

    Raises:
        UserError: it cannot be loaded, has no such prompt format, or cannot have attention sinks of this size.
    """

    def __init__(self, settings: ChatSettings) -> None:
        model, tokenizer = load(settings.model, dtype=settings.dtype, device="auto", **vars(settings.loading))
        if settings.dtype == "auto":
            to_quick_dtype(model)
        self.name = Path(settings.model).name if Path(settings.model).exists() else settings.model
        self.tokenizer = tokenizer
        self.window = window(model.config)
        self.prompts = ChatPrompts(model, tokenizer, settings.prompt_format)
        self.settings = settings
        self.sinks = self._sink_window(model)
        kept = settings.kept_tokens
        capacity = WINDOWS_KEPT * (self.window or DEFAULT_WINDOW) if kept is None else kept
        caches = PrefixCaches(model, capacity, self.sinks.sinks if self.sinks else 0)
        self.answerer = Answerer(model, caches, self.sinks)

    def _sink_window(self, model: Any) -> SinkWindow | None:
        sinks, recent = self.settings.sinks.attention_sinks, self.settings.sinks.sink_window
        if not sinks:
            return None
        size = self.window or DEFAULT_WINDOW
        if sinks + (recent or 16) > size:
            raise UserError(
                f"--attention-sinks {sinks:,} and --sink-window {recent or 16:,} together are more than the window of "
                f"{self.name}, {size:,} tokens: lower them."
            )
        return SinkWindow(model, sinks, recent or size - sinks)

    @property
    def reach(self) -> int | None:
        """Most tokens that the model sees at a time; None: no limit is known."""
        return self.sinks.size if self.sinks else self.window

    @property
    def reserve(self) -> int:
        """Tokens that a document must leave for questions and answers."""
        answer = self.settings.answer.answer_tokens
        return answer if self.reach is None else min(answer, self.reach // 4)

    def room(self, documents: Sequence[ChatDocument]) -> int | None:
        """Tokens that documents may have in all, beside the words around them, a question and its answer."""
        if self.reach is None:
            return None
        empty = [replace(each, text="") for each in documents]
        frame = len(self.prompts.prompt(empty, [{"role": "user", "content": ""}]))
        return max(self.reach - self.reserve - frame - JOINT_TOKENS * len(empty), 1)

    def surplus(self, documents: Sequence[ChatDocument]) -> int:
        """By how many tokens the documents are longer than the room they have; 0 where they fit."""
        room = self.room(documents) if documents else None
        return 0 if room is None else max(0, sum(each.tokens for each in documents) - room)

    def too_long(self, documents: Sequence[ChatDocument]) -> str:
        """The sentence for documents that do not fit, without what to do about it."""
        names = " and ".join(f"'{each.label}'" for each in documents)
        total, room = sum(each.tokens for each in documents), self.room(documents)
        verb = "has" if len(documents) == 1 else "together have"
        return (
            f"{names} {verb} {total:,} tokens, {self.surplus(documents):,} more than fit: {self.name} sees "
            f"{self.reach:,} tokens, of which {room:,} are left for documents beside questions and answers"
        )

    def section_budget(self, document: ChatDocument) -> int:
        """Most tokens of a section of `document`."""
        return self.room([document]) or DEFAULT_WINDOW


@dataclass
class ChatSession:
    """One conversation."""

    model: ChatModel
    documents: list[ChatDocument] = field(default_factory=list)
    turns: list[dict[str, str]] = field(default_factory=list)
    """Messages with `role` and `content`; the documents are none of them."""

    answers: list[Answer] = field(default_factory=list)
    """What each answer of this session cost."""

    def ask(
        self, question: str, stop: threading.Event | None = None, settings: AnswerSettings | None = None
    ) -> Iterator[Reading | str | Answer]:
        """Ask, and get what happens as it happens: `Reading`, pieces of the answer's text, and last the `Answer`.

        The question and the answer, stopped or not, become turns; not when nothing was answered. An iterator that is
        closed early leaves the conversation as it was.

        Args:
            question: what the person says.
            stop: set from any thread, it ends the answer.
            settings: default the model's own.

        Raises:
            UserError: the documents or the conversation do not fit the window.
        """
        began = time.monotonic()
        stop, settings = stop or threading.Event(), settings or self.model.settings.answer
        if self.model.surplus(self.documents):
            raise UserError(f"{self.model.too_long(self.documents)}: choose a section, or fewer documents.")
        turns = [*self.turns, {"role": "user", "content": question}]
        prompt = self.model.prompts.prompt(self.documents, turns)
        most = self._most_new_tokens(prompt, settings.answer_tokens)
        said, text, tokens = AnswerText(self.model.tokenizer), "", 0
        reused, first, finish = 0, None, "stopped"
        shown = 0
        happenings = self.model.answerer.answer(
            prompt,
            max_new_tokens=most,
            stop_tokens=self.model.prompts.stop_tokens,
            sampler=Sampler(settings),
            stop=stop,
        )
        try:
            for each in happenings:
                if isinstance(each, Reading):
                    reused = each.reused
                    yield each
                elif isinstance(each, Ended):
                    finish = each.reason
                else:
                    first = time.monotonic() - began if first is None else first
                    tokens += 1
                    text += said.add(each)
                    end = self.model.prompts.ends_answer(text)
                    if end is not None:
                        text, finish = text[:end], "end"
                        break
                    # what may be the beginning of a next question of the model's own is held back
                    safe = len(text) - self.model.prompts.held_back(text)
                    if safe > shown:
                        yield text[shown:safe]
                        shown = safe
            else:
                text += said.rest()
        finally:
            happenings.close()
        if len(text) > shown:
            yield text[shown:]
        if finish == "length" and most < settings.answer_tokens:
            finish = "window"
        answer = Answer(
            text=text.strip() if self.model.prompts.name != "plain" else text,
            finish=finish,
            prompt_tokens=len(prompt),
            reused_tokens=reused,
            answer_tokens=tokens,
            window=self.model.window,
            first_token_seconds=first,
            seconds=time.monotonic() - began,
            evicted_tokens=self._evicted(len(prompt) + tokens),
        )
        if text.strip():
            self.turns = [*turns, {"role": "assistant", "content": answer.text}]
            self.answers.append(answer)
        yield answer

    def _most_new_tokens(self, prompt: list[int], wanted: int) -> int:
        """Tokens that the answer may have."""
        if self.model.sinks is not None or self.model.window is None:
            return wanted
        left = self.model.window - len(prompt)
        if left < 1:
            raise UserError(
                f"the conversation has {len(prompt):,} tokens with this question, and the window of {self.model.name} "
                f"is {self.model.window:,}: begin a new one, or start with --attention-sinks 4 to let the oldest go."
            )
        return min(wanted, left)

    def _evicted(self, tokens: int) -> int:
        """Tokens of a conversation of so many that are out of sight, at least."""
        return max(0, tokens - self.model.sinks.size) if self.model.sinks else 0

    @property
    def used_tokens(self) -> int:
        """Tokens of the conversation so far: of the last answer and its prompt, before it of the documents."""
        return self.answers[-1].used_tokens if self.answers else sum(each.tokens for each in self.documents)

    def begin_again(self) -> None:
        """A new conversation about the same documents, which need not be read again."""
        self.turns, self.answers = [], []
