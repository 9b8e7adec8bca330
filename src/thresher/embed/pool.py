"""The pool that embedding writes: clip-retrieval's folders, a plan of which part of the data is which shard, and marks.

A shard is there when its table is: the vectors are put in place before it. Shards have the same bytes whenever and by
however many workers they are written, so that a killed run goes on to the same pool.
"""

from __future__ import annotations

import json
import os
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from thresher.cache import writing
from thresher.data.samples import Part
from thresher.errors import OutputError, PoolError, UsageError
from thresher.readers.pieces import file_stamp

PLAN = "pool.json"
SET_ASIDE = "set_aside.txt"
FOLDERS = {"image": "img_emb", "text": "text_emb"}
TABLES = "metadata"
OWN = ("key", "text", "uid", "width", "height", "shard", "offset", "thumbnail")  # columns that embedding makes itself

_GROUP = 4_096  # rows of a row group, or a batch more
_MARK = b"thresher"  # what a table says of the samples that are not in it


@dataclass(frozen=True)
class Shard:
    """Which part of the data a shard holds.

    Attributes:
        path: File or folder of the part.
        name: What the rows call it.
        first: Where in the file it begins.
        rows: Samples, None where only reading tells.
        stamp: Size and time of the file, by which a change is noticed.
    """

    path: str
    name: str
    first: int
    rows: int | None
    stamp: tuple[Any, ...]

    def same(self, other: Shard) -> bool:
        """Whether both are the same part of the same file."""
        return (self.path, self.first) == (other.path, other.first)


@dataclass(frozen=True)
class Plan:
    """What a pool is made of.

    Attributes:
        encoder: Its name, weights, dimensions and precision.
        fields: "image", "text" or both.
        columns: Columns of the tables and their Arrow types, as text, in order.
        shards: In the order of their numbers.
    """

    encoder: Mapping[str, Any]
    fields: tuple[str, ...]
    columns: Mapping[str, str]
    shards: tuple[Shard, ...] = field(repr=False, default=())

    def saved(self, folder: Path, rows: int | None = None) -> None:
        """Write it; with the number of rows where the pool is finished."""
        told = {
            "encoder": dict(self.encoder),
            "fields": list(self.fields),
            "columns": dict(self.columns),
            **({} if rows is None else {"rows": rows}),
            "shards": [[s.path, s.name, s.first, s.rows, list(s.stamp)] for s in self.shards],
        }
        with writing(folder / PLAN) as scratch:
            Path(scratch).write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Plan | None:
        """Return the plan of a folder, None where there is none.

        Raises:
            PoolError: It is damaged.
        """
        path = folder / PLAN
        if not path.exists():
            return None
        try:
            told = json.loads(path.read_text(encoding="utf-8"))
            shards = tuple(
                Shard(path, name, first, rows, tuple(stamp)) for path, name, first, rows, stamp in told["shards"]
            )
            return cls(told["encoder"], tuple(told["fields"]), told["columns"], shards)
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            raise PoolError(f"{path}: cannot be read ({error}); it is not of this version, or damaged") from None

    def grown(self, folder: Path, asked: Plan) -> Plan:
        """Return this plan with those shards of another at its end that it does not have.

        Raises:
            UsageError: They do not make one pool, or data has changed since it was embedded.
        """
        for what in ("fields", "encoder", "columns"):
            was, now = getattr(self, what), getattr(asked, what)
            if was != now:
                raise UsageError(
                    f"{folder}: is a pool with {what} {_told(was)}, which cannot grow with {what} {_told(now)}; embed "
                    "into another folder, or pass --overwrite"
                )
        known = {(shard.path, shard.first): shard for shard in self.shards}
        new = []
        for shard in asked.shards:
            was = known.get((shard.path, shard.first))
            if was is None:
                new.append(shard)
            elif (was.stamp, was.rows) != (shard.stamp, shard.rows):
                raise UsageError(
                    f"{shard.path}: has changed since it was embedded into {folder}; embed into another folder, or "
                    "pass --overwrite"
                )
        return replace(self, shards=(*self.shards, *new))


def _told(what: Any) -> str:
    return ", ".join(f"{k} {v}" for k, v in what.items()) if isinstance(what, Mapping) else ", ".join(what)


def shards_of(parts: Sequence[Part]) -> tuple[Shard, ...]:
    """Return the shards of parts, named by their paths below the folder that they share."""
    folders = {posixpath.dirname(part.path) for part in parts}
    above = os.path.commonpath(folders) if len(folders) > 1 else next(iter(folders))
    stamps: dict[str, tuple[Any, ...]] = {}
    found = []
    for part in parts:
        if part.path not in stamps:
            stamps[part.path] = tuple(file_stamp(part.protocol, part.path))
        name = os.path.relpath(part.path, above or ".")
        found.append(Shard(part.path, name, part.first, part.rows, stamps[part.path]))
    return tuple(found)


