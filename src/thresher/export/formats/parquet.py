"""A table with the result for every row of the pool."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from thresher.export.registry import Written
from thresher.export.table import batches
from thresher.pool.store import EmbeddingStore
from thresher.selection import Selection


@dataclass(frozen=True)
class Parquet:
    """A table of all rows of the pool: kept or dropped, by which step, and why."""

    name: ClassVar[str] = "parquet"

    def write(self, selection: Selection, store: EmbeddingStore, path: str) -> Written:
        """Write row, key, kept, step, reason, duplicate_of, score; duplicate_group and repeats where there are any."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        schema = pa.schema(
            [
                ("row", pa.int64()),
                ("key", pa.string()),
                ("kept", pa.bool_()),
                ("step", pa.string()),
                ("reason", pa.string()),
                ("duplicate_of", pa.int64()),
                ("score", pa.float32()),
            ]
        )
        grouped = any("duplicate_group" in step.rows for step in selection.steps)
        if grouped:
            schema = schema.append(pa.field("duplicate_group", pa.int64()))
        if selection.repeats is not None:
            schema = schema.append(pa.field("repeats", pa.int32()))
        with open(path, "wb") as raw, pq.ParquetWriter(raw, schema) as writer:  # Arrow opens only names in UTF-8
            for part in batches(selection, store, schema.names):
                writer.write_table(pa.Table.from_batches([part]).cast(schema))
        return Written(selection.total)
