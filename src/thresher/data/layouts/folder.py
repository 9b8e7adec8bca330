"""Samples of a folder of picture files, with captions beside them or in one file."""

from __future__ import annotations

import csv
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from thresher.data.location import Location
from thresher.data.options import DataOptions
from thresher.data.parts import Data, Ints, Part, Scanned
from thresher.data.samples import Place, Sample, caption_of
from thresher.errors import PoolError
from thresher.io.columns import CAPTIONS
from thresher.io.csv import rows as rows_of
from thresher.io.listing import natural
from thresher.io.open import trusting
from thresher.io.paths import inside, visible, writable
from thresher.io.pictures import ENDINGS
from thresher.runtime.random import digest

CAPTION_FILES = ("metadata.jsonl", "metadata.csv", "metadata.tsv", "metadata.parquet", "captions.txt", "captions.csv",
                 "captions.tsv", "captions.json", "captions.jsonl")  # fmt: skip
_OTHERS = ("avif", "cr2", "dng", "heic", "heif", "jp2", "jxl", "nef", "psd", "svg")  # not read: set aside, and said so
_NAMES = ("file_name", "filename", "filepath", "image_path", "image", "path", "image_name", "name")
_TEXTS = (*CAPTIONS, "comment")
_CAPTION = 1 << 20  # bytes of a caption, at most
_NO_FILE = "is no file, or a link to nowhere or out of the folder"


@dataclass(frozen=True)
class Folder:
    """A folder of pictures, at any depth; links to folders or out of it are not followed.

    Captions come from ``--captions FILE``; else, in every folder, from the first there is of ``metadata.jsonl``
    (Hugging Face), ``.csv``, ``.tsv``, ``.parquet``, ``captions.txt`` (picture and caption by tab or comma) and
    ``captions.json`` (COCO); where no folder has one, from ``NAME.txt`` or ``NAME.json`` beside the picture.
    """

    name: ClassVar[str] = "folder"
    rank: ClassVar[int] = 90
    looks_like: ClassVar[str] = "a folder of pictures"

    def recognise(self, where: Location) -> bool:
        """A folder on this machine with a picture in it."""
        return where.is_folder and any(_is_picture(name) for _, files in _walk(where.text) for name in files)

    def open(self, where: Location, options: DataOptions) -> Data:
        """List the pictures, and read the captions.

        Raises:
            PoolError: No picture there, or a file of captions that cannot be read or fits no picture.
        """
        names, tables = list[str](), [(options.captions_file, "")] if options.captions_file else []
        root = os.path.realpath(where.text)
        for folder, files in _walk(where.text):
            below = "" if folder == where.text else os.path.relpath(folder, where.text)
            names += [os.path.join(below, name) for name in files if _is_picture(name)]
            if options.captions and not options.captions_file:
                beside = (os.path.join(folder, name) for name in CAPTION_FILES if name in files)
                tables += [(path, below) for path in beside if _there(path, root)][:1]
        if not names:
            raise PoolError(f"{where.text}: holds no pictures ({', '.join(ENDINGS)})")
        place = os.path.abspath(where.text)
        coco = os.path.join(os.path.dirname(place), "annotations", f"captions_{os.path.basename(place)}.json")
        if options.captions and not tables and os.path.isfile(coco):
            tables = [(coco, "")]
        names.sort(key=natural)
        captions = _captions(where.text, names, tables)
        stems = [os.path.splitext(name)[0] for name in names]
        often = Counter(stems)
        often.update(names)  # the key of one picture may not be the name of another
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
            )
            for lo in range(0, len(names), step)
        ]
        return Data(where.text, self.name, tuple(parts))


@dataclass(frozen=True, kw_only=True)
class FolderPart(Part):
    """Pictures ``first`` to ``first + rows`` of a folder, and their captions."""

    names: tuple[str, ...]
    keys: tuple[str, ...]
    captions: tuple[str | None, ...]

    unit: ClassVar[str] = "picture"
    pictures_apart: ClassVar[bool] = True

    @property
    def has_uids(self) -> bool:
        """It has none."""
        return False

    def stamp(self) -> list[Any]:
        """Return a hash of its names, keys and captions: the time of a folder says nothing of the folders in it."""
        return [digest([self.names, self.keys, self.captions])[:32]]

    def samples(self) -> Iterator[Sample]:
        """Yield the samples; a caption that no file of captions gave is looked for beside the picture."""
        root = os.path.realpath(self.path)
        for i, (name, key, caption) in enumerate(zip(self.names, self.keys, self.captions, strict=True)):
            path = os.path.join(self.path, name)
            text = _beside(os.path.splitext(path)[0], root) if caption is None else caption
            good = _there(path, root)
            yield Sample(key, text, Place(path) if good else None, self.first + i, why="" if good else _NO_FILE)

    def scan(self, *, uids: bool = False) -> Scanned:
        """Return the keys; reads nothing."""
        count = len(self.keys)
        return Scanned(self.keys, np.arange(self.first, self.first + count), np.ones(count, np.int64))

    def chosen(self, start_c: Ints) -> Iterator[Sample]:
        """Yield the samples of some numbers."""
        for at in start_c.tolist():
            i = slice(at - self.first, at - self.first + 1)
            one = replace(self, first=at, rows=1, names=self.names[i], keys=self.keys[i], captions=self.captions[i])
            yield from one.samples()


