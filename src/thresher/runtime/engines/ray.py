"""Workers of Ray, on this machine or on the nodes of a cluster; only Ray's core is used.

The function of a ``map`` is put into Ray's object store once, and each worker reads it once. Short tasks are sent
together. Whatever Ray does again because a worker or a node was lost gives the same result, because tasks are functions
of their arguments.

A function with a state, such as a model, gets actors: workers that belong to one ``map``. They hand out parts of their
tasks, such as images to decode, to CPUs that no actor has reserved.

Ray changes settings of the process that uses it: the environment, ``sys.path``, hooks, signal handlers. They are put
back. A thread of its own starts, holds and stops the connection: Ctrl-C then ends the wait for Ray, and not Ray's start
in the middle.
"""

from __future__ import annotations

import faulthandler
import functools
import logging
import math
import operator
import os
import pickle
import secrets
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, ClassVar, Protocol, TypeVar

import threadpoolctl

from thresher.errors import MissingExtraError, ThresherError, UnreachedError, UsageError, installed
from thresher.runtime import parameters
from thresher.runtime.engine import Engine, Stateful, SumTree, cores
from thresher.runtime.engines.serial import Serial
from thresher.runtime.format import counted
from thresher.runtime.locks import Scratch, create_locked_folder, sweep
from thresher.runtime.parameters import Reads

T = TypeVar("T")
R = TypeVar("R")
S = TypeVar("S")

_Packed = tuple[bytes, list[Any]]  # a pickle, and the memory of its arrays as (bytes,) uint8 each

