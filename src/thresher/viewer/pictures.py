"""Thumbnails of rows, made when they are asked for; memory for them is bounded.

A page of rows is announced before the browser asks for its images one by one, so that the images of a whole page are
read from the pool in one pass.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Sequence

from thresher.io.pictures import small_picture
from thresher.pool.store import EmbeddingStore
from thresher.report.examples import read_rows

SIDES = (192, 640)  # of the gallery, and of a single row
_READ, _MADE = 48 * 2**20, 32 * 2**20  # bytes held as read, and as thumbnails
_PAGES = 64
_TOGETHER = 24  # images of a page that are read in one pass
_AT_ONCE = 2  # images decoded at a time: each may take hundreds of megabytes


class _Bytes:
    """The most recently used values, up to a number of bytes."""

    def __init__(self, most: int) -> None:
        self._most, self._size = most, 0
        self._held: OrderedDict[tuple[int, ...], bytes] = OrderedDict()

    def get(self, key: tuple[int, ...]) -> bytes | None:
        if key in self._held:
            self._held.move_to_end(key)
        return self._held.get(key)

    def put(self, key: tuple[int, ...], value: bytes) -> None:
        self._size += len(value) - len(self._held.pop(key, b""))
        self._held[key] = value
        while self._size > self._most and len(self._held) > 1:
            self._size -= len(self._held.popitem(last=False)[1])


class Pictures:
    """The thumbnails of the rows of some pools."""

    def __init__(self, stores: Sequence[EmbeddingStore]) -> None:
        """Remember the pools."""
        self._stores = stores
        self._lock, self._reading = threading.Lock(), threading.Lock()
        self._decoding = threading.Semaphore(_AT_ONCE)
        self._read, self._made = _Bytes(_READ), _Bytes(_MADE)
        self._pages: deque[tuple[int, tuple[int, ...]]] = deque(maxlen=_PAGES)

    def has(self, source: int) -> bool:
        """Return whether a pool has images."""
        layout = self._stores[source].layout
        return bool(layout.image or layout.pictures is not None)

    def expect(self, source: int, rows: Sequence[int]) -> None:
        """Announce rows whose images will be asked for together."""
        with self._lock:
            self._pages.append((source, tuple(rows)))

    def get(self, source: int, row: int, side: int) -> bytes:
        """Return a thumbnail as WebP, b"" if the row has no image or a damaged one."""
        key = source, row, side
        with self._lock:
            made = self._made.get(key)
        if made is None:
            with self._decoding:
                made = small_picture(self._encoded(source, row), side)
            with self._lock:
                self._made.put(key, made)
        return made

    def _encoded(self, source: int, row: int) -> bytes:
        with self._reading:  # one pass at a time; the next request of the same page finds its image read
            with self._lock:
                found = self._read.get((source, row))
                page = next((rows for at, rows in reversed(self._pages) if at == source and row in rows), (row,))
            if found is not None:
                return found
            first = page.index(row) // _TOGETHER * _TOGETHER
            result = b""
            for one in read_rows(self._stores[source], page[first : first + _TOGETHER]):
                if one.row == row:
                    result = one.image
                with self._lock:
                    self._read.put((source, one.row), one.image)
            return result
