"""The pool that embedding writes: folders in clip-retrieval's layout, and a plan of which data each shard holds.

A shard is complete once its table exists: the vectors are moved into place before it. Shards have the same bytes for
any number of workers and interruptions, so that a killed run resumes to the same pool.
"""

from __future__ import annotations

import base64
import json
import os
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from thresher.data import Part
from thresher.errors import PoolError, UsageError
from thresher.io.hub import without_commit
from thresher.io.open import meaning_of, open_file, trusting
from thresher.io.paths import writable
from thresher.io.places import located
from thresher.io.plan import BYTES, PLAN, datasets_in
from thresher.runtime import locks
from thresher.runtime.files import writing
from thresher.runtime.places import AnyPath, RemotePath, sizes_in
from thresher.runtime.untrusted import Fields, parse_json, read_json

SET_ASIDE = "set_aside.txt"
FOLDERS = {"image": "img_emb", "text": "text_emb"}
TABLES = "metadata"
JOBS = ".jobs"  # records of jobs that share the work
OWN = ("key", "text", "uid", "width", "height", "shard", "offset", "thumbnail")  # columns that embedding adds

LOCK = ".embed.lock"
_REQUESTS = 64  # at once
_GROUP = 4_096  # rows of a row group, plus less than a batch
_LONG = 2**20  # bytes from which the metadata in a footer is compressed
_NOTE = 256 * 2**20  # maximum bytes of that list
_VALUES = 1 << 25  # of a plan
_MARK = b"thresher"  # key of the table's metadata that lists the samples that are not in it


@dataclass(frozen=True)
class Shard:
    """The part of the data that a shard holds.

    Attributes:
        path: File or folder of the part, as an absolute path or a URL.
        name: Its name in the column "shard" of the rows.
        first: Where in the file it begins.
        rows: Number of samples, None if it is only known after reading.
        stamp: Size and modification time of the file, to detect changes.
    """

    path: str
    name: str
    first: int
    rows: int | None
    stamp: tuple[Any, ...]

    @property
    def part(self) -> tuple[str, int]:
        """Identity of the part, see :func:`identity_of`."""
        return without_commit(self.path), self.first

    def same_data(self, other: Shard) -> bool:
        """Return whether the data has not changed; pools of older versions have shorter stamps of folders."""
        return self.stamp == other.stamp[: len(self.stamp)]

    @property
    def moved(self) -> tuple[Any, ...]:
        """Identity of the part that does not change if the file is moved."""
        return os.path.basename(self.path), self.first, self.rows, self.stamp


