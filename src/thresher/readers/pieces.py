"""Pieces of files: arrays inside .npy, .npz and parquet, and parquet tables. Headers at opening only.

Pieces are frozen and picklable and hold no data. A *seekable* piece serves any range of rows; a
*mapped* one serves scattered rows as well. The rest can only be streamed from the start.
"""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import IO, Any, Protocol

import numpy as np
import numpy.typing as npt

from thresher.errors import PoolError

Array = npt.NDArray[Any]
FLOATS = ("float16", "float32", "float64")


class Piece(Protocol):
    """A run of rows of one field in one file."""

    @property
    def path(self) -> str: ...  # noqa: D102
    @property
    def rows(self) -> int: ...  # noqa: D102
    @property
    def dim(self) -> int: ...  # noqa: D102
    @property
    def dtype(self) -> str: ...  # noqa: D102
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

    def stamp(self) -> list[Any]:
        """What changes when the file does: name, size, time."""
        ...


def protocol_of(fs: Any) -> str:
    """Return the name by which fsspec gives this file system again."""
    name = fs.protocol if isinstance(fs.protocol, str) else fs.protocol[0]
    return "file" if name == "local" else str(name)


def open_file(protocol: str, path: str) -> IO[bytes]:
    """Open for reading, anywhere."""
    if protocol == "file":
        return open(path, "rb")
    import fsspec

    return fsspec.filesystem(protocol).open(path, "rb")  # type: ignore[no-any-return]


def stamp_of(protocol: str, path: str) -> list[Any]:
    """Return [path, size, version] of a file; changes whenever its content may have."""
    if protocol == "file":
        stat = os.stat(path)
        return [path, stat.st_size, stat.st_mtime_ns]
    import fsspec

    fs = fsspec.filesystem(protocol)
    info = fs.info(path)
    version = next((str(info[k]) for k in ("ETag", "etag", "mtime", "LastModified", "created") if k in info), "")
    return [path, info.get("size"), version]


def trusting(path: str, what: Callable[[], Any]) -> Any:
    """Call ``what``, turning whatever a damaged file makes it raise into a PoolError naming the file."""
    import pyarrow

    try:
        return what()
    except PoolError:
        raise
    except FileNotFoundError:
        raise PoolError(f"{path}: no such file") from None
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, pyarrow.ArrowException) as error:
        raise PoolError(f"{path}: cannot be read, it may be truncated or damaged ({error})") from None


# --- .npy -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NpyPiece:
    """Rows of an uncompressed array: a .npy file, or a stored member of an .npz."""

    path: str
    rows: int
    dim: int
    dtype: str
    offset: int
    protocol: str = "file"

    @property
    def seekable(self) -> bool:
        """True: rows are at known offsets."""
        return True

    @property
    def mapped(self) -> bool:
        """Whether scattered rows are cheap (local files)."""
        return self.protocol == "file"

    def read(self, start: int, stop: int) -> Array:
        """Return rows start..stop."""
        stored = _stored(self.dtype)
        width = self.dim * stored.itemsize
        if self.mapped:
            return np.asarray(self._map()[start:stop])
        with open_file(self.protocol, self.path) as file:
            file.seek(self.offset + start * width)
            data = file.read((stop - start) * width)
        if len(data) != (stop - start) * width:
            raise PoolError(f"{self.path}: ends before row {stop:,}; it is truncated")
        return np.frombuffer(data, stored).reshape(stop - start, self.dim)

    def take(self, rows: npt.NDArray[np.int64]) -> Array:
        """Return scattered rows."""
        return np.asarray(self._map()[rows])

    def stream(self, batch: int) -> Iterator[Array]:
        """Yield all rows in order."""
        for start in range(0, self.rows, batch):
            yield self.read(start, min(start + batch, self.rows))

    def stamp(self) -> list[Any]:
        """Name, size, time and place."""
        return [*stamp_of(self.protocol, self.path), self.offset]

    def _map(self) -> Array:
        try:
            return np.memmap(self.path, _stored(self.dtype), mode="r", offset=self.offset, shape=(self.rows, self.dim))
        except (OSError, ValueError) as error:
            raise PoolError(f"{self.path}: cannot be read any more ({error})") from None


