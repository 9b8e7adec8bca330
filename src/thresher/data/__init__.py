"""Raw data, before it is embedded: webdataset tars, tables, Lance, MDS, CSV, JSON Lines, folders of images."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from typing import ClassVar, Protocol

from thresher.data.compressed import COMPRESSED, unpacking
from thresher.data.files import ARCHIVES, Contents, ending_of, is_about_pictures, pictures_in
from thresher.data.location import Location
from thresher.data.options import PER_PART, DataOptions
from thresher.data.parts import Data, Part, Scanned, Words
from thresher.data.pools import refuse_pool, refuse_thumbnails
from thresher.data.samples import Place, Sample, noted
from thresher.errors import PoolError, ThresherError
from thresher.io.columns import is_text
from thresher.io.hub import commit_note, pinned
from thresher.io.listing import named
from thresher.io.paths import visible
from thresher.io.pictures import BY_ENDING
from thresher.io.readers import readable, recognising
from thresher.runtime.format import counted
from thresher.runtime.places import expanded
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
    "noted",
    "open_data",
]


class DataReader(Protocol):
    """Opens raw data: a frozen dataclass in a file of ``thresher.data.layouts``, or in another package.

    Attributes:
        name: Name of the reader.
        rank: Order in which readers are tried; if several recognise a location, the lowest rank is used.
        looks_like: A short description of what it reads, for messages.
    """

    name: ClassVar[str]
    rank: ClassVar[int]
    looks_like: ClassVar[str]

    def recognise(self, where: Location) -> bool:
        """Return whether it reads this location, judged by names and a few headers."""
        ...

    def open(self, where: Location, options: DataOptions) -> Data:
        """Split the data into parts; reads headers only.

        Raises:
            PoolError: A file is damaged or empty.
            UsageError: A requested column does not exist.
        """
        ...


DATA_READERS: PluginPoint[DataReader] = PluginPoint(
    "data reader", "thresher.data.layouts", "thresher.data_readers", needs=("recognise", "open", "rank", "looks_like")
)


def open_data(location: str, options: DataOptions | None = None) -> Data:
    """Recognise raw data and split it into parts; reads headers only (for CSV and JSON Lines every line).

    Args:
        location: Tars (a folder of them, a path with ``{00000..00099}``, ``*`` or ``::``), Parquet or Arrow files, a
            folder of them or a pattern with ``*``, a Hugging Face dataset saved to disk, a Lance dataset, MDS shards, a
            CSV file of open_clip, a JSON Lines file, a folder of images, or data that a reader of another package
            recognises.
        options: How to read the data.

    Raises:
        PoolError: There is nothing at the location, or its format is not recognised.
        UsageError: A requested column or reader does not exist, or the location is a pool.
    """
    options, where = options or DataOptions(), Location(expanded(pinned(location)))
    if location and not options.thumbnails_as_data:
        refuse_pool(where)
    reader = DATA_READERS.build(options.reader) if options.reader else None
    if location and (reader := reader or _reader_of(where, options)) is not None:
        if reader.name != "csv":
            options.refuse(where.text, f"data of the reader {reader.name}", columns="only a csv lacks names of columns")
        data = reader.open(where, options)
        if not data.parts:
            raise PoolError(f"{location}: has no samples")
        if not options.image and not options.thumbnails_as_data:
            refuse_thumbnails(data)
        notes = (*commit_note(location, where.text), *_notes(where, data))
        return replace(data, notes=(*data.notes, *notes)) if notes else data
    if not location:
        why = "no data was given"
    elif not where.exists:
        why = f"{location}: nothing is there"
    elif where.is_folder and not os.listdir(location):
        why = f"{location}: is an empty folder"
    elif where.is_folder:
        why = f"{location}: no known kind of data{Contents.of(location).instead()}"
    elif where.local and ending_of(location) in BY_ENDING:
        raise PoolError(f"{location}: is a single image; give the folder that it is in")
    elif ending_of(location) == "json":
        raise PoolError(f"{location}: is one json; give the folder of its images, and --captions {location}")
    elif ending_of(location) in ARCHIVES:
        raise PoolError(f"{location}: is an archive; unpack it and give the folder")
    else:
        why = f"{location}: no known kind of data"
    raise PoolError(f"{why}; give {readable(DATA_READERS)}")


def raw_reader(location: str) -> DataReader | None:
    """Return the reader that recognises raw data at a location, None if there are none or it cannot be reached."""
    try:
        where = Location(expanded(pinned(location)))
        there = where.exists or any(mark in location for mark in "{:@")  # several files, or a version
        return _reader_of(where, DataOptions()) if there else None
    except ThresherError:
        return None


def _reader_of(where: Location, options: DataOptions) -> DataReader | None:
    """Return the reader that recognises a location; of tables without images next to image files, that of a folder."""
    reader = recognising(DATA_READERS, where)
    if reader is not None and reader.name == "parquet" and where.is_folder and not options.image:
        beside = options.captions_file and next(pictures_in(where.text), None)
        if beside or is_about_pictures(where):
            return DATA_READERS.build("folder")
    return reader


def _notes(where: Location, data: Data) -> Iterator[str]:
    """Yield what is not read, if a folder with images was recognised as something else."""
    if data.kind not in ("webdataset", "arrow", "parquet") or not where.is_folder:
        return
    names = sorted(os.listdir(where.text)) if data.kind != "webdataset" else []
    if packed := [os.path.join(where.text, name) for name in names if name.lower().endswith(COMPRESSED)]:
        yield (
            f"not read: {counted(len(packed), 'compressed tar')} next to the {data.kind} files of "
            f"{visible(where.text)} ({named(packed)}); {unpacking(packed[0])}"
        )
    first = data.parts[0]
    picture = first.roles().get("picture")
    if picture and is_text(first.schema().field(picture).type):  # the table names image files
        return
    if images := list(pictures_in(where.text)):
        files = "tars" if first.unit == "tar" else f"{data.kind} files"
        yield (
            f"not read: {counted(len(images), 'image file')} next to the {files} of {visible(where.text)} "
            f"({named(images)}); to read only these, pass --reader folder"
        )
