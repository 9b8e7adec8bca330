"""The data of a trainer: images and captions of N rows, from any kind of raw data that :mod:`thresher.data` opens.

Rows are read in random order, so every image has a location: a file, an offset and a size. Images are read from their
files. Those of parquet and Arrow can only be read by row group, so they are copied into the run's folder once. Every
image is decoded once before training starts: rows that cannot be used are skipped, counted and listed, and small images
are kept decoded in memory.
"""

from __future__ import annotations

import os
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from thresher.data import Data, DataOptions, Place, noted, open_data
from thresher.dynamic.cabs import Concepts
from thresher.dynamic.reference_features import ReferenceFeatures
from thresher.dynamic.references import LOSSES, References, check_found
from thresher.dynamic.run_folder import ROWS
from thresher.errors import ChangedError, PoolError, UsageError
from thresher.export.keys import each_key, read_keys
from thresher.io.key_forms import unlike
from thresher.io.parquet import table_piece
from thresher.io.pictures import Pixels, Resize, decode
from thresher.ops.key_hash import hash_many
from thresher.pool.layout import Options
from thresher.pool.store import EmbeddingStore, absolute, heavy, open_store
from thresher.pruning.clusters import read_groups
from thresher.pruning.entries import Matcher, read_entries
from thresher.runtime.files import writing
from thresher.runtime.progress import Progress
from thresher.selection import Selection

Ints = npt.NDArray[np.int64]

IN_MEMORY = 4 * 2**30  # the most bytes of decoded images to keep in memory
SET_ASIDE = "set_aside.txt"
PICTURES = "pictures.bin"
_CHUNK = 1024  # images decoded at a time
COLUMN = "column:"  # the start of a reference that is a column of the data


@dataclass(frozen=True, eq=False)
class Pairs:
    """Images and captions of N rows.

    Attributes:
        store: The pool of the rows, in the same order.
        files: The files of the images, as (protocol of the file system, path).
        stamps: Size and time of each file when it was indexed, in bytes and nanoseconds; None if it is not checked.
        file_N: The index of each image's file, (N,) int64.
        offset_N: Its offset in the file, (N,) int64.
        size_N: Its size in bytes, (N,) int64; -1 for the whole file.
        captions: The N captions; "" for none.
        numbered: Whether the data are a pool without keys, whose selections name rows by their numbers.
        side: Height and width of the decoded images in pixels.
        resize: How images are made square.
        row_N: The number of each row among all rows of the data, (N,) int64.
        skipped: Rows of the data that were skipped, as (row and key, reason).
        pixels_NHWC: (N, side, side, 3) uint8 if the images are kept in memory, else None.
    """

    store: EmbeddingStore
    files: tuple[tuple[str, str], ...]
    stamps: tuple[tuple[int, int] | None, ...]
    file_N: Ints
    offset_N: Ints
    size_N: Ints
    row_N: Ints
    captions: Sequence[str]
    numbered: bool = False
    side: int = 0
    resize: Resize = "shortest"
    skipped: tuple[tuple[str, str], ...] = ()
    pixels_NHWC: Pixels | None = None

    def __len__(self) -> int:
        """Return N."""
        return len(self.file_N)

    def encoded(self, row: int) -> bytes:
        """Return an image as stored, without decoding it.

        Raises:
            ChangedError: Its file is no longer the one that was indexed.
        """
        number = self.file_N[row]
        protocol, path = self.files[number]
        return Place(path, int(self.offset_N[row]), int(self.size_N[row]), protocol, self.stamps[number]).read()

    def pixels(self, rows_B: Sequence[int]) -> Pixels:
        """Return decoded images, (B, side, side, 3) uint8, from memory or from their files."""
        if self.pixels_NHWC is not None:
            return self.pixels_NHWC[rows_B]
        return np.stack([decode(self.encoded(row), self.side, self.resize) for row in rows_B])

    def keys(self) -> list[str]:
        """Return the keys of the rows."""
        return _keys(self.store)

    def keys_known_to(self, known: Callable[[list[str]], bool]) -> list[str]:
        """Return the keys of the rows by which others know them.

        Args:
            known: Whether any of these keys is known. If none is, and the data are a pool without keys, the numbers of
                the rows are tried, as its selections have them.
        """
        keys = self.keys()
        if self.numbered and not known(keys):
            numbers = [str(row) for row in self.row_N.tolist()]
            return numbers if known(numbers) else keys
        return keys

    def keys_in(self, store: EmbeddingStore) -> list[str]:
        """Return the keys of the rows by which another pool knows them."""
        return self.keys_known_to(lambda keys: not set(keys).isdisjoint(_keys(store)))

    def column(self, name: str) -> list[Any]:
        """Return a column of the pool, such as labels.

        Raises:
            UsageError: There is no column of this name.
        """
        return [cell for _, part in self.store.scan([name]) for cell in part.column(0).to_pylist()]


