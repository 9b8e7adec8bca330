"""Raw data, before there are embeddings: webdataset tars, parquet, Arrow, csv, folders of pictures."""

from __future__ import annotations

import glob
import os
from dataclasses import dataclass

from thresher.data.layouts.csvs import open_csv
from thresher.data.layouts.folders import open_folder
from thresher.data.layouts.tables import STATE, open_arrow, open_parquet
from thresher.data.layouts.webdataset import TarPart, tars_at
from thresher.data.samples import Data, Part, Place, Sample
from thresher.errors import PoolError, UsageError
from thresher.io.listing import Files

__all__ = ["Data", "DataOptions", "Part", "Place", "Sample", "open_data"]

PER_PART = 10_000


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """How to read raw data where names do not say it.

    Attributes:
        image: Column of a table with the pictures.
        caption: Column with the captions.
        key: Column that identifies a row.
        root: Folder that pictures named by a table lie in (default: that of the table).
        captions_file: For a folder of pictures: the file that has their captions.
        captions: Whether captions are wanted at all.
        per_part: Rows of a part, where a file is cut into several.
    """

    image: str | None = None
    caption: str | None = None
    key: str | None = None
    root: str | None = None
    captions_file: str | None = None
    captions: bool = True
    per_part: int = PER_PART

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        if self.per_part < 1:
            raise UsageError(f"{self.per_part} rows a part: at least 1")
        if self.root and not os.path.isdir(self.root):
            raise UsageError(f"{self.root}: there is no such folder of pictures")
        if self.captions_file and not os.path.isfile(self.captions_file):
            raise UsageError(f"{self.captions_file}: there is no such file of captions")


def open_data(location: str, options: DataOptions | None = None) -> Data:
    """Recognise raw data and cut it into parts; reads headers only (of a csv every line).

    Args:
        location: Tars (a folder of them, a path with ``{00000..00099}``, ``*`` or ``::``), parquet or Arrow files or a
            folder of them, a Hugging Face dataset saved to disk, a csv of open_clip, or a folder of pictures.
        options: How to read them.

    Raises:
        PoolError: Nothing there, or nothing that is known.
        UsageError: A column that was asked for is not there.
    """
    options = options or DataOptions()
    if not location:
        raise PoolError("no data are named; give tars, parquet, a csv or a folder of pictures")
    if tars := tars_at(location):
        return Data(location, "webdataset", tuple(TarPart(path, protocol) for protocol, path in tars))
    if "://" not in location:
        kinds = "give tars, parquet, a csv or a folder of pictures"
        if not os.path.exists(location):
            raise PoolError(f"{location}: nothing is there; {kinds}")
        if os.path.isdir(location) and not os.listdir(location):
            raise PoolError(f"{location}: is an empty folder; {kinds}")
        if os.path.isdir(location) and (below := _tars_below(location)):
            raise PoolError(f"{location}: has its tars in {below}; name that")
        if os.path.isdir(location) and not _tables(location):
            return open_folder(location, options)
    files = Files.at(location)
    if len(files.names) == 1 and location.endswith((".csv", ".tsv")):
        return open_csv(location, files.protocol, files.path(files.names[0]), options)
    # state.json alone may be what a folder tells of the picture state.jpg.
    if files.matching(r".*\.arrow") or files.matching(STATE) and files.matching(r"([^/]*/)?dataset_info\.json"):
        return open_arrow(location, files, options)
    # Hugging Face's folders of pictures have a table of captions among them.
    tables = [name for name in files.matching(r".*\.(parquet|pq)") if not f"/{name}".endswith("/metadata.parquet")]
    if tables or len(files.names) == 1 and location.endswith((".parquet", ".pq")):
        return open_parquet(location, files, options)
    if os.path.isdir(location):
        return open_folder(location, options)
    raise PoolError(f"{location}: no kind of data that is known; give tars, parquet, a csv or a folder of pictures")


def _tars_below(folder: str) -> str:
    """Return the folders in a folder that have tars, where it has no tables itself: DataComp's ``shards``."""
    if any(name.endswith((".parquet", ".pq", ".arrow")) for name in os.listdir(folder)):
        return ""
    found = glob.glob(os.path.join(glob.escape(folder), "*", "*.tar"))
    return "::".join(sorted({os.path.dirname(path) for path in found}))


def _tables(folder: str) -> bool:
    """Whether a folder may have tables: names alone tell, where a million pictures are not to be listed at length."""
    endings = (".parquet", ".pq", ".arrow", "state.json")
    if folder.endswith((*endings, ".csv", ".tsv")):
        return True
    for here, inner, names in os.walk(folder):
        linked = any(os.path.islink(os.path.join(here, name)) for name in inner)
        if linked or any(name.endswith(endings) for name in (*inner, *names)):
            return True
        if here != folder:
            inner.clear()
    return False
