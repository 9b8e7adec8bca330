"""Paths of images in the metadata of a pool, for formats that name images by their path."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from thresher.io.columns import is_text
from thresher.io.paths import has_parent
from thresher.pool.store import EmbeddingStore

PATHS = ("filepath", "image_path", "path", "file_name", "image")
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")  # line breaks too: some csv readers do not support quotes


def path_column(store: EmbeddingStore, names: Sequence[str] = PATHS) -> str | None:
    """Return the first of some columns that has paths, to read: ``name.path`` for structs, to skip their images.

    None if no column has any.
    """
    return next((match for match in (_with_paths(store, name) for name in names) if match), None)


def usable(name: Any) -> bool:
    """Return whether a cell is a path on one line without a ".." component."""
    return isinstance(name, str) and bool(name) and not CONTROL.search(name) and not has_parent(name)


def _with_paths(store: EmbeddingStore, name: str) -> str | None:
    import pyarrow as pa

    if name not in store.columns:
        return None
    kinds = [table.schema([name]).field(0).type for table in store.layout.tables]
    if all(pa.types.is_struct(kind) and kind.get_field_index("path") >= 0 for kind in kinds):
        return f"{name}.path"
    return name if all(map(is_text, kinds)) else None
