"""The engine with which an actor has parts of its tasks done."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar, TypeVar

from thresher.runtime.ray.carriers import Tasks
from thresher.runtime.ray.flight import Flight

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Helpers:
    """The engine of an actor for parts of its tasks: workers on CPUs that no actor has reserved, its own node's first.

    Attributes:
        workers: Number of parts at once.
        retries: How many times a part is run again if its worker is lost.
        bound: Whether only its own node is used.
        share: Of the object store that parts and results may take, up to 1.
    """

    name: ClassVar[str] = "ray"
    shares_memory: ClassVar[bool] = False

    workers: int
    retries: int
    bound: bool
    share: float

    def map(self, fn: Callable[[T], R], tasks: Iterable[T]) -> Iterator[R]:
        """Yield ``fn(task)`` for every task, in order."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = ray.get_runtime_context().get_node_id()
        # "soft" alone would wait for this node as long as it lives.
        near = NodeAffinitySchedulingStrategy(here, soft=not self.bound, _spill_on_unavailable=not self.bound)
        carriers = Tasks({"num_cpus": 1}, self.retries, {"scheduling_strategy": near})
        expected = operator.length_hint(tasks, 0)
        yield from Flight(carriers, fn, self.workers, expected, self.share).run(tasks)
