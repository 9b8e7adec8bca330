"""Files made by others, read without trust: what they are, how large they are, and every value that is used.

Nothing here waits for a pipe, reads a device, unpickles, or allocates memory because a file says so.
"""

from __future__ import annotations

import ast
import errno
import io
import json
import math
import os
import re
import stat
import sys
import tomllib
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO, Any, Literal

import numpy as np
import numpy.typing as npt

from thresher.errors import PoolError
from thresher.runtime.places import RemotePath

Array = npt.NDArray[Any]
Location = str | os.PathLike[str]

SIGNED = ("int8", "int16", "int32", "int64")
INTEGERS = (*SIGNED, "uint8", "uint16", "uint32")
FLOATS = ("float16", "float32", "float64")
TEXT = "text"  # a NumPy array of text

_TOML_BYTES = 2**20
_JSON_BYTES = 64 * 2**20
_JSON_VALUES = 4_000_000  # about 400 MB of Python objects
_JSON_DEPTH = 500  # of a union of a hundred unions; Python's own limit is 1,000
_HIGHEST = sys.float_info.max
_HEADER = 10_000  # characters of a .npy header, as in NumPy
_TEXT_BYTES = 2**20  # of one item in an array of text
_DTYPE = re.compile(r"[<>|=]?[a-zA-Z]\d{0,9}")
_LONG = re.compile(r"(?<=\d)L\b")  # integers as Python 2 wrote them
_BLOCK = 2**17  # items checked at a time, so that they stay in the CPU cache
_NO_TRUST = (
    ValueError,
    TypeError,
    SyntaxError,
    OverflowError,
    RecursionError,
    MemoryError,
    AttributeError,
)  # fmt: skip - raised by ast.literal_eval and np.dtype for text that is none


def open_regular(path: Location) -> io.BufferedReader:
    """Open a regular file for reading. A pipe or a device is refused at once, so that nothing waits for it.

    Raises:
        OSError: The file cannot be opened, or is not a regular file.
    """
    _refuse_special(os.stat(path), path)
    flags = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
    file = os.open(path, os.O_RDONLY | flags)
    try:
        _refuse_special(os.fstat(file), path)  # it may have been replaced
        return os.fdopen(file, "rb")
    except BaseException:
        os.close(file)
        raise


def _refuse_special(status: os.stat_result, path: Location) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, "is a folder, not a file", os.fspath(path))
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "is a pipe or a device, not a regular file", os.fspath(path))


# --- JSON -----------------------------------------------------------------------------------------


def parse_json(content: str | bytes | bytearray) -> Any:
    """Parse JSON of any origin; NaN and infinities are allowed, as many tools write them.

    Raises:
        ValueError: It is not valid JSON, is nested too deeply, or has an integer of thousands of digits.
    """
    try:
        return json.loads(content.removeprefix("\ufeff") if isinstance(content, str) else content)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise
    except ValueError:
        raise ValueError("it has an integer of too many digits") from None


def load_json(file: IO[bytes], most: int = _JSON_BYTES) -> Any:
    """Parse the JSON in an open file of any origin, as :func:`parse_json` does, if it has at most ``most`` bytes.

    Raises:
        ValueError: It is larger, or not valid.
    """
    return parse_json(_read(file, most))


def parse_toml(text: str) -> dict[str, Any]:
    """Parse TOML of any origin.

    Raises:
        ValueError: It is not valid TOML, is nested too deeply, or has an integer of thousands of digits.
    """
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError("its values are nested too deeply") from None
    except tomllib.TOMLDecodeError:
        raise
    except ValueError:
        raise ValueError("an integer has too many digits") from None


def toml_text(file: IO[bytes]) -> str:
    """Read the text of a TOML file.

    Raises:
        OSError: It cannot be read.
        ValueError: It has more than a megabyte, or is not UTF-8.
    """
    try:
        return _read(file, _TOML_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 at byte {error.start:,}; save it as UTF-8") from None


def _read(file: IO[bytes], most: int) -> bytes:
    data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"it has more than {most:,} bytes")
    return data


