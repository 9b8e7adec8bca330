"""The files of a local folder: which are images, which hold their captions, and what must be reported as not read."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from thresher.data.location import Location
from thresher.data.tables import PICTURES
from thresher.errors import PoolError
from thresher.io.listing import folders_below, named
from thresher.io.open import regular_file, trusting
from thresher.io.parquet import table_piece
from thresher.io.paths import composed, inside, visible
from thresher.io.pictures import BY_ENDING, Format, format_of
from thresher.runtime.format import counted

BESIDE = (".txt", ".caption", ".json")  # extensions of a caption file next to an image, in order
TABLES = ("csv", "tsv", "jsonl", "ndjson", "parquet", "pq", "json", "txt")  # that may be files of captions
ARCHIVES = ("zip", "rar", "7z", "gz", "tgz", "bz2", "tbz2", "xz", "txz", "zst")  # without a reader
_SYSTEM = ("thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r")
_ABOUT = ("readme", "license", "licence")  # beginnings of names of files about the data
_LOOKED_AT = 1024  # bytes from which the format of an image is recognised
_ENDINGS = 8  # extensions that a note names
_DOWNLOADED = re.compile(r"\d+(\.parquet|_stats\.json)")  # by img2dataset


def walk(top: str) -> Iterator[tuple[str, list[str], list[str]]]:
    """Yield every folder at any depth, in order, its subfolders and its files, without those of operating systems."""
    for folder, inner, files in folders_below(top):
        inner[:] = sorted(name for name in inner if not name.startswith(".") and name != "__MACOSX")
        yield folder, inner, [name for name in files if not name.startswith(".") and name.lower() not in _SYSTEM]


def ending_of(name: str) -> str:
    """Return the extension of a file in lower case, "" for none: ``photo.1`` and ``photo.jpg_large`` have none."""
    stem, _, ending = name.rpartition(".")
    return ending.lower() if stem and ending.isascii() and ending.isalnum() and not ending.isdecimal() else ""


def stem_of(name: str) -> str:
    """Return a name without its extension, see :func:`ending_of`."""
    ending = ending_of(name)
    return name[: -len(ending) - 1] if ending else name


def is_about(name: str) -> bool:
    """Return whether a file is about the data and not part of it, such as README.md."""
    return name.lower().startswith(_ABOUT)


def format_in(path: str, root: str) -> Format | None:
    """Return the format of an image by its extension, or if it has none by its first bytes; None for other files.

    Args:
        path: The file.
        root: The folder, without symlinks, that the file must be in for its content to be read.
    """
    ending = ending_of(os.path.basename(path))
    if ending:
        return BY_ENDING.get(ending)
    return _format_by_content(path) if is_file_in(path, root) else None


def _format_by_content(path: str) -> Format | None:
    def read() -> bytes:
        with open(path, "rb") as file:
            return file.read(_LOOKED_AT)

    return format_of(trusting(path, read))


def is_file_in(path: str, root: str) -> bool:
    """Return whether a path is a regular file, and not a symlink to outside the folder ``root``."""
    return regular_file(path) is not None and inside(root, path) is not None


def pictures_in(top: str) -> Iterator[str]:
    """Yield the paths of the images of a folder at any depth."""
    root = os.path.realpath(top)
    for folder, _, files in walk(top):
        unsure = []
        for name in files:
            if ending_of(name) in BY_ENDING:
                yield os.path.join(folder, name)
            elif not ending_of(name):
                unsure.append(os.path.join(folder, name))
        yield from (path for path in unsure if format_in(path, root))


def is_about_pictures(where: Location) -> bool:
    """Return whether the Parquet files of a folder have no images, but are next to image files.

    They are metadata, such as what img2dataset writes about the images that it downloads to a folder.
    """
    if not where.is_folder:
        return False
    names = where.files.matching(r".*\.(parquet|pq)")
    for name in {names[0], names[len(names) // 2], names[-1]} if names else ():
        try:
            columns = table_piece(where.files.protocol, where.files.path(name)).columns
        except PoolError:  # a damaged table is an error, and not skipped
            return False
        if not set(PICTURES).isdisjoint(columns):
            return False
    return bool(names) and next(pictures_in(where.text), None) is not None


def captions_beside(
    pictures: Sequence[str], files: Iterable[str], endings: Sequence[str] = BESIDE
) -> tuple[dict[str, str], list[str]]:
    """Find the caption files next to the images of one folder.

    The caption of ``a.jpg`` is in the first of ``a.txt``, ``a.caption``, ``a.json``, ``a.jpg.txt``, ``a.jpg.caption``
    and ``a.jpg.json`` that exists; not in ``a.jpg.txt`` if there is also an image such as ``a.jpg.png``, whose it is.
    Names that differ in the case of the extension, or only in how Unicode composes their letters (macOS and zip files
    decompose them), count as the same if there is only one.

    Args:
        pictures: Names of the images.
        files: Names of the files that may hold captions.
        endings: Extensions of caption files.

    Returns:
        The caption file of each image that has one, and the names of the other files.
    """
    left, found, used = dict.fromkeys(files), dict[str, str](), set[str]()
    for name in pictures:
        stem = stem_of(name)
        if own := next((stem + ending for ending in endings if stem + ending in left), None):
            found[name] = own
            used.add(own)
    others = [name for name in pictures if name not in found] if len(used) < len(left) else []
    if others:
        loose: dict[str, str] = {}  # of names that are the same, none
        for name in left:
            plain = composed(f"{stem_of(name)}.{ending_of(name)}")
            loose[plain] = "" if plain in loose else name
        stems, names = (Counter(map(composed, of)) for of in (map(stem_of, pictures), pictures))
        for name in others:
            stem, whole = composed(stem_of(name)), composed(name)
            tried = [stem] if stems[stem] == 1 or stem.isascii() else []
            shorter = whole if ending_of(whole) else os.path.splitext(whole)[0]  # of photo.jpg_large, photo.jpg.1
            shortest = stem_of(shorter) if ending_of(shorter) in BY_ENDING else shorter
            tried += [one for one in (whole, shorter, shortest) if one not in stems and names[whole] == 1]
            if one := next(filter(None, (loose.get(one + ending) for one in tried for ending in endings)), ""):
                found[name] = one
                used.add(one)
    return found, [name for name in left if name not in used]


def downloads_in(folder: str, names: Sequence[str]) -> set[str]:
    """Return the names of img2dataset's tables and statistics among the files of a folder."""
    numbered = {name for name in names if _DOWNLOADED.fullmatch(name)}
    table = next((name for name in sorted(numbered) if name.endswith(".parquet")), None)
    try:
        columns = table_piece("file", os.path.join(folder, table)).columns if table else ()
    except PoolError:
        return set()
    return numbered if {"key", "status"} <= set(columns) else set()


