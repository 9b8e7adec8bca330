"""Tars copied by byte ranges: nothing is decoded, and members that keep their name keep their header."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator, Sequence
from functools import partial
from typing import IO, Any, NamedTuple

import numpy as np

from thresher.data.parts import Ints
from thresher.errors import PoolError
from thresher.io.open import trusting
from thresher.io.spans import open_spans
from thresher.io.tar import TAR_BLOCK, key_of
from thresher.resharding.plan import ReshardPlan, Source

RECORD = tarfile.RECORDSIZE
_COPY = 1 << 20  # bytes copied at a time


def write(plan: ReshardPlan, sources: Sequence[Source], path: str) -> int:
    """Write a tar of the samples of a plan.

    Args:
        plan: The part of the plan for this shard.
        sources: The sources that the plan refers to by number.
        path: File to write.

    Returns:
        The size of the tar in bytes.

    Raises:
        PoolError: A source changed since it was read.
    """
    length_M = -(-np.abs(plan.length_M) // TAR_BLOCK) * TAR_BLOCK
    made: dict[int, list[_Piece]] = {}
    odd_M = (plan.copy_M > 0) | (plan.length_M < 0)
    for i in np.flatnonzero(odd_M).tolist():
        made[i] = _pieces(plan, i)
        length_M[i] = sum(piece.to_size for piece in made[i])
    begin_M = np.cumsum(length_M) - length_M
    total = -(-(int(length_M.sum()) + 2 * TAR_BLOCK) // RECORD) * RECORD
    with open(path, "r+b", buffering=0) as out:
        out.truncate(total)
        copying = _Copy(out)
        for number, positions in plan.by_source():
            source = sources[number]
            whole, apart = list(_runs(plan, positions, begin_M, length_M, odd_M)), positions[odd_M[positions]].tolist()
            spans = [(start, start + size) for start, _, size in whole]
            spans += [(made[i][0].start, max(piece.end for piece in made[i])) for i in apart]
            with open_spans(source.protocol, source.path, spans) as file:
                for start, to, size in whole:
                    copying.copy(file, source.path, start, to, size)
                for i in apart:
                    _put(copying, file, source, made.pop(i), int(begin_M[i]))
        copying.flush()
    return total


class _Piece(NamedTuple):
    """Bytes of a source to copy, or a header to write with a new name.

    Attributes:
        start: First byte in the source.
        size: Number of bytes in the source; for a header, the size of the member's content.
        to_size: Number of bytes to write.
        name: The new name; "" to copy the bytes.
    """

    start: int
    size: int
    to_size: int
    name: str = ""

    @property
    def end(self) -> int:
        """Byte of the source after it."""
        return self.start + (TAR_BLOCK if self.name else self.size)


def _pieces(plan: ReshardPlan, i: int) -> list[_Piece]:
    """Return the pieces of a sample that cannot be copied as one range."""
    assert plan.index is not None  # noqa: S101 - the plan is of tars
    rows, copy = plan.index.rows(int(plan.source_M[i]), int(plan.start_M[i])), int(plan.copy_M[i])
    if not copy:
        return [_Piece(*row.span, row.span[1]) for row in rows]
    key = key_of(rows[-1].name)
    name, pieces = plan.renamed(key, copy), list[_Piece]()
    for row in rows:
        start, size = row.span
        if row.name:
            renamed = name + row.name[len(key) :]
            pieces.append(_Piece(start, row.size, header_size(renamed), renamed))
            pieces.append(_Piece(row.offset, size - TAR_BLOCK, size - TAR_BLOCK))
    return pieces


def _put(copying: _Copy, file: Any, source: Source, pieces: Sequence[_Piece], to: int) -> None:
    """Write the pieces of a sample one after the other; the bytes of a small sample are read in one call."""
    first, end = pieces[0].start, min(max(piece.end for piece in pieces), source.size)
    held = copying.read(file, source.path, first, end - first) if end - first <= _COPY else None
    for piece in pieces:
        lo, hi = piece.start - first, min(piece.end, end) - first
        if piece.name:
            block = (
                copying.read(file, source.path, piece.start, TAR_BLOCK) if held is None else held[lo : lo + TAR_BLOCK]
            )
            copying.put(_renamed(block, piece), to)
        elif held is None:
            copying.copy(file, source.path, piece.start, to, hi - lo)
        else:
            copying.put(held[lo:hi], to)
        to += piece.to_size


def _renamed(block: bytes, piece: _Piece) -> bytes:
    """Return a header of a source with a new name."""
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        info = tarfile.TarInfo()
    return header(piece.name, piece.size, info)


def _runs(
    plan: ReshardPlan, positions: Ints, begin_M: Ints, length_M: Ints, odd_M: np.ndarray[tuple[int], np.dtype[np.bool_]]
) -> Iterator[tuple[int, int, int]]:
    """Yield (from, to, bytes) of samples copied unchanged; samples adjacent in both files are one range."""
    plain = positions[~odd_M[positions]]
    if not len(plain):
        return
    start, to, size = plan.start_M[plain], begin_M[plain], length_M[plain]
    breaks = (start[1:] != start[:-1] + size[:-1]) | (to[1:] != to[:-1] + size[:-1])
    lo = np.flatnonzero(np.r_[True, breaks])
    hi = np.r_[lo[1:], len(plain)] - 1
    last = plan.length_M[plain]  # without padding, which a truncated file does not have
    total = start[hi] + last[hi] - start[lo]
    yield from zip(start[lo].tolist(), to[lo].tolist(), total.tolist(), strict=True)


def header(name: str, size: int, like: tarfile.TarInfo | None = None) -> bytes:
    """Return the headers of a regular file; the other metadata is taken from ``like``, or the default."""
    info = like or tarfile.TarInfo()
    info.name, info.size, info.type, info.linkname = name, size, tarfile.REGTYPE, ""
    return info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")


def header_size(name: str) -> int:
    """Return the size of what :func:`header` returns; a name over 100 bytes needs a header and blocks of its own."""
    length = len(name.encode("utf-8", "surrogateescape"))
    return TAR_BLOCK if length <= tarfile.LENGTH_NAME else 2 * TAR_BLOCK + -(-(length + 1) // TAR_BLOCK) * TAR_BLOCK


class _Copy:
    """Writes bytes to given offsets of a file; adjacent bytes are buffered and written together.

    Whole, aligned blocks take two thirds of the time that one write per sample takes.
    """

    def __init__(self, out: IO[bytes]) -> None:
        """Write to ``out``."""
        self._out = out
        self._held = memoryview(bytearray(_COPY))
        self._to, self._full = 0, 0  # offset of the buffered bytes in the file, and their number

    def copy(self, file: Any, path: str, start: int, to: int, size: int) -> None:
        """Copy bytes of another file, which errors call ``path``.

        Raises:
            PoolError: The file ends before the last byte.
        """
        trusting(path, partial(file.seek, start))
        end = to + size
        while to < end:
            done = trusting(path, partial(file.readinto, self._room(to, end - to)))
            if not done:
                raise PoolError(f"{path}: ends before byte {start + size:,}; the file was changed, run again")
            self._full += done
            to += done

    def read(self, file: Any, path: str, start: int, size: int) -> bytes:
        """Return bytes of another file, which errors call ``path``.

        Raises:
            PoolError: The file ends before the last byte.
        """
        trusting(path, partial(file.seek, start))
        found: bytes = trusting(path, partial(file.read, size))
        if len(found) < size:
            raise PoolError(f"{path}: ends before byte {start + size:,}; the file was changed, run again")
        return found

    def put(self, content: bytes, to: int) -> None:
        """Write bytes that are in memory."""
        rest = memoryview(content)
        while rest:
            room = self._room(to, len(rest))
            room[:] = rest[: len(room)]
            self._full += len(room)
            to, rest = to + len(room), rest[len(room) :]

    def flush(self) -> None:
        """Write the buffered bytes."""
        rest, self._full = self._held[: self._full], 0
        while rest:
            done = os.pwrite(self._out.fileno(), rest, self._to)
            rest, self._to = rest[done:], self._to + done

    def _room(self, to: int, size: int) -> memoryview:
        """Return buffer space for bytes at offset ``to``: ``size`` bytes, or at least 1."""
        if self._to + self._full != to or not to % _COPY:
            self.flush()
            self._to = to
        return self._held[self._full : self._full + min(size, _COPY - to % _COPY)]
