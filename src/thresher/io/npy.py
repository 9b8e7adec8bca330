"""Arrays in .npy and .npz files. Opening reads only headers; nothing is unpickled."""

from __future__ import annotations

import io
import math
import os
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import IO

import numpy as np
import numpy.typing as npt

from thresher.errors import PoolError
from thresher.io.open import meaning_of, open_file, trusting
from thresher.io.paths import is_unsafe
from thresher.io.pieces import DIMENSIONS, FLOATS, Array, Piece, stored_dtype
from thresher.runtime.format import counted
from thresher.runtime.untrusted import TEXT, cut, mapped_array, open_regular, read_exactly, read_npy_header

_MAGIC = b"\x93NUMPY"
_MEMBER = b"PK\x03\x04"
_DEFLATED = 1032  # bytes that one byte of a compressed member can unfold to
_BATCH = 8192  # rows decompressed at a time to find scattered rows
_PART = 32 * 2**20  # and their bytes, at most; one row may take more
_GAP = 128 * 2**10  # bytes that are read and not needed, rather than asking a remote file once more
_SPAN = 64 * 2**20  # bytes of a remote file read at once to get scattered rows, at most; one row may take more


@dataclass(frozen=True)
class NpyPiece:
    """Rows of an uncompressed array: a .npy file, or an uncompressed member of an .npz file."""

    path: str
    rows: int
    dim: int
    dtype: str
    offset: int
    protocol: str = "file"
    array: str = ""

    @property
    def seekable(self) -> bool:
        """True: the offset of every row is known."""
        return True

    @property
    def mapped(self) -> bool:
        """Whether reading scattered rows is cheap (local files)."""
        return self.protocol == "file"

    def read(self, start: int, stop: int) -> Array:
        """Return rows start..stop."""
        stored = stored_dtype(self.dtype)
        width = self.dim * stored.itemsize
        if self.mapped:
            return np.asarray(self._map()[start:stop])
        from thresher.io.remote import read_range

        data = read_range(self.protocol, self.path, self.offset + start * width, self.offset + stop * width)
        return np.frombuffer(data, stored).reshape(stop - start, self.dim)

    def take(self, rows: npt.NDArray[np.int64]) -> Array:
        """Return scattered rows; from a remote file, read the spans that contain them, several at the same time."""
        if self.mapped:
            return np.asarray(self._map()[rows])
        if not len(rows):
            return self.read(0, 0)
        from thresher.io.remote import read_ahead

        stored = stored_dtype(self.dtype)
        out = np.empty((len(rows), self.dim), stored)
        width = self.dim * stored.itemsize
        near = np.diff(rows) <= max(_GAP // width, 1)
        same = np.diff((rows - rows[0]) // max(_SPAN // width, 1)) == 0
        ends = [*(np.flatnonzero(~(near & same)) + 1).tolist(), len(rows)]
        spans = list(zip([0, *ends[:-1]], ends, strict=True))
        largest = max(int(rows[hi - 1] - rows[lo]) + 1 for lo, hi in spans) * width

        def read(span: tuple[int, int]) -> Array:
            lo, hi = span
            return np.asarray(self.read(int(rows[lo]), int(rows[hi - 1]) + 1)[rows[lo:hi] - rows[lo]])

        for (lo, hi), part in zip(spans, read_ahead(read, spans, largest), strict=True):
            out[lo:hi] = part
        return out

    def stream(self, batch: int) -> Iterator[Array]:
        """Yield all rows in order."""
        for start in range(0, self.rows, batch):
            yield self.read(start, min(start + batch, self.rows))

    def _map(self) -> Array:
        try:
            return np.memmap(
                self.path, stored_dtype(self.dtype), mode="r", offset=self.offset, shape=(self.rows, self.dim)
            )
        except OSError as error:
            raise meaning_of(self.path, error) or error from error
        except ValueError as error:  # it is shorter than its header says
            raise PoolError(f"{self.path}: can no longer be read ({error}); was it replaced?") from None


def npy_piece(protocol: str, path: str, dtype: str | None = None) -> NpyPiece:
    """Read a .npy header.

    Raises:
        PoolError: The array is not two-dimensional, not floats, pickled, Fortran-ordered, or truncated.
    """

    def read() -> NpyPiece:
        with open_file(protocol, path) as file:
            size = file.seek(0, io.SEEK_END)
            file.seek(0)
            return _npy_header(file, path, path, size, dtype, protocol, base=0)

    return trusting(path, read)


def _npy_header(
    file: IO[bytes], path: str, name: str, size: int, dtype: str | None, protocol: str, base: int, array: str = ""
) -> NpyPiece:
    """Read a header from ``file``, in which the array and its header take ``size`` bytes."""
    shape, kind = _header(file, name, dtype)
    begin = file.tell()
    need = shape[0] * shape[1] * stored_dtype(kind).itemsize
    if size - begin < need:
        raise PoolError(
            f"{name}: {counted(size - begin, 'byte')} of data where {shape[0]:,} x {shape[1]} {kind} need {need:,}; "
            "it is truncated: copy or create it again"
        )
    if size - begin > need:
        _refuse_another(file, name, begin + need)
    return NpyPiece(path, shape[0], shape[1], kind, base + begin, protocol, array)


def _refuse_another(file: IO[bytes], name: str, end: int) -> None:
    """Raise if an array begins where this one ends, as in a file to which np.save has written twice."""
    file.seek(end)
    if file.read(len(_MAGIC)) == _MAGIC:
        raise PoolError(
            f"{name}: another array begins at byte {end:,}, after the end of the first, and is not read; save one "
            "array per file"
        )


def _header(file: IO[bytes], name: str, dtype: str | None) -> tuple[tuple[int, int], str]:
    """Parse a .npy header; never unpickles."""
    try:
        header = read_npy_header(file)
    except (ValueError, EOFError) as error:
        raise PoolError(f"{name}: cannot be read ({error}); save the array again with np.save") from None
    shape, stored = header.shape, header.dtype
    if stored.hasobject:
        raise PoolError(f"{name}: contains pickled Python objects, which are never read; save a float array")
    if len(shape) != 2 or shape[1] < 1:
        raise PoolError(f"{name}: has shape {shape}; save embeddings as (rows, dimensions)")
    if shape[1] > DIMENSIONS:
        raise PoolError(f"{name}: has {shape[1]:,} dimensions; embeddings have at most {DIMENSIONS:,}")
    if header.fortran and shape[0] > 1 and shape[1] > 1:
        raise PoolError(f"{name}: is in Fortran order; save it with np.save(path, np.ascontiguousarray(array))")
    if stored.byteorder == ">":
        native = stored.newbyteorder("<").str
        raise PoolError(
            f"{name}: is big-endian {stored}; save it little-endian: np.save(path, array.astype({native!r}))"
        )
    # ml_dtypes saves bfloat16 as two opaque bytes; uint16 needs a hint in the file name or an option.
    marked = dtype == "bfloat16" or any(mark in os.path.basename(name).lower() for mark in ("bf16", "bfloat16"))
    if stored.str in ("|V2", "<V2") or (stored == np.uint16 and marked):
        return (int(shape[0]), int(shape[1])), "bfloat16"
    if stored.name not in FLOATS:
        hint = "; for bfloat16 bits pass --dtype bfloat16 or name the file *bf16*" if stored == np.uint16 else ""
        raise PoolError(f"{name}: contains {stored.name}; embeddings are float16, float32, float64 or bfloat16{hint}")
    return (int(shape[0]), int(shape[1])), stored.name


def npy_keys(path: str) -> Array:
    """Return the keys in a .npy file, memory-mapped: (M,) of text, of bytes, or of u8,u8 as in DataComp's subset files.

    Raises:
        PoolError: The file is damaged, or contains something else; the message says what to save instead.
    """
    save = "save keys as text: np.save(path, np.array(keys, dtype=str))"
    try:
        with open_regular(path) as file:
            header = read_npy_header(file)
            stored = header.dtype
            end = file.tell() + math.prod(header.shape) * stored.itemsize
            if end < os.fstat(file.fileno()).st_size:
                _refuse_another(file, path, end)
    except (OSError, ValueError, EOFError) as error:
        raise PoolError(f"{path}: cannot be read as keys ({error}); {save}") from None
    if stored.hasobject:
        raise PoolError(f"{path}: contains pickled Python objects, which are never read; {save}")
    kind = TEXT if stored.kind == "U" else stored.name if stored.kind == "S" else "uint64,uint64"
    is_pair = stored.names is not None and [stored[name].str[1:] for name in stored.names] == ["u8", "u8"]
    if len(header.shape) != 1 or not (stored.kind in "US" or is_pair):
        numbers = "; row numbers and masks are not keys" if stored.kind in "iub" else ""
        raise PoolError(
            f"{path}: contains {cut(str(stored))} of shape {cut(str(header.shape))}, but keys are (rows,) of text, or "
            f"of u8,u8 as in a subset file of DataComp{numbers}; {save}, or give the selection folder"
        )
    return mapped_array(path, (kind,), (None,))


@dataclass(frozen=True)
class DeflatedPiece:
    """Rows of a compressed member of an .npz file, which can only be streamed."""

    path: str
    array: str
    rows: int
    dim: int
    dtype: str
    protocol: str = "file"

    seekable = False
    mapped = False

    def read(self, start: int, stop: int) -> Array:
        """Return rows start..stop by streaming the whole piece."""
        return self.take(np.arange(start, stop))

    def take(self, rows: npt.NDArray[np.int64]) -> Array:
        """Return scattered rows by streaming the whole piece: the checksum is verified at its end."""
        out = np.empty((len(rows), self.dim), stored_dtype(self.dtype))
        start = 0
        for part in self.stream(_BATCH):
            lo, hi = np.searchsorted(rows, [start, start + len(part)])
            out[lo:hi] = part[rows[lo:hi] - start]
            start += len(part)
        return out

    def stream(self, batch: int) -> Iterator[Array]:
        """Yield all rows in order while decompressing; the last ones only after the checksum is verified.

        A part has at most ``batch`` rows, and fewer if they take many bytes: a small file can unfold to long rows.
        """
        stored = stored_dtype(self.dtype)
        batch = max(min(batch, _PART // (self.dim * stored.itemsize)), 1)
        with open_file(self.protocol, self.path) as raw, trusting(self.path, lambda: zipfile.ZipFile(raw)) as archive:
            with trusting(self.path, lambda: archive.open(f"{self.array}.npy")) as file:
                trusting(self.path, lambda: _header(file, f"{self.path} [{self.array}]", self.dtype))
                for start in range(0, self.rows, batch):
                    want = (min(start + batch, self.rows) - start) * self.dim * stored.itemsize
                    data = trusting(self.path, partial(read_exactly, file, want))
                    yield np.frombuffer(data, stored).reshape(-1, self.dim)


def npz_pieces(protocol: str, path: str, dtype: str | None = None) -> dict[str, Piece]:
    """Read the headers of all two-dimensional arrays of an .npz file, by member name without ``.npy``.

    Raises:
        PoolError: The file is truncated, or a member is pickled, too short for its header, or has an unsafe name.
    """

    def read() -> dict[str, Piece]:
        pieces: dict[str, Piece] = {}
        with open_file(protocol, path) as raw, zipfile.ZipFile(raw) as archive:
            before = min((info.header_offset for info in archive.infolist()), default=0)
            if before > 0 and raw.seek(before) and raw.read(len(_MEMBER)) == _MEMBER:
                raise PoolError(
                    f"{path}: its arrays begin at byte {before:,}, and what comes before them is not read; if it is "
                    "several files in one, separate them"
                )
            for info in archive.infolist():
                if is_unsafe(info.filename) or "/" in info.filename:
                    raise PoolError(f"{path}: has a member named {info.filename!r}; refused, it is not a plain name")
                if not info.filename.endswith(".npy"):
                    continue
                name = info.filename[:-4]
                label = f"{path} [{name}]"
                if name in pieces:
                    raise PoolError(f"{path}: has two arrays named {name!r}; save it again with np.savez")
                if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or info.flag_bits & 1:
                    raise PoolError(
                        f"{label}: is encrypted or compressed in a way that NumPy does not write; save it again with "
                        "np.savez_compressed"
                    )
                if info.file_size > _DEFLATED * (info.compress_size + 1):
                    raise PoolError(f"{label}: does not have the length that its header says")
                with archive.open(info) as file:
                    if info.compress_type != zipfile.ZIP_STORED:
                        shape, kind = _header(file, label, dtype)
                        need = shape[0] * shape[1] * stored_dtype(kind).itemsize
                        if info.file_size - file.tell() != need:
                            raise PoolError(f"{label}: does not have the length that its header says")
                        pieces[name] = DeflatedPiece(path, name, *shape, kind, protocol)
                        continue
                    # The data of an uncompressed member follows its local header, whose length varies.
                    raw.seek(info.header_offset + 26)
                    lengths = raw.read(4)
                    begin = info.header_offset + 30 + int.from_bytes(lengths[:2], "little")
                    begin += int.from_bytes(lengths[2:], "little")
                    raw.seek(0, io.SEEK_END)
                    if begin + info.file_size > raw.tell():
                        raise PoolError(f"{label}: is truncated; copy or create it again")
                    pieces[name] = _npy_header(file, path, label, info.file_size, dtype, protocol, begin, name)
        return pieces

    return trusting(path, read)
