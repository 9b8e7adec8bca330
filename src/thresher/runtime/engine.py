"""Where work runs: one ordered ``map`` over blocks or groups.

Engines are plug-ins: a frozen dataclass in a file of its own in ``runtime/engines``, or in another package. BLAS runs
single-threaded inside every engine: cache-sized products on one thread a core are faster than one product on all cores,
and the bits of a result do not depend on how many workers there are.
"""

from __future__ import annotations

import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

from thresher.errors import UsageError
from thresher.runtime import parameters
from thresher.runtime.plugins import PluginPoint

T = TypeVar("T")
R = TypeVar("R")


class Engine(Protocol):
    """Calls a function on every task; results come back in task order, few tasks in flight.

    How function and tasks reach the workers is up to the engine: they pickle, and a worker need not share a file system
    or memory with this process.
    """

    @property
    def workers(self) -> int:
        """How many tasks run at once."""
        ...

    def map(self, fn: Callable[[T], R], tasks: Iterable[T]) -> Iterator[R]:
        """Yield ``fn(task)`` for every task, in order. Functions and tasks must pickle."""
        ...


ENGINES: PluginPoint[Engine] = PluginPoint("engine", "thresher.runtime.engines", "thresher.engines", needs=("map",))


def make_engine(name: str = "threads", workers: int | None = None, options: Mapping[str, Any] | None = None) -> Engine:
    """Return an engine by name: serial, threads, processes, or one of another package.

    Args:
        name: Which.
        workers: How many tasks at once; by default the cores this process may use. An engine that has a number of its
            own, as ``serial`` has 1, keeps it.
        options: Other fields of the engine by name; text is read as the type of the field.

    Raises:
        UsageError: No such engine, no workers, or an option that the engine does not have.
    """
    cls = ENGINES.find(name)
    if workers is not None and workers < 1:
        raise UsageError(f"--workers {workers}: at least 1")
    given = dict(options or {})
    kinds = {item.name: parameters.type_of(cls, item.name) for item in parameters.parameters_of(cls)}
    given |= {
        key: parameters.read(kinds[key], text) for key, text in given.items() if key in kinds and isinstance(text, str)
    }
    if "workers" in kinds:
        given["workers"] = workers or cores()
    return parameters.build(cls, f"engine {name}", given)


def cores() -> int:
    """Return the number of cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def windowed(pool: Executor, fn: Callable[[T], R], tasks: Iterable[T], window: int) -> Iterator[R]:
    """Yield ``fn(task)`` for every task, in order, by an executor that has up to ``window`` of them at a time."""
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
