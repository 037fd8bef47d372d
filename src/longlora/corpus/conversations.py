"""Conversations as tokens, for training and for use: through a chat template, with each answer's tokens known.

    <|user|> Below is a book … Who is Ahab? <|end|> <|assistant|> A captain. <|end|>
    ╰──────────── prompt, no loss ─────────────────────────────╯╰── answer, loss ──╯

What a template writes for an answer is found by rendering the conversation without it and with it: the first must be
the beginning of the second, in text and in tokens. So no template needs `{% generation %}` marks, and a model trains
on exactly the prompt tokens that it meets in use.
"""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import jinja2
import numpy as np

from longlora.corpus.encoding import beginning
from longlora.errors import UserError, check_choice
from longlora.settings import PROMPT_FORMATS

logger = logging.getLogger(__name__)

Turns = Sequence[dict[str, str]]
"""Messages with `role` and `content`, as chat templates take them."""

INST_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '[INST]' + message['content'] + '[/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
)
"""The original code's prompt (`prompt_llama2` in LongLoRA's inference.py) and its answer, which ends with EOS."""

_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
"""Marks around a special token's letters in a user's text. Unicode keeps these two characters out of all texts."""


@dataclass(frozen=True)
class Example:
    """A conversation to train on."""

    tokens: np.ndarray
    """(n,) int32; the last is the end of the last answer."""

    answers: tuple[tuple[int, int], ...]
    """Start and stop of each answer's tokens, its end-of-turn token among them."""

    where: str = ""
    """Its place in the file it was read from."""

    @property
    def answer_tokens(self) -> int:
        """Tokens that carry loss."""
        return sum(stop - start for start, stop in self.answers)

    def labels(self, ignored: int) -> np.ndarray:
        """(n,) int64: the answers' tokens, and `ignored` elsewhere."""
        labels = np.full(len(self.tokens), ignored, dtype=np.int64)
        for start, stop in self.answers:
            labels[start:stop] = self.tokens[start:stop]
        return labels


