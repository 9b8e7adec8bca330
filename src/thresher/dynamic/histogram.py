"""A histogram of the losses of an epoch, with the same bins for every epoch and every run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from thresher.dynamic.ledger import Ints

_LOWEST, _HIGHEST, _PARTS = -10, 6, 4  # bins lie from 2^-10 to 2^6, four to each doubling
_FIRST = (_LOWEST + 127) * _PARTS  # float32 bits above the 21st: the exponent and two bits of the fraction
_BLOCK = 1 << 16
_STEPS = np.arange((_HIGHEST - _LOWEST) * _PARTS + 1)

# The edges of all bins: 0, then 2^e * (1, 1.25, 1.5, 1.75) for e = -10 .. 5, and 64.
LOSS_EDGES: npt.NDArray[np.float64] = np.append(
    0.0, 2.0 ** (_LOWEST + _STEPS // _PARTS) * (1 + _STEPS % _PARTS / _PARTS)
)


class LossHistogram:
    """Counts losses in bins, batch after batch; each bin is about a fifth wider than the one before."""

    def __init__(self) -> None:
        """Start with empty bins."""
        self._counts: Ints = np.zeros(len(LOSS_EDGES) - 1, np.int64)
        self._held: list[npt.NDArray[np.float32]] = []
        self._rows = 0

    def add(self, losses_B: npt.NDArray[np.float32]) -> None:
        """Count finite losses, (B,) float32; the array must not change before :meth:`as_dict`."""
        # Batches are small, and a NumPy call costs as much as counting thousands of losses: count many at once.
        self._held.append(losses_B)
        self._rows += len(losses_B)
        if self._rows >= _BLOCK:
            self._count()

    def as_dict(self) -> dict[str, Any] | None:
        """Return the counts, ready for JSON.

        Returns:
            "edges", the B + 1 numbers of :data:`LOSS_EDGES` around the bins that are not empty, and "counts", the B
            numbers of losses. The lowest bin, from 0, includes negative losses; the highest, up to 64, includes
            larger ones. None if nothing was counted.
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
            # The upper bits of a positive float increase with it, and give its bin. Adding 0 turns -0.0 into 0.0.
            positive = np.maximum(np.concatenate(held), np.float32(0)) + np.float32(0)
            bins = np.clip((positive.view(np.int32) >> 21) - (_FIRST - 1), 0, len(self._counts) - 1)
            self._counts += np.bincount(bins, minlength=len(self._counts))


def on_all_bins(histogram: Mapping[str, Any]) -> Ints:
    """Return the counts of a histogram over all bins, int64, so that epochs can be compared."""
    counts: Ints = np.zeros(len(LOSS_EDGES) - 1, np.int64)
    start = int(np.searchsorted(LOSS_EDGES, float(histogram["edges"][0])))
    values = np.asarray(histogram["counts"], np.int64)
    counts[start : start + len(values)] = values
    return counts
