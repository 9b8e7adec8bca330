"""Choose an exact number of rows, the lowest or at random, with little memory."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

Bools = npt.NDArray[np.bool_]

_BLOCK = 1 << 18


def whole(number: float) -> int:
    """Round down to a whole number of rows, tolerating floating-point error: 0.29 * 100 gives 29."""
    return math.floor(round(number, 6))


def lowest(scores_N: npt.NDArray[Any], k: int) -> Bools:
    """Mark the ``k`` lowest scores; among equal scores the lower row wins.

    Args:
        scores_N: (N,) numbers, no NaN.
        k: Number of rows to mark, 0 to N.

    Returns:
        (N,) bool.
    """
    if k == 0:
        return np.zeros(len(scores_N), np.bool_)
    cut = np.partition(scores_N, k - 1)[k - 1]
    mask_N: Bools = scores_N < cut
    at_cut = np.flatnonzero(scores_N == cut)
    mask_N[at_cut[: k - np.count_nonzero(mask_N)]] = True
    return mask_N


def draw(marked_N: Bools, k: int, rng: np.random.Generator) -> Bools:
    """Draw ``k`` of the marked rows without replacement, every set of ``k`` equally likely.

    One hypergeometric draw gives the number of rows per block; the rows are then drawn block by block. So nothing
    larger than a block is permuted, and N may be anything below 10^9.

    Args:
        marked_N: (N,) bool, the rows to draw from.
        k: Number of rows to draw, 0 to the number of marked rows.
        rng: Random generator; the same state gives the same rows.

    Returns:
        (N,) bool.
    """
    starts = range(0, len(marked_N), _BLOCK)
    sizes = np.array([np.count_nonzero(marked_N[lo : lo + _BLOCK]) for lo in starts], np.int64)
    drawn_N = np.zeros(len(marked_N), np.bool_)
    for lo, n in zip(starts, rng.multivariate_hypergeometric(sizes, k, method="marginals"), strict=True):
        rows = np.flatnonzero(marked_N[lo : lo + _BLOCK])
        drawn_N[lo + rng.choice(rows, n, replace=False, shuffle=False)] = True
    return drawn_N
