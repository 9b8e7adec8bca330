"""Embeddings of a reference model for every row of the data, read per batch: for JEST and DRRho.

They are arrays, which may be memory-mapped, or the embeddings stored in a pool with the same keys.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from thresher.dynamic.loop import as_array
from thresher.dynamic.references import positions_of
from thresher.errors import UsageError
from thresher.io.key_forms import unlike
from thresher.ops.key_hash import is_uid, records_of
from thresher.pool.store import EmbeddingStore
from thresher.runtime.files import writing
from thresher.runtime.format import counted

Features = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
FIELDS = ("image", "text")
COPIES = tuple(f"reference-{name}.npy" for name in FIELDS)  # in the folder of a run


@dataclass(frozen=True, eq=False)
class ReferenceFeatures:
    """Embeddings of images and captions of N rows under a reference model.

    Attributes:
        read: Returns the embeddings "image" or "text" of rows (B,) as (B, D) float32, in the order of the rows.
        rows: N.
    """

    read: Callable[[str, Ints], Features]
    rows: int

    @classmethod
    def of(cls, image_ND: Any, text_ND: Any) -> ReferenceFeatures:
        """Use two arrays, memory-mapped ones too: (N, D) numbers, row i of both belongs to row i of the data.

        Raises:
            UsageError: The shapes differ, or they are not matrices.
        """
        arrays = dict(zip(FIELDS, (image_ND, text_ND), strict=True))
        shapes = [tuple(np.shape(array)) for array in arrays.values()]
        if shapes[0] != shapes[1] or len(shapes[0]) != 2 or not min(shapes[0]):
            raise UsageError(f"reference embeddings of shapes {shapes[0]} and {shapes[1]}; give two arrays (N, D)")
        return cls(lambda name, rows_B: np.asarray(arrays[name][rows_B], np.float32), shapes[0][0])

    @classmethod
    def of_pool(
        cls, store: EmbeddingStore, keys: Sequence[str], folder: str | os.PathLike[str] | None = None
    ) -> ReferenceFeatures:
        """Use the embeddings stored in a pool, for the rows with these keys.

        The pool may have other rows too. If its rows cannot be read one by one (parquet), those with these keys are
        copied to ``folder`` once: 8 bytes per row and dimension.

        Args:
            store: The pool, with embeddings of images and captions in one space.
            keys: The keys of the N rows of the data.
            folder: Where to copy to; None to refuse such a pool.

        Raises:
            UsageError: A row is not in the pool, keys are not unique, the pool has no joint embeddings, or a folder is
                needed.
        """
        where = _joint(store)
        wanted = {_same(key): row for row, key in enumerate(keys)}
        if len(wanted) < len(keys):
            twice = next(key for row, key in enumerate(keys) if wanted[_same(key)] != row)
            raise UsageError(
                f"{where}: rows are found by key, but several of the data have the key {twice!r}; give every row a key "
                "of its own"
            )
        at_N, example = np.full(len(keys), -1, np.int64), ""
        for ids, names in store.keys():
            example = example or names[0]
            for number, name in zip(ids.tolist(), names, strict=True):
                if (row := wanted.get(_same(name))) is not None:
                    at_N[row] = number
        if missing := np.count_nonzero(at_N < 0):
            first = keys[int(np.argmax(at_N < 0))]
            raise UsageError(
                f"{where}: {missing:,} of {counted(len(keys), 'row')} of the data are not in it, the first {first!r}: "
                f"{unlike('the pool', [example], 'the data', [first])}; give a pool of these data, or leave out the "
                "rows with --policy static"
            )
        return cls(_reader(store, at_N, folder), len(keys))

    def gather(self, rows_B: Any) -> tuple[Features, Features]:
        """Return the embeddings of images and captions of rows (B,), each (B, D) float32.

        Raises:
            UsageError: A row is not one of the N.
        """
        rows = as_array(rows_B).astype(np.int64)
        if len(rows) and not 0 <= rows.min() <= rows.max() < self.rows:
            raise UsageError(f"rows {rows.min():,} to {rows.max():,}; the reference has rows 0 to {self.rows - 1:,}")
        image_BD, text_BD = (self.read(name, rows) for name in FIELDS)
        return image_BD, text_BD


@dataclass(frozen=True, eq=False)
class KeyedFeatures:
    """Embeddings of a pool, looked up by the ids of keys: for streams, which have no row numbers.

    Attributes:
        records_M: (M,) ids of the keys, of :data:`thresher.ops.key_hash.RECORD`, ascending.
        row_M: (M,) int64, the row of each.
        features: The embeddings of the rows.
        where: The location of the pool, for messages.
    """

    records_M: npt.NDArray[np.void]
    row_M: Ints
    features: ReferenceFeatures
    where: str

    @classmethod
    def of_pool(cls, store: EmbeddingStore, folder: str | os.PathLike[str] | None = None) -> KeyedFeatures:
        """Index a pool with embeddings of images and captions in one space; 20 bytes per row.

        Args:
            store: The pool.
            folder: Where to copy embeddings that cannot be read one by one; None to refuse such a pool.

        Raises:
            UsageError: The pool has no joint embeddings, or a folder is needed.
        """
        where = _joint(store)
        records_N = np.concatenate([records_of(names) for _, names in store.keys()])
        order = np.lexsort((records_N["check"], records_N["hash"]))
        features = ReferenceFeatures(_reader(store, np.arange(store.total), folder), store.total)
        return cls(records_N[order], order, features, where)

    def gather(self, ids_B2: npt.NDArray[np.int64]) -> tuple[Features, Features]:
        """Return the embeddings of images and captions of samples, each (B, D) float32.

        Args:
            ids_B2: (B, 2) ids of their keys, as :func:`thresher.ops.key_hash.id_of` makes them.

        Raises:
            UsageError: A sample is not in the pool.
        """
        at_B = positions_of(self.records_M, ids_B2[:, 0], ids_B2[:, 1])
        if missing := np.count_nonzero(at_B < 0):
            raise UsageError(
                f"{self.where}: {missing:,} of {counted(len(at_B), 'sample')} of a batch are not in it by key; give a "
                "pool of these data, with the same keys"
            )
        return self.features.gather(self.row_M[at_B])


def _joint(store: EmbeddingStore) -> str:
    """Return the location of a pool; raise UsageError if it has no embeddings in a joint space."""
    where = store.layout.location
    try:
        store.require_joint("a reference")
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None
    return where


def _reader(
    store: EmbeddingStore, at_N: Ints, folder: str | os.PathLike[str] | None
) -> Callable[[str, Ints], Features]:
    """Return a function that reads the embeddings of rows; ``at_N`` are their rows in the pool."""
    if all(store.mapped(name) for name in FIELDS):
        return lambda name, rows_B: store.vectors_at(name, at_N[rows_B])
    if folder is None:
        raise UsageError(f"{store.layout.location}: its rows cannot be read one by one; give a folder to copy them to")
    row_of = np.full(store.total, -1, np.int64)
    row_of[at_N] = np.arange(len(at_N))
    paths = {name: Path(folder) / copy for name, copy in zip(FIELDS, COPIES, strict=True)}
    copies = {name: _copied(store, name, row_of, len(at_N), path) for name, path in paths.items()}
    return lambda name, rows_B: np.asarray(copies[name][rows_B])


def _same(key: str) -> str:
    """Return the form of a key that is compared: uids are the same in upper and lower case."""
    return key.lower() if is_uid(key) else key


def _copied(store: EmbeddingStore, name: str, row_of: Ints, rows: int, path: Path) -> npt.NDArray[Any]:
    """Copy embeddings to a .npy file in the order of the data, and open it memory-mapped."""
    with writing(path) as scratch:
        copy = np.lib.format.open_memmap(scratch, "w+", np.float32, (rows, store.dim(name)))
        for block in store.blocks(name):
            to_B = row_of[store.ids_of(block)]
            if (to_B >= 0).any():
                copy[to_B[to_B >= 0]] = store.vectors(name, block)[to_B >= 0]
        copy.flush()
        del copy
    opened: npt.NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    return opened