def open_pairs(
    data: str,
    folder: Path,
    *,
    side: int,
    resize: Resize,
    captions: bool,
    progress: Progress,
    workers: int = 2,
    options: DataOptions | None = None,
) -> Pairs:
    """Index the data, decode every image once, and skip rows that cannot be used.

    Args:
        data: Anything that :func:`thresher.data.open_data` opens: parquet, tars, Arrow, a csv, a folder of images.
        folder: The folder of the run; indexes and copies are written there.
        side: Height and width of the decoded images in pixels, see :func:`thresher.io.pictures.decode`.
        resize: How images are made square.
        captions: Whether every row needs a caption.
        progress: Where to report progress.
        workers: Number of threads that decode.
        options: How to read the data.

    Raises:
        PoolError: The data are missing or damaged, or more than half of the rows cannot be used.
        ChangedError: The data changed while they were read.
    """
    options = replace(options or DataOptions(), captions=captions)
    opened = open_data(data, options)
    stamps = [part.stamp() for part in opened.parts]
    pairs, bad = _indexed(opened, data, folder, options, progress)
    pairs = replace(pairs, side=side, resize=resize)
    memory = len(pairs) * side * side * 3 <= IN_MEMORY
    pixels = np.empty((len(pairs) if memory else 0, side, side, 3), np.uint8)

    def look(row: int) -> None:
        if row in bad:
            return
        if captions and not pairs.captions[row]:
            bad[row] = "has no caption"
            return
        try:
            pixels_HWC = decode(pairs.encoded(row), side, resize)
        except PoolError as error:
            bad[row] = str(error)
            return
        if memory:
            pixels[row] = pixels_HWC

    with ThreadPoolExecutor(workers) as threads, progress.task("decode", len(pairs)) as advance:
        for lo in range(0, len(pairs), _CHUNK):
            rows = range(lo, min(lo + _CHUNK, len(pairs)))
            list(threads.map(look, rows))
            advance(len(rows))
    if stamps != [part.stamp() for part in opened.parts] or pairs.store.changed():
        raise ChangedError(f"{data}: changed while it was read; run again once writing has finished")
    if 2 * len(bad) > len(pairs):
        first = min(bad)
        raise PoolError(
            f"{data}: {len(bad):,} of {len(pairs):,} rows cannot be used; row {first:,} {bad[first]}; "
            "give data with images and captions"
        )
    if bad:
        keys, good_N = pairs.keys(), np.ones(len(pairs), np.bool_)
        good_N[sorted(bad)] = False
        skipped = tuple((f"row {row}, key {keys[row]}", bad[row]) for row in sorted(bad))
        pairs, pixels = replace(_without(pairs, good_N, folder), skipped=skipped), pixels[good_N] if memory else pixels
        with writing(folder / SET_ASIDE) as scratch:
            Path(scratch).write_text("".join(f"{what}: {why}\n" for what, why in skipped), encoding="utf-8")
    return replace(pairs, pixels_NHWC=pixels if memory else None)


def _indexed(
    opened: Data, data: str, folder: Path, options: DataOptions, progress: Progress
) -> tuple[Pairs, dict[int, str]]:
    """Read the data once; return all rows, and the reasons for rows without an image."""
    for note in opened.notes:
        progress.say(note)
    store, notes = _pool_of(opened, options), Counter[str]()
    numbered = store is not None and not store.layout.key
    if numbered:  # an index has the keys by which other commands find the rows
        store = None
    own: dict[str, list[Any]] = {name: [] for name in ("key", "text", "uid")}
    light: dict[str, list[Any]] = {name: [] for name in opened.columns}
    files: dict[tuple[str, str], int] = {}
    stamps: list[tuple[int, int] | None] = []
    bad: dict[int, str] = {}
    own_files = {part.path for part in opened.parts if not part.pictures_apart}
    at_N3 = array("q")
    copies = folder / PICTURES
    with writing(copies) as scratch, open(scratch, "wb") as file:
        for row, sample in enumerate(opened.samples()):
            place = sample.picture
            notes.update(sample.notes)
            if isinstance(place, bytes):
                place = Place(str(copies), file.tell(), file.write(place))
            elif place is None:
                place, bad[row] = Place(""), sample.why
            if (place.protocol, place.path) not in files:
                stamps.append(_stamp(place) if place.path in own_files else place.stamp)
            at_N3.extend((files.setdefault((place.protocol, place.path), len(files)), place.offset, place.size))
            own["text"].append(sample.text)
            if store is None:
                own["key"].append(sample.key)
                own["uid"].append(sample.uid)
                for name, column in light.items():
                    column.append(sample.columns.get(name))
        copied = file.tell()
    for line in (*opened.without_end(), *noted("row", notes)):
        progress.say(f"{data}: {line}")
    if not copied:
        copies.unlink()
    texts = own["text"]
    if not texts:
        raise PoolError(f"{data}: has no samples; give data with at least one")
    if options.captions and not any(texts):
        nowhere = f"{data}: none of its {len(texts):,} samples has a caption; CLIP training needs captions"
        raise PoolError(opened.captions_elsewhere() or nowhere)
    file_N, offset_N, size_N = np.array(at_N3, np.int64).reshape(-1, 3).T
    names = tuple(files)
    if store is None:
        paths = [names[number][1] for number in file_N]
        whole = bool((size_N < 0).all())
        where = {"filepath": paths} if whole else {"shard": paths, "offset": offset_N, "size": size_N}
        if not all(own["uid"]):
            del own["uid"]
        store = _pool(folder, {**{name: light[name] for name in light if name not in where}, **own, **where})
    return Pairs(store, names, tuple(stamps), file_N, offset_N, size_N, np.arange(len(texts)), texts, numbered), bad


