"""Evaluation sets: parquet in the Hugging Face image layout; images are read when they are needed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import PurePath
from typing import Any

import numpy as np

from thresher.errors import PoolError, UsageError, suggest
from thresher.evaluation.accuracy import Ints
from thresher.io.columns import captions_in, is_caption
from thresher.pool.store import EmbeddingStore, open_store

TEXTS = ("text", "texts", "caption", "captions")
LABELS = ("label_name", "label")


@dataclass(frozen=True, eq=False)
class Labels:
    """The classes of a label column.

    Attributes:
        names: The C names: the unique values, sorted (integers by value), as text.
        index_N: (N,) int64, the class of each row, -1 for none.
    """

    names: tuple[str, ...]
    index_N: Ints = field(repr=False)


@dataclass(frozen=True, eq=False)
class EvalSet:
    """Images with captions, labels or both.

    Attributes:
        name: The name in results: the name of the file without its extension.
        path: The path as given.
        texts: The M captions, grouped by row; () if there are none.
        text_row_M: (M,) int64, the row of each caption.
        group_N: (N,) int64, the group of each row; rows of a group count as the same. Without a column of groups every
            row has its own.
        labels: Classes by label column.
        store: The pool of the rows.
        image: The column of the images.
        group: The column of the groups, or None.
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
        """Return N, the number of images."""
        return self.store.total

    def column(self, name: str) -> list[Any]:
        """Return a column, N values.

        Raises:
            UsageError: There is no column of this name.
        """
        return _values(self.store, name)

    @property
    def text_group_M(self) -> Ints:
        """(M,) int64, the group of each caption."""
        return self.group_N[self.text_row_M]

    def pictures(self, rows_B: Sequence[int] | Ints) -> list[bytes]:
        """Return the images of these rows as stored (JPEG, WebP, ...), in the given order.

        Raises:
            PoolError: A row has no image.
        """
        ids = np.asarray(rows_B, np.int64)
        order = np.unique(ids)
        pictures: list[bytes] = []
        for part in self.store.lookup([self.image], order):
            pictures += self._bytes(part, order[len(pictures) : len(pictures) + len(part)])
        return [pictures[i] for i in np.searchsorted(order, ids).tolist()]

    def batches(self, size: int = 256) -> Iterator[tuple[Ints, list[bytes]]]:
        """Yield all images in row order, at most ``size`` at a time, as (row ids (B,), images)."""
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
                    f"{self.path}: row {row:,} has no bytes in column {self.image!r}; store the image bytes there"
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
    """Open an evaluation set, without reading its images.

    Args:
        path: A parquet file, or a folder of parquet files.
        image: Column of the images: a struct with ``bytes`` (and ``path``), or binary.
        text: Column of captions, text or lists of text; by default ``text``, ``texts``, ``caption`` or ``captions``,
            if there is one.
        group: Column of groups of duplicates, numbers or text; by default ``group``, if there is one.
        labels: Label columns, integers or text; by default ``label_name``, else ``label``, if there is one.
        needs: What the set must have: "texts", "labels" or both.

    Raises:
        UsageError: A named column is missing or has another type, or the set lacks what it needs.
        PoolError: The file is missing, damaged or unsafe.
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
                f"{path}: has no column of {what} ({', '.join(usual)}); name another column: it has "
                f"{', '.join(columns) or 'none'}"
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
            f"{store.layout.location}: column {name!r} has type {kind}; images are structs of bytes and path, or binary"
        )


def _values(store: EmbeddingStore, name: str) -> list[Any]:
    return [value for _, part in store.scan([name]) for value in part.column(0).to_pylist()]


def _texts(store: EmbeddingStore, name: str) -> tuple[tuple[str, ...], Ints]:
    """Return the captions and the row of each."""
    texts: list[str] = []
    owners: list[int] = []
    columns = (part.column(0) for _, part in store.scan([name]))
    cells = (captions_in(column) if is_caption(column.type) else column.to_pylist() for column in columns)
    for row, value in enumerate(chain.from_iterable(cells)):
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
        raise UsageError(f"{store.layout.location}: column {name!r} has neither text nor integers; name a label column")
    if not there:
        raise UsageError(f"{store.layout.location}: no row has a label in column {name!r}")
    ordered = sorted(there)
    number = {value: i for i, value in enumerate(ordered)}
    index = np.array([-1 if value is None else number[value] for value in values], np.int64)
    return Labels(tuple(map(str, ordered)), index)
