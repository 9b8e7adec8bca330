"""Parquet with embedding columns, as lists or binary: Hugging Face datasets and similar files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from thresher.io.listing import Files
from thresher.io.parquet import TablePiece, parquet_piece, parquet_types, table_piece
from thresher.io.pieces import Piece
from thresher.pool.layout import Layout, Options, embedding_columns, from_shards


@dataclass(frozen=True)
class Parquet:
    """Parquet files with embedding columns."""

    name: ClassVar[str] = "parquet"
    rank: ClassVar[int] = 50
    looks_like: ClassVar[str] = "*.parquet or data/*.parquet with a column of embeddings"

    def recognise(self, files: Files) -> bool:
        """Recognise Parquet files without .npy or .npz files, which the ``npy`` reader reads."""
        return bool(_tables(files)) and not files.matching(r".*\.np[yz]")

    def read(self, files: Files, options: Options) -> Layout:
        """Find the embedding columns of every file."""

        def shard(name: str) -> tuple[dict[str, Piece], TablePiece]:
            path = files.path(name)
            columns = embedding_columns(path, parquet_types(files.protocol, path), options)
            pieces: dict[str, Piece] = {
                role: parquet_piece(files.protocol, path, column, options.dtype) for role, column in columns.items()
            }
            return pieces, table_piece(files.protocol, path)

        return from_shards(self.name, files, _tables(files), shard, options)


def _tables(files: Files) -> list[str]:
    return files.matching(r"([^/]+/)?[^/]+\.(parquet|pq)")
