"""A sample of raw data: a picture and its caption."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import IO, Any

from thresher.errors import PoolError
from thresher.io.open import open_file, trusting
from thresher.io.paths import inside, writable

BYTES = 1 << 30  # of one picture: more is taken for something else


@dataclass(frozen=True, slots=True)
class Place:
    """Where the bytes of a picture are: in a file, from ``offset`` on.

    Attributes:
        path: The file.
        offset: Of the first byte.
        size: Bytes; -1 for the whole file.
        protocol: Of the file system, as fsspec names it.
    """

    path: str
    offset: int = 0
    size: int = -1
    protocol: str = "file"

    def read(self) -> bytes:
        """Return the bytes.

        Raises:
            PoolError: The file is gone, shorter than it was, or no plain file; or more than ``BYTES``.
        """
        with open_file(self.protocol, self.path) as file:
            return self.read_from(file)

    def read_from(self, file: IO[bytes]) -> bytes:
        """Return the bytes from the file, opened already.

        Raises:
            PoolError: The file is shorter than it was, or cannot be read; or more than ``BYTES``.
        """

        def read() -> bytes:
            size = self.size if self.size >= 0 else file.seek(0, os.SEEK_END) - self.offset
            if size > BYTES:
                raise PoolError(f"{self.path}: has a picture of {size:,} bytes; at most {BYTES:,} are read")
            file.seek(self.offset)
            return file.read(size)

        found = trusting(self.path, read)
        if 0 <= self.size != len(found):
            raise PoolError(f"{self.path}: ends before byte {self.offset + self.size:,}; it was longer before")
        return found


@dataclass(frozen=True, slots=True)
class Sample:
    """A picture and its caption.

    Attributes:
        key: What identifies it; "" where nothing does.
        text: The caption, stripped; "" where there is none.
        picture: Its bytes as stored, or where they are; None where there is none.
        at: Where the sample begins in its part's file: a byte of a tar, a row of a table, a line of a csv.
        uid: DataComp's name of it, 32 hexadecimal characters; "" where it has none.
        why: Why it has no picture, "" where it has one.
        columns: What else a table tells of it.
    """

    key: str
    text: str
    picture: bytes | Place | None
    at: int
    uid: str = ""
    why: str = ""
    columns: Mapping[str, Any] = field(default_factory=dict)

    def stored(self) -> bytes:
        """Return the picture's bytes.

        Raises:
            PoolError: There is none, or its file cannot be read.
        """
        if self.picture is None:
            raise PoolError(self.why or "has no picture")
        return self.picture.read() if isinstance(self.picture, Place) else self.picture


def picture_in(root: str, name: str) -> Place | None:
    """Return where a picture is that a table names, or None: names that lead out of ``root`` are not followed.

    Args:
        root: A folder without links, as :func:`thresher.io.paths.inside` takes it.
        name: As the table has it.
    """
    path = inside(root, name)
    return Place(path) if path is not None and os.path.isfile(path) else None


def caption_of(cell: Any) -> str:
    """Return a caption as stripped text that can be written as UTF-8: the first of several, "" for none."""
    if isinstance(cell, (list, tuple)):
        cell = next((one for one in cell if isinstance(one, str) and one.strip()), "")
    if isinstance(cell, bytes):
        cell = cell.decode("utf-8-sig", "replace")
    return writable(cell.strip()) if isinstance(cell, str) else ""
