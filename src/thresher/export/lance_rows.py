"""The Lance dataset of a pool: the pool itself, or the data that ``thresher embed`` made it of.

Shape letters: N rows of the pool, n rows of the dataset.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from thresher.errors import PoolError, UsageError
from thresher.io.lance import Fragment, LanceTable, fragments_of
from thresher.io.listing import Files
from thresher.io.paths import visible
from thresher.io.plan import datasets_in, paths_of, plan_in
from thresher.pool.store import EmbeddingStore

Ints = npt.NDArray[np.int64]

_FILE = re.compile(r"(.+)/data/[^/]+\.lance")  # of a dataset
_BATCH = 8_192  # rows that are not in the pool, at a time
_ABSENT = {"kept": False, "reason": "not in the pool", "repeats": 0, "score": float("nan")}


@dataclass(frozen=True, eq=False)
class LanceRows:
    """The rows of a pool in the Lance dataset that they are from.

    Attributes:
        fragments: The fragments of the version, in order, with n rows.
        again: What to type if the dataset has changed since.
        row_N: The row of the dataset of each row of the pool; None if the pool is the dataset.
    """

    fragments: list[Fragment]
    again: str
    row_N: Ints | None = None

    @property
    def absent(self) -> int:
        """Number of rows that are not in the pool."""
        return 0 if self.row_N is None else sum(one.rows for one in self.fragments) - len(self.row_N)

    def spread(self, times_N: Ints) -> Ints:
        """Return how often each row of the dataset is used, (n,), given the same of the pool."""
        if self.row_N is None:
            return times_N
        times_n = np.zeros(len(self.row_N) + self.absent, np.int64)
        times_n[self.row_N] = times_N
        return times_n

    def filled(self, parts: Iterator[Any], columns: list[str]) -> Iterator[Any]:
        """Yield record batches with a row for each row of the dataset, given those with one for each of the pool.

        Args:
            parts: The batches, of :func:`thresher.export.table.batches`.
            columns: Their columns: "kept", "score", "reason" and "repeats".
        """
        if self.row_N is None:
            yield from parts
            return
        done, n = 0, len(self.row_N) + self.absent
        seen = 0
        for part in parts:
            row_b = self.row_N[seen : seen + len(part)]
            seen += len(part)
            end = n if seen == len(self.row_N) else int(row_b[-1]) + 1
            while done < end:
                stop = min(done + _BATCH, end)
                lo, hi = np.searchsorted(row_b, [done, stop])
                yield _among(part.slice(lo, hi - lo), row_b[lo:hi] - done, stop - done, columns)
                done = stop


def _among(part: Any, at: Ints, rows: int, columns: list[str]) -> Any:
    """Return a batch with its rows at some places, and in between the values of rows that are not in the pool."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if len(part) == rows:
        return part
    index = np.zeros(rows, np.int64)
    there = np.zeros(rows, np.bool_)
    index[at], there[at] = np.arange(len(part)), True
    taken = pa.array(index, mask=~there)
    cells = []
    for name, cell in zip(columns, part.columns, strict=True):
        absent = pa.scalar(_ABSENT[name], cell.type)
        cells.append(pc.if_else(pa.array(there), cell.take(taken), absent))
    return pa.RecordBatch.from_arrays(cells, names=part.schema.names)


def lance_rows(store: EmbeddingStore) -> LanceRows:
    """Find the rows of a pool in its Lance dataset: the pool itself, or the data that it was embedded from.

    Raises:
        UsageError: There is no such dataset, or it no longer has the version that the pool was made of.
        PoolError: The dataset is damaged, or is not where it was.
    """
    pool = store.layout.location
    tables = store.layout.table_parts
    if store.layout.skipped:
        raise UsageError(f"{pool}: has files that were skipped; repair them and select again")
    if fragments := [one.fragment for one in tables if isinstance(one, LanceTable) and one.fragment is not None]:
        return LanceRows(fragments, "select again")
    plan = plan_in(Files.at(pool)) if _is_embedded(store) else None
    dataset, version, names = _made_from(pool, plan) if plan is not None else ("", 0, {})
    if not dataset:
        raise UsageError(
            f"{pool}: is {store.layout.kind}, not a Lance dataset, and thresher embed did not make it of one; "
            "--as parquet writes any pool"
        )
    try:
        fragments = fragments_of(Files.at(dataset), version)
    except (PoolError, UsageError) as error:
        raise type(error)(
            f"{error}; {pool} was made of version {version} of {visible(dataset)}: restore it, or embed it again"
        ) from None
    return LanceRows(fragments, "embed it into a new pool and select again", _rows(store, fragments, dataset, names))


