"""MDS, the format of MosaicML Streaming: shards of samples, and an ``index.json`` that describes them.

A shard is, in little-endian numbers of 32 bits: the number of samples, the offset of each sample and of the end, a copy
of the description of the columns, and the samples. A sample is the lengths of its columns of variable length, and then
the bytes of all columns. https://docs.mosaicml.com/projects/streaming describes the encodings of the columns.

Nothing is imported to read it. Columns in the encoding ``pkl`` are refused, because reading them would run code.
"""

from __future__ import annotations

import io
import posixpath
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import IO, Any, ClassVar, Protocol, TypeGuard

import numpy as np
import numpy.typing as npt

from thresher.data.location import Location
from thresher.data.options import DataOptions
from thresher.data.parts import Data, Ints
from thresher.data.samples import BYTES
from thresher.data.tables import Table, TablePart, tables_of
from thresher.errors import PoolError, UsageError
from thresher.io.listing import Files, stamp_of
from thresher.io.open import open_file, trusting
from thresher.io.paths import is_unsafe, visible
from thresher.runtime.format import counted
from thresher.runtime.untrusted import load_json, parse_json

INDEX = "index.json"
_INDEXES = rf"([^/]*/)?{re.escape(INDEX)}"  # of a dataset, or of one of its splits
_EMPTY = 200  # bytes that an index without shards has at most
_CODECS = {"gz": "gzip", "zstd": "zstd", "br": "brotli", "bz2": "bz2", "snappy": "snappy"}  # names that Arrow knows
_ENDINGS = (".mds", *(f".mds.{ending}" for ending in _CODECS))
_AGAIN = 8  # maximum number of times that a compressed shard is decompressed for the parts it is split into
_MOST = 1 << 32  # bytes of a shard, whose offsets have 32 bits
_BATCH = 1 << 26  # bytes of samples after which a batch ends
_SKIPPED = 1 << 20  # bytes read at a time to get over what is not needed in a compressed shard
_UNSNAPPED = 1 << 30  # bytes of a shard in snappy, which has no stream and is decompressed as a whole
_NUMBERS = ("uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64", "float16", "float32", "float64")
_DTYPES = {
    8: "uint8",
    9: "int8",
    16: "uint16",
    17: "int16",
    18: "float16",
    32: "uint32",
    33: "int32",
    34: "float32",
    64: "uint64",
    65: "int64",
    66: "float64",
}  # fmt: skip - of arrays, by the number in their first byte
_PIXELS = ("1", "L", "LA", "RGB", "RGBA", "I;16")  # modes of images without a file format that PNG has
# Modes that are converted for PNG, and to which.
_OTHERS = {"I": "I;16", **dict.fromkeys(("P", "PA", "CMYK", "YCbCr", "HSV", "LAB", "RGBX", "RGBa", "La"), "RGB")}

Offsets = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Mds:
    """MDS shards of MosaicML Streaming, with their index.json."""

    name: ClassVar[str] = "mds"
    rank: ClassVar[int] = 15
    looks_like: ClassVar[str] = "index.json with *.mds of MosaicML Streaming"

    def recognise(self, where: Location) -> bool:
        """Recognise an index.json with shards, whose names may go on after ``.mds``, or one that lists none."""
        if not where.has(*_ENDINGS, INDEX):
            return False
        found = where.files.matching(_INDEXES)
        return bool(found) and (where.has(*_ENDINGS) or all(_lists_none(where.files, name) for name in found))

    def open(self, where: Location, options: DataOptions) -> Data:
        """Read the index, and check the sizes of the shards.

        Raises:
            PoolError: The index is damaged or does not describe the shards, a shard is missing, or there is no column
                of images.
            UsageError: A column is pickled, there are several splits, or a requested column does not exist.
        """
        files = where.files
        shards = {files.path(shard.name): shard for shard in shards_of(files)}
        tables = [Table(shard.name, [shard.samples], shard.schema()) for shard in shards.values()]

        def part(path: str, protocol: str, **rows: Any) -> MdsPart:
            return MdsPart(path, protocol, shard=shards[path], **{**rows, "stem": shards[path].stem})

        again = _AGAIN if any(shard.codec for shard in shards.values()) else 0
        return replace(tables_of(self.name, files, options, tables, part, again), location=where.text)


