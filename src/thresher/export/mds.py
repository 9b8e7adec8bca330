"""A stream of MosaicML Streaming that has only the samples a selection keeps::

    from streaming import StreamingDataset

    stream = KeptStream("subset", remote="s3://bucket/data", local="/cache/data")
    dataset = StreamingDataset(streams=[stream], batch_size=256, shuffle=True)

To the dataset, a shard has only the samples that are kept, and a shard without any is not there. So lengths, shuffling,
the share of each rank and worker, checkpoints and the limit of the cache are right without further work, and nothing is
downloaded or decoded that is not kept.
"""

from __future__ import annotations

import os
import posixpath
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from thresher.data import DataOptions, open_data
from thresher.errors import MissingExtraError, PoolError, UsageError
from thresher.export.keys import Chosen, key_batches, read_keys
from thresher.io.key_forms import unlike
from thresher.io.listing import Files
from thresher.io.paths import visible
from thresher.io.plan import plan_in
from thresher.pool.store import EmbeddingStore, reopen
from thresher.runtime.format import counted
from thresher.selection import Selection

try:
    from streaming import Stream
    from streaming.base.format import Reader
except ImportError:
    raise MissingExtraError("filtering a StreamingDataset", "mds") from None

Ints = npt.NDArray[np.int64]
Places = Iterator[tuple[npt.NDArray[Any], Ints, Ints | None]]  # shards, samples in them, and their numbers of uses


class KeptStream(Stream):
    """A ``Stream`` with only the samples that a selection keeps, each as often as the selection uses it.

    It takes the place of a ``Stream``: alone or mixed with others in ``StreamingDataset(streams=[...])``, also with
    ``proportion``, ``repeat`` or ``choose``, which then refer to the samples that are kept. A checkpoint of the dataset
    is for this selection: resume with the same one.

    How samples are found without reading shards:

    - a selection whose pool ``thresher embed`` made of the data has the shard and the position of every sample;
    - samples of data without a column of keys have keys such as ``shard.00000-17``, also in files of keys;
    - a selection whose pool has as many rows as there are samples, and no keys, has them in the order of the samples.

    Otherwise the keys are in the shards: if these are local, the keys are read once, and nothing else.
    """

    def __init__(self, selection: Chosen, **options: Any) -> None:
        """Create the stream; the selection is read when a dataset is made of it.

        Args:
            selection: A selection folder, a :class:`~thresher.selection.Selection`, or a file of keys, as
                :func:`thresher.export.keys.read_keys` reads.
            **options: Those of ``Stream``: remote, local, split, proportion and others.
        """
        super().__init__(**options)
        self.selection = selection

    def get_shards(self, world: Any, allow_unsafe_types: bool) -> list[Reader]:
        """Return the shards with kept samples; called by ``StreamingDataset``.

        Raises:
            UsageError: The selection keeps none of the samples, is of other data, or its keys are in remote shards.
            PoolError: The selection cannot be read.
        """
        whole = super().get_shards(world, allow_unsafe_types)
        rows = _rows_of(self.selection, whole, posixpath.join(self.remote or self.local, self.split or ""))
        return [_KeptShard(shard, some) for shard, some in zip(whole, rows, strict=True) if len(some)]


class _KeptShard(Reader):
    """Some samples of a shard, as a shard."""

    def __init__(self, whole: Reader, rows: npt.NDArray[np.uint32]) -> None:
        super().__init__(whole.dirname, whole.split, whole.compression, whole.hashes, len(rows), whole.size_limit)
        self.whole, self.rows, self.file_pairs = whole, rows, whole.file_pairs

    def decode_sample(self, data: bytes) -> dict[str, Any]:
        sample: dict[str, Any] = self.whole.decode_sample(data)
        return sample

    def get_sample_data(self, idx: int) -> bytes:
        data: bytes = self.whole.get_sample_data(int(self.rows[idx]))
        return data


