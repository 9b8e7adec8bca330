"""Hashes of 64 bits that differ in few bits: each is compared with those kept before it. Exact, without all pairs.

Two hashes that differ in at most d bits agree in one of d + 1 bands of bits, because d bits cannot change all of them.
So a hash is compared only with those that share a band.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

Hashes = npt.NDArray[np.uint64]
Ints = npt.NDArray[np.int64]

MOST = 15  # bits of distance: more would make bands of less than 4 bits, which nearly every hash shares
_CHUNK = 1_024  # hashes judged at a time
_PAIRS = 2**21  # pairs compared at a time


def first_kept_within(values_U: Hashes, distance: int, pairs: int = _PAIRS) -> Ints:
    """Return for each hash the first kept one within a distance, (U,) int64, -1 for those that are kept.

    A hash is kept if no hash before it that was kept is within the distance. So each of the others has a kept
    representative, and chains of similar hashes do not join.

    Args:
        values_U: (U,) different hashes; earlier ones are preferred.
        distance: Bits in which two hashes may differ, 0 to :data:`MOST`.
        pairs: Pairs to compare at a time, which limits memory.
    """
    count = len(values_U)
    first_U = np.full(count, -1, np.int64)
    if not distance:
        return first_U
    bands = [(values_U >> np.uint64(low)) & np.uint64(2 ** (high - low) - 1) for low, high in _bands(distance + 1)]
    orders = [np.argsort(band, kind="stable") for band in bands]
    sorted_bands = [band[order] for band, order in zip(bands, orders, strict=True)]
    for lo in range(0, count, _CHUNK):
        hi = min(lo + _CHUNK, count)
        nearest = np.full(hi - lo, count, np.int64)  # the first kept hash of earlier chunks
        inside: list[Ints] = []  # pairs of this chunk: later * _CHUNK + earlier
        for band, order, ordered in zip(bands, orders, sorted_bands, strict=True):
            start = np.searchsorted(ordered, band[lo:hi])
            # A stable sort has the hashes of a band in their order: those before the own place are the earlier ones.
            stop = start + _earlier(order, start, np.searchsorted(ordered, band[lo:hi], "right"), np.arange(lo, hi))
            for own, other in _ranges(start, stop, order, pairs):
                close = np.bitwise_count(values_U[lo + own] ^ values_U[other]) <= distance
                close &= (other >= lo) | (first_U[other] < 0)
                own, other = own[close], other[close]
                early = other < lo
                np.minimum.at(nearest, own[early], other[early])
                inside.append(own[~early] * _CHUNK + other[~early] - lo)
        first_U[lo:hi] = np.where(nearest < count, nearest, -1)
        pairs_P = np.unique(np.concatenate(inside)) if inside else np.empty(0, np.int64)
        for at, earlier in zip((lo + pairs_P // _CHUNK).tolist(), (lo + pairs_P % _CHUNK).tolist(), strict=True):
            if first_U[at] < 0 and first_U[earlier] < 0:  # both kept so far; the pairs are in order
                first_U[at] = earlier
    return first_U


def _bands(count: int) -> list[tuple[int, int]]:
    """Split 64 bits into bands of nearly equal width: (lowest bit, end)."""
    ends = [64 * i // count for i in range(count + 1)]
    return list(zip(ends[:-1], ends[1:], strict=True))


def _earlier(order: Ints, start: Ints, stop: Ints, own: Ints) -> Ints:
    """Return how many of order[start:stop], which ascends, are below each of ``own``, by bisection."""
    low, high = start.copy(), stop.copy()
    while (low < high).any():
        middle = (low + high) // 2
        below = (low < high) & (order[np.minimum(middle, len(order) - 1)] < own)
        low, high = np.where(below, middle + 1, low), np.where(below | (low >= high), high, middle)
    return np.asarray(low - start, np.int64)


def _ranges(start: Ints, stop: Ints, order: Ints, pairs: int) -> Iterator[tuple[Ints, Ints]]:
    """Yield (own, order[place]) for every place from start to stop of every hash, some pairs at a time."""
    ends = np.cumsum(stop - start)
    total = int(ends[-1]) if len(ends) else 0
    for lo in range(0, total, pairs):
        flat = np.arange(lo, min(lo + pairs, total))
        own = np.searchsorted(ends, flat, "right")
        yield own, order[stop[own] - (ends[own] - flat)]