def _lists_none(files: Files, name: str) -> bool:
    """Return whether an index is the one that MDSWriter writes if it gets no samples."""
    path = files.path(name)
    if (files.stamps.get(path) or stamp_of(files.protocol, path))[0] > _EMPTY:
        return False
    with open_file(files.protocol, path) as raw:
        content = trusting(path, lambda: raw.read(_EMPTY))
    try:
        return bool(parse_json(content) == {"version": 2, "shards": []})
    except ValueError:
        return False


# --- the index ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shard:
    """A shard as its index describes it.

    Attributes:
        name: Name of its file in the listing, of the compressed file if there is no other.
        stem: Its name without endings: the first part of the keys of samples without a key.
        samples: Number of samples.
        size: Bytes, decompressed.
        codec: The compression of the file, "" for none.
        columns: Name, encoding and size of every column; size -1 if it varies.
    """

    name: str
    stem: str
    samples: int
    size: int
    codec: str
    columns: tuple[tuple[str, str, int], ...]

    def schema(self) -> Any:
        """Return the Arrow schema: images as encoded files, and JSON as lists of texts."""
        import pyarrow as pa

        return pa.schema([(name, _type_of(encoding)) for name, encoding, _ in self.columns])


def index_of(files: Files) -> str:
    """Return the name of the index of a dataset.

    Raises:
        UsageError: There is one for each of several splits.
        PoolError: There is none.
    """
    if INDEX in files.names:  # also of a dataset whose shards are in several folders
        return INDEX
    found = files.matching(rf"[^/]*/{INDEX}")
    if len(found) > 1:
        folders = [posixpath.dirname(name) for name in found]
        raise UsageError(
            f"{files.location}: contains the splits {visible(', '.join(folders))}; give one, such as "
            f"{visible(posixpath.join(files.location, folders[0]))}"
        )
    if not found:
        raise PoolError(f"{files.location}: has no {INDEX}, which describes MDS shards; give the folder that has it")
    return found[0]


def shards_of(files: Files) -> list[Shard]:
    """Return the shards of a dataset with their samples, in order; reads the index and the sizes of the files.

    Raises:
        PoolError: The index is damaged, lies about the files, or names files that do not exist.
        UsageError: A column is pickled, or there are several splits.
    """
    name = index_of(files)
    path, folder = files.path(name), posixpath.dirname(name)
    with open_file(files.protocol, path) as raw:
        index = trusting(path, lambda: load_json(raw))
    listed = index.get("shards") if isinstance(index, dict) else None
    if not isinstance(listed, list) or not listed:
        raise PoolError(f"{path}: lists no shards, so there are no samples; write it again with MDSWriter")
    if index.get("version") != 2:
        raise PoolError(f"{path}: is of version {visible(str(index.get('version')), 40)}; version 2 of MDS is read")
    there = set(files.names)
    shards = [_shard(files, path, folder, there, number, one) for number, one in enumerate(listed)]
    seen: set[str] = set()
    for shard in shards:
        if shard.name in seen:
            raise PoolError(f"{path}: names {visible(shard.name, 120)} twice; write the index again")
        seen.add(shard.name)
    return shards


