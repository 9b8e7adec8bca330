"""SQL as a table of keys and scores: ``sql:SELECT uid, score FROM 'scores/*.parquet' WHERE score > 0.3``.

The text is the user's own, one query, which DuckDB runs. Its result is streamed into a Parquet file, so that it can be
read several times, in one order, as any other table, with memory that does not grow with it. The file is named by its
content: the same result is the same file.

``sql:FILE:SELECT ...`` runs the query on a DuckDB database, opened read-only: ``sql:scores.duckdb:SELECT * FROM clip``.
"""

from __future__ import annotations

import hashlib
import os
import re
from functools import partial
from pathlib import Path
from typing import Any

from thresher.errors import PoolError, UsageError
from thresher.io.columns import KEYS, cast_batch
from thresher.io.parquet import TablePiece, check_names, table_piece
from thresher.io.paths import visible
from thresher.runtime.cache import HINT
from thresher.runtime.config import cache_folder
from thresher.runtime.duckdb_query import interruptible, signals_kept
from thresher.runtime.files import write_errors
from thresher.runtime.locks import scratch_folder

_FORM = re.compile(
    r"sql:(?:(?P<file>[^:;'\"]+\.(?:duckdb|ddb|db|sqlite3?)):(?!:))?(?P<query>.*)", re.DOTALL | re.IGNORECASE
)
_MEMORY = "512MB"  # that DuckDB may use; it writes the rest to disk
_THREADS = 4  # each takes memory
_ROWS = 65_536  # of a record batch
_CHUNK = 1 << 20
_SPILL = ".spill."  # prefix of the folders of temporary files


def is_sql(location: object) -> bool:
    """Return whether a location is SQL: ``sql:`` and a query."""
    return isinstance(location, str) and location[:4].lower() == "sql:"


def sql_table(location: str, scratch: str | None = None) -> TablePiece:
    """Run a query and return its result as a table.

    Args:
        location: ``sql:QUERY``, or ``sql:FILE:QUERY`` for a DuckDB database. Paths in it are relative to the current
            folder.
        scratch: The cache folder in which the result is kept (default: the usual one).

    Raises:
        UsageError: It is not one query that only reads, or DuckDB cannot run it.
        PoolError: The database does not exist, or the result has no rows, or two columns of one name.
    """
    import duckdb

    form = _FORM.fullmatch(location)
    file, query = (form["file"], form["query"].strip()) if form else (None, "")
    shown = visible(location, 120)
    if not query:
        raise UsageError(f"{shown}: has no query; give one, such as sql:SELECT uid, score FROM 'scores/*.parquet'")
    if file and not os.path.isfile(file):
        raise PoolError(f"{visible(file)}: there is no such database, for {shown}")
    folder = Path(scratch or cache_folder()) / "joined"
    with write_errors(folder, HINT):
        folder.mkdir(parents=True, exist_ok=True)
        own = scratch_folder(folder, _SPILL)
    config = {
        "memory_limit": _MEMORY,
        "threads": min(os.cpu_count() or 1, _THREADS),
        "temp_directory": str(own.path / "duckdb"),
        "autoinstall_known_extensions": "false",  # nothing is downloaded that was not asked for
    }
    made = own.path / "result.parquet"
    try:
        with write_errors(folder, HINT), signals_kept():
            with duckdb.connect(file or ":memory:", read_only=bool(file), config=config) as db:
                rows = _write(db, query, shown, str(made))
            target = folder / f"sql-{_digest(made)}.parquet"
            if not target.exists():  # a file that another run may be reading is not replaced
                os.replace(made, target)
    except duckdb.Error as error:
        raise UsageError(f"{shown}: {_reason(error)}") from None
    finally:
        own.remove()
    if not rows:
        raise PoolError(f"{shown}: the result has no rows; check the query")
    return table_piece("file", str(target))


def _write(db: Any, query: str, shown: str, path: str) -> int:
    """Write the result of a query as Parquet; return the number of rows."""
    import duckdb
    import pyarrow as pa
    import pyarrow.parquet as pq

    statements = db.extract_statements(query)
    if len(statements) != 1 or statements[0].type != duckdb.StatementType.SELECT:
        raise UsageError(f"{shown}: give one query that only reads, such as SELECT ... or WITH ... SELECT ...")
    stream = interruptible(db, lambda: _streamed(db.sql(query)))
    check_names(shown, stream.schema.names)
    schema = pa.schema([_number(field) for field in stream.schema])
    rows = 0
    try:
        with pq.ParquetWriter(path, schema) as writer:
            while (part := interruptible(db, partial(next, stream, None))) is not None:
                writer.write_batch(cast_batch(part, schema))
                rows += len(part)
    except pa.ArrowException as error:
        first = next(iter(str(error).splitlines()), "")
        raise UsageError(f"{shown}: a column cannot be used ({first}); cast it in the query") from None
    return rows


def _number(field: Any) -> Any:
    """Return a field with float64 instead of decimals, as DuckDB computes sums and fractions; keys keep theirs."""
    import pyarrow as pa

    return field.with_type(pa.float64()) if pa.types.is_decimal(field.type) and field.name not in KEYS else field


def _streamed(relation: Any) -> Any:
    """Return the rows of a query as a stream of record batches; the method has had two names."""
    read = getattr(relation, "to_arrow_reader", None) or relation.fetch_arrow_reader
    return read(_ROWS)


def _reason(error: Exception) -> str:
    """Return the first line of an error of DuckDB, and what to do if an extension is missing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first = visible(lines[0] if lines else type(error).__name__, 300)
    if found := re.search(r"[Ee]xtension \"(\w+)\"", str(error)):  # DuckDB for Python has no command of its own
        install = f"import duckdb; duckdb.sql('INSTALL {found[1]}')"
        return f'needs the extension {found[1]} of DuckDB; install it once with: python -c "{install}"'
    return first


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()[:32]
