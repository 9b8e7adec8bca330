"""Metadata joined to a pool by key: the rows of a dictionary, in bounded memory, and no bytes copied."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.runtime.common import needs_root, small_disk
from thresher import BadRowsError, Options, OutputError, PoolError, open_store
from thresher.pool import join
from thresher.pool.join import positions
from thresher.pool.store import EmbeddingStore, heavy

OWN = ("uid", "text", "width", "thumbnail", "image_embedding")
JOINED = ("aes", "lang", "tags", "size")


def write_pool(folder: Path, keys: list[Any], cuts: tuple[int, ...] = (), kind: Any = None) -> None:
    """A pool whose tables have a picture and a vector in each row."""
    folder.mkdir()
    vectors = np.random.default_rng(0).standard_normal((len(keys), 4)).astype(np.float32)
    edges = [0, *cuts, len(keys)]
    for i, (lo, hi) in enumerate(zip(edges, edges[1:], strict=False)):
        rows = range(lo, hi)
        columns = {
            "uid": pa.array(keys[lo:hi], kind),
            "text": [f"caption {row}" for row in rows],
            "width": list(rows),
            "thumbnail": [b"picture %d" % row for row in rows],
            "image_embedding": pa.FixedSizeListArray.from_arrays(pa.array(vectors[lo:hi].ravel()), 4),
        }
        pq.write_table(pa.table(columns), folder / f"{i}.parquet", row_group_size=7)


def write_meta(folder: Path, keys: list[Any], parts: int = 1, kind: Any = None) -> dict[str, dict[str, Any]]:
    """Metadata in any order; returns its rows by key."""
    folder.mkdir()
    rows = [
        {
            "uid": key,
            "width": -1,
            "aes": i / 7,
            "lang": ["en", "de", None][i % 3],
            "tags": ["a", None, str(i)],
            "size": i,
            "jpg": b"bytes",
            "picture": {"bytes": b"bytes", "path": "a.jpg"},
            "vector": [1.0, 2.0],
        }
        for i, key in enumerate(keys)
    ]
    for i, some in enumerate(np.array_split(np.random.default_rng(1).permutation(len(rows)), parts)):
        columns = {name: [rows[j][name] for j in some] for name in rows[0]}
        columns["uid"] = pa.array(columns["uid"], kind)
        if i % 2:  # another type of the same values
            columns["lang"] = pa.array(columns["lang"]).dictionary_encode()
            columns["size"] = pa.array(columns["size"], pa.int32())
        pq.write_table(pa.table(columns), folder / f"{i}.parquet", row_group_size=5)
    return {str(row["uid"]): row for row in rows if row["uid"] is not None}


def opened(folder: Path, **others: Any) -> EmbeddingStore:
    return open_store(
        str(folder / "pool"), Options(metadata=str(folder / "meta"), **others), scratch=str(folder / "cache")
    )


def rows_of(parts: Iterator[Any]) -> list[dict[str, Any]]:
    return [row for part in parts for row in part.to_pylist()]


TEXTS = [f"k{i}" for i in range(60)]


@pytest.mark.parametrize(
    ("pool", "meta", "cuts", "parts"),
    [
        ((TEXTS, None), (TEXTS[::-1], None), (), 1),
        ((TEXTS, None), ([*TEXTS[::2], "other"], None), (1, 20, 21, 45), 3),
        (([*TEXTS[:30], None, *TEXTS[31:], None], None), ([None, *TEXTS[::3], None], None), (31,), 2),
        ((list(range(60)), pa.int64()), ([str(i) for i in range(0, 60, 2)], None), (13,), 2),
        (([str(i) for i in range(60)], None), (list(range(5, 90)), pa.int16()), (50,), 1),
        (([*TEXTS, *TEXTS], None), (TEXTS[10:], None), (61,), 2),
    ],
    ids=["same keys", "some keys", "null keys", "whole numbers", "texts", "keys that repeat in the pool"],
)
def test_the_rows_are_those_of_a_dictionary(tmp_path: Path, pool: Any, meta: Any, cuts: Any, parts: int) -> None:
    write_pool(tmp_path / "pool", pool[0], cuts, pool[1])
    known = write_meta(tmp_path / "meta", meta[0], parts, meta[1])
    expected = []
    for row, key in enumerate(pool[0]):
        found = known.get(str(key), {}) if key is not None else {}
        own = {"uid": key, "text": f"caption {row}", "width": row, "thumbnail": b"picture %d" % row}
        expected.append({**own, **{name: found.get(name) for name in JOINED}, "joined": bool(found)})
    for _ in range(2):  # written, and read again
        store = opened(tmp_path)
        assert store.columns == (*OWN, *JOINED, "joined")
        for columns in (["joined", "text", "aes", "uid"], [*JOINED], ["width", "thumbnail"], [*expected[0]]):
            wanted = [{name: row[name] for name in columns} for row in expected]
            assert rows_of(part for _, part in store.scan(columns)) == wanted
            some = np.array([0, 3, 12, 13, 31, 59])
            assert rows_of(store.lookup(columns, some)) == [wanted[i] for i in some]
            assert store.layout.tables[0].schema(columns).names == columns
        half = store.where(np.arange(store.total) % 2 == 0)
        found = [(ids, part) for ids, part in half.scan(["size", "width"])]
        assert np.concatenate([ids for ids, _ in found]).tolist() == list(range(0, store.total, 2))
        wanted = [{"size": row["size"], "width": row["width"]} for row in expected[::2]]
        assert rows_of(part for _, part in found) == wanted


def test_no_bytes_are_copied(tmp_path: Path) -> None:
    write_pool(tmp_path / "pool", TEXTS)
    write_meta(tmp_path / "meta", TEXTS)
    store = opened(tmp_path)
    (path,) = (tmp_path / "cache" / "joined").iterdir()
    assert pq.read_schema(path).names == [*JOINED, "joined"]
    assert [name for name in store.columns if heavy(store, name)] == ["thumbnail", "image_embedding", "tags"]


def test_metadata_of_keys_only(tmp_path: Path) -> None:
    write_pool(tmp_path / "pool", TEXTS, (10,))
    (tmp_path / "meta").mkdir()
    pq.write_table(pa.table({"uid": TEXTS[5:20]}), tmp_path / "meta" / "a.parquet")
    joined = opened(tmp_path).column("joined")
    assert np.flatnonzero(joined).tolist() == list(range(5, 20))


@pytest.mark.parametrize("rows", [1, 2, 40])
def test_rows_are_ordered_in_parts(tmp_path: Path, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many small parts and windows give the same as a single one."""
    monkeypatch.setattr(join, "_GROUP", rows)
    monkeypatch.setattr(join, "_WINDOW", 3 * rows)
    write_pool(tmp_path / "pool", TEXTS, (20,))
    known = write_meta(tmp_path / "meta", TEXTS[::2], 2)
    found = rows_of(part for _, part in opened(tmp_path).scan(["uid", "size", "lang"]))
    nothing = {"size": None, "lang": None}
    assert found == [
        {"uid": key, "size": known.get(key, nothing)["size"], "lang": known.get(key, nothing)["lang"]} for key in TEXTS
    ]


