"""Joins of other tables to a pool by key: metadata as a table next to those of the pool, and row positions."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from thresher.errors import BadRowsError, OutputError, PoolError, UsageError
from thresher.io.columns import as_text
from thresher.io.key_forms import unlike
from thresher.io.open import trusting
from thresher.io.parquet import TablePiece, table_piece
from thresher.pool.layout import Layout, Options, Rows, rows_of, with_roles
from thresher.runtime.cache import HINT
from thresher.runtime.checksums import DamagedError, open_entry, report_damage, stripes
from thresher.runtime.duckdb_query import interruptible, signals_kept
from thresher.runtime.files import sync, write_errors, writing
from thresher.runtime.locks import scratch_folder

_MEMORY = "256MB"  # that DuckDB may use, for keys and row numbers; it writes the rest to disk
_WINDOW = 1 << 20  # rows of metadata whose places in the pool are in memory at a time
_GROUP = 1 << 16  # rows in a row group of the joined table
_PARTS = 1_024  # maximum number of parts into which the rows are sorted before they are ordered
_SUM = b"thresher-crc32:"  # in the footer of a joined table, before its checksum in hexadecimal
_SPILL = ".spill."  # prefix of the folders of temporary files


def join_by_key(layout: Layout, metadata: Layout, target: str, options: Options) -> Layout:
    """Left-join ``metadata`` to the rows of a pool and return the pool with the joined table next to its own tables.

    Later calls reuse the file at ``target``, if its checksum is right. The keys are the key column of the pool and the
    column with the same name in the metadata, or else the metadata's own key column. Only keys are joined, out of core;
    the columns of the metadata are then streamed into the row order of the pool. Columns that the pool already has,
    columns that contain bytes (such as images) and lists of floats are not joined; rows without a match get nulls. Adds
    the column ``joined`` (bool).

    Args:
        layout: The pool; needs a key column.
        metadata: Tables with a unique key.
        target: Parquet file to write, atomically.
        options: Options of the pool.

    Raises:
        UsageError: A side has no key column, or no key of the pool is in the metadata.
        BadRowsError: A key occurs more than once in ``metadata``.
        OutputError: The file cannot be written.
    """
    if layout.key is None:
        raise UsageError(f"{layout.location} has no key column to join metadata by; give one with --key")
    key = layout.key if layout.key in metadata.columns else metadata.key
    if key is None:
        raise UsageError(f"{metadata.location} has no key column to join by; it has {', '.join(metadata.columns)}")
    table = _known(target, layout.rows, metadata)
    if table is None:
        _write(layout, metadata, key, target)
        table = table_piece("file", target)
    own = tuple(name for name in layout.columns if name not in table.columns)
    both = JoinedTable(table.path, table.rows, (*own, *table.columns), own=layout.tables, joined=table)
    # The file name is a hash of its inputs, so the content never changes.
    joined = replace(layout, tables=(both,), stamps={**layout.stamps, target: []})
    caption = options.caption or layout.caption
    return with_roles(joined, replace(options, key=layout.key, caption=caption, metadata=None))


@dataclass(frozen=True)
class JoinedTable(TablePiece):
    """All tables of a pool, together with the columns of a joined table, as one table.

    Attributes:
        own: The tables of the pool, in row order.
        joined: The joined table; it has the rows of all of them.
    """

    own: tuple[TablePiece, ...] = ()
    joined: TablePiece | None = None

    @property
    def parts(self) -> tuple[TablePiece, ...]:
        """The files that are read."""
        return (*self.own, *filter(None, [self.joined]))

    def stream(self, columns: Sequence[str], batch: int = _GROUP) -> Iterator[Any]:
        """Yield record batches of the columns, in row order."""
        mine, theirs = self._split(columns)
        left = (part for table in self.own for part in table.stream(mine, batch))
        right = (part for table in self._added for part in table.stream(theirs, batch))
        return _side_by_side(columns, mine, left, theirs, right)

    def take(self, columns: Sequence[str], rows: Rows) -> Iterator[Any]:
        """Yield record batches of the given rows (ascending)."""
        mine, theirs = self._split(columns)
        left, right = rows_of(self.own, mine, rows), rows_of(self._added, theirs, rows)
        return _side_by_side(columns, mine, left, theirs, right)

    def schema(self, columns: Sequence[str]) -> Any:
        """Return the Arrow schema of some columns, in the order of ``columns``."""
        import pyarrow as pa

        mine, theirs = self._split(columns)
        kinds = [_schema(self.own, mine)] if mine else []
        kinds += [one.schema(theirs) for one in self._added] if theirs else []
        fields = {field.name: field for kind in kinds for field in kind}
        return pa.schema([fields[name] for name in columns])

    @property
    def _added(self) -> tuple[TablePiece, ...]:
        return self.parts[len(self.own) :]

    def _split(self, columns: Sequence[str]) -> tuple[list[str], list[str]]:
        """Return which columns are in the tables of the pool, and which in the joined table."""
        there = {name for one in self._added for name in one.columns}
        here = set(self.columns) - there
        theirs = [name for name in columns if name not in here and (name in there or name.split(".")[0] in there)]
        return [name for name in columns if name not in theirs], theirs


def _side_by_side(
    columns: Sequence[str], mine: Sequence[str], left: Iterator[Any], theirs: Sequence[str], right: Iterator[Any]
) -> Iterator[Any]:
    """Yield the columns of two sequences of record batches of the same rows, split anywhere, as one sequence."""
    import pyarrow as pa

    if not theirs or not mine:
        yield from (right if theirs else left)
        return
    for part, other in _in_step(left, right):
        found = {**dict(zip(mine, _fields(part), strict=True)), **dict(zip(theirs, _fields(other), strict=True))}
        cells = [found[name] for name in columns]
        yield pa.RecordBatch.from_arrays([cell for cell, _ in cells], schema=pa.schema([field for _, field in cells]))


def _fields(part: Any) -> list[tuple[Any, Any]]:
    return list(zip(part.columns, part.schema, strict=True))


def _in_step(ours: Iterator[Any], theirs: Iterator[Any]) -> Iterator[tuple[Any, Any]]:
    """Yield pairs of equally long slices of two sequences of arrays or batches; the rest of the longer with None."""
    left = right = None
    while True:
        left = left if left is not None and len(left) else next((part for part in ours if len(part)), None)
        right = right if right is not None and len(right) else next((part for part in theirs if len(part)), None)
        if left is None or right is None:
            if left is not right:
                yield left, right
            return
        n = min(len(left), len(right))
        yield left[:n], right[:n]
        left, right = left[n:], right[n:]


# --- the joined table -----------------------------------------------------------------------------


def _known(target: str, rows: int, metadata: Layout) -> TablePiece | None:
    """Return the table that an earlier call wrote; None, with a warning if it is damaged, if it cannot be used."""
    import pyarrow as pa

    try:
        with open_entry(target) as file:
            _check_sum(file)
        table = table_piece("file", target)
        *names, last = table.columns
        good = table.rows == rows and last == "joined" and set(names) <= set(metadata.columns)
        if not good or table.schema([last]).field(0).type != pa.bool_():
            raise DamagedError("it is another table")
    except OSError:
        return None
    except (DamagedError, PoolError, ValueError) as error:
        report_damage(target, error)
        return None
    return table


def _write(layout: Layout, metadata: Layout, key: str, target: str) -> None:
    schema = _added(layout, metadata)
    sides = (layout, str(layout.key)), (metadata, key)
    with writing(target, HINT) as scratch, _database(Path(target).parent) as (db, folder):
        _match(db, sides)
        if not _query(db, "SELECT count(*) FROM pairs")[0][0]:
            examples = unlike("the pool", first_keys(*sides[0]), "the metadata", first_keys(*sides[1]))
            raise UsageError(
                f"no {layout.key} of {layout.location} is among the {key} of {metadata.location}: {examples}; "
                "give the matching column with --key"
            )
        placed = _placed(db, metadata.tables, key, schema)
        _write_table(scratch, schema, _ordered(placed, schema, layout.rows, folder / "rows.arrow"))
        with open(scratch, "r+b") as file:
            _set_sum(file)


def _added(layout: Layout, metadata: Layout) -> Any:
    """Return the schema of the columns to join."""
    import pyarrow as pa

    known = {name.lower() for name in (*layout.columns, "joined")}
    names = [name for name in metadata.columns if name.lower() not in known]
    return pa.schema([field for field in _schema(metadata.tables, names) if not _is_heavy(field.type)])


def _is_heavy(kind: Any) -> bool:
    """Return whether an Arrow type contains bytes, or is a list of floats."""
    import pyarrow as pa

    of_bytes = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary, pa.types.is_binary_view)
    if any(is_a(kind) for is_a in of_bytes):
        return True
    inner = [kind.field(i).type for i in range(kind.num_fields)]
    vectors = kind.num_fields == 1 and not pa.types.is_struct(kind) and pa.types.is_floating(inner[0])
    return vectors or any(_is_heavy(one) for one in inner)


def _placed(db: Any, tables: Sequence[TablePiece], key: str, schema: Any) -> Iterator[tuple[list[Any], Rows]]:
    """Yield columns of the matched rows of the metadata, in its order, with the row of the pool of each, (n,)."""
    import pyarrow as pa

    stop = 0  # of the window
    here = there = np.empty(0, np.int64)
    read = schema if len(schema) else _schema(tables, [key])  # the rows are counted in any case
    for start, part in _batches(tables, read.names, read):
        end = start + len(part)
        if end > stop:
            stop = max(start + _WINDOW, end)
            window = "SELECT here, there FROM pairs WHERE there >= ? AND there < ? ORDER BY there, here"
            found = interruptible(db, partial(_numpy, db, window, [start, stop]))
            here, there = np.asarray(found["here"]), np.asarray(found["there"])
        some = slice(*np.searchsorted(there, [start, end]))
        rows = pa.array(there[some] - start)
        yield [cell.take(rows) for cell in part.columns[: len(schema)]], here[some]


def _ordered(placed: Iterable[tuple[list[Any], Rows]], schema: Any, rows: int, spill: Path) -> Iterator[list[Any]]:
    """Yield the columns of all rows of the pool, in order, and last ``joined``; nulls where no row was placed.

    The placed rows are first sorted into parts of the pool, in a temporary file, and then within each part, so that
    only one part is in memory.
    """
    import pyarrow as pa

    size = _GROUP * max(-(-rows // (_GROUP * _PARTS)), 1)
    batches: list[list[int]] = [[] for _ in range(0, rows, size)]
    with_place = schema.append(pa.field("place", pa.int64()))
    with pa.OSFile(str(spill), "wb") as file, pa.ipc.new_file(file, with_place) as writer:
        count = 0
        for cells, at in placed:
            order = np.argsort(at // size, kind="stable")
            at = at[order]
            cells = [cell.take(pa.array(order)) for cell in cells]
            part = pa.RecordBatch.from_arrays([*cells, pa.array(at)], schema=with_place)
            for number in np.unique(at // size).tolist():
                lo, hi = np.searchsorted(at // size, [number, number + 1])
                writer.write_batch(part[lo:hi])
                batches[number].append(count)
                count += 1
    with pa.OSFile(str(spill), "rb") as file, pa.ipc.open_file(file) as reader:
        for number, some in enumerate(batches):
            *cells, place = pa.Table.from_batches([reader.get_batch(i) for i in some], with_place).columns
            where = np.full(min(size, rows - number * size), -1, np.int64)
            where[place.to_numpy() - number * size] = np.arange(len(place))
            order = pa.array(where, mask=where < 0)
            yield [*(cell.take(order) for cell in cells), pa.array(where >= 0)]


def _write_table(path: str, schema: Any, parts: Iterable[list[Any]]) -> None:
    """Write a Parquet file with an empty checksum in its footer."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = schema.append(pa.field("joined", pa.bool_()))
    with pq.ParquetWriter(path, schema, write_page_checksum=True) as writer:
        for cells in parts:
            writer.write_table(pa.table(cells, schema=schema), row_group_size=_GROUP)
        writer.add_key_value_metadata({"checksum": _SUM.decode() + "0" * 8})