_PREFIX = "thresher-ray-"
_LONGEST = 40  # characters of the folder for temporary files; a socket's path may have 107
_GROUP = 0.05  # seconds of work that are sent together; Ray needs 0.6 ms for a task
_MOST = 1024  # tasks that are sent together
_INLINE = 100_000  # bytes of tasks that travel in the message to a worker; Ray's own limit
_SMALL = 2**20  # bytes of tasks, and of results, that are sent together
_IN_FLIGHT = 0.3  # of the object store of a node: bytes of tasks and results that wait
_STOPPED = 20.0  # seconds to wait for Ray to stop
_ANSWER = 10.0  # seconds to wait for a cluster to answer
_OUT_OF_MEMORY = 3  # times that a task is run again after memory ran out; by default Ray never stops
_PER_ACTOR = 2  # groups: one that it works on, and the next
_LOOK = 30.0  # seconds between looks whether there are still nodes
_PATIENCE = 5.0  # seconds that an actor waits for helpers
_OPENED = 16  # files that a node opens at a time


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
    _connection: _Connection = field(default_factory=lambda: _Connection(), init=False, repr=False, compare=False)

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
        return self._but(workers=sum(map(self._capacity, _nodes())))

    @property
    def nodes(self) -> int:
        """Number of nodes that can run tasks, 1 if Ray starts on this machine."""
        if self._is_local():
            return 1
        self._connection.open(self)
        return sum(1 for node in _nodes() if self._capacity(node))

    def map(self, fn: Callable[[T], R], tasks: Iterable[T]) -> Iterator[R]:
        """Yield ``fn(task)`` for every task, in order. The function is sent once, not with every task.

        Raises:
            ThresherError: A worker was lost too often, for example because memory ran out.
            UsageError: No node has what a task needs.
        """
        self._connection.open(self)
        expected = operator.length_hint(tasks, 0)
        if not isinstance(fn, Stateful):
            carriers: _Carriers = _Tasks(self._reserved(), self.retries, _workers_env(self), self._check_left)
            yield from _Flight(carriers, fn, self.workers, expected).run(tasks)
            return
        if fn.gpu and self.num_gpus is None and any(node["Resources"].get("GPU", 0) >= 1 for node in _nodes()):
            yield from self._but(num_gpus=1.0).map(fn, tasks)
            return
        count = max(1, min(self.workers, sum(map(self._capacity, _nodes())), expected or self.workers))
        carriers = _Actors(self._reserved(), count, self.retries, _workers_env(self), self._check_left)
        yield from _Flight(carriers, replace(fn, helpers=self._helpers(count)), count, expected).run(tasks)

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
        carriers = _Apart(self._reserved(), self.retries, _workers_env(self), self._check_left)
        flight = _Flight(carriers, fn, self.workers, operator.length_hint(tasks, 0), most=1)
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
        files = [(path, _length(path)) for path in new if new[path] not in self._connection.seen]
        if not files:
            return
        for node, wrong in self._on_every_node(_unreadable, files):
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
        if not any(map(self._capacity, _nodes())):
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
        nodes = [node for node in _nodes() if self._capacity(node) or self._helps(node)]
        free = sum(node["Resources"].get("CPU", 0) for node in nodes) - actors * self.num_cpus
        each = int(free // actors)
        together = max(1, min(actors, max(map(self._capacity, nodes), default=1)))  # on a node
        return _Helpers(each, self.retries, self._is_bound(), 1 / together) if each > 0 else Serial()

    def _on_every_node(self, fn: Callable[[Any], R], argument: Any) -> Iterator[tuple[dict[str, Any], R]]:
        """Yield each node that can run tasks, and what a function returns there."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        nodes = [node for node in _nodes() if self._capacity(node) or self._helps(node)]
        packed = ray.put(_pack(argument))
        sent = []
        for node in nodes:
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            options = {"num_cpus": 0, "max_retries": 1, "scheduling_strategy": there, **_workers_env(self)}
            sent.append(_remote(_packed_call).options(**options).remote(_place(), fn, packed))
        for node, result in zip(nodes, sent, strict=True):
            try:
                yield node, _unpack(ray.get(result))
            except (ray.exceptions.NodeDiedError, ray.exceptions.TaskUnschedulableError):
                continue  # it has just left the cluster
            except ray.exceptions.RayError as error:
                raise _readable(error, node["NodeManagerAddress"]) from None


# --- the connection -------------------------------------------------------------------------------


class _Connection:
    """The connection of an engine, none before the first task; one process has one. A copy starts without.

    Attributes:
        seen: Files that all nodes can read.
    """

    def __init__(self) -> None:
        self.seen: set[str] = set()
        self._holder: _Holder | None = None
        self._stop: Callable[[], Any] | None = None

    def __reduce__(self) -> Any:
        return _Connection, ()

    @property
    def starts_here(self) -> bool:
        """Whether Ray was started on this machine for this engine."""
        return self._holder is not None and self._holder.local

    def open(self, engine: Ray) -> None:
        """Connect, unless this process is connected: to the engine's cluster, or to one that is started here.

        Raises:
            UsageError: There is no such cluster, its nodes cannot run the tasks, or this process uses another one.
            ThresherError: Ray cannot be started.
        """
        ray = sys.modules.get("ray")
        if ray is not None and ray.is_initialized():
            if self._holder is None:
                _check_same(engine.address)
            return
        self.seen.clear()
        holder = _Holder(engine)
        self._stop = weakref.finalize(self, holder.stop, os.getpid())  # also at exit
        self._holder = holder
        try:
            holder.start()
            _keep_sigterm()
            if not any(map(engine._capacity, _nodes())):
                needed = engine._needed()
                raise UsageError(f"the engine ray: no node has what a task needs ({needed}); start such a node first")
            if not holder.local:
                _check_nodes(engine)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if self._stop is not None:
            self._stop()
        self._holder = self._stop = None


class _Holder:
    """A thread that connects to Ray, or starts it, and ends that on request.

    Attributes:
        local: Whether it starts Ray on this machine.
    """

    def __init__(self, engine: Ray) -> None:
        self.address = engine.address or os.environ.get("RAY_ADDRESS", "")
        self.local = not self.address
        self._cpus = math.ceil(engine.workers * max(engine.num_cpus, 1))
        self._resources = {name: amount * engine.workers for name, amount in engine.resources.items()}
        self._ready, self._end = threading.Event(), threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._hold, name="holds Ray", daemon=True)

    def start(self) -> None:
        """Start, and wait until Ray is ready."""
        self._thread.start()
        self._ready.wait()
        if isinstance(self._error, ThresherError):
            raise self._error
        if self._error is not None:
            why = getattr(self._error, "strerror", None) or next(iter(str(self._error).splitlines()), "no reason given")
            if self.local:
                raise ThresherError(f"Ray cannot be started on this machine ({why})") from self._error
            raise UsageError(
                f"Ray at {self.address}: cannot connect ({why}); start a cluster with 'ray start --head', or omit the "
                "address (and unset RAY_ADDRESS) to start Ray on this machine"
            ) from self._error

    def stop(self, owner: int) -> None:
        """End the connection, unless this is a forked copy of the process. If Ray is still starting, do not wait."""
        if os.getpid() == owner:
            self._end.set()
            if self._ready.is_set():
                self._thread.join(_STOPPED)

    def _hold(self) -> None:
        folder, level = None, logging.getLogger("ray").level
        try:
            with _settings_kept():
                if self.local:
                    folder = _folder()
                self._connect(folder)
        except BaseException as error:
            self._error = error
        else:
            self._ready.set()
            self._end.wait()
        finally:
            if ray := sys.modules.get("ray"):
                with suppress(Exception):
                    ray.shutdown(wait_for_processes=True)
                    _forget_token()
                    ray._private.worker._worker_logs_enabled = True
            logging.getLogger("ray").setLevel(level)
            if folder is not None:
                folder.remove()
            self._ready.set()

    def _connect(self, folder: Scratch | None) -> None:
        """Start Ray with its files in a folder, or connect to a cluster; without output of Ray's."""
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        os.environ.setdefault("RAY_task_oom_retries", str(_OUT_OF_MEMORY))
        os.environ.setdefault("RAY_worker_niceness", "0")  # by default workers give way to every other program
        if folder is not None and not any(name.startswith("RAY_AUTH_") for name in os.environ):
            os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)  # else Ray writes one to the home folder
        if folder is None:
            _check_port(self.address)
        import ray

        _forget_token()
        logging.getLogger("ray").setLevel(logging.CRITICAL)
        ray._private.worker._worker_logs_enabled = False  # Ray's own switch: it prints lost workers to standard output
        options: dict[str, Any] = {"configure_logging": False, "logging_level": logging.CRITICAL}
        if "://" not in self.address:
            options["log_to_driver"] = False
        if folder is not None:
            options |= {"num_cpus": self._cpus, "resources": self._resources, "include_dashboard": False}
            options["_temp_dir"] = str(folder.path)
        ray.init(address=self.address or "local", **options)


