"""What a whole process has once: settings that all threads share, and the process that started it."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import lru_cache
from multiprocessing.process import BaseProcess
from typing import Any

import threadpoolctl


class SharedContext:
    """A context manager that changes a setting of the process, for several threads or generators at once.

    The first that enters changes the setting, and the last that leaves restores it. With a context manager for each,
    one could restore the value that another has set.
    """

    def __init__(self, make: Callable[[], AbstractContextManager[Any]]) -> None:
        """Store the function that makes the context manager of the setting."""
        self._make = make
        self._changing = threading.RLock()  # garbage collection may end a generator here
        self._inside = 0
        self._held: AbstractContextManager[Any] | None = None

    def __enter__(self) -> None:
        """Change the setting, unless it is changed already."""
        with self._changing:
            if not self._inside:
                self._held = self._make()
                self._held.__enter__()
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        """Restore the setting when nothing else needs it changed."""
        with self._changing:
            self._inside -= 1
            if not self._inside and self._held is not None:
                self._held.__exit__(None, None, None)
                self._held = None


def thread_pools() -> threadpoolctl.ThreadpoolController:
    """Return the thread pools of the libraries that are loaded.

    To find them takes milliseconds, as every library of the process is looked at, so that is done again only if
    modules were imported since.
    """
    return _thread_pools(len(sys.modules))


@lru_cache(maxsize=1)
def _thread_pools(modules: int) -> threadpoolctl.ThreadpoolController:
    return threadpoolctl.ThreadpoolController()


def matrix_kernels() -> list[str]:
    """Return the names of the matrix kernels in use; the last bits of a product depend on them."""
    return sorted({info.get("architecture", "") for info in thread_pools().info()} - {""})


# Results must not depend on the number of cores. Only BLAS: OpenMP has a limit per thread, not per process.
one_blas_thread = SharedContext(lambda: thread_pools().limit(limits=1, user_api="blas"))

no_warnings = SharedContext(lambda: warnings.catch_warnings(action="ignore"))


def end_with_parent(_: int = 0) -> None:
    """End this process when the process that started it ends, even if that is killed, or was before this call.

    Call it in a process started by :mod:`multiprocessing`; it is an initializer of executors and a ``worker_init_fn``
    of loaders.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_after, args=(parent,), name="waits for the parent", daemon=True).start()


def _end_after(parent: BaseProcess) -> None:
    parent.join()  # a pipe that the parent holds open: its number may be that of another process by now
    os._exit(1)
