"""The contract of pool readers, as tests to inherit.

from thresher.testing import PoolReaderContract

class TestMine(PoolReaderContract):
    plugin = Mine

    def write(self, folder, rows, files):
        ...  # write the rows as a pool in your format, in this many files
        return str(folder)
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from thresher.errors import PoolError, ThresherError
from thresher.io.listing import Files
from thresher.io.readers import recognising
from thresher.pool.layout import Layout, Options
from thresher.pool.layouts import POOL_READERS, PoolReader, read_layout
from thresher.pool.store import EmbeddingStore, open_store
from thresher.testing.readers import bytes_read, check_plugin, damaged


@dataclass(frozen=True, eq=False)
class Rows:
    """N rows of a pool.

    Attributes:
        image: (N, D) float16, or None.
        text: (N, D) float16, or None.
        keys: (N,) keys.
        captions: (N,) captions.
    """

    image: Any
    text: Any
    keys: Sequence[str]
    captions: Sequence[str]

    @classmethod
    def some(cls, count: int, dim: int = 8) -> Rows:
        """Return random rows; the same arguments give the same rows."""
        rng = np.random.Generator(np.random.Philox(count))
        image, text = rng.standard_normal((2, count, dim)).astype(np.float16)
        return cls(image, text, [f"{i:08x}" for i in rng.permutation(count)], [f"caption {i} é" for i in range(count)])

    def cut(self, files: int) -> list[Rows]:
        """Split the rows into parts of different lengths, one per file."""
        edges = [round(len(self.keys) * (i / files) ** 1.5) for i in range(files + 1)]
        return [
            Rows(self.image[lo:hi], self.text[lo:hi], self.keys[lo:hi], self.captions[lo:hi])
            for lo, hi in zip(edges, edges[1:], strict=False)
        ]

    def table(self, **more: Any) -> Any:
        """Return keys, captions and the columns ``more`` as an Arrow table."""
        import pyarrow as pa

        return pa.table({"key": list(self.keys), "caption": list(self.captions), **more})


def _parquet(table: Any, path: Path) -> None:
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, use_dictionary=False, data_page_size=1 << 16)


def _npy(folder: Path, rows: Rows, files: int) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    for i, part in enumerate(rows.cut(files)):
        np.save(folder / f"image_{i}.npy", part.image)
        np.save(folder / f"text_{i}.npy", part.text)
        _parquet(part.table(), folder / f"table_{i}.parquet")
    return str(folder)


def _clip_retrieval(folder: Path, rows: Rows, files: int) -> str:
    for i, part in enumerate(rows.cut(files)):
        for name, array in (("img_emb", part.image), ("text_emb", part.text)):
            (folder / name).mkdir(parents=True, exist_ok=True)
            np.save(folder / name / f"{name}_{i}.npy", array)
        _parquet(part.table(), folder / "metadata" / f"metadata_{i}.parquet")
    return str(folder)


def _datacomp(folder: Path, rows: Rows, files: int) -> str:
    for i, part in enumerate(rows.cut(files)):
        _parquet(part.table(), folder / "metadata" / f"{i:08d}.parquet")
        np.savez(folder / "metadata" / f"{i:08d}.npz", l14_img=part.image, l14_txt=part.text)
    return str(folder)


def _img2dataset(folder: Path, rows: Rows, files: int) -> str:
    for i, part in enumerate(rows.cut(files)):
        _parquet(part.table(status=["success"] * len(part.keys)), folder / f"{i:05d}.parquet")
    return str(folder)


def _with_vectors(folder: Path, rows: Rows, files: int) -> str:
    for i, part in enumerate(rows.cut(files)):
        vectors = {"image_embedding": list(part.image), "text_embedding": list(part.text)}
        _parquet(part.table(**vectors), folder / "data" / f"train-{i}.parquet")
    return str(folder)


def _arrow(folder: Path, rows: Rows, files: int) -> str:
    import pyarrow as pa

    folder.mkdir(parents=True, exist_ok=True)
    for i, part in enumerate(rows.cut(files)):
        table = part.table(image_embedding=list(part.image), text_embedding=list(part.text))
        with pa.ipc.new_file(str(folder / f"part-{i}.arrow"), table.schema) as file:
            file.write_table(table, max_chunksize=1_000)
    return str(folder)


def _lance(folder: Path, rows: Rows, files: int) -> str:
    import lance
    import pyarrow as pa

    for part in rows.cut(files):
        width = part.image.shape[1]
        vectors = {
            f"{role}_embedding": pa.FixedSizeListArray.from_arrays(getattr(part, role).ravel(), width)
            for role in ("image", "text")
        }
        lance.write_dataset(part.table(**vectors), str(folder), mode="append" if folder.exists() else "create")
    return str(folder)


POOLS: Mapping[str, Callable[[Path, Rows, int], str]] = {
    "npy": _npy,
    "clip-retrieval": _clip_retrieval,
    "datacomp": _datacomp,
    "img2dataset": _img2dataset,
    "parquet": _with_vectors,
    "arrow": _arrow,
    "lance": _lance,
}
"""Layout -> function that writes a pool in it: (folder, rows, number of files). These are Thresher's own layouts."""


