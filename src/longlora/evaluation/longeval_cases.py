"""LongEval's test cases: LongChat's own files, and new ones of any length in the same words.

    topics   Below is a record of our previous conversation on 5 different topics. … USER: I would like to discuss the
             topic of the psychology of creativity. … What is the first topic we discussed? …
    lines    Below is a record of lines I want you to remember. …
             line grotesque-classmate: REGISTER_CONTENT is <42527>
             …
             Now the record is over. Tell me what is the <REGISTER_CONTENT> in line torpid-kid? I need the number.

Source: `longeval/utils.py` of DachengLi1/LongChat and its files `10_topics.jsonl`, `200_lines.jsonl` and so on, whose
wording differs from that code in two places; the files are followed.
"""

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import wonderwords

from longlora.errors import UserError

TOPICS_BEGIN = (
    "Below is a record of our previous conversation on {number} different topics. You are the ASSISTANT, and I am the "
    "USER. At the beginning of each topic, the USER will say 'I would like to discuss the topic of <TOPIC>'. Memorize "
    "each <TOPIC>. At the end of the record, I will ask you to retrieve the first topic. Now the record start. "
)
TOPICS_END = (
    " Now the record ends. What is the first topic we discussed? Only give me the topic name. Do not summarize "
    "yourself."
)
LINES_BEGIN = (
    "Below is a record of lines I want you to remember. Each line begins with 'line <line index>' and contains a "
    "'<REGISTER_CONTENT>' at the end of the line as a numerical value. For each line index, memorize its "
    "corresponding <REGISTER_CONTENT>. At the end of the record, I will ask you to retrieve the corresponding "
    "<REGISTER_CONTENT> of a certain line index. Now the record start:\n\n"
)
LINE = "line {name}: REGISTER_CONTENT is <{number}>\n"
LINES_END = "\nNow the record is over. Tell me what is the <REGISTER_CONTENT> in line {name}? I need the number. "
LARGEST_NUMBER = 50_000

ASPECTS = ("history", "future", "economics", "psychology", "science", "ethics", "teaching", "art")
SUBJECTS = (
    "bridge building,bread baking,bird migration,clock making,coral reefs,deep sea fishing,early photography,"
    "folk music,glass blowing,honey bees,kite flying,long distance running,map making,mountain railways,night skies,"
    "ocean tides,paper recycling,public libraries,rain forests,river trade,sign language,stage lighting,street markets,"
    "tea growing,urban gardens,volcanoes,water mills,winter sports,wool weaving,word puzzles"
).split(",")
EXCHANGES = (
    ("What makes people care about it?", "Most people come to it through somebody they know, and stay for the people."),
    ("How long does it take to learn the basics?", "A few weeks of patient practice are usually enough for a start."),
    (
        "Has it changed much in the last century?",
        "Very much: new tools came in, prices fell, and far more people joined.",
    ),
    (
        "Is there anything that beginners get wrong?",
        "They often hurry, and skip the slow parts that matter in the end.",
    ),
    ("What would an expert look at first?", "At the small details, because the large ones are easy to get right."),
    ("Does it differ between countries?", "It does, with climate and custom, though the main ideas are the same."),
    ("What does it cost?", "Less than one might think, if one borrows what is rarely needed."),
    ("Which mistakes are the expensive ones?", "Those that nobody notices for years, so regular checks pay off."),
    ("Can one person do it alone?", "One person can begin, but it goes better and is more fun with others."),
    ("What is still not understood?", "A good deal: careful records are young, and some old claims were never tested."),
    (
        "Are there good books about it?",
        "A few classics, though the best introductions today are short films and visits.",
    ),
    ("Who were the pioneers?", "Mostly people with other trades, who had time in the evening and neighbours to ask."),
    ("Does the weather matter?", "Less than it once did, but the old hands still plan the year around the seasons."),
    ("How do people usually meet?", "In clubs and at fairs, and more and more in small groups that form over the net."),
    (
        "Is it something for children?",
        "Yes, if somebody shows them the first steps and then lets them try by themselves.",
    ),
    ("What do the critics say?", "That it takes more time than it gives back, which depends on what one counts."),
    ("Which tools are really needed?", "Three or four good ones; most of the others are bought once and never used."),
    ("How is quality judged?", "By eye first, then by use over years, and only in contests by written rules."),
    ("Is there money in it?", "For a handful of people; for everybody else it is a pleasure that costs a little."),
    (
        "Will machines take it over?",
        "They have taken the dull parts, and that has brought many people back to the rest.",
    ),
    (
        "Where should one travel to see it?",
        "To the smaller towns, where the people who do it still have time for visitors.",
    ),
)
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
    for where, record in _records(file, ("prompt", "topics")):
        topics = record["topics"]
        if not isinstance(topics, list) or not topics or not all(isinstance(topic, str) for topic in topics):
            raise UserError(f"{where}: 'topics' is {topics!r:.80}: it must be a list of topics, the first one first.")
        cases.append(Case(len(topics), _text(where, record, "prompt"), topics[0], tuple(topics[1:])))
    return cases


