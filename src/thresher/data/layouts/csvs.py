"""Samples of a csv as open_clip reads it: a picture's path and its title on every line."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any

from thresher.data.samples import Data, Place, Sample, caption_of
from thresher.errors import PoolError, UsageError, suggest
from thresher.io.columns import CAPTIONS
from thresher.io.open import open_file, trusting
from thresher.io.paths import shown

_PATHS = ("filepath", "image_path", "path", "file_name", "filename", "image")
_TITLES = ("title", *CAPTIONS)
_LINE = 1 << 20  # bytes of a line, at most


class _Lines:
    """The lines of a file as text; knows how many bytes it has handed out, and whether there are no more."""

    def __init__(self, file: IO[bytes], path: str, at: int = 0) -> None:
        self._file, self._path, self.at, self.ended = file, path, at, False
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
        self.ended = True


def rows(file: IO[bytes], path: str, at: int, delimiter: str) -> Iterator[tuple[int, int, list[str]]]:
    """Yield the byte at which each row of a csv begins, that after it, and its cells, from byte ``at`` on.

    Blank lines are no rows, as pandas has it. A row may have several lines, in quotes.

    Raises:
        PoolError: No UTF-8, an enormous line, or a quote that nothing closes.
    """
    lines = _Lines(file, path, at)
    reader = csv.reader(lines, delimiter=delimiter)
    while True:
        begin = lines.at
        row = trusting(path, lambda: next(reader, None))
        if row is None:
            return
        if lines.ended:  # it looked for more than there is
            raise PoolError(f"{path}: the quote that opens in the row at byte {begin:,} is never closed; mend that row")
        if len(row) > 1 or row and row[0].strip():
            yield begin, lines.at, row


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
            found = rows(file, self.path, self.at, self.delimiter)
            for at in range(self.first, self.first + self.rows):
                _, _, row = next(found, (0, 0, None))
                if row is None:
                    raise PoolError(f"{self.path}: has fewer rows than when it was opened; it was changed, start again")
                name = row[self.picture] if len(row) > self.picture else ""
                title = row[self.title] if self.title is not None and len(row) > self.title else ""
                place = self.place(name)
                why = (
                    "" if place else f"names a picture that is not there: {shown(name)}" if name else "names no picture"
                )
                yield Sample(self.key(row, at), caption_of(title), place, at, why=why)

    def key(self, row: Sequence[str], at: int) -> str:
        """Return what identifies a row: the path as it is written, but for ``..``, of which no key may have any."""
        name = row[self.picture] if len(row) > self.picture else ""
        return re.sub(r"(?<![^/\\])\.\.(?![^/\\])", "%2E%2E", name) or f"line {at}"

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
        first = trusting(path, lambda: next(iter(_Lines(file, path)), ""))
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
        for begin, _, _ in rows(file, path, len(trusting(path, lambda: file.readline(_LINE))), delimiter):
            if count % options.per_part == 0:
                starts.append((count, begin))
            count += 1
    if not count:
        raise PoolError(f"{path}: has no rows")
    below = tuple(os.path.abspath(root) for root in roots)
    parts = [
        CsvPart(path, row, min(options.per_part, count - row), byte, delimiter, picture, title, below, protocol)
        for row, byte in starts
    ]
    return Data(location, "csv", tuple(parts))


def _column(path: str, flag: str, asked: str | None, usual: Sequence[str], names: Sequence[str]) -> int | None:
    if asked and asked not in names:
        raise UsageError(
            f"{path}: no column {asked!r} for {flag}; it has {shown(', '.join(names))}.{suggest(asked, names)}"
        )
    return next((names.index(name) for name in ([asked] if asked else usual) if name in names), None)