def _shard(files: Files, path: str, folder: str, there: set[str], number: int, entry: Any) -> Shard:
    where = f"{path}: shard {number:,}"
    if not isinstance(entry, dict):
        raise PoolError(f"{where} is not described by an object; write the index again")
    if entry.get("format") != "mds" or entry.get("version") != 2:
        form = visible(f"{entry.get('format')} of version {entry.get('version')}", 80)
        raise PoolError(f"{where} is {form}; only mds of version 2 is read")
    columns = _columns(where, entry)
    samples, raw, packed = entry.get("samples"), entry.get("raw_data"), entry.get("zip_data")
    base, size = _file(where, raw)
    least = 4 + sum(4 if width < 0 else width for _, _, width in columns)  # an offset, and lengths of columns
    if not _is_count(samples, _MOST) or 8 + samples * least > size or size > _MOST:
        raise PoolError(
            f"{where} cannot have {visible(str(samples), 40)} samples in {visible(str(size), 40)} bytes; "
            "write the index again"
        )
    stem, codec = posixpath.join(folder, base).removesuffix(".mds"), ""
    name = posixpath.join(folder, base)
    if name not in there and packed is not None:
        base, expected = _file(where, packed)
        codec = str(entry.get("compression")).partition(":")[0]
        if codec not in _CODECS:
            raise PoolError(
                f"{where} is compressed with {visible(codec, 40)}; read are {', '.join(_CODECS)} and shards without"
            )
        name = posixpath.join(folder, base)
    else:
        expected = size
    if name not in there:
        raise PoolError(f"{where}: {visible(files.path(name))} does not exist; copy it there, or remove its entry")
    found = (files.stamps.get(files.path(name)) or stamp_of(files.protocol, files.path(name)))[0]
    if found != expected:
        raise PoolError(
            f"{files.path(name)}: has {counted(found, 'byte')}, but {path} says {expected:,}; it may be "
            "cut off, copy it again"
        )
    return Shard(name, stem, samples, size, codec, columns)


def _file(where: str, entry: Any) -> tuple[str, int]:
    base, size = (entry.get("basename"), entry.get("bytes")) if isinstance(entry, dict) else (None, None)
    if not isinstance(base, str) or not base or not _is_count(size, 1 << 62):
        raise PoolError(f"{where} does not name its file and its bytes; write the index again")
    base = base.replace("\\", "/")
    if is_unsafe(base):
        raise PoolError(f"{where} names {visible(base, 120)!r}, which is outside of the folder; write the index again")
    return posixpath.normpath(base), size


def _columns(where: str, entry: Mapping[str, Any]) -> tuple[tuple[str, str, int], ...]:
    described: list[Any] = [entry.get(f"column_{what}") for what in ("names", "encodings", "sizes")]
    if not all(isinstance(one, list) and one for one in described) or len(set(map(len, described))) > 1:
        raise PoolError(f"{where} does not describe its columns; write the index again")
    columns: list[tuple[str, str, int]] = []
    for name, encoding, size in zip(*described, strict=True):
        if not isinstance(name, str) or not isinstance(encoding, str):
            raise PoolError(f"{where} has a column without a name or an encoding; write the index again")
        if encoding.partition(":")[0] == "pkl":
            raise UsageError(
                f"{where}: the column {visible(name)!r} has pickled objects, which can run code and are never read; "
                "write it again as str, json, bytes or ndarray"
            )
        fixed = _size_of(where, name, encoding)
        if size is not None and size != fixed or size is None and fixed >= 0:
            raise PoolError(
                f"{where}: the column {visible(name)!r} of {visible(encoding, 80)} has "
                f"{visible(str(fixed if fixed >= 0 else 'no size'))}, not {visible(str(size), 40)}; "
                "write the index again"
            )
        columns.append((name, encoding, fixed))
    return tuple(columns)


def _size_of(where: str, name: str, encoding: str) -> int:
    """Return the bytes of every value in an encoding, -1 if they vary."""
    if encoding in _NUMBERS or encoding == "int":
        return np.dtype("int64" if encoding == "int" else encoding).itemsize
    if encoding in _DECODERS:
        return -1
    kind, _, rest = encoding.partition(":")
    if kind == "ndarray":
        dtype, shape = _array_type(rest)
        if (not dtype or dtype in _NUMBERS) and (shape is None or min(shape, default=1) > 0):
            items = int(np.prod(shape, dtype=object)) if shape is not None else 0
            return items * np.dtype(dtype).itemsize if dtype and shape is not None else -1
    raise PoolError(
        f"{where}: the column {visible(name)!r} is encoded as {visible(encoding, 80)!r}, which is unknown; read are "
        f"{', '.join((*_DECODERS, 'int', *_NUMBERS, 'ndarray'))}"
    )


def _array_type(config: str) -> tuple[str, tuple[int, ...] | None]:
    """Return the type and the shape in the encoding of arrays, "" and None if each array has its own."""
    dtype, _, shape = config.partition(":")
    sides = shape.split(",") if shape else []
    if len(sides) > 63 or not all(side.isdecimal() and len(side) < 12 for side in sides):
        return "?", None
    return dtype, tuple(map(int, sides)) if shape else None


