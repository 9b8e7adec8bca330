"""Long loops that resume after a kill: their state is saved every few seconds."""

from __future__ import annotations

import os
import time
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from thresher.runtime.checksums import (
    ArraySpec,
    DamagedError,
    append_checksum,
    check,
    open_regular,
    read_header,
    report_damage,
)
from thresher.runtime.files import DAMAGED, ELSEWHERE, writing

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
            with open_regular(self.path) as file:
                check(file)
                with zipfile.ZipFile(file) as archive:
                    if set(archive.namelist()) != {f"{name}.npy" for name in specs}:
                        return None  # the state of another version
                    return {name: _member(archive, f"{name}.npy", spec) for name, spec in specs.items()}
        except OSError:
            return None
        except DAMAGED as error:
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
        with writing(self.path, self._hint) as scratch, open(scratch, "w+b") as file:
            np.savez(file, **{name: np.asarray(value) for name, value in state.items()})  # type: ignore[arg-type]
            append_checksum(file)
        self._saved = time.monotonic()

    def remove(self) -> None:
        """Remove the saved state, once the result is saved."""
        self.path.unlink(missing_ok=True)


def _member(archive: zipfile.ZipFile, name: str, spec: ArraySpec) -> Array:
    """Return an array of an archive after a check of its header: a wrong header must not take any memory."""
    if archive.getinfo(name).compress_type != zipfile.ZIP_STORED:
        raise DamagedError(f"{name} is compressed")
    with archive.open(name) as file:
        shape, _, dtype = read_header(file)
        spec.check_header(dtype, shape)
    with archive.open(name) as file:
        array: Array = np.lib.format.read_array(file, allow_pickle=False)
    spec.check_values(array)
    return array
