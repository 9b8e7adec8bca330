"""Tasks run in the calling thread, without workers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import ClassVar, TypeVar

from thresher.runtime.process import one_blas_thread

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Serial:
    """Runs one task after another in the calling thread."""

    name: ClassVar[str] = "serial"

    workers: int = field(default=1, init=False)
    device: str = field(default="auto", metadata={"help": "where products of many rows are computed: cpu, cuda"})

    def map(self, fn: Callable[[T], R], tasks: Iterable[T]) -> Iterator[R]:
        """Yield ``fn(task)`` for every task, in order."""
        with one_blas_thread:
            for task in tasks:
                yield fn(task)
