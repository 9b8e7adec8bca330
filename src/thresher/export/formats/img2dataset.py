"""The list of URLs that img2dataset downloads."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from thresher.errors import UsageError
from thresher.export.registry import Written, times_of
from thresher.io.columns import as_text, captions_in, is_uuid, is_words
from thresher.pool.store import EmbeddingStore, heavy
from thresher.selection import Selection

_URLS = ("url", "URL", "image_url")


@dataclass(frozen=True, kw_only=True)
class Img2dataset:
    """Parquet URL list for img2dataset: url, key, caption, and the other flat columns."""

    name: ClassVar[str] = "img2dataset"

    url_column: str | None = field(
        default=None,
        metadata={
            "metavar": "COLUMN",
            "help": f"column of URLs (default: the first existing of {', '.join(_URLS)})",
        },
    )

    def write(self, selection: Selection, store: EmbeddingStore, path: str) -> Written:
        """Write the table; rows without a URL are missing.

        Raises:
            UsageError: The pool has no column of URLs.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        names = (self.url_column,) if self.url_column else _URLS
        url = next((name for name in names if name in store.columns), None)
        if url is None:
            raise UsageError(
                f"img2dataset needs a column of URLs ({', '.join(names)}); {store.layout.location} has "
                f"{', '.join(store.columns) or 'no metadata'}"
            )
        light = [name for name in store.columns if not heavy(store, name)]
        named = {"url": url, "key": store.layout.key, "caption": store.layout.caption}
        sources = {name: source for name, source in named.items() if source}  # one column can have two roles
        sources |= {name: name for name in light if name not in sources and name not in sources.values()}
        columns = list(dict.fromkeys(sources.values()))
        kinds = pa.unify_schemas([table.schema(columns) for table in store.layout.tables], promote_options="permissive")
        schema = pa.schema([_field(kinds.field(source), name) for name, source in sources.items()])
        written = 0
        missing: list[tuple[int, str]] = []
        with open(path, "wb") as raw, pq.ParquetWriter(raw, schema) as writer:  # Arrow opens only names in UTF-8
            for ids, part in store.where(selection.mask()).scan(columns):
                cells = [part.column(columns.index(source)) for source in sources.values()]
                table = pa.table(
                    [_cast(c, f, store.layout.location) for c, f in zip(cells, schema, strict=True)], schema=schema
                )
                has_url = np.asarray(table.column("url").is_valid())
                keys = store.layout.keys_in(table.column("key")) if "key" in sources else None
                missing += [(int(ids[i]), keys[int(i)] if keys else "") for i in np.flatnonzero(~has_url)]
                counts = np.where(has_url, times_of(selection, ids), 0)
                table = table.take(np.repeat(np.arange(len(ids)), counts))
                writer.write_table(table)
                written += len(table)
        return Written(written, tuple(missing), f"a URL in {url!r} (another column: --url-column)")


def _field(field: Any, name: str) -> Any:
    """Return the field to write: bytes, UUIDs and dictionaries with a role become text."""
    import pyarrow as pa

    if name in ("url", "key", "caption") and (is_words(field.type) or is_uuid(field.type)):
        return pa.field(name, field.type if pa.types.is_string(field.type) else pa.large_string())
    return field.with_name(name)


def _cast(column: Any, field: Any, location: str) -> Any:
    import pyarrow as pa

    if column.type == field.type or field.type != pa.large_string():
        return column.cast(field.type)
    if field.name == "caption":
        return pa.array(captions_in(column), field.type)
    return as_text(column, location, field.name)
