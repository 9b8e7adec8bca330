from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.pool.layouts.common import CUTS, ROWS, check, metadata
from tests.pools import KINDS, make, table, vectors, write_parquet
from thresher import Options, PoolError, UsageError, open_store

POOL = make(ROWS)


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("row_group", [1, 7, 100])
def test_values_keys_and_order_however_cut(tmp_path: Path, cuts: list[int], row_group: int) -> None:
    store = open_store(write_parquet(tmp_path, POOL, cuts, row_group=row_group))
    check(store, POOL, "parquet")
    other = open_store(write_parquet(tmp_path / "again", POOL, [4, 40]))
    assert store.fingerprint() == other.fingerprint()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "bfloat16"])
@pytest.mark.parametrize("by", ["option", "mark"])
def test_kinds_of_columns_and_types(tmp_path: Path, kind: str, dtype: str, by: str) -> None:
    pool = POOL.stored(dtype)
    place = write_parquet(tmp_path, pool, [20], kind, mark=dtype if by == "mark" else "")
    check(open_store(place, Options(dtype=dtype) if by == "option" else None), pool, "parquet")


def test_binary_needs_to_be_told_what_it_is(tmp_path: Path) -> None:
    place = write_parquet(tmp_path, POOL, kind="binary")
    with pytest.raises(PoolError, match=r"\.parquet \[image_embedding\]: binary .* of 16 bytes a row; .* --dtype"):
        open_store(place)
    half, single = (open_store(place, Options(dtype=dtype)) for dtype in ("float16", "float32"))
    assert (half.dim("image"), single.dim("image")) == (8, 4)
    assert half.version() != single.version()  # nothing cached for one may serve the other
    with pytest.raises(UsageError, match="--dtype bfloat: .* Did you mean 'bfloat16'"):
        Options(dtype="bfloat")


def test_a_single_file_and_its_image_column(tmp_path: Path) -> None:
    write_parquet(tmp_path, POOL, images=True)
    store = open_store(str(tmp_path / "data" / "train-00000-of-00001.parquet"))
    check(store, POOL, "parquet")
    assert store.layout.image == "image"
    assert metadata(store, "image")[5] == {"bytes": POOL.keys[5].encode(), "path": f"{POOL.keys[5]}.jpg"}


def test_columns_named_in_the_options(tmp_path: Path) -> None:
    found = table(POOL, "name", "words").append_column("mine", vectors(POOL.image))
    pq.write_table(found, tmp_path / "a.parquet")
    store = open_store(str(tmp_path), Options(image="mine", key="name", caption="words"))
    assert (store.fields, metadata(store, store.layout.key)) == (("image",), POOL.keys)
    np.testing.assert_array_equal(store.raw_at("image", np.arange(ROWS)), POOL.image)
    for options, said in (
        (Options(image="mien"), "no column 'mien'.*Did you mean 'mine'"),
        (Options(image="mine", key="nam"), "no metadata column 'nam' for --key.*Did you mean 'name'"),
        (Options(image="mine", caption="word"), "--caption .*Did you mean 'words'"),
    ):
        with pytest.raises(UsageError, match=said):
            open_store(str(tmp_path), options)
    with pytest.raises(PoolError, match=r"a\.parquet \[words\]: contains string; embeddings are"):
        open_store(str(tmp_path), Options(image="words"))


def test_columns_come_in_the_order_asked(tmp_path: Path) -> None:
    store = open_store(write_parquet(tmp_path, POOL, [20]))
    for _, part in store.scan(["text", "uid"]):
        assert part.schema.names == ["text", "uid"]
    assert next(store.lookup(["text", "uid"], np.array([30]))).to_pylist() == [
        {"text": POOL.captions[30], "uid": POOL.keys[30]}
    ]


def test_shards_without_rows_do_not_matter(tmp_path: Path) -> None:
    pool = POOL.stored("float32")
    write_parquet(tmp_path, pool, kind="list")
    empty = pq.read_table(next(tmp_path.glob("data/*"))).slice(0, 0)
    pq.write_table(empty, tmp_path / "data" / "train-00000-of-00000.parquet")
    check(open_store(str(tmp_path)), pool, "parquet")


def test_shards_keyed_by_different_columns_are_refused(tmp_path: Path) -> None:
    write_parquet(tmp_path, POOL, [20, 30])
    last = sorted(tmp_path.glob("data/*"))[2]
    pq.write_table(pq.read_table(last).drop(["uid"]), last)
    with pytest.raises(PoolError, match=rf"{last.name}: .*metadata by row, most files have .*metadata by uid"):
        open_store(str(tmp_path))


def test_an_embedding_column_of_text_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"uid": ["a"], "embedding": [["x"]]}), tmp_path / "a.parquet")
    with pytest.raises(PoolError, match=r"a\.parquet \[embedding\]: contains lists of string"):
        open_store(str(tmp_path))
