"""Lists: text files with the path and the caption of an image in each row; shared by csv and jsonl."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import IO, Any, ClassVar, NamedTuple

import numpy as np

from thresher.data.cells import Roots, name_in, notes_on, paths_in, picture_of
from thresher.data.location import Location
from thresher.data.options import DataOptions
from thresher.data.parts import Ints, Part, Scanned
from thresher.data.samples import Sample
from thresher.errors import ChangedError, PoolError
from thresher.io.open import open_file
from thresher.io.paths import typed, without_parent, writable

# Usual columns; open_clip's come first.
PATHS = ("filepath", "image_path", "path", "file_name", "filename", "image", "image_name", "images")
# Endings of compressed files, and how they are unpacked.
_UNPACK = {".gz": "gunzip -k", ".zst": "zstd -d", ".bz2": "bunzip2 -k", ".xz": "unxz -k", ".zip": "unzip"}


class Entry(NamedTuple):
    """A row of a list.

    Attributes:
        begin: Its first byte.
        end: Its end.
        image: The cell of the image, see :func:`thresher.data.cells.picture_of`.
        text: The caption, "" for none.
        key: The cell of the key column, "" for none.
        why: Why the row cannot be used, "" if it can.
    """

    begin: int
    end: int
    image: Any
    text: str
    key: str
    why: str = ""


@dataclass(frozen=True, kw_only=True)
class ListPart(Part):
    """Rows ``first`` to ``first + rows`` of a list, which begin at byte ``at``.

    Attributes:
        at: The first byte of its first row.
        roots: Folders with the images that are named by path.
    """

    at: int
    roots: Roots

    pictures_apart: ClassVar[bool] = True

    @abstractmethod
    def entries(self, file: IO[bytes], at: int) -> Iterator[Entry]:
        """Yield the rows of the open file from byte ``at`` on.

        Raises:
            PoolError: The file is damaged.
        """

    @property
    def has_uids(self) -> bool:
        """False: lists have no uids."""
        return False

    def samples(self) -> Iterator[Sample]:
        """Yield the samples, with the positions of the images.

        Raises:
            PoolError: The file is damaged.
            ChangedError: It has fewer rows than when it was opened.
        """
        with open_file(self.protocol, self.path) as file:
            entries = self.entries(file, self.at)
            for at in range(self.first, self.first + (self.rows or 0)):
                if (entry := next(entries, None)) is None:
                    raise ChangedError(f"{self.path}: has fewer rows than when it was opened; run the command again")
                if entry.why:
                    yield Sample(_key(entry, at), "", None, at, why=entry.why)
                    continue
                stored, why, missing, notes = picture_of(entry.image, self.roots)
                yield Sample(_key(entry, at), entry.text, stored, at, why=why, missing=missing, notes=notes)

    def scan(self, *, uids: bool = False) -> Scanned:
        """Find the bytes of each row; a row of a csv may have several lines."""
        keys: list[str] = []
        places: list[tuple[int, int]] = []
        notes: list[tuple[str, ...]] = []
        with open_file(self.protocol, self.path) as file:
            for entry in islice(self.entries(file, self.at), self.rows):
                keys.append(_key(entry, self.first + len(keys)))
                places.append((entry.begin, entry.end - entry.begin))
                notes.append(notes_on(entry.image))
        place_n2 = np.array(places, np.int64).reshape(-1, 2)
        return Scanned(
            keys=keys,
            start_n=place_n2[:, 0],
            length_n=place_n2[:, 1],
            at_n=np.arange(self.first, self.first + len(keys)),
            notes=lambda i, _: notes[i],
        )

    def chosen(self, start_c: Ints) -> Iterator[Sample]:
        """Yield the samples of the rows that begin at some bytes."""
        for at in start_c.tolist():
            yield from replace(self, at=at, rows=1).samples()

    def separate_files(self, start_c: Ints) -> Iterator[Sequence[str]]:
        """Yield the places where the image of each row may be, whether or not there is one."""
        with open_file(self.protocol, self.path) as file:
            for at in start_c.tolist():
                entry = next(self.entries(file, at), None)
                yield paths_in(entry.image, self.roots) if entry else []


def roots_of(where: Location, options: DataOptions) -> Roots:
    """Return the folders that paths in a list may be relative to: ``--root``, else the current folder and its own."""
    path = where.files.path(where.files.names[0])
    return Roots.of(options, [".", os.path.dirname(path)] if where.files.protocol == "file" else ["."])


def file_of(where: Location) -> tuple[str, str]:
    """Return the protocol and the path of a list.

    Raises:
        PoolError: It is several files, or compressed: its rows are read in any order.
    """
    if len(names := where.files.names) > 1:
        raise PoolError(f"{where.text}: is {len(names):,} files; give one of them, or join them into one file")
    path = where.files.path(names[0])
    for ending, unpack in _UNPACK.items():
        if path.lower().endswith(ending):
            raise PoolError(
                f"{path}: is compressed, and its rows are read in any order; unpack it: {unpack} {typed(path)}"
            )
    return where.files.protocol, path


def listed(text: str, endings: tuple[str, ...]) -> bool:
    """Return whether a location is named like a list with one of these endings, compressed or not."""
    name = text.lower()
    return name.endswith((*endings, *(ending + packed for ending in endings for packed in _UNPACK)))


def _key(entry: Entry, at: int) -> str:
    """Return the key of a row, by default its path; each part ``..`` is escaped, because keys must not have one."""
    return writable(without_parent(entry.key or name_in(entry.image))) or f"line {at}"
