"""img2dataset output: ``{shard}.parquet`` with a row per attempt, including failed ones.

Rows are the successes, in file order. The tars have another order, so everything is joined by key. There are no
vectors; a pool with vectors can join this metadata with ``--metadata``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from thresher.errors import PoolError
from thresher.io.listing import Files
from thresher.io.parquet import TablePiece, table_piece
from thresher.io.pieces import Piece
from thresher.pool.layout import Layout, Options, from_shards

_PATTERN = r"\d+\.parquet"


@dataclass(frozen=True)
class Img2dataset:
    """The output of img2dataset: metadata without vectors."""

    name: ClassVar[str] = "img2dataset"
    rank: ClassVar[int] = 30
    looks_like: ClassVar[str] = "{00000..}.parquet with columns key and status"

    def recognise(self, files: Files) -> bool:
        """Recognise numbered Parquet files with the columns key and status."""
        for name in files.matching(_PATTERN):
            try:
                return {"key", "status"} <= set(table_piece(files.protocol, files.path(name)).columns)
            except PoolError:  # a damaged shard; try the next one
                continue
        return False

    def read(self, files: Files, options: Options) -> Layout:
        """Count the successes of every shard (reads only the status column)."""

        def shard(name: str) -> tuple[dict[str, Piece], TablePiece]:
            table = table_piece(files.protocol, files.path(name))
            missing = {"key", "status"} - set(table.columns)
            if missing:
                raise PoolError(f"{table.path}: has no column {', '.join(sorted(missing))}; remove it")
            good = sum(part.column(0).to_pylist().count("success") for part in table.stream(["status"]))
            return {}, replace(table, rows=good, success_only=True)

        names = files.matching(_PATTERN)
        return from_shards(self.name, files, names, shard, replace(options, key=options.key or "key"))
