"""Arrow files with embedding columns: datasets that Hugging Face saved to disk, Feather, and what polars writes."""

from __future__ import annotations

import posixpath
from dataclasses import dataclass
from typing import ClassVar

from thresher.errors import UsageError
from thresher.io.arrow import STATE, arrow_head, is_saved, saved_files
from thresher.io.listing import Files
from thresher.io.paths import visible
from thresher.pool.layout import Layout, Options, from_tables


@dataclass(frozen=True)
class Arrow:
    """Arrow files with embedding columns."""

    name: ClassVar[str] = "arrow"
    rank: ClassVar[int] = 55
    looks_like: ClassVar[str] = (
        "*.arrow, *.feather or *.ipc with a column of embeddings, or a saved Hugging Face dataset"
    )

    def recognise(self, files: Files) -> bool:
        """Recognise Arrow files without arrays or Parquet files, which other readers read."""
        found = files.matching(_ARROW) or is_saved(files)
        return bool(found) and not files.matching(r".*\.(np[yz]|parquet|pq)")

    def read(self, files: Files, options: Options) -> Layout:
        """Find the embedding columns of every file.

        Raises:
            UsageError: There are several splits, or a requested column does not exist.
            PoolError: A file of a saved dataset is missing.
        """
        return from_tables(self.name, files, _names(files), options, head=arrow_head)


_ARROW = r"([^/]+/)?[^/]+\.(arrow|feather|ipc)"


def _names(files: Files) -> list[str]:
    """Return the files of the pool in order: those that a saved dataset lists, else all but caches of ``datasets``."""
    folders = [posixpath.dirname(name) for name in files.matching(STATE)]
    if "" in folders or len(folders) == 1:
        return saved_files(files, "" if "" in folders else folders[0])
    if folders:
        raise UsageError(
            f"{files.location}: contains the splits {visible(', '.join(folders))}; give one, such as "
            f"{visible(posixpath.join(files.location, folders[0]))}"
        )
    return [name for name in files.matching(_ARROW) if not posixpath.basename(name).startswith("cache-")]
