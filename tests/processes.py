"""Commands in processes of their own, which never stay behind."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any


def finished(command: Sequence[str], *, timeout: float, **how: Any) -> subprocess.CompletedProcess[str]:
    """Run a command and return its output as text.

    If it takes too long, or the test is interrupted, the processes that it started are killed with it, also those with
    a session of their own, as torchrun starts them.
    """
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **how) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException:
            kill_tree(process.pid)
            raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def kill_tree(number: int) -> None:
    """Kill a process and all below it; each is stopped first, so that it starts no more."""
    with suppress(ProcessLookupError):
        os.kill(number, signal.SIGSTOP)
    for child in children_of(number):
        kill_tree(child)
    with suppress(ProcessLookupError):
        os.kill(number, signal.SIGKILL)


def children_of(number: int) -> list[int]:
    """The processes that a process has started and that have not been taken over by another; none outside Linux."""
    found: list[int] = []
    for path in Path(f"/proc/{number}/task").glob("*/children"):
        with suppress(OSError):
            found += map(int, path.read_text().split())
    return found
