"""Work in child processes: killed at a given system call, without file locks, or as another user."""

from __future__ import annotations

import errno

# Another user may not be able to read the folder of this Python: what is needed there is imported before.
import mmap  # noqa: F401
import os
import subprocess
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec  # noqa: F401
import pytest

KILLED = 9
NOBODY = 65_534

needs_root = pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="acts as another user")


def begin(work: Callable[[], Any]) -> int:
    """Start work in a copy of this process; returns its number."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of threads, which wait
        pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def end_of(pid: int) -> int:
    """Wait for a process; returns its exit code."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def run(work: Callable[[], Any]) -> int:
    return end_of(begin(work))


def change_of(path: Path) -> tuple[int, int]:
    """Which file it is and when it was changed. When it was read is not in it: to compare it is to read it."""
    found = path.stat()
    return found.st_ino, found.st_ctime_ns


def killed_at(point: int, work: Callable[[], Any]) -> bool:
    """Do work in another process that dies before its ``point``-th change on disk; says whether it got that far."""

    def dying() -> None:
        reached = 0

        def counted(call: Callable[..., Any]) -> Callable[..., Any]:
            def once(*args: Any, **named: Any) -> Any:
                nonlocal reached
                if reached == point:
                    os._exit(KILLED)
                reached += 1
                return call(*args, **named)

            return once

        os.fsync = lambda _: None  # a process is killed, not the machine
        for name in ("open", "mkdir", "fsync", "replace", "rename", "unlink", "utime"):
            setattr(os, name, counted(getattr(os, name)))
        work()

    code = run(dying)
    assert code in (0, KILLED)
    return code == KILLED


def no_locks(*_: Any) -> None:
    raise OSError(errno.ENOSYS, "Function not implemented")


def without_locks(work: Callable[[], Any]) -> Callable[[], None]:
    """Work in a process where no file system has locks."""
    import fcntl

    def other() -> None:
        fcntl.flock = no_locks  # type: ignore[assignment]
        work()

    return other


def as_nobody(work: Callable[[], Any]) -> Callable[[], None]:
    def other() -> None:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        work()

    return other


def wait_for(path: Path) -> None:
    for _ in range(3000):
        if path.exists():
            return
        time.sleep(0.01)
    raise AssertionError(f"{path} never came")


@contextmanager
def small_disk(folder: Path, size: str = "2m") -> Iterator[Path]:
    """A disk of its own at ``folder``; skips the test where none can be mounted."""
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True)
    if done.returncode:
        pytest.skip("no disk can be mounted")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