@contextmanager
def _settings_kept() -> Iterator[None]:
    """Put back what Ray changes in the process."""
    environment, path, hook, fault = dict(os.environ), list(sys.path), sys.excepthook, faulthandler.is_enabled()
    try:
        yield
    finally:
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ |= environment
        sys.path[:] = path
        sys.excepthook = hook
        if not fault:
            faulthandler.disable()


def _keep_sigterm() -> None:
    """Put back what SIGTERM does: Ray's libraries, which Python does not know of, would abort the process."""
    here = signal.getsignal(signal.SIGTERM)
    if here is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, here)


def _check_port(address: str) -> None:
    """Raise an OSError if nothing listens at an address; Ray would try for minutes."""
    host, colon, port = address.rpartition("://")[2].partition("/")[0].rpartition(":")
    if colon and port.isdecimal() and int(port) < 2**16:
        socket.create_connection((host.strip("[]"), int(port)), _ANSWER).close()


def _forget_token() -> None:
    """Make Ray read its token again: this process may have used another cluster before, or may do so later."""
    import ray._raylet

    loader = getattr(ray._raylet, "AuthenticationTokenLoader", None)  # private, and not in every version
    if loader is not None:
        loader.instance().reset_cache()


def _folder() -> Scratch:
    """Make a folder for Ray's sockets and logs, with a short path."""
    shared = Path(tempfile.gettempdir())
    if len(os.fsencode(shared)) > _LONGEST and os.path.isdir("/tmp"):  # noqa: S108
        shared = Path("/tmp")  # noqa: S108
    sweep(shared.glob(f"{_PREFIX}*"))  # left by killed runs
    return create_locked_folder(shared, _PREFIX, mode=0o700)


def _nodes() -> list[dict[str, Any]]:
    """Return the nodes that are alive."""
    import ray

    return [node for node in ray.nodes() if node["Alive"]]


