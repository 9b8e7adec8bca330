"""Versions of a Lance dataset, read by fragment; for the readers of pools and of raw data.

A version never changes, so what is opened stays as it was while others write new versions. The package ``lance`` reads
the files; what they say about names and sizes is checked here before, and its errors are those of damage.
"""

from __future__ import annotations

import os
import posixpath
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from thresher.errors import MissingExtraError, PoolError, ThresherError, UnreachedError, UsageError
from thresher.io.columns import plain_batch, plain_schema
from thresher.io.listing import Files, stamp_of
from thresher.io.open import meaning_of, trusting
from thresher.io.parquet import TablePiece, exactly, vectors_of
from thresher.io.paths import is_unsafe, typed, visible
from thresher.io.pieces import Array, stored_dtype
from thresher.runtime.format import counted
from thresher.runtime.random import digest

Rows = npt.NDArray[np.int64]
T = TypeVar("T")

MANIFESTS = r"_versions/(\d{1,20})\.manifest"
MARK = b"thresher"  # metadata of what export wrote: which selection a column, or a dataset, is of
_INVERTED = 2**64 - 1  # manifests are named by this number less the version, so that the newest is listed first
_BATCH = 8_192  # rows read at a time
_BYTES = 1 << 26  # bytes of files whose rows of a table are read at a time
_BUFFER = 1 << 26  # bytes that Lance reads ahead
_FOOTER = struct.Struct("<16x Q I 4x H H 4s")  # of a file: where its table of buffers begins, their number, version


class Fragment(NamedTuple):
    """Rows of a version that are in files of their own.

    Attributes:
        uri: The dataset, as the package takes it.
        version: The version.
        number: The id of the fragment.
        rows: Its rows, without deleted ones.
        path: Its first file, for messages, and to notice that it was removed.
        protocol: fsspec protocol of the file system.
        width: Bytes of its files for each row, at least 1.
    """

    uri: str
    version: int
    number: int
    rows: int
    path: str
    protocol: str = "file"
    width: int = 1

    def batches(
        self, columns: Sequence[str], start: int, rows: int, size: int = _BATCH, *, plain: bool = True
    ) -> Iterator[Any]:
        """Yield consecutive rows as record batches, validated; of plain types, or as they are.

        Raises:
            PoolError: A file is damaged.
        """
        how: dict[str, Any] = {
            "offset": start,
            "limit": rows,
            "batch_size": size,
            "batch_readahead": 2,
            "io_buffer_size": _BUFFER,
        }
        own = self.opened()
        if blobs := [name for name in columns if name in blobs_of(self.dataset().schema)]:
            places = reading(self.path, self.protocol, partial(own.to_table, columns=blobs, offset=start, limit=rows))
            for name in blobs:
                _refuse_elsewhere(self.path, name, places.column(name))
        how |= {"columns": list(columns), "blob_handling": "all_binary"}
        parts = reading(self.path, self.protocol, lambda: iter(own.to_batches(**how)))
        while (part := reading(self.path, self.protocol, lambda: next(parts, None))) is not None:
            yield from (self._checked(part.slice(lo, size), columns, plain) for lo in range(0, len(part), size))

    def take(self, columns: Sequence[str], rows: Rows, size: int = _BATCH) -> Iterator[Any]:
        """Yield scattered rows, ascending, as :meth:`batches` does."""
        blobs = not blobs_of(self.dataset().schema).isdisjoint(columns)
        for at in range(0, len(rows), size):
            some = rows[at : at + size]
            ends = np.flatnonzero(np.diff(some) != 1) + 1  # of runs; a row may be there twice
            if blobs or not len(ends):
                for run in np.split(some, ends):
                    yield from self.batches(columns, int(run[0]), len(run), size)
                continue
            read = partial(self._taken, list(columns), some.tolist())
            for part in reading(self.path, self.protocol, read).to_batches():
                yield self._checked(part, columns)

    def state(self, columns: Sequence[str]) -> str:
        """Return a text that changes with the values of some columns, and with the rows that are deleted."""

        def found() -> str:
            one, schema = self.opened().metadata, self.dataset().lance_schema
            fields = {schema.field(name).id() for name in columns}
            files = [file.path for file in one.files if not fields.isdisjoint(file.fields)]
            return digest([files, repr(one.deletion_file)])[:16]

        return reading(self.path, self.protocol, found)

    def _taken(self, columns: list[str], rows: list[int]) -> Any:
        return self.opened().take(rows, columns=columns)

    def _checked(self, part: Any, columns: Sequence[str], plain: bool = True) -> Any:
        def check() -> Any:
            part.validate(full=True)  # lengths and texts in the file may be invalid
            wanted = part.select(list(columns))
            return plain_batch(wanted) if plain else wanted

        return trusting(self.path, check)

    def dataset(self) -> Any:
        """Return the version as ``lance.LanceDataset``."""
        return reading(self.path, self.protocol, lambda: opened(self.uri, self.version))

    def opened(self) -> Any:
        """Return the fragment as ``lance.LanceFragment``.

        Raises:
            PoolError: The version no longer has it.
        """
        found = self.dataset().get_fragment(self.number)
        if found is None:
            raise PoolError(f"{self.path}: is no longer part of version {self.version}; open the dataset again")
        return found


