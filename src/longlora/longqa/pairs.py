"""A question with its long material and the answer: what it is in memory, and as a record of either file format.

LongAlpaca    {"instruction": the whole prompt, "output": the answer}, optionally "input", which follows the instruction
chat messages {"messages": [{"role": "user", "content": …}, {"role": "assistant", "content": …}]}

Read, but not written, are also the forms that TRL and data sets of the hub have: ShareGPT's {"conversations": [{"from":
"human", "value": …}, …]}, and {"prompt": …, "completion": …} as text or as messages; tools, tool calls and reasoning
are kept for the chat template. Records written here also carry "category" and "source", which readers pass over.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

ROLES = ("system", "user", "assistant", "tool")
_OTHER_NAMES = {
    "developer": "system",
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function": "tool",
    "observation": "tool",
    "tool_response": "tool",
    "ipython": "tool",
}
_KEPT = ("tool_calls", "tool_call_id", "name", "reasoning_content", "thinking")


class MalformedPairError(ValueError):
    """A record that is no pair: the message says why, as in "the answer is empty"."""


class Message(NamedTuple):
    """One turn of a conversation."""

    role: str
    """`system`, `user`, `assistant` or `tool`."""

    content: str

    more: Mapping[str, Any] | None = None
    """What a chat template may know besides: tool calls, reasoning."""


@dataclass(frozen=True)
class Pair:
    """A conversation whose last message is the answer to train on; nearly always one question and one answer."""

    messages: tuple[Message, ...]
    """An optional `system` message, then `user` and `assistant` in turn, who may have a `tool` answer it before it
    speaks again; the last is the `assistant`'s, not empty."""

    category: str = ""
    """Category of the question (`summary`, `characters`, …); empty when the record has none."""

    source: Mapping[str, Any] = field(default_factory=dict)
    """Where it comes from, as `longlora longqa build` records it: see `planning.Task.source`."""

    where: str = ""
    """Its place in the file it was read from: `line 12`, or `record 3` of a JSON array."""

    tools: Any = None
    """Descriptions of the tools that the assistant may call."""

    @property
    def prompt(self) -> str:
        """The last question with its material."""
        return next(message.content for message in reversed(self.messages) if message.role == "user")

    @property
    def answer(self) -> str:
        return self.messages[-1].content

    def conversation(self) -> list[dict[str, Any]]:
        """The messages as `tokenizer.apply_chat_template` takes them."""
        return [{"role": each.role, "content": each.content, **(each.more or {})} for each in self.messages]


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
    listed = next((record[name] for name in ("messages", "conversations", "conversation") if name in record), None)
    if listed is not None:
        messages = _messages(listed)
    elif "prompt" in record and "completion" in record:
        messages = _messages([*_turns(record["prompt"], "user"), *_turns(record["completion"], "assistant")])
    elif "instruction" in record and "output" in record:
        instruction, following = _text(record, "instruction"), _text(record, "input")
        prompt = "\n".join(part for part in (instruction, following) if part.strip())
        messages = (Message("user", prompt), Message("assistant", _text(record, "output")))
    else:
        fields = ", ".join(map(str, record)) or "none"
        raise MalformedPairError(
            "it has neither 'messages' nor 'conversations', 'prompt' and 'completion', or 'instruction' and 'output'; "
            f"its fields are: {fields}"
        )
    if not messages[-1].content.strip() and not (messages[-1].more or {}).get("tool_calls"):
        raise MalformedPairError("the answer is empty")
    if not next(message.content for message in messages if message.role == "user").strip():
        raise MalformedPairError("the prompt is empty")
    category, source = record.get("category"), record.get("source")
    return Pair(
        messages,
        category if isinstance(category, str) else "",
        source if isinstance(source, dict) else {},
        where,
        record.get("tools") or None,
    )


def _turns(value: Any, role: str) -> list[Any]:
    return value if isinstance(value, list) else [{"role": role, "content": value}]


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
    messages = tuple(_message(each) for each in value)
    roles = [message.role for message in messages]
    unknown = [role for role in roles if role not in ROLES]
    if unknown:
        raise MalformedPairError(f"role '{unknown[0]}' is none of {', '.join(ROLES)}")
    turns = roles[1:] if roles[:1] == ["system"] else roles
    may_follow = {"": "user", "user": "assistant", "assistant": "user tool", "tool": "tool assistant", "system": ""}
    follows = all(after in may_follow[before].split() for before, after in pairwise(["", *turns]))
    if not turns or not follows or turns[-1] != "assistant":
        raise MalformedPairError(
            f"its roles are {', '.join(roles[:9]) or 'none'}: they must be user and assistant in turn, to the assistant"
        )
    return messages


def _message(record: Mapping[str, Any]) -> Message:
    role = str(record.get("role", record.get("from")))
    role = _OTHER_NAMES.get(role, role)
    content = record.get("content") if "content" in record else record.get("value")
    if isinstance(content, list):  # of parts
        if any(not isinstance(part, dict) or not isinstance(part.get("text"), str) for part in content):
            raise MalformedPairError("a content is a list of parts that are not all text")
        content = "".join(part["text"] for part in content)
    more = {name: record[name] for name in _KEPT if record.get(name)}
    return Message(role, _text({"content": content}, "content"), more or None)


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
    named = {"tools": pair.tools, "category": pair.category, "source": dict(pair.source)}
    return {name: value for name, value in named.items() if value}
