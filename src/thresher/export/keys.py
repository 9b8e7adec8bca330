"""A compact set of keys with counts, fast enough to look up every sample of a stream.

A :class:`KeySet` stores no text. Each key is a 64-bit hash. The hashes are sorted in one array, and a table of buckets,
one for each value of the highest bits, gives the short range to search. A key takes 8.5 to 9 bytes, and 1 to 4 more if
keys repeat; a Python set of the same keys takes about 100 bytes per key.

Shape letters: N different keys, M keys looked up.
"""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import Any

import numpy as np
import numpy.typing as npt

from thresher.errors import PoolError, UsageError
from thresher.io.columns import KEYS, as_text
from thresher.io.csv import why_not_utf8
from thresher.io.key_forms import unlike
from thresher.io.npy import npy_keys
from thresher.io.parquet import TablePiece, table_piece
from thresher.io.sql import is_sql, sql_table
from thresher.io.tables import TABLES, any_table
from thresher.ops import key_hash
from thresher.ops.key_hash import BATCH, Hashes, batches_of
from thresher.pool.store import reopen
from thresher.runtime.format import counted
from thresher.runtime.untrusted import cut
from thresher.selection import Selection

Ints = npt.NDArray[np.int64]
Chosen = str | os.PathLike[str] | Selection

_BUCKET = 8  # maximum average number of hashes in a bucket; a bucket takes 4 bytes
_MOST_TIMES = 2**31 - 1
_SHOWN = 12  # columns named in a message
_NEVER = (".npz", ".pkl", ".pickle", ".pt", ".pth", ".gz", ".zip", ".tar", ".xlsx")
_FILES = f"give a .txt file with one key per line, a .npy of text, or a table with a column 'key' ({', '.join(TABLES)})"


