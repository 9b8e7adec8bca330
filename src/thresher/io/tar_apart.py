"""Samples of a tar whose members do not lie next to each other, as in a tar of a folder in the order of its listing.

For webdataset a sample is a run of consecutive members with the same key. Here a later run with the same key is another
piece of the sample if the sample lacks all of its extensions. A run with an extension that the sample has is a sample
of its own, of a key that repeats. If several samples of a key lack its extensions, it is unknown which one it belongs
to, and it is a sample of its own, too.

Only headers are read, and for each run a hash of its key and its start are kept: 16 bytes.

Shape letters: n runs, m pieces.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from thresher.errors import PoolError
from thresher.io.paths import visible
from thresher.io.tar import TarSample, Window, tar_samples, why_unsafe
from thresher.io.tar_fast import Stretch, runs
from thresher.runtime.format import counted

Ints = npt.NDArray[np.int64]
_HEADERS = 2_048  # read at once
_MOST = 100  # runs with one key; if there are more, they are samples of a key that repeats


class Run(NamedTuple):
    """A run of members: its key, and its file extensions."""

    key: str
    endings: frozenset[str]


@dataclass(frozen=True, eq=False)
class Apart:
    """Runs that are pieces of an earlier sample, m of them.

    Attributes:
        start_m: Start of each, ascending.
        owner_m: Start of the sample that each belongs to.
        order_m: The pieces in the order of their samples.
    """

    start_m: Ints
    owner_m: Ints
    order_m: Ints

    @classmethod
    def of(cls, start_m: Ints, owner_m: Ints) -> Apart:
        """Create it from the start of each piece, in any order, and the start of its sample."""
        order_m = np.argsort(start_m)
        start_m, owner_m = start_m[order_m], owner_m[order_m]
        return cls(start_m, owner_m, np.argsort(owner_m, kind="stable"))

    @property
    def samples(self) -> Ints:
        """The starts of the samples that have pieces."""
        return np.unique(self.owner_m)

    def is_piece(self, start: int) -> bool:
        """Return whether the run at a byte is a piece of an earlier sample."""
        at = int(np.searchsorted(self.start_m, start))
        return at < len(self.start_m) and int(self.start_m[at]) == start

    def pieces(self, start: int) -> list[int]:
        """Return the starts of the pieces of the sample at a byte, ascending."""
        if not len(self.start_m):
            return []
        lo, hi = np.searchsorted(self.owner_m, [start, start + 1], sorter=self.order_m)
        found: list[int] = self.start_m[self.order_m[lo:hi]].tolist()
        return found


NONE = Apart.of(np.empty(0, np.int64), np.empty(0, np.int64))


def apart_among(hash_n: Ints, start_n: Ints, run_at: Callable[[int], Run | None]) -> Apart:
    """Return which runs of a tar are pieces of earlier samples.

    Args:
        hash_n: Hash of the key of each run.
        start_n: Start of each, ascending.
        run_at: Returns the run with an index, None if it must not be joined; called only for keys that occur again.
    """
    order = np.argsort(hash_n, kind="stable")
    new = np.flatnonzero(np.diff(hash_n[order])) + 1
    lo, hi = np.append(0, new), np.append(new, len(order))
    pieces, owners = array("q"), array("q")
    for first, end in zip(lo[hi - lo > 1].tolist(), hi[hi - lo > 1].tolist(), strict=True):
        if end - first > _MOST:
            continue
        samples: list[tuple[str, int, set[str]]] = []
        for i in order[first:end].tolist():
            if (run := run_at(i)) is None:
                continue
            lacking = [sample for sample in samples if sample[0] == run.key and sample[2].isdisjoint(run.endings)]
            if len(lacking) == 1:
                pieces.append(int(start_n[i]))
                owners.append(lacking[0][1])
                lacking[0][2].update(run.endings)
            else:
                samples.append((run.key, int(start_n[i]), set(run.endings)))
    return Apart.of(np.array(pieces, np.int64), np.array(owners, np.int64))


def find_apart(window: Window, path: str) -> Apart:
    """Return which runs of a tar with random access are pieces of earlier samples, up to the first damage."""
    hashes, starts = array("q"), array("q")
    try:
        for run in runs(window, path, many=_HEADERS):
            if isinstance(run, Stretch):
                hashes.extend(map(hash, run.keys))
                starts.extend(run.start_n.tolist())
            else:
                hashes.append(hash(run.key))
                starts.append(run.start)
    except PoolError:  # reported when the samples are read
        pass
    start_n = np.array(starts, np.int64)
    return apart_among(np.array(hashes, np.int64), start_n, lambda i: run_of(run_at(window, path, int(start_n[i]))))


def run_of(sample: TarSample | None) -> Run | None:
    """Return what :func:`apart_among` needs of a run, None if its names are unsafe."""
    return None if sample is None or why_unsafe(sample) else Run(sample.key, frozenset(sample.members))


def run_at(window: Window, path: str, start: int) -> TarSample | None:
    """Return the run of members that begins at a byte, None if none does.

    Raises:
        PoolError: There is no header, or the tar is damaged there.
    """
    sample = next(tar_samples(window, path, start), None)
    return sample if sample is not None and sample.start == start else None


def whole(window: Window, path: str, sample: TarSample, pieces: list[int]) -> TarSample:
    """Return a sample with the members of its pieces."""
    members = dict(sample.members)
    for start in pieces:
        if (piece := run_at(window, path, start)) is not None:
            members |= piece.members
    return TarSample(sample.key, members)


class Watch:
    """Watches the runs of a tar without random access, such as a remote one, for samples whose members lie apart."""

    def __init__(self) -> None:
        """Begin with no run."""
        self._hashes, self._starts, self._which = array("q"), array("q"), array("q")
        self._numbers: dict[frozenset[str] | None, int] = {}

    def add(self, sample: TarSample) -> None:
        """Add a run."""
        run = run_of(sample)
        self._hashes.append(hash(sample.key))
        self._starts.append(sample.start)
        self._which.append(self._numbers.setdefault(run and run.endings, len(self._numbers)))

    def found(self) -> Apart:
        """Return which runs are pieces of earlier samples."""
        kinds = list(self._numbers)

        def run_at(i: int) -> Run | None:
            endings = kinds[self._which[i]]
            return None if endings is None else Run("", endings)

        return apart_among(np.array(self._hashes, np.int64), np.array(self._starts, np.int64), run_at)


def not_joined(path: str, apart: Apart, key: str) -> PoolError:
    """Return the error for a tar whose samples lie apart and cannot be joined; ``key`` is one of them."""
    return PoolError(
        f"{path}: members of {counted(len(apart.samples), 'sample')} lie apart, as those of {visible(key)}; they are "
        "joined only in tars on this machine: copy it here, or unpack it and write a sorted one with "
        "tar --sort=name -cf NEW.tar FOLDER"
    )
