"""Vectors and tables in Arrow IPC files: the file format (Feather 2, polars) and the stream format (Hugging Face).

Opening reads only the metadata of the batches. Uncompressed local files are memory-mapped, so that vectors are read in
place. In a compressed file one batch of a column is in memory at a time.
"""

from __future__ import annotations

import os
import posixpath
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from struct import unpack_from
from typing import Any

import numpy as np
import numpy.typing as npt

from thresher.errors import PoolError
from thresher.io.columns import plain_batch, plain_schema
from thresher.io.listing import Files
from thresher.io.open import open_file, trusting
from thresher.io.parquet import Choose, TablePiece, check_names, exactly, first_length, vector_type, vectors_of
from thresher.io.paths import visible
from thresher.io.pieces import Array, Piece, stored_dtype
from thresher.runtime.untrusted import load_json

ENDINGS = (".arrow", ".feather", ".ipc")

_FILE = b"ARROW1"  # how a file in the file format begins; a stream begins with its schema
_FEATHER_1 = b"FEA1"
STATE = r"([^/]*/)?state\.json"  # of a dataset that Hugging Face saved to disk, or of one of its splits
_GOES_ON = b"\xff\xff\xff\xff"  # before the size of a message, except in files of early versions
_BATCH = 8_192  # rows converted at a time

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ArrowPiece:
    """A column of vectors in an Arrow file (fixed-size list, list or binary).

    Attributes:
        mapped: Whether its vectors are read in place: the file is local, and the column is not compressed.
        ends: The row after the last one of every batch.
    """

    path: str
    array: str
    rows: int
    dim: int
    dtype: str
    mapped: bool
    ends: tuple[int, ...]
    protocol: str = "file"

    @property
    def seekable(self) -> bool:
        """Whether any range of rows is cheap to read; a compressed batch is read as a whole."""
        return self.mapped

    def read(self, start: int, stop: int) -> Array:
        """Return rows start..stop."""
        parts = [
            self._converted(column.slice(lo, hi - lo))
            for begin, column in self._columns(start, stop)
            for lo, hi in [(max(start - begin, 0), min(stop - begin, len(column)))]
        ]
        return self._joined(parts)

    def take(self, rows: Rows) -> Array:
        """Return scattered rows, ascending, from the batches that contain them."""
        import pyarrow as pa

        parts = []
        for begin, column in self._columns(int(rows[0]), int(rows[-1]) + 1) if len(rows) else ():
            lo, hi = np.searchsorted(rows, [begin, begin + len(column)])
            for at in range(lo, hi, _BATCH):
                some = rows[at : min(at + _BATCH, hi)] - begin
                if some[-1] - some[0] == len(some) - 1:
                    parts.append(self._converted(column.slice(int(some[0]), len(some))))
                else:
                    trusting(self.path, partial(column.validate, full=True))
                    parts.append(self._converted(column.take(pa.array(some))))
        return self._joined(parts)

    def stream(self, batch: int) -> Iterator[Array]:
        """Yield all rows in order."""
        columns = self._columns(0, self.rows)
        return exactly(
            self,
            (
                self._converted(column.slice(lo, min(batch, len(column) - lo)))
                for _, column in columns
                for lo in range(0, len(column), batch)
            ),
        )

    def _columns(self, start: int, stop: int) -> Iterator[tuple[int, Any]]:
        """Yield the first row and the column of each batch with some of rows start..stop."""
        first = int(np.searchsorted(self.ends, start, side="right"))
        begin = self.ends[first - 1] if first else 0
        for batch in _batches(self.protocol, self.path, [self.array], first, in_place=self.mapped):
            if len(batch):
                yield begin, batch.column(0)
            begin += len(batch)
            if begin >= stop < self.rows:  # to the end of the file, where damage may be, only if that is asked for
                return

    def _converted(self, column: Any) -> Array:
        def convert() -> Array:
            column.validate(full=True)  # the lengths in the file may be invalid
            plain = plain_batch(_one(column)).column(0)
            return vectors_of(plain, self.dim, self.dtype)

        return trusting(self.path, convert)

    def _joined(self, parts: list[Array]) -> Array:
        if len(parts) == 1:
            return parts[0]
        return np.concatenate([np.empty((0, self.dim), stored_dtype(self.dtype)), *parts])


