"""Lines and rows of CSV files, with their byte offsets."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import IO

from thresher.errors import PoolError, UsageError
from thresher.io.columns import CAPTIONS, FILES
from thresher.io.open import trusting
from thresher.io.paths import typed, visible

LINE = 1 << 24  # maximum bytes of a line, and of a row, which may have an image in base64
_STEP = 1 << 20  # maximum bytes read at a time
_DELIMITERS = ",|;"  # and tab
_SHOWN = 80  # characters of a line in a message
_SEPARATOR = re.compile(r"sep=(.)[\r\n]*")  # a first line that has the delimiter for Excel
_TEXT_BEHIND = "expected after"  # in the error of Python's csv
_MARK = b"\xef\xbb\xbf"  # of UTF-8, which some programs write at the beginning of a file


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
            if not self.at and (why := why_not_utf8(self._path, line)):
                raise PoolError(f"{self._path}: {why}")
            try:
                text = line.decode("utf-8" if self.at else "utf-8-sig")
            except UnicodeDecodeError as error:
                at = self.at + error.start
                to = f"iconv -f WINDOWS-1252 -t UTF-8 {typed(self._path)} > NEW"
                raise PoolError(
                    f"{self._path}: is not valid UTF-8 at byte {at:,}; save it as UTF-8 (if it is from Windows: {to})"
                ) from None
            self.at += len(line)
            yield text.replace("\0", "\ufffd")
        self.ended = True

    def _lines(self) -> Iterator[bytes]:
        r"""Yield the bytes of the lines. Only the end of a file with ``\r`` alone is not found by ``readline``."""
        rest = b""
        step = min(self._most, _STEP) + 1
        for data in iter(lambda: self._file.readline(step), b""):
            lines = (rest + data).splitlines(keepends=True)
            rest = b"" if data.endswith(b"\n") else lines.pop()  # the line, or \r\n, may go on
            yield from lines
            if len(rest) > self._most:
                break
        if rest:
            yield rest


def header(
    file: IO[bytes], path: str, named: Sequence[str] = (), columns: Sequence[str] = ()
) -> tuple[list[str], str, int]:
    """Return the names of the columns of a CSV file without blanks around them, its delimiter, and its first row.

    Blank lines before the names are skipped, as in pandas; a file without other lines has no names. The delimiter is
    that of a line ``sep=;`` before the names, which Excel reads; else a tab if the line with the names has one; else
    that of comma, ``|`` and ``;`` which separates a column with a usual name, or one that the user named, from others;
    else a comma.

    Args:
        file: The open file.
        path: Its name, for messages.
        named: Columns that the user named.
        columns: The names of all columns of a file whose first line is a row; () for one with names in its first line.

    Raises:
        PoolError: The file is not UTF-8, the line is too long, or two columns have the same name.
        UsageError: ``columns`` are not as many as the first row has cells.
    """
    lines = Lines(file, path)
    found = filter(str.strip, lines)
    first = trusting(path, lambda: next(found, ""))
    match = None if columns else _SEPARATOR.fullmatch(first)
    separator = match[1] if match else ""
    if separator:
        first = trusting(path, lambda: next(found, ""))

    def cells(delimiter: str) -> list[str]:
        row = trusting(path, lambda: next(_reader([first], delimiter), []))
        return [cell.strip() for cell in row]

    usual = {name.lower() for name in (*FILES, *CAPTIONS, *named)}

    def fits(delimiter: str) -> bool:
        row = cells(delimiter)
        return len(row) == len(columns) if columns else len(row) > 1 and not usual.isdisjoint(map(str.lower, row))

    delimiter = separator or ("\t" if "\t" in first else next(filter(fits, _DELIMITERS), ","))
    if columns:
        if first and len(row := cells(delimiter)) != len(columns):
            raise UsageError(
                f"{path}: --columns names {len(columns)} columns ({', '.join(columns)}), but the first line has "
                f"{len(row)}: {visible(first.strip(), _SHOWN)}"
            )
        file.seek(0)
        return list(columns), delimiter, len(_MARK) if file.read(len(_MARK)) == _MARK else 0
    names = cells(delimiter) if first else []
    if twice := next((name for i, name in enumerate(names) if name and name in names[:i]), ""):
        raise PoolError(f"{path}: has several columns with the name {visible(twice)}; rename all but one")
    return names, delimiter, lines.at


def rows(file: IO[bytes], path: str, at: int, delimiter: str) -> Iterator[tuple[int, int, list[str]]]:
    """Yield the start byte, the end byte and the cells of each row of a CSV file, from byte ``at`` on.

    Blank lines are not rows, as in pandas. A quoted cell may span several lines. Text behind its closing quote belongs
    to the cell, as in pandas, but is refused in cells of several lines and after backslashes: there the quotes are not
    those of a csv, and it is unknown where a row ends.

    Raises:
        PoolError: The file is not UTF-8, a row is too long, a quote is never closed, or one that closes in a later line
            or behind a backslash is followed by text.
    """
    lines, begin = Lines(file, path, at), at
    all_lines, held = iter(lines), list[str]()  # the lines of the row

    def of_one_row() -> Iterator[str]:
        for line in all_lines:
            held.append(line)
            if lines.at - begin > LINE:
                raise PoolError(
                    f"{path}: the row at byte {begin:,} exceeds {LINE:,} bytes, or has a quote that is never closed; "
                    "shorten it or fix that row"
                )
            yield line

    def read() -> list[str] | None:
        held.clear()
        try:
            return next(reader, None)
        except csv.Error as error:
            if lines.ended:
                return held
            if _TEXT_BEHIND not in str(error):
                raise
            if len(held) > 1 or '\\"' in held[0]:
                raise PoolError(
                    f"{path}: the row at byte {begin:,} has text behind a quote that closes a cell: "
                    f'{visible("".join(held).strip(), _SHOWN)}; write a quote in a cell as two ("")'
                ) from None
            return next(_reader(chain([held[0]], of_one_row()), delimiter), None)

    reader = _reader(of_one_row(), delimiter, strict=True)
    while True:
        begin = lines.at
        row = trusting(path, read)
        if row is None:
            return
        if lines.ended:  # the reader looked for more lines than there are
            raise PoolError(f"{path}: the quote that opens in the row at byte {begin:,} is never closed; fix that row")
        if len(row) > 1 or row and row[0].strip():
            yield begin, lines.at, row


def _reader(lines: Iterable[str], delimiter: str, *, strict: bool = False) -> Iterator[list[str]]:
    """Return a reader of rows. Python's limit on cells holds for the process: it is only ever raised, never lowered."""
    if csv.field_size_limit() < LINE:
        csv.field_size_limit(LINE)
    return csv.reader(lines, delimiter=delimiter, strict=strict)


def why_not_utf8(path: str, begin: bytes) -> str:
    """Return that a file is in another code, as its first bytes say, and what to type; "" if they do not."""
    name = _other_code(begin)
    return f"is {name}, not UTF-8; save it as UTF-8: iconv -f {name} -t UTF-8 {typed(path)} > NEW" if name else ""


def _other_code(line: bytes) -> str:
    """Return the name of the code of a file that begins with a line, "" for UTF-8 and codes without a mark."""
    if line.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")):
        return "UTF-32"
    if line.startswith(b"\xff\xfe") or line[:1] != b"\0" == line[1:2]:
        return "UTF-16LE" if line[:1] != b"\xff" else "UTF-16"
    return "UTF-16" if line.startswith(b"\xfe\xff") else "UTF-16BE" if line[:1] == b"\0" != line[1:2] else ""
