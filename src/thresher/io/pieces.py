"""Pieces of files: arrays inside .npy, .npz and parquet, and parquet tables. Headers at opening only.

Pieces are frozen and picklable and hold no data. A *seekable* piece serves any range of rows; a
*mapped* one serves scattered rows as well. The rest can only be streamed from the start.
A row of a parquet column that holds no vector of the right width is read as NaN: a bad row like others.
"""

from __future__ import annotations

import errno
import io
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import IO, Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from thresher.errors import PoolError, ThresherError, UnreachedError

Array = npt.NDArray[Any]
_T = TypeVar("_T")
FLOATS = ("float16", "float32", "float64")
_NAN = 0x7FC0  # as bfloat16 bits
_DOWN = frozenset(
    getattr(errno, name)
    for name in ("ESTALE", "ENETDOWN", "ENETUNREACH", "EHOSTDOWN", "EHOSTUNREACH", "ENOTCONN", "EMFILE", "ENFILE")
    if hasattr(errno, name)
)
_NO_CONNECTION = ("ClientConnectionError", "HTTPClientError", "EndpointConnectionError")  # of aiohttp and botocore
_SPAN = 1024  # rows of a file elsewhere that are fetched at once, at most, to serve scattered ones


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


def protocol_of(fs: Any) -> str:
    """Return the name by which fsspec gives this file system again."""
    name = fs.protocol if isinstance(fs.protocol, str) else fs.protocol[0]
    return "file" if name == "local" else str(name)


def open_file(protocol: str, path: str) -> IO[bytes]:
    """Open for reading, anywhere; a PoolError names a file that cannot be opened."""

    def opened() -> IO[bytes]:
        if protocol == "file":
            if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
                raise PoolError(f"{path}: is a pipe or a device, of which nobody knows when it ends; name a file")
            return open(path, "rb")
        import fsspec

        return fsspec.filesystem(protocol).open(path, "rb")  # type: ignore[no-any-return]

    return trusting(path, opened)


def stamp_of(piece: Piece | TablePiece) -> list[Any]:
    """Return what changes whenever the values may have: how a piece is read, and its file's stamp."""
    return [dict(vars(piece)), *file_stamp(piece.protocol, piece.path)]


def file_stamp(protocol: str, path: str) -> list[Any]:
    """Return size and version of a file: what changes whenever it does."""
    if protocol == "file":
        stat = trusting(path, lambda: os.stat(path))
        return [stat.st_size, stat.st_mtime_ns]
    import fsspec

    info = trusting(path, lambda: fsspec.filesystem(protocol).info(path))
    version = next((str(info[k]) for k in ("ETag", "etag", "mtime", "LastModified", "created") if k in info), "")
    return [info.get("size"), version]


def trusting(path: str, what: Callable[[], _T]) -> _T:
    """Call ``what``, turning whatever a damaged file makes it raise into a PoolError naming the file.

    Raises:
        PoolError: The file is not there, or damaged.
        UnreachedError: Nobody knows: the network or the file system does not answer.
    """
    try:
        return what()
    except ThresherError:
        raise
    except FileNotFoundError:
        raise PoolError(f"{path}: no such file; is it missing, or a link to nowhere?") from None
    except IsADirectoryError:
        raise PoolError(f"{path}: is a folder; name a file") from None
    except Exception as error:
        told = next(iter(str(error).splitlines()), "") or type(error).__name__
        if _unreached(error):
            raise UnreachedError(f"{path}: cannot be reached just now ({told}); try again when it can") from None
        raise PoolError(
            f"{path}: cannot be read, it may be truncated or damaged ({told}); replace or remove it"
        ) from None