class ConversationFormat:
    """How one tokenizer's conversations are written.

    The beginning-of-sequence token stands where the template writes it, and nowhere else; `inst` writes it where the
    tokenizer does by itself. A system turn that the template refuses or passes over goes before the user's words. What
    looks like a special token in a document or a question is text: it cannot end a turn or begin another.

    Args:
        tokenizer: a transformers tokenizer; it is not changed.
        prompt_format: `template`, `inst`, or `auto`: the template where there is one, else `inst`.

    Raises:
        UserError: there is no chat template, or for `inst` no end-of-sequence token.
    """

    def __init__(self, tokenizer: Any, prompt_format: str = "auto") -> None:
        check_choice("--prompt-format", prompt_format, PROMPT_FORMATS)
        if prompt_format == "template" and not tokenizer.chat_template:
            raise UserError(
                "--prompt-format is template, but the tokenizer has no chat template: give --prompt-format inst."
            )
        self.tokenizer = tokenizer
        self.name = "inst" if prompt_format == "inst" or not tokenizer.chat_template else "template"
        self.template: str | None = None
        """The Jinja template where it is not the tokenizer's own."""
        if self.name == "inst":
            if tokenizer.eos_token is None:
                raise UserError(
                    "the tokenizer has no end-of-sequence token to end an answer with: give one that has, or a chat "
                    "template that ends a turn, and --prompt-format template."
                )
            self.template = ("{{ bos_token }}" if beginning(tokenizer) else "") + INST_TEMPLATE

    def prompt(self, turns: Turns) -> list[int]:
        """Tokens of a conversation up to where the assistant speaks; the last turn is the user's.

        Raises:
            UserError: the template cannot write these turns.
        """
        return self._tokens([self._text(self._adapted(turns), add_generation_prompt=True)])[0]

    def example(self, turns: Turns, where: str = "") -> Example:
        """A conversation to train on, its last turn the assistant's.

        Each answer carries loss, but for those before the last that the template rewrites once more turns follow (as
        templates do that take out earlier reasoning).

        Raises:
            UserError: the template cannot write these turns, or its text or tokens for the last answer do not follow
                those of the prompt.
        """
        turns = self._adapted(turns)
        place = f"{where}: " if where else ""
        whole = self._text(turns, place)
        borders: list[int] = []
        for index, turn in enumerate(turns):
            if turn["role"] != "assistant":
                continue
            last = index == len(turns) - 1
            before = self._text(turns[:index], place, add_generation_prompt=True)
            after = whole if last else self._text(turns[: index + 1], place)
            answer = after[len(before) :].rstrip()
            if after.startswith(before) and whole.startswith(after) and _squeezed(turn["content"]) in _squeezed(answer):
                borders += [len(before), len(before) + len(answer)]
            elif last:
                raise UserError(
                    f"{place}the tokenizer's chat template writes a conversation otherwise once it is answered, so "
                    "which tokens are the answer cannot be told: mend the template, or give --prompt-format inst."
                )
        tokens, places = self._tokens_and_places(whole[: borders[-1]], borders, place)
        if tokens[-1] not in self.tokenizer.added_tokens_decoder and self.tokenizer.eos_token_id is not None:
            tokens.append(self.tokenizer.eos_token_id)  # or the model would never learn to stop
            places[-1] += 1
        answers = tuple(zip(places[::2], places[1::2], strict=True))
        return Example(np.array(tokens, dtype=np.int32), answers, where)

    def _tokens_and_places(self, text: str, borders: list[int], place: str) -> tuple[list[int], list[int]]:
        """Tokens of `text`, and at which token each border, a number of characters, lies; the last is the end."""
        tokens, *heads = self._tokens([text, *(text[:border] for border in borders[:-1])])
        if all(tokens[: len(head)] == head for head in heads):
            return tokens, [*map(len, heads), len(tokens)]
        # a token would reach over the border: what is before it must be the tokens of a prompt in use
        pieces = self._tokens([text[start:stop] for start, stop in pairwise([0, *borders])])
        joined = [token for piece in pieces for token in piece]
        if self._said(joined) != self._said(tokens):
            raise UserError(
                f"{place}the tokens of the prompt are not the beginning of those of prompt and answer, and the "
                "tokenizer cannot write them apart: give --prompt-format with a format that ends the prompt with a "
                "token of its own."
            )
        return joined, np.cumsum([len(piece) for piece in pieces]).tolist()

    def _tokens(self, texts: list[str]) -> list[list[int]]:
        return [self._unmarked(text) if _OPEN in text else self._ids(text) for text in texts]

    def _unmarked(self, text: str) -> list[int]:
        """Tokens of a text in which some special tokens' letters are marked as letters."""
        pieces = re.split(f"{_OPEN}(.*?){_CLOSE}", text, flags=re.DOTALL)
        return [token for place, piece in enumerate(pieces) for token in self._ids(piece, as_letters=place % 2 == 1)]

    def _ids(self, text: str, as_letters: bool = False) -> list[int]:
        # verbose=False: longer than `model_max_length` is what this is for
        options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
        return list(self.tokenizer(text, **options, split_special_tokens=as_letters)["input_ids"]) if text else []

    def _said(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, clean_up_tokenization_spaces=False))

    def _text(self, turns: Turns, place: str = "", **options: Any) -> str:
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    [self._with_marks(turn) for turn in turns],
                    chat_template=self.template,
                    tokenize=False,
                    enable_thinking=False,  # Qwen3 and its like would think before a short answer
                    **options,
                )
            )
        except (jinja2.TemplateError, ValueError, TypeError, KeyError) as error:
            roles = ", ".join(turn["role"] for turn in turns)
            raise UserError(
                f"{place}the tokenizer's chat template cannot write turns of {roles} "
                f"({str(error).partition(chr(10))[0]}): mend the template, or give --prompt-format inst."
            ) from error

    def _with_marks(self, turn: dict[str, str]) -> dict[str, str]:
        if turn["role"] == "assistant":
            return turn
        content = turn["content"].replace(_OPEN, "").replace(_CLOSE, "")
        return {**turn, "content": self._special.sub(rf"{_OPEN}\g<0>{_CLOSE}", content)}

    @cached_property
    def _special(self) -> re.Pattern[str]:
        """The letters of any special token, the longest first."""
        known = {str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        known |= set(self.tokenizer.all_special_tokens)
        letters = sorted(known - {""}, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, letters)) or r"(?!)")

    def _adapted(self, turns: Turns) -> Turns:
        if turns[0]["role"] != "system" or self._takes_system_turn:
            return turns
        system, user, *rest = turns
        return [{"role": "user", "content": f"{system['content']}\n\n{user['content']}"}, *rest]

    @cached_property
    def _takes_system_turn(self) -> bool:
        words = "the system's words"
        try:
            text = self._text([{"role": "system", "content": words}, {"role": "user", "content": "a question"}])
        except UserError:
            text = ""
        if words in text:
            return True
        logger.info("the prompt format has no system turn: its text goes before the user's")
        return False


def _squeezed(text: str) -> str:
    """`text` without blanks, which templates trim."""
    return "".join(text.split())
