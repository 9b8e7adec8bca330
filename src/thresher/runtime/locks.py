"""Locks on files, and the removal of what a killed process left behind.

A lock is held by an open file: the system releases it with the process, however that ends. Whether somebody is at work
is asked of a lock and never of a process number, because containers and hosts share folders but no process numbers.

The locks are those of ``flock``. They can be shared, and lie on any open file: on a scratch file while it is written,
on an array as long as it is mapped. Libraries of lock files offer neither. NFS maps them to its own locks, which need a
file open for writing and are not kept for folders: every exclusive lock here lies on a file opened for both.
"""

from __future__ import annotations

import enum
import errno
import os
import re
import secrets
import shutil
import socket
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from thresher.errors import OutputError

if sys.platform != "win32":
    import fcntl

LOCK = "lock"  # the file in a folder whose lock stands for the folder
DAY = 86_400.0
NO_LOCKS = "the file system has no locks; make sure that no other process writes there"

_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP}
# EBADF: NFS, asked for an exclusive lock on what may only be read, so on somebody else's file.
_HELD = {errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES, errno.EBADF}
_OPEN = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
_HOLDER = re.compile(rb"process \d+ on [\w.-]{1,255}")
_FIRST_WORD, _NEXT_WORD = 5.0, 60.0  # seconds of waiting before it is said, and said again
_TRIES = 50  # for a shared lock: others hold the file for as long as it takes to remove it


class Held(enum.Enum):
    """The outcome of trying to lock a file."""

    HERE = "this process holds the lock"
    ELSEWHERE = "somebody else holds it"
    UNKNOWN = "the file system has no locks"


def try_lock(file: int, *, shared: bool = False) -> Held:
    """Try to lock an open file, without waiting; closing the file releases the lock.

    Args:
        file: Descriptor, open for writing unless ``shared``.
        shared: Take a lock that others can share, but not hold exclusively.

    Raises:
        OSError: The file cannot be locked for another reason than a holder or a file system without locks.
    """
    if sys.platform == "win32":
        return Held.UNKNOWN
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return Held.UNKNOWN
        if error.errno in _HELD:
            return Held.ELSEWHERE
        raise
    return Held.HERE


@contextmanager
def holding(
    path: str | os.PathLike[str],
    what: str,
    *,
    wait: bool = True,
    say: Callable[[str], None] | None = None,
) -> Iterator[bool]:
    """Hold a lock file for the time of the block; it is made, and removed at the end.

    Args:
        path: The lock file. Its folder is made where it is missing.
        what: What the lock is for, to be named in messages: "the pool out/".
        wait: Wait for another holder, else refuse.
        say: Where a wait of more than some seconds is reported.

    Yields:
        True, or False where the file system has no locks: then nothing keeps others out (say :data:`NO_LOCKS`).

    Raises:
        OutputError: Another process holds it and ``wait`` is false, or the lock file cannot be opened.
    """
    path = Path(path)
    file, state = _acquired(path, what, wait, say)
    try:
        if state is Held.HERE:
            with suppress(OSError):  # for messages only
                os.ftruncate(file, 0)
                os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        yield state is Held.HERE
    finally:
        with suppress(OSError):
            if state is Held.HERE and _is(file, path):  # only its holder removes a lock file
                path.unlink()
        os.close(file)
        with suppress(OSError):
            if state is Held.UNKNOWN:
                path.unlink()


def _acquired(path: Path, what: str, wait: bool, say: Callable[[str], None] | None) -> tuple[int, Held]:
    begin = time.monotonic()
    pause, word = 0.01, _FIRST_WORD
    while True:
        file = _lock_file(path)
        while True:
            try:
                state = try_lock(file)
                if state is Held.UNKNOWN or (state is Held.HERE and _is(file, path)):
                    return file, state
                if state is Held.HERE or not _is(file, path):
                    break  # its holder removed it meanwhile
                if not wait:
                    raise OutputError(f"{what}: {_holder(file)} is at work there; wait until it has finished")
            except BaseException:
                os.close(file)
                raise
            waited = time.monotonic() - begin
            if say and waited >= word:
                say(f"waiting for {what}: {_holder(file)} is at work there ({waited:.0f} s so far)")
                word = waited + _NEXT_WORD
            try:
                time.sleep(pause)
            except BaseException:
                os.close(file)
                raise
            pause = min(2 * pause, 0.5)
        os.close(file)


