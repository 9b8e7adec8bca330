"""Vectors and tables in Parquet files. Opening reads only footers.

A row of a vector column without a vector of the right width is read as NaN, like any other bad row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import IO, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from thresher.errors import PoolError
from thresher.io.columns import plain_batch, plain_schema
from thresher.io.open import open_file, trusting
from thresher.io.paths import visible
from thresher.io.pieces import DIMENSIONS, FLOATS, Array, Piece, stored_dtype

Choose: TypeAlias = Callable[[Mapping[str, str]], Mapping[str, str]]  # role -> column, of column -> type
_NAN = 0x7FC0  # as bfloat16 bits
_SPAN = 1 << 16  # bytes fetched at a time when only a few rows are needed
_BATCH = 256 * 2**20  # bytes of a record batch of vectors, unless a single row is larger
_TABLE = 64 * 2**20  # the same of other columns, of which several are in memory while one is read
# Columns with values that are long on average, or that may be, are read as dictionaries, in which a value that many
# rows share is held once. It takes three times as long, so that it is not done for all columns.
_LONG = 1 << 14  # bytes of a value
_SMALL = 2 * 2**20  # bytes of a column; in a larger one, the average is known well enough
_FEW = 1_000  # batches of a row group, each of so few rows that every one may have the longest value


@dataclass(frozen=True)
class ParquetPiece:
    """A column of vectors in a Parquet file (fixed-size list, list or binary), which can only be streamed."""

    path: str
    array: str
    rows: int
    dim: int
    dtype: str
    protocol: str = "file"

    seekable = False
    mapped = False

    def read(self, start: int, stop: int) -> Array:
        """Return rows start..stop, reading only the row groups that contain them."""
        return self.take(np.arange(start, stop))

    def take(self, rows: npt.NDArray[np.int64]) -> Array:
        """Return scattered rows, reading only the row groups that contain them."""
        return np.concatenate([np.empty((0, self.dim), stored_dtype(self.dtype)), *self._vectors(8192, rows)])

    def stream(self, batch: int) -> Iterator[Array]:
        """Yield all rows in order."""
        return exactly(self, self._vectors(batch))

    def _vectors(self, batch: int, rows: npt.NDArray[np.int64] | None = None) -> Iterator[Array]:
        for part in _batches(self.protocol, self.path, [self.array], batch, _BATCH, rows):
            yield trusting(self.path, partial(vectors_of, part.column(0), self.dim, self.dtype))


def _batches(
    protocol: str,
    path: str,
    columns: Sequence[str],
    batch: int,
    most: int,
    rows: npt.NDArray[np.int64] | None = None,
) -> Iterator[Any]:
    """Yield record batches of a Parquet file: all rows, or the given ascending ones, reading only their row groups.

    They have up to ``batch`` rows and about ``most`` bytes, or a single row.
    """
    with open_file(protocol, path) as raw:
        file = trusting(path, lambda: open_parquet(raw))
        groups = None
        if rows is not None:
            sizes = np.array([file.metadata.row_group(g).num_rows for g in range(file.metadata.num_row_groups)], int)
            ends = np.cumsum(sizes)
            groups, which = np.unique(np.searchsorted(ends, rows, side="right"), return_inverse=True)
            left_out = (ends - sizes)[groups] - (np.cumsum(sizes[groups]) - sizes[groups])
            rows, groups = rows - left_out[which], groups.tolist()
        batch, repetitive = trusting(path, lambda: _within_memory(file.metadata, columns, batch, most))
        if repetitive:
            file = trusting(path, lambda: open_parquet(raw, dictionaries=repetitive))
        parts = file.iter_batches(batch_size=batch, columns=list(columns), row_groups=groups)
        batches = iter(lambda: trusting(path, lambda: next(map(plain_batch, parts), None)), None)
        for part in batches if rows is None else picked(batches, rows):
            trusting(path, partial(part.validate, full=True))  # lengths and texts in the file may be invalid
            present = part.schema.names  # a field of a struct, "image.path", is read as a struct with only that field
            part = part.select([name if name in present else name.split(".")[0] for name in columns])
            yield from _decoded(part, repetitive, most) if repetitive else (part,)


def _within_memory(footer: Any, columns: Sequence[str], batch: int, most: int) -> tuple[int, list[str]]:
    """Return how many rows to read at a time, and which columns to read as dictionaries, so that batches stay small.

    A few kilobytes of a compressed file can hold a text of many megabytes, and a dictionary can repeat it in each row.
    A dictionary takes several times the memory of its values, so a few such rows are read one after the other.

    Args:
        footer: The metadata of the file.
        columns: The columns to read.
        batch: Largest number of rows of a batch.
        most: Largest number of bytes of a batch, unless a single row is larger.
    """
    wanted, repetitive, widest = {name.split(".")[0] for name in columns}, set(), 1
    for g in range(footer.num_row_groups):
        group = footer.row_group(g)
        for c in range(group.num_columns):
            chunk = group.column(c)
            if chunk.path_in_schema.split(".")[0] not in wanted:
                continue
            rows, size = max(group.num_rows, 1), chunk.total_uncompressed_size
            widest = max(widest, size // rows)
            can_repeat = chunk.physical_type == "BYTE_ARRAY" and chunk.has_dictionary_page
            if can_repeat and size * min(batch, rows) > most:
                if size > _LONG * rows or size <= _SMALL and not _has_short_values(chunk.statistics):
                    if rows <= _FEW * max(most // size, 1) and not _is_dictionary(footer, chunk.path_in_schema):
                        widest = max(widest, size)
                    else:
                        repetitive.add(chunk.path_in_schema)
    return min(batch, max(most // widest, 1)), sorted(repetitive)


def _is_dictionary(footer: Any, column: str) -> bool:
    """Return whether a column is read as a dictionary in any case, because its writer noted this type."""
    import pyarrow as pa

    schema = footer.schema.to_arrow_schema()
    return column in schema.names and bool(pa.types.is_dictionary(schema.field(column).type))


def _has_short_values(statistics: Any) -> bool:
    """Return whether the smallest and the largest value are known and short, as writers note them for short values."""
    return bool(statistics and statistics.has_min_max and max(len(statistics.min), len(statistics.max)) < _LONG)


def _decoded(part: Any, columns: Sequence[str], most: int) -> Iterator[Any]:
    """Yield a record batch in runs of rows small enough to decode the dictionaries of some columns."""
    import pyarrow as pa
    import pyarrow.compute as pc

    sizes = np.zeros(len(part), np.int64)
    for name in columns:
        column = part.column(name) if name in part.schema.names else None
        if column is not None and pa.types.is_dictionary(column.type):
            lengths = pc.binary_length(column.dictionary).fill_null(0).take(column.indices).fill_null(0)
            sizes += lengths.to_numpy(zero_copy_only=False).astype(np.int64)
    ends, start = np.cumsum(sizes), 0
    while start < len(part):
        before = int(ends[start - 1]) if start else 0
        stop = max(int(np.searchsorted(ends, before + most, side="right")), start + 1)
        run = part.slice(start, stop - start)
        plain = [
            column.dictionary_decode() if name in columns and pa.types.is_dictionary(column.type) else column
            for name, column in zip(run.schema.names, run.columns, strict=True)
        ]
        yield pa.RecordBatch.from_arrays(plain, names=run.schema.names)
        start = stop


def picked(parts: Iterable[Any], rows: npt.NDArray[np.int64]) -> Iterator[Any]:
    """Yield the given rows (ascending, counted from the first batch) of a sequence of record batches."""
    start = 0
    for part in parts:
        lo, hi = np.searchsorted(rows, [start, start + len(part)])
        if hi > lo:
            yield part.take(rows[lo:hi] - start)
        start += len(part)


def exactly(piece: Piece | TablePiece, parts: Iterable[Any]) -> Iterator[Any]:
    """Yield the parts unchanged; raise if the file has a different number of rows than when it was opened."""
    rows = 0
    for part in parts:
        rows += len(part)
        if rows > piece.rows:
            break
        yield part
    if rows != piece.rows:
        raise PoolError(f"{piece.path}: had {piece.rows:,} rows when it was opened; it has changed since, start again")


def open_parquet(raw: IO[bytes], span: int | None = None, dictionaries: Sequence[str] = ()) -> Any:
    """Open a Parquet file as ``pyarrow.parquet.ParquetFile``; page checksums are verified.

    Args:
        raw: The file, open for reading.
        span: Bytes of a column to fetch at a time, if only a few rows are needed; None to prefetch whole row groups.
        dictionaries: Columns to read as dictionaries.
    """
    import pyarrow.parquet as pq

    return pq.ParquetFile(
        raw,
        pre_buffer=span is None,
        buffer_size=span or 0,
        read_dictionary=list(dictionaries),
        page_checksum_verification=True,
    )


def vectors_of(column: Any, dim: int, dtype: str) -> Array:
    """Convert an Arrow column to (rows, dim) as stored; rows that are null or have another width become NaN."""
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


def parquet_head(
    protocol: str, path: str, choose: Choose, dtype: str | None = None
) -> tuple[dict[str, Piece], TablePiece]:
    """Describe the columns of vectors and the table of a file, from its footer, which is read once.

    If the type of a column does not have the width, its first vector is read too.

    Args:
        protocol: Protocol of the file.
        path: Its path.
        choose: Returns the column of each role, of the Arrow types of all columns as text.
        dtype: The type of vectors that the user gave.
    """

    def read() -> tuple[dict[str, Piece], TablePiece]:
        with open_file(protocol, path) as raw:
            file = open_parquet(raw)
            schema, rows = plain_schema(file.schema_arrow), file.metadata.num_rows
            check_names(path, schema.names)
            table = TablePiece(path, rows, tuple(schema.names), protocol)
            pieces: dict[str, Piece] = {}
            for role, column in choose({name: str(schema.field(name).type) for name in schema.names}).items():
                first = partial(_first_length, raw, column)
                dim, kind = vector_type(f"{path} [{column}]", schema.field(column), rows, first, dtype)
                pieces[role] = ParquetPiece(path, column, rows, dim, kind, protocol)
            return pieces, table

    return trusting(path, read)


def _first_length(raw: IO[bytes], column: str) -> int:
    batches = open_parquet(raw, _SPAN).iter_batches(batch_size=64, columns=[column])
    return first_length(plain_batch(part).column(0) for part in batches)


def first_length(columns: Iterable[Any]) -> int:
    """Return the values, or bytes, of the first vector that has any in parts of a column of plain lists or binary.

    0 if all are null or empty: an empty list is a vector that is missing.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    for column in columns:
        lists = pa.types.is_list(column.type) or pa.types.is_large_list(column.type)
        lengths = pc.list_value_length(column) if lists else pc.binary_length(column)
        found = lengths.filter(pc.greater(lengths, 0))
        if len(found):
            return int(found[0].as_py())
    return 0


