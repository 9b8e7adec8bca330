"""Webdataset: tars in which consecutive members with the same key are a sample."""

from __future__ import annotations

import glob
import os
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np

from thresher.data.location import Location
from thresher.data.options import DataOptions
from thresher.data.parts import Data, Form, Ints, Part, Scanned
from thresher.data.samples import Place, Sample, caption_of
from thresher.errors import PoolError
from thresher.io.listing import natural
from thresher.io.open import open_file, protocol_of, trusting
from thresher.io.paths import visible, writable
from thresher.io.pictures import ENDINGS
from thresher.io.remote import file_system, requested
from thresher.io.tar import (
    NOTES,
    TAR_BLOCK,
    Headers,
    Row,
    TarSample,
    Window,
    ending_of,
    extent,
    json_in,
    json_of,
    members,
    rows_of,
    tar_samples,
    why_unsafe,
)
from thresher.io.tar_fast import FastWindow, Stretch, stretch, window_of

COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
_AHEAD = 8 << 20  # bytes of read-ahead
_FEW, _MANY = 512, 8192  # headers read at a time: at first, and once the previous ones were ordinary
_APART = 64  # samples read one by one if they are not ordinary
_UID = re.compile(rb'"uid"\s*:\s*"([0-9A-Fa-f]{32})"')


@dataclass(frozen=True)
class Webdataset:
    """Tars: a folder of them, or a path with ``{00000..00099}``, ``*`` or ``::``."""

    name: ClassVar[str] = "webdataset"
    rank: ClassVar[int] = 10
    looks_like: ClassVar[str] = "*.tar, or a path such as {00000..00099}.tar"

    def recognise(self, where: Location) -> bool:
        """Recognise .tar files, folders with them, or a folder of such folders without tables."""
        text = where.text.lower()
        if text.endswith((".tar", *COMPRESSED)) and not where.is_folder or ".tar::" in text:
            return True
        return bool(tars_at(where.text) or _tars_below(where))

    def open(self, where: Location, options: DataOptions) -> Data:
        """List the tars.

        Raises:
            PoolError: Some of the tars do not exist, or they are compressed.
        """
        if below := _tars_below(where):
            raise PoolError(f"{where.text}: has its tars in {below}; give that instead")
        tars = tars_at(where.text)
        if not tars:
            raise PoolError(f"{where.text}: has no tars")
        return Data(where.text, self.name, tuple(TarPart(path, protocol) for protocol, path in tars))


@dataclass(frozen=True)
class TarPart(Part):
    """The samples of one tar."""

    unit: ClassVar[str] = "tar"
    copied_as: ClassVar[Form | None] = "webdataset"
    scanning_is_slow: ClassVar[bool] = True

    def samples(self) -> Iterator[Sample]:
        """Yield the samples, each with the position of its image."""
        with open_file(self.protocol, self.path) as file:
            window = Window(file, self.path)
            for sample in tar_samples(window, self.path):
                yield self._sample(window, sample)

    def _sample(self, window: Window, sample: TarSample) -> Sample:
        members = sample.members
        info = json_of(window, members.get("json"))
        text = members.get("txt") or members.get("text") or members.get("caption")
        if text:
            caption = caption_of(window.read(text.offset, min(text.size, NOTES)))
        else:
            caption = next(filter(None, (caption_of(info.get(name)) for name in ("caption", "text"))), "")
        uid = info.get("uid")
        picture = next((members[kind] for kind in ENDINGS if kind in members), None)
        return Sample(
            key=sample.key,
            text=caption,
            picture=Place(self.path, picture.offset, picture.size, self.protocol) if picture else None,
            at=next(iter(members.values())).start,
            uid=writable(uid) if isinstance(uid, str) else "",
            why="" if picture else f"has no image (members: {visible(', '.join(members))})",
        )

    def scan(self, *, uids: bool = False) -> Scanned:
        """Read the headers, and the JSON members if uids are requested."""
        samples = Samples(uids=uids)
        damage = ""
        try:
            with open_file(self.protocol, self.path) as file:
                samples.read(window_of(file, self.protocol, self.path, _AHEAD), self.path)
        except PoolError as error:
            damage = str(error).removeprefix(f"{self.path}: ")
        return samples.scanned(damage)

    def scan_at(self, at_c: Ints) -> Scanned:
        """Read only the headers of the samples at some bytes.

        Raises:
            PoolError: There is no sample at a position, or it must not be copied.
        """
        samples = Samples(uids=False)
        for window, sample in self._samples_at(at_c):
            samples.add_one(window, sample)
        scanned = samples.scanned("")
        if scanned.skipped:
            raise PoolError(f"{self.path}: has a sample that {scanned.skipped[0][1]}")
        return scanned

    def chosen(self, start_c: Ints) -> Iterator[Sample]:
        """Yield the samples at some bytes."""
        yield from (sample for _, _, sample in self.opened(start_c))

    def opened(self, start_c: Ints) -> Iterator[tuple[Window, TarSample, Sample]]:
        """Yield the samples at some bytes, each with its members and a window on the tar."""
        for window, sample in self._samples_at(start_c):
            yield window, sample, self._sample(window, sample)

    def _samples_at(self, at_c: Ints) -> Iterator[tuple[Window, TarSample]]:
        with open_file(self.protocol, self.path) as file:
            window = window_of(file, self.protocol, self.path)
            for at in at_c.tolist():
                sample = next(tar_samples(window, self.path, at), None)
                if sample is None or next(iter(sample.members.values())).start != at:
                    raise PoolError(f"{self.path}: has no sample at byte {at:,}; it has changed, start again")
                yield window, sample

    def members(self) -> Iterator[Sequence[str]]:
        """Yield the file extensions of the members of each sample."""
        with open_file(self.protocol, self.path) as file:
            for sample in tar_samples(Window(file, self.path), self.path):
                yield list(sample.members)

    def cut_off(self) -> str:
        """Return what is wrong with the tar, "" if nothing; if both ends are valid, only these are read."""
        try:
            with open_file(self.protocol, self.path) as file:
                window = Window(file, self.path, 2 * TAR_BLOCK)
                next(members(window, self.path), None)
                if window.size % TAR_BLOCK or window.read(window.size - 2 * TAR_BLOCK, 2 * TAR_BLOCK).strip(b"\0"):
                    for _ in members(Window(file, self.path), self.path):
                        pass
                    return f"{self.path}: does not end in empty blocks, as tars do; it may be cut off"
        except PoolError as error:
            return str(error)
        return ""


