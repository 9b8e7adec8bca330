"""Spherical k-means: assignment by largest cosine, centroids are normalised sums.

Rows are processed in cache-sized stripes - product, argmax, accumulate - so that the N x K matrix of similarities is
never stored. Each row has two angles: an upper bound on the angle to its own centroid and a lower bound on the angle to
any other (Hamerly 2010, on the sphere). Centroids move less and less, and rows whose bounds cannot cross are skipped,
which changes no label. (Only the choice of the row that an empty group takes over uses the bound, not the angle.) Sums
are updated with the rows that change their group, some thousand at a time. All sums are taken in row order, so that the
number of workers cannot change a bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from thresher.ops.vectors import F32, workspace

Labels = npt.NDArray[np.int32]

STRIPE = 1024  # rows per product
TILE = 1024  # centroids per product
SLACK = 4e-3  # minimum gap of bounds in radians: the error of float32 cosines near 1
_NEAREST = 4  # coarse centroids whose centroids a row is multiplied with
_FEW = 4  # groups that are summed one by one
_TOGETHER = 4096  # most rows that are summed at once, in float32
_TOGETHER_VALUES = 2**20  # and most values, unless one stripe has more
_MOSTLY = 0.9  # share of a stripe above which all of it is multiplied, without a copy
_EVERY = 8  # one stripe of eight takes lower bounds while they do not pay
_SAMPLED = 2**16  # rows by which the cost of an iteration is estimated
_FAST = (2**40, 64, 32, 16, 8, 4)  # parts of the centroids that may be multiplied with all rows
# Measured costs, relative to the products of all rows with all centroids:
_WORTH_USING = 0.95  # most that bounds may cost, to be used
_WORTH_TAKING = 0.85  # and to be taken, which costs one iteration more
_KNOWN = 0.9  # share of the rows that must have bounds
_BOUNDS = 0.04  # keeping bounds
_TIGHTEN = 0.12  # the angle of a row to its own centroid
_PRODUCT = 1.12  # products of some rows, copied, with the second nearest
_FAST_PRODUCT = 1.2  # products with few centroids


class Nearest(Protocol):
    """Finds the nearest centroid of each row. Rows need not be normalised; centroids are."""

    @property
    def stripe(self) -> int:
        """Number of rows to pass at once."""
        ...

    def prepared(self, centroids_KD: F32) -> Any:
        """Return centroids in the form in which many calls are fastest."""
        ...

    def __call__(
        self, rows_BD: F32, centroids_KD: Any, scratch: F32 | None = None, *, second: bool = True
    ) -> tuple[Labels, F32, F32]:
        """Return labels (B,) int32, and products with the nearest and the second centroid, (B,) float32 each.

        The centroids are (K, D) float32 unit rows, or prepared ones. ``scratch`` is memory from :func:`products_of`, to
        be reused. Without ``second``, the last array may be any upper bound of the products with other centroids.
        """
        ...


def products_of(centroids_KD: F32) -> F32:
    """Return memory for the products of a stripe of rows with a tile of these centroids."""
    return workspace(STRIPE, min(TILE, len(centroids_KD)))


def by_columns(centroids_KD: F32) -> F32:
    """Return the same centroids in Fortran order: products with them are 5% faster, and equal bit for bit."""
    return np.asfortranarray(centroids_KD)


def nearest_two(
    rows_BD: F32, centroids_KD: F32, scratch: F32 | None = None, *, second: bool = True
) -> tuple[Labels, F32, F32]:
    """Find the nearest and the second nearest centroid of every row, in float32, with NumPy.

    Args:
        rows_BD: (B, D) float32, any length.
        centroids_KD: (K, D) float32 unit rows.
        scratch: Memory from :func:`products_of`, to be reused.
        second: Whether to find the second nearest.

    Returns:
        labels (B,) int32, ties to the lower one, the products <row, centroid> (B,) float32 and those
        with the second nearest (B,) float32, -inf for a single centroid; infinity if they were not asked for.
    """
    n, k = len(rows_BD), len(centroids_KD)
    labels = np.zeros(n, np.int32)
    best = np.full(n, -np.inf, np.float32)
    others = np.full(n, -np.inf if second else np.inf, np.float32)
    memory = (products_of(centroids_KD) if scratch is None else scratch).reshape(-1)
    for lo in range(0, n, STRIPE):
        rows = rows_BD[lo : lo + STRIPE]
        at = np.arange(len(rows))
        label, value, other = (array[lo : lo + STRIPE] for array in (labels, best, others))
        for t in range(0, k, TILE):
            tile = centroids_KD[t : t + TILE]
            products = memory[: len(rows) * len(tile)].reshape(len(rows), len(tile))
            np.matmul(rows, tile.T, out=products)
            arg = products.argmax(axis=1)
            top = products[at, arg]
            if second:
                products[at, arg] = -np.inf
                np.maximum(other, products.max(axis=1), out=other)
                np.maximum(other, np.minimum(top, value), out=other)
            better = top > value
            np.copyto(label, arg + t, where=better, casting="same_kind")
            np.copyto(value, top, where=better)
    return labels, best, others


def nearest_centroid(rows_BD: F32, centroids_KD: F32, scratch: F32 | None = None) -> tuple[Labels, F32]:
    """Label every row with its nearest centroid: :func:`nearest_two` without the second."""
    labels, best, _ = nearest_two(rows_BD, centroids_KD, scratch, second=False)
    return labels, best


@dataclass(frozen=True)
class NumpyNearest:
    """:func:`nearest_two`, as :class:`Nearest`."""

    stripe: ClassVar[int] = STRIPE

    def prepared(self, centroids_KD: F32) -> F32:
        """Return the centroids in Fortran order."""
        return by_columns(centroids_KD)

    def __call__(
        self, rows_BD: F32, centroids_KD: F32, scratch: F32 | None = None, *, second: bool = True
    ) -> tuple[Labels, F32, F32]:
        """Find the nearest and the second nearest centroid."""
        return nearest_two(rows_BD, centroids_KD, scratch, second=second)


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
        lower_N: (N,) float32, lower bound on the angle to any other centroid, in radians; 0 if not known.
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

    def apart(self) -> tuple[Moves, Moves]:
        """Return the bounds without changes, and the changes without bounds."""
        return replace(self, groups_J=self.groups_J[:0], sums_JD=self.sums_JD[:0], counts_J=self.counts_J[:0]), replace(
            self, bounds=Bounds(*(array[:0] for array in vars(self.bounds).values()))
        )

    def plus(self, other: Moves) -> Moves:
        """Return the changes of both; those of this one may be used for it."""
        mine, others = ((one.groups_J, one.sums_JD, one.counts_J) for one in (self, other))
        return Moves(self.bounds, *add_by_group(mine, others))


def add_by_group(one: tuple[Any, ...], other: tuple[Any, ...]) -> tuple[Any, ...]:
    """Add sums by group.

    Args:
        one: (J,) ascending groups, and sums of each, (J, ...); may be changed.
        other: The same of other rows; those of ``one`` are added first.

    Returns:
        The groups of both, and their sums.
    """
    groups = one[0]
    if not np.isin(other[0], groups).all():
        groups = np.union1d(groups, other[0])
    at, place = np.searchsorted(groups, one[0]), np.searchsorted(groups, other[0])
    sums = []
    for mine, others in zip(one[1:], other[1:], strict=True):
        total = mine
        if groups is not one[0]:
            total = np.zeros((len(groups), *mine.shape[1:]), mine.dtype)
            total[at] = mine
        total[place] += others
        sums.append(total)
    return (groups, *sums)


@dataclass(frozen=True, eq=False)
class MoveRows:
    """Callable on the unit rows of a block, stripe by stripe, and their bounds -> :class:`Moves`.

    Attributes:
        centroids_KD: (K, D) float32 unit rows.
        moved_K: (K,) float32, radians each moved since the bounds were taken.
        nearest: The assignment function.
        slack: Minimum gap between bounds, in radians.
        bounds: "used" skips rows by their bounds. Otherwise all rows are multiplied: "taken" takes lower bounds of all
            rows for the next iteration, "sampled" those of one stripe of eight, to see when they begin to pay.
        fast_F: (F,) centroids with which every row is multiplied, so that their moves do not weaken the bounds.
    """

    centroids_KD: F32
    moved_K: F32
    nearest: Nearest = NumpyNearest()
    slack: float = SLACK
    bounds: Literal["used", "taken", "sampled"] = "used"
    fast_F: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))

    @property
    def stripe(self) -> int:
        """Rows of a stripe."""
        return self.nearest.stripe

    def __call__(self, stripes: Iterable[F32], bounds: Bounds) -> Moves:
        """Relabel rows where necessary and sum the changes: in float32 of some thousand rows, and these in float64."""
        d = self.centroids_KD.shape[1]
        memory = _Memory(workspace(self.nearest.stripe, d), products_of(self.centroids_KD))
        changes = _Changes(max(STRIPE, min(_TOGETHER, _TOGETHER_VALUES // d)), d)
        lo = 0
        for i, rows in enumerate(stripes):
            here = slice(lo, lo + len(rows))
            lo += len(rows)
            of_stripe = Bounds(bounds.labels_B[here], bounds.upper_B[here], bounds.lower_B[here])
            changes.add(rows, *self._stripe(rows, of_stripe, memory, sampled=i % _EVERY == 0))
        return Moves(bounds, *changes.total())

    def _stripe(
        self, rows_BD: F32, bounds: Bounds, memory: _Memory, *, sampled: bool
    ) -> tuple[npt.NDArray[np.int64], Labels, Labels]:
        """Update labels and bounds in place; return the rows that change their group, (C,), and both groups of each."""
        label, upper, lower = bounds.labels_B, bounds.upper_B, bounds.lower_B
        if self.bounds != "used" or label[0] < 0:
            need = np.arange(len(rows_BD))
        else:
            need = self._doubtful(rows_BD, bounds, memory)
        if not len(need):
            return need, label[need], label[need]
        if len(need) > _MOSTLY * len(rows_BD):
            need = np.arange(len(rows_BD))
            some = rows_BD
        else:
            some = np.take(rows_BD, need, axis=0, out=memory.rows_BD[: len(need)], mode="clip")
        second = sampled or self.bounds != "sampled"
        labels, best, others = self.nearest(some, self._columns_KD, memory.products, second=second)
        before = label[need]
        label[need], upper[need], lower[need] = labels, _angles(best), _angles(others) if second else 0
        changed = np.flatnonzero(labels != before)
        return need[changed], before[changed], labels[changed]

    def _doubtful(self, rows_BD: F32, bounds: Bounds, memory: _Memory) -> npt.NDArray[np.int64]:
        """Update the bounds for the moves of the centroids; return the rows that may change their group."""
        label, upper, lower = bounds.labels_B, bounds.upper_B, bounds.lower_B
        upper += self.moved_K[label]
        most, largest, runner_up = self._slow
        # Any other slow centroid came nearer by at most the largest move among them.
        lower -= np.where(label == most, runner_up, largest)
        if len(self.fast_F):
            nearest, best, second = self.nearest(rows_BD, self._fast_FD, memory.products)
            np.minimum(lower, _angles(np.where(self.fast_F[nearest] == label, second, best)), out=lower)
        need = np.flatnonzero(upper + self.slack >= lower)
        if len(need) > len(rows_BD) // 2:
            own_BD = np.take(self.centroids_KD, label, axis=0, out=memory.rows_BD[: len(label)], mode="clip")
            upper[:] = _angles(np.einsum("ij,ij->i", rows_BD, own_BD))
        elif len(need):
            own_BD = np.take(self.centroids_KD, label[need], axis=0, out=memory.rows_BD[: len(need)], mode="clip")
            upper[need] = _angles(np.einsum("ij,ij->i", rows_BD[need], own_BD))
        return need[upper[need] + self.slack >= lower[need]]

    @cached_property
    def _slow(self) -> tuple[int, float, float]:
        """The slow centroid that moved most, its move, and the largest move of the other slow ones."""
        moved = self.moved_K.copy()
        moved[self.fast_F] = 0
        order = np.argsort(moved)[-2:]
        return int(order[-1]), float(moved[order[-1]]), float(moved[order[0]])

    @cached_property
    def _columns_KD(self) -> Any:
        return self.nearest.prepared(self.centroids_KD)

    @cached_property
    def _fast_FD(self) -> Any:
        return self.nearest.prepared(self.centroids_KD[self.fast_F])


class _Memory(NamedTuple):
    """Scratch memory of a worker, for the copied rows of a stripe and for products."""

    rows_BD: F32
    products: F32


def rule_for(state: State, nearest: Nearest = NumpyNearest(), slack: float = SLACK) -> MoveRows:
    """Return the cheapest rule for the next iteration, by a sample of the rows.

    Bounds cost a tenth of the products. Where centroids still move as far as rows are from a second centroid, all rows
    are multiplied. Often only some centroids move far, such as those of small groups: the rows are multiplied with
    these, and the bounds have to hold for the others only. The choice depends on nothing but the state, and changes no
    label.
    """
    every = max(len(state.lower_N) // _SAMPLED, 1) | 1  # odd: not in step with stripes
    upper, lower, labels = state.upper_N[::every], state.lower_N[::every], state.labels_N[::every]
    known = (lower > 0) & (labels >= 0)
    rule = MoveRows(state.centroids_KD, state.moved_K, nearest, slack, "sampled")
    if not known.any():
        return rule
    gap, own = (lower - upper - slack)[known], state.moved_K[labels[known]]
    order = np.argsort(-state.moved_K, kind="stable")
    k = len(order)
    costs: dict[int, float] = {}
    for count in {k // part for part in _FAST}:
        left = gap - state.moved_K[order[count]]
        doubtful, multiplied = float((left <= own).mean()), float((left <= 0).mean())
        costs[count] = _BOUNDS + _FAST_PRODUCT * count / k + _TIGHTEN * doubtful + _PRODUCT * multiplied
    count = min(costs, key=lambda count: (costs[count], count))
    if float(known.mean()) < _KNOWN:
        return replace(rule, bounds="taken") if costs[count] < _WORTH_TAKING else rule
    if costs[count] < _WORTH_USING:
        return replace(rule, bounds="used", fast_F=np.sort(order[:count]))
    return rule


def _angles(cosines: F32) -> F32:
    return np.arccos(np.clip(cosines, -1, 1))


class Sums(NamedTuple):
    """Float32 sums and counts of the rows of each group present."""

    groups_J: Labels
    sums_JD: F32
    counts_J: npt.NDArray[np.int64]


class _Changes:
    """Collects rows that change their group, from many stripes, and sums them together: fewer and larger sums."""

    def __init__(self, rows: int, dim: int) -> None:
        self._rows = workspace(rows, dim)
        self._groups = np.empty((2, rows), np.int32)  # before and after
        self._held = 0
        self._parts: list[tuple[Sums, bool]] = []

    def add(self, rows_BD: F32, at_C: npt.NDArray[np.int64], before_C: Labels, after_C: Labels) -> None:
        """Add rows ``at_C`` of a stripe, which leave one group (-1: none) and join another."""
        done = 0
        while done < len(at_C):
            start = self._held
            take = slice(done, done + len(self._rows) - start)
            some = at_C[take]
            done += len(some)
            self._held += len(some)
            here = slice(start, self._held)
            np.take(rows_BD, some, axis=0, out=self._rows[here], mode="clip")
            self._groups[0, here], self._groups[1, here] = before_C[take], after_C[take]
            if self._held == len(self._rows):
                self._sum()

    def _sum(self) -> None:
        before, after = self._groups[:, : self._held]
        left = np.flatnonzero(before >= 0)
        for groups, at, leaving in ((after, None, False), (before[left], left, True)):
            if len(groups):
                self._parts.append((sums_by_group(self._rows, groups, at), leaving))
        self._held = 0

    def total(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64], npt.NDArray[np.int64]]:
        """Return the ascending groups that changed, (J,), and the changes of their sums, (J, D), and counts, (J,)."""
        self._sum()
        present = [part.groups_J for part, _ in self._parts]
        groups = np.unique(np.concatenate([np.empty(0, np.int32), *present])).astype(np.int64)
        sums, counts = np.zeros((len(groups), self._rows.shape[1])), np.zeros(len(groups), np.int64)
        for part, leaving in self._parts:
            at = np.searchsorted(groups, part.groups_J)
            if leaving:
                sums[at] -= part.sums_JD
                counts[at] -= part.counts_J
            else:
                sums[at] += part.sums_JD
                counts[at] += part.counts_J
        return groups, sums, counts


def sums_by_group(rows_BD: F32, labels_C: Labels, at_C: npt.NDArray[np.int64] | None = None) -> Sums:
    """Sum the rows of each group, in row order; the largest groups come first.

    Groups are summed together - the second rows of all groups, then the third, and so on - until few groups have a next
    row; these are summed one by one. This is many times faster than ``np.add.reduceat``.

    Args:
        rows_BD: (B, D) float32.
        labels_C: (C,) the group of each row to sum.
        at_C: (C,) positions of these rows; the first C by default.
    """
    order = np.argsort(labels_C, kind="stable")
    ordered = labels_C[order]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    counts = np.diff(np.append(starts, len(ordered)))
    largest = np.argsort(-counts, kind="stable")  # so that groups with a next row are the first ones
    starts, counts = starts[largest], counts[largest]
    if at_C is not None:
        order = at_C[order]
    sums = np.take(rows_BD, order[starts], axis=0, mode="clip")
    with_row = np.searchsorted(-counts, -np.arange(counts[0] + 1)).tolist()  # groups of more than 0, 1, ... rows
    turn, memory = 1, np.empty_like(sums)
    while with_row[turn] > _FEW:
        end = with_row[turn]
        sums[:end] += np.take(rows_BD, order[starts[:end] + turn], axis=0, out=memory[:end], mode="clip")
        turn += 1
    for j in range(with_row[turn]):
        rest = rows_BD[order[starts[j] + turn : starts[j] + counts[j]]]
        rest[0] += sums[j]
        sums[j] = np.add.reduce(rest, axis=0)
    return Sums(ordered[starts], sums, counts)


Passes = Callable[[MoveRows, State], Iterator[Moves]]


def fit(
    each_block: Passes,
    take: Callable[[npt.NDArray[np.int64]], F32],
    state: State,
    iterations: int,
    *,
    nearest: Nearest = NumpyNearest(),
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
        for moves in each_block(rule_for(state, nearest, slack), state):
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
    nearest: Nearest = NumpyNearest()

    @property
    def stripe(self) -> int:
        """Rows of a stripe."""
        return self.nearest.stripe

    def __call__(self, stripes: Iterable[F32]) -> tuple[npt.NDArray[np.int32], F32]:
        """Return labels (B,) int32 and 1 - cosine (B,) float32."""
        scratch = products_of(self.centroids_KD)
        results = [self.nearest(rows, self._columns_KD, scratch, second=False) for rows in stripes]
        labels = np.concatenate([label for label, _, _ in results])
        return labels, np.float32(1) - np.concatenate([product for _, product, _ in results])

    @cached_property
    def _columns_KD(self) -> Any:
        return self.nearest.prepared(self.centroids_KD)


@dataclass(frozen=True)
class AssignTree:
    """Callable like :class:`Assign`: the nearest of the centroids that belong to the four nearest coarse ones.

    A row takes J + 4 K / J products instead of K. Its centroid is seldom not the nearest of all.

    Attributes:
        coarse_JD: (J, D) float32 unit rows.
        centroids_KD: (K, D) float32 unit rows, those of the first coarse centroid first; each has one at least.
        ends_J: (J,) int64, where the centroids of each coarse one end.
    """

    coarse_JD: F32
    centroids_KD: F32
    ends_J: npt.NDArray[np.int64]
    stripe: ClassVar[int] = STRIPE

    def __call__(self, stripes: Iterable[F32]) -> tuple[npt.NDArray[np.int32], F32]:
        """Return labels (B,) int32 and 1 - cosine (B,) float32."""
        rows_BD = np.concatenate([rows.copy() for rows in stripes])
        coarse_BP = self._nearest_coarse(rows_BD)
        order = np.argsort(coarse_BP, axis=None, kind="stable")
        each = np.bincount(coarse_BP.reshape(-1), minlength=len(self.ends_J))
        labels, best = np.zeros(len(rows_BD), np.int32), np.full(len(rows_BD), -np.inf, np.float32)
        scratch = products_of(self.centroids_KD)
        ends = np.cumsum(each).tolist()
        for j in np.flatnonzero(each).tolist():
            own = order[ends[j] - each[j] : ends[j]] // coarse_BP.shape[1]
            label, product = nearest_centroid(rows_BD[own], self._columns[j], scratch)
            better = product > best[own]
            labels[own[better]] = label[better] + (self.ends_J[j - 1] if j else 0)
            best[own[better]] = product[better]
        return labels, np.float32(1) - best

    def _nearest_coarse(self, rows_BD: F32) -> Labels:
        """Return the nearest coarse centroids of each row, (B, P)."""
        coarse_BP = np.empty((len(rows_BD), min(_NEAREST, len(self.coarse_JD))), np.int32)
        for lo in range(0, len(rows_BD), STRIPE):
            products = rows_BD[lo : lo + STRIPE] @ self.coarse_JD.T
            at = np.arange(len(products))
            for turn in range(coarse_BP.shape[1]):
                coarse_BP[lo : lo + STRIPE, turn] = nearest = products.argmax(axis=1)
                products[at, nearest] = -np.inf
        return coarse_BP

    @cached_property
    def _columns(self) -> list[F32]:
        return [by_columns(part) for part in np.split(self.centroids_KD, self.ends_J[:-1])]
