"""How sure a figure is: 95% intervals of means over documents, of shares of trials, and of both kinds of difference.

Documents, trials and seeds are what another measurement would draw anew, so they are what the intervals are over:

    perplexity        tokens of one document hang together; the mean is a ratio of sums, sum(nll) / sum(tokens), whose
                      variance comes from the documents' own deviations, with Student's t for Kish's effective number of
                      documents. Two models on the same text are compared document by document.
    accuracy          Wilson's interval (1927), at home at 0% and 100% too; two models on the same prompts are compared
                      prompt by prompt (Bonett and Price 2012).
    seeds             Student's t; one seed says nothing about another.

Resampling documents (a percentile bootstrap) covers 74% where there are three documents and 86% at eight; these
intervals cover 95% there (`tests/test_statistics.py`), are the same each time, and take no time.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

LEVEL = 0.95


class Estimate(NamedTuple):
    """A figure and the ends of its 95% interval; None where the data cannot tell, as for one document or seed."""

    value: float
    low: float | None
    high: float | None

    @property
    def is_zero(self) -> bool | None:
        """Whether zero is inside the interval, so that no difference is shown; None where that cannot be told."""
        return None if self.low is None or self.high is None else self.low <= 0 <= self.high


def mean_nll(nll: Sequence[float], tokens: Sequence[int]) -> Estimate:
    """Mean loss a token, in nats, from the sums of each document.

    >>> mean_nll([20.0, 31.0], [10, 10]).value
    2.55
    """
    sums, weights = np.asarray(nll, dtype=np.float64), np.asarray(tokens, dtype=np.float64)
    weights = weights / weights.sum()
    values = sums / np.asarray(tokens)
    mean = float(weights @ values)
    if len(values) < 2:
        return Estimate(mean, None, None)
    # Bell and McCaffrey (2002): residuals scaled so that the variance has no bias where documents are alike
    error = math.sqrt(float(np.sum((weights * (values - mean)) ** 2 / (1 - weights))))
    half = _t(1 / float(weights @ weights) - 1) * error
    return Estimate(mean, mean - half, mean + half)


def perplexity(nll: Sequence[float], tokens: Sequence[int]) -> Estimate:
    """exp of `mean_nll`."""
    return _mapped(mean_nll(nll, tokens), _exp)


def perplexity_change(nll: Sequence[float], before: Sequence[float], tokens: Sequence[int]) -> Estimate:
    """How much higher perplexity is than it was `before`, on the same documents: a share, such as 0.035.

    Raises:
        ValueError: the documents are not the same.
    """
    if not len(nll) == len(before) == len(tokens):
        raise ValueError(f"{len(nll)}, {len(before)} and {len(tokens)} documents cannot be paired")
    return _mapped(mean_nll(np.subtract(nll, before).tolist(), tokens), lambda value: _exp(value) - 1)


def share(mean: float, trials: int) -> Estimate:
    """A share of `trials` that are right, by Wilson.

    Where a trial can be right in part (RULER), or the mean is over several tasks of as many trials, the interval is
    wider than it need be, as neither varies more than right-or-wrong does.

    >>> [round(value, 3) for value in share(1.0, 5)]
    [1.0, 0.566, 1.0]
    """
    if not trials:
        return Estimate(mean, None, None)
    square = _normal() ** 2
    centre = (mean + square / (2 * trials)) / (1 + square / trials)
    half = math.sqrt(square * (mean * (1 - mean) / trials + square / (4 * trials**2))) / (1 + square / trials)
    return Estimate(mean, max(0.0, min(centre - half, mean)), min(1.0, max(centre + half, mean)))


def share_change(scores: Sequence[float], before: Sequence[float]) -> Estimate:
    """How much higher a mean score is than it was `before`, on the same prompts, as a share (0.02: two points).

    Args:
        scores: of each prompt, from 0 to 1.
        before: of the same prompts.

    Raises:
        ValueError: the prompts are not the same.
    """
    if len(scores) != len(before):
        raise ValueError(f"{len(scores)} and {len(before)} prompts cannot be paired")
    found = np.subtract(scores, before, dtype=np.float64)
    if not len(found):
        return Estimate(math.nan, None, None)
    # with one prompt more that changed for the better and one for the worse, the normal interval covers
    with_two = np.append(found, [1.0, -1.0])
    half = _normal() * math.sqrt(float(with_two.var()) / len(with_two))
    middle = float(with_two.mean())
    return Estimate(float(found.mean()), max(-1.0, middle - half), min(1.0, middle + half))


def share_change_apart(mean: float, trials: int, before: float, trials_before: int) -> Estimate:
    """As `share_change`, where which prompt came to what is not known, or the prompts differ (Newcombe 1998)."""
    after, earlier = share(mean, trials), share(before, trials_before)
    if after.low is None or after.high is None or earlier.low is None or earlier.high is None:
        return Estimate(mean - before, None, None)
    below = math.hypot(mean - after.low, earlier.high - before)
    above = math.hypot(after.high - mean, before - earlier.low)
    return Estimate(mean - before, mean - before - below, mean - before + above)


def over_seeds(values: Sequence[float]) -> Estimate:
    """The mean of one value a seed; for two arms with the same seeds, of their differences.

    >>> over_seeds([1.0]).low is None
    True
    """
    found = np.asarray(values, dtype=np.float64)
    mean = float(found.mean())
    if len(found) < 2:
        return Estimate(mean, None, None)
    half = _t(len(found) - 1) * float(found.std(ddof=1)) / math.sqrt(len(found))
    return Estimate(mean, mean - half, mean + half)


def _t(freedom: float) -> float:
    from scipy.special import stdtrit

    return float(stdtrit(max(freedom, 1.0), (1 + LEVEL) / 2))


def _normal() -> float:
    from scipy.special import ndtri

    return float(ndtri((1 + LEVEL) / 2))


def _exp(value: float) -> float:
    return math.exp(min(value, 700.0))


def _mapped(estimate: Estimate, rising: Callable[[float], float]) -> Estimate:
    value, low, high = estimate
    return Estimate(rising(value), None if low is None else rising(low), None if high is None else rising(high))
