"""Commands that are killed (SIGKILL) at a chosen change of a file: opened to write, moved, removed, made."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

# For a process of its own: python -c KILLED NUMBER ARGUMENTS...
KILLED = """
import sys
from tests.kills import kill_at
from thresher.cli.main import main

kill_at(int(sys.argv[1]))
sys.exit(main(sys.argv[2:]))
"""

_CHANGES = {"os.rename", "os.remove", "os.truncate", "os.mkdir", "os.rmdir", "shutil.rmtree"}


def kill_at(number: int) -> list[int]:
    """Kill this process at the change of a file with this number; returns a list that has the number of the last."""
    count = [0]

    def hook(event: str, args: Any) -> None:
        writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        if (writes and args[0] != os.devnull) or event in _CHANGES:
            count[0] += 1
            if count[0] == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return count


def forked(arguments: Sequence[str], number: int) -> int:
    """Run a command in a process of its own that is killed at a change; return how it ended, see ``os.waitpid``."""
    return _forked(arguments, number)[0]


def changes(arguments: Sequence[str]) -> int:
    """Run a command in a process of its own, and return how often it changes a file."""
    code, count = _forked(arguments, 0)
    assert code == 0, arguments
    return count


def _forked(arguments: Sequence[str], number: int) -> tuple[int, int]:
    from thresher.cli.main import main

    reader, writer = os.pipe()
    process = os.fork()
    if not process:
        code = 1
        try:
            os.close(reader)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            count = kill_at(number)
            code = main(list(arguments))
            os.write(writer, str(count[0]).encode())
        finally:
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        told = pipe.read()
    return os.waitpid(process, 0)[1], int(told or 0)