def read_lines(file: str) -> list[Case]:
    """The cases of one of LongChat's line files, in their order.

    Raises:
        UserError: the file cannot be read, holds no case, or a line of it is broken; the sentence names the line.
    """
    cases = []
    for where, record in _records(file, ("prompt", "expected_number", "num_lines", "random_idx")):
        expected, number, asked = record["expected_number"], record["num_lines"], record["random_idx"]
        if not isinstance(expected, int) or not isinstance(number, int) or not isinstance(asked, list) or not asked:
            raise UserError(
                f"{where}: 'expected_number' and 'num_lines' must be whole numbers and 'random_idx' a list of the "
                f"line's name and place; they are {expected!r:.40}, {number!r:.40} and {asked!r:.40}."
            )
        cases.append(Case(number, _text(where, record, "prompt"), str(expected), (str(asked[0]),)))
    return cases


def read_topic_list(file: str) -> list[tuple[str, str]]:
    """Topics and their conversations: LongChat's `conversations.jsonl`, or a text file with a topic a line.

    Raises:
        UserError: as `read_lines`.
    """
    if file.endswith(".jsonl"):
        records = _records(file, ("topic", "conversation"))
        return [(_text(where, record, "topic"), _text(where, record, "conversation")) for where, record in records]
    topics = [line.strip() for line in _read(file).splitlines() if line.strip()]
    if not topics:
        raise UserError(f"{file} holds no topic: give a topic a line.")
    return [(topic, conversation(topic)) for topic in topics]


def our_topics() -> list[tuple[str, str]]:
    """Topics of our own with their conversations, for those who have no list."""
    topics = [f"The {aspect} of {subject}" for subject in SUBJECTS for aspect in ASPECTS]
    return [(topic, conversation(topic)) for topic in topics]


def conversation(topic: str) -> str:
    """A plain conversation about `topic`, with LongEval's first and last turns."""
    random = np.random.default_rng(list(topic.encode()))
    middle = "".join(
        f" \n USER: {EXCHANGES[at][0]} \n ASSISTANT: {EXCHANGES[at][1]}"
        for at in random.permutation(len(EXCHANGES))[:EXCHANGES_A_TOPIC]
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
    prompt = TOPICS_BEGIN.format(number=number) + "".join(text for _, text in chosen) + TOPICS_END
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
    record = "".join(LINE.format(name=name, number=number) for name, number in lines)
    return LINES_BEGIN + record + LINES_END.format(name=asked)


@lru_cache
def _words(kind: str) -> list[str]:
    return sorted(set(wonderwords.RandomWord().filter(include_categories=[kind])))


def _read(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UserError(f"{file} cannot be read ({reason}): name a file of test cases.") from error


def _records(file: str, needed: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where it stands, and the record, for each line of a JSONL file that is not empty."""
    empty = True
    for number, line in enumerate(_read(file).split("\n"), 1):
        where = f"{file}, line {number}"
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{where} is not JSON ({error.msg} at column {error.colno}): mend or remove it.") from error
        missing = [name for name in needed if not isinstance(record, dict) or name not in record]
        if missing:
            raise UserError(
                f"{where} lacks '{missing[0]}': a case has {', '.join(needed)}; is it a file of another task?"
            )
        empty = False
        yield where, record
    if empty:
        raise UserError(f"{file} holds no case: name a file with one JSON record a line.")


def _text(where: str, record: dict[str, Any], name: str) -> str:
    if not isinstance(record[name], str) or not record[name]:
        raise UserError(f"{where}: '{name}' is {record[name]!r:.40}: it must be text.")
    return record[name]
