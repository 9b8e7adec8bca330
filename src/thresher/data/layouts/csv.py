"""A csv as open_clip reads it: a picture's path and its title on every line."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import ClassVar

import numpy as np

from thresher.data.location import Location
from thresher.data.options import DataOptions
from thresher.data.parts import Data, Form, Ints, Part, Scanned
from thresher.data.samples import Place, Sample, caption_of
from thresher.errors import PoolError, UsageError, suggest
from thresher.io.columns import CAPTIONS
from thresher.io.csv import LINE, Lines, rows
from thresher.io.open import open_file, trusting
from thresher.io.paths import inside, visible, without_parent

_PATHS = ("filepath", "image_path", "path", "file_name", "filename", "image")
_TITLES = ("title", *CAPTIONS)


@dataclass(frozen=True)
class Csv:
    """A csv with a line of names: filepath and title, separated by tabs, or by commas.

    Pictures are looked for below the root that is given; without one from the current folder, as open_clip does, and
    below the folder of the csv, for one that was moved with its pictures. Paths that lead out of these folders are
    followed only with ``allow_outside``: who wrote the csv need not be who reads it.
    """

    name: ClassVar[str] = "csv"
    rank: ClassVar[int] = 20
    looks_like: ClassVar[str] = "a .csv or .tsv of open_clip, with filepath and title"

    def recognise(self, where: Location) -> bool:
        """A file that is named .csv or .tsv."""
        return where.text.endswith((".csv", ".tsv")) and where.exists and len(where.files.names) == 1

    def open(self, where: Location, options: DataOptions) -> Data:
        """Read every line, for where it begins.

        Raises:
            PoolError: No such columns, no rows, or a line that is no csv.
            UsageError: A column that was asked for is not there.
        """
        protocol, path = where.files.protocol, where.files.path(where.files.names[0])
        roots = [options.root] if options.root else [".", os.path.dirname(path)] if protocol == "file" else ["."]
        with open_file(protocol, path) as file:
            first = trusting(path, lambda: next(iter(Lines(file, path)), ""))
            delimiter = "\t" if "\t" in first else ","
            names = trusting(path, lambda: next(csv.reader([first], delimiter=delimiter), []))
            picture = _column(path, "--image", options.image, _PATHS, names)
            title = _column(path, "--caption", options.caption, _TITLES, names)
            if picture is None or title is None and options.captions:
                lacks = [usual for usual, at in (("filepath", picture), ("title", title)) if at is None]
                raise PoolError(
                    f"{path}: has no column {', '.join(lacks)}; its first line is {first.strip()[:80]!r}. Give a tab "
                    "separated file with a first line of filepath and title, as open_clip reads it"
                )
            starts, count = [], 0
            trusting(path, lambda: file.seek(0))
            for begin, _, _ in rows(file, path, len(trusting(path, lambda: file.readline(LINE))), delimiter):
                if count % options.per_part == 0:
                    starts.append((count, begin))
                count += 1
        if not count:
            raise PoolError(f"{path}: has no rows")
        below = tuple(os.path.abspath(root) for root in roots)
        parts = [
            CsvPart(
                path,
                protocol,
                first=row,
                rows=min(options.per_part, count - row),
                at=byte,
                delimiter=delimiter,
                picture=picture,
                title=title,
                roots=below,
                outside=options.allow_outside,
            )
            for row, byte in starts
        ]
        return Data(where.text, self.name, tuple(parts))


@dataclass(frozen=True, kw_only=True)
class CsvPart(Part):
    """Rows ``first`` to ``first + rows`` of a csv, which begin at byte ``at``."""

    at: int
    delimiter: str
    picture: int
    title: int | None
    roots: tuple[str, ...]
    outside: bool = False

    pictures_apart: ClassVar[bool] = True
    copied_as: ClassVar[Form | None] = "csv"

    @property
    def has_uids(self) -> bool:
        """It has none."""
        return False

    def samples(self) -> Iterator[Sample]:
        """Yield the samples, with the places of the pictures.

        Raises:
            PoolError: The csv has changed, or cannot be read.
        """
        with open_file(self.protocol, self.path) as file:
            found = rows(file, self.path, self.at, self.delimiter)
            allowed = [os.path.realpath(root) for root in self.roots]
            for at in range(self.first, self.first + (self.rows or 0)):
                _, _, row = next(found, (0, 0, None))
                if row is None:
                    raise PoolError(f"{self.path}: has fewer rows than when it was opened; it was changed, start again")
                name = row[self.picture] if len(row) > self.picture else ""
                title = row[self.title] if self.title is not None and len(row) > self.title else ""
                place, why = self._place(name, allowed)
                yield Sample(self._key(row, at), caption_of(title), place, at, why=why)

    def scan(self, *, uids: bool = False) -> Scanned:
        """Find the lines of the rows; a row may have line breaks in quotes, and so several lines."""
        keys: list[str] = []
        places: list[tuple[int, int]] = []
        with open_file(self.protocol, self.path) as file:
            for begin, end, row in islice(rows(file, self.path, self.at, self.delimiter), self.rows):
                keys.append(self._key(row, self.first + len(keys)))
                places.append((begin, end - begin))
        place_n2 = np.array(places, np.int64).reshape(-1, 2)
        return Scanned(
            keys=keys,
            start_n=place_n2[:, 0],
            length_n=place_n2[:, 1],
            at_n=np.arange(self.first, self.first + len(keys)),
        )

    def chosen(self, start_c: Ints) -> Iterator[Sample]:
        """Yield the samples of the lines that begin at some bytes."""
        for at in start_c.tolist():
            yield from replace(self, at=at, rows=1).samples()

    def _key(self, row: Sequence[str], at: int) -> str:
        """Return what identifies a row: the path as it is written, but for ``..``, of which no key may have any."""
        return without_parent(row[self.picture] if len(row) > self.picture else "") or f"line {at}"

    def _place(self, name: str, allowed: Sequence[str]) -> tuple[Place | None, str]:
        """Return where a picture is, below the first of the roots that has it; or why there is none."""
        if not name:
            return None, "names no picture"
        hidden = False
        for root in self.roots:
            path = os.path.join(root, name)
            if "\0" not in name and os.path.isfile(path):
                if self.outside or any(inside(below, path) for below in allowed):
                    return Place(path), ""
                hidden = True
        if hidden:
            return None, (
                f"names a picture outside {' and '.join(dict.fromkeys(self.roots))}: {visible(name)}; "
                "if that is yours, pass --root with its folder, or --allow-outside"
            )
        return None, f"names a picture that is not there: {visible(name)}"


def _column(path: str, flag: str, asked: str | None, usual: Sequence[str], names: Sequence[str]) -> int | None:
    if asked and asked not in names:
        raise UsageError(
            f"{path}: no column {asked!r} for {flag}; it has {visible(', '.join(names))}.{suggest(asked, names)}"
        )
    return next((names.index(name) for name in ([asked] if asked else usual) if name in names), None)
