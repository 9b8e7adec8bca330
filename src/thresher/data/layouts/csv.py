"""CSV files as open_clip reads them: the path and the title of an image on every line."""

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
from thresher.errors import ChangedError, PoolError, UsageError, suggest
from thresher.io.columns import CAPTIONS
from thresher.io.csv import LINE, Lines, rows
from thresher.io.open import open_file, trusting
from thresher.io.paths import inside, visible, without_parent

_PATHS = ("filepath", "image_path", "path", "file_name", "filename", "image")
_TITLES = ("title", *CAPTIONS)


@dataclass(frozen=True)
class Csv:
    """A CSV file with a header line, filepath and title, separated by tabs or commas.

    Image paths are relative to ``root``. Without a root they are relative to the current folder, as in open_clip, or to
    the folder of the CSV file, which may have been moved together with its images. Paths outside these folders are
    followed only with ``allow_outside``, because a CSV file is untrusted input.
    """

    name: ClassVar[str] = "csv"
    rank: ClassVar[int] = 20
    looks_like: ClassVar[str] = "a .csv or .tsv of open_clip, with filepath and title"

    def recognise(self, where: Location) -> bool:
        """Recognise a .csv or .tsv file."""
        return where.text.lower().endswith((".csv", ".tsv")) and where.exists and len(where.files.names) == 1

    def open(self, where: Location, options: DataOptions) -> Data:
        """Read every line, to find where the rows begin.

        Raises:
            PoolError: A column is missing, there are no rows, or a line is not valid CSV.
            UsageError: A requested column does not exist.
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
                    f"{path}: has no column {', '.join(lacks)}; its first line is {first.strip()[:80]!r}. Give a "
                    "tab-separated file whose first line is filepath and title, as open_clip reads it"
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
    """Rows ``first`` to ``first + rows`` of a CSV file, which begin at byte ``at``."""

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
        """False: CSV files have no uids."""
        return False

    def samples(self) -> Iterator[Sample]:
        """Yield the samples, with the positions of the images.

        Raises:
            PoolError: The CSV file is damaged.
            ChangedError: It has fewer rows than when it was opened.
        """
        with open_file(self.protocol, self.path) as file:
            all_rows = rows(file, self.path, self.at, self.delimiter)
            allowed = [os.path.realpath(root) for root in self.roots]
            for at in range(self.first, self.first + (self.rows or 0)):
                _, _, row = next(all_rows, (0, 0, None))
                if row is None:
                    raise ChangedError(f"{self.path}: has fewer rows than when it was opened; run the command again")
                name = row[self.picture] if len(row) > self.picture else ""
                title = row[self.title] if self.title is not None and len(row) > self.title else ""
                place, why = self._place(name, allowed)
                yield Sample(
                    self._key(row, at), caption_of(title), place, at, why=why, missing=bool(name) and not place
                )

    def scan(self, *, uids: bool = False) -> Scanned:
        """Find the bytes of each row; a row may have several lines, because quoted cells can contain line breaks."""
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
        """Yield the samples of the rows that begin at some bytes."""
        for at in start_c.tolist():
            yield from replace(self, at=at, rows=1).samples()

    def separate_files(self, start_c: Ints) -> Iterator[Sequence[str]]:
        """Yield the places where the image of each row may be, whether or not there is one."""
        with open_file(self.protocol, self.path) as file:
            for at in start_c.tolist():
                _, _, row = next(rows(file, self.path, at, self.delimiter), (0, 0, []))
                names = row[self.picture : self.picture + 1]
                yield [os.path.join(root, name) for root in self.roots for name in names if name]

    def _key(self, row: Sequence[str], at: int) -> str:
        """Return the key of a row: its path, with each part ``..`` escaped, because keys must not have one."""
        return without_parent(row[self.picture] if len(row) > self.picture else "") or f"line {at}"

    def _place(self, name: str, allowed: Sequence[str]) -> tuple[Place | None, str]:
        """Return the position of an image below the first root that has it, or why there is none."""
        if not name:
            return None, "has no image path"
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


def _column(path: str, flag: str, asked: str | None, usual: Sequence[str], names: Sequence[str]) -> int | None:
    if asked and asked not in names:
        raise UsageError(
            f"{path}: no column {asked!r} for {flag}; it has {visible(', '.join(names))}.{suggest(asked, names)}"
        )
    return next((names.index(name) for name in ([asked] if asked else usual) if name in names), None)
