r"""A document cut into sections of a token budget, at the most sensible place within reach.

                 half the budget        budget
    begin ───────────────┼────────○──────●──┼───────────    ○ paragraph   ● chapter: the cut, the highest rank wins
                         └──── window ──────┘

Ranks: chapter, heading, line in capitals, paragraph, line, sentence, word, anywhere; among places of one rank the
nearest to an even division of what is left wins, so that the last section is no crumb.
"""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from longlora.corpus.encoding import count_tokens, token_starts

CHARACTERS_A_TOKEN = 4
"""What a token counts without a tokenizer: English prose has 4 to 5 characters a token."""

_NUMBER = r"(?:[IVXLCDM]+|\d+|[Oo]ne|ONE|[Tt]he|THE|[A-Z][a-z]*(?:st|nd|rd|th)|[A-Z]+(?:ST|ND|RD|TH))\b"
_CHAPTER = re.compile(
    r"(?:(?<=\n\n)|\A)[ \t]*("
    r"\#[ \t]+[^\n]+"
    rf"|(?:chapter|book|part|act|volume|letter|canto|appendix|CHAPTER|BOOK|PART|ACT|VOLUME|LETTER|CANTO|APPENDIX"
    rf"|Chapter|Book|Part|Act|Volume|Letter|Canto|Appendix)[ \t]+{_NUMBER}[^\n]{{0,60}}"
    r"|CHAPTER[ \t]*\n[ \t]*[A-Z0-9]+"  # as in PDFs that Sphinx makes
    r"|(?:PROLOGUE|EPILOGUE|INTRODUCTION|PREFACE|Prologue|Epilogue|Introduction|Preface)[.:]?"
    r")[ \t]*$",
    re.MULTILINE,
)
_HEADING = re.compile(
    r"(?:(?<=\n\n)|\A)[ \t]*("
    r"\#{2,6}[ \t]+[^\n]+"
    r"|(?:SCENE|Scene|SECTION|Section)[ \t]+(?:[IVXLC]+|\d+)\b[^\n]{0,70}"
    r"|\d+(?:\.\d+)*\.?[ \t]+[A-Z][^\n]{2,70}(?<![.,;:])"
    r")[ \t]*$",
    re.MULTILINE,
)
_PAPER_HEADING = re.compile(  # a PDF's text has no blank lines that would set headings apart
    r"^[ \t]*((?:(?:\d+(?:\.\d+)*|[IVX]+)\.?[ \t]+)?(?:Abstract|Introduction|Related Works?|Background|Preliminaries"
    r"|Methods?|Methodology|Approach|Experiments?|Evaluation|Results|Discussion|Limitations?|Conclusions?"
    r"|Acknowledge?ments?|References|Bibliography|Appendix))[ \t]*$",
    re.MULTILINE | re.IGNORECASE,
)
_CAPITALS = re.compile(r"(?:(?<=\n\n)|\A)[ \t]*([A-Z][A-Z0-9 ,.'’:;&-]{3,70})[ \t]*$", re.MULTILINE)
_TEX_CHAPTER = re.compile(r"^[ \t]*(\\(?:chapter|part)\b[^\n]*)", re.MULTILINE)
_TEX_HEADING = re.compile(r"^[ \t]*(\\(?:sub)*sec(?:tion)?\b[^\n]*)", re.MULTILINE)
_HEADING_RANKS = (
    (2, _CAPITALS),
    (1, _HEADING),
    (1, _PAPER_HEADING),
    (1, _TEX_HEADING),
    (0, _CHAPTER),
    (0, _TEX_CHAPTER),
)
_LOWER_RANKS = (
    re.compile(r"(?<=\S)[^\S\n]*\n[^\S\n]*\n\s*+(?=\S)"),
    re.compile(r"\n(?=\S)"),
    re.compile(r"[.!?…。！？][\"'”’)\]]*(?:\s+|(?<=[。！？]))(?=\S)"),  # CJK sentences end without a blank
    re.compile(r"\s(?=\S)"),
)


