"""The contract of export formats, as tests to inherit."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from thresher.errors import OutputError, ThresherError, UsageError
from thresher.export.registry import Export, Written
from thresher.export.write import export
from thresher.pool.store import EmbeddingStore, open_store
from thresher.runtime.parameters import build, parameters_of
from thresher.selection import Selection, Step

N = 60
UNUSUAL = {  # row: its key
    3: "two\nlines",
    5: "a\r\ttab",
    8: "say \"so\", 'twice'",
    11: "../../up",
    14: "\x1b[31mred\x07",
    17: "part\u2028para\u2029next\x85",
    20: "",
}
ESCAPES = "../../escapes.jpg"  # an image path that points outside its folder


class ExportContract:
    """Inherit it to test your own format: ``class TestMine(ExportContract): plugin = Mine``.

    The pool has 60 rows with keys (``uid``, most of them 32 hexadecimal digits), captions (``text``), image paths
    (``filepath``), URLs (``url``), ``width`` and image embeddings. Some keys, captions and paths are malicious or
    unusual. A file that is neither parquet nor ``.npy`` is read as lines of text.

    Attributes:
        plugin: The format.
        example: Options to make it with, if it has required ones.
    """

    plugin: ClassVar[type[Any]]
    example: ClassVar[dict[str, Any]] = {}

    @pytest.fixture
    def format(self) -> Export:
        """Return the format under test."""
        made: Export = build(self.plugin, self.plugin.name, self.example)
        return made

    @pytest.fixture
    def pool(self, tmp_path: Path) -> EmbeddingStore:
        """Return the pool that is exported."""
        return _pool(tmp_path / "pool")

    def test_it_is_a_frozen_dataclass_whose_options_are_described(self, format: Export) -> None:
        assert isinstance(vars(self.plugin).get("name"), str)
        assert self.plugin.__doc__
        assert dataclasses.is_dataclass(self.plugin)
        assert dataclasses.replace(format) == format  # type: ignore[type-var]
        assert hash(dataclasses.replace(format)) == hash(format)  # type: ignore[type-var]
        for item in parameters_of(self.plugin):
            assert item.metadata.get("help"), f"the option {item.name} has no help"

    def test_it_writes_its_file_and_nothing_else(self, format: Export, pool: EmbeddingStore, tmp_path: Path) -> None:
        before = _files(tmp_path)
        (tmp_path / "out").mkdir()
        written = format.write(_selection(pool), pool, str(tmp_path / "out" / "file"))
        assert isinstance(written, Written)
        assert _files(tmp_path).keys() - before.keys() == {"out/file"}
        assert {name: content for name, content in _files(tmp_path).items() if name != "out/file"} == before

    def test_the_same_bytes_twice(self, format: Export, pool: EmbeddingStore, tmp_path: Path) -> None:
        for name in ("one", "two"):
            format.write(_selection(pool), open_store(pool.layout.location), str(tmp_path / name))
        assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()

    def test_every_row_kept_is_written_or_listed(self, format: Export, pool: EmbeddingStore, tmp_path: Path) -> None:
        selection = _selection(pool)
        done = export(selection, format, tmp_path / "out", store=pool, manifest=False)
        written = format.write(selection, pool, str(tmp_path / "again"))
        assert (done.rows, done.missing) == (written.rows, len(written.missing))
        rows = [row for row, _ in written.missing]
        assert rows == sorted(set(rows))
        assert set(rows) <= set(selection.rows().tolist())
        assert written.rows + done.missing == len(selection) or (written.rows, rows) == (N, [])
        lines = _lines(Path(done.missing_file).read_bytes()) if done.missing else []
        assert [line.partition("\t")[0] for line in lines] == [str(row) for row in rows]

    def test_entries_cannot_be_forged(self, format: Export, pool: EmbeddingStore, tmp_path: Path) -> None:
        everything = _everything(pool)
        nothing = dataclasses.replace(everything, dropped_by=np.zeros(N, np.int16), steps=(_step(N, 0),))
        none = format.write(nothing, pool, str(tmp_path / "none"))
        written = format.write(everything, pool, str(tmp_path / "all"))
        if none.rows == N:  # it has an entry for every row of the pool, and at most a line before and one after these
            entries = _entries(tmp_path / "all", written)
            assert N <= entries <= N + 2
            assert _entries(tmp_path / "none", none) == entries
            return
        head = _entries(tmp_path / "none", Written(0))
        assert _entries(tmp_path / "all", written) == written.rows + (head or 0)

    def test_no_path_leads_out_of_its_folder(self, format: Export, pool: EmbeddingStore, tmp_path: Path) -> None:
        format.write(_everything(pool), pool, str(tmp_path / "all"))
        content = (tmp_path / "all").read_bytes()
        assert content.startswith((b"PAR1", b"\x93NUMPY")) or b"escapes.jpg" not in content

    def test_rows_are_written_as_often_as_they_are_to_be_used(
        self, format: Export, pool: EmbeddingStore, tmp_path: Path
    ) -> None:
        once = _selection(pool)
        times = np.where(once.mask(), 1 + np.arange(N) % 3, 0).astype(np.int32)
        often = dataclasses.replace(once, repeats=times)
        one = format.write(once, pool, str(tmp_path / "once"))
        try:
            two = format.write(often, pool, str(tmp_path / "often"))
        except UsageError as error:  # it has no way to repeat a row
            assert "repeats rows" in str(error)
            return
        assert two.missing == one.missing
        if one.rows + len(one.missing) == len(once):
            assert two.rows == int(times.sum()) - sum(int(times[row]) for row, _ in two.missing)
        assert (tmp_path / "once").read_bytes() != (tmp_path / "often").read_bytes()

    def test_a_part_of_a_pool_is_refused(self, format: Export, pool: EmbeddingStore, tmp_path: Path) -> None:
        selection = _selection(pool)
        with pytest.raises(UsageError, match="whole pool"):
            export(selection, format, tmp_path / "out", store=pool.where(selection.mask()))
        assert not (tmp_path / "out").exists()

    def test_what_there_was_stays_when_it_fails(self, format: Export, pool: EmbeddingStore, tmp_path: Path) -> None:
        (tmp_path / "out").write_text("precious")
        with pytest.raises(OutputError, match="exists already"):
            export(_selection(pool), format, tmp_path / "out", store=pool)
        damaged = tmp_path / "pool" / "1.parquet"
        content = bytearray(damaged.read_bytes())
        content[4 : len(content) // 2] = bytes(len(content) // 2 - 4)
        damaged.write_bytes(content)
        before = _files(tmp_path)
        try:
            export(_selection(pool), format, tmp_path / "out", store=pool, overwrite=True, manifest=False)
        except ThresherError:
            assert _files(tmp_path) == before


def _pool(folder: Path) -> EmbeddingStore:
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True)
    rng = np.random.default_rng(1)
    unit = rng.standard_normal((N, 4)).astype(np.float32)
    captions = [f"caption {i}" for i in range(N)]
    captions[30:35] = ["two\nlines", 'a\ttab and a "quote', "", "\x1b[2J\x00\x85\u2028forged", "'; drop table"]
    paths = [f"pictures/{i}.jpg" for i in range(N)]
    paths[40:44] = [ESCAPES, "..\\..\\escapes.jpg", "a\nforged.jpg", "b\tforged.jpg"]
    table = pa.table(
        {
            "uid": [UNUSUAL.get(i, f"{i:032x}") for i in range(N)],
            "text": captions,
            "filepath": paths,
            "url": [None if i % 20 == 19 else f"https://example.org/{i}.jpg" for i in range(N)],
            "width": pa.array(rng.integers(100, 900, N)),
            "image_embedding": pa.array(list(unit), pa.list_(pa.float32(), 4)),
        }
    )
    for number in range(2):
        pq.write_table(table.slice(number * N // 2, N // 2), folder / f"{number}.parquet", row_group_size=8)
    return open_store(str(folder))


def _everything(pool: EmbeddingStore) -> Selection:
    return Selection.everything(pool.fingerprint(), pool.layout.location, {}, pool.total)


def _step(before: int, after: int) -> Step:
    return Step(method="contract", parameters={}, seed=0, rows_in=before, rows_out=after, reasons=("is a fourth",))


def _selection(pool: EmbeddingStore) -> Selection:
    """Return a selection of three of four rows."""
    dropped_by = np.where(np.arange(N) % 4 == 1, 0, -1).astype(np.int16)
    step = _step(N, int((dropped_by == -1).sum()))
    return dataclasses.replace(_everything(pool), dropped_by=dropped_by, steps=(step,))


def _files(folder: Path) -> dict[str, bytes]:
    paths: Iterator[Path] = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def _lines(content: bytes) -> list[str]:
    """Return the lines as most programs split them."""
    return content.decode("utf-8").replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n").split("\n")


def _entries(path: Path, written: Written) -> int:
    """Return how many entries a reader finds."""
    content = path.read_bytes()
    if content.startswith(b"PAR1"):
        import pyarrow.parquet as pq

        return int(pq.read_metadata(path).num_rows)
    if content.startswith(b"\x93NUMPY"):
        return len(np.load(path, allow_pickle=False))
    return len(_lines(content)) if content else 0
