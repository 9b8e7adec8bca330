"""Lines of a csv, copied unchanged into one csv with the names of the columns in its first line."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import IO

import numpy as np

from thresher.data.layouts.csv import CsvPart
from thresher.errors import PoolError
from thresher.io.csv import header
from thresher.io.open import open_file, trusting
from thresher.resharding.plan import ReshardPlan, Source

_CHUNK = 100_000  # lines at a time


def write(plan: ReshardPlan, sources: Sequence[Source], path: str) -> None:
    """Write a csv: the header line, and the lines of a plan in its order.

    Raises:
        PoolError: The csv changed since it was read.
    """
    source = sources[0]
    with open_file(source.protocol, source.path) as file, open(path, "wb") as out:
        head = _first_line(source) or _ended(_read(file, source.path, 0, header(file, source.path)[-1]))
        out.write(head.lstrip(b"\r\n"))
        for lo in range(0, len(plan), _CHUNK):
            part = plan.part(lo, lo + _CHUNK)
            start, end = part.start_M, part.start_M + part.length_M
            begins = np.flatnonzero(np.r_[True, start[1:] != end[:-1]])
            for first, last in zip(begins.tolist(), [*(begins[1:] - 1).tolist(), len(part) - 1], strict=True):
                out.write(_ended(_read(file, source.path, int(start[first]), int(end[last]))))


def _first_line(source: Source) -> bytes:
    """Return a line with the names of the columns that the user gave, b"" if the csv has such a line."""
    text = io.StringIO()
    if isinstance(source.part, CsvPart) and source.part.names:
        csv.writer(text, delimiter=source.part.delimiter, lineterminator="\n").writerow(source.part.names)
    return text.getvalue().encode()


def _read(file: IO[bytes], path: str, start: int, end: int) -> bytes:
    trusting(path, lambda: file.seek(start))
    lines = trusting(path, lambda: file.read(end - start))
    if len(lines) < end - start:
        raise PoolError(f"{path}: ends before byte {end:,}; the file was changed, run again")
    return lines


def _ended(lines: bytes) -> bytes:
    return lines if lines.endswith((b"\n", b"\r")) else lines + b"\n"
