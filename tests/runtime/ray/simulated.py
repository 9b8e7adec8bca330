"""A stand-in for Ray in this process: time is simulated, workers run one call at a time and can be lost."""

from __future__ import annotations

import heapq
import itertools
import pickle
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

from thresher.runtime.ray import worker


class Killed(KeyboardInterrupt):
    """Raised in a task, it kills the worker."""


class Clock:
    """Simulated seconds; takes the place of the module ``time`` in workers."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


CLOCK = Clock()


class RayError(Exception):
    """What all errors of Ray are."""


NAMES = "RayTask RayActor WorkerCrashed OutOfMemory ObjectLost NodeDied TaskUnschedulable"
ERRORS = SimpleNamespace(
    RayError=RayError, **{f"{name}Error": type(f"{name}Error", (RayError,), {}) for name in NAMES.split()}
)


@dataclass(eq=False)
class Ref:
    """A reference of a result, or of what was stored."""

    done: bool = False
    value: Any = None
    error: Exception | None = None
    stored: bool = False


@dataclass(eq=False)
class Job:
    """A call, or an actor that waits for a CPU."""

    fn: Callable[..., Any]
    args: tuple[Any, ...]
    refs: list[Ref]
    retries: int = 0

    def ready(self) -> bool:
        return all(one.done for one in self.args if isinstance(one, Ref))


@dataclass(eq=False)
class Handle:
    """An actor."""

    ray: SimulatedRay
    made: Any = None
    dead: bool = False
    busy: bool = False
    placed: bool = False
    calls: deque[Job] = field(default_factory=deque)

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=lambda *args: self.ray.call_actor(self, name, args))


class Remote:
    """A function or an actor class of workers."""

    def __init__(self, ray: SimulatedRay, fn: Any, options: dict[str, Any]) -> None:
        self.ray, self.fn, self.given = ray, fn, options

    def options(self, **options: Any) -> Remote:
        return Remote(self.ray, self.fn, {**self.given, **options})

    def remote(self, *args: Any) -> Any:
        return self.ray.submit(self.fn, args, self.given)


class SimulatedRay:
    """What the module ``ray`` has, as far as it is used here.

    Attributes:
        cpus: CPUs: that many calls or actors at once.
        alive: Its nodes.
        starts_lost: How many actors die when they start, from now on.
        cancelled: References that were cancelled.
        most_calls: The largest number of calls that one actor had at once.
        options: Those of the last task or actor.
        submitted: How many tasks were sent, without calls of actors.
        failed: How often results were an error of Ray's.
    """

    exceptions = ERRORS
    cloudpickle = pickle
    _jobs = itertools.count()

    def __init__(self, cpus: int) -> None:
        self.cpus, self.starts_lost, self.most_calls = cpus, 0, 0
        self.alive: list[dict[str, Any]] = [{"Alive": True, "Resources": {"CPU": 2.0, "object_store_memory": 1e9}}]
        self.cancelled: list[Ref] = []
        self.options: dict[str, Any] = {}
        self.submitted = self.failed = 0
        self._error: Exception | None = None
        self._job = f"simulated {next(self._jobs)}"
        self._queue: deque[Job] = deque()
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()

    def fail_with(self, error: Exception) -> None:
        """Raise an error of Ray's instead of returning what a group returned."""
        self._error = error

    def is_initialized(self) -> bool:
        return True

    def nodes(self) -> list[dict[str, Any]]:
        return self.alive

    def get_runtime_context(self) -> Any:
        return SimpleNamespace(get_job_id=lambda: self._job, get_node_id=lambda: "here")

    def remote(self, fn: Any) -> Remote:
        return Remote(self, fn, {})

    def put(self, value: Any) -> Ref:
        return Ref(True, value, stored=True)

    def get(self, ref: Ref) -> Any:
        self.wait([ref])
        if ref.error is not None:
            raise ref.error
        if self._error is not None and ref.value is not None and not ref.stored:
            self.failed += 1
            raise self._error
        return ref.value

    def wait(self, refs: list[Ref], num_returns: int = 1, timeout: float | None = None) -> tuple[list[Ref], list[Ref]]:
        end = float("inf") if timeout is None else CLOCK.now + timeout
        while not (done := [ref for ref in refs if ref.done]):
            if not self._events or self._events[0][0] > end:
                assert timeout is not None, "this would wait for ever"
                CLOCK.now = end
                return [], refs
            CLOCK.now, _, event = heapq.heappop(self._events)
            event()
        return done[:num_returns], [ref for ref in refs if ref not in done[:num_returns]]

    def cancel(self, ref: Ref, force: bool = False) -> None:
        assert not force
        self.cancelled.append(ref)

    def kill(self, handle: Handle) -> None:
        self._end(handle)

    def submit(self, fn: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        self.options = options
        if isinstance(fn, type):
            handle = Handle(self)
            self._queue.append(Job(lambda: self._start_actor(handle, fn), (), []))
            self._start()
            return handle
        self.submitted += 1
        refs = [Ref() for _ in range(options.get("num_returns", 1))]
        self._queue.append(Job(fn, args, refs, options["max_retries"]))
        self._start()
        return refs[0] if len(refs) == 1 else refs

    def call_actor(self, handle: Handle, name: str, args: tuple[Any, ...]) -> Ref:
        assert not handle.dead
        ref = Ref()
        handle.calls.append(Job(lambda *values: getattr(handle.made, name)(*values), args, [ref]))
        self.most_calls = max(self.most_calls, len(handle.calls))
        self._next_call(handle)
        return ref

    def _after(self, seconds: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (CLOCK.now + seconds, next(self._order), event))

    def _start(self) -> None:
        """Give free CPUs to what waits for one."""
        while self.cpus and (job := next((one for one in self._queue if one.ready()), None)):
            self.cpus -= 1
            self._queue.remove(job)
            if job.refs:
                self._run(job, partial(self._finished, job))
            else:
                job.fn()  # an actor

    def _run(self, job: Job, then: Callable[[Any, bool], None]) -> None:
        """Call a function now; what it returned, or that it killed the worker, is known when its time has passed."""
        begin, value, lost = CLOCK.now, None, False
        try:
            value = job.fn(*(one.value if isinstance(one, Ref) else one for one in job.args))
        except Killed:
            lost = True
        seconds, CLOCK.now = CLOCK.now - begin, begin
        self._after(seconds, lambda: then(value, lost))

    def _finished(self, job: Job, value: Any, lost: bool) -> None:
        self.cpus += 1
        if lost and job.retries:
            job.retries -= 1
            self._queue.appendleft(job)
        else:
            for ref, one in zip(job.refs, value if len(job.refs) > 1 and not lost else [value], strict=False):
                ref.done, ref.value, ref.error = True, one, ERRORS.WorkerCrashedError("crashed") if lost else None
        self._start()

    def _start_actor(self, handle: Handle, cls: type) -> None:
        def started() -> None:
            if handle.dead:
                return
            if self.starts_lost:
                self.starts_lost -= 1
                self._end(handle)
                return
            handle.made = cls()
            self._next_call(handle)

        handle.placed = True
        if handle.dead:
            self.cpus += 1
        else:
            self._after(0.5, started)

    def _next_call(self, handle: Handle) -> None:
        if handle.made is not None and handle.calls and not handle.busy:
            handle.busy = True
            self._run(handle.calls[0], partial(self._called, handle))

    def _called(self, handle: Handle, value: Any, lost: bool) -> None:
        if handle.dead:
            return
        if lost:
            self._end(handle)
            return
        handle.busy = False
        (ref,) = handle.calls.popleft().refs
        ref.done, ref.value = True, value
        self._next_call(handle)

    def _end(self, handle: Handle) -> None:
        """End an actor; its CPU is free again."""
        if handle.dead:
            return
        handle.dead = True
        self.cpus += handle.placed
        for job in handle.calls:
            job.refs[0].done, job.refs[0].error = True, ERRORS.RayActorError("died")
        self._start()


@contextmanager
def simulated_ray(cpus: int) -> Iterator[SimulatedRay]:
    """Take the place of Ray."""
    ray, CLOCK.now = SimulatedRay(cpus), 0.0
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "ray", ray)
        patch.setattr(worker, "time", CLOCK)
        patch.setattr(worker, "_begin", lambda *_: None)
        yield ray