def vector_type(
    label: str, field: Any, rows: int, first: Callable[[], int], dtype: str | None = None
) -> tuple[int, str]:
    """Return the width and the type of the vectors of a column.

    Args:
        label: The file and the column, for messages.
        field: The Arrow field, of a plain type; its metadata may have the type as ``dtype``.
        rows: Number of rows.
        first: Returns :func:`first_length`; called if the type does not have the width.
        dtype: The type, if neither the field nor its metadata has it.

    Raises:
        PoolError: These are not vectors of floats, all are null or empty, or they are too long.
    """
    import pyarrow as pa

    kind, mark = field.type, _mark(field) or dtype
    fixed = pa.types.is_fixed_size_list(kind)
    binary = any(f(kind) for f in (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary))
    if not (fixed or binary or pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        raise PoolError(f"{label}: contains {kind}; embeddings are lists of floats, or binary")
    found = "" if binary else _float(kind.value_type, mark, label)
    width = kind.list_size if fixed else first()
    if not width and rows:
        raise PoolError(f"{label}: no row has an embedding; remove the file")
    if not binary:
        return _checked(width, label), found
    if mark not in (*FLOATS, "bfloat16"):
        raise PoolError(
            f"{label}: binary embeddings of {width} bytes a row; give their type with "
            "--dtype float16, float32 or bfloat16"
        )
    if width % stored_dtype(mark).itemsize:
        raise PoolError(f"{label}: {width} bytes a row is not a multiple of {mark}; is --dtype right?")
    return _checked(width // stored_dtype(mark).itemsize, label), mark


def _checked(width: int, label: str) -> int:
    if width > DIMENSIONS:
        raise PoolError(f"{label}: has {width:,} dimensions; embeddings have at most {DIMENSIONS:,}")
    return width


def _float(kind: Any, mark: str | None, label: str) -> str:
    import pyarrow as pa

    name = {pa.float16(): "float16", pa.float32(): "float32", pa.float64(): "float64"}.get(kind)
    if kind == pa.uint16() and mark == "bfloat16":
        return "bfloat16"
    if name is None:
        raise PoolError(f"{label}: contains lists of {kind}; embeddings are float16, float32, float64 or bfloat16")
    return name


def _mark(field: Any) -> str | None:
    mark = (field.metadata or {}).get(b"dtype")
    return mark.decode() if mark else None


@dataclass(frozen=True)
class TablePiece:
    """Metadata rows of one Parquet file; ``success_only`` skips the failed downloads of img2dataset."""

    path: str
    rows: int
    columns: tuple[str, ...]
    protocol: str = "file"
    success_only: bool = False

    @property
    def parts(self) -> tuple[TablePiece, ...]:
        """The files that are read: this one."""
        return (self,)

    def stream(self, columns: Sequence[str], batch: int = 65536) -> Iterator[Any]:
        """Yield record batches of the columns, in row order."""
        import pyarrow.compute as pc

        wanted = list(dict.fromkeys([*columns, "status"])) if self.success_only else columns
        parts = _batches(self.protocol, self.path, wanted, batch, _TABLE)
        if self.success_only:
            parts = (part.filter(pc.equal(part.column("status"), "success")).select(list(columns)) for part in parts)
        return exactly(self, parts)

    def take(self, columns: Sequence[str], rows: npt.NDArray[np.int64]) -> Iterator[Any]:
        """Yield record batches of the given rows (ascending)."""
        if self.success_only:
            return picked(self.stream(columns), rows)
        return _batches(self.protocol, self.path, columns, 8192, _TABLE, rows)

    def schema(self, columns: Sequence[str]) -> Any:
        """Return the Arrow schema of some columns, in the order of ``columns``."""
        import pyarrow as pa

        with open_file(self.protocol, self.path) as raw:
            schema = trusting(self.path, lambda: plain_schema(open_parquet(raw).schema_arrow))
        return pa.schema([schema.field(name) for name in columns])


def table_piece(protocol: str, path: str) -> TablePiece:
    """Read a Parquet footer."""

    def read() -> TablePiece:
        with open_file(protocol, path) as raw:
            file = open_parquet(raw)
            check_names(path, file.schema_arrow.names)
            return TablePiece(path, file.metadata.num_rows, tuple(file.schema_arrow.names), protocol)

    return trusting(path, read)


def check_names(path: str, names: Sequence[str]) -> None:
    """Check that no two columns of a table have one name.

    Raises:
        PoolError: Two have.
    """
    if twice := [name for name in names if names.count(name) > 1]:
        raise PoolError(f"{path}: has two columns named {visible(twice[0])!r}; rename one of them")


def parquet_metadata(protocol: str, path: str) -> dict[bytes, bytes]:
    """Return the key-value metadata of a Parquet footer."""

    def read() -> dict[bytes, bytes]:
        with open_file(protocol, path) as raw:
            return dict(open_parquet(raw).schema_arrow.metadata or {})

    return trusting(path, read)
