"""Rows as a reader of the report sees them: key, caption and a small picture.

Captions and pictures come from strangers: captions are only ever text, pictures are decoded and
encoded anew, and paths never lead out of the pool's folder.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from thresher.errors import PoolError
from thresher.io.paths import inside
from thresher.io.pictures import open_rgb, thumbnail
from thresher.pool.layout import Options
from thresher.pool.store import EmbeddingStore, open_store
from thresher.report.facts import Repeats, plain
from thresher.select.reference import ways_to_open
from thresher.selection import Step

SIDE = 96  # pixels of a thumbnail's longer side, at most
_BYTES = 64 * 2**20
_KEY, _CAPTION = 200, 140


@dataclass(frozen=True)
class Example:
    """A row to show; ``picture`` is a data URI, "" where there is none."""

    row: int
    key: str
    caption: str
    picture: str


def look_up(store: EmbeddingStore, rows: Iterable[int]) -> dict[int, Example]:
    """Read some rows of a pool, by global id, touching only where they lie."""
    layout = store.layout
    ids = np.array(sorted(set(rows)), np.int64)
    names = [name for name in (layout.key, layout.caption, layout.image) if name]
    wanted = list(dict.fromkeys(names))
    if not wanted:
        return {row: Example(row, "", "", "") for row in ids.tolist()}
    root = _folder(store) if layout.image else ""
    found: dict[int, Example] = {}
    for part in store.lookup(wanted, ids):
        columns = {name: part.column(wanted.index(name)) for name in wanted}
        for i in range(len(part)):
            row = int(ids[len(found)])
            found[row] = Example(
                row=row,
                key=_text(columns, layout.key, i, _KEY),
                caption=_text(columns, layout.caption, i, _CAPTION),
                picture=data_uri(_bytes(columns[layout.image][i].as_py(), root)) if layout.image else "",
            )
    return found


def look_up_repeated(step: Step, repeats: Repeats, options: Options) -> tuple[dict[int, Example], bool]:
    """Return the rows of a reference that are to be shown: keys and captions as the selection keeps them.

    Args:
        step: That dropped what repeats them; its notes hold the reference's fingerprint.
        repeats: Which rows to show.
        options: How the pool was opened.

    Returns:
        The rows by number, with pictures where the reference can still be opened; and whether it can.
    """
    reference = _again(step, repeats.location, options) if repeats.told else None
    try:
        seen = look_up(reference, repeats.told) if reference is not None and reference.layout.image else {}
    except Exception:  # as in opening it: the page can do without
        seen, reference = {}, None
    found = {}
    for row, told in repeats.told.items():
        picture = seen[row].picture if row in seen else ""
        found[row] = Example(row, plain(told.get("key", ""), _KEY), plain(told.get("caption", ""), _CAPTION), picture)
    return found, reference is not None


def _again(step: Step, location: str, options: Options) -> EmbeddingStore | None:
    """Open a reference as it was opened for the step; None where it is gone, or another by now."""
    for tried in ways_to_open(options):
        try:
            store = open_store(location, tried)
            fingerprint = store.fingerprint()
        except Exception:  # file systems out of reach and damaged files raise whatever they like
            continue
        if any(fingerprint in note for note in step.notes):
            return store
    return None


def _text(columns: dict[str, Any], name: str | None, i: int, limit: int) -> str:
    value = columns[name][i].as_py() if name else None
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if isinstance(value, list):
        value = " / ".join(map(str, value))
    return "" if value is None or isinstance(value, dict) else plain(value, limit)


def _folder(store: EmbeddingStore) -> str:
    """Return the pool's local folder with links resolved; "" where it lies elsewhere."""
    import fsspec

    if any(table.protocol != "file" for table in store.layout.tables):
        return ""
    fs, found = fsspec.core.url_to_fs(store.layout.location)
    path = str(found)
    if "file" not in fs.protocol and "local" not in fs.protocol:
        return ""
    return os.path.realpath(path if os.path.isdir(path) else os.path.dirname(path))


def _bytes(value: Any, root: str) -> bytes:
    """Return a picture's bytes from a cell: bytes, a struct with them, or a path inside the pool."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return value if len(value) <= _BYTES else b""
    path = inside(root, value) if isinstance(value, str) and value and root else None
    try:
        if path is None or not os.path.isfile(path) or os.path.getsize(path) > _BYTES:
            return b""
        with open(path, "rb") as file:
            return file.read(_BYTES)
    except OSError:
        return b""


def data_uri(data: bytes) -> str:
    """Return a small copy of a picture in a data URI; "" for anything that is not a sound, ordinary picture."""
    if not data:
        return ""
    try:
        small = thumbnail(open_rgb(data, draft=2 * SIDE), SIDE)
    except PoolError:
        return ""
    return f"data:image/webp;base64,{base64.b64encode(small).decode()}"