@dataclass(frozen=True)
class ArrowTable(TablePiece):
    """Metadata rows of one Arrow file; ``in_place`` if it is local and not compressed."""

    in_place: bool = False

    def stream(self, columns: Sequence[str], batch: int = 65536) -> Iterator[Any]:
        """Yield record batches of the columns, in row order."""
        return exactly(
            self,
            (
                self._checked(whole.slice(lo, min(batch, len(whole) - lo)))
                for whole in self._wholes(columns)
                for lo in range(0, len(whole), batch)
            ),
        )

    def take(self, columns: Sequence[str], rows: Rows) -> Iterator[Any]:
        """Yield record batches of the given rows (ascending)."""
        import pyarrow as pa

        start = 0
        for whole in self._wholes(columns):
            lo, hi = np.searchsorted(rows, [start, start + len(whole)])
            for at in range(lo, hi, _BATCH):
                some = rows[at : min(at + _BATCH, hi)] - start
                span = self._checked(whole.slice(int(some[0]), int(some[-1] - some[0]) + 1))
                yield span.take(pa.array(some - some[0]))
            start += len(whole)
            if hi == len(rows):
                return

    def schema(self, columns: Sequence[str]) -> Any:
        """Return the Arrow schema of some columns, in the order of ``columns``."""
        import pyarrow as pa

        schema = plain_schema(_schema(self.protocol, self.path))
        return pa.schema([schema.field(name) for name in columns])

    def _wholes(self, columns: Sequence[str]) -> Iterator[Any]:
        # A field of a struct, "image.path", is read as the struct.
        names = [name if name in self.columns else name.split(".")[0] for name in columns]
        return _batches(self.protocol, self.path, names, in_place=self.in_place)

    def _checked(self, part: Any) -> Any:
        def check() -> Any:
            part.validate(full=True)  # lengths and texts in the file may be invalid
            return plain_batch(part)

        return trusting(self.path, check)


def arrow_table(protocol: str, path: str) -> ArrowTable:
    """Read the metadata of the batches of an Arrow file.

    Raises:
        PoolError: The file is damaged, or two of its columns have one name.
    """
    schema, ends = _schema(protocol, path), _ends(protocol, path)
    rows = ends[-1] if ends else 0
    return ArrowTable(path, rows, tuple(schema.names), protocol, in_place=_in_place(protocol, path))


def arrow_piece(protocol: str, path: str, column: str, dtype: str | None = None) -> ArrowPiece:
    """Describe a column of vectors from the metadata of the batches and, if needed, its first vector.

    Raises:
        PoolError: The file is damaged, or the column does not contain vectors.
    """
    field, ends = plain_schema(_schema(protocol, path)).field(column), tuple(_ends(protocol, path))
    rows = ends[-1] if ends else 0

    def parts() -> Iterator[Any]:
        for batch in _batches(protocol, path, [column]):
            for lo in range(0, len(batch), 64):
                part = batch.slice(lo, 64)
                trusting(path, partial(part.validate, full=True))
                yield plain_batch(part).column(0)

    dim, kind = vector_type(f"{path} [{column}]", field, rows, lambda: first_length(parts()), dtype)
    return ArrowPiece(path, column, rows, dim, kind, _in_place(protocol, path), ends, protocol)


def arrow_head(
    protocol: str, path: str, choose: Choose, dtype: str | None = None
) -> tuple[dict[str, Piece], TablePiece]:
    """Describe the columns of vectors and the table of a file, as :func:`thresher.io.parquet.parquet_head` does."""
    columns = choose(arrow_types(protocol, path))
    return {role: arrow_piece(protocol, path, name, dtype) for role, name in columns.items()}, arrow_table(
        protocol, path
    )


def arrow_types(protocol: str, path: str) -> dict[str, str]:
    """Return the Arrow type of every column as text."""
    schema = plain_schema(_schema(protocol, path))
    return {name: str(schema.field(name).type) for name in schema.names}


def is_saved(files: Files) -> bool:
    """Return whether files have a dataset that Hugging Face saved to disk; one without rows has no Arrow file."""
    return bool(files.matching(STATE) and files.matching(r"([^/]*/)?dataset_info\.json"))