def _is_embedded(store: EmbeddingStore) -> bool:
    return {"shard", "offset"} <= set(store.columns)


def _made_from(pool: str, plan: Any) -> tuple[str, int, dict[str, str]]:
    """Return the dataset of a pool, its version, and the names of its files in the column "shard"; "" for none.

    Raises:
        UsageError: Only some rows are of a dataset, or the version is not known.
    """
    paths = paths_of(plan)
    try:
        known = datasets_in(plan)
    except ValueError as error:
        raise PoolError(f"{pool}: its pool.json is damaged: {error}; restore it, or embed again") from None
    for dataset, version in known.items():
        others = [path for path in paths if not path.startswith(f"{dataset}/data/")]
        if not others:
            return dataset, version, {path.removeprefix(dataset): name for path, name in paths.items()}
    of_lance = [found[1] for path in paths if (found := _FILE.fullmatch(path))]
    if known and of_lance:
        other = next((path for path in paths if not path.startswith(f"{of_lance[0]}/")), "other data")
        raise UsageError(
            f"{pool}: was made of {visible(of_lance[0])} and of {visible(other)}; embed each Lance dataset into a pool "
            "of its own"
        )
    if of_lance:
        raise UsageError(
            f"{pool}: does not say which version of {visible(of_lance[0])} it was made of; run the thresher embed "
            "command that made it again, which adds the version and embeds nothing twice"
        )
    return "", 0, {}


def _rows(store: EmbeddingStore, fragments: list[Fragment], dataset: str, names: dict[str, str]) -> Ints:
    """Return the row of the dataset of each row of the pool, (N,), ascending.

    Raises:
        UsageError: A row of the pool is of no file of the version, or the rows are in another order.
    """
    import pyarrow as pa

    pool = store.layout.location
    ends = np.cumsum([one.rows for one in fragments])
    own = {_below(one): (int(end) - one.rows, one.rows) for one, end in zip(fragments, ends, strict=True)}
    places = {name: own.get(path) for path, name in names.items()}
    row_N = np.empty(len(store), np.int64)
    for ids, part in store.scan(["shard", "offset"]):
        coded = part.column(0).dictionary_encode()
        found = [places.get(name) for name in coded.dictionary.to_pylist()]
        offset = part.column(1)
        if coded.null_count or offset.null_count or None in found or not pa.types.is_integer(offset.type):
            name = next(
                (str(name) for name, one in zip(coded.dictionary.to_pylist(), found, strict=True) if not one), ""
            )
            raise UsageError(
                f"{pool}: has a row of {visible(name, 120) or 'an unknown file'}, which version "
                f"{fragments[0].version} of {visible(dataset)} does not have; embed it into a new pool and select again"
            )
        offset_b = offset.to_numpy()
        first_b, rows_b = np.array(found, np.int64).reshape(-1, 2)[coded.indices.to_numpy()].T
        if ((offset_b < 0) | (offset_b >= rows_b)).any():
            raise UsageError(
                f"{pool}: has a row {int(offset_b.max()):,} of a file with fewer rows in version "
                f"{fragments[0].version} of {visible(dataset)}; embed it into a new pool and select again"
            )
        row_N[ids] = first_b + offset_b
    if (np.diff(row_N) <= 0).any():
        raise UsageError(
            f"{pool}: has the rows of {visible(dataset)} in another order, or twice; embed it into a new pool and "
            "select again"
        )
    return row_N


def _below(fragment: Fragment) -> str:
    """Return the path of the first file of a fragment below its dataset."""
    root = fragment.uri.partition("://")[2] or fragment.uri
    return fragment.path.removeprefix(root)
