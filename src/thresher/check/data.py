"""A check of raw data before it is embedded: what it holds, what looks wrong, what embedding will cost.

All keys and captions are read if that means reading a few gigabytes at most; otherwise those of some files, spread
evenly over the data. Images are checked on a random sample, the same for the same data, and fully decoded.
"""

from __future__ import annotations

import contextlib
import hashlib
import posixpath
import re
import shlex
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from thresher.check.loader import Loader
from thresher.data import Data, DataOptions, Part, Place, Sample, open_data
from thresher.data.members import APART
from thresher.data.trainable import PILLOW, described
from thresher.errors import PoolError, UnreachedError, UsageError
from thresher.export.keys import hashes_of
from thresher.io.listing import named
from thresher.io.open import file_stamp, open_file, trusting
from thresher.io.paths import has_parent, visible
from thresher.io.pictures import ENDINGS, NARROW, PIXELS, open_encoded, open_rgb
from thresher.runtime.engine import cores
from thresher.runtime.format import counted, percent
from thresher.runtime.process import no_warnings
from thresher.runtime.progress import Progress, Silent
from thresher.runtime.untrusted import load_json

SAMPLE = 1_000
_BYTES = 4 * 2**30  # most bytes of tars to read; of larger data, tars of about this size are read, spread over all
_ROWS = 5_000_000  # most rows of tables, lines or images whose captions are read
_CHUNK = 1_024  # samples processed together
_AT_ONCE = 64  # images decoded together
_RUNS = 50  # runs of rows that a sample of tables is read from
_MEMBERS = 200  # samples of a tar whose file extensions are reported
_SECONDS = 5.0  # time spent on measuring an encoder
_PIXELS = 64  # most images that it is measured with
_DIM = 512  # dimensions of a pool if no encoder is given
_TINY = 10  # pixels of the shorter side; smaller images show nothing
_LOADERS = 4  # default number of loader processes of open_clip
_TEXTS = 512  # captions that are kept as text
_BATCH = 64  # images or captions that an encoder encodes together on the CPU
_MOST, _FEW = 100_000, 100  # samples of a tar that are too many, too few
_ENCODER = "open_clip:ViT-B-32/laion2b_s34b_b79k"

_ENORMOUS = re.compile(r"is an image of [\d,]+ x |exceeds limit")
_NAME = re.compile(
    rf"\S*\.({'|'.join(ENDINGS)})|(img|dscn?|dscf|image|photo|pict?|screenshot)[-_ ]?\d{{2,}}"
    r"|(https?://|www\.)\S+",
    re.IGNORECASE,
)
_NOTHING = re.compile(r"nan|none|null|n/?a|undefined|no (description|caption|title)|untitled|[\W_]+", re.IGNORECASE)

T = TypeVar("T")
P = TypeVar("P", bound=Part)


