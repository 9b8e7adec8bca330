"""Cross-covariance of image and text: moments of rows, their deviation, and the deviation expected by chance.

N rows of unit vectors, D and E the widths of image and text, S a subset of m rows. The centred
cross-covariance of rows with weights w is C = 1/W sum_i w_i (v_i - v)(t_i - t)^T, W = sum w, v and t the
weighted means; the uncentred one, M = 1/W sum_i w_i v_i t_i^T = C + v t^T.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from thresher.ops.vectors import F32

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Moments:
    """First and second moments of weighted rows.

    Attributes:
        weight: W; 0 for no rows, whose moments are all zero.
        image_D: Mean image vector, float64.
        text_E: Mean text vector, float64.
        scatter_DE: W C, float32 from one product, float64 from a sum of several.
    """

    weight: float
    image_D: Floats
    text_E: Floats
    scatter_DE: Array

    @property
    def centred_DE(self) -> Array:
        """C."""
        return np.asarray(self.scatter_DE / self.scatter_DE.dtype.type(max(self.weight, 1.0)))


def moments(image_ND: F32, text_NE: F32, weights_N: Array | None = None) -> Moments:
    """Return the moments of unit rows with integer weights (default: 1 each)."""
    if weights_N is not None:
        kept = np.flatnonzero(weights_N)
        if len(kept) < len(weights_N):
            image_ND, text_NE, weights_N = image_ND[kept], text_NE[kept], weights_N[kept]
        if (weights_N == 1).all():
            weights_N = None
    if not len(image_ND):
        d, e = image_ND.shape[1], text_NE.shape[1]
        return Moments(0.0, np.zeros(d), np.zeros(e), np.zeros((d, e), np.float32))
    image_D, text_E = _mean(image_ND, weights_N), _mean(text_NE, weights_N)
    left, right = image_ND - image_D.astype(np.float32), text_NE - text_E.astype(np.float32)
    if weights_N is not None:
        left *= weights_N.astype(np.float32)[:, None]
    weight = float(len(image_ND) if weights_N is None else weights_N.sum(dtype=np.float64))
    return Moments(weight, image_D, text_E, left.T @ right)


def _mean(rows_ND: F32, weights_N: Array | None) -> Floats:
    if weights_N is None:
        return np.asarray(rows_ND.mean(axis=0, dtype=np.float64))
    return np.asarray(np.average(rows_ND.astype(np.float64), axis=0, weights=weights_N))


class Sum:
    """Accumulates moments of groups of rows: the scatter within groups and the scatter of their means, in float64."""

    def __init__(self) -> None:
        """Start without groups."""
        self._weights: list[float] = []
        self._images: list[Floats] = []
        self._texts: list[Floats] = []
        self._scatter_DE: Floats | None = None

    def add(self, group: Moments) -> None:
        """Add a group. Its means are stored; its scatter is only added to the sum."""
        self._weights.append(group.weight)
        self._images.append(group.image_D)
        self._texts.append(group.text_E)
        if self._scatter_DE is None:
            self._scatter_DE = group.scatter_DE.astype(np.float64)
        elif group.weight:
            self._scatter_DE += group.scatter_DE

    def plus(self, other: Sum) -> Sum:
        """Add the groups of another sum, after those of this one."""
        self._weights += other._weights
        self._images += other._images
        self._texts += other._texts
        if self._scatter_DE is None:
            self._scatter_DE = other._scatter_DE
        elif other._scatter_DE is not None:
            self._scatter_DE += other._scatter_DE
        return self

    def moments(self) -> Moments:
        """Return the moments of all rows of the added groups; requires at least one group."""
        weights_K, image_KD, text_KE = np.array(self._weights), np.array(self._images), np.array(self._texts)
        weight = float(weights_K.sum())
        image_D, text_E = weights_K @ image_KD / max(weight, 1.0), weights_K @ text_KE / max(weight, 1.0)
        between_DE = (weights_K[:, None] * (image_KD - image_D)).T @ (text_KE - text_E)
        return Moments(weight, image_D, text_E, np.asarray(self._scatter_DE) + between_DE)


def deviations(pool: Moments, subset: Moments) -> tuple[float, float]:
    """Return ||C - C_S|| and ||M - M_S||, Frobenius norms; a subset without rows has C_S = M_S = 0."""
    apart_DE = pool.centred_DE - subset.centred_DE
    # v t^T - v_S t_S^T, in a form that gives exact zeros for equal means.
    left = np.stack([pool.image_D - subset.image_D, subset.image_D])
    right = np.stack([pool.text_E, pool.text_E - subset.text_E])
    centred = float(np.linalg.norm(apart_DE))
    apart_DE += (left.T @ right).astype(apart_DE.dtype)
    return centred, float(np.linalg.norm(apart_DE))


# --- chance ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spread:
    """The quantities that determine the error of a random subset of unit rows.

    Attributes:
        rows: n.
        centred: ||C||.
        uncentred: ||M||.
        separate: p = (1/n sum ||v_i - v||^2) (1/n sum ||t_i - t||^2).
        paired: q = 1/n sum ||v_i - v||^2 ||t_i - t||^2.
    """

    rows: int
    centred: float
    uncentred: float
    separate: float
    paired: float

    @classmethod
    def of(cls, pool: Moments) -> Spread:
        """Return the spread of unit rows, each with weight 1, computed from their moments.

        With ||v_i|| = ||t_i|| = 1: ||v_i - v||^2 = 1 + |v|^2 - 2 v_i.v, so that q = p + 4 v^T C t.
        """
        centred_DE = pool.centred_DE
        image, text = (max(1 - float(mean @ mean), 0.0) for mean in (pool.image_D, pool.text_E))
        separate = image * text
        paired = separate + 4 * float(pool.image_D @ centred_DE @ pool.text_E)
        centred = float(np.linalg.norm(centred_DE))
        centred_DE += np.outer(pool.image_D, pool.text_E).astype(centred_DE.dtype)
        return cls(round(pool.weight), centred, float(np.linalg.norm(centred_DE)), separate, max(paired, 0.0))

    def expected(self, kept_M: Array) -> tuple[Floats, Floats]:
        """Return the root mean squares of ||C - C_S|| and of ||M - M_S|| over all subsets of m rows, (M,) each.

        Exact for a draw without replacement, with the subset centred by its own means. With x_i = v_i - v
        and y_i = t_i - t, C_S = a A - b B, where A sums x_i y_i^T over S and B sums x_i y_j^T over its
        pairs i != j. The squares are sums over up to four rows, each term weighted by the probability that all
        its different rows are drawn; because the x_i and y_i sum to zero, all terms reduce to ||C||, p and q.
        """
        n, m = float(self.rows), np.asarray(kept_M, np.float64)
        c, u, p, q = self.centred**2, self.uncentred**2, self.separate, self.paired
        some = np.maximum(m, 1)
        one = m / n
        two = one * (m - 1) / max(n - 1, 1)
        three = two * (m - 2) / max(n - 2, 1)
        four = three * (m - 3) / max(n - 3, 1)
        a, b = (some - 1) / some**2, 1 / some**2
        nq, nnc, nnp = n * q, n * n * c, n * n * p
        aa = one * nq + two * (nnc - nq)
        ab = -2 * two * nq + three * (2 * nq - nnc)
        bb = two * (nnp + nnc - 2 * nq) + three * (8 * nq - 2 * nnp - 2 * nnc) + four * (nnp + 2 * nnc - 6 * nq)
        centred = a * a * aa - 2 * a * b * ab + b * b * bb - 2 * (a * one + b * two) * n * c + c
        uncentred = (n - m) / (some * max(n - 1, 1)) * (1 - u)
        centred, uncentred = (
            np.where(m == 0, whole, np.where(m == n, 0.0, np.maximum(part, 0.0)))
            for whole, part in ((c, centred), (u, uncentred))
        )
        return np.sqrt(centred), np.sqrt(uncentred)

    def by_chance(self, total: int, kept: int) -> tuple[float, float]:
        """Return the expected errors of a class with this spread if ``kept`` of the ``total`` rows of a pool are drawn.

        The number of rows of the class among them has a hypergeometric distribution.
        """
        counts_M, chances_M = hypergeometric(total, self.rows, kept)
        centred, uncentred = self.expected(counts_M)
        return float(chances_M @ centred), float(chances_M @ uncentred)


def hypergeometric(total: int, marked: int, drawn: int) -> tuple[npt.NDArray[np.int64], Floats]:
    """Return the possible counts of marked rows among those drawn, (M,) int64, and their probabilities, (M,) float64.

    Counts more than ten standard deviations from the mean are omitted.
    """
    share = marked / total
    mean, width = drawn * share, 10 * (drawn * share * (1 - share)) ** 0.5 + 10
    low = max(0, drawn - (total - marked), int(mean - width))
    high = min(marked, drawn, int(mean + width))
    counts_M = np.arange(low, high + 1)
    x = counts_M[:-1].astype(np.float64)
    steps = np.log((marked - x) * (drawn - x)) - np.log((x + 1) * (total - marked - drawn + x + 1))
    logs_M = np.concatenate([[0.0], np.cumsum(steps)])
    chances_M = np.exp(np.maximum(logs_M - logs_M.max(), -700))
    return counts_M, np.asarray(chances_M / chances_M.sum(), np.float64)
