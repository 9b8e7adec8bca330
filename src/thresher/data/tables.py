"""Tables: images as bytes or paths, captions and keys in columns; shared by all tabular formats."""

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
from thresher.errors import ChangedError, PoolError, UsageError, suggest
from thresher.io.columns import (
    CAPTIONS,
    KEYS,
    NO_KEY,
    as_text,
    captions_in,
    check_key,
    is_caption,
    is_text,
    is_uuid,
    is_words,
    plain_batch,
    plain_schema,
    stored_type,
)
from thresher.io.listing import Files
from thresher.io.open import trusting
from thresher.io.paths import visible, writable

PICTURES = ("image", "img", "jpg", "png", "webp", "picture", "image_path", "filepath", "file_name", "path", "thumbnail")
_BATCH = 64  # rows in memory at a time: an image may have megabytes
_TEXTS = 8_192  # rows at a time without images
# Types of extra columns that are kept, of the values if they are in a dictionary. Not times: Arrow allows times that
# Python cannot represent.
_LIGHT = ("string", "large_string", "bool", "int", "uint", "float", "double", "halffloat", "decimal128")


@dataclass(frozen=True)
class Columns:
    """The roles of the columns of a table.

    Attributes:
        picture: Column of images: bytes, a struct of bytes and path, or paths.
        caption: Column of captions, texts or lists of texts; None for none.
        key: Column that identifies a row; None for its file and row number.
        uid: Column of DataComp uids; None for none.
        light: Other columns that are kept, and their Arrow types.
    """

    picture: str
    caption: str | None
    key: str | None
    uid: str | None
    light: Mapping[str, Any] = field(default_factory=dict)

    @property
    def named(self) -> list[str]:
        """The columns with a role, each once."""
        return list(dict.fromkeys(name for name in (self.picture, self.caption, self.key, self.uid) if name))

    def wanted(self) -> list[str]:
        """Return the columns to read, each once."""
        return [*self.named, *self.light]


