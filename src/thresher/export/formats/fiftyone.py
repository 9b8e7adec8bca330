"""A dataset of FiftyOne as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice, repeat
from typing import Any, ClassVar

from thresher.errors import UsageError
from thresher.export.paths import PATHS, path_column, usable
from thresher.export.registry import Written
from thresher.export.table import batches, columns_of, json_value
from thresher.io.columns import captions_in
from thresher.io.paths import cut
from thresher.pool.layout import texts
from thresher.pool.store import EmbeddingStore
from thresher.selection import Selection

_CAPTION = 2_000  # characters of a caption


@dataclass(frozen=True, kw_only=True)
class FiftyOne:
    """JSON for FiftyOne's Dataset.from_json: a sample for every row of the pool, with tags kept and dropped."""

    name: ClassVar[str] = "fiftyone"

    image_paths: str | None = field(
        default=None,
        metadata={
            "metavar": "COLUMN",
            "help": f"column of image paths (default: the first existing of {', '.join(PATHS)}, else ROW.jpg)",
        },
    )
    dataset: str = field(default="thresher", metadata={"metavar": "NAME", "help": "name of the dataset in FiftyOne"})

    def write(self, selection: Selection, store: EmbeddingStore, path: str) -> Written:
        """Write one sample on each line.

        A row without a usable path has the path ``17.jpg`` with its row number, and the tag "no path".

        Raises:
            UsageError: There is no such column, or it has no paths.
        """
        column = path_column(store, (self.image_paths,) if self.image_paths else PATHS)
        if self.image_paths and column is None:
            raise UsageError(
                f"fiftyone finds no paths in the column {self.image_paths!r}; {store.layout.location} has "
                f"{', '.join(store.columns) or 'no metadata'}"
            )
        caption = store.layout.caption
        names = [*columns_of(selection), "score", "duplicate_of"]
        extra = [caption] if caption is not None and caption not in names else []
        paths = _paths(store, column)
        head = json.dumps({"name": self.dataset, "media_type": "image", "sample_fields": {}, "info": {}})
        with open(path, "w", encoding="ascii", newline="\n") as file:
            file.write(head[:-1] + ', "samples": [\n')
            first = True
            for part in batches(selection, store, [*names, *extra]):
                captions = texts(part.column(caption), _CAPTION + 1) if caption in extra else [None] * len(part)
                for row, where, text in zip(
                    part.select(names).to_pylist(), islice(paths, len(part)), captions, strict=True
                ):
                    file.write(("" if first else ",\n") + json.dumps(_sample(row, where, text)))
                    first = False
            file.write("\n]}\n")
        return Written(selection.total)


def _paths(store: EmbeddingStore, column: str | None) -> Iterator[Any]:
    """Yield the cell of every row in a column of paths, without reading images that are in the same column."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if column is None:
        yield from repeat(None, store.total)
        return
    for _, part in store.scan([column]):
        cells = part.column(0)
        yield from captions_in(pc.struct_field(cells, "path") if pa.types.is_struct(cells.type) else cells)


def _sample(row: dict[str, Any], path: Any, caption: str | None) -> dict[str, Any]:
    good = usable(path)
    tags = ["kept" if row["kept"] else "dropped", *([] if good else ["no path"])]
    about = {} if caption is None else {"caption": cut(caption, _CAPTION)}
    return {
        "filepath": path if good else f"{row['row']}.jpg",
        "tags": tags,
        **{name: json_value(value) for name, value in row.items()},
        **about,
    }
