"""Processes of this machine.

The function of a ``map`` is written to a file once, and read by every worker: sent with the tasks, it would be copied
with each. The file is in a folder of this engine's own that no other user can read. A lock on the folder tells other
processes that it is in use; the number of a process would not, as containers may share ``/tmp`` but no numbers.
"""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import threadpoolctl

from thresher.errors import ThresherError
from thresher.runtime.engine import windowed

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

T = TypeVar("T")
R = TypeVar("R")

_PREFIX = "thresher-tasks-"
_YOUNG = 60.0  # seconds in which a folder may not be locked yet


class _Pool:
    """The processes of an engine and their folder, None before the first task. A copy has none yet."""

    def __init__(self) -> None:
        self.executor: ProcessPoolExecutor | None = None
        self.folder: Path | None = None
        self._remove: Callable[[], Any] | None = None

    def __reduce__(self) -> Any:
        return _Pool, ()

    def open(self, workers: int) -> tuple[ProcessPoolExecutor, Path]:
        """Return the processes, and the folder for their functions; start them if there are none."""
        if self.folder is None:
            _sweep()
            self.folder = Path(tempfile.mkdtemp(prefix=_PREFIX))  # for this user alone
            lock = _locked(self.folder)
            self._remove = weakref.finalize(self, _remove, self.folder, lock, os.getpid())  # at exit, too
        if self.executor is None:
            self.executor = ProcessPoolExecutor(workers, get_context("spawn"), initializer=_begin_worker)
        return self.executor, self.folder

    def close(self) -> None:
        if self.executor is not None:
            self.executor.shutdown(cancel_futures=True)
        if self._remove is not None:
            self._remove()
        self.executor = self.folder = self._remove = None


@dataclass(frozen=True)
class Processes:
    """Processes of this machine, started afresh (no forked locks) and kept; tasks and results are copied."""

    name: ClassVar[str] = "processes"

    workers: int
    _pool: _Pool = field(default_factory=_Pool, init=False, repr=False, compare=False)

    def map(self, fn: Callable[[T], R], tasks: Iterable[T]) -> Iterator[R]:
        """Yield ``fn(task)`` for every task, in order. The function travels once, not with every task."""
        executor, folder = self._pool.open(self.workers)
        with tempfile.NamedTemporaryFile(dir=folder, suffix=".task") as file:
            pickle.dump(fn, file)
            file.flush()
            try:
                yield from windowed(executor, partial(_call, file.name), tasks, self.workers + 2)
            except BrokenProcessPool:
                self._pool.executor = None
                raise ThresherError(
                    "a worker process was killed, perhaps for its memory; use fewer --workers, or, where there is that "
                    "option, --engine threads"
                ) from None

    def close(self) -> None:
        """End the processes, as one has to that is itself a worker: it would end before it had told them to."""
        self._pool.close()


def _locked(folder: Path) -> int | None:
    """Lock a folder until this process ends, however it ends; None where there are no such locks."""
    descriptor = None
    if fcntl is not None:
        descriptor = os.open(folder, os.O_RDONLY)
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return descriptor


def _remove(folder: Path, lock: int | None, owner: int) -> None:
    if os.getpid() != owner:  # a forked copy of the process: the folder is not its own
        return
    shutil.rmtree(folder, ignore_errors=True)
    if lock is not None:
        os.close(lock)


def _sweep() -> None:
    """Remove the folders of this user whose processes were killed: those that nobody has locked."""
    for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*") if fcntl is not None else ():
        with suppress(OSError):
            about = path.lstat()
            if about.st_uid != os.getuid() or time.time() - about.st_mtime < _YOUNG:
                continue
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(descriptor)


def _call(path: str, task: Any) -> Any:
    return _function(path)(task)


@lru_cache(maxsize=2)
def _function(path: str) -> Any:
    """Load this program's own function from the file its parent process wrote; never a user's file."""
    with open(path, "rb") as file:
        return pickle.load(file)  # noqa: S301


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
