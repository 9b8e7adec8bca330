"""The images of a pool: bytes in a cell, or a file inside the folder of the pool. Nothing is decoded here."""

from __future__ import annotations

import os
from typing import Any

from thresher.io.paths import inside
from thresher.io.remote import file_system
from thresher.pool.store import EmbeddingStore

BYTES = 64 * 2**20  # of an image, at most


def folder_of(store: EmbeddingStore) -> str:
    """Return the local folder of the pool with symlinks resolved; "" if it is remote."""
    if any(table.protocol != "file" for table in store.layout.tables):
        return ""
    fs, path = file_system(store.layout.location)
    if "file" not in fs.protocol and "local" not in fs.protocol:
        return ""
    return os.path.realpath(path if os.path.isdir(path) else os.path.dirname(path))


def bytes_in(value: Any, root: str) -> bytes:
    """Return the bytes of an image from a cell: bytes, a struct with bytes or path, or a path inside the pool."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return value if len(value) <= BYTES else b""
    path = inside(root, value) if isinstance(value, str) and value and root else None
    try:
        if path is None or not os.path.isfile(path) or os.path.getsize(path) > BYTES:
            return b""
        with open(path, "rb") as file:
            return file.read(BYTES)
    except OSError:
        return b""
