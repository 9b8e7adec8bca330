"""What carries groups of tasks to workers: tasks of Ray, or actors."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from thresher.errors import ThresherError
from thresher.runtime.ray.cluster import readable, remote
from thresher.runtime.ray.flight import Sent
from thresher.runtime.ray.packing import Packed, pack, unpack
from thresher.runtime.ray.worker import Kept, add_up, call, call_apart, place

_PER_ACTOR = 2  # groups: one that it works on, and the next
_LOOK = 30.0  # seconds between looks whether there are still nodes
_PATIENCE = 5.0  # seconds that an actor waits for helpers


class Tasks:
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
        """Carry nothing yet."""
        self._options = {**reserved, "max_retries": retries, "retry_exceptions": False, **more}
        self._call = remote(call).options(**self._options)
        self._look = look

    def send(self, sent: Sent) -> None:
        """Send a group."""
        sent.future = self._call.remote(sent.function, sent.tasks)

    def result(self, sent: Sent) -> Packed:
        """Wait for the result of a group."""
        import ray

        try:
            while not ray.wait([sent.future], timeout=_LOOK if self._look else _PATIENCE)[0]:
                if self._look is None:
                    # Perhaps no CPU is free for it: a node was lost, and actors took the last ones of the others.
                    ray.cancel(sent.future)
                    return call(sent.function, ray.get(sent.tasks) if sent.stored else sent.tasks)
                self._look()
            packed: Packed = ray.get(sent.future)
        except ray.exceptions.RayError as error:
            raise readable(error) from None
        return packed

    def close(self, waiting: Sequence[Sent]) -> None:
        """Cancel what was sent; tasks that have started are interrupted."""
        import ray

        for sent in waiting:
            with suppress(Exception):  # Ray may have stopped
                ray.cancel(sent.future, force=False)


class Apart(Tasks):
    """Tasks whose results are pairs, of which the second parts stay in the object stores, and are added up there.

    Attributes:
        parts: References of the second parts of the results that were taken, in order.

    Args:
        how: As for :class:`Tasks`.
    """

    def __init__(self, *how: Any) -> None:
        """Carry nothing yet."""
        super().__init__(*how)
        self._call = remote(call_apart).options(num_returns=2, **self._options)
        self._sum = remote(add_up).options(**self._options)
        self._add: Any = None
        self.parts: deque[Any] = deque()

    def send(self, sent: Sent) -> None:
        """Send a group."""
        sent.future, sent.part = self._call.remote(sent.function, sent.tasks)

    def result(self, sent: Sent) -> Packed:
        """Wait for the result of a group."""
        packed = super().result(sent)
        self.parts.append(sent.part)
        return packed

    def adding(self, add: Callable[[Any, Any], Any]) -> Callable[[list[Any]], Any]:
        """Return a function that has a worker add up some parts, and returns the sum to come."""
        import ray

        self._add = ray.put((place(), pack(add)))
        return lambda parts: self._sum.remote([self._add], *parts) if len(parts) > 1 else parts[0]

    def fetch(self, part: Any) -> Any:
        """Return a part, or None.

        Raises:
            ThresherError: A worker was lost too often.
        """
        return None if part is None else unpack(super().result(Sent([], None, False, future=part)))


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
        self.groups: deque[Sent] = deque()


class Actors:
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
        """Start the actors."""
        options = {**reserved, "max_restarts": 0, "max_task_retries": 0, **more}
        self._make: Callable[[], Any] = remote(Kept).options(**options).remote
        self._retries, self._look, self._unstarted = retries, look, 0
        self._queue: deque[Sent] = deque()
        self._actors = [_Actor(self._make) for _ in range(count)]

    def send(self, sent: Sent) -> None:
        """Send a group."""
        self._queue.append(sent)
        self._assign()

    def result(self, sent: Sent) -> Packed:
        """Wait for the result of a group."""
        while sent.value is None and sent.error is None:
            self._wait()
        if sent.error is not None:
            raise sent.error
        value, sent.value = sent.value, None
        assert value is not None  # noqa: S101 - it waited for one
        return value

    def close(self, waiting: Sequence[Sent]) -> None:
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
                self._lost(actor, readable(error))
                continue
            except ray.exceptions.RayError as error:
                raise readable(error) from None
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
