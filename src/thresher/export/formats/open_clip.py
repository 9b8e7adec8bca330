"""The csv format of open_clip."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, ClassVar

from thresher.data.samples import caption_of
from thresher.errors import UsageError
from thresher.export.registry import Written, times_of
from thresher.io.columns import captions_in, is_text
from thresher.io.paths import has_parent
from thresher.pool.store import EmbeddingStore
from thresher.selection import Selection

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")  # line breaks too: some csv readers do not support quotes
_PATHS = ("filepath", "image_path", "path", "file_name", "image")


@dataclass(frozen=True, kw_only=True)
class OpenClip:
    """Tab-separated csv for open_clip, with the columns filepath and title."""

    name: ClassVar[str] = "open_clip"

    path_column: str | None = field(
        default=None,
        metadata={
            "metavar": "COLUMN",
            "help": f"column of image paths (default: the first existing of {', '.join(_PATHS)})",
        },
    )

    def write(self, selection: Selection, store: EmbeddingStore, path: str) -> Written:
        """Write the csv; rows without a caption or a usable path are missing.

        Raises:
            UsageError: The pool has no captions or no column of paths.
        """
        import csv

        import pyarrow as pa
        import pyarrow.compute as pc

        names = (self.path_column,) if self.path_column else _PATHS
        column = next((match for match in (_path_column(store, name) for name in names) if match), None)
        if column is None or store.layout.caption is None:
            raise UsageError(
                f"the csv of open_clip needs captions and a column of image paths ({', '.join(names)}); "
                f"{store.layout.location} has {', '.join(store.columns) or 'no metadata'}"
            )
        written = 0
        missing: list[tuple[int, str]] = []
        with open(path, "w", encoding="utf-8", newline="") as file:
            lines = csv.writer(file, delimiter="\t", lineterminator="\n")
            lines.writerow(["filepath", "title"])
            for ids, part in store.where(selection.mask()).scan([column, store.layout.caption]):
                cells = part.column(0)
                paths = pc.struct_field(cells, "path") if pa.types.is_struct(cells.type) else cells
                names_b = captions_in(paths)
                titles, counts = captions_in(part.column(1)), times_of(selection, ids).tolist()
                for row, name, caption, count in zip(ids.tolist(), names_b, titles, counts, strict=True):
                    title = " ".join(_CONTROL.sub(" ", caption_of(caption)).split())
                    if not title or not _usable(name):
                        missing.append((row, str(name or "")))
                        continue
                    lines.writerows([[name, title]] * count)
                    written += count
        return Written(written, tuple(missing))


def _usable(name: Any) -> bool:
    """Return whether a cell is a path on one line without a ".." component."""
    if not isinstance(name, str) or not name or _CONTROL.search(name):
        return False
    return not has_parent(name)


def _path_column(store: EmbeddingStore, name: str) -> str | None:
    """Return the column to read for paths: ``name.path`` for structs, to skip their images; None if it has no paths."""
    import pyarrow as pa

    if name not in store.columns:
        return None
    kinds = [table.schema([name]).field(0).type for table in store.layout.tables]
    if all(pa.types.is_struct(kind) and kind.get_field_index("path") >= 0 for kind in kinds):
        return f"{name}.path"
    return name if all(map(is_text, kinds)) else None
