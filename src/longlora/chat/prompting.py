r"""A conversation about documents as the tokens that a model expects, and an answer's tokens as text.

template, inst   user: Below is a book … Now the material ends. Who is Ahab?   assistant: A captain.   user: …
plain            Below is a book … Now the material ends. Who is Ahab?\nAnswer: A captain.\n\nQuestion: …\nAnswer:
plain, no document   what was written, for the model to go on with
"""

from collections.abc import Sequence
from typing import Any

from torch import nn

from longlora.chat.documents import ChatDocument
from longlora.corpus.conversations import ConversationFormat, Turns
from longlora.corpus.encoding import beginning, encode
from longlora.evaluation.prompting import PromptFormat
from longlora.longqa.prompts import material_opening
from longlora.model.lm_head import unwrapped

NEXT_QUESTION = "\n\nQuestion:"
_QUESTION, _ANSWER = f"{NEXT_QUESTION} ", "\nAnswer:"


class ChatPrompts:
    """How one model's conversations are written.

    Args:
        model: its own end-of-text tokens end an answer too.
        tokenizer: a transformers tokenizer; it is not changed.
        prompt_format: `template`, `inst`, `plain`, or `auto`: the template where there is one, else `plain`.

    Raises:
        UserError: there is no chat template, or for `inst` no end-of-sequence token.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, prompt_format: str = "auto") -> None:
        if prompt_format == "auto":
            prompt_format = "template" if tokenizer.chat_template else "plain"
        self.name, self.tokenizer = prompt_format, tokenizer
        self._beginning = beginning(tokenizer)
        self._format = None if prompt_format == "plain" else ConversationFormat(tokenizer, prompt_format)
        chat = "yes" if prompt_format == "template" else "no"
        self.stop_tokens = PromptFormat(tokenizer, chat=chat).stop_tokens(unwrapped(model))
        """Ids that end an answer."""

    def prompt(self, documents: Sequence[ChatDocument], turns: Turns) -> list[int]:
        """Tokens of the conversation up to where the model answers; the last turn is the user's.

        Raises:
            UserError: the chat template cannot write these turns.
        """
        opening = "".join(material_opening(each.text, each.material, each.title) for each in documents)
        first = {"role": "user", "content": opening + turns[0]["content"]}
        if self._format is not None:
            return self._format.prompt([first, *turns[1:]])
        return self._beginning + self._plain([first, *turns[1:]], bool(documents))

    def ends_answer(self, text: str) -> int | None:
        """Offset at which a plain answer goes over into a next question of the model's own; None while it does not."""
        at = text.find(NEXT_QUESTION) if self.name == "plain" else -1
        return at if at >= 0 else None

    def held_back(self, text: str) -> int:
        """Characters at the end of a plain answer that may be the beginning of such a question."""
        if self.name != "plain":
            return 0
        return next((n for n in range(len(NEXT_QUESTION) - 1, 0, -1) if text.endswith(NEXT_QUESTION[:n])), 0)

    def _plain(self, turns: Turns, asked: bool) -> list[int]:
        text = turns[0]["content"] + (_ANSWER if asked else "")
        for turn in turns[1:]:
            if turn["role"] == "assistant":
                text += turn["content"]
            else:
                text += _QUESTION + turn["content"] + _ANSWER if asked else "\n\n" + turn["content"]
        return encode(self.tokenizer, [text])[0]


class AnswerText:
    """Text out of tokens as they come, each character once and whole (a letter may be several tokens).

    Decoded from a few tokens back, because what a token says may depend on the one before it (SentencePiece's blank).
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._before = self._said = 0

    def add(self, token: int) -> str:
        """The new characters, maybe none yet."""
        self._tokens.append(token)
        return self._new(self._decoded(self._tokens[self._before :]))

    def rest(self) -> str:
        """What is left of an answer that ends in the middle of a character."""
        return self._new(self._decoded(self._tokens[self._before :]), whole=True)

    def _new(self, text: str, whole: bool = False) -> str:
        known = self._decoded(self._tokens[self._before : self._said])
        if len(text) <= len(known) or (text.endswith("\ufffd") and not whole):
            return ""
        self._before, self._said = self._said, len(self._tokens)
        return text[len(known) :]

    def _decoded(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))
