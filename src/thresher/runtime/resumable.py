"""Long loops that resume after a kill: their state is saved every few seconds."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from thresher.runtime.files import ELSEWHERE, writing
from thresher.runtime.untrusted import read_npz

Array = npt.NDArray[Any]
State = Mapping[str, Array | np.generic | int | float]


class Resumable:
    """The state of a loop: named arrays in one file that is replaced atomically.

    A loop loads the state once, offers the new state after every step, and removes it once the result is saved::

        saved = Resumable(path)
        state = saved.load("sums", "done") or {"sums": np.zeros(n), "done": 0}
        for step in range(int(state["done"]), steps):
            ...
            saved.offer(lambda: {"sums": sums, "done": step + 1})
        ...  # write the result
        saved.remove()
    """

    def __init__(self, path: str | os.PathLike[str], every: float = 2.0, hint: str = ELSEWHERE) -> None:
        """Store the arguments; nothing is read or written yet.

        Args:
            path: The file of the state, ``.npz``.
            every: Seconds between saves: how much work is lost at most. Below 0 every offer is saved.
            hint: What the error message suggests if the file cannot be written.
        """
        self.path = Path(path)
        self._every, self._hint = every, hint
        self._saved = time.monotonic()

    def load(self, *names: str) -> dict[str, Array] | None:
        """Return the last saved arrays, in memory; None if there are none or their names differ from ``names``."""
        try:
            arrays = read_npz(self.path)
            return {name: arrays[name] for name in names} if set(arrays) == set(names) else None
        except (OSError, ValueError):  # an unreadable state is computed again and replaced
            return None

    def offer(self, state: Callable[[], State]) -> bool:
        """Save a state if it is due; return whether it was saved.

        Raises:
            OutputError: The file cannot be written.
        """
        if time.monotonic() - self._saved <= self._every:
            return False
        self.save(state())
        return True

    def save(self, state: State) -> None:
        """Save a state now; it is on disk when this returns.

        Raises:
            OutputError: The file cannot be written.
        """
        with writing(self.path, self._hint) as scratch, open(scratch, "wb") as file:
            np.savez(file, **{name: np.asarray(value) for name, value in state.items()})  # type: ignore[arg-type]
            file.flush()
            os.fsync(file.fileno())
        self._saved = time.monotonic()

    def remove(self) -> None:
        """Remove the saved state, once the result is saved."""
        self.path.unlink(missing_ok=True)
