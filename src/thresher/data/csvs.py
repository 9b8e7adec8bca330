"""Samples of a csv as open_clip reads it: a picture's path and its title on every line."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any

from thresher.data.samples import Data, Place, Sample, caption_of, shown
from thresher.errors import PoolError, UsageError, suggest
from thresher.readers.layout import CAPTIONS
from thresher.readers.pieces import open_file, trusting

_PATHS = ("filepath", "image_path", "path", "file_name", "filename", "image")
_TITLES = ("title", *CAPTIONS)
_LINE = 1 << 20  # bytes of a line, at most


class _Lines:
    """The lines of a file as text; knows how many bytes it has handed out."""

    def __init__(self, file: IO[bytes], path: str, at: int = 0) -> None:
        self._file, self._path, self.at = file, path, at
        file.seek(at)

    def __iter__(self) -> Iterator[str]:
        for line in iter(lambda: self._file.readline(_LINE + 1), b""):
            if len(line) > _LINE:
                raise PoolError(f"{self._path}: is no csv: a line of more than {_LINE:,} bytes begins at {self.at:,}")
            try:
                text = line.decode("utf-8" if self.at else "utf-8-sig")
            except UnicodeDecodeError as error:
                at = self.at + error.start
                raise PoolError(f"{self._path}: is no UTF-8 text at byte {at:,}; save it as UTF-8") from None
            self.at += len(line)
            yield text.replace("\0", "\ufffd")


def _rows(lines: _Lines, path: str, delimiter: str) -> Iterator[list[str]]:
    """Yield the rows of a csv; blank lines are none, as pandas has it."""
    reader = csv.reader(lines, delimiter=delimiter)
    for row in iter(lambda: trusting(path, lambda: next(reader, None)), None):
        if len(row) > 1 or row and row[0].strip():
            yield row


@dataclass(frozen=True)
class CsvPart:
    """Rows ``first`` to ``first + rows`` of a csv, which begin at byte ``at``."""

    path: str
    first: int
    rows: int
    at: int
    delimiter: str
    picture: int
    title: int | None
    roots: tuple[str, ...]
    protocol: str = "file"

    def samples(self) -> Iterator[Sample]:
        """Yield the samples, with the places of the pictures, wherever they are: a csv is its user's own.

        Raises:
            PoolError: The csv has changed, or cannot be read.
        """
        with open_file(self.protocol, self.path) as file:
            rows = _rows(_Lines(file, self.path, self.at), self.path, self.delimiter)
            for at in range(self.first, self.first + self.rows):
                row = next(rows, None)
                if row is None:
                    raise PoolError(f"{self.path}: has fewer rows than when it was opened; it was changed, start again")
                name = row[self.picture] if len(row) > self.picture else ""
                title = row[self.title] if self.title is not None and len(row) > self.title else ""
                place = self.place(name)
                why = (
                    "" if place else f"names a picture that is not there: {shown(name)}" if name else "names no picture"
                )
                yield Sample(name or f"line {at}", caption_of(title), place, at, why=why)

    def place(self, name: str) -> Place | None:
        """Return where a picture is: below the first of the roots that has it."""
        tried = (os.path.join(root, name) for root in self.roots)
        return next((Place(path) for path in tried if name and os.path.isfile(path)), None)


def open_csv(location: str, protocol: str, path: str, options: Any) -> Data:
    """Open a csv with a line of names: filepath and title, separated by tabs, or by commas.

    Pictures are looked for below the root that is given; without one from the current folder, as open_clip does, and
    below the folder of the csv, for one that was moved with its pictures.

    Args:
        location: As it was given.
        protocol: Of its file system.
        path: The file.
        options: Names of columns, root of pictures and rows a part, as :class:`thresher.data.DataOptions` has them.

    Raises:
        PoolError: No such columns, no rows, or a line that is no csv.
        UsageError: A column that was asked for is not there.
    """
    roots = [options.root] if options.root else [".", os.path.dirname(path)] if protocol == "file" else ["."]
    with open_file(protocol, path) as file:
        lines = _Lines(file, path)
        first = trusting(path, lambda: next(iter(lines), ""))
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
        starts, rows, at = [], 0, lines.at
        for _ in _rows(lines, path, delimiter):
            if rows % options.per_part == 0:
                starts.append((rows, at))
            rows, at = rows + 1, lines.at
    if not rows:
        raise PoolError(f"{path}: has no rows")
    below = tuple(os.path.abspath(root) for root in roots)
    parts = [
        CsvPart(path, row, min(options.per_part, rows - row), byte, delimiter, picture, title, below, protocol)
        for row, byte in starts
    ]
    return Data(location, "csv", tuple(parts))


def _column(path: str, flag: str, asked: str | None, usual: Sequence[str], names: Sequence[str]) -> int | None:
    if asked and asked not in names:
        raise UsageError(
            f"{path}: no column {asked!r} for {flag}; it has {shown(', '.join(names))}.{suggest(asked, names)}"
        )
    return next((names.index(name) for name in ([asked] if asked else usual) if name in names), None)