def test_a_table_of_the_pool_that_changes_is_noticed(tmp_path: Path) -> None:
    write_pool(tmp_path / "pool", TEXTS, (20,))
    write_meta(tmp_path / "meta", TEXTS)
    store = opened(tmp_path)
    assert not store.changed()
    assert store.location_of("metadata", 25) == f"{tmp_path}/pool/1.parquet row 5"
    os.utime(tmp_path / "pool" / "1.parquet", (1, 1))
    assert store.changed()


def test_types_that_do_not_go_together(tmp_path: Path) -> None:
    write_pool(tmp_path / "pool", TEXTS)
    (tmp_path / "meta").mkdir()
    for i, values in enumerate((["a"] * 60, list(range(60)))):
        keys = [f"k{i * 60 + j}" for j in range(60)]
        pq.write_table(pa.table({"uid": keys, "x": values}), tmp_path / "meta" / f"{i}.parquet")
    with pytest.raises(PoolError, match=r"0\.parquet: has other types than the files after it \(.*x.*\); convert one"):
        opened(tmp_path)


def test_a_key_that_repeats_is_named_in_either_order(tmp_path: Path) -> None:
    write_pool(tmp_path / "pool", [*TEXTS, "k7"])
    write_meta(tmp_path / "meta", [*TEXTS, "k7"])
    with pytest.raises(BadRowsError, match="meta: the uid 'k7' occurs more than once"):
        opened(tmp_path)
    assert list((tmp_path / "cache" / "joined").iterdir()) == []