@dataclass(frozen=True)
class PoolPlan:
    """What a pool consists of.

    Attributes:
        encoder: Name, weights, dimensions and precision of the encoder.
        fields: "image", "text" or both.
        columns: Columns of the tables and their Arrow types, as text, in order.
        options: Other options that the rows of unwritten shards depend on.
        shards: The shards, in the order of their numbers.
        versions: Datasets that keep their versions, and the newest version of each that was embedded.
    """

    encoder: Mapping[str, Any]
    fields: tuple[str, ...]
    columns: Mapping[str, str]
    options: Mapping[str, Any]
    shards: tuple[Shard, ...] = field(repr=False, default=())
    versions: Mapping[str, int] = field(default_factory=dict, compare=False)  # a newer one may have the same rows

    def saved(self, folder: AnyPath, rows: int | None = None) -> None:
        """Write the plan to a folder; with the number of rows if the pool is finished."""
        content = {
            "encoder": dict(self.encoder),
            "fields": list(self.fields),
            "columns": dict(self.columns),
            "options": dict(self.options),
            **({"versions": dict(self.versions)} if self.versions else {}),
            **({} if rows is None else {"rows": rows}),
            "shards": [[s.path, s.name, s.first, s.rows, list(s.stamp)] for s in self.shards],
        }
        with writing(folder / PLAN) as scratch:
            Path(scratch).write_text(json.dumps(content, indent=1) + "\n", encoding="ascii")

    @classmethod
    def read(cls, folder: AnyPath) -> PoolPlan | None:
        """Return the plan of a folder, None if it has none.

        Raises:
            PoolError: It is damaged.
        """
        path = folder / PLAN
        if not path.exists():
            return None
        try:
            content = read_json(path, BYTES, _VALUES)
            head = Fields(content, str(path))
            encoder, columns, options = (head.object(name).values for name in ("encoder", "columns", "options"))
            shards, versions = tuple(map(_shard, content["shards"])), datasets_in(content)
            return cls(encoder, head.texts("fields"), columns, options, shards, versions)
        except OSError as error:
            raise meaning_of(str(path), error) or error from error
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise PoolError(
                f"{path}: cannot be read ({error}), is damaged or of another version; pass --overwrite to start again"
            ) from None

    def grown(self, folder: AnyPath, asked: PoolPlan, again: Collection[int] = ()) -> PoolPlan:
        """Return this plan with the new shards of another plan added at the end.

        A file that was moved is recognised by its name, size and time, if there is no file at its old path.

        Args:
            folder: The folder of the pool.
            asked: The plan of the data as it is now.
            again: Shards that are written again, so that their data may have changed.

        Raises:
            UsageError: The two plans cannot be one pool, data has changed since it was embedded, or unwritten shards
                were planned with other options.
        """
        for what in ("fields", "encoder", "columns"):
            was, now = getattr(self, what), getattr(asked, what)
            if was != now:
                raise UsageError(
                    f"{folder}: is a pool with {what} {_text(was)}, which cannot grow with {what} {_text(now)}; embed "
                    "into another folder, or pass --overwrite"
                )
        if self.options != asked.options and any(written(folder, n) is None for n in range(len(self.shards))):
            names = [name for name in asked.options if self.options.get(name) != asked.options[name]]
            was, now = (" ".join(f"--{name} {of.get(name)}" for name in names) for of in (self.options, asked.options))
            raise UsageError(
                f"{folder}: was started with {was} and is not finished, so it cannot be resumed with {now}; run the "
                "original command again, or pass --overwrite"
            )
        shards = list(self.shards)
        known = {shard.part: number for number, shard in enumerate(shards)}
        moved = {shard.moved: number for number, shard in enumerate(shards) if not os.path.lexists(shard.path)}
        named = {shard.name: shard.path for shard in shards}
        for shard in asked.shards:
            number = known.get(shard.part)
            if number is None and os.path.isfile(shard.path):
                number = moved.get(shard.moved)
            if number is None:
                unique = named.setdefault(shard.name, shard.path) == shard.path
                shards.append(shard if unique else replace(shard, name=writable(shard.path)))
                continue
            was = shards[number]
            changed = not was.same_data(shard)
            info = written(folder, number) if changed else None
            if number in again or (changed and info is None):  # it is written from the data as it is now
                shards[number] = replace(shard, name=was.name)
                continue
            if info is not None:
                retry = "pass --retry-damaged to embed it again, " if may_retry(info) else ""
                raise UsageError(
                    f"{shard.path}: has changed since it was embedded into {folder}; {retry}embed into another folder, "
                    "or pass --overwrite"
                )
            if was.rows != shard.rows:
                raise UsageError(
                    f"{shard.path}: was split into other shards when it was embedded into {folder}: {was.rows:,} "
                    f"rows from {was.first:,} on, now {shard.rows:,}; give the same --per-shard"
                )
            shards[number] = replace(was, path=shard.path)
        versions = {name: max(version, self.versions.get(name, 0)) for name, version in asked.versions.items()}
        return replace(self, options=asked.options, shards=tuple(shards), versions={**self.versions, **versions})


def _text(what: Any) -> str:
    return ", ".join(f"{k} {v}" for k, v in what.items()) if isinstance(what, Mapping) else ", ".join(what)


def place_of(part: Part) -> str:
    """Return the absolute path or URL of a part."""
    if part.protocol == "file":
        return os.path.abspath(part.path)
    return part.path if "://" in part.path else f"{part.protocol}://{part.path}"


def identity_of(part: Part) -> tuple[str, int]:
    """Return what identifies a part: its place, the same in all commits of a dataset on the Hub, and its beginning."""
    return without_commit(place_of(part)), part.first


