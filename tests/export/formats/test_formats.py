"""Exports are read back by readers written from the formats' descriptions, not by the package."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from thresher import Cache, Selection, Step, UsageError, build, open_store, run_steps
from thresher.export.write import export
from thresher.testing.pools import write_pool

ROWS, N = 200, 1_000


def uids(uid_pool: Path) -> list[str]:
    return pq.read_table(uid_pool / "pool.parquet").column("uid").to_pylist()


def test_datacomp_subset_is_sorted_and_complete(uid_pool: Path, selection: Selection, tmp_path: Path) -> None:
    done = export(selection, "datacomp", tmp_path / "subset.npy")
    found = np.load(tmp_path / "subset.npy", allow_pickle=False)
    assert found.dtype == np.dtype("u8,u8")
    names = uids(uid_pool)
    expected = sorted((int(names[i][:16], 16), int(names[i][16:32], 16)) for i in selection.rows())
    assert [tuple(map(int, entry)) for entry in found] == expected
    assert done.rows == len(selection)
    assert done.missing == 0


def test_datacomp_subset_repeats_a_row_as_often_as_it_is_to_be_used(uid_pool: Path, tmp_path: Path) -> None:
    store = open_store(str(uid_pool))
    everything = Selection.everything(store.fingerprint(), str(uid_pool), {}, ROWS)
    repeats = np.arange(ROWS, dtype=np.int32) % 4
    dropped_by = np.where(repeats > 0, -1, 0).astype(np.int16)
    step = Step(method="drawn", parameters={}, seed=0, rows_in=ROWS, rows_out=150, reasons=("not drawn",))
    drawn = Selection(
        store=everything.store, pool=str(uid_pool), options={}, dropped_by=dropped_by, steps=(step,), repeats=repeats
    )
    drawn.save(tmp_path / "drawn")
    export(Selection.load(tmp_path / "drawn"), "datacomp", tmp_path / "subset.npy")
    names = uids(uid_pool)
    expected = sorted(
        (int(names[i][:16], 16), int(names[i][16:], 16)) for i in range(ROWS) for _ in range(int(repeats[i]))
    )
    assert [tuple(map(int, entry)) for entry in np.load(tmp_path / "subset.npy")] == expected


def test_keys_that_are_no_uids_are_counted_and_listed(tmp_path: Path) -> None:
    names = [f"{i:032x}" for i in range(10)]
    names[3], names[7] = "not-a-uid", "g" * 32
    table = pa.table({"uid": names, "emb": pa.array(list(np.eye(10, dtype=np.float32)), pa.list_(pa.float32(), 10))})
    pq.write_table(table, tmp_path / "pool.parquet")
    store = open_store(str(tmp_path / "pool.parquet"))
    everything = Selection.everything(store.fingerprint(), store.layout.location, {}, 10)
    done = export(everything, "datacomp", tmp_path / "subset.npy", store=store)
    assert (done.rows, done.missing) == (8, 2)
    assert Path(done.missing_file).read_text() == f"3\tnot-a-uid\n7\t{'g' * 32}\n"


def evidence(selection: Selection) -> tuple[np.ndarray, np.ndarray]:
    """Score and duplicate of every row, from the last step that saw it, one step after another."""
    score, twin = np.full(selection.total, np.nan, np.float32), np.full(selection.total, -1, np.int64)
    for number, step in enumerate(selection.steps):
        given = selection.given(number)
        if "score" in step.rows:
            score[given] = step.rows["score"]
        if "duplicate_of" in step.rows:
            twin[given] = step.rows["duplicate_of"]
    return score, twin


def test_parquet_of_many_steps_and_files(tmp_path: Path) -> None:
    """Rows are told step by step, whatever file they come from."""
    rng = np.random.default_rng(5)
    image, keys = rng.standard_normal((N, 3)).astype(np.float32), {"key": [f"k{i}" for i in range(N)]}
    store = write_pool(tmp_path / "pool", image, table=keys, files=7)
    chain = Selection.everything(store.fingerprint(), store.layout.location, {}, N)
    for number, names in enumerate((["score"], ["duplicate_of"], ["score", "duplicate_of"], [])):
        given = len(chain)
        rows = {"score": rng.random(given, np.float32), "duplicate_of": rng.integers(-1, N, given)}
        keep = rng.random(given) < 0.7
        step = Step(
            method=f"m{number}",
            parameters={},
            seed=0,
            rows_in=given,
            rows_out=int(keep.sum()),
            reasons=(", ".join(f"{{{name}}}" for name in names) or "gone",),
            rows={name: rows[name] for name in names},
        )
        chain = chain.then(step, keep)
    chain.save(tmp_path / "sel")
    export(Selection.load(tmp_path / "sel"), "parquet", tmp_path / "rows.parquet")
    table = pq.read_table(tmp_path / "rows.parquet")
    score, twin = evidence(chain)
    np.testing.assert_array_equal(table["score"].to_numpy(), score)
    assert table["duplicate_of"].to_pylist() == twin.tolist()
    rank = {number: {row: i for i, row in enumerate(chain.given(number).tolist())} for number in range(4)}
    told = [
        "kept" if by < 0 else chain.steps[by].why(rank[by][row]) for row, by in enumerate(chain.dropped_by.tolist())
    ]
    assert table["reason"].to_pylist() == told


def test_parquet_has_the_story_of_every_row(uid_pool: Path, selection: Selection, tmp_path: Path) -> None:
    export(selection, "parquet", tmp_path / "rows.parquet")
    table = pq.read_table(tmp_path / "rows.parquet")
    assert table.schema.equals(
        pa.schema(
            {
                "row": pa.int64(),
                "key": pa.string(),
                "kept": pa.bool_(),
                "step": pa.string(),
                "reason": pa.string(),
                "duplicate_of": pa.int64(),
                "score": pa.float32(),
            }
        )
    )
    rows = table.to_pylist()
    assert [row["row"] for row in rows] == list(range(ROWS))
    assert [row["key"] for row in rows] == uids(uid_pool)
    assert [row["kept"] for row in rows] == selection.mask().tolist()
    names = ["semdedup", "random", ""]  # dropped_by -1 is the last
    assert [row["step"] for row in rows] == [names[by] for by in selection.dropped_by]
    score, twin = evidence(selection)
    for row in rows:
        duplicate = row["step"] == "semdedup"
        assert (row["duplicate_of"] >= 0) == duplicate
        assert row["duplicate_of"] == twin[row["row"]]
        assert row["score"] == pytest.approx(float(score[row["row"]]))
        if duplicate:
            assert f"duplicate of row {row['duplicate_of']}" in row["reason"]
        else:
            assert row["reason"] == ("kept" if row["kept"] else "not drawn")


def test_parquet_has_the_groups_of_duplicates(tmp_path: Path) -> None:
    """Of the rows that the last step with groups saw, -1 for the others."""
    image = np.array([[1, 0], [0, 1], [0.99, 0.1], [1, 0.05], [-1, 0]], np.float32)
    store = write_pool(tmp_path / "pool", image, table={"uid": list("abcde"), "aes": [1, 2, 3, 2, 9]})
    steps = [build("filter", {"where": "aes < 5"}), build("semdedup", {"eps": 0.02, "prefer": "aes", "clusters": 1})]
    made = run_steps(store, steps, cache=Cache.at(tmp_path / "cache"))
    made.save(tmp_path / "sel")
    export(Selection.load(tmp_path / "sel"), "parquet", tmp_path / "rows.parquet")
    table = pq.read_table(tmp_path / "rows.parquet")
    assert table["duplicate_group"].to_pylist() == [0, 1, 0, 0, -1]
    assert table["duplicate_of"].to_pylist() == [2, -1, -1, 2, -1]
    assert table["kept"].to_pylist() == [False, True, True, False, False]


def test_keys_open_clip_and_img2dataset(uid_pool: Path, selection: Selection, tmp_path: Path) -> None:
    kept = selection.rows().tolist()
    export(selection, "keys", tmp_path / "keys.txt")
    assert (tmp_path / "keys.txt").read_text().splitlines() == [uids(uid_pool)[i] for i in kept]

    export(selection, "open_clip", tmp_path / "train.csv")
    with open(tmp_path / "train.csv", newline="") as file:
        lines = list(csv.reader(file, delimiter="\t"))
    assert lines[0] == ["filepath", "title"]
    assert lines[1:] == [[f"images/{i}.jpg", f"caption {i} of two lines"] for i in kept]

    done = export(selection, "img2dataset", tmp_path / "list.parquet")
    table = pq.read_table(tmp_path / "list.parquet")
    reachable = [i for i in kept if i % 10]
    assert {"key", "url", "caption"} <= set(table.column_names)
    assert "image_embedding" not in table.column_names
    assert table.column("url").to_pylist() == [f"https://example.org/{i}" for i in reachable]
    assert done.missing == len(kept) - len(reachable)
    listed = Path(done.missing_file).read_text().splitlines()
    assert listed == [f"{i}\t{uids(uid_pool)[i]}" for i in kept if i % 10 == 0]


def test_paths_that_climb_are_not_exported(tmp_path: Path) -> None:
    table = pa.table(
        {
            "filepath": ["a.jpg", "../../etc/passwd"],
            "text": ["one", "two"],
            "emb": pa.array([[1.0, 0.0], [0.0, 1.0]], pa.list_(pa.float32(), 2)),
        }
    )
    pq.write_table(table, tmp_path / "pool.parquet")
    store = open_store(str(tmp_path / "pool.parquet"))
    everything = Selection.everything(store.fingerprint(), store.layout.location, {}, 2)
    done = export(everything, "open_clip", tmp_path / "train.csv", store=store)
    assert (done.rows, done.missing) == (1, 1)
    assert "passwd" not in (tmp_path / "train.csv").read_text()


@pytest.mark.parametrize(
    ("kind", "lacks"),
    [
        ("open_clip", "both a caption in 'text' and a path in 'image.path'"),
        ("img2dataset", "a URL in 'url'"),
        ("keys", "a key without line breaks"),
    ],
)
def test_a_file_without_rows_is_refused(tmp_path: Path, kind: str, lacks: str) -> None:
    table = pa.table(
        {
            "key": ["a\nb", "c\nd"],
            "text": ["one", "two"],
            "image": [{"bytes": b"x", "path": None}] * 2,
            "url": pa.nulls(2, pa.string()),
            "emb": pa.array([[1.0, 0.0], [0.0, 1.0]], pa.list_(pa.float32(), 2)),
        }
    )
    pq.write_table(table, tmp_path / "pool.parquet")
    store = open_store(str(tmp_path / "pool.parquet"))
    everything = Selection.everything(store.fingerprint(), store.layout.location, {}, 2)
    with pytest.raises(UsageError, match=f"--as {kind}: no selected row has {lacks}.*; --as parquet and --as csv"):
        export(everything, kind, tmp_path / "out", store=store)
    assert [path.name for path in tmp_path.iterdir()] == ["pool.parquet"]


def test_shards_whose_columns_have_other_types_are_exported_as_one(tmp_path: Path) -> None:
    (tmp_path / "pool").mkdir()
    for shard, extra in enumerate((pa.nulls(2), pa.array([3, None]), pa.array([1.5, 2.5]))):
        columns = {
            "key": [f"{shard}-{i}" for i in range(2)],
            "url": [f"https://example.org/{shard}/{i}" for i in range(2)],
            "extra": extra,
            "image": pa.array([{"bytes": b"x" * 10, "path": f"{shard}/{i}.jpg"} for i in range(2)]),
            "text": ["a", "b"],
            "emb": pa.array(list(np.eye(2, dtype=np.float32)), pa.list_(pa.float32(), 2)),
        }
        pq.write_table(pa.table(columns), tmp_path / "pool" / f"{shard}.parquet")
    store = open_store(str(tmp_path / "pool"))
    everything = Selection.everything(store.fingerprint(), str(tmp_path / "pool"), {}, 6)
    export(everything, "img2dataset", tmp_path / "list.parquet", store=store)
    table = pq.read_table(tmp_path / "list.parquet")
    assert table.column("extra").to_pylist() == [None, None, 3.0, None, 1.5, 2.5]
    assert set(table.column_names) == {"url", "key", "caption", "extra"}
    export(everything, "open_clip", tmp_path / "train.csv", store=store)
    assert (tmp_path / "train.csv").read_text().splitlines()[1:3] == ["0/0.jpg\ta", "0/1.jpg\tb"]


def test_pictures_without_paths_are_no_paths(tmp_path: Path) -> None:
    columns = {
        "image": pa.array([{"bytes": b"x"}] * 2, pa.struct([("bytes", pa.binary())])),
        "text": ["a", "b"],
        "emb": pa.array(list(np.eye(2, dtype=np.float32)), pa.list_(pa.float32(), 2)),
    }
    pq.write_table(pa.table(columns), tmp_path / "pool.parquet")
    store = open_store(str(tmp_path / "pool.parquet"))
    everything = Selection.everything(store.fingerprint(), store.layout.location, {}, 2)
    with pytest.raises(UsageError, match="column of image paths"):
        export(everything, "open_clip", tmp_path / "train.csv", store=store)
