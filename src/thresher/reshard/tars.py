"""Tars copied by byte ranges: nothing is decoded, and members that keep their names keep their headers."""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from functools import partial
from typing import IO, Any

import numpy as np

from thresher.data.layouts.webdataset import TarPart
from thresher.errors import PoolError
from thresher.export.keys import hashes_of
from thresher.io.open import open_file, trusting
from thresher.io.paths import climbs
from thresher.io.tar import BLOCK, NOTES, Group, Member, Window, groups, json_in
from thresher.io.tar_fast import Skim, Stretch, stretch
from thresher.reshard.plan import Ints, Matched, PlaceError, Places, Plan, Scanned, Source

RECORD = tarfile.RECORDSIZE
_AHEAD = 8 << 20  # bytes that the disk is asked for before they are needed
_COPY = 1 << 20  # bytes copied at a time
_FEW, _MANY = 512, 8192  # headers looked at at a time: at first, and once they were ordinary
_APART = 64  # samples read one by one where they are not
_UID = re.compile(rb'"uid"\s*:\s*"([0-9A-Fa-f]{32})"')
_LONG = frozenset((b"L", b"x", b"X"))  # headers that belong to the member after them


# --- finding --------------------------------------------------------------------------------------


def scan(part: TarPart, *, uids: bool) -> Scanned:
    """Read the headers of a tar.

    Args:
        part: The tar.
        uids: Whether the samples' uids are wanted.
    """
    found = _Samples(uids)
    damage = ""
    try:
        with open_file(part.protocol, part.path) as file:
            window = _window(file, part.protocol, part.path, _AHEAD)
            found.read(window, part.path)
    except PoolError as error:
        damage = str(error).removeprefix(f"{part.path}: ")
    return found.scanned(damage)


class _Samples:
    """The samples of a tar, while it is read."""

    def __init__(self, uids: bool) -> None:
        """Begin with none; note uids where they are wanted."""
        self._keys: list[str] = []
        self._uids: list[str] | None = [] if uids else None
        self._starts: list[int] = []
        self._lengths: list[int] = []
        self._aside: list[tuple[str, str]] = []

    def read(self, window: Window, path: str) -> None:
        """Add all, stretch by stretch where they are ordinary, else one by one.

        Raises:
            PoolError: As :func:`thresher.data.layouts.webdataset.groups`; the samples before the damage are there.
        """
        at, most, more = 0, _FEW, True
        while more:
            if isinstance(window, Skim) and (found := stretch(window, at, most, jsons=self._uids is not None)):
                self._add(found)
                at, most = found.end, min(2 * most, _MANY)
                continue
            most, more = _FEW, False
            for number, group in enumerate(groups(window, path, at), 1):
                self._add_one(window, group)
                if number == _APART and isinstance(window, Skim):
                    at, more = next(reversed(group.members.values())).end, True
                    break

    def _add(self, found: Stretch) -> None:
        self._keys += found.keys
        self._starts += found.start_n.tolist()
        self._lengths += np.diff(found.start_n, append=found.end).tolist()
        if self._uids is not None:
            self._uids += map(_uid, found.jsons)

    def _add_one(self, window: Window, group: Group) -> None:
        uid = ""
        if self._uids is not None and (json := group.members.get("json")) and json.size <= NOTES:
            uid = _uid(window.read(json.offset, json.size))
        if why := unsafe(group):
            self._aside.append((uid or group.key, why))
            return
        start, length = extent(window, group)
        self._keys.append(group.key)
        self._starts.append(start)
        self._lengths.append(length)
        if self._uids is not None:
            self._uids.append(uid)

    def scanned(self, damage: str) -> Scanned:
        """Return them."""
        return Scanned(
            keys=self._keys,
            start_n=np.array(self._starts, np.int64),
            length_n=np.array(self._lengths, np.int64),
            uids=self._uids,
            aside=tuple(self._aside),
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


def _window(file: IO[bytes], protocol: str, path: str, ahead: int = 0) -> Window:
    return Skim(file, path, ahead) if protocol == "file" and hasattr(os, "pread") else Window(file, path)


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


def _uid(content: bytes) -> str:
    """Return the uid that a json tells, "" where there is none."""
    # One object, no other in it: its only uid is the one.
    if content.count(b"{") == content.count(b'"uid"') == 1 and (told := _UID.search(content)):
        return told[1].decode("ascii")
    uid = json_in(content).get("uid")
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
