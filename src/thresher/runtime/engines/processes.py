"""Worker processes on this machine.

The function of a ``map`` is written to a file once and read by every worker; sent with the tasks, it would be copied
with each of them. The file is in a private folder that no other user can read; a lock marks the folder as in use.
"""

from __future__ import annotations

import os
import pickle
import secrets
import signal
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache, partial
from multiprocessing import current_process, get_context
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import threadpoolctl

from thresher.errors import ThresherError, UsageError
from thresher.runtime.engine import windowed
from thresher.runtime.locks import Scratch, scratch_folder
from thresher.runtime.process import end_with_parent

T = TypeVar("T")
R = TypeVar("R")

_PREFIX = "thresher-tasks-"
_BEGUN = "begun"  # file of the folder: a worker has started


class _Pool:
    """The processes of an engine and their folder, None before the first task. A copy starts without them."""

    def __init__(self) -> None:
        self.executor: ProcessPoolExecutor | None = None
        self.folder: Scratch | None = None
        self._remove: Callable[[], Any] | None = None

    def __reduce__(self) -> Any:
        return _Pool, ()

    def open(self, workers: int) -> tuple[ProcessPoolExecutor, Path]:
        """Return the processes and the folder for their functions; start them if they are not running."""
        if self.folder is None:
            self.folder = scratch_folder(tempfile.gettempdir(), _PREFIX, mode=0o700)
            self._remove = weakref.finalize(self, _remove, self.folder, os.getpid())  # also at exit
        if self.executor is None:
            context = get_context("spawn")
            begin = (os.getcwd(), str(self.folder.path / _BEGUN))
            self.executor = ProcessPoolExecutor(workers, context, initializer=_begin_worker, initargs=begin)
        return self.executor, self.folder.path

    def close(self) -> None:
        if self.executor is not None:
            self.executor.shutdown(cancel_futures=True)
        if self._remove is not None:
            self._remove()
        self.executor = self.folder = self._remove = None


@dataclass(frozen=True)
class Processes:
    """Worker processes on this machine, spawned (no forked locks) and kept; tasks and results are copied."""

    name: ClassVar[str] = "processes"
    shares_memory: ClassVar[bool] = False

    workers: int
    device: str = field(default="auto", metadata={"help": "where products of many rows are computed: cpu, cuda"})
    _pool: _Pool = field(default_factory=_Pool, init=False, repr=False, compare=False)

    def map(self, fn: Callable[[T], R], tasks: Iterable[T]) -> Iterator[R]:
        """Yield ``fn(task)`` for every task, in order. The function is sent once, not with every task."""
        if getattr(current_process(), "_inheriting", False):
            raise SystemExit(1)  # a worker that imports a script, which would start workers again; the parent says why
        executor, folder = self._pool.open(self.workers)
        path = folder / f"{secrets.token_hex(8)}.task"
        try:
            with open(path, "xb") as file:
                pickle.dump(fn, file)
            yield from windowed(executor, partial(_call, str(path)), tasks, self.workers + 2)
        except BrokenProcessPool:
            self._pool.executor = None
            if not (folder / _BEGUN).exists():
                raise UsageError(
                    "the worker processes do not start: in a script, what starts them goes below the line "
                    'if __name__ == "__main__": because every worker imports the script; or give workers=0'
                ) from None
            raise ThresherError(
                "a worker process was killed, perhaps because it ran out of memory; use fewer --workers or, if the "
                "command has that option, --engine threads"
            ) from None
        finally:
            path.unlink(missing_ok=True)  # close() may have removed the whole folder

    def close(self) -> None:
        """Stop the processes. A process that is itself a worker must call this: at its own exit it is too late."""
        self._pool.close()


def _remove(folder: Scratch, owner: int) -> None:
    if os.getpid() == owner:  # not in a forked copy of the process
        folder.remove()


def _call(path: str, task: Any) -> Any:
    return _function(path)(task)


@lru_cache(maxsize=2)
def _function(path: str) -> Any:
    """Load the function from the file that the parent process wrote; never a file of a user."""
    with open(path, "rb") as file:
        try:
            return pickle.load(file)  # noqa: S301
        except ModuleNotFoundError:  # of the user's own module in the current folder, which the parent found there
            if os.getcwd() in sys.path:
                raise
            sys.path.append(os.getcwd())
            file.seek(0)
            return pickle.load(file)  # noqa: S301


def _begin_worker(folder: str, begun: str) -> None:
    """Work in the current folder of the parent, with one BLAS thread, and end with the parent."""
    end_with_parent()
    Path(begun).touch()
    import numpy  # noqa: F401 - BLAS must be loaded to be limited

    with suppress(OSError):
        os.chdir(folder)
    threadpoolctl.threadpool_limits(1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C reaches the workers too; the parent reports it
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
