"""A question as the tokens a model expects: with its chat template or as plain text, with BOS once or not at all."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from longlora.corpus.conversations import ConversationFormat
from longlora.errors import UserError, check_choice
from longlora.model.stopping import ends_of_turn
from longlora.settings import CHOICES


class PromptFormat:
    """How one tokenizer's prompts are written.

    Args:
        tokenizer: of the model that will read them.
        chat: `yes`, `no`, or `auto`: with the chat template where there is one.
        bos: `yes`, `no`, or `auto`: BOS where the tokenizer, or in a chat its template, puts it.
        system: text of a system turn; where the template refuses or ignores one it goes before the user's text.

    Raises:
        UserError: a chat without a (working) template, a system turn without a chat, or BOS without such a token.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        chat: str = "auto",
        bos: str = "auto",
        system: str | None = None,
    ) -> None:
        check_choice("--chat", chat, CHOICES)
        check_choice("--bos", bos, CHOICES)
        self.tokenizer, self.system = tokenizer, system
        if chat == "yes" and not tokenizer.chat_template:
            raise UserError(
                "--chat is yes, but the tokenizer has no chat template: give --chat no to ask in plain text, as a "
                "base model expects."
            )
        self.chat = chat == "yes" or (chat == "auto" and bool(tokenizer.chat_template))
        if system is not None and not self.chat:
            raise UserError("--system is a turn of a chat, and the tokenizer has no chat template: leave it out.")
        if bos == "yes" and tokenizer.bos_token_id is None:
            raise UserError("--bos is yes, but the tokenizer has no BOS token: give --bos auto or no.")
        self.description: Mapping[str, Any] = {"chat": self.chat, "bos": bos, "system": system}
        """How prompts are written, for a results document."""
        self._bos = bos
        self._format = ConversationFormat(tokenizer, "template", instead="--chat no") if self.chat else None

    def tokens(self, text: str, opening: str = "", joint: str = " ") -> np.ndarray:
        """Token ids (N,) of the question `text`, int32.

        Args:
            text: what the user says; without a chat template the whole prompt.
            opening: words the answer begins with, which the model goes on from.
            joint: what stands between `text` and `opening` in plain text.

        Raises:
            UserError: the chat template cannot write this turn, or leaves the question out.
        """
        if self._format is not None:
            system = [] if self.system is None else [{"role": "system", "content": self.system}]
            found = self._format.prompt([*system, {"role": "user", "content": text}], opening)
            own = found[:1] == [self.tokenizer.bos_token_id]
            prefix = [] if own else self._bos_prefix([])
            # SmolLM2's BOS opens every turn, and so belongs to the template
            if own and self._bos == "no" and found.count(found[0]) == 1:
                found = found[1:]
        else:
            found = self._tokenized(text + joint + opening if opening else text)
            prefix = self._bos_prefix(self._usual_prefix())
        return np.array([*prefix, *found], dtype=np.int32)

    def stop_tokens(self, model: PreTrainedModel | None = None) -> frozenset[int]:
        """Ids that end an answer: the tokenizer's and the model's EOS, and what the template ends a turn with."""
        found = {self.tokenizer.eos_token_id}
        if model is not None:
            given = getattr(model.generation_config, "eos_token_id", None)
            found |= set(given) if isinstance(given, list) else {given}
        if self.chat:
            found |= ends_of_turn(self.tokenizer)
        return frozenset(token for token in found if token is not None)

    def text(self, tokens: list[int]) -> str:
        """What an answer's tokens say, without special tokens."""
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _tokenized(self, text: str) -> list[int]:
        # verbose=False: longer than `model_max_length` is what this is for
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _usual_prefix(self) -> list[int]:
        """What the tokenizer puts before a text of its own accord; what it may put after it would end the prompt."""
        plain = self._tokenized("x")
        whole = list(self.tokenizer("x")["input_ids"])
        starts = [at for at in range(len(whole)) if whole[at : at + len(plain)] == plain]
        return whole[: starts[0]] if starts else []

    def _bos_prefix(self, usual: list[int]) -> list[int]:
        if self._bos == "auto":
            return usual
        return [self.tokenizer.bos_token_id] if self._bos == "yes" else []
