"""Tables: pictures as bytes or as paths, captions and keys in columns, however their rows are read."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple

import numpy as np

from thresher.data.options import DataOptions
from thresher.data.parts import Form, Ints, Part, Scanned, Words
from thresher.data.samples import Place, Sample, caption_of, picture_in
from thresher.errors import PoolError, UsageError, suggest
from thresher.io.columns import CAPTIONS, KEYS
from thresher.io.listing import Files
from thresher.io.open import trusting
from thresher.io.paths import visible, writable

PICTURES = ("image", "img", "jpg", "png", "webp", "picture", "image_path", "filepath", "file_name", "path", "thumbnail")
_BATCH = 64  # rows in memory at a time: a picture may have megabytes
_TEXTS = 8_192  # rows at a time without pictures
_CELLS = ("binary", "large_binary", "fixed_size_binary", "string", "large_string", "dictionary<values=string")
# Types of columns that go along; not those of time: Arrow's reach further than Python's, one such cell would stop all.
_LIGHT = ("string", "large_string", "bool", "int", "uint", "float", "double", "halffloat")


@dataclass(frozen=True)
class Columns:
    """Which columns of a table are what.

    Attributes:
        picture: Bytes, a struct of bytes and path, or paths.
        caption: A text or a list of them; None for none.
        key: What identifies a row; None for its file and number.
        uid: DataComp's name of the row; None for none.
        light: Others that go along, and their Arrow types.
    """

    picture: str
    caption: str | None
    key: str | None
    uid: str | None
    light: Mapping[str, Any] = field(default_factory=dict)

    @property
    def named(self) -> list[str]:
        """The columns that have a meaning, each once."""
        return list(dict.fromkeys(name for name in (self.picture, self.caption, self.key, self.uid) if name))

    def wanted(self) -> list[str]:
        """Return the columns to read, each once."""
        return [*self.named, *self.light]


@dataclass(frozen=True, kw_only=True)
class TablePart(Part):
    """Rows ``first`` to ``first + rows`` of a table.

    Attributes:
        stem: What rows without a key are named after.
        root: Folder that pictures named by paths must lie in, without links; "" where none may be followed.
        columns: Which are what.
    """

    stem: str
    root: str
    columns: Columns

    copied_as: ClassVar[Form | None] = "parquet"

    @abstractmethod
    def read_rows(self, columns: Sequence[str] | None, row_c: Ints, size: int) -> Iterator[tuple[int, Any]]:
        """Yield record batches that hold some rows of the file, and perhaps others, with the number of their first.

        Args:
            columns: To read; None for all.
            row_c: Rows of the file that are wanted, ascending.
            size: Rows of a batch, at most.

        Raises:
            PoolError: The file is damaged; raised after the batches before that.
        """

    @property
    def has_uids(self) -> bool:
        """Whether there is a column of uids."""
        return self.columns.uid is not None

    @property
    def key_column(self) -> str | None:
        """The column of keys; None where rows go by their number."""
        return self.columns.key

    def light(self) -> Mapping[str, Any]:
        """Return the columns that go along."""
        return self.columns.light

    def roles(self) -> Mapping[str, str | None]:
        """Return which column is what."""
        return {name: getattr(self.columns, name) for name in ("picture", "caption", "key", "uid")}

    def samples(self) -> Iterator[Sample]:
        """Yield the samples, pictures as bytes where the table holds them."""
        yield from self.chosen(self._all())

    def chosen(self, start_c: Ints) -> Iterator[Sample]:
        """Yield the samples of some rows."""
        rows, names = iter(start_c.tolist()), self.columns.wanted()
        for batch in self.batches(names, start_c):
            cells = trusting(self.path, lambda batch=batch: {n: batch.column(n).to_pylist() for n in names})  # type: ignore[misc]
            for i in range(len(batch)):
                yield self._sample({name: column[i] for name, column in cells.items()}, next(rows))

    def batches(self, columns: Sequence[str] | None, start_c: Ints, size: int = _BATCH) -> Iterator[Any]:
        """Yield some rows as they are, checked: what the file says of lengths and texts may be wrong, and crash Arrow.

        Raises:
            PoolError: The file is damaged, or has fewer rows than when it was opened.
        """
        lo = 0
        for start, batch in self.read_rows(columns, start_c, size):
            hi = int(np.searchsorted(start_c, start + len(batch)))
            if hi > lo:
                trusting(self.path, lambda batch=batch: batch.validate(full=True))  # type: ignore[misc]
            for at in range(lo, hi, size):  # a row may be wanted many times
                row_c = start_c[at : min(at + size, hi)] - start
                run = (np.diff(row_c) == 1).all()
                yield batch.slice(row_c[0], len(row_c)) if run else batch.take(row_c)
            lo = hi
            if lo == len(start_c):
                return
        if lo < len(start_c):
            raise PoolError(f"{self.path}: has fewer rows than when it was opened; it was changed since, start again")

    def scan(self, *, uids: bool = False) -> Scanned:
        """Read the keys, and the uids where they are wanted."""
        keys, found, damage = list[str](), list[str](), ""
        key, uid = self.columns.key, self.columns.uid if uids else None
        if names := [name for name in (key, uid) if name]:
            try:
                for batch in self.batches(names, self._all(), _TEXTS):
                    cells = batch.column(key).to_pylist() if key else [None] * len(batch)
                    keys += [self._key(cell, self.first + len(keys) + i) for i, cell in enumerate(cells)]
                    found += [str(cell or "") for cell in batch.column(uid).to_pylist()] if uid else []
            except PoolError as error:
                damage = str(error).removeprefix(f"{self.path}: ")
        else:
            keys = [self._key(None, at) for at in self._all().tolist()]
        return Scanned(
            keys=keys,
            start_n=np.arange(self.first, self.first + len(keys)),
            length_n=np.ones(len(keys), np.int64),
            uids=found if uid else None,
            damage=damage,
        )

    def words(self) -> Iterator[Words]:
        """Return keys and captions, and read no other columns."""
        key, caption, uid = self.columns.key, self.columns.caption, self.columns.uid
        names = list(dict.fromkeys(name for name in (key, caption, uid) if name))
        if not names:
            rows = self.rows or 0
            yield from (Words((), [""] * min(_TEXTS, rows - lo), 0) for lo in range(0, rows, _TEXTS))
            return
        for batch in self.batches(names, self._all(), _TEXTS):
            cells = {name: batch.column(name).to_pylist() for name in names}
            keys = [str(cell) for cell in cells[key] if cell not in (None, "")] if key else []
            texts = [caption_of(cell) for cell in (cells[caption] if caption else [None] * len(batch))]
            yield Words(keys, texts, sum(map(bool, cells[uid])) if uid else 0)

    def _all(self) -> Ints:
        return np.arange(self.first, self.first + (self.rows or 0))

    def _key(self, cell: Any, at: int) -> str:
        return writable(f"{self.stem}-{at}" if cell in (None, "") else str(cell))

    def _sample(self, row: Mapping[str, Any], at: int) -> Sample:
        picture, why = _picture(row[self.columns.picture], self.root)
        return Sample(
            key=self._key(row[self.columns.key] if self.columns.key else None, at),
            text=caption_of(row[self.columns.caption]) if self.columns.caption else "",
            picture=picture,
            at=at,
            uid=str(row[self.columns.uid] or "") if self.columns.uid else "",
            why=why,
            columns={name: row[name] for name in self.columns.light},
        )


def _picture(cell: Any, root: str) -> tuple[bytes | Place | None, str]:
    """Return a picture from a cell, or why there is none."""
    if isinstance(cell, dict):
        cell = cell.get("bytes") or cell.get("path")
    if isinstance(cell, bytes) and cell:
        return cell, ""
    if isinstance(cell, str) and cell:
        found = picture_in(root, cell) if root else None
        return found, "" if found else f"names a picture that is not in {root or 'a folder here'}: {visible(cell)}"
    return None, "has no picture"


# --- opening --------------------------------------------------------------------------------------


class Table(NamedTuple):
    """A file of rows.

    Attributes:
        name: As it is listed.
        sizes: Rows of its row groups or batches.
        schema: Its Arrow schema.
    """

    name: str
    sizes: list[int]
    schema: Any


def parts_of(
    files: Files, options: DataOptions, found: Sequence[Table], make: type[TablePart], again: int
) -> tuple[Part, ...]:
    """Cut tables into parts; columns besides that only some of them have, or of another type, do not go along.

    Args:
        files: Where they lie.
        options: Names of columns, root of pictures and rows a part.
        found: The tables, in order.
        make: What reads them.
        again: How often a run of rows that is read as one may be read again, at most, for the parts it is cut into; 0
            for any number.

    Raises:
        PoolError: No rows, no column of pictures, or files of differing columns.
        UsageError: A column that was asked for is not there.
    """
    found = [table for table in found if any(table.sizes)]
    if not found:
        raise PoolError(f"{files.location}: its tables have no rows")
    shapes: list[Columns] = []
    for name, sizes, schema in found:
        path = files.path(name)
        if min(sizes) < 0:
            raise PoolError(f"{path}: is damaged: a row group has {min(sizes)} rows")
        shapes.append(trusting(path, lambda path=path, schema=schema: _columns(path, schema, options)))  # type: ignore[misc]
        if shapes[0].named != shapes[-1].named:
            raise PoolError(
                f"{path}: has other columns than the files before: {visible(', '.join(shapes[-1].named))}, not "
                f"{visible(', '.join(shapes[0].named))}; give files of one kind"
            )
    first = shapes[0]
    light = {name: of for name, of in first.light.items() if all(shape.light.get(name) == of for shape in shapes)}
    columns = replace(first, light=light)
    below = options.root or (files.root if files.protocol == "file" else "")
    root = os.path.realpath(below) if below else ""  # a table elsewhere is not believed about files here
    parts: list[Part] = []
    for name, sizes, _ in found:
        longest = max(-(-size // again) for size in sizes) if again else 0
        step = max(options.per_part, longest)
        for lo in range(0, sum(sizes), step):
            parts.append(
                make(
                    files.path(name),
                    files.protocol,
                    first=lo,
                    rows=min(step, sum(sizes) - lo),
                    stem=name.rpartition(".")[0],
                    root=root,
                    columns=columns,
                )
            )
    return tuple(parts)


def _columns(path: str, schema: Any, options: DataOptions) -> Columns:
    names: list[str] = schema.names
    if len(set(names)) < len(names):
        raise PoolError(f"{path}: has several columns of one name; rename them")

    def asked(what: str, name: str | None, usual: Sequence[str], fits: Callable[[Any], bool]) -> str | None:
        if name and name not in names:
            raise UsageError(
                f"{path}: no column {name!r} for {what}; it has {visible(', '.join(names))}.{suggest(name, names)}"
            )
        return name or next((one for one in usual if one in names and fits(schema.field(one).type)), None)

    picture = asked("--image", options.image, PICTURES, _pictorial)
    if picture is None:
        raise PoolError(
            f"{path}: has no column of pictures (bytes, or {{bytes, path}}, or paths); it has "
            f"{visible(', '.join(names)) or 'no columns'}; name one with --image"
        )
    caption = asked("--caption", options.caption, CAPTIONS, _textual)
    # A column that is asked for as the key is the key; a pool with uids would be known by these.
    usual = () if options.key not in (None, "uid") else ("uid",)
    uid = asked("--key", None, usual, lambda kind: str(kind) in ("string", "large_string"))
    key = asked("--key", options.key, KEYS, lambda kind: _light(kind))
    taken = {picture, caption, key, uid, "key", "text", "width", "height", "shard", "offset"}
    light = {name: schema.field(name).type for name in names if name not in taken and _light(schema.field(name).type)}
    return Columns(picture, caption, None if key == picture else key, uid, light)


def _pictorial(kind: Any) -> bool:
    told = str(kind)
    if told.startswith("struct<"):
        return any(kind.get_field_index(name) >= 0 for name in ("bytes", "path"))
    return told.startswith(_CELLS)


def _textual(kind: Any) -> bool:
    return "string" in str(kind) and not str(kind).startswith(("struct", "map"))


def _light(kind: Any) -> bool:
    return str(kind).startswith(_LIGHT)