def _keys(store: EmbeddingStore) -> list[str]:
    return [key for _, keys in store.keys() for key in keys]


def _stamp(place: Place) -> tuple[int, int] | None:
    """Return the size and time of a local file, None for others: looking at them takes requests."""
    if place.protocol != "file":
        return None
    status = os.stat(place.path)
    return status.st_size, status.st_mtime_ns


def _pool_of(opened: Data, options: DataOptions) -> EmbeddingStore | None:
    """Return parquet data as a pool, with all its columns; None for other data, whose rows need an index."""
    if opened.kind != "parquet" or "*" in opened.location:
        return None
    store = open_store(absolute(opened.location), Options(key=options.key, caption=options.caption))
    tables, read = store.layout.tables, dict.fromkeys(part.path for part in opened.parts)
    same = [table.path for table in tables] == list(read) and not any(table.success_only for table in tables)
    return store if same else None


def times_of(selection: str, pairs: Pairs) -> tuple[npt.NDArray[np.int32], int]:
    """Return how often a selection has each row, (N,) int32, and how many of its keys are missing in the data.

    Args:
        selection: A selection folder, of this pool or of another with the same keys; or a text file with one key per
            line.
        pairs: The rows.

    Raises:
        UsageError: All or most of its keys are missing.
    """
    if os.path.isdir(selection):
        chosen = Selection.load(selection)
        if not pairs.skipped and (chosen.store, chosen.total) == (pairs.store.fingerprint(), len(pairs)):
            return np.asarray(chosen.mask() if chosen.repeats is None else chosen.repeats).astype(np.int32), 0
    wanted = read_keys(selection)
    keys = pairs.keys_known_to(lambda keys: bool(wanted.times_many(keys).any()))
    times_N = wanted.times_many(keys).astype(np.int32)
    missing = len(wanted) - len(np.unique(wanted.find_many(keys)[times_N > 0]))
    where = pairs.store.layout.location
    if not times_N.any():
        ours = (key for key, _ in each_key(selection))
        examples = unlike("the selection", ours, "the data", keys)
        raise UsageError(f"{selection}: none of its keys is in {where}: {examples}; give a selection of these data")
    if 2 * missing > len(wanted):
        raise UsageError(
            f"{selection}: {missing:,} of its {len(wanted):,} keys are not in {where}; give a selection of these data"
        )
    return times_N, missing


def references_of(reference: str, pairs: Pairs) -> npt.NDArray[np.float32]:
    """Return the loss of each row under a reference model, (N,) float32; NaN if unknown.

    Args:
        reference: A file for :meth:`References.read`, or ``column:NAME``, a column of numbers of the data.
        pairs: The rows.

    Raises:
        UsageError: There is no such column, it has no numbers, or no row has a loss.
        PoolError: The file cannot be read.
    """
    where, column = pairs.store.layout.location, reference.removeprefix(COLUMN)
    if column != reference:
        try:
            values = [np.nan if value is None else float(value) for value in pairs.column(column)]
        except (TypeError, ValueError):
            raise UsageError(f"column {column!r} of {where} has values that are not numbers; give losses") from None
        return np.array(values, np.float32)
    references = References.read(reference)
    keys = pairs.keys_known_to(lambda keys: bool(np.isfinite(references.of_keys(keys)).any()))
    references_N = references.of_keys(keys)
    check_found(references_N, reference, where, keys, references.example)
    return references_N


