"""Compressed tars, which have no random access: how they are named, and how to decompress them."""

from __future__ import annotations

import os
import shlex

_PACKED = {
    "gzip": (".tar.gz", ".tgz"),
    "bzip2": (".tar.bz2", ".tbz2", ".tbz"),
    "xz": (".tar.xz", ".txz"),
    "zstd": (".tar.zst", ".tzst"),
}
_PROGRAM = {ending: program for program, endings in _PACKED.items() for ending in endings}
COMPRESSED = tuple(_PROGRAM)
"""Extensions of compressed tars."""


def stem_of_tar(path: str) -> str:
    """Return the path of a compressed tar without its extension."""
    return next(path[: -len(ending)] for ending in COMPRESSED if path.lower().endswith(ending))


def unpacking(path: str) -> str:
    """Return how to decompress all tars next to a compressed one to plain ones."""
    ending = path[len(stem_of_tar(path)) :]
    return f"decompress them: {_PROGRAM[ending.lower()]} -dk {shlex.quote(os.path.dirname(path) or '.')}/*{ending}"