def _unreached(error: Exception) -> bool:
    """Whether an error tells of the way to a file rather than of the file."""
    status = getattr(error, "status", 0)  # of HTTP
    return (
        isinstance(error, (ConnectionError, TimeoutError))
        or (isinstance(error, OSError) and error.errno in _DOWN)
        or any(kind.__name__ in _NO_CONNECTION for kind in type(error).__mro__)
        or (isinstance(status, int) and (status in (408, 429) or 500 <= status < 600))
    )


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
    array: str = ""

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

        def fetch() -> bytes:
            with open_file(self.protocol, self.path) as file:
                file.seek(self.offset + start * width)
                return _read_fully(file, (stop - start) * width)

        return np.frombuffer(trusting(self.path, fetch), stored).reshape(stop - start, self.dim)

    def take(self, rows: npt.NDArray[np.int64]) -> Array:
        """Return scattered rows; of a file elsewhere by fetching spans that hold some."""
        if self.mapped:
            return np.asarray(self._map()[rows])
        out = np.empty((len(rows), self.dim), _stored(self.dtype))
        ends = np.flatnonzero(np.diff(rows // _SPAN, append=-1)) + 1
        for lo, hi in zip([0, *ends[:-1]], ends, strict=True):
            out[lo:hi] = self.read(int(rows[lo]), int(rows[hi - 1]) + 1)[rows[lo:hi] - rows[lo]]
        return out

    def stream(self, batch: int) -> Iterator[Array]:
        """Yield all rows in order."""
        for start in range(0, self.rows, batch):
            yield self.read(start, min(start + batch, self.rows))

    def _map(self) -> Array:
        try:
            return np.memmap(self.path, _stored(self.dtype), mode="r", offset=self.offset, shape=(self.rows, self.dim))
        except (OSError, ValueError) as error:
            raise PoolError(f"{self.path}: cannot be read any more ({error}); was it replaced?") from None


def _stored(dtype: str) -> np.dtype[Any]:
    return np.dtype("<u2" if dtype == "bfloat16" else dtype)


def _read_fully(file: IO[bytes], size: int) -> bytes:
    data = file.read(size)
    while len(data) < size:
        more = file.read(size - len(data))
        if not more:
            raise EOFError(f"ends {size - len(data):,} bytes early")
        data += more
    return data


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

    return trusting(path, read)


def _npy_header(
    file: IO[bytes], path: str, name: str, size: int, dtype: str | None, protocol: str, base: int, array: str = ""
) -> NpyPiece:
    """Read a header from ``file``, where the array with its header takes ``size`` bytes."""
    shape, found = _header(file, name, dtype)
    begin = file.tell()
    need = shape[0] * shape[1] * _stored(found).itemsize
    if size - begin < need:
        raise PoolError(
            f"{name}: {size - begin:,} bytes of data where {shape[0]:,} x {shape[1]} {found} need {need:,}; "
            "it is truncated: copy or make it again"
        )
    return NpyPiece(path, shape[0], shape[1], found, base + begin, protocol, array)


def _header(file: IO[bytes], name: str, dtype: str | None) -> tuple[tuple[int, int], str]:
    """Parse a .npy header; never unpickles."""
    from numpy.lib import format as npy

    if file.read(6) != npy.MAGIC_PREFIX:
        raise PoolError(f"{name}: is no .npy file; save the array with np.save")
    file.seek(-6, io.SEEK_CUR)
    version = npy.read_magic(file)
    reader = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, fortran, stored = reader(file)
    if stored.hasobject:
        raise PoolError(f"{name}: holds pickled Python objects, which are never read; save it as a plain float array")
    if len(shape) != 2 or shape[0] < 0 or shape[1] < 1:
        raise PoolError(f"{name}: has shape {shape}; embeddings are (rows, dimensions), save it so")
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
    array: str
    rows: int
    dim: int
    dtype: str
    protocol: str = "file"

    seekable = False
    mapped = False

    def read(self, start: int, stop: int) -> Array:
        """Return rows start..stop by streaming over the whole piece."""
        return self.take(np.arange(start, stop))

    def take(self, rows: npt.NDArray[np.int64]) -> Array:
        """Return scattered rows by streaming over the whole piece: the checksum is known at its end."""
        out = np.empty((len(rows), self.dim), _stored(self.dtype))
        start = 0
        for part in self.stream(8192):
            lo, hi = np.searchsorted(rows, [start, start + len(part)])
            out[lo:hi] = part[rows[lo:hi] - start]
            start += len(part)
        return out

    def stream(self, batch: int) -> Iterator[Array]:
        """Yield all rows in order, inflating as it goes; the last only once the checksum is right."""
        stored = _stored(self.dtype)
        with open_file(self.protocol, self.path) as raw, trusting(self.path, lambda: zipfile.ZipFile(raw)) as archive:
            with trusting(self.path, lambda: archive.open(f"{self.array}.npy")) as file:
                trusting(self.path, lambda: _header(file, f"{self.path} [{self.array}]", self.dtype))
                for start in range(0, self.rows, batch):
                    want = (min(start + batch, self.rows) - start) * self.dim * stored.itemsize
                    data = trusting(self.path, partial(_read_fully, file, want))
                    yield np.frombuffer(data, stored).reshape(-1, self.dim)


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
                        pieces[name] = DeflatedPiece(path, name, *shape, found, protocol)
                        continue
                    # A stored member lies as it is behind its local header, whose length is its own.
                    raw.seek(info.header_offset + 26)
                    lengths = raw.read(4)
                    begin = info.header_offset + 30 + int.from_bytes(lengths[:2], "little")
                    begin += int.from_bytes(lengths[2:], "little")
                    raw.seek(0, io.SEEK_END)
                    if begin + info.file_size > raw.tell():
                        raise PoolError(f"{told}: is truncated; copy or make it again")
                    pieces[name] = _npy_header(file, path, told, info.file_size, dtype, protocol, begin, name)
        return pieces

    return trusting(path, read)


def climbs(name: str) -> bool:
    """Whether a name from outside would lead out of the folder it is put in."""
    parts = name.replace("\\", "/").split("/")
    return ".." in parts or name.startswith(("/", "\\")) or "\0" in name or (len(name) > 1 and name[1] == ":")


# --- parquet --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ParquetPiece:
    """A column of vectors in a parquet file (fixed-size list, list or binary): can only be streamed."""

    path: str
    array: str
    rows: int
    dim: int
    dtype: str
    protocol: str = "file"

    seekable = False
    mapped = False

    def read(self, start: int, stop: int) -> Array:
        """Return rows start..stop, reading only the row groups that hold them."""
        return self.take(np.arange(start, stop))

    def take(self, rows: npt.NDArray[np.int64]) -> Array:
        """Return scattered rows, reading only the row groups that hold them."""
        return np.concatenate([np.empty((0, self.dim), _stored(self.dtype)), *self._vectors(8192, rows)])

    def stream(self, batch: int) -> Iterator[Array]:
        """Yield all rows in order."""
        return _exactly(self, self._vectors(batch))

    def _vectors(self, batch: int, rows: npt.NDArray[np.int64] | None = None) -> Iterator[Array]:
        for part in _batches(self.protocol, self.path, [self.array], batch, rows):
            yield trusting(self.path, partial(vectors_of, part.column(0), self.dim, self.dtype))


def _batches(
    protocol: str, path: str, columns: Sequence[str], batch: int, rows: npt.NDArray[np.int64] | None = None
) -> Iterator[Any]:
    """Yield record batches of a parquet file: all rows, or some (ascending) from the row groups that hold them."""
    with open_file(protocol, path) as raw:
        file = trusting(path, lambda: _parquet(raw))
        groups = None
        if rows is not None:
            sizes = np.array([file.metadata.row_group(g).num_rows for g in range(file.metadata.num_row_groups)], int)
            ends = np.cumsum(sizes)
            groups, which = np.unique(np.searchsorted(ends, rows, side="right"), return_inverse=True)
            left_out = (ends - sizes)[groups] - (np.cumsum(sizes[groups]) - sizes[groups])
            rows, groups = rows - left_out[which], groups.tolist()
        parts = file.iter_batches(batch_size=batch, columns=list(columns), row_groups=groups)
        found = iter(lambda: trusting(path, lambda: next(parts, None)), None)
        for part in found if rows is None else picked(found, rows):
            held = part.schema.names  # a field of a struct, "image.path", comes as a struct of that field alone
            yield part.select([name if name in held else name.split(".")[0] for name in columns])


def picked(parts: Iterable[Any], rows: npt.NDArray[np.int64]) -> Iterator[Any]:
    """Yield the given rows (ascending, counted from the first part) of a run of record batches."""
    start = 0
    for part in parts:
        lo, hi = np.searchsorted(rows, [start, start + len(part)])
        if hi > lo:
            yield part.take(rows[lo:hi] - start)
        start += len(part)


def _exactly(piece: ParquetPiece | TablePiece, parts: Iterable[Any]) -> Iterator[Any]:
    """Pass the parts on; refuse a file that has other rows than when it was opened."""
    rows = 0
    for part in parts:
        rows += len(part)
        if rows > piece.rows:
            break
        yield part
    if rows != piece.rows:
        raise PoolError(f"{piece.path}: had {piece.rows:,} rows when it was opened; it was changed since, start again")


def _parquet(raw: IO[bytes]) -> Any:
    import pyarrow.parquet as pq

    return pq.ParquetFile(raw, pre_buffer=True, page_checksum_verification=True)


def vectors_of(column: Any, dim: int, dtype: str) -> Array:
    """Turn an Arrow column into (rows, dim) as stored; rows that are null or of another width become NaN."""
    import pyarrow as pa
    import pyarrow.compute as pc

    kind, stored = column.type, _stored(dtype)
    good = column.is_valid()
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        good = pc.equal(pc.list_value_length(column), dim).fill_null(False)
    elif pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        good = pc.equal(pc.binary_length(column), dim * stored.itemsize).fill_null(False)
    mask = np.asarray(good)
    if not mask.all():
        column = column.filter(good)
    if pa.types.is_fixed_size_binary(kind):
        start = column.offset * kind.byte_width
        values = np.frombuffer(column.buffers()[1], np.uint8)[start : start + len(column) * kind.byte_width].view(
            stored
        )
    elif pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        values = np.frombuffer(b"".join(column.to_pylist()), stored)
    else:
        values = column.flatten()  # nulls among the values become NaN
        values = (values.fill_null(_NAN) if dtype == "bfloat16" else values).to_numpy(zero_copy_only=False)
    vectors = np.asarray(values).reshape(len(column), dim)
    if mask.all():
        return vectors
    out = np.full((len(mask), dim), _NAN if dtype == "bfloat16" else np.nan, stored)
    out[mask] = vectors
    return out


def parquet_piece(protocol: str, path: str, column: str, dtype: str | None = None) -> ParquetPiece:
    """Read a parquet footer (and, where the type does not tell the width, the first vector) to describe a column."""

    def read() -> ParquetPiece:
        import pyarrow as pa

        with open_file(protocol, path) as raw:
            file = _parquet(raw)
            field, rows = file.schema_arrow.field(column), file.metadata.num_rows
            kind, mark, told = field.type, _mark(field) or dtype, f"{path} [{column}]"
            if pa.types.is_fixed_size_list(kind):
                return ParquetPiece(path, column, rows, kind.list_size, _float(kind.value_type, mark, told), protocol)
            binary = any(f(kind) for f in (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary))
            if not (binary or pa.types.is_list(kind) or pa.types.is_large_list(kind)):
                raise PoolError(f"{told}: holds {kind}; embeddings are lists of floats, or binary")
            parts = (part.column(0).drop_null() for part in file.iter_batches(batch_size=64, columns=[column]))
            first = next((part[0].as_py() for part in parts if len(part)), None)
            if first is None and rows:
                raise PoolError(f"{told}: no row has an embedding; remove the file")
            width = len(first or ())
            if not binary:
                return ParquetPiece(path, column, rows, width, _float(kind.value_type, mark, told), protocol)
            if mark not in (*FLOATS, "bfloat16"):
                raise PoolError(
                    f"{told}: binary embeddings of {width} bytes a row; say what they are with "
                    "--dtype float16, float32 or bfloat16"
                )
            if width % _stored(mark).itemsize:
                raise PoolError(f"{told}: {width} bytes a row are no whole number of {mark}; is --dtype right?")
            return ParquetPiece(path, column, rows, width // _stored(mark).itemsize, mark, protocol)

    return trusting(path, read)


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

        wanted = list(dict.fromkeys([*columns, "status"])) if self.success_only else columns
        parts = _batches(self.protocol, self.path, wanted, batch)
        if self.success_only:
            parts = (part.filter(pc.equal(part.column("status"), "success")).select(list(columns)) for part in parts)
        return _exactly(self, parts)

    def take(self, columns: Sequence[str], rows: npt.NDArray[np.int64]) -> Iterator[Any]:
        """Yield record batches holding the given rows (ascending)."""
        if self.success_only:
            return picked(self.stream(columns), rows)
        return _batches(self.protocol, self.path, columns, 8192, rows)

    def schema(self, columns: Sequence[str]) -> Any:
        """Return the Arrow schema of some columns, in the order given."""
        import pyarrow as pa

        with open_file(self.protocol, self.path) as raw:
            found = trusting(self.path, lambda: _parquet(raw).schema_arrow)
        return pa.schema([found.field(name) for name in columns])


def table_piece(protocol: str, path: str) -> TablePiece:
    """Read a parquet footer."""

    def read() -> TablePiece:
        with open_file(protocol, path) as raw:
            file = _parquet(raw)
            return TablePiece(path, file.metadata.num_rows, tuple(file.schema_arrow.names), protocol)

    return trusting(path, read)


def parquet_metadata(protocol: str, path: str) -> dict[bytes, bytes]:
    """Return the notes in a parquet footer, by name."""

    def read() -> dict[bytes, bytes]:
        with open_file(protocol, path) as raw:
            return dict(_parquet(raw).schema_arrow.metadata or {})

    return trusting(path, read)


def parquet_types(protocol: str, path: str) -> dict[str, str]:
    """Return the Arrow type of every column, as text, from the footer."""

    def read() -> dict[str, str]:
        with open_file(protocol, path) as raw:
            schema = _parquet(raw).schema_arrow
            return {name: str(schema.field(name).type) for name in schema.names}

    return trusting(path, read)
