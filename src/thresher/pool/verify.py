"""Finds damage that no header shows, such as a flipped bit, by reading everything once."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from thresher.errors import PoolError
from thresher.io.npy import DeflatedPiece, NpyPiece
from thresher.io.parquet import TablePiece
from thresher.io.pieces import Piece
from thresher.pool.layout import Layout, Skipped, skipped_file
from thresher.runtime.cache import HINT
from thresher.runtime.checksums import read_checked, write_checked
from thresher.runtime.untrusted import parse_json


def without_damaged(layout: Layout, record: str) -> Layout:
    """Return the layout without the shards whose vectors or keys cannot be read to their end.

    Reads what has a checksum or an encoding: .npz members and Parquet columns. A plain .npy file has neither. The
    damaged paths are saved in the file ``record``, whose name should depend on the files. The next call reads only
    these again, so that a temporary read error does not exclude a file forever.

    Raises:
        PoolError: A file is damaged, but fields are split into files differently, so its partners are unknown.
    """
    suspects = _suspects(record)
    damaged = [Skipped(*entry) for entry in dict(_damage(layout, suspects)).items()]
    if suspects is None:
        write_checked(record, json.dumps([file.path for file in damaged]).encode(), HINT)
    if not damaged:
        return layout
    lists: list[tuple[Piece | TablePiece, ...]] = [*layout.vectors.values(), *filter(None, [layout.tables])]
    if len({tuple(piece.rows for piece in pieces) for pieces in lists}) > 1:
        raise PoolError(f"{damaged[0].path}: {damaged[0].why}; it cannot be skipped, other files are cut differently")
    paths = {file.path for file in damaged}
    good = [paths.isdisjoint(piece.path for piece in shard) for shard in zip(*lists, strict=True)]

    def left(pieces: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(piece for piece, fine in zip(pieces, good, strict=True) if fine)

    vectors = {role: left(pieces) for role, pieces in layout.vectors.items() if any(good)}
    tables = left(layout.tables) if layout.tables else ()
    rest = replace(layout, vectors=vectors, tables=tables, skipped=(*layout.skipped, *damaged))
    rest.check()
    return rest


def _suspects(record: str) -> list[str] | None:
    """Return the paths in a record, None if it is missing or damaged."""
    data = read_checked(record)
    try:
        paths = None if data is None else parse_json(data)
    except ValueError:
        paths = None
    return paths if isinstance(paths, list) and all(isinstance(path, str) for path in paths) else None


def _damage(layout: Layout, suspects: list[str] | None) -> Iterator[tuple[str, str]]:
    """Yield the path of each file that cannot be read, and why; reads only the suspects, by default all files."""
    for path, parts in _readings(layout):
        if suspects is not None and path not in suspects:
            continue
        try:
            deque(parts, maxlen=0)
        except PoolError as error:
            yield path, skipped_file(error).why


def _readings(layout: Layout) -> Iterator[tuple[str, Iterator[Any]]]:
    for pieces in layout.vectors.values():
        for piece in pieces:
            if isinstance(piece, NpyPiece) and piece.array:  # an uncompressed member, read with its checksum
                piece = DeflatedPiece(piece.path, piece.array, piece.rows, piece.dim, piece.dtype, piece.protocol)
            if not piece.seekable:
                yield piece.path, piece.stream(8192)
    for table in layout.tables:
        if layout.key:
            yield table.path, table.stream([layout.key])
