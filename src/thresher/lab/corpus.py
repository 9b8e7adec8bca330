"""Corpora: training data with planted faults, and evaluation sets cut into two halves.

Every choice is keyed by the seed of the corpus and a purpose, so that the same plan gives the same corpus. Images are
streamed; only keys and captions are in memory. A changed corpus is parquet with the column ``planted``: "" for rows as
they are, else "swapped", "duplicate" or "off-topic", which no method reads and analyses can.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from thresher.data import DataOptions, open_data
from thresher.errors import PoolError, UsageError
from thresher.evaluation.sets import read_eval
from thresher.evaluation.split import split
from thresher.io.pictures import open_rgb
from thresher.lab.plan import HALVES, Corpus
from thresher.pool.store import open_store
from thresher.runtime.files import writing
from thresher.runtime.random import generator

PLANTED = "planted"
INDEX = "index.parquet"  # keys and captions of the rows of a corpus
_WRITTEN = 512  # rows written at a time
SWAPPED, DUPLICATE, OFF_TOPIC = "swapped", "duplicate", "off-topic"

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class _Index:
    """Keys, captions and classes of the rows of some data that can be used: those with an image and a caption."""

    keys: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    classes: list[Any] = field(default_factory=list)
    at: list[int] = field(default_factory=list)  # number of the sample among all of the data

    def __len__(self) -> int:
        return len(self.keys)


def index_of(data: str, *, captions: bool, within: str | None = None) -> _Index:
    """Read the data once, without decoding images; return the rows that can be used.

    Raises:
        PoolError: The data cannot be read, or no row can be used.
        UsageError: There is no column ``within``.
    """
    index = _Index()
    opened = open_data(data, DataOptions(captions=captions))
    if within is not None and within not in opened.columns:
        known = ", ".join(opened.columns) or "none"
        raise UsageError(f"{data}: has no column {within!r} to swap captions within; it has {known}")
    for number, sample in enumerate(opened.samples()):
        if sample.picture is None or (captions and not sample.text):
            continue
        index.keys.append(sample.key or str(number))
        index.texts.append(sample.text)
        index.at.append(number)
        if within is not None:
            index.classes.append(sample.columns.get(within))
    if not len(index):
        raise PoolError(f"{data}: no row has an image{' and a caption' if captions else ''}")
    for note in opened.without_end():
        warnings.warn(f"{data}: {note}", stacklevel=2)
    return index


def write_index(index: _Index, target: Path) -> None:
    """Write keys and captions as a table that opens as a pool without embeddings."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with writing(target) as scratch:
        pq.write_table(pa.table({"key": index.keys, "text": index.texts}), scratch)


def swaps(index: _Index, rows: int, seed: int) -> dict[int, int]:
    """Return whose caption each of about ``rows`` rows gets: passed on in a circle, so that no row keeps its own.

    With classes, captions are passed on within a class. A row that is drawn alone keeps its own.
    """
    order = generator(seed, "swapped").permutation(len(index))[:rows]
    of_class: dict[Any, list[int]] = {}
    for row in order.tolist():
        of_class.setdefault(index.classes[row] if index.classes else None, []).append(row)
    return {
        row: other
        for members in of_class.values()
        if len(members) > 1
        for row, other in zip(members, [members[-1], *members[:-1]], strict=True)
    }


def make_corpus(corpus: Corpus, train: str, off_topic: str, target: Path, *, captions: bool) -> dict[str, Any]:
    """Write the training data of a corpus, if it differs from the data; return what it is.

    Args:
        corpus: What is done to the data.
        train: The training data.
        off_topic: The data of off-topic rows, "" for none.
        target: The parquet file to write; next to it the keys and captions of its rows are written.
        captions: Whether rows need captions.

    Returns:
        "data", the file of the corpus, "" if it is the data; "rows"; and the number of rows of each planted kind.
    """
    index = index_of(train, captions=captions, within=corpus.within)
    where = target.with_name(INDEX)
    if not corpus.changed:
        write_index(index, where)
        return {"data": "", "rows": len(index), "base": len(index)}
    chosen_N = np.ones(len(index), np.bool_)
    if corpus.rows is not None and corpus.rows < len(index):
        chosen_N[generator(corpus.seed, "rows").permutation(len(index))[corpus.rows :]] = False
    base = int(np.count_nonzero(chosen_N))
    total = round(base / (1 - corpus.duplicated - corpus.off_topic))
    more, off = round(total * corpus.duplicated), round(total * corpus.off_topic)
    copies_N = np.zeros(len(index), np.int64)
    at_M = np.flatnonzero(chosen_N)[generator(corpus.seed, "duplicated").integers(0, base, more)]
    np.add.at(copies_N, at_M, 1)
    rows = _Rows(index, chosen_N, copies_N, corpus)
    others = _off_topic(off_topic, off, corpus.seed, captions=captions) if off else None
    counts = rows.write(train, others, target, captions=captions)
    write_index(index_of(str(target), captions=captions), where)
    return {"data": target.name, "base": base, **counts}


