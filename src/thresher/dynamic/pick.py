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


def growing(e: int, cycle: int) -> float:
    """Return the share of SCAN's candidates left out in epoch ``e`` of 1 .. ``cycle``: half a cosine from 0 up to 1."""
    return 0.5 * (1 + math.cos(math.pi * (cycle - e) / cycle))


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


def ranks(values_M: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Return the share of the values below each value, (M,) float32 in 0 .. 1; half of the equal ones count as below.

    Args:
        values_M: (M,) numbers, no NaN.
    """
    order = np.argsort(values_M)
    ascending_M = values_M[order]
    starts = np.flatnonzero(np.concatenate([[True], ascending_M[1:] != ascending_M[:-1]])[: len(order)])
    counts = np.diff(starts, append=len(order))
    ranks_M = np.empty(len(order), np.float32)
    ranks_M[order] = np.repeat((starts + counts / 2) / max(len(order), 1), counts)
    return ranks_M


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
