"""Selection by score: which rows, and how many of each group. Budgets are exact, ties go to the lower row id."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from thresher.errors import BudgetError, UsageError

Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Scores = npt.NDArray[Any]


def top(scores_N: Scores, k: int) -> Bools:
    """Mark the ``k`` highest scores; among equal scores the lower row wins.

    Args:
        scores_N: (N,) numbers without NaN.
        k: Number of rows to mark, 0 to N.

    Returns:
        (N,) bool with exactly ``k`` True.
    """
    n = len(scores_N)
    _refuse_nan(scores_N)
    if not 0 <= k <= n:
        raise BudgetError(f"cannot keep {k:,} of {n:,} rows")
    if k == 0:
        return np.zeros(n, np.bool_)
    if k == n:
        return np.ones(n, np.bool_)
    cut = np.partition(scores_N, n - k)[n - k]
    mask = scores_N > cut
    at_cut = np.flatnonzero(scores_N == cut)
    mask[at_cut[: k - int(mask.sum())]] = True
    return np.asarray(mask, np.bool_)


def top_per_group(scores_N: Scores, labels_N: npt.NDArray[Any], counts_K: npt.NDArray[Any]) -> Bools:
    """Mark the ``counts_K[j]`` highest scores of every group j; ties go to the lower row.

    One sort of 64-bit keys (group, score), whatever the number of groups.

    Args:
        scores_N: (N,) float32 or uint32 without NaN, or uint64, which takes more memory.
        labels_N: (N,) group of each row, 0 <= label < K.
        counts_K: (K,) number of rows to keep, 0 <= count <= size of the group.

    Returns:
        (N,) bool with exactly ``counts_K.sum()`` True.
    """
    _refuse_nan(scores_N)
    sizes_K = np.bincount(labels_N, minlength=len(counts_K))
    if len(sizes_K) > len(counts_K):
        raise UsageError(f"label {len(sizes_K) - 1} is out of range for {len(counts_K)} groups")
    over = np.flatnonzero((counts_K > sizes_K) | (counts_K < 0))
    if len(over):
        j = int(over[0])
        raise BudgetError(f"cannot keep {int(counts_K[j]):,} rows of group {j}, which has {int(sizes_K[j]):,}")
    starts_K = np.cumsum(sizes_K) - sizes_K
    if scores_N.dtype == np.uint64:
        order_N = order_by_group(scores_N, labels_N)
        ordered_N = labels_N[order_N]
        first_N = np.arange(len(order_N)) - starts_K[ordered_N] < counts_K[ordered_N]
        mask_N = np.zeros(len(order_N), np.bool_)
        mask_N[order_N[first_N]] = True
        return mask_N
    keys_N = _descending_bits(scores_N).astype(np.uint64)
    keys_N |= np.asarray(labels_N).astype(np.uint64) << np.uint64(32)
    ordered = np.sort(keys_N)
    some_K = counts_K > 0
    # The key of the last row kept of each group; 0 where none is kept, so that no key lies below it.
    cuts_K = np.zeros(len(counts_K), np.uint64)
    cuts_K[some_K] = ordered[(starts_K + counts_K - 1)[some_K]]
    del ordered
    cuts_N = cuts_K[labels_N]
    mask_N = keys_N < cuts_N
    tied = np.flatnonzero((keys_N == cuts_N) & some_K[labels_N])
    missing_K = counts_K - np.bincount(labels_N[mask_N], minlength=len(counts_K))
    order = np.argsort(labels_N[tied], kind="stable")
    tied = tied[order]
    labels_T = labels_N[tied]
    first_K = np.searchsorted(labels_T, np.arange(len(counts_K)))
    mask_N[tied[np.arange(len(tied)) - first_K[labels_T] < missing_K[labels_T]]] = True
    return np.asarray(mask_N, np.bool_)


def order_by_group(scores_N: Scores, labels_N: npt.NDArray[Any]) -> Ints:
    """Return the rows group by group, the highest score first; ties go to the lower row.

    Args:
        scores_N: (N,) float32 or uint32 without NaN, or uint64, which takes more memory.
        labels_N: (N,) group of each row.
    """
    _refuse_nan(scores_N)
    if scores_N.dtype == np.uint64:
        return np.asarray(np.lexsort((~scores_N, labels_N)), np.int64)
    keys_N = _descending_bits(scores_N).astype(np.uint64)
    keys_N |= np.asarray(labels_N).astype(np.uint64) << np.uint64(32)
    return np.asarray(np.argsort(keys_N, kind="stable"), np.int64)


def allocate(target_K: npt.NDArray[Any], low_K: npt.NDArray[Any], high_K: npt.NDArray[Any], total: int) -> Ints:
    """Allocate ``total`` rows to K groups, as close to ``target_K`` in the least-squares sense as the bounds allow.

    The minimiser of ``||x - target||^2`` over integers with ``sum(x) == total`` and ``low <= x <= high``:
    ``clip(target + shift, low, high)`` for the one shift that meets the total, found exactly by sorting the break
    points, then rounded to integers by largest remainder (ties to the lower group). The sum is exact and all bounds
    hold, unlike with a solver followed by rounding.

    Args:
        target_K: (K,) target rows, any finite numbers.
        low_K: (K,) minimum rows, integers.
        high_K: (K,) maximum rows, integers >= ``low_K``.
        total: Number of rows to allocate.

    Raises:
        BudgetError: ``total`` lies outside ``sum(low_K) .. sum(high_K)``.
    """
    target = np.asarray(target_K, np.float64)
    low = np.asarray(low_K, np.int64)
    high = np.asarray(high_K, np.int64)
    if not np.isfinite(target).all():
        raise UsageError("the targets of an allocation must be finite")
    if (low > high).any():
        raise BudgetError("an allocation asks for more rows of a group than the group has")
    if not int(low.sum()) <= total <= int(high.sum()):
        raise BudgetError(f"cannot allocate {total:,} rows: the bounds allow {low.sum():,} to {high.sum():,}")
    # sum(clip(target + shift)) is piecewise linear in the shift: a group starts to grow at
    # low - target and stops at high - target.
    points = np.concatenate([low - target, high - target])
    slopes = np.concatenate([np.ones(len(low)), -np.ones(len(high))])
    order = np.argsort(points, kind="stable")
    points, slope = points[order], np.cumsum(slopes[order])
    reached = low.sum() + np.concatenate([[0.0], np.cumsum(slope[:-1] * np.diff(points))])
    i = max(int(np.searchsorted(reached, total, side="left")) - 1, 0)
    shift = points[i] + ((total - reached[i]) / slope[i] if slope[i] > 0 else 0.0)
    ideal = np.clip(target + shift, low, high)
    counts: Ints = np.floor(ideal).astype(np.int64)
    remainder = ideal - counts
    spare = total - int(counts.sum())
    # Rounding errors of the shift can move `spare` outside 0..K by a row or two, hence the loops.
    while spare > 0:
        room = np.flatnonzero(counts < high)
        take = room[np.argsort(-remainder[room], kind="stable")][:spare]
        counts[take] += 1
        spare -= len(take)
    while spare < 0:
        room = np.flatnonzero(counts > low)
        take = room[np.argsort(remainder[room], kind="stable")][:-spare]
        counts[take] -= 1
        spare += len(take)
    return counts


def pack(sizes: Ints, room: int) -> Iterator[tuple[int, int]]:
    """Split consecutive groups lo..hi into runs of up to ``room`` rows; a larger non-empty group is a run by itself."""
    lo = held = 0
    for k, size in enumerate(sizes.tolist()):
        if held and held + size > room:
            yield lo, k
            lo, held = k, 0
        held += size
    if held:
        yield lo, len(sizes)


def softmax(values_K: npt.NDArray[Any], temperature: float) -> Floats:
    """Return exp(values / temperature) normalised to sum 1, in float64, without overflow."""
    scaled = np.asarray(values_K, np.float64) / temperature
    weights = np.exp(scaled - scaled.max())
    return np.asarray(weights / weights.sum(), np.float64)


def _refuse_nan(scores: Scores) -> None:
    if scores.dtype.kind == "f" and np.isnan(scores).any():
        row = int(np.flatnonzero(np.isnan(scores))[0])
        raise UsageError(f"the score of row {row:,} is NaN, so rows cannot be ranked by it")


def _descending_bits(scores_N: Scores) -> npt.NDArray[np.uint32]:
    """Map scores to uint32 so that a higher score has a lower code."""
    if scores_N.dtype == np.uint32:
        return np.asarray(~scores_N, np.uint32)
    if scores_N.dtype != np.float32:
        raise UsageError(f"scores within groups must be float32, uint32 or uint64, not {scores_N.dtype}")
    bits = (scores_N + np.float32(0)).view(np.uint32)  # + 0 makes -0.0 equal to 0.0
    negative = bits >> 31 != 0
    # Ascending code: flip all bits of negatives, set the sign bit of the others; then reverse.
    return np.asarray(~np.where(negative, ~bits, bits | np.uint32(0x80000000)), np.uint32)
