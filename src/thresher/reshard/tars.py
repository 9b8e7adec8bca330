"""Tars copied by byte ranges: nothing is decoded, and members that keep their names keep their headers."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator, Sequence
from functools import partial
from typing import IO, Any

import numpy as np

from thresher.data.parts import Ints
from thresher.errors import PoolError
from thresher.io.open import open_file, trusting
from thresher.io.tar import BLOCK, LONG, Member, Window, groups, notes_of
from thresher.io.tar_fast import window_of
from thresher.reshard.plan import Plan, Source

RECORD = tarfile.RECORDSIZE
_COPY = 1 << 20  # bytes copied at a time


def write(plan: Plan, sources: Sequence[Source], path: str) -> int:
    """Write a tar of the samples of a plan.

    Args:
        plan: A shard of it.
        sources: What it numbers.
        path: File to write.

    Returns:
        Its bytes.

    Raises:
        PoolError: A source is not what it was.
    """
    length_M = -(-np.abs(plan.length_M) // BLOCK) * BLOCK
    made: dict[int, list[bytes | tuple[int, int]]] = {}
    odd_M = (plan.copy_M > 0) | (plan.length_M < 0)
    if odd_M.any():
        for number, positions in plan.by_source():
            source, positions = sources[number], positions[odd_M[positions]]
            if len(positions):
                with open_file(source.protocol, source.path) as file:
                    window = window_of(file, source.protocol, source.path)
                    for i in positions.tolist():
                        made[i] = _pieces(window, source.path, plan, i)
                        length_M[i] = sum(len(one) if isinstance(one, bytes) else one[1] for one in made[i])
    begin_M = np.cumsum(length_M) - length_M
    total = -(-(int(length_M.sum()) + 2 * BLOCK) // RECORD) * RECORD
    with open(path, "r+b", buffering=0) as out:
        out.truncate(total)
        copying = _Copy(out)
        for number, positions in plan.by_source():
            source = sources[number]
            with open_file(source.protocol, source.path) as file:
                for start, to, size in _runs(plan, positions, begin_M, length_M, odd_M):
                    copying.copy(file, source.path, start, to, size)
                for i in positions[odd_M[positions]].tolist():
                    to = int(begin_M[i])
                    for piece in made[i]:
                        if isinstance(piece, bytes):
                            copying.put(piece, to)
                            to += len(piece)
                        else:
                            start, size = piece
                            copying.copy(file, source.path, start, to, min(size, source.size - start))
                            to += size
        copying.flush()
    return total


def _runs(
    plan: Plan, positions: Ints, begin_M: Ints, length_M: Ints, odd_M: np.ndarray[tuple[int], np.dtype[np.bool_]]
) -> Iterator[tuple[int, int, int]]:
    """Yield (where from, where to, bytes) of samples copied as they are, neighbours on both sides as one."""
    plain = positions[~odd_M[positions]]
    if not len(plain):
        return
    start, to, size = plan.start_M[plain], begin_M[plain], length_M[plain]
    breaks = (start[1:] != start[:-1] + size[:-1]) | (to[1:] != to[:-1] + size[:-1])
    lo = np.flatnonzero(np.r_[True, breaks])
    hi = np.r_[lo[1:], len(plain)] - 1
    last = plan.length_M[plain]  # without the padding that a file cut short lacks
    total = start[hi] + last[hi] - start[lo]
    yield from zip(start[lo].tolist(), to[lo].tolist(), total.tolist(), strict=True)


def _pieces(window: Window, path: str, plan: Plan, i: int) -> list[bytes | tuple[int, int]]:
    """Return what a sample is made of that cannot be copied in one: bytes, or (where from, bytes) padded."""
    start, end = int(plan.start_M[i]), int(plan.start_M[i] + abs(plan.length_M[i]))
    copy, pieces = int(plan.copy_M[i]), list[bytes | tuple[int, int]]()
    group = next(groups(window, path, start), None)
    if group is None:
        raise PoolError(f"{path}: has no sample at byte {start:,} any more; it was changed, start again")
    name = plan.renamed(group.key, copy)
    for member in group.members.values():
        if member.end > -(-end // BLOCK) * BLOCK:
            raise PoolError(f"{path}: has another sample at byte {start:,}; it was changed, start again")
        if copy:
            pieces.append(_header(window, member, name + member.name[len(group.key) :]))
        else:
            pieces += [(at, to - at) for kind, at, to in notes_of(window, member) if kind in LONG]
            pieces.append((member.offset - BLOCK, BLOCK))
        pieces.append((member.offset, member.end - member.offset))
    return pieces


def _header(window: Window, member: Member, name: str) -> bytes:
    """Return the headers of a member under another name."""
    try:
        info = tarfile.TarInfo.frombuf(window.read(member.offset - BLOCK, BLOCK), "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        info = tarfile.TarInfo()
    return header(name, member.size, info)


def header(name: str, size: int, like: tarfile.TarInfo | None = None) -> bytes:
    """Return the headers of a plain file; what else they tell is that of another, or the same for all."""
    info = like or tarfile.TarInfo()
    info.name, info.size, info.type, info.linkname = name, size, tarfile.REGTYPE, ""
    return info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")


class _Copy:
    """Puts bytes to their places in a file, those that come to stand together in one.

    Whole, aligned stretches take the system two thirds of the time that a write for every sample takes.
    """

    def __init__(self, out: IO[bytes]) -> None:
        """Write to ``out``."""
        self._out = out
        self._held = memoryview(bytearray(_COPY))
        self._to, self._full = 0, 0  # where what is held is to stand, and how much that is

    def copy(self, file: Any, path: str, start: int, to: int, size: int) -> None:
        """Copy bytes of another file, called ``path`` in messages.

        Raises:
            PoolError: It ends before.
        """
        trusting(path, partial(file.seek, start))
        end = to + size
        while to < end:
            done = trusting(path, partial(file.readinto, self._room(to, end - to)))
            if not done:
                raise PoolError(f"{path}: ends before byte {start + size:,}; it was changed, start again")
            self._full += done
            to += done

    def put(self, content: bytes, to: int) -> None:
        """Write bytes that are at hand."""
        rest = memoryview(content)
        while rest:
            room = self._room(to, len(rest))
            room[:] = rest[: len(room)]
            self._full += len(room)
            to, rest = to + len(room), rest[len(room) :]

    def flush(self) -> None:
        """Write what is held."""
        rest, self._full = self._held[: self._full], 0
        while rest:
            done = os.pwrite(self._out.fileno(), rest, self._to)
            rest, self._to = rest[done:], self._to + done

    def _room(self, to: int, size: int) -> memoryview:
        """Return memory for what is to stand at ``to`` and after: ``size`` bytes, or 1 and more."""
        if self._to + self._full != to or not to % _COPY:
            self.flush()
            self._to = to
        return self._held[self._full : self._full + min(size, _COPY - to % _COPY)]
