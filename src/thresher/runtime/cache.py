"""Arrays on disk, keyed by what they are: function, parameters, store, rows kept so far.

Resuming is "the array exists". An array that is still being filled is an append-only file whose
finished length is known from whole batches, so a killed run goes on where it stopped, to the same
bytes. Nothing is pickled; a damaged entry counts as absent.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from thresher.errors import OutputError
from thresher.runtime.files import (
    DAMAGED,
    write_errors,
    writing,
)

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

Array = npt.NDArray[Any]

LIMIT = 20 * 10**9
FORMAT = 1  # of the arrays: raised when what a key stands for changes
_DAY = 86_400


def default_folder() -> str:
    """Return ``$XDG_CACHE_HOME/thresher``, by default ``~/.cache/thresher``."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(base, "thresher")


@dataclass(frozen=True)
class Cache:
    """A folder of arrays by content key.

    Attributes:
        folder: Where.
        limit: Bytes it may hold; the least recently used arrays go first.
        flush_seconds: How much work a kill may cost.
    """

    folder: Path
    limit: int = LIMIT
    flush_seconds: float = 2.0

    @classmethod
    def at(cls, folder: str | os.PathLike[str] | None = None, limit: int = LIMIT) -> Cache:
        """Return the cache in ``folder``, by default ``$XDG_CACHE_HOME/thresher``."""
        return cls(Path(folder or default_folder()), limit)

    def path(self, name: str, key: Mapping[str, Any], suffix: str = ".npy") -> Path:
        """Return where the array of a key lies."""
        text = json.dumps({"name": name, "format": FORMAT, **key}, sort_keys=True, default=str)
        return self.folder / "arrays" / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:40]}{suffix}"

    def load(self, path: Path) -> Array | None:
        """Return an array, memory-mapped, or None where there is none that can be trusted."""
        try:
            found: Array = np.load(path, mmap_mode="r", allow_pickle=False)
        except FileNotFoundError:
            return None
        except OSError:  # not the array's fault
            return None
        except DAMAGED:
            path.unlink(missing_ok=True)
            return None
        os.utime(path)
        return found

    def save(self, path: Path, array: Array) -> Array:
        """Write an array atomically and return it as loaded."""
        with writing(path) as scratch, open(scratch, "wb") as file:
            np.save(file, array, allow_pickle=False)
            _sync(file)
        return self._reload(path)

    def save_all(self, path: Path, arrays: Mapping[str, Array]) -> None:
        """Write several arrays that belong together, atomically."""
        with writing(path) as scratch, open(scratch, "wb") as file:
            np.savez(file, **dict(arrays))  # type: ignore[arg-type]
            _sync(file)

    def load_all(self, path: Path) -> dict[str, Array] | None:
        """Return what :meth:`save_all` wrote, in memory, or None where there is nothing that can be trusted."""
        try:
            with np.load(path, allow_pickle=False) as file:
                return {name: file[name] for name in file.files}
        except FileNotFoundError:
            return None
        except (OSError, KeyError, *DAMAGED):
            path.unlink(missing_ok=True)
            return None

    def array(self, name: str, key: Mapping[str, Any], make: Callable[[], Array]) -> Array:
        """Return the array of a key, making it when it is not there."""
        path = self.path(name, key)
        found = self.load(path)
        return self.save(path, make()) if found is None else found

    def columns(
        self,
        name: str,
        key: Mapping[str, Any],
        dtypes: Mapping[str, str],
        rows: int,
        fill: Callable[[int], Iterator[tuple[Array, ...]]],
        width: int | None = None,
    ) -> dict[str, Array]:
        """Return parallel columns, filled batch by batch in row order and resumed after a kill.

        Args:
            name: What they are.
            key: What they depend on.
            dtypes: Column name -> dtype, in the order of the batches' arrays.
            rows: Final length.
            fill: ``fill(start)`` yields batches of all columns from row ``start`` on. ``start`` is
                the end of a batch yielded by an earlier, unfinished call.
            width: Columns are (rows, width) instead of (rows,).
        """
        paths = {column: self.path(f"{name}.{column}", key) for column in dtypes}
        found = {column: self.load(path) for column, path in paths.items()}
        if all(array is not None for array in found.values()):
            return {column: array for column, array in found.items() if array is not None}
        folder = self.path(name, key, ".partial")
        with write_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            lock = open(folder / "lock", "w")  # noqa: SIM115
        with lock:
            if fcntl is not None:  # released by the system with the process
                fcntl.flock(lock, fcntl.LOCK_EX)
            if not all(path.exists() for path in paths.values()):  # another run may have been faster
                self._fill(folder, dtypes, rows, fill, width)
                with write_errors(folder):
                    for column, path in paths.items():
                        os.replace(folder / f"{column}.npy", path)
        shutil.rmtree(folder, ignore_errors=True)
        return {column: self._reload(path) for column, path in paths.items()}

    def _fill(
        self,
        folder: Path,
        dtypes: Mapping[str, str],
        rows: int,
        fill: Callable[[int], Iterator[tuple[Array, ...]]],
        width: int | None,
    ) -> None:
        counter = folder / "rows"
        with ExitStack() as stack:
            with write_errors(folder):
                text = counter.read_text() if counter.exists() else ""
                done = int(text) if text.isdigit() else 0
                files = [
                    stack.enter_context(_appendable(folder / f"{column}.npy", np.dtype(dtype), rows, width))
                    for column, dtype in dtypes.items()
                ]
                sizes = [np.dtype(dtype).itemsize * (width or 1) for dtype in dtypes.values()]
                begins = [_header_end(file) for file in files]
                for file, begin, size in zip(files, begins, sizes, strict=True):
                    if file.seek(0, os.SEEK_END) < begin + done * size:
                        done = 0  # the counter outlived its data: start over
                for file, begin, size in zip(files, begins, sizes, strict=True):
                    file.seek(begin + done * size)
                    file.truncate()
            flushed = time.monotonic()
            for batch in fill(done):
                with write_errors(folder):
                    for file, array, dtype in zip(files, batch, dtypes.values(), strict=True):
                        file.write(np.ascontiguousarray(array, dtype).data)
                    done += len(batch[0])
                    if time.monotonic() - flushed > self.flush_seconds:
                        for file in files:
                            _sync(file)
                        with writing(counter) as scratch:
                            Path(scratch).write_text(str(done))
                        flushed = time.monotonic()
            with write_errors(folder):
                for file in files:
                    _sync(file)
        if done != rows:
            raise OutputError(f"{folder}: {done:,} of {rows:,} rows were filled; the pool changed while it was read")

    def _reload(self, path: Path) -> Array:
        found = self.load(path)
        if found is None:
            raise OutputError(f"{path}: vanished from the cache; is another process clearing it?")
        return found

    # --- size -----------------------------------------------------------------------------------

    def size(self) -> int:
        """Bytes in use."""
        return sum(size for _, size, _ in self._entries())

    def clear(self) -> int:
        """Remove everything; returns the bytes freed."""
        freed = self.size()
        for name in ("arrays", "joined"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        return freed

    def trim(self) -> int:
        """Remove least recently used entries until the limit holds; returns the bytes freed."""
        entries = sorted(self._entries(), key=lambda entry: entry[2])
        excess = sum(size for _, size, _ in entries) - self.limit
        freed = 0
        for path, size, used in entries:
            if freed >= excess:
                break
            # What is being filled or read by another run: its lock and parts, copies that are read all along.
            age = time.time() - max(used, _last_use(path.parent) if path.parent.suffix == ".partial" else 0)
            if age < _DAY and (path.parent.suffix == ".partial" or path.name.startswith(("local.", "."))):
                continue
            path.unlink(missing_ok=True)
            freed += size
        return freed

    def _entries(self) -> list[tuple[Path, int, float]]:
        entries = []
        for name in ("arrays", "joined"):
            for path in (self.folder / name).rglob("*"):
                try:
                    stat = path.stat()
                except FileNotFoundError:
                    continue
                if path.is_file():
                    entries.append((path, stat.st_size, stat.st_mtime))
        return entries


def _last_use(folder: Path) -> float:
    try:
        return max((path.stat().st_mtime for path in folder.iterdir()), default=0.0)
    except OSError:  # just gone
        return time.time()


def _appendable(path: Path, dtype: np.dtype[Any], rows: int, width: int | None) -> Any:
    """Open an array file with the header of its final shape, keeping what it holds."""
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
