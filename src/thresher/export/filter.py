"""Filter datasets by a selection: the result has the type of the dataset."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from thresher.errors import UsageError, suggest
from thresher.export.keys import KeySet, read_keys, select_indices, texts_of
from thresher.pool.store import reopen
from thresher.selection import Selection

_TAKES = (
    "a Hugging Face Dataset or IterableDataset, a map-style dataset of torch, a pandas or polars frame, an Arrow "
    "table, a NumPy array, a tensor, a list or a tuple"
)


_ROWS = 256  # of a stream at a time: an image may have megabytes
# Steps of a stream after which each row has the number that it had.
_SAME_ROWS = (
    "FormattedExamplesIterable", "RebatchedArrowExamplesIterable", "SelectColumnsIterable", "TakeExamplesIterable"
)  # fmt: skip


def filtered(selection: Selection, dataset: Any, keys: str | Iterable[Any] | None = None) -> Any:
    """Return the kept rows of a dataset, see :meth:`thresher.selection.Selection.filter`."""
    for cls in type(dataset).__mro__:
        package = cls.__module__.partition(".")[0]
        kind = _KINDS.get((package, cls.__name__)) or _KINDS.get((cls.__module__, cls.__name__))
        if kind is not None:
            return kind(selection, dataset, keys)
    raise UsageError(f"cannot filter {type(dataset).__name__}; give {_TAKES}")


def _rows(selection: Selection, dataset: Any, keys: Any, names: Sequence[str], column: Any) -> npt.NDArray[np.int64]:
    """Return the kept row numbers of a dataset with random access.

    Args:
        selection: The selection.
        dataset: Anything with a length.
        keys: As the caller gave them: the name of a column, the keys, or None.
        names: The columns of the dataset.
        column: Returns the values of a column.
    """
    name = _key_column(selection, keys, names)
    if name is not None:
        keys = column(name)
    if keys is not None:
        return select_indices(selection, dataset, keys=keys)
    if len(dataset) != selection.total:
        raise UsageError(
            f"a dataset of {len(dataset):,} rows for a pool of {selection.total:,} rows ({selection.pool}), and no "
            "column of keys in common; give the dataset of the pool, or the keys of its rows with keys="
        )
    return select_indices(selection)


def _key_column(selection: Selection, keys: Any, names: Sequence[str]) -> str | None:
    """Return the column to match by, None to match by row or by given keys."""
    if isinstance(keys, str):
        if keys not in names:
            raise UsageError(
                f"keys = {keys!r}: no such column; there are {', '.join(names) or 'none'}.{suggest(keys, names)}"
            )
        return keys
    if keys is not None or not names:
        return None
    own = reopen(selection).layout.key
    return own if own in names else None


# --- kinds ----------------------------------------------------------------------------------------


def _listed(selection: Selection, dataset: Any, keys: Any) -> Any:
    first = dataset[0] if len(dataset) else None
    names = list(first) if isinstance(first, Mapping) else []

    def column(name: str) -> list[Any]:
        return [row.get(name) for row in dataset]

    return type(dataset)([dataset[i] for i in _rows(selection, dataset, keys, names, column).tolist()])


def _array(selection: Selection, dataset: Any, keys: Any) -> Any:
    return dataset[_rows(selection, dataset, keys, (), None)]


def _arrow(selection: Selection, dataset: Any, keys: Any) -> Any:
    names = getattr(dataset, "column_names", None) or getattr(getattr(dataset, "schema", None), "names", [])
    return dataset.take(_rows(selection, dataset, keys, names, lambda name: dataset.column(name)))


def _pandas(selection: Selection, dataset: Any, keys: Any) -> Any:
    index = dataset.index.name
    names = [*([] if index is None else [index]), *getattr(dataset, "columns", [])]
    rows = _rows(selection, dataset, keys, names, lambda name: dataset.index if name == index else dataset[name])
    return dataset.iloc[rows]


def _polars(selection: Selection, dataset: Any, keys: Any) -> Any:
    names = getattr(dataset, "columns", ())
    return dataset[_rows(selection, dataset, keys, names, lambda name: dataset[name])]


def _lazy(selection: Selection, dataset: Any, keys: Any) -> Any:
    return _polars(selection, dataset.collect(), keys).lazy()


def _dataset(selection: Selection, dataset: Any, keys: Any) -> Any:
    def column(name: str) -> Any:
        return dataset.select_columns([name]).with_format("arrow")[:].column(0)

    return dataset.select(_rows(selection, dataset, keys, dataset.column_names, column))


def _splits(selection: Selection, dataset: Any, keys: Any) -> Any:
    raise UsageError(f"this has the splits {', '.join(map(repr, dataset))}; filter one of them, as dataset['train']")


def _torch(selection: Selection, dataset: Any, keys: Any) -> Any:
    from torch.utils.data import IterableDataset, Subset

    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise UsageError(
            f"{type(dataset).__name__} is a stream, without row numbers; filter its samples by key with "
            "thresher.export.webdataset.keep"
        )
    return Subset(dataset, _rows(selection, dataset, keys, (), None).tolist())


def _stream(selection: Selection, dataset: Any, keys: Any) -> Any:
    """Filter a Hugging Face IterableDataset while it is read."""
    if selection.repeats is not None:
        raise UsageError("this selection repeats rows, which the filter of a stream cannot do; load it as a Dataset")
    if keys is not None and not isinstance(keys, str):
        raise UsageError("the keys of a stream are read with it; give the name of their column with keys=")
    names = dataset.column_names or list(next(iter(dataset), {}))
    name = _key_column(selection, keys, names)
    if name is None and getattr(dataset, "num_shards", 1) > 1:
        raise UsageError(
            f"the stream has {dataset.num_shards:,} shards, and no column of keys in common with the pool; workers and "
            "nodes that share the shards would count its rows from 0: give the name of its column of keys with keys=, "
            "or load it as a Dataset"
        )
    if name is None and not _has_row_numbers(dataset):
        raise UsageError(
            "the stream was shuffled, filtered, mapped in batches, joined or cut after it was loaded, so its rows have "
            "other numbers than those of the pool: do that after this filter, or give the name of its column of keys "
            "with keys="
        )
    kept = _RowKept(selection.mask(), selection.pool) if name is None else _KeyKept(read_keys(selection), name)
    indexed = name is None
    if getattr(getattr(dataset, "_ex_iterable", None), "iter_arrow", None) is None:  # its rows are Python objects
        columns = [] if name is None else [name]
        return dataset.filter(kept, input_columns=columns, with_indices=indexed, batched=True)
    # As Arrow tables without features, the images of dropped rows are not decoded. Later steps need the features.
    features, form = dataset.features, getattr(dataset, "_formatting", None)
    tables = dataset.with_format("arrow")  # has an info of its own
    tables.info.features = None
    tables = tables.filter(kept.of_table, with_indices=indexed, batched=True, batch_size=_ROWS)
    found = tables.with_format(None if form is None else form.format_type)
    found.info.features = features
    return found


def _has_row_numbers(dataset: Any) -> bool:
    """Return whether a stream has the rows that were loaded: only columns, values and formats may be others."""
    step = getattr(dataset, "_ex_iterable", None)
    while (before := getattr(step, "ex_iterable", None)) is not None:
        kind = type(step).__name__
        if kind not in _SAME_ROWS and (kind != "MappedExamplesIterable" or getattr(step, "batched", True)):
            return False
        step = before
    return not hasattr(step, "ex_iterables")


@dataclass(frozen=True, eq=False)
class _KeyKept:
    """Which keys of a stream are kept; can be pickled, for the workers of a loader."""

    keys: KeySet
    column: str

    def __call__(self, keys: Any) -> list[bool]:
        return [bool(times) for times in self.keys.times_many(texts_of(keys))]

    def of_table(self, table: Any) -> list[bool]:
        return self(table.column(self.column))


@dataclass(frozen=True, eq=False)
class _RowKept:
    """Which row numbers of a stream are kept; can be pickled."""

    mask_N: npt.NDArray[np.bool_]
    pool: str

    def __call__(self, rows: Sequence[int]) -> list[bool]:
        if len(rows) and max(rows) >= len(self.mask_N):
            raise UsageError(
                f"the stream has more rows than the {len(self.mask_N):,} of the pool ({self.pool}); give the name of "
                "its column of keys with keys="
            )
        return [bool(kept) for kept in self.mask_N[np.asarray(rows, np.int64)]]

    def of_table(self, _table: Any, rows: Sequence[int]) -> list[bool]:
        return self(rows)


_KINDS = {
    ("builtins", "list"): _listed,
    ("builtins", "tuple"): _listed,
    ("numpy", "ndarray"): _array,
    ("torch", "Tensor"): _array,
    ("torch", "Dataset"): _torch,
    ("pyarrow", "Table"): _arrow,
    ("pyarrow", "RecordBatch"): _arrow,
    ("pyarrow", "ChunkedArray"): _arrow,
    ("pyarrow", "Array"): _arrow,
    ("pandas", "DataFrame"): _pandas,
    ("pandas", "Series"): _pandas,
    ("polars", "DataFrame"): _polars,
    ("polars", "Series"): _polars,
    ("polars", "LazyFrame"): _lazy,
    ("datasets.arrow_dataset", "Dataset"): _dataset,
    ("datasets.iterable_dataset", "IterableDataset"): _stream,
    ("datasets.dataset_dict", "DatasetDict"): _splits,
    ("datasets.dataset_dict", "IterableDatasetDict"): _splits,
}
