"""What a trainer reads: pictures and captions of N rows, from parquet, webdataset tars or an open_clip csv.

Rows are read in any order, so every picture has a place: a file, and where in it. Tars and csv are indexed and read
where they lie; pictures of parquet, which gives them up by row groups only, are copied into the run's folder once.
Every picture is decoded once before the training begins: rows that cannot be used are set aside, counted and listed,
and small pictures stay in memory decoded.
"""

from __future__ import annotations

import csv
import glob
import io
import json
import os
import tarfile
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import numpy.typing as npt

from thresher.cache import writing
from thresher.errors import MissingExtraError, PoolError, UsageError
from thresher.export import heavy, keys_chosen
from thresher.readers.pieces import climbs
from thresher.run import Progress
from thresher.selection import Selection
from thresher.store import EmbeddingStore, absolute, open_store
from thresher.training import ROWS

Pixels = npt.NDArray[np.uint8]
Ints = npt.NDArray[np.int64]
Resize = Literal["squash", "shortest"]

IN_MEMORY = 4 * 2**30  # bytes of decoded pictures that are kept
SET_ASIDE = "set_aside.txt"
PICTURES = "pictures.bin"
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
_PIXELS = 2**27  # of one picture: more is taken for a decompression bomb
_IMAGE = ("jpg", "jpeg", "png", "webp")
_CHUNK = 1024  # pictures decoded at a time
_PART = 256  # pictures of parquet copied at a time


@dataclass(frozen=True, eq=False)
class Pairs:
    """Pictures and captions of N rows.

    Attributes:
        store: The pool that the rows are rows of, in the same order.
        files: What the pictures lie in.
        file_N: Which of them, (N,) int32.
        offset_N: Where in it, (N,) int64.
        size_N: How many bytes, (N,) int64; -1 for the whole file.
        captions: N texts; "" where there is none.
        side: Pixels of a side of the pictures, decoded.
        resize: How they are made square.
        aside: Rows of the data that are not among these, and why.
        pixels_NHWC: (N, side, side, 3) uint8 where they are kept in memory, else None.
    """

    store: EmbeddingStore
    files: tuple[str, ...]
    file_N: npt.NDArray[np.int32]
    offset_N: Ints
    size_N: Ints
    captions: Sequence[str]
    side: int = 0
    resize: Resize = "shortest"
    aside: tuple[tuple[str, str], ...] = ()
    pixels_NHWC: Pixels | None = None

    def __len__(self) -> int:
        """Return N."""
        return len(self.file_N)

    def encoded(self, row: int) -> bytes:
        """Return a picture as it is stored."""
        size = int(self.size_N[row])
        with open(self.files[self.file_N[row]], "rb") as file:
            file.seek(int(self.offset_N[row]))
            return file.read(size)

    def pixels(self, rows_B: Sequence[int]) -> Pixels:
        """Return pictures, (B, side, side, 3) uint8, from memory or from where they lie."""
        if self.pixels_NHWC is not None:
            return self.pixels_NHWC[rows_B]
        return np.stack([decode(self.encoded(row), self.side, self.resize) for row in rows_B])

    def keys(self) -> list[str]:
        """Return the keys of the rows."""
        return [key for _, keys in self.store.keys() for key in keys]

    def column(self, name: str) -> list[Any]:
        """Return a column of the pool, such as labels.

        Raises:
            UsageError: There is none of this name.
        """
        return [cell for _, part in self.store.scan([name]) for cell in part.column(0).to_pylist()]


