"""Arrays on disk, keyed by their content: function, parameters, store, rows kept so far.

A result is reused if its array exists. An array that is still being filled is an append-only file whose finished
length is a number of whole batches, so a killed run resumes where it stopped and produces the same bytes. Nothing is
pickled. Every file has a checksum, which is compared when the file is loaded: a damaged entry is reported, treated as
missing and computed again.

A cache can be shared by runs, users and hosts: entries in use are locked, and no other process removes them.
"""

from __future__ import annotations

import io
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from thresher.errors import OutputError
from thresher.runtime.checksums import (
    ArraySpec,
    Checksum,
    append_checksum,
    check,
    mapped,
    open_entry,
    report_damage,
)
from thresher.runtime.config import cache_folder
from thresher.runtime.files import DAMAGED, mapped_space, sync, write_errors, writing
from thresher.runtime.locks import DAY, LOCK, holding, last_change, remove_folder, remove_unused
from thresher.runtime.places import RemotePath, local_path
from thresher.runtime.random import digest
from thresher.runtime.resumable import Resumable

Array = npt.NDArray[Any]

LIMIT = 20 * 10**9
FORMAT = 2  # of the files: increased when the meaning of a key changes; entries of another format count as missing
HINT = "choose another cache folder with --cache"
_HOUR = 3600.0
_MOVABLE = os.name != "nt"  # whether a memory-mapped file can be moved


