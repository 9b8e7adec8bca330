"""Example rows of the report: key, caption and thumbnail.

Captions and images are untrusted: captions are inserted as text only, images are decoded and encoded again, and paths
outside the folder of the pool are not read.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from thresher.errors import PoolError
from thresher.io.pictures import open_rgb, thumbnail
from thresher.pool.layout import Options, texts
from thresher.pool.pictures import bytes_in, folder_of
from thresher.pool.store import EmbeddingStore, open_store
from thresher.pruning.reference import ways_to_open
from thresher.report.facts import Repeats, plain
from thresher.selection import Step

SIDE = 96  # maximum longer side of a thumbnail in pixels
_KEY, _CAPTION = 200, 140


@dataclass(frozen=True)
class Example:
    """A row to show; ``picture`` is a data URI, "" if there is none."""

    row: int
    key: str
    caption: str
    picture: str


def look_up(store: EmbeddingStore, rows: Iterable[int]) -> dict[int, Example]:
    """Read some rows of a pool by global id, without reading the others."""
    layout = store.layout
    ids = np.array(sorted(set(rows)), np.int64)
    names = [name for name in (layout.key, layout.caption, layout.image) if name]
    wanted = list(dict.fromkeys(names))
    if not wanted:
        return {row: Example(row, "", "", _picture(store, row)) for row in ids.tolist()}
    root = folder_of(store) if layout.image else ""
    examples: dict[int, Example] = {}
    for part in store.lookup(wanted, ids):
        columns = {name: part.column(wanted.index(name)) for name in wanted}
        for i in range(len(part)):
            row = int(ids[len(examples)])
            examples[row] = Example(
                row=row,
                key=_text(columns, layout.key, i, _KEY),
                caption=_text(columns, layout.caption, i, _CAPTION),
                picture=data_uri(bytes_in(columns[layout.image][i].as_py(), root))
                if layout.image
                else _picture(store, row),
            )
    return examples


def _picture(store: EmbeddingStore, row: int) -> str:
    """Return the image of a row of a pool in memory as a data URI."""
    return data_uri(store.layout.pictures(row)) if store.layout.pictures is not None else ""


def look_up_repeated(step: Step, repeats: Repeats, options: Options) -> tuple[dict[int, Example], bool]:
    """Return the rows of a reference to show, with keys and captions as recorded in the selection.

    Args:
        step: The step that dropped their duplicates; its notes contain the fingerprint of the reference.
        repeats: Which rows to show.
        options: How the pool was opened.

    Returns:
        The rows by number, with images if the reference can still be opened, and whether it can.
    """
    reference = _reopened(step, repeats.location, options) if repeats.originals else None
    try:
        seen = look_up(reference, repeats.originals) if reference is not None and reference.layout.image else {}
    except Exception:  # as for opening: the page works without images
        seen, reference = {}, None
    examples = {}
    for row, known in repeats.originals.items():
        picture = seen[row].picture if row in seen else ""
        key, caption = plain(known.get("key", ""), _KEY), plain(known.get("caption", ""), _CAPTION)
        examples[row] = Example(row, key, caption, picture)
    return examples, reference is not None


def _reopened(step: Step, location: str, options: Options) -> EmbeddingStore | None:
    """Open a reference as it was opened for the step; None if it is gone or has changed."""
    for tried in ways_to_open(options):
        try:
            store = open_store(location, tried)
            fingerprint = store.fingerprint()
        except Exception:  # remote file systems and damaged files raise any kind of error
            continue
        if any(fingerprint in note for note in step.notes):
            return store
    return None


def _text(columns: dict[str, Any], name: str | None, i: int, limit: int) -> str:
    import pyarrow as pa

    if name is None or pa.types.is_struct(columns[name].type):
        return ""
    return plain(texts(columns[name].slice(i, 1), 8 * limit)[0], limit)


def data_uri(data: bytes) -> str:
    """Return a thumbnail as a data URI; "" for anything that is not a valid image."""
    if not data:
        return ""
    try:
        small = thumbnail(open_rgb(data, draft=2 * SIDE), SIDE)
    except PoolError:
        return ""
    return f"data:image/webp;base64,{base64.b64encode(small).decode()}"
