"""Webdataset: tars in which members with the same key are a sample."""

from __future__ import annotations

import glob
import os
import re
import shlex
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from functools import cached_property, partial
from itertools import islice
from typing import IO, Any, ClassVar

import numpy as np

from thresher.data.compressed import COMPRESSED, stem_of_tar, unpacking
from thresher.data.indexed import listed
from thresher.data.location import Location
from thresher.data.members import JSON, NO_NAMES, Found, Members
from thresher.data.options import DataOptions
from thresher.data.parts import Data, Form, Ints, Part, Scanned
from thresher.data.samples import Place, Sample, caption_of
from thresher.errors import PoolError, UnreachedError
from thresher.io.listing import natural
from thresher.io.open import open_file, protocol_of, trusting
from thresher.io.paths import writable
from thresher.io.pictures import ENDINGS
from thresher.io.remote import file_system, requested
from thresher.io.spans import open_spans
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
from thresher.io.tar_apart import NONE, Apart, Run, Watch, apart_among, find_apart, not_joined, run_at, whole
from thresher.io.tar_fast import Stretch, runs, window_of
from thresher.io.tar_index import IndexProblem, index_path
from thresher.runtime.format import counted

_OTHERS = (".parquet", ".pq", ".arrow", ".csv", ".tsv", ".jsonl", ".ndjson", *(f".{ending}" for ending in ENDINGS))
_AHEAD = 8 << 20  # bytes of read-ahead
_SAMPLE = 32 << 10  # bytes in which the headers of most samples are
_LOOKED_AT, _LOOKED_IN = 200, 20  # samples looked at of a tar, and tars, for what the user names
_UID = re.compile(rb'"uid"\s*:\s*"([0-9A-Fa-f]{32})"')


@dataclass(frozen=True)
class Webdataset:
    """Tars: a folder of them, or a path with ``{00000..00099}``, ``*`` or ``::``.

    ``--image``, ``--caption`` and ``--key`` name members and attributes, see :mod:`thresher.data.members`.
    """

    name: ClassVar[str] = "webdataset"
    rank: ClassVar[int] = 10
    looks_like: ClassVar[str] = "*.tar, or a path such as {00000..00099}.tar"

    def recognise(self, where: Location) -> bool:
        """Recognise .tar files, folders with them, or a folder of such folders without tables."""
        text = where.text.lower()
        if text.endswith((".tar", *COMPRESSED)) and not where.is_folder or ".tar::" in text:
            return True
        if not where.local and not where.has(".tar"):  # one listing serves all readers
            return False
        if tars_at(where.text) or _tars_below(where):
            return True
        return where.is_folder and bool(_in_folder(where.text, COMPRESSED)) and not where.has(*_OTHERS)

    def open(self, where: Location, options: DataOptions) -> Data:
        """List the tars. If the user names members or attributes, look at samples until they are found.

        Raises:
            PoolError: Some of the tars do not exist, or they are compressed.
            UsageError: No sample looked at has what the user names, or an option is given that tars do not use.
        """
        if below := _tars_below(where):
            raise PoolError(f"{where.text}: has its tars in {below}; give that instead")
        _refuse_compressed(where.text)
        tars = tars_at(where.text)
        if not tars:
            raise PoolError(f"{where.text}: has no tars")
        return tars_of(self.name, where.text, tars, options)


@dataclass(frozen=True)
class Indexed:
    """What an index says about a tar.

    Attributes:
        index: The index, for messages.
        samples: Number of samples.
    """

    index: str
    samples: int


def tars_of(
    kind: str,
    location: str,
    tars: Sequence[tuple[str, str]],
    options: DataOptions,
    indexed: Sequence[Indexed | None] | None = None,
) -> Tars:
    """Return tars as data. If the user names members or attributes, look at samples until they are found.

    Args:
        kind: Name of the reader.
        location: Where they are, for messages.
        tars: Protocol and path of each.
        options: What the user names.
        indexed: What an index says about each.

    Raises:
        UsageError: No sample looked at has what the user names, or an option is given that tars do not use.
    """
    named = Members.of(location, options)
    make = ChosenTarPart if named.image or named.caption or named.caption_in else TarPart
    parts = tuple(
        make(path, protocol, named=named, indexed=one)
        for (protocol, path), one in zip(tars, indexed or [None] * len(tars), strict=True)
    )
    if named != NO_NAMES and (refusal := _looked(parts, named, captions=False).refusal(location)):
        raise refusal
    return Tars(location, kind, parts)