def doctor(
    location: str,
    options: DataOptions | None = None,
    *,
    sample: int = SAMPLE,
    encoder: str | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Check raw data.

    Args:
        location: See :func:`thresher.data.open_data`.
        options: How to read it.
        sample: Number of images to decode.
        encoder: The encoder to embed it with, as :func:`thresher.embedding.encoders.make_encoder` takes it; its
            speed is measured for a few seconds.
        workers: Threads that decode (default: one per core).
        progress: Receives progress updates.

    Returns:
        location, kind, samples ("exact": whether they were counted), files, bytes, looked_at (samples whose key and
        caption were read), columns, members (file extensions in tars, and the share of samples that have them),
        missing (samples without an image), notes (what is unusual about samples, with their number),
        keys, captions, "pictures" (the sampled images), tars, "open_clip" (for tars, what its loader trains on, and
        what it leaves out by reason), "reshard" (for other data, what `reshard --as webdataset` does to the sampled
        images), damaged files, unreached files, "warnings" as sentences, "cost" (rates measured on this machine,
        seconds and bytes of embedding), and "next", the command to run next.

    Raises:
        PoolError: There is nothing that can be read.
        UnreachedError: None of the data was reached.
        UsageError: A column or an encoder does not exist, or ``sample`` is below 1.
        MissingExtraError: The encoder's library is not installed.
    """
    if sample < 1:
        raise UsageError(f"--sample {sample}: at least 1")
    progress, workers = progress or Silent(), workers or cores()
    options, refusal = options or DataOptions(), ""
    try:
        data = open_data(location, options)
    except PoolError as error:  # may be about captions or images: that one is missing is a warning here, not an error
        data, refusal = _without(location, options, error), str(error)
    model = None
    if encoder:
        from thresher.embedding.encoders import make_encoder

        model = make_encoder(encoder)
    read = _Read(sample)
    light = data.parts[0].words() is not None  # keys and captions can be read without the images
    if light:
        _read_words(data, read, progress)
        samples = _spread_over(data, sample, read)
    else:
        _read_parts(data, read, progress)
        samples = read.chosen()
    if not read.samples and read.unreached:
        raise UnreachedError(next(iter(read.unreached.values())))
    if not read.samples:
        raise PoolError(next(iter(read.why.values()), f"{location}: has no samples; has writing it finished?"))
    seen = _decoded(samples, model, min(sample, read.samples), workers, progress)
    unreached = {**read.unreached, **seen.unreached}
    total, exact = _counted(data, read)
    report: dict[str, Any] = {
        "location": location,
        "kind": data.kind,
        "samples": total,
        "exact": exact,
        "looked_at": read.samples,
        "unit": data.parts[0].unit,
        "files": total if data.parts[0].unit == "picture" else len({part.path for part in data.parts}),
        "bytes": _stored(data, seen, total),
        "bytes_estimated": data.parts[0].pictures_apart,
        "columns": _columns(data),
        "members": _members(data, read),
        "missing": {
            "count": read.missing,
            "of": len(seen.pictures) + read.missing if light else read.samples,
            "first": read.first_missing,
        },
        "keys": read.keys(),
        "captions": read.captions(),
        "pictures": seen.summary(),
        "notes": dict(read.notes),
        "tars": _tars(data, read),
        "open_clip": _left_out(data, read, progress),
        "reshard": _converted(data, seen),
        "damaged": [
            {"path": path, "why": why, "samples": None if light else read.counts.get(path)}
            for path, why in read.why.items()
        ],
        "unreached": [{"path": path, "why": why} for path, why in unreached.items()],
    }
    if report["captions"]["empty"] == read.samples:
        report["captions"]["elsewhere"] = data.captions_elsewhere()
    first = [*([refusal] if refusal else []), *data.notes, *(data.without_end() if light else ())]  # else: damaged
    report["warnings"] = [
        *first,
        *_warnings(report, explained=any("no captions" in text or "--caption" in text for text in first)),
    ]
    report["cost"] = _cost(total, seen, model, read.texts, workers)
    report["next"] = _next(location, options, encoder, report)
    return report


def _without(location: str, options: DataOptions, refusal: PoolError) -> Data:
    """Open data that was refused without captions, else without images; if that is refused too, raise the refusal."""
    for fewer in (replace(options, captions=False), replace(options, pictures=False)):
        with suppress(PoolError):
            return open_data(location, fewer)
    raise refusal


# --- keys and captions ----------------------------------------------------------------------------


@dataclass
class _Read:
    """What has been read so far: hashes of keys and captions, and a random sample of ``wanted`` samples."""

    wanted: int
    samples: int = 0
    missing: int = 0
    first_missing: str = ""
    empty: int = 0
    nothing: int = 0
    names: int = 0
    undecoded: int = 0
    unsafe: int = 0
    uids: int = 0
    notes: Counter[str] = field(default_factory=Counter)  # samples with each note
    texts: list[str] = field(default_factory=list)  # some captions, to show and to measure the encoder with
    counts: dict[str, int] = field(default_factory=dict)  # samples of each file
    why: dict[str, str] = field(default_factory=dict)  # what is wrong with each damaged file
    unreached: dict[str, str] = field(default_factory=dict)  # why each file was not reached

    def __post_init__(self) -> None:
        self._rng = np.random.Generator(np.random.Philox(0))
        self._kept: list[tuple[float, int, Sample]] = []
        self._keys: list[npt.NDArray[np.uint64]] = []
        self._captions: list[npt.NDArray[np.uint64]] = []
        self._lengths: list[npt.NDArray[np.int32]] = []

    def add(self, path: str, keys: Sequence[str], texts: Sequence[str], uids: int) -> None:
        """Add captions and keys; keys are () if rows are identified by their numbers."""
        self.samples += len(texts)
        self.counts[path] += len(texts)
        self.uids += uids
        self.unsafe += sum(map(has_parent, keys))
        captions = [text for text in texts if text]
        self.empty += len(texts) - len(captions)
        self.nothing += sum(_NOTHING.fullmatch(text) is not None for text in captions)
        self.names += sum(_NAME.fullmatch(text) is not None for text in captions)
        self.undecoded += sum("\ufffd" in text for text in captions)
        self.texts += captions[: max(0, _TEXTS - len(self.texts))]
        self._keys.append(hashes_of(keys))
        self._captions.append(hashes_of(captions))
        self._lengths.append(np.fromiter(map(len, captions), np.int32, len(captions)))

    def offer(self, samples: Sequence[Sample]) -> None:
        """Keep the samples with the lowest random numbers, and count those without an image."""
        limit = self._kept[-1][0] if len(self._kept) == self.wanted else 1.0
        for i, (number, sample) in enumerate(zip(self._rng.random(len(samples)).tolist(), samples, strict=True)):
            self.notes.update(sample.notes)
            if sample.picture is None:
                self.first_missing = self.first_missing or f"{visible(sample.key)} {sample.why}"
                self.missing += 1
                continue
            if number < limit:
                self._kept.append((number, self.samples + i, sample))
        self._kept.sort(key=lambda one: one[0])
        del self._kept[self.wanted :]

    def chosen(self) -> Iterator[Sample]:
        """Yield the random sample, in the order of the data."""
        return (sample for _, _, sample in sorted(self._kept, key=lambda one: one[1]))

    def until_damage(self, path: str, what: Iterable[T]) -> Iterator[T]:
        """Yield what a file holds up to the first damage, and record the damage, or why it was not reached."""
        self.counts.setdefault(path, 0)
        try:
            yield from what
        except PoolError as error:
            self.why.setdefault(path, str(error))
        except UnreachedError as error:
            self.unreached.setdefault(path, str(error))

    def keys(self) -> dict[str, int] | None:
        """Return counts about keys, None if there are no keys."""
        hashes = np.sort(np.concatenate(self._keys))
        if not len(hashes):
            return None
        repeated = int(np.count_nonzero(hashes[1:] == hashes[:-1]))
        return {"repeated": repeated, "unsafe": self.unsafe, "uids": self.uids}

    def captions(self) -> dict[str, Any]:
        """Return counts about captions, the most repeated one (its text is None if unknown) and their lengths."""
        hashes, counts = np.unique(np.concatenate(self._captions), return_counts=True)
        most: dict[str, Any] = {"count": int(counts.max(initial=0)), "text": None}
        if most["count"] > 1:  # its text is known only if it is among the captions that are kept
            same = np.flatnonzero(hashes_of(self.texts) == hashes[counts.argmax()])
            most["text"] = self.texts[same[0]] if len(same) else None
        return {
            "empty": self.empty,
            "repeated": int(counts.sum()) - len(hashes),
            "most_repeated": most if most["count"] > 1 else None,
            "say_nothing": self.nothing,
            "file_names": self.names,
            "undecoded": self.undecoded,
            "elsewhere": "",
            "characters": _spread(np.concatenate(self._lengths)),
        }


def _read_parts(data: Data, read: _Read, progress: Progress) -> None:
    """Read the samples of parts without their images; of files that are not read, check the end."""
    counted_rows = all(part.rows is not None for part in data.parts)
    sized = [(part, part.rows or 0 if counted_rows else _size(part)) for part in data.parts]
    chosen = _evenly(sized, _ROWS if counted_rows else _BYTES)
    unit = data.parts[0].unit
    units = "rows" if counted_rows else f"{unit}s"
    with progress.task(f"read {unit}s", sum(part.rows or 1 for part in chosen), units) as advance:
        for part in chosen:
            samples = read.until_damage(part.path, part.samples())
            while batch := list(islice(samples, _CHUNK)):
                read.offer(batch)
                uids = sum(bool(sample.uid) for sample in batch)
                read.add(part.path, [sample.key for sample in batch], [sample.text for sample in batch], uids)
            advance(part.rows or 1)
    rest = [] if counted_rows else [part for part in data.parts if part.path not in {**read.why, **read.unreached}]
    with (
        ThreadPoolExecutor(8) as threads,
        progress.task(f"check the ends of {unit}s", len(rest), f"{unit}s") as advance,
    ):
        for part, (damage, unreached) in zip(rest, threads.map(_wrong_end, rest), strict=True):
            if damage:
                read.why[part.path] = damage
            if unreached:
                read.unreached[part.path] = unreached
            advance(1)


def _wrong_end(part: Part) -> tuple[str, str]:
    """Return what is wrong with the end of a part, and why it was not reached."""
    try:
        return part.cut_off(), ""
    except UnreachedError as error:
        return "", str(error)


def _read_words(data: Data, read: _Read, progress: Progress) -> None:
    """Read only the keys and captions of whole files."""
    rows = Counter[str]()
    for part in data.parts:
        rows[part.path] += part.rows or 0
    whole = [part.slice(0, rows[part.path]) for part in {part.path: part for part in data.parts}.values()]
    chosen = _evenly([(part, part.rows or 0) for part in whole], _ROWS)
    with progress.task("read", sum(part.rows or 0 for part in chosen)) as advance:
        for part in chosen:
            for words in read.until_damage(part.path, part.words() or ()):
                read.add(part.path, words.keys, words.texts, words.uids)
            advance(part.rows or 0)


def _spread_over(data: Data, sample: int, read: _Read) -> Iterator[Sample]:
    """Yield a random sample as runs of rows, evenly spread, because tables are read by row groups."""
    parts = list(data.parts)
    ends = np.cumsum([part.rows or 0 for part in parts])
    total = int(ends[-1])
    rng = np.random.Generator(np.random.Philox(0))
    if sample < total:
        whole, parts = parts, []
        edges, counts = (np.linspace(0, n, min(_RUNS, sample) + 1).astype(np.int64) for n in (total, sample))
        for lo, hi, count in zip(edges, edges[1:], np.diff(counts), strict=False):
            first = int(rng.integers(lo, max(lo, hi - count) + 1))
            stop = min(first + int(count), int(hi))
            while first < stop:  # a run may span several parts
                i = int(np.searchsorted(ends, first, "right"))
                rows = min(stop, int(ends[i])) - first
                parts.append(whole[i].slice(whole[i].first + (whole[i].rows or 0) - int(ends[i]) + first, rows))
                first += rows
    for part in parts:
        for one in read.until_damage(part.path, part.samples()):
            if one.picture is None:
                read.missing += 1
                read.first_missing = read.first_missing or f"{visible(one.key)} {one.why}"
            else:
                read.notes.update(one.notes)
                yield one


def _evenly(sized: Sequence[tuple[P, int]], budget: int) -> list[P]:
    """Return all parts, or as many as the budget allows, at least one, evenly spread from the first to the last."""
    total = sum(size for _, size in sized)
    count = len(sized) if total <= budget else max(1, min(len(sized), len(sized) * budget // total))
    return [sized[i][0] for i in np.unique(np.linspace(0, len(sized) - 1, count).astype(int)).tolist()]


def _size(part: Part) -> int:
    """Return the size of a part's file in bytes, 0 if it does not exist or was not reached."""
    try:
        return int(file_stamp(part.protocol, part.path)[0] or 0)
    except (PoolError, UnreachedError):
        return 0


# --- images ---------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Picture:
    """An image of the sample; ``why`` says why it cannot be used, "" if it can, ``unreached`` why it was not read."""

    why: str = ""
    unreached: str = ""
    size: int = 0
    digest: bytes = b""
    seconds: float = 0.0
    kind: str = ""
    mode: str = ""
    sides: tuple[int, int] = (0, 0)
    animated: bool = False
    transparent: bool = False
    deep: bool = False


@dataclass
class _Seen:
    """The images of the sample, and some of them preprocessed for the encoder."""

    pictures: list[_Picture] = field(default_factory=list)
    pixels: list[Any] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    unreached: dict[str, str] = field(default_factory=dict)

    @property
    def good(self) -> list[_Picture]:
        """The images that can be used."""
        return [one for one in self.pictures if not one.why]

    def summary(self) -> dict[str, Any]:
        """Return counts and spreads of the images."""
        good = self.good
        digests = {one.digest for one in good}
        sides = np.array([one.sides for one in good], np.int64).reshape(-1, 2)
        short, long = sides.min(axis=1, initial=2**31), sides.max(axis=1, initial=0)
        enormous = sum(_ENORMOUS.search(one.why) is not None for one in self.pictures)
        return {
            "looked_at": len(self.pictures),
            "broken": len(self.broken) - enormous,
            "enormous": enormous,
            "first_broken": self.broken[:5],
            "formats": dict(Counter(one.kind for one in good).most_common()),
            "modes": dict(Counter(one.mode for one in good).most_common()),
            "short_side": _spread(short),
            "long_side": _spread(long),
            "aspect": [round(float(value), 2) for value in _spread(long / np.maximum(short, 1))],
            "bytes": _spread(np.array([one.size for one in good])),
            "animated": sum(one.animated for one in good),
            "transparent": sum(one.transparent for one in good),
            "cmyk": sum(one.mode == "CMYK" for one in good),
            "sixteen_bit": sum(one.deep for one in good),
            "tiny": int(np.count_nonzero(short < _TINY)),
            "narrow": int(np.count_nonzero(long > NARROW * short)),
            "identical": len(good) - len(digests),
        }


def _decoded(samples: Iterable[Sample], model: Any, count: int, workers: int, progress: Progress) -> _Seen:
    """Decode the images of a sample, some at a time, and preprocess them if there is an encoder."""
    from PIL import Image

    Image.preinit()  # takes longer than decoding a few images: not to be part of the measured time
    seen, preprocess = _Seen(), getattr(model, "preprocess", None)
    samples = iter(samples)
    with ThreadPoolExecutor(workers) as threads, progress.task("decode", count, "images") as advance:
        while batch := list(islice(samples, _AT_ONCE)):
            looks = threads.map(lambda sample: _look(sample, preprocess), batch)
            for sample, (picture, pixels) in zip(batch, looks, strict=True):
                if picture.unreached:
                    place = sample.picture.path if isinstance(sample.picture, Place) else sample.key
                    seen.unreached.setdefault(place, picture.unreached)
                    continue
                seen.pictures.append(picture)
                if picture.why:
                    seen.broken.append(f"{visible(sample.key)} {picture.why}")
                elif pixels is not None and len(seen.pixels) < _PIXELS:
                    seen.pixels.append(pixels)
            advance(len(batch))
    return seen


def _look(sample: Sample, preprocess: Any) -> tuple[_Picture, Any]:
    """Return the properties of an image, and its pixels as the encoder takes them."""
    try:
        data = sample.stored()
        begin = time.thread_time()
        picture = open_rgb(data)
        narrow = max(picture.size) > NARROW * min(picture.size)
        pixels = preprocess(picture) if preprocess and not narrow else None
        seconds = time.thread_time() - begin
    except PoolError as error:
        return _Picture(why=str(error)), None
    except UnreachedError as error:
        return _Picture(unreached=str(error)), None
    with no_warnings, open_encoded(data) as stored:
        return _Picture(
            size=len(data),
            digest=hashlib.blake2b(data, digest_size=16).digest(),
            seconds=seconds,
            kind=str(stored.format),
            mode=stored.mode,
            sides=picture.size,
            animated=bool(getattr(stored, "is_animated", False)),
            transparent=stored.has_transparency_data,
            deep=stored.mode.startswith("I") or stored.format == "PNG" and data[24] == 16,
        ), pixels


def _spread(values: npt.NDArray[Any]) -> list[Any]:
    """Return the minimum, the median and the maximum, [] for no values."""
    return np.percentile(values, (0, 50, 100), method="nearest").tolist() if len(values) else []


# --- the whole ------------------------------------------------------------------------------------


def _counted(data: Data, read: _Read) -> tuple[int, bool]:
    """Return the number of samples, and whether it is exact rather than estimated from the sizes of the tars."""
    if all(part.rows is not None for part in data.parts):
        return sum(part.rows or 0 for part in data.parts), True
    if len(read.counts) == len(data.parts) and not read.unreached:
        return read.samples, True
    sizes = {part.path: _size(part) for part in data.parts}
    return round(read.samples * sum(sizes.values()) / max(1, sum(sizes[path] for path in read.counts))), False


def _tars(data: Data, read: _Read) -> dict[str, Any] | None:
    """Return a summary of the tars and of the ``sizes.json`` next to them, None if there are no tars."""
    if data.parts[0].unit != "tar":
        return None
    counts = {
        posixpath.basename(path): count
        for path, count in read.counts.items()
        if path not in {**read.why, **read.unreached}
    }
    listed = _listed(data.parts[0])
    return {
        "samples": _spread(np.array(list(counts.values()))),
        "bytes": _spread(np.array([_size(part) for part in data.parts])),
        "empty": [name for name, count in counts.items() if not count],
        "sizes_json": None if listed is None else {
            "lacks": [name for part in data.parts if (name := posixpath.basename(part.path)) not in listed],
            "wrong": [f"{name} {listed[name]}, not {n:,}" for name, n in counts.items() if listed.get(name, n) != n],
        },
    }  # fmt: skip


def _listed(part: Part) -> dict[str, Any] | None:
    """Return the content of ``sizes.json`` next to a tar, None if there is no readable one."""
    path = posixpath.join(posixpath.dirname(part.path), "sizes.json")
    try:
        with open_file(part.protocol, path) as file:
            sizes = trusting(path, lambda: load_json(file))
    except (PoolError, UnreachedError):
        return None
    return sizes if isinstance(sizes, dict) else None


def _left_out(data: Data, read: _Read, progress: Progress) -> dict[str, Any] | None:
    """Return what the loader of open_clip makes of the tars that were read, None if there are no tars."""
    if data.parts[0].unit != "tar":
        return None
    loader, parts = Loader(), [part for part in data.parts if part.path in read.counts]
    with progress.task("read headers", len(parts), "tars") as advance:
        for part in parts:
            with contextlib.suppress(PoolError, UnreachedError):  # reported as damaged or unreached
                loader.read(part)
            advance(1)
    return {
        "trained": loader.trained,
        "left_out": {
            why: {"count": count, **dict(zip(("key", "path"), loader.first[why], strict=True))}
            for why, count in loader.left_out.most_common()
        },
    }


def _converted(data: Data, seen: _Seen) -> dict[str, Any] | None:
    """Return what resharding to webdataset does to the sampled images, None for tars, which it copies."""
    if data.parts[0].unit == "tar":
        return None
    formats = Counter(one.kind for one in seen.good if one.kind not in PILLOW)
    return {"images": len(seen.good), "converted": dict(formats.most_common())}


def _members(data: Data, read: _Read) -> dict[str, float]:
    """Return the file extensions in tars, each with the share of samples that have it, from a few samples."""
    counts, total = Counter[str](), 0
    for part in [part for part in data.parts if part.path in read.counts][:3]:
        for endings in read.until_damage(part.path, islice(part.members(), _MEMBERS)):
            counts.update(endings)
            total += 1
    return {visible(name): round(count / total, 3) for name, count in counts.most_common(20)}


def _stored(data: Data, seen: _Seen, total: int) -> int:
    """Return the bytes of tars and tables; for images in files of their own, an estimate from the sample."""
    if data.parts[0].pictures_apart:
        return round(total * float(np.mean([one.size for one in seen.good] or [0])))
    return sum(_size(part) for part in {part.path: part for part in data.parts}.values())


def _columns(data: Data) -> dict[str, Any]:
    """Return the roles of a table's columns, {} if the data is not a table."""
    roles = data.parts[0].roles()
    return {**roles, "others": list(data.columns)} if roles else {}


def _warnings(report: dict[str, Any], *, explained: bool) -> list[str]:
    """Return what looks wrong, the worst first; ``explained`` if it says already where captions may be."""
    texts = []
    for one in report["unreached"][:5]:
        texts.append(one["why"])
    if len(report["unreached"]) > 5:
        texts.append(f"{len(report['unreached']):,} files were not reached in total")
    for one in report["damaged"][:5]:
        before = "" if one["samples"] is None else f" ({counted(one['samples'], 'sample')} before it)"
        texts.append(f"{one['path']}: {one['why'].removeprefix(one['path'] + ': ')}{before}")
    if len(report["damaged"]) > 5:
        texts.append(f"{len(report['damaged']):,} files are damaged in total")
    pictures, captions, keys, tars = report["pictures"], report["captions"], report["keys"], report["tars"]
    looked_at, seen = report["looked_at"], pictures["looked_at"]

    if count := report["missing"]["count"]:
        of = report["missing"]["of"]
        texts.append(f"{_share(count, of)} samples cannot be used; the first: {report['missing']['first']}")
    for note, count in report["notes"].items():
        if note != APART or "apart" not in (report["open_clip"] or {"left_out": ()})["left_out"]:  # see below
            texts.append(f"{_share(count, report['missing']['of'])} samples {note}")
    if count := pictures["broken"]:
        texts.append(f"{_share(count, seen)} images cannot be decoded; the first: {pictures['first_broken'][0]}")
    if count := pictures["enormous"]:
        texts.append(f"{_share(count, seen)} images have more than {PIXELS:,} pixels and are not decoded")
    if count := pictures["tiny"]:
        texts.append(f"{_share(count, seen)} images are less than {_TINY} pixels high or wide")
    if count := pictures["narrow"]:
        texts.append(f"{_share(count, seen)} images are over {NARROW} times as long as wide; embedding skips them")
    if 20 * (count := pictures["identical"]) >= seen > 0:
        texts.append(f"{_share(count, seen)} images are byte-for-byte copies of an earlier one")
    if captions["empty"] == looked_at:
        explained = explained or report["missing"]["count"] == report["missing"]["of"]
        nowhere = "no captions were found; if there are some, name them with --caption or --captions"
        texts += [captions["elsewhere"] or nowhere] if captions["elsewhere"] or not explained else []
    elif count := captions["empty"]:
        texts.append(f"{_share(count, looked_at)} samples have no caption")
    if count := captions["undecoded"]:
        texts.append(f"{_share(count, looked_at)} captions are not UTF-8: they have U+FFFD in place of invalid bytes")
    kinds = {"say_nothing": "say nothing (nan, None, untitled)", "file_names": "are file names or URLs"}
    for name, what in kinds.items():
        if 100 * (count := captions[name]) >= looked_at:
            texts.append(f"{_share(count, looked_at)} captions {what}")
    if 5 * (count := captions["repeated"]) >= looked_at:
        most = captions["most_repeated"]
        example = f"; {most['count']:,} are {most['text'][:60]!r}" if most["text"] else ""
        texts.append(f"{_share(count, looked_at)} captions repeat an earlier one{example}")
    if keys and (count := keys["repeated"]):
        texts.append(
            f"{_share(count, looked_at)} keys repeat an earlier one; select drops such rows with --skip-bad, and keeps "
            "them with --key row"
        )
    if keys and (count := keys["unsafe"]):
        texts.append(f"{_share(count, looked_at)} keys are unsafe paths: they contain ..")
    if report["open_clip"] and set(left_out := report["open_clip"]["left_out"]) - {"no_image"}:  # see above
        trained = report["open_clip"]["trained"]
        total = trained + sum(one["count"] for one in left_out.values())
        reasons = (f"{described([(why, one['count'])])}, such as {one['key']}" for why, one in left_out.items())
        command = shlex.join(["thresher", "reshard", report["location"]])
        texts.append(
            f"open_clip trains on {trained:,} of {counted(total, 'sample')}: {'; '.join(reasons)}. To fix what can be "
            f"fixed, type {command} SEL -o DIR --trainable"
        )
    if tars:
        texts += _warnings_of_tars(tars, report["files"])
    return texts


def _share(count: int, whole: int) -> str:
    """Format a number of things and their share of all of them."""
    return f"{count:,} of {whole:,} ({percent(count, whole)})"


def _warnings_of_tars(tars: dict[str, Any], count: int) -> list[str]:
    texts = []
    if empty := tars["empty"]:
        texts.append(f"{counted(len(empty), 'tar has', 'tars have')} no samples: {named(empty)}")
    if count < _LOADERS:
        texts.append(
            f"{counted(count, 'tar')} for {_LOADERS} loader processes (open_clip's --workers): each needs at least one "
            "tar; thresher reshard makes more"
        )
    if not tars["samples"]:
        return texts
    if tars["samples"][1] > _MOST:
        texts.append(f"tars of {counted(tars['samples'][1], 'sample')} are shuffled poorly; 10,000 are usual")
    if count > _LOADERS and tars["samples"][1] < _FEW:
        texts.append(
            f"tars of {counted(tars['samples'][1], 'sample')} are many small files, which are slow to "
            "read; 10,000 are usual"
        )
    if sizes := tars["sizes_json"]:
        if sizes["wrong"]:
            texts.append(
                f"sizes.json is wrong about {counted(len(sizes['wrong']), 'tar')}; the first: {sizes['wrong'][0]}"
            )
        if sizes["lacks"]:
            texts.append(
                f"sizes.json does not list {counted(len(sizes['lacks']), 'tar')}; the first: {sizes['lacks'][0]}"
            )
    return texts


def _cost(total: int, seen: _Seen, model: Any, texts: list[str], workers: int) -> dict[str, Any]:
    """Estimate the cost of embedding: decoding from the sample, the encoder, if there is one, from a short run."""
    seconds = [one.seconds for one in seen.good]
    decoded = workers * len(seconds) / sum(seconds) if sum(seconds) else 0.0
    cost: dict[str, Any] = {"workers": workers, "decoded_per_second": decoded}
    dims = 2 * _DIM if texts else _DIM
    each = [decoded]
    if model is not None:
        rates = _measured(model, seen.pixels, texts)
        cost |= rates
        dims = (model.image_dim if seen.good else 0) + (model.text_dim if texts else 0)
        each += list(rates.values())
    cost |= {"dims": dims, "pool_bytes": 2 * total * dims, "decode_seconds": total / decoded if decoded else 0.0}
    if model is not None:
        needed = [total / rate for rate in each if rate]
        # A model on the CPU shares the cores with decoding; on another device both run at the same time.
        shared = str(getattr(model, "device", "cpu")) == "cpu"
        cost["embed_seconds"] = sum(needed) if shared else max(needed[0], sum(needed[1:]))
    return cost


def _measured(model: Any, pixels: list[Any], texts: list[str]) -> dict[str, float]:
    """Return how many images and captions an encoder encodes per second."""
    rates = {}
    size = _BATCH if str(getattr(model, "device", "cpu")) == "cpu" else 8 * _BATCH
    if model.image_dim and pixels:
        batch = np.stack([pixels[i % len(pixels)] for i in range(size)])
        rates["images_per_second"] = _rate(size, lambda: model.encode_images(batch))
    if model.text_dim and texts:
        some = [texts[i % len(texts)] for i in range(size)]
        rates["texts_per_second"] = _rate(size, lambda: model.encode_texts(model.tokenize(some)))
    return rates


def _rate(count: int, what: Callable[[], Any]) -> float:
    """Return how many items ``what`` processes per second, ``count`` per call; the first, slower call is left out."""
    what()
    begin, times = time.perf_counter(), 0
    while not times or time.perf_counter() - begin < _SECONDS / 2:
        what()
        times += 1
    return times * count / (time.perf_counter() - begin)


def _next(location: str, options: DataOptions, encoder: str | None, report: dict[str, Any]) -> str:
    """Return the command to run next."""
    words = ["thresher", "embed", location, "-o", "POOL", "--encoder", encoder or _ENCODER]
    for flag, value in (("image", options.image), ("caption", options.caption), ("key", options.key),
                        ("columns", options.columns), ("root", options.root), ("captions", options.captions_file),
                        ("reader", options.reader)):  # fmt: skip
        words += [f"--{flag}", value] if value else []
    words += ["--allow-outside"] if options.allow_outside else []
    words += ["--thumbnails-as-data"] if options.thumbnails_as_data else []
    words += ["--only", "image"] if report["captions"]["empty"] == report["looked_at"] else []
    words += ["--only", "text"] if report["missing"]["count"] == report["missing"]["of"] > 0 else []
    return shlex.join(words)
