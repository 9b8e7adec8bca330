"""Selection by score: which rows, and how many of each group. Budgets are exact, ties go to the lower row id."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from thresher.errors import BudgetError, UsageError

Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Scores = npt.NDArray[Any]

_BLOCK = 2**18  # rows of which a few numbers each are in memory
_SORTED = 2**20  # rows that are sorted in memory


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

    A radix selection: the last score kept of every group is found some bits at a time, in a few passes over blocks of
    rows. Besides the result it takes half a byte a row, and the arrays may be mapped from files.

    Args:
        scores_N: (N,) float32 without NaN, uint32 or uint64.
        labels_N: (N,) group of each row, 0 <= label < K.
        counts_K: (K,) number of rows to keep, 0 <= count <= size of the group.

    Returns:
        (N,) bool with exactly ``counts_K.sum()`` True.
    """
    _refuse_nan(scores_N)
    n, groups = len(scores_N), len(counts_K)
    sizes_K = sizes_of(labels_N, groups)
    if len(sizes_K) > groups:
        raise UsageError(f"label {len(sizes_K) - 1} is out of range for {groups} groups")
    over = np.flatnonzero((counts_K > sizes_K) | (counts_K < 0))
    if len(over):
        j = int(over[0])
        raise BudgetError(f"cannot keep {int(counts_K[j]):,} rows of group {j}, which has {int(sizes_K[j]):,}")

    def blocks() -> Iterator[tuple[slice, npt.NDArray[np.uint64], Ints]]:
        for lo in range(0, n, _BLOCK):
            here = slice(lo, min(lo + _BLOCK, n))
            yield here, _codes(scores_N[here]), np.asarray(labels_N[here]).astype(np.int64)

    width = 8 * scores_N.dtype.itemsize
    digit = max(min((max(n // 16, 2**16) // max(groups, 1)).bit_length() - 1, 16), 1)  # bits that are found in a pass
    cuts_K, left_K = np.zeros(groups, np.uint64), np.asarray(counts_K, np.int64).copy()
    some_K = left_K > 0
    for high in range(width, 0, -digit):
        low = max(high - digit, 0)
        counts_KD = np.zeros((groups, 1 << (high - low)), np.int64)
        for _, codes, labels in blocks():
            if high < width:
                alike = np.flatnonzero(codes >> np.uint64(high) == cuts_K[labels])
                codes, labels = codes[alike], labels[alike]
            digits = (codes >> np.uint64(low)).astype(np.int64) & ((1 << (high - low)) - 1)
            counts_KD += np.bincount(digits + (labels << (high - low)), minlength=counts_KD.size).reshape(
                counts_KD.shape
            )
        np.cumsum(counts_KD, axis=1, out=counts_KD)
        at_K = np.argmax(counts_KD >= left_K[:, None], axis=1)  # the digit of the last row kept
        left_K -= np.where(some_K & (at_K > 0), counts_KD[np.arange(groups), at_K - 1], 0)
        cuts_K = cuts_K << np.uint64(high - low) | at_K.astype(np.uint64)
    # Of the rows with the code of the cut, the first left_K are kept.
    mask_N = np.zeros(n, np.bool_)
    for here, codes, labels in blocks():
        cuts = cuts_K[labels]
        mask_N[here] = (codes < cuts) & some_K[labels]
        tied = np.flatnonzero((codes == cuts) & (left_K[labels] > 0))
        tied = tied[np.argsort(labels[tied], kind="stable")]
        groups_T, starts, sizes = np.unique(labels[tied], return_index=True, return_counts=True)
        rank = np.arange(len(tied)) - np.repeat(starts, sizes)
        mask_N[here.start + tied[rank < np.repeat(left_K[groups_T], sizes)]] = True
        left_K[groups_T] = np.maximum(left_K[groups_T] - sizes, 0)
    return mask_N


def sizes_of(labels_N: npt.NDArray[Any], groups: int, mask_N: Bools | None = None) -> Ints:
    """Return the number of rows of each group, (K,): all, or those that a mask (N,) marks; in blocks of rows."""
    sizes_K = np.zeros(groups, np.int64)
    for lo in range(0, len(labels_N), _BLOCK):
        labels = labels_N[lo : lo + _BLOCK]
        labels = labels if mask_N is None else labels[mask_N[lo : lo + _BLOCK]]
        counts = np.bincount(labels, minlength=len(sizes_K))
        if len(counts) > len(sizes_K):
            sizes_K = np.pad(sizes_K, (0, len(counts) - len(sizes_K)))
        sizes_K += counts
    return sizes_K


def sums_of(labels_N: npt.NDArray[Any], values_N: npt.NDArray[Any], groups: int) -> Floats:
    """Return the sum of the values of each group, (K,) float64, added in the order of the rows; in blocks of rows."""
    sums_K = np.zeros(groups, np.float64)
    for lo in range(0, len(labels_N), _BLOCK):
        np.add.at(sums_K, np.asarray(labels_N[lo : lo + _BLOCK]), np.asarray(values_N[lo : lo + _BLOCK], np.float64))
    return sums_K


def order_by_group(
    scores_N: Scores, labels_N: npt.NDArray[Any], space: Callable[[int], Ints] | None = None
) -> Iterator[Ints]:
    """Return the rows group by group, the highest score first, some at a time; ties go to the lower row.

    Besides the working space it takes up to 40 bytes for each of a million rows.

    Args:
        scores_N: (N,) float32 without NaN, uint32 or uint64.
        labels_N: (N,) group of each row.
        space: Returns an array (n,) int64 to work in, such as one that is mapped from a file; by default in memory.
    """
    _refuse_nan(scores_N)
    _codes(scores_N[:0])
    return _ordered(scores_N, labels_N, space or (lambda n: np.empty(n, np.int64)))


def slices(count: int) -> Iterator[slice]:
    """Yield slices of so few rows that some numbers for each take little memory."""
    return (slice(lo, min(lo + _BLOCK, count)) for lo in range(0, count, _BLOCK))


def by_group(labels_N: npt.NDArray[Any], space: Callable[[int], Ints] | None = None) -> Ints:
    """Return the rows group by group, ascending within a group, (N,) int64.

    Args:
        labels_N: (N,) group of each row.
        space: Returns an array (n,) int64, such as one that is mapped from a file; by default in memory.
    """
    return _distributed(
        range(len(labels_N)),
        lambda rows: labels_N[rows[0] : rows[-1] + 1],
        sizes_of(labels_N, 0),
        space or (lambda n: np.empty(n, np.int64)),
    )


def _ordered(scores_N: Scores, labels_N: npt.NDArray[Any], space: Callable[[int], Ints]) -> Iterator[Ints]:
    n = len(scores_N)
    if n <= _SORTED:
        yield _sorted(np.arange(n), scores_N, labels_N)
        return
    sizes_K, rows_N = sizes_of(labels_N, 0), by_group(labels_N, space)
    ends_K = np.cumsum(sizes_K)
    for first, last in pack(sizes_K, _SORTED):
        lo, hi = int(ends_K[first] - sizes_K[first]), int(ends_K[last - 1])
        yield from _in_parts(rows_N[lo:hi], scores_N, labels_N, 8 * scores_N.dtype.itemsize, space)


def _in_parts(
    rows_n: Ints, scores_N: Scores, labels_N: npt.NDArray[Any], bits: int, space: Callable[[int], Ints]
) -> Iterator[Ints]:
    """Sort rows, which ascend within a group: a few, or of one group those that are alike but for the last ``bits``."""
    if len(rows_n) <= _SORTED:
        yield _sorted(np.asarray(rows_n), scores_N, labels_N)
        return
    if not bits:  # all are equal
        yield from (np.asarray(rows_n[lo : lo + _BLOCK]) for lo in range(0, len(rows_n), _BLOCK))
        return

    def digits(rows: Ints) -> Ints:
        return (_codes(scores_N[rows]) >> np.uint64(bits - 8)).astype(np.int64) & 255

    sizes_D = np.zeros(256, np.int64)
    for lo in range(0, len(rows_n), _BLOCK):
        sizes_D += np.bincount(digits(rows_n[lo : lo + _BLOCK]), minlength=256)
    if sizes_D.max() == len(rows_n):
        yield from _in_parts(rows_n, scores_N, labels_N, bits - 8, space)
        return
    moved_n, ends_D = _distributed(rows_n, digits, sizes_D, space), np.cumsum(sizes_D)
    for first, last in pack(sizes_D, _SORTED):
        lo, hi = int(ends_D[first] - sizes_D[first]), int(ends_D[last - 1])
        yield from _in_parts(moved_n[lo:hi], scores_N, labels_N, bits - 8, space)


def _distributed(
    rows_n: Any, digits: Callable[[Ints], npt.NDArray[Any]], sizes_D: Ints, space: Callable[[int], Ints]
) -> Ints:
    """Return rows by digit, in the same order within a digit: a counting sort in blocks."""
    out_n, next_D = space(len(rows_n)), np.cumsum(sizes_D) - sizes_D
    for lo in range(0, len(rows_n), _BLOCK):
        rows = np.asarray(rows_n[lo : lo + _BLOCK])
        here = np.asarray(digits(rows))
        order = np.argsort(here, kind="stable")
        digits_U, starts, sizes = np.unique(here[order], return_index=True, return_counts=True)
        out_n[np.repeat(next_D[digits_U] - starts, sizes) + np.arange(len(rows))] = rows[order]
        next_D[digits_U] += sizes
    return out_n


def _sorted(rows_n: Ints, scores_N: Scores, labels_N: npt.NDArray[Any]) -> Ints:
    """Return rows, which ascend within a group, by group, the highest score first."""
    codes, labels = _codes(scores_N[rows_n]), np.asarray(labels_N[rows_n])
    if scores_N.dtype.itemsize == 8:
        return np.asarray(rows_n[np.lexsort((codes, labels))])
    codes |= labels.astype(np.uint64) << np.uint64(32)
    return np.asarray(rows_n[np.argsort(codes, kind="stable")])


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
    if scores.dtype.kind != "f":
        return
    for lo in range(0, len(scores), _BLOCK):
        if np.isnan(scores[lo : lo + _BLOCK]).any():
            row = lo + int(np.flatnonzero(np.isnan(scores[lo : lo + _BLOCK]))[0])
            raise UsageError(f"the score of row {row:,} is NaN, so rows cannot be ranked by it")


def _codes(scores_n: Scores) -> npt.NDArray[np.uint64]:
    """Map scores to whole numbers so that a higher score has a lower one."""
    if scores_n.dtype in (np.uint32, np.uint64):
        return (~np.asarray(scores_n)).astype(np.uint64)
    if scores_n.dtype != np.float32:
        raise UsageError(f"scores within groups must be float32, uint32 or uint64, not {scores_n.dtype}")
    bits = (np.asarray(scores_n) + np.float32(0)).view(np.uint32)  # + 0 makes -0.0 equal to 0.0
    negative = bits >> 31 != 0
    # Ascending code: flip all bits of negatives, set the sign bit of the others; then reverse.
    return (~np.where(negative, ~bits, bits | np.uint32(0x80000000))).astype(np.uint64)
