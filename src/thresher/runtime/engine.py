"""Engines run work in parallel: one ordered ``map`` over blocks or groups.

Engines are plug-ins: each is a frozen dataclass in its own file in ``runtime/engines``, or in another package. BLAS
runs single-threaded inside every engine: cache-sized products on one thread per core are faster than one product on
all cores, and the bits of a result do not depend on the number of workers.
"""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any, Generic, Protocol, TypeVar

from thresher.errors import UsageError
from thresher.runtime import parameters
from thresher.runtime.engines.serial import Serial
from thresher.runtime.plugins import PluginPoint

T = TypeVar("T")
R = TypeVar("R")
S = TypeVar("S")

SPAN = 16  # sums that are added up in a row


class Engine(Protocol):
    """Calls a function on every task; yields results in task order, with few tasks in flight.

    The engine decides how the function and the tasks reach the workers: both can be pickled, and a worker need not
    share a file system or memory with this process.
    """

    @property
    def workers(self) -> int:
        """Number of tasks that run at once."""
        ...

    def map(self, fn: Callable[[T], R], tasks: Iterable[T]) -> Iterator[R]:
        """Yield ``fn(task)`` for every task, in order. The function and the tasks must be picklable."""
        ...


class _Made(Generic[S]):
    """A value that the first thread that needs it makes. A copy in another process starts without."""

    def __init__(self) -> None:
        self._value: list[S] = []
        self._lock = threading.Lock()

    def __reduce__(self) -> Any:
        return _Made, ()

    def get(self, make: Callable[[], S]) -> S:
        with self._lock:
            if not self._value:
                self._value.append(make())
            return self._value[0]


@dataclass(frozen=True)
class Stateful(Generic[S, T, R]):
    """A function for :meth:`Engine.map` with a state that every worker makes once, such as a model.

    Calls ``call(state, task)``, with ``state = make(helpers)`` made at the first task of a worker. Threads share one
    state. Every engine takes it as any other function; an engine that can choose what each worker has, such as ray,
    makes workers for it.

    Attributes:
        make: Makes the state, from an engine for the parts of a task.
        call: The function of the state and a task. What it returns must depend on the task alone.
        gpu: Whether a worker can use a GPU.
        helpers: The engine for the parts of a task. Engines whose workers can use others give another one.
    """

    make: Callable[[Engine], S]
    call: Callable[[S, T], R]
    gpu: bool = False
    helpers: Engine = field(default_factory=Serial)
    _state: _Made[S] = field(default_factory=_Made, init=False, repr=False, compare=False)

    def __call__(self, task: T) -> R:
        """Return the result of a task."""
        return self.call(self._state.get(lambda: self.make(self.helpers)), task)


ENGINES: PluginPoint[Engine] = PluginPoint("engine", "thresher.runtime.engines", "thresher.engines", needs=("map",))


def device_of(engine: Engine) -> str:
    """Return where an engine wants products of many rows: its field ``device``, "auto" without one."""
    return str(getattr(engine, "device", "auto"))


def make_engine(name: str = "threads", workers: int | None = None, options: Mapping[str, Any] | None = None) -> Engine:
    """Return an engine by name: serial, threads, processes, ray, or one of another package.

    Args:
        name: Name of the engine, or ``NAME:OPTION=VALUE,OPTION=VALUE``.
        workers: Number of tasks that run at once; by default the number of cores this process may use, or what a
            cluster can run. An engine with a fixed number of workers, such as ``serial`` with 1, ignores it.
        options: Other fields of the engine by name; strings are parsed as the type of the field.

    Raises:
        UsageError: Unknown engine, fewer than one worker, or an option that the engine does not have.
    """
    cls, values = ENGINES.parsed(name)
    kinds = {item.name: parameters.type_of(cls, item.name) for item in parameters.parameters_of(cls)}
    values |= {
        key: parameters.read(kinds[key], value) if key in kinds and isinstance(value, str) else value
        for key, value in (options or {}).items()
    }
    sized = workers is not None or "workers" in values
    if "workers" in kinds:
        values["workers"] = workers if workers is not None else values.get("workers", cores())
    if isinstance(count := values.get("workers", workers), int) and count < 1:
        raise UsageError(f"--workers {count}: at least 1")
    made: Any = parameters.build(cls, f"the engine {name.partition(':')[0]!r}", values)
    engine: Engine = made if sized or not hasattr(made, "of_cluster") else made.of_cluster()
    return engine


