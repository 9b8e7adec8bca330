"""A selection as a table: a row per row of the pool, with what became of it and why."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from thresher.errors import UsageError, suggest
from thresher.pool.store import EmbeddingStore
from thresher.selection import Selection, Step

_EVIDENCE = (
    "score",
    "cluster",
    "duplicate_of",
    "duplicate_group",
)  # of every step that has it, after the name of its method
_OF_LAST = ("score", "duplicate_of", "duplicate_group")  # of the last step that saw a row
COLUMNS = {
    "metavar": "NAMES",
    "help": "columns, separated by commas (default: row, key, kept, step, reason, repeats and scores of steps)",
}
"""The option of formats whose columns can be chosen, for :func:`wanted_columns`."""


def columns_of(selection: Selection) -> list[str]:
    """Return the columns that a table has by default: the row and its fate, and the scores of steps."""
    more = [] if selection.repeats is None else ["repeats"]
    scores = [
        name for name, (_, evidence) in _of_steps(selection).items() if evidence not in ("cluster", "duplicate_group")
    ]
    return ["row", "key", "kept", "step", "reason", *more, *scores]


def as_table(selection: Selection, store: EmbeddingStore | None, columns: Sequence[str] | None = None) -> Any:
    """Return a selection as an Arrow table with N rows.

    Args:
        selection: The selection.
        store: Its pool; needed only for "key" and for columns of the pool.
        columns: See :func:`batches`; by default those of :func:`columns_of`.

    Raises:
        UsageError: There is no such column.
        PoolError: A file of the pool changed while it was read.
    """
    import pyarrow as pa

    wanted = columns_of(selection) if columns is None else list(columns)
    table = pa.Table.from_batches(list(batches(selection, store, wanted)))
    if store is not None:
        store.check_unchanged("the table was made")
    return table


def wanted_columns(selection: Selection, names: str) -> list[str]:
    """Return the columns of an option, separated by commas; those of :func:`columns_of` if there are none.

    Raises:
        UsageError: A name is given twice.
    """
    wanted = [name.strip() for name in names.split(",") if name.strip()] or columns_of(selection)
    if twice := [name for name in wanted if wanted.count(name) > 1]:
        raise UsageError(f"column {twice[0]!r} is given twice")
    return wanted


def json_value(value: Any) -> Any:
    """Return a value of an Arrow table as JSON has it: numbers that are not finite as null, bytes and dates as text."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, dict):
        return {str(name): json_value(one) for name, one in value.items()}
    if isinstance(value, list):
        return [json_value(one) for one in value]
    return value if value is None or isinstance(value, (str, int)) else str(value)


def needs_pool(selection: Selection, columns: Sequence[str] | None) -> bool:
    """Return whether a table with these columns needs the pool."""
    return columns is None or bool({*columns} - {*_own(selection), *_of_steps(selection)} or "key" in columns)


def batches(selection: Selection, store: EmbeddingStore | None, columns: Sequence[str]) -> Iterator[Any]:
    """Yield a selection as Arrow record batches, in the order of the pool.

    Args:
        selection: The selection.
        store: Its pool; needed only for "key" and for columns of the pool.
        columns: Any of "row" int64; "key" text; "kept" bool; "step", the method that dropped the row, "" if kept;
            "reason", "kept" if kept; "repeats" int32, how often the row is used; "score" float32 (NaN for none) and
            "duplicate_of" and "duplicate_group" int64 (-1 for none) of the last step that saw the row; the same of one
            step as "density_score" or "semdedup_duplicate_of", and "density_cluster" int32 (-1 for rows that the step
            did not see); and columns of the pool.

    Raises:
        UsageError: There is no such column.
    """
    import pyarrow as pa

    steps, own = _of_steps(selection), _own(selection)
    pool = [name for name in columns if name not in own and name not in steps]
    known = [*own, *steps, *(store.columns if store is not None else ())]
    if unknown := [name for name in pool if name not in known]:
        raise UsageError(f"no column {unknown[0]!r}; there are {', '.join(known)}.{suggest(unknown[0], known)}")
    seen = [0] * len(selection.steps)  # rows of each step's input that are done
    for ids, keys, part in _rows(selection, store, "key" in columns, pool):
        by = np.asarray(selection.dropped_by[ids])
        made: dict[str, Any] = {"row": ids, "key": keys, "kept": by == -1}
        if selection.repeats is not None:
            made["repeats"] = selection.repeats[ids]
        if "step" in columns:
            names = np.array(["", *(step.method for step in selection.steps)], object)
            made["step"] = names[by + 1]
        reasons = np.full(len(ids), "kept", object)
        made |= {name: np.full(len(ids), *_NOTHING[name]) for name in _OF_LAST}
        for number, step in enumerate(selection.steps):
            mask = (by == -1) | (by >= number)  # as Selection.given, for these rows only
            # Positions in the arrays of the step; rows are in pool order.
            at = seen[number] + np.cumsum(mask) - 1
            here = slice(seen[number], seen[number] + int(mask.sum()))
            seen[number] = here.stop
            for name in _OF_LAST:
                if name in step.rows:
                    made[name][mask] = step.rows[name][here]
            for name, (owner, evidence) in steps.items():
                if owner is step and name in columns:
                    made[name] = np.full(len(ids), *_NOTHING[evidence])
                    made[name][mask] = step.rows[evidence][here]
            if "reason" in columns:
                dropped = by == number
                reasons[dropped] = step.why_each(at[dropped])
        made["reason"] = reasons
        cells = [part[name] if name in pool else pa.array(made[name], _TYPES.get(name)) for name in columns]
        yield pa.RecordBatch.from_arrays(cells, names=list(columns))


_NOTHING: dict[str, tuple[Any, Any]] = {
    "score": (np.nan, np.float32),
    "cluster": (-1, np.int32),
    "duplicate_of": (-1, np.int64),
    "duplicate_group": (-1, np.int64),
}
_TYPES = {"key": "string", "step": "string", "reason": "string"}


def _own(selection: Selection) -> list[str]:
    more = [] if selection.repeats is None else ["repeats"]
    return ["row", "key", "kept", "step", "reason", *more, *_OF_LAST]


def _of_steps(selection: Selection) -> dict[str, tuple[Step, str]]:
    """Return the columns of single steps: their step and evidence. A second step of a method is "density_2_score"."""
    found: dict[str, tuple[Step, str]] = {}
    methods: list[str] = []
    for step in selection.steps:
        methods.append(step.method)
        count = methods.count(step.method)
        prefix = step.method.replace("-", "_") + (f"_{count}" if count > 1 else "")
        found |= {f"{prefix}_{name}": (step, name) for name in _EVIDENCE if name in step.rows}
    return found


def _rows(
    selection: Selection, store: EmbeddingStore | None, keyed: bool, pool: Sequence[str]
) -> Iterator[tuple[npt.NDArray[np.int64], Any, dict[str, Any]]]:
    """Yield row ids, their keys, and the cells of columns of the pool, batch by batch."""
    if store is not None and pool:
        names = list(dict.fromkeys([*pool, *([store.layout.key] if keyed and store.layout.key else [])]))
        for ids, part in store.scan(names):
            cells = dict(zip(names, part.columns, strict=True))
            keys = store.layout.keys_in(cells[store.layout.key]) if keyed and store.layout.key else ids.astype(str)
            yield ids, keys, cells
    elif store is not None and keyed:
        for ids, keys in store.keys():
            yield ids, keys, {}
    else:
        for lo in range(0, selection.total, 65_536):
            yield np.arange(lo, min(lo + 65_536, selection.total)), None, {}
