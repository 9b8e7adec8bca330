"""File locks, and the removal of files that a killed process left behind.

A lock belongs to an open file: the system releases it when the process ends, for whatever reason. Locks, not process
numbers, show whether a file is in use, because containers and hosts share folders but not process numbers.

The locks are ``flock`` locks. They can be shared, and any open file can have one: a temporary file while it is written,
an array while it is mapped. Lock-file libraries support neither. NFS maps ``flock`` to its own locks, which require a
file open for writing and do not work on folders: every exclusive lock here is on a file opened for reading and writing.

Some file systems have no locks. There, the process that uses a file updates its modification time every few seconds,
and other processes count the file as unused once that stops: see :mod:`thresher.runtime.leases`.
"""

from __future__ import annotations

import enum
import errno
import glob
import os
import re
import secrets
import shutil
import socket
import stat
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from hashlib import blake2b
from pathlib import Path

from thresher.errors import OutputError
from thresher.runtime import remote_locks
from thresher.runtime.leases import HEART, LEASE, Hold, Lease, age, taken_over
from thresher.runtime.places import RemotePath
from thresher.runtime.process import end_with_parent

if sys.platform != "win32":
    import fcntl

LOCK = "lock"  # the file whose lock protects the folder it is in
DAY = 86_400.0

_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP}
# EBADF: NFS, for an exclusive lock on a read-only file, so on the file of another user.
_HELD = {errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES, errno.EBADF}
_OPEN = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
_HOLDER = re.compile(rb"process \d+ on [\w.-]{1,255}")
_FIRST_WORD, _NEXT_WORD = 5.0, 60.0  # seconds of waiting before the first message, and between messages
_TEXT = 400  # bytes of a lock file that are read
_TRIES = 50  # for a shared lock: other processes hold the file only while they remove it


class Held(enum.Enum):
    """The outcome of trying to lock a file."""

    HERE = "this process holds the lock"
    ELSEWHERE = "another process holds the lock"
    UNKNOWN = "the file system has no locks"  # a lease shows whether the file is in use


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
    path: str | os.PathLike[str] | RemotePath,
    what: str,
    *,
    wait: bool = True,
    say: Callable[[str], None] | None = None,
    lease: Lease = LEASE,
) -> Iterator[Callable[[], None]]:
    """Hold a lock file during the block; it is created at the start and removed at the end.

    If the file system has no locks, the holder has a lease: when it is killed, others can hold the file once the lease
    has ended. A holder that is suspended for longer loses it, too. So a block calls the function that is yielded before
    it writes what marks a result as complete.

    Yields:
        A function that raises an OutputError if another process took the lock over.

    Args:
        path: The lock file. Its folder is created if it is missing.
        what: What the lock protects, for messages: "the pool out/".
        wait: Wait while another process holds the lock; otherwise raise.
        say: Called with a message after some seconds of waiting.
        lease: For file systems without locks; the same for all processes.

    Raises:
        OutputError: Another process holds the lock and ``wait`` is false, or the lock file cannot be opened.
    """
    if isinstance(path, RemotePath):
        hold = remote_locks.hold(path, what, wait, say, lease)
    else:
        hold = _acquired(Path(path), what, wait, say, lease)
    try:
        yield hold.check
    finally:
        hold.release()


def set_up_worker(lock: str | os.PathLike[str] | None, worker: int = 0) -> None:
    """Set up a worker of a loader: it ends with its parent, and does not hold the lock of its parent.

    A forked worker has a copy of every open file of its parent. The lock would last until the worker ends, which may be
    seconds after a killed parent.

    Args:
        lock: The lock file of the parent; None for none.
        worker: Ignored; torch gives the number of the worker.
    """
    end_with_parent()
    if lock is None:
        return
    with suppress(OSError):
        own = os.stat(lock, follow_symlinks=False)
        for file in map(int, os.listdir("/dev/fd")):
            with suppress(OSError):
                if os.path.samestat(os.fstat(file), own):
                    os.close(file)


def _acquired(path: Path, what: str, wait: bool, say: Callable[[str], None] | None, lease: Lease) -> Hold:
    begin = time.monotonic()
    pause, word, look = 0.01, _FIRST_WORD, 0.0
    while True:
        file, is_new = _lock_file(path)
        try:
            state = try_lock(file)
            if state is Held.HERE and _is(file, path):
                return _locked(path, file)
            if state is Held.UNKNOWN and is_new:
                return _leased(path, file, what, lease)
            again = state is Held.HERE or not _is(file, path)  # the previous holder removed it in the meantime
            using = f"{what}: {_holder(file)} is using it"
        except BaseException:
            os.close(file)
            raise
        os.close(file)
        waited = time.monotonic() - begin
        if state is Held.UNKNOWN:
            using += f" (if it was killed, its lease ends after {lease.ends:.0f} s)"
            if waited >= look:
                look = waited + lease.heartbeat
                again |= _take_over(path, what, lease)
        if again:
            continue
        if not wait:
            raise OutputError(f"{using}; wait until it has finished")
        if say and waited >= word:
            say(f"waiting for {using}, {waited:.0f} s so far")
            word = waited + _NEXT_WORD
        time.sleep(pause)
        pause = min(2 * pause, 0.5)


