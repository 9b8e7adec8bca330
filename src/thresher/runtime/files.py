"""Atomic writes, and the errors that writing can raise."""

from __future__ import annotations

import ctypes
import errno
import glob
import os
import re
import tempfile
import tokenize
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from thresher.errors import OutputError
from thresher.runtime.locks import create_locked, create_locked_folder, holding, remove_unused, sweep, unused
from thresher.runtime.places import UPLOADING, AnyPath, RemotePath, as_path, files_below

if TYPE_CHECKING:
    import numpy.typing as npt

# The errors that NumPy raises for a damaged array.
DAMAGED = (ValueError, EOFError, TypeError, SyntaxError, tokenize.TokenError, zipfile.BadZipFile)

ELSEWHERE = "choose another place"
_SMALL = 2**20  # bytes of numbers that are kept in memory

_NOT_OFFERED = {errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}  # by a file system that cannot reserve space
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_WRITE_ONLY = _FULL | {errno.EROFS}  # reading never fails with these
_NUMPY_FULL = re.compile(r"\d+ requested and \d+ written|Not enough free space to write")  # NumPy gives no error number


def _is_special(path: Path) -> bool:
    """Return whether a path is a pipe, a socket or a device."""
    return path.exists() and not (path.is_file() or path.is_dir() or path.is_symlink())