def shards_of(parts: Sequence[Part]) -> tuple[Shard, ...]:
    """Return the shards of parts, named by folder and file, or by as much of their paths as makes the names unique.

    Raises:
        UsageError: A file is named twice.
    """
    paths = {place_of(part) for part in parts}
    deepest = max((path.count("/") for path in paths), default=0) + 1
    length = next((n for n in range(2, deepest) if len({_end(path, n) for path in paths}) == len(paths)), deepest)
    shards: dict[tuple[str, int], Shard] = {}
    for part in parts:
        path = place_of(part)
        stamp = tuple(part.stamp())
        shard = Shard(path, writable(_end(path, length)), part.first, part.rows, stamp)
        if shards.setdefault(shard.part, shard) is not shard:
            raise UsageError(f"{part.path}: is named twice; name it once")
    return tuple(shards.values())


def _end(path: str, names: int) -> str:
    return "/".join(path.split("/")[-names:])


# --- one shard ------------------------------------------------------------------------------------


def shard_path(folder: AnyPath, kind: str, number: int) -> AnyPath:
    """Return the path of a shard's file: the vectors if ``kind`` is a field, otherwise the table."""
    name = FOLDERS.get(kind, TABLES)
    return folder / name / f"{name}_{number:05d}.{'npy' if kind in FOLDERS else 'parquet'}"


@dataclass
class ShardWriter:
    """Appends rows to the files of one shard."""

    files: Mapping[str, Any]
    widths: Mapping[str, int]
    table: Any
    schema: Any
    rows: int = 0
    held: list[Any] = field(default_factory=list)
    skipped: list[tuple[str, int, str]] = field(default_factory=list)
    damage: str = ""
    retry: bool = False  # whether the image of a skipped sample is a file that may be good by now
    notes: Counter[str] = field(default_factory=Counter)  # rows with each of Sample.notes

    def add(self, vectors: Mapping[str, npt.NDArray[np.float16]], columns: Mapping[str, Sequence[Any]]) -> None:
        """Append rows."""
        import pyarrow as pa

        for name, file in self.files.items():
            file.write(np.ascontiguousarray(vectors[name], np.float16).data)  # tofile() does not report why it failed
        self.held.append(pa.table([pa.array(columns[one.name], one.type) for one in self.schema], schema=self.schema))
        self.rows += len(self.held[-1])
        if sum(map(len, self.held)) >= _GROUP:
            self._write()

    def finish(self) -> None:
        """Write the remaining rows, the final headers, and the list of skipped samples."""
        self._write()
        for name, file in self.files.items():
            _header(file, self.rows, self.widths[name])
        info = {"rows": self.rows, "set_aside": self.skipped, "damage": self.damage}
        info |= {"retry": True} if self.retry else {}
        info |= {"notes": dict(self.notes)} if self.notes else {}
        self.table.add_key_value_metadata({_MARK.decode(): _packed(json.dumps(info, ensure_ascii=False).encode())})
        self.table.close()

    def _write(self) -> None:
        import pyarrow as pa

        if self.held:
            self.table.write_table(pa.concat_tables(self.held), row_group_size=1 << 20)
        self.held = []


def _packed(note: bytes) -> bytes:
    """Compress long metadata: readers refuse footers of 100 MB, which a million skipped samples would take."""
    return note if len(note) < _LONG else base64.b64encode(zlib.compress(note))


def _unpacked(note: bytes) -> bytes:
    if note.startswith(b"{"):
        return note
    return zlib.decompressobj().decompress(base64.b64decode(note), _NOTE)  # a longer one is cut, and no longer JSON


def _header(file: Any, rows: int, width: int) -> None:
    """Write the .npy header at the beginning of a file; it has the same length for any number of rows."""
    file.seek(0)
    header = {"descr": np.dtype(np.float16).str, "fortran_order": False, "shape": (rows, width)}
    np.lib.format.write_array_header_1_0(file, header)