def _is_count(value: Any, most: int) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most


def _type_of(encoding: str) -> Any:
    """Return the Arrow type of a column. Arrays that cannot be images keep a type that says so in messages."""
    import pyarrow as pa

    if encoding in _NUMBERS or encoding == "int":
        return pa.from_numpy_dtype(np.dtype("int64" if encoding == "int" else encoding))
    if encoding.startswith("ndarray"):
        dtype = _array_type(encoding.partition(":")[2])[0] or "uint8"
        return pa.binary() if dtype == "uint8" else pa.list_(pa.from_numpy_dtype(np.dtype(dtype)))
    return {"text": pa.string(), "number": pa.float64(), "bytes": pa.binary(), "list": pa.list_(pa.binary())}.get(
        _DECODERS[encoding][0], pa.list_(pa.string())
    )


# --- the samples ----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class MdsPart(TablePart):
    """Samples of a shard.

    Attributes:
        shard: The shard.
    """

    shard: Shard

    def schema(self) -> Any:
        """Return the schema of the shard."""
        return self.shard.schema()

    def read_rows(self, columns: Sequence[str] | None, row_c: Ints, size: int) -> Iterator[tuple[int, Any]]:
        """Yield the samples that are needed, without the columns that are not."""
        import pyarrow as pa

        schema = self.schema()
        names = schema.names if columns is None else list(columns)
        kept = pa.schema([schema.field(name) for name in names])
        wanted = [i for name in names for i, column in enumerate(self.shard.columns) if column[0] == name]

        def batch(samples: Sequence[Sequence[bytes]]) -> Any:
            cells = [
                pa.array([_decoded(self.shard.columns[at], cell) for cell in column], field.type)
                for at, column, field in zip(wanted, zip(*samples, strict=True), kept, strict=True)
            ]
            return pa.RecordBatch.from_arrays(cells, schema=kept)

        held: list[Sequence[bytes]] = []
        start = length = 0
        for at, cells in self._rows(np.unique(row_c), wanted):
            if held and (at != start + len(held) or len(held) == size or length > _BATCH):
                yield start, trusting(self.path, partial(batch, held))
                held, length = [], 0
            start = start if held else at
            held.append(cells)
            length += sum(map(len, cells))
        if held:
            yield start, trusting(self.path, partial(batch, held))

    def _rows(self, row_c: Ints, wanted: Sequence[int]) -> Iterator[tuple[int, list[bytes]]]:
        """Yield the row and the bytes of some columns of each of some samples, in order."""
        if not len(row_c):
            return
        with open_file(self.protocol, self.path) as raw:
            shard = self.shard
            source: _Source = _Forward(self.path, raw, shard) if shard.codec else _Plain(self.path, raw)
            (samples,) = np.frombuffer(source.read(0, 4), "<u4").tolist()
            if samples != shard.samples:
                raise PoolError(
                    f"{self.path}: has {samples:,} samples, but the index says {shard.samples:,}; write them again"
                )
            first, last = int(row_c[0]), int(row_c[-1])
            offsets = self._offsets(source, first, last)
            for row in row_c.tolist():
                begin, end = offsets[row - first : row - first + 2].tolist()
                yield row, self._values(source, row, begin, end, wanted)

    def _offsets(self, source: _Source, first: int, last: int) -> Offsets:
        """Return the offsets of samples ``first`` to ``last`` and of the end of the last, which are checked."""
        read = source.read(4 * (1 + first), 4 * (last - first + 2))
        offsets = np.frombuffer(read, "<u4").astype(np.int64)
        least = 4 * (self.shard.samples + 2)
        if offsets[0] < least or offsets[-1] > self.shard.size or (np.diff(offsets) < 0).any():
            raise PoolError(f"{self.path}: is damaged: offsets of its samples are not in order; write it again")
        return offsets

    def _values(self, source: _Source, row: int, begin: int, end: int, wanted: Sequence[int]) -> list[bytes]:
        columns = self.shard.columns
        fixed = [width for _, _, width in columns]
        varied = fixed.count(-1)
        lengths = iter(np.frombuffer(source.read(begin, 4 * varied), "<u4").tolist() if varied else [])
        sizes = [next(lengths) if width < 0 else width for width in fixed]
        if 4 * varied + sum(sizes) != end - begin:
            raise PoolError(
                f"{self.path}: is damaged: the columns of sample {row:,} have {4 * varied + sum(sizes):,} bytes, not "
                f"{end - begin:,}; write it again"
            )
        starts = list(accumulate(sizes, initial=begin + 4 * varied))
        if any(sizes[i] > BYTES for i in wanted):
            raise PoolError(f"{self.path}: sample {row:,} has a value of more than {BYTES:,} bytes, the limit")
        found = {i: source.read(starts[i], sizes[i]) for i in sorted(set(wanted), key=lambda i: starts[i])}
        return [found[i] for i in wanted]


