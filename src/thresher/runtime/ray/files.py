"""Whether the nodes of a cluster can read local files of this machine."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from thresher.errors import UnreachedError
from thresher.runtime.format import counted

_OPENED = 16  # files that a node opens at a time


def check_readable(nodes: Iterable[tuple[Mapping[str, Any], list[tuple[str, str]]]]) -> None:
    """Refuse files that a node cannot read.

    Args:
        nodes: The nodes, and what :func:`unreadable` returns there.

    Raises:
        UnreachedError: A node cannot read a file, or has another file there; names the first one and the node.
    """
    for node, wrong in nodes:
        if wrong:
            (path, why), more = wrong[0], len(wrong) - 1
            others = f", and {counted(more, 'other file')}" if more else ""
            raise UnreachedError(
                f"{path}: cannot be read on node {node['NodeManagerAddress']} ({why}){others}; put the files on "
                "storage that all nodes share, or use one node"
            )


def unreadable(files: list[tuple[str, int]]) -> list[tuple[str, str]]:
    """Return the files that cannot be read here, or have another size, and why.

    Args:
        files: Paths, and the size that each has on the machine of the command.
    """
    with ThreadPoolExecutor(_OPENED) as threads:
        return [(path, why) for (path, _), why in zip(files, threads.map(_why_not, files), strict=True) if why]


def size_on_disk(path: str) -> int:
    """Return the size of a file in bytes, -1 for a folder."""
    return -1 if os.path.isdir(path) else os.stat(path).st_size


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
