from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import duckdb
import pytest

from thresher.runtime.duckdb_query import QueryTimeout, interruptible

ENDLESS = "SELECT sum(a.range * b.range) FROM range(100000000) a, range(100000000) b"


@pytest.fixture
def db():
    with duckdb.connect(config={"threads": 1}) as connection:
        yield connection


def test_it_returns_what_the_query_returns(db) -> None:
    assert interruptible(db, lambda: db.execute("SELECT 6 * 7").fetchall()) == [(42,)]
    assert interruptible(db, lambda: db.execute("SELECT 6 * 7").fetchall(), seconds=60) == [(42,)]


def test_it_raises_what_the_query_raises(db) -> None:
    with pytest.raises(duckdb.Error, match="no_such_table"):
        interruptible(db, lambda: db.execute("SELECT * FROM no_such_table").fetchall())
    with pytest.raises(ZeroDivisionError):
        interruptible(db, lambda: 1 // 0)


def test_a_time_limit_ends_a_query_and_the_connection_can_be_used_again(db) -> None:
    before = threading.active_count()
    with pytest.raises(QueryTimeout, match=r"0\.2 s"):
        interruptible(db, lambda: db.execute(ENDLESS).fetchall(), seconds=0.2)
    assert threading.active_count() == before
    assert db.execute("SELECT 1").fetchall() == [(1,)]


@pytest.mark.skipif(os.name == "nt", reason="no SIGTERM")
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_signal_ends_a_query(sent, threads) -> None:
    script = f"""
import signal, sys, threading, duckdb
from thresher.runtime.duckdb_query import interruptible
def stop(number, frame):
    raise KeyboardInterrupt
signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGINT, stop)
with duckdb.connect(config={{"threads": {threads}}}) as db:
    def query():
        print("begun", flush=True)
        db.execute({ENDLESS!r}).fetchall()
    try:
        interruptible(db, query)
    except KeyboardInterrupt:
        print(db.execute("SELECT 42").fetchall()[0][0], threading.active_count())
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    process.send_signal(sent)
    out, _ = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, "42 1\n")
