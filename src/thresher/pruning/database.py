"""The DuckDB database that evaluates conditions and hashes keys: one per process, without access to files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from thresher.runtime.duckdb_query import signals_kept

# DuckDB's own least and greatest ignore missing values: a row without a width would count as wide.
MACROS = """
CREATE MACRO words(t) AS len(regexp_extract_all(t, '[^\\s\\p{Z}]+'));
CREATE MACRO characters(t) AS length(t);
CREATE MACRO least(a, b) AS CASE WHEN a < b THEN a WHEN b <= a THEN b END;
CREATE MACRO greatest(a, b) AS CASE WHEN a > b THEN a WHEN b >= a THEN b END;
CREATE MACRO aspect(w, h) AS greatest(w, h)::DOUBLE / nullif(least(w, h), 0);
CREATE MACRO number_or_null(x) AS CASE WHEN isnan(x) THEN NULL ELSE x END;
"""
MEMORY = 2**30  # bytes that one query may use


@contextmanager
def cursor() -> Iterator[Any]:
    """Yield a new connection to the database, for short queries; for others see ``runtime.duckdb_query``.

    Raises:
        KeyboardInterrupt: A signal interrupted a query.
    """
    with signals_kept(), _database().cursor() as db:
        yield db


@cache
def _database() -> Any:
    import duckdb

    db = duckdb.connect(config={"threads": 1})
    db.execute(MACROS)
    db.execute("SET GLOBAL TimeZone = 'UTC'")  # times with a zone mean the same on every machine
    db.execute(f"SET memory_limit = '{MEMORY}B'")
    db.execute("SET temp_directory = ''")
    db.execute("SET enable_external_access = false")
    db.execute("SET lock_configuration = true")
    return db
