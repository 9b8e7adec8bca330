"""Parquet with embedding columns, as lists or binary: Hugging Face datasets and similar files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from thresher.io.listing import Files
from thresher.io.parquet import parquet_head
from thresher.pool.layout import Layout, Options, from_tables


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
        return from_tables(self.name, files, _tables(files), options, head=parquet_head)


def _tables(files: Files) -> list[str]:
    return files.matching(r"([^/]+/)?[^/]+\.(parquet|pq)")
