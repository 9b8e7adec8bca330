"""A table with the result for every row of the pool."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from thresher.export.registry import Written
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
        names = [step.method for step in selection.steps]
        seen = [0] * len(selection.steps)  # rows of each step's input that are written so far
        with open(path, "wb") as raw, pq.ParquetWriter(raw, schema) as writer:  # Arrow opens only names in UTF-8
            for ids, keys in store.keys():
                by = np.asarray(selection.dropped_by[ids])
                reasons = ["kept"] * len(ids)
                score, twin = np.full(len(ids), np.nan, np.float32), np.full(len(ids), -1, np.int64)
                group = twin.copy()
                for number, step in enumerate(selection.steps):
                    mask = (by == -1) | (by >= number)  # as Selection.given, for these rows only
                    # Positions in the arrays of the step; rows are in pool order.
                    at = seen[number] + np.cumsum(mask) - 1
                    here = slice(seen[number], seen[number] + int(mask.sum()))
                    seen[number] = here.stop
                    # Of the last step that saw a row.
                    for column, name in ((score, "score"), (twin, "duplicate_of"), (group, "duplicate_group")):
                        if name in step.rows:
                            column[mask] = step.rows[name][here]
                    for i in np.flatnonzero(by == number):
                        reasons[i] = step.why(int(at[i]))
                columns = [
                    ids,
                    keys,
                    by == -1,
                    [names[b] if b >= 0 else "" for b in by],
                    reasons,
                    twin,
                    score,
                ]
                columns += [group] if grouped else []
                columns += [] if selection.repeats is None else [selection.repeats[ids]]
                writer.write_table(
                    pa.table([pa.array(c, kind) for c, kind in zip(columns, schema.types, strict=True)], schema=schema)
                )
        return Written(selection.total)
