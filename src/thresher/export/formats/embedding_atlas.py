"""A table for Embedding Atlas: positions, images, captions, reasons and scores of every row of the pool."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from thresher.errors import UsageError
from thresher.explore.map import SAMPLE, map_of
from thresher.export.registry import Written
from thresher.export.table import batches, columns_of
from thresher.io.pictures import small_picture
from thresher.pool.layout import texts
from thresher.pool.pictures import bytes_in, folder_of
from thresher.pool.store import EmbeddingStore
from thresher.runtime.cache import Cache
from thresher.selection import Selection

_CAPTION = 10_000  # characters of a caption
_ROWS = 2_048  # with their images in memory at a time


@dataclass(frozen=True, kw_only=True)
class EmbeddingAtlas:
    """Parquet for Embedding Atlas, all rows of the pool: x, y, image, caption, kept, step, reason and scores."""

    name: ClassVar[str] = "embedding-atlas"

    side: int = field(
        default=96, metadata={"metavar": "PIXELS", "help": "longer side of the images in pixels; 0 for no images"}
    )
    sample: int = field(
        default=SAMPLE, metadata={"metavar": "N", "help": "rows that are laid out; the others are placed next to these"}
    )

    def __post_init__(self) -> None:
        """Validate the parameters."""
        if not 0 <= self.side <= 1024:
            raise UsageError(f"side = {self.side}: must be 0 to 1024 pixels")
        if self.sample < 1:
            raise UsageError(f"sample = {self.sample}: must be at least 1")

    def write(self, selection: Selection, store: EmbeddingStore, path: str) -> Written:
        """Write the table.

        Positions are cached, see :func:`thresher.explore.map.map_of`; ``x`` and ``y`` are null for rows without a
        usable vector. ``image`` is {"bytes": WebP, "path": null}, null for a row without a usable image.

        Raises:
            UsageError: The pool has no embeddings.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        if not store.layout.vectors:
            raise UsageError(f"embedding-atlas needs embeddings; {store.layout.location} has none")
        found = map_of(store, Cache.at(), sample=self.sample)
        names = [*columns_of(selection), "score", "duplicate_of"]
        image, caption = store.layout.image if self.side else None, store.layout.caption
        extra = [name for name in (image, caption) if name is not None and name not in names]
        shows = bool(self.side) and (image in extra or store.layout.pictures is not None)
        root = folder_of(store) if image else ""
        writer = None
        with open(path, "wb") as raw:
            for part in _small(batches(selection, store, [*names, *extra])):
                ids = np.asarray(part.column("row"))
                columns = {name: part.column(name) for name in names}
                columns["x"], columns["y"] = _position(found.x[ids]), _position(found.y[ids])
                if caption in extra:
                    columns["caption"] = pa.array(texts(part.column(caption), _CAPTION), pa.string())
                if shows:
                    cells = part.column(image) if image in extra else None
                    columns["image"] = _images(store, cells, ids, root, self.side)
                table = pa.table(columns)
                if writer is None:
                    writer = pq.ParquetWriter(raw, table.schema)
                writer.write_table(table.cast(writer.schema))
            if writer is not None:
                writer.close()
        return Written(selection.total)


def _small(parts: Iterator[Any]) -> Iterator[Any]:
    for part in parts:
        for lo in range(0, len(part), _ROWS):
            yield part.slice(lo, _ROWS)


def _position(values: npt.NDArray[Any]) -> Any:
    import pyarrow as pa

    return pa.array(np.asarray(values), pa.float32(), mask=np.isnan(values))


def _images(store: EmbeddingStore, cells: Any, ids: npt.NDArray[np.int64], root: str, side: int) -> Any:
    """Return thumbnails: images are decoded and encoded again, and nothing outside the pool is read."""
    import pyarrow as pa

    pictures = store.layout.pictures
    made: list[dict[str, Any] | None] = []
    for i, row in enumerate(ids.tolist()):
        data = bytes_in(cells[i].as_py(), root) if cells is not None else pictures(row) if pictures is not None else b""
        small = small_picture(data, side)
        made.append({"bytes": small, "path": None} if small else None)
    return pa.array(made, pa.struct({"bytes": pa.binary(), "path": pa.string()}))
