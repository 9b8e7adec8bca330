"""File locks, and the removal of files that a killed process left behind.

A lock belongs to an open file: the system releases it when the process ends, for whatever reason. Locks, not process
numbers, show whether a file is in use, because containers and hosts share folders but not process numbers.

The locks are ``flock`` locks. They can be shared, and any open file can have one: a temporary file while it is written,
an array while it is mapped. Lock-file libraries support neither. NFS maps ``flock`` to its own locks, which require a
file open for writing and do not work on folders: every exclusive lock here is on a file opened for reading and writing.
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

LOCK = "lock"  # the file whose lock protects the folder it is in
DAY = 86_400.0
NO_LOCKS = "the file system has no locks; make sure that no other process writes there"

_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP}
# EBADF: NFS, for an exclusive lock on a read-only file, so on the file of another user.
_HELD = {errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES, errno.EBADF}
_OPEN = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
_HOLDER = re.compile(rb"process \d+ on [\w.-]{1,255}")
_FIRST_WORD, _NEXT_WORD = 5.0, 60.0  # seconds of waiting before the first message, and between messages
_TRIES = 50  # for a shared lock: other processes hold the file only while they remove it


class Held(enum.Enum):
    """The outcome of trying to lock a file."""

    HERE = "this process holds the lock"
    ELSEWHERE = "another process holds the lock"
    UNKNOWN = "the file system has no locks"


def try_lock(file: int, *, shared: bool = False) -> Held:
    """Try to lock an open file, without waiting; closing the file releases the lock.

    Args:
        file: File descriptor, open for writing unless ``shared``.
        shared: Take a shared lock: other processes can share it, but not lock the file exclusively.

    Raises:
        OSError: Locking failed for a reason other than an existing lock or a file system without locks.
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
    """Hold a lock file during the block; it is created at the start and removed at the end.

    Args:
        path: The lock file. Its folder is created if it is missing.
        what: What the lock protects, for messages: "the pool out/".
        wait: Wait while another process holds the lock; otherwise raise.
        say: Called with a message after some seconds of waiting.

    Yields:
        True, or False if the file system has no locks: then other processes are not kept out (report
        :data:`NO_LOCKS`).

    Raises:
        OutputError: Another process holds the lock and ``wait`` is false, or the lock file cannot be opened.
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
                    break  # the previous holder removed it in the meantime
                if not wait:
                    raise OutputError(f"{what}: {_holder(file)} is using it; wait until it has finished")
            except BaseException:
                os.close(file)
                raise
            waited = time.monotonic() - begin
            if say and waited >= word:
                say(f"waiting for {what}: {_holder(file)} is using it ({waited:.0f} s so far)")
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
                time.sleep(0.002)
            except PermissionError:
                with suppress(OSError):  # left by a killed process of another user, in a shared folder
                    return os.open(path, os.O_RDONLY | _OPEN)
                raise
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    except OSError as error:
        raise OutputError(f"{path}: cannot be locked ({error.strerror or error}); choose another folder") from error


def _holder(file: int) -> str:
    """Return the holder that a lock file names; the text comes from another process, so its format is checked."""
    try:
        match = _HOLDER.match(os.pread(file, 300, 0))
    except OSError:
        match = None
    return match.group().decode("ascii", "replace") if match else "another process"


def _is(file: int, path: str | os.PathLike[str]) -> bool:
    """Return whether an open file is still the file at a path."""
    try:
        return os.path.samestat(os.fstat(file), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


# --- files in use ---------------------------------------------------------------------------------


class Pin:
    """Protects a file from removal by :func:`remove_unused` while this object exists.

    A pickled copy in another process does not protect the file; the original object does.
    """

    def __init__(self, file: int | None = None) -> None:
        """Take ownership of an open, locked file."""
        if file is not None:
            weakref.finalize(self, os.close, file)

    def __reduce__(self) -> tuple[type[Pin], tuple[()]]:
        """Pickle without the file."""
        return Pin, ()


def pin(path: str | os.PathLike[str]) -> Pin | None:
    """Mark a file as in use and as just used; return None if there is no such file."""
    file = open_shared(path)
    return None if file is None else Pin(file)


def open_shared(path: str | os.PathLike[str]) -> int | None:
    """Open a file for reading with a shared lock, and mark it as just used.

    If the file system has no locks, or the lock cannot be acquired, the file is opened without one. A memory mapping of
    the file keeps the lock after the descriptor is closed.

    Returns:
        The file descriptor; None if there is no such file.

    Raises:
        OSError: The file cannot be read.
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
        except OSError:  # it can be read even without a lock
            break
        os.close(file)
        time.sleep(0.002)
    else:
        try:
            file = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        except FileNotFoundError:
            return None
    with suppress(OSError):  # the file of another user
        os.utime(path)
    return file


