"""The result of a reader: fields of vectors and tables of metadata, as lists of pieces of files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import numpy.typing as npt

from thresher.errors import PoolError, UsageError, suggest
from thresher.io.columns import CAPTIONS, IMAGES, KEYS, NO_KEY, SCORES, as_text, captions_in
from thresher.io.listing import Files, stamp_of
from thresher.io.parquet import Choose, TablePiece
from thresher.io.paths import cut
from thresher.io.pieces import FLOATS, Array, Piece, stored_dtype
from thresher.io.remote import in_parallel
from thresher.ops.vectors import to_float32
from thresher.runtime.format import counted
from thresher.runtime.random import digest

Rows = npt.NDArray[np.int64]

_IMAGE_VECTORS = (
    "image_embedding", "image_embeddings", "img_embedding", "img_emb", "image_emb", "image_features",
    "clip_image", "l14_img", "b32_img", "embedding", "embeddings", "emb", "vector",
)  # fmt: skip
_TEXT_VECTORS = (
    "text_embedding", "text_embeddings", "txt_embedding", "text_emb", "txt_emb", "text_features",
    "caption_embedding", "clip_text", "l14_txt", "b32_txt",
)  # fmt: skip

_SAMPLED = 1_000  # rows in a fingerprint: their keys, or their vectors if there are no keys
_CHUNKS = 64  # groups of remote files that are read for a fingerprint at the same time
_DECODED = 64  # rows whose vectors are always in it; reading one may require decoding its row group


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to read a pool if the names and types in its files are not sufficient.

    Attributes:
        image: Array or column with the image embeddings (default: by usual names).
        text: Array or column with the caption embeddings (default: by usual names).
        key: Metadata column that identifies a row; "row" for the row number.
        caption: Metadata column with the caption.
        dtype: "bfloat16" if uint16 arrays contain bfloat16 bits; "float16" or "float32" for binary columns.
        metadata: Location of an img2dataset output to join by key.
        skip_bad: Skip unusable files and rows, and count and list them, instead of stopping.
        reader: The reader to use, and its options: ``NAME`` or ``NAME:OPTION=VALUE,...`` (default: the first that
            recognises the pool).
    """

    image: str | None = None
    text: str | None = None
    key: str | None = None
    caption: str | None = None
    dtype: str | None = None
    metadata: str | None = None
    skip_bad: bool = False
    reader: str | None = None

    def __post_init__(self) -> None:
        """Validate the parameters."""
        allowed = (*FLOATS, "bfloat16")
        if self.dtype not in (None, *allowed):
            raise UsageError(
                f"--dtype {self.dtype}: allowed are {', '.join(allowed)}.{suggest(str(self.dtype), allowed)}"
            )

    def recorded(self) -> dict[str, Any]:
        """Return the options as JSON values, to be saved in a selection; without ``reader`` if none was given."""
        return {name: value for name, value in vars(self).items() if name != "reader" or value is not None}


@dataclass(frozen=True)
class Skipped:
    """A file that ``skip_bad`` skipped, and why."""

    path: str
    why: str