def _check_same(address: str) -> None:
    """Refuse an address other than that of the cluster that this process uses already."""
    import ray

    host, _, port = address.rpartition(":")
    if host and "://" not in address and host not in ("localhost", "127.0.0.1"):  # Ray knows those by another name
        here = ray.get_runtime_context().gcs_address
        with suppress(OSError):
            host = socket.gethostbyname(host)
        if here != f"{host}:{port}":
            raise UsageError(f"Ray at {address}: this process is connected to {here}; call ray.shutdown() first")


def _check_nodes(engine: Ray) -> None:
    """Refuse nodes with another version of thresher, and warn of other products."""
    own = _about(None)
    for node, about in engine._on_every_node(_about, None):
        where = f"node {node['NodeManagerAddress']}"
        if about["thresher"] != own["thresher"]:
            raise UsageError(
                f"{where} has thresher {about['thresher']}, this machine {own['thresher']}; install the same version"
            )
        if about != own:
            there, here = (", ".join(f"{name} {value}" for name, value in one.items()) for one in (about, own))
            warnings.warn(
                f"{where} has {there}; this machine has {here}: the last bits of products may differ", stacklevel=2
            )


def _about(_: None) -> dict[str, str]:
    """Return what the bits of a result depend on."""
    import numpy as np

    from thresher import __version__

    blas = {info.get("architecture", "") for info in threadpoolctl.threadpool_info() if info["user_api"] == "blas"}
    return {"thresher": __version__, "numpy": np.__version__, "kernels": " ".join(sorted(blas - {""}))}


def _remote(fn: Callable[..., Any]) -> Any:
    """Return a function that runs in workers; a new one would be sent to each of them again."""
    import ray

    return _remote_of_job(fn, ray.get_runtime_context().get_job_id())


@lru_cache(maxsize=8)
def _remote_of_job(fn: Callable[..., Any], _: str) -> Any:
    import ray

    return ray.remote(fn)


def _workers_env(engine: Ray) -> dict[str, Any]:
    """Return the option that gives workers the environment of this process as far as results depend on it."""
    kernels = None if engine._is_local() else os.environ.get("OPENBLAS_CORETYPE")  # if local, they inherit it
    return {"runtime_env": {"env_vars": {"OPENBLAS_CORETYPE": kernels}}} if kernels else {}


def _readable(error: Exception, node: str = "") -> ThresherError:
    """Return an error of Ray as one line."""
    import ray

    where = f" on node {node}" if node else ""
    if "No module named" in str(error):
        missing = next(line for line in str(error).splitlines() if "No module named" in line).strip()
        return UsageError(f"a worker of Ray{where} cannot start ({missing}); install thresher on every node")
    if isinstance(error, ray.exceptions.OutOfMemoryError):
        return ThresherError(
            f"memory ran out{where}, and Ray stopped workers several times; use fewer --workers, or reserve more CPUs "
            "for a task, for example --engine ray:num_cpus=2"
        )
    if isinstance(
        error, (ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError, ray.exceptions.RayActorError)
    ):
        return ThresherError(
            f"a worker process of Ray was killed{where}, several times, perhaps because it ran out of memory; use "
            "fewer --workers, or reserve more CPUs for a task, for example --engine ray:num_cpus=2"
        )
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    why = lines[-1] if isinstance(error, ray.exceptions.RayTaskError) else lines[0]
    return ThresherError(f"a worker of Ray{where} failed ({why})")


# --- tasks in flight ------------------------------------------------------------------------------