# --- one shard ------------------------------------------------------------------------------------


def shard_path(folder: Path, kind: str, number: int) -> Path:
    """Return the file of a shard: of vectors for a field, else of its table."""
    name = FOLDERS.get(kind, TABLES)
    return folder / name / f"{name}_{number:05d}.{'npy' if kind in FOLDERS else 'parquet'}"


@dataclass
class ShardWriter:
    """Appends to the files of one shard, which take their places together."""

    files: Mapping[str, Any]
    widths: Mapping[str, int]
    table: Any
    schema: Any
    rows: int = 0
    held: list[Any] = field(default_factory=list)
    aside: list[tuple[str, int, str]] = field(default_factory=list)
    damage: str = ""

    def add(self, vectors: Mapping[str, npt.NDArray[np.float16]], columns: Mapping[str, Sequence[Any]]) -> None:
        """Append rows."""
        import pyarrow as pa

        for name, file in self.files.items():
            np.ascontiguousarray(vectors[name], np.float16).tofile(file)
        self.held.append(pa.table([pa.array(columns[one.name], one.type) for one in self.schema], schema=self.schema))
        self.rows += len(self.held[-1])
        if sum(map(len, self.held)) >= _GROUP:
            self._write()

    def finish(self) -> None:
        """Write what is known at the end only."""
        self._write()
        for name, file in self.files.items():
            _header(file, self.rows, self.widths[name])
        told = {"rows": self.rows, "set_aside": self.aside, "damage": self.damage}
        self.table.add_key_value_metadata({_MARK.decode(): json.dumps(told, ensure_ascii=False)})
        self.table.close()

    def _write(self) -> None:
        import pyarrow as pa

        if self.held:
            self.table.write_table(pa.concat_tables(self.held), row_group_size=1 << 20)
        self.held = []


def _header(file: Any, rows: int, width: int) -> None:
    """Write the header of an array at the beginning of its file: NumPy's has the same length for any number of rows."""
    file.seek(0)
    header = {"descr": np.dtype(np.float16).str, "fortran_order": False, "shape": (rows, width)}
    np.lib.format.write_array_header_1_0(file, header)


@contextmanager
def writing_shard(folder: Path, number: int, widths: Mapping[str, int], schema: Any) -> Iterator[ShardWriter]:
    """Give a writer whose files take their places when the block ends well, the table last."""
    import pyarrow.parquet as pq

    with ExitStack() as after:  # left in reverse: the table's file is moved last
        scratch = {"table": after.enter_context(writing(shard_path(folder, "table", number)))}
        for name in reversed(list(widths)):
            scratch[name] = after.enter_context(writing(shard_path(folder, name, number)))
        with ExitStack() as opened:
            files = {name: opened.enter_context(open(scratch[name], "wb")) for name in widths}
            for name, file in files.items():
                _header(file, 0, widths[name])
            table = opened.enter_context(pq.ParquetWriter(scratch["table"], schema, compression="zstd"))
            writer = ShardWriter(files, widths, table, schema)
            yield writer
            writer.finish()


def written(folder: Path, number: int) -> dict[str, Any] | None:
    """Return what a shard says of itself, None where it is not there yet.

    Raises:
        PoolError: Its table is damaged, or not from embedding.
    """
    import pyarrow.parquet as pq

    path = shard_path(folder, "table", number)
    if not path.exists():
        return None
    try:
        told = json.loads((pq.read_metadata(path).metadata or {})[_MARK])
        return {"rows": int(told["rows"]), "set_aside": list(told["set_aside"]), "damage": str(told["damage"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PoolError(f"{path}: is damaged, or was not made by embedding ({error}); remove it") from None


# --- the folder -----------------------------------------------------------------------------------


@contextmanager
def holding(folder: Path) -> Iterator[None]:
    """Hold a folder for this process, and remove what a killed one left unfinished in it.

    Raises:
        OutputError: Another process embeds into it.
    """
    try:
        import fcntl
    except ImportError:  # a system without locks of files
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise OutputError(f"{folder}: another process is embedding into it; wait for its end") from None
        for path in [*folder.glob(".*.tmp*"), *folder.glob("*/.*.tmp*")]:
            path.unlink(missing_ok=True)
        yield
    finally:
        os.close(handle)
