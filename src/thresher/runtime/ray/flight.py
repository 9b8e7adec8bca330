"""Tasks in flight: sent in groups, few at a time, and their results in order."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, Protocol

from thresher.runtime.ray.packing import Packed, pack, size_of, unpack
from thresher.runtime.ray.worker import Done

_GROUP = 0.05  # seconds of work that are sent together; Ray needs 0.6 ms for a task
_MOST = 1024  # tasks that are sent together
_SMALL = 2**20  # bytes of tasks, and of results, that are sent together
_STEP = 32  # tasks that are drawn before one of them is measured


class Carriers(Protocol):
    """Carries groups of tasks to workers, which run the function of a map."""

    def send(self, tasks: Packed) -> Any:
        """Send a group; returns what :meth:`result` takes."""

    def result(self, sent: Any) -> Packed:
        """Wait for what a group returned: a packed :class:`~thresher.runtime.ray.worker.Done`.

        Raises:
            ThresherError: There is none, because workers were lost.
        """
        ...

    def tasks(self, sent: Any) -> Packed:
        """Return the tasks of a group."""

    def close(self, waiting: Sequence[Any]) -> None:
        """Give up groups that were sent, the function, and what carries them."""


class Flight:
    """The tasks of a map that were sent and whose results were not taken yet, in order.

    Short and small tasks are sent together: as many as take ``_GROUP`` seconds, as the last ones did, and at most twice
    as many as before. If tasks suddenly have more bytes, a group has at most ``2 * _SMALL`` of them, or one task, and
    at most ``_STEP`` of the large ones are in memory. If they suddenly take longer, a worker does some of a group, and
    the others are sent again, each alone. All this changes neither results nor order.
    """

    def __init__(self, carriers: Carriers, workers: int, tasks: int, most_bytes: float, most: int = _MOST) -> None:
        """Send nothing yet.

        Args:
            carriers: What carries the tasks to workers.
            workers: Number of tasks that run at once.
            tasks: Number of tasks, 0 if unknown.
            most_bytes: Bytes of tasks and results that may wait. A group is sent if there are fewer.
            most: How many tasks may be sent together.
        """
        self._carriers, self._workers, self._most_bytes, self._most = carriers, workers, most_bytes, most
        self._most_groups = workers + 2 + workers // 4
        self._left: float = tasks or math.inf
        self._result_bytes = 0.0  # of a task
        self._size = 1  # tasks of the next group
        self._drawn: deque[Any] = deque()  # tasks that were too large to be sent with those before
        self._waiting: deque[tuple[int, int, Any]] = deque()  # of each group: tasks, bytes, what was sent

    def run(self, tasks: Iterable[Any]) -> Generator[Any, None, None]:
        """Yield the results of all tasks, in order.

        Raises:
            Exception: A task raised it.
            ThresherError: A worker was lost.
        """
        left = iter(tasks)
        try:
            while True:
                while self._has_room() and (some := self._draw(left)):
                    self._send(some)
                if not self._waiting:
                    return
                yield from self._take()
        finally:
            self._cancel()

    def _has_room(self) -> bool:
        """Return whether more tasks may be sent: at least one, else as many as the limits allow."""
        count, bytes_ = sum(group[0] for group in self._waiting), sum(group[1] for group in self._waiting)
        full = bytes_ + count * self._result_bytes > self._most_bytes
        return not self._waiting or (len(self._waiting) < self._most_groups and not full)

    def _draw(self, left: Iterator[Any]) -> list[Any]:
        """Return the tasks of the next group, fewer than usual if they are suddenly large."""
        some: list[Any] = []
        while True:
            wanted = min(self._size - len(some), _STEP)
            more = [self._drawn.popleft() for _ in range(min(wanted, len(self._drawn)))]
            more += islice(left, wanted - len(more))
            some += more
            if len(more) < wanted or len(some) == self._size or size_of(pack(more[-1:])) * _STEP > _SMALL:
                return some

    def _send(self, tasks: list[Any]) -> None:
        """Send some tasks together, or only the first of them if they are too large."""
        packed = pack(tasks)
        size, count = size_of(packed), len(tasks)
        if count > 1 and size > 2 * _SMALL:
            self._size = max(count * _SMALL // size, 1)
            self._drawn.extendleft(reversed(tasks[self._size :]))
            self._send(tasks[: self._size])
            return
        self._waiting.append((count, size, self._carriers.send(packed)))
        self._left -= count

    def _send_rest(self, tasks: list[Any]) -> None:
        """Send the tasks that a worker left of a group, each alone, as the first that were sent."""
        packed = [pack([task]) for task in tasks]
        self._waiting.extendleft([(1, size_of(one), self._carriers.send(one)) for one in packed][::-1])

    def _take(self) -> Iterator[Any]:
        """Yield the results of the first tasks that were sent."""
        count, size, sent = self._waiting[0]
        packed = self._carriers.result(sent)
        done: Done = unpack(packed)
        rest = [] if done.error is not None or len(done.results) == count else unpack(self._carriers.tasks(sent))
        del sent
        self._waiting.popleft()
        self._send_rest(rest[len(done.results) :])
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
        by_time, by_bytes = _GROUP * count / max(seconds, 1e-6), _SMALL / max(task_bytes, self._result_bytes)
        at_end = self._left / (2 * self._workers)  # every worker gets some
        self._size = int(min(max(min(2 * self._size, by_time, by_bytes, at_end), 1), self._most))

    def _cancel(self) -> None:
        """Cancel what was sent."""
        sent = [one for _, _, one in self._waiting]
        self._waiting.clear()
        self._carriers.close(sent)
