"""Tables: images as bytes or paths, captions and keys in columns; shared by all tabular formats."""

from __future__ import annotations

import os
import posixpath
import shlex
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple

import numpy as np

from thresher.data.cells import Roots, is_address, name_in, paths_in, picture_of
from thresher.data.options import DataOptions
from thresher.data.parts import Data, Form, Ints, Part, Scanned, Words
from thresher.data.rows import (
    FIRST,
    ONLY_IMAGE,
    ONLY_TEXT,
    TEXTS,
    addresses_in,
    chosen_caption,
    missing_column,
    shortened,
)
from thresher.data.samples import Sample, caption_of
from thresher.errors import ChangedError, PoolError, UsageError, suggest
from thresher.io.columns import (
    KEYS,
    NO_KEY,
    as_text,
    captions_in,
    check_key,
    element_of,
    is_bytes_list,
    is_caption,
    is_text,
    is_uuid,
    is_words,
    known,
    plain_batch,
    plain_schema,
    stored_type,
)
from thresher.io.hub import SPLIT, SPLITS
from thresher.io.listing import Files, named
from thresher.io.open import trusting
from thresher.io.paths import visible, writable
from thresher.runtime.format import counted
from thresher.runtime.untrusted import parse_json

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
        picture: Column of images: bytes, a struct of bytes and path, paths, base64, or lists of these; None for none.
        caption: Column of captions, texts or lists of texts; None for none.
        key: Column that identifies a row; None for its file and row number.
        uid: Column of DataComp uids; None for none.
        light: Other columns that are kept, and their Arrow types.
    """

    picture: str | None
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
        roots: The folder with the images that are named by path; none if paths are not followed.
        columns: The roles of the columns.
    """

    stem: str
    roots: Roots
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
        """Yield the paths where the image of each row may be, if the row only names it."""
        column = self.columns.picture
        kind = None if column is None else element_of(self.schema().field(column).type)
        if column is None or not self.roots.folders or not (is_text(kind) or _has(kind, "path")):
            yield from super().separate_files(start_c)
            return
        if is_text(kind) or f"{column}.path" in self.schema().names:
            for batch in self.batches([column], start_c):
                yield from (paths_in(cell, self.roots) for cell in batch.column(column).to_pylist())
            return
        # Most tables have images and their former paths: images are read only of rows whose path is that of a file.
        lo, size = 0, _TEXTS if kind == self.schema().field(column).type else _BATCH
        for batch in self.batches([f"{column}.path"], start_c, size):
            tried = [paths_in(name, self.roots) for name in _names_in(batch.column(column))]
            there = [i for i, paths in enumerate(tried) if any(map(os.path.lexists, paths))]
            apart: dict[int, Sequence[str]] = {}
            if there:
                parts = self.batches([column], start_c[lo : lo + len(batch)][there])
                cells = (cell for part in parts for cell in part.column(column).to_pylist())
                apart = {i: paths_in(cell, self.roots) for i, cell in zip(there, cells, strict=True)}
            yield from (apart.get(i, ()) for i in range(len(batch)))
            lo += len(batch)

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
            elif name == roles.picture and is_bytes_list(column.type):
                lists = (cell.values for cell in column)
                cells[name] = [None if one is None or one.null_count else one.to_numpy().tobytes() for one in lists]
            else:
                cells[name] = column.to_pylist()
        return cells

    def _all(self) -> Ints:
        return np.arange(self.first, self.first + (self.rows or 0))

    def _key(self, cell: str | None, at: int) -> str:
        return writable(cell or f"{self.stem}-{at}")

    def _sample(self, row: Mapping[str, Any], at: int) -> Sample:
        cell = row[self.columns.picture] if self.columns.picture else None
        stored, why, missing, notes = picture_of(cell, self.roots)
        return Sample(
            key=self._key(row[self.columns.key] if self.columns.key else None, at),
            text=caption_of(row[self.columns.caption]) if self.columns.caption else "",
            picture=stored,
            at=at,
            uid=row[self.columns.uid] or "" if self.columns.uid else "",
            why=why,
            missing=missing,
            columns={name: row[name] for name in self.columns.light},
            notes=notes,
        )


def _names_in(column: Any) -> list[str]:
    """Return the paths in a column of structs with a path, or of the first struct of each list."""
    import pyarrow as pa
    import pyarrow.compute as pc

    cells = pc.struct_field(column, "path") if pa.types.is_struct(column.type) else column
    return [name_in(cell) for cell in cells.to_pylist()]


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


