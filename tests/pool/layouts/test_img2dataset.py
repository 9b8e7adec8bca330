from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.pool.layouts.common import CUTS, ROWS, metadata
from tests.pools import Pool, make, write_clip_retrieval, write_datacomp, write_img2dataset
from thresher import BadRowsError, OutputError, PoolError, UsageError, open_store
from thresher import Options as Options_
from thresher.runtime.checksums import CacheWarning

POOL = make(ROWS)


def shuffled(pool: Pool, seed: int = 1) -> Pool:
    return pool.at(np.random.default_rng(seed).permutation(len(pool)))


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("failed", [1, 3])
def test_rows_are_the_successes(tmp_path: Path, cuts: list[int], failed: int) -> None:
    store = open_store(write_img2dataset(tmp_path, POOL, cuts, failed))
    assert (store.layout.kind, store.fields, len(store)) == ("img2dataset", (), ROWS)
    assert metadata(store, "key") == POOL.keys
    assert metadata(store, store.layout.caption) == POOL.captions
    assert set(metadata(store, "status")) == {"success"}
    some = np.array([0, 3, 20, 40])
    assert [k for part in store.lookup(["key"], some) for k in part.column(0).to_pylist()] == [
        POOL.keys[i] for i in some
    ]
    assert store.fingerprint() == open_store(write_img2dataset(tmp_path / "again", POOL, [7], 2)).fingerprint()


def test_a_damaged_first_shard_does_not_hide_the_layout(tmp_path: Path) -> None:
    write_img2dataset(tmp_path, POOL, [20])
    (tmp_path / "00000.parquet").write_bytes(b"PAR1 no parquet")
    with pytest.raises(PoolError, match=r"00000\.parquet: cannot be read"):
        open_store(str(tmp_path))
    store = open_store(str(tmp_path), Options_(skip_bad=True))
    assert (store.layout.kind, metadata(store, "key")) == ("img2dataset", POOL.keys[20:])


# --- joined to a pool of vectors ------------------------------------------------------------------


def options(tmp_path: Path, **others: Any) -> Options_:
    return Options_(metadata=str(tmp_path / "meta"), **others)


@pytest.mark.parametrize("write", [write_clip_retrieval, write_datacomp])
def test_joined_by_key_in_the_order_of_the_pool(tmp_path: Path, write: Any) -> None:
    write_img2dataset(tmp_path / "meta", shuffled(POOL.at(range(30))), [11])
    plain = open_store(write(tmp_path / "pool", POOL, [20]))
    store = open_store(str(tmp_path / "pool"), options(tmp_path))
    assert store.fingerprint() == plain.fingerprint()
    assert metadata(store, store.layout.key) == POOL.keys
    assert metadata(store, store.layout.caption) == POOL.captions
    assert metadata(store, "joined") == [row < 30 for row in range(ROWS)]
    assert metadata(store, "status") == ["success"] * 30 + [None] * 11
    assert metadata(store, "url") == [f"https://example.org/{key}.jpg" for key in POOL.keys]  # the pool's own
    if plain.layout.key == "image_path":
        assert metadata(store, "key") == [*POOL.keys[:30], *[None] * 11]


def test_many_rows_stay_in_order(tmp_path: Path) -> None:
    """More than DuckDB gives to one thread."""
    keys = np.random.default_rng(0).permutation(300_000)
    for name in ("pool", "meta"):
        (tmp_path / name).mkdir()
    np.save(tmp_path / "pool" / "image.npy", np.ones((len(keys), 1), "<f2"))
    pq.write_table(pa.table({"id": keys}), tmp_path / "pool" / "keys.parquet", row_group_size=7_000)
    found = np.arange(0, len(keys), 2)
    pq.write_table(pa.table({"key": found.astype(str), "double": 2 * found}), tmp_path / "meta" / "a.parquet")
    store = open_store(str(tmp_path / "pool"), options(tmp_path))
    assert [metadata(store, "id"), metadata(store, "double")] == [
        keys.tolist(),
        [2 * key if key % 2 == 0 else None for key in keys.tolist()],
    ]


def test_written_once_and_again_when_damaged(tmp_path: Path) -> None:
    write_img2dataset(tmp_path / "meta", shuffled(POOL))
    write_clip_retrieval(tmp_path / "pool", POOL)

    def opened() -> int:
        store = open_store(str(tmp_path / "pool"), options(tmp_path), scratch=str(tmp_path / "scratch"))
        assert metadata(store, "key") == POOL.keys
        (path,) = (tmp_path / "scratch" / "joined").iterdir()
        return path.stat().st_ino

    first = opened()
    assert opened() == first
    next((tmp_path / "scratch" / "joined").iterdir()).write_bytes(b"half")
    with pytest.warns(CacheWarning, match=r"\.parquet is damaged \(it ends early\); it is computed again"):
        assert opened()
    assert opened()
    write_img2dataset(tmp_path / "meta", shuffled(POOL, 2))  # other files: joined anew, under another name
    with pytest.raises(ValueError, match="too many values"):
        opened()