def _stored(dtype: str) -> np.dtype[Any]:
    return np.dtype("<u2" if dtype == "bfloat16" else dtype)


def npy_piece(protocol: str, path: str, dtype: str | None = None) -> NpyPiece:
    """Read a .npy header.

    Raises:
        PoolError: Not an array of rows of floats, pickled, Fortran-ordered or shorter than it says.
    """

    def read() -> NpyPiece:
        with open_file(protocol, path) as file:
            size = file.seek(0, io.SEEK_END)
            file.seek(0)
            return _npy_header(file, path, path, size, dtype, protocol, base=0)

    piece: NpyPiece = trusting(path, read)
    return piece


def _npy_header(
    file: IO[bytes], path: str, name: str, size: int, dtype: str | None, protocol: str, base: int
) -> NpyPiece:
    """Read a header from ``file``, where the array with its header takes ``size`` bytes."""
    shape, found = _header(file, name, dtype)
    begin = file.tell()
    need = shape[0] * shape[1] * _stored(found).itemsize
    if size - begin < need:
        raise PoolError(
            f"{name}: {size - begin:,} bytes of data where {shape[0]:,} x {shape[1]} {found} need {need:,}; "
            "it is truncated"
        )
    return NpyPiece(path, shape[0], shape[1], found, base + begin, protocol)


def _header(file: IO[bytes], name: str, dtype: str | None) -> tuple[tuple[int, int], str]:
    """Parse a .npy header; never unpickles."""
    from numpy.lib import format as npy

    version = npy.read_magic(file)
    reader = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, fortran, stored = reader(file)
    if stored.hasobject:
        raise PoolError(f"{name}: holds pickled Python objects, which are never read; save it as a plain float array")
    if len(shape) != 2 or shape[1] == 0:
        raise PoolError(f"{name}: has shape {shape}; embeddings are (rows, dimensions)")
    if fortran and shape[0] > 1:
        raise PoolError(f"{name}: is in Fortran order; save it with np.save(path, np.ascontiguousarray(array))")
    if stored.byteorder == ">":
        raise PoolError(f"{name}: is big-endian {stored}; save it little-endian")
    # ml_dtypes saves its bfloat16 as two opaque bytes; elsewhere uint16 needs a mark.
    marked = dtype == "bfloat16" or any(mark in os.path.basename(name).lower() for mark in ("bf16", "bfloat16"))
    if stored.str in ("|V2", "<V2") or (stored == np.uint16 and marked):
        return (int(shape[0]), int(shape[1])), "bfloat16"
    if stored.name not in FLOATS:
        hint = "; for bfloat16 bits say --dtype bfloat16 or name the file *bf16*" if stored == np.uint16 else ""
        raise PoolError(f"{name}: holds {stored.name}; embeddings are float16, float32, float64 or bfloat16{hint}")
    return (int(shape[0]), int(shape[1])), stored.name


# --- .npz -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DeflatedPiece:
    """Rows of a compressed member of an .npz: can only be streamed."""

    path: str
    member: str
    rows: int
    dim: int
    dtype: str
    protocol: str = "file"

    seekable = False
    mapped = False

    def read(self, start: int, stop: int) -> Array:
        """Return rows start..stop by streaming up to them."""
        return _read_by_streaming(self, start, stop)

    def take(self, rows: npt.NDArray[np.int64]) -> Array:
        """Return scattered rows by streaming over the whole piece."""
        return _take_by_streaming(self, rows)

    def stream(self, batch: int) -> Iterator[Array]:
        """Yield all rows in order, inflating as it goes."""
        stored = _stored(self.dtype)
        with open_file(self.protocol, self.path) as raw, _zip(raw, self.path) as archive:
            with archive.open(self.member) as file:
                trusting(self.path, lambda: _header(file, self.path, self.dtype))
                for start in range(0, self.rows, batch):
                    want = (min(start + batch, self.rows) - start) * self.dim * stored.itemsize
                    data = trusting(self.path, partial(_read_fully, file, want))
                    yield np.frombuffer(data, stored).reshape(-1, self.dim)
                trusting(self.path, lambda: file.read())  # the end of the member is where its checksum is

    def stamp(self) -> list[Any]:
        """Name, size, time and member."""
        return [*stamp_of(self.protocol, self.path), self.member]


