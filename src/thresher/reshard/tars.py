"""Tars copied by byte ranges: nothing is decoded, and members that keep their names keep their headers."""

from __future__ import annotations

import errno
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from functools import partial
from typing import IO

import numpy as np

from thresher.data.tars import BLOCK, Group, Member, TarPart, Window, groups, json_of
from thresher.errors import PoolError
from thresher.keys import hashes_of
from thresher.readers.pieces import climbs, open_file, trusting
from thresher.reshard.plan import Ints, Matched, PlaceError, Places, Plan, Scanned, Source

RECORD = tarfile.RECORDSIZE
_PEEK = 4096  # bytes read of a local file at a place
_STEP = 1 << 20  # and at most where reading goes on
_AHEAD = 8 << 20  # that the disk is asked for before they are needed
_COPY = 8 << 20  # bytes copied at a time, where they pass through memory
_UID = re.compile(rb'"uid"\s*:\s*"([0-9A-Fa-f]{32})"')
_LONG = frozenset((b"L", b"x", b"X"))  # headers that belong to the member after them


# --- finding --------------------------------------------------------------------------------------


def scan(part: TarPart, *, uids: bool) -> Scanned:
    """Read the headers of a tar.

    Args:
        part: The tar.
        uids: Whether the samples' uids are wanted.
    """
    keys: list[str] = []
    found_uids: list[str] = []
    places: list[int] = []
    aside: list[tuple[str, str]] = []
    damage = ""
    try:
        with open_file(part.protocol, part.path) as file:
            window = _window(file, part.protocol, part.path, _AHEAD)
            for group in groups(window, part.path):
                uid = _uid(window, group.members.get("json")) if uids else ""
                if why := unsafe(group):
                    aside.append((uid or group.key, why))
                    continue
                keys.append(group.key)
                places += extent(window, group)
                if uids:
                    found_uids.append(uid)
    except PoolError as error:
        damage = str(error).removeprefix(f"{part.path}: ")
    place_n2 = np.array(places, np.int64).reshape(-1, 2)
    return Scanned(
        keys=keys,
        start_n=place_n2[:, 0],
        length_n=place_n2[:, 1],
        uids=found_uids if uids else None,
        aside=tuple(aside),
        damage=damage,
    )


def at_places(part: TarPart, places: Places) -> Matched:
    """Read the headers of the samples at the places given, and nothing else.

    Raises:
        PlaceError: Another sample lies there, or none that may be copied.
    """
    found: list[int] = []
    keys: list[str] = []
    try:
        with open_file(part.protocol, part.path) as file:
            window = _window(file, part.protocol, part.path)
            for at in places.at_c.tolist():
                group = next(groups(window, part.path, at), None)
                if group is None or next(iter(group.members.values())).start != at or unsafe(group):
                    raise PlaceError
                keys.append(group.key)
                found += extent(window, group)
    except PoolError:
        raise PlaceError from None
    if (hashes_of(keys) != places.names_c).any():
        raise PlaceError
    place_c2 = np.array(found, np.int64).reshape(-1, 2)
    return Matched(place_c2[:, 0], place_c2[:, 1], places.times_c, places.names_c, np.full(len(keys), -1, np.int64))


