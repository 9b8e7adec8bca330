"""What carries groups of tasks to workers: tasks of Ray, or actors."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from thresher.errors import ThresherError
from thresher.runtime.ray.cluster import remote
from thresher.runtime.ray.errors import readable, readable_errors
from thresher.runtime.ray.packing import Packed, pack, size_of
from thresher.runtime.ray.worker import Kept, call, place

_INLINE = 100_000  # bytes of tasks that travel in the message to a worker; Ray's own limit
_PER_ACTOR = 2  # groups: one that it works on, and the next
_LOOK = 30.0  # seconds between looks whether there are still nodes
_PATIENCE = 5.0  # seconds that an actor waits for helpers


@dataclass(frozen=True)
class How:
    """How groups of tasks are sent.

    Attributes:
        options: Options of Ray: what it reserves for each task or actor, and where it runs.
        retries: How many times the groups of lost workers or actors are sent again.
        look: Called while nothing comes back; raises an error if nothing will.
    """

    options: Mapping[str, Any]
    retries: int
    look: Callable[[], None]


class Sent(NamedTuple):
    """A group of tasks that was sent.

    Attributes:
        result: Reference of the result.
        tasks: The packed tasks, or their reference.
    """

    result: Any
    tasks: Any


class Tasks:
    """Tasks of Ray, which sends those of lost workers again."""

    def __init__(self, fn: Callable[..., Any], how: How) -> None:
        """Put the function into the object store."""
        self._function = stored_function(fn)
        self._options = {"max_retries": how.retries, "retry_exceptions": False, **how.options}
        self._call, self._look = remote(call).options(**self._options), how.look

    def send(self, tasks: Packed) -> Sent:
        """Send a group."""
        held = stored_if_large(tasks)
        return Sent(self._call.remote(self._function, held), held)

    def result(self, sent: Sent) -> Packed:
        """Wait for what a group returned."""
        return self.fetch(sent.result)

    def tasks(self, sent: Sent) -> Packed:
        """Return the tasks of a group."""
        return packed_again(sent.tasks)

    def close(self, waiting: Sequence[Sent]) -> None:
        """Cancel what was sent; tasks that have started are interrupted."""
        import ray

        self._function = []
        for sent in waiting:
            with suppress(Exception):  # Ray may have stopped
                ray.cancel(sent.result, force=False)

    def fetch(self, ref: Any) -> Packed:
        """Wait for a result.

        Raises:
            ThresherError: A worker was lost too often, or all that have what a task needs.
        """
        import ray

        with readable_errors():
            while not ray.wait([ref], timeout=_LOOK)[0]:
                self._look()
            packed: Packed = ray.get(ref)
        return packed


class Parts(Tasks):
    """Tasks that an actor sends. It does the first group itself if that is not done soon.

    Perhaps no CPU is free for it: a node was lost, and actors took the last ones of the others.
    """

    def result(self, sent: Sent) -> Packed:
        """Wait for what a group returned."""
        import ray

        with readable_errors():
            if not ray.wait([sent.result], timeout=_PATIENCE)[0]:
                ray.cancel(sent.result)
                return call(self._function, self.tasks(sent))
        return self.fetch(sent.result)


@dataclass(eq=False)
class _Group:
    """A group of tasks for an actor.

    Attributes:
        tasks: The packed tasks, or their reference.
        ref: Reference of the result, None as long as no actor has the group.
        lost: How many actors were lost while they worked on it.
        done: What it returned, or why it never will.
    """

    tasks: Any
    ref: Any = None
    lost: int = 0
    done: Future[Packed] = field(default_factory=Future)


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
        self.groups: deque[_Group] = deque()


class Actors:
    """Actors, each with the function and its state. Groups of a lost one go to others; a new one takes its place.

    Ray could start an actor again by itself, but its groups would wait until a node has room for it, while other actors
    have nothing to do.
    """

    def __init__(self, fn: Callable[..., Any], how: How, count: int) -> None:
        """Start ``count`` actors."""
        self._function = stored_function(fn)
        self._make = remote(Kept).options(max_restarts=0, max_task_retries=0, **how.options).remote
        self._retries, self._look, self._unstarted = how.retries, how.look, 0
        self._queue: deque[_Group] = deque()
        self._actors = [_Actor(self._make) for _ in range(count)]

    def send(self, tasks: Packed) -> _Group:
        """Send a group."""
        group = _Group(stored_if_large(tasks))
        self._queue.append(group)
        self._assign()
        return group

    def result(self, sent: _Group) -> Packed:
        """Wait for what a group returned."""
        while not sent.done.done():
            self._wait()
        return sent.done.result()

    def tasks(self, sent: _Group) -> Packed:
        """Return the tasks of a group."""
        return packed_again(sent.tasks)

    def close(self, waiting: Sequence[_Group]) -> None:
        """End the actors."""
        import ray

        self._function = []
        self._queue.clear()
        while self._actors:
            with suppress(Exception):  # Ray may have stopped
                ray.kill(self._actors.pop().handle)

    def _assign(self) -> None:
        """Send groups to the actors that have the fewest."""
        while self._queue:
            started = (actor for actor in self._actors if actor.starting is None)
            actor = min(started, key=lambda one: len(one.groups), default=None)
            if actor is None or len(actor.groups) == _PER_ACTOR:
                return
            group = self._queue.popleft()
            group.ref = actor.handle.call.remote(self._function, group.tasks)
            actor.groups.append(group)

    def _wait(self) -> None:
        """Wait until an actor has started, has done a group, or is lost."""
        import ray

        starting = {actor.starting: actor for actor in self._actors if actor.starting is not None}
        working = {group.ref: (actor, group) for actor in self._actors for group in actor.groups}
        done = ray.wait([*working, *starting], num_returns=1, timeout=_LOOK)[0]
        if not done:
            self._look()
            return
        actor, group = working.get(done[0]) or (starting[done[0]], None)
        try:
            value = ray.get(done[0])
        except (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError, ray.exceptions.ObjectLostError) as error:
            self._replace(actor, readable(error))
        except ray.exceptions.RayError as error:
            raise readable(error) from None
        else:
            if group is None:
                actor.starting, self._unstarted = None, 0
            else:
                group.done.set_result(value)
                actor.groups.remove(group)
        self._assign()

    def _replace(self, lost: _Actor, error: ThresherError) -> None:
        """Put a new actor in the place of a lost one; of its groups it worked on the first."""
        import ray

        with suppress(Exception):  # it may only be out of reach
            ray.kill(lost.handle)
        if lost.starting is not None:
            self._unstarted += 1
            if self._unstarted > self._retries:
                raise error
        if lost.groups:
            lost.groups[0].lost += 1
        for group in reversed(lost.groups):
            if group.lost > self._retries:
                group.done.set_exception(error)
            else:
                self._queue.appendleft(group)
        self._actors.remove(lost)
        self._actors.append(_Actor(self._make))


def stored_function(fn: Callable[..., Any]) -> list[Any]:
    """Put a function into the object store; returns its reference in a list, else Ray would load it for every task."""
    import ray

    return [ray.put((place(), pack(fn)))]


def stored_if_large(tasks: Packed) -> Any:
    """Put packed tasks into the object store, unless they can travel in a message; returns their reference, or them."""
    import ray

    return ray.put(tasks) if size_of(tasks) >= _INLINE else tasks


def packed_again(held: Any) -> Packed:
    """Return what :func:`stored_if_large` was given."""
    import ray

    packed: Packed = held if isinstance(held, tuple) else ray.get(held)
    return packed
