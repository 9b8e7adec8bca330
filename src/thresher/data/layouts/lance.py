"""Lance datasets with images and captions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np

from thresher.data.location import Location
from thresher.data.options import DataOptions
from thresher.data.parts import Data, Ints
from thresher.data.tables import Columns, Table, TablePart, tables_of
from thresher.errors import PoolError
from thresher.io.lance import Fragment, fragments_of, is_lance, marks_of, schema_of


@dataclass(frozen=True)
class Lance:
    """A Lance dataset with a column of images."""

    name: ClassVar[str] = "lance"
    rank: ClassVar[int] = 28
    looks_like: ClassVar[str] = "a Lance dataset (_versions/*.manifest) with a column of images"

    version: int = field(default=0, metadata={"help": "version to read (default: as in PATH@VERSION, else the newest)"})

    def recognise(self, where: Location) -> bool:
        """Recognise the manifests of versions."""
        if "@" in where.text and where.local and not where.exists:  # PATH@VERSION
            try:
                return is_lance(where.files)
            except PoolError:
                return False
        return where.has(".manifest") and is_lance(where.files)

    def open(self, where: Location, options: DataOptions) -> Data:
        """Read the manifest of a version, and the sizes of its files.

        Columns of selections are not columns of its samples: the data stay the same if one is added.

        Raises:
            UsageError: A requested version or column does not exist.
            PoolError: The manifest is damaged, a file is missing, or there is no column of images.
        """
        files = where.files
        fragments = {one.path: one for one in fragments_of(files, self.version)}
        tables = [
            Table(path.removeprefix(files.path("")), [one.rows], schema_of(one.dataset()))
            for path, one in fragments.items()
        ]

        def part(path: str, protocol: str, *, columns: Columns, **rows: Any) -> LancePart:
            own = fragments[path]
            marks = marks_of(own.dataset().schema)
            columns = replace(columns, light={name: of for name, of in columns.light.items() if not marks.get(name)})
            return LancePart(path, protocol, fragment=own, columns=columns, **{**rows, "stem": f"{own.number:05d}"})

        versions = {one.uri: one.version for one in fragments.values()}
        data = tables_of(self.name, files, options, tables, part, 0)
        return replace(data, location=where.text, versions=versions)


@dataclass(frozen=True, kw_only=True)
class LancePart(TablePart):
    """Rows of a fragment."""

    fragment: Fragment

    def schema(self) -> Any:
        """Return the schema of the dataset."""
        return schema_of(self.fragment.dataset())

    def stamp(self) -> list[Any]:
        """Return the stamp of its file, and what else changes with the samples: files of its columns, deleted rows."""
        return [*super().stamp(), self.fragment.state(self.columns.named)]

    def read_rows(self, columns: Sequence[str] | None, row_c: Ints, size: int) -> Iterator[tuple[int, Any]]:
        """Yield runs of consecutive rows, and of columns that are not needed nothing."""
        own = set(self.schema().names)
        names = [
            name if name in own else name.rpartition(".")[0]
            for name in (self.schema().names if columns is None else columns)
        ]
        rows = np.unique(row_c)
        for run in np.split(rows, np.flatnonzero(np.diff(rows) > 1) + 1) if len(rows) else ():
            start = int(run[0])
            for batch in self.fragment.batches(list(dict.fromkeys(names)), start, len(run), size):
                yield start, batch
                start += len(batch)
