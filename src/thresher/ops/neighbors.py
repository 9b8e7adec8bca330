"""Nearest neighbours by running maxima over blocks of products: never an n x n matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from thresher.ops.components import find, unite
from thresher.ops.products import ON_CPU, Products
from thresher.ops.vectors import F32

Load = Callable[[int, int], F32]

CHUNK = 4096  # rows of a product, both ways: 64 MB at most
_PANEL = 1024  # rows of d_inter, and of the rule of kept rows, at a time


@dataclass(frozen=True)
class MeanNearestDistance:
    """Callable for an engine: d_inter, the mean cosine distance of centroids to their nearest neighbours.

    Attributes:
        centroids_KD: (K, D) float32 unit rows.
        neighbors: Number of neighbours; all K - 1 if there are fewer.
    """

    centroids_KD: F32
    neighbors: int

    def panels(self) -> Iterator[tuple[int, int]]:
        """Split the centroids into tasks with at most 64 MB of products."""
        k = len(self.centroids_KD)
        size = min(_PANEL, max(2**24 // k, 1))
        return ((lo, min(lo + size, k)) for lo in range(0, k, size))

    def __call__(self, panel: tuple[int, int]) -> npt.NDArray[np.float64]:
        """Return (hi - lo,) float64 for centroids lo..hi; zero for a single centroid."""
        lo, hi = panel
        k = len(self.centroids_KD)
        m = min(self.neighbors, k - 1)
        if m < 1:
            return np.zeros(hi - lo)
        cosines = self.centroids_KD[lo:hi] @ self.centroids_KD.T
        at = np.arange(hi - lo)
        cosines[at, lo + at] = -np.inf
        nearest = np.partition(cosines, k - m, axis=1)[:, k - m :]
        # Sorted before the sum, because np.partition does not define the order and so the rounding.
        return np.asarray(1.0 - np.sort(nearest, axis=1).mean(axis=1, dtype=np.float64), np.float64)


def nearest_earlier(
    load: Load, start: int, stop: int, products: Products = ON_CPU
) -> tuple[F32, npt.NDArray[np.int64]]:
    """Find, for rows start..stop of an ordered group, the most similar row before each.

    Args:
        load: ``load(lo, hi)`` returns unit rows lo..hi of the group in order, (hi - lo, D) float32.
        start: First row of the query.
        stop: One past the last.
        products: Computes the products.

    Returns:
        The largest cosine with any earlier row (-inf for row 0) and that row's position in the group
        (-1 for row 0), the earliest of equal ones.
    """
    best = np.full(stop - start, -np.inf, np.float32)
    where = np.full(stop - start, -1, np.int64)
    scratch = products.scratch()
    for row, rows, column, others in _with_earlier(load, start, stop, products.panel):
        here = slice(row - start, row - start + len(rows))
        _keep_better(products.best(rows, others, row - column, scratch), column, best[here], where[here])
    return best, where


def linked_to_earlier(
    load: Load, start: int, stop: int, threshold: float, products: Products = ON_CPU
) -> npt.NDArray[np.int64]:
    """Join rows start..stop of an ordered group with all earlier rows whose cosine exceeds ``threshold``.

    Args:
        load: As for :func:`nearest_earlier`.
        start: First row that is compared with the rows before it.
        stop: One past the last.
        threshold: Cosine above which two rows are joined.
        products: Computes the products.

    Returns:
        (stop,) int64, for rows 0..stop the first row that they are joined with, directly or by way of others; two
        rows before ``start`` are only joined by way of later ones.
    """
    parents = np.arange(stop)
    scratch = products.scratch()
    for row, rows, column, others in _with_earlier(load, start, stop, products.panel):
        at, other = products.above(rows, others, threshold, row - column, scratch)
        if len(at):
            first = find(parents, np.arange(row, row + len(rows)))
            second = find(parents, np.arange(column, column + len(others)))
            unite(parents, first[at], second[other])
    return find(parents, np.arange(stop))


def nearest_other(
    rows_BD: F32, others: Iterable[F32], products: Products = ON_CPU
) -> tuple[F32, npt.NDArray[np.int64]]:
    """Find for each row the most similar of some other rows.

    Args:
        rows_BD: (B, D) float32 unit rows.
        others: (M_i, D) float32 unit rows, some at a time; each array is used before the next one is requested.
        products: Computes the products.

    Returns:
        The largest cosine (B,) float32 and the index (B,) int64 of that other row, counted over all arrays, the first
        of equal ones; -inf and -1 if there are no other rows.
    """
    best = np.full(len(rows_BD), -np.inf, np.float32)
    where = np.full(len(rows_BD), -1, np.int64)
    panel, scratch = products.panel, products.scratch()
    a = 0
    for some in others:
        for p in range(0, len(some), panel):
            for r in range(0, len(rows_BD), panel):
                here = slice(r, r + panel)
                found = products.best(rows_BD[here], some[p : p + panel], scratch=scratch)
                _keep_better(found, a + p, best[here], where[here])
        a += len(some)
    return best, where


def _keep_better(found: tuple[F32, npt.NDArray[np.int64]], first: int, best: F32, where: npt.NDArray[np.int64]) -> None:
    """Update the running maximum of rows with that of their products with others, numbered from ``first``."""
    top, column = found
    better = top > best
    np.copyto(where, first + column, where=better)
    np.copyto(best, top, where=better)


def _with_earlier(load: Load, start: int, stop: int, panel: int) -> Iterator[tuple[int, F32, int, F32]]:
    """Yield the position of some of the rows start..stop, these rows, and the same of rows that may be earlier.

    They are valid until the next ones.
    """
    for lo in range(start, stop, CHUNK):
        hi = min(lo + CHUNK, stop)
        rows = load(lo, hi)
        for a in [*range(0, lo, CHUNK), lo]:
            others = rows if a == lo else load(a, min(a + CHUNK, lo))
            for p in range(0, len(others), panel):
                first = max(a + p - lo, 0)  # rows before the first column of the panel have no earlier rows in it
                for r in range(first, len(rows), panel):
                    yield lo + r, rows[r : r + panel], a + p, others[p : p + panel]


def duplicates_of_kept(
    load: Load, size: int, threshold: float, products: Products = ON_CPU
) -> tuple[F32, npt.NDArray[np.int64]]:
    """Go through an ordered group and drop each row whose cosine with a KEPT earlier row exceeds ``threshold``.

    Args:
        load: As for :func:`nearest_earlier`.
        size: Number of rows of the group.
        threshold: Cosine above which a row is a duplicate.
        products: Computes the products with rows of earlier panels.

    Returns:
        The largest cosine with an earlier kept row (-inf if there is none) and that row's position
        (-1); a row is dropped exactly if its cosine exceeds the threshold.
    """
    best = np.full(size, -np.inf, np.float32)
    where = np.full(size, -1, np.int64)
    kept: list[npt.NDArray[np.int64]] = []
    scratch = products.scratch()
    for lo in range(0, size, _PANEL):
        hi = min(lo + _PANEL, size)
        rows = load(lo, hi)
        value, place = best[lo:hi], where[lo:hi]
        for j, positions in enumerate(kept):
            if not len(positions):
                continue
            others = load(j * _PANEL, min((j + 1) * _PANEL, size))
            if len(positions) < len(others):
                others = others[positions - j * _PANEL]
            cosine, column = products.best(rows, others, scratch=scratch)
            _keep_better((cosine, positions[column]), 0, value, place)
        earlier = np.tri(hi - lo, k=-1, dtype=np.bool_)
        inner = np.where(earlier, rows @ rows.T, -np.inf)
        alive = value <= threshold
        # Only rows with a near neighbour inside the panel need the sequential rule.
        for i in np.flatnonzero((inner > threshold).any(axis=1)):
            if alive[i] and (inner[i, :i][alive[:i]] > threshold).any():
                alive[i] = False
        inside = np.where(alive[None, :], inner, -np.inf)
        top = inside.max(axis=1)
        better = np.flatnonzero(top > value)
        place[better] = lo + inside[better].argmax(axis=1)
        value[better] = top[better]
        kept.append(lo + np.flatnonzero(alive))
    return best, where
