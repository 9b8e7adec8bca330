"""Samples of tables: parquet, Arrow, Hugging Face datasets saved to disk; pictures as bytes or as paths."""

from __future__ import annotations

import json
import os
import posixpath
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from thresher.data.samples import Data, Place, Sample, caption_of, named_picture
from thresher.errors import PoolError, UsageError, suggest
from thresher.io.columns import CAPTIONS, KEYS
from thresher.io.listing import Files
from thresher.io.open import open_file, trusting
from thresher.io.paths import shown, writable

PICTURES = ("image", "img", "jpg", "png", "webp", "picture", "image_path", "filepath", "file_name", "path", "thumbnail")
_BATCH = 64  # rows in memory at a time: a picture may have megabytes
STATE = r"([^/]*/)?state\.json"  # a dataset that Hugging Face saved to disk, or one of its splits
_CELLS = ("binary", "large_binary", "fixed_size_binary", "string", "large_string", "dictionary<values=string")
_AGAIN = 8  # how often a row group is read again, at most, for the parts that it is cut into
_SPAN = 1 << 20  # bytes of a column fetched at a time
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


@dataclass(frozen=True)
class TablePart:
    """Rows ``first`` to ``first + rows`` of a parquet or Arrow file."""

    path: str
    first: int
    rows: int
    stem: str
    root: str
    columns: Columns
    arrow: bool = False
    protocol: str = "file"

    def samples(self) -> Iterator[Sample]:
        """Yield the samples, pictures as bytes where the table holds them."""
        at = self.first
        for batch in (_arrow if self.arrow else _parquet)(self):
            cells = trusting(self.path, lambda batch=batch: _cells(batch, self.columns.wanted()))  # type: ignore[misc]
            for i in range(len(batch)):
                yield self._sample({name: column[i] for name, column in cells.items()}, at)
                at += 1
        if at != self.first + self.rows:
            raise PoolError(f"{self.path}: has fewer rows than when it was opened; it was changed since, start again")

    def _sample(self, row: Mapping[str, Any], at: int) -> Sample:
        picture, why = _picture(row[self.columns.picture], self.root)
        key = row[self.columns.key] if self.columns.key else None
        return Sample(
            key=writable(f"{self.stem}-{at}" if key in (None, "") else str(key)),
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
        found = named_picture(cell, root) if root else None
        return found, "" if found else f"names a picture that is not in {root or 'a folder here'}: {shown(cell)}"
    return None, "has no picture"


def _cells(batch: Any, names: Sequence[str]) -> dict[str, list[Any]]:
    """Return columns as lists; first what the file says of lengths and texts is checked, else Arrow may crash."""
    batch.validate(full=True)
    return {name: batch.column(name).to_pylist() for name in names}


def _parquet(part: TablePart) -> Iterator[Any]:
    import pyarrow.parquet as pq

    with open_file(part.protocol, part.path) as raw:
        how = {"pre_buffer": False, "buffer_size": _SPAN, "page_checksum_verification": True}
        file = trusting(part.path, lambda: pq.ParquetFile(raw, **how))
        start, skip, groups = 0, 0, list[int]()
        for group in range(file.metadata.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if start < part.first + part.rows and start + rows > part.first:
                skip = skip if groups else part.first - start
                groups.append(group)
            start += rows
        batches = file.iter_batches(batch_size=_BATCH, columns=part.columns.wanted(), row_groups=groups)
        yield from _cut(iter(lambda: trusting(part.path, lambda: next(batches, None)), None), skip, part.rows)


def _arrow(part: TablePart) -> Iterator[Any]:
    def batches() -> Iterator[Any]:
        for batch in arrow_batches(part.protocol, part.path):
            for lo in range(0, len(batch), _BATCH):
                yield batch.slice(lo, _BATCH)

    yield from _cut(batches(), part.first, part.rows)


def _cut(batches: Iterator[Any], skip: int, rows: int) -> Iterator[Any]:
    """Yield ``rows`` rows of a run of batches after the first ``skip``."""
    for batch in batches:
        if skip >= len(batch):
            skip -= len(batch)
            continue
        batch = batch.slice(skip, rows)
        skip, rows = 0, rows - len(batch)
        yield batch
        if not rows:
            return


def arrow_batches(protocol: str, path: str) -> Iterator[Any]:
    """Yield the record batches of an Arrow file, in the stream format that Hugging Face writes or the file format.

    Raises:
        PoolError: The file is damaged or cut off; raised after the batches before that.
    """
    import pyarrow as pa

    raw: Any = open_file(protocol, path)
    if protocol == "file":
        raw.close()  # it is a file: no pipe that never ends
        raw = trusting(path, lambda: pa.memory_map(path))
    with raw:
        if bytes(raw.read(6)) == b"ARROW1":
            file = trusting(path, lambda: pa.ipc.open_file(raw))
            batches = (file.get_batch(i) for i in range(file.num_record_batches))
        else:
            raw.seek(0)
            batches = trusting(path, lambda: iter(pa.ipc.open_stream(raw)))
        for batch in iter(lambda: trusting(path, lambda: next(batches, None)), None):
            trusting(path, batch.validate)  # that its columns are as long as it says
            if batch.num_rows < 0:  # of which validate says nothing
                raise PoolError(f"{path}: is damaged: one of its batches has {batch.num_rows:,} rows")
            yield batch


# --- opening --------------------------------------------------------------------------------------


def open_parquet(location: str, files: Files, options: Any) -> Data:
    """Open parquet files as raw data; reads footers only.

    Args:
        location: As it was given.
        files: What lies there.
        options: Names of columns, root of pictures and rows a part, as :class:`thresher.data.DataOptions` has them.

    Raises:
        PoolError: No column of pictures, or files of differing columns.
    """
    import pyarrow.parquet as pq

    def look(raw: Any) -> tuple[list[int], Any]:
        file = pq.ParquetFile(raw)
        return [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)], file.schema_arrow

    found: list[_Table] = []
    for name in files.matching(r".*\.(parquet|pq)"):
        with open_file(files.protocol, files.path(name)) as raw:
            found.append(_Table(name, *trusting(files.path(name), lambda raw=raw: look(raw))))  # type: ignore[misc]
    return _data("parquet", files, options, found)


def open_arrow(location: str, files: Files, options: Any) -> Data:
    """Open Arrow files, or a Hugging Face dataset saved to disk, as raw data.

    Args:
        location: As it was given.
        files: What lies there.
        options: As for :func:`open_parquet`.

    Raises:
        UsageError: Several splits lie there.
        PoolError: Files that the dataset names are missing, no column of pictures, or files of differing columns.
    """
    folders = [posixpath.dirname(name) for name in files.matching(STATE)]
    if "" in folders or len(folders) == 1:
        names = _listed(files, "" if "" in folders else folders[0])
    elif folders:
        raise UsageError(
            f"{location}: holds the splits {shown(', '.join(folders))}; name one, as {location}/{folders[0]}"
        )
    else:  # those that datasets keeps of what it computed are no data
        names = [name for name in files.matching(r".*\.arrow") if not posixpath.basename(name).startswith("cache-")]
    found: list[_Table] = []
    for name in names:
        sizes, schema = list[int](), None
        for batch in arrow_batches(files.protocol, files.path(name)):
            sizes.append(len(batch))
            schema = batch.schema
        found.append(_Table(name, sizes, schema))
    return _data("arrow", files, options, found)


def _listed(files: Files, folder: str) -> list[str]:
    """Return the Arrow files of a dataset saved to disk, in its order."""
    path = files.path(posixpath.join(folder, "state.json"))
    with open_file(files.protocol, path) as raw:
        told = trusting(path, lambda: json.load(raw))
    listed = told.get("_data_files") if isinstance(told, dict) else None
    bases = [one.get("filename") if isinstance(one, dict) else None for one in listed or () if isinstance(listed, list)]
    if not bases or None in bases:
        raise PoolError(f"{path}: does not say which files the dataset has; save it again")
    names = [posixpath.join(folder, str(base)) for base in bases]
    if lost := [name for name in names if name not in files.names]:
        raise PoolError(f"{path}: names {shown(lost[0])}, which is not there; save the dataset again")
    if told.get("_indices_files") or told.get("_indices_data_files"):
        raise PoolError(
            f"{path}: the dataset is saved with its rows in another order; load it with datasets and save it with "
            "flatten_indices().save_to_disk(...)"
        )
    return names


class _Table(NamedTuple):
    name: str
    sizes: list[int]  # rows of its row groups or batches
    schema: Any


def _data(kind: str, files: Files, options: Any, found: Sequence[_Table]) -> Data:
    """Cut tables into parts; columns besides that only some of them have, or of another type, do not go along."""
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
                f"{path}: has other columns than the files before: {shown(', '.join(shapes[-1].named))}, not "
                f"{shown(', '.join(shapes[0].named))}; give files of one kind"
            )
    first = shapes[0]
    light = {name: of for name, of in first.light.items() if all(shape.light.get(name) == of for shape in shapes)}
    columns = replace(first, light=light)
    below = options.root or (files.root if files.protocol == "file" else "")
    root = os.path.realpath(below) if below else ""  # a table elsewhere is not believed about files here
    parts = []
    for name, sizes, _ in found:
        step = max(options.per_part, *(-(-size // _AGAIN) for size in sizes)) if kind == "parquet" else options.per_part
        for lo in range(0, sum(sizes), step):
            rows = min(step, sum(sizes) - lo)
            parts.append(
                TablePart(
                    files.path(name), lo, rows, name.rpartition(".")[0], root, columns, kind == "arrow", files.protocol
                )
            )
    return Data(files.location, kind, tuple(parts), light)


def _columns(path: str, schema: Any, options: Any) -> Columns:
    names: list[str] = schema.names
    if len(set(names)) < len(names):
        raise PoolError(f"{path}: has several columns of one name; rename them")

    def asked(what: str, name: str | None, usual: Sequence[str], fits: Callable[[Any], bool]) -> str | None:
        if name and name not in names:
            raise UsageError(
                f"{path}: no column {name!r} for {what}; it has {shown(', '.join(names))}.{suggest(name, names)}"
            )
        return name or next((one for one in usual if one in names and fits(schema.field(one).type)), None)

    picture = asked("--image", options.image, PICTURES, _pictorial)
    if picture is None:
        raise PoolError(
            f"{path}: has no column of pictures (bytes, or {{bytes, path}}, or paths); it has "
            f"{shown(', '.join(names)) or 'no columns'}; name one with --image"
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