# --- scratch files --------------------------------------------------------------------------------


def create_locked(folder: str | os.PathLike[str], prefix: str, suffix: str, mode: int = 0o666) -> tuple[int, str]:
    """Create a file with a unique name, locked until its descriptor is closed.

    Args:
        folder: Folder of the file.
        prefix: Prefix of its name.
        suffix: Suffix of its name.
        mode: Its permissions, subject to the umask.

    Returns:
        The file descriptor, open for reading and writing, and the path.

    Raises:
        OSError: The file cannot be created.
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
        os.close(file)  # another process removed it before it was locked


def create_locked_folder(folder: str | os.PathLike[str], prefix: str, suffix: str = "", mode: int = 0o777) -> Scratch:
    """Create a folder with a unique name, in use until :meth:`Scratch.remove` or the end of the process.

    Raises:
        OSError: The folder cannot be created.
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
        path: The folder; a file named ``lock`` in it belongs to this module.
    """

    def __init__(self, path: Path, file: int) -> None:
        """Take ownership of the open lock file of a folder."""
        self.path = path
        self._close = weakref.finalize(self, os.close, file)

    def remove(self) -> None:
        """Remove the folder, as far as possible."""
        if sys.platform == "win32":  # Windows cannot remove an open file and has no locks
            self._close()
        with suppress(OSError):
            _remove_all(self.path)
        self._close()


@contextmanager
def unused(path: Path, quiet: float = DAY) -> Iterator[bool]:
    """Check whether a file or folder is in use, and prevent other processes from using it during the block.

    Args:
        path: A file that is locked while in use, or a folder with such a file ``lock``.
        quiet: If locks are not available, the path counts as in use until it has not changed for this many seconds.

    Yields:
        True if it is unused.
    """
    file = None
    try:
        state = Held.UNKNOWN
        try:
            file = _existing(path / LOCK if path.is_dir() else path)
            state = try_lock(file)
        except FileNotFoundError:
            pass
        except OSError:  # of another user, or a symlink
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
    """Return the time of the last change of a file or folder, in seconds since 1970; now if it was just removed."""
    try:
        inside = [one for one in path.rglob("*") if not one.is_dir()] if path.is_dir() else []
        return max(float(one.lstat().st_mtime) for one in inside or [path])
    except OSError:
        return time.time()


def remove_unused(path: Path, quiet: float = DAY) -> bool:
    """Remove a file or folder unless it is in use, see :func:`unused`; return whether it was removed."""
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            path.rmdir()  # empty: unused, or so new that its creator makes another
            return True
    with unused(path, quiet) as free:
        if not free:
            return False
        try:
            if path.is_dir():
                remove_folder(path)
            else:
                path.unlink()
        except OSError:  # of another user
            return False
        return True


def remove_folder(path: Path) -> None:
    """Remove a folder whose lock this process holds. No other process sees a partly removed folder.

    Raises:
        OSError: The folder cannot be removed.
    """
    away = path.with_name(f"{path.stem}.{secrets.token_hex(4)}{path.suffix}")
    path.rename(away)
    _remove_all(away)


def _remove_all(folder: Path) -> None:
    """Remove a folder, its lock file last: if this process is killed, the next one can still remove the rest."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()
    (folder / LOCK).unlink(missing_ok=True)
    folder.rmdir()


def sweep(paths: Iterable[Path], quiet: float = DAY) -> None:
    """Remove the files and folders that are not in use, which killed processes left behind."""
    for path in paths:
        remove_unused(path, quiet)
