"""A sample of raw data: an image and its caption."""

from __future__ import annotations

import os
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import IO, Any

from thresher.errors import ChangedError, PoolError
from thresher.io.open import open_file, regular_file, trusting
from thresher.io.paths import writable
from thresher.runtime.format import counted

SEVERAL = "have several images; the first is used"  # a note
BYTES = 1 << 30  # maximum of one image: a larger file is not an image


@dataclass(frozen=True, slots=True)
class Place:
    """The position of the bytes of an image: in a file, from ``offset`` on.

    Attributes:
        path: The file.
        offset: Offset of the first byte.
        size: Number of bytes; -1 for the whole file.
        protocol: fsspec protocol of the file system.
        stamp: Size and time of the file when its sample was read, in bytes and nanoseconds; None if it is not checked.
    """

    path: str
    offset: int = 0
    size: int = -1
    protocol: str = "file"
    stamp: tuple[int, int] | None = field(default=None, compare=False)

    @classmethod
    def of_file(cls, path: str) -> Place | None:
        """Return the place of an image that is a local file of its own; None if there is no regular file.

        Raises:
            UnreachedError: The system does not say whether there is one, or denies access.
        """
        status = regular_file(path)
        return None if status is None else cls(path, stamp=(status.st_size, status.st_mtime_ns))

    def read(self) -> bytes:
        """Return the bytes.

        Raises:
            PoolError: The file is missing, shorter than before, or not a regular file; or the image exceeds ``BYTES``.
            ChangedError: It is no longer the file that was there when its sample was read.
            UnreachedError: It was not reached.
        """
        with open_file(self.protocol, self.path) as file:
            return self.read_from(file)

    def read_from(self, file: IO[bytes]) -> bytes:
        """Return the bytes from the open file.

        Raises:
            PoolError: The file is shorter than before or damaged, or the image exceeds ``BYTES``.
            ChangedError: It is no longer the file that was there when its sample was read.
            UnreachedError: It was not reached.
        """

        def read() -> bytes:
            size = self.size if self.size >= 0 else file.seek(0, os.SEEK_END) - self.offset
            if size > BYTES:
                raise PoolError(f"{self.path}: has an image of {size:,} bytes; the limit is {BYTES:,}")
            file.seek(self.offset)
            return file.read(size)

        data = trusting(self.path, read)
        if self.stamp is not None:
            status = os.fstat(file.fileno())
            if (status.st_size, status.st_mtime_ns) != self.stamp:
                raise ChangedError(f"{self.path}: changed while it was read; run again once writing has finished")
        if 0 <= self.size != len(data):
            raise PoolError(f"{self.path}: ends before byte {self.offset + self.size:,}; it was longer before")
        return data


@dataclass(frozen=True, slots=True)
class Sample:
    """An image and its caption.

    Attributes:
        key: Identifier of the sample; "" if it has none.
        text: The caption, stripped; "" if there is none.
        picture: The encoded image, or the position of its bytes; None if there is none.
        at: Start of the sample in the file of its part: a byte offset in a tar, a row of a table or CSV file.
        uid: DataComp uid, 32 hexadecimal characters; "" if it has none.
        why: Why it has no image, "" if it has one.
        columns: Values of other columns of a table.
        missing: Whether it names an image file that does not exist.
        notes: What is unusual about it, although it can be used: phrases about samples that begin with "have", such as
            :data:`SEVERAL`. Commands count the samples with each, and say it with :func:`noted`.
    """

    key: str
    text: str
    picture: bytes | Place | None
    at: int
    uid: str = ""
    why: str = ""
    columns: Mapping[str, Any] = field(default_factory=dict)
    missing: bool = False
    notes: tuple[str, ...] = ()

    @property
    def picture_apart(self) -> bool:
        """Whether the image is, or should be, a file of its own."""
        return self.picture.stamp is not None if isinstance(self.picture, Place) else self.missing

    def stored(self) -> bytes:
        """Return the bytes of the encoded image.

        Raises:
            PoolError: There is no image, or its file cannot be read.
        """
        if self.picture is None:
            raise PoolError(self.why or "has no image")
        return self.picture.read() if isinstance(self.picture, Place) else self.picture


def noted(noun: str, counts: Mapping[str, int]) -> list[str]:
    """Return a sentence for each note with the number of samples that have it: "3 rows have several images; ..."."""
    return [
        f"{counted(count, noun)} {'has' + note.removeprefix('have') if count == 1 else note}"
        for note, count in sorted(counts.items())
        if count
    ]


def caption_of(cell: Any) -> str:
    """Return a caption as stripped text that UTF-8 can encode: the first of several, "" for none.

    Bytes are UTF-8, or UTF-16 if they begin with its byte order mark. Invalid bytes become U+FFFD.
    """
    if isinstance(cell, (list, tuple)):
        cell = next((one for one in cell if isinstance(one, (str, bytes)) and one.strip()), "")
    if isinstance(cell, bytes):
        cell = cell.decode("utf-16" if cell.startswith((BOM_UTF16_LE, BOM_UTF16_BE)) else "utf-8-sig", "replace")
    return writable(cell.strip()) if isinstance(cell, str) else ""
