"""Indexes of ``wids``, a part of webdataset: a JSON file with the addresses of tars and their numbers of samples."""

from __future__ import annotations

import os
import posixpath
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from thresher.data.layouts.webdataset import Indexed, tars_of
from thresher.data.location import Location
from thresher.data.options import DataOptions
from thresher.data.parts import Data
from thresher.errors import ChangedError, PoolError, UsageError
from thresher.io.open import file_stamp, open_file, trusting
from thresher.io.paths import inside, is_unsafe, visible
from thresher.io.places import located
from thresher.io.remote import in_parallel
from thresher.runtime.untrusted import load_json

_MOST = 1 << 40  # samples or bytes of a tar


@dataclass(frozen=True)
class Wids:
    """The tars of an index of wids."""

    name: ClassVar[str] = "wids"
    rank: ClassVar[int] = 15
    looks_like: ClassVar[str] = "an index of wids, *.json with a shardlist"

    def recognise(self, where: Location) -> bool:
        """Recognise a JSON file with a list of shards."""
        if not where.text.lower().endswith(".json") or where.is_folder or where.is_pattern or not where.exists:
            return False
        try:
            return not {"shardlist", "wids_version"}.isdisjoint(_read(where.text))
        except PoolError:  # another JSON file, or a damaged one
            return False

    def open(self, where: Location, options: DataOptions) -> Data:
        """Look at the size of every tar.

        Raises:
            PoolError: The index is damaged, or names files that do not exist.
            UsageError: It names tars outside its folder, or other indexes.
            ChangedError: A tar has another size than the index says.
        """
        urls, tars, indexed = [*_shards(where.text)], [], []
        for entry in urls:
            tars.append(located(_inside(where.text, entry.url, options.allow_outside)))
            indexed.append(Indexed(where.text, entry.samples))
        if len(set(tars)) < len(tars):
            (_, twice), _ = Counter(tars).most_common(1)[0]
            raise PoolError(f"{where.text}: names {visible(twice)} twice")
        stamps = in_parallel(tars[0][0], lambda tar: file_stamp(*tar), tars)
        for entry, (_, path), stamp in zip(urls, tars, stamps, strict=True):
            if entry.bytes is not None and stamp[0] != entry.bytes:
                raise ChangedError(
                    f"{path}: has {stamp[0]:,} bytes, but {where.text} says {entry.bytes:,}; write the index again, or "
                    "give the tars themselves"
                )
        return tars_of(self.name, where.text, tars, options, indexed)


@dataclass(frozen=True)
class _Entry:
    url: str
    samples: int
    bytes: int | None


def _read(location: str) -> Mapping[str, Any]:
    protocol, path = located(location)
    with open_file(protocol, path) as file:
        index = trusting(location, lambda: load_json(file))
    return index if isinstance(index, Mapping) else {}


def _shards(location: str) -> Iterator[_Entry]:
    """Yield the tars that an index names, checked; it is untrusted.

    Raises:
        PoolError: It is not an index, or has no tars.
        UsageError: It names other indexes.
    """
    index, found = _read(location), False
    if type(version := index.get("wids_version")) is not int or version != 1:
        shown = version if isinstance(version, (int, str)) else "another"
        raise PoolError(f"{location}: the wids_version is {visible(str(shown), 40)}; version 1 is read")
    inner = index.get("datasets", [])
    groups = [index, *(inner if isinstance(inner, list) else [None])]
    for number, group in enumerate(groups):
        if isinstance(group, Mapping) and "source_url" in group:
            raise UsageError(f"{location}: names another index as source_url; give that one itself")
        shards = group.get("shardlist", [] if not number else None) if isinstance(group, Mapping) else None
        if not isinstance(shards, list):
            raise PoolError(f"{location}: has no list of tars as shardlist; write the index again")
        for i, one in enumerate(shards):
            found = True
            yield _entry(location, i, one)
    if not found:
        raise PoolError(f"{location}: names no tars")


def _entry(location: str, number: int, one: Any) -> _Entry:
    url, samples, size = (
        one.get(name) if isinstance(one, Mapping) else None for name in ("url", "nsamples", "filesize")
    )
    good = isinstance(url, str) and url and type(samples) is int and 0 <= samples < _MOST
    if not good or not (size is None or (type(size) is int and 0 <= size < _MOST)):
        raise PoolError(
            f"{location}: entry {number:,} of shardlist is not valid: it needs a url and the number nsamples, and "
            "filesize is a number if it is there"
        )
    assert isinstance(url, str)  # noqa: S101 - checked
    assert isinstance(samples, int)  # noqa: S101 - checked
    if not url.lower().endswith(".tar"):
        raise PoolError(f"{location}: names {visible(url, 100)}, which is not a .tar")
    return _Entry(url, samples, size)


def _inside(index: str, url: str, outside: bool) -> str:
    """Return where a tar is that an index names: below the folder of the index, unless others are allowed.

    Raises:
        UsageError: It is elsewhere.
    """
    if "::" not in url and "\0" not in url:
        folder = index.rpartition("/")[0] if "://" in index else os.path.dirname(os.path.abspath(index))
        if "://" in index and (url.startswith(f"{folder}/") or not ("://" in url or is_unsafe(url))):
            below = url.removeprefix(f"{folder}/")
            if not is_unsafe(below):
                return posixpath.join(folder, below)
        elif "://" not in index + url and (path := inside(os.path.realpath(folder), url)):
            return path
        if outside:
            return url if "://" in url or os.path.isabs(url) else posixpath.join(folder, url)
    raise UsageError(
        f"{index}: names a tar outside its folder, {visible(url, 100)}; for an index of your own pass --allow-outside"
    )
