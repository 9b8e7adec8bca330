"""Bootstrap intervals of shares: how much a share would vary with other rows of the same kind.

A share of rows is the mean of zeros and ones, so that drawing the rows again with replacement is drawing a binomial
number: no row is needed, and the interval is that of the percentile bootstrap. Rows that depend on each other, such as
duplicates, make the true interval wider.
"""

from __future__ import annotations

import numpy as np

from thresher.errors import UsageError
from thresher.runtime.random import generator

DRAWS = 10_000


def share_interval(share: float, rows: int, *, level: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Return the percentile bootstrap interval of a share.

    Args:
        share: The share of the rows, 0 to 1.
        rows: Number of rows, 1 or more.
        level: Probability of the interval, strictly between 0 and 1.
        seed: Seed of the draws.

    Raises:
        UsageError: A value is not allowed.
    """
    if not 0 <= share <= 1 or rows < 1 or not 0 < level < 1:
        raise UsageError(f"a share of {share} of {rows} rows, level {level}; give a share and a level from 0 to 1")
    drawn = generator(seed, "bootstrap").binomial(rows, share, DRAWS) / rows
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