# --- the headers of a tar ---------------------------------------------------------------------------


class Samples:
    """Collects the samples of a tar while it is read."""

    def __init__(self, *, uids: bool) -> None:
        """Start without samples; collect uids if requested."""
        self._keys: list[str] = []
        self._uids: list[str] | None = [] if uids else None
        self._starts: list[int] = []
        self._lengths: list[int] = []
        self._skipped: list[tuple[str, str]] = []
        self._runs: list[Stretch | list[Row]] = []  # headers of consecutive samples, and how many samples precede them
        self._before: list[int] = []

    def read(self, window: Window, path: str) -> None:
        """Add all samples, many at a time if they are ordinary, else one by one.

        Raises:
            PoolError: As in :func:`thresher.io.tar.tar_samples`; the samples before the damage are added.
        """
        at, most, more = 0, _FEW, True
        while more:
            if isinstance(window, FastWindow) and (run := stretch(window, at, most, jsons=self._uids is not None)):
                self._add(run)
                at, most = run.end, min(2 * most, _MANY)
                continue
            most, more = _FEW, False
            for number, sample in enumerate(tar_samples(window, path, at), 1):
                self.add_one(window, sample)
                if number == _APART and isinstance(window, FastWindow):
                    at, more = next(reversed(sample.members.values())).end, True
                    break

    def _add(self, run: Stretch) -> None:
        self._before.append(len(self._keys))
        self._runs.append(run)
        self._keys += run.keys
        self._starts += run.start_n.tolist()
        self._lengths += np.diff(run.start_n, append=run.end).tolist()
        if self._uids is not None:
            self._uids += map(_uid, run.jsons)

    def add_one(self, window: Window, sample: TarSample) -> None:
        """Add a sample, or record why it must not be copied."""
        uid = ""
        if self._uids is not None and (json := sample.members.get("json")) and json.size <= NOTES:
            uid = _uid(window.read(json.offset, json.size))
        if why := why_unsafe(sample):
            self._skipped.append((uid or sample.key, why))
            return
        start, length = extent(window, sample)
        self._before.append(len(self._keys))
        self._runs.append(rows_of(window, sample))
        self._keys.append(sample.key)
        self._starts.append(start)
        self._lengths.append(length)
        if self._uids is not None:
            self._uids.append(uid)

    def scanned(self, damage: str) -> Scanned:
        """Return the samples."""
        return Scanned(
            keys=self._keys,
            start_n=np.array(self._starts, np.int64),
            length_n=np.array(self._lengths, np.int64),
            uids=self._uids,
            skipped=tuple(self._skipped),
            damage=damage,
            headers=self._headers,
            endings=self._endings_of,
        )

    def _headers(self, which: Ints) -> Headers:
        return Headers.of(map(self._rows, which.tolist()))

    def _endings_of(self, which: Ints) -> Iterator[tuple[str, ...]]:
        for sample in which.tolist():
            yield tuple(ending_of(row.name) for row in self._rows(sample) if row.name)

    def _rows(self, sample: int) -> list[Row]:
        i = bisect_right(self._before, sample) - 1
        run = self._runs[i]
        return run.rows(sample - self._before[i]) if isinstance(run, Stretch) else run


