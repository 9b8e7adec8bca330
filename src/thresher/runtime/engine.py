"""Where work runs: one ordered ``map`` over blocks or groups.

BLAS runs single-threaded inside every engine: cache-sized products on one thread a core are faster
than one product on all cores, and the bits of a result do not depend on how many workers there are.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import threadpoolctl

from thresher.errors import ThresherError, UsageError, suggest
from thresher.runtime.locks import alive

T = TypeVar("T")
R = TypeVar("R")


class Engine(Protocol):
    """Calls a function on every task; results come back in task order, few tasks in flight."""

    @property
    def workers(self) -> int:
        """How many tasks run at once."""
        ...

    def map(self, fn: Callable[[T], R], tasks: Iterable[T]) -> Iterator[R]:
        """Yield ``fn(task)`` for every task, in order. Functions and tasks must pickle."""
        ...


@dataclass(frozen=True)
class Serial:
    """One task after the other, in this thread."""

    workers: int = 1

    def map(self, fn: Callable[[T], R], tasks: Iterable[T]) -> Iterator[R]:
        """Yield ``fn(task)`` for every task, in order."""
        with threadpoolctl.threadpool_limits(1):
            for task in tasks:
                yield fn(task)


@dataclass(frozen=True)
class Threads:
    """Threads of this process: NumPy and BLAS release the interpreter lock, nothing is copied."""

    workers: int

    def map(self, fn: Callable[[T], R], tasks: Iterable[T]) -> Iterator[R]:
        """Yield ``fn(task)`` for every task, in order."""
        with threadpoolctl.threadpool_limits(1), ThreadPoolExecutor(self.workers) as pool:
            yield from _windowed(pool, fn, tasks, self.workers + 2)


class Processes:
    """Processes of this machine, started afresh (no forked locks) and kept; tasks and results are copied."""

    def __init__(self, workers: int) -> None:
        """Remember the number; processes start with the first task."""
        self.workers = workers
        self._pool: ProcessPoolExecutor | None = None
        for path in Path(tempfile.gettempdir()).glob("thresher-*-*.task"):  # left by a parent that was killed
            parent = path.name.split("-")[1]
            if parent.isdecimal() and not alive(int(parent)):
                path.unlink(missing_ok=True)

    def map(self, fn: Callable[[T], R], tasks: Iterable[T]) -> Iterator[R]:
        """Yield ``fn(task)`` for every task, in order. The function travels once, not with every task."""
        if self._pool is None:
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self.workers, context, initializer=_begin_worker)
        with tempfile.NamedTemporaryFile(prefix=f"thresher-{os.getpid()}-", suffix=".task") as file:
            pickle.dump(fn, file)
            file.flush()
            try:
                yield from _windowed(self._pool, partial(_call, file.name), tasks, self.workers + 2)
            except BrokenProcessPool:
                self._pool = None
                raise ThresherError(
                    "a worker process was killed, perhaps for its memory; use fewer --workers, or, where there is that "
                    "option, --engine threads"
                ) from None

    def close(self) -> None:
        """End the processes, as one has to that is itself a worker: it would end before it had told them to."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None


def _call(path: str, task: Any) -> Any:
    return _function(path)(task)


@lru_cache(maxsize=2)
def _function(path: str) -> Any:
    """Load this program's own function from the file its parent process wrote; never a user's file."""
    with open(path, "rb") as file:
        return pickle.load(file)  # noqa: S301


def make_engine(name: str = "threads", workers: int | None = None) -> Engine:
    """Return an engine by name: serial, threads or processes.

    Args:
        name: Which.
        workers: How many tasks at once; by default the cores this process may use.
    """
    engines: dict[str, Callable[[int], Engine]] = {
        "serial": lambda _: Serial(),
        "threads": Threads,
        "processes": Processes,
    }
    if name not in engines:
        raise UsageError(f"no engine {name!r}; there are {', '.join(engines)}.{suggest(name, engines)}")
    if workers is not None and workers < 1:
        raise UsageError(f"--workers {workers}: at least 1")
    return engines[name](workers or cores())


def cores() -> int:
    """Return the number of cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _windowed(pool: Executor, fn: Callable[[T], R], tasks: Iterable[T], window: int) -> Iterator[R]:
    waiting: deque[Future[R]] = deque()
    try:
        for task in tasks:
            with _undisturbed():
                waiting.append(pool.submit(fn, task))
            if len(waiting) >= window:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Hold Ctrl-C back, in the processes begun meanwhile too: one that is still loading modules would tell of it."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    was = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, was)


def _begin_worker() -> None:
    """Limit BLAS to one thread and end with the parent, which may be killed without a word."""
    import numpy  # noqa: F401 - BLAS must be loaded to be limited

    threadpoolctl.threadpool_limits(1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C reaches the workers too; its parent tells of it
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)
