"""Folders of image files, with captions next to the images or in one file."""

from __future__ import annotations

import csv
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import numpy as np

from thresher.data.location import Location
from thresher.data.options import DataOptions
from thresher.data.parts import Data, Ints, Part, Scanned
from thresher.data.samples import Place, Sample, caption_of
from thresher.errors import PoolError
from thresher.io.columns import CAPTIONS
from thresher.io.csv import rows as rows_of
from thresher.io.listing import folders_below, natural
from thresher.io.open import file_stamp, regular_file, trusting
from thresher.io.parquet import open_parquet
from thresher.io.paths import inside, visible, writable
from thresher.io.pictures import ENDINGS
from thresher.runtime.random import digest
from thresher.runtime.untrusted import load_json, parse_json

CAPTION_FILES = ("metadata.jsonl", "metadata.csv", "metadata.tsv", "metadata.parquet", "captions.txt", "captions.csv",
                 "captions.tsv", "captions.json", "captions.jsonl")  # fmt: skip
_OTHERS = ("avif", "cr2", "dng", "heic", "heif", "jp2", "jxl", "nef", "psd", "svg")  # unsupported: skipped and reported
_NAMES = ("file_name", "filename", "filepath", "image_path", "image", "path", "image_name", "name")
_TEXTS = (*CAPTIONS, "comment")
_BESIDE = (".txt", ".caption", ".json")  # endings of a caption file next to an image
_CAPTIONS = 1 << 32  # maximum bytes of a file with the captions of all images
_CAPTION = 1 << 20  # maximum bytes of a caption file
_NO_FILE = "is not a regular file, is a broken symlink, or links outside the folder"


