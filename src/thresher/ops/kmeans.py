"""Spherical k-means: assignment by largest cosine, centroids are normalised sums.

Rows are processed in cache-sized stripes - product, argmax, accumulate - so that the N x K matrix of similarities is
never stored. Each row has two angles: an upper bound on the angle to its own centroid and a lower bound on the angle to
any other (Hamerly 2010, on the sphere). Centroids move less and less, and rows whose bounds cannot cross are skipped,
which changes no label. (Only the choice of the row that an empty group takes over uses the bound, not the angle.) Sums
are updated with the rows that change their group. All sums are taken in row order, in float64 across stripes, so that
the number of workers cannot change a bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from thresher.ops.vectors import F32

Labels = npt.NDArray[np.int32]

STRIPE = 1024  # rows per product
TILE = 1024  # centroids per product
SLACK = 4e-3  # minimum gap of bounds in radians: the error of float32 cosines near 1
_SIDE_BY_SIDE = 16  # maximum rows of a group that is summed with others
_MOSTLY = 0.9  # share of a stripe above which all of it is multiplied, without a copy


class Nearest(Protocol):
    """Finds the nearest centroid of each row. Rows need not be normalised; centroids are."""

    def __call__(self, rows_BD: F32, centroids_KD: F32) -> tuple[Labels, F32, F32]:
        """Return labels (B,) int32, and products with the nearest and the second centroid, (B,) float32 each."""
        ...


def nearest_two(rows_BD: F32, centroids_KD: F32) -> tuple[Labels, F32, F32]:
    """Find the nearest and the second nearest centroid of every row, in float32, with NumPy.

    Args:
        rows_BD: (B, D) float32, any length.
        centroids_KD: (K, D) float32 unit rows.

    Returns:
        labels (B,) int32, ties to the lower one, the products <row, centroid> (B,) float32 and those
        with the second nearest (B,) float32, -inf for a single centroid.
    """
    n, k = len(rows_BD), len(centroids_KD)
    labels = np.zeros(n, np.int32)
    best = np.full(n, -np.inf, np.float32)
    second = np.full(n, -np.inf, np.float32)
    buffer = np.empty(min(STRIPE, n) * min(TILE, k), np.float32)
    for lo in range(0, n, STRIPE):
        rows = rows_BD[lo : lo + STRIPE]
        at = np.arange(len(rows))
        label, value, other = (array[lo : lo + STRIPE] for array in (labels, best, second))
        for t in range(0, k, TILE):
            tile = centroids_KD[t : t + TILE]
            products = buffer[: len(rows) * len(tile)].reshape(len(rows), len(tile))
            np.matmul(rows, tile.T, out=products)
            arg = products.argmax(axis=1)
            top = products[at, arg]
            products[at, arg] = -np.inf
            np.maximum(other, products.max(axis=1), out=other)
            np.maximum(other, np.minimum(top, value), out=other)
            better = top > value
            label[better] = arg[better] + t
            value[better] = top[better]
    return labels, best, second


def nearest_centroid(rows_BD: F32, centroids_KD: F32) -> tuple[Labels, F32]:
    """Label every row with its nearest centroid: :func:`nearest_two` without the second."""
    labels, best, _ = nearest_two(rows_BD, centroids_KD)
    return labels, best


@dataclass(eq=False)
class State:
    """The state of k-means after an iteration; it can be resumed from here with the same bits.

    Attributes:
        centroids_KD: (K, D) float32 unit rows.
        moved_K: (K,) float32, radians each centroid moved in the last update.
        sums_KD: (K, D) float64 sums of the groups' rows.
        sizes_K: (K,) int64.
        labels_N: (N,) int32, -1 before the first iteration.
        upper_N: (N,) float32, upper bound on the angle to the own centroid, in radians.
        lower_N: (N,) float32, lower bound on the angle to any other centroid, in radians.
        done: () int64, number of iterations done.
    """

    centroids_KD: F32
    moved_K: F32
    sums_KD: npt.NDArray[np.float64]
    sizes_K: npt.NDArray[np.int64]
    labels_N: Labels
    upper_N: F32
    lower_N: F32
    done: npt.NDArray[np.int64]

    @classmethod
    def start(cls, centroids_KD: F32, rows: int) -> State:
        """Return the state before the first iteration."""
        k = len(centroids_KD)
        return cls(
            np.array(centroids_KD, np.float32),
            np.zeros(k, np.float32),
            np.zeros(centroids_KD.shape, np.float64),
            np.zeros(k, np.int64),
            np.full(rows, -1, np.int32),
            np.zeros(rows, np.float32),
            np.zeros(rows, np.float32),
            np.array(0, np.int64),
        )

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Return all arrays by name, to save them and to pass them to the constructor later."""
        return {item.name: getattr(self, item.name) for item in fields(self)}

    def bounds(self, lo: int, hi: int) -> Bounds:
        """Return a copy of the labels and bounds of rows lo..hi."""
        return Bounds(self.labels_N[lo:hi].copy(), self.upper_N[lo:hi].copy(), self.lower_N[lo:hi].copy())