def _locked(path: Path, file: int) -> Hold:
    """Name the holder in a locked file; its lock cannot be taken over."""
    with suppress(OSError):  # for messages only
        os.ftruncate(file, 0)
        os.pwrite(file, _own_name(), 0)

    def release() -> None:
        with suppress(OSError):
            if _is(file, path):  # only its holder removes a lock file
                path.unlink()
        os.close(file)

    return Hold(release, lambda: None)


def _leased(path: Path, file: int, what: str, lease: Lease) -> Hold:
    """Keep the lease of a new file."""
    text = _own_name() + secrets.token_bytes(8).hex().encode()
    try:
        os.write(file, text)
        end = HEART.keep(path, lease, file)
    except OSError as error:
        with suppress(OSError):
            path.unlink()
        raise _cannot_be_locked(path, error) from error

    def release() -> None:
        end()
        os.close(file)
        with suppress(OSError), _claimed(path, text, lease) as claimed:
            if claimed and _text(path) == text:
                path.unlink()

    def check() -> None:
        try:
            now = _text(path)
        except FileNotFoundError:
            now = b""
        if now != text:
            raise taken_over(what, lease)

    return Hold(release, check)


def _own_name() -> bytes:
    return f"process {os.getpid()} on {socket.gethostname()}\n".encode()


def _take_over(path: Path, what: str, lease: Lease) -> bool:
    """Remove a lock file whose lease has ended; return whether the file may be gone.

    Raises:
        OutputError: It belongs to another user, and only that user can remove it.
    """
    try:
        with _stale(path, lease) as stale:
            if stale:
                path.unlink()
    except FileNotFoundError:
        pass
    except OSError as error:
        raise OutputError(
            f"{what}: a killed process of another user left {path}, which cannot be removed ({error.strerror}); ask "
            "that user to remove it"
        ) from error
    return not path.exists()


@contextmanager
def _stale(path: Path, lease: Lease) -> Iterator[bool]:
    """Check whether the lease of a lock file has ended; if so, no other process can remove the file during the block.

    Yields:
        True if the lease has ended.
    """
    text = _text_if_stale(path, lease)
    if text is None:
        yield False
        return
    with _claimed(path, text, lease) as claimed:
        # Again: the file may have been replaced before it was claimed.
        yield claimed and _text_if_stale(path, lease) == text


def _text_if_stale(path: Path, lease: Lease) -> bytes | None:
    """Return the text of a lock file whose lease has ended; None if it has not, or there is no such file."""
    try:
        text = _text(path)
        return text if age(path) >= lease.ends else None
    except OSError:  # it was just removed, or it is a symlink
        return None


@contextmanager
def _claimed(path: Path, text: bytes, lease: Lease) -> Iterator[bool]:
    """Claim the right to remove the lock file with this text: of all processes, one at a time has it.

    The text of a lock file is unique. So of several processes that want to take over the lock of one killed process,
    none removes the file of the next holder.

    Yields:
        False if another process has the right.

    Raises:
        OSError: Nothing can be written in the folder.
    """
    name = blake2b(text, digest_size=8).hexdigest()
    claim = path.with_name(f".{path.name.lstrip('.')}.{name}.tmp")
    try:
        file = os.open(claim, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _OPEN, 0o666)
    except FileExistsError:
        with _stale(claim, lease) as stale, suppress(OSError):  # of a process that was killed here
            if stale:
                claim.unlink()
        yield False
        return
    try:
        with suppress(OSError):
            os.write(file, secrets.token_bytes(8))
        yield True
    finally:
        os.close(file)
        with suppress(OSError):
            claim.unlink()


def _lock_file(path: Path) -> tuple[int, bool]:
    """Open a lock file; return its descriptor, and whether this process created it."""
    try:
        for _ in range(_TRIES):
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | _OPEN, 0o666), True
            except FileExistsError:
                with suppress(FileNotFoundError):  # one call: the folder may be removed at any time
                    if not stat.S_ISDIR(os.stat(path.parent).st_mode):
                        raise
            except FileNotFoundError:  # its folder was removed by the last holder meanwhile
                time.sleep(0.002)
                continue
            with suppress(FileNotFoundError):  # removed meanwhile
                return _existing(path), False
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    except OSError as error:
        raise _cannot_be_locked(path, error) from error


def _cannot_be_locked(path: Path, error: OSError) -> OutputError:
    return OutputError(f"{path}: cannot be locked ({error.strerror or error}); choose another folder")


def _holder(file: int) -> str:
    """Return the holder that a lock file names; the text comes from another process, so its format is checked."""
    try:
        match = _HOLDER.match(os.read(file, _TEXT))
    except OSError:
        match = None
    return match.group().decode("ascii", "replace") if match else "another process"


