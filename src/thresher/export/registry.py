"""Export formats by name.

A format is a frozen dataclass in its own file in ``export/formats``, with its name as the class attribute ``name``, its
options as fields, and ``write(selection, store, path) -> Written``. Other packages add formats through the entry point
group ``thresher.exports``. ``docs/adding-an-export.md`` has a complete example.
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
    """The result of writing a format.

    Attributes:
        rows: Entries written, including repeats.
        missing: Rows of the selection that could not be written, in pool order: their row numbers in the pool, and
            their keys or another name. Empty for a format that has an entry for every row.
        lacks: What the missing rows lack, for the error if all rows are missing: "a URL in the column 'url'".
    """

    rows: int
    missing: tuple[tuple[int, str], ...] = ()
    lacks: str = ""


class Export(Protocol):
    """A frozen dataclass of options that writes a selection as one file."""

    name: ClassVar[str]

    def write(self, selection: Selection, store: EmbeddingStore, path: str) -> Written:
        """Write the rows that a selection keeps, each as often as the selection uses it.

        Args:
            selection: The selection to write.
            store: The whole pool of the selection.
            path: The file to write. The caller moves it to the target afterwards.

        Raises:
            UsageError: The pool does not have what the format needs; the message names it.
            PoolError: The pool cannot be read.
        """
        ...


def writes_folder(kind: Export | type[Export]) -> bool:
    """Return whether a format writes a folder, or changes a dataset: it has ``is_folder = True``.

    Its ``write`` is called with the target itself, ``overwrite`` and ``say``, and is atomic by itself. It has no
    manifest.
    """
    return bool(getattr(kind, "is_folder", False))


EXPORTS: PluginPoint[Export] = PluginPoint(
    "export format", "thresher.export.formats", "thresher.exports", needs=("write",)
)


def build(name: str, options: Mapping[str, Any]) -> Export:
    """Build a format from loosely typed options.

    Raises:
        UsageError: Unknown format, unknown option (the message suggests the nearest), missing option, or invalid
            value.
    """
    return parameters.build(EXPORTS.find(name), name, options)


def kept_rows(selection: Selection, store: EmbeddingStore) -> Iterator[tuple[Rows, list[str], Rows]]:
    """Yield the rows that a selection keeps, in batches, in pool order.

    Yields:
        Row numbers in the pool, keys as text, and how often the selection uses each row.
    """
    for ids, keys in store.where(selection.mask()).keys():
        yield ids, keys, times_of(selection, ids)


def times_of(selection: Selection, ids: Rows) -> Rows:
    """Return how often the selection uses each of some kept rows, 1 or more."""
    return np.ones(len(ids), np.int64) if selection.repeats is None else selection.repeats[ids].astype(np.int64)
