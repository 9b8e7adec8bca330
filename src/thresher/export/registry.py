"""Export formats by name.

A format is a frozen dataclass in a file of its own in ``export/formats``, with its name as the class attribute
``name``, its options as fields, and ``write(selection, store, path) -> Written``. Another package offers one by an
entry point of the group ``thresher.exports``. ``docs/adding-an-export.md`` shows a complete one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt

from thresher.pool.store import EmbeddingStore
from thresher.runtime import parameters
from thresher.runtime.plugins import PluginPoint
from thresher.selection import Selection

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Written:
    """What a format has written.

    Attributes:
        rows: Entries written, repeats included.
        missing: The rows of the selection that could not be written, in pool order: their numbers in the pool, and
            their keys or whatever else says which they are. Empty for a format that has an entry for every row.
    """

    rows: int
    missing: tuple[tuple[int, str], ...] = ()


class Export(Protocol):
    """A frozen dataclass of options that writes a selection as one file."""

    name: ClassVar[str]

    def write(self, selection: Selection, store: EmbeddingStore, path: str) -> Written:
        """Write the rows that a selection keeps, each as often as it is to be used.

        Args:
            selection: What to write.
            store: Its whole pool.
            path: The file to write. It is moved to its place when this returns.

        Raises:
            UsageError: The pool lacks what the format needs; says what.
            PoolError: The pool cannot be read.
        """
        ...


EXPORTS: PluginPoint[Export] = PluginPoint(
    "export format", "thresher.export.formats", "thresher.exports", needs=("write",)
)


def build(name: str, given: Mapping[str, Any]) -> Export:
    """Make a format from loosely typed options.

    Raises:
        UsageError: No such format, an unknown option (suggests the nearest), a missing one, or a value that is not
            allowed.
    """
    return parameters.build(EXPORTS.find(name), name, given)


def kept_rows(selection: Selection, store: EmbeddingStore) -> Iterator[tuple[Rows, list[str], Rows]]:
    """Yield the rows that a selection keeps, some at a time, in pool order.

    Yields:
        Their numbers in the pool, their keys as text, and how often each is to be used.
    """
    for ids, keys in store.where(selection.mask()).keys():
        yield ids, keys, times_of(selection, ids)


def times_of(selection: Selection, ids: Rows) -> Rows:
    """Return how often rows that are kept are to be used, 1 or more."""
    return np.ones(len(ids), np.int64) if selection.repeats is None else selection.repeats[ids].astype(np.int64)