def tables_of(
    kind: str, files: Files, options: DataOptions, tables: Sequence[Table], make: Callable[..., TablePart], again: int
) -> Tables:
    """Split tables into parts. Extra columns are kept only if all tables have them with the same type.

    Args:
        kind: Name of the reader.
        files: The listing with the tables.
        options: Names of columns, root of images and rows per part.
        tables: The tables, in order.
        make: Makes a part: the class, or a function that is called as the class is.
        again: Maximum number of times that one row group or batch is read again for the parts it is split into; 0 for
            no limit.

    Raises:
        PoolError: There are no rows, there is no image column, or the files have different columns.
        UsageError: A requested column does not exist, or the images are addresses.
    """
    options.refuse(
        files.location,
        "tables",
        captions_file="name the column with --caption COLUMN; for the images next to a table, pass --reader folder",
    )
    empty = [files.path(table.name) for table in tables if not any(table.sizes)]
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
    roots = Roots.of(options, [files.root] if files.protocol == "file" else [])  # a remote table names no local files
    parts: list[TablePart] = []
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
                    roots=roots,
                    columns=columns,
                )
            )
    schema = plain_schema(tables[0].schema)
    if options.pictures:
        _refuse_addresses(files, parts[0], schema)
        if columns.picture is None:
            raise PoolError(
                f"{parts[0].path}: has no column of images (bytes, {{bytes, path}}, paths, base64, or lists of these); "
                f"it has {visible(', '.join(tables[0].schema.names))}; name one with --image COLUMN{ONLY_TEXT}"
            )
    notes = [f"{counted(len(empty), 'file has', 'files have')} no rows: {named(empty)}"] if empty else []
    if options.captions and not options.caption and columns.caption is not None:  # several may have usual names
        usual = [name for name in _usual(schema.names, TEXTS) if is_caption(schema.field(name).type)]
        notes += chosen_caption(parts[0].path, usual)
    return Tables(files.location, kind, tuple(parts), tuple(notes))


@dataclass(frozen=True)
class Tables(Data):
    """Tables at a location."""

    def captions_elsewhere(self) -> str:
        """Return which columns may have captions, judged by the first rows of the first table, "" if none."""
        part = self.parts[0]
        assert isinstance(part, TablePart)  # noqa: S101 - of tables
        if part.columns.caption is not None:
            return ""
        texts = [name for name, cells in _first_texts(part).items() if any(" " in cell.strip() for cell in cells)]
        if not texts:
            return ""
        return (
            f"{part.path}: has no column of captions ({', '.join(TEXTS)}); it has "
            f"{visible(', '.join(part.schema().names))}; name one, such as --caption {visible(texts[0])}"
        )


def _first_texts(part: TablePart) -> dict[str, list[str]]:
    """Return the texts in the first rows of the columns of text that have no role and no addresses."""
    taken = part.columns.named
    names = [field.name for field in part.schema() if is_text(field.type) and field.name not in taken]
    found: dict[str, list[str]] = {name: [] for name in names}
    with suppress(PoolError):  # damage is reported when the part is read
        rows = np.arange(part.first, part.first + min(FIRST, part.rows or 0))
        for batch in part.batches(names, rows) if names else ():
            for name in names:
                found[name] += [cell for cell in batch.column(name).to_pylist() if cell and not is_address(cell)]
    return found


def refuse_splits(files: Files, names: Sequence[str]) -> None:
    """Refuse a folder with several splits of a dataset; a pattern or a file chooses them.

    Raises:
        UsageError: There are several; the message has a pattern for each.
    """
    if "*" in files.location:
        return
    splits: dict[str, str] = {}
    for name in names:
        if found := [*SPLIT.finditer(name)]:
            last = found[-1]  # the name of the file, else that of its folder
            end = name[: last.end()] + ("" if "/" in name[last.end() :] else "*" + posixpath.splitext(name)[1])
            splits.setdefault(SPLITS[last[0].lower()], end)
    if len(splits) > 1:
        given = " or ".join(shlex.quote(posixpath.join(files.location, end)) for end in splits.values())
        raise UsageError(f"{files.location}: contains the splits {', '.join(splits)}; give one: {given}")


def _refuse_addresses(files: Files, part: TablePart, schema: Any) -> None:
    """Refuse tables of addresses, judged by the first rows of the first; only texts are read."""
    picture = part.columns.picture
    if picture and not is_text(element_of(schema.field(picture).type)):
        return
    names = [field.name for field in schema if is_text(element_of(field.type))]
    rows = min(FIRST, part.rows or 0)
    found: list[Mapping[str, str]] = []
    with suppress(PoolError):  # damage is reported when the part is read
        for batch in part.batches(names, np.arange(part.first, part.first + rows)) if names else ():
            for row in batch.to_pylist():
                found.append(shortened({**row, **({picture: name_in(row[picture])} if picture else {})}))
    form = "parquet" if part.path.lower().endswith((".parquet", ".pq")) else ""
    caption = [part.columns.caption] if part.columns.caption else []
    if addresses := addresses_in(files.location, form, found, [picture] if picture else [], caption):
        raise UsageError(f"{addresses}{ONLY_TEXT}")