def _small_remote(path: RemotePath, most: int) -> IO[bytes]:
    """Return a remote file as an open one in memory, empty if it is larger than any that is read.

    Raises:
        OSError: There is no such file.
    """
    return io.BytesIO(path.read_bytes() if path.stat().st_size <= most else b" " * (most + 1))


def read_json(path: Location | RemotePath, most: int = _JSON_BYTES, values: int = _JSON_VALUES) -> Any:
    """Read a JSON file that thresher wrote, or that claims so: all its numbers are finite, and its size is bounded.

    Args:
        path: The file.
        most: Maximum size in bytes.
        values: Maximum number of values.

    Raises:
        OSError: It cannot be read, or is not a regular file.
        ValueError: It is not such a file.
    """
    opened = _small_remote(path, most) if isinstance(path, RemotePath) else open_regular(path)
    with opened as file:
        data = _read(file, most)
    if data.count(b",") + data.count(b"[") + data.count(b"{") > values:
        raise ValueError(f"it has more than {values:,} values")
    value = parse_json(data.decode("utf-8-sig"))
    _check_values(value)
    return value


def _check_values(value: Any) -> None:
    """Refuse numbers that are not finite, and values that are nested too deeply to be written again."""
    level, depth = [value], 0
    while level:
        if depth > _JSON_DEPTH:
            raise ValueError("it is nested too deeply")
        inner: list[Any] = []
        for each in level:
            if isinstance(each, dict):
                inner += each.values()
            elif isinstance(each, list):
                inner += each
            elif isinstance(each, float) and not math.isfinite(each):
                raise ValueError(f"it has the number {each}, which is not finite")
        level, depth = inner, depth + 1


class Fields:
    """The fields of a JSON object made by others; each is checked when it is read.

    All methods raise a PoolError that names the file, the field, its value and what is allowed.
    """

    def __init__(self, value: Any, where: str) -> None:
        """Check that ``value`` is an object.

        Args:
            value: The parsed value.
            where: What to call it in messages: the path of the file, and the place in it.
        """
        if not isinstance(value, dict):
            raise PoolError(f"{where}: is {_shown(value)}, but must be an object; it may be damaged")
        self.values: dict[str, Any] = value
        self.where = where

    def refuse_others(self, names: Sequence[str]) -> None:
        """Refuse a field with another name."""
        for name in self.values:
            if name not in names:
                raise PoolError(f"{self.where}: has an unknown field {_shown(name)}; it may be damaged")

    def text(self, name: str, *, empty: bool = True) -> str:
        """Return a text, without a NUL character, which no path or name has."""
        value = self._of(name)
        if not isinstance(value, str) or "\0" in value or not (value or empty):
            raise self.wrong(name, "text")
        return value

    def flag(self, name: str) -> bool:
        """Return true or false."""
        value = self._of(name)
        if not isinstance(value, bool):
            raise self.wrong(name, "true or false")
        return value

    def whole(self, name: str, low: int = 0, high: int = 2**62) -> int:
        """Return an integer from ``low`` to ``high``."""
        value = self._of(name)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise self.wrong(name, f"a whole number from {low:,} to {high:,}")
        return value

    def number(self, name: str, low: float = -math.inf, high: float = math.inf) -> float | None:
        """Return a finite number from ``low`` to ``high``, None for null or if the field is missing."""
        value = self.values.get(name)
        if value is None:
            return None
        if not _is_number(value) or not low <= value <= high:
            limits = "" if math.isinf(low) else f" from {low:,} to {high:,}" if high < math.inf else f" from {low:,}"
            raise self.wrong(name, f"a number{limits} or null")
        return float(value)

    def numbers(self, name: str, most: int) -> list[float]:
        """Return a list of at most ``most`` finite numbers."""
        value = self._of(name)
        if not isinstance(value, list) or len(value) > most or not all(map(_is_number, value)):
            raise self.wrong(name, f"a list of at most {most:,} numbers")
        return [float(each) for each in value]

    def texts(self, name: str) -> tuple[str, ...]:
        """Return a list of texts."""
        value = self._of(name)
        if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
            raise self.wrong(name, "a list of texts")
        return tuple(value)

    def object(self, name: str) -> Fields:
        """Return an object."""
        return Fields(self._of(name), f"{self.where}: {name}")

    def objects(self, name: str, most: int) -> list[Fields]:
        """Return a list of at most ``most`` objects."""
        value = self._of(name)
        if not isinstance(value, list) or len(value) > most:
            raise self.wrong(name, f"a list of at most {most:,} objects")
        return [Fields(each, f"{self.where}: {name}[{i}]") for i, each in enumerate(value)]

    def lists(self, name: str, most: int) -> list[list[Fields]]:
        """Return a list of at most ``most`` lists of objects."""
        value = self._of(name)
        if not isinstance(value, list) or len(value) > most or not all(isinstance(each, list) for each in value):
            raise self.wrong(name, f"a list of at most {most:,} lists")
        return [
            [Fields(each, f"{self.where}: {name}[{i}][{j}]") for j, each in enumerate(inner)]
            for i, inner in enumerate(value)
        ]

    def wrong(self, name: str, allowed: str) -> PoolError:
        """Return the error for a field that is not what is allowed."""
        return PoolError(
            f"{self.where}: {name} is {_shown(self.values.get(name))}, but must be {allowed}; it may be damaged"
        )

    def _of(self, name: str) -> Any:
        if name not in self.values:
            raise PoolError(f"{self.where}: {name} is missing; it may be damaged")
        return self.values[name]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= _HIGHEST


