"""The questions put to each section, by kind of material and category; those a user brings in a YAML file.

The categories are the paper's (appendix on LongAlpaca: summaries, relationships and characters of books; contribution,
novelty and limitations of papers), the first question of each is worded as in its demo. `{it}` becomes "the book" or,
for a section, "this part of the book".
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import yaml

from longlora.errors import UserError, check_choice

_SUMMARY = [
    "Please summarize {it} in one paragraph.",
    "What happens in {it}? Tell it briefly, in order.",
    "Write an abstract of {it} for a reader who has no time to read it.",
]
_IDEA = [
    "Please tell me what high-level idea the author wants to indicate in {it}.",
    "What is the central theme of {it}, and where does it show?",
    "What should a reader take away from {it}?",
]
_DETAILS = [
    "Where and when does {it} take place, and how can one tell?",
    "Name three details of {it} that are easily overlooked, and say why they matter.",
    "What is the turning point of {it}, and what leads to it?",
    "Which facts, names and numbers does {it} give?",
]
BANK: Mapping[str, Mapping[str, Sequence[str]]] = {
    "book": {
        "summary": _SUMMARY,
        "idea": _IDEA,
        "relationships": [
            "Please describe the relationship among the roles in {it}.",
            "Who is on whose side in {it}, and why?",
            "How does the relationship between the two most important people change in {it}?",
        ],
        "characters": [
            "Who are the main characters of {it}, and what does each of them want?",
            "Describe the character who speaks or acts most in {it}.",
            "What do we learn in {it} about the feelings of its main character?",
        ],
        "details": _DETAILS[:3],
    },
    "paper": {
        "summary": [
            "Please summarize {it} in one paragraph.",
            "Explain {it} to a student of another field.",
        ],
        "contribution": [
            "What is the main contribution of {it}?",
            "Which problem does {it} solve, and who benefits?",
        ],
        "novelty": [
            "What is new in {it} compared with earlier work?",
            "On which earlier ideas does {it} build, and where does it depart from them?",
        ],
        "limitation": [
            "What are the limitations of {it}?",
            "Which assumptions does {it} make, and when would they fail?",
        ],
        "method": [
            "How does the method of {it} work? Explain it step by step.",
            "How do the authors of {it} support their claims?",
        ],
        "details": [
            "Which data, measures and results does {it} report?",
            "Which facts, names and numbers does {it} give?",
        ],
    },
    "material": {
        "summary": _SUMMARY,
        "idea": _IDEA,
        "structure": [
            "How is {it} organised, and how do its parts hang together?",
            "Which terms does {it} introduce, and what do they mean?",
        ],
        "argument": [
            "What does the author of {it} argue or explain, and with what reasons?",
            "What does {it} say ought to be done, and why?",
        ],
        "details": _DETAILS[1:],
    },
}


@dataclass(frozen=True)
class Question:
    """A question of the bank."""

    id: str
    """`book/summary/1`: kind of material (`own` for a user's), category, place in its list from 1."""

    category: str

    text: str
    """With `{it}` where the material is named."""

    def about(self, material: str, part: bool) -> str:
        """The question about a whole `material` or, if `part`, a section of it."""
        return self.text.replace("{it}", f"this part of the {material}" if part else f"the {material}")


def questions(material: str, categories: Sequence[str] = ()) -> list[Question]:
    """The questions for `material` (`book`, `paper`, `material`), of `categories` only where there are any."""
    return _listed(material, BANK[material], categories)


def check_categories(categories: Sequence[str], own: Sequence[Question] | None) -> None:
    """Raises UserError for a category that no bank (or not the user's `own`) has."""
    known = [each.category for each in own] if own is not None else [name for bank in BANK.values() for name in bank]
    for category in categories:
        check_choice("category of --categories", category, dict.fromkeys(known))


def read_questions(path: str) -> list[Question]:
    """The user's questions from a YAML file `category: [question, …]`.

    Raises:
        UserError: it cannot be read or is anything else.
    """
    try:
        with open(path, encoding="utf-8") as file:
            bank = yaml.safe_load(file)
    except OSError as error:
        raise UserError(f"--questions {path} cannot be read ({error.strerror}): name a YAML file.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--questions {path} is not YAML: {' '.join(str(error).split())}.") from error
    lists = bank.values() if isinstance(bank, dict) else [None]
    if not bank or not all(isinstance(each, list) and each and all(_is_text(one) for one in each) for each in lists):
        raise UserError(f"--questions {path} must hold `category: [question, …]` lines, a question or more in each.")
    return _listed("own", {str(category): each for category, each in bank.items()}, ())


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _listed(material: str, bank: Mapping[str, Sequence[str]], categories: Sequence[str]) -> list[Question]:
    return [
        Question(f"{material}/{category}/{number}", category, text.strip())
        for category, texts in bank.items()
        if not categories or category in categories
        for number, text in enumerate(texts, start=1)
    ]


def choose(bank: Sequence[Question], a_section: int, seed: str) -> Iterator[list[Question]]:
    """For one section after another `a_section` different questions (all, where the bank has fewer).

    Categories take turns from section to section in an order drawn from `seed`, so that each has its share of a
    document; which of its questions is drawn anew each time.
    """
    draw = random.Random(seed)
    order = list(dict.fromkeys(question.category for question in bank))
    draw.shuffle(order)
    turn = 0
    while True:
        left = list(bank)
        chosen: list[Question] = []
        while left and len(chosen) < a_section:
            of_category = [question for question in left if question.category == order[turn % len(order)]]
            turn += 1
            if of_category:
                chosen.append(draw.choice(of_category))
                left.remove(chosen[-1])
        yield chosen
