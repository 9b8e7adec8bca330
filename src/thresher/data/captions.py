"""Files with the captions of a folder of images: csv, jsonl, Parquet, and json in several structures."""

from __future__ import annotations

import os
import posixpath
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import IO, Any

from thresher.data.cells import is_file_name, with_slashes
from thresher.data.files import stem_of
from thresher.data.options import DataOptions
from thresher.data.rows import RowReader, is_text
from thresher.errors import PoolError
from thresher.io.columns import FILES, known
from thresher.io.csv import Lines, header, rows
from thresher.io.open import open_file, trusting
from thresher.io.parquet import open_parquet
from thresher.io.paths import composed, visible
from thresher.runtime.untrusted import load_json, parse_json

JSONL = (".jsonl", ".ndjson")
JSON_LINE = 1 << 24  # maximum bytes of a line of jsonl
_JSON = 1 << 32  # maximum bytes of a json file
_TOKEN = re.compile(r"#\d+$")  # the number of a caption, behind the name of its image, in Flickr8k.token.txt


def captions_in_files(
    location: str, names: Sequence[str], tables: Sequence[tuple[str, str]], options: DataOptions
) -> tuple[Mapping[str, str], int]:
    """Return the captions of images, "" for an image without one, and how many names in the files match no image.

    Args:
        location: The folder, for messages.
        names: Paths of the images in it.
        tables: Files of captions, and the folders that they describe. If there are none, the captions are {}.
        options: Columns of the image and the caption, and whether the user named the file.

    Raises:
        PoolError: A file cannot be read, has no column of images or captions, or no image is named.
        UsageError: There is no column that the user named.
    """
    if not tables:
        return {}, 0
    by_name: dict[str, str] = {}
    own_names = set(names)
    for path, below in tables:
        for name, text in trusting(path, partial(_pairs, path, options)):
            place = os.path.join(below, name)
            place = place if place in own_names else os.path.join(below, with_slashes(name))
            by_name.setdefault(os.path.normpath(place), text)  # the first one is used
    # A table may name images without their folder or extension, with an old folder, or with letters that are composed
    # of others than on the disk. Such a name is used if it belongs to only one image.
    own = Counter(other for name in names for other in _others(name))
    by_other: dict[str, str] = {}  # of names that are the same, none
    for name in by_name:
        for other in {composed(name), composed(os.path.basename(name))}:
            by_other[other] = "" if other in by_other else name
    captions: dict[str, str] = {}
    used = set[str]()
    for name in names:
        tried = [name, stem_of(name), *(by_other.get(other, "") for other in _others(name) if own[other] == 1)]
        if found := next((one for one in tried if one in by_name), ""):
            captions[name] = by_name[found]
            used.add(found)
    if not used:
        one = f"it names {visible(next(iter(by_name)), 80)}" if by_name else "it names no image"
        raise PoolError(
            f"{tables[0][0]}: names none of the {len(names):,} images in {location}: {one}, an image of the folder is "
            f"{visible(names[0], 80)}"
        )
    return {name: captions.get(name, "") for name in names}, len(by_name) - len(used)


def _others(name: str) -> list[str]:
    """Return other names that a table may have for an image, each once."""
    whole = composed(name)
    base = os.path.basename(whole)
    return list(dict.fromkeys((whole, stem_of(whole), base, stem_of(base))))


def _pairs(path: str, options: DataOptions) -> list[tuple[str, str]]:
    """Return (name of the image, caption) of each row that names an image."""
    reader = RowReader(options)
    try:
        pairs = [pair for row in _rows(path, options) if (pair := reader.of(row))[0]]
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"its structure is not that of captions: {type(error).__name__}: {error}") from error
    reader.check_images(path, in_folder=True)
    reader.check_captions(path, needed=options.captions_file is not None)
    return pairs


def _rows(path: str, options: DataOptions) -> Iterator[Mapping[str, Any]]:
    ending = os.path.splitext(path)[1].lower()
    with open_file("file", path) as file:
        if ending == ".json":
            found = _rows_of_json(load_json(file, _JSON))
        elif ending in JSONL:
            found = (parse_json(line) for line in Lines(file, path, most=JSON_LINE) if line.strip())
        elif ending == ".parquet":
            found = (row for batch in open_parquet(file).iter_batches() for row in batch.to_pylist())
        else:
            found = _rows_of_lines(file, path, options)
        for row in found:
            if not isinstance(row, dict):
                raise PoolError(f"{path}: a row is not an object with file_name and text")
            yield row


def _rows_of_json(content: Any) -> Iterator[Any]:
    """Yield the rows of a list, of COCO's or Karpathy's json, of ``{"data": [...]}``, or of an object by image."""
    if isinstance(content, dict) and {"images", "annotations"} <= content.keys():  # COCO
        files = {one["id"]: str(one["file_name"]) for one in content["images"]}
        content = ({**one, "file_name": files[one["image_id"]]} for one in content["annotations"])
    elif isinstance(content, dict):
        content = _list_in(content) or map(_named, content, content.values())
    for row in content:
        if isinstance(row, dict) and "sentences" in row and isinstance(row.get("filepath"), str):  # Karpathy
            row = {**row, "file_name": posixpath.join(row["filepath"], row["filename"])}
        yield row


def _list_in(content: Mapping[str, Any]) -> Any:
    """Return the rows in an object: those of "images" or "data", else of its single list of objects; None if none."""
    lists = {name: value for name, value in content.items() if isinstance(value, list) and value[:1] and
             isinstance(value[0], dict)}  # fmt: skip
    for name in ("images", "data"):
        if name in lists:
            return lists[name]
    return next((value for name, value in lists.items() if len(lists) == 1 and not is_file_name(name)), None)


def _named(name: str, value: Any) -> Mapping[str, Any]:
    """Return the row of a value in an object by image: a caption, several, or an object."""
    first = value[0] if isinstance(value, list) and value else value
    if isinstance(first, dict):
        return first if known(first, FILES) else {"file_name": name, **first}
    return {"file_name": name, "caption": value}


def _rows_of_lines(file: IO[bytes], path: str, options: DataOptions) -> Iterator[Mapping[str, Any]]:
    """Yield the rows of a csv; the first line may be a row if it is an image and a caption."""
    columns, delimiter, end = header(file, path, [name for name in (options.image, options.caption) if name])
    if len(columns) == 2 and delimiter in "\t," and is_file_name(_TOKEN.sub("", columns[0])) and is_text(columns[1]):
        if delimiter == "\t" and _TOKEN.search(columns[0]):  # Flickr8k; quotes are not special
            for line in Lines(file, path):
                name, _, text = line.partition("\t")
                yield {"image": _TOKEN.sub("", name.strip()), "caption": text}
            return
        columns, end = ["image", "caption"], 0
    joint = " " if delimiter == "\t" else delimiter
    last = len(columns) - 1
    for _, _, row in rows(file, path, end, delimiter):
        # In a line without quotes the caption, if it is the last column, may contain delimiters.
        row[last:] = [joint.join(row[last:])] if len(row) > last else []
        yield dict(zip(columns, row, strict=False))
