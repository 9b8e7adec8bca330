"""Lines and rows of CSV files, with their byte offsets."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from typing import IO

from thresher.errors import PoolError
from thresher.io.columns import CAPTIONS, FILES
from thresher.io.open import trusting

LINE = 1 << 20  # maximum bytes of a line
_DELIMITERS = ",|;"  # and tab


class Lines:
    r"""The lines of a file as text; tracks the byte offset and whether the file has ended.

    Lines end in ``\n``, ``\r\n`` or ``\r``, as in pandas.
    """

    def __init__(self, file: IO[bytes], path: str, at: int = 0, most: int = LINE) -> None:
        """Start at byte ``at`` of ``file``; messages name it ``path``. A line may have ``most`` bytes."""
        self._file, self._path, self._most, self.at, self.ended = file, path, most, at, False
        file.seek(at)

    def __iter__(self) -> Iterator[str]:
        """Yield the lines."""
        for line in self._lines():
            if len(line) > self._most:
                raise PoolError(f"{self._path}: the line at byte {self.at:,} exceeds {self._most:,} bytes")
            try:
                text = line.decode("utf-8" if self.at else "utf-8-sig")
            except UnicodeDecodeError as error:
                at = self.at + error.start
                raise PoolError(f"{self._path}: is not valid UTF-8 at byte {at:,}; save it as UTF-8") from None
            self.at += len(line)
            yield text.replace("\0", "\ufffd")
        self.ended = True

    def _lines(self) -> Iterator[bytes]:
        r"""Yield the bytes of the lines. Only the end of a file with ``\r`` alone is not found by ``readline``."""
        rest = b""
        for data in iter(lambda: self._file.readline(self._most + 1), b""):
            lines = (rest + data).splitlines(keepends=True)
            rest = b"" if data.endswith(b"\n") else lines.pop()  # the line, or \r\n, may go on
            yield from lines
            if len(rest) > self._most:
                break
        if rest:
            yield rest


def header(file: IO[bytes], path: str, named: Sequence[str] = ()) -> tuple[list[str], str, int]:
    """Return the cells of the first line of a CSV file without blanks around them, its delimiter, and its end.

    The delimiter is a tab if the line has one; else that of comma, ``|`` and ``;`` which separates a column with a
    usual name, or one that the user named, from others; else a comma.

    Raises:
        PoolError: The file is not UTF-8, or the line is too long.
    """
    lines = Lines(file, path)
    first = trusting(path, lambda: next(iter(lines), ""))

    def cells(delimiter: str) -> list[str]:
        row = trusting(path, lambda: next(csv.reader([first], delimiter=delimiter), []))
        return [cell.strip() for cell in row]

    usual = {name.lower() for name in (*FILES, *CAPTIONS, *named)}
    known = (one for one in _DELIMITERS if len(row := cells(one)) > 1 and usual & {cell.lower() for cell in row})
    delimiter = "\t" if "\t" in first else next(known, ",")
    return cells(delimiter), delimiter, lines.at


def rows(file: IO[bytes], path: str, at: int, delimiter: str) -> Iterator[tuple[int, int, list[str]]]:
    """Yield the start byte, the end byte and the cells of each row of a CSV file, from byte ``at`` on.

    Blank lines are not rows, as in pandas. A quoted cell may span several lines.

    Raises:
        PoolError: The file is not UTF-8, a line or a cell is too long, or a quote is never closed.
    """
    lines = Lines(file, path, at)
    reader = csv.reader(lines, delimiter=delimiter)
    while True:
        begin = lines.at
        try:
            row = trusting(path, lambda: next(reader, None))
        except PoolError as error:
            if not isinstance(error.__cause__, csv.Error):
                raise
            raise PoolError(
                f"{path}: the row at byte {begin:,} has a cell of more than {csv.field_size_limit():,} characters, or "
                "a quote that is never closed; shorten the cell or fix that row"
            ) from None
        if row is None:
            return
        if lines.ended:  # the reader looked for more lines than there are
            raise PoolError(f"{path}: the quote that opens in the row at byte {begin:,} is never closed; fix that row")
        if len(row) > 1 or row and row[0].strip():
            yield begin, lines.at, row
