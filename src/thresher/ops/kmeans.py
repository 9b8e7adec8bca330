"""Spherical k-means: assignment by largest cosine, centroids are normalised sums.

Work goes in cache-sized stripes - product, argmax, accumulate, next - so that the N x K matrix of
similarities never exists. Sums are taken in float32 within a stripe and in float64 above it, in row
order, so that the number of workers cannot change a bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from thresher.ops.vectors import F32

STRIPE = 1024  # rows per product
TILE = 1024  # centroids per product
_SIDE_BY_SIDE = 16  # rows of a group up to which groups are summed together


class Nearest(Protocol):
    """Finds each row's centroid. Rows need not be normalised, centroids are."""

    def __call__(self, rows_BD: F32, centroids_KD: F32) -> tuple[npt.NDArray[np.int32], F32]:
        """Return labels (B,) and products with the winning centroid (B,); ties go to the lower one."""
        ...


def nearest_centroid(rows_BD: F32, centroids_KD: F32) -> tuple[npt.NDArray[np.int32], F32]:
    """Label every row with its nearest centroid, in float32, through NumPy.

    Args:
        rows_BD: (B, D) float32, any length.
        centroids_KD: (K, D) float32 unit rows.

    Returns:
        labels (B,) int32 and the products <row, centroid> (B,) float32.
    """
    n, k = len(rows_BD), len(centroids_KD)
    labels = np.zeros(n, np.int32)
    best = np.full(n, -np.inf, np.float32)
    buffer = np.empty(min(STRIPE, n) * min(TILE, k), np.float32)
    for lo in range(0, n, STRIPE):
        rows = rows_BD[lo : lo + STRIPE]
        at = np.arange(len(rows))
        label, value = labels[lo : lo + STRIPE], best[lo : lo + STRIPE]
        for t in range(0, k, TILE):
            tile = centroids_KD[t : t + TILE]
            products = buffer[: len(rows) * len(tile)].reshape(len(rows), len(tile))
            np.matmul(rows, tile.T, out=products)
            arg = products.argmax(axis=1)
            top = products[at, arg]
            if t == 0:
                label[:], value[:] = arg, top
            else:
                better = top > value
                label[better] = arg[better] + t
                value[better] = top[better]
    return labels, best


@dataclass(frozen=True)
class Tally:
    """What one block adds to an iteration: its rows' labels and cosines, and sums by group."""

    labels_B: npt.NDArray[np.int32]
    cosines_B: F32
    groups_J: npt.NDArray[np.int64]
    sums_JD: npt.NDArray[np.float64]


@dataclass(frozen=True)
class TallyBlock:
    """Callable on the unit rows of a block, stripe by stripe -> :class:`Tally`."""

    centroids_KD: F32
    nearest: Nearest = nearest_centroid

    def __call__(self, stripes: Iterable[F32]) -> Tally:
        """Assign the rows and sum them by group; float32 within a stripe, float64 across."""
        labels, cosines, parts = [], [], []
        for rows in stripes:
            label, cosine = self.nearest(rows, self.centroids_KD)
            parts.append(_sums_by_group(rows, label))
            labels.append(label)
            cosines.append(cosine)
        groups, inverse = np.unique(np.concatenate([part for part, _ in parts]), return_inverse=True)
        sums = np.zeros((len(groups), self.centroids_KD.shape[1]), np.float64)
        start = 0
        for part, part_sums in parts:
            sums[inverse[start : start + len(part)]] += part_sums
            start += len(part)
        return Tally(np.concatenate(labels), np.concatenate(cosines), groups.astype(np.int64), sums)


