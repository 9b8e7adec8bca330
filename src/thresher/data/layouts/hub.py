"""Datasets of the Hugging Face Hub by their short name: the Parquet files of a split."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from thresher.data.layouts.parquet import parquet_data
from thresher.data.location import Location
from thresher.data.options import DataOptions
from thresher.data.parts import Data
from thresher.io.hub import is_dataset, parquet_of
from thresher.io.listing import natural


@dataclass(frozen=True, kw_only=True)
class Hub:
    """A dataset of the Hugging Face Hub."""

    name: ClassVar[str] = "hub"
    rank: ClassVar[int] = 35
    looks_like: ClassVar[str] = "hf://datasets/OWNER/NAME with *.parquet"

    split: str | None = field(default=None, metadata={"help": "split, such as train; all for all of them"})
    config: str | None = field(default=None, metadata={"help": "configuration, if there are several"})

    def recognise(self, where: Location) -> bool:
        """Recognise the address of a whole dataset that has Parquet files."""
        return is_dataset(where.text) and where.has(".parquet", ".pq")

    def open(self, where: Location, options: DataOptions) -> Data:
        """Read the footers of the files of the split.

        Raises:
            PoolError: There is no image column, or the files have different columns.
            UsageError: A requested column or split does not exist, or there are several splits and none is chosen.
        """
        names = sorted(parquet_of(where.text, self.config, self.split), key=natural)
        return parquet_data(self.name, where.files, names, options)
