"""Products of rows with other rows, of which only maxima, matches or sums are kept: never a matrix of all products.

NumPy computes them on the CPU. :class:`~thresher.ops.torch_products.TorchProducts` does the same on GPUs.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from thresher.ops.kmeans import Nearest, NumpyNearest
from thresher.ops.vectors import F32, workspace

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_PANEL = 1024  # rows of a product, both ways: it stays in cache


class Products(Protocol):
    """Computes products <row, other> in float32 and reduces them.

    ``lag`` limits the pairs to earlier rows: others j < i + lag count for row i. None: all others count. It can be
    pickled, and threads may share it.
    """

    @property
    def panel(self) -> int:
        """Number of rows of a product, both ways, that is computed at once."""
        ...

    @property
    def nearest(self) -> Nearest:
        """Finds the nearest centroids, in float32."""
        ...

    def scratch(self) -> F32:
        """Return memory that several calls of one thread can use."""
        ...

    def best(
        self, rows_RD: F32, others_MD: F32, lag: int | None = None, scratch: F32 | None = None
    ) -> tuple[F32, Ints]:
        """Return the largest product of each row (R,) float32 and its first column (R,); -inf if no other counts.

        There are at most ``panel`` rows and ``panel`` others.
        """
        ...

    def above(
        self, rows_RD: F32, others_MD: F32, threshold: float, lag: int | None = None, scratch: F32 | None = None
    ) -> tuple[Ints, Ints]:
        """Return the rows and the columns of all products above a threshold, (P,) each, row by row.

        There are at most ``panel`` rows and ``panel`` others.
        """
        ...

    def sums(self, rows_RD: F32, others_MD: F32, clamp: float | None) -> tuple[Floats, Floats]:
        """Return the sums of the products by row (R,) and by column (M,); those below ``clamp`` count as 0."""
        ...


def clamped(products: F32, clamp: float | None) -> F32:
    """Set products below ``clamp`` to 0 in place; None changes nothing."""
    if clamp == 0:
        np.maximum(products, 0, out=products)
    elif clamp is not None:
        products[products < clamp] = 0
    return products


class NumpyProducts:
    """Products on the CPU. The bits depend on the matrix kernels of NumPy."""

    panel = _PANEL
    nearest: Nearest = NumpyNearest()

    def scratch(self) -> F32:
        """Return memory for the products of a panel."""
        return workspace(_PANEL, _PANEL)

    def best(
        self, rows_RD: F32, others_MD: F32, lag: int | None = None, scratch: F32 | None = None
    ) -> tuple[F32, Ints]:
        """Return the largest product of each row and its first column."""
        products = self._products(rows_RD, others_MD, lag, scratch)
        column = products.argmax(axis=1)  # faster than max
        return products[np.arange(len(products)), column], column

    def above(
        self, rows_RD: F32, others_MD: F32, threshold: float, lag: int | None = None, scratch: F32 | None = None
    ) -> tuple[Ints, Ints]:
        """Return the rows and the columns of all products above a threshold."""
        near = self._products(rows_RD, others_MD, lag, scratch) > threshold
        at, column = np.nonzero(near) if near.any() else (np.empty(0, np.int64),) * 2
        return at, column

    def sums(self, rows_RD: F32, others_MD: F32, clamp: float | None) -> tuple[Floats, Floats]:
        """Return the sums by row and by column: float32 within a panel, float64 across panels."""
        by_row, by_column = np.zeros(len(rows_RD)), np.zeros(len(others_MD))
        buffer = np.empty(min(_PANEL, len(rows_RD)) * min(_PANEL, len(others_MD)), np.float32)
        ones = np.ones(_PANEL, np.float32)
        for lo in range(0, len(rows_RD), _PANEL):
            rows = rows_RD[lo : lo + _PANEL]
            for at in range(0, len(others_MD), _PANEL):
                others = others_MD[at : at + _PANEL]
                panel = buffer[: len(rows) * len(others)].reshape(len(rows), len(others))
                clamped(np.matmul(rows, others.T, out=panel), clamp)
                by_row[lo : lo + _PANEL] += panel @ ones[: len(others)]
                by_column[at : at + _PANEL] += ones[: len(rows)] @ panel
        return by_row, by_column

    def _products(self, rows_RD: F32, others_MD: F32, lag: int | None, scratch: F32 | None) -> F32:
        memory = workspace(len(rows_RD), len(others_MD)) if scratch is None else scratch
        products = memory.reshape(-1)[: len(rows_RD) * len(others_MD)].reshape(len(rows_RD), len(others_MD))
        np.matmul(rows_RD, others_MD.T, out=products)
        if lag is not None and lag < len(others_MD):  # for the first row; later ones have more earlier others
            at = lag + np.arange(len(rows_RD))
            products[np.arange(len(others_MD))[None, :] >= at[:, None]] = -np.inf
        return products


ON_CPU: Products = NumpyProducts()
