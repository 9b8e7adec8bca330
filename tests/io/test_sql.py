"""SQL wherever scores and keys are taken: as a table with the same rows, read-only, streamed, ended by Ctrl-C."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from thresher import build, open_store, run_steps
from thresher.cli.main import main
from thresher.data import open_data
from thresher.errors import BadRowsError, PoolError, ThresherError, UsageError
from thresher.export.keys import each_key, read_keys, select_indices
from thresher.io.sql import is_sql, sql_table
from thresher.pool.layout import Options
from thresher.resharding import reshard
from thresher.testing.data_reader import DATA, pairs

N = 50


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pool, and the scores of its rows in two files and a database, in another order."""
    monkeypatch.chdir(tmp_path)
    keys = [f"k{i:03d}" for i in range(N)]
    (tmp_path / "pool").mkdir()
    pq.write_table(pa.table({"key": keys, "width": range(N)}), "pool/pool.parquet")
    order = np.random.default_rng(0).permutation(N)
    scores = pa.table({"uid": [keys[i] for i in order], "score": order / N, "other": order})
    (tmp_path / "scores").mkdir()
    pq.write_table(scores[:20], "scores/a.parquet")
    pq.write_table(scores[20:], "scores/b.parquet")
    with duckdb.connect("scores.duckdb") as db:
        db.execute("CREATE TABLE clip AS SELECT * FROM 'scores/*.parquet'")
    return tmp_path


ALL = "sql:SELECT uid AS key, score FROM 'scores/*.parquet'"


def kept(source: str, **options: Any) -> list[int]:
    steps = [build("clip-score", {"column": source, "keep": "40%"})]
    return np.flatnonzero(run_steps(open_store("pool", Options(**options)), steps).mask()).tolist()


@pytest.mark.parametrize(
    "source",
    [
        ALL,
        "SQL: select uid as key, max(score) from 'scores/*.parquet' group by all order by random()",
        "sql:WITH s AS (FROM 'scores/*.parquet') SELECT uid AS key, 1.0 - 0.5 * (1 - score) AS half FROM s;",
        "sql:scores.duckdb:SELECT uid AS key, score FROM clip",
        "sql:WITH x AS (SELECT uid AS key, other AS db FROM 'scores/*.parquet') SELECT key, x.db::INT AS score FROM x",
        "sql:SELECT uid AS key, sum(other) AS total FROM 'scores/*.parquet' GROUP BY uid",
    ],
)
def test_scores_of_a_query_are_those_of_the_file(place: Path, source: str) -> None:
    pq.write_table(pq.read_table("scores").rename_columns(["key", "score", "other"]).drop(["other"]), "scores.parquet")
    assert kept(source) == kept("scores.parquet") == list(range(30, 50))


def test_a_method_of_two_scores_takes_queries(place: Path) -> None:
    source = "sql:SELECT uid AS key, score FROM 'scores/*.parquet'"
    other = "sql:SELECT uid AS key, -score AS score FROM 'scores/*.parquet'"
    steps = [build("c-rho", {"reference": source, "proxy": other, "keep": "40%"})]
    assert np.flatnonzero(run_steps(open_store("pool"), steps).mask()).tolist() == list(range(30, 50))


def test_metadata_of_a_query_is_joined(place: Path) -> None:
    query = "sql:SELECT uid AS key, score FROM 'scores/*.parquet' WHERE score >= 0.5"
    store = open_store("pool", Options(metadata=query))
    assert {"score", "joined"} <= set(store.columns)
    selection = run_steps(store, [build("filter", {"where": "joined AND score < 0.6"})])
    assert np.flatnonzero(selection.mask()).tolist() == [25, 26, 27, 28, 29]
    selection.save("subset")
    from thresher import Selection
    from thresher.pool.store import reopen

    again = Selection.load("subset")
    assert again.options["metadata"] == query
    with pytest.warns(UserWarning, match="was joined to the pool, but a query in a file is not run; to join it, give"):
        assert "score" not in reopen(again).columns
    assert "score" in reopen(again, metadata=query).columns
    assert main(["select", "filter", "pool", "-o", "sel", "--metadata", query, "--where", "joined"]) == 0


def test_keys_of_a_query_are_a_selection(place: Path) -> None:
    query = "sql:SELECT uid FROM 'scores/*.parquet' WHERE other IN (3, 4, 40)"
    assert read_keys(query).total == 3
    assert sorted(key for key, _ in each_key(query)) == ["k003", "k004", "k040"]
    assert select_indices(query, keys=[f"k{i:03d}" for i in range(N)]).tolist() == [3, 4, 40]
    assert read_keys("sql:SELECT uid FROM 'scores/*.parquet', range(2)").times("k001") == 2