class _Source(Protocol):
    """The decompressed bytes of a shard."""

    def read(self, at: int, size: int) -> bytes:
        """Return some bytes; the positions of calls ascend.

        Raises:
            PoolError: The shard ends before.
        """
        ...


class _Plain:
    """A shard that is not compressed."""

    def __init__(self, path: str, raw: IO[bytes]) -> None:
        self._path, self._raw = path, raw

    def read(self, at: int, size: int) -> bytes:
        def read() -> bytes:
            self._raw.seek(at)
            return self._raw.read(size)

        return _whole(self._path, trusting(self._path, read), at, size)


class _Forward:
    """A compressed shard, of which only what is needed is in memory."""

    def __init__(self, path: str, raw: IO[bytes], shard: Shard) -> None:
        import pyarrow as pa

        self._path, self._at = path, 0
        if shard.codec == "snappy":
            if shard.size > _UNSNAPPED:
                raise PoolError(f"{path}: has {shard.size:,} bytes in snappy; the limit is {_UNSNAPPED:,}, use zstd")
            whole = trusting(path, lambda: pa.decompress(raw.read(), shard.size, "snappy", asbytes=True))
            self._raw: Any = io.BytesIO(whole)
        else:
            self._raw = trusting(path, lambda: pa.CompressedInputStream(pa.PythonFile(raw), _CODECS[shard.codec]))

    def read(self, at: int, size: int) -> bytes:
        if at < self._at:
            raise PoolError(f"{self._path}: is damaged: its samples are not in order; write it again")
        while self._at < at:
            self._next(min(at - self._at, _SKIPPED))
        return self._next(size)

    def _next(self, size: int) -> bytes:
        found = bytes(_whole(self._path, trusting(self._path, lambda: self._raw.read(size)), self._at, size))
        self._at += size
        return found


def _whole(path: str, found: bytes, at: int, size: int) -> bytes:
    if len(found) != size:
        raise PoolError(f"{path}: ends before byte {at + size:,}; it may be cut off, copy it again")
    return found


# --- the values -----------------------------------------------------------------------------------


def _decoded(column: tuple[str, str, int], cell: bytes) -> Any:
    """Return a value as Arrow holds it; an image that cannot be read as its bytes, which count as a broken image.

    Raises:
        ValueError: The bytes are not a value of the encoding, which is not one of images.
    """
    name, encoding, _ = column
    kind = "bytes" if encoding.startswith("ndarray") else _DECODERS.get(encoding, ("",))[0]
    try:
        if encoding in _NUMBERS or encoding == "int":
            return np.frombuffer(cell, "<i8" if encoding == "int" else np.dtype(encoding).newbyteorder("<"))[0]
        if encoding.startswith("ndarray"):
            return _pixels(cell, *_array_type(encoding.partition(":")[2]))
        return _DECODERS[encoding][1](cell)
    except (ValueError, IndexError, OverflowError) as error:
        if kind in ("bytes", "list"):
            return cell if kind == "bytes" else [cell]
        raise ValueError(f"the column {visible(name)!r} has a value that is not {encoding}: {error}") from None


