"""Means over seeds and how sure they are."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Estimate:
    """A mean and its standard error (standard deviation / sqrt(n), with n - 1 degrees of freedom)."""

    mean: float
    error: float | None
    """None for a single value."""


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and standard error of `values`.

    >>> estimate([1.0, 2.0, 3.0])
    Estimate(mean=2.0, error=0.5773502691896258)
    """
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return Estimate(statistics.fmean(values), error)
