"""Sums of results that stay on the workers."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from thresher.runtime.engine import SumTree
from thresher.runtime.ray.carriers import Sent, Tasks, stored_function, stored_if_large
from thresher.runtime.ray.cluster import remote
from thresher.runtime.ray.packing import Packed, unpack
from thresher.runtime.ray.worker import add_up, call_apart


class Sums(Tasks):
    """Tasks whose results are pairs, of which the second parts stay in the object stores, and are added up there."""

    def __init__(
        self,
        fn: Callable[..., Any],
        options: Mapping[str, Any],
        retries: int,
        look: Callable[[], None],
        add: Callable[[Any, Any], Any],
    ) -> None:
        """Put the functions into the object store.

        Args:
            fn: Returns a pair.
            options: As for :class:`~thresher.runtime.ray.carriers.Tasks`, like the next two.
            retries: How many times the tasks of lost workers are sent.
            look: Called while nothing comes back; raises an error if nothing will.
            add: Adds two second parts.
        """
        super().__init__(fn, options, retries, look)
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
