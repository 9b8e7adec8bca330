"""Worker threads in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import ClassVar, TypeVar

from thresher.runtime.engine import windowed
from thresher.runtime.process import one_blas_thread

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Threads:
    """Worker threads in this process: NumPy and BLAS release the GIL, and nothing is copied."""

    name: ClassVar[str] = "threads"

    workers: int
    device: str = field(default="auto", metadata={"help": "where products of many rows are computed: cpu, cuda"})

    def map(self, fn: Callable[[T], R], tasks: Iterable[T]) -> Iterator[R]:
        """Yield ``fn(task)`` for every task, in order."""
        with one_blas_thread, ThreadPoolExecutor(self.workers) as pool:
            yield from windowed(pool, fn, tasks, self.workers + 2)
