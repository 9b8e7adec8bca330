"""Joins of other tables to a pool by key: metadata, written once as Parquet in row order, and row positions."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from thresher.errors import BadRowsError, OutputError, PoolError, UsageError
from thresher.io.open import trusting
from thresher.io.parquet import TablePiece, table_piece
from thresher.pool.layout import Layout, Options, with_roles
from thresher.runtime.files import writing


def join_by_key(layout: Layout, metadata: Layout, target: str, options: Options) -> Layout:
    """Left-join ``metadata`` to the rows of a pool and return the pool with the joined table.

    Out of core: both sides are streamed through DuckDB, once; later calls reuse the file at ``target``. The keys are
    the key column of the pool and the column with the same name in the metadata, or else the metadata's own key
    column. Columns that the pool already has and lists of floats are not joined; rows without a match get nulls. Adds
    the column ``joined`` (bool).

    Args:
        layout: The pool; needs a key column.
        metadata: Tables with a unique key.
        target: Parquet file to write, atomically.
        options: Options of the pool.

    Raises:
        UsageError: A side has no key column, or no key of the pool is in the metadata.
        BadRowsError: A key occurs more than once in ``metadata``.
    """
    if layout.key is None:
        raise UsageError(f"{layout.location} has no key column to join metadata by; give one with --key")
    key = layout.key if layout.key in metadata.columns else metadata.key
    if key is None:
        raise UsageError(f"{metadata.location} has no key column to join by; it has {', '.join(metadata.columns)}")
    try:
        table = table_piece("file", target)
    except (PoolError, OSError):  # missing or damaged
        _write(layout, metadata, key, target)
        table = table_piece("file", target)
    # The file name is a hash of its inputs, so the content never changes.
    joined = replace(layout, tables=(table,), stamps={**layout.stamps, target: []})
    caption = options.caption or layout.caption
    return with_roles(joined, replace(options, key=layout.key, caption=caption, metadata=None))


def _write(layout: Layout, metadata: Layout, key: str, target: str) -> None:
    import duckdb

    # Column names ignore case in DuckDB but not in Parquet, so columns are numbered in DuckDB.
    own_columns = _flat(layout)
    known = {name.lower() for name in (*layout.columns, "joined")}
    extra = [name for name in _flat(metadata) if name.lower() not in known]
    chosen = [f"k.c{i} AS {_quoted(name)}" for i, name in enumerate(own_columns)]
    selected = list(dict.fromkeys([key, *extra]))
    chosen += [f"m.c{selected.index(name)} AS {_quoted(name)}" for name in extra]
    own = f"k.c{own_columns.index(str(layout.key))}::VARCHAR"
    with writing(target) as scratch:
        with duckdb.connect(config={"temp_directory": os.path.dirname(target)}) as db:
            try:
                db.register("pool", _reader(layout.tables, own_columns))
                db.execute("CREATE TEMP TABLE k AS SELECT * FROM pool")
                db.register("metadata", _reader(metadata.tables, selected))
                db.execute(
                    "CREATE TEMP TABLE m AS SELECT * REPLACE (c0::VARCHAR AS c0) FROM metadata WHERE c0 IS NOT NULL"
                )
                twice = db.execute("SELECT c0 FROM m GROUP BY 1 HAVING count(*) > 1 LIMIT 1").fetchone()
                if twice:
                    raise BadRowsError(f"{metadata.location}: the {key} {twice[0]!r} occurs more than once")
                if not db.execute(f"SELECT count(*) FROM k SEMI JOIN m ON {own} = m.c0").fetchall()[0][0]:
                    raise UsageError(
                        f"no {layout.key} of {layout.location} is among the {key} of {metadata.location}; "
                        "give the matching column with --key"
                    )
                db.execute(
                    f"COPY (SELECT {', '.join(chosen)}, m.c0 IS NOT NULL AS joined FROM k LEFT JOIN m ON {own} = m.c0 "
                    "ORDER BY k.at) TO ? (FORMAT parquet, ROW_GROUP_SIZE 65536)",
                    [scratch],
                )
            except duckdb.Error as error:
                raise OutputError(f"{target}: the joined metadata could not be written ({error})") from None


def positions(layout: Layout, key: str, other: Layout, other_key: str, scratch: str) -> npt.NDArray[np.int64]:
    """Return for every row of a pool the row of another layout with the same key, -1 if there is none; (N,) int64.

    If both have the same keys in the same order, this takes one pass over each; otherwise DuckDB joins them out of
    core, in the folder ``scratch``.

    Raises:
        BadRowsError: A key occurs more than once in ``other``.
    """
    import duckdb

    sides = (layout, key), (other, other_key)
    if layout.rows == other.rows and _same_keys(*(_texts(side.tables, name) for side, name in sides)):
        return np.arange(layout.rows)
    with duckdb.connect(config={"temp_directory": scratch}) as db:
        try:
            for name, (side, column) in zip("km", sides, strict=True):
                db.register("part", _reader(side.tables, [column]))
                db.execute(f"CREATE TEMP TABLE {name} AS SELECT * REPLACE (c0::VARCHAR AS c0) FROM part")
                db.unregister("part")
            twice = db.execute("SELECT c0 FROM m WHERE c0 IS NOT NULL GROUP BY 1 HAVING count(*) > 1 LIMIT 1")
            if repeated := twice.fetchone():
                raise BadRowsError(f"{other.location}: the {other_key} {repeated[0]!r} occurs more than once")
            pairs = db.execute("SELECT k.at AS here, m.at AS there FROM k JOIN m ON k.c0 = m.c0").fetchnumpy()
        except duckdb.Error as error:
            raise OutputError(f"{scratch}: keys could not be joined there ({error})") from None
    places = np.full(layout.rows, -1, np.int64)
    places[pairs["here"]] = pairs["there"]
    return places


def _texts(tables: Sequence[TablePiece], key: str) -> Iterator[Any]:
    import pyarrow as pa

    for table in tables:
        for part in table.stream([key]):
            yield trusting(f"{table.path} [{key}]", partial(part.column(0).cast, pa.large_string()))


def _same_keys(ours: Iterator[Any], theirs: Iterator[Any]) -> bool:
    """Return whether two sequences of text arrays have the same content, regardless of where they are split."""
    left = right = None
    while True:
        left = left if left is not None and len(left) else next(ours, None)
        right = right if right is not None and len(right) else next(theirs, None)
        if left is None or right is None:
            return left is right
        n = min(len(left), len(right))
        if not left[:n].equals(right[:n]):
            return False
        left, right = left[n:], right[n:]


def _flat(layout: Layout) -> list[str]:
    """Return all columns except embeddings, which are not joined."""
    import pyarrow as pa

    kinds = pa.unify_schemas([table.schema(layout.columns) for table in layout.tables], promote_options="permissive")
    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return [
        kind.name
        for kind in kinds
        if not (any(is_a(kind.type) for is_a in lists) and pa.types.is_floating(kind.type.value_type))
    ]


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _reader(tables: Sequence[TablePiece], columns: Sequence[str]) -> Any:
    """Return the rows of the tables as a stream, columns c0, c1, ... and ``at``, the row number."""
    import pyarrow as pa

    schema = pa.unify_schemas([table.schema(columns) for table in tables], promote_options="permissive")
    schema = pa.schema([field.with_name(f"c{i}") for i, field in enumerate(schema)]).append(pa.field("at", pa.int64()))

    def batches() -> Iterator[Any]:
        start = 0
        for table in tables:
            for part in table.stream(columns):
                at = pa.array(np.arange(start, start + len(part)))
                yield pa.RecordBatch.from_arrays(
                    [*(c.cast(f.type) for c, f in zip(part.columns, schema, strict=False)), at], schema=schema
                )
                start += len(part)

    return pa.RecordBatchReader.from_batches(schema, batches())
