"""LongEval's test cases: LongChat's own files, and new ones of any length in the same words.

    topics   Below is a record of our previous conversation on 5 different topics. … USER: I would like to discuss the
             topic of the psychology of creativity. … What is the first topic we discussed? …
    lines    Below is a record of lines I want you to remember. …
             line grotesque-classmate: REGISTER_CONTENT is <42527>
             …
             Now the record is over. Tell me what is the <REGISTER_CONTENT> in line torpid-kid? I need the number.

Source: `longeval/utils.py` of DachengLi1/LongChat and its files `10_topics.jsonl`, `200_lines.jsonl` and so on. The
words are in `assets/longeval.yaml`.
"""

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import wonderwords
import yaml

from longlora.errors import UserError

WORDS: dict[str, Any] = yaml.safe_load(
    (resources.files("longlora") / "assets" / "longeval.yaml").read_text(encoding="utf-8")
)
"""What prompts are made of."""

LARGEST_NUMBER = 50_000

EXCHANGES_A_TOPIC = 16
"""As many as make up a topic of LongChat's: 578 tokens of its files."""


@dataclass(frozen=True)
class Case:
    """One prompt, and what its answer should be."""

    number: int
    """Topics or lines in the prompt."""
    prompt: str
    expected: str
    """The first topic, or the number asked for."""
    others: tuple[str, ...]
    """Of topics, the others in the prompt; of lines, the name of the line asked for."""


def read_topics(file: str) -> list[Case]:
    """The cases of one of LongChat's topic files. Raises as `read_lines`."""
    cases = []
    for where, record in _records(file, {"prompt": str, "topics": list}):
        first, *others = record["topics"]
        if not all(isinstance(topic, str) for topic in record["topics"]):
            raise UserError(f"{where}: 'topics' is {record['topics']!r:.80}: it must be a list of topics.")
        cases.append(Case(1 + len(others), record["prompt"], first, tuple(others)))
    return cases


def read_lines(file: str) -> list[Case]:
    """The cases of one of LongChat's line files, in their order.

    Raises:
        UserError: the file cannot be read, holds no case, or a line of it is broken; the sentence names the line.
    """
    fields = {"prompt": str, "expected_number": int, "num_lines": int, "random_idx": list}
    return [
        Case(record["num_lines"], record["prompt"], str(record["expected_number"]), (str(record["random_idx"][0]),))
        for _, record in _records(file, fields)
    ]


def read_topic_list(file: str) -> list[tuple[str, str]]:
    """Topics and their conversations: LongChat's `conversations.jsonl`, or a text file with a topic a line.

    Raises:
        UserError: as `read_lines`.
    """
    if file.endswith(".jsonl"):
        records = _records(file, {"topic": str, "conversation": str})
        return [(record["topic"], record["conversation"]) for _, record in records]
    topics = [line.strip() for line in _read(file).splitlines() if line.strip()]
    if not topics:
        raise UserError(f"{file} holds no topic: give a topic a line.")
    return [(topic, conversation(topic)) for topic in topics]


def our_topics() -> list[tuple[str, str]]:
    """Topics of our own with their conversations, for those who have no list."""
    topics = [f"The {aspect} of {subject}" for subject in WORDS["subjects"] for aspect in WORDS["aspects"]]
    return [(topic, conversation(topic)) for topic in topics]


def conversation(topic: str) -> str:
    """A plain conversation about `topic`, with LongEval's first and last turns."""
    random, exchanges = np.random.default_rng(list(topic.encode())), WORDS["exchanges"]
    middle = "".join(
        " \n USER: {} \n ASSISTANT: {}".format(*exchanges[at])
        for at in random.permutation(len(exchanges))[:EXCHANGES_A_TOPIC]
    )
    return (
        f"USER: I would like to discuss the topic of {topic[:1].lower()}{topic[1:]}. \n ASSISTANT: Sure, I'd be happy "
        f"to talk about that with you! What would you like to know?{middle} \n USER: Great, this is the end of our "
        f"discussion on the topic {topic}, let's talk about the next topic."
    )


def make_topics(conversations: Sequence[tuple[str, str]], number: int, trial: int, seed: int) -> Case:
    """A case of `number` of the topics, in random order, none twice.

    Raises:
        UserError: there are fewer topics.
    """
    if number > len(conversations):
        raise UserError(
            f"--topics is {number}, and there are {len(conversations)} topics to choose from: give a longer "
            "--topic-list, or fewer topics."
        )
    random = np.random.default_rng([seed, number, trial])
    chosen = [conversations[at] for at in random.permutation(len(conversations))[:number]]
    prompt = WORDS["topics_begin"].format(number=number) + "".join(text for _, text in chosen) + WORDS["topics_end"]
    first, *others = (topic for topic, _ in chosen)
    return Case(number, prompt, first, tuple(others))


def make_lines(number: int, trial: int, seed: int) -> Case:
    """A case of `number` lines with random names and numbers, one of which is asked for.

    A name is an adjective and a noun, as LongEval's `LRT-NL`; adjectives come again when they are used up.
    """
    random = np.random.default_rng([seed, number, trial])
    adjectives, nouns = (random.permutation(_words(kind)).tolist() for kind in ("adjective", "noun"))
    names: dict[str, None] = {}
    for at in itertools.count():
        if len(names) == number:
            break
        # the second step keeps pairs apart once all nouns have been used
        noun = nouns[(at + at // len(nouns)) % len(nouns)]
        names[f"{adjectives[at % len(adjectives)]}-{noun}"] = None
    numbers = random.integers(1, LARGEST_NUMBER, size=number, endpoint=True).tolist()
    asked = int(random.integers(len(names)))
    name = list(names)[asked]
    return Case(number, lines_prompt(list(zip(names, numbers, strict=True)), name), str(numbers[asked]), (name,))


def lines_prompt(lines: Sequence[tuple[str, int]], asked: str) -> str:
    """The prompt that holds `lines`, each a name and a number, and asks for the line of name `asked`."""
    record = "".join(WORDS["line"].format(name=name, number=number) for name, number in lines)
    return WORDS["lines_begin"] + record + WORDS["lines_end"].format(name=asked)


@lru_cache
def _words(kind: str) -> list[str]:
    return sorted(set(wonderwords.RandomWord().filter(include_categories=[kind])))


def _read(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UserError(f"{file} cannot be read ({reason}): name a file of test cases.") from error


def _records(file: str, fields: Mapping[str, type]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where it stands, and the record, for each line of a JSONL file that is not empty; it has `fields`, none empty."""
    lines = [(f"{file}, line {number}", line) for number, line in enumerate(_read(file).split("\n"), 1) if line.strip()]
    if not lines:
        raise UserError(f"{file} holds no case: name a file with one JSON record a line.")
    kinds = {str: "text", int: "a whole number", list: "a list"}
    for where, line in lines:
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{where} is not JSON ({error.msg} at column {error.colno}): mend or remove it.") from error
        for name, kind in fields.items():
            if not isinstance(record, dict) or name not in record:
                raise UserError(
                    f"{where} lacks '{name}': a case has {', '.join(fields)}; is it a file of another task?"
                )
            value = record[name]
            if not isinstance(value, kind) or (kind is not int and not value):
                raise UserError(f"{where}: '{name}' is {value!r:.40}: it must be {kinds[kind]}.")
        yield where, record