def _text(path: Path) -> bytes:
    """Return the first bytes of a lock file."""
    file = os.open(path, os.O_RDONLY | _OPEN)
    try:
        return os.read(file, _TEXT)
    finally:
        os.close(file)


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


def pin(path: str | os.PathLike[str], lease: Lease = LEASE) -> Pin | None:
    """Mark a file as in use and as just used; return None if there is no such file."""
    file = open_shared(path, lease)
    return None if file is None else Pin(file)


def open_shared(path: str | os.PathLike[str], lease: Lease = LEASE) -> int | None:
    """Open a file for reading with a shared lock, and mark it as just used.

    If the file system has no locks, the file has a lease until the descriptor is closed. If the lock cannot be
    acquired, or the lease needs the permission of another user, the file is opened without. A memory mapping of the
    file keeps the lock after the descriptor is closed; for the lease, call :func:`keep_while`.

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
        if _has_no_locks(file):
            HEART.keep(path, lease, file)
    return file


def keep_while(owner: object, path: str | os.PathLike[str], file: int, lease: Lease = LEASE) -> None:
    """Count a file opened by :func:`open_shared` as in use while ``owner``, which maps it, exists."""
    if _has_no_locks(file):
        with suppress(OSError):
            weakref.finalize(owner, HEART.keep(path, lease))


def _has_no_locks(file: int) -> bool:
    """Return whether an open, unlocked or shared file is on a file system without locks."""
    try:
        return try_lock(file, shared=True) is Held.UNKNOWN
    except OSError:
        return False


# --- scratch files --------------------------------------------------------------------------------


def create_locked(
    folder: str | os.PathLike[str], prefix: str, suffix: str, mode: int = 0o666, lease: Lease = LEASE
) -> tuple[int, str]:
    """Create a file with a unique name, locked until its descriptor is closed.

    Args:
        folder: Folder of the file.
        prefix: Prefix of its name.
        suffix: Suffix of its name.
        mode: Its permissions, subject to the umask.
        lease: For file systems without locks.

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
            state = try_lock(file)
            if state is not Held.ELSEWHERE and os.path.exists(path):
                if state is Held.UNKNOWN:
                    HEART.keep(path, lease, file if os.name != "nt" else None)  # Windows closes it to move it
                return file, path
        except OSError:
            os.close(file)
            os.unlink(path)
            raise
        os.close(file)  # another process removed it before it was locked


def create_locked_folder(
    folder: str | os.PathLike[str], prefix: str, suffix: str = "", mode: int = 0o777, lease: Lease = LEASE
) -> Scratch:
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
        state = try_lock(file)
        if state is not Held.ELSEWHERE and (path / LOCK).exists():
            if state is Held.UNKNOWN:
                HEART.keep(path / LOCK, lease, file)
            return Scratch(path, file)
        os.close(file)


def scratch_folder(folder: str | os.PathLike[str], prefix: str, suffix: str = "", mode: int = 0o777) -> Scratch:
    """Create a folder as :func:`create_locked_folder`, and remove those of the same kind that killed processes left.

    Raises:
        OSError: The folder cannot be created.
    """
    sweep(Path(folder).glob(f"{glob.escape(prefix)}*{glob.escape(suffix)}"))
    return create_locked_folder(folder, prefix, suffix, mode)


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
def unused(path: Path, quiet: float = DAY, lease: Lease = LEASE) -> Iterator[bool]:
    """Check whether a file or folder is in use, and prevent other processes from using it during the block.

    Args:
        path: A file that is locked while in use, or a folder with such a file ``lock``.
        quiet: A folder without a file ``lock`` counts as in use until it has not changed for this many seconds.
        lease: For file systems without locks.

    Yields:
        True if it is unused.
    """
    is_folder = path.is_dir()
    with ExitStack() as stack:
        free = False
        try:
            file = _existing(path / LOCK if is_folder else path)
            stack.callback(os.close, file)
            state = try_lock(file)
            if state is Held.HERE:
                free = True
            elif state is Held.UNKNOWN and age(path, last_change(path)) >= lease.ends:
                free = not is_folder or stack.enter_context(_stale(path / LOCK, lease))
        except FileNotFoundError:
            free = is_folder and time.time() - last_change(path) >= quiet
        except OSError:  # of another user, or a symlink
            pass
        yield free and not path.is_symlink()


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


def remove_unused(path: Path, quiet: float = DAY, lease: Lease = LEASE) -> bool:
    """Remove a file or folder unless it is in use, see :func:`unused`; return whether it was removed."""
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            path.rmdir()  # empty: unused, or so new that its creator makes another
            return True
    with unused(path, quiet, lease) as free:
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


def sweep(paths: Iterable[Path], lease: Lease = LEASE) -> None:
    """Remove the files and folders that are not in use, which killed processes left behind."""
    for path in paths:
        remove_unused(path, lease=lease)
