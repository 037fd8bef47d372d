"""A teacher that runs here: any MODEL, answering greedily through its chat template."""

import logging
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TypeVar

from longlora.errors import UserError
from longlora.evaluation.generation import generate
from longlora.evaluation.prompting import PromptFormat
from longlora.longqa.answers import Answer, judged
from longlora.model.lm_head import unwrapped
from longlora.model.loading import load, load_config, window
from longlora.settings import LoadSettings

logger = logging.getLogger(__name__)

LOOP_REPEATS, LOOP_TOKENS = 4, 32
"""An answer whose last tokens are the same stretch this many times, over at least so many tokens, is stopped."""

Key = TypeVar("Key")


def require_room(model: str, prompt_tokens: int, answer_tokens: int, loading: LoadSettings) -> None:
    """Raises UserError if a prompt of so many tokens and its answer do not fit the window of `model`."""
    config = load_config(model, **vars(loading))
    width = window(config)
    if width is not None and prompt_tokens + answer_tokens > width:
        raise UserError(
            f"--teacher {model} has a window of {width:,} tokens; the longest prompt has about {prompt_tokens:,} and "
            f"its answer up to {answer_tokens:,}: lower --section-tokens or --answer-tokens, or give another teacher."
        )


class LocalTeacher:
    """Answers `batch` prompts in one pass, on the GPU where there is one. Greedy: to ask again would change nothing."""

    def __init__(self, model: str, *, answer_tokens: int, batch: int, loading: LoadSettings) -> None:
        """
        Raises:
            UserError: `model` cannot be loaded.
        """
        self.name = Path(model).name if Path(model).exists() else model
        self.answer_tokens, self.batch = answer_tokens, batch
        self.model, tokenizer = load(model, device="auto", **vars(loading))
        self.window = window(self.model.config)
        self.prompts = PromptFormat(tokenizer)
        if not self.prompts.chat:
            logger.warning("'%s' has no chat template: it is a base model, its answers will be poor", model)
        self._ends = self.prompts.stop_tokens(unwrapped(self.model))

    def answer_each(self, asked: Iterable[tuple[Key, str]]) -> Iterator[tuple[Key, Answer]]:
        """The answer to each prompt, `batch` at a time; one that does not fit the window is not read."""
        waiting = iter(asked)
        while together := list(islice(waiting, self.batch)):
            prompts = [self._tokens(prompt) for _, prompt in together]
            fits = [self.window is None or len(each) + self.answer_tokens <= self.window for each in prompts]
            answers = iter(
                generate(
                    self.model,
                    [prompt for prompt, fit in zip(prompts, fits, strict=True) if fit],
                    self.answer_tokens,
                    stop_tokens=self._ends,
                    stop=_loops,
                    batch=self.batch,
                )
            )
            for (key, prompt), tokens, fit in zip(together, prompts, fits, strict=True):
                if not fit:
                    yield key, Answer("", "too long for the teacher", f"{len(tokens):,} tokens")
                    continue
                yield key, self._judged(next(answers), prompt, len(tokens))

    def _judged(self, tokens: list[int], prompt: str, prompt_tokens: int) -> Answer:
        text = self.prompts.text(tokens)
        cut = len(tokens) >= self.answer_tokens
        if _loops(tokens):
            return Answer(text, "repetition", text[-120:], cut, prompt_tokens, len(tokens))
        return judged(text, prompt, cut=cut, prompt_tokens=prompt_tokens, answer_tokens=len(tokens))

    def _tokens(self, prompt: str) -> list[int]:
        return self.prompts.tokens(prompt if self.prompts.chat else f"{prompt}\nAnswer:").tolist()


def _loops(tokens: list[int]) -> bool:
    """Whether the answer so far ends in one stretch of tokens said over and over."""
    for period in range(1, len(tokens) // LOOP_REPEATS + 1):
        stretch = max(period * LOOP_REPEATS, LOOP_TOKENS)
        if stretch > len(tokens) or period * LOOP_REPEATS > 4 * LOOP_TOKENS:
            return False
        tail = tokens[-stretch:]
        if tail[period:] == tail[:-period]:
            return True
    return False