def _set_sum(file: IO[bytes]) -> None:
    """Fill in the checksum of a file that :func:`_write_table` wrote."""
    at, _, found = _sum(file)
    file.seek(at)
    file.write(b"%08x" % found)
    sync(file)


def _check_sum(file: IO[bytes]) -> None:
    """Raise a DamagedError unless a Parquet file has the right checksum in its footer."""
    _, written, found = _sum(file)
    if written != b"%08x" % found:
        raise DamagedError("its checksum is wrong")


def _sum(file: IO[bytes]) -> tuple[int, bytes, int]:
    """Return where the checksum of a Parquet file is, its eight digits, and the CRC-32 of all other bytes."""
    end = file.seek(0, os.SEEK_END)
    file.seek(max(end - 8, 0))
    size = int.from_bytes(file.read(4), "little")
    if not 0 < size <= end - 12:
        raise DamagedError("it ends early")
    file.seek(end - 8 - size)
    at = file.read(size).rfind(_SUM)
    if at < 0:
        raise DamagedError("it has no checksum")
    at += end - 8 - size + len(_SUM)
    file.seek(0)
    found = 0
    for stripe in stripes(file, at):
        found = zlib.crc32(stripe, found)
    written = file.read(8)
    for stripe in stripes(file, end):
        found = zlib.crc32(stripe, found)
    return at, written, found


