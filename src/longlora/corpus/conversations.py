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
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import jinja2
import numpy as np

from longlora.corpus.encoding import beginning, encode
from longlora.errors import UserError, check_choice
from longlora.settings import PROMPT_FORMATS

logger = logging.getLogger(__name__)

Turns = Sequence[dict[str, Any]]
"""Messages with `role` and `content` as chat templates take them, and with what a template may know besides:
`tool_calls`, `reasoning_content`, `thinking`, `name`."""

REASONING = ("reasoning_content", "thinking")

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
        instead: the setting, for messages, that does without the template.

    Raises:
        UserError: there is no chat template, or for `inst` no end-of-sequence token.
    """

    def __init__(self, tokenizer: Any, prompt_format: str = "auto", instead: str = "--prompt-format inst") -> None:
        check_choice("--prompt-format", prompt_format, PROMPT_FORMATS)
        if prompt_format == "template" and not tokenizer.chat_template:
            raise UserError(
                "--prompt-format is template, but the tokenizer has no chat template: give --prompt-format inst."
            )
        self.tokenizer, self._instead = tokenizer, instead
        self.name = "inst" if prompt_format == "inst" or not tokenizer.chat_template else "template"
        self._said_lost = False
        self.template: str | None = None
        """The Jinja template where it is not the tokenizer's own."""
        if self.name == "inst":
            if tokenizer.eos_token is None:
                raise UserError(
                    "the tokenizer has no end-of-sequence token to end an answer with: give one that has, or a chat "
                    "template that ends a turn, and --prompt-format template."
                )
            self.template = ("{{ bos_token }}" if beginning(tokenizer) else "") + INST_TEMPLATE

    def prompt(self, turns: Turns, opening: str = "") -> list[int]:
        """Tokens of a conversation up to where the assistant speaks; the last turn is the user's.

        Args:
            turns: the conversation.
            opening: words the assistant's answer begins with.

        Raises:
            UserError: the template cannot write these turns, leaves the question out, or could be faked by its words.
        """
        turns = self._adapted(turns)
        text = self._opened(turns, opening) if opening else self._text(turns, add_generation_prompt=True)
        if _squeezed(self._marked(turns[-1]["content"])) not in _squeezed(text):
            raise UserError(
                "the tokenizer's chat template writes a prompt without the question: mend the template, or give "
                f"{self._instead}."
            )
        return self._tokens([text])[0]

    def examples(self, turns: Turns, *, every: bool = True, tools: Any = None) -> list[Example]:
        """A conversation to train on, its last turn the assistant's, with loss on every answer or on the last.

        An answer before the last that the template rewrites once more turns follow (as templates do that take out
        earlier reasoning) is an example of its own, as the model gave it: the conversation as far as that answer.

        Args:
            turns: the conversation.
            every: loss on each answer of the assistant, else on the last alone.
            tools: descriptions of the tools that templates write for the model.

        Raises:
            UserError: the template cannot write these turns, or which tokens are the last answer cannot be told.
        """
        turns = self._adapted(turns)
        last, rewritten = self._example(turns, tools)
        if not every:
            return [replace(last, answers=last.answers[-1:])]
        earlier = [self._example(turns[: index + 1], tools)[0] for index in rewritten]
        return [*(replace(each, answers=each.answers[-1:]) for each in earlier), last]

    def example(self, turns: Turns) -> Example:
        """The last of `examples`: the whole, with loss on each answer that the template leaves as it is."""
        return self.examples(turns)[-1]

    def _example(self, turns: Turns, tools: Any) -> tuple[Example, list[int]]:
        """The conversation, and the indices of those answers before the last that carry no loss in it."""
        options = {"tools": tools, "thinking": any(map(_reasons, turns))}
        whole = self._text(turns, **options)
        borders: list[int] = []
        rewritten: list[int] = []
        for index, turn in enumerate(turns):
            if turn["role"] != "assistant":
                continue
            last = index == len(turns) - 1
            before = self._text(turns[:index], add_generation_prompt=True, **options)
            after = whole if last else self._text(turns[: index + 1], **options)
            visible = _squeezed(self._marked(_visible(turn)))
            if last and not after.startswith(before):
                whole = after = self._continued(before, after, turn)
            answer = after[len(before) :].rstrip()
            if after.startswith(before) and whole.startswith(after) and visible in _squeezed(answer) and answer:
                self._check_written(turn, answer)
                borders += [len(before), len(before) + len(answer)]
            elif last:
                raise self._untold()
            else:
                rewritten.append(index)
        tokens, places = self._tokens_and_places(whole[: borders[-1]], borders)
        if tokens[-1] not in self.tokenizer.added_tokens_decoder and self.tokenizer.eos_token_id is not None:
            tokens.append(self.tokenizer.eos_token_id)  # or the model would never learn to stop
            places[-1] += 1
        answers = tuple(zip(places[::2], places[1::2], strict=True))
        return Example(np.array(tokens, dtype=np.int32), answers), rewritten

    def _check_written(self, turn: dict[str, Any], answer: str) -> None:
        """Refuse an answer whose calls the template passes over, and say so of reasoning that it passes over."""
        calls = [call.get("function") or call for call in turn.get("tool_calls") or () if isinstance(call, dict)]
        names = [str(call.get("name", "")) for call in calls]
        if lost := [name for name in names if name not in answer]:
            raise UserError(
                f"the tokenizer's chat template writes no tool calls ('{lost[0]}' is not in what it makes of "
                "the answer): give a model whose template does, or leave such conversations out."
            )
        reasoning = next((str(turn[name]) for name in REASONING if turn.get(name)), "")
        if _squeezed(self._marked(reasoning)) not in _squeezed(answer) and not self._said_lost:
            self._said_lost = True
            logger.warning("the chat template has no place for an answer's reasoning: it is left out")

    def _continued(self, before: str, after: str, turn: dict[str, Any]) -> str:
        """The prompt in use, and the answer after it, where the template writes answers that are past without their
        reasoning (DeepSeek-R1's): the prompt has opened it, so the answer closes it, though it be empty."""
        visible = self._marked(_visible(turn)).strip()
        at = after.rfind(visible)
        if not visible or at < 0 or not before.rstrip().endswith("<think>"):
            raise self._untold()
        spoken = self._marked(turn["content"]).strip()
        reasoning = next((str(turn[name]) for name in REASONING if turn.get(name)), "")
        if "</think>" not in spoken:
            spoken = f"{reasoning}\n</think>\n\n{spoken}"
        return (
            before
            + spoken.removeprefix("<think>").lstrip("\n" if reasoning or spoken[0] == "<" else "")
            + (after[at + len(visible) :])
        )

    @staticmethod
    def _untold() -> UserError:
        return UserError(
            "the tokenizer's chat template writes a conversation otherwise once it is answered, so "
            "which tokens are the answer cannot be told: mend the template, or give --prompt-format inst."
        )

    def _tokens_and_places(self, text: str, borders: list[int]) -> tuple[list[int], list[int]]:
        """Tokens of `text`, and at which token each border, a number of characters, lies; the last is the end."""
        tokens, *heads = self._tokens([text, *(text[:border] for border in borders[:-1])])
        if all(tokens[: len(head)] == head for head in heads):
            return tokens, [*map(len, heads), len(tokens)]
        # a token would reach over the border: what is before it must be the tokens of a prompt in use
        pieces = self._tokens([text[start:stop] for start, stop in pairwise([0, *borders])])
        joined = [token for piece in pieces for token in piece]
        if self._said(joined) != self._said(tokens):
            raise UserError(
                "the tokens of the prompt are not the beginning of those of prompt and answer, and the "
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
        return encode(self.tokenizer, [text], special_tokens=not as_letters)[0] if text else []

    def _said(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, clean_up_tokenization_spaces=False))

    def _text(self, turns: Turns, thinking: bool = False, **options: Any) -> str:
        """What the template writes; `thinking` as the data has it, or models that think would before a short answer."""
        written = [{name: self._marked(value) for name, value in turn.items()} for turn in turns]
        if self._in_parts:
            for turn in written:
                turn["content"] = [{"type": "text", "text": turn["content"]}] if turn["content"] else []
        for turn in turns if self._plain_marker else ():
            if turn["role"] != "assistant" and self._plain_marker in str(turn["content"]):
                raise UserError(
                    f"the {turn['role']}'s text has '{self._plain_marker}' in it, by which this prompt format "
                    "says that the assistant speaks, and which is no token of its own: take it out, or give a model "
                    "whose chat template marks turns with special tokens."
                )
        return self._rendered(written, enable_thinking=thinking, thinking=thinking, **options)

    def _opened(self, turns: Turns, opening: str) -> str:
        """A prompt that ends with the first words of the answer."""
        try:
            return self._text([*turns, {"role": "assistant", "content": opening}], continue_final_message=True)
        except UserError:
            logger.debug("the chat template cannot leave a turn open: the answer's first words follow its last")
        return self._text(turns, add_generation_prompt=True) + opening

    def _rendered(self, turns: Turns, **options: Any) -> str:
        try:
            return str(
                self.tokenizer.apply_chat_template(turns, chat_template=self.template, tokenize=False, **options)
            )
        except (jinja2.TemplateError, ValueError, TypeError, KeyError) as error:
            roles = ", ".join(turn["role"] for turn in turns)
            raise UserError(
                f"the tokenizer's chat template cannot write turns of {roles} "
                f"({str(error).partition(chr(10))[0]}): mend the template, or give {self._instead}."
            ) from error

    @cached_property
    def _in_parts(self) -> bool:
        """Whether the template reads a turn's content as a list of parts, as those of models that see do."""
        words = "the question's words"

        def says(content: Any) -> bool:
            try:
                return words in self._rendered([{"role": "user", "content": content}], add_generation_prompt=True)
            except UserError:
                return False

        return not says(words) and says([{"type": "text", "text": words}])

    @cached_property
    def _plain_marker(self) -> str:
        """What stands between a question and its answer, where it is plain text that a document could hold too."""
        words = ["the question's words", "the answer's words"]
        turns = [{"role": role, "content": each} for role, each in zip(("user", "assistant"), words, strict=True)]
        if self._in_parts:
            return ""
        try:
            between = self._rendered(turns).partition(words[0])[2].rpartition(words[1])[0]
        except UserError:
            return ""
        return "" if self._special.search(between) else between.strip()

    def _marked(self, value: Any) -> Any:
        """Text, and text within lists and objects, with special tokens' letters marked as letters."""
        if isinstance(value, str):
            return self._special.sub(rf"{_OPEN}\g<0>{_CLOSE}", value.replace(_OPEN, "").replace(_CLOSE, ""))
        if isinstance(value, list | tuple):
            return [self._marked(each) for each in value]
        return {name: self._marked(each) for name, each in value.items()} if isinstance(value, dict) else value

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


def _reasons(turn: dict[str, Any]) -> bool:
    """Whether a turn holds reasoning."""
    return turn["role"] == "assistant" and (
        "</think>" in (turn["content"] or "") or any(turn.get(name) for name in REASONING)
    )


def _visible(turn: dict[str, Any]) -> str:
    """An answer without its reasoning, which templates move or take out."""
    return str(turn["content"] or "").rpartition("</think>")[2]


def _squeezed(text: str) -> str:
    """`text` without blanks, which templates trim."""
    return "".join(text.split())