@dataclass
class Contents:
    """What a folder contains besides the images and captions that are read, to report it.

    Attributes:
        others: Number of files that are not read, by extension.
        tables: Some of these that may be files of captions.
        archives: Some of these that are archives.
        disguised: By extension, the usual extension of the image that the first such file is.
        links: Symlinks to folders, which are not followed.
        formats: Number of images, by extension.
    """

    others: Counter[str] = field(default_factory=Counter)
    tables: list[str] = field(default_factory=list)
    archives: list[str] = field(default_factory=list)
    disguised: dict[str, str] = field(default_factory=dict)
    links: list[str] = field(default_factory=list)
    formats: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of(cls, top: str) -> Contents:
        """Return what a folder without data contains, at any depth."""
        contents = cls()
        for folder, inner, files in walk(top):
            contents.add_links(folder, inner)
            contents.add(folder, (name for name in files if not is_about(name)))
        return contents

    def add(self, folder: str, names: Iterable[str]) -> None:
        """Add files of a folder that are not read."""
        for name in names:
            ending, path = ending_of(name), os.path.join(folder, name)
            if ending and ending not in self.others and regular_file(path) and not os.path.islink(path):
                one = _format_by_content(path)
                self.disguised |= {ending: one.endings[0]} if one else {}
            self.others[ending] += 1
            for endings, some in ((TABLES, self.tables), (ARCHIVES, self.archives)):
                if ending in endings:
                    some.append(path)

    def add_links(self, folder: str, inner: Iterable[str]) -> None:
        """Add the symlinks among the subfolders of a folder."""
        self.links += [path for name in inner if os.path.islink(path := os.path.join(folder, name))]

    def unread(self) -> str:
        """Return the files that are not read as text, "" if there are none: ``12 files (.mp4 9, .psd 3)``."""
        if not self.others:
            return ""
        text = f"{counted(self.others.total(), 'file')} ({_by_ending(self.others)})"
        if self.archives:
            text += f"; unpack {named(self.archives)}"
        for ending, usual in self.disguised.items():
            text += f"; {visible('.' + ending)} may be images: rename them to .{usual}"
        return text

    def instead(self) -> str:
        """Return the end of a message on a folder without data."""
        found = [f"it has {self.unread()}"] if self.others else []
        return "".join(f"; {one}" for one in (*found, *self._not_followed()))

    def notes(self) -> Iterator[str]:
        """Yield a sentence about each kind of file that is not read."""
        instead: dict[str, Counter[str]] = {}
        for ending, count in self.formats.items():
            if not BY_ENDING[ending].is_read:
                instead.setdefault(BY_ENDING[ending].instead, Counter())[ending] = count
        for what, counts in instead.items():
            yield f"{counted(counts.total(), 'image')} in a format that cannot be read ({_by_ending(counts)}): {what}"
        if text := self.unread():
            yield f"not read: {text}"
        yield from self._not_followed()

    def _not_followed(self) -> Iterator[str]:
        if self.links:
            yield (
                f"not followed: {counted(len(self.links), 'symlink')} to folders, the first: {visible(self.links[0])}; "
                "give the folder itself to read it"
            )


def _by_ending(counts: Counter[str]) -> str:
    """Return the most frequent extensions with their counts: ``.mp4 9, .psd 3``."""
    most = sorted(counts.items(), key=lambda one: (-one[1], one[0]))
    names = [f"{visible('.' + ending) if ending else 'no extension'} {count:,}" for ending, count in most[:_ENDINGS]]
    more = len(most) - len(names)
    return ", ".join([*names, *([counted(more, "other extension")] if more else [])])