class KeySet:
    """A set of keys, each with the number of times it is used. Immutable; pickles as its arrays.

    Different keys with the same hash are treated as one key. The probability that any two of N keys share a hash is
    about N^2 / 2^65, which is 1 in 3,700 for 100 million keys. Of M samples that are not kept, about N * M / 2^64
    are kept by mistake, which is 1 sample in 18 such runs for 100 million keys and 10 billion samples.

    A key of 32 hexadecimal digits, such as a DataComp uid, is the same key in upper and lower case.

    Attributes:
        uids: Whether any key is 32 hexadecimal digits, so that samples may have to be looked up by uid.
        total: Sum of the counts of all keys.
    """

    uids: bool
    total: int

    def __init__(self, hashes_N: Hashes, times_N: npt.NDArray[Any] | None = None, *, uids: bool = False) -> None:
        """Build a set from its arrays; use :meth:`from_keys`, :meth:`from_counts` or :func:`read_keys` instead.

        Args:
            hashes_N: (N,) uint64 from :func:`hashes_of`, ascending and unique.
            times_N: (N,) integer counts, 1 or more; None for 1 each.
            uids: Whether any key is 32 hexadecimal digits.
        """
        n = len(hashes_N)
        bits = max(1, (max(n - 1, 0) // _BUCKET).bit_length())
        starts = np.empty(2**bits + 1, np.uint32 if n < 2**32 else np.uint64)
        for lo in range(0, 2**bits, BATCH):
            edges = np.arange(lo, min(lo + BATCH, 2**bits), dtype=np.uint64) << np.uint64(64 - bits)
            starts[lo : lo + len(edges)] = np.searchsorted(hashes_N, edges)
        starts[-1] = n
        total = n if times_N is None else int(times_N.sum(dtype=np.int64))
        self.__setstate__((hashes_N, times_N, starts, uids and n > 0, total))

    def __getstate__(self) -> tuple[Any, ...]:
        """Return the pickled state."""
        return self._hashes_N, self._times_N, self._starts, self.uids, self.total

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        """Restore the pickled state."""
        self._hashes_N, self._times_N, self._starts, self.uids, self.total = state
        for array in self._arrays():
            array.flags.writeable = False
        # Memoryviews return Python integers, several times faster than arrays.
        self._hashes, self._begins = memoryview(self._hashes_N), memoryview(self._starts)
        self._times = None if self._times_N is None else memoryview(self._times_N)
        self._shift = 64 - (len(self._starts) - 1).bit_length() + 1

    @classmethod
    def from_keys(cls, keys: Iterable[str]) -> KeySet:
        """Build a set from keys; a key given k times has the count k. Reads the keys in batches.

        Raises:
            UsageError: A key is given more than 2^31 - 1 times.
        """
        return cls._of((part, None) for part in batches_of(keys))

    @classmethod
    def from_counts(cls, counts: Iterable[tuple[str, int]]) -> KeySet:
        """Build a set from keys with counts; the counts of repeated keys are added.

        Args:
            counts: Keys and counts; keys with count 0 are ignored.

        Raises:
            UsageError: A count is below 0 or above 2^31 - 1.
        """
        return cls._of(_counted(counts))

    @classmethod
    def _of(cls, parts: Iterable[tuple[Sequence[str], Ints | None]], rows_of: Chosen | None = None) -> KeySet:
        """Build a set from keys and counts, None for 1 each; with ``rows_of``, keys must be unique to a row."""
        uids = False

        def hashed() -> Iterator[tuple[Hashes, Ints | None]]:
            nonlocal uids
            for keys, times in parts:
                hashes, some_uids = key_hash.hash_many(keys)
                uids |= some_uids
                yield hashes, times

        hashes_N, times_N, repeated = _merged(hashed())
        if rows_of is not None and len(repeated):
            times_N = _resolved(rows_of, hashes_N, times_N, repeated)
        return cls(hashes_N, times_N, uids=uids)

    @property
    def hashes_N(self) -> Hashes:
        """The sorted hashes."""
        hashes: Hashes = self._hashes_N
        return hashes

    def __len__(self) -> int:
        """Return N."""
        return len(self._hashes_N)

    def __contains__(self, key: object) -> bool:
        """Return whether a key is kept."""
        return isinstance(key, str) and self.find(key) >= 0

    def __repr__(self) -> str:
        """Return the numbers of keys and uses."""
        return f"<{counted(len(self), 'key')}, {counted(self.total, 'use')}>"

    def find(self, key: str) -> int:
        """Return the index of a key, 0 to N-1, which is fixed for this set; -1 if the key is not kept."""
        hashed = key_hash.hash_of(key)
        bucket = hashed >> self._shift
        end = self._begins[bucket + 1]
        at = bisect_left(self._hashes, hashed, self._begins[bucket], end)
        return at if at < end and self._hashes[at] == hashed else -1

    def times(self, key: str) -> int:
        """Return how often a key is used, 0 if it is not kept."""
        at = self.find(key)
        return 0 if at < 0 else 1 if self._times is None else self._times[at]

    def times_at(self, number: int) -> int:
        """Return how often the key at an index is used.

        Raises:
            IndexError: No such index.
        """
        if not 0 <= number < len(self):
            raise IndexError(f"no key number {number:,}; there are {len(self):,}")
        return 1 if self._times is None else self._times[number]

    def find_many(self, keys: Iterable[str]) -> Ints:
        """Return the indices of keys, (M,) int64, -1 for keys that are not kept, as :meth:`find` does for one key."""
        numbers = [self._look_up(hashes_of(part)) for part in batches_of(keys)]
        return np.concatenate(numbers) if numbers else np.empty(0, np.int64)

    def times_many(self, keys: Iterable[str]) -> Ints:
        """Return how often keys are used, (M,) int64, 0 for keys that are not kept."""
        at_M = self.find_many(keys)
        times_M = (at_M >= 0).astype(np.int64)
        if self._times_N is not None:
            times_M[at_M >= 0] = self._times_N[at_M[at_M >= 0]]
        return times_M

    @property
    def nbytes(self) -> int:
        """Size of the arrays in bytes."""
        return sum(array.nbytes for array in self._arrays())

    def _arrays(self) -> list[npt.NDArray[Any]]:
        return [array for array in (self._hashes_N, self._starts, self._times_N) if array is not None]

    def _look_up(self, hashes_M: Hashes) -> Ints:
        """Return the indices of hashes by a vectorised binary search in their buckets."""
        if not len(self):
            return np.full(len(hashes_M), -1, np.int64)
        bucket_M = (hashes_M >> np.uint64(self._shift)).astype(np.int64)
        lo_M, hi_M = self._starts[bucket_M].astype(np.int64), self._starts[bucket_M + 1].astype(np.int64)
        last = len(self) - 1
        while (lo_M < hi_M).any():
            mid_M = (lo_M + hi_M) >> 1
            # Where lo == hi this changes nothing, except past the last hash.
            less_M = self._hashes_N[np.minimum(mid_M, last)] < hashes_M
            lo_M, hi_M = np.where(less_M, mid_M + 1, lo_M), np.where(less_M, hi_M, mid_M)
        return np.where(self._hashes_N[np.minimum(lo_M, last)] == hashes_M, lo_M, -1)


def hashes_of(keys: Sequence[str]) -> Hashes:
    """Return the hashes of keys in a :class:`KeySet`, (M,) uint64."""
    return key_hash.hash_many(keys)[0]


def read_keys(sel: Chosen) -> KeySet:
    """Return the keys that a selection keeps, with counts.

    Args:
        sel: A selection folder or a :class:`Selection`, whose pool is opened for the keys, or a file:

            - ``.npy``: an array of text, or a DataComp subset file, whose keys are uids of 32 hexadecimal digits;
            - ``.parquet``, ``.pq``, ``.arrow``, ``.feather``, ``.ipc``, ``.csv``, ``.tsv``, ``.jsonl``, ``.ndjson``,
              ``.json``: a table with a column ``uid``, ``key``, ``id``, ``__key__`` or ``image_path``. Of a file of
              ``export --as parquet`` only the kept rows count, with their repeats. JSON may also list the keys alone;
            - ``sql:`` and a query: the same column of its result, see :mod:`thresher.io.sql`;
            - any other: UTF-8 text with one key per line. Empty lines are ignored.

            A key that is there several times counts each time.

    Raises:
        PoolError: It is none of these, the file is damaged, or the pool is gone.
        UsageError: The pool has a key several times, so that the key does not identify one row.
    """
    if _kind(sel) == "npy":
        subset = npy_keys(_path(sel))
        if subset.dtype.names is not None:
            hashes_N, times_N, _ = _merged((key_hash.of_halves(high, low), None) for high, low in _halves(subset))
            return KeySet(hashes_N, times_N, uids=True)
    return KeySet._of(key_batches(sel), rows_of=sel if keys_are_of_rows(sel) else None)


def each_key(sel: Chosen) -> Iterator[tuple[str, int]]:
    """Yield the keys that a selection keeps with counts, in its order, with only a batch in memory.

    A key that is in a file several times is yielded each time; its counts add up to that of :func:`read_keys`.

    Args:
        sel: As for :func:`read_keys`.

    Raises:
        PoolError: As for :func:`read_keys`.
    """
    for keys, times in key_batches(sel):
        yield from zip(keys, [1] * len(keys) if times is None else times.tolist(), strict=True)


def keys_are_of_rows(sel: Chosen) -> bool:
    """Return whether the keys are those of single rows of a pool, so that :func:`read_keys` refuses repeated keys."""
    kind = _kind(sel)
    return kind == "selection" or (kind == "table" and _exported(_path(sel)) is not None)


def key_batches(sel: Chosen) -> Iterator[tuple[list[str], Ints | None]]:
    """Yield the keys of :func:`each_key` in batches with their counts, (M,) int64; None for 1 each."""
    kind = _kind(sel)
    if kind == "selection":
        selection = _selection(sel)
        store = reopen(selection)
        for ids, keys in store.where(selection.mask()).keys():
            yield keys, None if selection.repeats is None else selection.repeats[ids].astype(np.int64)
        store.check_unchanged("its keys were read")
    elif kind == "npy":
        yield from ((part, None) for part in _npy(_path(sel)))
    elif kind == "table":
        yield from _table(_path(sel))
    else:
        yield from ((part, None) for part in batches_of(_lines(_path(sel))))


def select_indices(sel: Chosen | KeySet, dataset: Any = None, *, keys: Iterable[Any] | None = None) -> Ints:
    """Return which rows of a dataset a selection keeps: for ``Subset(dataset, ...)`` or ``dataset.select(...)``.

    Args:
        sel: A selection whose pool has the rows of the dataset in the same order. With ``keys``, also anything else
            that :func:`thresher.export.keys.read_keys` reads, or the :class:`KeySet` it returns.
        dataset: The dataset, only to check that its length is that of the pool.
        keys: The key of every row of the dataset, as a sequence or column. Rows are then selected by key, and the pool
            may have other rows in another order. Keys are converted to text. All rows with a kept key are selected.
            For a selection of uids, give the uid of every row, in upper or lower case.

    Returns:
        (M,) int64, ascending, each row as often as the selection uses it.

    Raises:
        UsageError: The dataset has another length, ``sel`` is a file of keys without ``keys``, or none of the keys is
            kept.
        PoolError: The selection cannot be read.
    """
    if keys is not None:
        chosen = sel if isinstance(sel, KeySet) else read_keys(sel)
        texts = texts_of(keys)
        first = list(islice(texts, 1))
        times_N = chosen.times_many(chain(first, texts))
        what = counted(len(times_N), "key")
        if not times_N.any():
            known = () if isinstance(sel, KeySet) else (key for key, _ in each_key(sel))
            like = f": {unlike('the dataset', first, 'the selection', known)}" if first and known else ""
            raise UsageError(
                f"none of the {what} is one of {counted(len(chosen), 'kept key')}; is this other data?{like}"
            )
    else:
        if isinstance(sel, KeySet) or not (isinstance(sel, Selection) or os.path.isdir(sel)):
            raise UsageError(f"{sel}: a file of keys has no row numbers; give the keys of the dataset with keys=")
        selection = _selection(sel)
        kept_N = selection.mask() if selection.repeats is None else selection.repeats
        times_N, what = kept_N.astype(np.int64), f"a pool of {counted(selection.total, 'row')} ({selection.pool})"
    if dataset is not None and len(dataset) != len(times_N):
        hint = "" if keys is not None else "; select by key with keys="
        raise UsageError(f"a dataset of {counted(len(dataset), 'row')} for {what}{hint}")
    return np.repeat(np.arange(len(times_N)), times_N)


# --- arrays ---------------------------------------------------------------------------------------


def _merged(parts: Iterable[tuple[Hashes, Ints | None]]) -> tuple[Hashes, npt.NDArray[Any] | None, Hashes]:
    """Return unique ascending hashes, their counts, None for 1 each, and the hashes that occurred several times."""
    held, often = bytearray(), None  # bytearrays grow in place, without a second copy
    for hashes, times in parts:
        if often is None and times is not None and (times != 1).any():
            often = bytearray(np.ones(len(held) // 8, np.int32).data)
        held += hashes.data
        if often is not None:
            often += (np.ones(len(hashes), np.int32) if times is None else times.astype(np.int32)).data
    hashes_n = np.frombuffer(held, np.uint64)
    times_n = None if often is None else np.frombuffer(often, np.int32)
    if times_n is None:
        hashes_n.sort()
    else:
        order = np.argsort(hashes_n)
        hashes_n, times_n = hashes_n[order], times_n[order]
    new_n = np.ones(len(hashes_n), np.bool_)
    np.not_equal(hashes_n[1:], hashes_n[:-1], out=new_n[1:])
    if new_n.all():
        return hashes_n, None if times_n is None else _narrow(times_n), hashes_n[:0]
    begins = np.flatnonzero(new_n)
    repeated = np.unique(hashes_n[~new_n])
    if times_n is None:
        summed = np.diff(begins, append=len(hashes_n))
    else:
        summed = np.add.reduceat(times_n, begins, dtype=np.int64)
    return hashes_n[begins], _narrow(summed), repeated


def _narrow(times_N: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return counts in the smallest integer type that fits."""
    if (most := int(times_N.max())) > _MOST_TIMES:
        raise UsageError(f"a key is used {most:,} times; use it {_MOST_TIMES:,} times or fewer")
    return times_N.astype(np.min_scalar_type(most))


# --- sources --------------------------------------------------------------------------------------


def _counted(counts: Iterable[tuple[str, int]]) -> Iterator[tuple[list[str], Ints]]:
    rest = iter(counts)
    while part := list(islice(rest, BATCH)):
        for key, times in part:
            if not 0 <= times <= _MOST_TIMES:
                raise UsageError(f"the key {key!r} has the count {times:,}; give 0 to {_MOST_TIMES:,}")
        used = [(key, times) for key, times in part if times]
        yield [key for key, _ in used], np.array([times for _, times in used], np.int64)


def texts_of(keys: Any) -> Iterator[str]:
    """Yield the keys of a column as text, as a pool does; a missing key is empty."""
    if hasattr(keys, "to_pylist"):  # Arrow
        keys = as_text(keys, "keys=", "keys").to_pylist()
    return (key if isinstance(key, str) else _text(key) for key in keys)


def _text(key: Any) -> str:
    if isinstance(key, bytes):
        try:
            return key.decode()
        except UnicodeDecodeError:
            raise UsageError(f"keys=: the key {key!r} is not UTF-8 text; give keys as text") from None
    if isinstance(key, float):
        raise UsageError(f"keys=: floats are not keys: {key!r}; give keys as text or whole numbers")
    return "" if key is None else str(key).lower() if isinstance(key, bool) else str(key)


def _kind(sel: Chosen) -> str:
    if isinstance(sel, Selection) or os.path.isdir(sel):
        return "selection"
    if is_sql(sel):
        return "table"
    ending = os.path.splitext(sel)[1].lower()
    if ending in _NEVER:
        raise PoolError(f"{os.fspath(sel)}: keys are not read from {ending} files; {_FILES}")
    return "npy" if ending == ".npy" else "table" if ending in TABLES else "text"


def _selection(sel: Chosen) -> Selection:
    return sel if isinstance(sel, Selection) else Selection.load(sel)


def _path(sel: Chosen) -> str:
    return sel.pool if isinstance(sel, Selection) else os.fspath(sel)


def _lines(path: str) -> Iterator[str]:
    try:
        with open(path, "rb") as raw:
            why = why_not_utf8(path, raw.read(4))
        if why:
            raise PoolError(f"{path}: {why}")
        with open(path, encoding="utf-8-sig") as file:
            for line in file:
                if key := line.removesuffix("\n"):
                    yield key
    except (OSError, ValueError) as error:
        raise PoolError(f"{path}: is neither a selection folder nor a file of keys ({error}); {_FILES}") from None


def _npy(path: str) -> Iterator[list[str]]:
    """Yield the keys of a .npy file in batches."""
    keys = npy_keys(path)
    if keys.dtype.names is not None:
        for high, low in _halves(keys):
            text = np.stack([high, low], axis=1).astype(">u8").tobytes().hex()
            yield [text[at : at + 32] for at in range(0, len(text), 32)]
        return
    for start in range(0, len(keys), BATCH):
        part = keys[start : start + BATCH].tolist()
        try:
            yield [key if isinstance(key, str) else key.decode() for key in part]
        except UnicodeDecodeError:
            raise PoolError(f"{path}: contains bytes that are not UTF-8; save keys as text") from None


def _halves(subset: npt.NDArray[Any]) -> Iterator[tuple[Hashes, Hashes]]:
    """Yield the two halves of the uids of a DataComp subset file, in batches."""
    high, low = subset.dtype.names or ()
    for start in range(0, len(subset), BATCH):
        part = subset[start : start + BATCH]
        yield part[high].astype(np.uint64), part[low].astype(np.uint64)


def _exported(path: str) -> TablePiece | None:
    """Return a table that ``export --as parquet`` wrote, with a row for every row of a pool; None if it is another."""
    if is_sql(path) or not path.lower().endswith((".parquet", ".pq")):
        return None
    piece = table_piece("file", path)
    return piece if {"row", "key", "kept"} <= set(piece.columns) else None


def _table(path: str) -> Iterator[tuple[list[str], Ints | None]]:
    """Yield the keys of a table; only the kept rows of one written by ``export --as parquet``."""
    place = sql_table(path).path if is_sql(path) else path
    exported = _exported(place)
    piece = exported or any_table("file", place)
    key = "key" if exported else next((name for name in KEYS if name in piece.columns), None)
    if key is None:
        there = ", ".join(map(cut, piece.columns[:_SHOWN])) + (", ..." if len(piece.columns) > _SHOWN else "")
        raise PoolError(
            f"{path}: has no column of keys ({', '.join(KEYS)}); it has {there}. Name the column of keys 'key', or "
            "give a .txt file with one key per line"
        )
    repeats = ["repeats"] if exported and "repeats" in piece.columns else []
    for part in piece.stream([key, *(["kept"] if exported else []), *repeats]):
        if exported:
            part = part.filter(part.column("kept"))
        if lost := part.column(key).null_count:
            raise PoolError(f"{path}: {counted(lost, 'row has', 'rows have')} no {key}; every row needs one")
        yield (
            as_text(part.column(key), path, key).to_pylist(),
            np.asarray(part.column("repeats"), np.int64) if repeats else None,
        )


def _resolved(
    sel: Chosen, hashes_N: Hashes, times_N: npt.NDArray[Any] | None, repeated: Hashes
) -> npt.NDArray[Any] | None:
    """Raise if a key belongs to several rows; different keys with one hash all get the highest of their counts."""
    seen: dict[int, dict[str, int]] = {int(hashed): {} for hashed in repeated}
    for keys, times in key_batches(sel):
        hashes = hashes_of(keys)
        for i in np.flatnonzero(np.isin(hashes, repeated)):
            times_by_key = seen[int(hashes[i])]
            if keys[i] in times_by_key:
                raise UsageError(
                    f"{_path(sel)}: the key {keys[i]!r} belongs to several rows; select from a pool with unique keys"
                )
            times_by_key[keys[i]] = 1 if times is None else int(times[i])
    wide_N = np.ones(len(hashes_N), np.int64) if times_N is None else times_N.astype(np.int64)
    wide_N[np.searchsorted(hashes_N, repeated)] = [max(seen[int(hashed)].values()) for hashed in repeated]
    return _narrow(wide_N)
