"""Folders of image files, with captions next to the images or in one file."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from thresher.data.captions import captions_in_files
from thresher.data.location import Location
from thresher.data.options import DataOptions
from thresher.data.parts import Data, Ints, Part, Scanned
from thresher.data.rows import TEXTS, caption_in
from thresher.data.samples import Place, Sample, caption_of
from thresher.errors import PoolError
from thresher.io.listing import folders_below, natural
from thresher.io.open import file_stamp, regular_file, trusting
from thresher.io.paths import inside, writable
from thresher.io.pictures import ENDINGS
from thresher.runtime.random import digest
from thresher.runtime.untrusted import parse_json

CAPTION_FILES = ("metadata.jsonl", "metadata.csv", "metadata.tsv", "metadata.parquet", "captions.txt", "captions.csv",
                 "captions.tsv", "captions.json", "captions.jsonl")  # fmt: skip
_OTHERS = ("avif", "cr2", "dng", "heic", "heif", "jp2", "jxl", "nef", "psd", "svg")  # unsupported: skipped and reported
_BESIDE = (".txt", ".caption", ".json")  # endings of a caption file next to an image
_CAPTION = 1 << 20  # maximum bytes of a caption file
_NO_FILE = "is not a regular file, is a broken symlink, or links outside the folder"


@dataclass(frozen=True)
class Folder:
    """A folder of images, at any depth; symlinks to folders, or to files outside the folder, are not followed.

    Captions come from ``--captions FILE``; else, in every folder, from the first of these files that exists:
    ``metadata.jsonl`` (Hugging Face), ``.csv``, ``.tsv``, ``.parquet``, ``captions.txt`` (image and caption separated
    by a tab or a comma) and ``captions.json`` (COCO); if no folder has such a file, from ``NAME.txt`` or ``NAME.json``
    next to the image. ``--image`` and ``--caption`` name columns of these files, if their names are not known.
    """

    name: ClassVar[str] = "folder"
    rank: ClassVar[int] = 90
    looks_like: ClassVar[str] = "a folder of images"

    def recognise(self, where: Location) -> bool:
        """Recognise a local folder that contains an image."""
        return where.is_folder and any(_is_picture(name) for _, files in _walk(where.text) for name in files)

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
        names, tables = list[str](), [(options.captions_file, "")] if options.captions_file else []
        root, json = os.path.realpath(where.text), False
        for folder, files in _walk(where.text):
            below = "" if folder == where.text else os.path.relpath(folder, where.text)
            pictures = [name for name in files if _is_picture(name)]
            names += [os.path.join(below, name) for name in pictures]
            if options.caption and not json:
                json = not {os.path.splitext(name)[0] + ".json" for name in pictures}.isdisjoint(files)
            if options.captions and not options.captions_file:
                candidates = (os.path.join(folder, name) for name in CAPTION_FILES if name in files)
                tables += [(path, below) for path in candidates if _there(path, root)][:1]
        if not names:
            raise PoolError(f"{where.text}: contains no images ({', '.join(ENDINGS)})")
        place = os.path.abspath(where.text)
        coco = os.path.join(os.path.dirname(place), "annotations", f"captions_{os.path.basename(place)}.json")
        if options.captions and not tables and os.path.isfile(coco):
            tables = [(coco, "")]
        if options.captions and not tables:
            without = "it has no file of captions with columns; give one with --captions FILE"
            options.refuse(where.text, self.looks_like, image=without)
            if not json:
                options.refuse(where.text, self.looks_like, caption=f"{without}, or NAME.json next to each image")
        names.sort(key=natural)
        captions = captions_in_files(where.text, names, tables, options)
        stems = [os.path.splitext(name)[0] for name in names]
        often = Counter(stems)
        often.update(names)  # the key of one image must not be the name of another
        keys = [writable(stem if often[stem] == 1 else name) for stem, name in zip(stems, names, strict=True)]
        step = options.per_part
        parts = [
            FolderPart(
                place,
                first=lo,
                rows=len(names[lo : lo + step]),
                names=tuple(names[lo : lo + step]),
                keys=tuple(keys[lo : lo + step]),
                captions=tuple(captions.get(name) if captions else None for name in names[lo : lo + step]),
                tables=tuple(path for path, _ in tables),
                attribute=options.caption,
            )
            for lo in range(0, len(names), step)
        ]
        return Data(where.text, self.name, tuple(parts))


@dataclass(frozen=True, kw_only=True)
class FolderPart(Part):
    """Images ``first`` to ``first + rows`` of a folder, and their captions.

    Attributes:
        names: Their paths in the folder.
        keys: Their keys.
        captions: Their captions; None for a caption that is in a file next to the image.
        tables: The files that the captions come from.
        attribute: The attribute with the caption in a json file next to an image; None for one with a usual name.
    """

    names: tuple[str, ...]
    keys: tuple[str, ...]
    captions: tuple[str | None, ...]
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
            text = _caption_next_to(os.path.splitext(path)[0], root, self.attribute) if caption is None else caption
            yield Sample(key, text, place, self.first + i, why="" if place else _NO_FILE, missing=place is None)

    def scan(self, *, uids: bool = False) -> Scanned:
        """Return the keys; reads nothing."""
        count = len(self.keys)
        return Scanned(self.keys, np.arange(self.first, self.first + count), np.ones(count, np.int64))

    def chosen(self, start_c: Ints) -> Iterator[Sample]:
        """Yield the samples with some indices."""
        for at in start_c.tolist():
            i = slice(at - self.first, at - self.first + 1)
            one = replace(self, first=at, rows=1, names=self.names[i], keys=self.keys[i], captions=self.captions[i])
            yield from one.samples()

    def separate_files(self, start_c: Ints) -> Iterator[Sequence[str]]:
        """Yield the image of each sample, and the files that may have its caption."""
        for i in (start_c - self.first).tolist():
            path = os.path.join(self.path, self.names[i])
            stem = os.path.splitext(path)[0]
            yield [path, *(stem + ending for ending in _BESIDE if self.captions[i] is None)]


def _walk(top: str) -> Iterator[tuple[str, list[str]]]:
    """Yield every folder at any depth, in order, and the names of its files."""
    for folder, inner, files in folders_below(top):
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        yield folder, files


def _is_picture(name: str) -> bool:
    ending = os.path.splitext(name)[1][1:].lower()
    return (ending in ENDINGS or ending in _OTHERS) and not name.startswith(".")


def _there(path: str, root: str) -> bool:
    """Return whether a path is a file and not a symlink to outside the folder."""
    return regular_file(path) is not None and inside(root, path) is not None


def _caption_next_to(stem: str, root: str, attribute: str | None) -> str:
    """Return the caption of ``stem.txt`` or ``stem.json``, or only this attribute of ``stem.json``."""
    for ending in (".json",) if attribute else _BESIDE:
        if _there(stem + ending, root):
            data = _start_of(stem + ending)
            try:
                content = parse_json(data) if ending == ".json" else data
            except ValueError:
                continue
            if isinstance(content, dict):
                return caption_in(content, (attribute,) if attribute else TEXTS)
            return "" if attribute else caption_of(content)
    return ""


def _start_of(path: str) -> bytes:
    def read() -> bytes:
        with open(path, "rb") as file:
            return file.read(_CAPTION)

    return trusting(path, read)
