"""A selection of a Lance dataset: its rows as a new dataset, or a column of the dataset itself in a new version."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from thresher.errors import OutputError, ThresherError, UsageError
from thresher.export.lance_rows import LanceRows, lance_rows
from thresher.export.registry import Written
from thresher.export.table import batches
from thresher.io.lance import MARK, blobs_of, marks_of, package
from thresher.io.paths import visible
from thresher.pool.store import EmbeddingStore
from thresher.runtime.files import writing_folder
from thresher.runtime.format import counted
from thresher.runtime.random import digest
from thresher.selection import Selection

_NEXT, _LAST = "__next", "__last"  # endings of columns while they are replaced
_LARGE = 256  # rows at a time if there are images or other bytes
_SMALL = 8_192


@dataclass(frozen=True, kw_only=True)
class Lance:
    """A new Lance dataset with the kept rows; if the target is the dataset of the pool, a new version with a column."""

    name: ClassVar[str] = "lance"
    is_folder: ClassVar[bool] = True

    column: str = field(default="kept", metadata={"help": "column of true and false that the dataset of the pool gets"})
    with_score: bool = field(default=False, metadata={"help": "also add a column with the score of the last step"})
    with_reason: bool = field(default=False, metadata={"help": "also add a column that says why a row was dropped"})

    def __post_init__(self) -> None:
        """Refuse a name that a filter would read as something else: ``filter="a-b"`` is a difference."""
        if not self.column.isidentifier():
            raise UsageError(
                f"column = {visible(self.column, 80)!r}: give letters, digits and _, the first of them no digit, so "
                'that Lance reads it in filter="NAME"'
            )

    def write(
        self,
        selection: Selection,
        store: EmbeddingStore,
        path: str,
        *,
        overwrite: bool = False,
        say: Callable[[str], None] | None = None,
    ) -> Written:
        """Write a new dataset, or add columns to that of the pool; older versions of it stay as they are.

        The dataset of a pool is the pool itself, or the data that ``thresher embed`` made it of. Rows of such data that
        are not in the pool are not kept. A new dataset has all columns of the version that the selection was made of,
        and each kept row as often as it is used. The added columns are ``kept``, and by request ``kept_score`` and
        ``kept_reason``; with repeats also ``kept_repeats``. Both are complete or not there; the same export again
        changes nothing.

        Args:
            selection: The selection.
            store: Its pool, a Lance dataset or made of one by ``thresher embed``.
            path: A new name, or the dataset of the pool.
            overwrite: Replace an existing dataset, or columns of another selection.
            say: Called with one line if the result is there already, or rows are not in the pool.

        Raises:
            UsageError: The pool has no Lance dataset, or that was changed after the selection was made.
            PoolError: The dataset is damaged, or is not where it was.
            OutputError: Something else is there, or it cannot be written.
        """
        found = lance_rows(store)
        store.check_unchanged("the places of its rows were read")
        place, source = os.path.realpath(path), os.path.realpath(found.fragments[0].uri)
        if place.startswith(source + os.sep):
            raise OutputError(f"{path}: is inside the dataset of the pool; choose another folder")
        request = [self.column, self.with_score, self.with_reason, selection.header()]
        mark = digest(selection.mask(), b"" if selection.repeats is None else selection.repeats, request)[:32].encode()
        notice = say or _nobody
        if found.absent:
            notice(f"{found.fragments[0].uri}: {counted(found.absent, 'row')} not in the pool, and not kept")
        if place == source:
            self._add(selection, store, found, mark, overwrite, notice)
            return Written(selection.total + found.absent)
        _new(selection, found, path, mark, overwrite, notice)
        return Written(selection.uses)

    def _add(
        self,
        selection: Selection,
        store: EmbeddingStore,
        found: LanceRows,
        mark: bytes,
        overwrite: bool,
        say: Callable[[str], None],
    ) -> None:
        import pyarrow as pa

        first = found.fragments[0]
        with _writing(first.uri):
            dataset = package().dataset(first.uri)
            _refuse_changed(found, dataset)
            wanted = {self.column: "kept"}
            wanted |= {f"{self.column}_score": "score"} if self.with_score else {}
            wanted |= {f"{self.column}_reason": "reason"} if self.with_reason else {}
            wanted |= {f"{self.column}_repeats": "repeats"} if selection.repeats is not None else {}
            there = marks_of(dataset.schema)
            variants = [self.column, *(f"{self.column}_{of}" for of in ("score", "reason", "repeats"))]
            unfinished = [
                name + ending for name in variants for ending in (_NEXT, _LAST) if there.get(name + ending) is not None
            ]
            taken = [name for name in wanted if name in there]
            if taken and {there[name] for name in taken} == {mark} and len(taken) == len(wanted):
                if unfinished:  # killed after the columns were replaced
                    dataset.drop_columns(unfinished)
                say(f"{first.uri}: already done; nothing was changed")
                return
            used = taken + [name + ending for name in variants for ending in (_NEXT, _LAST) if name + ending in there]
            if foreign := [name for name in used if there[name] is None]:
                raise OutputError(
                    f"{first.uri}: has a column {visible(foreign[0])!r} that is not of a selection; name another one "
                    "with --column NAME"
                )
            if taken and not overwrite:
                raise OutputError(
                    f"{first.uri}: has the column {visible(taken[0])!r} of another selection; name another one with "
                    "--column NAME, or replace it with --overwrite"
                )
            if unfinished:
                dataset.drop_columns(unfinished)
            marks = {there[name] for name in taken}
            old = [name for name in variants if name in there and there[name] in marks]  # it may have more columns
            kinds = {"kept": pa.bool_(), "score": pa.float32(), "reason": pa.string(), "repeats": pa.int32()}
            ending = _NEXT if old else ""
            schema = pa.schema(
                [pa.field(name + ending, kinds[of], metadata={MARK: mark}) for name, of in wanted.items()]
            )
            columns = list(wanted.values())
            parts = (
                pa.RecordBatch.from_arrays(
                    [cell.cast(kind) for cell, kind in zip(part.columns, schema.types, strict=True)], schema=schema
                )
                for part in found.filled(batches(selection, store, columns), columns)
            )
            with _streamed(schema, parts) as reader:
                dataset.add_columns(reader)
            if old:
                _replace(dataset, old, list(wanted))


def _replace(dataset: Any, old: list[str], new: list[str]) -> None:
    """Give new columns the names of old ones in one version, and drop the old ones in the next.

    A process that is killed before leaves the old columns as they were, and one that is killed in between the new ones.
    """
    away = [{"path": name, "name": name + _LAST} for name in old]
    dataset.alter_columns(*away, *({"path": name + _NEXT, "name": name} for name in new))
    dataset.drop_columns([name + _LAST for name in old])


def _new(
    selection: Selection,
    found: LanceRows,
    path: str,
    mark: bytes,
    overwrite: bool,
    say: Callable[[str], None],
) -> None:
    import pyarrow as pa

    if os.path.isdir(path) and os.listdir(path):
        if _mark_of(path) == mark and not overwrite:
            say(f"{path}: already done; nothing was changed")
            return
        if not overwrite:
            raise OutputError(f"{path}: is something else already; name a new dataset, or replace it with --overwrite")
        if _mark_of(path) is None:
            raise OutputError(f"{path}: is not a dataset that export wrote, so it is not replaced; name a new one")
    source = found.fragments[0].dataset()
    blobs = blobs_of(source.schema)
    fields = [
        pa.field(one.name, pa.large_binary(), one.nullable, {"lance-encoding:blob": "true"})
        if one.name in blobs
        else one
        for one in source.schema
    ]
    schema = pa.schema(fields, {**(source.schema.metadata or {}), MARK: mark})
    with (
        _writing(path),
        writing_folder(path) as scratch,
        _streamed(schema, _kept(selection, found, schema)) as reader,
    ):
        package().write_dataset(reader, str(scratch), data_storage_version=source.data_storage_version)


def _kept(selection: Selection, found: LanceRows, schema: Any) -> Iterator[Any]:
    """Yield the kept rows as record batches, in order, each as often as it is used."""
    import pyarrow as pa

    times = found.spread((selection.mask() if selection.repeats is None else selection.repeats).astype(np.int64))
    size = _LARGE if any(_is_large(kind) for kind in schema.types) else _SMALL
    start = 0
    for fragment in found.fragments:
        at = start
        start += fragment.rows
        if not times[at:start].any():
            continue
        for part in fragment.batches(schema.names, 0, fragment.rows, size, plain=False):
            rows = np.repeat(np.arange(len(part)), times[at : at + len(part)])
            at += len(part)
            for lo in range(0, len(rows), size):
                some = part.take(pa.array(rows[lo : lo + size]))
                yield pa.RecordBatch.from_arrays(some.columns, schema=schema)


def _is_large(kind: Any) -> bool:
    import pyarrow as pa

    of_bytes = pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
    return of_bytes or any(_is_large(kind.field(i).type) for i in range(kind.num_fields))


def _refuse_changed(found: LanceRows, dataset: Any) -> None:
    """Check that the newest version has the rows, and the files, of the version that the selection was made of.

    Raises:
        UsageError: It has others; new columns do not count, and neither do columns of selections.
    """
    first = found.fragments[0]
    source = first.dataset()
    ours = {source.lance_schema.field(name).id() for name, mark in marks_of(source.schema).items() if mark is not None}

    def files(one: Any) -> set[str]:
        return {file.path for file in one.metadata.files if {*file.fields} - ours}

    old, new = (list(which.get_fragments()) for which in (source, dataset))
    same = len(old) == len(new) and all(
        (a.fragment_id, a.physical_rows, repr(a.metadata.deletion_file))
        == (b.fragment_id, b.physical_rows, repr(b.metadata.deletion_file))
        and files(a) <= files(b)
        for a, b in zip(old, new, strict=True)
    )
    if not same:
        raise UsageError(
            f"{first.uri}: has changed since the selection was made: that was version {first.version}, and the newest "
            f"is {dataset.version}; {found.again}, or write a new dataset with another name for -o"
        )


def _mark_of(path: str) -> bytes | None:
    """Return the mark of a dataset that export wrote, None for anything else."""
    try:
        mark: bytes | None = (package().dataset(path).schema.metadata or {}).get(MARK)
        return mark
    except (OSError, ValueError, RuntimeError):  # not a dataset
        return None


@contextmanager
def _streamed(schema: Any, parts: Iterator[Any]) -> Iterator[Any]:
    """Yield a stream of record batches; an error in making them is raised as it is, which Lance would wrap."""
    import pyarrow as pa

    failed: list[BaseException] = []

    def kept() -> Iterator[Any]:
        try:
            yield from parts
        except BaseException as error:
            failed.append(error)
            raise

    try:
        yield pa.RecordBatchReader.from_batches(schema, kept())
    except Exception:
        if failed:
            raise failed[0] from None
        raise


@contextmanager
def _writing(path: str) -> Iterator[None]:
    """Raise errors of the package in writing as an OutputError in one line."""
    try:
        yield
    except ThresherError:
        raise
    except (OSError, RuntimeError, ValueError) as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)[:300]
        raise OutputError(f"{path}: cannot be written ({first}); run the same command again") from error


def _nobody(_: str) -> None:
    return None
