"""Long loops that go on after a kill: their state is saved every few seconds."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from thresher.runtime.files import DAMAGED, ELSEWHERE, writing

Array = npt.NDArray[Any]
State = Mapping[str, Array | np.generic | int | float]


class Resumable:
    """The state of a loop, named arrays in one file that is replaced whole.

    A loop reads the state once, offers the new one after every step, and removes it when its result is safe::

        saved = Resumable(path)
        state = saved.load("sums", "done") or {"sums": np.zeros(n), "done": 0}
        for step in range(int(state["done"]), steps):
            ...
            saved.offer(lambda: {"sums": sums, "done": step + 1})
        ...  # write the result
        saved.remove()
    """

    def __init__(self, path: str | os.PathLike[str], every: float = 2.0, hint: str = ELSEWHERE) -> None:
        """Remember where; nothing is read or written yet.

        Args:
            path: The file of the state, ``.npz``.
            every: Seconds between saves: how much work a kill may cost. Below 0 every offer is saved.
            hint: What to do where it cannot be written.
        """
        self.path = Path(path)
        self._every, self._hint = every, hint
        self._saved = time.monotonic()

    def load(self, *names: str) -> dict[str, Array] | None:
        """Return the arrays last saved, in memory; None where there are none, or others than those named."""
        try:
            with open(self.path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
                return {name: file[name] for name in names} if set(file.files) == set(names) else None
        except (OSError, KeyError, *DAMAGED):  # what cannot be read is computed again and replaced
            return None

    def offer(self, state: Callable[[], State]) -> bool:
        """Save a state if it is time to; returns whether it was saved.

        Raises:
            OutputError: It cannot be written.
        """
        if time.monotonic() - self._saved <= self._every:
            return False
        self.save(state())
        return True

    def save(self, state: State) -> None:
        """Save a state now, on the disk before it counts.

        Raises:
            OutputError: It cannot be written.
        """
        with writing(self.path, self._hint) as scratch, open(scratch, "wb") as file:
            np.savez(file, **{name: np.asarray(value) for name, value in state.items()})  # type: ignore[arg-type]
            file.flush()
            os.fsync(file.fileno())
        self._saved = time.monotonic()

    def remove(self) -> None:
        """Remove what was saved: the result is there."""
        self.path.unlink(missing_ok=True)
