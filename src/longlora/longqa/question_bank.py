"""The questions put to each section: the package's by kind of material (`assets/questions/`), or a user's YAML file."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources

from longlora.errors import UserError, check_choice
from longlora.longqa.prompts import BEGINNINGS
from longlora.whole_files import read_yaml


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


@cache
def questions(material: str) -> list[Question]:
    """The package's questions for `material` (`book`, `paper`, `material`)."""
    return read_questions(str(resources.files("longlora") / "assets" / "questions" / f"{material}.yaml"), material)


def check_categories(categories: Sequence[str], own: Sequence[Question] | None) -> None:
    """Raises UserError for a category that no bank (or not the user's `own`) has."""
    banks = [own] if own is not None else map(questions, BEGINNINGS)
    known = dict.fromkeys(each.category for bank in banks for each in bank)
    for category in categories:
        check_choice("category of --categories", category, known)


def read_questions(path: str, material: str = "own") -> list[Question]:
    """Questions from a YAML file `category: [question, …]`.

    Args:
        path: the file.
        material: first part of their ids.

    Raises:
        UserError: it cannot be read or is anything else.
    """
    bank = read_yaml("--questions", path)
    lists = bank.values() if isinstance(bank, dict) else [None]
    if not bank or not all(isinstance(each, list) and each and all(_is_text(one) for one in each) for each in lists):
        raise UserError(f"--questions {path} must hold `category: [question, …]` lines, a question or more in each.")
    return [
        Question(f"{material}/{category}/{number}", str(category), text.strip())
        for category, texts in bank.items()
        for number, text in enumerate(texts, start=1)
    ]


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


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