def _rows_of(chosen: Chosen, shards: Sequence[Reader], location: str) -> list[npt.NDArray[np.uint32]]:
    """Return the samples of each shard that a selection keeps, ascending, each as often as it is used."""
    sizes = np.array([len(shard) for shard in shards], np.int64)
    starts = np.cumsum(sizes) - sizes
    times = np.zeros(int(sizes.sum()), np.int32)
    for at_n, row_n, often_n in _places(chosen, shards, location):
        if len(beyond := np.flatnonzero((row_n < 0) | (row_n >= sizes[at_n]))):
            shard = _names_of(shards[int(at_n[beyond[0]])])[0]
            raise UsageError(
                f"{_shown(chosen)}: keeps sample {row_n[beyond[0]]:,} of {visible(shard)}, which has "
                f"{sizes[at_n[beyond[0]]]:,} in {location}; give a selection of these data"
            )
        np.add.at(times, starts[at_n] + row_n, 1 if often_n is None else often_n)
    if not times.any():
        raise UsageError(f"{_shown(chosen)}: keeps no sample of {location}; give a selection that keeps some")
    some = (times[start : start + size] for start, size in zip(starts.tolist(), sizes.tolist(), strict=True))
    return [np.repeat(np.arange(len(one), dtype=np.uint32), one) for one in some]


def _places(chosen: Chosen, shards: Sequence[Reader], location: str) -> Places:
    """Yield where kept samples are: numbers of shards, samples in them, and how often each is used, None for once."""
    if isinstance(chosen, Selection) or os.path.isdir(chosen):
        selection = chosen if isinstance(chosen, Selection) else Selection.load(chosen)
        store = reopen(selection)
        names = {name: at for at, shard in enumerate(shards) for name in _names_of(shard)}
        if {"shard", "offset"} <= set(store.columns) and _is_of(store, selection, names):
            _refuse_changed(store, shards, names, location)
            yield from _by_place(store, selection, names, shards, location)
            return
        if store.layout.key is None and selection.total == sum(map(len, shards)):
            yield from _by_row(selection, shards)
            return
    stems = {name.removesuffix(".mds"): at for at, shard in enumerate(shards) for name in _names_of(shard)[:1]}
    first = next((keys for keys, _ in key_batches(chosen) if keys), [])
    if first and _place_in(first[0], stems) is not None:
        for keys, often in key_batches(chosen):
            found = [_place_in(key, stems) for key in keys]
            if None in found:
                raise _other_data(chosen, keys[found.index(None)], location, shards)
            at_row = np.array(found, np.int64).reshape(-1, 2)
            yield at_row[:, 0], at_row[:, 1], often
    else:
        yield from _by_key(chosen, first, shards, location)


def _is_of(store: EmbeddingStore, selection: Selection, names: Mapping[str, int]) -> bool:
    """Return whether the first kept row of a pool is in one of the shards, and not in a tar or a table."""
    first = store.lookup(["shard"], np.flatnonzero(selection.mask())[:1])
    return any(_shard_of(str(text), names) is not None for part in first for text in part.column(0).to_pylist())


def _refuse_changed(store: EmbeddingStore, shards: Sequence[Reader], names: Mapping[str, int], location: str) -> None:
    """Check that the shards have the sizes that they had when the pool was made of them.

    Raises:
        UsageError: One has another size.
    """
    plan = plan_in(Files.at(store.layout.location))
    for entry in plan["shards"] if plan else ():
        try:
            _, name, _, _, (size, *_) = entry
        except (TypeError, ValueError):  # not what embed writes
            continue
        at = _shard_of(str(name), names)
        sizes = [] if at is None else [info.bytes for info in shards[at].file_pairs[-1] if info is not None]
        if at is not None and size not in sizes:
            raise UsageError(
                f"{location}: {visible(str(name), 120)} has {sizes[0]:,} bytes, but had {visible(str(size), 40)} when "
                f"{store.layout.location} was made of it; embed these data, and select again"
            )