@dataclass(frozen=True)
class Tars(Data):
    """Tars at a location."""

    parts: tuple[TarPart, ...]

    def captions_elsewhere(self) -> str:
        """Return which members and attributes the samples have that may be captions, "" if none."""
        return _looked(self.parts, self.parts[0].named, captions=True).captions_elsewhere(self.location)


def _looked(parts: Sequence[TarPart], named: Members, *, captions: bool) -> Found:
    """Look at samples of some tars until they have what is wanted; usually the first one has it."""
    some = [parts[i] for i in np.unique(np.linspace(0, len(parts) - 1, min(_LOOKED_IN, len(parts))).astype(int))]
    found = Found(named)
    for joined in (False, True):  # joining reads all headers
        found = Found(named)
        for part in some:
            try:
                for members, info, caption in islice(part.look(joined=joined), _LOOKED_AT):
                    found.add(members, info, caption)
                    if found.done(captions=captions):
                        return found
            except (PoolError, UnreachedError):  # reported when the samples are read
                continue
    return found


@dataclass(frozen=True)
class TarPart(Part):
    """The samples of one tar, in the order of their first members.

    Attributes:
        named: The members and attributes that the user names.
        indexed: What an index says about the tar; it is compared when all samples are read.
    """

    named: Members = NO_NAMES
    indexed: Indexed | None = None

    unit: ClassVar[str] = "tar"
    copied_as: ClassVar[Form | None] = "webdataset"
    scanning_is_slow: ClassVar[bool] = True

    def stamp(self) -> list[Any]:
        """Return size and time of the file, and what the user names in it."""
        names = astuple(self.named)
        return [*super().stamp(), *(names if any(names) else ())]

    def samples(self) -> Iterator[Sample]:
        """Yield the samples, each with the position of its image.

        Raises:
            PoolError: The tar is damaged; or it is not on this machine, and members of samples lie apart in it. Raised
                after the samples before the damage, or after all.
        """
        count, joined = 0, False
        with open_file(self.protocol, self.path) as file:
            for window, sample, apart in self._whole(file):
                count, joined = count + 1, joined or apart
                yield self._sample(window, sample, apart=apart)
        if wrong := "" if joined else self._not_as_indexed(count):
            raise PoolError(f"{self.path}: {wrong}")

    def _not_as_indexed(self, count: int) -> str:
        """Return how the number of samples differs from that of the index, "" if it does not."""
        if self.indexed is None or count == self.indexed.samples:
            return ""
        return (
            f"has {counted(count, 'sample')}, but {self.indexed.index} says {self.indexed.samples:,}; write the index "
            "again, or give the tars themselves"
        )

    def look(self, *, joined: bool) -> Iterator[tuple[Sequence[str], Mapping[str, Any], str]]:
        """Yield the extensions of the members of each sample, its json, and its caption.

        Args:
            joined: Whether to join samples whose members lie apart.
        """
        with open_file(self.protocol, self.path) as file:
            for window, sample, _ in self._whole(file, joined=joined):
                info = json_of(window, sample.members.get(JSON))
                yield list(sample.members), info, self._caption(window, sample, info)

    def _whole(self, file: IO[bytes], *, joined: bool = True) -> Iterator[tuple[Window, TarSample, bool]]:
        """Yield each sample with a window to read it, and whether its members lie apart."""
        apart, watch = NONE, Watch()
        here = joined and self.protocol == "file"
        near = window_of(file, self.protocol, self.path)
        if here:
            apart = find_apart(window_of(file, self.protocol, self.path, _AHEAD), self.path)
        window = Window(file, self.path)
        for sample in tar_samples(window, self.path):
            if not here:
                watch.add(sample)
            elif apart.is_piece(sample.start):
                continue
            if pieces := apart.pieces(sample.start):
                yield near, whole(near, self.path, sample, pieces), True
            else:
                yield window, sample, False
        self._remember_end(window)
        if joined and not here:
            self._refuse_apart(window, watch.found())

    def _refuse_apart(self, window: Window, apart: Apart) -> None:
        if len(apart.samples):
            first = run_at(window, self.path, int(apart.samples[0]))
            raise not_joined(self.path, apart, first.key if first else "")

    def _sample(self, window: Window, sample: TarSample, *, apart: bool = False) -> Sample:
        members, named = sample.members, self.named
        info = json_of(window, members.get(JSON))
        image, uid = named.image_in(members), info.get("uid")
        picture, why = members.get(image), "" if image else named.why_no_image(members, sample.linked)
        key = sample.key
        if named.key_in:
            own, lacking = named.key_of(info)
            key, picture, why = own or key, None if lacking else picture, lacking or why
        return Sample(
            key=key,
            text=self._caption(window, sample, info),
            picture=Place(self.path, picture.offset, picture.size, self.protocol) if picture else None,
            at=sample.start,
            uid=writable(uid) if isinstance(uid, str) else "",
            why=why,
            columns=self._columns(info),
            notes=named.notes(tuple(members), apart=apart),
        )

    def _caption(self, window: Window, sample: TarSample, info: Mapping[str, Any]) -> str:
        if text := sample.members.get(self.named.caption_member(sample.members)):
            return caption_of(window.read(text.offset, min(text.size, NOTES)))
        return self.named.caption_of(info)

    def _columns(self, info: Mapping[str, Any]) -> Mapping[str, Any]:
        return {}

    def scan(self, *, uids: bool = False) -> Scanned:
        """Read the headers, and the JSON members if uids are requested or keys are in them."""
        samples = Samples(self.named, uids=uids, renamed=self.copied_as is not None)
        damage = ""
        try:
            with open_file(self.protocol, self.path) as file:
                window = window_of(file, self.protocol, self.path, _AHEAD)
                try:
                    samples.read(window, self.path)
                    self._remember_end(window)
                finally:
                    apart = samples.join(window, here=self.protocol == "file")
                self._refuse_apart(window, apart)
        except PoolError as error:
            damage = str(error).removeprefix(f"{self.path}: ")
        scanned = samples.scanned(damage)
        if damage or samples.joined:
            return scanned
        return replace(scanned, damage=self._not_as_indexed(len(scanned.keys) + len(scanned.skipped)))

    def scan_chosen(self, choose: Callable[[Sequence[str]], Ints]) -> Scanned:
        """Read only the headers of the samples with chosen keys, if the tar is remote and has an index, else of all.

        Args:
            choose: Returns which of some keys are chosen, ascending.

        Returns:
            The chosen samples, or all.
        """
        if self.protocol == "file" or self.named.key_in or self.indexed is not None:
            return self.scan()
        try:
            if (found := listed(self.protocol, self.path)) is None:
                return self.scan()
            samples = Samples(self.named, uids=False, renamed=self.copied_as is not None)
            chosen = choose([sample.key for sample in found.samples])
            for window, sample in found.opened([found.samples[i] for i in chosen.tolist()]):
                samples.add_one(window, sample)
            return replace(samples.scanned(""), by_index=True)
        except IndexProblem as problem:
            return replace(self.scan(), said=self._not_used(problem))

    def _not_used(self, problem: IndexProblem) -> str:
        return f"{index_path(self.path)}: is not used, because it {problem}; write it again, or remove it"

    def read_chosen(
        self, choose: Callable[[Scanned], Ints], *, uids: bool, say: Callable[[str], None]
    ) -> Iterator[tuple[Window, TarSample]]:
        """Yield the chosen samples in their order, each with a window to read its members.

        Of a remote tar with an index, only these samples are read; else the headers of all, too.

        Args:
            choose: Returns which of the samples are chosen, ascending; it is given their keys, and uids if they are
                needed.
            uids: Whether uids are needed, which are not in an index.
            say: Called with why an index is not used.

        Raises:
            PoolError: The tar is damaged; raised before the first sample, or if it changes.
        """
        done = set[int]()
        try:
            found = None if uids or self.protocol == "file" else listed(self.protocol, self.path)
            if found is not None:
                samples = found.samples
                none = np.zeros(len(samples), np.int64)
                chosen = choose(Scanned([sample.key for sample in samples], none, none))
                for window, sample in found.opened([samples[i] for i in chosen.tolist()], contents=True):
                    yield window, sample
                    done.add(sample.start)
                return
        except IndexProblem as problem:
            say(self._not_used(problem))
        scanned = self.scan(uids=uids)
        if scanned.damage:
            raise PoolError(f"{self.path}: {scanned.damage}")
        starts = scanned.start_n[choose(scanned)].tolist()
        for window, sample, _ in self._whole_at(np.array([start for start in starts if start not in done], np.int64)):
            yield window, sample

    def scan_at(self, at_c: Ints) -> Scanned:
        """Read only the headers of the samples at some bytes, after those of all if the tar is on this machine.

        Raises:
            PoolError: There is no sample at a position, or it must not be copied.
        """
        samples = Samples(self.named, uids=False, renamed=self.copied_as is not None)
        for window, sample, apart in self._whole_at(at_c, headers=True):
            samples.add_one(window, sample, joined=apart)
        scanned = samples.scanned("")
        if scanned.skipped:
            raise PoolError(f"{self.path}: has a sample that {scanned.skipped[0][1]}")
        return scanned

    def chosen(self, start_c: Ints) -> Iterator[Sample]:
        """Yield the samples at some bytes."""
        yield from (sample for _, _, sample in self.opened(start_c))

    def opened(self, start_c: Ints) -> Iterator[tuple[Window, TarSample, Sample]]:
        """Yield the samples at some bytes, each with its members and a window on the tar."""
        for window, sample, apart in self._whole_at(start_c):
            yield window, sample, self._sample(window, sample, apart=apart)

    def _whole_at(self, at_c: Ints, *, headers: bool = False) -> Iterator[tuple[Window, TarSample, bool]]:
        """Yield the samples at some bytes; of a remote tar that is read only for its ``headers``, read little else."""
        spans = [(at, at + _SAMPLE) for at in at_c.tolist()] if headers and self.protocol != "file" else None
        opened = open_file(self.protocol, self.path) if spans is None else open_spans(self.protocol, self.path, spans)
        with opened as file:
            apart = NONE
            if self.protocol == "file":
                apart = find_apart(window_of(file, self.protocol, self.path, _AHEAD), self.path)
            window = window_of(file, self.protocol, self.path) if spans is None else Window(file, self.path, TAR_BLOCK)
            for at in at_c.tolist():
                sample = None if apart.is_piece(at) else run_at(window, self.path, at)
                if sample is None:
                    raise PoolError(f"{self.path}: has no sample at byte {at:,}; it has changed, start again")
                pieces = apart.pieces(at)
                yield window, whole(window, self.path, sample, pieces) if pieces else sample, bool(pieces)

    def members(self) -> Iterator[Sequence[str]]:
        """Yield the file extensions of the members of each sample."""
        with open_file(self.protocol, self.path) as file:
            for _, sample, _ in self._whole(file):
                yield list(sample.members)

    def cut_off(self) -> str:
        """Return what is wrong with the tar, "" if nothing; if both ends are valid, only these are read."""
        try:
            with open_file(self.protocol, self.path) as file:
                window = Window(file, self.path, 2 * TAR_BLOCK)
                next(members(window, self.path), None)
                if window.size % TAR_BLOCK or not _is_ended(window):
                    for _ in members(Window(file, self.path), self.path):
                        pass
                    return f"{self.path}: does not end in empty blocks, as tars do; it may be cut off"
        except PoolError as error:
            return str(error)
        return ""

    def lacks_end(self) -> bool:
        """Return whether the tar does not end in empty blocks; nothing is read if this part was read to its end."""
        return not self._has_end

    @cached_property
    def _has_end(self) -> bool:
        with open_file(self.protocol, self.path) as file:
            return _is_ended(Window(file, self.path, 2 * TAR_BLOCK))

    def _remember_end(self, window: Window) -> None:
        """Look at the end of a tar that was just read, so that it is not requested once more."""
        vars(self)["_has_end"] = _is_ended(window)


