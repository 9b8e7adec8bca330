"""Lines and rows of CSV files, with their byte offsets."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from typing import IO

from thresher.errors import PoolError
from thresher.io.open import trusting

LINE = 1 << 20  # maximum bytes of a line


class Lines:
    """The lines of a file as text; tracks the byte offset and whether the file has ended."""

    def __init__(self, file: IO[bytes], path: str, at: int = 0) -> None:
        """Start at byte ``at`` of ``file``; messages name it ``path``."""
        self._file, self._path, self.at, self.ended = file, path, at, False
        file.seek(at)

    def __iter__(self) -> Iterator[str]:
        """Yield the lines."""
        for line in iter(lambda: self._file.readline(LINE + 1), b""):
            if len(line) > LINE:
                raise PoolError(f"{self._path}: is not a CSV file: the line at byte {self.at:,} exceeds {LINE:,} bytes")
            try:
                text = line.decode("utf-8" if self.at else "utf-8-sig")
            except UnicodeDecodeError as error:
                at = self.at + error.start
                raise PoolError(f"{self._path}: is not valid UTF-8 at byte {at:,}; save it as UTF-8") from None
            self.at += len(line)
            yield text.replace("\0", "\ufffd")
        self.ended = True


def rows(file: IO[bytes], path: str, at: int, delimiter: str) -> Iterator[tuple[int, int, list[str]]]:
    """Yield the start byte, the end byte and the cells of each row of a CSV file, from byte ``at`` on.

    Blank lines are not rows, as in pandas. A quoted cell may span several lines.

    Raises:
        PoolError: The file is not UTF-8, a line is too long, or a quote is never closed.
    """
    lines = Lines(file, path, at)
    reader = csv.reader(lines, delimiter=delimiter)
    while True:
        begin = lines.at
        row = trusting(path, lambda: next(reader, None))
        if row is None:
            return
        if lines.ended:  # the reader looked for more lines than there are
            raise PoolError(f"{path}: the quote that opens in the row at byte {begin:,} is never closed; fix that row")
        if len(row) > 1 or row and row[0].strip():
            yield begin, lines.at, row
