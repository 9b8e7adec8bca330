"""Commands in a process whose address space is limited (``ulimit -v``).

There libraries written in C and C++ end the process when they find no memory, so that Python cannot report it. The
command runs in a child process, and this one reports how the child ended.

Python itself may loop forever when it raises an exception and finds no memory for a small number (``exception_unwind``
in its ``ceval.c``). So the child starts with a slightly lower limit, and gets the rest in steps when it needs it.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from typing import IO, Any

from thresher.runtime.memory import has_signs

_ENDED = {getattr(signal, name) for name in ("SIGABRT", "SIGSEGV", "SIGBUS") if hasattr(signal, name)}
_END = re.compile(r"\nended (\d+)\n")
_NO_MEMORY = 127  # exit code of the C library if there is none for a thread
_RESERVE = 16 << 20  # bytes that the child does not get at first
_STEP = 2 << 20  # bytes that it gets at once, if it has less than this
_PAUSE = 0.5  # seconds between two looks at it


def is_limited() -> bool:
    """Return whether the address space of this process is limited, and a child process can be forked."""
    try:
        import resource
    except ImportError:  # Windows
        return False
    return hasattr(os, "fork") and resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY


def run_limited(command: Callable[[], int], out_of_memory: Callable[[], int]) -> int:
    """Run a command in a child process and return its exit code.

    Args:
        command: The command; called in the child.
        out_of_memory: Reports that there was too little memory, and returns the exit code for it.
    """
    with tempfile.TemporaryFile() as noise:
        parent = os.getpid()
        child = os.fork()
        if child == 0:
            _end_with(parent)
            _keep_reserve()
            _divert(noise)
            _interrupt_if_asked(noise)
            code = command()
            os.write(noise.fileno(), b"\nended %d\n" % code)
            return code
        code = _wait(child)
        noise.seek(max(noise.seek(0, os.SEEK_END) - (1 << 16), 0))
        said = noise.read().decode("utf-8", "replace")
    if ended := _END.search(said):  # libraries may still fail while Python exits
        return int(ended[1])
    if code in (-number for number in _ENDED) or code == _NO_MEMORY or (code not in (0, 2, 130) and has_signs(said)):
        return out_of_memory()
    if said and code not in (0, 2, 130) and sys.stderr is not None:
        sys.stderr.write(said)
    return code if code >= 0 else 128 - code


def _end_with(parent: int) -> None:
    """Let the system end this process when its parent is killed. A thread that waits for it would take memory."""
    with contextlib.suppress(OSError, AttributeError, ImportError, MemoryError):  # only Linux can do this
        import ctypes

        ctypes.CDLL(None).prctl(1, int(signal.SIGKILL))  # PR_SET_PDEATHSIG
    if os.getppid() != parent:  # it was killed before
        os._exit(1)


def _divert(noise: IO[bytes]) -> None:
    """Send what libraries write to standard error to a file; Python goes on writing to the real one."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        real = os.dup(2)
        os.dup2(noise.fileno(), 2)
        sys.stderr = open(real, "w", buffering=1, encoding=sys.stderr.encoding, errors="backslashreplace")


def _interrupt_if_asked(noise: IO[bytes]) -> None:
    """Raise MemoryError, and not KeyboardInterrupt, when a library and not the user interrupts this process.

    OpenBLAS does so when it cannot start its threads, and says why before.
    """

    def interrupt(number: int, frame: Any) -> None:
        said = os.pread(noise.fileno(), 1 << 16, 0)
        raise MemoryError if has_signs(said.decode("utf-8", "replace")) else KeyboardInterrupt

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # it is ignored with nohup
        signal.signal(signal.SIGINT, interrupt)


def _wait(child: int) -> int:
    """Return the exit code of a child, or minus the number of the signal that ended it. Signals are passed on."""

    def forward(number: int, frame: Any) -> None:
        os.kill(child, number)

    signal.signal(signal.SIGTERM, forward)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to the child too
    pause = 0.01
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
        time.sleep(pause)
        pause = min(2 * pause, _PAUSE)
        _give_reserve(child)
    return os.waitstatus_to_exitcode(ended[1])


def _keep_reserve() -> None:
    """Lower the limit of this process by the reserve. The hard limit stays, so that the parent can give it back."""
    import resource

    limit, hard = resource.getrlimit(resource.RLIMIT_AS)
    if hasattr(resource, "prlimit") and limit > 2 * _RESERVE:
        resource.setrlimit(resource.RLIMIT_AS, (limit - _RESERVE, hard))


def _give_reserve(child: int) -> None:
    """Raise the limit of a child by a step, up to that of this process, if its address space is nearly full."""
    import resource

    with contextlib.suppress(OSError, ValueError, AttributeError):  # it has ended, or this is not Linux
        most = resource.getrlimit(resource.RLIMIT_AS)[0]
        limit, hard = resource.prlimit(child, resource.RLIMIT_AS)
        with open(f"/proc/{child}/statm", encoding="ascii") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        if limit < most and limit - used < _STEP:
            resource.prlimit(child, resource.RLIMIT_AS, (min(limit + _STEP, most), hard))
