"""Example rows of the report: key, caption and thumbnail.

Captions and images are untrusted: captions are inserted as text only, images are decoded and encoded again, and paths
outside the folder of the pool are not read.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from thresher.errors import PoolError
from thresher.io.pictures import small_picture
from thresher.pool.layout import Options, texts
from thresher.pool.pictures import bytes_in, folder_of
from thresher.pool.store import EmbeddingStore, open_store
from thresher.pruning.reference import ways_to_open
from thresher.report.facts import Repeats, plain
from thresher.runtime.results import Say
from thresher.selection import Step

T = TypeVar("T")

SIDE = 96  # maximum longer side of a thumbnail in pixels
_KEY, _CAPTION = 200, 140


@dataclass(frozen=True)
class Example:
    """A row to show; ``picture`` is a data URI, "" if there is none."""

    row: int
    key: str
    caption: str
    picture: str


@dataclass(frozen=True)
class Read:
    """A row as it was read: key and caption on one line, cut, and the bytes of the image, b"" if there is none."""

    row: int
    key: str
    caption: str
    image: bytes


def look_up(store: EmbeddingStore, rows: Iterable[int]) -> dict[int, Example]:
    """Read some rows of a pool by global id, without reading the others."""
    return {one.row: Example(one.row, one.key, one.caption, data_uri(one.image)) for one in read_rows(store, rows)}


def read_rows(
    store: EmbeddingStore, rows: Iterable[int], *, images: bool = True, caption: int = _CAPTION
) -> Iterator[Read]:
    """Yield some rows of a pool by ascending global id, without reading the others.

    Args:
        store: The pool.
        rows: Global ids, in any order.
        images: Whether to read the images.
        caption: Number of characters after which captions are cut.
    """
    layout = store.layout
    ids = np.array(sorted(set(rows)), np.int64)
    image = layout.image if images else None
    wanted = list(dict.fromkeys(name for name in (layout.key, layout.caption, image) if name))
    held = layout.pictures if images and image is None else None
    if not wanted:
        yield from (Read(row, "", "", held(row) if held is not None else b"") for row in ids.tolist())
        return
    root = folder_of(store) if image else ""
    done = 0
    for part in store.lookup(wanted, ids):
        columns = {name: part.column(wanted.index(name)) for name in wanted}
        for i, row in enumerate(ids[done : done + len(part)].tolist()):
            yield Read(
                row=row,
                key=_text(columns, layout.key, i, _KEY),
                caption=_text(columns, layout.caption, i, caption),
                image=bytes_in(columns[image][i].as_py(), root) if image else held(row) if held is not None else b"",
            )
        done += len(part)


def with_vectors(
    store: EmbeddingStore | None, work: Callable[[EmbeddingStore | None], T], say: Say | None
) -> tuple[T, str]:
    """Return what is made from a pool, and ""; if its vectors cannot be read, what is made without them, and why.

    Args:
        store: The pool.
        work: Makes it, also from a pool without vectors.
        say: Called with the reason.

    Raises:
        PoolError: Something else cannot be read.
    """
    try:
        return work(store), ""
    except PoolError as error:
        if store is None or not store.layout.vectors:
            raise
        made = work(replace(store, layout=replace(store.layout, vectors={})))  # fails again if it was not the vectors
        why = f"Without typical rows of clusters and without a map, since vectors cannot be read: {plain(error, 300)}"
        if say is not None:
            say(why)
        return made, why


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
    small = small_picture(data, SIDE)
    return f"data:image/webp;base64,{base64.b64encode(small).decode()}" if small else ""
