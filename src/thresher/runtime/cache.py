"""Arrays on disk, keyed by their content: function, parameters, store, rows kept so far.

A result is reused if its array exists. An array that is still being filled is an append-only file whose finished
length is a number of whole batches, so a killed run resumes where it stopped and produces the same bytes. Nothing is
pickled; a damaged entry is treated as missing.

A cache can be shared by runs, users and hosts: entries in use are locked, and no other process removes them.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from thresher.errors import OutputError
from thresher.runtime.files import DAMAGED, write_errors, writing
from thresher.runtime.locks import (
    DAY,
    LOCK,
    holding,
    keep_while,
    last_change,
    open_shared,
    remove_folder,
    remove_unused,
)
from thresher.runtime.random import digest
from thresher.runtime.resumable import Resumable

Array = npt.NDArray[Any]

LIMIT = 20 * 10**9
FORMAT = 1  # of the arrays: increased when the meaning of a key changes
_HINT = "choose another cache folder with --cache"
_HOUR = 3600.0
_MOVABLE = os.name != "nt"  # whether a memory-mapped file can be moved


def default_folder() -> str:
    """Return ``$XDG_CACHE_HOME/thresher``, by default the system's cache folder: on Linux ``~/.cache/thresher``."""
    if base := os.environ.get("XDG_CACHE_HOME"):
        return os.path.join(base, "thresher")
    import platformdirs

    return str(platformdirs.user_cache_dir("thresher", appauthor=False))