# --- keys -----------------------------------------------------------------------------------------


def positions(layout: Layout, key: str, other: Layout, other_key: str, scratch: str) -> npt.NDArray[np.int64]:
    """Return for every row of a pool the row of another layout with the same key, -1 if there is none; (N,) int64.

    If both have the same keys in the same order, this takes one pass over each; otherwise DuckDB joins them out of
    core, in a folder of its own inside ``scratch``.

    Raises:
        BadRowsError: A key occurs more than once in ``other``.
    """
    sides = (layout, key), (other, other_key)
    if layout.rows == other.rows and _same_keys(*(_texts(side.tables, name) for side, name in sides)):
        return np.arange(layout.rows)
    with _database(Path(scratch)) as (db, _):
        _match(db, sides)
        pairs = interruptible(db, partial(_numpy, db, "SELECT here, there FROM pairs", []))
    places = np.full(layout.rows, -1, np.int64)
    places[pairs["here"]] = pairs["there"]
    return places


def first_keys(layout: Layout, key: str) -> Iterator[str]:
    """Yield the keys of a layout that are not null, for a message."""
    for text in _texts(layout.tables, key):
        yield from (one for one in text.to_pylist() if one is not None)


@contextmanager
def _database(folder: Path) -> Iterator[tuple[Any, Path]]:
    """Yield a DuckDB connection and a folder for its temporary files that no other connection uses.

    Raises:
        OutputError: The folder cannot be written, or there is not enough memory or disk space.
    """
    import duckdb

    with write_errors(folder, HINT):
        folder.mkdir(parents=True, exist_ok=True)
        own = scratch_folder(folder, _SPILL)
    try:
        threads = min(os.cpu_count() or 1, 4)  # each takes memory
        config = {"temp_directory": str(own.path / "duckdb"), "memory_limit": _MEMORY, "threads": threads}
        with signals_kept(), duckdb.connect(config=config) as db:
            yield db, own.path
    except duckdb.Error as error:
        first = next(iter(str(error).splitlines()), "")
        raise OutputError(f"{folder}: keys could not be joined there ({first}); {HINT}") from None
    finally:
        own.remove()


