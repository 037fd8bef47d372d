"""A question with its long material and the answer: what it is in memory, and as a record of either file format.

LongAlpaca    {"instruction": the whole prompt, "output": the answer}, optionally "input", which follows the instruction
chat messages {"messages": [{"role": "user", "content": …}, {"role": "assistant", "content": …}]}

Records written here also carry "category" and "source", which readers of either format pass over.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

ROLES = ("system", "user", "assistant")


class MalformedPairError(ValueError):
    """A record that is no pair: the message says why, as in "the answer is empty"."""


class Message(NamedTuple):
    """One turn of a conversation."""

    role: str
    """`system`, `user` or `assistant`."""

    content: str


@dataclass(frozen=True)
class Pair:
    """A conversation whose last message is the answer to train on; nearly always one question and one answer."""

    messages: tuple[Message, ...]
    """An optional `system` message, then `user` and `assistant` in turn; the last is the `assistant`'s, not empty."""

    category: str = ""
    """Category of the question (`summary`, `characters`, …); empty when the record has none."""

    source: Mapping[str, Any] = field(default_factory=dict)
    """Where it comes from, as `longlora longqa build` records it: see `planning.Task.source`."""

    where: str = ""
    """Its place in the file it was read from: `line 12`, or `record 3 (line 40)` of a JSON array."""

    @property
    def prompt(self) -> str:
        """The last question with its material."""
        return self.messages[-2].content

    @property
    def answer(self) -> str:
        return self.messages[-1].content

    def conversation(self) -> list[dict[str, str]]:
        """The messages as `tokenizer.apply_chat_template` takes them."""
        return [message._asdict() for message in self.messages]


def question_and_answer(prompt: str, answer: str, category: str = "", source: Mapping[str, Any] | None = None) -> Pair:
    """The pair of one user's turn and its answer."""
    return Pair((Message("user", prompt), Message("assistant", answer)), category, source or {})


def pair_from_record(record: Any, where: str = "") -> Pair:
    """The pair in a decoded JSON record of either format.

    Raises:
        MalformedPairError: it is none.
    """
    if not isinstance(record, dict):
        raise MalformedPairError(f"the record is a {type(record).__name__}, not an object")
    if "messages" in record:
        messages = _messages(record["messages"])
    elif "instruction" in record and "output" in record:
        instruction, following = _text(record, "instruction"), _text(record, "input")
        prompt = "\n".join(part for part in (instruction, following) if part.strip())
        messages = (Message("user", prompt), Message("assistant", _text(record, "output")))
    else:
        fields = ", ".join(map(str, record)) or "none"
        raise MalformedPairError(f"it has neither 'messages' nor 'instruction' and 'output'; its fields are: {fields}")
    if not messages[-1].content.strip():
        raise MalformedPairError("the answer is empty")
    if not messages[-2].content.strip():
        raise MalformedPairError("the prompt is empty")
    category, source = record.get("category"), record.get("source")
    return Pair(
        messages,
        category if isinstance(category, str) else "",
        source if isinstance(source, dict) else {},
        where,
    )


def _text(record: Mapping[str, Any], name: str) -> str:
    value = record.get(name)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise MalformedPairError(f"'{name}' is a {type(value).__name__}, not text")
    return value


def _messages(value: Any) -> tuple[Message, ...]:
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
        raise MalformedPairError("'messages' is not a list of objects")
    messages = tuple(Message(str(each.get("role")), _text(each, "content")) for each in value)
    roles = [message.role for message in messages]
    unknown = [role for role in roles if role not in ROLES]
    if unknown:
        raise MalformedPairError(f"role '{unknown[0]}' is none of {', '.join(ROLES)}")
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if not turns or turns != ["user", "assistant"] * (len(turns) // 2):
        raise MalformedPairError(
            f"its roles are {', '.join(roles) or 'none'}: they must be user and assistant in turn, to the assistant"
        )
    return messages


def messages_record(pair: Pair) -> dict[str, Any]:
    """The record of `pair` as chat messages."""
    return {"messages": pair.conversation(), **_about(pair)}


def longalpaca_record(pair: Pair) -> dict[str, Any]:
    """The record of `pair` in LongAlpaca's format.

    Raises:
        ValueError: it has a system message or several turns, for which the format has no place.
    """
    if len(pair.messages) != 2:
        raise ValueError(f"{pair.where or 'a pair'} has {len(pair.messages)} messages")
    return {"instruction": pair.prompt, "output": pair.answer, **_about(pair)}


def _about(pair: Pair) -> dict[str, Any]:
    named = {"category": pair.category, "source": dict(pair.source)}
    return {name: value for name, value in named.items() if value}
