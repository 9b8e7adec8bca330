"""Exports for other viewers and tools: every row of the pool, with what became of it."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from thresher import Selection, UsageError, build, from_arrays, open_store, run_steps
from thresher.explore.map import map_of
from thresher.export.formats.csv import Csv
from thresher.export.formats.embedding_atlas import EmbeddingAtlas
from thresher.export.formats.fiftyone import FiftyOne
from thresher.export.formats.jsonl import JsonLines
from thresher.export.write import export
from thresher.runtime.cache import Cache

ROWS = 200


def told(selection: Selection) -> list[dict[str, Any]]:
    return selection.to_table().to_pylist()


def same(a: Any, b: Any) -> bool:
    return a == b or (isinstance(a, float) and np.isnan(a) and b in (None, ""))


def test_jsonl_has_every_row_as_to_table_gives_it(selection: Selection, tmp_path: Path) -> None:
    done = export(selection, "jsonl", tmp_path / "rows.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert (done.rows, done.missing, len(rows)) == (ROWS, 0, ROWS)
    for row, expected in zip(rows, told(selection), strict=True):
        assert list(row) == list(expected)
        assert all(same(expected[name], row[name]) for name in row)
    assert sum(row["kept"] for row in rows) == len(selection)


def test_csv_has_every_row_as_to_table_gives_it(selection: Selection, tmp_path: Path) -> None:
    export(selection, "csv", tmp_path / "rows.csv")
    with open(tmp_path / "rows.csv", encoding="utf-8", newline="") as file:
        rows = [*csv.DictReader(file)]
    assert len(rows) == ROWS
    for row, expected in zip(rows, told(selection), strict=True):
        assert row["kept"] == ("true" if expected["kept"] else "false")
        assert (row["key"], row["step"], row["reason"]) == (expected["key"], expected["step"], expected["reason"])
        score = expected["semdedup_score"]
        assert row["semdedup_score"] == "" if np.isnan(score) else float(row["semdedup_score"]) == score


def test_columns_can_be_chosen_and_text_stays_on_one_line(selection: Selection, tmp_path: Path) -> None:
    export(selection, Csv(columns="key, text,kept"), tmp_path / "rows.csv")
    lines = (tmp_path / "rows.csv").read_text().splitlines()
    assert lines[0] == "key,text,kept"
    assert len(lines) == ROWS + 1
    assert "caption\\t7\\nof two lines" in lines[8]
    export(selection, JsonLines(columns="text"), tmp_path / "rows.jsonl")
    assert json.loads((tmp_path / "rows.jsonl").read_text().splitlines()[7]) == {"text": "caption\t7\nof two lines"}
    for made in (Csv(columns="key,nothing"), JsonLines(columns="nothing"), Csv(columns="key,key")):
        with pytest.raises(UsageError, match="no column 'nothing'|'key' is given twice"):
            export(selection, made, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_fiftyone_has_a_sample_for_every_row(selection: Selection, tmp_path: Path) -> None:
    export(selection, "fiftyone", tmp_path / "set.json")
    found = json.loads((tmp_path / "set.json").read_text())
    assert (found["name"], found["media_type"]) == ("thresher", "image")
    samples = found["samples"]
    assert [sample["row"] for sample in samples] == [*range(ROWS)]
    mask = selection.mask()
    for row, sample in enumerate(samples):
        assert sample["filepath"] == f"images/{row}.jpg"
        assert sample["tags"] == ["kept" if mask[row] else "dropped"]
        assert sample["caption"] == f"caption\t{row}\nof two lines"
        assert sample["kept"] == mask[row]
        assert bool(sample["reason"]) is True
    assert not [name for sample in samples for name in sample if name.startswith("_")]


def test_fiftyone_paths_that_lead_outside_or_are_missing_are_replaced(tmp_path: Path) -> None:
    table = pa.table(
        {
            "key": ["a", "b", "c"],
            "where": ["../../x.jpg", "ok/é.jpg", None],
            "image_embedding": pa.array(list(np.eye(3, dtype="f4")), pa.list_(pa.float32(), 3)),
        }
    )
    pq.write_table(table, tmp_path / "pool.parquet")
    store = open_store(str(tmp_path / "pool.parquet"))
    everything = Selection.everything(store.fingerprint(), store.layout.location, {}, 3)
    export(everything, FiftyOne(image_paths="where", dataset="x"), tmp_path / "a.json", store=store)
    samples = json.loads((tmp_path / "a.json").read_text())["samples"]
    assert [sample["filepath"] for sample in samples] == ["0.jpg", "ok/é.jpg", "2.jpg"]
    assert [sample["tags"] for sample in samples] == [["kept", "no path"], ["kept"], ["kept", "no path"]]
    export(everything, "fiftyone", tmp_path / "b.json", store=store)
    assert {s["filepath"] for s in json.loads((tmp_path / "b.json").read_text())["samples"]} == {
        f"{i}.jpg" for i in range(3)
    }
    with pytest.raises(UsageError, match="'nothing'"):
        export(everything, FiftyOne(image_paths="nothing"), tmp_path / "c.json", store=store)


def test_embedding_atlas_has_positions_images_and_reasons(tmp_path: Path) -> None:
    def picture(i: int) -> bytes:
        out = io.BytesIO()
        Image.new("RGB", (300, 100), (i, 0, 0)).save(out, "PNG")
        return out.getvalue()

    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((60, 8)).astype("f4")
    vectors[5] = np.nan
    images = [picture(i) for i in range(60)]
    images[7] = b"not an image"
    table = {"key": [f"k{i}" for i in range(60)], "text": [f"caption {i}" for i in range(60)], "image": images}
    columns = {**table, "image_embedding": pa.array(list(vectors), pa.list_(pa.float32(), 8))}
    (tmp_path / "pool").mkdir()
    pq.write_table(pa.table(columns), tmp_path / "pool" / "p.parquet")
    store = open_store(str(tmp_path / "pool"))
    selection = run_steps(store, [build("filter", {"where": "text LIKE '%1%'"})], cache=Cache.at(tmp_path / "cache"))
    export(selection, EmbeddingAtlas(side=48, sample=30), tmp_path / "atlas.parquet", store=store)
    rows = pq.read_table(tmp_path / "atlas.parquet")
    assert {"row", "key", "kept", "step", "reason", "x", "y", "caption", "image"} <= {*rows.column_names}
    assert rows.num_rows == 60
    expected = map_of(store, Cache.at(), sample=30)
    good = np.isfinite(expected.x)
    assert np.flatnonzero(~good).tolist() == [5]
    for axis, values in (("x", expected.x), ("y", expected.y)):
        column = rows.column(axis)
        assert column.null_count == 1
        assert (column.drop_null().to_numpy() == np.asarray(values)[good]).all()
    pictures = rows.column("image").to_pylist()
    assert [i for i, one in enumerate(pictures) if one is None] == [7]
    with Image.open(io.BytesIO(pictures[3]["bytes"])) as small:
        assert small.size == (48, 16)
        assert small.format == "WEBP"
    assert rows.column("kept").to_pylist() == selection.mask().tolist()
    assert rows.column("caption").to_pylist() == table["text"]
    export(selection, EmbeddingAtlas(side=0), tmp_path / "plain.parquet", store=store)
    assert "image" not in pq.read_schema(tmp_path / "plain.parquet").names


def test_embedding_atlas_needs_embeddings_and_sensible_sizes(tmp_path: Path) -> None:
    pq.write_table(pa.table({"key": ["a", "b"], "status": ["success"] * 2, "width": [1, 2]}), tmp_path / "0.parquet")
    store = open_store(str(tmp_path / "0.parquet"))
    everything = Selection.everything(store.fingerprint(), store.layout.location, {}, 2)
    with pytest.raises(UsageError, match="embedding-atlas needs embeddings"):
        export(everything, "embedding-atlas", tmp_path / "a.parquet", store=store)
    for options in ({"side": -1}, {"side": 5000}, {"sample": 0}):
        with pytest.raises(UsageError, match="must be"):
            EmbeddingAtlas(**options)


def test_pools_in_memory_have_their_images(tmp_path: Path) -> None:
    out = io.BytesIO()
    Image.new("RGB", (10, 10)).save(out, "PNG")
    store = from_arrays(np.random.default_rng(0).standard_normal((6, 4)).astype("f4"), images=lambda _: out.getvalue())
    selection = run_steps(store, [build("random", {"keep": "50%"})])
    export(selection, EmbeddingAtlas(), tmp_path / "a.parquet", store=store)
    assert pq.read_table(tmp_path / "a.parquet").column("image").null_count == 0