def saved_files(files: Files, folder: str) -> list[str]:
    """Return the Arrow files of a dataset that Hugging Face saved to disk, in its order; [] if it has no rows.

    Args:
        files: The files.
        folder: The folder with the ``state.json`` of the dataset; "" for the location itself.

    Raises:
        PoolError: A file is missing, or the dataset is saved with an indices mapping.
    """
    path = files.path(posixpath.join(folder, "state.json"))
    with open_file(files.protocol, path) as raw:
        state = trusting(path, lambda: load_json(raw))
    listed = state.get("_data_files") if isinstance(state, dict) else None
    bases = [
        one.get("filename") if isinstance(one, dict) else None for one in (listed if isinstance(listed, list) else [0])
    ]
    if None in bases:
        raise PoolError(f"{path}: does not list the files of the dataset; save it again")
    names = [posixpath.join(folder, str(base)) for base in bases]
    if lost := [name for name in names if name not in files.names]:
        raise PoolError(f"{path}: names {visible(lost[0])}, which does not exist; save the dataset again")
    if state.get("_indices_files") or state.get("_indices_data_files"):
        raise PoolError(
            f"{path}: the dataset is saved with an indices mapping; load it with datasets and save it with "
            "flatten_indices().save_to_disk(...)"
        )
    return names


def refuse_another(raw: Any, path: str) -> None:
    """Raise if another stream begins at the position of a file, after the end of the first, as ``cat`` writes it."""
    if trusting(path, partial(raw.read, len(_GOES_ON))) == _GOES_ON:
        raise PoolError(
            f"{path}: another stream begins at byte {raw.tell() - len(_GOES_ON):,}, after the end of the first, "
            "and is not read; save one stream per file"
        )


def lacks_end(protocol: str, path: str) -> bool:
    """Return whether a file is a stream without its end mark, and so may be cut off between two batches.

    The file format ends in the positions of its batches. That of early versions is four zeros, which may be padding.
    """
    mark = _GOES_ON + bytes(4)
    with open_file(protocol, path) as file:
        if trusting(path, lambda: file.read(len(_GOES_ON))) != _GOES_ON:
            return False
        trusting(path, lambda: file.seek(max(0, file.seek(0, os.SEEK_END) - len(mark))))
        return trusting(path, lambda: file.read(len(mark))) != mark


# --- reading --------------------------------------------------------------------------------------


def _opened(protocol: str, path: str) -> Any:
    """Open a file; a local one is memory-mapped."""
    import pyarrow as pa

    raw: Any = open_file(protocol, path)
    if protocol != "file":
        return raw
    raw.close()  # open_file has checked that it is a regular file
    return trusting(path, lambda: pa.memory_map(path))


def _reader(raw: Any, path: str, fields: Sequence[int] = ()) -> tuple[Any, bool]:
    """Return a reader of some fields, () for all, and whether it is one of the file format."""
    import pyarrow as pa

    options = pa.ipc.IpcReadOptions(included_fields=list(fields), use_threads=False)
    begin = bytes(raw.read(6))
    raw.seek(0)
    if begin.startswith(_FEATHER_1):
        raise PoolError(f"{path}: is Feather version 1; save it again with pyarrow.feather.write_feather")
    if begin == _FILE:
        return trusting(path, lambda: pa.ipc.open_file(raw, options=options)), True
    return trusting(path, lambda: pa.ipc.open_stream(raw, options=options)), False


def _schema(protocol: str, path: str) -> Any:
    with _opened(protocol, path) as raw:
        schema = _reader(raw, path)[0].schema
    check_names(path, schema.names)
    return schema


