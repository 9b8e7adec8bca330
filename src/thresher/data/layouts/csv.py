"""CSV files as open_clip reads them: the path and the title of an image on every line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, ClassVar

from thresher.data.lists import PATHS, Entry, ListPart, roots_of
from thresher.data.location import Location
from thresher.data.options import DataOptions
from thresher.data.parts import Data, Form
from thresher.data.rows import missing_column
from thresher.data.samples import caption_of
from thresher.errors import PoolError
from thresher.io.columns import CAPTIONS, known
from thresher.io.csv import header, rows
from thresher.io.open import open_file

_FIRST_LINE = ", or write a first line with the names of the columns if there is none"
_TITLES = ("title", *CAPTIONS, "comment")


@dataclass(frozen=True)
class Csv:
    """A CSV file with a header line, filepath and title, separated by tabs, commas, ``|`` or ``;``.

    Image paths are relative to ``root``. Without a root they are relative to the current folder, as in open_clip, or to
    the folder of the CSV file, which may have been moved together with its images. Paths outside these folders are
    followed only with ``allow_outside``, because a CSV file is untrusted input.
    """

    name: ClassVar[str] = "csv"
    rank: ClassVar[int] = 20
    looks_like: ClassVar[str] = "a .csv or .tsv of open_clip, with filepath and title"

    def recognise(self, where: Location) -> bool:
        """Recognise a .csv or .tsv file."""
        return where.text.lower().endswith((".csv", ".tsv")) and where.exists and len(where.files.names) == 1

    def open(self, where: Location, options: DataOptions) -> Data:
        """Read every line, to find where the rows begin.

        Raises:
            PoolError: A column is missing, there are no rows, or a line is not valid CSV.
            UsageError: A requested column does not exist, or an option is given that a CSV file does not use.
        """
        options.refuse(where.text, "a csv", captions_file="name the column with --caption COLUMN")
        protocol, path = where.files.protocol, where.files.path(where.files.names[0])
        asked = [name for name in (options.image, options.caption, options.key) if name]
        with open_file(protocol, path) as file:
            names, delimiter, end = header(file, path, asked)
            if not end:
                raise PoolError(f"{path}: has no rows")
            picture = _column(path, "--image", "image paths", options.image, PATHS, names)
            if picture is None:
                raise missing_column(path, "--image", "image paths", None, PATHS, names, _FIRST_LINE)
            title = _column(path, "--caption", "captions", options.caption, _TITLES, names)
            if title is None and options.captions:
                raise missing_column(path, "--caption", "captions", None, _TITLES, names)
            key = _column(path, "--key", "keys", options.key, (), names)
            starts, count = [], 0
            for begin, _, _ in rows(file, path, end, delimiter):
                if count % options.per_part == 0:
                    starts.append((count, begin))
                count += 1
        if not count:
            raise PoolError(f"{path}: has no rows")
        roots = roots_of(where, options)
        parts = [
            CsvPart(
                path,
                protocol,
                first=row,
                rows=min(options.per_part, count - row),
                at=byte,
                delimiter=delimiter,
                picture=picture,
                title=title,
                key=key,
                roots=roots,
                outside=options.allow_outside,
            )
            for row, byte in starts
        ]
        return Data(where.text, self.name, tuple(parts))


@dataclass(frozen=True, kw_only=True)
class CsvPart(ListPart):
    """Rows of a CSV file.

    Attributes:
        delimiter: Character between cells.
        picture: Index of the column of image paths.
        title: Index of the column of captions; None for none.
        key: Index of the column of keys; None for the image path.
    """

    delimiter: str
    picture: int
    title: int | None
    key: int | None = None

    copied_as: ClassVar[Form | None] = "csv"

    def entries(self, file: IO[bytes], at: int) -> Iterator[Entry]:
        """Yield the rows from byte ``at`` on; a quoted cell may have several lines."""
        for begin, end, row in rows(file, self.path, at, self.delimiter):
            image = row[self.picture] if len(row) > self.picture else ""
            text = row[self.title] if self.title is not None and len(row) > self.title else ""
            image = image.strip() if self.delimiter == "|" else image  # Flickr30k: "| "
            key = row[self.key].strip() if self.key is not None and len(row) > self.key else ""
            yield Entry(begin, end, image, caption_of(text), key)


def _column(
    path: str, flag: str, what: str, asked: str | None, usual: Sequence[str], names: Sequence[str]
) -> int | None:
    """Return the index of a requested column, else of the first with a usual name, None if there is none."""
    if asked and asked not in names:
        raise missing_column(path, flag, what, asked, usual, names)
    return next((names.index(name) for name in ([asked] if asked else known(names, usual))), None)
