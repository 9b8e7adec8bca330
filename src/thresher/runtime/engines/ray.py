"""Workers of Ray, on this machine or on the nodes of a cluster; only Ray's core is used.

The function of a ``map`` is put into Ray's object store once, and each worker reads it once. Short tasks are sent
together. Whatever Ray does again because a worker or a node was lost gives the same result, because tasks are functions
of their arguments.

A function with a state, such as a model, gets actors: workers that belong to one ``map``. They hand out parts of their
tasks, such as images to decode, to CPUs that no actor has reserved.
"""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Any, ClassVar, TypeVar

from thresher.errors import MissingExtraError, UsageError, installed
from thresher.runtime import parameters
from thresher.runtime.engine import Stateful
from thresher.runtime.parameters import Reads
from thresher.runtime.ray.carriers import Actors, How, Tasks
from thresher.runtime.ray.cluster import alive_nodes, bytes_in_flight, check_left, environment, on_every_node
from thresher.runtime.ray.connection import Connection
from thresher.runtime.ray.files import check_readable, size_on_disk, unreadable
from thresher.runtime.ray.flight import Flight
from thresher.runtime.ray.helpers import helpers_of
from thresher.runtime.ray.needs import Needs
from thresher.runtime.ray.sums import Sums

T = TypeVar("T")
R = TypeVar("R")
S = TypeVar("S")


def _amounts(text: str) -> dict[str, float]:
    """Parse ``NAME=AMOUNT``, several of them separated by ``+``."""
    amounts = {}
    for one in filter(None, text.split("+")):
        name, _, amount = one.partition("=")
        value = parameters.from_text(float, amount)
        if not name or not isinstance(value, float) or not math.isfinite(value):
            raise UsageError(f"cannot read {text[:100]!r}; write NAME=AMOUNT, several of them separated by +")
        amounts[name] = value
    return amounts


