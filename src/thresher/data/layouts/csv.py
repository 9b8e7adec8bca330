"""CSV files as open_clip reads them: the path and the title of an image on every line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, ClassVar

from thresher.data.cells import Roots, is_address, is_base64, is_file_name
from thresher.data.lists import PATHS, Entry, ListPart, file_of, listed, roots_of
from thresher.data.location import Location
from thresher.data.options import DataOptions
from thresher.data.parts import Data, Form
from thresher.data.rows import FIRST, ONLY_IMAGE, ONLY_TEXT, addresses_in, chosen_caption, missing_column, shortened
from thresher.data.samples import caption_of
from thresher.errors import PoolError, UsageError
from thresher.io.columns import CAPTIONS, known
from thresher.io.csv import header, rows
from thresher.io.open import open_file
from thresher.io.paths import visible

_ENDINGS = (".csv", ".tsv", ".txt")
_FIRST_LINE = "; if its first line is a row, name the columns with --columns NAME,NAME"
_TITLES = tuple(dict.fromkeys(("title", *CAPTIONS, "comment")))


@dataclass(frozen=True)
class Csv:
    """A CSV file with a header line, filepath and title, separated by tabs, commas, ``|`` or ``;``.

    Image paths are relative to ``root``. Without a root they are relative to the current folder, as in open_clip, or to
    the folder of the CSV file, which may have been moved together with its images. Paths outside these folders are
    followed only with ``allow_outside``, because a CSV file is untrusted input. An image may also be in its cell, in
    base64. Without a header line, ``columns`` has the names.
    """

    name: ClassVar[str] = "csv"
    rank: ClassVar[int] = 20
    looks_like: ClassVar[str] = "a .csv or .tsv of open_clip, with filepath and title"

    def recognise(self, where: Location) -> bool:
        """Recognise a .csv, .tsv or .txt file, also a compressed one, which is refused."""
        return listed(where.text, _ENDINGS) and where.exists

    def open(self, where: Location, options: DataOptions) -> Data:
        """Read every line, to find where the rows begin.

        Raises:
            PoolError: A column is missing, there are no rows, or a line is not valid CSV.
            UsageError: A requested column does not exist, or an option is given that a CSV file does not use.
        """
        options.refuse(where.text, "a csv", captions_file="name the column with --caption COLUMN")
        protocol, path = file_of(where)
        roots = roots_of(where, options)
        asked = [name for name in (options.image, options.caption, options.key) if name]
        with open_file(protocol, path) as file:
            names, delimiter, end = header(file, path, asked, options.names)
            if not names:
                raise PoolError(f"{path}: has no rows")
            if not options.columns:
                _refuse_data(path, names, delimiter, roots)
            key = _column(path, "--key", "keys", options.key, (), names)
            picture = _column(path, "--image", "image paths", options.image, PATHS, names)
            title = _column(path, "--caption", "captions", options.caption, _TITLES, names)
            starts, count, first = [], 0, list[dict[str, str]]()
            for begin, _, row in rows(file, path, end, delimiter):
                if count % options.per_part == 0:
                    starts.append((count, begin))
                if count < FIRST:
                    first.append(shortened(dict(zip(names, row, strict=False))))
                count += 1
        if options.pictures:
            named = [[] if at is None else [names[at]] for at in (picture, title)]
            form = "tsv" if delimiter == "\t" else "csv"
            if options.columns:  # img2dataset needs the names of columns in the file, or a list of addresses alone
                form = "txt" if len(names) == 1 else ""
            if addresses := addresses_in(path, form, first, *named):
                raise UsageError(f"{addresses}{ONLY_TEXT}")
            if picture is None:
                raise missing_column(path, "--image", "image paths", None, PATHS, names, f"{ONLY_TEXT}{_FIRST_LINE}")
        if title is None and options.captions:
            raise missing_column(path, "--caption", "captions", None, _TITLES, names, ONLY_IMAGE)
        if not count:
            raise PoolError(f"{path}: has no rows")
        parts = [
            CsvPart(
                path,
                protocol,
                first=row,
                rows=min(options.per_part, count - row),
                at=byte,
                delimiter=delimiter,
                width=len(names),
                picture=picture,
                title=title,
                key=key,
                names=tuple(options.names),
                roots=roots,
            )
            for row, byte in starts
        ]
        usual = [] if options.caption or not options.captions else known(names, _TITLES)
        return Data(where.text, self.name, tuple(parts), tuple(chosen_caption(path, usual)))


@dataclass(frozen=True, kw_only=True)
class CsvPart(ListPart):
    """Rows of a CSV file.

    Attributes:
        delimiter: Character between cells.
        width: Number of columns.
        picture: Index of the column of images; None for none.
        title: Index of the column of captions; None for none.
        key: Index of the column of keys; None for the image path.
        names: Names of the columns, if the first line of the file is a row; () if it has the names.
    """

    delimiter: str
    width: int
    picture: int | None
    title: int | None
    key: int | None = None
    names: tuple[str, ...] = ()

    copied_as: ClassVar[Form | None] = "csv"

    def entries(self, file: IO[bytes], at: int) -> Iterator[Entry]:
        """Yield the rows from byte ``at`` on; a quoted cell may have several lines."""
        for begin, end, row in rows(file, self.path, at, self.delimiter):
            image, text, key = (
                row[one] if one is not None and one < len(row) else "" for one in (self.picture, self.title, self.key)
            )
            image = image.strip() if self.delimiter == "|" else image  # Flickr30k: "| "
            why = ""
            if any(row[self.width :]):  # a caption with the delimiter would be cut off without a word
                why = f"has {len(row)} cells, but there are {self.width} columns; put quotes around a cell with "
                why += "the delimiter"
            yield Entry(begin, end, image, caption_of(text), key.strip(), why)


def _refuse_data(path: str, first: Sequence[str], delimiter: str, roots: Roots) -> None:
    """Refuse a file whose first line is a row, because one of its cells is an image.

    Raises:
        PoolError: It is; the message has the line, and what to type.
    """

    named = bool(known(first, PATHS))  # there may be a file with the name of a column

    def is_image(cell: str) -> bool:
        clear = is_file_name(cell) or is_address(cell) or is_base64(cell)
        return clear or bool(cell) and not named and roots.find(cell)[0] is not None

    at = next((i for i, cell in enumerate(first) if is_image(cell)), None)
    if at is None:
        return
    names = [f"column{i + 1}" for i in range(len(first))]
    names[at] = "url" if is_address(first[at]) else "image" if is_base64(first[at]) else "filepath"
    if others := [i for i in range(len(first)) if i != at]:
        names[max(others, key=lambda i: len(first[i]))] = "title"
    line = visible(delimiter.join(visible(cell, 60) for cell in first), 300)
    raise PoolError(
        f"{path}: its first line is a row, not the names of its columns: {line}; name the columns, for example "
        f"--columns {','.join(names)}"
    )


def _column(
    path: str, flag: str, what: str, asked: str | None, usual: Sequence[str], names: Sequence[str]
) -> int | None:
    """Return the index of a requested column, else of the first with a usual name, None if there is none."""
    if asked and asked not in names:
        raise missing_column(path, flag, what, asked, usual, names)
    return next((names.index(name) for name in ([asked] if asked else known(names, usual))), None)
