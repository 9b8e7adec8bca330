"""DuckDB queries that Ctrl-C, SIGTERM or a time limit can stop.

While DuckDB evaluates a query, Python cannot handle signals. So the query runs in a thread of its own, and the calling
thread waits for it and handles signals at once.
"""

from __future__ import annotations

import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")

_POLL = 0.5  # seconds; on Windows a wait without a limit cannot be interrupted
_INTERRUPTED = re.compile(r"^Query interrupted$|failed: KeyboardInterrupt:?\s*$")  # the whole text, or its end
_GRACE = 10.0  # seconds to wait for a query that was asked to stop


class QueryTimeout(Exception):
    """A query took longer than its time limit."""


@contextmanager
def signals_kept() -> Iterator[None]:
    """Raise KeyboardInterrupt where DuckDB made an error of its own of it.

    That happens when a signal comes during a query in this thread, or while DuckDB reads the schema of Arrow data.
    """
    import duckdb

    try:
        yield
    except (RuntimeError, duckdb.Error) as error:
        if _INTERRUPTED.search(str(error)):
            raise KeyboardInterrupt from None
        raise


def interruptible(connection: Any, query: Callable[[], T], *, seconds: float | None = None) -> T:
    """Return ``query()``, a function that uses a DuckDB connection; stop it on a signal or after a time limit.

    Args:
        connection: The DuckDB connection or cursor that the function uses. No other thread may use it meanwhile.
        query: The function. It runs in another thread, so it must fetch its results itself.
        seconds: Time limit, None for no limit.

    Raises:
        QueryTimeout: The time limit is exceeded.
        BaseException: What the function raises, or what a signal handler raises, such as KeyboardInterrupt.
    """
    values: list[T] = []
    errors: list[BaseException] = []
    done = threading.Event()

    def run() -> None:
        if hasattr(signal, "pthread_sigmask"):  # signals are for the thread that waits
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        try:
            values.append(query())
        except BaseException as error:  # raised again in the calling thread
            errors.append(error)
        finally:
            done.set()

    end = None if seconds is None else time.monotonic() + seconds
    thread = threading.Thread(target=run, name="duckdb query", daemon=True)
    try:
        thread.start()
        while not done.wait(_POLL if end is None else max(min(_POLL, end - time.monotonic()), 0)):
            if end is not None and time.monotonic() >= end:
                raise QueryTimeout(f"the query took longer than {seconds:g} s")
    except BaseException:
        _stop(connection, thread)
        raise
    if errors:
        raise errors[0]
    return values[0]


def _stop(connection: Any, thread: threading.Thread) -> None:
    """Ask a query to stop until it does: a request before the query has begun is lost."""
    end = time.monotonic() + _GRACE
    while thread.is_alive() and time.monotonic() < end:
        connection.interrupt()
        thread.join(0.05)
