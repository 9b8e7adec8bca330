"""Checksums at the end of files, and what an array in such a file must be.

A checksum shows damage that nothing else shows, such as a flipped bit. It is in the file itself, so that both are
replaced together, and at its end, so that a NumPy array can be memory-mapped as usual. It is a CRC-32: fast, and a file
that is still being written can be summed as it grows.
"""

from __future__ import annotations

import os
import struct
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any, Literal

import numpy as np
import numpy.typing as npt

from thresher.runtime.files import ELSEWHERE, sync, writing
from thresher.runtime.locks import keep_while, open_shared
from thresher.runtime.untrusted import read_npy_header

_MARK = b"\x89crc32\r\n"
_TRAILER = struct.Struct("<8sQI")  # mark, bytes before it, their CRC-32
_STRIPE = 1 << 20  # bytes read at a time


class CacheWarning(UserWarning):
    """A cache entry is damaged; its content is computed again."""


class DamagedError(ValueError):
    """A file does not have the checksum or the content that it should have."""


def report_damage(path: str | os.PathLike[str], why: object) -> None:
    """Warn that a cache entry is damaged and is computed again."""
    warnings.warn(f"cache entry {os.fspath(path)} is damaged ({why}); it is computed again", CacheWarning, stacklevel=3)


class Checksum:
    """The checksum of a file that is written or read piece by piece.

    Attributes:
        value: CRC-32 of the bytes so far.
        length: Number of bytes so far.
    """

    def __init__(self, value: int = 0, length: int = 0) -> None:
        """Start with no bytes, or continue."""
        self.value, self.length = value, length

    def update(self, data: bytes | memoryview) -> None:
        """Add bytes."""
        self.value = zlib.crc32(data, self.value)
        self.length += memoryview(data).nbytes

    def read(self, file: IO[bytes], length: int) -> None:
        """Add the next bytes of a file, as many of them as it has."""
        for stripe in stripes(file, length):
            self.update(stripe)

    def trailer(self) -> bytes:
        """Return what must follow the bytes in the file."""
        return _TRAILER.pack(_MARK, self.length, self.value)


def stripes(file: IO[bytes], length: int) -> Iterator[memoryview]:
    """Yield the next ``length`` bytes of a file, or as many as it has; each stripe is valid until the next one."""
    buffer = memoryview(bytearray(min(_STRIPE, max(length, 1))))
    while length:
        count = file.readinto(buffer[: min(len(buffer), length)])  # type: ignore[attr-defined]
        if not count:
            return
        yield buffer[:count]
        length -= count


def append_checksum(file: IO[bytes]) -> None:
    """Append the checksum of a file that is open for reading and writing, and wait until all of it is on disk."""
    file.flush()
    file.seek(0)
    sums = Checksum()
    sums.read(file, os.fstat(file.fileno()).st_size)
    file.seek(sums.length)
    file.write(sums.trailer())
    sync(file)


def check(file: IO[bytes]) -> int:
    """Read a file to its end and compare it with its checksum; return the number of bytes before the checksum.

    Raises:
        OSError: It cannot be read.
        DamagedError: It has no checksum, or another one.
    """
    length = os.fstat(file.fileno()).st_size - _TRAILER.size
    sums = Checksum()
    file.seek(0)
    sums.read(file, max(length, 0))
    if length < 0 or file.read(_TRAILER.size) != sums.trailer():
        raise DamagedError("its checksum is wrong")
    file.seek(0)
    return length


def write_checked(path: str | os.PathLike[str], data: bytes, hint: str = ELSEWHERE) -> None:
    """Write a small file with its checksum, atomically.

    Raises:
        OutputError: It cannot be written.
    """
    with writing(path, hint, cached=True) as scratch, open(scratch, "w+b") as file:
        file.write(data)
        append_checksum(file)


def read_checked(path: str | os.PathLike[str]) -> bytes | None:
    """Return what :func:`write_checked` wrote; None, with a warning if it is damaged, if it cannot be used."""
    try:
        with open_entry(path) as file:
            return file.read(check(file))
    except OSError:
        return None
    except DamagedError as error:
        report_damage(path, error)
        return None


def open_entry(path: str | os.PathLike[str]) -> IO[bytes]:
    """Open a file for reading, with a shared lock; a pipe or a device counts as missing.

    Raises:
        OSError: It is missing or cannot be read.
    """
    handle = open_shared(path) if os.path.isfile(path) else None
    if handle is None:
        raise FileNotFoundError(os.fspath(path))
    return open(path, "rb", opener=lambda *_: handle)


# --- arrays ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ArraySpec:
    """What an array must be: an array with another dtype, shape or range counts as damaged.

    Attributes:
        dtype: The dtype.
        shape: The shape, None for a dimension of any length; any shape by default.
        least: The smallest allowed number; any by default.
        most: The largest allowed number; any by default. With ``least`` or ``most``, NaN is not allowed.
    """

    dtype: str
    shape: tuple[int | None, ...] | None = None
    least: float | None = None
    most: float | None = None

    def check_header(self, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
        """Raise a DamagedError if an array has another dtype or shape."""
        if dtype != np.dtype(self.dtype):
            raise DamagedError(f"it contains {dtype}, not {self.dtype}")
        fits = self.shape is None or (
            len(shape) == len(self.shape) and all(b in (None, a) for a, b in zip(shape, self.shape, strict=True))
        )
        if not fits:
            raise DamagedError(f"its shape is {shape}, not {self.shape}")

    def check_values(self, array: npt.NDArray[Any]) -> None:
        """Raise a DamagedError if an array has a number outside the range."""
        if not array.size:
            return
        low = self.least is None or bool(array.min() >= self.least)  # false for NaN
        if not low or not (self.most is None or bool(array.max() <= self.most)):
            raise DamagedError(f"it has numbers that are not within {self.least} to {self.most}")


def mapped(file: IO[bytes], spec: ArraySpec | None = None, end: int | None = None) -> npt.NDArray[Any]:
    """Memory-map the array in a file for reading; the mapping keeps the lock of the file.

    Args:
        file: The file, at its start.
        spec: What the array must be.
        end: Where its data must end, in bytes.

    Raises:
        OSError: The file cannot be read.
        ValueError: It contains no array, or another one.
    """
    header = read_npy_header(file)
    begin = file.tell()
    if header.dtype.hasobject:
        raise DamagedError("it contains Python objects")
    if spec is not None:
        spec.check_header(header.dtype, header.shape)
    if end is not None and begin + header.bytes != end:
        raise DamagedError("its length is not that of its header")
    order: Literal["F", "C"] = "F" if header.fortran else "C"
    array: npt.NDArray[Any] = np.memmap(file, header.dtype, "r", begin, header.shape, order)
    keep_while(getattr(array, "_mmap"), file.name, file.fileno())  # noqa: B009 - the mapping, which views keep too
    if spec is not None:
        spec.check_values(array)
    return array