def test_names_that_differ_in_case_or_quote(tmp_path: Path) -> None:
    (tmp_path / "pool").mkdir()
    np.save(tmp_path / "pool" / "image.npy", POOL.image)
    pq.write_table(pa.table({"uid": POOL.keys, "TEXT": POOL.captions, 'a"b': range(ROWS)}), tmp_path / "pool/a.parquet")
    (tmp_path / "meta").mkdir()
    extra = pa.table({"UID": ["x"] * ROWS, "text": ["y"] * ROWS, "key": POOL.keys, "Width": range(ROWS)})
    pq.write_table(extra, tmp_path / "meta" / "b.parquet")
    store = open_store(str(tmp_path / "pool"), options(tmp_path))
    assert metadata(store, "TEXT") == POOL.captions
    assert metadata(store, 'a"b') == metadata(store, "Width") == list(range(ROWS))
    assert set(store.columns) == {"uid", "TEXT", 'a"b', "key", "Width", "joined"}


def test_tables_with_columns_in_another_order_or_type(tmp_path: Path) -> None:
    write_clip_retrieval(tmp_path / "pool", POOL, [20])
    for name, rows in (("metadata_0", slice(0, 20)), ("metadata_1", slice(20, None))):
        part = POOL.at(rows)
        columns = {"image_path": part.keys, "caption": part.captions, "size": pa.array(range(len(part)), pa.int32())}
        if rows.start:
            columns = {
                **{name: columns[name] for name in ("size", "caption", "image_path")},
                "size": [2**40] * len(part),
            }
        pq.write_table(pa.table(columns), tmp_path / "pool" / "metadata" / f"{name}.parquet")
    write_img2dataset(tmp_path / "meta", shuffled(POOL))
    store = open_store(str(tmp_path / "pool"), options(tmp_path))
    assert (metadata(store, "image_path"), metadata(store, "caption")) == (POOL.keys, POOL.captions)
    assert metadata(store, "size") == [*range(20), *[2**40] * 21]


def test_the_caption_may_come_with_the_metadata(tmp_path: Path) -> None:
    np.save(tmp_path / "image.npy", POOL.image)
    pq.write_table(pa.table({"uid": POOL.keys}), tmp_path / "keys.parquet")
    write_img2dataset(tmp_path / "meta", shuffled(POOL))
    for chosen in (None, "caption"):
        store = open_store(str(tmp_path / "image.npy"), None)
        assert store.layout.caption is None
        store = open_store(str(move(tmp_path)), options(tmp_path, caption=chosen))
        assert metadata(store, store.layout.caption) == POOL.captions
    with pytest.raises(UsageError, match="--caption .*Did you mean 'caption'"):
        open_store(str(move(tmp_path)), options(tmp_path, caption="captoin"))


def move(folder: Path) -> Path:
    """Put the vectors and keys in a folder of their own, once."""
    (folder / "pool").mkdir(exist_ok=True)
    for name in ("image.npy", "keys.parquet"):
        (folder / "pool" / name).write_bytes((folder / name).read_bytes())
    return folder / "pool"


@pytest.mark.parametrize(
    ("meta", "error", "said"),
    [
        (
            lambda p: p.at([*range(ROWS), 3]),
            BadRowsError,
            rf"meta: the key '{POOL.keys[3]}' occurs more than once",
        ),
        (lambda p: make(5, seed=9), UsageError, "no image_path of .*pool is among the key of .*meta"),
    ],
)
def test_metadata_that_cannot_be_joined(tmp_path: Path, meta: Any, error: type[Exception], said: str) -> None:
    write_img2dataset(tmp_path / "meta", meta(POOL))
    write_clip_retrieval(tmp_path / "pool", POOL)
    with pytest.raises(error, match=said):
        open_store(str(tmp_path / "pool"), options(tmp_path), scratch=str(tmp_path / "scratch"))
    assert not list((tmp_path / "scratch").rglob("*.parquet"))


def test_places_that_cannot_be_joined(tmp_path: Path) -> None:
    write_img2dataset(tmp_path / "meta", POOL)
    np.save(tmp_path / "image.npy", POOL.image)
    with pytest.raises(UsageError, match=r"image\.npy has no key column .*--key"):
        open_store(str(tmp_path / "image.npy"), options(tmp_path))
    write_clip_retrieval(tmp_path / "pool", POOL)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        open_store(str(tmp_path / "pool"), options(tmp_path), scratch=str(tmp_path / "file"))