def _read_fully(file: IO[bytes], size: int) -> bytes:
    data = file.read(size)
    while len(data) < size:
        more = file.read(size - len(data))
        if not more:
            raise EOFError(f"ends {size - len(data):,} bytes early")
        data += more
    return data


def _zip(file: IO[bytes], path: str) -> zipfile.ZipFile:
    archive: zipfile.ZipFile = trusting(path, lambda: zipfile.ZipFile(file))
    return archive


def npz_pieces(protocol: str, path: str, dtype: str | None = None) -> dict[str, Piece]:
    """Read the headers of all two-dimensional arrays of an .npz, by member name without ``.npy``.

    Raises:
        PoolError: Truncated, names that climb out, pickles, or members shorter than they say.
    """

    def read() -> dict[str, Piece]:
        pieces: dict[str, Piece] = {}
        with open_file(protocol, path) as raw, zipfile.ZipFile(raw) as archive:
            for info in archive.infolist():
                if climbs(info.filename) or "/" in info.filename:
                    raise PoolError(f"{path}: has a member named {info.filename!r}; refused, it is not a plain name")
                if not info.filename.endswith(".npy"):
                    continue
                name = info.filename[:-4]
                told = f"{path} [{name}]"
                with archive.open(info) as file:
                    if info.compress_type != zipfile.ZIP_STORED:
                        shape, found = _header(file, told, dtype)
                        need = shape[0] * shape[1] * _stored(found).itemsize
                        if info.file_size - file.tell() != need:
                            raise PoolError(f"{told}: is not as long as its header says")
                        pieces[name] = DeflatedPiece(path, info.filename, *shape, found, protocol)
                        continue
                    # A stored member lies as it is behind its local header, whose length is its own.
                    raw.seek(info.header_offset + 26)
                    lengths = raw.read(4)
                    begin = info.header_offset + 30 + int.from_bytes(lengths[:2], "little")
                    begin += int.from_bytes(lengths[2:], "little")
                    raw.seek(0, io.SEEK_END)
                    if begin + info.file_size > raw.tell():
                        raise PoolError(f"{told}: is truncated")
                    pieces[name] = _npy_header(file, path, told, info.file_size, dtype, protocol, base=begin)
        return pieces

    pieces: dict[str, Piece] = trusting(path, read)
    return pieces


def climbs(name: str) -> bool:
    """Whether a name from outside would lead out of the folder it is put in."""
    parts = name.replace("\\", "/").split("/")
    return ".." in parts or name.startswith(("/", "\\")) or "\0" in name or (len(name) > 1 and name[1] == ":")


# --- parquet --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ParquetPiece:
    """A column of vectors in a parquet file (fixed-size list, list or binary): can only be streamed."""

    path: str
    column: str
    rows: int
    dim: int
    dtype: str
    protocol: str = "file"

    seekable = False
    mapped = False

    def read(self, start: int, stop: int) -> Array:
        """Return rows start..stop, reading only the row groups that hold them."""
        return _read_by_streaming(self, start, stop)

    def take(self, rows: npt.NDArray[np.int64]) -> Array:
        """Return scattered rows, reading only the row groups that hold them."""
        return _take_by_streaming(self, rows)

    def stream(self, batch: int) -> Iterator[Array]:
        """Yield all rows in order."""
        for part in _batches(self.protocol, self.path, [self.column], batch):
            yield vectors_of(part.column(0), self.dim, self.dtype, f"{self.path} [{self.column}]")

    def stamp(self) -> list[Any]:
        """Name, size, time and column."""
        return [*stamp_of(self.protocol, self.path), self.column]


