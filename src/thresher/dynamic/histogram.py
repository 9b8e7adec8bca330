"""Losses of an epoch in a few numbers, in bins that are the same for every epoch and every run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from thresher.dynamic.ledger import Ints

_LOWEST, _HIGHEST, _PARTS = -10, 6, 4  # bins lie from 2^-10 to 2^6, four to each doubling
_FIRST = (_LOWEST + 127) * _PARTS  # of a float32's bits above the 21st: exponent, and two digits of the fraction
_BLOCK = 1 << 16
_STEPS = np.arange((_HIGHEST - _LOWEST) * _PARTS + 1)

# The edges of all bins: 0, then 2^e * (1, 1.25, 1.5, 1.75) for e = -10 .. 5, and 64.
LOSS_EDGES: npt.NDArray[np.float64] = np.append(
    0.0, 2.0 ** (_LOWEST + _STEPS // _PARTS) * (1 + _STEPS % _PARTS / _PARTS)
)


class LossHistogram:
    """Counts losses by size, batch after batch; a bin is about a fifth wider than the one before."""

    def __init__(self) -> None:
        """Start with none."""
        self._counts: Ints = np.zeros(len(LOSS_EDGES) - 1, np.int64)
        self._held: list[npt.NDArray[np.float32]] = []
        self._rows = 0

    def add(self, losses_B: npt.NDArray[np.float32]) -> None:
        """Count finite losses, (B,) float32; the array must not change before :meth:`told`."""
        # Counted together: batches are small, and every call of NumPy costs as much as thousands of losses.
        self._held.append(losses_B)
        self._rows += len(losses_B)
        if self._rows >= _BLOCK:
            self._count()

    def as_dict(self) -> dict[str, Any] | None:
        """Return what was counted, ready for JSON.

        Returns:
            "edges", B + 1 numbers of :data:`LOSS_EDGES` around all that is not empty, and "counts", B numbers of
            losses. The first bin of all, from 0, also has negative ones, the last, to 64, also larger ones. None
            where nothing was counted.
        """
        self._count()
        filled = np.flatnonzero(self._counts)
        if not len(filled):
            return None
        lo, hi = int(filled[0]), int(filled[-1]) + 1
        return {"edges": LOSS_EDGES[lo : hi + 1].tolist(), "counts": self._counts[lo:hi].tolist()}

    def _count(self) -> None:
        held, self._held, self._rows = self._held, [], 0
        if held:
            # The upper bits of a positive float rise with it and name its bin; 0 is added as -0.0 would be negative.
            positive = np.maximum(np.concatenate(held), np.float32(0)) + np.float32(0)
            bins = np.clip((positive.view(np.int32) >> 21) - (_FIRST - 1), 0, len(self._counts) - 1)
            self._counts += np.bincount(bins, minlength=len(self._counts))


def on_all_bins(histogram: Mapping[str, Any]) -> Ints:
    """Return the counts of a histogram on all bins, so that those of several epochs can stand side by side."""
    counts: Ints = np.zeros(len(LOSS_EDGES) - 1, np.int64)
    start = int(np.searchsorted(LOSS_EDGES, float(histogram["edges"][0])))
    values = np.asarray(histogram["counts"], np.int64)
    counts[start : start + len(values)] = values
    return counts