@dataclass(frozen=True)
class LancePiece:
    """A column of vectors of a fragment."""

    fragment: Fragment
    array: str
    rows: int
    dim: int
    dtype: str

    @property
    def path(self) -> str:
        """The first file of the fragment."""
        return self.fragment.path

    @property
    def protocol(self) -> str:
        """The protocol of its file system."""
        return self.fragment.protocol

    @property
    def seekable(self) -> bool:
        """Whether any range of rows is cheap to read: as far as the format goes."""
        return False

    @property
    def mapped(self) -> bool:
        """Whether vectors are read in place."""
        return False

    def read(self, start: int, stop: int) -> Array:
        """Return rows start..stop."""
        return self._joined(self.fragment.batches([self.array], start, stop - start) if stop > start else iter(()))

    def take(self, rows: Rows) -> Array:
        """Return scattered rows, ascending."""
        return self._joined(self.fragment.take([self.array], rows))

    def stream(self, batch: int) -> Iterator[Array]:
        """Yield all rows in order."""
        parts = self.fragment.batches([self.array], 0, self.rows, batch)
        return exactly(self, (self._vectors(part) for part in parts))

    def _vectors(self, part: Any) -> Array:
        return trusting(self.path, partial(vectors_of, part.column(0), self.dim, self.dtype))

    def _joined(self, parts: Iterator[Any]) -> Array:
        return np.concatenate([np.empty((0, self.dim), stored_dtype(self.dtype)), *map(self._vectors, parts)])


