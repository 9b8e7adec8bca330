"""Rows of parquet and Arrow files, copied with all columns into parquet files that ``datasets`` reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np

from thresher.data.parts import Ints
from thresher.errors import PoolError
from thresher.io.columns import as_text, cast_batch, decoded_schema, is_words
from thresher.resharding import hub
from thresher.resharding.plan import ReshardPlan, Source

_GROUP_ROWS = 1_000  # rows of a row group that is written
_GROUP_BYTES = 64 << 20
_BATCH = 256  # rows in memory at a time
_SPOOLED = 512  # rows of a batch in a spool


def schema_of(sources: Sequence[Source]) -> Any:
    """Return the schema that all files share, with its metadata (the features of ``datasets``).

    Dictionaries become their values: each batch can have another dictionary, and an Arrow or Parquet file has one.

    Raises:
        PoolError: The files have different columns.
    """
    first = None
    for path, same in groupby(sources, key=lambda source: source.path):
        part = next(same).part
        schema = decoded_schema(part.schema())
        if first is None:
            first = schema
        elif not schema.equals(first):
            odd = next((field for field in schema if field not in first), "their order")
            raise PoolError(f"{path}: has other columns than {sources[0].path} ({odd}); reshard them separately")
    return first


# --- spools: Arrow files with the chosen rows of a source, for fast random access -----------------


def spool(source: Source, rows: Ints, schema: Any, path: str) -> None:
    """Copy rows of a source to an Arrow file; row numbers are ascending and unique."""
    import pyarrow as pa

    with pa.OSFile(path, "wb") as file, pa.ipc.new_file(file, schema) as writer:
        for table in _regular(source.part.batches(None, rows, _BATCH), schema, _SPOOLED):
            writer.write_table(table, max_chunksize=_SPOOLED)


def _regular(batches: Iterator[Any], schema: Any, rows: int) -> Iterator[Any]:
    """Yield tables of exactly ``rows`` rows, each contiguous; the last may be shorter."""
    import pyarrow as pa

    held: list[Any] = []
    count = 0
    for batch in batches:
        held.append(batch)
        count += len(batch)
        while count >= rows:
            table = pa.Table.from_batches([cast_batch(one, schema) for one in held], schema)
            yield table.slice(0, rows).combine_chunks()
            held, count = table.slice(rows).to_batches(), count - rows
    if count:
        yield pa.Table.from_batches([cast_batch(one, schema) for one in held], schema).combine_chunks()


class Spools:
    """The spools of all sources; files are memory-mapped, and each batch is opened once."""

    def __init__(self, paths: Mapping[int, str], rows: Mapping[int, Ints]) -> None:
        """Store the path of the spool and the spooled rows of every source."""
        self._paths, self._rows = paths, rows
        self._files: dict[int, Any] = {}
        self._batches: dict[tuple[int, int], Any] = {}

    def take(self, plan: ReshardPlan) -> Any:
        """Return the rows of a part of a plan, in its order, as a table."""
        import pyarrow as pa

        parts, order = [], []
        for number, positions in plan.by_source():
            index = np.searchsorted(self._rows[number], plan.start_M[positions])
            ends = np.flatnonzero(np.diff(index // _SPOOLED, append=-1)) + 1
            for lo, hi in zip([0, *ends[:-1]], ends, strict=True):
                batch = self._batch(number, int(index[lo]) // _SPOOLED)
                parts.append(batch.take(index[lo:hi] % _SPOOLED))
            order.append(positions)
        back = np.empty(len(plan), np.int64)
        back[np.concatenate(order)] = np.arange(len(plan))
        return pa.Table.from_batches(parts).combine_chunks().take(back)

    def _batch(self, number: int, batch: int) -> Any:
        import pyarrow as pa

        if (number, batch) not in self._batches:
            if number not in self._files:
                self._files[number] = pa.ipc.open_file(pa.memory_map(self._paths[number]))
            self._batches[number, batch] = self._files[number].get_batch(batch)
        return self._batches[number, batch]


# --- writing --------------------------------------------------------------------------------------


def write(
    plan: ReshardPlan,
    sources: Sequence[Source],
    schema: Any,
    group: int,
    path: str,
    spools: Spools | None = None,
    for_hub: Any = None,
) -> None:
    """Write a parquet file of the rows of a plan.

    Args:
        plan: The part of the plan for this file; in the order of the data if there are no spools.
        sources: The sources that the plan refers to by number.
        schema: Schema of the rows.
        group: Rows per row group.
        path: File to write.
        spools: The spools of all sources, if the plan is in another order than the data.
        for_hub: The schema of a file for the Hub, see :mod:`thresher.resharding.hub`; None for a file as any other.
    """
    import pyarrow.parquet as pq

    written = schema if for_hub is None else for_hub

    key = sources[0].part.key_column
    if key is not None and not (plan.copy_M.any() and is_words(schema.field(key).type)):
        key = None
    with pq.ParquetWriter(path, written, **({} if for_hub is None else hub.writer_options())) as writer:
        at = 0
        for table in _in_order(plan, sources, schema, group) if spools is None else _gathered(plan, group, spools):
            copies = plan.copy_M[at : at + len(table)]
            table = _renamed(table, key, plan, copies) if key and copies.any() else table
            writer.write_table(table if for_hub is None else hub.fitted(table, for_hub), group)
            at += len(table)


def _in_order(plan: ReshardPlan, sources: Sequence[Source], schema: Any, group: int) -> Iterator[Any]:
    def batches() -> Iterator[Any]:
        for number, positions in plan.by_source():
            yield from sources[number].part.batches(None, plan.start_M[positions], _BATCH)

    yield from _regular(batches(), schema, group)


def _gathered(plan: ReshardPlan, group: int, spools: Spools) -> Iterator[Any]:
    for lo in range(0, len(plan), group):
        yield spools.take(plan.part(lo, lo + group))


def _renamed(table: Any, key: str, plan: ReshardPlan, copies: np.ndarray[Any, Any]) -> Any:
    import pyarrow as pa

    at = table.schema.get_field_index(key)
    named = [
        plan.renamed(name, copy) if name and copy else name
        for name, copy in zip(as_text(table.column(at), "", key).to_pylist(), copies.tolist(), strict=True)
    ]
    field = table.schema.field(at)
    return table.set_column(at, field, pa.array(named, pa.large_string()).cast(field.type))


def group_rows(sources: Sequence[Source], most: int = _GROUP_ROWS, size: int = _GROUP_BYTES) -> int:
    """Return the number of rows per row group: at most ``most``, and about ``size`` bytes."""
    sizes = {source.path: source.size for source in sources}
    rows = sum(source.part.rows or 0 for source in sources)
    return max(1, min(most, size * rows // max(sum(sizes.values()), 1))) if rows else _GROUP_ROWS
