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
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, TypeVar

from thresher.errors import MissingExtraError, ThresherError, UnreachedError, UsageError, installed
from thresher.runtime import parameters
from thresher.runtime.engine import Engine, Stateful, SumTree, cores
from thresher.runtime.engines.serial import Serial
from thresher.runtime.format import counted
from thresher.runtime.parameters import Reads
from thresher.runtime.ray.carriers import Actors, Apart, Tasks
from thresher.runtime.ray.cluster import alive_nodes, readable, remote
from thresher.runtime.ray.connection import Connection
from thresher.runtime.ray.files import size_on_disk, unreadable
from thresher.runtime.ray.flight import Carriers, Flight
from thresher.runtime.ray.helpers import Helpers
from thresher.runtime.ray.packing import pack, unpack
from thresher.runtime.ray.worker import packed_call, place

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
        num_gpus: GPUs that Ray reserves for a task; by default 1 for a worker with a model if a node has a GPU, else 0.
        resources: Other resources of Ray that a task needs, by name.
        retries: How many times a task is run again if its worker or node is lost; an error of the task itself is
            raised at once.

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
        default=None, metadata={"help": "GPUs that Ray reserves for a task (default: 1 for a model if there are any)"}
    )
    resources: Annotated[Mapping[str, float], Reads(_amounts, "NAME=AMOUNT")] = field(
        default_factory=dict, metadata={"help": "other resources of Ray that a task needs: NAME=AMOUNT+NAME=AMOUNT"}
    )
    retries: int = field(default=3, metadata={"help": "times that a task of a lost worker or node is run again"})
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
        self._connection.open(self)
        return self._but(workers=sum(map(self._capacity, alive_nodes())))

    @property
    def nodes(self) -> int:
        """Number of nodes that can run tasks, 1 if Ray starts on this machine."""
        if self._is_local():
            return 1
        self._connection.open(self)
        return sum(1 for node in alive_nodes() if self._capacity(node))

    def map(self, fn: Callable[[T], R], tasks: Iterable[T]) -> Iterator[R]:
        """Yield ``fn(task)`` for every task, in order. The function is sent once, not with every task.

        Raises:
            ThresherError: A worker was lost too often, for example because memory ran out.
            UsageError: No node has what a task needs.
        """
        self._connection.open(self)
        expected = operator.length_hint(tasks, 0)
        if not isinstance(fn, Stateful):
            carriers: Carriers = Tasks(self._reserved(), self.retries, _workers_env(self), self._check_left)
            yield from Flight(carriers, fn, self.workers, expected).run(tasks)
            return
        if fn.gpu and self.num_gpus is None and any(node["Resources"].get("GPU", 0) >= 1 for node in alive_nodes()):
            yield from self._but(num_gpus=1.0).map(fn, tasks)
            return
        count = max(1, min(self.workers, sum(map(self._capacity, alive_nodes())), expected or self.workers))
        carriers = Actors(self._reserved(), count, self.retries, _workers_env(self), self._check_left)
        yield from Flight(carriers, replace(fn, helpers=self._helpers(count)), count, expected).run(tasks)

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
        self._connection.open(self)
        carriers = Apart(self._reserved(), self.retries, _workers_env(self), self._check_left)
        flight = Flight(carriers, fn, self.workers, operator.length_hint(tasks, 0), most=1)
        tree = SumTree(lambda part: [part], lambda parts, part: [*parts, part], carriers.adding(add))
        with closing(flight.run(tasks)) as results:
            for kept in results:
                tree.push(carriers.parts.popleft())
                yield kept
        total: S | None = carriers.fetch(tree.total())
        return total

    def check_files(self, paths: Iterable[str]) -> None:
        """Check that every node can read local files of this machine, each only once for this engine.

        Raises:
            UnreachedError: A node cannot, or has another file there; names the file and the node.
        """
        if self._is_local():
            return
        self._connection.open(self)
        new = {path: os.path.abspath(path) for path in paths}
        files = [(path, size_on_disk(path)) for path in new if new[path] not in self._connection.seen]
        if not files:
            return
        for node, wrong in self._on_every_node(unreadable, files):
            if wrong:
                (path, why), more = wrong[0], len(wrong) - 1
                others = f", and {counted(more, 'other file')}" if more else ""
                raise UnreachedError(
                    f"{path}: cannot be read on node {node['NodeManagerAddress']} ({why}){others}; put the files on "
                    "storage that all nodes share, or use one node"
                )
        self._connection.seen.update(new.values())

    def close(self) -> None:
        """Stop Ray, if this engine started it, or leave the cluster."""
        self._connection.close()

    def _but(self, **changes: Any) -> Ray:
        """Return this engine with other fields, and the same connection."""
        engine = replace(self, **changes)
        object.__setattr__(engine, "_connection", self._connection)
        return engine

    def _is_local(self) -> bool:
        """Whether all workers are, or will be, on this machine because this engine starts Ray."""
        ray = sys.modules.get("ray")
        if ray is not None and ray.is_initialized():
            return self._connection.starts_here
        return not (self.address or os.environ.get("RAY_ADDRESS"))

    def _needs(self) -> dict[str, float]:
        return {"CPU": self.num_cpus, "GPU": self.num_gpus or 0, **self.resources}

    def _reserved(self) -> dict[str, Any]:
        """Return the options of Ray that reserve what a task needs."""
        return {"num_cpus": self.num_cpus, "num_gpus": self.num_gpus or 0, "resources": dict(self.resources) or None}

    def _capacity(self, node: Mapping[str, Any]) -> int:
        """Return how many tasks a node can run at once."""
        has = node["Resources"]
        return int(min((has.get(name, 0) // need for name, need in self._needs().items() if need), default=cores()))

    def _check_left(self) -> None:
        """Refuse to wait for ever.

        Raises:
            ThresherError: The nodes that have what a task needs are lost.
        """
        if not any(map(self._capacity, alive_nodes())):
            raise ThresherError(
                f"no node is left that has what a task needs ({self._needed()}); start one, and run the command again"
            )

    def _needed(self) -> str:
        return ", ".join(f"{name} {need:g}" for name, need in self._needs().items() if need)

    def _helps(self, node: Mapping[str, Any]) -> bool:
        """Return whether a node can do parts of tasks, although it cannot run one."""
        return bool(self.num_gpus) and not self._is_bound() and node["Resources"].get("CPU", 0) >= 1

    def _is_bound(self) -> bool:
        """Whether parts of tasks are done only on the node of the task: others were not checked for files."""
        return bool(self.resources) or self.num_cpus > 1

    def _helpers(self, actors: int) -> Engine:
        """Return the engine with which each of some actors has parts of its tasks done."""
        nodes = [node for node in alive_nodes() if self._capacity(node) or self._helps(node)]
        free = sum(node["Resources"].get("CPU", 0) for node in nodes) - actors * self.num_cpus
        each = int(free // actors)
        together = max(1, min(actors, max(map(self._capacity, nodes), default=1)))  # on a node
        return Helpers(each, self.retries, self._is_bound(), 1 / together) if each > 0 else Serial()

    def _on_every_node(self, fn: Callable[[Any], R], argument: Any) -> Iterator[tuple[dict[str, Any], R]]:
        """Yield each node that can run tasks, and what a function returns there."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        nodes = [node for node in alive_nodes() if self._capacity(node) or self._helps(node)]
        packed = ray.put(pack(argument))
        sent = []
        for node in nodes:
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            options = {"num_cpus": 0, "max_retries": 1, "scheduling_strategy": there, **_workers_env(self)}
            sent.append(remote(packed_call).options(**options).remote(place(), fn, packed))
        for node, result in zip(nodes, sent, strict=True):
            try:
                yield node, unpack(ray.get(result))
            except (ray.exceptions.NodeDiedError, ray.exceptions.TaskUnschedulableError):
                continue  # it has just left the cluster
            except ray.exceptions.RayError as error:
                raise readable(error, node["NodeManagerAddress"]) from None


def _workers_env(engine: Ray) -> dict[str, Any]:
    """Return the option that gives workers the environment of this process as far as results depend on it."""
    kernels = None if engine._is_local() else os.environ.get("OPENBLAS_CORETYPE")  # if local, they inherit it
    return {"runtime_env": {"env_vars": {"OPENBLAS_CORETYPE": kernels}}} if kernels else {}