@dataclass(frozen=True, eq=False)
class Bounds:
    """Labels (B,) int32 and bounding angles (B,) float32 of the rows of a block."""

    labels_B: Labels
    upper_B: F32
    lower_B: F32


@dataclass(frozen=True, eq=False)
class Moves:
    """The result of one block in an iteration: new bounds, and the changes to the sums and counts of groups."""

    bounds: Bounds
    groups_J: npt.NDArray[np.int64]
    sums_JD: npt.NDArray[np.float64]
    counts_J: npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class MoveRows:
    """Callable on the unit rows of a block, stripe by stripe, and their bounds -> :class:`Moves`.

    Attributes:
        centroids_KD: (K, D) float32 unit rows.
        moved_K: (K,) float32, radians each moved since the bounds were taken.
        nearest: The assignment function.
        slack: Minimum gap between bounds, in radians.
    """

    centroids_KD: F32
    moved_K: F32
    nearest: Nearest = nearest_two
    slack: float = SLACK

    def __call__(self, stripes: Iterable[F32], bounds: Bounds) -> Moves:
        """Relabel rows where necessary and sum the changes; float32 within a stripe, float64 across stripes."""
        parts: list[Sums] = []
        spare = np.empty((STRIPE, self.centroids_KD.shape[1]), np.float32)
        lo = 0
        for rows in stripes:
            here = slice(lo, lo + len(rows))
            lo += len(rows)
            parts += self._stripe(rows, bounds.labels_B[here], bounds.upper_B[here], bounds.lower_B[here], spare)
        if not parts:
            shape = (0, self.centroids_KD.shape[1])
            return Moves(bounds, np.empty(0, np.int64), np.empty(shape, np.float64), np.empty(0, np.int64))
        groups, inverse = np.unique(np.concatenate([part.groups_J for part in parts]), return_inverse=True)
        sums = np.zeros((len(groups), self.centroids_KD.shape[1]), np.float64)
        counts = np.zeros(len(groups), np.int64)
        start = 0
        for part in parts:
            at = inverse[start : start + len(part.groups_J)]
            start += len(at)
            if part.leaving:
                sums[at] -= part.sums_JD
                counts[at] -= part.counts_J
            else:
                sums[at] += part.sums_JD
                counts[at] += part.counts_J
        return Moves(bounds, groups.astype(np.int64), sums, counts)

    def _stripe(self, rows_BD: F32, label: Labels, upper: F32, lower: F32, spare: F32) -> list[Sums]:
        """Update labels and bounds in place; return the sums of rows that join and leave groups.

        ``spare`` (B or more, D) is a scratch buffer: allocating memory for every copy would cost more than the copy.
        """
        fresh = bool(label[0] < 0)
        if fresh:
            need = np.arange(len(rows_BD))
        else:
            own = self.moved_K[label]
            upper += own
            # Any other centroid came nearer by at most the largest move of the other centroids.
            order = np.argsort(self.moved_K)[-2:]
            largest, runner_up = self.moved_K[order[-1]], self.moved_K[order[0]]
            lower -= np.where(label == order[-1], runner_up, largest)
            need = np.flatnonzero(upper + self.slack >= lower)
            if len(need) > len(rows_BD) // 2:
                own_BD = np.take(self.centroids_KD, label, axis=0, out=spare[: len(label)], mode="clip")
                upper[:] = _angles(np.einsum("ij,ij->i", rows_BD, own_BD))
            elif len(need):
                own_BD = np.take(self.centroids_KD, label[need], axis=0, out=spare[: len(need)], mode="clip")
                upper[need] = _angles(np.einsum("ij,ij->i", rows_BD[need], own_BD))
            need = need[upper[need] + self.slack >= lower[need]]
        if not len(need):
            return []
        if len(need) > _MOSTLY * len(rows_BD):
            need = np.arange(len(rows_BD))
            some = rows_BD
        else:
            some = np.take(rows_BD, need, axis=0, out=spare[: len(need)], mode="clip")
        labels, best, second = self.nearest(some, self.centroids_KD)
        before = label[need]
        label[need], upper[need], lower[need] = labels, _angles(best), _angles(second)
        if fresh:
            return [sums_by_group(rows_BD, labels)]
        changed = np.flatnonzero(labels != before)
        if not len(changed):
            return []
        moving = some[changed]
        return [sums_by_group(moving, labels[changed]), sums_by_group(moving, before[changed], leaving=True)]


