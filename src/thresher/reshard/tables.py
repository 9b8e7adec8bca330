"""Rows of parquet and Arrow files copied with all their columns, into parquet that ``datasets`` reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np

from thresher.data.parts import Ints
from thresher.errors import PoolError
from thresher.reshard.plan import ReshardPlan, Source

_GROUP_ROWS = 1_000  # of a row group that is written
_GROUP_BYTES = 64 << 20
_BATCH = 256  # rows in memory at a time
_SPOOLED = 512  # rows of a batch of a spool


def schema_of(sources: Sequence[Source]) -> Any:
    """Return the one schema of all files, with what it tells besides (the features of ``datasets``).

    Raises:
        PoolError: They have different columns.
    """
    first = None
    for path, same in groupby(sources, key=lambda source: source.path):
        part = next(same).part
        schema = part.schema()
        if first is None:
            first = schema
        elif not schema.equals(first):
            odd = next((field for field in schema if field not in first), "their order")
            raise PoolError(f"{path}: has other columns than {sources[0].path} ({odd}); reshard them apart")
    return first


# --- spools: the chosen rows of a source, in Arrow, where any of them can be read quickly ---------


def spool(source: Source, rows: Ints, schema: Any, path: str) -> None:
    """Copy rows of a source, ascending and each once, to an Arrow file."""
    import pyarrow as pa

    with pa.OSFile(path, "wb") as file, pa.ipc.new_file(file, schema) as writer:
        for table in _regular(source.part.batches(None, rows, _BATCH), schema, _SPOOLED):
            writer.write_table(table, max_chunksize=_SPOOLED)


def _regular(batches: Iterator[Any], schema: Any, rows: int) -> Iterator[Any]:
    """Yield tables of exactly so many rows, each in one piece, the last shorter."""
    import pyarrow as pa

    held: list[Any] = []
    count = 0
    for batch in batches:
        held.append(batch)
        count += len(batch)
        while count >= rows:
            table = pa.Table.from_batches([one.cast(schema) for one in held], schema)
            yield table.slice(0, rows).combine_chunks()
            held, count = table.slice(rows).to_batches(), count - rows
    if count:
        yield pa.Table.from_batches([one.cast(schema) for one in held], schema).combine_chunks()


class Spools:
    """The chosen rows of all sources, spooled; batches are mapped, not read, and each is opened once."""

    def __init__(self, paths: Mapping[int, str], rows: Mapping[int, Ints]) -> None:
        """Remember which file holds which rows of a source."""
        self._paths, self._rows = paths, rows
        self._files: dict[int, Any] = {}
        self._batches: dict[tuple[int, int], Any] = {}

    def take(self, plan: ReshardPlan) -> Any:
        """Return the rows of a piece of a plan, in its order, as a table."""
        import pyarrow as pa

        parts, order = [], []
        for number, positions in plan.by_source():
            place = np.searchsorted(self._rows[number], plan.start_M[positions])
            ends = np.flatnonzero(np.diff(place // _SPOOLED, append=-1)) + 1
            for lo, hi in zip([0, *ends[:-1]], ends, strict=True):
                batch = self._batch(number, int(place[lo]) // _SPOOLED)
                parts.append(batch.take(place[lo:hi] % _SPOOLED))
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
    plan: ReshardPlan, sources: Sequence[Source], schema: Any, group: int, path: str, spools: Spools | None = None
) -> None:
    """Write a parquet file of the rows of a plan.

    Args:
        plan: A shard of it; in the order of the data where there are no spools.
        sources: What it numbers.
        schema: Of the rows.
        group: Rows of a row group.
        path: File to write.
        spools: The chosen rows of all sources, where the plan is in another order.
    """
    import pyarrow.parquet as pq

    key = sources[0].part.key_column
    if key is not None and not (plan.copy_M.any() and "string" in str(schema.field(key).type)):
        key = None
    with pq.ParquetWriter(path, schema) as writer:
        at = 0
        for table in _in_order(plan, sources, schema, group) if spools is None else _gathered(plan, group, spools):
            copies = plan.copy_M[at : at + len(table)]
            writer.write_table(_renamed(table, key, plan, copies) if key and copies.any() else table, group)
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
        name if name in (None, "") or not copy else plan.renamed(name, copy)
        for name, copy in zip(table.column(at).to_pylist(), copies.tolist(), strict=True)
    ]
    return table.set_column(at, table.schema.field(at), pa.array(named, table.schema.field(at).type))


def group_rows(sources: Sequence[Source]) -> int:
    """Return how many rows a row group is to have: 1,000, fewer where they are large."""
    sizes = {source.path: source.size for source in sources}
    rows = sum(source.part.rows or 0 for source in sources)
    return max(1, min(_GROUP_ROWS, _GROUP_BYTES * rows // max(sum(sizes.values()), 1))) if rows else _GROUP_ROWS
