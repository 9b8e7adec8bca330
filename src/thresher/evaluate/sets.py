"""Evaluation sets: parquet in the Hugging Face image layout, pictures read as they are needed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

import numpy as np

from thresher.errors import PoolError, UsageError, suggest
from thresher.evaluate.accuracy import Ints
from thresher.pool.store import EmbeddingStore, open_store

TEXTS = ("text", "texts", "caption", "captions")
LABELS = ("label_name", "label")


@dataclass(frozen=True, eq=False)
class Labels:
    """The classes of a label column.

    Attributes:
        names: C names: the sorted unique values, as text; whole numbers in their own order.
        index_N: (N,) int64, the class of each row, -1 where it has none.
    """

    names: tuple[str, ...]
    index_N: Ints = field(repr=False)


@dataclass(frozen=True, eq=False)
class EvalSet:
    """Pictures with captions, labels or both.

    Attributes:
        name: What to call it: the file's name without its ending.
        path: Where it lies.
        texts: M captions, those of a row one after the other; () where there are none.
        text_row_M: (M,) int64, the row each caption belongs to.
        group_N: (N,) int64, rows of one group show or say the same; every row its own where no column says so.
        labels: Classes by label column.
        group: The column that says which rows are of one group, None where none does.
    """

    name: str
    path: str
    texts: tuple[str, ...] = field(repr=False)
    text_row_M: Ints = field(repr=False)
    group_N: Ints = field(repr=False)
    labels: Mapping[str, Labels]
    store: EmbeddingStore = field(repr=False)
    image: str
    group: str | None = None

    def __len__(self) -> int:
        """Return N, the number of pictures."""
        return self.store.total

    def column(self, name: str) -> list[Any]:
        """Return a column, N values.

        Raises:
            UsageError: There is none of this name.
        """
        return _values(self.store, name)

    @property
    def text_group_M(self) -> Ints:
        """(M,) int64, the group of each caption."""
        return self.group_N[self.text_row_M]

    def pictures(self, rows_B: Sequence[int] | Ints) -> list[bytes]:
        """Return the pictures of some rows as they are stored (JPEG, WebP, ...), in the order asked.

        Raises:
            PoolError: A row has none.
        """
        ids = np.asarray(rows_B, np.int64)
        order = np.unique(ids)
        pictures: list[bytes] = []
        for part in self.store.lookup([self.image], order):
            pictures += self._bytes(part, order[len(pictures) : len(pictures) + len(part)])
        return [pictures[i] for i in np.searchsorted(order, ids).tolist()]

    def batches(self, size: int = 256) -> Iterator[tuple[Ints, list[bytes]]]:
        """Yield all pictures in row order, at most ``size`` at a time, as (row ids, pictures)."""
        start = 0
        for table in self.store.layout.tables:
            for part in table.stream([self.image], size):
                ids = np.arange(start, start + len(part))
                start += len(part)
                yield ids, self._bytes(part, ids)

    def _bytes(self, part: Any, ids: Ints) -> list[bytes]:
        cells: list[bytes] = []
        for value, row in zip(part.column(0).to_pylist(), ids.tolist(), strict=True):
            cells.append((value.get("bytes") if isinstance(value, dict) else value) or b"")
            if not cells[-1]:
                raise PoolError(
                    f"{self.path}: row {row:,} has no bytes in column {self.image!r}; put the picture there"
                )
        return cells


def read_eval(
    path: str,
    *,
    image: str = "image",
    text: str | None = None,
    group: str | None = None,
    labels: Sequence[str] | None = None,
    needs: Sequence[str] = (),
) -> EvalSet:
    """Open an evaluation set; pictures are not read yet.

    Args:
        path: A parquet file, or a folder of them.
        image: Column of the pictures: a struct with ``bytes`` (and ``path``), or binary.
        text: Column of captions, text or lists of text; by default ``text``, ``texts``, ``caption`` or ``captions``
            where there is one.
        group: Column of what is duplicated, numbers or text; by default ``group`` where there is one.
        labels: Label columns, numbers or text; by default ``label_name``, else ``label``, where there is one.
        needs: What there must be, of "texts" and "labels".

    Raises:
        UsageError: A column named that is not there, or is of another type, or nothing of what is needed.
        PoolError: The file is not there or cannot be trusted.
    """
    store = open_store(path)
    columns = store.columns

    def one(name: str | None, usual: Sequence[str]) -> str | None:
        if name is not None and name not in columns:
            near = suggest(name, columns)
            raise UsageError(f"{path}: has no column {name!r}; it has {', '.join(columns) or 'none'}.{near}")
        return name or next((each for each in usual if each in columns), None)

    picture = one(image, ())
    caption, grouped = one(text, TEXTS), one(group, ("group",))
    default = [column] if (column := one(None, LABELS)) else []
    named = default if labels is None else [str(one(name, ())) for name in labels]
    for what, there, usual in (("texts", caption, TEXTS), ("labels", named, LABELS)):
        if what in needs and not there:
            raise UsageError(
                f"{path}: has no column of {what} ({', '.join(usual)}); name one of {', '.join(columns) or 'none'}"
            )
    _check_pictures(store, str(picture))
    texts, owners = _texts(store, caption) if caption else ((), np.empty(0, np.int64))
    groups = np.arange(store.total)
    if grouped:
        values = _values(store, grouped)
        if None in values:
            raise UsageError(f"{path}: row {values.index(None):,} has no {grouped!r}; give every row a group")
        groups = np.unique(np.array(values), return_inverse=True)[1].astype(np.int64)
    return EvalSet(
        name=PurePath(path).stem,
        path=path,
        texts=texts,
        text_row_M=owners,
        group_N=groups,
        labels={name: _labels(store, name) for name in named},
        store=store,
        image=str(picture),
        group=grouped,
    )


def _check_pictures(store: EmbeddingStore, name: str) -> None:
    import pyarrow as pa

    kind = store.layout.tables[0].schema([name]).field(0).type
    inner = kind
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        inner = kind.field("bytes").type
    if not (pa.types.is_binary(inner) or pa.types.is_large_binary(inner)):
        raise UsageError(
            f"{store.layout.location}: column {name!r} holds {kind}; pictures are structs of bytes and path, or binary"
        )


def _values(store: EmbeddingStore, name: str) -> list[Any]:
    return [value for _, part in store.scan([name]) for value in part.column(0).to_pylist()]


def _texts(store: EmbeddingStore, name: str) -> tuple[tuple[str, ...], Ints]:
    """Return the captions and the row each belongs to."""
    texts: list[str] = []
    owners: list[int] = []
    for row, value in enumerate(_values(store, name)):
        captions = value if isinstance(value, list) else [value]
        if not captions or not all(isinstance(each, str) and each.strip() for each in captions):
            raise UsageError(f"{store.layout.location}: row {row:,} has no text in column {name!r} ({value!r})")
        texts += captions
        owners += [row] * len(captions)
    return tuple(texts), np.array(owners, np.int64)


def _labels(store: EmbeddingStore, name: str) -> Labels:
    values = _values(store, name)
    there = {value for value in values if value is not None}
    if not all(isinstance(value, str) for value in there) and not all(type(value) in (int, bool) for value in there):
        raise UsageError(f"{store.layout.location}: column {name!r} holds neither text nor whole numbers: no labels")
    if not there:
        raise UsageError(f"{store.layout.location}: no row has a label in column {name!r}")
    ordered = sorted(there)
    number = {value: i for i, value in enumerate(ordered)}
    index = np.array([-1 if value is None else number[value] for value in values], np.int64)
    return Labels(tuple(map(str, ordered)), index)