def _walk(top: str) -> Iterator[tuple[str, list[str]]]:
    """Yield each folder at any depth, in order, and the names of its files."""
    for folder, inner, files in os.walk(top):
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        yield folder, files


def _is_picture(name: str) -> bool:
    ending = os.path.splitext(name)[1][1:].lower()
    return (ending in ENDINGS or ending in _OTHERS) and not name.startswith(".")


def _there(path: str, root: str) -> bool:
    """Return whether a file of a folder is one, and no link that leads out of the folder."""
    return os.path.isfile(path) and inside(root, path) is not None


def _beside(stem: str, root: str) -> str:
    """Return the caption of ``stem.txt`` or ``stem.json``."""
    for ending in (".txt", ".caption", ".json"):
        if _there(stem + ending, root):
            try:
                with open(stem + ending, "rb") as file:
                    found = file.read(_CAPTION)
                told = json.loads(found) if ending == ".json" else found
            except (OSError, ValueError, RecursionError):
                continue
            return _text(told) if isinstance(told, dict) else caption_of(told)
    return ""


def _captions(location: str, names: Sequence[str], tables: Sequence[tuple[str, str]]) -> Mapping[str, str]:
    """Return captions by picture, {} where no file has them; ``tables`` are files and the folders they speak of."""
    if not tables:
        return {}
    told: dict[str, str] = {}
    for path, below in tables:
        for name, text in trusting(path, lambda path=path: list(_rows(path))):  # type: ignore[misc]
            told.setdefault(os.path.normpath(os.path.join(below, name)), text)  # of several the first counts
    # A table may name pictures without their folder or ending, or with a folder that they have left: such a name counts
    # where it is one picture's alone.
    bases = Counter(map(os.path.basename, told))
    own = Counter(base for name in names for base in _bases(name))
    by_base = {os.path.basename(name): text for name, text in told.items() if bases[os.path.basename(name)] == 1}
    found = {}
    for name in names:
        tried = [told.get(name), told.get(os.path.splitext(name)[0])]
        tried += [by_base.get(base) for base in _bases(name) if own[base] == 1]
        found[name] = next((text for text in tried if text is not None), None)
    if not any(text is not None for text in found.values()):
        raise PoolError(f"{tables[0][0]}: names none of the {len(names):,} pictures in {location}")
    return {name: text or "" for name, text in found.items()}


def _bases(name: str) -> list[str]:
    base = os.path.basename(name)
    return [base, os.path.splitext(base)[0]]


def _rows(path: str) -> Iterator[tuple[str, str]]:
    """Yield (name of the picture, caption) of a file of captions."""
    if path.endswith(".json"):
        with open(path, encoding="utf-8-sig") as file:
            told = json.load(file)
        if isinstance(told, dict) and "annotations" in told:  # COCO
            files = {one["id"]: str(one["file_name"]) for one in told["images"]}
            yield from ((files[one["image_id"]], caption_of(one["caption"])) for one in told["annotations"])
        elif isinstance(told, dict):
            yield from ((str(name), caption_of(text)) for name, text in told.items())
        else:
            yield from (_named(row, path) for row in told)
    elif path.endswith(".jsonl"):
        with open(path, encoding="utf-8-sig") as file:
            yield from (_named(json.loads(line), path) for line in file if line.strip())
    elif path.endswith(".parquet"):
        import pyarrow.parquet as pq

        for batch in pq.ParquetFile(path).iter_batches():
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
                # In a line without quotes a caption may hold commas of its own.
                whole = row[text:] if text == len(names) - 1 and text > at else [row[text]]
                yield row[at].strip(), caption_of((" " if delimiter == "\t" else ",").join(whole))


def _named(row: Any, path: str) -> tuple[str, str]:
    if not isinstance(row, dict):
        raise PoolError(f"{path}: a row of it is no object with file_name and text")
    name = next((row[one] for one in _NAMES if isinstance(row.get(one), str)), None)
    if name is None:
        raise PoolError(
            f"{path}: a row names no picture ({', '.join(_NAMES)}); it has {visible(', '.join(map(str, row)))}"
        )
    return name, _text(row)


def _text(row: Mapping[str, Any]) -> str:
    return next(filter(None, (caption_of(row.get(name)) for name in _TEXTS)), "")
