"""Embed data in memory: it is written to a Parquet file, which is embedded like any other data."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from thresher.data import DataOptions
from thresher.embedding.pipeline import Embedded, EmbedSettings
from thresher.embedding.pipeline import embed as embed_files
from thresher.embedding.pool import SET_ASIDE
from thresher.errors import UsageError
from thresher.io.columns import CAPTIONS, IMAGES, KEYS
from thresher.io.pictures import bytes_of
from thresher.io.places import place
from thresher.pool.layout import Skipped
from thresher.pool.memory import by_position, from_arrays
from thresher.pool.store import EmbeddingStore, open_store
from thresher.runtime.config import cache_folder
from thresher.runtime.files import writing
from thresher.runtime.format import counted
from thresher.runtime.progress import Progress

_FOLDER = "joined"  # of the cache
_ROWS = 256  # of a row group

_WRITTEN = re.compile(r"^.*data-[0-9a-f]{32}\.parquet, ")  # the file that samples are written to, in messages

Samples = Any  # a Hugging Face Dataset or IterableDataset, or images, pairs or dictionaries in a sequence
_GIVE = (
    "give a path or URL, a Hugging Face Dataset or IterableDataset, or a list of images (PIL images, bytes or paths), "
    "of pairs (image, caption) or of dictionaries"
)


def embed_samples(
    data: Samples,
    captions: Sequence[str] | None,
    out: str | os.PathLike[str] | None,
    settings: EmbedSettings,
    *,
    report: Callable[[Embedded], object] | None = None,
    **how: Any,
) -> EmbeddingStore | Embedded:
    """Embed data to a pool on disk, or without ``out`` to a pool in memory; see :func:`thresher.embed`.

    With ``shard``, the share of one job: the counts are returned.

    Args:
        data: Files, or samples in memory.
        captions: N captions, for a list of images.
        out: Folder of the pool.
        settings: The options.
        report: Called with the counts; by default they are reported as progress.
        **how: Further arguments of :func:`thresher.embedding.pipeline.embed`.
    """
    if (job := how.get("shard")) is not None and (out is None or not isinstance(data, (str, os.PathLike))):
        raise UsageError(f"shard {job}: jobs share files, and a pool on disk; give the location of data, and out=")
    if isinstance(data, (str, os.PathLike)):
        if captions is not None:
            raise UsageError("captions= is for images in a list; files have their own captions")
        return _embedded(os.fspath(data), out, settings, None, report, how)
    columns = _columns(data, captions, settings.data)
    settings = replace(settings, data=DataOptions(image="image", caption=columns.caption, key=columns.key))
    with tempfile.TemporaryDirectory(prefix="thresher-data-") as scratch:
        # A pool on disk remembers its data, so that the same call resumes: the file stays in the cache.
        folder = Path(scratch) if out is None else Path(cache_folder()) / _FOLDER
        random_access = columns if isinstance(columns, _Columns) else None
        return _embedded(_written(columns, folder), out, settings, random_access, report, how)


def _embedded(
    data: str,
    out: str | os.PathLike[str] | None,
    settings: EmbedSettings,
    columns: _Columns | None,
    report: Callable[[Embedded], object] | None,
    how: Mapping[str, Any],
) -> EmbeddingStore | Embedded:
    with tempfile.TemporaryDirectory(prefix="thresher-pool-") as scratch:
        target = Path(scratch) / "pool" if out is None else place(out)
        result = embed_files(data, target, settings, **how)
        (report or partial(_say, how["progress"]))(result)
        if how.get("shard") is not None:
            return result
        store = open_store(str(target))
        return store if out is not None else _held(store, Path(scratch) / "pool", columns)


def _say(progress: Progress, result: Embedded) -> None:
    for note in result.notes:
        progress.say(note)
    if result.skipped:
        progress.say(f"{counted(result.skipped, 'sample')} cannot be used and have no row")


def _held(store: EmbeddingStore, folder: Path, columns: _Columns | None) -> EmbeddingStore:
    """Return a pool read into memory."""
    import pyarrow as pa

    names = [name for name in store.columns if name not in ("shard", "filepath")]
    table = pa.Table.from_batches([part for _, part in store.scan(names)])
    vectors: dict[str, Any] = {
        name: np.concatenate([np.array(store.raw(name, block)) for block in store.blocks(name)])
        for name in store.layout.vectors
    }
    rows = table.column("offset").to_numpy() if "offset" in table.column_names else None
    pictures = None if columns is None or rows is None else partial(_picture, columns, rows)
    kept = table.select([name for name in table.column_names if name not in ("offset", "thumbnail")])
    made = from_arrays(**vectors, keys=store.layout.key, captions=store.layout.caption, table=kept, images=pictures)
    skipped = []
    if (lines := folder / SET_ASIDE).exists():
        for line in lines.read_text(encoding="utf-8").splitlines():
            sample, _, why = _WRITTEN.sub("sample ", line).partition(": ")
            skipped.append(Skipped(sample, why))
    return replace(made, layout=replace(made.layout, skipped=tuple(skipped)))


def _picture(columns: _Columns, rows: Any, row: int) -> bytes:
    return columns.image(int(rows[row]))


# --- samples --------------------------------------------------------------------------------------


class _Columns:
    """Data in memory as columns: images as bytes, captions, keys, and other columns of a Dataset."""

    def __init__(self, count: int, image: Any, captions: Any, other: Any = None, key: str | None = None) -> None:
        """Store the number of samples and functions of the row number."""
        self.count, self._image, self._captions, self.other = count, image, captions, other
        self.caption = None if captions is None else "caption"
        self.key = key or "key"

    def image(self, row: int) -> bytes:
        """Return the bytes of an image, b"" if it is missing."""
        return bytes_of(self._image(row), f"the image of sample {row:,}")

    def batches(self) -> Iterator[dict[str, Any]]:
        """Yield columns, some rows at a time."""
        for lo in range(0, self.count, _ROWS):
            rows = range(lo, min(lo + _ROWS, self.count))
            batch: dict[str, Any] = {} if self.other is None else {**self.other[rows.start : rows.stop]}
            batch["image"] = [self.image(row) for row in rows]
            if self._captions is not None:
                batch["caption"] = [self._captions(row) for row in rows]
            if self.key not in batch:
                batch["key"] = [str(row) for row in rows]
            yield batch


class _Stream:
    """A Hugging Face IterableDataset as columns, which are read once; images are not decoded."""

    def __init__(self, data: Any, options: DataOptions) -> None:
        """Find the columns.

        Raises:
            UsageError: A column is missing.
        """
        import datasets

        self.data = data.with_format(None)
        features = self.data.features or {}
        names = list(features) or list(next(iter(self.data), {}))
        if not names:
            raise UsageError("there are no samples")
        pictures = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
        self._image, caption, key = _roles(names, pictures, options, "stream")
        for name in pictures:
            self.data = self.data.cast_column(name, datasets.Image(decode=False))
        self.caption, self._caption, self.key = "caption" if caption else None, caption, key or "key"
        own = {*pictures, self._image, caption, "image", "caption", *(["key"] if key is None else [])}
        self._types: dict[str, Any] = {} if key is None else {key: None}
        if features:
            self._types = {name: datasets.Features({name: features[name]}).arrow_schema.field(name).type
                           for name in names if name not in own}  # fmt: skip

    def batches(self) -> Iterator[dict[str, Any]]:
        """Yield columns, some rows at a time.

        Raises:
            UsageError: A value is not an image, or does not fit its column.
        """
        import pyarrow as pa

        start = 0
        for rows in self.data.iter(batch_size=_ROWS):
            images = rows[self._image]
            batch: dict[str, Any] = {}
            for name, kind in self._types.items():
                try:
                    batch[name] = pa.array(rows[name], kind)
                except (KeyError, pa.ArrowInvalid, pa.ArrowTypeError) as error:
                    why = str(error).splitlines()[0]
                    raise UsageError(f"the column {name!r} of the stream has values of several types ({why})") from None
            batch["image"] = [bytes_of(one, f"the image of sample {start + i:,}") for i, one in enumerate(images)]
            if self._caption:
                batch["caption"] = rows[self._caption]
            if self.key not in batch:
                batch["key"] = [str(start + i) for i in range(len(images))]
            start += len(images)
            yield batch


def _columns(data: Samples, captions: Sequence[str] | None, options: DataOptions) -> _Columns | _Stream:
    """Return data in memory as columns.

    Raises:
        UsageError: It is something else, or lengths differ.
    """
    if type(data).__module__.startswith("datasets.") and hasattr(data, "column_names"):
        return _of_dataset(data, captions, options)
    if hasattr(data, "columns"):
        raise UsageError(
            f"cannot embed a {type(data).__name__}; give its rows as dictionaries, or its column of images"
        )
    if not (hasattr(data, "__getitem__") and hasattr(data, "__len__")) or isinstance(data, (bytes, Mapping)):
        raise UsageError(f"cannot embed {type(data).__name__}; {_GIVE}")
    if not len(data):
        raise UsageError("there are no samples")
    if captions is not None and len(captions) != len(data):
        raise UsageError(f"{len(captions):,} captions for {len(data):,} images; give one for each image")
    count, data, captions = len(data), by_position(data), by_position(captions)
    first = data[0]
    if isinstance(first, Mapping):
        image = options.image or _first(first, IMAGES, "image")
        caption = options.caption or next((name for name in CAPTIONS if name in first), None)
        key = options.key or next((name for name in KEYS if name in first), None)
        texts = (lambda row: data[row].get(caption)) if caption else None
        keys = None if key is None else _Rows(lambda row: {key: data[row].get(key)})
        return _Columns(count, lambda row: data[row].get(image), texts, keys, key)
    if captions is not None:
        return _Columns(count, data.__getitem__, captions.__getitem__)
    if isinstance(first, (tuple, list)):
        if len(first) != 2:
            raise UsageError(f"the first sample has {len(first)} parts; {_GIVE}")
        return _Columns(count, lambda row: data[row][0], lambda row: data[row][1])
    return _Columns(count, data.__getitem__, None)


def _of_dataset(data: Any, captions: Sequence[str] | None, options: DataOptions) -> _Columns | _Stream:
    import datasets

    if isinstance(data, datasets.IterableDataset):
        if captions is not None:
            raise UsageError("captions= is for data with a length; a stream has its captions in a column")
        return _Stream(data, options)
    if not isinstance(data, datasets.Dataset):
        raise UsageError(f"cannot embed a {type(data).__name__}; give one split, loaded as a Dataset")
    data = data.with_format(None)  # values as Python has them, whatever the program reads them as
    features = data.features
    pictures = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    image, caption, key = _roles(features, pictures, options, "Dataset")
    if image in pictures:
        data = data.cast_column(image, datasets.Image(decode=False))  # the bytes of the file, as embedding files reads
    own = {*pictures, image, caption, "image", "caption", *(["key"] if key is None else [])}
    rest = data.select_columns([name for name in features if name not in own])
    given = (
        by_position(captions).__getitem__
        if captions is not None
        else (lambda row: data[row][caption])
        if caption
        else None
    )
    if captions is not None and len(captions) != len(data):
        raise UsageError(f"{len(captions):,} captions for {len(data):,} images; give one for each image")
    return _Columns(len(data), lambda row: data[row][image], given, rest, key)


def _roles(
    names: Collection[str], pictures: Sequence[str], options: DataOptions, what: str
) -> tuple[str, str | None, str | None]:
    """Return the columns of images, captions and keys; None for none.

    Raises:
        UsageError: There is no column of images, or one that the user names.
    """
    image = options.image or next(iter(pictures), None) or _first(names, IMAGES, "image")
    for name in filter(None, (image, options.caption, options.key)):
        if name not in names:
            raise UsageError(f"no column {name!r}; the {what} has {', '.join(names)}")
    caption = options.caption or next((name for name in CAPTIONS if name in names and name != image), None)
    return image, caption, options.key or next((name for name in KEYS if name in names), None)


class _Rows:
    """Columns of rows that are dictionaries, sliced like a Dataset."""

    def __init__(self, of: Any) -> None:
        """Store the function of the row number."""
        self._of = of

    def __getitem__(self, rows: slice) -> dict[str, list[Any]]:
        """Return some rows as columns."""
        found = [self._of(row) for row in range(rows.start, rows.stop)]
        return {name: [one[name] for one in found] for name in found[0]}


def _first(names: Any, usual: Sequence[str], what: str) -> str:
    name = next((name for name in usual if name in names), None)
    if name is None:
        raise UsageError(f"no column of {what}s; there are {', '.join(names)}: give its name, as {what}=")
    return name


def _written(columns: _Columns | _Stream, folder: Path) -> str:
    """Write samples to a Parquet file that has the name of its content."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    first = folder / f"data-{secrets.token_hex(8)}.parquet"
    with writing(first) as scratch, open(scratch, "wb") as raw:
        writer = None
        for batch in columns.batches():
            try:
                table = pa.table(batch) if writer is None else pa.table(batch, schema=writer.schema)
            except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
                raise UsageError(f"a column has values of several types ({str(error).splitlines()[0]})") from None
            writer = writer or pq.ParquetWriter(raw, table.schema)
            writer.write_table(table)
        if writer is not None:
            writer.close()
    with open(first, "rb") as file:
        name = hashlib.file_digest(file, "sha256").hexdigest()[:32]
    final = folder / f"data-{name}.parquet"
    if final.exists():
        first.unlink()  # the same data; a pool that was begun knows the time of its file
    else:
        os.replace(first, final)
    return str(final)
