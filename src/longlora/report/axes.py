"""Axes of a chart: from values to a place between 0 and 1, and the ticks that people expect."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from longlora.report.wording import plain, whole

LOGARITHMIC_FROM = 4
"""Values that span more than this ratio are drawn on a logarithmic scale."""


_LEAST, _MOST = 1e-200, 1e200
"""Numbers that arithmetic with a margin does not run out of."""


@dataclass(frozen=True)
class Axis:
    """`low` lies at place 0 and `high` at 1; each tick is a value and its label."""

    title: str
    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    logarithmic: bool = False

    def has(self, value: float) -> bool:
        """Whether `value` has a place on this scale, inside or outside the axis."""
        return math.isfinite(value) and (value > 0 or not self.logarithmic)

    def place(self, value: float) -> float:
        low, high = self.low, self.high
        if self.logarithmic:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return (value - low) / (high - low)


def drawable(value: float) -> bool:
    """Whether a perplexity or a loss has a place on either scale: above zero, and not beyond reason."""
    return _LEAST <= value <= _MOST


def measured_axis(title: str, values: Sequence[float]) -> Axis:
    """For positive values: linear, not from zero, unless they span more than `LOGARITHMIC_FROM`."""
    if max(values) > LOGARITHMIC_FROM * min(values):
        return _logarithmic(title, min(values), max(values))
    return linear_axis(title, min(values), max(values))


def linear_axis(title: str, low: float, high: float, ticks: int = 5, label: Callable[[float], str] = plain) -> Axis:
    """About `ticks` round steps, the outermost of them at the ends of the axis.

    >>> linear_axis("loss", 2.31, 3.94).ticks
    ((2.0, '2'), (2.5, '2.5'), (3.0, '3'), (3.5, '3.5'), (4.0, '4'))
    """
    if high <= low:
        spread = abs(low) * 0.05 or 1.0
        low, high = low - spread, high + spread
    step = _round_step((high - low) / ticks)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    values = [round(index * step, 12) if step > 1e-9 else index * step for index in range(first, last + 1)]
    return Axis(title, values[0], values[-1], tuple((value, label(value)) for value in values))


def context_axis(title: str, contexts: Iterable[int]) -> Axis:
    """Context lengths in tokens on a scale of doublings, a tick at each."""
    known = sorted(set(contexts))
    ticks = tuple((float(context), whole(context)) for context in known)
    return Axis(title, known[0] / 2**0.15, known[-1] * 2**0.15, ticks, logarithmic=True)


def step_axis(title: str, first: int, last: int) -> Axis:
    """Training steps: round ticks, but the line fills the width."""
    round_one = linear_axis(title, first, max(last, first + 1), ticks=6)
    ticks = tuple(
        (value, whole(value)) for value, _ in round_one.ticks if first <= value <= last and float(value).is_integer()
    )
    return Axis(title, first, max(last, first + 1), ticks)


def _logarithmic(title: str, low: float, high: float) -> Axis:
    margin = (high / low) ** 0.04
    low, high = low / margin, high * margin
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for mantissas in ((1, 2, 5), (1, 3), (1,)):
        values = [mantissa * 10.0**decade for decade in decades for mantissa in mantissas]
        within = [value for value in values if low <= value <= high]
        if len(within) <= 8:
            break
    within = within[:: math.ceil(len(within) / 8)]
    return Axis(title, low, high, tuple((value, plain(value)) for value in within), logarithmic=True)


def _round_step(step: float) -> float:
    """The smallest of 1, 2, 2.5, 5 or 10 times a power of ten that is not below `step`."""
    power = 10.0 ** math.floor(math.log10(step))
    return next((factor * power for factor in (1, 2, 2.5, 5) if factor * power >= step * (1 - 1e-9)), 10 * power)
