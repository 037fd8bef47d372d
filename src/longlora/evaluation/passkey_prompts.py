"""The passkey prompt of LongLoRA (`passkey_retrivial.py`), which is Landmark Attention's: five parts, a line each.

    There is an important info hidden inside a lot of irrelevant text. …     what to do
    The grass is green. The sky is blue. The sun is yellow. …                filler
    The pass key is 48122. Remember it. 48122 is the pass key.               the key
    The grass is green. The sky is blue. …                                   filler, from its start again
    What is the pass key? The pass key is                                    the question, and how its answer begins

Filler is cut by characters, so any length is possible; keys are 1 to 49,999. With several keys each has a name and a
line of its own, with filler between.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. I will quiz you "
    "about the important information there."
)
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
ABOVE_ANY_KEY = 50_000
NAMES = (
    "alpha bravo charlie delta echo foxtrot golf hotel india juliett kilo lima mike november oscar papa quebec romeo "
    "sierra tango uniform victor whiskey xray yankee zulu"
).split()


@dataclass(frozen=True)
class Hidden:
    """One line with a key."""

    key: int
    place: float
    """0 before all of the filler, 1 after it."""
    name: str | None = None

    @property
    def line(self) -> str:
        of = f" of {self.name}" if self.name else ""
        return f"The pass key{of} is {self.key}. Remember it. {self.key} is the pass key{of}."

    @property
    def question(self) -> str:
        return f"What is the pass key of {self.name}?" if self.name else "What is the pass key?"

    @property
    def opening(self) -> str:
        """The words an answer begins with."""
        return f"The pass key of {self.name} is" if self.name else "The pass key is"


def filler(characters: int) -> str:
    """The first `characters` characters of the filler, which never ends.

    >>> filler(19), len(filler(1000))
    ('The grass is green.', 1000)
    """
    return " ".join([FILLER] * (characters // len(FILLER) + 1))[:characters]


def prompt(hidden: Sequence[Hidden], asked: Hidden, characters: int) -> str:
    """The prompt up to the question's `opening`, with `characters` characters of filler in all."""
    lines, begin = [TASK], 0
    for each in sorted(hidden, key=lambda each: each.place):
        end = round(each.place * characters)
        lines += [filler(end - begin), each.line]
        begin = end
    return "\n".join([*lines, filler(characters - begin), asked.question])


def original_prompt(characters: int, seed: int) -> tuple[Hidden, str]:
    """Key and prompt as the original draws them, with NumPy's legacy generator.

    Raises:
        ValueError: `characters` is 0: the original has nowhere to put the key then.
    """
    random = np.random.RandomState(seed)
    prefix = int(random.randint(0, characters))
    hidden = Hidden(int(random.randint(1, ABOVE_ANY_KEY)), prefix / characters)
    return hidden, prompt([hidden], hidden, characters)


def draw_keys(keys: int, place: float, random: np.random.Generator) -> list[Hidden]:
    """`keys` different keys, the first one (which is asked for) at `place`, the others anywhere."""
    found = [int(key) for key in random.choice(ABOVE_ANY_KEY - 1, size=keys, replace=False) + 1]
    if keys == 1:
        return [Hidden(found[0], place)]
    names = [NAMES[at] for at in random.permutation(len(NAMES))[:keys]]
    places = [place, *random.random(keys - 1).tolist()]
    return [Hidden(*each) for each in zip(found, places, names, strict=True)]


def filled(written: Callable[[int], np.ndarray], budget: int, guess: int | None = None) -> tuple[np.ndarray, int]:
    """The prompt of exactly `budget` tokens, and its characters of filler.

    Where no number of characters gives `budget` tokens (two merge into one at the cut), the prompt is the longest
    below; where even without filler there are more, it is the one without, for the caller to count as not fitting.

    Args:
        written: token ids (N,) of the prompt with so many characters of filler.
        budget: tokens of the prompt.
        guess: characters to try first, such as those of a prompt like it.
    """
    shortest = written(0)
    low, low_tokens = 0, shortest
    if len(low_tokens) >= budget:
        return shortest, 0
    high, high_tokens = None, shortest
    tried = guess or 4 * (budget - len(shortest))
    while high is None or high - low > 1:
        tokens = written(tried)
        if len(tokens) == budget:
            return tokens, tried
        if len(tokens) < budget:
            low, low_tokens = tried, tokens
        else:
            high, high_tokens = tried, tokens
        if high is None:
            tried = max(low + 1, round(low * 1.1 * budget / len(low_tokens)))
        else:
            slope = (high - low) / max(1, len(high_tokens) - len(low_tokens))
            tried = min(max(low + 1, low + round(slope * (budget - len(low_tokens)))), high - 1)
    nearby = (written(low + step) for step in range(2, 20))
    return next((tokens for tokens in nearby if len(tokens) == budget), low_tokens), low
