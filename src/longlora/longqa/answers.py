"""Whether an answer of a teacher is fit to train on: what is useless is said in a word, an answer cut short is trimmed.

The measure of repetition is the share of 4-grams of words that the answer has said before. In prose it is low: of 660
windows of 60 to 400 words from novels, plays and speeches the highest has 0.12.
"""

import re
from dataclasses import dataclass

MOST_REPEATED = 0.3
"""Share of repeated 4-grams of words above which an answer goes round in circles."""

LEAST_LETTERS = 10
"""Letters and digits below which an answer to any question of the bank says nothing."""

_THOUGHTS = re.compile(r"^\s*<think(?:ing)?>.*?(?:</think(?:ing)?>|\Z)", re.DOTALL)
_WORD = re.compile(r"[぀-ヿ㐀-鿿가-힯]|\w+")  # scripts without blanks: a character is a word
_LAST_SENTENCE_END = re.compile(r".*[.!?。！？…][\"'”’)\]]*", re.DOTALL)
_REFUSAL = re.compile(
    r"\b(?:as an? (?:ai|artificial intelligence|(?:large )?language model)\b"
    r"|(?:i am|i['’]m) (?:sorry,? but|unable to|not able to)"
    r"|i apologi[sz]e"
    r"|i (?:can ?not|can['’]t|could ?n[o'’]t) (?:answer|provide|help|assist|access|find|see|read|determine|summari[sz]e"
    r"|describe|fulfil|comply|do that)"
    r"|i (?:do not|don['’]t) (?:have (?:access|enough|any|the)|see (?:any|the|a))"
    r"|(?:please|could you) (?:provide|share|paste|upload)"
    r"|(?:no|the) (?:text|material|book|document|content) (?:was|is|has) (?:not|never)? ?(?:been )?"
    r"(?:provided|given|attached|included))",
    re.IGNORECASE,
)
_REFUSAL_WITHIN = 160
"""Characters from the beginning in which a refusal stands; later a character of the book may be speaking."""


@dataclass(frozen=True)
class Answer:
    """What a teacher said to one question."""

    text: str
    """The answer, trimmed; empty if the teacher gave none."""

    problem: str = ""
    """Why it is of no use, in a word or two (`refusal`, `timeout`); empty if it is of use."""

    detail: str = ""
    """More about the problem, for the log."""

    cut: bool = False
    """It reached the most tokens an answer may have, and was trimmed to its last whole sentence."""

    prompt_tokens: int = 0
    """Tokens the teacher read, as far as it says so."""

    answer_tokens: int = 0
    """Tokens the teacher wrote, as far as it says so."""


def judged(text: str, prompt: str, *, cut: bool = False, prompt_tokens: int = 0, answer_tokens: int = 0) -> Answer:
    """The answer in `text`, as the teacher wrote it, without its thoughts, and whether it is of use.

    Args:
        text: what the teacher wrote.
        prompt: what it was asked.
        cut: it wrote as much as it may, so that its last sentence is not whole.
        prompt_tokens: see `Answer`.
        answer_tokens: see `Answer`.
    """
    text = _THOUGHTS.sub("", text).strip()
    problem = _problem(text, prompt)
    if cut and not problem:
        whole = _LAST_SENTENCE_END.match(text)
        text = whole[0].strip() if whole else ""
        problem = "" if _letters(text) >= LEAST_LETTERS else "cut short"
    return Answer(text, problem, text[:120], cut, prompt_tokens, answer_tokens)


def _problem(text: str, prompt: str) -> str:
    if _letters(text) < LEAST_LETTERS:
        return "empty"
    if _REFUSAL.search(text[:_REFUSAL_WITHIN]):
        return "refusal"
    if repetition(text) > MOST_REPEATED:
        return "repetition"
    if plain(text) in plain(prompt.rpartition("\n")[2]):  # "Now the material ends." and the question
        return "echo"
    return ""


def _letters(text: str) -> int:
    return sum(character.isalnum() for character in text)


def plain(text: str) -> str:
    """`text` as far as it tells two texts apart: without case and spacing."""
    return " ".join(text.casefold().split())


def repetition(text: str) -> float:
    """Share of the 4-grams of words that stood in `text` before; 0 for fewer than 20 words.

    >>> repetition("one two three four " * 5), repetition("nothing is said twice here")
    (0.7647058823529411, 0.0)
    """
    words = [word.casefold() for word in _WORD.findall(text)]
    if len(words) < 20:
        return 0.0
    grams = list(zip(words, words[1:], words[2:], words[3:], strict=False))
    return 1 - len(set(grams)) / len(grams)
