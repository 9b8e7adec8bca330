"""Datasets of the Hugging Face Hub by their short name: the Parquet files of a split, with columns of embeddings."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from thresher.io.hub import is_dataset, parquet_of
from thresher.io.listing import Files, natural
from thresher.io.parquet import parquet_head
from thresher.pool.layout import Layout, Options, from_tables


@dataclass(frozen=True, kw_only=True)
class Hub:
    """A dataset of the Hugging Face Hub."""

    name: ClassVar[str] = "hub"
    rank: ClassVar[int] = 45
    looks_like: ClassVar[str] = "hf://datasets/OWNER/NAME with *.parquet"

    split: str | None = field(default=None, metadata={"help": "split, such as train; all for all of them"})
    config: str | None = field(default=None, metadata={"help": "configuration, if there are several"})

    def recognise(self, files: Files) -> bool:
        """Recognise the address of a whole dataset with Parquet files and without .npy or .npz files."""
        tables = files.matching(r".*\.(parquet|pq)")
        return is_dataset(files.location) and bool(tables) and not files.matching(r".*\.np[yz]")

    def read(self, files: Files, options: Options) -> Layout:
        """Find the embedding columns of every file of the split."""
        names = sorted(parquet_of(files.location, self.config, self.split), key=natural)
        return from_tables(self.name, files, names, options, head=parquet_head)
