"""A piece: consecutive rows of one field in one file, in any format.

Pieces are frozen and picklable and contain no data; creating one reads only headers. A *seekable* piece can read any
range of rows; a *mapped* piece can also read scattered rows cheaply. Other pieces can only be streamed from the start.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
FLOATS = ("float16", "float32", "float64")
DIMENSIONS = 2**20  # of an embedding, at most


class Piece(Protocol):
    """Consecutive rows of one field in one file."""

    @property
    def path(self) -> str: ...  # noqa: D102
    @property
    def rows(self) -> int: ...  # noqa: D102
    @property
    def dim(self) -> int: ...  # noqa: D102
    @property
    def dtype(self) -> str: ...  # noqa: D102
    @property
    def array(self) -> str: ...  # noqa: D102
    @property
    def protocol(self) -> str: ...  # noqa: D102
    @property
    def seekable(self) -> bool: ...  # noqa: D102
    @property
    def mapped(self) -> bool: ...  # noqa: D102

    def read(self, start: int, stop: int) -> Array:
        """Return rows start..stop as stored; bfloat16 as uint16."""
        ...

    def take(self, rows: npt.NDArray[np.int64]) -> Array:
        """Return scattered rows, ascending."""
        ...

    def stream(self, batch: int) -> Iterator[Array]:
        """Yield all rows in order, at most ``batch`` at a time."""
        ...


def stored_dtype(dtype: str) -> np.dtype[Any]:
    """Return the NumPy type of stored values; bfloat16 is read as uint16 bits."""
    return np.dtype("<u2" if dtype == "bfloat16" else dtype)
