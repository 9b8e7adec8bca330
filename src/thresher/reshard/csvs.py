"""Lines of a csv copied as they are, into one csv."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from typing import IO

import numpy as np

from thresher.data.csvs import CsvPart
from thresher.errors import PoolError
from thresher.readers.pieces import open_file, trusting
from thresher.reshard.plan import Plan, Scanned, Source

_CHUNK = 100_000  # lines at a time


class _Lines:
    """The lines of a file as text; knows how many bytes it has handed out."""

    def __init__(self, file: IO[bytes], at: int) -> None:
        self._file, self.at = file, at
        file.seek(at)

    def __iter__(self) -> Iterator[str]:
        for line in self._file:
            self.at += len(line)
            yield line.decode("utf-8", "replace").replace("\0", "\ufffd")


def scan(part: CsvPart) -> Scanned:
    """Find where the rows of a part of a csv are; one may have line breaks in quotes, and so several lines."""
    keys: list[str] = []
    starts: list[int] = []
    with open_file(part.protocol, part.path) as file:
        lines = _Lines(file, part.at)
        at = part.at
        for row in _rows(part, lines):
            starts.append(at)
            at = lines.at
            keys.append((row[part.picture] if len(row) > part.picture else "") or f"line {part.first + len(keys)}")
            if len(keys) == part.rows:
                break
    start_n = np.array(starts, np.int64)
    return Scanned(
        keys=keys,
        start_n=start_n,
        length_n=np.diff(start_n, append=at),
        at_n=np.arange(part.first, part.first + len(keys)),
    )


def _rows(part: CsvPart, lines: _Lines) -> Iterator[list[str]]:
    reader = csv.reader(iter(lines), delimiter=part.delimiter)
    for row in iter(lambda: trusting(part.path, lambda: next(reader, None)), None):
        if len(row) > 1 or row and row[0].strip():  # blank lines are no rows
            yield row


def write(plan: Plan, sources: Sequence[Source], path: str) -> None:
    """Write a csv: the line of names, and the lines of a plan in its order.

    Raises:
        PoolError: The csv is not what it was.
    """
    source = sources[0]
    with open_file(source.protocol, source.path) as file, open(path, "wb") as out:
        out.write(_ended(trusting(source.path, lambda: file.read(source.part.at))))
        for lo in range(0, len(plan), _CHUNK):
            part = plan.part(lo, lo + _CHUNK)
            start, end = part.start_M, part.start_M + part.length_M
            begins = np.flatnonzero(np.r_[True, start[1:] != end[:-1]])
            for first, last in zip(begins.tolist(), [*(begins[1:] - 1).tolist(), len(part) - 1], strict=True):
                out.write(_ended(_read(file, source.path, int(start[first]), int(end[last]))))


def _read(file: IO[bytes], path: str, start: int, end: int) -> bytes:
    trusting(path, lambda: file.seek(start))
    found = trusting(path, lambda: file.read(end - start))
    if len(found) < end - start:
        raise PoolError(f"{path}: ends before byte {end:,}; it was changed, start again")
    return found


def _ended(lines: bytes) -> bytes:
    return lines if lines.endswith(b"\n") else lines + b"\n"
