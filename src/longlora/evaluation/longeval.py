"""`longlora eval topics` and `longlora eval lines`: LongEval, the coarse and the fine retrieval of the paper's table 6.

An instruction model is asked through its chat template and judged by what it says; a model without one goes on from
the words that LongEval gives to a base model (mpt-7b-storywriter), up to the end of the line.
"""

import functools
import hashlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from transformers import PreTrainedConfig

from longlora.errors import UserError
from longlora.evaluation.longeval_cases import (
    Case,
    make_lines,
    make_topics,
    our_topics,
    read_lines,
    read_topic_list,
    read_topics,
)
from longlora.evaluation.prompting import PromptFormat
from longlora.evaluation.results import Document
from longlora.evaluation.retrieval import Question, Task, ask_models, footing, window_of
from longlora.evaluation.tables import result_table, shown
from longlora.settings import LinesSettings, LongEvalSettings, TopicsSettings

TOPICS = (5, 10, 15, 20, 25)
LINES = (200, 300, 400, 500, 600, 680)
"""LongEval's own lengths (`longeval/eval.py`)."""

TOPIC_TOKENS, LINE_TOKENS = 50, 100
"""Tokens of an answer (`longeval/utils.py`)."""


def evaluate_topics(settings: TopicsSettings) -> Document:
    """Run `longlora eval topics`.

    Returns:
        `{"model", "task": "topics", …, "results": [{"context", "topics", "accuracy", "trials", "skipped", "tokens"}]}`
        where `context` is the mean prompt length in tokens; several models as in `retrieval.ask_models`.

    Raises:
        UserError: a broken line of a test-case file, or a model, tokenizer or number that does not serve.
    """
    conversations = read_topic_list(settings.topic_list) if settings.topic_list else our_topics()
    make = functools.partial(make_topics, conversations)
    cases = _cases(settings, "topics", settings.topics, TOPICS, read_topics, make)
    return _evaluate(settings, "topics", cases, TOPIC_TOKENS, names_first_topic, _topic_opening)


def evaluate_lines(settings: LinesSettings) -> Document:
    """Run `longlora eval lines`; as `evaluate_topics`, with `lines` in place of `topics`."""
    cases = _cases(settings, "lines", settings.lines, LINES, read_lines, make_lines)
    return _evaluate(settings, "lines", cases, LINE_TOKENS, gives_number, _line_opening)


def gives_number(answer: str, case: Case) -> bool:
    """LongEval's score for lines: the last number in the answer is the one asked for.

    >>> gives_number("The <REGISTER_CONTENT> in line torpid-kid is <2416>.", Case(200, "…", "2416", ("torpid-kid",)))
    True
    """
    numbers = re.findall(r"\d+", answer)
    return bool(numbers) and int(numbers[-1]) == int(case.expected)


def names_first_topic(answer: str, case: Case) -> bool:
    """Whether the first of the case's topics to be named in the answer is the first topic.

    LongEval asks GPT-3.5 to judge, which is to overlook paraphrases, capitals and punctuation; this overlooks capitals,
    punctuation and articles.

    >>> case = Case(2, "…", "The psychology of creativity", ("The role of art in society",))
    >>> names_first_topic("The first topic was “psychology of creativity”.", case)
    True
    """
    said = _plain(answer)
    places = {topic: said.find(_plain(topic)) for topic in (case.expected, *case.others)}
    named = {topic: place for topic, place in places.items() if place >= 0}
    return bool(named) and min(named, key=lambda topic: (named[topic], -len(topic))) == case.expected


def _plain(text: str) -> str:
    """Lower case words without articles, a space around each."""
    words = re.findall(r"[^\W_]+", text.lower())
    return " " + " ".join(word for word in words if word not in ("a", "an", "the")) + " "


def _topic_opening(case: Case) -> tuple[str, str]:
    """What stands before a base model's answer, and the words it begins with."""
    return "\n ASSISTANT: ", "The first topic is"


def _line_opening(case: Case) -> tuple[str, str]:
    return "", f"Line <{case.others[0]}>: <REGISTER_CONTENT> is"


def _cases(
    settings: LongEvalSettings,
    what: str,
    numbers: Sequence[int],
    usual: Sequence[int],
    read: Callable[[str], list[Case]],
    make: Callable[[int, int, int], Case],
) -> list[Case]:
    """The cases of `--data`, or new ones, of each length as many as there are trials."""
    if not settings.data:
        return [make(number, trial, settings.seed) for number in numbers or usual for trial in range(settings.trials)]
    found: dict[int, list[Case]] = {}
    for file in settings.data:
        for case in read(file):
            found.setdefault(case.number, []).append(case)
    for number in numbers:
        if number not in found:
            raise UserError(
                f"--{what} is {number}, and the files of --data hold cases with {', '.join(map(str, sorted(found)))}: "
                "leave it out, or name a file that has them."
            )
    return [case for number in numbers or sorted(found) for case in found[number][: settings.trials]]


def _evaluate(
    settings: LongEvalSettings,
    what: str,
    cases: list[Case],
    max_new_tokens: int,
    judge: Callable[[str, Case], bool],
    opening: Callable[[Case], tuple[str, str]],
) -> Document:
    def make_task(form: PromptFormat, config: PreTrainedConfig) -> Task:
        limit = settings.max_context or window_of(config, "--max-context")
        questions = []
        for case in cases:
            joint, words = opening(case)
            tokens = form.tokens(case.prompt) if form.chat else form.tokens(case.prompt, words, joint)
            questions.append(
                Question(
                    # named by its text, so that a file with other cases is never taken for this one
                    trial=f"{case.number}/{hashlib.sha256(case.prompt.encode()).hexdigest()[:16]}",
                    cell={what: case.number},
                    tokens=tokens,
                    limit=limit,
                    expected=case.expected,
                    right=lambda answer, case=case: judge(form.text(answer), case),  # type: ignore[misc]
                )
            )
        return Task(
            questions=questions,
            max_new_tokens=max_new_tokens,
            about={"seed": None if settings.data else settings.seed, "data": _data_names(settings)},
            stop=None if form.chat else lambda answer: "\n" in form.text(answer).lstrip(),
        )

    return ask_models(what, settings, make_task, functools.partial(accuracy_table, what=what), key=what)


def _data_names(settings: LongEvalSettings) -> list[str]:
    """What the cases come from, without where it lies."""
    topic_list = getattr(settings, "topic_list", None)
    return [Path(file).name for file in (*settings.data, *([topic_list] if topic_list else []))] or ["new cases"]


def accuracy_table(documents: Sequence[Document], what: str) -> str:
    """Accuracy in per cent for people: a line a model, a column a length."""
    lines = [
        result_table(documents, f"% right, of {what}", lambda result: shown(result, "accuracy", 0, 100), what),
        result_table(documents[:1], "tokens a prompt", lambda result: f"{result['tokens']:,}", what),
    ]
    for document in documents:
        seed = "" if document["seed"] is None else f", seed {document['seed']}"
        lines.append(footing(document, f"{document['label']}: {', '.join(document['data'])}{seed}"))
    return "\n".join(lines)