@dataclass(frozen=True)
class Cache:
    """A folder of arrays by content key.

    Attributes:
        folder: The folder.
        limit: Maximum size in bytes; the least recently used arrays are removed first, arrays in use never.
        flush_seconds: Seconds between saves: how much work is lost at most if the process is killed.
        scratch: Folder or address where vectors are written in another order during a step; None for the folder.
    """

    folder: Path
    limit: int = LIMIT
    flush_seconds: float = 2.0
    scratch: str | os.PathLike[str] | RemotePath | None = None

    @classmethod
    def at(
        cls,
        folder: str | os.PathLike[str] | None = None,
        limit: int = LIMIT,
        scratch: str | os.PathLike[str] | RemotePath | None = None,
    ) -> Cache:
        """Return the cache in ``folder``, by default that of the settings; ``scratch`` may be an address."""
        return cls(local_path(folder or cache_folder()), limit, scratch=scratch)

    def path(self, name: str, key: Mapping[str, Any], suffix: str = ".npy") -> Path:
        """Return the path of the array of a key."""
        text = json.dumps({"name": name, "format": FORMAT, **key}, sort_keys=True, default=str)
        return self.folder / "arrays" / f"{name}-{digest(text)[:40]}{suffix}"

    def load(self, path: Path, spec: ArraySpec | None = None) -> Array | None:
        """Return an array, memory-mapped, or None if it is missing or cannot be read.

        The whole file is read once, to compare it with its checksum. An entry that is damaged, or is not as specified,
        counts as missing, with a warning. No run removes the file while the array, or a view of it, exists.

        Args:
            path: Its path, see :meth:`path`.
            spec: What the array must be.
        """
        try:
            with open_entry(path) as file:
                return mapped(file, spec, check(file))
        except OSError:  # a read error, not damage
            return None
        except DAMAGED as error:
            report_damage(path, error)
            return None

    def save(self, path: Path, array: Array) -> Array:
        """Write an array atomically and return it as loaded.

        Raises:
            OutputError: The array cannot be written.
        """
        with writing(path, HINT, cached=True) as scratch, open(scratch, "w+b") as file:
            np.save(file, array, allow_pickle=False)
            append_checksum(file)
        with suppress(OSError, *DAMAGED), open_entry(path) as file:
            return mapped(file)
        return np.asarray(array)

    def resumable(self, path: Path) -> Resumable:
        """Return the state of the loop that computes the array at ``path``; remove it once the array is saved."""
        return Resumable(path.with_suffix(".state.npz"), self.flush_seconds, HINT)

    def array(
        self, name: str, key: Mapping[str, Any], make: Callable[[], Array], spec: ArraySpec | None = None
    ) -> Array:
        """Return the array of a key; compute and save it if it is missing or not as specified."""
        path = self.path(name, key)
        array = self.load(path, spec)
        return self.save(path, make()) if array is None else array

    def space(self, rows: int, dtype: npt.DTypeLike = np.int64) -> Array:
        """Return an array (rows,) of zeros for a while, mapped from a file without a name if it is large.

        Raises:
            OutputError: There is not enough space in the folder.
        """
        with write_errors(self.folder, HINT):
            self.folder.mkdir(parents=True, exist_ok=True)
        # A cache that is only read may have all other results.
        return mapped_space(self.folder if os.access(self.folder, os.W_OK) else None, rows, dtype)

    def columns(
        self,
        name: str,
        key: Mapping[str, Any],
        dtypes: Mapping[str, str | ArraySpec],
        rows: int,
        fill: Callable[[int], Iterator[tuple[Array, ...]]],
        width: int | None = None,
        say: Callable[[str], None] | None = None,
    ) -> dict[str, Array]:
        """Return parallel columns, filled batch by batch in row order and resumed after a kill.

        One run fills them while others wait for it.

        Args:
            name: Name of the columns.
            key: What the columns depend on.
            dtypes: Column name -> dtype, or dtype and range, in the order of the batches' arrays.
            rows: Final length.
            fill: ``fill(start)`` yields batches of all columns from row ``start`` on. ``start`` is
                the end of a batch yielded by an earlier, unfinished call.
            width: Columns are (rows, width) instead of (rows,).
            say: Called with a message while waiting for another run.

        Raises:
            OutputError: The folder cannot be written, or ``fill`` ended early.
        """
        paths = {column: self.path(f"{name}.{column}", key) for column in dtypes}
        specs = _specs(dtypes, rows, width)
        if arrays := self._all(paths, specs):
            return arrays
        with self._filling(self.path(name, key, ".partial"), name, say) as folder:
            if arrays := self._all(paths, specs):  # another run finished first
                return arrays
            self._fill(folder, specs, rows, fill)
            for column, path in paths.items():
                made = folder / f"{column}.npy"
                with write_errors(path, HINT):
                    array = _mapped(made) if _MOVABLE else None  # mapped first, so that no other run can remove it
                    os.replace(made, path)
                    arrays[column] = _mapped(path) if array is None else array
        return arrays

    def _all(self, paths: Mapping[str, Path], specs: Mapping[str, ArraySpec]) -> dict[str, Array]:
        """Return all columns, or {} if any is missing."""
        arrays: dict[str, Array] = {}
        for column, path in paths.items():
            array = self.load(path, specs[column])
            if array is None:
                return {}
            arrays[column] = array
        return arrays

    @contextmanager
    def _filling(self, folder: Path, name: str, say: Callable[[str], None] | None) -> Iterator[Path]:
        """Yield a folder for filling columns that no other run uses."""
        with write_errors(folder, HINT):
            folder.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            try:
                stack.enter_context(holding(folder / LOCK, f"{name} in the cache {self.folder}", say=say))
                locked = _own(folder)
            except OutputError:  # the lock of another user
                locked = False
            if not locked:
                with write_errors(folder, HINT):
                    folder = Path(tempfile.mkdtemp(prefix=f".{name}-", suffix=".partial", dir=folder.parent))
            try:
                yield folder
            except BaseException:
                if not locked:
                    _remove(folder)
                raise
            _remove(folder)

    def _fill(
        self,
        folder: Path,
        specs: Mapping[str, ArraySpec],
        rows: int,
        fill: Callable[[int], Iterator[tuple[Array, ...]]],
    ) -> None:
        saved = Resumable(folder / "rows.npz", self.flush_seconds, HINT)
        state = saved.load(
            {"rows": ArraySpec("int64", (), 0, rows), "checksums": ArraySpec("int64", (len(specs),), 0, 2**32 - 1)}
        )
        done = int(state["rows"]) if state else 0
        with ExitStack() as stack:
            with write_errors(folder, HINT):
                files = [stack.enter_context(_Growing(folder / f"{name}.npy", spec)) for name, spec in specs.items()]
                if state and not all(
                    file.resume(done, int(value)) for file, value in zip(files, state["checksums"], strict=True)
                ):
                    if not any(file.new for file in files):  # else killed while the columns were moved into place
                        report_damage(folder, "its checksum is wrong")
                    state = None
                if not state:
                    done = 0
                    for file in files:
                        file.restart()

            def rows_on_disk() -> dict[str, Any]:
                for file in files:
                    sync(file.raw)
                return {"rows": done, "checksums": np.array([file.sums.value for file in files], np.int64)}

            for batch in fill(done):
                with write_errors(folder, HINT):
                    for file, array in zip(files, batch, strict=True):
                        file.append(array)
                    done += len(batch[0])
                    saved.offer(rows_on_disk)
            if done == rows:
                with write_errors(folder, HINT):
                    for file in files:
                        file.finish()
        if done != rows:
            raise OutputError(
                f"{folder}: {done:,} of {rows:,} rows were filled; the pool changed while it was read; run again once "
                "writing has finished"
            )

    # --- size -----------------------------------------------------------------------------------

    def size(self) -> int:
        """Return the size of all entries in bytes."""
        return sum(entry.size for entry in self._entries())

    def clear(self) -> int:
        """Remove all entries that no run is using; return the bytes freed."""
        freed = sum(entry.size for entry in self._entries() if remove_unused(entry.path, _HOUR if entry.open else 0))
        for name in ("arrays", "joined"):
            with suppress(OSError):
                (self.folder / name).rmdir()
        return freed

    def trim(self) -> int:
        """Remove the least recently used entries until the size is within the limit; return the bytes freed.

        Entries in use are kept, and unfinished entries for a day. The limit can therefore be exceeded.
        """
        entries = sorted(self._entries(), key=lambda entry: entry.used)
        excess = sum(entry.size for entry in entries) - self.limit
        freed = 0
        for entry in entries:
            if freed >= excess:
                break
            if entry.unfinished and entry.used > time.time() - DAY:
                continue
            if remove_unused(entry.path, DAY if entry.open else 0):
                freed += entry.size
        return freed

    def _entries(self) -> list[_Entry]:
        entries = []
        for name in ("arrays", "joined"):
            with suppress(OSError):
                for path in (self.folder / name).iterdir():
                    with suppress(OSError):
                        entries.append(_Entry.of(path))
        return entries