@dataclass(frozen=True, kw_only=True)
class TablePart(Part):
    """Rows ``first`` to ``first + rows`` of a table.

    Attributes:
        stem: Prefix of the keys of rows without a key.
        root: Folder, without symlinks, in which images named by path must be; "" if paths are not followed.
        columns: The roles of the columns.
    """

    stem: str
    root: str
    columns: Columns

    copied_as: ClassVar[Form | None] = "parquet"

    @abstractmethod
    def read_rows(self, columns: Sequence[str] | None, row_c: Ints, size: int) -> Iterator[tuple[int, Any]]:
        """Yield record batches that contain some rows of the file, and possibly others, with their first row number.

        Args:
            columns: Columns to read; None for all.
            row_c: Rows of the file to read, ascending.
            size: Maximum rows of a batch.

        Raises:
            PoolError: The file is damaged; raised after the batches before the damage.
        """

    @property
    def has_uids(self) -> bool:
        """Whether there is a uid column."""
        return self.columns.uid is not None

    @property
    def key_column(self) -> str | None:
        """The key column; None if the key is the row number."""
        return self.columns.key

    def light(self) -> Mapping[str, Any]:
        """Return the extra columns that are kept."""
        return self.columns.light

    def roles(self) -> Mapping[str, str | None]:
        """Return the column of each role."""
        return {name: getattr(self.columns, name) for name in ("picture", "caption", "key", "uid")}

    def samples(self) -> Iterator[Sample]:
        """Yield the samples, with images as bytes if the table contains them."""
        yield from self.chosen(self._all())

    def chosen(self, start_c: Ints) -> Iterator[Sample]:
        """Yield the samples of some rows."""
        rows, names = iter(start_c.tolist()), self.columns.wanted()
        for batch in self.batches(names, start_c):
            cells = trusting(self.path, lambda batch=batch: self._cells(batch, names))  # type: ignore[misc]
            for i in range(len(batch)):
                yield self._sample({name: column[i] for name, column in cells.items()}, next(rows))

    def batches(self, columns: Sequence[str] | None, start_c: Ints, size: int = _BATCH) -> Iterator[Any]:
        """Yield some rows, unchanged but validated: invalid lengths and texts in the file could crash Arrow.

        Raises:
            PoolError: The file is damaged.
            ChangedError: It has fewer rows than when it was opened.
        """
        lo = 0
        for start, batch in self.read_rows(columns, start_c, size):
            hi = int(np.searchsorted(start_c, start + len(batch)))
            if hi > lo:
                trusting(self.path, lambda batch=batch: batch.validate(full=True))  # type: ignore[misc]
                batch = trusting(self.path, lambda batch=batch: plain_batch(batch))  # type: ignore[misc]
            for at in range(lo, hi, size):  # a row may be requested many times
                row_c = start_c[at : min(at + size, hi)] - start
                run = (np.diff(row_c) == 1).all()
                yield batch.slice(row_c[0], len(row_c)) if run else batch.take(row_c)
            lo = hi
            if lo == len(start_c):
                return
        if lo < len(start_c):
            raise ChangedError(f"{self.path}: has fewer rows than when it was opened; run the command again")

    def scan(self, *, uids: bool = False) -> Scanned:
        """Read the keys, and the uids if requested."""
        keys, uids_found, damage = list[str](), list[str](), ""
        key, uid = self.columns.key, self.columns.uid if uids else None
        if names := [name for name in (key, uid) if name]:
            try:
                for batch in self.batches(names, self._all(), _TEXTS):
                    cells = self._cells(batch, names)
                    found = cells[key] if key else [None] * len(batch)
                    keys += [self._key(cell, self.first + len(keys) + i) for i, cell in enumerate(found)]
                    uids_found += [cell or "" for cell in cells[uid]] if uid else []
            except PoolError as error:
                damage = str(error).removeprefix(f"{self.path}: ")
        else:
            keys = [self._key(None, at) for at in self._all().tolist()]
        return Scanned(
            keys=keys,
            start_n=np.arange(self.first, self.first + len(keys)),
            length_n=np.ones(len(keys), np.int64),
            uids=uids_found if uid else None,
            damage=damage,
        )

    def separate_files(self, start_c: Ints) -> Iterator[Sequence[str]]:
        """Yield the images that a column of paths names; images are otherwise in the table."""
        column = self.columns.picture
        if not self.root or not is_text(self.schema().field(column).type):
            yield from super().separate_files(start_c)
            return
        for batch in self.batches([column], start_c, _TEXTS):
            for cell in batch.column(column).to_pylist():
                picture, _ = _picture(cell, self.root)
                yield [picture.path] if isinstance(picture, Place) else []

    def words(self) -> Iterator[Words]:
        """Return keys and captions without reading other columns."""
        key, caption, uid = self.columns.key, self.columns.caption, self.columns.uid
        names = list(dict.fromkeys(name for name in (key, caption, uid) if name))
        if not names:
            rows = self.rows or 0
            yield from (Words((), [""] * min(_TEXTS, rows - lo), 0) for lo in range(0, rows, _TEXTS))
            return
        for batch in self.batches(names, self._all(), _TEXTS):
            cells = self._cells(batch, names)
            keys = [cell for cell in cells[key] if cell] if key else []
            texts = [caption_of(cell) for cell in (cells[caption] if caption else [None] * len(batch))]
            yield Words(keys, texts, sum(map(bool, cells[uid])) if uid else 0)

    def _cells(self, batch: Any, names: Sequence[str]) -> dict[str, list[Any]]:
        """Return columns of a batch as lists: keys and uids as text, captions as a text or a list of texts."""
        roles, cells = self.columns, dict[str, list[Any]]()
        for name in names:
            column = batch.column(name)
            if name in (roles.key, roles.uid) or (name in roles.light and is_uuid(column.type)):
                cells[name] = as_text(column, self.path, name).to_pylist()
            elif name == roles.caption and name != roles.picture:
                cells[name] = captions_in(column)
            else:
                cells[name] = column.to_pylist()
        return cells

    def _all(self) -> Ints:
        return np.arange(self.first, self.first + (self.rows or 0))

    def _key(self, cell: str | None, at: int) -> str:
        return writable(cell or f"{self.stem}-{at}")

    def _sample(self, row: Mapping[str, Any], at: int) -> Sample:
        picture, why = _picture(row[self.columns.picture], self.root)
        return Sample(
            key=self._key(row[self.columns.key] if self.columns.key else None, at),
            text=caption_of(row[self.columns.caption]) if self.columns.caption else "",
            picture=picture,
            at=at,
            uid=row[self.columns.uid] or "" if self.columns.uid else "",
            why=why,
            missing=why.startswith("names"),
            columns={name: row[name] for name in self.columns.light},
        )


def _picture(cell: Any, root: str) -> tuple[bytes | Place | None, str]:
    """Return the image in a cell, or why there is none."""
    if isinstance(cell, dict):
        cell = cell.get("bytes") or cell.get("path")
    if isinstance(cell, bytes) and cell:
        return cell, ""
    if isinstance(cell, str) and cell:
        place = picture_in(root, cell) if root else None
        return place, "" if place else f"names an image that is not in {root or 'a local folder'}: {visible(cell)}"
    return None, "has no image"


