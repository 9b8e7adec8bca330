"""Means over seeds with 95% intervals, differences paired by seed, and significance with many comparisons.

All intervals and tests are Student's t. The distribution function has a closed form for whole degrees of freedom
(Abramowitz and Stegun, 26.7.3 and 26.7.4), so that no other package is needed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

LEVEL = 0.95


@dataclass(frozen=True)
class Mean:
    """The mean over seeds.

    Attributes:
        mean: The mean.
        half: Half of the width of its 95% interval; NaN for one seed, and where all seeds gave the same: a metric of
            few rows often does, and says nothing about other seeds.
        deviation: Standard deviation between seeds (n - 1); NaN for one seed.
        seeds: Number of seeds.
    """

    mean: float
    half: float
    deviation: float
    seeds: int

    @classmethod
    def of(cls, values: Sequence[float], same: float = 1e-9) -> Mean:
        """Return the mean of one value or more; values that are at most ``same`` apart count as equal."""
        n = len(values)
        mean = math.fsum(values) / n
        if n == 1:
            return cls(mean, math.nan, math.nan, 1)
        if max(values) - min(values) <= same:
            return cls(mean, math.nan, 0.0, n)
        deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
        return cls(mean, t_quantile((1 + LEVEL) / 2, n - 1) * deviation / math.sqrt(n), deviation, n)

    @property
    def low(self) -> float:
        """The lower end of the interval."""
        return self.mean - self.half

    @property
    def high(self) -> float:
        """The upper end of the interval."""
        return self.mean + self.half

    @property
    def p(self) -> float:
        """The two-sided p-value of a mean of 0; NaN for one seed, 1 without an interval."""
        if self.seeds < 2:
            return math.nan
        if self.deviation == 0:
            return 1.0
        t = abs(self.mean) / (self.deviation / math.sqrt(self.seeds))
        return 2 * (1 - t_distribution(t, self.seeds - 1))


def t_distribution(t: float, degrees: int) -> float:
    """Return the probability that Student's t with ``degrees`` of freedom, 1 or more, is at most ``t``."""
    angle = math.atan2(abs(t), math.sqrt(degrees))
    sine, cosine = math.sin(angle), math.cos(angle)
    if degrees % 2:
        term = total = cosine
        for k in range(3, degrees - 1, 2):
            term *= cosine * cosine * (k - 1) / k
            total += term
        within = 2 / math.pi * (angle + (sine * total if degrees > 1 else 0.0))
    else:
        term = total = 1.0
        for k in range(2, degrees - 1, 2):
            term *= cosine * cosine * (k - 1) / k
            total += term
        within = sine * total
    return 0.5 + math.copysign(within / 2, t)


def t_quantile(probability: float, degrees: int) -> float:
    """Return the value that Student's t does not exceed with this probability, 0.5 or more and below 1."""
    high = 1.0
    while t_distribution(high, degrees) < probability:
        high *= 2
    low = 0.0
    for _ in range(200):
        middle = (low + high) / 2
        if t_distribution(middle, degrees) < probability:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the p-values adjusted for their number by the method of Holm (1979); NaN stays and does not count.

    All comparisons with an adjusted value below 0.05 hold together with a probability of 95%.
    """
    order = sorted((i for i, p in enumerate(p_values) if not math.isnan(p)), key=lambda i: p_values[i])
    adjusted, highest = [math.nan] * len(p_values), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - rank) * p_values[i]))
        adjusted[i] = highest
    return adjusted