@dataclass(frozen=True)
class Ray:
    """Workers of Ray: processes on this machine, or on the nodes of a cluster that is already running.

    Without an address, and without the variable ``RAY_ADDRESS``, Ray starts on this machine at the first task and stops
    with :meth:`close`, or at the end of the process. If the process already uses Ray, that is used.

    Attributes:
        workers: Number of tasks that run at once.
        address: "auto" (the cluster that this machine belongs to), "HOST:PORT" or "ray://HOST:PORT"; "" to start Ray.
        num_cpus: CPUs that Ray reserves for a task; BLAS uses one thread in any case.
        num_gpus: GPUs that Ray reserves for a task; by default 1 with device "cuda", or for a worker with a model if a
            node has a GPU, else 0.
        resources: Other resources of Ray that a task needs, by name.
        retries: How many times a task is run again if its worker or node is lost; an error of the task itself is
            raised at once.
        device: Where a task computes products of many rows: "cuda" is a GPU that Ray reserves for it.

    Raises:
        MissingExtraError: Ray is not installed.
        UsageError: A number is negative.
    """

    name: ClassVar[str] = "ray"
    shares_memory: ClassVar[bool] = False

    workers: int
    address: str = field(
        default="", metadata={"help": "cluster: auto, HOST:PORT or ray://HOST:PORT (default: Ray starts here)"}
    )
    num_cpus: float = field(default=1.0, metadata={"help": "CPUs that Ray reserves for a task"})
    num_gpus: float | None = field(
        default=None,
        metadata={"help": "GPUs that Ray reserves for a task (default: 1 with device cuda, or for a model, else 0)"},
    )
    resources: Annotated[Mapping[str, float], Reads(_amounts, "NAME=AMOUNT")] = field(
        default_factory=dict, metadata={"help": "other resources of Ray that a task needs: NAME=AMOUNT+NAME=AMOUNT"}
    )
    retries: int = field(default=3, metadata={"help": "times that a task of a lost worker or node is run again"})
    device: str = field(default="auto", metadata={"help": "where products of many rows are computed: cpu, cuda"})
    _connection: Connection = field(default_factory=Connection, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Validate the fields."""
        for name in ("num_cpus", "num_gpus", "retries"):
            if (getattr(self, name) or 0) < 0:
                raise UsageError(f"engine ray: {name} = {getattr(self, name):g}: at least 0")
        if any(amount < 0 for amount in self.resources.values()):
            raise UsageError(f"engine ray: resources = {dict(self.resources)}: at least 0 each")
        if not installed("ray"):
            raise MissingExtraError("the engine ray", "ray")

    def of_cluster(self) -> Ray:
        """Return this engine with as many workers as the nodes of its cluster can run at once; if local, unchanged."""
        if self._is_local():
            return self
        needs = self._connected()
        engine = replace(self, workers=sum(map(needs.capacity, alive_nodes())))
        object.__setattr__(engine, "_connection", self._connection)
        return engine

    @property
    def nodes(self) -> int:
        """Number of nodes that can run tasks, 1 if Ray starts on this machine."""
        if self._is_local():
            return 1
        needs = self._connected()
        return sum(1 for node in alive_nodes() if needs.capacity(node))

    def map(self, fn: Callable[[T], R], tasks: Iterable[T]) -> Iterator[R]:
        """Yield ``fn(task)`` for every task, in order. The function is sent once, not with every task.

        Raises:
            ThresherError: A worker was lost too often, for example because memory ran out.
            UsageError: No node has what a task needs.
        """
        needs, expected = self._connected(), operator.length_hint(tasks, 0)
        if not isinstance(fn, Stateful):
            carriers = Tasks(fn, self._how(needs))
            yield from Flight(carriers, self.workers, expected, bytes_in_flight()).run(tasks)
            return
        if fn.gpu and self.num_gpus is None and any(node["Resources"].get("GPU", 0) >= 1 for node in alive_nodes()):
            needs = replace(needs, gpus=1.0)
        count = max(1, min(self.workers, sum(map(needs.capacity, alive_nodes())), expected or self.workers))
        actors = Actors(replace(fn, helpers=helpers_of(count, needs, self.retries)), self._how(needs), count)
        yield from Flight(actors, count, expected, bytes_in_flight()).run(tasks)

    def reduce(
        self, fn: Callable[[T], tuple[R, S]], tasks: Iterable[T], add: Callable[[S, S], S]
    ) -> Generator[R, None, S | None]:
        """Yield the first part of ``fn(task)`` for every task, in order, and return the sum of the second parts.

        The second parts stay where they were made, and workers add them up, in the tree of
        :func:`~thresher.runtime.engine.reduced`. Each task is sent alone.

        Raises:
            ThresherError: As for :meth:`map`.
            UsageError: As for :meth:`map`.
        """
        needs, expected = self._connected(), operator.length_hint(tasks, 0)
        sums = Sums(fn, self._how(needs), add)
        with closing(Flight(sums, self.workers, expected, bytes_in_flight(), most=1).run(tasks)) as results:
            for kept in results:
                sums.add_next()
                yield kept
        total: S | None = sums.total()
        return total

    def check_files(self, paths: Iterable[str]) -> None:
        """Check that every node can read local files of this machine, each only once for this engine.

        Raises:
            UnreachedError: A node cannot, or has another file there; names the file and the node.
        """
        if self._is_local():
            return
        needs, seen = self._connected(), self._connection.seen
        new = {path: os.path.abspath(path) for path in paths}
        files = [(path, size_on_disk(path)) for path in new if new[path] not in seen]
        if files:
            check_readable(on_every_node(needs, unreadable, files, self._environment()))
            seen.update(new.values())

    def close(self) -> None:
        """Stop Ray, if this engine started it, or leave the cluster."""
        self._connection.close()

    def _is_local(self) -> bool:
        """Whether all workers are, or will be, on this machine because this engine starts Ray."""
        return self._connection.is_local(self.address)

    def _connected(self) -> Needs:
        """Connect, unless this process is connected; returns what Ray reserves for a task."""
        gpus = float(self.device == "cuda") if self.num_gpus is None else self.num_gpus
        needs = Needs(self.num_cpus, gpus, self.resources)
        self._connection.open(self.address, self.workers, needs)
        return needs

    def _environment(self) -> dict[str, Any]:
        return {} if self._is_local() else environment()  # if local, workers inherit it

    def _how(self, needs: Needs) -> How:
        return How({**needs.options, **self._environment()}, self.retries, partial(check_left, needs))
