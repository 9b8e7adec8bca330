"""Herding: a subset whose mean of v t^T is as close to that of all rows as a greedy choice gets."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from thresher.ops.vectors import F32


def herd(image_ND: F32, text_NE: F32, count: int) -> npt.NDArray[np.int64]:
    """Return ``count`` rows, in the order in which they are taken.

    Each step takes the row after which the mean of v t^T over the rows taken is closest to the mean over all rows, in
    the Frobenius norm. The product of two such matrices is (v_i . v_j) (t_i . t_j), so that none is ever made for a
    row; as rows have unit length, the distance falls with <M, x_i> - sum over taken j of <x_j, x_i> / (taken + 1).

    Args:
        image_ND: (N, D) float32 unit rows.
        text_NE: (N, E) float32 unit rows.
        count: Number of rows to take, at most N.

    Returns:
        (count,) int64; among equally good rows the lowest is taken.
    """
    mean_DE = image_ND.T @ text_NE / np.float32(len(image_ND))
    toward_N = np.einsum("ij,ij->i", image_ND @ mean_DE, text_NE).astype(np.float64)
    taken_N = np.zeros(len(image_ND))  # sum of products with the rows taken
    order = np.empty(count, np.int64)
    for step in range(count):
        best = int(np.argmax(toward_N - taken_N / (step + 1)))
        order[step] = best
        toward_N[best] = -np.inf
        taken_N += (image_ND @ image_ND[best]) * (text_NE @ text_NE[best])
    return order