class writing:  # noqa: N801 - reads as a verb: with writing(path) as scratch
    """Yield a temporary file next to ``path`` that replaces it if the block succeeds and is removed otherwise.

    The temporary file is locked until then: see :func:`thresher.runtime.locks.unused`.
    """

    def __init__(
        self, path: str | os.PathLike[str] | RemotePath, hint: str = ELSEWHERE, *, cached: bool = False
    ) -> None:
        """Store the arguments; nothing is written before the block begins.

        Args:
            path: The target.
            hint: What the error message suggests if the target cannot be written.
            cached: Whether it is a file of the cache: a pipe in its place is replaced, and not refused.
        """
        self.path = as_path(path)
        self.scratch = ""
        self._hint, self._cached = hint, cached
        self._file = -1

    def __enter__(self) -> str:
        """Create the temporary file; raises OutputError if that fails."""
        suffix = ".tmp" + self.path.suffix
        if isinstance(self.path, RemotePath):
            with write_errors(Path(tempfile.gettempdir()), SCRATCH_FULL):
                self._file, self.scratch = create_locked(tempfile.gettempdir(), _UPLOAD, suffix, 0o600)
        else:
            with write_errors(self.path, self._hint):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                if not self._cached and _is_special(self.path):
                    raise OutputError(f"{self.path}: is a pipe or a device, which would be replaced; give a file")
                self._file, self.scratch = create_locked(self.path.parent, f".{self.path.name}.", suffix)
        if os.name == "nt":  # Windows cannot move an open file and has no locks
            self._close()
        return self.scratch

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Move the file into place, or remove it.

        A write error of the operating system becomes an OutputError; an error in reading another file does not.
        """
        try:
            if kind is not None:
                pass
            elif isinstance(self.path, RemotePath):
                self.path.upload(Path(self.scratch))
            else:
                with write_errors(self.path, self._hint):
                    os.replace(self.scratch, self.path)
        finally:
            with suppress(OSError):
                os.unlink(self.scratch)
            self._close()
        if isinstance(error, OSError) and _of_writing(error, self.path, self.scratch):
            raise _cannot_write(self.path, error, self._hint) from error

    def _close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


@contextmanager
def writing_folder(
    folder: str | os.PathLike[str] | RemotePath, hint: str = ELSEWHERE, *, marker: str = ""
) -> Iterator[Path]:
    """Yield a temporary folder that replaces ``folder`` if the block succeeds and is removed otherwise.

    A remote folder is uploaded file by file. While that lasts, and if it is interrupted, it holds a file
    :data:`UNFINISHED` and no marker.

    Args:
        folder: The target.
        hint: What the error message suggests if it cannot be written.
        marker: The file that is written last and says what the folder is.
    """
    if isinstance(folder, RemotePath):
        with _uploading(folder, marker) as scratch:
            yield scratch
        return
    target = Path(folder)
    if target.is_symlink():
        target = target.resolve()  # what it points to is replaced, not the link
    with write_errors(target, hint):
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep(target)
        around = create_locked_folder(target.parent, f".{target.name}.", ".tmp")
    try:
        with write_errors(target, hint):
            new = around.path / "new"
            new.mkdir()
        try:
            yield new
        except OSError as error:
            if _of_writing(error, target, new):
                raise _cannot_write(target, error, hint) from error
            raise
        with write_errors(target, hint):
            for path in new.rglob("*"):
                if path.is_file():
                    with open(path, "rb") as file:
                        os.fsync(file.fileno())
            if not target.exists():
                new.rename(target)
            elif not _swap(new, target):
                # If the system cannot swap two folders, the target is missing for a moment.
                was = around.path / _WAS
                target.rename(was)
                try:
                    new.rename(target)
                except OSError:
                    was.rename(target)
                    raise
    finally:
        around.remove()


@contextmanager
def _uploading(target: RemotePath, marker: str) -> Iterator[Path]:
    """Yield a temporary folder on this machine that is uploaded at the end."""
    with write_errors(Path(tempfile.gettempdir()), SCRATCH_FULL):
        around = create_locked_folder(tempfile.gettempdir(), _UPLOAD, ".tmp", mode=0o700)
        new = around.path / "new"
        new.mkdir()
    try:
        yield new
        with holding(target / _UPLOAD_LOCK, f"the folder {target}", wait=False) as still_held:
            names = files_below(new)
            old = [name for name in files_below(target) if name not in (*names, UNFINISHED, _UPLOAD_LOCK)]
            (target / UNFINISHED).create(b"")
            if marker:
                (target / marker).unlink(missing_ok=True)
            for name in old:
                (target / name).unlink(missing_ok=True)
            for name in sorted(names, key=lambda name: name == marker):
                if name == marker:
                    still_held()
                (target / name).upload(new / name)
            still_held()
            (target / UNFINISHED).unlink(missing_ok=True)
    finally:
        around.remove()


UNFINISHED = ".unfinished"  # in a remote folder: its upload has not ended
SCRATCH_FULL = "set TMPDIR to a folder with more space"
_UPLOAD, _UPLOAD_LOCK = "thresher-upload-", ".lock"
_WAS = "old"  # the name of a target while it is being replaced


def _swap(a: Path, b: Path) -> bool:
    """Swap two paths atomically if Linux and the file system support it; return whether that worked."""
    try:
        swap = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    here = -100  # AT_FDCWD; the last argument is RENAME_EXCHANGE
    return bool(swap(here, os.fsencode(a.absolute()), here, os.fsencode(b.absolute()), 2) == 0)


def _sweep(target: Path) -> None:
    """Remove temporary folders of the same target whose writer was killed; restore a target that was being replaced."""
    for path in target.parent.glob(f".{glob.escape(target.name)}.*.tmp"):
        if os.path.isdir(path / _WAS):  # not Path.is_dir: it raises for a folder of another user
            with unused(path) as free, suppress(OSError):
                if free and not target.exists():
                    (path / _WAS).rename(target)
        if path.is_dir():
            remove_unused(path)


def refuse_foreign_files(folder: AnyPath, names: Iterable[str]) -> None:
    """Check that a folder contains nothing but the named results, so that replacing it loses nothing else.

    Raises:
        OutputError: The folder contains other files; the message names them.
    """
    own = set(names)
    there = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    if isinstance(folder, RemotePath):
        own |= {UNFINISHED, _UPLOAD_LOCK, *filter(UPLOADING.fullmatch, there)}
    others = sorted(set(there) - own)
    if others:
        raise OutputError(f"{folder}: also contains {', '.join(others[:3])}; move that away or choose another name")


def check_writable(folder: str | os.PathLike[str] | RemotePath) -> None:
    """Raise an OutputError if a folder cannot be written, before any work is done; leaves no files behind."""
    if isinstance(folder, RemotePath):
        sweep(Path(tempfile.gettempdir()).glob(f"{_UPLOAD}*.tmp*"))  # of killed processes
        folder.now()  # writes and removes a file next to it
        return
    target = Path(folder)
    with write_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        os.rmdir(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp"))
        if target.is_symlink() and not target.exists():
            raise FileNotFoundError(errno.ENOENT, "is a broken symlink")


def _of_writing(error: OSError, target: AnyPath, scratch: str | os.PathLike[str]) -> bool:
    """Return whether an error in a writing block is a write error, not an error in reading another file.

    An error that names a file is a write error if that file is the temporary file or the target, or is inside one of
    them. An error that names no file is a write error if only writing can fail with it.
    """
    named = [os.path.abspath(os.fsdecode(name)) for name in (error.filename, error.filename2) if _is_path(name)]
    if named:
        own = [os.path.abspath(place) for place in (target, scratch) if not isinstance(place, RemotePath)]
        return any(name == place or name.startswith(place + os.sep) for name in named for place in own)
    return error.errno in _WRITE_ONLY or (error.errno is None and bool(_NUMPY_FULL.match(str(error))))


def _is_path(name: object) -> bool:
    return isinstance(name, (str, bytes, os.PathLike))


def _cannot_write(path: AnyPath, error: OSError, hint: str) -> OutputError:
    full = error.errno in _FULL or _NUMPY_FULL.match(str(error))
    return OutputError(f"{path}: cannot be written ({error.strerror or error}); {'free some space' if full else hint}")


@contextmanager
def write_errors(path: Path, hint: str = ELSEWHERE) -> Iterator[None]:
    """Turn every error of the system (a full disk, a missing permission) into an OutputError about ``path``.

    For blocks that read nothing except what belongs to ``path``.
    """
    try:
        yield
    except OSError as error:
        raise _cannot_write(path, error, hint) from None


def mapped_space(folder: str | os.PathLike[str] | None, rows: int, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Return an array (rows,) of zeros for numbers that are needed for a while; a large one is mapped from a file.

    The file has no name: it is gone with the array, or with the process. Its space is taken at once: a disk that is
    full when a mapped array is written would end the process.

    Args:
        folder: An existing folder on this machine; None for the system's for temporary files.
        rows: Number of values.
        dtype: Their type.

    Raises:
        OutputError: There is not enough space.
    """
    import numpy as np

    size = rows * np.dtype(dtype).itemsize
    if size <= _SMALL:
        return np.zeros(rows, dtype)
    with write_errors(Path(folder or tempfile.gettempdir())), tempfile.TemporaryFile(dir=folder) as file:
        file.truncate(size)
        if hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(file.fileno(), 0, size)
            except OSError as error:
                if error.errno not in _NOT_OFFERED:
                    raise
        return np.asarray(np.memmap(file, dtype, "r+", shape=(rows,)))


def sync(file: IO[Any]) -> None:
    """Wait until everything that was written to a file is on disk."""
    file.flush()
    os.fsync(file.fileno())
