"""Intervals that cover what they promise, and comparisons that call a difference no oftener than they may."""

import math

import numpy as np
import pytest
from scipy import stats

from longlora.evaluation import statistics
from longlora.evaluation.statistics import Estimate

SIMULATIONS = 3000


def covers(estimate: Estimate, truth: float) -> bool:
    assert estimate.low is not None
    assert estimate.high is not None
    assert estimate.low <= estimate.value <= estimate.high
    return estimate.low <= truth <= estimate.high


@pytest.mark.parametrize("documents", [2, 3, 5, 12, 40])
def test_intervals_of_perplexity_cover(documents: int) -> None:
    """Documents with means of their own and lengths that differ by half of themselves."""
    random = np.random.default_rng(documents)
    held = 0
    for _ in range(SIMULATIONS):
        tokens = np.round(np.exp(random.normal(9, 0.5, documents)))
        nll = tokens * random.normal(2.5, 0.3, documents) + np.sqrt(tokens) * random.normal(0, 2, documents)
        held += covers(statistics.perplexity(nll.tolist(), tokens.astype(int).tolist()), math.exp(2.5))
    assert held / SIMULATIONS == pytest.approx(0.95, abs=0.015)


def test_intervals_of_a_share_cover() -> None:
    random = np.random.default_rng(1)
    for trials in (5, 20, 100):
        shares = random.random(SIMULATIONS)
        held = sum(covers(statistics.share(random.binomial(trials, p) / trials, trials), p) for p in shares)
        assert held / len(shares) == pytest.approx(0.95, abs=0.015)


def test_a_share_is_wilsons() -> None:
    for right, trials in [(0, 5), (5, 5), (3, 20), (17, 1000)]:
        expected = stats.binomtest(right, trials).proportion_ci(method="wilson")
        assert statistics.share(right / trials, trials)[1:] == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_alike_documents_are_students_t() -> None:
    values = [2.1, 2.9, 2.4, 2.2, 3.0]
    expected = stats.ttest_1samp(values, 0).confidence_interval()
    assert statistics.over_seeds(values)[1:] == pytest.approx((expected.low, expected.high))
    nll = [100 * value for value in values]
    assert statistics.mean_nll(nll, [100] * 5)[1:] == pytest.approx((expected.low, expected.high))


def test_null_comparisons_and_true_ones() -> None:
    """Two models that differ by chance alone are told apart at most 6 times of 100; three standard errors are found."""
    random = np.random.default_rng(2)
    called, found = {"perplexity": 0, "share": 0, "apart": 0, "seeds": 0}, {"perplexity": 0, "share": 0, "seeds": 0}
    for _ in range(1000):
        tokens = random.integers(3000, 9000, 25)
        before, noise = tokens * random.normal(2.5, 0.3, 25), tokens * random.normal(0, 0.02, 25)
        pairs = (before + noise, before, tokens)
        called["perplexity"] += not statistics.perplexity_change(*pairs).is_zero  # type: ignore[arg-type]
        pairs = (before + noise + 5 * tokens * 0.02 / 5, before, tokens)
        found["perplexity"] += not statistics.perplexity_change(*pairs).is_zero  # type: ignore[arg-type]

        chances = random.random(100)
        one, other = (random.random((2, 100)) < chances).astype(float)
        called["share"] += not statistics.share_change(one.tolist(), other.tolist()).is_zero
        called["apart"] += not statistics.share_change_apart(one.mean(), 100, other.mean(), 100).is_zero
        better = (random.random(100) < np.clip(chances + 0.25, 0, 1)).astype(float)
        found["share"] += not statistics.share_change(better.tolist(), other.tolist()).is_zero

        seeds = random.normal(0, 1, 5)
        called["seeds"] += not statistics.over_seeds(seeds.tolist()).is_zero
        found["seeds"] += not statistics.over_seeds((seeds + 5 / math.sqrt(5)).tolist()).is_zero
    assert max(called.values()) <= 60, called
    assert min(found.values()) >= 800, found


def test_what_one_document_or_seed_cannot_tell() -> None:
    assert statistics.perplexity([25.0], [10]) == (pytest.approx(math.exp(2.5)), None, None)
    assert statistics.over_seeds([0.3]) == (0.3, None, None)
    assert statistics.over_seeds([0.3]).is_zero is None
    assert statistics.share(0.0, 0) == (0.0, None, None)
    with pytest.raises(ValueError, match="cannot be paired"):
        statistics.perplexity_change([1.0], [1.0, 2.0], [5])
    with pytest.raises(ValueError, match="cannot be paired"):
        statistics.share_change([1.0], [1.0, 0.0])
