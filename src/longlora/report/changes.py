"""Two perplexities on one text: which is lower, by how much, and how sure that is."""

from longlora.evaluation.statistics import Estimate, perplexity_change
from longlora.report.axes import drawable
from longlora.report.wording import change as size
from longlora.results import Measured

SAME = 0.005
"""Without intervals, perplexities that differ by less than this share are called equal."""


def same_text(one: Measured, other: Measured) -> bool:
    """Whether both were measured on the same documents, as far as the files tell."""
    if one.text and other.text:
        return one.text == other.text
    return not one.documents or not other.documents or one.documents == other.documents


def change(one: Measured, other: Measured) -> Estimate | None:
    """How much higher `one` is than `other`, as a share; None where they cannot be compared.

    It has an interval where both files have the sums of each document.
    """
    if not drawable(one.perplexity) or not drawable(other.perplexity) or not same_text(one, other):
        return None
    tokens = one.document_tokens
    paired = one.text and tokens == other.document_tokens and len(one.document_nll) == len(other.document_nll)
    if paired and len(tokens) == len(one.document_nll) > 0:
        return perplexity_change(one.document_nll, other.document_nll, tokens)
    return Estimate(one.perplexity / other.perplexity - 1, None, None)


def direction(found: Estimate) -> int:
    """1 for higher, -1 for lower, 0 where no difference is shown."""
    none_shown = found.is_zero if found.is_zero is not None else abs(found.value) <= SAME
    return 0 if none_shown else 1 if found.value > 0 else -1


def interval(found: Estimate) -> str:
    """The ends in words, as sizes of a change in the direction of its value, or nothing.

    >>> interval(Estimate(-0.052, -0.06, -0.041)), interval(Estimate(0.01, -0.01, 0.03))
    (' (95%: 4.1% to 6.0%)', ' (95%: -1.0% to 3.0%)')
    """
    if found.low is None or found.high is None:
        return ""
    ends = sorted(-end for end in (found.low, found.high)) if found.value < 0 else [found.low, found.high]
    least, most = (f"{'-' if end < 0 else ''}{size(end)}" for end in ends)
    return f" (95%: {least} to {most})"


def said(found: Estimate) -> str:
    """
    >>> said(Estimate(-0.052, -0.06, -0.041)), said(Estimate(0.001, None, None))
    ('5.2% lower (95%: 4.1% to 6.0%)', '0.1% higher')
    """
    return f"{size(found.value)} {'higher' if found.value > 0 else 'lower'}{interval(found)}"