def open_pairs(
    data: str, folder: Path, *, side: int, resize: Resize, captions: bool, progress: Progress, workers: int = 2
) -> Pairs:
    """Index the data, decode every picture once, and set aside what cannot be used.

    Args:
        data: A parquet file or folder with ``image`` and ``text`` (Hugging Face layout), tars (a folder, or a path
            with ``{00000..00099}``, ``*`` or ``::``), or a csv of open_clip (tab separated, filepath and title).
        folder: Of the run; what has to be written goes there.
        side: Pixels of a side, as :func:`decode` makes them.
        resize: How they are made square.
        captions: Whether rows need one.
        progress: What to tell while it takes time.
        workers: Threads that decode.

    Raises:
        PoolError: Nothing there, a damaged file, or hardly a row that can be used.
    """
    found = replace(_indexed(data, folder, captions), side=side, resize=resize)
    memory = len(found) * side * side * 3 <= IN_MEMORY
    pixels = np.empty((len(found) if memory else 0, side, side, 3), np.uint8)
    bad: dict[int, str] = {}

    def look(row: int) -> None:
        if captions and not found.captions[row].strip():
            bad[row] = "has no caption"
            return
        try:
            pixels_HWC = decode(found.encoded(row), side, resize)
        except (PoolError, OSError) as error:
            bad[row] = str(error)
            return
        if memory:
            pixels[row] = pixels_HWC

    with ThreadPoolExecutor(workers) as threads, progress.task("decode", len(found)) as advance:
        for lo in range(0, len(found), _CHUNK):
            rows = range(lo, min(lo + _CHUNK, len(found)))
            list(threads.map(look, rows))
            advance(len(rows))
    good_N = np.ones(len(found), np.bool_)
    good_N[sorted(bad)] = False
    if 2 * len(bad) > len(found):
        first = min(bad)
        raise PoolError(
            f"{data}: {len(bad):,} of {len(found):,} rows cannot be used; row {first:,} {bad[first]}; "
            "does it hold pictures and captions?"
        )
    if bad:
        keys = found.keys()
        aside = (*found.aside, *((f"row {row}, key {keys[row]}", bad[row]) for row in sorted(bad)))
        found, pixels = replace(_without(found, good_N, folder), aside=aside), pixels[good_N] if memory else pixels
    if found.aside:
        with writing(folder / SET_ASIDE) as scratch:
            Path(scratch).write_text("".join(f"{what}: {why}\n" for what, why in found.aside), encoding="utf-8")
    return replace(found, pixels_NHWC=pixels if memory else None)


def decode(data: bytes, side: int, resize: Resize = "shortest") -> Pixels:
    """Return a picture as (side, side, 3) uint8, transparent parts white, upright.

    Args:
        data: The picture as stored.
        side: Pixels of a side.
        resize: "shortest": the shorter side becomes ``side`` and the middle is cut out; "squash": both do.

    Raises:
        PoolError: Not a picture, a damaged or an enormous one; says which.
    """
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's about sizes: they are checked here
            with Image.open(io.BytesIO(data), formats=_FORMATS) as source:
                if source.width * source.height > _PIXELS:
                    raise PoolError(f"is a picture of {source.width:,} x {source.height:,} pixels")
                source.draft("RGB", (2 * side, 2 * side))
                picture = _eight_bit(ImageOps.exif_transpose(source))
                if picture.has_transparency_data:
                    picture = picture.convert("RGBA")
                    picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
                picture = picture.convert("RGB")
    except (OSError, ValueError, SyntaxError, TypeError, MemoryError, Image.DecompressionBombError) as error:
        told = str(error).splitlines()[0] if str(error) and "BytesIO" not in str(error) else "no kind that is known"
        raise PoolError(f"is no picture that can be read ({told})") from None
    box = None
    if resize == "shortest":
        short = min(picture.size)
        left, top = (picture.width - short) / 2, (picture.height - short) / 2
        box = (left, top, left + short, top + short)
    return np.asarray(picture.resize((side, side), Image.Resampling.BICUBIC, box=box, reducing_gap=2.0))