def test_what_a_killed_run_left_is_removed(tmp_path: Path) -> None:
    left = tmp_path / "cache" / "joined" / f"{join._SPILL}left"
    left.mkdir(parents=True)
    for name in ("lock", "rows.arrow"):
        (left / name).write_bytes(b"")
    write_pool(tmp_path / "pool", TEXTS)
    write_meta(tmp_path / "meta", TEXTS)
    opened(tmp_path)
    assert [path.suffix for path in (tmp_path / "cache" / "joined").iterdir()] == [".parquet"]


def test_joins_that_meet_have_folders_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two joins in one cache at once, with little memory: both write temporary files, and both are right."""
    monkeypatch.setattr(join, "_MEMORY", "16MB")
    n = 100_000
    keys = np.array([f"{i * 7919 % n:032d}" for i in range(n)])
    scratch = tmp_path / "cache" / "joined"
    sides = []
    for name, order in (("pool", np.arange(n)), ("meta", np.random.default_rng(0).permutation(n))):
        (tmp_path / name).mkdir()
        pq.write_table(pa.table({"uid": keys[order], name: order}), tmp_path / name / "a.parquet")
        sides.append((open_store(str(tmp_path / name)), order))
    (pool, _), (meta, order) = sides
    found: dict[str, Any] = {}
    ready = threading.Barrier(2)

    def table() -> None:
        ready.wait()
        found["table"] = opened(tmp_path).column("meta")

    def places() -> None:
        ready.wait()
        found["places"] = positions(pool.layout, "uid", meta.layout, "uid", str(scratch))

    seen: set[str] = set()
    threads = [threading.Thread(target=work) for work in (table, places)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        with suppress(FileNotFoundError):  # a folder that was removed meanwhile
            seen |= {path.parent.parent.name for path in scratch.glob(f"{join._SPILL}*/duckdb/*.tmp")}
    np.testing.assert_array_equal(found["table"], np.arange(n))
    np.testing.assert_array_equal(order[found["places"]], np.arange(n))
    assert len(seen) == 2, "the joins had enough memory, so that this shows nothing"
    assert [path.suffix for path in scratch.iterdir()] == [".parquet"]


@needs_root
@pytest.mark.parametrize("size", ["64k", "1m", "4m", "7m"])
def test_a_full_disk_gives_one_line_and_leaves_nothing(tmp_path: Path, size: str) -> None:
    n = 50_000
    keys = [f"k{i}" for i in range(n)]
    texts = [line.tobytes().hex() for line in np.random.default_rng(0).integers(0, 256, (n, 50), np.uint8)]
    for name, columns in (("pool", {}), ("meta", {"url": texts})):
        (tmp_path / name).mkdir()
        pq.write_table(pa.table({"uid": keys, **columns}), tmp_path / name / "a.parquet")
    with small_disk(tmp_path / "cache", size) as disk:
        with pytest.raises(OutputError, match=r"^[^\n]*(cannot be written|could not be joined)[^\n]*$"):
            opened(tmp_path)
        assert [path for path in disk.rglob("*") if path.is_file()] == []
    assert opened(tmp_path).column("joined").all()