@dataclass(frozen=True)
class Cache:
    """A folder of arrays by content key.

    Attributes:
        folder: The folder.
        limit: Maximum size in bytes; the least recently used arrays are removed first, arrays in use never.
        flush_seconds: Seconds between saves: how much work is lost at most if the process is killed.
    """

    folder: Path
    limit: int = LIMIT
    flush_seconds: float = 2.0

    @classmethod
    def at(cls, folder: str | os.PathLike[str] | None = None, limit: int = LIMIT) -> Cache:
        """Return the cache in ``folder``, by default :func:`default_folder`."""
        return cls(Path(folder or default_folder()), limit)

    def path(self, name: str, key: Mapping[str, Any], suffix: str = ".npy") -> Path:
        """Return the path of the array of a key."""
        text = json.dumps({"name": name, "format": FORMAT, **key}, sort_keys=True, default=str)
        return self.folder / "arrays" / f"{name}-{digest(text)[:40]}{suffix}"

    def load(self, path: Path) -> Array | None:
        """Return an array, memory-mapped, or None if it is missing or damaged.

        No run removes the file while the array, or a view of it, exists.
        """
        try:
            return mapped(path)
        except OSError:  # a read error, not damage
            return None
        except DAMAGED:
            with suppress(OSError):  # the file of another user
                path.unlink()
            return None

    def save(self, path: Path, array: Array) -> Array:
        """Write an array atomically and return it as loaded.

        Raises:
            OutputError: The array cannot be written.
        """
        with writing(path, _HINT) as scratch, open(scratch, "wb") as file:
            np.save(file, array, allow_pickle=False)
            _sync(file)
        loaded = self.load(path)
        return np.asarray(array) if loaded is None else loaded

    def resumable(self, path: Path) -> Resumable:
        """Return the state of the loop that computes the array at ``path``; remove it once the array is saved."""
        return Resumable(path.with_suffix(".state.npz"), self.flush_seconds, _HINT)

    def array(self, name: str, key: Mapping[str, Any], make: Callable[[], Array]) -> Array:
        """Return the array of a key; compute and save it if it is missing."""
        path = self.path(name, key)
        array = self.load(path)
        return self.save(path, make()) if array is None else array

    def columns(
        self,
        name: str,
        key: Mapping[str, Any],
        dtypes: Mapping[str, str],
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
            dtypes: Column name -> dtype, in the order of the batches' arrays.
            rows: Final length.
            fill: ``fill(start)`` yields batches of all columns from row ``start`` on. ``start`` is
                the end of a batch yielded by an earlier, unfinished call.
            width: Columns are (rows, width) instead of (rows,).
            say: Called with a message while waiting for another run.

        Raises:
            OutputError: The folder cannot be written, or ``fill`` ended early.
        """
        paths = {column: self.path(f"{name}.{column}", key) for column in dtypes}
        if arrays := self._all(paths):
            return arrays
        with self._filling(self.path(name, key, ".partial"), name, say) as folder:
            if arrays := self._all(paths):  # another run finished first
                return arrays
            self._fill(folder, dtypes, rows, fill, width)
            for column, path in paths.items():
                made = folder / f"{column}.npy"
                with write_errors(path, _HINT):
                    array = mapped(made) if _MOVABLE else None  # mapped first, so that no other run can remove it
                    os.replace(made, path)
                    arrays[column] = mapped(path) if array is None else array
        return arrays

    def _all(self, paths: Mapping[str, Path]) -> dict[str, Array]:
        """Return all columns, or {} if any is missing."""
        loaded = {column: self.load(path) for column, path in paths.items()}
        present = {column: array for column, array in loaded.items() if array is not None}
        return present if len(present) == len(paths) else {}

    @contextmanager
    def _filling(self, folder: Path, name: str, say: Callable[[str], None] | None) -> Iterator[Path]:
        """Yield a folder for filling columns that no other run uses."""
        with write_errors(folder, _HINT):
            folder.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            try:
                stack.enter_context(holding(folder / LOCK, f"{name} in the cache {self.folder}", say=say))
                locked = _own(folder)
            except OutputError:  # the lock of another user
                locked = False
            if not locked:
                with write_errors(folder, _HINT):
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
        dtypes: Mapping[str, str],
        rows: int,
        fill: Callable[[int], Iterator[tuple[Array, ...]]],
        width: int | None,
    ) -> None:
        saved = Resumable(folder / "rows.npz", self.flush_seconds, _HINT)
        state = saved.load("rows")
        done = int(state["rows"]) if state else 0
        sizes = [np.dtype(dtype).itemsize * (width or 1) for dtype in dtypes.values()]
        with ExitStack() as stack:
            with write_errors(folder, _HINT):
                files = [
                    stack.enter_context(_appendable(folder / f"{column}.npy", np.dtype(dtype), rows, width))
                    for column, dtype in dtypes.items()
                ]
                begins = [_header_end(file) for file in files]
                for file, begin, size in zip(files, begins, sizes, strict=True):
                    if not 0 <= done <= rows or file.seek(0, os.SEEK_END) < begin + done * size:
                        done = 0  # the count was saved but its data was lost: start over
                for file, begin, size in zip(files, begins, sizes, strict=True):
                    file.seek(begin + done * size)
                    file.truncate()

            def rows_on_disk() -> dict[str, int]:
                for file in files:
                    _sync(file)
                return {"rows": done}

            for batch in fill(done):
                with write_errors(folder, _HINT):
                    for file, array, dtype in zip(files, batch, dtypes.values(), strict=True):
                        file.write(np.ascontiguousarray(array, dtype).data)
                    done += len(batch[0])
                    saved.offer(rows_on_disk)
            with write_errors(folder, _HINT):
                rows_on_disk()
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


def mapped(path: Path) -> Array:
    """Memory-map an array file for reading; the file counts as in use while the array, or a view of it, exists.

    Raises:
        OSError: The file cannot be read.
        ValueError: The file is damaged or contains objects; see :data:`thresher.runtime.files.DAMAGED`.
    """
    handle = open_shared(path)
    if handle is None:
        raise FileNotFoundError(path)
    with os.fdopen(handle, "rb") as file:  # the mapping keeps the file open, and with it the lock
        version = np.lib.format.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"{path}: unsupported version {version} of the NumPy format")
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, by_column, dtype = read(file)
        if dtype.hasobject:
            raise ValueError(f"{path}: contains Python objects")
        array = np.memmap(file, dtype, "r", file.tell(), shape, "F" if by_column else "C")
        keep_while(getattr(array, "_mmap"), path, handle)  # noqa: B009 - the mapping, which views keep too
        return array


def _own(folder: Path) -> bool:
    """Return whether this user owns a folder: the unfinished work of another user cannot be resumed."""
    return not hasattr(os, "geteuid") or folder.stat().st_uid == os.geteuid()


def _remove(folder: Path) -> None:
    with suppress(OSError):
        remove_folder(folder)


def _appendable(path: Path, dtype: np.dtype[Any], rows: int, width: int | None) -> Any:
    """Open an array file with the header of its final shape, keeping its content."""
    file = open(path, "r+b" if path.exists() else "w+b")  # noqa: SIM115
    shape = (rows,) if width is None else (rows, width)
    np.lib.format.write_array_header_1_0(file, {"descr": dtype.str, "fortran_order": False, "shape": shape})
    return file


def _header_end(file: Any) -> int:
    file.seek(0)
    np.lib.format.read_magic(file)
    np.lib.format.read_array_header_1_0(file)
    return int(file.tell())


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