# --- opening --------------------------------------------------------------------------------------


class Table(NamedTuple):
    """A file of rows.

    Attributes:
        name: Its name in the listing.
        sizes: Rows of its row groups or batches.
        schema: Its Arrow schema.
    """

    name: str
    sizes: list[int]
    schema: Any


def parts_of(
    files: Files, options: DataOptions, tables: Sequence[Table], make: type[TablePart], again: int
) -> tuple[Part, ...]:
    """Split tables into parts. Extra columns are kept only if all tables have them with the same type.

    Args:
        files: The listing with the tables.
        options: Names of columns, root of images and rows per part.
        tables: The tables, in order.
        make: The class of the parts.
        again: Maximum number of times that one row group or batch is read again for the parts it is split into; 0 for
            no limit.

    Raises:
        PoolError: There are no rows, there is no image column, or the files have different columns.
        UsageError: A requested column does not exist.
    """
    tables = [table for table in tables if any(table.sizes)]
    if not tables:
        raise PoolError(f"{files.location}: its tables have no rows")
    shapes: list[Columns] = []
    for name, sizes, schema in tables:
        path = files.path(name)
        if min(sizes) < 0:
            raise PoolError(f"{path}: is damaged: a row group has {min(sizes)} rows")
        shapes.append(trusting(path, lambda path=path, schema=schema: _columns(path, schema, options)))  # type: ignore[misc]
        if shapes[0].named != shapes[-1].named:
            raise PoolError(
                f"{path}: has other columns than the previous files: {visible(', '.join(shapes[-1].named))}, not "
                f"{visible(', '.join(shapes[0].named))}; give files of one kind"
            )
    first = shapes[0]
    light = {name: of for name, of in first.light.items() if all(shape.light.get(name) == of for shape in shapes)}
    columns = replace(first, light=light)
    below = options.root or (files.root if files.protocol == "file" else "")
    root = os.path.realpath(below) if below else ""  # a remote table must not name local files
    parts: list[Part] = []
    for name, sizes, _ in tables:
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
    schema = plain_schema(schema)
    names: list[str] = schema.names
    if len(set(names)) < len(names):
        raise PoolError(f"{path}: has several columns with the same name; rename them")

    def asked(what: str, name: str | None, usual: Sequence[str], fits: Callable[[Any], bool]) -> str | None:
        if name and name not in names:
            raise UsageError(
                f"{path}: no column {name!r} for {what}; it has {visible(', '.join(names))}.{suggest(name, names)}"
            )
        return name or next((one for one in usual if one in names and fits(schema.field(one).type)), None)

    picture = asked("--image", options.image, PICTURES, _pictorial)
    if picture is None:
        raise PoolError(
            f"{path}: has no column of images (bytes, or {{bytes, path}}, or paths); it has "
            f"{visible(', '.join(names)) or 'no columns'}; choose one with --image"
        )
    caption = asked("--caption", options.caption, CAPTIONS, is_caption)
    # A column requested as the key is the key; otherwise a uid column would become the key of the pool.
    usual = () if options.key not in (None, "uid") else ("uid",)
    uid = asked("--key", None, usual, lambda kind: is_words(kind) or is_uuid(kind))
    rows = options.key == NO_KEY and NO_KEY not in names
    key = None if rows else asked("--key", options.key, KEYS, lambda kind: True)
    if key not in (None, picture):
        check_key(path, key, schema.field(key).type)
    taken = {picture, caption, key, uid, "key", "text", "width", "height", "shard", "offset"}
    types = {name: _light(schema.field(name).type) for name in names if name not in taken}
    light = {name: kind for name, kind in types.items() if kind is not None}
    return Columns(picture, caption, None if key == picture else key, uid, light)


def _pictorial(kind: Any) -> bool:
    text = str(kind)
    if text.startswith("struct<"):
        return any(kind.get_field_index(name) >= 0 for name in ("bytes", "path"))
    return is_words(kind) or text.startswith("fixed_size_binary")


def _light(kind: Any) -> Any:
    """Return the type with which an extra column is kept; None if it is not kept."""
    import pyarrow as pa

    if is_uuid(kind) and not pa.types.is_fixed_size_binary(kind):
        return pa.large_string()
    kind = stored_type(kind)
    return kind if str(kind).startswith(_LIGHT) else None
