"""Whether a node can read local files of this machine."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

_OPENED = 16  # files that a node opens at a time


def size_on_disk(path: str) -> int:
    """Return the size of a file, -1 for a folder."""
    return -1 if os.path.isdir(path) else os.stat(path).st_size


def unreadable(files: list[tuple[str, int]]) -> list[tuple[str, str]]:
    """Return the files that cannot be read here, or have another size, and why."""
    with ThreadPoolExecutor(_OPENED) as threads:
        return [(path, why) for (path, _), why in zip(files, threads.map(_why_not, files), strict=True) if why]


def _why_not(file: tuple[str, int]) -> str:
    path, length = file
    try:
        here = size_on_disk(path)
        if here < 0:
            os.listdir(path)
        else:
            with open(path, "rb") as opened:
                opened.read(1)
    except OSError as error:
        return error.strerror or str(error)
    return "" if here == length else f"it has {here:,} bytes there, and {length:,} here"