def _json(cell: bytes) -> list[str | None] | None:
    value = parse_json(cell)
    values = [value] if isinstance(value, str) else value
    if values is not None and not (isinstance(values, list) and all(isinstance(one, str | None) for one in values)):
        raise ValueError("of JSON, a text or a list of texts is read; write the caption as a column of its own")
    return values


def _pixels(cell: bytes, dtype: str, shape: tuple[int, ...] | None) -> bytes:
    """Return an array of pixels as PNG: (height, width) or (height, width, 1 to 4) of uint8.

    Raises:
        ValueError: It is another array, or damaged.
    """
    at = 0
    if not dtype:
        dtype, at = _DTYPES.get(cell[0], "?"), 1
    if shape is None:
        sides, width = cell[at] >> 2, 1 << (cell[at] & 3)
        shape = tuple(np.frombuffer(cell[at + 1 : at + 1 + sides * width], f"<u{width}").tolist())
        at += 1 + sides * width
    if dtype not in _NUMBERS or int(np.prod(shape, dtype=object)) * np.dtype(dtype).itemsize != len(cell) - at:
        raise ValueError("its bytes do not fit its shape")
    if dtype != "uint8" or len(shape) not in (2, 3) or len(shape) == 3 and shape[2] not in (1, 2, 3, 4):
        raise ValueError("an array of another shape or type than an image")
    mode = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}[shape[2] if len(shape) == 3 else 1]
    return _as_png(mode, (shape[1], shape[0]), cell[at:])


def _pil(cell: bytes) -> bytes:
    """Return an image that is stored without a file format as PNG."""
    width, height, length = np.frombuffer(cell[:12], "<u4").tolist()
    mode = cell[12 : 12 + length].decode("ascii") if length <= 8 else "?"
    return _as_png(mode, (width, height), cell[12 + length :])


def _as_png(mode: str, size: tuple[int, int], pixels: bytes) -> bytes:
    """Return pixels as PNG.

    Raises:
        ValueError: PNG cannot have them, or there are fewer than the size says.
    """
    from PIL import Image

    if mode not in (*_PIXELS, *_OTHERS) or not size[0] * size[1] <= 8 * len(pixels):  # mode 1 has 8 pixels a byte
        raise ValueError("pixels of another mode or size")
    image = Image.frombytes(mode, size, pixels)
    out = io.BytesIO()
    (image if mode in _PIXELS else image.convert(_OTHERS[mode])).save(out, "PNG", compress_level=1)
    return out.getvalue()


def _several(one: Callable[[bytes], bytes], begin: int, cell: bytes) -> list[bytes]:
    """Return the images of a list: after ``begin`` bytes their number, their lengths and the images."""
    (count,) = np.frombuffer(cell[begin : begin + 4], "<u4").tolist()
    if 4 * count > len(cell):
        raise ValueError("it ends before its last image")
    at = begin + 4 + 4 * count
    sizes = np.frombuffer(cell[begin + 4 : at], "<u4").tolist()
    ends = list(accumulate(sizes, initial=at))
    if ends[-1] != len(cell):
        raise ValueError("its images do not fill it")
    return [one(cell[lo:hi]) if i == 0 else b"" for i, (lo, hi) in enumerate(zip(ends, ends[1:], strict=False))]


def _number(cell: bytes) -> float:
    return float(cell.decode("ascii"))


def _text(cell: bytes) -> str:
    return cell.decode("utf-8")


def _same(cell: bytes) -> bytes:
    return cell


# Encoding -> kind of value, and the function that reads it.
_DECODERS: dict[str, tuple[str, Callable[[bytes], Any]]] = {
    "str": ("text", _text),
    "str_int": ("text", _text),
    "str_decimal": ("text", _text),
    "str_float": ("number", _number),
    "json": ("texts", _json),
    "bytes": ("bytes", _same),
    "jpeg": ("bytes", _same),
    "png": ("bytes", _same),
    "pil": ("bytes", _pil),
    "list[jpeg]": ("list", partial(_several, _same, 4)),
    "list[png]": ("list", partial(_several, _same, 4)),
    "list[pil]": ("list", partial(_several, _pil, 4)),
    "jpeg_array": ("list", partial(_several, _same, 0)),
    "jpegarray": ("list", partial(_several, _same, 0)),
}
