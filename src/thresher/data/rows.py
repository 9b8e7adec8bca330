"""Rows that name an image and its caption, from csv, jsonl, json and Parquet files of other people."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from thresher.data.cells import is_address, name_in
from thresher.data.options import DataOptions
from thresher.data.samples import caption_of
from thresher.errors import PoolError, UsageError, suggest
from thresher.io.columns import ADDRESSES, CAPTIONS, FILES, known
from thresher.io.paths import visible

TEXTS = (*CAPTIONS, "comment", "sentences", "conversations")
_ANSWERS = ("gpt", "assistant")  # who speaks a caption in a conversation
_MOST = 100  # columns that are remembered for a message
FIRST = 64  # first rows, whose cells show what a column has
_WEB = re.compile(r"\s*https?://", re.IGNORECASE)
_SHORT = 200  # characters of a cell that are looked at
ONLY_TEXT = ", or embed only the captions with --only text"
ONLY_IMAGE = ", or embed only the images with --only image"
_FORMS = {".csv": "csv", ".tsv": "tsv", ".txt": "csv", ".parquet": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl"}


def text_of(cell: Any) -> str:
    """Return the caption in a cell, "" for none.

    It is a text, the first text of a list, the first ``raw`` sentence of Karpathy's json, or the first answer of a
    conversation of LLaVA.
    """
    if not isinstance(cell, (list, tuple)) or not any(isinstance(one, dict) for one in cell):
        return caption_of(cell)
    for one in cell:
        if not isinstance(one, dict):
            continue
        speaker = one.get("from", one.get("role"))
        if speaker is None:
            text = caption_of(one.get("raw"))
        else:
            text = caption_of(one.get("value", one.get("content"))) if speaker in _ANSWERS else ""
        if text:
            return text
    return ""


def caption_in(row: Mapping[str, Any], texts: Sequence[str] = TEXTS) -> str:
    """Return the caption in the first of these columns that has one, "" for none."""
    return next(filter(None, (text_of(row[one]) for one in known(row, texts))), "")


class RowReader:
    """Finds the image and the caption of each row, in columns with usual names or those that the user named.

    Captions are never guessed: after the last row, :meth:`check_captions` says which columns there were.
    """

    def __init__(self, options: DataOptions, files: Sequence[str] = FILES, texts: Sequence[str] = TEXTS) -> None:
        """Use ``--image`` and ``--caption``, else the usual names ``files`` and ``texts``."""
        self._asked, self._usual = (options.image, options.caption), (files, texts)
        self._columns: dict[str, None] = {}
        self._keys: tuple[str, ...] | None = None
        self._image: list[str] = []
        self._text: list[str] = []
        self._found = [False, False]
        self._other_text = False
        self._first: list[dict[str, str]] = []

    @property
    def columns(self) -> list[str]:
        """Names of the columns of the rows so far, at least the first hundred."""
        return list(self._columns)

    def of(self, row: Mapping[str, Any]) -> tuple[str, str]:
        """Return the name of the image and the caption, "" for none."""
        cell, text = self.cells(row)
        return name_in(cell).strip(), text

    def cells(self, row: Mapping[str, Any]) -> tuple[Any, str]:
        """Return the cell of the image, None for none, and the caption, "" for none."""
        if (keys := tuple(row)) != self._keys:
            self._keys = keys
            self._image, self._text = (
                ([asked] if asked in row else []) if asked else known(keys, usual)
                for asked, usual in zip(self._asked, self._usual, strict=True)
            )
            if len(self._columns) < _MOST:
                self._columns.update(dict.fromkeys(keys))
            self._found = [self._found[0] or bool(self._image), self._found[1] or bool(self._text)]
        cell = next((row[one] for one in self._image if row[one]), None)
        if len(self._first) < FIRST:
            self._first.append(shortened({**row, **({self._image[0]: name_in(cell)} if self._image else {})}))
        if not self._found[1] and not self._other_text:
            self._other_text = any(is_text(cell) for one, cell in row.items() if one not in self._image)
        return cell, next(filter(None, (text_of(row[one]) for one in self._text)), "")

    def check_images(self, path: str, *, needed: bool = True, in_folder: bool = False) -> None:
        """Raise if there are rows, but none had a column of images, or the images are addresses.

        Args:
            path: The file, for messages.
            needed: Whether there must be images.
            in_folder: Whether the images are in a folder, and the file has their captions.

        Raises:
            PoolError: There is none with a usual name; the message lists the columns. Or it has addresses instead of
                the names of the images in a folder.
            UsageError: There is none with the name that the user gave, or it has addresses.
        """
        instead = ONLY_IMAGE if in_folder else ONLY_TEXT
        if needed and (addresses := addresses_in(path, _form_of(path), self._first, self._image[:1], self._text[:1])):
            raise (PoolError if in_folder else UsageError)(f"{addresses}{instead}")
        if not self._found[0] and self._keys is not None and (needed or self._asked[0]):
            raise missing_column(path, "--image", "image paths", self._asked[0], self._usual[0], self.columns, instead)

    def check_captions(self, path: str, *, needed: bool = True) -> None:
        """Raise if there are rows, but none had a column of captions.

        Args:
            path: The file, for messages.
            needed: Whether there must be captions; if not, there may also be no column that could have them, because
                all others have numbers.

        Raises:
            PoolError: There is none with a usual name; the message lists the columns.
            UsageError: There is none with the name that the user gave.
        """
        if not self._found[1] and self._keys is not None and (needed or self._other_text or self._asked[1]):
            raise missing_column(
                path, "--caption", "captions", self._asked[1], self._usual[1], self.columns, ONLY_IMAGE
            )


def chosen_caption(path: str, columns: Sequence[str]) -> list[str]:
    """Return a note if several columns have usual names of captions, of which the first is used."""
    if len(columns) < 2:
        return []
    used, *others = map(visible, columns)
    return [f"{path}: captions come from the column {used}, not from {', '.join(others)}; --caption names another"]


def missing_column(
    path: str, flag: str, what: str, asked: str | None, usual: Sequence[str], columns: Sequence[str], more: str = ""
) -> UsageError | PoolError:
    """Return the error for a file without a column: the columns it has, and the flag that names one, and ``more``."""
    has = visible(", ".join(columns)) or "no columns"
    if asked:
        return UsageError(f"{path}: no column {asked!r} for {flag}; it has {has}.{suggest(asked, columns)}")
    return PoolError(
        f"{path}: has no column of {what} ({', '.join(usual)}); it has {has}; name one with {flag} COLUMN{more}"
    )


def shortened(row: Mapping[str, Any]) -> dict[str, str]:
    """Return the beginnings of the texts in a row."""
    return {name: cell[:_SHORT] for name, cell in row.items() if isinstance(cell, str)}


def addresses_in(
    path: str, form: str, rows: Sequence[Mapping[str, str]], image: Sequence[str], caption: Sequence[str]
) -> str:
    """Return the message for data whose images are addresses, which nothing here downloads; "" for other data.

    Args:
        path: The file, or the folder of files.
        form: What img2dataset calls its format, "" for one that img2dataset does not read.
        rows: Its first rows, shortened.
        image: The column of images; () to look at all columns.
        caption: The column of captions, () for none.

    Returns:
        What the data are, and the command that downloads the images, if the column of images, or some column if there
        is none, has addresses in all rows that have a text.
    """
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {name: [row[name] for row in rows if row.get(name, "").strip()] for name in names}
    # img2dataset downloads from the web; other addresses are counted row by row.
    addresses = [
        name for name, cells in columns.items() if cells and all(map(is_address, cells)) and _WEB.match(cells[0])
    ]
    if not (found := [*known(addresses, ADDRESSES), *addresses] if not image else [*{*image} & {*addresses}]):
        return ""
    others = [name for name, cells in columns.items() if name not in addresses and any(map(is_text, cells))]
    texts = list(caption) or others
    words = ["img2dataset", "--url_list", path, "--input_format", form or "parquet", "--url_col", found[0]]
    words += ["--caption_col", texts[0] if len(texts) == 1 else "COLUMN"] if texts else []
    command = shlex.join([*words, "--output_format", "webdataset", "--output_folder", "OUT"])
    more = f" (COLUMN: one of {', '.join(texts)})" if len(texts) > 1 else ""
    more += "" if form else "; write the rows as Parquet before"
    return (
        f"{path}: has the addresses of images in the column {visible(found[0])!r}, not images; download them, and give "
        f"the folder OUT: {visible(command + more, None)}"
    )


def _form_of(path: str) -> str:
    return _FORMS.get(os.path.splitext(path)[1].lower(), "")


def is_text(cell: Any) -> bool:
    """Return whether a cell may hold a caption: it has text that is not a number."""
    text = text_of(cell)
    try:
        float(text)
    except ValueError:
        return bool(text)
    return False