def _by_place(
    store: EmbeddingStore, selection: Selection, names: Mapping[str, int], shards: Sequence[Reader], location: str
) -> Places:
    known: dict[str, int] = {}
    for ids, part in store.where(selection.mask()).scan(["shard", "offset"]):
        texts = part.column(0).to_pylist()
        for text in set(texts) - set(known):
            at = _shard_of(str(text), names)
            if at is None:
                raise _other_data(selection, str(text), location, shards)
            known[text] = at
        often = None if selection.repeats is None else selection.repeats[ids].astype(np.int64)
        yield np.array([known[text] for text in texts], np.int64), part.column(1).to_numpy(), often
    store.check_unchanged("the places of its rows were read")


def _by_row(selection: Selection, shards: Sequence[Reader]) -> Places:
    ends = np.cumsum([len(shard) for shard in shards])
    row_n = np.flatnonzero(selection.mask())
    at_n = np.searchsorted(ends, row_n, side="right")
    often = None if selection.repeats is None else selection.repeats[row_n].astype(np.int64)
    yield at_n, row_n - np.append(0, ends)[at_n], often


def _by_key(chosen: Chosen, first: Sequence[str], shards: Sequence[Reader], location: str) -> Places:
    """Read the keys of all samples, if they are on this machine."""
    if "://" in location:
        like = f" has keys such as {visible(first[0], 80)!r}" if first else " has no keys"
        raise UsageError(
            f"{_shown(chosen)}{like}, and the keys of {location} are in its shards, which would all be downloaded; "
            "give a selection folder of a pool that thresher embed made of these data"
        )
    keys = read_keys(chosen)
    names = {name: at for at, shard in enumerate(shards) for name in _names_of(shard)}
    found = np.zeros(len(keys), np.bool_)
    seen = ""
    for part in open_data(location, DataOptions(captions=False, pictures=False, reader="mds")).parts:
        at = next(names[end] for end in _ends(part.path) if end in names)
        scanned = part.scan()
        if scanned.damage:
            raise PoolError(f"{part.path}: {scanned.damage}")
        seen = seen or next(iter(scanned.keys), "")
        numbers = keys.find_many(scanned.keys)
        rows = np.flatnonzero(numbers >= 0)
        found[numbers[rows]] = True
        often = np.array([keys.times_at(number) for number in numbers[rows].tolist()], np.int64)
        yield np.full(len(rows), at), scanned.start_n[rows], often
    if not found.any():
        raise UsageError(
            f"{_shown(chosen)}: {unlike(location, [seen], 'the selection', first)}; give one of these data"
        )
    if lost := len(keys) - int(found.sum()):
        warnings.warn(f"{_shown(chosen)}: {counted(lost, 'key')} of {len(keys):,} not in {location}", stacklevel=2)


def _place_in(key: str, stems: dict[str, int]) -> tuple[int, int] | None:
    """Return the shard and the sample that a key such as ``shard.00000-17`` names, None if it names none."""
    stem, _, row = key.rpartition("-")
    at = _shard_of(stem, stems)
    return None if at is None or not (row.isascii() and row.isdigit() and len(row) < 12) else (at, int(row))


def _names_of(shard: Reader) -> list[str]:
    """Return the names of the file of a shard in its index: the plain one, and the compressed one."""
    return [info.basename for info in shard.file_pairs[-1] if info is not None]


def _shard_of(path: str, names: Mapping[str, int]) -> int | None:
    """Return the shard whose name is the end of a path."""
    return next((names[end] for end in _ends(path) if end in names), None)


def _ends(path: str) -> list[str]:
    """Return the ends of a path, from its name to all of it."""
    parts = path.split("/")
    return ["/".join(parts[-n:]) for n in range(1, len(parts) + 1)]


def _other_data(chosen: Chosen, name: str, location: str, shards: Iterable[Reader]) -> UsageError:
    own = _names_of(next(iter(shards)))[0]
    return UsageError(
        f"{_shown(chosen)}: keeps a sample of {visible(name, 120)!r}, but {location} has shards such as "
        f"{visible(own, 120)!r}; give a selection of these data"
    )


def _shown(chosen: Chosen) -> str:
    return f"the selection of {counted(chosen.total, 'row')}" if isinstance(chosen, Selection) else os.fspath(chosen)