class _Flight:
    """The tasks of a map that were sent and whose results were not taken yet, in order.

    Short and small tasks are sent together: as many as take ``_GROUP`` seconds, as the last ones did. This changes
    neither results nor order.

    Attributes:
        size: How many tasks to send together.
        waiting: Number of tasks, their bytes, and what was sent, of each group.
    """

    def __init__(
        self,
        carriers: _Carriers,
        fn: Callable[[Any], Any],
        workers: int,
        tasks: int,
        share: float = 1.0,
        most: int = _MOST,
    ) -> None:
        """Put the function into the object store.

        Args:
            carriers: What carries the tasks to workers.
            fn: The function.
            workers: Number of tasks that run at once.
            tasks: Number of tasks, 0 if unknown.
            share: Of the object store of a node that tasks and results may take, up to 1.
            most: How many tasks may be sent together.
        """
        import ray

        self._carriers, self._most = carriers, most
        self._function: Any = ray.put((_place(), _pack(fn)))
        self._room = workers + 2 + workers // 4
        stores = (node["Resources"].get("object_store_memory", 0) for node in _nodes())
        self._bytes = share * _IN_FLIGHT * min(filter(None, stores), default=2**30)
        self._workers, self._left, self._known = workers, tasks, tasks > 0
        self._result_bytes = 0.0  # of a task
        self.size = 1
        self.waiting: deque[tuple[int, int, _Sent]] = deque()

    def run(self, tasks: Iterable[Any]) -> Generator[Any, None, None]:
        """Yield the results of all tasks, in order."""
        left = iter(tasks)
        try:
            while True:
                while self.has_room() and (some := list(islice(left, self.size))):
                    self.send(some)
                if not self.waiting:
                    return
                yield from self.take()
        finally:
            self.cancel()

    def has_room(self) -> bool:
        """Return whether more tasks may be sent: at least one, else as many as the limits allow."""
        count, bytes_ = sum(group[0] for group in self.waiting), sum(group[1] for group in self.waiting)
        full = bytes_ + count * self._result_bytes > self._bytes
        return not self.waiting or (len(self.waiting) < self._room and not full)

    def send(self, tasks: list[Any]) -> None:
        """Send some tasks together."""
        import ray

        packed = _pack(tasks)
        size = _size(packed)
        # The function is in a list, else Ray would load it again for every task.
        stored = size >= _INLINE
        sent = _Sent([self._function], ray.put(packed) if stored else packed, stored)
        self._carriers.send(sent)
        self.waiting.append((len(tasks), size, sent))
        self._left -= len(tasks)

    def take(self) -> Iterator[Any]:
        """Yield the results of the first tasks that were sent.

        Raises:
            Exception: A task raised it.
            ThresherError: A worker was lost.
        """
        count, size, sent = self.waiting[0]
        packed = self._carriers.result(sent)
        del sent
        self.waiting.popleft()
        done: _Done = _unpack(packed)
        self._learn(len(done.results), done.seconds, size / count, _size(packed))
        del packed
        yield from done.results
        if done.error is not None:
            raise done.error()

    def _learn(self, count: int, seconds: float, task_bytes: float, result_bytes: int) -> None:
        """Choose how many tasks to send together: at most twice as many as last time."""
        if not count:
            return
        self._result_bytes = max(0.9 * self._result_bytes, result_bytes / count)
        size = min(2 * self.size, _GROUP * count / max(seconds, 1e-6), _SMALL / max(task_bytes, self._result_bytes))
        if self._known:  # at the end, every worker gets some
            size = min(size, self._left / (2 * self._workers))
        self.size = int(min(max(size, 1), self._most))

    def cancel(self) -> None:
        """Cancel what was sent."""
        sent = [one for _, _, one in self.waiting]
        self.waiting.clear()
        self._function = None
        self._carriers.close(sent)


@dataclass(eq=False)
class _Sent:
    """A group of tasks on its way.

    Attributes:
        function: The function in the object store, in a list.
        tasks: The packed tasks, or their reference.
        stored: Whether it is a reference.
        future: Reference of the result, None as long as no actor has them.
        part: Reference of the second part of the result, if it is not fetched.
        lost: How many workers were lost with them.
        value: The result, once it is there.
        error: Why there will be none.
    """

    function: list[Any]
    tasks: Any
    stored: bool
    future: Any = None
    part: Any = None
    lost: int = 0
    value: _Packed | None = None
    error: ThresherError | None = None


class _Carriers(Protocol):
    """Carries groups of tasks to workers."""

    def send(self, sent: _Sent) -> None:
        """Send a group."""

    def result(self, sent: _Sent) -> _Packed:
        """Wait for the result of a group.

        Raises:
            ThresherError: There is none, because workers were lost.
        """
        ...

    def close(self, waiting: Sequence[_Sent]) -> None:
        """Give up groups, and what carries them."""


