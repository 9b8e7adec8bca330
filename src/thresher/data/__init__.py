"""Raw data, before there are embeddings: webdataset tars, parquet, Arrow, csv, folders of pictures."""

from __future__ import annotations

import os
from typing import ClassVar, Protocol

from thresher.data.location import Location
from thresher.data.options import PER_PART, DataOptions
from thresher.data.parts import Data, Part, Scanned, Words
from thresher.data.samples import Place, Sample
from thresher.errors import PoolError
from thresher.io.readers import readable, recognising
from thresher.runtime.plugins import PluginPoint

__all__ = [
    "DATA_READERS",
    "PER_PART",
    "Data",
    "DataOptions",
    "DataReader",
    "Location",
    "Part",
    "Place",
    "Sample",
    "Scanned",
    "Words",
    "open_data",
]


class DataReader(Protocol):
    """Turns a location into data: a frozen dataclass in a file of ``thresher.data.layouts``, or of another package.

    Attributes:
        name: What it is called.
        rank: Which is asked first, the lowest, where several would recognise a location.
        looks_like: What it reads, in a few words, for messages.
    """

    name: ClassVar[str]
    rank: ClassVar[int]
    looks_like: ClassVar[str]

    def recognise(self, where: Location) -> bool:
        """Return whether it reads what is there, by names and a header or two."""
        ...

    def open(self, where: Location, options: DataOptions) -> Data:
        """Cut it into parts; reads headers only.

        Raises:
            PoolError: A file is damaged, or there is nothing in it.
            UsageError: A column that was asked for is not there.
        """
        ...


DATA_READERS: PluginPoint[DataReader] = PluginPoint(
    "data reader", "thresher.data.layouts", "thresher.data_readers", needs=("recognise", "open", "rank", "looks_like")
)


def open_data(location: str, options: DataOptions | None = None) -> Data:
    """Recognise raw data and cut it into parts; reads headers only (of a csv every line).

    Args:
        location: Tars (a folder of them, a path with ``{00000..00099}``, ``*`` or ``::``), parquet or Arrow files or a
            folder of them, a Hugging Face dataset saved to disk, a csv of open_clip, a folder of pictures, or what a
            reader of another package recognises.
        options: How to read them.

    Raises:
        PoolError: Nothing there, or nothing that is known.
        UsageError: A column or a reader that was asked for is not there.
    """
    options, where = options or DataOptions(), Location(location)
    reader = DATA_READERS.build(options.reader) if options.reader else None
    if location and (reader := reader or recognising(DATA_READERS, where)) is not None:
        data = reader.open(where, options)
        if not data.parts:
            raise PoolError(f"{location}: has no samples")
        return data
    if not location:
        why = "no data are named"
    elif not where.exists:
        why = f"{location}: nothing is there"
    elif where.is_folder and not os.listdir(location):
        why = f"{location}: is an empty folder"
    else:
        why = f"{location}: no kind of data that is known"
    raise PoolError(f"{why}; give {readable(DATA_READERS)}")
