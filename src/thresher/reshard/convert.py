"""Samples of any data as members of a tar: the picture's bytes as they are, its caption, and a json with the rest."""

from __future__ import annotations

import json
import math
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from hashlib import blake2b
from typing import IO, Any
from urllib.parse import quote

import numpy as np

from thresher.data.layouts.csvs import CsvPart
from thresher.data.layouts.folders import FolderPart
from thresher.data.layouts.tables import TablePart
from thresher.data.samples import Sample
from thresher.errors import PoolError
from thresher.io.tar import BLOCK
from thresher.reshard.plan import Ints, Plan, Scanned, Source
from thresher.reshard.tars import RECORD, header

_LONGEST = 180  # characters of a member's name before its ending


def scan(part: FolderPart) -> Scanned:
    """Return the keys of a part of a folder."""
    n = len(part.keys)
    return Scanned(part.keys, np.arange(part.first, part.first + n), np.ones(n, np.int64))


def write(plan: Plan, sources: Sequence[Source], path: str) -> tuple[int, list[tuple[str, str]]]:
    """Write a tar of the samples of a plan, which are in the order of the data.

    Args:
        plan: A shard of it.
        sources: What it numbers.
        path: File to write.

    Returns:
        How many samples were written, and (key, why) of those that could not be.
    """
    written, aside = 0, list[tuple[str, str]]()
    with open(path, "wb") as out:
        for number, positions in plan.by_source():
            copies = plan.copy_M[positions]
            rows, begins = np.unique(plan.start_M[positions], return_index=True)
            ends = np.r_[begins[1:], len(positions)]
            samples = _samples(sources[number].part, rows)
            for sample, lo, hi in zip(samples, begins.tolist(), ends.tolist(), strict=True):
                try:
                    picture = sample.stored()
                    ending = kind_of(picture)
                except PoolError as error:
                    aside.append((sample.key, str(error)))
                    continue
                for copy in copies[lo:hi].tolist():
                    _add(out, plan.renamed(sample.key, copy), sample, picture, ending)
                    written += 1
        out.write(bytes(-(-(out.tell() + 2 * BLOCK) // RECORD) * RECORD - out.tell()))
    return written, aside


def _samples(part: Any, rows: Ints) -> Iterator[Sample]:
    """Yield the samples of some rows of a part, without making the others where that can be."""
    if isinstance(part, FolderPart):
        at = [row - part.first for row in rows.tolist()]
        names, keys, texts = (tuple(column[i] for i in at) for column in (part.names, part.keys, part.captions))
        yield from replace(part, names=names, keys=keys, captions=texts).samples()
        return
    if isinstance(part, TablePart):
        part = replace(part, first=int(rows[0]), rows=int(rows[-1] - rows[0]) + 1)
        wanted = set(rows.tolist())
        yield from (sample for sample in part.samples() if sample.at in wanted)
        return
    csv: CsvPart = part
    for at in rows.tolist():
        yield from replace(csv, at=at, rows=1).samples()


def _add(out: IO[bytes], key: str, sample: Sample, picture: bytes, ending: str) -> None:
    name = safe_name(key)
    told = {"key": key, "caption": sample.text, **({"uid": sample.uid} if sample.uid else {})}
    told |= {column: value for column, value in sample.columns.items() if column not in told}
    content = json.dumps({k: _plain(v) for k, v in told.items()}, ensure_ascii=False, default=str)
    for kind, data in ((ending, picture), ("json", content.encode("utf-8", "replace")),
                       ("txt", sample.text.encode("utf-8", "replace"))):  # fmt: skip
        info = tarfile.TarInfo()
        info.mode = 0o644
        out.write(header(f"{name}.{kind}", len(data), info))
        out.write(data)
        out.write(bytes(-len(data) % BLOCK))


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def safe_name(key: str) -> str:
    """Return a key as the name of a member: other for other keys, one folder deep, and without dots.

    Letters, digits, ``_``, ``-`` and ``~`` stay, all else is written ``%2F`` as in addresses on the web; of a very long
    key what follows the first part is a hash.
    """
    name = quote(key, safe="", errors="surrogatepass").replace(".", "%2E")
    if len(name) <= _LONGEST:
        return name
    return f"{name[: _LONGEST - 33]}~{blake2b(name.encode(), digest_size=16).hexdigest()}"


def kind_of(picture: bytes) -> str:
    """Return the ending of a picture by its first bytes.

    Raises:
        PoolError: None that is known.
    """
    if picture[:4] == b"RIFF" and picture[8:12] == b"WEBP":
        return "webp"
    for begins, ending in _MAGIC:
        if picture.startswith(begins):
            return ending
    raise PoolError(f"is no kind of picture that is known (it begins with {picture[:8]!r})")


_MAGIC = (
    (b"\xff\xd8\xff", "jpg"),
    (b"\x89PNG\r\n\x1a\n", "png"),
    (b"GIF8", "gif"),
    (b"BM", "bmp"),
    (b"II*\0", "tif"),
    (b"MM\0*", "tif"),
    (b"P5", "ppm"),
    (b"P6", "ppm"),
)