def _sums_by_group(rows_BD: F32, labels_B: npt.NDArray[np.int32]) -> tuple[npt.NDArray[np.int32], F32]:
    """Return the groups present, ascending, and the float32 sums of their rows.

    Groups of a few rows are summed side by side - the second rows of all groups, then the third -
    and only larger ones one by one: four times faster than ``np.add.reduceat``.
    """
    order = np.argsort(labels_B, kind="stable")
    ordered = labels_B[order]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    counts = np.diff(np.append(starts, len(ordered)))
    sums = rows_BD[order[starts]]
    large = counts > _SIDE_BY_SIDE
    for j in np.flatnonzero(large):
        sums[j] = np.add.reduce(rows_BD[order[starts[j] : starts[j] + counts[j]]], axis=0)
    for turn in range(1, _SIDE_BY_SIDE):
        still = np.flatnonzero((counts > turn) & ~large)
        if not len(still):
            break
        sums[still] += rows_BD[order[starts[still] + turn]]
    return ordered[starts], sums


Passes = Callable[[Callable[[Iterable[F32]], Tally]], Iterator[Tally]]


def fit(
    each_block: Passes,
    take: Callable[[npt.NDArray[np.int64]], F32],
    centroids_KD: F32,
    iterations: int,
    *,
    start: int = 0,
    nearest: Nearest = nearest_centroid,
    after: Callable[[int, F32, float], None] | None = None,
) -> tuple[F32, float]:
    """Run Lloyd's iterations on the sphere.

    A group left empty takes over the row that lies farthest from its own centroid (each such row
    once, farthest first), which then leaves no group empty unless rows are fewer than groups.

    Args:
        each_block: Calls a function on the unit rows of every block, results in row order.
        take: Fetches single unit rows by position, for empty groups.
        centroids_KD: (K, D) float32 unit start.
        iterations: Total number of updates; those before ``start`` are taken as done.
        start: Updates already in ``centroids_KD``.
        nearest: The assignment to use while iterating.
        after: Called with (iteration, centroids, mean cosine) after each update.

    Returns:
        Final centroids and the mean cosine seen by the last pass (before its update).
    """
    centroids = np.ascontiguousarray(centroids_KD, np.float32)
    mean_cosine = float("nan")
    for iteration in range(start, iterations):
        sums = np.zeros(centroids.shape, np.float64)
        sizes = np.zeros(len(centroids), np.int64)
        cosines: list[F32] = []
        total = 0.0
        for tally in each_block(TallyBlock(centroids, nearest)):
            sums[tally.groups_J] += tally.sums_JD
            sizes += np.bincount(tally.labels_B, minlength=len(sizes))
            cosines.append(tally.cosines_B)
            total += float(tally.cosines_B.sum(dtype=np.float64))
        mean_cosine = total / max(int(sizes.sum()), 1)
        centroids = _normalise(sums, centroids)
        empty = np.flatnonzero(sizes == 0)
        if len(empty):
            far = np.argsort(np.concatenate(cosines), kind="stable")[: len(empty)]
            centroids[empty[: len(far)]] = take(far)
        if after is not None:
            after(iteration + 1, centroids, mean_cosine)
    return centroids, mean_cosine


def _normalise(sums_KD: npt.NDArray[np.float64], fallback_KD: F32) -> F32:
    """Unit rows of the sums; a sum without direction (an empty or cancelling group) stays where it was."""
    norms = np.sqrt(np.einsum("ij,ij->i", sums_KD, sums_KD))
    ok = norms > 1e-12
    out = fallback_KD.copy()
    out[ok] = (sums_KD[ok] / norms[ok, None]).astype(np.float32)
    return out


@dataclass(frozen=True)
class Assign:
    """Callable on the unit rows of a block, stripe by stripe -> labels and cosine distances in float32."""

    centroids_KD: F32

    def __call__(self, stripes: Iterable[F32]) -> tuple[npt.NDArray[np.int32], F32]:
        """Return labels (B,) int32 and 1 - cosine (B,) float32."""
        found = [nearest_centroid(rows, self.centroids_KD) for rows in stripes]
        labels = np.concatenate([label for label, _ in found])
        return labels, np.float32(1) - np.concatenate([product for _, product in found])
