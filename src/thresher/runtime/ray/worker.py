"""What runs in the workers of Ray: it reads the function once, and runs tasks with one BLAS thread."""

from __future__ import annotations

import functools
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import threadpoolctl

from thresher.runtime.ray.packing import Packed, pack, portable, unpack

_LONG = 1.0  # seconds after which a group starts no other task: others can do the rest


@dataclass(frozen=True)
class Done:
    """Results of the first tasks of a group, up to one that raised or until they took too long.

    Attributes:
        results: The results.
        error: Returns the error of the task after them, None if it raised none.
        seconds: What the tasks took.
    """

    results: list[Any]
    error: Callable[[], BaseException] | None
    seconds: float


def place() -> tuple[str, list[str]]:
    """Return the current folder and the module search path, which workers use too, as far as they exist there."""
    return os.getcwd(), [path for path in sys.path if path]


def call(held: list[Any], packed: Packed) -> Packed:
    """Run some tasks, one after the other, up to the first that raises, or for a second."""
    return _run(partial(_function, held[0]), packed)


class Kept:
    """An actor: a worker of one map, which keeps the function and its state."""

    def __init__(self) -> None:
        """Load nothing yet."""
        self._function: Any = None

    def start(self) -> None:
        """Return once the actor has started."""

    def call(self, held: list[Any], packed: Packed) -> Packed:
        """Run some tasks, one after the other, up to the first that raises, or for a second."""
        return _run(partial(self._loaded, held[0]), packed)

    def _loaded(self, held: Any) -> Any:
        if self._function is None:
            self._function = _load(held)
        return self._function


def _run(load: Callable[[], Callable[[Any], Any]], packed: Packed) -> Packed:
    done = _done(load, packed)
    try:
        return pack(done)
    except Exception as error:  # a result cannot be pickled
        return pack(Done([], portable(error), done.seconds))


def call_apart(held: list[Any], packed: Packed) -> tuple[Packed, Packed | None]:
    """Run a task that returns a pair; return the parts apart."""
    done = _done(partial(_function, held[0]), packed)
    try:
        (kept, part) = done.results[0] if done.results else (None, None)
        return pack(replace(done, results=[kept] if done.results else [])), pack(part)
    except Exception as error:  # a result cannot be pickled
        return pack(Done([], portable(error), done.seconds)), None


def add_up(held: list[Any], *parts: Packed) -> Packed:
    """Add up parts of results, in order."""
    return pack(functools.reduce(_function(held[0]), map(unpack, parts)))


def _done(load: Callable[[], Callable[[Any], Any]], packed: Packed) -> Done:
    results: list[Any] = []
    failed: Callable[[], BaseException] | None = None
    begin = time.perf_counter()
    try:
        fn, tasks = load(), unpack(packed)
        begin = time.perf_counter()
        for task in tasks:
            results.append(fn(task))
            if time.perf_counter() - begin > _LONG:
                break
    except KeyboardInterrupt:  # the task was cancelled
        raise
    except BaseException as error:
        failed = portable(error)
    return Done(results, failed, time.perf_counter() - begin)


@lru_cache(maxsize=2)
def _function(held: Any) -> Any:
    """Return the function of a map; each worker loads it once."""
    return _load(held)


def _load(held: Any) -> Any:
    import ray

    place, packed = ray.get(held)
    _begin(*place)
    return unpack(packed, shared=True)


def packed_call(place: tuple[str, list[str]], fn: Callable[[Any], Any], packed: Packed) -> Packed:
    """Return what a function returns here."""
    _begin(*place)
    return pack(fn(unpack(packed)))


@lru_cache(maxsize=1)
def _begin_in(folder: str) -> None:
    with suppress(OSError):  # another machine may not have it
        os.chdir(folder)


def _begin(folder: str, path: list[str]) -> None:
    """Work in the folder of the driver and with its modules, as far as they exist here, with one BLAS thread."""
    _begin_in(folder)
    sys.path += [one for one in path if one not in sys.path and os.path.exists(one)]
    _one_thread()


@lru_cache(maxsize=1)
def _one_thread() -> Any:
    import numpy  # noqa: F401 - BLAS must be loaded to be limited

    return threadpoolctl.threadpool_limits(1)
