"""A csv table with the result for every row of the pool."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

from thresher.export.paths import CONTROL
from thresher.export.registry import Written
from thresher.export.table import COLUMNS, batches, wanted_columns
from thresher.pool.store import EmbeddingStore
from thresher.selection import Selection


@dataclass(frozen=True, kw_only=True)
class Csv:
    """A csv table of all rows of the pool: kept or dropped, by which step, why, and scores."""

    name: ClassVar[str] = "csv"

    columns: str = field(default="", metadata=COLUMNS)

    def write(self, selection: Selection, store: EmbeddingStore, path: str) -> Written:
        """Write UTF-8 with a header; line breaks and control characters in text are escaped, as in ``\\\\n``.

        Raises:
            UsageError: There is no such column.
        """
        import csv

        names = wanted_columns(selection, self.columns)
        with open(path, "w", encoding="utf-8", newline="") as file:
            lines = csv.writer(file, lineterminator="\n")
            lines.writerow([_cell(name) for name in names])
            for part in batches(selection, store, names):
                columns = [[_cell(value) for value in column.to_pylist()] for column in part.columns]
                lines.writerows(zip(*columns, strict=True))
        return Written(selection.total)


def _cell(value: Any) -> Any:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return value
    text = value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
    return CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), _valid(text))


def _valid(text: str) -> str:
    """Return text that UTF-8 can write: a lone surrogate becomes a question mark."""
    return text.encode("utf-8", "replace").decode()