@dataclass(frozen=True)
class LanceTable(TablePiece):
    """Metadata of the rows of a fragment."""

    fragment: Fragment | None = None

    def stream(self, columns: Sequence[str], batch: int = 65536) -> Iterator[Any]:
        """Yield record batches of the columns, in row order."""
        return exactly(self, self._own.batches(self._whole(columns), 0, self.rows, min(batch, self._at_once)))

    def take(self, columns: Sequence[str], rows: Rows) -> Iterator[Any]:
        """Yield record batches of the given rows (ascending)."""
        return self._own.take(self._whole(columns), rows, self._at_once)

    def schema(self, columns: Sequence[str]) -> Any:
        """Return the Arrow schema of some columns, in the order of ``columns``."""
        import pyarrow as pa

        schema = schema_of(self._own.dataset())
        return pa.schema([schema.field(name) for name in columns])

    @property
    def _at_once(self) -> int:
        """Rows of a batch, so that a few of long texts are in memory."""
        return min(_BATCH, max(_BYTES // self._own.width, 1))

    @property
    def _own(self) -> Fragment:
        assert self.fragment is not None  # noqa: S101 - it has a default only because fields of the base have
        return self.fragment

    def _whole(self, columns: Sequence[str]) -> list[str]:
        """Return the columns to read: of ``image.path``, a field of a struct, the struct."""
        return [name if name in self.columns else name.split(".")[0] for name in columns]


# --- opening --------------------------------------------------------------------------------------


def is_lance(files: Files) -> bool:
    """Return whether files are those of a Lance dataset."""
    return bool(files.matching(MANIFESTS))


def versions_in(files: Files) -> dict[int, str]:
    """Return the versions of a dataset and the names of their manifests."""
    found: dict[int, str] = {}
    for name in files.matching(MANIFESTS):
        digits = re.fullmatch(MANIFESTS, name)[1]  # type: ignore[index]
        number = int(digits)
        found[_INVERTED - number if len(digits) == 20 else number] = name
    return found


def fragments_of(files: Files, version: int = 0, bad: Callable[[PoolError], object] | None = None) -> list[Fragment]:
    """Return the fragments of a version, in the order of the rows; reads its manifest.

    Args:
        files: The files of the dataset.
        version: The version; 0 for the one that the location names, else the newest.
        bad: Called with the error of a fragment whose files are missing or cut off, which is left out; raised if None.

    Raises:
        UsageError: There is no such version, or the location names another one.
        PoolError: The manifest is damaged, or a file of a fragment is missing or cut off.
    """
    known = versions_in(files)
    if version and files.version not in ("", str(version)):
        raise UsageError(
            f"{files.location}: names version {visible(files.version, 40)}, but the option says {version}; give one"
        )
    wanted = str(version or files.version or max(known))
    chosen = next((number for number in known if str(number) == wanted), None)
    if chosen is None:
        raise UsageError(f"{files.location}: has no version {visible(wanted, 40)}; {_versions(files, sorted(known))}")
    uri = files.root if files.protocol == "file" else f"{files.protocol}://{files.root}"
    manifest = files.path(known[chosen])
    elsewhere, parts, _ = reading(manifest, files.protocol, lambda: _parsed(opened(uri, chosen)))
    if elsewhere:
        raise PoolError(f"{manifest}: has files in other folders; copy the dataset with deep_clone")
    there_now = set(files.names)
    found: list[Fragment] = []
    for one in parts:
        try:
            found.append(_fragment(files, manifest, there_now, uri, chosen, one))
        except PoolError as error:
            if bad is None:
                raise
            bad(error)
    if len({one.path for one in found}) < len(found):
        raise PoolError(f"{manifest}: is damaged: two fragments have the same file; restore it")
    return found


def _versions(files: Files, known: Sequence[int]) -> str:
    """Return which versions there are, ascending, and what to type if the location names one."""
    first, last = known[0], known[-1]
    if len(known) == 1:
        there = f"its only version is {last}"
    elif len(known) == last - first + 1:
        there = f"it has versions {first} to {last}"
    else:
        there = f"it has {len(known):,} versions, the first is {first} and the last {last}"
    path = files.location.removesuffix(f"@{files.version}")
    return f"{there}; type {typed(f'{path}@{last}')}, or {typed(path)} for the newest" if files.version else there


def _parsed(dataset: Any) -> tuple[Any, list[Any], Any]:
    """Return the other folders, the fragments and the schema; each is parsed only now, and panics if it is damaged."""
    return dataset.base_paths(), dataset.get_fragments(), dataset.schema


def _fragment(files: Files, manifest: str, there: set[str], uri: str, version: int, one: Any) -> Fragment:
    rows = reading(manifest, files.protocol, lambda: one.physical_rows - one.num_deletions)
    described = one.metadata.files
    if not described or rows < 0:
        raise PoolError(
            f"{manifest}: is damaged: fragment {one.fragment_id} has {rows:,} rows and {len(described)} files"
        )
    total = 0
    for file in described:
        name = posixpath.join("data", file.path)
        if is_unsafe(file.path):
            raise PoolError(f"{manifest}: names {visible(file.path, 120)!r}, which is outside of the dataset")
        path = files.path(name)
        if name not in there:
            raise PoolError(f"{path}: does not exist, but version {version} needs it; restore it")
        size = (files.stamps.get(path) or stamp_of(files.protocol, path))[0]
        total += size
        if file.file_size_bytes and file.file_size_bytes != size:
            raise PoolError(
                f"{path}: has {counted(size, 'byte')}, not {file.file_size_bytes:,}; it may be cut off, restore it"
            )
        if files.protocol == "file" and size >= _FOOTER.size:
            _check_footer(path, size)
    first = files.path(posixpath.join("data", described[0].path))
    return Fragment(uri, version, one.fragment_id, int(rows), first, files.protocol, max(total // max(rows, 1), 1))


def _check_footer(path: str, size: int) -> None:
    """Refuse a file with more buffers than it has room for: the package ends the process if it cannot allocate them.

    Raises:
        PoolError: It has.
    """

    def read() -> bytes:
        with open(path, "rb") as file:
            file.seek(size - _FOOTER.size)
            return file.read(_FOOTER.size)

    start, buffers, *version, mark = _FOOTER.unpack(trusting(path, read))
    if mark == b"LANC" and version > [0, 2] and start + 16 * buffers + _FOOTER.size > size:  # older ones have none
        raise PoolError(f"{path}: is damaged: it says that it has {counted(buffers, 'buffer')}; restore it")


def opened(uri: str, version: int) -> Any:
    """Return a version of a dataset as ``lance.LanceDataset``. A few stay open in a process; a fork opens its own."""
    stamp = [os.stat(os.path.join(uri, "_versions")).st_mtime_ns] if "://" not in uri else []
    return _opened(uri, version, os.getpid(), *stamp)


@lru_cache(maxsize=4)
def _opened(uri: str, version: int, *stamp: int) -> Any:
    return package().dataset(uri, version=version)


def schema_of(dataset: Any) -> Any:
    """Return the schema of a dataset with plain types, and blobs as bytes."""
    import pyarrow as pa

    blobs = blobs_of(dataset.schema)
    return plain_schema(
        pa.schema(
            [field.with_type(pa.large_binary()) if field.name in blobs else field for field in dataset.schema],
            dataset.schema.metadata,
        )
    )


def marks_of(schema: Any) -> dict[str, bytes | None]:
    """Return which selection each column is of that export added; None for other columns."""
    return {one.name: (one.metadata or {}).get(MARK) for one in schema}


def blobs_of(schema: Any) -> set[str]:
    """Return the columns of large values that Lance keeps apart, and describes by their places."""

    def is_blob(field: Any) -> bool:
        named = str(getattr(field.type, "extension_name", "")).startswith("lance.blob")
        return named or (field.metadata or {}).get(b"lance-encoding:blob") == b"true"

    return {field.name for field in schema if is_blob(field)}


def _refuse_elsewhere(path: str, name: str, places: Any) -> None:
    """Refuse values that are in files which the dataset only names.

    Raises:
        PoolError: One is.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    if not pa.types.is_struct(places.type) or places.type.get_field_index("blob_uri") < 0:
        return
    for uri in pc.unique(pc.struct_field(places, "blob_uri")).to_pylist():
        if uri:
            raise PoolError(
                f"{path}: the column {visible(name)!r} names {visible(uri, 120)!r}, a file of its own, which is not "
                "read; write the dataset again with external_blob_mode='ingest'"
            )


def package() -> Any:
    """Return the package ``lance``.

    Raises:
        MissingExtraError: It is not installed.
    """
    try:
        import lance
    except ImportError:
        raise MissingExtraError("Lance", "lance") from None
    return lance


def reading(path: str, protocol: str, what: Callable[[], T]) -> T:
    """Call ``what``, which reads with the package, and raise what its errors mean, as :func:`trusting` does.

    Raises:
        PoolError: A file is damaged; also if the package fails because of it, which it reports as a panic.
        UnreachedError: A remote file was not reached.
    """
    try:
        return what()
    except ThresherError:
        raise
    except Exception as error:
        text = next(iter(str(error).splitlines()), "")[:300]
        if protocol != "file" and "LanceError(IO)" in str(error):
            raise UnreachedError(f"{path}: network or system error ({text}); retry later") from error
        if (meaning := meaning_of(path, error)) is not None:
            raise meaning from error
        if not isinstance(error, (OSError, RuntimeError)):
            raise
        raise PoolError(
            f"{path}: cannot be read, it may be truncated or damaged ({text}); replace or remove it"
        ) from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of pyo3, not a subclass of Exception
            raise
        raise PoolError(f"{path}: cannot be read, it may be damaged ({str(error)[:200]}); replace it") from None