def _batches(
    protocol: str, path: str, columns: Sequence[str], batch: int, groups: Sequence[int] | None = None
) -> Iterator[Any]:
    """Yield record batches of a parquet file; errors name the file."""
    with open_file(protocol, path) as raw:
        file = trusting(path, lambda: _parquet(raw))
        parts = file.iter_batches(batch_size=batch, columns=list(columns), row_groups=groups)
        while True:
            part = trusting(path, lambda: next(parts, None))
            if part is None:
                return
            yield part


def _parquet(raw: IO[bytes]) -> Any:
    import pyarrow.parquet as pq

    return pq.ParquetFile(raw, pre_buffer=True)


def vectors_of(column: Any, dim: int, dtype: str, told: str) -> Array:
    """Turn an Arrow column into (rows, dim) as stored; refuses nulls and ragged lists."""
    import pyarrow as pa

    if column.null_count:
        raise PoolError(f"{told}: {column.null_count:,} rows have no embedding (null)")
    kind = column.type
    stored = _stored(dtype)
    if pa.types.is_fixed_size_list(kind):
        values = column.flatten().to_numpy(zero_copy_only=False)
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
        lengths = np.diff(column.offsets.to_numpy(zero_copy_only=False))
        if len(lengths) and (lengths != dim).any():
            row = int(np.flatnonzero(lengths != dim)[0])
            raise PoolError(f"{told}: row {row:,} of a batch has {lengths[row]} values, others {dim}")
        values = column.flatten().to_numpy(zero_copy_only=False)
    elif pa.types.is_fixed_size_binary(kind):
        start = column.offset * kind.byte_width
        data = np.frombuffer(column.buffers()[1], np.uint8)[start : start + len(column) * kind.byte_width]
        values = data.view(stored)
    else:
        cells = column.to_pylist()
        width = dim * stored.itemsize
        if any(len(cell) != width for cell in cells):
            raise PoolError(f"{told}: binary embeddings of different lengths; each should have {width} bytes")
        values = np.frombuffer(b"".join(cells), stored)
    if values.size != len(column) * dim:
        raise PoolError(f"{told}: {values.size:,} values for {len(column):,} rows of {dim}")
    if dtype == "bfloat16":
        values = values.view(np.uint16)
    return np.asarray(values).reshape(len(column), dim)