@contextmanager
def writing_shard(folder: AnyPath, number: int, widths: Mapping[str, int], schema: Any) -> Iterator[ShardWriter]:
    """Yield a writer whose files are moved into place, the table last, if the block ends without an error."""
    import pyarrow.parquet as pq

    with ExitStack() as after:  # exits in reverse order: the table's file is moved last
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
        shard_path(folder, "table", number).unlink(missing_ok=True)  # of a shard that is written again


def written(folder: AnyPath, number: int) -> dict[str, Any] | None:
    """Return the metadata in the table of a shard, None if the shard is not written yet.

    Raises:
        PoolError: The table is damaged, or was not written by embedding.
    """
    import pyarrow.parquet as pq

    path = shard_path(folder, "table", number)
    if not path.exists():
        return None

    def read() -> dict[str, Any]:
        with open_file(*located(str(path))) as file:
            footer = pq.read_metadata(file).metadata or {}
        try:
            info = parse_json(_unpacked(footer[_MARK]))
            return {
                "rows": int(info["rows"]),
                "set_aside": list(info["set_aside"]),
                "damage": str(info["damage"]),
                "retry": bool(info.get("retry")),
                "notes": {str(note): int(count) for note, count in info.get("notes", {}).items()},
            }
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"it has no metadata of a shard: {error!r}") from error

    try:
        return trusting(str(path), read)
    except PoolError as error:
        why = error.__cause__ or error
        raise PoolError(f"{path}: is damaged, or was not written by thresher embed ({why}); remove it") from error


def all_written(folder: AnyPath, numbers: Sequence[int]) -> list[dict[str, Any] | None]:
    """Return what :func:`written` returns for several shards: one listing, and the footers that there are, in parallel.

    Raises:
        PoolError: A table is damaged, or was not written by embedding.
    """
    there = listed(folder, numbers)
    with ThreadPoolExecutor(_REQUESTS if isinstance(folder, RemotePath) else 1) as threads:
        return list(threads.map(lambda n: written(folder, n) if n in there else None, numbers))


def listed(folder: AnyPath, numbers: Iterable[int]) -> set[int]:
    """Return which of several shards have a table: one listing, and nothing is read."""
    there = sizes_in(folder / TABLES)
    return {number for number in numbers if shard_path(folder, "table", number).name in there}


def may_retry(info: Mapping[str, Any]) -> bool:
    """Return whether a shard lacks samples that it may have if it is written again."""
    return bool(info["damage"] or info["retry"])


def _shard(entry: Any) -> Shard:
    path, name, first, rows, stamp = entry
    texts, numbers = (path, name), (first, *([] if rows is None else [rows]))
    if not all(isinstance(text, str) for text in texts) or not isinstance(stamp, list):
        raise ValueError("a shard has no path, name and stamp")
    if not all(isinstance(number, int) and number >= 0 for number in numbers):
        raise ValueError("a shard has no numbers of rows")
    return Shard(path, name, first, rows, tuple(stamp))


# --- the folder -----------------------------------------------------------------------------------


def unfinished(folder: AnyPath) -> list[AnyPath]:
    """Return temporary files that a killed process left directly in a folder, and its lock."""
    return [*folder.glob(".*.tmp*"), *folder.glob(LOCK)]


@contextmanager
def holding(folder: AnyPath, wait: Callable[[str], None] | None = None) -> Iterator[Callable[[], None]]:
    """Lock a folder for this process, and remove temporary files that a killed process left in it.

    Args:
        folder: The folder.
        wait: Wait while another process holds the lock, and call this with a message after some seconds.

    Yields:
        See :func:`thresher.runtime.locks.holding`.

    Raises:
        OutputError: Another process is embedding into the folder.
    """
    with locks.holding(folder / LOCK, f"the pool {folder}", wait=wait is not None, say=wait) as still_held:
        sweep_pool(folder)
        yield still_held


def sweep_pool(folder: AnyPath) -> None:
    """Remove temporary files that killed processes left in a folder."""
    if not isinstance(folder, RemotePath):  # nothing is left there
        locks.sweep([*folder.glob(".*.tmp*"), *folder.glob("*/.*.tmp*")])
