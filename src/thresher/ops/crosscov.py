"""The computations of ClipCov: cross-modal similarities within a class, and the greedy selection from one class.

What a row loses when another row of its class is taken depends only on that class. Every class therefore has its own
order, and classes only have to be merged. In a class, similarities s(a, b) = <v_a, t_b> are either used unchanged, and
sums of them are products with a summed vector; or values below a clamp are set to 0 first, and sums are blocked
products. No matrix of a class is stored in either case.

The greedy selection is exact. It considers the best few rows of a class, repeatedly takes the best of them, and stops
when a row outside these candidates could be better. The gain of such a row is bounded by what it loses to the mean of
the previously taken rows, and by how far the rows taken now differ from that mean.

n rows of a class, C candidates, S rows taken, D dimensions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from thresher.ops.cut import top
from thresher.ops.products import ON_CPU, Products, clamped
from thresher.ops.vectors import F32

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

_MOST = 2048  # maximum number of candidates
_ROUNDING = 1e-6  # of a mean of float32 similarities
_SLACK = 1e-5  # bound on the error of a float32 cosine, with a margin


# --- sums of similarities -------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Taken:
    """Rows that were taken from a class, in the form needed to update its other rows.

    Attributes:
        image_SD: (S, D) float32 unit rows.
        text_SD: (S, D) float32 unit rows.
        sums: (2, D) float32, sum of the texts and sum of the images.
        toward: (2, D) float32, the direction for the drift, or None for the mean of these rows.
    """

    image_SD: F32
    text_SD: F32
    sums: F32
    toward: F32 | None

    @classmethod
    def of(cls, image_SD: F32, text_SD: F32, toward: F32 | None) -> Taken:
        """Sum the rows."""
        sums = np.stack([text_SD.sum(axis=0, dtype=np.float64), image_SD.sum(axis=0, dtype=np.float64)])
        return cls(image_SD, text_SD, sums.astype(np.float32), toward)


def losses(
    image_RD: F32, text_RD: F32, clamped_R: Bools, taken: Taken, clamp: float | None, products: Products = ON_CPU
) -> tuple[Floats, Floats]:
    """Return what rows R lose when rows S of their class are taken, both times n.

    Args:
        image_RD: (R, D) float32 unit rows.
        text_RD: (R, D) float32 unit rows.
        clamped_R: (R,) bool, for which rows the clamp changes a similarity; see :func:`where_clamped`.
        taken: Rows S.
        clamp: Similarities below it count as 0; None for no clamp.
        products: Computes the products.

    Returns:
        sum_s s(r, s) + s(s, r) (R,), and :func:`drifts` toward the direction (R,).
    """
    loss = drifts(image_RD, text_RD, taken.sums)
    drift = loss / len(taken.image_SD)
    if clamp is not None and taken.toward is not None:
        drift = drifts(image_RD, text_RD, taken.toward)
    if clamp is not None and clamped_R.any():
        there, _ = products.sums(image_RD[clamped_R], taken.text_SD, clamp)
        back, _ = products.sums(text_RD[clamped_R], taken.image_SD, clamp)
        loss[clamped_R] = there + back
    return loss, drift


def where_clamped(cross_n: Floats, mean_n: Floats, clamp: float | None) -> Bools:
    """Return for which rows the clamp changes a similarity with their class, (n,) bool.

    A clamp of 0 or below can only increase sums: the clamped mean similarity exceeds the unclamped one by the total of
    the zeroed values. If that difference is within rounding, no sum over a part of the class can differ by more.

    Args:
        cross_n: Mean similarity with the class, clamped.
        mean_n: The same without a clamp.
        clamp: The clamp.
    """
    if clamp is not None and clamp > 0:
        return np.ones(len(cross_n), np.bool_)
    return np.asarray(cross_n - mean_n > _ROUNDING, np.bool_)


def drifts(image_RD: F32, text_RD: F32, toward: F32) -> Floats:
    """Return <v_r, toward[0]> + <t_r, toward[1]>, (R,)."""
    return np.asarray(image_RD @ toward[0] + text_RD @ toward[1], np.float64)


# --- greedy selection from one class -------------------------------------------------------------------


@dataclass(eq=False)
class Walk:
    """The state of the greedy selection from one class; it can be resumed from here with the same bits.

    Attributes:
        gains_n: (n,) float64, gain of every row at the last refresh, without the class-wide balance;
            -inf for rows taken.
        drift_n: (n,) float64, n times the expected loss of a row when one more row is taken.
        toward: (2, D) float32, the direction from which the expected loss is computed.
        clamped_n: (n,) bool, see :func:`where_clamped`.
        balance_n: (n,) float64, n times the loss of all rows of the class once this row is taken.
        again_n: (n,) float64, n times their loss at every later refresh (as in the released code); or None.
        order: (m,) int64 rows taken, in order.
        gains: (m,) float64, their gains when they were taken, including the balance.
        lost: (m + 1,) float64, the loss of the class to balance after 0, 1, 2, ... rows were taken.
        stride: Number of rows of the last batch; 0 before the first.
    """

    gains_n: Floats
    drift_n: Floats
    toward: F32
    clamped_n: Bools
    balance_n: Floats
    again_n: Floats | None = None
    order: Ints = field(default_factory=lambda: np.empty(0, np.int64))
    gains: Floats = field(default_factory=lambda: np.empty(0))
    lost: Floats = field(default_factory=lambda: np.zeros(1))
    stride: int = 0

    def note(self, batch: Ints, gains: Floats, lost: Floats) -> None:
        """Record a batch, with the gains and the loss to balance after each of its rows."""
        self.order = np.concatenate([self.order, batch])
        self.gains = np.concatenate([self.gains, gains])
        self.lost = np.concatenate([self.lost, lost])
        self.gains_n[batch] = -np.inf
        self.stride = len(batch)

    def become(self, other: Walk) -> None:
        """Take over the state of this walk as another process advanced it; arrays of all rows stay where they are."""
        if other is self:
            return
        self.gains_n[:], self.drift_n[:] = other.gains_n, other.drift_n
        for name in ("toward", "order", "gains", "lost", "stride"):
            setattr(self, name, getattr(other, name))


Take = Callable[[Ints], tuple[F32, F32]]
Spend = Callable[[Ints, F32 | None], tuple[Floats, Floats]]


def advance(walk: Walk, clamp: float | None, refresh: int, least: int, floor: float, take: Take, spend: Spend) -> None:
    """Take more rows of a class, in batches that depend only on the class.

    Args:
        walk: The state; updated by one batch or more.
        clamp: Similarities below it count as 0; None for no clamp.
        refresh: Gains are updated after refresh - 1, 2 refresh - 1, ... rows of the class are taken.
        least: Continue until this many rows are taken,
        floor: or until the gain has fallen to this value. Batches are never cut.
        take: Rows of the class -> their image and text vectors.
        spend: (rows taken, toward) -> :func:`losses` of all n rows.
    """
    n = len(walk.gains_n)
    while len(walk.order) < n:
        batch, toward = _certain(walk, clamp, take) if refresh == 1 else (_segment(walk, refresh), None)
        if len(walk.order) < n:  # a segment that ends before the next refresh is the end of the class
            loss, drift = spend(batch, toward)
            walk.gains_n -= loss / n
            if toward is not None:
                walk.drift_n[:], walk.toward = drift, toward
        if len(walk.order) >= least or walk.gains[-1] <= floor:
            return


def _segment(walk: Walk, refresh: int) -> Ints:
    """Take the best rows up to the next refresh; until then gains do not change."""
    n = len(walk.gains_n)
    room = refresh - 1 - len(walk.order) % refresh or refresh
    left = np.flatnonzero(walk.gains_n > -np.inf)
    batch = left[top(walk.gains_n[left], min(room, len(left)))]
    batch = batch[np.lexsort((batch, -walk.gains_n[batch]))]
    cost = float(walk.balance_n[batch].sum())
    if walk.again_n is not None:
        cost += float(walk.again_n[batch].sum() + walk.again_n[walk.order].sum())
    lost = np.full(len(batch), walk.lost[-1])
    lost[-1] += cost / n
    walk.note(batch, walk.gains_n[batch] - walk.lost[-1], lost)
    return batch


def _certain(walk: Walk, clamp: float | None, take: Take) -> tuple[Ints, F32 | None]:
    """Take the rows that are certain to be next, in order; also return their mean texts and images, if needed.

    Rows whose gains differ by less than rounding count as equal; otherwise copies could only be taken one by one.
    """
    n = len(walk.gains_n)
    most = max(n // 32, 16)
    count = min(max(2 * most, 256), _MOST, n)
    if walk.stride:  # if the last batch was small, consider fewer candidates
        count = min(count, max(16 * walk.stride, 256))
    chosen, ceiling = _candidates(walk, clamp, count)
    image_CD, text_CD = take(chosen)
    between = clamped(image_CD @ text_CD.T, clamp)
    between = (between + between.T) / np.float32(n)
    seen_C2D = np.stack([text_CD, image_CD], axis=1)
    gains = walk.gains_n[chosen]
    astray = np.zeros_like(walk.toward)
    batch: list[int] = []
    values: list[float] = []
    while len(batch) < min(most, len(chosen)):
        best = int(gains.argmax())
        gain = float(gains[best])
        if batch and ceiling is not None:
            apart = float(np.sqrt(np.einsum("ij,ij->", astray, astray)))
            if gain <= ceiling(len(batch), apart) - _ROUNDING:
                break
        batch.append(best)
        values.append(gain)
        gains -= between[best]
        gains[best] = -np.inf
        if ceiling is not None:
            astray += seen_C2D[best] - walk.toward
    taken = chosen[batch]
    lost = walk.lost[-1] + np.cumsum(np.concatenate([[0.0], walk.balance_n[taken]])) / n
    walk.note(taken, np.array(values) - lost[:-1], lost[1:])
    toward = seen_C2D[batch].mean(axis=0, dtype=np.float64).astype(np.float32) if ceiling is not None else None
    return taken, toward


def _candidates(walk: Walk, clamp: float | None, count: int) -> tuple[Ints, Callable[[int, float], float] | None]:
    """Return the candidate rows, ascending, and a bound on the gain of all other rows.

    The arguments of the bound are the number of rows taken since, and the norm of the sum of their differences from
    ``toward``; it is None if all rows are candidates.
    """
    n = len(walk.gains_n)
    left = np.flatnonzero(walk.gains_n > -np.inf)
    if len(left) <= count:
        return left, None
    gains, drift = walk.gains_n[left], walk.drift_n[left] / n
    # The best rows now, and the best rows after the maximum number of rows is taken.
    hopeful = top(gains, count // 2) | top(gains - (count / 2) * drift, count // 2)
    gains, drift = gains[~hopeful], drift[~hopeful]
    # The maximum of n decreasing lines is convex in the number taken: between two points it is below their chord.
    points = np.linspace(0, count + 1, 17)
    lines = np.array([float((gains - p * drift).max()) for p in points])

    def ceiling(taken: int, apart: float) -> float:
        if clamp is not None and clamp > 0:  # the loss may be less than the similarity, but gains never increase
            return float(lines[0])
        # Rows (v, t) have norm sqrt(2), and the loss is at least the unclamped similarities.
        bound = float(np.interp(taken, points, lines)) + (2**0.5 * apart + _SLACK * taken) / n
        return bound if clamp is None or clamp < 0 else min(bound, float(lines[0]))

    return left[hopeful], ceiling


# --- all classes ----------------------------------------------------------------------------------


def merge(gains: list[Floats], rows: list[Ints], budget: int) -> tuple[Ints, float]:
    """Repeatedly take the next row of the class where it has the highest gain, until the budget is used.

    A row is taken only after all rows before it in its class, so its rank is that of the worst of them.

    Args:
        gains: Gains of the rows of every class, in its order.
        rows: Row ids of the same; of equal gains the lower id is taken first.
        budget: Maximum number of rows to take.

    Returns:
        (K,) int64 number of rows of each class, and the gain of the worst row taken (-inf if fewer than the budget).
    """
    sizes = np.array([len(own) for own in gains], np.int64)
    count = int(sizes.sum())
    if count < budget:
        return sizes, -np.inf
    # The gain at which a row is taken: the lowest up to it.
    reached = np.concatenate([np.minimum.accumulate(own) for own in gains])
    cut = np.partition(reached, count - budget)[count - budget]
    ends = np.cumsum(sizes)
    kept = np.array([np.count_nonzero(reached[end - size : end] > cut) for size, end in zip(sizes, ends, strict=True)])
    # Of the rows that are taken at the cut, each waits for the highest id with that gain before it in its class.
    at = np.flatnonzero(reached == cut)
    classes = np.searchsorted(ends, at, side="right")
    waiting: list[Ints] = []
    for k, count in zip(*(found.tolist() for found in np.unique(classes, return_counts=True)), strict=True):
        here = slice(kept[k], kept[k] + count)
        waiting.append(np.maximum.accumulate(np.where(gains[k][here] == cut, rows[k][here], -1)))
    first = np.argsort(np.concatenate(waiting), kind="stable")[: budget - int(kept.sum())]
    return kept + np.bincount(classes[first], minlength=len(sizes)), float(cut)


def forecast(score_n: Floats, cross_n: Floats, balance_n: Floats, starts_K: Ints, budget: int) -> Ints:
    """Estimate how many rows each class will keep, (K,) int64, as if all rows of a class were alike.

    Args:
        score_n: Scores of all rows, class by class.
        cross_n: Their mean similarity with the class, in both directions.
        balance_n: Their balance.
        starts_K: Start of each class.
        budget: Total number of rows to keep.
    """
    sizes = np.diff(np.append(starts_K, len(score_n)))
    classes = np.repeat(np.arange(len(sizes)), sizes)
    order = np.lexsort((-score_n, classes))
    share = (np.arange(len(score_n)) - starts_K[classes]) / sizes[classes]
    means = np.bincount(classes, cross_n + balance_n, minlength=len(sizes)) / np.maximum(sizes, 1)
    guess = score_n[order] - share * means[classes]
    return np.bincount(classes[np.argpartition(-guess, budget - 1)[:budget]], minlength=len(sizes))
