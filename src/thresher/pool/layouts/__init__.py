"""One file per layout of pools; the folder is scanned, so there is no list to edit."""

from __future__ import annotations

import posixpath
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Protocol

from thresher.errors import PoolError
from thresher.io.columns import KEYS
from thresher.io.hub import pinned
from thresher.io.listing import Files, natural, stamp_of
from thresher.io.paths import typed, visible
from thresher.io.plan import plan_in
from thresher.io.readers import readable, recognising
from thresher.io.remote import file_system, requested
from thresher.io.sql import is_sql, sql_table
from thresher.io.tables import TEXTS, any_table
from thresher.pool.layout import Layout, Options, with_roles
from thresher.runtime.plugins import PluginPoint

__all__ = ["POOL_READERS", "Files", "Layout", "Options", "PoolReader", "read_layout", "read_metadata"]


_LOOKED = 50  # folders in a folder that is not a pool


class PoolReader(Protocol):
    """Converts files to a layout: a frozen dataclass in a file of ``thresher.pool.layouts``, or in another package.

    Attributes:
        name: Name of the reader, and the ``kind`` of its layouts.
        rank: Order in which readers are tried; if several recognise a pool, the lowest rank is used.
        looks_like: A short description of what it reads, for messages.
    """

    name: ClassVar[str]
    rank: ClassVar[int]
    looks_like: ClassVar[str]

    def recognise(self, files: Files) -> bool:
        """Return whether it reads these files, judged by names and a few headers."""
        ...

    def read(self, files: Files, options: Options) -> Layout:
        """Return the pieces of vectors and tables; reads headers only.

        Raises:
            PoolError: A file is damaged, or files do not belong together; with ``options.skip_bad`` such files are
                listed in ``Layout.skipped`` instead. :func:`thresher.pool.layout.from_shards` does that.
            UsageError: A requested array or column does not exist.
        """
        ...


POOL_READERS: PluginPoint[PoolReader] = PluginPoint(
    "pool reader", "thresher.pool.layouts", "thresher.pool_readers", needs=("recognise", "read", "rank", "looks_like")
)


def read_layout(location: str, options: Options) -> Layout:
    """Recognise the layout at ``location`` and read its headers.

    Raises:
        PoolError: There is nothing at the location, no layout is recognised, a file is not usable, or
            ``thresher embed`` has not finished the pool.
        UsageError: ``options`` name an unknown reader.
    """
    address = pinned(location)  # raises first if it is not one: there is nothing to look into
    try:
        files = Files.at(address)
    except PoolError:
        _refuse_parent(location, options)
        _refuse_raw(location, ())
        raise
    _refuse_unfinished(files, options)
    reader = POOL_READERS.build(options.reader) if options.reader else recognising(POOL_READERS, files)
    if reader is None:
        _refuse_parent(location, options)
        _refuse_raw(location, files.names)
        raise PoolError(
            f"{location}: no known layout of embeddings (found: {_shown(files.names) or 'nothing'}). Known: "
            f"{readable(POOL_READERS)}"
        )
    layout = reader.read(files, options)
    layout.check()
    stamps = {path: files.stamps.get(path) or stamp_of(protocol, path) for protocol, path in layout.files()}
    return replace(layout, stamps=stamps)


def read_metadata(location: str, options: Options, key: str | None = None, scratch: str | None = None) -> Layout:
    """Return the tables of metadata or scores that are joined to a pool by key.

    Args:
        location: A pool, or a file of text, whose columns of keys stay text; see :mod:`thresher.io.text_table`. Or SQL,
            see :mod:`thresher.io.sql`.
        options: Options of the pool that is read.
        key: The key column of the pool that they are joined to.
        scratch: The cache folder for the result of SQL (default: the usual one).

    Raises:
        PoolError: As for :func:`read_layout`.
    """
    if is_sql(location):
        result = sql_table(location, scratch)
        layout = with_roles(Layout("sql", location, {}, (result,)), options)
        return replace(layout, stamps={result.path: stamp_of("file", result.path)})
    files = Files.at(location) if location.lower().endswith(TEXTS) else None
    if files is None or len(files.names) != 1:
        return read_layout(location, options)
    path = files.path(files.names[0])
    table = any_table(files.protocol, path, (*KEYS, key))
    layout = with_roles(Layout("table", location, {}, (table,)), options)
    layout.check()
    return replace(layout, stamps={path: files.stamps.get(path) or stamp_of(files.protocol, path)})


def _refuse_raw(location: str, names: Sequence[str]) -> None:
    """Refuse raw data, which have a reader of their own, and say what to type."""
    from thresher.data import raw_reader

    if (reader := raw_reader(location)) is not None:
        found = f" (found: {_shown(names)})" if names else ""
        raise PoolError(
            f"{location}: looks like raw data{found}, read as {reader.name} ({reader.looks_like}), not a pool of "
            f"embeddings; to look at it type thresher doctor {typed(location)}, to make a pool "
            f"thresher embed {typed(location)}"
        )


def _shown(names: Sequence[str]) -> str:
    """Return the first names, for messages."""
    return visible(", ".join(names[:5])) + (", ..." if len(names) > 5 else "")


def _refuse_parent(location: str, options: Options) -> None:
    """Refuse a folder whose folders are pools, as LAION-5B is laid out, and name them."""
    fs, root = file_system(location)
    if options.reader or not requested(location, lambda: fs.isdir(root)):
        return
    inner = [
        info["name"] for info in requested(location, lambda: fs.ls(root, detail=True)) if info["type"] == "directory"
    ]
    places = sorted((posixpath.join(location, posixpath.basename(path.rstrip("/"))) for path in inner), key=natural)
    pools = [place for place in places[:_LOOKED] if _is_pool(place)]
    if pools:
        names = visible(", ".join(posixpath.basename(place) for place in pools))
        raise PoolError(
            f"{location}: is not a pool, but has pools in its folders ({names}); give one, such as {visible(pools[0])}"
        )


def _is_pool(location: str) -> bool:
    try:
        return recognising(POOL_READERS, Files.at(location)) is not None
    except PoolError:  # empty, or damaged
        return False


def _refuse_unfinished(files: Files, options: Options) -> None:
    """Refuse a pool that ``thresher embed`` has begun; with ``skip_bad``, one of which no shard is written yet."""
    shards = bool(files.matching(r"metadata/.+\.parquet"))  # a shard is complete once its table exists
    plan = None if options.skip_bad and shards else plan_in(files)
    if plan is None or "rows" in plan:
        return
    use = ", or pass --skip-bad to use the rows written so far" if shards else "; no shard is written yet"
    raise PoolError(f"{files.location}: is not finished; run the thresher embed command that started it again{use}")
