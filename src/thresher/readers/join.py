"""Metadata of an img2dataset output, joined to a pool by key, written once as parquet in row order."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

from thresher.errors import BadRowsError, OutputError, UsageError
from thresher.readers.layout import Layout
from thresher.readers.pieces import TablePiece, table_piece


def join_by_key(layout: Layout, metadata: Layout, target: str) -> TablePiece:
    """Left-join ``metadata`` to the pool's rows and write the result; rows without a match get nulls.

    Out of core: both sides stream through DuckDB. Adds a column ``joined`` (bool).

    Args:
        layout: The pool; needs a key column.
        metadata: Tables with a unique column ``key``.
        target: Parquet file to write, atomically.

    Raises:
        UsageError: The pool has no key column.
        BadRowsError: A key stands more than once in ``metadata``.
    """
    import duckdb

    if layout.key is None:
        raise UsageError(f"{layout.location} has no key column to join metadata by; name one with --key")
    if metadata.key is None:
        raise UsageError(f"{metadata.location} has no key column to join by")
    extra = [name for name in metadata.columns if name not in layout.columns]
    os.makedirs(os.path.dirname(target), exist_ok=True)
    handle, scratch = tempfile.mkstemp(suffix=".parquet", dir=os.path.dirname(target))
    os.close(handle)
    names = "".join(f', m."{name}"' for name in extra)
    own = ", ".join(f'k."{name}"' for name in layout.columns)
    try:
        with duckdb.connect(config={"temp_directory": os.path.dirname(target)}) as db:
            db.register("k_stream", _reader(layout.tables, layout.columns))
            db.execute("CREATE TEMP TABLE k AS SELECT *, row_number() OVER () AS at__ FROM k_stream")
            db.register("m_stream", _reader(metadata.tables, metadata.columns))
            db.execute("CREATE TEMP TABLE m AS SELECT * FROM m_stream")
            twice = db.execute(f'SELECT "{metadata.key}" FROM m GROUP BY 1 HAVING count(*) > 1 LIMIT 1').fetchone()
            if twice:
                raise BadRowsError(f"{metadata.location}: the key {twice[0]!r} stands there more than once")
            db.execute(
                f'COPY (SELECT {own}{names}, m."{metadata.key}" IS NOT NULL AS joined FROM k LEFT JOIN m '
                f'ON CAST(k."{layout.key}" AS VARCHAR) = CAST(m."{metadata.key}" AS VARCHAR) '
                "ORDER BY k.at__) TO ? (FORMAT parquet, ROW_GROUP_SIZE 65536)",
                [scratch],
            )
        os.replace(scratch, target)
    except (OSError, duckdb.Error) as error:
        raise OutputError(f"{target}: the joined metadata could not be written ({error})") from None
    finally:
        if os.path.exists(scratch):
            os.unlink(scratch)
    return table_piece("file", target)


def _reader(tables: Sequence[TablePiece], columns: Sequence[str]) -> Any:
    import pyarrow as pa

    def batches() -> Iterator[Any]:
        for table in tables:
            yield from table.stream(columns)

    parts = batches()
    first = next(parts)

    def all_of_them() -> Iterator[Any]:
        yield first
        yield from parts

    return pa.RecordBatchReader.from_batches(first.schema, all_of_them())
