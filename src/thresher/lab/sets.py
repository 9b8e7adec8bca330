"""Evaluation sets of all kinds: parquet, webdatasets of CLIP_benchmark, folders of classes, Hugging Face datasets."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import numpy.typing as npt

from thresher.data import Data, DataOptions, open_data
from thresher.data.layouts.webdataset import TarPart
from thresher.errors import PoolError, UsageError, suggest
from thresher.evaluation.sets import LABELS, TEXTS, Labels, read_eval
from thresher.io.open import open_file
from thresher.io.tar import Window, tar_samples
from thresher.runtime.format import counted
from thresher.runtime.untrusted import parse_json

Ints = npt.NDArray[np.int64]

_PICTURES = ("webp", "png", "jpg", "jpeg")  # members of a webdataset of CLIP_benchmark
_SHARDS, _CLASSES, _TEMPLATES = "nshards.txt", "classnames.txt", "zeroshot_classification_templates.txt"
_TYPE = "dataset_type.txt"
_BYTES = 2**24  # of a text file next to a set
_MOST_SHARDS = 100_000
_DIGITS = 9  # of the number of a class or a file
_TRAIN, _TEST = ("train",), ("test", "val", "validation")


@dataclass(frozen=True, eq=False)
class LabelledSet:
    """Images with captions, labels or both, in the order of :attr:`pictures`.

    Attributes:
        name: The name in results.
        pictures: Yields the encoded image of every row.
        texts: The M captions.
        text_row_M: (M,) the row of each caption.
        group_N: (N,) the group of each row.
        labels: Classes by label column.
        templates: Prompts that the set brings along, with {} for the class; () for none.
        train: The rows to fit kNN and probes on; None if the set has none.
    """

    name: str
    pictures: Callable[[], Iterator[bytes]] = field(repr=False)
    texts: tuple[str, ...] = field(repr=False)
    text_row_M: Ints = field(repr=False)
    group_N: Ints = field(repr=False)
    labels: Mapping[str, Labels]
    templates: tuple[str, ...] = ()
    train: LabelledSet | None = None

    def __len__(self) -> int:
        """Return N."""
        return len(self.group_N)


def open_set(
    path: str,
    *,
    train: str | None = None,
    labels: Sequence[str] = (),
    group: str | None = None,
    text: str | None = None,
) -> LabelledSet:
    """Open an evaluation set; captions and labels are read, images later.

    Args:
        path: Parquet; a folder as CLIP_benchmark writes it, with ``test/nshards.txt`` and tars; a folder with a folder
            of images per class, or with ``train`` and ``test`` of these; a Hugging Face dataset saved to disk; or any
            other data that :func:`thresher.data.open_data` reads.
        train: Rows to fit kNN and probes on, of the same kinds; by default the train split next to the set.
        labels: Label columns; by default ``label_name``, else ``label``, ``cls`` or the folder of the image.
        group: Column of groups; by default ``group``.
        text: Column of captions.

    Raises:
        PoolError: It is missing, damaged, or of no known kind.
        UsageError: A named column is missing, or it has neither captions nor labels.
    """
    how: dict[str, Any] = {"labels": tuple(labels), "group": group, "text": text}
    split = _split_of(path, _TEST)
    found = _opened(split or path, path, **how)
    beside = None if split is None else _split_of(path, _TRAIN)
    rows = train or beside
    if rows is not None and found.labels:
        names = {column: one.names for column, one in found.labels.items()}
        fitted = _opened(rows, path, labels=tuple(found.labels), group=group, text=text)
        found = replace(found, train=_with_classes(fitted, names))
    if not found.texts and not found.labels:
        where = split or path
        tars = os.path.isdir(where) and any(name.lower().endswith(".tar") for name in os.listdir(where))
        numbered = f"; a webdataset of CLIP_benchmark has the number of its tars in {where}/{_SHARDS}" if tars else ""
        raise UsageError(f"{path}: has neither captions nor labels; name a column with --label or --text{numbered}")
    return found


def _opened(path: str, whole: str, *, labels: tuple[str, ...], group: str | None, text: str | None) -> LabelledSet:
    name = PurePath(os.path.normpath(whole)).stem or "set"
    if os.path.isfile(os.path.join(path, _SHARDS)):
        return _webdataset(path, whole, name)
    if _tables(path):
        one = read_eval(path, text=text, group=group, labels=labels or None)
        pictures = lambda: (picture for _, part in one.batches() for picture in part)  # noqa: E731
        named = {column: _hub_names(path, column, found) for column, found in one.labels.items()}
        return LabelledSet(name, pictures, one.texts, one.text_row_M, one.group_N, named)
    return _raw(path, name, labels, group, text)


def _tables(path: str) -> list[str]:
    """Return a parquet file, or those in a folder, sorted."""
    paths = sorted(str(one) for one in Path(path).iterdir()) if os.path.isdir(path) else [path]
    return [one for one in paths if one.lower().endswith(".parquet")]


def _split_of(path: str, names: Sequence[str]) -> str | None:
    """Return the folder of a split below a folder, None if there is none."""
    return next((where for name in names if os.path.isdir(where := os.path.join(path, name))), None)


# --- CLIP_benchmark -------------------------------------------------------------------------------


def _webdataset(split: str, whole: str, name: str) -> LabelledSet:
    """Open a split of a webdataset of CLIP_benchmark: numbered tars with images, and classes or captions."""
    count = _text(os.path.join(split, _SHARDS)).strip()
    if not _is_index(count) or not 0 < int(count) <= _MOST_SHARDS:
        raise PoolError(f"{split}/{_SHARDS}: has {count[:40]!r}; expected the number of tars")
    tars = [os.path.join(split, f"{number}.tar") for number in range(int(count))]
    retrieval = _optional(os.path.join(whole, _TYPE)).strip().lower() == "retrieval"
    texts: list[str] = []
    owners: list[int] = []
    index: list[int] = []
    for row, (_, _, note) in enumerate(_members(tars, "txt" if retrieval else "cls")):
        if retrieval:
            lines = note.decode("utf-8", "replace").splitlines()
            texts += lines
            owners += [row] * len(lines)
            index.append(-1)
        else:
            cell = note.decode("utf-8", "replace").strip()
            if not _is_index(cell):
                raise PoolError(f"{whole}: sample {row:,} has the class {cell[:40]!r}; expected a whole number")
            index.append(int(cell))
    if not index:
        raise PoolError(f"{whole}: its tars have no samples")
    for warning in Data(split, "webdataset", tuple(map(TarPart, tars))).without_end():
        warnings.warn(f"{split}: {warning}", stacklevel=2)
    names = tuple(_optional(os.path.join(whole, _CLASSES)).rstrip().splitlines())
    if blank := next((at for at, line in enumerate(names, 1) if not line.strip()), 0):
        raise PoolError(f"{whole}/{_CLASSES}: line {blank} is blank, so that the classes after it would be others")
    labels: dict[str, Labels] = {}
    if not retrieval:
        if not names:
            raise PoolError(f"{whole}: has no {_CLASSES} with the name of a class per line")
        if max(index) >= len(names):
            named = counted(len(names), "name")
            raise PoolError(f"{whole}: has the class {max(index):,}, but {named} in {_CLASSES}; classes count from 0")
        labels["cls"] = Labels(names, np.array(index, np.int64))
    templates = tuple(
        line.replace("{c}", "{}") for line in _optional(os.path.join(whole, _TEMPLATES)).splitlines() if line
    )
    if odd := next((line for line in templates if "{}" not in line), ""):
        raise PoolError(f"{whole}/{_TEMPLATES}: {odd[:80]!r} has no {{c}} for the name of a class")
    return LabelledSet(
        name, lambda: (picture for _, picture, _ in _members(tars, None)), tuple(texts), np.array(owners, np.int64),
        np.arange(len(index)), labels, templates,
    )  # fmt: skip


def _members(tars: Sequence[str], wanted: str | None) -> Iterator[tuple[str, bytes, bytes]]:
    """Yield key, image and another member of each sample; one of the two is read, the other is b""."""
    for path in tars:
        with open_file("file", path) as file:
            window = Window(file, path)
            for sample in tar_samples(window, path):
                ending = wanted or next((one for one in _PICTURES if one in sample.members), None)
                if ending is None or ending not in sample.members:
                    need = f".{wanted}" if wanted else "image"
                    raise PoolError(f"{path}: the sample {sample.key!r} has no {need}")
                member = sample.members[ending]
                content = window.read(member.offset, member.size)
                yield (sample.key, b"", content) if wanted else (sample.key, content, b"")


def _is_index(text: str) -> bool:
    """Return whether a text is a whole number of a size that classes and files can have."""
    return text.isascii() and text.isdecimal() and len(text) <= _DIGITS


def _text(path: str) -> str:
    with open_file("file", path) as file:
        return file.read(_BYTES).decode("utf-8", "replace")


def _optional(path: str) -> str:
    return _text(path) if os.path.isfile(path) else ""


# --- other data -----------------------------------------------------------------------------------


def _raw(path: str, name: str, labels: tuple[str, ...], group: str | None, text: str | None) -> LabelledSet:
    """Open folders of classes, Arrow files and other data."""
    options = DataOptions(captions=False, caption=text)
    try:
        opened = open_data(path, options)
    except UsageError as error:  # evaluations name the option in their own way
        raise UsageError(str(error).replace("--caption", "--text")) from None
    texts: list[str] = []
    owners: list[int] = []
    columns: dict[str, list[Any]] = {column: [] for column in opened.columns}
    folders: list[str] = []
    rows = 0
    for sample in opened.samples():
        if sample.picture is None:
            raise PoolError(f"{path}: row {rows:,} has no image ({sample.why}); evaluations do not skip rows")
        for caption in _captions(sample, columns):
            texts.append(caption)
            owners.append(rows)
        for column, cells in columns.items():
            cells.append(sample.columns.get(column))
        key = sample.key.replace(os.sep, "/")
        folders.append(key.split("/")[0] if "/" in key else "")
        rows += 1
    if not rows:
        raise PoolError(f"{path}: has no images")
    if len(set(folders)) > 1 and all(folders) and opened.kind == "folder":
        columns["folder"] = folders
    for wanted in (*labels, *([group] if group else [])):
        if wanted not in columns:
            known = ", ".join(columns) or "none"
            raise UsageError(f"{path}: has no column {wanted!r}; it has {known}.{suggest(wanted, columns)}")
    usual = next(([column] for column in (*LABELS, "folder") if column in columns), [])
    chosen = {column: _hub_names(path, column, _labels(path, column, columns[column])) for column in labels or usual}
    grouped = group or ("group" if "group" in columns else None)
    groups = np.arange(rows)
    if grouped:
        values = columns[grouped]
        if None in values:
            raise UsageError(f"{path}: row {values.index(None):,} has no {grouped!r}; give every row a group")
        groups = np.unique(np.array([str(cell) for cell in values]), return_inverse=True)[1].astype(np.int64)
    if texts and (without := rows - len(set(owners))):
        warnings.warn(
            f"{path}: {without:,} of {rows:,} images have no caption; retrieval is not measured", stacklevel=2
        )
        texts, owners = [], []
    for warning in opened.without_end():
        warnings.warn(f"{path}: {warning}", stacklevel=2)
    pictures = lambda: (sample.stored() for sample in open_data(path, options).samples())  # noqa: E731
    return LabelledSet(name, pictures, tuple(texts), np.array(owners, np.int64), groups, chosen)


def _captions(sample: Any, columns: Mapping[str, Any]) -> list[str]:
    """Return all captions of a sample: a list of them, else the one caption."""
    for column in TEXTS:
        cell = sample.columns.get(column) if column in columns else None
        if isinstance(cell, list) and cell and all(isinstance(one, str) and one.strip() for one in cell):
            return list(cell)
    return [sample.text] if sample.text else []


def _labels(path: str, column: str, cells: Sequence[Any]) -> Labels:
    there = {cell for cell in cells if cell is not None}
    if not there or not (all(isinstance(c, str) for c in there) or all(type(c) in (int, bool) for c in there)):
        raise UsageError(f"{path}: column {column!r} has neither text nor whole numbers; name a label column")
    ordered = sorted(there)
    number = {cell: i for i, cell in enumerate(ordered)}
    index = np.array([-1 if cell is None else number[cell] for cell in cells], np.int64)
    return Labels(tuple(map(str, ordered)), index)


def _hub_names(path: str, column: str, labels: Labels) -> Labels:
    """Return labels with the class names that a Hugging Face dataset has for its numbers."""
    if not all(map(_is_index, labels.names)):
        return labels
    feature = _feature(path).get(column)
    names = feature.get("names") if isinstance(feature, dict) else None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return labels
    old = [int(name) for name in labels.names]
    if max(old) >= len(names):
        return labels
    index = np.array([-1 if i < 0 else old[i] for i in labels.index_N.tolist()], np.int64)
    return Labels(tuple(names), index)


def _feature(path: str) -> dict[str, Any]:
    """Return the features of a Hugging Face dataset: of its dataset_info.json, or of the schema of its files."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if os.path.isfile(info := os.path.join(path, "dataset_info.json")):
            found = parse_json(_text(info))
        else:
            tables = _tables(path)
            if not tables:
                return {}
            meta = pq.read_schema(tables[0]).metadata or {}
            found = parse_json(meta.get(b"huggingface", b"{}")).get("info", {})
        features = found.get("features", {})
    except (OSError, ValueError, AttributeError, pa.ArrowException):
        return {}
    return features if isinstance(features, dict) else {}


def _with_classes(rows: LabelledSet, names: Mapping[str, tuple[str, ...]]) -> LabelledSet:
    """Return rows whose classes are numbered as those of another set; rows of other classes have none."""
    labels = {}
    for column, wanted in names.items():
        own = rows.labels.get(column)
        if own is None:
            raise UsageError(f"{rows.name}: the rows to fit on have no column {column!r}")
        number = {name: i for i, name in enumerate(wanted)}
        index = np.array([-1 if i < 0 else number.get(own.names[i], -1) for i in own.index_N.tolist()], np.int64)
        labels[column] = Labels(wanted, index)
    return replace(rows, labels=labels)
