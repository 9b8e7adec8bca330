"""How much memory this process may still take, and a check before a large allocation."""

from __future__ import annotations

import errno
import re
import sys
from pathlib import Path

from thresher.errors import ThresherError, UsageError
from thresher.runtime.format import size

OUT_OF_MEMORY = "out of memory; use fewer --workers or a smaller --sample, or raise the memory limit (ulimit -v)"
_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # of a container


def available() -> int:
    """Return the bytes that this process may still take: of the machine, its container and its own limit.

    A very large number if nothing is known.
    """
    return min(_of_machine(), *map(_of_container, _LIMITS), _of_process())


def require(count: int, what: str, instead: str) -> None:
    """Check that there is memory for something, before any of it is taken.

    Args:
        count: Bytes that it takes.
        what: What takes them, as the start of the message.
        instead: What the user can do.

    Raises:
        UsageError: There is not enough memory.
    """
    free = available()
    if count > free:
        raise UsageError(f"{what} takes about {size(count)} of memory, but only {size(free)} are free; {instead}")


def _of_machine() -> int:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError):
        return sys.maxsize
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), sys.maxsize)


def _of_container(path: str) -> int:
    try:
        return int(Path(path).read_text(encoding="ascii"))
    except (OSError, ValueError):  # no such limit, or "max"
        return sys.maxsize


def _of_process() -> int:
    try:
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    except (ImportError, OSError, ValueError):
        return sys.maxsize
    return sys.maxsize if limit == resource.RLIM_INFINITY else max(limit - pages * resource.getpagesize(), 0)


_SIGNS = (  # of libraries that say so in text only
    "can't start new thread",
    "failed to map segment",
    "cannot allocate memory",
    "failed to launch worker thread",
    "bad_alloc",
    "bad allocation",
    "malloc of size",
    "realloc of size",
    "unable to allocate",
    "allocation failure",
    "memory allocation",
    "cuda out of memory",
    "without exception set",  # by Python, when an extension module finds no memory
    "without setting an exception",
    "blas_thread_init",  # by OpenBLAS, which then interrupts its own process
)
# By Python, when it compiles a module and finds no memory for a part of it.
_COMPILED = re.compile(r"field '\w+' is required for \w+")


def is_out_of_memory(error: BaseException | None) -> bool:
    """Return whether an error, or one that led to it, says that there is no memory for data, a library or a thread."""
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
            return True
        # Our own messages and those of the system may have names of files in them.
        own = isinstance(error, ThresherError) or (isinstance(error, OSError) and error.errno is not None)
        if isinstance(error, Exception) and not own and has_signs(str(error)[:10_000]):
            return True
        error = error.__cause__ or error.__context__
    return False


def has_signs(text: str) -> bool:
    """Return whether a message of a library says that there is no memory."""
    low = text.lower()
    return any(sign in low for sign in _SIGNS) or _COMPILED.search(text) is not None