@dataclass(frozen=True)
class _Entry:
    """A file or folder of the cache.

    Attributes:
        path: The file or folder.
        size: Bytes.
        used: Time of last use, in seconds since 1970.
        open: Whether it may be in use without being memory-mapped: only a lock shows that.
        unfinished: Whether it is not a finished entry yet, or belongs to a running process.
    """

    path: Path
    size: int
    used: float
    open: bool
    unfinished: bool

    @classmethod
    def of(cls, path: Path) -> _Entry:
        stat = path.stat(follow_symlinks=False)
        folder = path.is_dir()
        unfinished = folder or path.name.startswith(".") or path.suffix not in (".npy", ".npz", ".parquet", ".json")
        return cls(
            path,
            sum(one.stat().st_size for one in path.rglob("*") if one.is_file()) if folder else stat.st_size,
            last_change(path),
            unfinished or path.name.startswith("local.") or path.parent.name == "joined",
            unfinished,
        )


def _specs(dtypes: Mapping[str, str | ArraySpec], rows: int, width: int | None) -> dict[str, ArraySpec]:
    shape = (rows,) if width is None else (rows, width)
    return {
        column: replace(spec if isinstance(spec, ArraySpec) else ArraySpec(spec), shape=shape)
        for column, spec in dtypes.items()
    }


def _mapped(path: Path) -> Array:
    """Memory-map an array that this process has written."""
    with open_entry(path) as file:
        return mapped(file)


def _own(folder: Path) -> bool:
    """Return whether this user owns a folder: the unfinished work of another user cannot be resumed."""
    return not hasattr(os, "geteuid") or folder.stat().st_uid == os.geteuid()


def _remove(folder: Path) -> None:
    with suppress(OSError):
        remove_folder(folder)


class _Growing:
    """An array file that is filled from its start; its header has its final shape from the beginning.

    Attributes:
        new: Whether there was no such file.
        raw: The open file.
        sums: Checksum of the header and the rows so far.
    """

    def __init__(self, path: Path, spec: ArraySpec) -> None:
        """Open the file, keeping its content."""
        shape = tuple(side or 0 for side in spec.shape or ())
        header = io.BytesIO()
        self._dtype = np.dtype(spec.dtype)
        np.lib.format.write_array_header_1_0(header, {"descr": self._dtype.str, "fortran_order": False, "shape": shape})
        self._header = header.getvalue()
        self._row = self._dtype.itemsize * math.prod(shape[1:])
        self.new = not path.exists()
        self.raw: IO[bytes] = open(path, "w+b" if self.new else "r+b")  # noqa: SIM115
        self.sums = Checksum()

    def __enter__(self) -> _Growing:
        """Return this file."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file; what :meth:`finish` did not sync is not needed."""
        with suppress(OSError):  # a full disk, again
            self.raw.close()

    def resume(self, rows: int, value: int) -> bool:
        """Keep the first rows; return False if they, or the header, do not have this checksum."""
        length = len(self._header) + rows * self._row
        self.raw.seek(0)
        self.sums = Checksum()
        self.sums.read(self.raw, length)
        self.raw.seek(length)
        self.raw.truncate()
        return (self.sums.length, self.sums.value) == (length, value)

    def restart(self) -> None:
        """Remove all rows."""
        self.raw.seek(0)
        self.raw.truncate()
        self.sums = Checksum()
        self._write(self._header)

    def append(self, rows: Array) -> None:
        """Append rows."""
        self._write(np.ascontiguousarray(rows, self._dtype).reshape(-1).view(np.uint8).data)

    def finish(self) -> None:
        """Append the checksum and wait until everything is on disk."""
        self.raw.write(self.sums.trailer())
        sync(self.raw)

    def _write(self, data: bytes | memoryview) -> None:
        self.raw.write(data)
        self.sums.update(data)
