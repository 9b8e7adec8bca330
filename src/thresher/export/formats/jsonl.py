"""JSON lines with the result for every row of the pool."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import ClassVar

from thresher.export.registry import Written
from thresher.export.table import COLUMNS, batches, json_value, wanted_columns
from thresher.pool.store import EmbeddingStore
from thresher.selection import Selection


@dataclass(frozen=True, kw_only=True)
class JsonLines:
    """JSON lines, one for each row of the pool: kept or dropped, by which step, why, and scores."""

    name: ClassVar[str] = "jsonl"

    columns: str = field(default="", metadata=COLUMNS)

    def write(self, selection: Selection, store: EmbeddingStore, path: str) -> Written:
        """Write ASCII: JSON escapes all other characters. A missing number is null.

        Raises:
            UsageError: There is no such column.
        """
        names = wanted_columns(selection, self.columns)
        with open(path, "w", encoding="ascii", newline="\n") as file:
            for part in batches(selection, store, names):
                for row in part.to_pylist():
                    file.write(json.dumps({name: json_value(value) for name, value in row.items()}) + "\n")
        return Written(selection.total)
