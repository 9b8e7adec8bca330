"""Remote files: every request is tried again, with growing pauses, while the network or the server fails.

Denied access, missing files and damage are not tried again: they would fail in the same way.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeVar

from thresher.errors import MissingExtraError, MissingPackageError, PoolError, UnreachedError, UsageError
from thresher.io.open import meaning_of, trusting
from thresher.runtime import memory
from thresher.runtime.config import setting
from thresher.runtime.engine import windowed
from thresher.runtime.places import expanded

_T = TypeVar("_T")
_S = TypeVar("_S")
_REQUESTS = 64  # at once
_AHEAD = 2**30  # bytes of results that are read ahead
EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "hf": "hf"}  # what to install for a protocol


def file_system(location: str) -> tuple[Any, str]:
    """Return the fsspec file system of a location, and the path in it.

    A location without ``://`` is a local path, whatever its name contains; fsspec would take ``a::b`` for a chain and
    ``file:a`` for a URL.

    Raises:
        PoolError: The location is a chain of URLs, such as ``simplecache::s3://bucket/pool``.
        UsageError: fsspec does not know the protocol.
        MissingPackageError: The protocol needs a package that is not installed.
        UnreachedError: The file system was not reached.
    """
    import fsspec

    if "://" not in location:
        return fsspec.filesystem("file"), os.path.abspath(expanded(location))
    if "::" in location:
        inner = location.rpartition("::")[2]
        raise PoolError(f"{location}: chained URLs are not supported; give the location of the files, such as {inner}")
    fs, path = _created(location, lambda: fsspec.core.url_to_fs(location))
    return fs, str(path)


def _created(location: str, what: Callable[[], _T]) -> _T:
    """Call ``what``, which creates a file system: here a ValueError is an unknown protocol or an invalid address."""
    try:
        return what()
    except ImportError as error:
        if extra := EXTRAS.get(location.partition("://")[0]):
            raise MissingExtraError(location, extra) from error
        raise MissingPackageError(f"{location}: a package is missing ({error}); install it with pip") from error
    except ValueError as error:
        raise UsageError(f"{location}: cannot be opened ({error}); give a folder, a file or an address") from error
    except Exception as error:  # it may connect when it is created
        raise meaning_of(location, error) or error from error


def _of(protocol: str, path: str) -> Any:
    import fsspec

    return _created(path, lambda: fsspec.filesystem(protocol))


def requested(path: str, what: Callable[[], _T]) -> _T:
    """Call ``what``, which asks a remote file system, and call it again while the network or the server fails.

    Args:
        path: The file or location, for messages.
        what: The request.

    Raises:
        UnreachedError: It still fails after the number of tries of the setting ``network_tries``.
        AccessError: Access was denied.
        PoolError: There is no such file.
    """
    import tenacity

    return tenacity.Retrying(
        retry=tenacity.retry_if_exception(lambda error: type(error) is UnreachedError),  # not its subclass AccessError
        stop=tenacity.stop_after_attempt(setting("network_tries").value),
        wait=tenacity.wait_exponential(multiplier=0.5, max=30),  # 0.5, 1, 2, 4, ... seconds
        reraise=True,
    )(lambda: trusting(path, what))


def in_parallel(protocol: str, fn: Callable[[_S], _T], items: Iterable[_S]) -> Iterator[_T]:
    """Yield ``fn(item)`` for every item, in order; for remote files with several requests at the same time.

    Reading headers of many remote files waits for the network, and hardly needs a processor.
    """
    if protocol == "file":
        yield from map(fn, items)
        return
    with ThreadPoolExecutor(_REQUESTS) as threads:
        yield from windowed(threads, fn, items, 2 * _REQUESTS)


def read_ahead(fn: Callable[[_S], _T], items: Iterable[_S], size: int) -> Generator[_T, None, None]:
    """Yield ``fn(item)`` for every item, in order; several requests ahead of the caller, at the same time.

    Args:
        fn: Reads something.
        items: What is read.
        size: Bytes that a result takes: results that wait take up to 1 GiB, and an eighth of the free memory, unless
            two are larger.
    """
    window = max(min(_REQUESTS, min(_AHEAD, memory.available() // 8) // max(size, 1)), 2)
    with ThreadPoolExecutor(window) as threads:
        yield from windowed(threads, fn, items, window)


def forget_listings(protocol: str) -> None:
    """Forget the listings that a remote file system keeps: they have the sizes and versions of an earlier time."""
    if protocol != "file":
        _of(protocol, f"{protocol}://").invalidate_cache()


def info_of(protocol: str, path: str) -> dict[str, Any]:
    """Return what a file system knows about a file: its size and version."""
    return dict(requested(path, lambda: _of(protocol, path).info(path)))


def read_range(protocol: str, path: str, start: int, stop: int) -> bytes:
    """Return the bytes start..stop of a remote file, in one request for exactly these.

    Raises:
        UnreachedError: The file was not reached.
        AccessError: Access was denied.
        PoolError: There is no such file, or it is shorter.
    """

    def asked() -> bytes:
        data = bytes(_of(protocol, path).cat_file(path, start=start, end=stop)) if stop > start else b""
        if len(data) != stop - start:
            raise EOFError(f"{len(data):,} bytes where {stop - start:,} were expected")
        return data

    return requested(path, asked)


class RemoteFile(io.RawIOBase):
    """A remote file for reading. A request that fails is tried again with a newly opened file."""

    def __init__(self, protocol: str, path: str) -> None:
        """Open the file.

        Raises:
            UnreachedError: The file was not reached.
            AccessError: Access was denied.
            PoolError: There is no such file.
        """
        self._protocol, self._path = protocol, path
        self._file: Any = None
        self._at = 0
        requested(path, self._opened)

    def _opened(self) -> Any:
        if self._file is None:
            self._file = _of(self._protocol, self._path).open(self._path, "rb")
        return self._file

    def _call(self, what: Callable[[Any], _T]) -> _T:
        """Call ``what`` with the file at the current position; open the file again after an error."""

        def once() -> _T:
            try:
                file = self._opened()
                if file.tell() != self._at:
                    file.seek(self._at)
                return what(file)
            except Exception:
                self._drop()
                raise

        return requested(self._path, once)

    def _drop(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            with suppress(Exception):  # the connection may be lost
                file.close()

    def read(self, size: int = -1, /) -> bytes:
        """Return up to ``size`` bytes, all of them if it is negative; fewer only at the end of the file."""
        self._check()
        data = bytes(self._call(lambda file: file.read(size)))
        self._at += len(data)
        return data

    def readall(self) -> bytes:
        """Return the rest of the file."""
        return self.read()

    def readinto(self, buffer: Any, /) -> int:
        """Read into a buffer; return the number of bytes."""
        view = memoryview(buffer).cast("B")
        data = self.read(len(view))
        view[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """Move to a position; return it."""
        self._check()
        if whence == os.SEEK_SET:
            at = offset
        elif whence == os.SEEK_CUR:
            at = self._at + offset
        else:
            at = int(self._call(lambda file: file.seek(offset, whence)))
        if at < 0:
            raise ValueError(f"seek to {at}: a position is not negative")
        self._at = at
        return at

    def tell(self) -> int:
        """Return the position."""
        return self._at

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def close(self) -> None:
        """Close the file."""
        if not self.closed:
            self._drop()
        super().close()

    def _check(self) -> None:
        if self.closed:
            raise ValueError(f"{self._path}: is closed")