@dataclass(frozen=True)
class Layout:
    """N rows over files. Row order is file order; different fields may be split into files differently.

    Attributes:
        kind: Name of the layout.
        location: The location as the user wrote it.
        vectors: Field -> pieces, in row order.
        tables: Metadata tables, in row order.
        key: Metadata column that identifies a row; None for the row number.
        caption: Metadata column with the caption.
        image: Metadata column with the image.
        scores: Metadata columns with known scores.
        skipped: Files that ``skip_bad`` skipped.
        empty: Files without rows that are not among the pieces.
        stamps: Path -> size and version of the files when the pool was opened, [] for a file that cannot change.
        pictures: For a pool in memory, a function that returns the bytes of the image of a row, b"" for none.
    """

    kind: str
    location: str
    vectors: Mapping[str, tuple[Piece, ...]]
    tables: tuple[TablePiece, ...] = ()
    key: str | None = None
    caption: str | None = None
    image: str | None = None
    scores: tuple[str, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    empty: tuple[str, ...] = ()
    stamps: Mapping[str, list[Any]] = field(default_factory=dict, repr=False, compare=False)
    pictures: Callable[[int], bytes] | None = field(default=None, repr=False, compare=False)

    @property
    def rows(self) -> int:
        """N, the number of rows."""
        for pieces in self.vectors.values():
            return sum(piece.rows for piece in pieces)
        return sum(piece.rows for piece in self.tables)

    def without_rows(self) -> list[str]:
        """Return the files without rows, each once."""
        pieces: list[Any] = [piece for pieces in self.vectors.values() for piece in pieces] + list(self.table_parts)
        return list(dict.fromkeys([*self.empty, *(piece.path for piece in pieces if not piece.rows)]))

    @property
    def columns(self) -> tuple[str, ...]:
        """Metadata columns that every table has."""
        if not self.tables:
            return ()
        common = set(self.tables[0].columns).intersection(*(piece.columns for piece in self.tables))
        return tuple(name for name in self.tables[0].columns if name in common)

    # --- rows -----------------------------------------------------------------------------------

    def raw_at(self, name: str, ids: Rows) -> Array:
        """Return the stored vectors of some rows of a field, by ascending row number, (n, D)."""
        spans, start = [], 0
        for piece in self.vectors[name]:
            lo, hi = np.searchsorted(ids, [start, start + piece.rows])
            if hi > lo:
                spans.append((piece, int(hi - lo), partial(piece.take, ids[lo:hi] - start)))
            start += piece.rows
        return gathered(spans, self.vectors[name][0].dim)

    def lookup(self, columns: Sequence[str], ids: Rows) -> Iterator[Any]:
        """Yield Arrow record batches of some rows, by ascending row number, reading only their row groups."""
        return rows_of(self.tables, columns, ids)

    def keys_in(self, column: Any) -> list[str]:
        """Return the keys in a part of the key column as strings, "" for nulls.

        Raises:
            UsageError: The values cannot be keys, see :mod:`thresher.io.columns`.
        """
        return ["" if key is None else key for key in as_text(column, self.location, str(self.key)).to_pylist()]

    @property
    def table_parts(self) -> tuple[TablePiece, ...]:
        """The files of the metadata tables; a table that joins others has several."""
        return tuple(part for table in self.tables for part in table.parts)

    # --- identity -------------------------------------------------------------------------------

    @cached_property
    def fingerprint(self) -> str:
        """Hash of N, fields and widths, and the values of evenly spaced rows; the same after re-sharding."""
        parts: list[Any] = [[self.rows, sorted(self.vectors)]]
        few, many = (np.unique(np.linspace(0, self.rows - 1, n).astype(np.int64)) for n in (_DECODED, _SAMPLED))
        remote = next((protocol for protocol, _ in self.files() if protocol != "file"), "file")

        def by_file(pieces: Sequence[Piece | TablePiece], rows: Rows) -> list[Rows]:
            ends = np.cumsum([piece.rows for piece in pieces])
            split = np.split(rows, np.searchsorted(rows, ends[:-1])) if remote != "file" else [rows]
            parts = [part for part in split if len(part)]
            step = -(-len(parts) // _CHUNKS)
            return [np.concatenate(parts[i : i + step]) for i in range(0, len(parts), step)]

        def vectors(name: str, rows: Rows) -> Array:
            split = by_file(self.vectors[name], rows)
            return to_float32(np.concatenate(list(in_parallel(remote, partial(self.raw_at, name), split))))

        parts += [vectors(name, few) for name in sorted(self.vectors)]
        if not self.key:
            parts += [vectors(name, many) for name in sorted(self.vectors)]
        else:
            split = by_file(self.tables, many)
            parts.append("\0".join(key for keys in in_parallel(remote, self._keys_at, split) for key in keys))
        return digest(*parts)[:32]

    def _keys_at(self, rows: Rows) -> list[str]:
        return [key for part in self.lookup([str(self.key)], rows) for key in self.keys_in(part.column(0))]

    @cached_property
    def version(self) -> str:
        """Hash of the names, sizes and times of the files when the pool was opened."""
        stamps = [self.stamps_of(pieces) for _, pieces in sorted(self.vectors.items())]
        return digest([*stamps, self.stamps_of(self.table_parts), [self.key, self.caption]])[:32]

    def stamps_of(self, pieces: Sequence[Piece | TablePiece]) -> list[list[Any]]:
        """Return how each piece is read, and the size and version of its file when the pool was opened."""
        return [[dict(vars(piece)), *self._stamp(piece.protocol, piece.path)] for piece in pieces]

    def _stamp(self, protocol: str, path: str) -> list[Any]:
        return self.stamps[path] if path in self.stamps else stamp_of(protocol, path)

    def changed(self) -> bool:
        """Return whether a file has changed since the pool was opened.

        Checks every local file once; for remote pools lists the files again, and requests what the listing lacks.

        Raises:
            PoolError: A file no longer exists.
        """
        files = [(protocol, path) for protocol, path in self.files() if self.stamps.get(path)]
        elsewhere = any(protocol != "file" for protocol, _ in files)
        now = Files.at(self.location, again=True).stamps if elsewhere else {}
        return any((now.get(path) or stamp_of(protocol, path)) != self.stamps[path] for protocol, path in files)

    def files(self) -> list[tuple[str, str]]:
        """Return (protocol, path) of every file, each once, in order."""
        pieces: list[Any] = [p for ps in self.vectors.values() for p in ps] + list(self.table_parts)
        return list(dict.fromkeys((piece.protocol, piece.path) for piece in pieces))

    def check(self) -> None:
        """Raise a PoolError if fields differ in length, width or type, or if there are no rows."""
        if not self.vectors and not self.tables and self.skipped:
            why = f"; the first: {self.skipped[0].path}: {self.skipped[0].why}"
            raise PoolError(f"{self.location}: no usable file is left of the {len(self.skipped)} found{why}")
        counts = {name: sum(p.rows for p in pieces) for name, pieces in self.vectors.items()}
        if self.tables:
            counts["metadata"] = sum(piece.rows for piece in self.tables)
        if len(set(counts.values())) > 1:
            first = {n: p[0].path for n, p in self.vectors.items()} | (
                {"metadata": self.tables[0].path} if self.tables else {}
            )
            counts_text = ", ".join(
                f"{name} has {counted(count, 'row')} (from {first[name]})" for name, count in counts.items()
            )
            raise PoolError(f"{self.location}: row counts differ: {counts_text}; is a file missing, or one too many?")
        if self.rows == 0:
            raise PoolError(f"{self.location}: the pool has no rows; is it finished?")
        for name, pieces in self.vectors.items():
            for piece in pieces:
                if (piece.dim, piece.dtype) != (pieces[0].dim, pieces[0].dtype):
                    raise PoolError(
                        f"{piece.path}: {name} rows are {piece.dim} x {piece.dtype}, but those of "
                        f"{pieces[0].path} are {pieces[0].dim} x {pieces[0].dtype}; convert one of them"
                    )


def rows_of(tables: Sequence[TablePiece], columns: Sequence[str], ids: Rows) -> Iterator[Any]:
    """Yield Arrow record batches of some rows of consecutive tables, by ascending number of the row in all of them."""
    start = 0
    for table in tables:
        lo, hi = np.searchsorted(ids, [start, start + table.rows])
        if hi > lo:
            yield from table.take(columns, ids[lo:hi] - start)
        start += table.rows


def gathered(spans: Sequence[tuple[Piece, int, Callable[[], Array]]], dim: int) -> Array:
    """Return rows of several pieces as one array, (n, D); no file stays open for it, unless it has all the rows.

    Args:
        spans: Piece, number of rows, and a function that reads them.
        dim: D, if there are no rows.
    """
    if not spans:
        return np.empty((0, dim), np.float32)
    if len(spans) == 1:
        return spans[0][2]()
    out = np.empty((sum(rows for _, rows, _ in spans), spans[0][0].dim), stored_dtype(spans[0][0].dtype))
    start = 0
    for _, rows, read in spans:
        out[start : start + rows] = read()
        start += rows
    return out


def from_shards(
    kind: str,
    files: Files,
    names: Iterable[str],
    read: Callable[[str], tuple[Mapping[str, Piece], TablePiece | None]],
    options: Options,
    skipped: Sequence[Skipped] = (),
) -> Layout:
    """Return the layout of files that belong together shard by shard.

    ``read(name)`` returns the vectors and the table of one shard. A bad shard raises an error or, with ``skip_bad``,
    is skipped: one that is unreadable, has differing row counts, or has other fields, widths or types than most.
    """
    bad = list(skipped)
    shards = []

    def tried(name: str) -> tuple[Mapping[str, Piece], TablePiece | None] | PoolError:
        try:
            vectors, table = read(name)
            _same_rows({**vectors, **({"metadata": table} if table else {})})
            return vectors, table
        except PoolError as error:
            return error

    for found in in_parallel(files.protocol, tried, names):
        if not isinstance(found, PoolError):
            shards.append(found)
        elif not options.skip_bad:
            raise found
        else:
            bad.append(skipped_file(found))
    # An empty file has no reliable types; if all files are empty, they are kept, so that the check below rejects them.
    full = [shard for shard in shards if _first(*shard).rows]
    left_out = [shard for shard in shards if full and not _first(*shard).rows]
    empty = dict.fromkeys(piece.path for vectors, table in left_out for piece in (*vectors.values(), table) if piece)
    shards = full or shards
    kinds = [_kind(vectors, table, options) for vectors, table in shards]
    usual = max(dict.fromkeys(kinds), key=kinds.count, default=None)
    for shard, shape in zip(shards, kinds, strict=True):
        if shape != usual:
            odd = PoolError(f"{_first(*shard).path}: has {shape}, most files have {usual}; convert or remove this one")
            if not options.skip_bad:
                raise odd
            bad.append(skipped_file(odd))
    good = [shard for shard, shape in zip(shards, kinds, strict=True) if shape == usual]
    return with_roles(
        Layout(
            kind=kind,
            location=files.location,
            vectors={name: tuple(vectors[name] for vectors, _ in good) for name in (good[0][0] if good else ())},
            tables=tuple(table for _, table in good if table),
            skipped=tuple(bad),
            empty=tuple(empty),
        ),
        options,
    )


def skipped_file(error: PoolError) -> Skipped:
    """Return the file that an error names, and the reason that it gives."""
    path, _, why = str(error).partition(": ")
    if path.endswith("]"):  # an array in the file
        path, _, array = path.rpartition(" [")
        why = f"{array[:-1]} {why}"
    return Skipped(path, why)


def _first(vectors: Mapping[str, Piece], table: TablePiece | None) -> Piece | TablePiece:
    return next(piece for piece in (*vectors.values(), table) if piece)


def _same_rows(what: Mapping[str, Piece | TablePiece]) -> None:
    first, *rest = what.values()
    for piece in rest:
        if piece.rows != first.rows:
            raise PoolError(
                f"{piece.path}: has {counted(piece.rows, 'row')}, but {first.path}, which belongs to it, has "
                f"{first.rows:,}; create both again together"
            )


def _kind(vectors: Mapping[str, Piece], table: TablePiece | None, options: Options) -> str:
    """Describe what must be the same in all shards: arrays, widths, types and the key column."""
    parts = [" ".join(f"{name} {p.array} {p.dim} x {p.dtype}".split()) for name, p in sorted(vectors.items())]
    if table:
        parts.append(f"metadata by {next((name for name in (options.key, *KEYS) if name in table.columns), 'row')}")
    return ", ".join(parts)


def embedding_columns(path: str, types: Mapping[str, str], options: Options) -> dict[str, str]:
    """Return the columns of a table with image and text embeddings, by role.

    Args:
        path: The file, for messages.
        types: The Arrow type of every column as text.
        options: Columns that the user named.

    Raises:
        UsageError: A requested column does not exist.
    """
    found = {}
    for role, wanted, usual in (("image", options.image, _IMAGE_VECTORS), ("text", options.text, _TEXT_VECTORS)):
        if wanted and wanted not in types:
            raise UsageError(f"{path}: no column {wanted!r}; it has {', '.join(types)}.{suggest(wanted, types)}")
        vectors = (name for name in usual if name in types and _may_be_vectors(types[name]))
        if column := wanted or next(vectors, None):
            found[role] = column
    return found


def from_tables(
    kind: str,
    files: Files,
    names: Iterable[str],
    options: Options,
    *,
    head: Callable[[str, str, Choose, str | None], tuple[dict[str, Piece], TablePiece]],
) -> Layout:
    """Return the layout of tables with columns of embeddings; a bad file is treated as in :func:`from_shards`.

    Args:
        kind: Name of the layout.
        files: The files of the pool.
        names: Names of the tables, in order.
        options: Columns that the user named, and the type of vectors.
        head: Reads the header of a file, given its protocol and path, a function that chooses the column of each role
            by the Arrow types of all columns, as text, and the type of vectors that the user gave. Returns the columns
            of vectors by role, and the table.

    Raises:
        UsageError: A requested column does not exist.
    """

    def shard(name: str) -> tuple[dict[str, Piece], TablePiece]:
        path = files.path(name)
        return head(files.protocol, path, lambda types: embedding_columns(path, types, options), options.dtype)

    return from_shards(kind, files, names, shard, options)


def _may_be_vectors(kind: str) -> bool:
    return any(word in kind for word in ("list<", "fixed_size_list", "binary"))


def with_roles(layout: Layout, options: Options) -> Layout:
    """Set the key, caption, image and score columns of a layout.

    Raises:
        UsageError: A requested column does not exist (a caption may come from ``metadata``).
    """
    columns = layout.columns

    def first(names: Sequence[str]) -> str | None:
        return next((name for name in names if name in columns), None)

    for role, wanted in (("key", options.key), ("caption", None if options.metadata else options.caption)):
        if wanted and wanted not in columns and (role, wanted) != ("key", NO_KEY):
            raise UsageError(
                f"no metadata column {wanted!r} for --{role} in {layout.location}; "
                f"columns: {', '.join(columns) or 'none'}.{suggest(wanted, columns)}"
            )
    return replace(
        layout,
        key=(options.key if options.key in columns else None) if options.key else first(KEYS),
        caption=options.caption or first(CAPTIONS),
        image=first(IMAGES),
        scores=tuple(name for name in SCORES if name in columns),
    )


def texts(column: Any, limit: int | None = None) -> list[str]:
    """Return the values of an Arrow column as strings to show, "" for nulls; several captions of a row are joined.

    Args:
        column: The column.
        limit: Number of characters after which texts are cut, before they are copied; None for no limit.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    if limit is not None:
        if pa.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            column = pc.utf8_slice_codeunits(column, 0, limit)
    return ["" if value is None else _one(value)[:limit] for value in captions_in(column)]


def _one(value: str | list[str | None]) -> str:
    return value if isinstance(value, str) else " / ".join(one for one in value if one is not None)


def shown(column: Any, limit: int) -> list[str]:
    """Return the values of an Arrow column as strings to show: long ones are cut and followed by their length."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        return [cut(text, limit) for text in texts(column)]
    lengths = pc.utf8_length(column).fill_null(0).to_pylist()
    return [cut(text, limit, length) for text, length in zip(texts(column, limit), lengths, strict=True)]