def test_reshard_takes_a_query_and_does_not_mix_two(place: Path) -> None:
    DATA["webdataset"](place / "tars", pairs(9), 2)
    for low in (5, 7):
        query = f"sql:SELECT format('k{{:04d}}', i) AS key FROM range({low}, 9) t(i)"
        done = reshard("tars", query, f"out{low}", workers=1)
        assert (done.samples, done.missing) == (9 - low, 0)
        assert [one.key for one in open_data(f"out{low}").samples()] == [pair.key for pair in pairs(9)[low:]]
    with pytest.raises(ThresherError):  # the result of another query is there
        reshard("tars", "sql:SELECT 'k0001' AS key", "out5", workers=1)


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("sql:SELECT uid AS key, score FROM 'scores/a.parquet'", BadRowsError, r"no row for the key k\d+ \(30 of 50"),
        ("sql:SELECT uid AS key, NULL::DOUBLE AS score FROM 'scores/*.parquet'", BadRowsError, "is empty or NaN"),
        ("sql:SELECT uid AS key, score FROM 'scores/*.parquet', range(2)", BadRowsError, "occurs more than once"),
        ("sql:SELECT score FROM 'scores/*.parquet'", UsageError, "has no column 'key' to join by; it has score"),
        ("sql:SELECT uid AS key FROM 'scores/*.parquet'", UsageError, "has no column of numbers except keys"),
        ("sql:SELECT uid AS key, * FROM 'scores/*.parquet'", UsageError, "choose one, as in SELECT key, score"),
        ("sql:SELECT 'a/' || uid AS key, 1 AS s FROM 'scores/*.parquet'", BadRowsError, "these differ by a folder"),
        ("sql:SELECT uid AS key, 1 AS key FROM 'scores/*.parquet'", PoolError, "has two columns named 'key'"),
        ("sql:SELECT uid AS key, 1 AS s FROM 'scores/*.parquet' WHERE false", PoolError, "the result has no rows"),
        ("sql:SELECT nothing FROM 'scores/*.parquet'", UsageError, 'Binder Error: Referenced column "nothing"'),
        ("sql:SELECT 1 FROM 'gone/*.parquet'", UsageError, "No files found"),
        ("sql:SELEC 1", UsageError, "Parser Error: syntax error"),
        ("sql:", UsageError, "has no query; give one"),
        ("sql:gone.duckdb:SELECT 1", PoolError, "gone.duckdb: there is no such database"),
        ("sql:pool/pool.db:SELECT 1", UsageError, "valid DuckDB database|not a valid"),
        ("sql:SELECT uid AS key, INTERVAL 1 DAY AS s FROM 'scores/*.parquet'", UsageError, "cannot be used .*cast it"),
    ],
)  # fmt: skip
def test_errors_are_those_of_files_in_one_line(place: Path, source: str, error: type, message: str) -> None:
    (place / "pool" / "pool.db").write_bytes(b"x" * 5_000)
    with pytest.raises(error, match=message) as caught:
        kept(source)
    assert "\n" not in str(caught.value)
    left = os.listdir(Path(os.environ["XDG_CACHE_HOME"]) / "thresher" / "joined") if source != "sql:" else []
    assert not [name for name in left if name.startswith(".spill")]


@pytest.mark.parametrize(
    "query",
    [
        "COPY (SELECT 1) TO 'made.csv'",
        "CREATE TABLE made AS SELECT 1",
        "INSERT INTO clip VALUES ('a', 1, 1)",
        "DELETE FROM clip",
        "DROP TABLE clip",
        "ATTACH 'made.duckdb'",
        "SELECT 1; COPY (SELECT 1) TO 'made.csv'",
        "SET memory_limit = '100GB'",
        "EXPORT DATABASE 'made'",
        "INSTALL httpfs",
        "PRAGMA database_size",
        "EXPLAIN ANALYZE SELECT 1",
        "",
        "-- nothing",
    ],
)
def test_only_one_query_that_reads_is_run(place: Path, query: str) -> None:
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file() and "cache" not in path.parts}
    for location in (f"sql:{query}", f"sql:scores.duckdb:{query}"):
        with pytest.raises(UsageError, match="give one"):
            sql_table(location, str(place / "cache"))
    after = {path: path.read_bytes() for path in place.rglob("*") if path.is_file() and "cache" not in path.parts}
    assert after == before


def test_a_missing_extension_says_what_to_type(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(place))  # where DuckDB keeps extensions
    with pytest.raises(UsageError) as caught:
        sql_table("sql:FROM 'https://127.0.0.1:9/x.parquet'", str(place / "cache"))
    end = (
        """needs the extension httpfs of DuckDB; install it once with: python -c "import duckdb; duckdb.sql('INSTALL """
    )
    assert str(caught.value).endswith(f"""{end}httpfs')\"""")


def test_the_same_result_is_the_same_file(place: Path) -> None:
    scratch = str(place / "cache")
    one = sql_table(ALL, scratch)
    status = os.stat(one.path)
    assert sql_table(ALL, scratch) == one
    assert os.stat(one.path).st_mtime_ns == status.st_mtime_ns
    other = sql_table(f"{ALL} WHERE score > 0.5", scratch)
    assert {Path(one.path).name, Path(other.path).name} == set(os.listdir(place / "cache" / "joined"))


def test_a_long_query_is_ended_by_ctrl_c(place: Path) -> None:
    query = "sql:SELECT count(*) AS score FROM range(10000000) a, range(10000000) b"
    timer = threading.Timer(1.0, lambda: os.kill(os.getpid(), signal.SIGINT))
    begin = time.monotonic()
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            sql_table(query, str(place / "cache"))
    finally:
        timer.cancel()
    assert time.monotonic() - begin < 30
    assert os.listdir(place / "cache" / "joined") == []


def test_a_large_result_is_not_held_in_memory(place: Path) -> None:
    """Counted by what Arrow holds at a time."""
    pool = pa.default_memory_pool()
    before, most = pool.bytes_allocated(), 0
    write = pq.ParquetWriter.write_batch

    def writing(self: Any, batch: Any, *args: Any) -> None:
        nonlocal most
        most = max(most, pool.bytes_allocated() - before, batch.nbytes)
        write(self, batch, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pq.ParquetWriter, "write_batch", writing)
        table = sql_table("sql:SELECT i AS key, i / 3 AS score FROM range(3000000) t(i)", str(place / "cache"))
    assert table.rows == 3_000_000
    assert 0 < most < 16 << 20


def test_other_locations_are_not_sql(place: Path) -> None:
    assert [is_sql(one) for one in ("sql:SELECT 1", "SQL:x", "sql", "sqlite.db", "pool/sql:a", Path("sql:a"))] == [
        True, True, False, False, False, False
    ]  # fmt: skip
