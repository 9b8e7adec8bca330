"""A dataset of FiftyOne as JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, ClassVar

from thresher.export.paths import PATHS, path_column, usable
from thresher.export.registry import Written
from thresher.export.table import batches, columns_of, json_value
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
            store.require([self.image_paths], "--image-paths")
            column = self.image_paths
        caption = store.layout.caption
        names = [*columns_of(selection), "score", "duplicate_of"]
        extra = [name for name in (column, caption) if name is not None and name not in names]
        head = json.dumps({"name": self.dataset, "media_type": "image", "sample_fields": {}, "info": {}})
        with open(path, "w", encoding="ascii", newline="\n") as file:
            file.write(head[:-1] + ', "samples": [\n')
            first = True
            for part in batches(selection, store, [*names, *extra]):
                paths = part.column(column).to_pylist() if column in extra else [None] * len(part)
                captions = texts(part.column(caption), _CAPTION + 1) if caption in extra else [None] * len(part)
                for row, where, text in zip(part.select(names).to_pylist(), paths, captions, strict=True):
                    file.write(("" if first else ",\n") + json.dumps(_sample(row, where, text)))
                    first = False
            file.write("\n]}\n")
        return Written(selection.total)


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
