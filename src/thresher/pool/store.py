"""The store: N rows over files. Immutable, picklable, and without vectors in memory.

Rows have global ids 0..N-1 in file order. A *view* (:meth:`EmbeddingStore.where`) contains some of them with the same
ids. Vectors are read in *blocks*, which are consecutive rows of the view, not of a file: splitting the files
differently cannot change a result.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from thresher.errors import BadRowsError, PoolError, UsageError
from thresher.io.npy import NpyPiece, npy_piece
from thresher.io.parquet import TablePiece
from thresher.io.paths import relative, shortened, visible
from thresher.io.pieces import Piece
from thresher.io.places import located
from thresher.io.sql import is_sql
from thresher.ops.kmeans import STRIPE
from thresher.ops.vectors import F32, units_of
from thresher.pool.join import join_by_key
from thresher.pool.layout import Options, Rows, gathered
from thresher.pool.layouts import Layout, read_layout, read_metadata
from thresher.pool.verify import without_damaged
from thresher.runtime.code import code_version
from thresher.runtime.config import cache_folder
from thresher.runtime.format import counted
from thresher.runtime.locks import Pin, pin
from thresher.runtime.places import expanded
from thresher.runtime.random import digest
from thresher.selection import Selection

if TYPE_CHECKING:
    from thresher.report.notebook import Gallery

Array = npt.NDArray[Any]

BLOCK = 16_384  # rows of a block
IN_MEMORY = "arrays://"  # begins the location of a pool in memory
_BLOCK_BYTES = 512 * 2**20  # of a block in float32, at most
_EXACT = 2**53  # float64 represents all whole numbers up to this
_WHOLE = 128 * 2**20  # bytes of vectors of a remote file that is read as a whole, ahead of its turn, at most
_CHUNK = 4_096  # rows of a user file in memory at a time


@dataclass(frozen=True)
class Block:
    """Rows lo..hi of a view. ``data`` has their vectors if the files can only be streamed."""

    lo: int
    hi: int
    data: dict[str, Array] | None = field(default=None, compare=False)

    def __len__(self) -> int:
        """Number of rows."""
        return self.hi - self.lo


@dataclass(frozen=True, eq=False)
class EmbeddingStore:
    """Image and text embeddings, captions, keys and scores of N rows, in local or remote files.

    Attributes:
        layout: The files.
        options: Options with which it was opened.
        rows: Global ids of the rows of the view, ascending; None for all.
        block: Rows of a block.
    """

    layout: Layout
    options: Options
    rows: Rows | None = None
    block: int = BLOCK
    held: tuple[Pin, ...] = ()  # cache files that it reads

    def __repr__(self) -> str:
        """Return the location, the number of rows and the embeddings in one line."""
        widths = ", ".join(f"{name} {pieces[0].dim}" for name, pieces in self.layout.vectors.items())
        of = "" if self.rows is None else f" of {self.total:,}"
        key = f", key {self.layout.key!r}" if self.layout.key else ""
        location = shortened(visible(relative(self.layout.location)), 80)
        return f"EmbeddingStore({location}: {len(self):,}{of} rows, {widths or 'no embeddings'}{key})"

    def _repr_html_(self) -> str:
        from thresher.report.notebook import in_notebook, store_html

        return in_notebook(store_html, self)

    def show(self, rows: Any = None, n: int = 24) -> Gallery:
        """Return a gallery of rows for a notebook, with images and captions.

        Args:
            rows: Global ids: a number, numbers, a slice, or a mask (N,); at most 200. By default ``n`` rows, evenly
                spaced.
            n: Number of rows without ``rows``, 1 to 200.

        Raises:
            UsageError: No such rows, or too many.
        """
        from thresher.report.notebook import store_gallery

        return store_gallery(self, rows, n)

    # --- shape --------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Number of rows of the view."""
        return self.layout.rows if self.rows is None else len(self.rows)

    @property
    def total(self) -> int:
        """N, the number of rows of the whole store."""
        return self.layout.rows

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the embeddings: "image", "text", and "joint" if there are both."""
        names = tuple(self.layout.vectors)
        return (*names, "joint") if {"image", "text"} <= set(names) else names

    def dim(self, name: str) -> int:
        """Return D of a field; the joint field is the concatenation of image and text."""
        return sum(self.layout.vectors[part][0].dim for part in self.parts(name))

    def require_joint(self, why: str) -> None:
        """Check that image and text embeddings both exist and have the same width, as those of a joint space do.

        Raises:
            UsageError: One of them is missing, or the widths differ; the message gives the widths.
        """
        image, text = self.dim("image"), self.dim("text")
        if image != text:
            raise UsageError(
                f"image embeddings have {counted(image, 'dimension')}, text embeddings {text}: {why} needs both "
                "from one joint space"
            )

    def parts(self, name: str) -> tuple[str, ...]:
        """Return the stored fields that make up a field.

        Raises:
            UsageError: The pool has no such embeddings.
        """
        if name not in self.fields:
            raise UsageError(f"{self.layout.location} has no {name} embeddings; {self._embeddings}")
        return ("image", "text") if name == "joint" else (name,)

    @property
    def _embeddings(self) -> str:
        """Which embeddings there are; if there are none, which columns may be named instead."""
        if self.fields:
            return f"it has {', '.join(self.fields)}"
        parts = self.layout.tables[0].parts if self.layout.tables else ()
        kinds = {one.name: str(one.type) for part in parts for one in part.schema(part.columns)}
        lists = ", ".join(name for name, kind in kinds.items() if "list<" in kind)
        if not lists:
            return "none of its columns has lists of numbers; give the files with the embeddings"
        return f"name their column with --image or --text: {shortened(visible(lists), 300)}"

    @property
    def ids(self) -> Rows:
        """Global row ids of the view, ascending."""
        return np.arange(self.total) if self.rows is None else self.rows

    def ids_at(self, positions: Rows) -> Rows:
        """Return the global ids of some rows of the view, without those of all others."""
        return positions if self.rows is None else self.rows[positions]

    def where(self, kept_N: npt.NDArray[np.bool_]) -> EmbeddingStore:
        """Return a view of the rows that are True in a mask over the whole store, (N,) bool."""
        if kept_N.shape != (self.total,):
            raise UsageError(f"a mask of {kept_N.shape} rows for a store of {self.total:,}")
        return replace(self, rows=None if kept_N.all() else np.flatnonzero(kept_N))

    # --- identity -----------------------------------------------------------------------------

    def fingerprint(self) -> str:
        """Return a hash of N, fields and widths, and the values of evenly spaced rows; the same after re-sharding."""
        return self.layout.fingerprint

    def version(self) -> str:
        """Return a hash of the names, sizes and times of the files when the store was opened; part of cache keys."""
        return self.layout.version

    def changed(self) -> bool:
        """Return whether a file has changed since the store was opened.

        Raises:
            PoolError: A file no longer exists.
        """
        return self.layout.changed()

    def check_unchanged(self, what: str) -> None:
        """Raise a PoolError if a file has changed since the store was opened: ``what`` happened to mixed rows.

        For the end of whatever writes rows of the pool, before the result is moved into place.
        """
        if self.changed():
            raise PoolError(
                f"{shortened(visible(self.layout.location), 500)}: a file of the pool changed while {what}; run again "
                "once writing has finished"
            )

    def files(self) -> list[tuple[str, str]]:
        """Return (protocol, path) of every file that the store reads, each once, in order."""
        return self.layout.files()

    def location_of(self, name: str, row: int) -> str:
        """Return the file and the row in it of a row of a field, for messages."""
        metadata = name == "metadata"
        pieces: Sequence[Piece | TablePiece] = self.layout.table_parts if metadata else self.layout.vectors[name]
        for piece in pieces:
            if row < piece.rows:
                if self.in_memory:
                    return f"{'the table' if metadata else f'the {name} vectors'}, row {row:,}"
                return f"{piece.path} row {row:,}"
            row -= piece.rows
        raise UsageError(f"row {row:,} is beyond the end of the store")

    @property
    def in_memory(self) -> bool:
        """Whether the pool was made by :func:`thresher.from_arrays`."""
        return self.layout.location.startswith(IN_MEMORY)

    # --- vectors ------------------------------------------------------------------------------

    def seekable(self, name: str) -> bool:
        """Return whether blocks can be read independently."""
        return all(p.seekable for part in self.parts(name) for p in self.layout.vectors[part])

    def mapped(self, name: str) -> bool:
        """Return whether reading scattered rows is cheap."""
        return all(p.mapped for part in self.parts(name) for p in self.layout.vectors[part])

    def stored_bytes(self, name: str) -> int:
        """Return the size in bytes of the stored vectors of the view."""
        pieces = [self.layout.vectors[part][0] for part in self.parts(name)]
        return sum(len(self) * p.dim * _itemsize(p) for p in pieces)

    def blocks(self, name: str, start: int = 0, size: int | None = None, *, ahead: bool = False) -> Iterator[Block]:
        """Split the view into blocks, without data if the files are seekable, else with streamed data.

        Args:
            name: The field.
            start: Blocks before this row of the view, which must be a block boundary, are not yielded.
            size: Rows of a block.
            ahead: Read seekable remote files here, many blocks at the same time, instead of by whoever gets the block.
        """
        size = size or self.block
        if self.seekable(name):
            spans = (Block(lo, min(lo + size, len(self))) for lo in range(start, len(self), size))
            yield from self._read_ahead(name, spans, size) if ahead and self._is_remote(name) else spans
            return
        streams = {part: self._stream(part, size) for part in self.parts(name)}
        for lo in range(0, len(self), size):
            data = {part: next(stream) for part, stream in streams.items()}
            if lo >= start:
                yield Block(lo, min(lo + size, len(self)), data)
        for stream in streams.values():  # to the end, where a file's checksum and row count are checked
            next(stream, None)

    def _is_remote(self, name: str) -> bool:
        pieces = (p for part in self.parts(name) for p in self.layout.vectors[part])
        return any(p.protocol != "file" and not p.mapped for p in pieces)

    def _read_ahead(self, name: str, blocks: Iterator[Block], size: int) -> Iterator[Block]:
        """Yield blocks with their data."""
        from thresher.io.remote import read_ahead

        def read(block: Block) -> Block:
            return replace(block, data={part: self.raw(part, block) for part in self.parts(name)})

        width, read_rows = self.stored_bytes(name) // max(len(self), 1), size
        if self.rows is not None and len(self):  # rows that lie between those of the view may be read, too
            read_rows = size * int(self.rows[-1] - self.rows[0] + 1) // len(self)
        yield from read_ahead(read, blocks, read_rows * width)

    def stripes(self, name: str, block: Block, size: int = STRIPE) -> Iterator[F32]:
        """Yield the unit vectors of a block in stripes, of a size for the cache; each is valid until the next one."""
        whole = {part: self.raw(part, block) for part in self.parts(name)}
        ids = self.ids_of(block)
        buffers = {part: np.empty((min(size, len(block)), raw.shape[1]), np.float32) for part, raw in whole.items()}
        for lo in range(0, len(block), size):
            here = slice(lo, lo + size)
            yield self._join(
                name, [self._unit(part, raw[here], ids[here], buffers[part]) for part, raw in whole.items()]
            )

    def raw(self, name: str, block: Block) -> Array:
        """Return the vectors of a block as stored, (B, D)."""
        if block.data is not None:
            return np.asarray(block.data[name])
        if self.rows is None:
            return self._range(name, block.lo, block.hi)
        rows = self.rows[block.lo : block.hi]
        if rows[-1] - rows[0] == len(rows) - 1:
            return self._range(name, int(rows[0]), int(rows[-1]) + 1)
        return self.raw_at(name, rows)

    def vectors(self, name: str, block: Block) -> F32:
        """Return the unit vectors of a block, (B, D) float32.

        Raises:
            BadRowsError: A row is zero or not finite; names the file and row.
        """
        ids = self.ids_of(block)
        return self._join(name, [self._unit(part, self.raw(part, block), ids) for part in self.parts(name)])

    def vectors_at(self, name: str, positions: Rows) -> F32:
        """Return unit vectors of scattered rows by position in the view, in the order of ``positions``."""
        ids = self.ids_at(positions)
        if (ids[1:] >= ids[:-1]).all():
            return self._join(name, [self._unit(part, self.raw_at(part, ids), ids) for part in self.parts(name)])
        order = np.argsort(ids, kind="stable")
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        units = [self._unit(part, self.raw_at(part, ids[order])[back], ids) for part in self.parts(name)]
        return self._join(name, units)

    def ids_of(self, block: Block) -> Rows:
        """Return the global ids of the rows of a block."""
        return np.arange(block.lo, block.hi) if self.rows is None else self.rows[block.lo : block.hi]

    def raw_at(self, name: str, ids: Rows) -> Array:
        """Return the stored vectors of ascending global ids."""
        return self.layout.raw_at(name, ids)

    def local(self, name: str, files: dict[str, NpyPiece]) -> EmbeddingStore:
        """Return the same store with some fields read from local copies in the row order of the whole store."""
        vectors = {**self.layout.vectors, **{part: (piece,) for part, piece in files.items()}}
        held = (*self.held, *filter(None, (pin(piece.path) for piece in files.values())))
        return replace(self, layout=replace(self.layout, vectors=vectors), held=held)

    def _join(self, name: str, units: list[F32]) -> F32:
        if len(units) == 1:
            return units[0]
        return np.concatenate(units, axis=1) * np.float32(np.sqrt(0.5))

    def _unit(self, part: str, raw: Array, ids: Rows, buffer: F32 | None = None) -> F32:
        rows = np.empty(raw.shape, np.float32) if buffer is None else buffer[: len(raw)]
        units, bad = units_of(raw, rows)
        if len(bad):
            row = int(ids[bad[0]])
            kind = (
                "is all zeros"
                if not raw[bad[0]].any()
                else "has NaN or infinite values, is missing or has another width"
            )
            raise BadRowsError(
                f"{self.location_of(part, row)}: the {part} embedding {kind} (row {row:,} of the pool); "
                + ("fix the values, or give skip_bad=True" if self.in_memory else "fix the file, or pass --skip-bad")
                + " to skip such rows"
            )
        return units

    def _range(self, name: str, start: int, stop: int) -> Array:
        spans, first = [], 0
        for piece in self.layout.vectors[name]:
            lo, hi = max(start - first, 0), min(stop - first, piece.rows)
            if hi > lo:
                spans.append((piece, hi - lo, partial(piece.read, lo, hi)))
            first += piece.rows
        return gathered(spans, self.layout.vectors[name][0].dim)

    def _stream(self, name: str, size: int) -> Iterator[Array]:
        """Yield the stored vectors of the view in runs of exactly ``size`` rows (the last may be shorter)."""
        held: list[Array] = []
        count, start = 0, 0
        for piece, parts in self._streamed(name, size):
            for part in parts:
                if self.rows is not None:
                    lo, hi = np.searchsorted(self.rows, [start, start + len(part)])
                    start += len(part)
                    part = part[self.rows[lo:hi] - (start - len(part))]
                if len(part) < size and piece.mapped:
                    part = part.copy()  # a view of a mapped file would keep the file open
                held.append(part)
                count += len(part)
                while count >= size:
                    joined = held[0] if len(held) == 1 else np.concatenate(held)
                    yield joined[:size]
                    held, count = [joined[size:]], count - size
        if count:
            yield np.concatenate(held)

    def _streamed(self, name: str, size: int) -> Iterator[tuple[Piece, Iterable[Array]]]:
        """Yield each piece of a field and its rows in parts; of remote ones several are read at the same time."""
        pieces = self.layout.vectors[name]
        largest = max(piece.rows * piece.dim * _itemsize(piece) for piece in pieces)
        if self._is_remote(name) and largest <= _WHOLE:
            from thresher.io.remote import read_ahead

            yield from read_ahead(lambda piece: (piece, list(piece.stream(size))), pieces, largest)
        else:
            yield from ((piece, piece.stream(size)) for piece in pieces)

    # --- metadata -----------------------------------------------------------------------------

    @property
    def columns(self) -> tuple[str, ...]:
        """Metadata columns."""
        return self.layout.columns

    def require(self, columns: Sequence[str], why: str) -> None:
        """Raise a UsageError unless all the columns exist."""
        missing = [name for name in columns if name.split(".")[0] not in self.columns and name not in self.columns]
        if missing:
            raise UsageError(
                f"{why} needs the metadata column {', '.join(map(repr, missing))}; {self.layout.location} has "
                f"{', '.join(self.columns) or 'no metadata'}"
            )

    def scan(self, columns: Sequence[str]) -> Iterator[tuple[Rows, Any]]:
        """Yield (global ids, Arrow record batch of ``columns``) of the rows of the view, in order."""
        self.require(columns, "this")
        start = 0
        for table in self.layout.tables:
            for part in table.stream(columns):
                ids = np.arange(start, start + len(part))
                start += len(part)
                if self.rows is not None and len(ids):
                    lo, hi = np.searchsorted(self.rows, [ids[0], ids[-1] + 1])
                    part = part.take(self.rows[lo:hi] - ids[0])
                    ids = self.rows[lo:hi]
                if len(ids):
                    yield ids, part

    def lookup(self, columns: Sequence[str], ids: Rows) -> Iterator[Any]:
        """Yield Arrow record batches of some rows, by ascending global id, reading only their row groups."""
        return self.layout.lookup(columns, ids)

    def column(self, name: str) -> Array:
        """Return one column of numbers or booleans of the view as an array, (n,).

        Nulls become NaN, and whole numbers then float64. If float64 cannot represent all of these numbers, the result
        is a masked array of whole numbers instead; :func:`missing` handles both.

        Raises:
            UsageError: There is no such column, or it contains something else.
        """
        import pyarrow as pa

        parts, masks = [], []
        for _, part in self.scan([name]):
            cells = part.column(0)
            kind = cells.type
            whole = pa.types.is_integer(kind) or pa.types.is_boolean(kind)
            if not (whole or pa.types.is_floating(kind) or pa.types.is_null(kind)):
                raise UsageError(f"the metadata column {name!r} is not numeric, it contains {kind}")
            masks.append(np.asarray(cells.is_null()) if cells.null_count else np.zeros(len(cells), np.bool_))
            if pa.types.is_null(kind):
                parts.append(np.zeros(len(cells), np.int8))
            else:
                cells = cells.fill_null(False if pa.types.is_boolean(kind) else 0) if whole else cells
                parts.append(cells.to_numpy(zero_copy_only=False))
        values = np.concatenate(parts) if parts else np.empty(0, np.float32)
        nothing = np.concatenate(masks) if masks else np.empty(0, np.bool_)
        if values.dtype.kind == "f":
            values[nothing] = np.nan
        elif nothing.any():
            if max(int(values.max()), -int(values.min())) > _EXACT:
                return np.ma.MaskedArray(values, nothing)
            values = np.where(nothing, np.nan, values)
        return values

    def keys(self) -> Iterator[tuple[Rows, list[str]]]:
        """Yield (global ids, keys as strings) of the view; without a key column the key is the row id."""
        if not self.layout.key:
            for lo in range(0, len(self), 65536):
                ids = self.ids_of(Block(lo, min(lo + 65536, len(self))))
                yield ids, [str(i) for i in ids]
            return
        for ids, part in self.scan([self.layout.key]):
            yield ids, self.layout.keys_in(part.column(0))


def missing(values_n: Array) -> Rows:
    """Return the positions of nulls and NaN in a column, (m,); see :meth:`EmbeddingStore.column`."""
    if isinstance(values_n, np.ma.MaskedArray):
        return np.flatnonzero(np.ma.getmaskarray(values_n))
    return np.flatnonzero(np.isnan(values_n)) if values_n.dtype.kind == "f" else np.empty(0, np.int64)


def vectors_from_npy(path: str, what: str, store: EmbeddingStore, name: str) -> Iterator[F32]:
    """Yield the unit rows of a .npy file of the user, some at a time, to compare them with a field of the store.

    Args:
        path: The file or its address, (M, D) with the D of the field.
        what: Name of the rows in messages, in the plural.
        store: The store.
        name: The field.

    Raises:
        PoolError: The file is damaged or empty, or a row is zero or not finite.
        UsageError: The rows have another width than the field.
    """
    piece = npy_piece(*located(path))
    if piece.dim != store.dim(name):
        raise UsageError(
            f"{path}: {what} of {counted(piece.dim, 'dimension')} for {name} embeddings of {store.dim(name)}"
        )
    if not piece.rows:
        raise PoolError(f"{path}: contains no {what}")
    chunk = max(min(_CHUNK, _CHUNK * 4_096 // piece.dim), 1)  # fewer of very wide rows
    for lo in range(0, piece.rows, chunk):
        raw = piece.read(lo, min(lo + chunk, piece.rows))
        units, bad = units_of(raw, np.empty(raw.shape, np.float32))
        if len(bad):
            raise PoolError(f"{path}: row {lo + int(bad[0]):,} of the {what} is zero or not finite")
        yield units


def same_pool(selection: Selection, store: EmbeddingStore, fingerprint: str | None = None) -> None:
    """Check that a selection belongs to the rows of a store; a view counts as its whole store.

    Raises:
        UsageError: It belongs to another pool; the message describes both.
    """
    if selection.total != store.total or selection.store != (fingerprint or store.fingerprint()):
        grown = "; if the pool has grown since, select again" if store.total > selection.total else ""
        raise UsageError(
            f"{store.layout.location} ({counted(store.total, 'row')}) is another pool or has changed: it is "
            f"not the pool of this selection, which is {selection.pool} ({counted(selection.total, 'row')}){grown}"
        )


def whole_pool(store: EmbeddingStore) -> None:
    """Check that a store is not a view, for code that always works on all rows.

    Raises:
        UsageError: The store is a view.
    """
    if store.rows is not None:
        raise UsageError("this needs the whole pool, not a view of it; pass a selection to choose rows")


def absolute(location: str) -> str:
    """Return a location that is independent of the current folder; URLs and SQL are returned unchanged."""
    return location if "://" in location or is_sql(location) else os.path.abspath(expanded(location))


def _itemsize(piece: Piece) -> int:
    return 2 if piece.dtype == "bfloat16" else np.dtype(piece.dtype).itemsize


def open_store(
    location: str | os.PathLike[str], options: Options | None = None, *, scratch: str | None = None
) -> EmbeddingStore:
    """Open a pool of embeddings: a folder or file with a known layout, local or at any fsspec location.

    Reads headers only, with two exceptions, which are done once for the same files and saved below ``scratch``
    (default: the cache folder): ``options.metadata`` is joined by key, and ``options.skip_bad`` reads compressed files
    and Parquet to their end to find damaged shards.

    Args:
        location: The location; for data in memory see :func:`thresher.from_arrays`.
        options: What names and types in the files do not say.
        scratch: Where the two results are saved.

    Raises:
        PoolError: No layout is recognised, or a file is not usable (truncated, pickled, unsupported shape or type,
            differing row counts).
        UsageError: The location is an array or anything else than a path or URL.
    """
    if not isinstance(location, (str, os.PathLike)):
        raise UsageError(
            f"a pool is opened at a path or a URL, not from {type(location).__name__}; for data in memory type "
            "thresher.from_arrays(...)"
        )
    options = options or Options()
    layout = read_layout(os.fspath(location), options)
    folder = os.path.join(scratch or cache_folder(), "joined")

    def made_from(what: Any) -> str:
        return os.path.join(folder, digest(what)[:32])

    if options.skip_bad:
        pieces: list[Piece | TablePiece] = [piece for part in layout.vectors.values() for piece in part]
        code, stamps = code_version("thresher.pool.verify"), layout.stamps_of([*pieces, *layout.tables])
        layout = without_damaged(layout, made_from(["damage", code, layout.key, stamps]) + ".json")
    if options.metadata:
        metadata = read_metadata(options.metadata, Options(skip_bad=options.skip_bad), layout.key, scratch)
        code = code_version("thresher.pool.join")
        stamps = [*layout.stamps_of(layout.tables), *metadata.stamps_of(metadata.tables)]
        target = made_from([code, layout.key, metadata.key, stamps]) + ".parquet"
        joined = join_by_key(layout, metadata, target, options)
        while (held := pin(target)) is None:  # another run removed it in the meantime
            joined = join_by_key(layout, metadata, target, options)
        return EmbeddingStore(joined, options, block=block_of(layout), held=(held,))
    return EmbeddingStore(layout, options, block=block_of(layout))


def open_table(location: str, key: str | None = None, scratch: str | None = None) -> EmbeddingStore:
    """Open a table of scores, or the tables of another pool, to join them to a pool.

    Args:
        location: A pool, or a file of text, see :func:`thresher.pool.layouts.read_metadata`.
        key: The key column of the pool to which it is joined.
        scratch: The cache folder for the result of SQL (default: the usual one).

    Raises:
        PoolError: As for :func:`open_store`.
    """
    layout = read_metadata(location, Options(), key, scratch)
    held = tuple(filter(None, [pin(layout.tables[0].path)])) if is_sql(location) else ()
    return EmbeddingStore(layout, Options(), held=held)


def block_of(layout: Layout) -> int:
    """Return the rows of a block: fewer than usual if they are very long, as a small compressed file may say."""
    dim = sum(pieces[0].dim for pieces in layout.vectors.values() if pieces)
    return max(min(BLOCK, _BLOCK_BYTES // (4 * max(dim, 1))), 1)


def reopen(selection: Selection, pool: str | None = None, metadata: str | None = None) -> EmbeddingStore:
    """Return the pool of a selection: the open one it was made from, or open it again and check that it is the same.

    Args:
        selection: The selection; it records the location of its pool and the options with which it was opened.
        pool: The location of the pool, if it was moved.
        metadata: An img2dataset output to join by key.

    Raises:
        UsageError: There is another pool at the location.
        PoolError: It cannot be opened, or it was in memory.
    """
    source = selection.source
    if source is not None and pool is None and metadata is None and not source.store.changed():
        return replace(source.store, rows=None)
    if pool is None and selection.pool.startswith(IN_MEMORY):
        raise PoolError(
            "the pool of this selection was in memory, and is not saved with it; give the same data again: "
            "selection.with_pool(thresher.from_arrays(...)), or --pool if its rows are also in files"
        )
    known = {item.name for item in fields(Options)}
    if unknown := set(selection.options) - known:
        raise PoolError(f"the selection was made with options that this version does not know: {', '.join(unknown)}")
    options = Options(**{**selection.options, **({"metadata": metadata} if metadata else {})})
    joined = options.metadata
    if is_sql(joined) and not metadata:  # the file of a selection may come from others
        warnings.warn(
            f"{joined}: was joined to the pool, but a query in a file is not run; to join it, give it with --metadata",
            stacklevel=2,
        )
        options, joined = replace(options, metadata=None), None
    if joined and "://" not in joined and not is_sql(joined) and not os.path.exists(joined):
        raise PoolError(f"{joined}: was joined to the pool but no longer exists; give its location with --metadata")
    try:
        store = open_store(pool or selection.pool, options)
    except PoolError as error:
        raise type(error)(f"{error}; if the pool was moved, say where it is with --pool") from None
    try:
        same_pool(selection, store)
    except UsageError as error:
        raise UsageError(f"{error}; say where that is with --pool") from None
    return store


def heavy(store: EmbeddingStore, name: str) -> bool:
    """Return whether a column contains images or vectors."""
    table = next(part for part in store.layout.table_parts if name in part.columns)
    kind = str(table.schema([name]).field(0).type)
    return any(word in kind for word in ("struct<", "list<", "fixed_size_list", "binary", "map<"))
