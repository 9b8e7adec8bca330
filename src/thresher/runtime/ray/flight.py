"""Tasks in flight: sent in groups, few at a time, and their results in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

from thresher.errors import ThresherError
from thresher.runtime.ray.cluster import alive_nodes
from thresher.runtime.ray.packing import Packed, pack, size_of, unpack
from thresher.runtime.ray.worker import Done, place

_GROUP = 0.05  # seconds of work that are sent together; Ray needs 0.6 ms for a task
_MOST = 1024  # tasks that are sent together
_INLINE = 100_000  # bytes of tasks that travel in the message to a worker; Ray's own limit
_SMALL = 2**20  # bytes of tasks, and of results, that are sent together
_IN_FLIGHT = 0.3  # of the object store of a node: bytes of tasks and results that wait


class Flight:
    """The tasks of a map that were sent and whose results were not taken yet, in order.

    Short and small tasks are sent together: as many as take ``_GROUP`` seconds, as the last ones did. This changes
    neither results nor order.

    Attributes:
        size: How many tasks to send together.
        waiting: Number of tasks, their bytes, and what was sent, of each group.
    """

    def __init__(
        self,
        carriers: Carriers,
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
        self._function: Any = ray.put((place(), pack(fn)))
        self._room = workers + 2 + workers // 4
        stores = (node["Resources"].get("object_store_memory", 0) for node in alive_nodes())
        self._bytes = share * _IN_FLIGHT * min(filter(None, stores), default=2**30)
        self._workers, self._left, self._known = workers, tasks, tasks > 0
        self._result_bytes = 0.0  # of a task
        self.size = 1
        self.waiting: deque[tuple[int, int, Sent]] = deque()

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

        packed = pack(tasks)
        size = size_of(packed)
        # The function is in a list, else Ray would load it again for every task.
        stored = size >= _INLINE
        sent = Sent([self._function], ray.put(packed) if stored else packed, stored)
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
        done: Done = unpack(packed)
        self._learn(len(done.results), done.seconds, size / count, size_of(packed))
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
class Sent:
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
    value: Packed | None = None
    error: ThresherError | None = None


class Carriers(Protocol):
    """Carries groups of tasks to workers."""

    def send(self, sent: Sent) -> None:
        """Send a group."""

    def result(self, sent: Sent) -> Packed:
        """Wait for the result of a group.

        Raises:
            ThresherError: There is none, because workers were lost.
        """
        ...

    def close(self, waiting: Sequence[Sent]) -> None:
        """Give up groups, and what carries them."""