@dataclass(frozen=True, eq=False)
class _OffTopic:
    """Off-topic rows: the data, and the numbers of the samples that are used."""

    data: str
    numbers: frozenset[int]


def _off_topic(data: str, rows: int, seed: int, *, captions: bool) -> _OffTopic:
    index = index_of(data, captions=captions)
    chosen = generator(seed, "off-topic").permutation(len(index))[:rows]
    if len(chosen) < rows:
        raise UsageError(f"{data}: has {len(index):,} rows, but {rows:,} off-topic rows are wanted; give more data")
    return _OffTopic(data, frozenset(index.at[row] for row in chosen.tolist()))


@dataclass(frozen=True, eq=False)
class _Rows:
    """The rows of a changed corpus."""

    index: _Index
    chosen_N: npt.NDArray[np.bool_]
    copies_N: Ints
    corpus: Corpus

    def write(self, train: str, others: _OffTopic | None, target: Path, *, captions: bool) -> dict[str, int]:
        """Write the corpus; return the number of rows, and of each planted kind."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        schema = self._schema(train)
        given = self._captions() if captions else {}
        counts = {"rows": 0, SWAPPED: 0, DUPLICATE: 0, OFF_TOPIC: 0}
        with writing(target) as scratch, pq.ParquetWriter(scratch, schema) as writer:
            block: list[dict[str, Any]] = []
            for row in self._rows(train, given, others, set(schema.names), captions):
                counts["rows"] += 1
                for kind in filter(None, row[PLANTED].split("+")):
                    counts[kind] += 1
                block.append(row)
                if len(block) == _WRITTEN:
                    writer.write_table(pa.Table.from_pylist(block, schema))
                    block = []
            writer.write_table(pa.Table.from_pylist(block, schema))
        return counts

    def _schema(self, train: str) -> Any:
        import pyarrow as pa

        columns: dict[str, Any] = {"key": pa.string(), "image": pa.struct({"bytes": pa.binary(), "path": pa.string()})}
        columns |= {"text": pa.string(), PLANTED: pa.string()}
        light = open_data(train, DataOptions(captions=False)).columns
        return pa.schema([*columns.items(), *((name, kind) for name, kind in light.items() if name not in columns)])

    def _captions(self) -> dict[int, int]:
        """Return the row whose caption each swapped row gets, by row of the data."""
        base_M = np.flatnonzero(self.chosen_N)
        given = swaps(subset(self.index, base_M), round(self.corpus.swapped * len(base_M)), self.corpus.seed)
        return {int(base_M[row]): int(base_M[other]) for row, other in given.items()}

    def _rows(
        self, train: str, given: dict[int, int], others: _OffTopic | None, names: set[str], captions: bool
    ) -> Iterator[dict[str, Any]]:
        row_of = {at: row for row, at in enumerate(self.index.at)}
        own = {"key", "image", "text", PLANTED}
        for number, sample in enumerate(open_data(train, DataOptions(captions=captions)).samples()):
            row = row_of.get(number)
            if row is None or not self.chosen_N[row]:
                continue
            light = {name: value for name, value in sample.columns.items() if name in names - own}
            picture, text, planted = sample.stored(), self.index.texts[row], ""
            if row in given:
                text, planted = self.index.texts[given[row]], SWAPPED
            key = self.index.keys[row]
            yield {**light, "key": key, "image": {"bytes": picture, "path": None}, "text": text, PLANTED: planted}
            for copy in range(int(self.copies_N[row])):
                changed = {"bytes": changed_slightly(picture, self.corpus.seed, row, copy), "path": None}
                name = "+".join(filter(None, (DUPLICATE, planted)))
                yield {**light, "key": f"{key}~{copy + 1}", "image": changed, "text": text, PLANTED: name}
        if others is None:
            return
        for number, sample in enumerate(open_data(others.data, DataOptions(captions=captions)).samples()):
            if number in others.numbers:
                image = {"bytes": sample.stored(), "path": None}
                key = f"off-topic-{sample.key or number}"
                yield {"key": key, "image": image, "text": sample.text, PLANTED: OFF_TOPIC}


def write_subset(
    index: _Index, chosen_N: npt.NDArray[np.bool_], data: str, target: Path, *, group_by_text: bool = False
) -> None:
    """Write some rows of the data, unchanged, as parquet.

    Args:
        index: The rows of the data, see :func:`index_of`.
        chosen_N: (N,) the rows of the index to write.
        data: The data.
        target: The file.
        group_by_text: Add a column ``group``, unless there is one: rows with the same caption have the same group.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = _Rows(index, chosen_N, np.zeros(len(index), np.int64), Corpus())
    rows.write(data, None, target, captions=True)
    if group_by_text and "group" not in pq.read_schema(target).names:
        table = pq.read_table(target)
        groups = np.unique(np.array(table["text"].to_pylist()), return_inverse=True)[1]
        with writing(target) as scratch:
            pq.write_table(table.append_column("group", pa.array(groups.astype(np.int64))), scratch)


