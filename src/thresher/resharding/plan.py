"""The plan of a reshard: samples found in the data by place, uid or key, then ordered and split into shards.

Shape letters: C chosen samples, M samples to write (a sample that is used k times counts k times), N different keys.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import repeat
from typing import Any

import numpy as np
import numpy.typing as npt

from thresher.data.parts import Ints, Part, Scanned
from thresher.data.trainable import why_left_out
from thresher.errors import UsageError
from thresher.export.keys import Chosen, KeySet, hashes_of
from thresher.io.columns import as_text
from thresher.io.tar import Headers, Row
from thresher.pool.store import reopen
from thresher.runtime.random import digest, generator
from thresher.selection import Selection

Hashes = npt.NDArray[np.uint64]

_UID = 32  # hexadecimal digits
_NO_INTS = np.empty(0, np.int64)


@dataclass(frozen=True)
class Source:
    """A file or a range of rows of the data.

    Attributes:
        path: The file, or the folder of images.
        protocol: Protocol of the file system, as fsspec names it.
        size: Size of the file in bytes; 0 for a folder.
        part: The part of the data that reads it.
        stamp: A value that differs if the samples may have changed, such as size and modification time.
    """

    path: str
    protocol: str
    size: int
    part: Part
    stamp: tuple[Any, ...] = ()


@dataclass(frozen=True, eq=False)
class Matched:
    """The chosen samples of a source, c of them, in order.

    Attributes:
        start_c: Start of each, see :class:`thresher.data.parts.Scanned`.
        length_c: Length of each, see :class:`thresher.data.parts.Scanned`.
        times_c: How often each is used.
        names_c: Hashes of the keys.
        numbers_c: Number of the key of each in the selection; -1 for samples found by place.
        damage: Why the source was not read to its end, "" if it was.
        skipped: (key, why) of chosen samples that cannot be copied.
        headers: For a tar, the headers of the samples that cannot be copied unchanged, see :func:`_odd`.
        left_out: For a tar, how many samples the loader of open_clip leaves out, repeats included, by reason, see
            :func:`thresher.data.trainable.why_left_out`.
        notes: How many samples have each of :attr:`thresher.data.Sample.notes`, repeats included, as far as is known.
        said: See :class:`thresher.data.parts.Scanned`.
        by_index: See :class:`thresher.data.parts.Scanned`.
    """

    start_c: Ints
    length_c: Ints
    times_c: Ints
    names_c: Hashes
    numbers_c: Ints
    damage: str = ""
    skipped: tuple[tuple[str, str], ...] = ()
    headers: Headers | None = None
    left_out: Mapping[str, int] = field(default_factory=dict)
    notes: Mapping[str, int] = field(default_factory=dict)
    said: str = ""
    by_index: bool = False


@dataclass(frozen=True, eq=False)
class Places:
    """The places of the chosen samples in one source according to a pool, in order.

    Attributes:
        at_c: Byte or row of each.
        times_c: How often each is used.
        names_c: Hashes of the expected keys.
    """

    at_c: Ints
    times_c: Ints
    names_c: Hashes


@dataclass(frozen=True, eq=False)
class Change:
    """Samples of a tar that are taken from another one, or left out: k of them.

    Attributes:
        start_k: Start of each in the tar, ascending.
        to: Number of the source of the other tar.
        to_k: Start of each in the other tar; -1 for a sample that is left out.
        length_k: Length of each there, with nothing in between.
    """

    start_k: Ints
    to: int
    to_k: Ints
    length_k: Ints


class PlaceError(Exception):
    """A sample is not at the place that the pool has for it."""


@dataclass(frozen=True, eq=False)
class Index:
    """The headers of the samples of a plan that cannot be copied from tars unchanged, k of them, sorted by place.

    Attributes:
        source_k: Number of the source of each, ascending.
        start_k: Start of each in its source, ascending in each source.
        headers: Headers of each.
    """

    source_k: npt.NDArray[np.uint32]
    start_k: Ints
    headers: Headers

    def find(self, source: int, start: int) -> int:
        """Return the number of a sample in the index, -1 if it is not in the index."""
        lo, hi = np.searchsorted(self.source_k, [source, source + 1])
        at = int(lo + np.searchsorted(self.start_k[lo:hi], start))
        return at if at < hi and self.start_k[at] == start else -1

    def extended(self, other: Index) -> Index:
        """Return the index with that of later sources added."""
        return Index(
            np.concatenate([self.source_k, other.source_k]),
            np.concatenate([self.start_k, other.start_k]),
            Headers.joined([self.headers, other.headers]),
        )

    def rows(self, source: int, start: int) -> list[Row]:
        """Return the headers of a sample in the index."""
        return self.headers.rows(self.find(source, start))


@dataclass(frozen=True, eq=False)
class ReshardPlan:
    """The samples to write, M of them in their final order.

    Attributes:
        source_M: Number of the source of each.
        start_M: Start of each in its source.
        length_M: Length of each, see :class:`thresher.data.parts.Scanned`.
        copy_M: 0 for a sample that keeps its name, j for the j-th further sample with the same name.
        names: Hashes of all names, if new names are needed; None otherwise.
        index: Headers of the samples that cannot be copied unchanged; None if the data is not tars.
    """

    source_M: npt.NDArray[np.uint32]
    start_M: Ints
    length_M: Ints
    copy_M: npt.NDArray[np.int32]
    names: KeySet | None
    index: Index | None = None

    def __len__(self) -> int:
        """Return M."""
        return len(self.start_M)

    def part(self, lo: int, hi: int) -> ReshardPlan:
        """Return samples lo to hi."""
        return self._taken(slice(lo, hi))

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Return the plan as arrays by name, for :meth:`of`."""
        arrays: dict[str, Any] = {name: getattr(self, name) for name in ("source_M", "start_M", "length_M", "copy_M")}
        if self.names is not None:
            arrays["names"] = self.names.hashes_N
        if self.index is not None:
            headers = self.index.headers
            _, ends, text = headers.name_m.buffers()
            arrays |= {"source_k": self.index.source_k, "start_k": self.index.start_k, "begin_n": headers.begin_n}
            arrays |= {"offset_m": headers.offset_m, "size_m": headers.size_m}
            arrays |= {
                "name_ends": np.frombuffer(ends or bytes(8), np.int64),
                "name_text": np.frombuffer(text or b"", np.uint8),
            }
        return arrays

    @classmethod
    def of(cls, arrays: Mapping[str, npt.NDArray[Any]]) -> ReshardPlan:
        """Make a plan from the result of :meth:`arrays`."""
        import pyarrow as pa

        index = None
        if "source_k" in arrays:
            buffers = [pa.py_buffer(arrays[name]) for name in ("name_ends", "name_text")]
            names = pa.LargeStringArray.from_buffers(len(arrays["name_ends"]) - 1, *buffers)
            headers = Headers(arrays["begin_n"], arrays["offset_m"], arrays["size_m"], names)
            index = Index(arrays["source_k"], arrays["start_k"], headers)
        names_N = KeySet(arrays["names"]) if "names" in arrays else None
        return cls(arrays["source_M"], arrays["start_M"], arrays["length_M"], arrays["copy_M"], names_N, index)

    def changed(self, changes: Mapping[int, Change], sources: Sequence[Source]) -> ReshardPlan:
        """Return the plan with some samples of tars taken from other tars, or left out.

        Args:
            changes: The changes to the samples of each source, by its number.
            sources: All sources; the new ones are at the end.
        """
        source_M, start_M, length_M = self.source_M.copy(), self.start_M.copy(), self.length_M.copy()
        renamed = list[tuple[int, Ints]]()
        for number, positions in self.by_source():
            if (change := changes.get(number)) is None or not len(change.start_k):
                continue
            which = np.minimum(np.searchsorted(change.start_k, self.start_M[positions]), len(change.start_k) - 1)
            hit = change.start_k[which] == self.start_M[positions]
            here, which = positions[hit], which[hit]
            source_M[here], start_M[here], length_M[here] = change.to, change.to_k[which], change.length_k[which]
            starts = np.unique(start_M[here[(self.copy_M[here] > 0) & (start_M[here] >= 0)]])
            renamed += [(change.to, starts)] if len(starts) else []
        plan = replace(self, source_M=source_M, start_M=start_M, length_M=length_M)
        if self.index is not None and renamed:
            more = [
                (to, starts, _headers(sources[to], starts)) for to, starts in sorted(renamed, key=lambda one: one[0])
            ]
            plan = replace(plan, index=self.index.extended(_indexed(more)))
        return plan._taken(np.flatnonzero(start_M >= 0))

    def shuffled(self, seed: int) -> ReshardPlan:
        """Return the same samples in an order that depends only on the seed and on M."""
        return self._taken(generator(seed, "reshard").permutation(len(self)))

    def _taken(self, which: slice | Ints) -> ReshardPlan:
        return replace(
            self,
            source_M=self.source_M[which],
            start_M=self.start_M[which],
            length_M=self.length_M[which],
            copy_M=self.copy_M[which],
        )

    def by_source(self) -> Iterator[tuple[int, Ints]]:
        """Yield each source number and the positions of its samples in the plan, sorted by start."""
        if not len(self):
            return
        order = np.lexsort((self.start_M, self.source_M))
        ends = np.flatnonzero(np.diff(self.source_M[order].astype(np.int64), append=-1)) + 1
        for lo, hi in zip([0, *ends[:-1]], ends, strict=True):
            yield int(self.source_M[order[lo]]), order[lo:hi]

    def digest(self, *what: Any) -> str:
        """Return a hash of the plan and of ``what``, the other values that the written bytes depend on."""
        return digest(what, self.source_M, self.start_M, self.length_M, self.copy_M)[:32]

    def renamed(self, key: str, copy: int) -> str:
        """Return the name of a sample: its key, or the ``copy``-th of KEY-1, KEY-2, ... that is not an existing key."""
        number = 0
        while copy:
            number += 1
            copy -= self.names is None or self.names.find(f"{key}-{number}") < 0
        return f"{key}-{number}" if number else key