def _batches(
    protocol: str, path: str, columns: Sequence[str], first: int = 0, *, in_place: bool = False
) -> Iterator[Any]:
    """Yield some columns of the record batches from number ``first`` on, each of which has passed cheap checks.

    Arrow decompresses no other columns if it knows which ones to read, but then it copies what it could map.
    """
    schema = _schema(protocol, path)
    fields = trusting(path, lambda: sorted({_index(schema, name) for name in columns}))
    with _opened(protocol, path) as raw:
        reader, seekable = _reader(raw, path, () if in_place else fields)
        if seekable:
            numbers = range(first, reader.num_record_batches)
            batches = (reader.get_batch(i) for i in numbers)
        else:
            batches = iter(reader)
            for _ in range(first):
                trusting(path, lambda: next(batches, None))
        for batch in iter(lambda: trusting(path, lambda: next(batches, None)), None):
            trusting(path, batch.validate)  # checks the lengths of its columns
            if batch.num_rows < 0:  # validate does not check this
                raise PoolError(f"{path}: is damaged: one of its batches has {batch.num_rows:,} rows")
            yield batch.select(list(columns))
        if not seekable:
            refuse_another(raw, path)


def _index(schema: Any, name: str) -> int:
    if (at := schema.get_field_index(name)) < 0:
        raise ValueError(f"it no longer has the column {name!r}")
    return int(at)


def _ends(protocol: str, path: str) -> list[int]:
    """Return the row after the last one of every batch, reading the column that takes the fewest bytes."""
    import pyarrow as pa

    def bytes_of(kind: Any) -> int:
        return 0 if pa.types.is_null(kind) else kind.bit_width if pa.types.is_primitive(kind) else 1 << 20

    schema = _schema(protocol, path)
    if not schema.names:
        raise PoolError(f"{path}: has no columns")
    cheap = min(range(len(schema)), key=lambda i: bytes_of(schema.field(i).type))
    sizes = [len(batch) for batch in _batches(protocol, path, [schema.names[cheap]])]
    return np.cumsum(sizes, dtype=np.int64).tolist() if sizes else []


def _in_place(protocol: str, path: str) -> bool:
    """Return whether columns are read from a memory map of the file: it is local, and not compressed."""
    if protocol != "file":
        return False
    with _opened(protocol, path) as raw:
        return not trusting(path, partial(_compressed, raw))


def _compressed(raw: Any) -> bool:
    """Return whether the first record batch is compressed, which pyarrow does not say without decompressing it."""
    import pyarrow as pa

    raw.seek(0)
    if bytes(raw.read(6)) != _FILE:
        raw.seek(0)
        messages = pa.ipc.MessageReader.open_stream(raw)
        first = next((message for message in messages if message.type == "record batch"), None)
        return first is not None and _Table.root(bytes(first.metadata)).table(2).at(3) > 0
    raw.seek(raw.size() - 10)
    (size,) = unpack_from("<i", bytes(raw.read(4)))
    raw.seek(raw.size() - 10 - size)
    footer = _Table.root(bytes(raw.read(size)))
    if not footer.at(3) or not footer.length(3):
        return False
    offset, size = unpack_from("<qi", footer.content, footer.target(3) + 4)
    raw.seek(offset)
    message = bytes(raw.read(size))
    return _Table.root(message[8 if message.startswith(_GOES_ON) else 4 :]).table(2).at(3) > 0


@dataclass(frozen=True)
class _Table:
    """A table of a flatbuffer, in which Arrow keeps its metadata; a position outside of it is a struct.error."""

    content: bytes
    place: int

    @classmethod
    def root(cls, content: bytes) -> _Table:
        return cls(content, unpack_from("<I", content)[0])

    def at(self, number: int) -> int:
        """Return where a field is, 0 if the table does not have it."""
        fields = self.place - unpack_from("<i", self.content, self.place)[0]
        if 4 + 2 * number >= unpack_from("<H", self.content, fields)[0]:
            return 0
        offset = unpack_from("<H", self.content, fields + 4 + 2 * number)[0]
        return int(self.place + offset) if offset else 0

    def target(self, number: int) -> int:
        """Return where the table or vector of a field is."""
        return int(self.at(number) + unpack_from("<I", self.content, self.at(number))[0])

    def table(self, number: int) -> _Table:
        """Return the table of a field."""
        return _Table(self.content, self.target(number))

    def length(self, number: int) -> int:
        """Return the number of elements of the vector of a field."""
        return int(unpack_from("<I", self.content, self.target(number))[0])


def _one(column: Any) -> Any:
    import pyarrow as pa

    return pa.RecordBatch.from_arrays([column], names=["vectors"])