def _uid(content: bytes) -> str:
    """Return the uid in a JSON member, "" if there is none."""
    # A single object without nested objects: its only uid is the right one.
    if content.count(b"{") == content.count(b'"uid"') == 1 and (match := _UID.search(content)):
        return match[1].decode("ascii")
    uid = json_in(content).get("uid")
    return uid if isinstance(uid, str) else ""


# --- where tars are -------------------------------------------------------------------------------


_TARS = "*.[tT][aA][rR]"


def _tars_below(where: Location) -> str:
    """Return the subfolders with tars of a folder without tars and tables of its own, such as DataComp's ``shards``."""
    if not where.is_folder or tars_at(where.text):
        return ""
    if any(name.lower().endswith((".parquet", ".pq", ".arrow")) for name in os.listdir(where.text)):
        return ""
    paths = glob.glob(os.path.join(glob.escape(where.text), "*", _TARS))
    return "::".join(sorted({os.path.dirname(path) for path in paths}))


def tars_at(location: str) -> list[tuple[str, str]]:
    """Return (protocol, path) of the tars at a location, in order; [] if there are none.

    Args:
        location: Folders with tars, or paths with ``{00000..00099}`` or ``*``, several separated by ``::``; on any
            file system that fsspec supports.

    Raises:
        PoolError: Some of the tars do not exist, or they are compressed.
    """
    if location.lower().endswith(COMPRESSED):
        raise PoolError(f"{location}: is a compressed tar, which has no random access; decompress it to a plain tar")
    folders = [location] if os.path.isdir(location) else location.split("::")
    if all(os.path.isdir(folder) and not folder.lower().endswith(".tar") for folder in folders):
        return [tar for folder in folders for tar in _in_folder(folder)]
    if not location.lower().endswith(".tar") and ".tar::" not in location.lower():
        return _in_folder(location)
    if os.path.isfile(location):  # even if its name contains braces or stars
        return [("file", location)]
    tars: list[tuple[str, str]] = []
    missing: list[str] = []
    for name in (one for part in _parts(location) for one in _expanded(part)):
        if "://" in name:
            fs, path = file_system(name)
            paths = requested(name, partial(fs.glob, path)) if glob.has_magic(path) else [path]
            tars += [(protocol_of(fs), str(one)) for one in sorted(paths, key=natural)]
            continue
        paths = sorted(glob.glob(name), key=natural) if glob.has_magic(name) else [name]
        missing += [path for path in paths if not os.path.isfile(path)] or ([] if paths else [name])
        tars += [("file", path) for path in paths]
    if missing or not tars:
        raise PoolError(
            f"{location}: {missing[0] if missing else 'no file'} does not exist, {len(tars) - len(missing):,} tars do; "
            "give only those that exist"
        )
    if len(set(tars)) < len(tars):
        raise PoolError(f"{location}: names {next(path for one, path in tars if tars.count((one, path)) > 1)} twice")
    return tars


def _expanded(name: str) -> list[str]:
    from braceexpand import braceexpand

    try:
        return list(braceexpand(name))
    except ValueError:
        raise PoolError(f"{name}: a brace is not closed; give a range such as {{00000..00099}}") from None


def _parts(location: str) -> list[str]:
    parts = location.split("::")
    if odd := [part for part in parts if not part.lower().endswith(".tar")]:
        raise PoolError(f"{location}: {odd[0] or 'an empty name'} is not a .tar; separate tars by ::")
    return parts


def _in_folder(location: str) -> list[tuple[str, str]]:
    if "://" not in location:
        names = trusting(location, lambda: os.listdir(location)) if os.path.isdir(location) else []
        names = [name for name in names if name.lower().endswith(".tar") and not name.startswith(".")]
        return [("file", os.path.join(location, name)) for name in sorted(names, key=natural)]
    fs, root = file_system(location)
    paths = requested(location, lambda: fs.glob(f"{root}/{_TARS}"))
    return [(protocol_of(fs), str(path)) for path in sorted(paths, key=natural)]