class _Tasks:
    """Tasks of Ray, which sends those of lost workers again.

    Args:
        reserved: What Ray reserves for each.
        retries: How many times those of lost workers are sent.
        more: Other options of Ray.
        look: Called while nothing comes back; raises an error if nothing will. Without it, this is an actor, which then
            does the first group itself.
    """

    def __init__(
        self, reserved: dict[str, Any], retries: int, more: dict[str, Any], look: Callable[[], None] | None = None
    ) -> None:
        self._options = {**reserved, "max_retries": retries, "retry_exceptions": False, **more}
        self._call = _remote(_call).options(**self._options)
        self._look = look

    def send(self, sent: _Sent) -> None:
        sent.future = self._call.remote(sent.function, sent.tasks)

    def result(self, sent: _Sent) -> _Packed:
        import ray

        try:
            while not ray.wait([sent.future], timeout=_LOOK if self._look else _PATIENCE)[0]:
                if self._look is None:
                    # Perhaps no CPU is free for it: a node was lost, and actors took the last ones of the others.
                    ray.cancel(sent.future)
                    return _call(sent.function, ray.get(sent.tasks) if sent.stored else sent.tasks)
                self._look()
            packed: _Packed = ray.get(sent.future)
        except ray.exceptions.RayError as error:
            raise _readable(error) from None
        return packed

    def close(self, waiting: Sequence[_Sent]) -> None:
        """Cancel what was sent; tasks that have started are interrupted."""
        import ray

        for sent in waiting:
            with suppress(Exception):  # Ray may have stopped
                ray.cancel(sent.future, force=False)


class _Apart(_Tasks):
    """Tasks whose results are pairs, of which the second parts stay in the object stores, and are added up there.

    Attributes:
        parts: References of the second parts of the results that were taken, in order.

    Args:
        how: As for :class:`_Tasks`.
    """

    def __init__(self, *how: Any) -> None:
        super().__init__(*how)
        self._call = _remote(_call_apart).options(num_returns=2, **self._options)
        self._sum = _remote(_sum).options(**self._options)
        self._add: Any = None
        self.parts: deque[Any] = deque()

    def send(self, sent: _Sent) -> None:
        sent.future, sent.part = self._call.remote(sent.function, sent.tasks)

    def result(self, sent: _Sent) -> _Packed:
        packed = super().result(sent)
        self.parts.append(sent.part)
        return packed

    def adding(self, add: Callable[[Any, Any], Any]) -> Callable[[list[Any]], Any]:
        """Return a function that has a worker add up some parts, and returns the sum to come."""
        import ray

        self._add = ray.put((_place(), _pack(add)))
        return lambda parts: self._sum.remote([self._add], *parts) if len(parts) > 1 else parts[0]

    def fetch(self, part: Any) -> Any:
        """Return a part, or None.

        Raises:
            ThresherError: A worker was lost too often.
        """
        return None if part is None else _unpack(super().result(_Sent([], None, False, future=part)))


@dataclass(frozen=True)
class _Helpers:
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
        carriers = _Tasks({"num_cpus": 1}, self.retries, {"scheduling_strategy": near})
        expected = operator.length_hint(tasks, 0)
        yield from _Flight(carriers, fn, self.workers, expected, self.share).run(tasks)


class _Actor:
    """An actor, from the driver's side.

    Attributes:
        handle: Its handle.
        starting: Reference of a result that is there once it has started; None from then on.
        groups: What was sent to it, in order.
    """

    def __init__(self, make: Callable[[], Any]) -> None:
        self.handle = make()
        self.starting: Any = self.handle.start.remote()
        self.groups: deque[_Sent] = deque()


