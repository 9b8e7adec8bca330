"""Weighted k-nearest-neighbor classification: how well features separate classes, without training.

As in "Unsupervised Feature Learning via Non-Parametric Instance Discrimination" (arXiv 1805.01978), and later in the
evaluations of MoCo and DINO.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from thresher.errors import UsageError
from thresher.evaluation.accuracy import CELLS, KS, Array, Bools, Tally, as_classes, labels_for, units


def knn(
    train_ND: npt.ArrayLike,
    train_labels_N: npt.ArrayLike,
    test_MD: npt.ArrayLike,
    test_labels_M: npt.ArrayLike,
    *,
    k: int = 20,
    temperature: float = 0.07,
    ks: Sequence[int] = KS,
) -> dict[str, float]:
    """Classify every test row by the votes of its ``k`` nearest training rows, with weight exp(cosine / temperature).

    Of equally near rows the lower one votes. If classes get equal votes, or none, the right one ranks behind the
    others. Rows with a negative label are left out. Similarities are computed in blocks of rows.

    Args:
        train_ND: (N, D) features, any float type and norm.
        train_labels_N: (N,) integers.
        test_MD: (M, D) features, any float type and norm.
        test_labels_M: (M,) integers.
        k: Number of neighbors that vote; all rows if there are fewer.
        temperature: Above 0; a smaller value gives more weight to the nearest.
        ks: The values of k for top-k accuracy.

    Returns:
        "top1", "top5" (one for each of ``ks``), "mean_per_class", "majority", "chance", "classes" (of both sets) and
        "rows" (of the test set), as in :func:`thresher.evaluation.zero_shot.zero_shot`.

    Raises:
        UsageError: Shapes do not fit, there is no labelled row, or a row is zero or not finite.
    """
    if k < 1 or not temperature > 0:
        raise UsageError(f"k = {k}, temperature = {temperature}; give 1 neighbor or more, and a number above 0")
    train, test = units(train_ND, "training rows"), units(test_MD, "test rows")
    if train.shape[1] != test.shape[1]:
        raise UsageError(f"training rows of {train.shape[1]} dimensions, test rows of {test.shape[1]}")
    of_train = labels_for(train_labels_N, len(train), "training rows")
    of_test = labels_for(test_labels_M, len(test), "test rows")
    train, of_train = train[of_train >= 0], of_train[of_train >= 0]
    if not len(train):
        raise UsageError("no training row has a label")
    rows = np.flatnonzero(of_test >= 0)
    of_train, labels, classes = as_classes(of_train, of_test[rows])
    tally = Tally(classes, ks)
    step = max(1, min(1024, CELLS // max(len(train), classes)))
    for lo in range(0, len(rows), step):
        near_BN = test[rows[lo : lo + step]] @ train.T
        at_B, at_N = np.nonzero(_nearest(near_BN, k))
        # Minus the highest possible cosine, so that weights do not overflow.
        weights = np.exp((near_BN[at_B, at_N].astype(np.float64) - 1) / temperature)
        cells = at_B * classes + of_train[at_N]
        votes = np.bincount(cells, weights, minlength=len(near_BN) * classes)
        tally.add(votes.reshape(-1, classes), labels[lo : lo + step])
    return tally.shares()


def _nearest(near_BN: Array, k: int) -> Bools:
    """Mark the k highest values of every row; among equal ones the first."""
    n = near_BN.shape[1]
    if k >= n:
        return np.ones(near_BN.shape, np.bool_)
    cut_B = np.partition(near_BN, n - k, axis=1)[:, n - k, None]
    chosen_BN: Bools = near_BN >= cut_B
    for b in np.flatnonzero(np.count_nonzero(chosen_BN, axis=1) > k):
        tied = np.flatnonzero(near_BN[b] == cut_B[b])
        chosen_BN[b, tied[k - int(np.count_nonzero(near_BN[b] > cut_B[b])) :]] = False
    return chosen_BN
