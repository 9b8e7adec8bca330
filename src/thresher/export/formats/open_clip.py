"""The csv format of open_clip."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from thresher.data.samples import caption_of
from thresher.errors import UsageError
from thresher.export.paths import CONTROL, PATHS, path_column, usable
from thresher.export.registry import Written, times_of
from thresher.io.columns import captions_in
from thresher.pool.store import EmbeddingStore
from thresher.selection import Selection


@dataclass(frozen=True, kw_only=True)
class OpenClip:
    """Tab-separated csv for open_clip, with the columns filepath and title."""

    name: ClassVar[str] = "open_clip"

    path_column: str | None = field(
        default=None,
        metadata={
            "metavar": "COLUMN",
            "help": f"column of image paths (default: the first existing of {', '.join(PATHS)})",
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

        names = (self.path_column,) if self.path_column else PATHS
        column = path_column(store, names)
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
                    title = " ".join(CONTROL.sub(" ", caption_of(caption)).split())
                    if not title or not usable(name):
                        missing.append((row, str(name or "")))
                        continue
                    lines.writerows([[name, title]] * count)
                    written += count
        lacks = f"both a caption in {store.layout.caption!r} and a path in {column!r} (another column: --path-column)"
        return Written(written, tuple(missing), lacks)