@dataclass(frozen=True)
class Folder:
    """A folder of images, at any depth; symlinks to folders, or to files outside the folder, are not followed.

    Captions come from ``--captions FILE``; else, in every folder, from the first of these files that exists:
    ``metadata.jsonl`` (Hugging Face), ``.csv``, ``.tsv``, ``.parquet``, ``captions.txt`` (image and caption separated
    by a tab or a comma) and ``captions.json`` (COCO); if no folder has such a file, from ``NAME.txt`` or ``NAME.json``
    next to the image.
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
            PoolError: There is no image, or a caption file cannot be read or matches no image.
        """
        names, tables = list[str](), [(options.captions_file, "")] if options.captions_file else []
        root = os.path.realpath(where.text)
        for folder, files in _walk(where.text):
            below = "" if folder == where.text else os.path.relpath(folder, where.text)
            names += [os.path.join(below, name) for name in files if _is_picture(name)]
            if options.captions and not options.captions_file:
                candidates = (os.path.join(folder, name) for name in CAPTION_FILES if name in files)
                tables += [(path, below) for path in candidates if _there(path, root)][:1]
        if not names:
            raise PoolError(f"{where.text}: contains no images ({', '.join(ENDINGS)})")
        place = os.path.abspath(where.text)
        coco = os.path.join(os.path.dirname(place), "annotations", f"captions_{os.path.basename(place)}.json")
        if options.captions and not tables and os.path.isfile(coco):
            tables = [(coco, "")]
        names.sort(key=natural)
        captions = _captions(where.text, names, tables)
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
    """

    names: tuple[str, ...]
    keys: tuple[str, ...]
    captions: tuple[str | None, ...]
    tables: tuple[str, ...] = ()

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
            text = _caption_next_to(os.path.splitext(path)[0], root) if caption is None else caption
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


def _caption_next_to(stem: str, root: str) -> str:
    """Return the caption of ``stem.txt`` or ``stem.json``."""
    for ending in _BESIDE:
        if _there(stem + ending, root):
            data = _start_of(stem + ending)
            try:
                content = parse_json(data) if ending == ".json" else data
            except ValueError:
                continue
            return _text(content) if isinstance(content, dict) else caption_of(content)
    return ""


def _start_of(path: str) -> bytes:
    def read() -> bytes:
        with open(path, "rb") as file:
            return file.read(_CAPTION)

    return trusting(path, read)


def _captions(location: str, names: Sequence[str], tables: Sequence[tuple[str, str]]) -> Mapping[str, str]:
    """Return captions by image, {} if there is no caption file; ``tables`` are files and the folders they describe."""
    if not tables:
        return {}
    by_name: dict[str, str] = {}
    for path, below in tables:
        for name, text in trusting(path, partial(_all_rows, path)):
            by_name.setdefault(os.path.normpath(os.path.join(below, name)), text)  # the first one is used
    # A table may name images without their folder or extension, or with an old folder. Such a name is used if it
    # belongs to only one image.
    bases = Counter(map(os.path.basename, by_name))
    own = Counter(base for name in names for base in _bases(name))
    by_base = {os.path.basename(name): text for name, text in by_name.items() if bases[os.path.basename(name)] == 1}
    captions = {}
    for name in names:
        tried = [by_name.get(name), by_name.get(os.path.splitext(name)[0])]
        tried += [by_base.get(base) for base in _bases(name) if own[base] == 1]
        captions[name] = next((text for text in tried if text is not None), None)
    if not any(text is not None for text in captions.values()):
        raise PoolError(f"{tables[0][0]}: names none of the {len(names):,} images in {location}")
    return {name: text or "" for name, text in captions.items()}


def _bases(name: str) -> list[str]:
    base = os.path.basename(name)
    return [base, os.path.splitext(base)[0]]


def _all_rows(path: str) -> list[tuple[str, str]]:
    try:
        return list(_rows(path))
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"its structure is not that of captions: {type(error).__name__}: {error}") from error


def _rows(path: str) -> Iterator[tuple[str, str]]:
    """Yield (name of the image, caption) from a caption file."""
    if path.endswith(".json"):
        with open(path, "rb") as file:
            content = load_json(file, _CAPTIONS)
        if isinstance(content, dict) and "annotations" in content:  # COCO
            files = {one["id"]: str(one["file_name"]) for one in content["images"]}
            yield from ((files[one["image_id"]], caption_of(one["caption"])) for one in content["annotations"])
        elif isinstance(content, dict):
            yield from ((str(name), caption_of(text)) for name, text in content.items())
        else:
            yield from (_named(row, path) for row in content)
    elif path.endswith(".jsonl"):
        with open(path, encoding="utf-8-sig") as file:
            yield from (_named(parse_json(line), path) for line in file if line.strip())
    elif path.endswith(".parquet"):
        with open(path, "rb") as raw:
            for batch in open_parquet(raw).iter_batches():
                yield from (_named(row, path) for row in batch.to_pylist())
    else:
        yield from _lines(path)


def _lines(path: str) -> Iterator[tuple[str, str]]:
    with open(path, "rb") as file:
        first = file.readline(1 << 20)
        delimiter = "\t" if b"\t" in first else ","
        names = next(csv.reader([first.decode("utf-8-sig", "replace")], delimiter=delimiter), [])
        at = next((i for i, name in enumerate(names) if name.strip().lower() in _NAMES), None)
        text = next((i for i, name in enumerate(names) if name.strip().lower() in _TEXTS), None)
        named = at is not None and text is not None
        if at is None or text is None:
            at, text = 0, 1
        for _, _, row in rows_of(file, path, len(first) if named else 0, delimiter):
            if len(row) > max(at, text):
                # In a line without quotes the caption may contain commas.
                whole = row[text:] if text == len(names) - 1 and text > at else [row[text]]
                yield row[at].strip(), caption_of((" " if delimiter == "\t" else ",").join(whole))


def _named(row: Any, path: str) -> tuple[str, str]:
    if not isinstance(row, dict):
        raise PoolError(f"{path}: a row is not an object with file_name and text")
    name = next((row[one] for one in _NAMES if isinstance(row.get(one), str)), None)
    if name is None:
        raise PoolError(
            f"{path}: a row names no image ({', '.join(_NAMES)}); it has {visible(', '.join(map(str, row)))}"
        )
    return name, _text(row)


def _text(row: Mapping[str, Any]) -> str:
    return next(filter(None, (caption_of(row.get(name)) for name in _TEXTS)), "")