class _Skim(Window):
    """A local file of which little is read: headers, while the disk is asked for what comes, ahead of time."""

    def __init__(self, file: IO[bytes], path: str, ahead: int = 0) -> None:
        """Read ``file``; ask the disk for ``ahead`` bytes at a time, 0 where the places read are far apart."""
        super().__init__(file, path, 0)
        self._handle, self._ahead = file.fileno(), ahead if hasattr(os, "posix_fadvise") else 0
        self._asked, self._end, self._step = 0, 0, _PEEK

    def _fetch(self, offset: int, size: int) -> bytes:
        while self._ahead and self._asked < min(self.size, offset + self._ahead // 2):
            os.posix_fadvise(self._handle, self._asked, self._ahead, os.POSIX_FADV_WILLNEED)
            self._asked += self._ahead
        # What was skipped will be again; what was read on will be, too.
        self._step = min(2 * self._step, _STEP) if 0 <= self._end - offset < _PEEK else _PEEK
        found = os.pread(self._handle, max(0, min(max(size, self._step), self.size - offset)), offset)
        self._end = offset + len(found)
        return found


def _window(file: IO[bytes], protocol: str, path: str, ahead: int = 0) -> Window:
    return _Skim(file, path, ahead) if protocol == "file" and hasattr(os, "pread") else Window(file, path)


def unsafe(group: Group) -> str:
    """Return why the sample must not be copied, "" where it may: its names would lead whoever unpacks it elsewhere."""
    told = "".join((group.key, *group.members))
    if ".." not in told and "\\" not in told and "\0" not in told and told[0] != "/" and told[1:2] != ":":
        return ""  # quickly, for almost all
    name = next((member.name for member in group.members.values() if climbs(member.name)), None)
    return "" if name is None else f"has the name {name!r}, which leads out of its folder"


def extent(window: Window, group: Group) -> tuple[int, int]:
    """Return where a sample begins and its bytes, below 0 where something lies between that is not its own."""
    start = end = next(iter(group.members.values())).start
    whole = True
    for member in group.members.values():
        whole &= member.start == end and (
            member.offset == member.start + BLOCK or all(kind in _LONG for kind, _, _ in _notes(window, member))
        )
        end = member.end
    length = min(end, window.size) - start
    return start, length if whole else -length


def _notes(window: Window, member: Member) -> Iterator[tuple[bytes, int, int]]:
    """Yield the kinds of the headers before a member's own, where they begin, and where what they say ends."""
    at, own = member.start, member.offset - BLOCK
    while at < own:
        digits = window.read(at + 124, 12).strip(b"\0 ")
        end = at + BLOCK + -(-int(digits or b"0", 8) // BLOCK) * BLOCK
        yield window.read(at + 156, 1), at, end
        at = end


def _uid(window: Window, member: Member | None) -> str:
    """Return the uid that a sample's json tells, "" where there is none."""
    if member is None:
        return ""
    content = window.read(member.offset, member.size) if member.size < 1 << 16 else b""
    if content.count(b"{") == 1:  # one object, no other in it: its only uid is the one
        told = _UID.findall(content)
        if len(told) == 1:
            return str(told[0], "ascii")
    uid = json_of(window, member).get("uid")
    return uid if isinstance(uid, str) else ""


# --- writing --------------------------------------------------------------------------------------


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
                    window = _window(file, source.protocol, source.path)
                    for i in positions.tolist():
                        made[i] = _pieces(window, source.path, plan, i)
                        length_M[i] = sum(len(one) if isinstance(one, bytes) else one[1] for one in made[i])
    begin_M = np.cumsum(length_M) - length_M
    total = -(-(int(length_M.sum()) + 2 * BLOCK) // RECORD) * RECORD
    with open(path, "r+b", buffering=0) as out:
        out.truncate(total)
        for number, positions in plan.by_source():
            with open_file(sources[number].protocol, sources[number].path) as file:
                for start, to, size in _runs(plan, positions, begin_M, length_M, odd_M):
                    _copy(file, sources[number], start, out, to, size)
                for i in positions[odd_M[positions]].tolist():
                    to = int(begin_M[i])
                    for piece in made[i]:
                        if isinstance(piece, bytes):
                            _put(out, piece, to)
                            to += len(piece)
                        else:
                            _copy(
                                file, sources[number], piece[0], out, to, min(piece[1], sources[number].size - piece[0])
                            )
                            to += piece[1]
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
            pieces += [(at, to - at) for kind, at, to in _notes(window, member) if kind in _LONG]
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


def _copy(file: IO[bytes], source: Source, start: int, out: IO[bytes], to: int, size: int) -> None:
    """Copy bytes from one file to a place in another, by the system where it can."""
    end = start + size
    if source.protocol == "file" and hasattr(os, "copy_file_range"):
        try:
            while start < end:
                done = os.copy_file_range(file.fileno(), out.fileno(), end - start, start, to)
                if not done:
                    break
                start, to = start + done, to + done
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM):
                raise
    while start < end:
        content = trusting(source.path, partial(_read, file, start, min(_COPY, end - start)))
        if not content:
            raise PoolError(f"{source.path}: ends before byte {end:,}; it was changed, start again")
        _put(out, content, to)
        start, to = start + len(content), to + len(content)


def _read(file: IO[bytes], start: int, size: int) -> bytes:
    file.seek(start)
    return file.read(size)


def _put(out: IO[bytes], content: bytes, to: int) -> None:
    rest = memoryview(content)
    while rest:
        done = os.pwrite(out.fileno(), rest, to)
        rest, to = rest[done:], to + done
