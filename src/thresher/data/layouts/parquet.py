"""Parquet files with images: Hugging Face datasets and similar files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np

from thresher.data.location import Location
from thresher.data.options import DataOptions
from thresher.data.parts import Data, Ints
from thresher.data.tables import Table, TablePart, refuse_splits, tables_of
from thresher.io.columns import plain_schema
from thresher.io.listing import Files
from thresher.io.open import open_file, trusting
from thresher.io.parquet import open_parquet
from thresher.io.remote import in_parallel

_AGAIN = 8  # maximum number of times that a row group is read again for the parts it is split into
_SPAN = 1 << 20  # bytes of a column fetched at a time


@dataclass(frozen=True)
class Parquet:
    """Parquet files."""

    name: ClassVar[str] = "parquet"
    rank: ClassVar[int] = 40
    looks_like: ClassVar[str] = "*.parquet with a column of images"

    def recognise(self, where: Location) -> bool:
        """Recognise .parquet and .pq files, except the metadata.parquet of a Hugging Face image folder."""
        return where.has(".parquet", ".pq") and bool(_tables(where))

    def open(self, where: Location, options: DataOptions) -> Data:
        """Read the footers.

        Raises:
            PoolError: There is no image column, or the files have different columns.
            UsageError: A requested column does not exist.
        """
        names = where.files.matching(r".*\.(parquet|pq)")
        refuse_splits(where.files, names)
        return parquet_data(self.name, where.files, names, options)


def parquet_data(kind: str, files: Files, names: Sequence[str], options: DataOptions) -> Data:
    """Read the footers of Parquet files and split them into parts; for remote files, many at a time.

    Args:
        kind: Name of the reader.
        files: The listing with the files.
        names: Their names, in order.
        options: How to read them.

    Raises:
        PoolError: There is no image column, or the files have different columns.
        UsageError: A requested column does not exist.
    """
    tables = [*in_parallel(files.protocol, lambda name: _table(files.protocol, files.path(name), name), names)]
    return tables_of(kind, files, options, tables, ParquetPart, _AGAIN)


@dataclass(frozen=True, kw_only=True)
class ParquetPart(TablePart):
    """Rows of a parquet file."""

    def read_rows(self, columns: Sequence[str] | None, row_c: Ints, size: int) -> Iterator[tuple[int, Any]]:
        """Yield batches of the row groups that contain some of the rows."""
        with open_file(self.protocol, self.path) as raw:
            file = trusting(self.path, lambda: open_parquet(raw, _SPAN))
            leaves = None if columns is None else _leaves(file, columns)
            start = 0
            for group in range(file.metadata.num_row_groups):
                end = start + file.metadata.row_group(group).num_rows
                lo, hi = np.searchsorted(row_c, [start, end])
                if hi > lo:
                    batches = file.iter_batches(batch_size=size, columns=leaves, row_groups=[group])
                    for batch in iter(partial(trusting, self.path, partial(next, batches, None)), None):
                        yield start, batch
                        start += len(batch)
                        if row_c[hi - 1] < start:
                            break
                start = end

    def schema(self) -> Any:
        """Return the schema of the file, including its metadata (the features of ``datasets``)."""
        with open_file(self.protocol, self.path) as raw:
            return trusting(self.path, lambda: plain_schema(open_parquet(raw, _SPAN).schema_arrow))


def _leaves(file: Any, columns: Sequence[str]) -> list[str]:
    """Return columns as the file names them: ``a.b`` is the field ``b`` of ``a``, also of the structs in a list."""
    own, paths = set(file.schema_arrow.names), [file.schema.column(i).path for i in range(len(file.schema))]
    leaves: list[str] = []
    for name in columns:
        whole, _, field = name.rpartition(".")
        inner = [path for path in paths if path.startswith(f"{whole}.") and path.endswith(f".{field}")]
        leaves += [name] if name in own else inner
    return leaves


def _tables(where: Location) -> list[str]:
    names = where.files.matching(r".*\.(parquet|pq)")
    if where.text.lower().endswith((".parquet", ".pq")) and len(where.files.names) == 1:
        return names
    return [name for name in names if not f"/{name}".lower().endswith("/metadata.parquet")]


def _table(protocol: str, path: str, name: str) -> Table:
    def look(raw: Any) -> Table:
        file = open_parquet(raw, _SPAN)
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        return Table(name, sizes, file.schema_arrow)

    with open_file(protocol, path) as raw:
        return trusting(path, lambda: look(raw))
