"""Parquet columns with long texts: batches stay small, and values are those that were written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from thresher.io import parquet
from thresher.io.parquet import table_piece
from thresher.pool.layout import shown, texts

LONG = "ä" + "y" * 3_000_000


def write(path: Path, rows: int, *, declared: bool) -> list[str | None]:
    """Write a table in which one long text repeats; return its texts. ``declared``: its type says dictionary."""
    at = np.arange(rows) % 5
    indices = pa.array([None if i == 4 else min(int(i), 1) for i in at], pa.int32())
    table = pa.table(
        {"uid": [f"k{i}" for i in range(rows)], "text": pa.DictionaryArray.from_arrays(indices, ["s", LONG])}
    )
    pq.write_table(table, path, store_schema=declared, row_group_size=150)
    return [None if i == 4 else ["s", LONG][min(int(i), 1)] for i in at]


@pytest.mark.parametrize("few", [0, 1_000])
@pytest.mark.parametrize("declared", [False, True])
def test_a_text_that_many_rows_share_is_read_in_small_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, declared: bool, few: int
) -> None:
    wanted = write(tmp_path / "a.parquet", 400, declared=declared)
    assert (tmp_path / "a.parquet").stat().st_size < 1_000_000, "a small file"
    monkeypatch.setattr(parquet, "_TABLE", 16 * 2**20)
    monkeypatch.setattr(parquet, "_FEW", few)  # without any, as dictionaries
    piece = table_piece("file", str(tmp_path / "a.parquet"))
    found: list[str | None] = []
    for part in piece.stream(["text", "uid"]):
        assert part.schema.names == ["text", "uid"]
        assert part.column(0).type == pa.string()
        assert part.nbytes <= 17 * 2**20
        assert part.column("uid").to_pylist() == [f"k{i}" for i in range(len(found), len(found) + len(part))]
        found += part.column(0).to_pylist()
    assert found == wanted
    rows = np.array([1, 2, 149, 150, 151, 154, 399])
    some = [text for part in piece.take(["text"], rows) for text in part.column(0).to_pylist()]
    assert some == [wanted[row] for row in rows]


def test_a_few_long_texts_are_read_one_after_the_other(tmp_path: Path) -> None:
    """A dictionary of them would take several times their memory."""
    table = pa.table({"text": [f"{i} " * (4 << 20) for i in range(9)]})
    pq.write_table(table, tmp_path / "a.parquet", compression="zstd")
    footer = pq.ParquetFile(tmp_path / "a.parquet").metadata
    assert parquet._within_memory(footer, ["text"], 8192, 16 * 2**20) == (1, [])
    parts = list(table_piece("file", str(tmp_path / "a.parquet")).stream(["text"]))
    assert pa.Table.from_batches(parts).equals(table)


def test_ordinary_columns_are_read_as_before(tmp_path: Path) -> None:
    table = pa.table({"uid": [f"{i:032}" for i in range(3000)], "status": ["success"] * 3000})
    pq.write_table(table, tmp_path / "a.parquet")
    footer = pq.ParquetFile(tmp_path / "a.parquet").metadata
    assert parquet._within_memory(footer, ["uid", "status"], 65_536, parquet._TABLE) == (65_536, [])
    parts = list(table_piece("file", str(tmp_path / "a.parquet")).stream(["uid", "status"]))
    assert pa.Table.from_batches(parts).equals(table)


def test_wide_rows_are_read_some_at_a_time(tmp_path: Path) -> None:
    rows = np.zeros((64, 1 << 20), np.float32)
    array = pa.FixedSizeListArray.from_arrays(rows.ravel(), 1 << 20)
    pq.write_table(pa.table({"embedding": array}), tmp_path / "a.parquet", compression="zstd", use_dictionary=False)
    footer = pq.ParquetFile(tmp_path / "a.parquet").metadata
    batch, repetitive = parquet._within_memory(footer, ["embedding"], 8192, parquet._BATCH)
    assert repetitive == []
    assert 32 <= batch <= 64


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_texts_to_show_are_cut_before_they_are_copied(kind: pa.DataType) -> None:
    column = pa.array(["é" * 10, None, "b", ""]).cast(kind)
    assert shown(column, 3) == ["ééé... (10 characters)", "", "b", ""]
    assert texts(column, 3) == ["ééé", "", "b", ""]
    assert texts(column) == ["é" * 10, "", "b", ""]
    assert shown(pa.array([1, None]), 3) == ["1", ""]