def _match(db: Any, sides: Sequence[tuple[Layout, str]]) -> None:
    """Create the table ``pairs`` of the rows ``here`` and ``there`` of two layouts that have the same key, as text.

    Raises:
        BadRowsError: A key occurs more than once in the second layout.
    """
    for name, (side, column) in zip("km", sides, strict=True):
        _read(db, name, side, column)
    other, key = sides[1]
    twice = _query(db, "SELECT c0 FROM m GROUP BY 1 HAVING count(*) > 1 LIMIT 1")
    if twice:
        raise BadRowsError(f"{other.location}: the {key} {twice[0][0]!r} occurs more than once")
    _query(
        db,
        "CREATE TEMP TABLE pairs AS "
        "SELECT k.number AS here, m.number AS there FROM k JOIN m ON k.c0 = m.c0 ORDER BY there, here",
    )
    _query(db, "DROP TABLE k")
    _query(db, "DROP TABLE m")


def _read(db: Any, name: str, side: Layout, column: str) -> None:
    """Create a table of the values of a column that are not null, as text, with their row numbers."""
    import duckdb

    failed: list[Exception] = []
    db.register("part", _reader(side.tables, column, failed))
    try:
        _query(db, f"CREATE TEMP TABLE {name} AS SELECT c0, number FROM part WHERE c0 IS NOT NULL")
    except duckdb.Error:
        if failed:  # DuckDB reports an error in reading the data as one of its own
            raise failed[0] from None
        raise
    db.unregister("part")