# --- by key ---------------------------------------------------------------------------------------


def match(scanned: Scanned, wanted: KeySet) -> Matched:
    """Return the samples of a source whose key or uid is wanted."""
    names = scanned.keys if scanned.names is None else scanned.names
    number_n = wanted.find_many(scanned.keys if scanned.uids is None else scanned.uids)
    if scanned.uids is not None:  # the key of a sample may be a wanted uid too
        rest = [i for i in np.flatnonzero(number_n < 0).tolist() if len(scanned.keys[i]) == _UID]
        number_n[rest] = wanted.find_many([scanned.keys[i] for i in rest])
    chosen = np.flatnonzero(number_n >= 0)
    number_c = number_n[chosen]
    times_c: npt.NDArray[Any] = np.fromiter(map(wanted.times_at, number_c.tolist()), np.int32, len(chosen))
    left_out, notes = _counts(scanned, chosen, times_c)
    return Matched(
        start_c=scanned.start_n[chosen],
        length_c=scanned.length_n[chosen],
        times_c=times_c,
        names_c=hashes_of([names[i] for i in chosen.tolist()]),
        numbers_c=number_c,
        damage=scanned.damage,
        said=scanned.said,
        by_index=scanned.by_index,
        skipped=tuple((key, why) for key, why in scanned.skipped if wanted.find(key) >= 0),
        headers=scanned.headers and scanned.headers(chosen[_odd(scanned.length_n[chosen], times_c)]),
        left_out=left_out,
        notes=notes,
    )


