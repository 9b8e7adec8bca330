"""The image in a cell of a table or a list: bytes, base64, a path, a struct of bytes and path, or a list of these.

All readers of rows use these functions, so that the same cell means the same in csv, jsonl, Parquet and Arrow.
"""

from __future__ import annotations

import binascii
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from thresher.data.options import DataOptions
from thresher.data.samples import SEVERAL, Place
from thresher.io.paths import inside, visible
from thresher.io.pictures import ENDINGS

_ADDRESS = re.compile(r"(https?|ftp|s3|gs|gcs|abfs|hf)://\S", re.IGNORECASE)
_DATA_URI = re.compile(r"data:image/[\w.+-]+(;[\w.=-]+)*;base64,", re.IGNORECASE)
# How base64 of JPEG, PNG, GIF, WebP, BMP, TIFF and PPM begins; "_" instead of "/" in the alphabet for URLs.
_BEGINS = (
    "/9j/",
    "_9j_",
    "iVBORw0KGgo",
    "R0lGOD",
    "UklGR",
    "Qk0",
    "Qk1",
    "Qk2",
    "Qk3",
    "SUkqA",
    "TU0AK",
    "UDUK",
    "UDYK",
)
_SMALLEST = 32  # characters of base64 that a path cannot be taken for: no image has fewer
_LONG = 1_024  # characters of a text that is not a path if all are in the alphabet of base64
_ALPHABET = re.compile(r"(?=.*[A-Z])(?=.*[a-z])(?=.*\d)[A-Za-z0-9+/_\-\r\n]+", re.DOTALL)
_FOR_URLS = str.maketrans("-_", "+/")


@dataclass(frozen=True)
class Roots:
    """The folders with the images that a file names by path. Names are untrusted: this is the rule for all of them.

    A name is an image below one of the folders, after symlinks are resolved, or is not read.

    Attributes:
        folders: Absolute paths of the folders, in the order in which they are tried; () if no path is followed.
        outside: Whether images outside the folders may be read.
    """

    folders: tuple[str, ...]
    outside: bool = False

    @classmethod
    def of(cls, options: DataOptions, folders: Iterable[str]) -> Roots:
        """Return the folder of ``--root``, else these folders."""
        named = (options.root,) if options.root else folders
        return cls(tuple(dict.fromkeys(map(os.path.abspath, named))), options.allow_outside)

    @cached_property
    def _allowed(self) -> tuple[str, ...]:
        return tuple(map(os.path.realpath, self.folders))

    def paths(self, name: str) -> list[str]:
        """Return the paths where an image may be, whether or not there is one; a backslash may stand for a slash."""
        names = dict.fromkeys((name, with_slashes(name)))
        return [os.path.join(folder, one) for folder in self.folders for one in names]

    def find(self, name: str) -> tuple[Place | None, str]:
        """Return the place of an image in the first folder that has it, or None and why there is none."""
        if not self.folders:
            return None, f"names an image by path, which is read only with --root: {visible(name)}"
        hidden = False
        for path in self.paths(name):
            if (place := Place.of_file(path)) is not None:
                if self.outside or any(inside(below, path) for below in self._allowed):
                    return place, ""
                hidden = True
        if hidden:
            return None, (
                f"names an image outside {' and '.join(self.folders)}: {visible(name)}; "
                "if you trust the file, pass --root with the folder of the image, or --allow-outside"
            )
        return None, f"names an image that is not a file: {visible(name)}"


def with_slashes(name: str) -> str:
    r"""Return a path as Windows writes it, ``a\b.jpg``, with slashes."""
    return name.replace("\\", "/")


class Picture(NamedTuple):
    """The image in a cell.

    Attributes:
        stored: The encoded image or its place; None if there is none.
        why: Why there is none, "" if there is one.
        missing: Whether the cell names a file that is not there.
        notes: See :attr:`thresher.data.samples.Sample.notes`.
    """

    stored: bytes | Place | None
    why: str = ""
    missing: bool = False
    notes: tuple[str, ...] = ()


def picture_of(cell: Any, roots: Roots) -> Picture:
    """Return the image in a cell.

    Args:
        cell: Bytes, a text with base64 or a path, a mapping with ``bytes`` or ``path``, or a list of these, of which
            the first is used.
        roots: Where images named by path are.
    """
    notes, cell = notes_on(cell), _first(cell)
    if isinstance(cell, bytes) and cell:
        return Picture(cell, notes=notes)
    if not isinstance(cell, str) or not cell:
        return Picture(None, "has no image")
    if is_base64(cell):
        try:
            return Picture(_decoded(cell), notes=notes)
        except ValueError as error:
            return Picture(None, f"has an image that is not valid base64 ({error})")
    if is_address(cell):
        return Picture(None, f"has the address of an image, not an image: {visible(cell)}")
    place, why = roots.find(cell)
    return Picture(place, why, place is None, notes if place else ())


def paths_in(cell: Any, roots: Roots) -> list[str]:
    """Return the paths where the image that a cell names may be; [] if the cell contains it, or has none."""
    name = name_in(cell)
    return roots.paths(name) if name and not is_address(name) else []


def name_in(cell: Any) -> str:
    """Return the path or the address of the image in a cell; "" if the cell contains it, or has none."""
    cell = _first(cell)
    return cell if isinstance(cell, str) and not is_base64(cell) else ""


def is_address(text: Any) -> bool:
    """Return whether a cell is the address of a file on the internet or in an object store."""
    return isinstance(text, str) and _ADDRESS.match(text.lstrip()) is not None


def is_base64(text: str) -> bool:
    """Return whether a text is meant as an image in base64, judged by its beginning and its length."""
    if _DATA_URI.match(text[:_LONG].lstrip()):
        return True
    begin = text[:_LONG].strip()
    if len(begin) < _SMALLEST or is_file_name(text[-8:]):
        return False
    return begin.startswith(_BEGINS) or len(text) > _LONG and _ALPHABET.fullmatch(begin) is not None


def is_file_name(text: str) -> bool:
    """Return whether a text is clearly the name of an image file, and not that of a column."""
    return os.path.splitext(text.strip())[1][1:].lower() in ENDINGS


def notes_on(cell: Any) -> tuple[str, ...]:
    """Return the :attr:`thresher.data.samples.Sample.notes` of a cell of images."""
    return (SEVERAL,) if _is_list(cell) and len(cell) > 1 else ()


def _is_list(cell: Any) -> bool:
    return isinstance(cell, Sequence) and not isinstance(cell, (str, bytes))


def _first(cell: Any) -> Any:
    """Return the first image of a cell."""
    if _is_list(cell):
        cell = cell[0] if cell else None
    if isinstance(cell, Mapping):
        cell = cell.get("bytes") or cell.get("path")
    return cell


def _decoded(text: str) -> bytes:
    """Return the bytes of base64 in the usual alphabet or that for URLs, possibly in lines and after ``data:``.

    Raises:
        ValueError: It is not valid.
    """
    head = _DATA_URI.match(text[:_LONG].lstrip())
    body = "".join(text.lstrip()[head.end() if head else 0 :].split())
    if ("-" in body or "_" in body) and "+" not in body and "/" not in body:
        body = body.translate(_FOR_URLS)
    if len(body) % 4:
        raise ValueError(f"it has {len(body):,} characters, not a multiple of 4")
    data = binascii.a2b_base64(body.encode("ascii"), strict_mode=True)
    if not data:
        raise ValueError("it is empty")
    return data
