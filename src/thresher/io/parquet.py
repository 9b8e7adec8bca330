"""Vectors and tables inside parquet files. Only footers are read at opening.

A row of a vector column that holds no vector of the right width is read as NaN: a bad row like others.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from thresher.errors import PoolError
from thresher.io.open import open_file, trusting
from thresher.io.pieces import FLOATS, Array, stored_dtype

_NAN = 0x7FC0  # as bfloat16 bits
_SPAN = 1 << 16  # bytes fetched at a time where little is wanted


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
        return np.concatenate([np.empty((0, self.dim), stored_dtype(self.dtype)), *self._vectors(8192, rows)])

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
            trusting(path, partial(part.validate, full=True))  # what it says of lengths and texts may be wrong
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


def _parquet(raw: IO[bytes], *, ahead: bool = True) -> Any:
    """Open a parquet file; ``ahead`` for reading whole row groups, else no more than is asked for."""
    import pyarrow.parquet as pq

    return pq.ParquetFile(raw, pre_buffer=ahead, buffer_size=0 if ahead else _SPAN, page_checksum_verification=True)


def vectors_of(column: Any, dim: int, dtype: str) -> Array:
    """Turn an Arrow column into (rows, dim) as stored; rows that are null or of another width become NaN."""
    import pyarrow as pa
    import pyarrow.compute as pc

    kind, stored = column.type, stored_dtype(dtype)
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
            found = _parquet(raw, ahead=False).iter_batches(batch_size=64, columns=[column])
            parts = (part.column(0).drop_null() for part in found)
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
            if width % stored_dtype(mark).itemsize:
                raise PoolError(f"{told}: {width} bytes a row are no whole number of {mark}; is --dtype right?")
            return ParquetPiece(path, column, rows, width // stored_dtype(mark).itemsize, mark, protocol)

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