def parquet_piece(protocol: str, path: str, column: str, dtype: str | None = None) -> ParquetPiece:
    """Read a parquet footer (and, for lists without a fixed size, one row) to describe a vector column."""

    def read() -> ParquetPiece:
        import pyarrow as pa

        with open_file(protocol, path) as raw:
            file = _parquet(raw)
            kind = file.schema_arrow.field(column).type
            mark = _mark(file.schema_arrow.field(column)) or dtype
            rows = file.metadata.num_rows
            told = f"{path} [{column}]"
            if pa.types.is_fixed_size_list(kind):
                return ParquetPiece(path, column, rows, kind.list_size, _float(kind.value_type, mark, told), protocol)
            listed = pa.types.is_list(kind) or pa.types.is_large_list(kind)
            first = next((b for b in file.iter_batches(batch_size=1, columns=[column]) if len(b)), None)
            cell = first.column(0)[0].as_py() if first is not None else None
            if cell is None:
                raise PoolError(f"{told}: the first row has no embedding")
            if listed:
                return ParquetPiece(path, column, rows, len(cell), _float(kind.value_type, mark, told), protocol)
            if mark not in (*FLOATS, "bfloat16"):
                raise PoolError(
                    f"{told}: binary embeddings of {len(cell)} bytes a row; say what they are with "
                    "--dtype float16, float32 or bfloat16"
                )
            width = _stored(mark).itemsize
            if len(cell) % width:
                raise PoolError(f"{told}: {len(cell)} bytes a row are no whole number of {mark}")
            return ParquetPiece(path, column, rows, len(cell) // width, mark, protocol)

    piece: ParquetPiece = trusting(path, read)
    return piece


def _float(kind: Any, mark: str | None, told: str) -> str:
    import pyarrow as pa

    name = {pa.float16(): "float16", pa.float32(): "float32", pa.float64(): "float64"}.get(kind)
    if kind == pa.uint16() and mark == "bfloat16":
        return "bfloat16"
    if name is None:
        raise PoolError(f"{told}: holds lists of {kind}; embeddings are float16, float32, float64 or bfloat16")
    return name


def _mark(field: Any) -> str | None:
    found = (field.metadata or {}).get(b"dtype")
    return found.decode() if found else None


def _read_by_streaming(piece: ParquetPiece | DeflatedPiece, start: int, stop: int) -> Array:
    return _take_by_streaming(piece, np.arange(start, stop))


def _take_by_streaming(piece: ParquetPiece | DeflatedPiece, rows: npt.NDArray[np.int64]) -> Array:
    if isinstance(piece, ParquetPiece):
        found = [
            vectors_of(part.column(0), piece.dim, piece.dtype, piece.path)
            for part in take_table(piece.protocol, piece.path, [piece.column], rows)
        ]
        return np.concatenate(found) if found else np.empty((0, piece.dim), _stored(piece.dtype))
    out = np.empty((len(rows), piece.dim), _stored(piece.dtype))
    start = 0
    for part in piece.stream(8192):
        lo, hi = np.searchsorted(rows, [start, start + len(part)])
        out[lo:hi] = part[rows[lo:hi] - start]
        start += len(part)
        if start > (rows[-1] if len(rows) else -1):
            break
    return out


def take_table(protocol: str, path: str, columns: Sequence[str], rows: npt.NDArray[np.int64]) -> Iterator[Any]:
    """Yield record batches with the given rows (ascending), touching only their row groups."""
    with open_file(protocol, path) as raw:
        metadata = trusting(path, lambda: _parquet(raw)).metadata
    ends = np.cumsum([metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)])
    for group in np.unique(np.searchsorted(ends, rows, side="right")):
        start = int(ends[group - 1]) if group else 0
        for part in _batches(protocol, path, columns, 8192, [int(group)]):
            lo, hi = np.searchsorted(rows, [start, start + len(part)])
            if hi > lo:
                yield part.take(rows[lo:hi] - start)
            start += len(part)


@dataclass(frozen=True)
class TablePiece:
    """Metadata rows of one parquet file; ``success_only`` leaves out img2dataset's failed downloads."""

    path: str
    rows: int
    columns: tuple[str, ...]
    protocol: str = "file"
    success_only: bool = False

    def stream(self, columns: Sequence[str], batch: int = 65536) -> Iterator[Any]:
        """Yield record batches of the columns, in row order."""
        import pyarrow.compute as pc

        if not self.success_only:
            yield from _batches(self.protocol, self.path, columns, batch)
            return
        for part in _batches(self.protocol, self.path, [*columns, "status"], batch):
            yield part.filter(pc.equal(part.column("status"), "success")).select(list(columns))

    def take(self, columns: Sequence[str], rows: npt.NDArray[np.int64]) -> Iterator[Any]:
        """Yield record batches holding the given rows (ascending)."""
        if not self.success_only:
            yield from take_table(self.protocol, self.path, columns, rows)
            return
        start = 0
        for part in self.stream(columns):
            lo, hi = np.searchsorted(rows, [start, start + len(part)])
            if hi > lo:
                yield part.take(rows[lo:hi] - start)
            start += len(part)

    def stamp(self) -> list[Any]:
        """Name, size and time."""
        return stamp_of(self.protocol, self.path)


def table_piece(protocol: str, path: str) -> TablePiece:
    """Read a parquet footer."""

    def read() -> TablePiece:
        with open_file(protocol, path) as raw:
            file = _parquet(raw)
            return TablePiece(path, file.metadata.num_rows, tuple(file.schema_arrow.names), protocol)

    piece: TablePiece = trusting(path, read)
    return piece


def parquet_types(protocol: str, path: str) -> dict[str, str]:
    """Return the Arrow type of every column, as text, from the footer."""

    def read() -> dict[str, str]:
        with open_file(protocol, path) as raw:
            schema = _parquet(raw).schema_arrow
            return {name: str(schema.field(name).type) for name in schema.names}

    types: dict[str, str] = trusting(path, read)
    return types