def _is_ended(window: Window) -> bool:
    """Return whether a tar ends in empty blocks."""
    return not window.read(max(0, window.size - 2 * TAR_BLOCK), 2 * TAR_BLOCK).strip(b"\0")


@dataclass(frozen=True)
class ChosenTarPart(TarPart):
    """The samples of one tar of which the user names the image or the caption: resharding writes these."""

    copied_as: ClassVar[Form | None] = None

    def _columns(self, info: Mapping[str, Any]) -> Mapping[str, Any]:
        return info


# --- the headers of a tar ---------------------------------------------------------------------------


class Samples:
    """Collects the samples of a tar while it is read."""

    def __init__(self, named: Members = NO_NAMES, *, uids: bool, renamed: bool = False) -> None:
        """Start without samples.

        Args:
            named: What the user names; a sample without the key that it names is skipped.
            uids: Whether to collect uids.
            renamed: Whether to collect the names of samples that have keys of their own.
        """
        self._named, self._renamed = named, renamed and bool(named.key_in)
        self._names: list[str] = []  # the keys of webdataset
        self._keys: list[str] = self._names if not named.key_in else []
        self._uids: list[str] | None = [] if uids else None
        self._starts: list[int] = []
        self._lengths: list[int] = []
        self._skipped: list[tuple[str, str]] = []
        self._runs: list[Stretch | list[Row]] = []  # headers of consecutive samples, and how many samples precede them
        self._before: list[int] = []
        self._lacking: dict[int, str] = {}  # why samples have no key
        self._pieces: dict[int, list[int]] = {}  # of samples whose members lie apart; [] if they were joined before
        self._left_out: set[int] = set()
        self._kept_n: Ints = np.empty(0, np.int64)

    def read(self, window: Window, path: str) -> None:
        """Add all samples.

        Raises:
            PoolError: As in :func:`thresher.io.tar.tar_samples`; the samples before the damage are added.
        """
        for run in runs(window, path, jsons=self._uids is not None or bool(self._named.key_in)):
            if isinstance(run, Stretch):
                self._add(run)
            else:
                self.add_one(window, run)

    def _add(self, run: Stretch) -> None:
        self._before.append(len(self._names))
        self._runs.append(run)
        self._names += run.keys
        self._starts += run.start_n.tolist()
        self._lengths += np.diff(run.start_n, append=run.end).tolist()
        if self._named.key_in:
            for json in run.jsons:
                self._add_key(json)
        if self._uids is not None:
            self._uids += map(_uid, run.jsons)

    def _add_key(self, json: bytes) -> None:
        key, why = self._named.key_of(json_in(json))
        if why:
            self._lacking[len(self._keys)] = why
        self._keys.append(key)

    def add_one(self, window: Window, sample: TarSample, *, joined: bool = False) -> None:
        """Add a sample, or record why it must not be copied; ``joined`` if its members lie apart in the tar."""
        content = b""
        if (json := sample.members.get(JSON)) and json.size <= NOTES and (self._uids is not None or self._named.key_in):
            content = window.read(json.offset, json.size)
        uid = _uid(content) if self._uids is not None else ""
        if why := why_unsafe(sample):
            self._skipped.append((uid or sample.key, why))
            return
        start, length = extent(window, sample)
        if joined:
            self._pieces[len(self._names)] = []
        self._before.append(len(self._names))
        self._runs.append(rows_of(window, sample))
        self._names.append(sample.key)
        self._starts.append(start)
        self._lengths.append(length)
        if self._named.key_in:
            self._add_key(content)
        if self._uids is not None:
            self._uids.append(uid)

    def join(self, window: Window, *, here: bool) -> Apart:
        """Join the samples whose members lie apart if the tar is on this machine, else leave them out.

        Returns:
            The pieces that are not joined.
        """
        hash_n = np.fromiter(map(hash, self._names), np.int64, len(self._names))
        start_n = np.array(self._starts, np.int64)
        apart = apart_among(hash_n, start_n, self._endings)
        number = {start: i for i, start in enumerate(self._starts)} if len(apart.start_m) else {}
        for start in apart.samples.tolist():
            sample, pieces = number[start], [number[piece] for piece in apart.pieces(start)]
            self._left_out.update(pieces)
            if not here:
                self._lacking[sample] = "has members that lie apart"
                continue
            self._pieces[sample] = pieces
            last = self._run(pieces[-1])[-1]
            self._lengths[sample] = start - min(sum(last.span), window.size)
            self._join_json(window, sample)
        return NONE if here else apart

    def _endings(self, sample: int) -> Run:
        name = self._names[sample]
        return Run(name, frozenset(row.name[len(name) + 1 :].lower() for row in self._rows(sample) if row.name))

    def _join_json(self, window: Window, sample: int) -> None:
        at = len(self._names[sample]) + 1
        row = next((row for row in self._rows(sample) if row.name[at:].lower() == JSON), None)
        content = window.read(row.offset, row.size) if row is not None and row.size <= NOTES else b""
        if self._uids is not None:
            self._uids[sample] = _uid(content)
        if self._named.key_in:
            self._lacking.pop(sample, None)
            self._keys[sample], why = self._named.key_of(json_in(content))
            if why:
                self._lacking[sample] = why

    @property
    def joined(self) -> bool:
        """Whether members of a sample lie apart."""
        return any(self._pieces.values())

    def scanned(self, damage: str) -> Scanned:
        """Return the samples."""
        keep_n = np.ones(len(self._names), np.bool_)
        lacking = {i: why for i, why in self._lacking.items() if i not in self._left_out}
        keep_n[[*self._left_out, *lacking]] = False
        self._kept_n = np.flatnonzero(keep_n)
        ids = self._names if self._uids is None else self._uids
        skipped = [(ids[i] or self._names[i], why) for i, why in lacking.items()]
        return Scanned(
            keys=self._kept(self._keys),
            start_n=np.array(self._starts, np.int64)[self._kept_n],
            length_n=np.array(self._lengths, np.int64)[self._kept_n],
            uids=None if self._uids is None else self._kept(self._uids),
            skipped=(*self._skipped, *skipped),
            damage=damage,
            headers=self._headers,
            endings=self._endings_of,
            notes=self._notes_of,
            names=self._kept(self._names) if self._renamed else None,
        )

    def _kept(self, of_all: list[str]) -> list[str]:
        return of_all if len(self._kept_n) == len(of_all) else [of_all[i] for i in self._kept_n.tolist()]

    def _headers(self, which: Ints) -> Headers:
        return Headers.of(map(self._rows, self._kept_n[which].tolist()))

    def _endings_of(self, which: Ints) -> Iterator[tuple[str, ...]]:
        for sample in self._kept_n[which].tolist():
            yield tuple(ending_of(row.name) for row in self._rows(sample) if row.name)

    def _notes_of(self, which: int, endings: tuple[str, ...]) -> tuple[str, ...]:
        return self._named.notes(endings, apart=int(self._kept_n[which]) in self._pieces)

    def _rows(self, sample: int) -> list[Row]:
        return [row for piece in (sample, *self._pieces.get(sample, ())) for row in self._run(piece)]

    def _run(self, sample: int) -> list[Row]:
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
    if packed := next((part for part in location.split("::") if part.lower().endswith(COMPRESSED)), ""):
        raise PoolError(f"{packed}: is compressed, and compressed tars have no random access; {unpacking(packed)}")
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