def _eight_bit(picture: Any) -> Any:
    """Return a picture of 16 bits a pixel as one of 8; others as they are."""
    from PIL import Image

    if picture.mode == "F":
        raise PoolError("is a picture of floating-point pixels, of which nobody can tell what is white")
    if not picture.mode.startswith("I"):
        return picture
    pixels = np.asarray(picture).astype(np.int64)
    if pixels.min() < 0 or pixels.max() > 65_535:
        raise PoolError("is a picture of more than 16 bits a pixel")
    return Image.fromarray((pixels // 257).astype(np.uint8))


def times_of(selection: str, pairs: Pairs) -> tuple[npt.NDArray[np.int32], int]:
    """Return how often a selection has each row, and how many of its keys the data do not have.

    Args:
        selection: A selection folder, of this pool or of another with the same keys; or a file with a key a line.
        pairs: The rows.

    Raises:
        UsageError: Most of it is not here.
    """
    if os.path.isdir(selection):
        chosen = Selection.load(selection)
        if not pairs.aside and (chosen.store, chosen.total) == (pairs.store.fingerprint(), len(pairs)):
            return np.asarray(chosen.mask() if chosen.repeats is None else chosen.repeats).astype(np.int32), 0
    wanted, keys = keys_chosen(selection), pairs.keys()
    times_N = np.array([wanted.get(key, 0) for key in keys], np.int32)
    if not times_N.any():
        raise UsageError(f"{selection}: none of its keys is in {pairs.store.layout.location}; is it of other data?")
    missing = len(wanted.keys() - set(keys))
    if 2 * missing > len(wanted):
        raise UsageError(
            f"{selection}: {missing:,} of its {len(wanted):,} keys are not in {pairs.store.layout.location}; is it of "
            "other data?"
        )
    return times_N, missing


def _without(pairs: Pairs, good_N: npt.NDArray[np.bool_], folder: Path) -> Pairs:
    """Return the good rows, as a pool of their own with the columns that the data have."""
    light = [name for name in pairs.store.columns if not heavy(pairs.store, name)]
    columns: dict[str, list[Any]] = {name: [] for name in light}
    for _, part in pairs.store.where(good_N).scan(light) if light else ():
        for name, column in zip(light, part.columns, strict=True):
            columns[name] += column.to_pylist()
    captions = [caption for caption, good in zip(pairs.captions, good_N, strict=True) if good]
    at: dict[str, Any] = {name: getattr(pairs, name)[good_N] for name in ("file_N", "offset_N", "size_N")}
    store = _pool(folder, {**columns, "row": np.flatnonzero(good_N)})
    return replace(pairs, store=store, captions=captions, **at)


# --- kinds of data --------------------------------------------------------------------------------


def _indexed(data: str, folder: Path, captions: bool) -> Pairs:
    if data.endswith((".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")):
        raise PoolError(f"{data}: is a compressed tar, which cannot be read in any order; unpack it to a plain one")
    tars = _tars(data)
    if tars:
        return _of_tars(tars, folder)
    if data.endswith((".csv", ".tsv")):
        return _of_csv(data, folder)
    return _of_parquet(data, folder, captions)


def _tars(data: str) -> list[str]:
    """Return the tars that a location names, [] where it names none."""
    if os.path.isdir(data):
        return sorted(glob.glob(os.path.join(glob.escape(data), "*.tar")))
    if not all(part.endswith(".tar") for part in data.split("::")):
        return []
    try:
        from braceexpand import braceexpand
    except ImportError:
        raise MissingExtraError("reading tars", "train") from None
    names = [name for part in data.split("::") for name in braceexpand(part)]
    found = [path for name in names for path in (sorted(glob.glob(name)) if glob.has_magic(name) else [name])]
    missing = [path for path in found if not os.path.isfile(path)]
    if missing or not found:
        told = f"{missing[0]} is not there" if missing else "no file is called so"
        raise PoolError(f"{data}: {told}, {len(found) - len(missing):,} tars are; name those you have")
    return found


def _of_tars(tars: list[str], folder: Path) -> Pairs:
    """Index samples of tars: neighbouring members of one key, of which one is a picture."""
    columns: dict[str, list[Any]] = {name: [] for name in ("key", "text", "shard", "offset", "size")}
    aside: list[tuple[str, str]] = []
    for shard in tars:
        for key, members in _samples(shard):
            picture = next((members[kind] for kind in _IMAGE if kind in members), None)
            if picture is None:
                aside.append((f"{shard}, key {key}", "has no picture"))
                continue
            caption = members["txt"] if "txt" in members else members.get("json")
            with open(shard, "rb") as file:
                text = _caption(file, caption, "json" if "txt" not in members else "txt")
            for name, value in zip(columns, (key, text, shard, *picture), strict=True):
                columns[name].append(value)
    if not columns["key"]:
        raise PoolError(f"{tars[0]}: no sample with a picture ({', '.join(_IMAGE)}) in {len(tars):,} tars")
    number = {shard: i for i, shard in enumerate(tars)}
    return Pairs(
        store=_pool(folder, columns),
        files=tuple(tars),
        file_N=np.array([number[shard] for shard in columns["shard"]], np.int32),
        offset_N=np.array(columns["offset"], np.int64),
        size_N=np.array(columns["size"], np.int64),
        captions=columns["text"],
        aside=tuple(aside),
    )


def _samples(shard: str) -> Iterator[tuple[str, dict[str, tuple[int, int]]]]:
    """Yield the samples of a tar: key, and by extension where the member's bytes are and how many."""
    key, members = "", dict[str, tuple[int, int]]()
    try:
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                archive.members.clear()  # type: ignore[attr-defined]  # it would keep them all
                base, dot, extension = os.path.basename(member.name).partition(".")
                if not member.isreg() or not base or not dot:
                    continue
                here = os.path.join(os.path.dirname(member.name), base)
                if here != key and members:
                    yield key, members
                    members = {}
                key = here
                members[extension.lower()] = (member.offset_data, member.size)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise PoolError(f"{shard}: cannot be read as a plain tar, it may be damaged ({error})") from None
    if members:
        yield key, members


def _caption(file: IO[bytes], at: tuple[int, int] | None, kind: str) -> str:
    if at is None:
        return ""
    file.seek(at[0])
    text = file.read(at[1]).decode("utf-8", "replace")
    if kind == "json":
        try:
            told = json.loads(text)
            text = next((told[name] for name in ("caption", "text") if isinstance(told.get(name), str)), "")
        except (ValueError, AttributeError):
            return ""
    return text.strip()


def _of_csv(path: str, folder: Path) -> Pairs:
    """Index a csv as open_clip reads it: tab separated, columns filepath and title."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            lines = csv.DictReader(file, delimiter="\t")
            missing = {"filepath", "title"} - set(lines.fieldnames or ())
            if missing:
                raise PoolError(
                    f"{path}: has no column {', '.join(sorted(missing))}; its first line is "
                    f"{(lines.fieldnames or [''])[0]!r}. Give a tab separated file with a first line of filepath and "
                    "title, as open_clip reads it"
                )
            rows = [(line["filepath"] or "", line["title"] or "") for line in lines]
    except (OSError, ValueError, csv.Error) as error:
        raise PoolError(f"{path}: cannot be read ({error})") from None
    if not rows:
        raise PoolError(f"{path}: has no rows")
    # open_clip looks from the current folder; a csv that was moved along with its pictures says it from its own.
    beside = os.path.dirname(os.path.abspath(path))
    files = [os.path.abspath(name if os.path.exists(name) else os.path.join(beside, name)) for name, _ in rows]
    titles = [title.strip() for _, title in rows]
    return Pairs(
        store=_pool(folder, {"key": [name for name, _ in rows], "text": titles, "filepath": files}),
        files=tuple(files),
        file_N=np.arange(len(rows), dtype=np.int32),
        offset_N=np.zeros(len(rows), np.int64),
        size_N=np.full(len(rows), -1, np.int64),
        captions=titles,
    )


def _of_parquet(data: str, folder: Path, captions: bool) -> Pairs:
    """Copy the pictures of a parquet pool to where they can be read by row."""
    if not os.path.exists(data) and "://" not in data:
        raise PoolError(f"{data}: nothing is there; give parquet with image and text, tars, or a csv of open_clip")
    store = open_store(absolute(data))
    picture, caption = store.layout.image, store.layout.caption
    lacks = [what for what, name in (("image", picture), ("text", caption if captions else "-")) if name is None]
    if lacks:
        raise PoolError(
            f"{data}: has no column {' and none '.join(lacks)}; it has {', '.join(store.columns) or 'no metadata'}. "
            "Give parquet with image (bytes) and text, tars, or a csv of open_clip"
        )
    sizes, texts, path = [], [], folder / PICTURES
    beside = os.path.realpath(data if os.path.isdir(data) else os.path.dirname(data))
    with writing(path) as scratch, open(scratch, "wb") as file:
        columns = [name for name in (picture, caption) if name]
        for part in (part for table in store.layout.tables for part in table.stream(columns, _PART)):
            sizes += [file.write(_stored(cell, beside)) for cell in part.column(0).to_pylist()]
            texts += [_first(cell) for cell in part.column(1).to_pylist()] if caption else [""] * len(part)
    size_N = np.array(sizes, np.int64)
    return Pairs(
        store=store,
        files=(str(path),),
        file_N=np.zeros(len(sizes), np.int32),
        offset_N=np.cumsum(size_N) - size_N,
        size_N=size_N,
        captions=texts,
    )


def _first(cell: Any) -> str:
    """Return a caption, the first where there are several."""
    text = next(iter(cell), None) if isinstance(cell, list) else cell
    return "" if text is None else str(text)


def _stored(cell: Any, beside: str) -> bytes:
    """Return a picture from a cell: bytes, a struct with them, or the path of a file below the data; b"" for none."""
    if isinstance(cell, dict):
        cell = cell.get("bytes") or cell.get("path")
    if isinstance(cell, str):
        path = os.path.realpath(os.path.join(beside, cell))
        if climbs(cell) or not path.startswith(beside + os.sep) or not os.path.isfile(path):
            return b""
        with open(path, "rb") as file:
            return file.read()
    return cell if isinstance(cell, bytes) else b""


def _pool(folder: Path, columns: dict[str, Any]) -> EmbeddingStore:
    """Write an index of rows and open it as a pool."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = folder / ROWS
    with writing(path) as scratch:
        pq.write_table(pa.table(columns), scratch)
    return open_store(absolute(str(path)))