def _counts(scanned: Scanned, chosen: Ints, times_c: Ints) -> tuple[Mapping[str, int], Mapping[str, int]]:
    """Return ``left_out`` and ``notes`` of :class:`Matched`."""
    left_out, notes = Counter[str](), Counter[str]()
    if scanned.endings is not None or scanned.notes is not None:
        endings = repeat(()) if scanned.endings is None else scanned.endings(chosen)
        for i, members, times in zip(chosen.tolist(), endings, times_c.tolist(), strict=False):
            if scanned.endings is not None:
                left_out[why_left_out(members)] += times
            if scanned.notes is not None and (found := scanned.notes(i, members)):
                notes.update(dict.fromkeys(found, times))
    del left_out[""]
    return left_out, notes


def _odd(length_c: Ints, times_c: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Return which samples cannot be copied unchanged: those that get new names or have gaps, as far as is known."""
    return (length_c < 0) | (times_c > 1)


def match_places(scanned: Scanned, places: Places) -> Matched:
    """Return the samples of a source that were read at given places.

    Raises:
        PlaceError: Another sample is there.
    """
    names_c = hashes_of(scanned.keys)
    if (names_c != places.names_c).any():
        raise PlaceError
    if scanned.names is not None:
        names_c = hashes_of(scanned.names)
    left_out, notes = _counts(scanned, np.arange(len(names_c)), places.times_c)
    return Matched(
        start_c=scanned.start_n,
        length_c=scanned.length_n,
        times_c=places.times_c,
        names_c=names_c,
        numbers_c=np.full(len(names_c), -1, np.int64),
        headers=scanned.headers and scanned.headers(np.flatnonzero(_odd(scanned.length_n, places.times_c))),
        left_out=left_out,
        notes=notes,
    )


def planned(sources: Sequence[Source], matches: Iterable[Matched], wanted: KeySet | None) -> tuple[ReshardPlan, Any]:
    """Make a plan of the chosen samples of all sources.

    Args:
        sources: All sources.
        matches: The chosen samples of each source, in order.
        wanted: The selection, if samples were found by key or uid.

    Returns:
        The plan in the order of the data, and which keys were found, (N,) bool, or None if ``wanted`` is None.

    Raises:
        UsageError: A key belongs to two samples.
    """
    columns: list[list[Any]] = [[] for _ in range(5)]
    index = list[tuple[int, Ints, Headers]]()
    seen_N = None if wanted is None else np.zeros(len(wanted), np.bool_)
    for i, (source, part) in enumerate(zip(sources, matches, strict=True)):
        if seen_N is not None:
            again_c = seen_N[part.numbers_c]
            unique, first = np.unique(part.numbers_c, return_index=True)
            again_c |= ~np.isin(np.arange(len(again_c)), first)
            if again_c.any():
                raise _ambiguous(source, int(part.start_c[again_c.argmax()]))
            seen_N[unique] = True
        of = np.full(len(part.start_c), i, np.uint32)
        for column, array in zip(columns, (of, part.start_c, part.length_c, part.times_c, part.names_c), strict=True):
            column.append(array)
        if part.headers is not None:
            index.append((i, part.start_c[_odd(part.length_c, part.times_c)], part.headers))
    source_C, start_C, length_C, times_C, names_C = (_joined(column) for column in columns)
    different, headers = np.unique(names_C), _indexed(index) if index else None
    if len(different) == len(names_C) and not (times_C > 1).any():
        return ReshardPlan(source_C, start_C, length_C, np.zeros(len(start_C), np.int32), None, headers), seen_N
    index_M = np.repeat(np.arange(len(times_C)), times_C)
    copy_M = _occurrence(names_C[index_M])
    plan = ReshardPlan(source_C[index_M], start_C[index_M], length_C[index_M], copy_M, KeySet(different), headers)
    return replace(plan, index=_completed(plan, sources, index)), seen_N


def _headers(source: Source, start_k: Ints) -> Headers:
    """Return the headers of some samples of a tar."""
    headers = source.part.scan_at(start_k).headers
    assert headers is not None  # noqa: S101 - the source is a tar
    return headers(np.arange(len(start_k)))


def _indexed(parts: Sequence[tuple[int, Ints, Headers]]) -> Index:
    source_k = np.repeat(np.array([i for i, _, _ in parts], np.uint32), [len(start_k) for _, start_k, _ in parts])
    start_k = np.concatenate([start_k for _, start_k, _ in parts])
    return Index(source_k, start_k, Headers.joined([headers for _, _, headers in parts]))


def _completed(
    plan: ReshardPlan, sources: Sequence[Source], parts: Sequence[tuple[int, Ints, Headers]]
) -> Index | None:
    """Return the index with headers added for samples found by place that get new names, as another has their name."""
    if plan.index is None:
        return None
    renamed = np.flatnonzero(plan.copy_M > 0)
    missing: dict[int, list[int]] = {}
    for source, start in zip(plan.source_M[renamed].tolist(), plan.start_M[renamed].tolist(), strict=True):
        if plan.index.find(source, start) < 0:
            missing.setdefault(source, []).append(start)
    if not missing:
        return plan.index
    complete = {i: (start_k, headers) for i, start_k, headers in parts}
    for i, starts in missing.items():
        new_k = np.unique(starts)
        start_k, headers = complete.get(i, (new_k[:0], Headers.of(())))
        both_k = np.concatenate([start_k, new_k])
        order = np.argsort(both_k)
        joined = Headers.joined([headers, _headers(sources[i], new_k)])
        complete[i] = both_k[order], Headers.of([joined.rows(k) for k in order.tolist()])
    return _indexed([(i, *complete[i]) for i in sorted(complete)])


def _joined(parts: list[Any]) -> Any:
    """Return the arrays as one, and empty the list to free their memory."""
    whole = np.concatenate(parts)
    parts.clear()
    return whole


def _ambiguous(source: Source, start: int) -> UsageError:
    return UsageError(
        f"{source.path}: the sample at {start:,} has the same key as another chosen sample, so keys do not identify "
        "samples; embed this data and select from that pool with --key row: the pool has the place of every sample"
    )


def _occurrence(names_M: Hashes) -> npt.NDArray[np.int32]:
    """Return the number of equal hashes before each, (M,) int32."""
    order = np.argsort(names_M, kind="stable")
    ranked = names_M[order]
    new = np.ones(len(ranked), np.bool_)
    np.not_equal(ranked[1:], ranked[:-1], out=new[1:])
    begins = np.flatnonzero(new)
    out = np.empty(len(ranked), np.int32)
    out[order] = np.arange(len(ranked)) - np.repeat(begins, np.diff(begins, append=len(ranked)))
    return out


# --- by place -------------------------------------------------------------------------------------


def places_of(sel: Chosen, sources: Sequence[Source]) -> list[Places | None] | None:
    """Return the places of the chosen samples in every source according to the pool of a selection.

    Args:
        sel: The selection.
        sources: The data. A pool has the file of each row as a path or the last part of one.

    Returns:
        Places in each source, None for a source without chosen samples; None if the pool does not have the places.
    """
    if not isinstance(sel, Selection) and not os.path.isdir(sel):
        return None
    selection = sel if isinstance(sel, Selection) else Selection.load(sel)
    store = reopen(selection)
    if not {"key", "shard", "offset"} <= set(store.columns):
        return None
    parts_of: dict[str, list[int]] = {}
    for i, source in enumerate(sources):
        parts_of.setdefault(source.path, []).append(i)
    by_base: dict[str, list[str]] = {}
    for path in parts_of:
        by_base.setdefault(os.path.basename(path), []).append(path)
    places: list[list[tuple[Ints, Ints, Hashes]]] = [[] for _ in sources]
    for ids, batch in store.where(selection.mask()).scan(["key", "shard", "offset"]):
        shard, offset = batch.column("shard"), batch.column("offset")
        if any(column.null_count for column in batch.columns) or not str(offset.type).startswith(("int", "uint")):
            return None
        at_b = np.asarray(offset, np.int64)
        names_b = hashes_of(as_text(batch.column("key"), store.layout.location, "key").to_pylist())
        times_b = np.ones(len(ids), np.int64) if selection.repeats is None else selection.repeats[ids].astype(np.int64)
        named = np.array([str(name) for name in shard.to_pylist()])
        for name in np.unique(named):
            paths = by_base.get(os.path.basename(name), [])
            if len(paths) > 1:  # a pool has as much of the path as makes its files unique
                paths = [path for path in paths if f"/{path}".endswith(f"/{name}") or os.path.abspath(path) == name]
            if len(paths) != 1:
                return None
            here = np.flatnonzero(named == name)
            firsts = np.array([sources[i].part.first for i in parts_of[paths[0]]])
            which = np.searchsorted(firsts, at_b[here], "right") - 1
            for one in np.unique(which):
                rows = here[which == one]
                places[parts_of[paths[0]][max(one, 0)]].append((at_b[rows], times_b[rows], names_b[rows]))
    store.check_unchanged("the places of its rows were read")
    return [_sorted(parts) if parts else None for parts in places]


def _sorted(parts: list[tuple[Ints, Ints, Hashes]]) -> Places:
    at, times, names = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.argsort(at, kind="stable")
    return Places(at[order], times[order], names[order])


NOTHING = Matched(_NO_INTS, _NO_INTS, _NO_INTS, np.empty(0, np.uint64), _NO_INTS)
