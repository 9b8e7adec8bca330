"""Sums of results that stay on the workers."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from thresher.runtime.engine import SumTree
from thresher.runtime.ray.carriers import How, Sent, Tasks, stored_function, stored_if_large
from thresher.runtime.ray.cluster import remote
from thresher.runtime.ray.packing import Packed, unpack
from thresher.runtime.ray.worker import add_up, call_apart


class Sums(Tasks):
    """Tasks whose results are pairs, of which the second parts stay in the object stores, and are added up there."""

    def __init__(self, fn: Callable[..., Any], how: How, add: Callable[[Any, Any], Any]) -> None:
        """Put the functions into the object store.

        Args:
            fn: Returns a pair.
            how: How its tasks are sent.
            add: Adds two second parts.
        """
        super().__init__(fn, how)
        self._call = remote(call_apart).options(num_returns=2, **self._options)
        self._parts: deque[Any] = deque()  # references, in order
        total_of, held = remote(add_up).options(**self._options), stored_function(add)
        self._tree = SumTree(
            lambda part: [part],
            lambda parts, part: [*parts, part],
            lambda parts: total_of.remote(held, *parts) if len(parts) > 1 else parts[0],
        )

    def send(self, tasks: Packed) -> Sent:
        """Send a task alone."""
        held = stored_if_large(tasks)
        result, part = self._call.remote(self._function, held)
        self._parts.append(part)
        return Sent(result, held)

    def add_next(self) -> None:
        """Add the second part of the next result."""
        self._tree.push(self._parts.popleft())

    def total(self) -> Any:
        """Return the sum of what was added, None if nothing was.

        Raises:
            ThresherError: A worker was lost too often.
        """
        total = self._tree.total()
        return None if total is None else unpack(self.fetch(total))