def subset(index: _Index, rows_M: Ints) -> _Index:
    """Return some rows of an index, in the given order."""
    rows = rows_M.tolist()
    classes = [index.classes[row] for row in rows] if index.classes else []
    return replace(
        index, keys=[index.keys[row] for row in rows], texts=[index.texts[row] for row in rows], classes=classes,
        at=[index.at[row] for row in rows],
    )  # fmt: skip


def changed_slightly(picture: bytes, seed: int, *which: int) -> bytes:
    """Return a near-duplicate of an image: cropped by up to a tenth, brighter or darker by up to a tenth, as JPEG."""
    from PIL import Image

    rng = generator(seed, "near-duplicate", *which)
    image = open_rgb(picture)
    width, height = image.size
    cut_w, cut_h = (max(1, round(side * rng.uniform(0.9, 1.0))) for side in (width, height))
    left, top = (int(rng.integers(0, room + 1)) for room in (width - cut_w, height - cut_h))
    image = image.resize((width, height), Image.Resampling.BICUBIC, box=(left, top, left + cut_w, top + cut_h))
    pixels = np.clip(np.asarray(image, np.float32) * rng.uniform(0.9, 1.1), 0, 255)
    buffer = io.BytesIO()
    Image.fromarray(np.round(pixels).astype(np.uint8)).save(buffer, "jpeg", quality=90)
    return buffer.getvalue()


def cut_in_halves(path: str, folder: Path, *, group: str | None, labels: tuple[str, ...], seed: int = 0) -> list[str]:
    """Write the two halves of an evaluation set, "NAME-selection" and "NAME-held-out", with no group in both.

    Hyperparameters may be chosen on the first half only; claims are made on the second.

    Returns:
        The paths of the two files.

    Raises:
        PoolError: An image cannot be decoded. Every run would fail at its end.
    """
    import pyarrow.parquet as pq

    one = read_eval(path, group=group, labels=labels or None)
    for rows, pictures in one.batches():
        for row, picture in zip(rows.tolist(), pictures, strict=True):
            try:
                open_rgb(picture)
            except PoolError as error:
                raise PoolError(f"{path}: row {row:,} {error}; evaluations do not skip rows") from None
    first_N = split(len(one), groups_N=one.group_N, seed=seed)
    store = open_store(path)
    written = []
    for half, mine_N in zip(HALVES, (first_N, ~first_N), strict=True):
        target = folder / f"{one.name}-{half}.parquet"
        start = 0
        writer: Any = None
        with writing(target) as scratch:
            for table in store.layout.tables:
                for part in table.stream(list(store.columns), _WRITTEN):
                    rows = np.flatnonzero(mine_N[start : start + len(part)])
                    start += len(part)
                    writer = writer or pq.ParquetWriter(scratch, part.schema)
                    writer.write_batch(part.take(rows))
            writer.close()
        written.append(str(target))
    return written