class Reduced(Generic[R, S]):
    """The first parts of the results of tasks, in order, to be iterated once; then ``total`` is the sum of the others.

    Attributes:
        total: The sum; None if there were no tasks.
    """

    def __init__(self, made: Generator[R, None, S | None]) -> None:
        """Take a generator that yields the first parts and returns the sum."""
        self.total: S | None = None
        self._made = made

    def __iter__(self) -> Iterator[R]:
        """Yield the first parts."""
        self.total = yield from self._made


def reduced(
    engine: Engine, fn: Callable[[T], tuple[R, S]], tasks: Iterable[T], add: Callable[[S, S], S]
) -> Reduced[R, S]:
    """Return the first part of ``fn(task)`` for every task, in order, and the sum of the second parts.

    Sums are added in a tree that depends only on the number of tasks: 16 in a row, then 16 of these sums, and so on. So
    the bits do not depend on the engine. An engine with a method ``reduce`` adds where the tasks run, and only the last
    sum reaches this process.

    Args:
        engine: The engine.
        fn: Returns what comes in order, and what is added.
        tasks: The tasks.
        add: Adds two sums; may change the first. Must be picklable, like ``fn``.
    """
    own: Callable[..., Generator[R, None, S | None]] = getattr(engine, "reduce", partial(_reduced, engine))
    return Reduced(own(fn, tasks, add))


def _reduced(
    engine: Engine, fn: Callable[[T], tuple[R, S]], tasks: Iterable[T], add: Callable[[S, S], S]
) -> Generator[R, None, S | None]:
    """Add up in this process."""
    tree = SumTree(lambda part: part, add, lambda part: part)
    for kept, part in engine.map(fn, tasks):
        tree.push(part)
        yield kept
    total: S | None = tree.total()
    return total


class SumTree:
    """Adds up parts that arrive in order: ``SPAN`` in a row, then as many of these sums, and so on."""

    def __init__(self, first: Callable[[Any], Any], add: Callable[[Any, Any], Any], end: Callable[[Any], Any]) -> None:
        """Make a tree without parts.

        Args:
            first: Returns the sum that a part begins.
            add: Adds a part to a sum.
            end: Returns a sum as a part of the next level.
        """
        self._first, self._add, self._end = first, add, end
        self._levels: list[tuple[int, Any]] = []  # number of parts, and their sum

    def push(self, part: Any) -> None:
        """Add the next part."""
        for level in count():
            if level == len(self._levels):
                self._levels.append((0, None))
            number, sum_ = self._levels[level]
            sum_ = self._add(sum_, part) if number else self._first(part)
            if number + 1 < SPAN:
                self._levels[level] = (number + 1, sum_)
                return
            self._levels[level] = (0, None)
            part = self._end(sum_)

    def total(self) -> Any:
        """Return the sum of all parts, None if there are none; it uses up the tree."""
        total, some = None, False
        for number, sum_ in self._levels:
            if some:
                sum_ = self._add(sum_, total) if number else self._first(total)
            if some or number:
                total, some = self._end(sum_), True
        return total


def shares_memory(engine: Engine) -> bool:
    """Return whether tasks are used where they are, and not copied to workers: unless the engine says otherwise."""
    return bool(getattr(engine, "shares_memory", True))


def nodes_of(engine: Engine) -> int:
    """Return how many machines the work runs on: 1 unless the engine says otherwise."""
    return int(getattr(engine, "nodes", 1))


def check_files(engine: Engine, files: Callable[[], Iterable[tuple[str, str]]]) -> None:
    """Check that all workers can read local files, if they are on other machines: if the engine has ``check_files``.

    Args:
        engine: The engine.
        files: Returns (protocol, path) of the files.

    Raises:
        UnreachedError: A worker cannot read a file; the message names the file and the machine.
    """
    check = getattr(engine, "check_files", None)
    if check is not None:
        check(path for protocol, path in files() if protocol == "file")


def cores() -> int:
    """Return the number of cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def windowed(pool: Executor, fn: Callable[[T], R], tasks: Iterable[T], window: int) -> Iterator[R]:
    """Yield ``fn(task)`` for every task, in order, using an executor with up to ``window`` tasks in flight."""
    waiting: deque[Future[R]] = deque()
    try:
        for task in tasks:
            with _sigint_blocked():
                waiting.append(pool.submit(fn, task))
            if len(waiting) >= window:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


@contextmanager
def _sigint_blocked() -> Iterator[None]:
    """Block SIGINT, also in processes started inside: one still importing modules would print a traceback on Ctrl-C."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    was = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, was)
