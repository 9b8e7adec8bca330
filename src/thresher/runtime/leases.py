"""Leases: signs of use for files on file systems without locks.

A process that uses a file updates its modification time every few seconds, from a thread. Other processes count the
file as unused once the time is older than the lease. Ages are measured by the clock of the file system, because the
clocks of hosts differ.
"""

from __future__ import annotations

import os
import secrets
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from thresher.errors import OutputError, UsageError

_LOOK = 1.0  # seconds until the thread notices that the descriptor of a file was closed


@dataclass(frozen=True)
class Lease:
    """How long a file counts as in use on a file system without locks.

    Attributes:
        heartbeat: Seconds between updates of the modification time by a process that uses the file.
        ends: The file counts as unused after this many seconds without an update.
    """

    heartbeat: float = 30.0
    ends: float = 300.0

    def __post_init__(self) -> None:
        """Validate the values."""
        if not 0 < self.heartbeat <= self.ends / 2:
            raise UsageError(f"a lease of {self.ends} s with a heartbeat of {self.heartbeat} s: at most half the lease")


LEASE = Lease()


@dataclass(frozen=True, eq=False)
class Hold:
    """A lock that this process holds.

    Attributes:
        release: Gives it up.
        check: Raises an OutputError if another process took it over. A lease ends if it is not renewed, for example
            while this process is suspended or the storage is not reached.
    """

    release: Callable[[], None]
    check: Callable[[], None]


def taken_over(what: str, lease: Lease) -> OutputError:
    """Return the error of a holder whose lease ended."""
    return OutputError(
        f"{what}: another process took it over, because this one did not renew its lease for {lease.ends:.0f} s (it "
        "was suspended, or the storage was not reached); nothing more is written; run the same command again"
    )


def age(path: str | os.PathLike[str], changed: float | None = None) -> float:
    """Return the seconds since the last change of a file, by the clock of its file system.

    Args:
        path: The file.
        changed: Time of the last change, if it is known.

    Raises:
        OSError: There is no such file.
    """
    then = os.stat(path, follow_symlinks=False).st_mtime if changed is None else changed
    return _now_in(Path(path).parent) - then


def _now_in(folder: Path) -> float:
    """Return the time by the clock of a file system; by that of this host if nothing can be written there."""
    scratch = folder / f".{secrets.token_hex(8)}.tmp"
    try:
        os.close(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    except OSError:
        return time.time()
    try:
        os.utime(scratch)
        return os.stat(scratch).st_mtime
    except OSError:
        return time.time()
    finally:
        with suppress(OSError):
            os.unlink(scratch)


@dataclass(eq=False)
class _Kept:
    """A file in use.

    Attributes:
        path: The file.
        identity: Its device and inode: another file with this path is left alone.
        file: A descriptor: once it is closed, the file is no longer in use. None: until the use is ended.
        every: Seconds between heartbeats.
        due: Time of the next heartbeat.
        ended: Whether the use was ended.
    """

    path: str
    identity: tuple[int, int]
    file: int | None
    every: float
    due: float
    ended: bool = False

    def beat(self) -> bool:
        """Mark the file as in use; return False if it is gone, or belongs to another user."""
        try:
            found = os.stat(self.path, follow_symlinks=False)
            if (found.st_dev, found.st_ino) != self.identity:
                return False
            os.utime(self.path)
        except (FileNotFoundError, PermissionError):
            return False
        except OSError:  # the server cannot be reached at the moment
            pass
        return True

    def is_over(self) -> bool:
        """Return whether the use was ended or the descriptor closed."""
        if self.ended or self.file is None:
            return self.ended
        try:
            found = os.fstat(self.file)
        except OSError:
            return True
        return (found.st_dev, found.st_ino) != self.identity


class Heart:
    """Updates the modification times of the files in use, in a daemon thread that exists while there are any."""

    def __init__(self) -> None:
        """Start without files."""
        self._clear()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._clear)  # what the parent uses, only the parent keeps

    def _clear(self) -> None:
        self._changed = threading.Condition()  # reentrant: garbage collection may end a use at any time
        self._kept: set[_Kept] = set()  # changed by `keep` and by the thread only
        self._thread: threading.Thread | None = None

    def keep(self, path: str | os.PathLike[str], lease: Lease, file: int | None = None) -> Callable[[], None]:
        """Mark a file as in use every few seconds.

        Args:
            path: The file.
            lease: How often.
            file: An open descriptor of the file: the use ends when it is closed.

        Returns:
            A function that ends the use; it may be called several times, and from any thread.

        Raises:
            OSError: There is no such file.
        """
        found = os.stat(path, follow_symlinks=False) if file is None else os.fstat(file)
        due = time.monotonic() + lease.heartbeat
        kept = _Kept(os.path.abspath(path), (found.st_dev, found.st_ino), file, lease.heartbeat, due)
        with self._changed:
            self._kept.add(kept)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="heartbeat of files in use", daemon=True)
                self._thread.start()
            self._changed.notify()

        def end() -> None:
            kept.ended = True
            with self._changed:
                self._changed.notify()

        return end

    def _run(self) -> None:
        while True:
            with self._changed:
                self._kept = {kept for kept in self._kept if not kept.is_over()}
                if not self._kept:
                    self._thread = None
                    return
                wait = min(kept.due for kept in self._kept) - time.monotonic()
                if any(kept.file is not None for kept in self._kept):
                    wait = min(wait, _LOOK)
                if wait > 0:
                    self._changed.wait(wait)
                now = time.monotonic()
                due = [kept for kept in self._kept if now >= kept.due]
            for kept in due:  # without the lock: a file system may not answer for a while
                kept.due = now + kept.every
                if not kept.is_over() and not kept.beat():
                    kept.ended = True


HEART = Heart()  # one thread for all files of a process
