"""Top-k accuracy, shared by zero-shot classification, kNN and the linear probe."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from thresher.errors import UsageError
from thresher.ops.vectors import F32, to_float32, unit_rows

Array = npt.NDArray[Any]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

KS = (1, 5)
TIE = 1e-6  # cosines closer than this are equal: embeddings of the same text may differ in their last bits
CELLS = 1 << 24  # size of a block of scores: 64 MiB as float32


class Tally:
    """Counts how often the right class is among the k best, block by block of rows.

    The rank of the right class is the number of other classes with the same or a higher score. A right class that ties
    with others ranks behind them, so that constant scores do not count as right.
    """

    def __init__(self, classes: int, ks: Sequence[int] = KS, *, tie: float = 0.0) -> None:
        """Start without rows.

        Args:
            classes: C.
            ks: The values of k, each 1 or more.
            tie: Scores that differ by at most this are equal.

        Raises:
            UsageError: A ``k`` below 1.
        """
        self.ks, self.tie = check_ks(ks), tie
        self._hits_KC = np.zeros((len(self.ks), classes), np.int64)
        self._rows_C = np.zeros(classes, np.int64)

    def add(self, scores_BC: Array, labels_B: Ints) -> None:
        """Add a block: the scores (B, C) of each row, and its right class (B,), 0 to C - 1."""
        right_B = scores_BC[np.arange(len(labels_B)), labels_B]
        ranks_B = np.count_nonzero(scores_BC >= (right_B - right_B.dtype.type(self.tie))[:, None], axis=1) - 1
        classes = len(self._rows_C)
        self._rows_C += np.bincount(labels_B, minlength=classes)
        for i, k in enumerate(self.ks):
            self._hits_KC[i] += np.bincount(labels_B[ranks_B < k], minlength=classes)

    def shares(self) -> dict[str, float]:
        """Return the shares.

        Returns:
            "top1" (one for each ``k``), the share of rows whose class is among the k best; "mean_per_class", the mean
            of top-1 over the classes that have rows; "majority", the share of rows in the largest class, which is the
            accuracy of always predicting it; "chance", 1 / C; "classes", C; and "rows".

        Raises:
            UsageError: No row was added.
        """
        rows = int(self._rows_C.sum())
        if not rows:
            raise UsageError("no row has a label; give at least one row with a label to evaluate on")
        there_C = self._rows_C > 0
        tops = {f"top{k}": float(hits_C.sum() / rows) for k, hits_C in zip(self.ks, self._hits_KC, strict=True)}
        first_C = self._hits_KC[self.ks.index(1)] if 1 in self.ks else None
        if first_C is not None:
            tops["mean_per_class"] = float(np.mean(first_C[there_C] / self._rows_C[there_C]))
        return {
            **tops,
            "majority": float(self._rows_C.max() / rows),
            "chance": 1 / len(self._rows_C),
            "classes": len(self._rows_C),
            "rows": rows,
        }


def check_ks(ks: Sequence[int]) -> tuple[int, ...]:
    """Return ``ks`` as a tuple.

    Raises:
        UsageError: It is empty, or a number is below 1.
    """
    if not ks or any(k < 1 for k in ks):
        raise UsageError(f"ks = {list(ks)}; give one or more integers, each 1 or more")
    return tuple(int(k) for k in ks)


def units(rows_ND: npt.ArrayLike, what: str) -> F32:
    """Return rows as (N, D) float32 of length 1.

    Raises:
        UsageError: It is not a matrix of floats, or a row is zero or not finite.
    """
    rows = np.asarray(rows_ND)
    if rows.ndim != 2 or rows.dtype.kind != "f" or not rows.size:
        raise UsageError(f"{what} of shape {rows.shape} and type {rows.dtype}; give floats, (rows, dimensions)")
    unit, bad = unit_rows(to_float32(rows))
    if len(bad):
        raise UsageError(f"row {int(bad[0]):,} of the {what} is zero or not finite; it cannot be normalized")
    return unit


def labels_for(labels_N: npt.ArrayLike, rows: int, what: str) -> Ints:
    """Return labels as (N,) int64, one for each of ``rows``; negative values mark rows without a label.

    Raises:
        UsageError: They are not integers, or not one per row.
    """
    labels = np.asarray(labels_N)
    if labels.shape != (rows,) or labels.dtype.kind not in "iu":
        raise UsageError(f"{what}: labels of shape {labels.shape} and type {labels.dtype}; give integers, ({rows},)")
    return np.asarray(labels, np.int64)


def as_classes(train_labels_N: Ints, test_labels_M: Ints) -> tuple[Ints, Ints, int]:
    """Number the classes of two sets from 0, in the order of their labels; return both, and the number of classes."""
    classes, codes = np.unique(np.concatenate([train_labels_N, test_labels_M]), return_inverse=True)
    codes = np.asarray(codes, np.int64)
    return codes[: len(train_labels_N)], codes[len(train_labels_N) :], len(classes)