def _columns(path: str, schema: Any, options: DataOptions) -> Columns:
    schema = plain_schema(schema)
    names: list[str] = schema.names
    if len(set(names)) < len(names):
        raise PoolError(f"{path}: has several columns with the same name; rename them")

    def asked(what: str, name: str | None, usual: Sequence[str], fits: Callable[[Any], bool]) -> str | None:
        if name and name not in names:
            inside = "; a column inside a struct is not read, write it as a column of its own" if "." in name else ""
            raise UsageError(
                f"{path}: no column {name!r} for {what}; it has {visible(', '.join(names))}{inside}."
                f"{suggest(name, names)}"
            )
        return name or next((one for one in usual if one in names and fits(schema.field(one).type)), None)

    pictures = [*_usual(names, PICTURES), *(name for name in _image_features(schema) if name in names)]
    picture = asked("--image", options.image, pictures, _pictorial)
    if picture is None and options.pictures:
        picture = _unfit(schema, pictures)
    if picture is not None and not _pictorial(schema.field(picture).type):
        raise _refused(
            path,
            schema,
            "--image",
            picture,
            "bytes, {bytes, path}, paths, base64, or a list of these",
            _pictorial,
            ONLY_TEXT,
        )
    captions = _usual(names, TEXTS)
    caption = asked("--caption", options.caption, captions, is_caption)
    if caption is None and options.captions:
        caption = _unfit(schema, captions)
    if caption is not None and schema.field(caption).type.num_fields and not is_caption(schema.field(caption).type):
        raise _refused(path, schema, "--caption", caption, "a text or a list of texts", is_caption, ONLY_IMAGE)
    if caption is None and options.captions and not options.pictures:
        raise missing_column(path, "--caption", "captions", None, TEXTS, names)
    # A column requested as the key is the key; otherwise a uid column would become the key of the pool.
    usual = () if options.key not in (None, "uid") else ("uid",)
    uid = asked("--key", None, usual, lambda kind: is_words(kind) or is_uuid(kind))
    rows = options.key == NO_KEY and NO_KEY not in names
    key = None if rows else asked("--key", options.key, KEYS, lambda kind: True)
    if key not in (None, picture):
        check_key(path, key, schema.field(key).type)
    if key == picture:
        key = None
    taken = {picture, caption, key, uid, "key", "text", "width", "height", "shard", "offset"}
    types = {name: _light(schema.field(name).type) for name in names if name not in taken}
    light = {name: kind for name, kind in types.items() if kind is not None}
    return Columns(picture if options.pictures else None, caption, key, uid, light)


def _usual(names: Sequence[str], usual: Sequence[str]) -> list[str]:
    """Return the columns with usual names; case counts only if another column has the usual name itself."""
    return list(dict.fromkeys([*(name for name in usual if name in names), *known(names, usual)]))


def _unfit(schema: Any, names: Sequence[str]) -> str | None:
    """Return a column whose name promises what its type does not hold: a struct or a list. Labels are often numbers."""
    return next((name for name in names if schema.field(name).type.num_fields), None)


def _refused(
    path: str, schema: Any, flag: str, name: str, what: str, fits: Callable[[Any], bool], more: str
) -> PoolError:
    """Return the error for a column whose type is not that of its role: what is allowed, and what could be named."""
    others = ", ".join(field.name for field in schema if fits(field.type)) or "no such column"
    return PoolError(
        f"{path}: the column {visible(name)!r} for {flag} has {visible(str(schema.field(name).type), 120)}; allowed: "
        f"{what} ({visible(others)}); write it as a column of its own and name it with {flag} COLUMN{more}"
    )


def _image_features(schema: Any) -> list[str]:
    """Return the columns that ``datasets`` declares as images, or lists of images, in the metadata of a schema."""
    try:
        features = parse_json((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return [
            name
            for name, feature in features.items()
            if "Image" in (feature.get("_type"), (feature.get("feature") or {}).get("_type"))
        ]
    except (KeyError, TypeError, AttributeError, ValueError):  # there is none, or it is not what datasets writes
        return []


def _pictorial(kind: Any) -> bool:
    kind = kind if is_bytes_list(kind) else element_of(kind)
    fixed = str(kind).startswith("fixed_size_binary")
    return fixed or is_bytes_list(kind) or is_words(kind) or _has(kind, "bytes") or _has(kind, "path")


def _has(kind: Any, name: str) -> bool:
    return str(kind).startswith("struct<") and kind.get_field_index(name) >= 0


def _light(kind: Any) -> Any:
    """Return the type with which an extra column is kept; None if it is not kept."""
    import pyarrow as pa

    if is_uuid(kind) and not pa.types.is_fixed_size_binary(kind):
        return pa.large_string()
    kind = stored_type(kind)
    return kind if str(kind).startswith(_LIGHT) else None