class PoolReaderContract:
    """The contract of pool readers.

    Attributes:
        plugin: The reader.
        fields: The embedding fields of its format.
        opening: The share of a pool's bytes that opening it may read.
    """

    plugin: ClassVar[type[PoolReader]]
    fields: ClassVar[tuple[str, ...]] = ("image", "text")
    opening: ClassVar[float] = 0.2

    def write(self, folder: Path, rows: Rows, files: int) -> str:
        """Write a pool in ``files`` files; return its location."""
        raise NotImplementedError

    def test_it_is_a_plugin(self) -> None:
        """It is found by its name, and all its options have defaults."""
        check_plugin(POOL_READERS, self.plugin)

    def test_it_recognises_its_own_and_no_others(self, tmp_path: Path) -> None:
        """It reads its own pools, and leaves those of Thresher's own layouts to their readers."""
        rows = Rows.some(7)
        own = Files.at(self.write(tmp_path / "own", rows, 2))
        assert type(recognising(POOL_READERS, own)) is self.plugin
        assert self.plugin().recognise(own)
        for name, write in POOLS.items():
            reader = recognising(POOL_READERS, Files.at(write(tmp_path / name, rows, 2)))
            assert reader is not None
            assert reader.name == name, f"takes pools of {name}"

    @pytest.mark.parametrize("files", [1, 3])
    def test_rows_are_those_written(self, tmp_path: Path, files: int) -> None:
        """Vectors, keys and captions are read in order, for any number of files."""
        rows = Rows.some(41)
        store = open_store(self.write(tmp_path / "pool", rows, files))
        assert store.layout.kind == self.plugin.name
        assert len(store) == len(rows.keys)
        assert tuple(store.layout.vectors) == self.fields
        _same(store, rows, self.fields)

    def test_the_same_rows_in_other_files_are_the_same_pool(self, tmp_path: Path) -> None:
        """The fingerprint depends on the rows, not on how they are split into files."""
        rows = Rows.some(41)
        one, other = (open_store(self.write(tmp_path / str(files), rows, files)) for files in (1, 4))
        assert one.fingerprint() == other.fingerprint()
        assert open_store(self.write(tmp_path / "less", rows.cut(2)[1], 1)).fingerprint() != one.fingerprint()

    def test_opening_reads_headers_only(self, tmp_path: Path) -> None:
        """Opening reads few bytes, as counted by the operating system."""
        location = self.write(tmp_path / "pool", Rows.some(6_000, 256), 2)
        whole = sum(path.stat().st_size for path in (tmp_path / "pool").rglob("*") if path.is_file())
        _, read = bytes_read(lambda: read_layout(location, Options()))
        assert read < self.opening * whole + 300_000, f"opening reads {read:,} of {whole:,} bytes"

    def test_pieces_can_be_pickled(self, tmp_path: Path) -> None:
        """The layout can be pickled, because other processes read its pieces."""
        layout = read_layout(self.write(tmp_path / "pool", Rows.some(9), 2), Options())
        again: Layout = pickle.loads(pickle.dumps(layout))  # noqa: S301 - pickled above
        assert again == layout

    def test_damaged_files_are_named(self, tmp_path: Path) -> None:
        """Truncated files and files with a changed byte give an error that names the file, or are read correctly."""
        rows = Rows.some(41)
        location = self.write(tmp_path / "pool", rows, 2)
        detected = 0
        for path, what in damaged(tmp_path / "pool"):
            try:
                _same(open_store(location), rows, ())
            except PoolError as error:
                assert path.name in str(error), f"{path.name}, {what}: the error does not name the file: {error}"
                detected += 1
            except ThresherError:
                detected += 1
            except AssertionError:
                assert not what.startswith("cut"), f"{path.name}, {what}: is read without an error"
        assert detected

    def test_damaged_files_are_skipped(self, tmp_path: Path) -> None:
        """With ``skip_bad`` the rest of the pool is read, and skipped files are listed."""
        rows = Rows.some(41)
        location = self.write(tmp_path / "pool", rows, 3)
        path = max((path for path in (tmp_path / "pool").rglob("*") if path.is_file()), key=lambda one: str(one))
        path.write_bytes(path.read_bytes()[:20])
        layout = read_layout(location, Options(skip_bad=True))
        assert [Path(aside.path).name for aside in layout.skipped] == [path.name]
        assert 0 < layout.rows < len(rows.keys)


def _same(store: EmbeddingStore, rows: Rows, fields: Sequence[str]) -> None:
    """Read everything, and compare keys, captions and the given fields."""
    for field in store.layout.vectors:
        vectors = np.concatenate([np.asarray(store.raw(field, block)) for block in store.blocks(field)])
        if field in fields:
            np.testing.assert_array_equal(vectors, getattr(rows, field))
    assert store.layout.key == "key"
    assert store.layout.caption == "caption"
    keys, captions = list[str](), list[str]()
    for _, part in store.scan(["key", "caption"]):
        keys += part.column(0).to_pylist()
        captions += part.column(1).to_pylist()
    assert keys == list(rows.keys)
    assert captions == list(rows.captions)
