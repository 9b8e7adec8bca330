"""What is copied must stay as it was when it was scanned: sizes and times of all files, compared again and again.

Shape letters: M samples of a plan, u different samples of a source.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

import numpy as np

from thresher.data.parts import Ints, Part
from thresher.errors import ChangedError, PoolError
from thresher.export.keys import Chosen
from thresher.io.open import open_file, status_of, trusting
from thresher.io.remote import forget_listings
from thresher.resharding.plan import Hashes, ReshardPlan, Source
from thresher.runtime.engine import Engine
from thresher.runtime.progress import Progress
from thresher.selection import Selection

AGAIN = "wait until nothing writes to it, then run again"


@dataclass(frozen=True, eq=False)
class Originals:
    """The data of a reshard, as they were when they were opened.

    Attributes:
        sources: The sources, each with its stamp.
        keys: The file of keys, "" if the selection is a folder.
        keys_stamp: The stamp of the file of keys.
        apart: For each source with files of its own for every sample, such as images: its samples of the plan (u,), and
            a hash of the stamps of the files of each (u,). Empty if these files are not copied.
    """

    sources: Sequence[Source]
    keys: str = ""
    keys_stamp: tuple[int, int] | None = None
    apart: dict[int, tuple[Ints, Hashes]] = field(default_factory=dict)

    @classmethod
    def of(cls, parts: Iterable[Part], sel: Chosen) -> Originals:
        """Take the stamps of the data and of the file of keys."""
        keys = "" if isinstance(sel, Selection) or not os.path.isfile(sel) else os.fspath(sel)
        return cls([source_of(part) for part in parts], keys, _size_and_time(keys) if keys else None)

    def look_apart(self, plan: ReshardPlan, engine: Engine, progress: Progress) -> None:
        """Take the stamps of the files that samples of a plan have of their own."""
        tasks = [(number, np.unique(plan.start_M[at])) for number, at in plan.by_source()]
        with progress.task("look at files", sum(len(start_u) for _, start_u in tasks), "samples") as advance:
            stamps = engine.map(_Apart(self.sources), tasks)
            for (number, start_u), hash_u in zip(tasks, stamps, strict=True):
                if hash_u.any():
                    self.apart[number] = start_u, hash_u
                advance(len(start_u))

    def stamps(self) -> list[Any]:
        """Return what a plan depends on: the stamps of the sources, and of the files of single samples if there are."""
        apart = blake2b(digest_size=16)
        for _, (_, hash_u) in sorted(self.apart.items()):
            apart.update(hash_u.data)
        return [source.stamp for source in self.sources] + ([apart.hexdigest()] if self.apart else [])

    def check(self, again: str = AGAIN) -> None:
        """Check that nothing has changed.

        Args:
            again: What to do if it has.

        Raises:
            ChangedError: A file has changed; the message names it.
        """
        if self.keys and _size_and_time(self.keys) != self.keys_stamp:
            raise changed(self.keys, again)
        self.check_sources(range(len(self.sources)), again)
        for number, (start_u, _) in self.apart.items():
            self._check_apart(number, start_u, again)

    def check_part(self, plan: ReshardPlan, again: str = AGAIN) -> None:
        """Check that nothing has changed that a part of a plan is copied from.

        Raises:
            ChangedError: A file has changed; the message names it.
        """
        own = plan.source_M[plan.source_M < len(self.sources)]  # others are files that this reshard wrote
        self.check_sources(np.unique(own).tolist(), again)
        if self.apart:
            for number, at in plan.by_source():
                if number in self.apart:
                    self._check_apart(number, np.unique(plan.start_M[at]), again)

    def check_sources(self, numbers: Iterable[int], again: str = AGAIN) -> None:
        """Check that the files of some sources have not changed.

        Raises:
            ChangedError: A file has changed; the message names it.
        """
        for number in numbers:
            source = self.sources[number]
            forget_listings(source.protocol)
            if _stamp(source.part) != source.stamp:
                raise changed(source.path, again)

    def _check_apart(self, number: int, start_u: Ints, again: str) -> None:
        source, (known_u, hash_u) = self.sources[number], self.apart[number]
        now_u = _apart(source.part, start_u)
        other = np.flatnonzero(now_u != hash_u[np.searchsorted(known_u, start_u)])
        if len(other):
            paths = [path for path in next(source.part.separate_files(start_u[other[:1]])) if os.path.exists(path)]
            raise changed(paths[0] if paths else source.path, again)


class _Apart:
    """Returns the hashes of some samples of a source; picklable."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self.sources = sources

    def __call__(self, task: tuple[int, Ints]) -> Hashes:
        number, start_u = task
        return _apart(self.sources[number].part, start_u)


def _apart(part: Part, start_u: Ints) -> Hashes:
    """Return a hash of the stamps of the files that each of some samples has of its own, 0 for none."""
    return np.fromiter(map(_hash, part.separate_files(start_u)), np.uint64, len(start_u))


def _hash(paths: Sequence[str]) -> int:
    if not paths:
        return 0
    return int.from_bytes(blake2b(repr([*map(_size_and_time, paths)]).encode(), digest_size=8).digest(), "little")


def _size_and_time(path: str) -> tuple[int, int] | None:
    status = status_of(path)
    return None if status is None else (status.st_size, status.st_mtime_ns)


def source_of(part: Part) -> Source:
    """Return a part of the data with its size and its stamp."""
    if part.protocol == "file":
        size = os.path.getsize(part.path) if os.path.isfile(part.path) else 0
        return Source(part.path, part.protocol, size, part, _stamp(part))
    try:
        with open_file(part.protocol, part.path) as file:
            size = trusting(part.path, lambda: file.seek(0, os.SEEK_END))
    except PoolError:
        size = -1  # reported as damage when it is read
    return Source(part.path, part.protocol, size, part, _stamp(part))


def _stamp(part: Part) -> tuple[Any, ...]:
    try:
        return tuple(part.stamp())
    except PoolError:  # reported as damage when it is read
        return ()


def changed(path: str, again: str = AGAIN) -> ChangedError:
    """Return the error for a file that has changed."""
    return ChangedError(f"{path}: was changed while it was copied; {again}")
