"""Fast tar scan: reads many headers of a local tar at a time if they are ordinary: regular files with short names.

:mod:`thresher.io.tar` is the reference for what a tar means; everything that is not ordinary is left to it.

Shape letters: H headers, M members, n samples.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import IO

import numpy as np
import numpy.typing as npt

from thresher.io.open import trusting
from thresher.io.paths import all_plain
from thresher.io.tar import NOTES, TAR_BLOCK, Row, TarSample, Window, tar_samples

_PEEK = 4096  # bytes of one read
_STEP = 1 << 20  # maximum bytes of one read while reading sequentially
_WAITED = 100e-6  # a read that takes longer than this many seconds waited for the disk
_NOTES = ord("x")
_TIMES = re.compile(rb"([0-9]{1,3}) [acm]time=[0-9.]+\n")  # the only pax metadata that webdataset writes
_NAME = re.compile(r"\0((?:[^\0]*/)?[^\0./]+)\.([^\0/]*)(?=\0)")  # key and extension
_FEW, _MANY = 512, 8192  # headers read at a time: at first, and once the previous ones were ordinary
_APART = 64  # samples read one by one if they are not ordinary
_OCTAL = 8 ** np.arange(10, -1, -1)

Ints = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]
Flags = npt.NDArray[np.bool_]


class FastWindow(Window):
    """A window on a local file that reads only headers, with read-ahead requests to the disk."""

    def __init__(self, file: IO[bytes], path: str, ahead: int = 0) -> None:
        """Read ``file``; request ``ahead`` bytes of read-ahead at a time, 0 if the positions read are far apart."""
        super().__init__(file, path, 0)
        self._handle, self._ahead = file.fileno(), ahead if hasattr(os, "posix_fadvise") else 0
        self._asked, self._end, self._step = 0, 0, _PEEK

    def _fetch(self, offset: int, size: int) -> bytes:
        # Read more at a time while reading sequentially, less after a skip.
        gap = self._end - offset
        self._step = min(2 * self._step, _STEP) if 0 <= gap < _PEEK else _PEEK
        begin = perf_counter()
        data = os.pread(self._handle, size if size > self._step else self._step, offset)
        self._end = offset + len(data)
        if self._asked - offset < self._ahead // 2 and (self._asked or perf_counter() - begin > _WAITED):
            self._ask(offset)
        return data

    def _ask(self, offset: int) -> None:
        """Request read-ahead once a read had to wait for the disk; requests for a cached file only cost time."""
        self._asked = max(self._asked, offset)
        while self._asked < min(self.size, offset + self._ahead):
            os.posix_fadvise(self._handle, self._asked, self._ahead, os.POSIX_FADV_WILLNEED)
            self._asked += self._ahead

    def headers(self, at: int, most: int, ending: bytes = b"") -> tuple[list[int], list[bytes], dict[int, bytes]]:
        """Read headers one after another by the sizes in them, without other checks, from byte ``at`` on.

        Args:
            at: Start of the first header.
            most: Maximum number of headers; fewer if the next one has no valid size, or the file ends.
            ending: End of the names (including the zero byte) whose contents are needed.

        Returns:
            The starts of the headers, the headers, and by start the contents of the members needed and of pax
            metadata, as far as they were read with the header.
        """
        return trusting(self._path, lambda: self._headers(at, most, ending))

    def _headers(self, at: int, most: int, ending: bytes) -> tuple[list[int], list[bytes], dict[int, bytes]]:
        starts: list[int] = []
        headers: list[bytes] = []
        contents: dict[int, bytes] = {}
        held, lo, last = b"", 0, -1  # data read, position of the next header in it, last possible one
        for _ in range(most):
            if lo > last:
                held, lo = self._fetch(at, TAR_BLOCK), 0
                self._held, self._at, last = held, at, len(held) - TAR_BLOCK
                if lo > last:
                    break
            header = held[lo : lo + TAR_BLOCK]
            try:
                size = int(header[124:135], 8)
            except ValueError:
                break
            if size < 0:
                break
            starts.append(at)
            headers.append(header)
            if header[156] == _NOTES or ending and ending in header[:101]:
                if lo + TAR_BLOCK + size > len(held) and size < _PEEK:
                    held, lo = self._fetch(at, TAR_BLOCK + size), 0
                    self._held, self._at, last = held, at, len(held) - TAR_BLOCK
                contents[at] = held[lo + TAR_BLOCK : lo + TAR_BLOCK + size]
            step = TAR_BLOCK + (size + TAR_BLOCK - 1 & -TAR_BLOCK)
            at += step
            lo += step
        return starts, headers, contents


def window_of(file: IO[bytes], protocol: str, path: str, ahead: int = 0) -> Window:
    """Return a window on an open tar; for a local file it reads little more than the headers.

    Args:
        file: The tar.
        protocol: Protocol of its file system.
        path: Its name in messages.
        ahead: Bytes of read-ahead; 0 if the positions read are far apart.
    """
    return FastWindow(file, path, ahead) if protocol == "file" and hasattr(os, "pread") else Window(file, path)


@dataclass(frozen=True, eq=False)
class Stretch:
    """Consecutive samples, n of them, with nothing in between.

    Attributes:
        keys: Key of each sample.
        start_n: Start of each sample.
        end: End of the last sample.
        jsons: Content of their JSON members, b"" if a sample has none or a very long one; empty if not requested.
        begins: Index of the first member of each sample, and of the sample after them.
        offset_M: Offsets of the contents of the members.
        size_M: Bytes of the contents.
        names: Key and extension of each member.
    """

    keys: Sequence[str]
    start_n: Ints
    end: int
    jsons: Sequence[bytes]
    begins: Sequence[int]
    offset_M: Ints
    size_M: Ints
    names: Sequence[tuple[str, str]]

    def rows(self, sample: int) -> list[Row]:
        """Return the headers of a sample."""
        lo, hi = self.begins[sample], self.begins[sample + 1]
        columns = (self.offset_M[lo:hi].tolist(), self.size_M[lo:hi].tolist(), self.names[lo:hi])
        return [Row(offset, size, ".".join(name)) for offset, size, name in zip(*columns, strict=True)]


def runs(window: Window, path: str, *, jsons: bool = False, many: int = _MANY) -> Iterator[Stretch | TarSample]:
    """Yield all samples of a tar in order: many at a time if they are ordinary, else one by one.

    Args:
        window: The tar. Only those of a :class:`FastWindow` are read many at a time.
        path: Its name in messages.
        jsons: Whether to read the JSON members of many samples with them.
        many: Most headers that are read at once; each takes about a kilobyte of memory.

    Raises:
        PoolError: As in :func:`thresher.io.tar.tar_samples`, after the samples before the damage.
    """
    at, most, more = 0, _FEW, True
    while more:
        if isinstance(window, FastWindow) and (run := stretch(window, at, most, jsons=jsons)):
            yield run
            at, most = run.end, min(2 * most, many)
            continue
        most, more = _FEW, False
        for number, sample in enumerate(tar_samples(window, path, at), 1):
            yield sample
            if number == _APART and isinstance(window, FastWindow):
                at, more = sample.end, True
                break


def stretch(window: FastWindow, at: int, most: int, *, jsons: bool = False) -> Stretch | None:
    """Return the complete samples among the next headers of a tar, up to the first that is not ordinary.

    They are the same samples that :func:`thresher.io.tar.tar_samples` yields, and their names are safe.

    Args:
        window: The tar.
        at: Start of a sample.
        most: Number of headers to read.
        jsons: Whether to return the JSON members.

    Returns:
        At least one sample; None if the next one may be not ordinary or incomplete.
    """
    starts, headers, contents = window.headers(at, most, b".json\0" if jsons else b"")
    head_H = np.frombuffer(b"".join(headers), np.uint8).reshape(-1, TAR_BLOCK)
    start_H, notes_H = np.array(starts, np.int64), head_H[:, 156] == _NOTES
    size_H, good_H = _ordinary(head_H)
    good_H &= start_H + TAR_BLOCK + size_H <= window.size
    for i in np.flatnonzero(notes_H).tolist():
        times = _TIMES.fullmatch(contents.pop(starts[i], b""))
        good_H[i] &= times is not None and int(times[1]) == size_H[i]
    good_H[1:] &= ~(notes_H[:-1] & notes_H[1:])
    own_M = np.flatnonzero(~notes_H[: len(good_H) if good_H.all() else int(good_H.argmin())])
    keys, firsts, which, names = _grouped(head_H[own_M, :100])
    if len(keys) < 2:
        return None
    noted_M = (own_M > 0) & notes_H[own_M - 1]
    start_n = start_H[(own_M - noted_M)[firsts]]
    json_contents: list[bytes] = []
    if jsons:
        own, size = own_M.tolist(), size_H.tolist()
        for i in which[:-1]:
            at, much = (starts[own[i]], size[own[i]]) if i >= 0 else (0, 0)
            content = contents.get(at, b"") if much else b""
            json_contents.append(
                content if len(content) == much else window.read(at + TAR_BLOCK, much) if much <= NOTES else b""
            )
    offset_M, size_M = start_H[own_M] + TAR_BLOCK, size_H[own_M]
    # The last sample may be incomplete.
    return Stretch(keys[:-1], start_n[:-1], int(start_n[-1]), json_contents, firsts, offset_M, size_M, names)


def _ordinary(head_H: Bytes) -> tuple[Ints, Flags]:
    """Return the sizes in headers, and which headers are valid, ordinary, and of a regular file or pax metadata."""
    size = head_H[:, 124:135].astype(np.int64) - ord("0")
    checksum = head_H[:, 148:154].astype(np.int64) - ord("0")
    total_H = head_H.sum(1, dtype=np.uint32) - head_H[:, 148:156].sum(1, dtype=np.uint32) + 8 * ord(" ")
    kind_H = head_H[:, 156]
    good_H = (size >= 0).all(1) & (size < 8).all(1) & np.isin(head_H[:, 135], (0, ord(" ")))
    good_H &= (checksum >= 0).all(1) & (checksum < 8).all(1)
    good_H &= (head_H[:, 154] == 0) & (checksum @ _OCTAL[5:] == total_H)
    good_H &= (kind_H == ord("0")) | (kind_H == 0) | (kind_H == _NOTES)
    good_H &= head_H[:, 345] == 0  # no name prefix
    return size @ _OCTAL, good_H


def _grouped(name_M: Bytes) -> tuple[list[str], list[int], list[int], list[tuple[str, str]]]:
    """Group consecutive names with the same key.

    Returns:
        The keys, the index of the first name of each, the index of its JSON member (-1 if it has none), and all names
        as key and extension; all empty if a name is not UTF-8, not safe, or not a key with an extension.
    """
    joined = b"\0".join(np.ascontiguousarray(name_M).view("S100").ravel().tolist())
    try:
        text = f"\0{joined.decode()}\0"
    except UnicodeDecodeError:
        return [], [], [], []
    if not all_plain(text) or "\0__" in text:
        return [], [], [], []
    names = _NAME.findall(text)
    if not len(names) == len(name_M) == text.count("\0") - 1:
        return [], [], [], []
    keys: list[str] = []
    firsts: list[int] = []
    jsons: list[int] = []
    last, endings = "", set[str]()
    for i, (key, ending) in enumerate(names):
        ending = ending.lower()  # noqa: PLW2901
        if key == last and ending not in endings:
            endings.add(ending)
        else:
            last, endings = key, {ending}
            keys.append(key)
            firsts.append(i)
            jsons.append(-1)
        if ending == "json":
            jsons[-1] = i
    return keys, firsts, jsons, names