def _in_folder(location: str, endings: tuple[str, ...] = (".tar",)) -> list[tuple[str, str]]:
    if "://" not in location:
        names = trusting(location, lambda: os.listdir(location)) if os.path.isdir(location) else []
        names = [name for name in names if name.lower().endswith(endings) and not name.startswith(".")]
        return [("file", os.path.join(location, name)) for name in sorted(names, key=natural)]
    fs, root = file_system(location)
    paths = requested(location, lambda: fs.glob(f"{root}/*.[tT]*"))
    found = [(protocol_of(fs), str(path)) for path in sorted(paths, key=natural)]
    return [(protocol, path) for protocol, path in found if path.lower().endswith(endings)]


def _refuse_compressed(location: str) -> None:
    """Refuse a folder with compressed tars, so that none of them is passed over.

    Raises:
        PoolError: There are some without a plain tar of the same name; the message says what to type.
    """
    for folder in location.split("::"):
        if folder.lower().endswith(".tar"):
            continue
        plain = {path.lower() for _, path in _in_folder(folder)}
        packed = [path for _, path in _in_folder(folder, COMPRESSED) if f"{stem_of_tar(path)}.tar".lower() not in plain]
        if packed:
            has = f"{counted(len(plain), 'tar')} and " if plain else ""
            others = f", or give only the others: {shlex.quote(folder.rstrip('/') + '/*.tar')}" if plain else ""
            raise PoolError(
                f"{folder}: has {has}{counted(len(packed), 'compressed tar')} (such as {os.path.basename(packed[0])}), "
                f"and compressed tars have no random access; {unpacking(packed[0])}{others}"
            )
