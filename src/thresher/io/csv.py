"""Lines and rows of csv files, with the bytes they begin at."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from typing import IO

from thresher.errors import PoolError
from thresher.io.open import trusting

LINE = 1 << 20  # bytes of a line, at most


class Lines:
    """The lines of a file as text; knows how many bytes it has handed out, and whether there are no more."""

    def __init__(self, file: IO[bytes], path: str, at: int = 0) -> None:
        """Begin at byte ``at`` of ``file``, called ``path`` in messages."""
        self._file, self._path, self.at, self.ended = file, path, at, False
        file.seek(at)

    def __iter__(self) -> Iterator[str]:
        """Yield the lines."""
        for line in iter(lambda: self._file.readline(LINE + 1), b""):
            if len(line) > LINE:
                raise PoolError(f"{self._path}: is no csv: a line of more than {LINE:,} bytes begins at {self.at:,}")
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
    lines = Lines(file, path, at)
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
