"""Reading some spans of a remote file: several requests at the same time, for little more than these bytes.

File systems for object storage read ahead, up to 50 MB at a time, which is right for a file that is read from its
beginning to its end, and reads a whole file for a few samples of it.
"""

from __future__ import annotations

import io
import os
from collections import deque
from collections.abc import Sequence
from typing import IO, Any

from thresher.io.open import open_file
from thresher.io.remote import info_of, read_ahead, read_range

_NEAR = 128 << 10  # bytes between two spans up to which they are one request
_MOST = 8 << 20  # bytes of a request, unless a span is larger
_LEAST = 4096  # bytes of a request for something that is in no span
_DENSE = 4  # a file of which at least one in so many bytes is needed is read as usual

Span = tuple[int, int]  # first byte, and the one after the last


def open_spans(protocol: str, path: str, spans: Sequence[Span]) -> IO[bytes]:
    """Open a local or remote file of which little more than some spans is read.

    Args:
        protocol: Protocol of its file system.
        path: The file.
        spans: What is read, in the order in which it is read. Other bytes can be read too, each with a request.

    Raises:
        PoolError, UnreachedError, AccessError: As in :func:`thresher.io.open.open_file`.
    """
    needed = sum(stop - start for start, stop in spans)
    if protocol == "file" or spans and needed * _DENSE >= max(stop for _, stop in spans) - min(spans)[0] > _MOST:
        return open_file(protocol, path)
    if (size := size_of(protocol, path)) is None:
        return open_file(protocol, path)
    return io.BufferedReader(SpanFile(protocol, path, size, spans), _LEAST)


def size_of(protocol: str, path: str) -> int | None:
    """Return the size of a remote file, None if its server does not say, as some do not for ``https://``.

    Raises:
        PoolError, UnreachedError, AccessError: As in :func:`thresher.io.open.open_file`.
    """
    size = info_of(protocol, path).get("size")
    return size if isinstance(size, int) else None


def joined(spans: Sequence[Span]) -> list[Span]:
    """Return spans with those joined that follow closely, so that a request is worth its time."""
    found: list[Span] = []
    for start, stop in spans:
        if found and 0 <= start - found[-1][0] and start - found[-1][1] <= _NEAR and stop - found[-1][0] <= _MOST:
            found[-1] = found[-1][0], max(stop, found[-1][1])
        else:
            found.append((start, stop))
    return found


class SpanFile(io.RawIOBase):
    """A remote file for reading, see :func:`open_spans`."""

    def __init__(self, protocol: str, path: str, size: int, spans: Sequence[Span]) -> None:
        """Read nothing yet: spans are read when they are needed. ``size`` is that of the file."""
        self._protocol, self._path, self._size = protocol, path, size
        within = [(start, min(stop, self._size)) for start, stop in joined(spans) if start < self._size]
        self._left = deque(within)
        self._ahead = read_ahead(self._request, within, max((stop - start for start, stop in within), default=1))
        self._at, self._start, self._held = 0, 0, b""

    def _request(self, span: Span) -> bytes:
        return read_range(self._protocol, self._path, *span)

    def readinto(self, buffer: Any, /) -> int:
        """Read into a buffer; return the number of bytes, which may be fewer than there are."""
        view = memoryview(buffer).cast("B")
        much = min(len(view), self._size - self._at)
        if much <= 0:
            return 0
        if not self._start <= self._at < self._start + len(self._held):
            self._load(much)
        part = self._held[self._at - self._start :][:much]
        view[: len(part)] = part
        self._at += len(part)
        return len(part)

    def _load(self, much: int) -> None:
        while self._left and self._left[0][1] <= self._at:  # nothing of it was read
            self._left.popleft()
            next(self._ahead)
        if self._left and self._left[0][0] <= self._at:
            self._start, self._held = self._left.popleft()[0], next(self._ahead)
            return
        stop = min(self._at + max(much, _LEAST), self._size)
        self._start, self._held = self._at, self._request((self._at, stop))

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """Move to a position; return it."""
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

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
        """Close the file; requests that are not needed any more are given up."""
        if not self.closed:
            self._ahead.close()
        super().close()