@dataclass(frozen=True)
class Section:
    """A stretch of a document's text, without the blanks around it."""

    begin: int
    """Offset of its first character."""

    end: int
    """Offset after its last character."""

    tokens: int
    """Its tokens on its own, without special tokens."""

    heading: str
    """The chapter or heading it begins with or stands under; empty before the first."""


def count(text: str, tokenizer: Any = None) -> int:
    """Tokens of `text`; without a tokenizer one for every four characters."""
    return -(-len(text) // CHARACTERS_A_TOKEN) if tokenizer is None else count_tokens(tokenizer, text)


def cut(text: str, budget: int, tokenizer: Any = None) -> Iterator[Section]:
    """The sections of `text` in order, each of at most `budget` tokens; nothing but blanks lies between them."""
    starts = np.arange(0, len(text), CHARACTERS_A_TOKEN) if tokenizer is None else token_starts(tokenizer, text)
    headings = _headings(text)
    places = [place for place, _, _ in headings]
    begin = _skip_blanks(text, 0)
    while begin < len(text):
        end, tokens = _end(text, begin, budget, starts, headings, tokenizer)
        last = bisect_right(places, begin) - 1
        yield Section(begin, end, tokens, headings[last][2] if last >= 0 else "")
        begin = _skip_blanks(text, end)


def _end(
    text: str,
    begin: int,
    budget: int,
    starts: np.ndarray,
    headings: list[tuple[int, int, str]],
    tokenizer: Any,
) -> tuple[int, int]:
    """End of the section at `begin`, blanks left out, and its tokens, counted on its own text."""
    first = max(0, int(np.searchsorted(starts, begin, side="right")) - 1)  # the token that `begin` lies in
    left = len(starts) - first
    reach = budget
    while True:
        if left <= reach:
            end = len(text)
        else:
            parts = -(-left // reach)
            low, high, even = (
                int(starts[first + min(count, left - 1)]) for count in (reach // 2, reach, left // parts)
            )
            end = _best(text, max(low, begin + 1), max(high, begin + 1), even, headings)
        stripped = begin + len(text[begin:end].rstrip())
        tokens = count(text[begin:stripped], tokenizer)
        if tokens <= budget or reach == 1:
            return stripped, tokens
        # A text alone may have a token or two more than in its surroundings.
        reach = max(1, min(reach, left) - (tokens - budget))


def _best(text: str, low: int, high: int, even: int, headings: list[tuple[int, int, str]]) -> int:
    """The cut in [low, high]: of the highest rank that has any, the one nearest to `even`."""
    within = headings[bisect_left(headings, (low,)) : bisect_left(headings, (high + 1,))]
    for rank in (0, 1, 2):
        found = [place for place, of_rank, _ in within if of_rank == rank]
        if found:
            return min(found, key=lambda place: abs(place - even))
    for pattern in _LOWER_RANKS:
        found = [match.end() for match in pattern.finditer(text, max(low - 1, 0), min(high + 1, len(text)))]
        found = [place for place in found if low <= place <= high]
        if found:
            return min(found, key=lambda place: abs(place - even))
    return high


def _headings(text: str) -> list[tuple[int, int, str]]:
    """(offset, rank, words) of every heading, in order; rank 0 is a chapter."""
    found: dict[int, tuple[int, str]] = {}
    for rank, pattern in _HEADING_RANKS:
        for match in pattern.finditer(text):
            found[match.start(1)] = (rank, " ".join(match[1].lstrip("# \t").split())[:120])
    return [(place, rank, words) for place, (rank, words) in sorted(found.items())]


def _skip_blanks(text: str, at: int) -> int:
    match = re.compile(r"\s*").match(text, at)
    return match.end() if match else at


def chapters(text: str) -> int:
    """How many chapters (not lesser headings) `text` is divided into by its headings."""
    return sum(rank == 0 for _, rank, _ in _headings(text))