def _angles(cosines: F32) -> F32:
    return np.arccos(np.clip(cosines, -1, 1))


class Sums(NamedTuple):
    """Float32 sums and counts of the rows of each group present, groups ascending."""

    groups_J: Labels
    sums_JD: F32
    counts_J: npt.NDArray[np.int64]
    leaving: bool


def sums_by_group(rows_BD: F32, labels_B: Labels, *, leaving: bool = False) -> Sums:
    """Sum the rows of each group.

    Small groups are summed together - the second rows of all groups, then the third, and so on - and only larger groups
    one by one: four times faster than ``np.add.reduceat``.
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
    return Sums(ordered[starts], sums, counts, leaving)


Rule = Callable[[Iterable[F32], Bounds], Moves]
Passes = Callable[[Rule, State], Iterator[Moves]]


def fit(
    each_block: Passes,
    take: Callable[[npt.NDArray[np.int64]], F32],
    state: State,
    iterations: int,
    *,
    nearest: Nearest = nearest_two,
    slack: float = SLACK,
    after: Callable[[State], None] | None = None,
) -> F32:
    """Run Lloyd's iterations on the sphere, skipping rows that cannot change their group; stops at a fixed point.

    An empty group takes over the row that may be farthest from its own centroid (each such row once, farthest first).
    No group then stays empty unless there are fewer rows than groups.

    Args:
        each_block: ``each_block(rule, state)`` calls the rule on the unit rows of every block and
            ``state.bounds`` of its rows, and yields the results in row order.
        take: Returns single unit rows by position, for empty groups.
        state: The initial state; updated after every iteration.
        iterations: Total number of updates, including those in ``state``.
        nearest: The assignment function for the iterations.
        slack: Maximum error of its angles, in radians.
        after: Called after each update.

    Returns:
        The centroids, (K, D) float32 unit rows.
    """
    while int(state.done) < iterations:
        lo, changed = 0, 0
        for moves in each_block(MoveRows(state.centroids_KD, state.moved_K, nearest, slack), state):
            hi = lo + len(moves.bounds.labels_B)
            state.labels_N[lo:hi] = moves.bounds.labels_B
            state.upper_N[lo:hi] = moves.bounds.upper_B
            state.lower_N[lo:hi] = moves.bounds.lower_B
            state.sums_KD[moves.groups_J] += moves.sums_JD
            state.sizes_K[moves.groups_J] += moves.counts_J
            changed += len(moves.groups_J)
            lo = hi
        empty = np.flatnonzero(state.sizes_K == 0)
        state.sums_KD[empty] = 0  # remove rounding errors
        centroids = _normalise(state.sums_KD, state.centroids_KD)
        if len(empty):
            far = np.argsort(-state.upper_N, kind="stable")[: len(empty)]
            centroids[empty[: len(far)]] = take(far)
        chords = np.sqrt(((centroids.astype(np.float64) - state.centroids_KD) ** 2).sum(axis=1))
        state.moved_K = (2 * np.arcsin(np.minimum(chords / 2, 1))).astype(np.float32)
        state.centroids_KD = centroids
        # If no row changed its group, no later iteration will change one.
        state.done = np.array(state.done + 1 if changed or len(empty) else iterations, np.int64)
        if after is not None:
            after(state)
    return state.centroids_KD


def _normalise(sums_KD: npt.NDArray[np.float64], fallback_KD: F32) -> F32:
    """Return unit rows of the sums; a group whose sum is zero (empty or cancelling) keeps its centroid."""
    norms = np.sqrt(np.einsum("ij,ij->i", sums_KD, sums_KD))
    ok = norms > 1e-6
    out = fallback_KD.copy()
    out[ok] = (sums_KD[ok] / norms[ok, None]).astype(np.float32)
    return out


@dataclass(frozen=True)
class Assign:
    """Callable on the unit rows of a block, stripe by stripe -> labels and cosine distances in float32."""

    centroids_KD: F32

    def __call__(self, stripes: Iterable[F32]) -> tuple[npt.NDArray[np.int32], F32]:
        """Return labels (B,) int32 and 1 - cosine (B,) float32."""
        results = [nearest_centroid(rows, self.centroids_KD) for rows in stripes]
        labels = np.concatenate([label for label, _ in results])
        return labels, np.float32(1) - np.concatenate([product for _, product in results])
