"""Folders of image files, with captions next to the images or in one file."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import compress
from typing import Any, ClassVar

import numpy as np

from thresher.data.captions import captions_in_files
from thresher.data.files import (
    BESIDE,
    Contents,
    captions_beside,
    downloads_in,
    ending_of,
    format_in,
    is_about,
    is_file_in,
    pictures_in,
    stem_of,
    walk,
)
from thresher.data.location import Location
from thresher.data.options import DataOptions
from thresher.data.parts import Data, Ints, Part, Scanned
from thresher.data.rows import TEXTS, caption_in
from thresher.data.samples import Place, Sample, caption_of
from thresher.errors import PoolError
from thresher.io.listing import named, natural
from thresher.io.open import file_stamp, regular_file, trusting
from thresher.io.paths import inside, visible, writable
from thresher.io.pictures import BY_ENDING
from thresher.runtime.format import counted
from thresher.runtime.random import digest
from thresher.runtime.untrusted import parse_json

CAPTION_FILES = ("metadata.jsonl", "metadata.csv", "metadata.tsv", "metadata.parquet", "captions.txt", "captions.csv",
                 "captions.tsv", "captions.json", "captions.jsonl")  # fmt: skip
_CAPTION = 1 << 20  # maximum bytes of a caption file
_CLASSES = 5  # subfolders that a note names
_NO_FILE = "is not a regular file, is a broken symlink, or links outside the folder"


@dataclass(frozen=True)
class Folder:
    """A folder of images, at any depth; symlinks to folders, or to files outside the folder, are not followed.

    Captions come from ``--captions FILE``; else, in every folder, from the first of these files that exists:
    ``metadata.jsonl`` (Hugging Face), ``.csv``, ``.tsv``, ``.parquet``, ``captions.txt`` (image and caption separated
    by a tab or a comma) and ``captions.json`` (COCO); if no folder has such a file, from the files next to the images
    that :func:`thresher.data.files.captions_beside` finds. ``--image`` and ``--caption`` name columns of these files,
    if their names are not known. Files that are not read are counted in :attr:`thresher.data.Data.notes`.
    """

    name: ClassVar[str] = "folder"
    rank: ClassVar[int] = 90
    looks_like: ClassVar[str] = "a folder of images"

    def recognise(self, where: Location) -> bool:
        """Recognise a local folder that contains an image."""
        return where.is_folder and next(pictures_in(where.text), None) is not None

    def open(self, where: Location, options: DataOptions) -> Data:
        """List the images and read the captions.

        Raises:
            PoolError: There is no image, or a caption file cannot be read, has no column of captions or matches no
                image.
            UsageError: An option is given that a folder does not use, or a requested column does not exist.
        """
        options.refuse(
            where.text,
            self.looks_like,
            key="the key of an image is its path without the extension",
            root="give the folder of the images as DATA",
        )
        found = _Listing.of(where.text, options)
        names, tables = sorted(found.pictures, key=natural), found.tables
        if not names:
            raise PoolError(f"{where.text}: contains no images{found.contents.instead()}")
        if options.captions and not tables:
            without = "it has no file of captions with columns; give one with --captions FILE"
            options.refuse(where.text, self.looks_like, image=without)
            if not found.beside:
                options.refuse(where.text, self.looks_like, caption=f"{without}, or NAME.json next to each image")
        captions, unmatched = captions_in_files(where.text, names, tables, options)
        place, step = os.path.abspath(where.text), options.per_part
        keys, same = _keys(names)
        notes = list(found.notes())
        if unmatched:
            notes.append(f"{counted(unmatched, 'name')} in {named([path for path, _ in tables])} without an image")
        if same:
            notes.append(
                f"{counted(same, 'image')} with the name of another but for the extension: their keys include it, and "
                "they have the same NAME.txt"
            )
        parts = [
            FolderPart(
                place,
                first=lo,
                rows=len(names[lo : lo + step]),
                names=tuple(names[lo : lo + step]),
                keys=tuple(keys[lo : lo + step]),
                captions=tuple(captions.get(name) if captions else None for name in names[lo : lo + step]),
                beside=tuple(found.beside.get(name, "") for name in names[lo : lo + step]),
                tables=tuple(path for path, _ in tables),
                attribute=options.caption,
            )
            for lo in range(0, len(names), step)
        ]
        return Data(where.text, self.name, tuple(parts), tuple(notes))


@dataclass
class _Listing:
    """What a folder contains.

    Attributes:
        top: The folder.
        captions: Whether captions are needed.
        pictures: Paths of the images in it.
        tables: Files of captions, and the folders that they describe.
        beside: Name of the caption file next to an image, by the path of the image; for those that have one.
        lonely: Paths of caption files that match no image.
        unused: Number of caption files next to images that are not read, because captions come from tables.
        passed: Files of captions that are not read, because their folder has another.
        contents: Everything else.
    """

    top: str
    captions: bool
    pictures: list[str] = field(default_factory=list)
    tables: list[tuple[str, str]] = field(default_factory=list)
    beside: dict[str, str] = field(default_factory=dict)
    lonely: list[str] = field(default_factory=list)
    unused: int = 0
    passed: list[str] = field(default_factory=list)
    contents: Contents = field(default_factory=Contents)

    @classmethod
    def of(cls, top: str, options: DataOptions) -> _Listing:
        """List a folder; the images are in no order."""
        found, root = cls(top, options.captions), os.path.realpath(top)
        for folder, inner, files in walk(top):
            found.contents.add_links(folder, inner)
            found._add(folder, files, root, options)
        place = os.path.abspath(top)
        coco = os.path.join(os.path.dirname(place), "annotations", f"captions_{os.path.basename(place)}.json")
        if options.captions_file:
            found.tables, found.passed = [(options.captions_file, "")], []
        elif options.captions and not found.tables and os.path.isfile(coco):
            found.tables = [(coco, "")]
        if found.tables:
            found.unused = len(found.beside)
        if not found.beside or found.tables:  # no file next to an image is a caption
            found.contents.add("", found.lonely)
            found.lonely = []
        return found

    def _add(self, folder: str, files: Sequence[str], root: str, options: DataOptions) -> None:
        pictures, texts, others = list[str](), list[str](), list[str]()
        known = {name.lower(): name for name in files}
        tables = [known[name] for name in CAPTION_FILES if name in known]
        tables = [name for name in tables if is_file_in(os.path.join(folder, name), root)]
        read = {*tables, *downloads_in(folder, files), *_file_in(folder, options.captions_file)}
        for name in files:
            if not (ending := ending_of(name)) and (one := format_in(os.path.join(folder, name), root)):
                ending = one.endings[0]
            if ending in BY_ENDING:
                pictures.append(name)
                self.contents.formats[ending] += 1
            elif name not in read and not is_about(name):
                (texts if f".{ending}" in BESIDE else others).append(name)
        below = "" if folder == self.top else os.path.relpath(folder, self.top)
        self.pictures += [os.path.join(below, name) for name in pictures]
        self.contents.add(folder, others)
        if not self.captions:
            return
        self.tables += [(os.path.join(folder, name), below) for name in tables[:1]]
        self.passed += [os.path.join(folder, name) for name in tables[1:]]
        found, left = captions_beside(pictures, texts, [".json"] if options.caption else BESIDE)
        self.beside |= {os.path.join(below, name): text for name, text in found.items()}
        stems = set(map(stem_of, pictures)) if left else set()
        self.lonely += [os.path.join(folder, name) for name in left if stem_of(name) not in stems]

    def notes(self) -> Iterator[str]:
        """Yield a sentence about each kind of file that is not read, or in a way that may surprise."""
        yield from self.contents.notes()
        if not self.captions:
            return
        if self.passed:
            yield f"captions come from {visible(self.tables[0][0])}; not read: {named(self.passed)}"
        if self.unused and self.tables:
            many = counted(self.unused, "caption file")
            yield f"{many} next to images not read, because captions come from {visible(self.tables[0][0])}"
        if self.lonely:
            many = counted(len(self.lonely), "caption file")
            yield f"{many} without an image of the same name, the first: {visible(min(self.lonely))}"
        if not self.tables and not self.beside:
            if tables := self.contents.tables:
                yield f"no captions; if they are in {named(tables)}, pass --captions FILE"
            folders = sorted({name.partition(os.sep)[0] for name in self.pictures if os.sep in name})
            if len(folders) > 1 and all(os.sep in name for name in self.pictures):
                some = ", ".join(map(visible, folders[:_CLASSES])) + (", ..." if len(folders) > _CLASSES else "")
                yield (
                    f"no captions; the images are in {len(folders):,} folders that may be classes ({some}): "
                    "thresher embed --only image needs no captions"
                )


def _file_in(folder: str, path: str | None) -> list[str]:
    """Return the name of a file if it is in a folder."""
    here = path is not None and os.path.realpath(os.path.dirname(path)) == os.path.realpath(folder)
    return [os.path.basename(path)] if path and here else []


def _keys(names: Sequence[str]) -> tuple[list[str], int]:
    """Return the key of each image, and how many images that are read have the name of another but for the extension.

    It is the path without the extension, if no other image has that. Images in formats that are never read, such as
    the raw file of a camera next to its JPEG, do not change the keys of others.
    """
    stems, never = list(map(stem_of, names)), list(map(_is_never_read, names))
    often = Counter(stems)
    often.update(names)  # the key of one image must not be the name of another
    unread = Counter(compress(stems, never))
    keys, same = [], 0
    for stem, name, skipped in zip(stems, names, never, strict=True):
        others = often[stem] - (1 if skipped else 1 + unread[stem])
        keys.append(writable(name if others else stem))
        same += bool(others) and name != stem and not skipped
    return keys, same


def _is_never_read(name: str) -> bool:
    one = BY_ENDING.get(ending_of(name))
    return one is not None and not one.is_known


@dataclass(frozen=True, kw_only=True)
class FolderPart(Part):
    """Images ``first`` to ``first + rows`` of a folder, and their captions.

    Attributes:
        names: Their paths in the folder.
        keys: Their keys.
        captions: Their captions; None for a caption that is in a file next to the image.
        tables: The files that the captions come from.
        attribute: The attribute with the caption in a json file next to an image; None for one with a usual name.
        beside: Names of the caption files next to them, "" for none.
    """

    names: tuple[str, ...]
    keys: tuple[str, ...]
    captions: tuple[str | None, ...]
    beside: tuple[str, ...]
    tables: tuple[str, ...] = ()
    attribute: str | None = None

    unit: ClassVar[str] = "picture"
    pictures_apart: ClassVar[bool] = True

    @property
    def has_uids(self) -> bool:
        """False: folders of images have no uids."""
        return False

    def stamp(self) -> list[Any]:
        """Return a hash of its names, keys and captions, and one of the sizes and times of all its files.

        The time of a folder does not cover its subfolders.
        """
        files = [regular_file(os.path.join(self.path, name)) for name in self.names]
        sizes = [None if one is None else (one.st_size, one.st_mtime_ns) for one in files]
        stamps = [sizes, [file_stamp("file", table) for table in self.tables]]
        return [digest([self.names, self.keys, self.captions])[:32], digest(stamps)[:32]]

    def samples(self) -> Iterator[Sample]:
        """Yield the samples; a caption that is not in a caption file is read from a file next to the image."""
        root = os.path.realpath(self.path)
        for i, (name, key, caption) in enumerate(zip(self.names, self.keys, self.captions, strict=True)):
            path = os.path.join(self.path, name)
            place = Place.of_file(path) if inside(root, path) is not None else None  # before its caption is read
            if caption is None:
                file = os.path.join(os.path.dirname(path), self.beside[i])
                caption = _caption_in(file, self.attribute) if self.beside[i] and is_file_in(file, root) else ""
            yield Sample(key, caption, place, self.first + i, why="" if place else _NO_FILE, missing=place is None)

    def scan(self, *, uids: bool = False) -> Scanned:
        """Return the keys; reads nothing."""
        count = len(self.keys)
        return Scanned(self.keys, np.arange(self.first, self.first + count), np.ones(count, np.int64))

    def chosen(self, start_c: Ints) -> Iterator[Sample]:
        """Yield the samples with some indices."""
        for at in start_c.tolist():
            i = slice(at - self.first, at - self.first + 1)
            own = {name: getattr(self, name)[i] for name in ("names", "keys", "captions", "beside")}
            yield from replace(self, first=at, rows=1, **own).samples()

    def separate_files(self, start_c: Ints) -> Iterator[Sequence[str]]:
        """Yield the image of each sample, and the files that may have its caption."""
        for i in (start_c - self.first).tolist():
            path = os.path.join(self.path, self.names[i])
            texts = [stem_of(path) + ending for ending in BESIDE] if self.captions[i] is None else []
            texts += [os.path.join(os.path.dirname(path), self.beside[i])] if self.beside[i] else []
            yield [path, *dict.fromkeys(texts)]


def _caption_in(path: str, attribute: str | None) -> str:
    """Return the caption in a file next to an image; of a json file with this attribute, or one with a usual name."""
    data = _start_of(path)
    try:
        content = parse_json(data) if path.lower().endswith(".json") else data
    except ValueError:
        return ""
    if isinstance(content, dict):
        return caption_in(content, (attribute,) if attribute else TEXTS)
    return "" if attribute else caption_of(content)


def _start_of(path: str) -> bytes:
    def read() -> bytes:
        with open(path, "rb") as file:
            return file.read(_CAPTION)

    return trusting(path, read)