def reference_of(reference: str, pairs: Pairs, folder: Path) -> ReferenceFeatures | npt.NDArray[np.float32]:
    """Return the embeddings of a reference for each row, or its losses (N,) float32, NaN if unknown.

    Args:
        reference: A pool, or what :func:`references_of` takes.
        pairs: The rows.
        folder: The folder of the run; embeddings that cannot be read one by one are copied there.

    Raises:
        UsageError: A row is not in the pool, or no row has a loss.
        PoolError: The pool or file cannot be read.
    """
    if has_losses(reference):
        return references_of(reference, pairs)
    store = open_store(absolute(reference))
    return ReferenceFeatures.of_pool(store, pairs.keys_in(store), folder)


def concepts_of(where: str, pairs: Pairs) -> Concepts:
    """Return the concepts of each row.

    Args:
        where: ``column:NAME``, a column of the data with a value or a list of values per row, without nulls and NaN;
            ``entries:FILE``, a text file of words and phrases that captions are searched for, one per line; or the
            folder of clusters that ``thresher cluster`` wrote for a pool with the same keys.
        pairs: The rows.

    Raises:
        UsageError: No row has a concept, or the clusters are those of other rows.
        PoolError: The file or folder cannot be read.
        MissingExtraError: ``entries:`` needs the extra ``metaclip``.
    """
    data, (kind, _, name) = pairs.store.layout.location, where.partition(":")
    if kind == "column" and name:
        cells = pairs.column(name)
        try:
            found = Concepts.of_lists(
                cell if isinstance(cell, list) else None if cell is None else (cell,) for cell in cells
            )
        except TypeError:  # it cannot be compared, such as a struct
            raise UsageError(f"column {name!r} of {data} has no values or lists of values; give concepts") from None
    elif kind == "entries" and name:
        match = Matcher(read_entries(name, True)[0], True)
        found = Concepts.of_lists(map(match, pairs.captions))
    else:
        found = Concepts.of_labels(_labels_of(where, pairs))
    if not len(found.ids_M):
        raise UsageError(f"{where}: none of {len(found):,} rows of {data} has a concept; give concepts of these data")
    return found


def _labels_of(folder: str, pairs: Pairs) -> Ints:
    """Return the cluster of each row, -1 for none: by row if the clusters are those of these data, else by key."""
    written = read_groups(folder)
    labels_N, pool = np.asarray(written.labels_N, np.int64), written.info.get("pool")
    if not isinstance(pool, str):
        raise UsageError(f"{folder}: does not say which pool was clustered; run thresher cluster on these data")
    store = open_store(absolute(pool))
    keys = pairs.keys_in(store)
    if len(labels_N) != store.total:
        raise UsageError(f"{folder}: its pool {pool} has changed; cluster it again")
    if store.fingerprint() == pairs.store.fingerprint():
        return labels_N
    # By hash, as keys of selections are: uids are the same in upper and lower case.
    theirs_M = np.concatenate([hash_many(list(names))[0] for _, names in store.keys()])
    order_M = np.argsort(theirs_M, kind="stable")
    ours_N = hash_many(keys)[0]
    at_N = np.searchsorted(theirs_M, ours_N, side="right", sorter=order_M) - 1
    rows_N = order_M[np.maximum(at_N, 0)]
    found_N = (at_N >= 0) & (theirs_M[rows_N] == ours_N)
    if not found_N.any():
        first = next(name for _, names in store.keys() for name in names)
        raise UsageError(f"{folder}: none of its keys is in the data: {unlike('the pool', [first], 'the data', keys)}")
    return np.where(found_N, labels_N[rows_N], -1)


def has_losses(reference: str) -> bool:
    """Return whether a reference is a column, or a parquet file with losses, rather than a pool.

    Raises:
        PoolError: The file cannot be read.
    """
    if reference.startswith(COLUMN):
        return True
    return os.path.isfile(reference) and bool(set(LOSSES) & set(table_piece("file", reference).columns))


def _without(pairs: Pairs, good_N: npt.NDArray[np.bool_], folder: Path) -> Pairs:
    """Return the usable rows as a new pool, with the columns of the data."""
    light = [name for name in pairs.store.columns if not heavy(pairs.store, name)]
    columns: dict[str, list[Any]] = {name: [] for name in light}
    for _, part in pairs.store.where(good_N).scan(light) if light else ():
        for name, column in zip(light, part.columns, strict=True):
            columns[name] += column.to_pylist()
    captions = [caption for caption, good in zip(pairs.captions, good_N, strict=True) if good]
    at: dict[str, Any] = {name: getattr(pairs, name)[good_N] for name in ("file_N", "offset_N", "size_N", "row_N")}
    store = _pool(folder, {**columns, "row": at["row_N"]})
    return replace(pairs, store=store, captions=captions, **at)


def _pool(folder: Path, columns: dict[str, Any]) -> EmbeddingStore:
    """Write an index of rows and open it as a pool."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = folder / ROWS
    with writing(path) as scratch:
        pq.write_table(pa.table(columns), scratch)
    return open_store(absolute(str(path)))
