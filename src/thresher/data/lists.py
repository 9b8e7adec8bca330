"""Lists: text files with the path and the caption of an image in each row; shared by csv and jsonl."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import IO, ClassVar, NamedTuple

import numpy as np

from thresher.data.location import Location
from thresher.data.options import DataOptions
from thresher.data.parts import Ints, Part, Scanned
from thresher.data.samples import Place, Sample
from thresher.errors import ChangedError
from thresher.io.open import open_file
from thresher.io.paths import inside, visible, without_parent, writable

# Usual columns; open_clip's come first.
PATHS = ("filepath", "image_path", "path", "file_name", "filename", "image", "image_name", "images")


class Entry(NamedTuple):
    """A row of a list.

    Attributes:
        begin: Its first byte.
        end: Its end.
        image: The path of the image, "" for none.
        text: The caption, "" for none.
        key: The cell of the key column, "" for none.
    """

    begin: int
    end: int
    image: str
    text: str
    key: str


@dataclass(frozen=True, kw_only=True)
class ListPart(Part):
    """Rows ``first`` to ``first + rows`` of a list, which begin at byte ``at``.

    Attributes:
        at: The first byte of its first row.
        roots: Folders that paths may be relative to, in the order in which they are tried.
        outside: Whether images outside the roots may be read.
    """

    at: int
    roots: tuple[str, ...]
    outside: bool = False

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
            allowed = [os.path.realpath(root) for root in self.roots]
            for at in range(self.first, self.first + (self.rows or 0)):
                if (entry := next(entries, None)) is None:
                    raise ChangedError(f"{self.path}: has fewer rows than when it was opened; run the command again")
                place, why = self._place(entry.image, allowed)
                yield Sample(
                    _key(entry, at), entry.text, place, at, why=why, missing=bool(entry.image) and place is None
                )

    def scan(self, *, uids: bool = False) -> Scanned:
        """Find the bytes of each row; a row of a csv may have several lines."""
        keys: list[str] = []
        places: list[tuple[int, int]] = []
        with open_file(self.protocol, self.path) as file:
            for entry in islice(self.entries(file, self.at), self.rows):
                keys.append(_key(entry, self.first + len(keys)))
                places.append((entry.begin, entry.end - entry.begin))
        place_n2 = np.array(places, np.int64).reshape(-1, 2)
        return Scanned(
            keys=keys,
            start_n=place_n2[:, 0],
            length_n=place_n2[:, 1],
            at_n=np.arange(self.first, self.first + len(keys)),
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
                yield [os.path.join(root, entry.image) for root in self.roots] if entry and entry.image else []

    def _place(self, name: str, allowed: Sequence[str]) -> tuple[Place | None, str]:
        """Return the position of an image below the first root that has it, or why there is none."""
        if not name:
            return None, "has no image path, or several"
        hidden = False
        for root in self.roots:
            path = os.path.join(root, name)
            if (place := Place.of_file(path)) is not None:
                if self.outside or any(inside(below, path) for below in allowed):
                    return place, ""
                hidden = True
        if hidden:
            return None, (
                f"names an image outside {' and '.join(dict.fromkeys(self.roots))}: {visible(name)}; "
                "if you trust the file, pass --root with the folder of the image, or --allow-outside"
            )
        return None, f"names an image that is not a file: {visible(name)}"


def roots_of(where: Location, options: DataOptions) -> tuple[str, ...]:
    """Return the folders that paths in a list may be relative to: ``--root``, else the current folder and its own."""
    path = where.files.path(where.files.names[0])
    local = where.files.protocol == "file"
    roots = [options.root] if options.root else [".", os.path.dirname(path)] if local else ["."]
    return tuple(os.path.abspath(root) for root in roots)


def _key(entry: Entry, at: int) -> str:
    """Return the key of a row, by default its path; each part ``..`` is escaped, because keys must not have one."""
    return writable(without_parent(entry.key or entry.image)) or f"line {at}"