def _shown(value: Any) -> str:
    """Return a value as JSON would show it, cut to a few words."""
    if isinstance(value, (list, dict)):
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value):,}"
    if isinstance(value, int) and abs(value) >= 10**30:
        return "an integer of more than 30 digits"
    text = repr(value) if isinstance(value, str) else json.dumps(value)
    return cut(text)


def cut(text: str, most: int = 60) -> str:
    """Return a text of others for a message, cut to ``most`` characters."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


# --- arrays ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NpyHeader:
    """What the header of a .npy file says about the array after it."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran: bool

    @property
    def bytes(self) -> int:
        """Size of the array."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_npy_header(file: IO[bytes]) -> NpyHeader:
    """Read the header of a .npy file, and leave ``file`` where the array begins; evaluates literals only.

    Raises:
        ValueError: It is not the header of an array of numbers or text; the message says why.
        EOFError: The file ends before the header does.
    """
    magic = _exactly(file, 6)
    if magic != b"\x93NUMPY":
        raise ValueError("it is not a .npy file")
    version = tuple(_exactly(file, 2))
    if version not in ((1, 0), (2, 0), (3, 0)):
        raise ValueError(f"it has the unknown .npy version {version[0]}.{version[1]}")
    length = int.from_bytes(_exactly(file, 2 if version == (1, 0) else 4), "little")
    if length > _HEADER:
        raise ValueError(f"its header has {length:,} bytes, more than {_HEADER:,}")
    text = _exactly(file, length).decode("utf-8" if version == (3, 0) else "latin-1")
    header = _literal(_LONG.sub("", text.strip()))
    if header is None:
        raise ValueError("its header is not a dictionary of literals")
    if not isinstance(header, dict) or header.keys() != {"descr", "fortran_order", "shape"}:
        raise ValueError("its header does not have exactly the fields descr, fortran_order and shape")
    shape, fortran = header["shape"], header["fortran_order"]
    if not isinstance(shape, tuple) or not all(type(side) is int and side >= 0 for side in shape) or len(shape) > 32:
        raise ValueError(f"its header has shape {cut(str(shape))}")
    if not isinstance(fortran, bool):
        raise ValueError("its header does not say whether it is in Fortran order")
    found = NpyHeader(shape, _dtype(header["descr"]), fortran)
    if found.bytes >= 2**63 or math.prod(side or 1 for side in shape) >= 2**63:
        raise ValueError(f"its header has shape {cut(str(shape))}, which fits no file")
    return found


def _literal(text: str) -> Any:
    """Return the value of a Python literal, None if it is not one. Deep nesting is a MemoryError for the parser."""
    try:
        return ast.literal_eval(text)
    except _NO_TRUST:
        return None


def _dtype(descr: Any) -> np.dtype[Any]:
    """Return the type of a header, also a record of plain types."""
    parts = descr if isinstance(descr, list) else [("", descr)]
    try:
        if not all(len(part) == 2 and _DTYPE.fullmatch(part[1]) for part in parts):
            raise ValueError
        dtype: np.dtype[Any] = np.dtype(descr)
        return dtype
    except _NO_TRUST:
        raise ValueError(f"its header has the unknown type {cut(str(descr))}") from None


def _exactly(file: IO[bytes], size: int) -> bytes:
    try:
        return read_exactly(file, size)
    except EOFError:
        raise EOFError("it ends within its header") from None


def read_exactly(file: IO[bytes], size: int) -> bytes:
    """Read ``size`` bytes of a file, which may return fewer at a time; raises an EOFError if it has fewer."""
    data = file.read(size)
    while len(data) < size:
        more = file.read(size - len(data))
        if not more:
            raise EOFError(f"ends {size - len(data):,} bytes early")
        data += more
    return data


def mapped_array(
    path: Location,
    dtypes: Sequence[str],
    shape: Sequence[int | None],
    low: int | None = None,
    high: int | None = None,
    *,
    name: str = "",
) -> Array:
    """Return the array of a .npy file, memory-mapped, after all checks of :func:`check_array`.

    Args:
        path: The file.
        dtypes: Names of the allowed types; see :func:`check_array`.
        shape: The allowed shape; None for any length.
        low: Lowest allowed value of an integer array.
        high: Highest allowed value of an integer array.
        name: What to call the file in messages, by default its path.

    Raises:
        FileNotFoundError: There is no such file.
        NotADirectoryError: Its folder is a file.
        PoolError: The file cannot be read, or contains something else; the message says what.
    """
    name = name or os.fspath(path)
    try:
        with open_regular(path) as file:
            header = read_npy_header(file)
            _check_type(name, header.dtype, header.shape, dtypes, shape)
            begin = file.tell()
            here = os.fstat(file.fileno()).st_size - begin
            if here < header.bytes:
                raise ValueError(f"it is truncated: {here:,} bytes of data where {header.bytes:,} are needed")
            array: Array = np.empty(header.shape if not header.bytes else 0, header.dtype)
            if header.bytes:
                order: Literal["C", "F"] = "F" if header.fortran else "C"
                array = np.memmap(file, header.dtype, "r", begin, header.shape, order)
    except (FileNotFoundError, NotADirectoryError):
        raise
    except (OSError, ValueError, EOFError) as error:
        raise PoolError(f"{name}: cannot be read, it may be damaged ({_said(error)})") from None
    _check_range(name, array, low, high)
    return array


def check_array(
    array: Array,
    name: str,
    dtypes: Sequence[str],
    shape: Sequence[int | None],
    low: int | None = None,
    high: int | None = None,
) -> Array:
    """Return an array after checking its type, its shape and its range.

    Args:
        array: The array, also memory-mapped: it is read once, some of it at a time.
        name: What to call it in messages.
        dtypes: Names of NumPy types, in any byte order, "uint64,uint64" for records, or :data:`TEXT`.
        shape: The allowed shape; None for any length.
        low: Lowest allowed value of an integer array.
        high: Highest allowed value of an integer array.

    Raises:
        PoolError: It is another array; the message says what it is and what is allowed.
    """
    _check_type(name, array.dtype, array.shape, dtypes, shape)
    _check_range(name, array, low, high)
    return array


def _check_type(
    name: str, dtype: np.dtype[Any], shape: tuple[int, ...], dtypes: Sequence[str], wanted: Sequence[int | None]
) -> None:
    kind = dtype.name if dtype.names is None else ",".join(dtype[name].name for name in dtype.names)
    kind = TEXT if dtype.kind == "U" and dtype.itemsize <= _TEXT_BYTES else kind
    fits = len(shape) == len(wanted) and all(side in (None, here) for side, here in zip(wanted, shape, strict=True))
    if kind not in dtypes or not fits:
        sides = ", ".join("any" if side is None else f"{side:,}" for side in wanted)
        raise PoolError(
            f"{name}: is {cut(str(dtype))} of shape {cut(str(shape))}, but must be {' or '.join(dtypes)} "
            f"of shape ({sides}{',' if len(wanted) == 1 else ''}); it may be damaged"
        )


def _check_range(name: str, array: Array, low: int | None, high: int | None) -> None:
    if array.dtype.kind == "U":
        array, low, high = array.reshape(-1, 1).view(array.dtype.str[0] + "u4"), 0, 0x10FFFF
    if low is None or high is None or not array.size:
        return
    flat = array.reshape(-1, order="A")
    parts = [flat[lo : lo + _BLOCK] for lo in range(0, len(flat), _BLOCK)]
    least, most = min(int(part.min()) for part in parts), max(int(part.max()) for part in parts)
    if least < low or most > high:
        raise PoolError(
            f"{name}: has values from {least:,} to {most:,}, but they must be from {low:,} to {high:,}; "
            "it may be damaged"
        )


def read_npz(path: Location, most: int | None = None) -> dict[str, Array]:
    """Return the arrays of an .npz file that thresher wrote with ``np.savez``, in memory; see :func:`load_npz`.

    Args:
        path: The file.
        most: Maximum size of all arrays in bytes.

    Raises:
        OSError: It cannot be read, or is not a regular file.
        ValueError: It is not such a file.
    """
    with open_regular(path) as raw:
        return load_npz(raw, most)


def load_npz(raw: IO[bytes], most: int | None = None) -> dict[str, Array]:
    """Return the arrays of an open .npz file that thresher wrote with ``np.savez``, in memory.

    Compressed arrays are refused, so a small file cannot unfold to a large array. Checksums are verified.

    Raises:
        OSError: It cannot be read.
        ValueError: It is not such a file, or has more than ``most`` bytes.
    """
    size = os.fstat(raw.fileno()).st_size
    if most is not None and size > most + 2**20:
        raise ValueError(f"it has {size:,} bytes, more than its rows can take")
    try:
        with zipfile.ZipFile(raw) as archive:
            return _members(archive, size)
    except (zipfile.BadZipFile, EOFError, RuntimeError, NotImplementedError, zlib.error, OverflowError) as error:
        raise ValueError(_said(error)) from None


def _members(archive: zipfile.ZipFile, size: int) -> dict[str, Array]:
    arrays: dict[str, Array] = {}
    for info in archive.infolist():
        name = info.filename.removesuffix(".npy")
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or name in arrays:
            raise ValueError(f"its member {_shown(name)} is compressed, encrypted or there twice")
        file: Any = archive.open(info)
        with file:
            header = read_npy_header(file)
            if header.dtype.hasobject or header.dtype.names is not None:
                raise ValueError(f"its array {_shown(name)} is of type {cut(str(header.dtype))}")
            size -= header.bytes
            if size < 0 or info.file_size - file.tell() != header.bytes:
                raise ValueError(f"its array {_shown(name)} does not have the length that its header says")
            flat = np.empty(header.bytes, np.uint8)
            view, done = flat.data, 0
            while done < len(view) and (count := file.readinto(view[done:])):
                done += count
            if done < len(view) or file.read(1):  # at its end, the checksum is verified
                raise ValueError(f"its array {_shown(name)} is truncated")
        arrays[name] = flat.view(header.dtype).reshape(header.shape, order="F" if header.fortran else "C")
    return arrays


def _said(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(text).split())