class _Actors:
    """Actors, each with the function and its state. Groups of a lost one go to others; a new one takes its place.

    Ray could start an actor again by itself, but its groups would wait until a node has room for it, while other actors
    have nothing to do.

    Args:
        reserved: What Ray reserves for each.
        count: Number of actors.
        retries: How many times the groups of lost actors are sent.
        more: Other options of Ray.
        look: Called while nothing comes back; raises an error if nothing will.
    """

    def __init__(
        self, reserved: dict[str, Any], count: int, retries: int, more: dict[str, Any], look: Callable[[], None]
    ) -> None:
        options = {**reserved, "max_restarts": 0, "max_task_retries": 0, **more}
        self._make: Callable[[], Any] = _remote(_Kept).options(**options).remote
        self._retries, self._look, self._unstarted = retries, look, 0
        self._queue: deque[_Sent] = deque()
        self._actors = [_Actor(self._make) for _ in range(count)]

    def send(self, sent: _Sent) -> None:
        self._queue.append(sent)
        self._assign()

    def result(self, sent: _Sent) -> _Packed:
        while sent.value is None and sent.error is None:
            self._wait()
        if sent.error is not None:
            raise sent.error
        value, sent.value = sent.value, None
        assert value is not None  # noqa: S101 - it waited for one
        return value

    def close(self, waiting: Sequence[_Sent]) -> None:
        """End the actors."""
        import ray

        self._queue.clear()
        while self._actors:
            with suppress(Exception):  # Ray may have stopped
                ray.kill(self._actors.pop().handle)

    def _assign(self) -> None:
        """Send groups to the actors that have the fewest."""
        while self._queue:
            actor = min((one for one in self._actors if one.starting is None), key=_groups, default=None)
            if actor is None or _groups(actor) == _PER_ACTOR:
                return
            sent = self._queue.popleft()
            sent.future = actor.handle.call.remote(sent.function, sent.tasks)
            actor.groups.append(sent)

    def _wait(self) -> None:
        """Wait until an actor has started, has done a group, or is lost."""
        import ray

        starting = {one.starting: one for one in self._actors if one.starting is not None}
        working = {sent.future: (one, sent) for one in self._actors for sent in one.groups}
        done = ray.wait([*working, *starting], num_returns=1, timeout=_LOOK)[0]
        if not done:
            self._look()
        for ref in done:
            actor, sent = working.get(ref) or (starting[ref], None)
            try:
                value = ray.get(ref)
            except (
                ray.exceptions.RayActorError,
                ray.exceptions.OutOfMemoryError,
                ray.exceptions.ObjectLostError,
            ) as error:
                self._lost(actor, _readable(error))
                continue
            except ray.exceptions.RayError as error:
                raise _readable(error) from None
            if sent is None:
                actor.starting, self._unstarted = None, 0
            else:
                sent.value = value
                actor.groups.remove(sent)
        self._assign()

    def _lost(self, actor: _Actor, error: ThresherError) -> None:
        """Put a new actor in the place of a lost one; of its groups it worked on the first."""
        import ray

        with suppress(Exception):  # it may only be out of reach
            ray.kill(actor.handle)
        if actor.starting is not None:
            self._unstarted += 1
            if self._unstarted > self._retries:
                raise error
        if actor.groups:
            actor.groups[0].lost += 1
        for sent in reversed(actor.groups):
            if sent.lost > self._retries:
                sent.error = error
            else:
                self._queue.appendleft(sent)
        self._actors.remove(actor)
        self._actors.append(_Actor(self._make))


def _groups(actor: _Actor) -> int:
    return len(actor.groups)


@dataclass(frozen=True)
class _Done:
    """Results of the tasks of a group up to the first that raised, its error, and the seconds they took."""

    results: list[Any]
    error: Callable[[], BaseException] | None
    seconds: float


def _pack(value: Any) -> _Packed:
    """Pickle a value; the memory of its arrays stays apart, so that it is copied only once, to shared memory."""
    import numpy as np
    from ray import cloudpickle

    buffers: list[pickle.PickleBuffer] = []
    data = cloudpickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    return data, [np.asarray(one.raw()) for one in buffers]  # Ray's client cannot send a memoryview


def _unpack(packed: _Packed, *, shared: bool = False) -> Any:
    """Return a value that the other side packed; its arrays are copies that can be changed unless ``shared``."""
    data, buffers = packed
    return pickle.loads(data, buffers=buffers if shared else [bytearray(one) for one in buffers])


def _size(packed: _Packed) -> int:
    return len(packed[0]) + sum(map(len, packed[1]))


# --- in the workers -------------------------------------------------------------------------------


def _place() -> tuple[str, list[str]]:
    """Return the current folder and the module search path, which workers use too, as far as they exist there."""
    return os.getcwd(), [path for path in sys.path if path]


def _call(held: list[Any], packed: _Packed) -> _Packed:
    """Run some tasks, one after the other, up to the first that raises."""
    return _run(partial(_function, held[0]), packed)


