"""Long loops that resume after a kill: their state is saved every few seconds."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from thresher.runtime.checksums import ArraySpec, append_checksum, check, open_entry, report_damage
from thresher.runtime.files import ELSEWHERE, writing
from thresher.runtime.untrusted import load_npz

Array = npt.NDArray[Any]
State = Mapping[str, Array | np.generic | int | float]


class Resumable:
    """The state of a loop: named arrays in one file with a checksum, which is replaced atomically.

    A loop loads the state once, offers the new state after every step, and removes it once the result is saved::

        saved = Resumable(path)
        specs = {"sums": ArraySpec("float64", (n,)), "done": ArraySpec("int64", (), 0, steps)}
        state = saved.load(specs) or {"sums": np.zeros(n), "done": 0}
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

    def load(self, specs: Mapping[str, ArraySpec]) -> dict[str, Array] | None:
        """Return the last saved arrays, in memory; None if there are none or if they are not as specified.

        Args:
            specs: What each array must be, by name.
        """
        try:
            with open_entry(self.path) as file:
                check(file)
                arrays = load_npz(file)
            if set(arrays) != set(specs):
                return None  # the state of another version
            for name, spec in specs.items():
                spec.check_header(arrays[name].dtype, arrays[name].shape)
                spec.check_values(arrays[name])
            return arrays
        except OSError:
            return None
        except ValueError as error:
            report_damage(self.path, error)
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
        with writing(self.path, self._hint, cached=True) as scratch, open(scratch, "w+b") as file:
            np.savez(file, **{name: np.asarray(value) for name, value in state.items()})  # type: ignore[arg-type]
            append_checksum(file)
        self._saved = time.monotonic()

    def remove(self) -> None:
        """Remove the saved state, once the result is saved."""
        self.path.unlink(missing_ok=True)
