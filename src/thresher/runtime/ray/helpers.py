"""The engine with which an actor has parts of its tasks done."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, TypeVar

from thresher.runtime.engine import Engine
from thresher.runtime.engines.serial import Serial
from thresher.runtime.ray.carriers import How, Parts
from thresher.runtime.ray.cluster import alive_nodes, bytes_in_flight, check_left
from thresher.runtime.ray.flight import Flight
from thresher.runtime.ray.needs import Needs

T = TypeVar("T")
R = TypeVar("R")


def helpers_of(actors: int, needs: Needs, retries: int) -> Engine:
    """Return the engine with which each of some actors has parts of its tasks done, on CPUs that no actor has reserved.

    Args:
        actors: Number of actors.
        needs: What an actor needs.
        retries: How many times a part is run again if its worker is lost.
    """
    nodes = [node for node in alive_nodes() if needs.uses(node)]
    free = sum(node["Resources"].get("CPU", 0) for node in nodes) - actors * needs.cpus
    each = int(free // actors)
    together = max(1, min(actors, max(map(needs.capacity, nodes), default=1)))  # on a node
    return Helpers(each, retries, needs.is_bound, 1 / together) if each > 0 else Serial()


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

        here = ray.get_runtime_context().get_node_id()
        options = {"num_cpus": 1, "scheduling_strategy": _at(here, self.bound)}
        carriers = Parts(fn, How(options, self.retries, partial(check_left, Needs())))
        expected = operator.length_hint(tasks, 0)
        yield from Flight(carriers, self.workers, expected, bytes_in_flight(self.share)).run(tasks)


def _at(node: str, bound: bool) -> Any:
    """Return what has Ray run a task on a node, or on another one if that has no CPU free and the task is not bound."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    if bound:
        return NodeAffinitySchedulingStrategy(node, soft=False)
    try:
        # Ray has no stable public option for this: "soft" alone waits for this node as long as it lives, and so may a
        # fallback_strategy; the strategy for node labels is an alpha.
        return NodeAffinitySchedulingStrategy(node, soft=True, _spill_on_unavailable=True)
    except TypeError:  # a version without the private option
        return "DEFAULT"