def _lock_file(path: Path) -> int:
    try:
        for _ in range(_TRIES):
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                return os.open(path, os.O_RDWR | os.O_CREAT | _OPEN, 0o666)
            except (FileNotFoundError, FileExistsError):  # its folder was removed by the last holder meanwhile
                if path.parent.exists() and not path.parent.is_dir():
                    raise
                continue
            except PermissionError:
                with suppress(OSError):  # left by another user who was killed, in a folder of both
                    return os.open(path, os.O_RDONLY | _OPEN)
                raise
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    except OSError as error:
        raise OutputError(f"{path}: cannot be locked ({error.strerror or error}); choose another place") from error


def _holder(file: int) -> str:
    """Return who says to hold a lock file; the text is somebody else's."""
    try:
        found = _HOLDER.match(os.pread(file, 300, 0))
    except OSError:
        found = None
    return found.group().decode("ascii", "replace") if found else "another process"


def _is(file: int, path: str | os.PathLike[str]) -> bool:
    """Whether an open file still lies at a path."""
    try:
        return os.path.samestat(os.fstat(file), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


# --- files in use ---------------------------------------------------------------------------------


class Pin:
    """Keeps a file from being removed by :func:`remove_unused` for as long as this object lives.

    A copy in another process (pickled) keeps nothing: the process it came from does.
    """

    def __init__(self, file: int | None = None) -> None:
        """Own an open file that is locked."""
        if file is not None:
            weakref.finalize(self, os.close, file)

    def __reduce__(self) -> tuple[type[Pin], tuple[()]]:
        """Travel without the file."""
        return Pin, ()


def pin(path: str | os.PathLike[str]) -> Pin | None:
    """Mark a file as in use, and as just used; None where there is no such file."""
    file = open_shared(path)
    return None if file is None else Pin(file)


def open_shared(path: str | os.PathLike[str]) -> int | None:
    """Open a file for reading with a shared lock, and mark it as just used.

    Where the file system has no locks, or the lock cannot be had, it is open without. A mapping of the file keeps the
    lock after the descriptor is closed.

    Returns:
        The descriptor; None where there is no such file.

    Raises:
        OSError: It cannot be read.
    """
    for _ in range(_TRIES):
        try:
            file = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        except FileNotFoundError:
            return None
        try:
            state = try_lock(file, shared=True)
            if state is Held.UNKNOWN or (state is Held.HERE and _is(file, os.path.realpath(path))):
                break
        except OSError:  # pinned or not, it can be read
            break
        os.close(file)
        time.sleep(0.002)
    else:
        try:
            file = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        except FileNotFoundError:
            return None
    with suppress(OSError):  # another user's file
        os.utime(path)
    return file


# --- scratch files --------------------------------------------------------------------------------


def create_locked(folder: str | os.PathLike[str], prefix: str, suffix: str, mode: int = 0o666) -> tuple[int, str]:
    """Create a file with a name of its own, locked until its descriptor is closed.

    Args:
        folder: Where.
        prefix: Of its name.
        suffix: Of its name.
        mode: Its permissions, less what the process's umask takes away.

    Returns:
        The descriptor, open for reading and writing, and the path.

    Raises:
        OSError: It cannot be created.
    """
    while True:
        path = os.path.join(folder, f"{prefix}{secrets.token_hex(4)}{suffix}")
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | _OPEN, mode)
        except FileExistsError:
            continue
        try:
            if try_lock(file) is not Held.ELSEWHERE and os.path.exists(path):
                return file, path
        except OSError:
            os.close(file)
            os.unlink(path)
            raise
        os.close(file)  # somebody swept it before it was locked


