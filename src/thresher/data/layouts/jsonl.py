"""JSON Lines: an object with the path and the caption of an image on every line."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any, ClassVar

from thresher.data.captions import JSON_LINE, JSONL
from thresher.data.lists import PATHS, Entry, ListPart, file_of, listed, roots_of
from thresher.data.location import Location
from thresher.data.options import DataOptions
from thresher.data.parts import Data
from thresher.data.rows import RowReader, missing_column
from thresher.errors import PoolError
from thresher.io.csv import Lines
from thresher.io.open import open_file, trusting
from thresher.runtime.untrusted import parse_json


@dataclass(frozen=True)
class Jsonl:
    """A JSON Lines file of objects with the path of an image and its caption, also as a conversation of LLaVA.

    Paths are followed as those in a CSV file.
    """

    name: ClassVar[str] = "jsonl"
    rank: ClassVar[int] = 25
    looks_like: ClassVar[str] = "a .jsonl of objects with an image path and a caption"

    def recognise(self, where: Location) -> bool:
        """Recognise a .jsonl or .ndjson file, also a compressed one, which is refused."""
        return listed(where.text, JSONL) and where.exists

    def open(self, where: Location, options: DataOptions) -> Data:
        """Read every line, to find where the rows begin.

        Raises:
            PoolError: No row has an image path or a caption, there are no rows, or a line is not a JSON object.
            UsageError: No row has a requested column, or an option is given that a JSON Lines file does not use.
        """
        options.refuse(where.text, "a jsonl", captions_file="name the column with --caption COLUMN")
        protocol, path = file_of(where)
        reader, keyed = RowReader(options, PATHS), False
        starts, count = [], 0
        with open_file(protocol, path) as file:
            for begin, _, row in _objects(file, path, 0):
                reader.cells(row)
                keyed = keyed or options.key in row
                if count % options.per_part == 0:
                    starts.append((count, begin))
                count += 1
        if not count:
            raise PoolError(f"{path}: has no rows")
        reader.check_images(path, needed=options.pictures)
        if options.captions or options.caption:
            reader.check_captions(path)
        if options.key and not keyed:
            raise missing_column(path, "--key", "keys", options.key, (), reader.columns)
        roots = roots_of(where, options)
        parts = [
            JsonlPart(
                path,
                protocol,
                first=row,
                rows=min(options.per_part, count - row),
                at=byte,
                options=DataOptions(image=options.image, caption=options.caption, key=options.key),
                roots=roots,
            )
            for row, byte in starts
        ]
        return Data(where.text, self.name, tuple(parts))


@dataclass(frozen=True, kw_only=True)
class JsonlPart(ListPart):
    """Rows of a JSON Lines file.

    Attributes:
        options: Names of the columns of image, caption and key; None for those with usual names.
    """

    options: DataOptions

    def entries(self, file: IO[bytes], at: int) -> Iterator[Entry]:
        """Yield the rows from byte ``at`` on."""
        reader = RowReader(self.options, PATHS)
        for begin, end, row in _objects(file, self.path, at):
            image, text = reader.cells(row)
            image = image.strip() if isinstance(image, str) else image
            key = row.get(self.options.key) if self.options.key else None
            yield Entry(begin, end, image, text, str(key) if isinstance(key, (str, int, float)) else "")


def _objects(file: IO[bytes], path: str, at: int) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """Yield the first byte, the end and the object of each line from byte ``at`` on; blank lines are not rows."""
    lines = Lines(file, path, at, JSON_LINE)
    begin = at
    found = iter(lines)
    while (line := trusting(path, lambda: next(found, None))) is not None:
        if line.strip():
            try:
                row = parse_json(line)
            except ValueError as error:
                raise PoolError(f"{path}: the line at byte {begin:,} is not JSON ({error}); fix or remove it") from None
            if not isinstance(row, dict):
                raise PoolError(f"{path}: the line at byte {begin:,} is not a JSON object; fix or remove it")
            yield begin, lines.at, row
        begin = lines.at