class _Kept:
    """An actor: a worker of one map, which keeps the function and its state."""

    def __init__(self) -> None:
        self._function: Any = None

    def start(self) -> None:
        """Return once the actor has started."""

    def call(self, held: list[Any], packed: _Packed) -> _Packed:
        """Run some tasks, one after the other, up to the first that raises."""
        return _run(partial(self._loaded, held[0]), packed)

    def _loaded(self, held: Any) -> Any:
        if self._function is None:
            self._function = _load(held)
        return self._function


def _run(load: Callable[[], Callable[[Any], Any]], packed: _Packed) -> _Packed:
    done = _done(load, packed)
    try:
        return _pack(done)
    except Exception as error:  # a result cannot be pickled
        return _pack(_Done([], _portable(error), done.seconds))


def _call_apart(held: list[Any], packed: _Packed) -> tuple[_Packed, _Packed | None]:
    """Run a task that returns a pair; return the parts apart."""
    done = _done(partial(_function, held[0]), packed)
    try:
        (kept, part) = done.results[0] if done.results else (None, None)
        return _pack(replace(done, results=[kept] if done.results else [])), _pack(part)
    except Exception as error:  # a result cannot be pickled
        return _pack(_Done([], _portable(error), done.seconds)), None


def _sum(held: list[Any], *parts: _Packed) -> _Packed:
    """Add up parts of results, in order."""
    return _pack(functools.reduce(_function(held[0]), map(_unpack, parts)))


def _done(load: Callable[[], Callable[[Any], Any]], packed: _Packed) -> _Done:
    results: list[Any] = []
    failed: Callable[[], BaseException] | None = None
    begin = time.perf_counter()
    try:
        fn, tasks = load(), _unpack(packed)
        begin = time.perf_counter()
        for task in tasks:
            results.append(fn(task))
    except KeyboardInterrupt:  # the task was cancelled
        raise
    except BaseException as error:
        failed = _portable(error)
    return _Done(results, failed, time.perf_counter() - begin)


@lru_cache(maxsize=2)
def _function(held: Any) -> Any:
    """Return the function of a map; each worker loads it once."""
    return _load(held)


def _load(held: Any) -> Any:
    import ray

    place, packed = ray.get(held)
    _begin(*place)
    return _unpack(packed, shared=True)


def _packed_call(place: tuple[str, list[str]], fn: Callable[[Any], Any], packed: _Packed) -> _Packed:
    _begin(*place)
    return _pack(fn(_unpack(packed)))


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


def _portable(error: BaseException) -> Callable[[], BaseException]:
    """Return a picklable function that returns an error, with its traceback as a note."""
    from ray import cloudpickle

    error.add_note(f"in a worker of Ray:\n{''.join(traceback.format_exception(error)).rstrip()}")
    error.__traceback__ = error.__cause__ = error.__context__ = None
    ways = partial(_itself, error), partial(_made_again, type(error), error.args, vars(error))
    for way in ways:  # the second, if its class takes other arguments than those that it passes on
        with suppress(Exception):
            pickle.loads(cloudpickle.dumps(way))()
            return way
    return partial(RuntimeError, f"{type(error).__name__}: {error}")


def _itself(error: BaseException) -> BaseException:
    return error


def _made_again(cls: type[BaseException], args: tuple[Any, ...], values: dict[str, Any]) -> BaseException:
    error = cls.__new__(cls, *args)
    vars(error).update(values)
    return error


def _length(path: str) -> int:
    """Return the size of a file, -1 for a folder."""
    return -1 if os.path.isdir(path) else os.stat(path).st_size


def _unreadable(files: list[tuple[str, int]]) -> list[tuple[str, str]]:
    """Return the files that cannot be read here, or have another size, and why."""
    with ThreadPoolExecutor(_OPENED) as threads:
        return [(path, why) for (path, _), why in zip(files, threads.map(_why_not, files), strict=True) if why]


def _why_not(file: tuple[str, int]) -> str:
    path, length = file
    try:
        here = _length(path)
        if here < 0:
            os.listdir(path)
        else:
            with open(path, "rb") as opened:
                opened.read(1)
    except OSError as error:
        return error.strerror or str(error)
    return "" if here == length else f"it has {here:,} bytes there, and {length:,} here"