def create_locked_folder(folder: str | os.PathLike[str], prefix: str, suffix: str = "", mode: int = 0o777) -> Scratch:
    """Create a folder with a name of its own, in use until :meth:`Scratch.remove` or the end of the process.

    Raises:
        OSError: It cannot be created.
    """
    while True:
        path = Path(folder) / f"{prefix}{secrets.token_hex(4)}{suffix}"
        try:
            path.mkdir(mode=mode)
            file = os.open(path / LOCK, os.O_RDWR | os.O_CREAT | _OPEN, 0o666)
        except (FileExistsError, FileNotFoundError):
            if not os.path.isdir(folder):
                raise
            continue
        if try_lock(file) is not Held.ELSEWHERE and (path / LOCK).exists():
            return Scratch(path, file)
        os.close(file)


class Scratch:
    """A folder in use.

    Attributes:
        path: Where; a file named ``lock`` in it belongs to this module.
    """

    def __init__(self, path: Path, file: int) -> None:
        """Own the open lock file of a folder."""
        self.path = path
        self._close = weakref.finalize(self, os.close, file)

    def remove(self) -> None:
        """Remove the folder, as far as that is possible."""
        if sys.platform == "win32":  # where an open file cannot be removed, and there are no locks
            self._close()
        with suppress(OSError):
            _remove_all(self.path)
        self._close()


@contextmanager
def unused(path: Path, quiet: float = DAY) -> Iterator[bool]:
    """Find out whether a file or folder is in use, and keep others from using it for the time of the block.

    Args:
        path: A file that is locked while in use, or a folder with such a file ``lock``.
        quiet: Where no lock can be asked, it counts as in use until nothing has changed for so many seconds.

    Yields:
        Whether it is unused.
    """
    file = None
    try:
        state = Held.UNKNOWN
        try:
            file = _existing(path / LOCK if path.is_dir() else path)
            state = try_lock(file)
        except FileNotFoundError:
            pass
        except OSError:  # another user's, or a link
            state = Held.ELSEWHERE
        yield not path.is_symlink() and (
            state is Held.HERE or (state is Held.UNKNOWN and time.time() - last_change(path) >= quiet)
        )
    finally:
        if file is not None:
            os.close(file)


def _existing(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | _OPEN)
    except PermissionError:
        return os.open(path, os.O_RDONLY | _OPEN)


def last_change(path: Path) -> float:
    """Return when a file, or any file in a folder, changed last, in seconds since 1970; now if it is just gone."""
    try:
        inside = [one for one in path.rglob("*") if not one.is_dir()] if path.is_dir() else []
        return max(float(one.lstat().st_mtime) for one in inside or [path])
    except OSError:
        return time.time()


def remove_unused(path: Path, quiet: float = DAY) -> bool:
    """Remove a file or folder unless it is in use, see :func:`unused`; returns whether that was done."""
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            path.rmdir()  # empty: nobody's, or so new that its maker makes another
            return True
    with unused(path, quiet) as free:
        if not free:
            return False
        try:
            if path.is_dir():
                remove_folder(path)
            else:
                path.unlink()
        except OSError:  # another user's
            return False
        return True


def remove_folder(path: Path) -> None:
    """Remove a folder whose lock this process holds: whoever comes next finds none, not one that is half empty.

    Raises:
        OSError: It cannot be removed.
    """
    away = path.with_name(f"{path.stem}.{secrets.token_hex(4)}{path.suffix}")
    path.rename(away)
    _remove_all(away)


def _remove_all(folder: Path) -> None:
    """Remove a folder, its lock file at last: until then a killed process leaves what the next one can remove."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()
    (folder / LOCK).unlink(missing_ok=True)
    folder.rmdir()


def sweep(paths: Iterable[Path], quiet: float = DAY) -> None:
    """Remove those files and folders that are not in use: what killed processes left."""
    for path in paths:
        remove_unused(path, quiet)
