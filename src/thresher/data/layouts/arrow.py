"""Arrow files, and Hugging Face datasets saved to disk."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from thresher.data.location import Location
from thresher.data.options import DataOptions
from thresher.data.parts import Data, Ints
from thresher.data.tables import Table, TablePart, refuse_splits, tables_of
from thresher.errors import PoolError, UsageError
from thresher.io.arrow import STATE, is_saved, lacks_end, refuse_another, saved_files
from thresher.io.columns import plain_schema
from thresher.io.open import open_file, trusting
from thresher.io.paths import visible


@dataclass(frozen=True)
class Arrow:
    """Arrow files, or a Hugging Face dataset saved to disk."""

    name: ClassVar[str] = "arrow"
    rank: ClassVar[int] = 30
    looks_like: ClassVar[str] = "*.arrow, or a Hugging Face dataset saved to disk"

    def recognise(self, where: Location) -> bool:
        """Recognise .arrow files, or a dataset's state.json with its dataset_info.json."""
        if not where.has(".arrow", "state.json"):
            return False
        # state.json alone may be the metadata of an image state.jpg in a folder.
        return bool(where.files.matching(r".*\.arrow")) or is_saved(where.files)

    def open(self, where: Location, options: DataOptions) -> Data:
        """Read the headers of all batches.

        Raises:
            UsageError: There are several splits, or a requested column does not exist.
            PoolError: Files of the dataset are missing, there is no image column, or the files have different columns.
        """
        files = where.files
        folders = [posixpath.dirname(name) for name in files.matching(STATE)]
        if "" in folders or len(folders) == 1:
            names = saved_files(files, "" if "" in folders else folders[0])
        elif folders:
            splits = visible(", ".join(folders))
            raise UsageError(f"{where.text}: contains the splits {splits}; give one, such as {where.text}/{folders[0]}")
        else:  # ignore the cache files of datasets
            names = [name for name in files.matching(r".*\.arrow") if not posixpath.basename(name).startswith("cache-")]
        tables: list[Table] = []
        for name in names:
            sizes, schema = list[int](), None
            for batch in _batches(files.protocol, files.path(name)):
                sizes.append(len(batch))
                schema = batch.schema
            tables.append(Table(name, sizes, schema))
        refuse_splits(files, names)
        return tables_of(self.name, files, options, tables, ArrowPart, 0)


@dataclass(frozen=True, kw_only=True)
class ArrowPart(TablePart):
    """Rows of an Arrow file."""

    def read_rows(self, columns: Sequence[str] | None, row_c: Ints, size: int) -> Iterator[tuple[int, Any]]:
        """Yield slices of the batches, from the first on; they are memory-mapped, not read."""
        start, last = 0, int(row_c[-1]) if len(row_c) else -1
        for whole in _batches(self.protocol, self.path):
            for lo in range(0, len(whole), size):
                batch = whole.slice(lo, size)
                yield start + lo, batch.select(_whole(batch, columns)) if columns else batch
            start += len(whole)
            if start > last:
                return

    def schema(self) -> Any:
        """Return the schema of the file, including its metadata (the features of ``datasets``)."""
        return plain_schema(next(_batches(self.protocol, self.path)).schema)

    def lacks_end(self) -> bool:
        """Return whether the file is a stream without its end mark."""
        return lacks_end(self.protocol, self.path)


def _whole(batch: Any, columns: Sequence[str]) -> list[str]:
    """Return the columns of a batch that contain some columns, of which ``a.b`` may be the field ``b`` of ``a``."""
    own = set(batch.schema.names)
    return [name if name in own else name.rpartition(".")[0] for name in columns]


def _batches(protocol: str, path: str) -> Iterator[Any]:
    """Yield the record batches of an Arrow file, in the stream format that Hugging Face writes or the file format.

    Raises:
        PoolError: The file is damaged or cut off, or another stream follows; raised after the batches before that.
    """
    import pyarrow as pa

    raw: Any = open_file(protocol, path)
    if protocol == "file":
        raw.close()  # open_file has checked that it is a regular file
        raw = trusting(path, lambda: pa.memory_map(path))
    with raw:
        if bytes(raw.read(6)) == b"ARROW1":
            file = trusting(path, lambda: pa.ipc.open_file(raw))
            batches = (file.get_batch(i) for i in range(file.num_record_batches))
        else:
            file = None
            raw.seek(0)
            batches = trusting(path, lambda: iter(pa.ipc.open_stream(raw)))
        for batch in iter(lambda: trusting(path, lambda: next(batches, None)), None):
            trusting(path, batch.validate)  # checks the lengths of its columns
            if batch.num_rows < 0:  # validate does not check this
                raise PoolError(f"{path}: is damaged: one of its batches has {batch.num_rows:,} rows")
            yield batch
        if file is None:
            refuse_another(raw, path)