def _query(db: Any, sql: str) -> list[tuple[Any, ...]]:
    """Run a query, which Ctrl-C ends at once; return its rows."""
    return interruptible(db, lambda: list(db.execute(sql).fetchall()))


def _numpy(db: Any, sql: str, values: list[int]) -> Any:
    return db.execute(sql, values).fetchnumpy()


def _texts(tables: Sequence[TablePiece], key: str) -> Iterator[Any]:
    """Yield a column of the tables as text."""
    for table in tables:
        for part in table.stream([key]):
            yield trusting(table.path, partial(as_text, part.column(0), table.path, key))


def _same_keys(ours: Iterator[Any], theirs: Iterator[Any]) -> bool:
    """Return whether two sequences of text arrays have the same content, regardless of where they are split."""
    return all(left is not None and right is not None and left.equals(right) for left, right in _in_step(ours, theirs))


def _schema(tables: Sequence[TablePiece], columns: Sequence[str]) -> Any:
    """Return the schema of some columns, with types that can hold the values of all tables.

    Raises:
        PoolError: A column has types that do not go together.
    """
    import pyarrow as pa

    schemas = [pa.schema([_plain(field) for field in table.schema(columns)]) for table in tables]
    try:
        return pa.unify_schemas(schemas, promote_options="permissive")
    except pa.ArrowException as error:
        first = next(iter(str(error).splitlines()), "")
        raise PoolError(f"{tables[0].path}: has other types than the files after it ({first}); convert one") from None


def _plain(field: Any) -> Any:
    """Return a field without a dictionary, and with text of any total length."""
    import pyarrow as pa

    kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
    return pa.field(field.name, pa.large_string() if pa.types.is_string(kind) else kind)


def _reader(tables: Sequence[TablePiece], column: str, failed: list[Exception]) -> Any:
    """Return a column of the tables as a stream: its text as c0, and the row number. An error goes to ``failed``."""
    import pyarrow as pa

    schema = pa.schema([("c0", pa.large_string()), ("number", pa.int64())])

    def parts() -> Iterator[Any]:
        try:
            start = 0
            for text in _texts(tables, column):
                numbers = pa.array(np.arange(start, start + len(text)))
                yield pa.RecordBatch.from_arrays([text, numbers], schema=schema)
                start += len(text)
        except Exception as error:
            failed.append(error)
            raise

    return pa.RecordBatchReader.from_batches(schema, parts())


def _batches(tables: Sequence[TablePiece], columns: Sequence[str], schema: Any) -> Iterator[tuple[int, Any]]:
    """Yield the rows of the tables as batches of a schema, with the number of the first row of each."""
    import pyarrow as pa

    start = 0
    for table in tables:
        for part in table.stream(columns):
            pairs = zip(part.columns, schema, strict=True)
            cells = [trusting(table.path, partial(cell.cast, field.type)) for cell, field in pairs]
            yield start, pa.RecordBatch.from_arrays(cells, schema=schema)
            start += len(part)
