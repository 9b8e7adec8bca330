"""Lines of a csv copied as they are, into one csv."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import IO

import numpy as np

from thresher.data.layouts.csvs import CsvPart, rows
from thresher.errors import PoolError
from thresher.io.open import open_file, trusting
from thresher.reshard.plan import Plan, Scanned, Source

_CHUNK = 100_000  # lines at a time


def scan(part: CsvPart) -> Scanned:
    """Find where the rows of a part of a csv are; one may have line breaks in quotes, and so several lines."""
    keys: list[str] = []
    places: list[tuple[int, int]] = []
    with open_file(part.protocol, part.path) as file:
        for begin, end, row in islice(rows(file, part.path, part.at, part.delimiter), part.rows):
            keys.append(part.key(row, part.first + len(keys)))
            places.append((begin, end - begin))
    place_n2 = np.array(places, np.int64).reshape(-1, 2)
    return Scanned(
        keys=keys,
        start_n=place_n2[:, 0],
        length_n=place_n2[:, 1],
        at_n=np.arange(part.first, part.first + len(keys)),
    )


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
