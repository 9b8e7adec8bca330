import math
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.pools import WRITERS, Pool, float32, make, table, write_datacomp, write_npy, write_parquet
from thresher import BadRowsError, EmbeddingStore, PoolError, UsageError, open_store
from thresher.pool.store import missing

ROWS = 61
POOL = make(ROWS)


def unit(array: np.ndarray) -> np.ndarray:
    wide = float32(array).astype(np.float64)
    return wide / np.linalg.norm(wide, axis=1, keepdims=True)


UNIT = {"image": unit(POOL.image), "text": unit(POOL.text)}
UNIT["joint"] = np.concatenate([UNIT["image"], UNIT["text"]], axis=1) * np.sqrt(0.5)

WIDTHS = table(POOL)["original_width"].to_numpy()

SOURCES: dict[str, Any] = {
    "npy": lambda folder: write_npy(folder, POOL, [13, 14, 50], [30]),
    "npz stored": lambda folder: write_datacomp(folder, POOL, [13, 50], compressed=False),
    "npz compressed": lambda folder: write_datacomp(folder, POOL, [13, 50]),
    "parquet": lambda folder: write_parquet(folder, POOL, [13, 50], "list"),
    "memory npy": lambda folder: in_memory(write_npy(folder, POOL, [13, 50])),
    "memory parquet": lambda folder: in_memory(write_parquet(folder, POOL, [13, 50])),
}


def in_memory(folder: str) -> str:
    """Copy a pool into fsspec's memory file system."""
    place = f"memory:/{folder}"
    fs = fsspec.filesystem("memory")
    for path in Path(folder).rglob("*.*"):
        fs.pipe(f"{folder}/{path.relative_to(folder)}", path.read_bytes())
    return place


LONG = ("npz stored", "memory parquet")


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=pytest.mark.slow if name in LONG else ()) for name in SOURCES]
)
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddingStore]:
    yield open_store(SOURCES[request.param](tmp_path_factory.mktemp("pool")))
    fsspec.filesystem("memory").store.clear()


masks = st.one_of(
    st.lists(st.booleans(), min_size=ROWS, max_size=ROWS).map(np.array),
    st.tuples(st.integers(0, ROWS), st.integers(0, ROWS)).map(  # runs of rows: the fast way
        lambda ends: (np.arange(ROWS) >= min(ends)) & (np.arange(ROWS) < max(ends))
    ),
)


@given(mask=masks, size=st.integers(1, ROWS + 3), skipped=st.integers(0, 5))
def test_blocks_of_a_view_are_plain_indexing(store: EmbeddingStore, mask: np.ndarray, size: int, skipped: int) -> None:
    view, rows = store.where(mask), np.flatnonzero(mask)
    assert len(view) == len(rows)
    assert view.ids.tolist() == rows.tolist()
    for field, wanted in UNIT.items():
        at = min(skipped * size, len(rows) // size * size)
        for block in view.blocks(field, at, size):
            assert (block.lo, block.hi) == (at, min(at + size, len(rows)))
            assert view.ids_of(block).tolist() == rows[at : at + size].tolist()
            np.testing.assert_allclose(view.vectors(field, block), wanted[rows[at : at + size]], atol=3e-7)
            if field != "joint":
                stored = getattr(POOL, field)[rows[at : at + size]]
                assert view.raw(field, block).tobytes() == stored.tobytes()
            at = block.hi
        assert at == len(rows)


@given(mask=masks, data=st.data())
def test_scattered_rows_and_metadata_of_a_view(store: EmbeddingStore, mask: np.ndarray, data: st.DataObject) -> None:
    view, rows = store.where(mask), np.flatnonzero(mask)
    if len(rows):
        positions = np.array(data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=20)), np.int64)
        for field, wanted in UNIT.items():
            found = view.vectors_at(field, positions)
            np.testing.assert_allclose(found, wanted[rows[positions]].reshape(found.shape), atol=3e-7)
    scanned = [
        (i, row) for ids, part in view.scan(["text", "uid"]) for i, row in zip(ids, part.to_pylist(), strict=True)
    ]
    assert scanned == [(i, {"text": POOL.captions[i], "uid": POOL.keys[i]}) for i in rows]
    looked_up = [row["uid"] for part in view.lookup(["uid"], rows) for row in part.to_pylist()]
    assert looked_up == [POOL.keys[i] for i in rows] == [key for _, keys in view.keys() for key in keys]
    assert view.column("original_width").tolist() == WIDTHS[rows].tolist()


def test_stripes_are_the_rows_of_their_block(store: EmbeddingStore, tmp_path: Path) -> None:
    wide = make(2500, 3)  # more than two stripes
    large = open_store(write_datacomp(tmp_path, wide, [1000], compressed=not store.seekable("image")))
    for view in (large, large.where(np.arange(2500) % 3 > 0)):
        for field, array in (("image", unit(wide.image)), ("text", unit(wide.text))):
            rows = [stripe.copy() for block in view.blocks(field, size=2100) for stripe in view.stripes(field, block)]
            assert max(map(len, rows)) <= 1024
            np.testing.assert_allclose(np.concatenate(rows), array[view.ids], atol=3e-7)


def test_unit_vectors_are_the_same_bits_from_every_source(store: EmbeddingStore, tmp_path: Path) -> None:
    plain = open_store(write_npy(tmp_path, POOL))
    (wanted,) = (plain.vectors("joint", block) for block in plain.blocks("joint"))
    (found,) = (store.vectors("joint", block) for block in store.blocks("joint"))
    assert found.tobytes() == wanted.tobytes()
    assert store.fingerprint() == plain.fingerprint()


def test_a_store_survives_pickling(store: EmbeddingStore) -> None:
    view = store.where(np.arange(ROWS) % 2 == 1)
    again = pickle.loads(pickle.dumps(view))
    assert (again.layout, again.options, again.ids.tolist()) == (view.layout, view.options, view.ids.tolist())
    assert again.version() == view.version()
    for block, other in zip(view.blocks("image"), again.blocks("image"), strict=True):
        assert (
            again.vectors("image", pickle.loads(pickle.dumps(other))).tobytes()
            == view.vectors("image", block).tobytes()
        )


def test_identity_of_all_layouts(tmp_path: Path) -> None:
    stores = {name: open_store(write(tmp_path / name, POOL, [9])) for name, write in WRITERS.items()}
    assert [store.layout.kind for store in stores.values()] == list(WRITERS)
    assert len({store.fingerprint() for store in stores.values()}) == 1
    single = POOL.stored("float32")
    assert open_store(write_npy(tmp_path / "float32", single)).fingerprint() == stores["npy"].fingerprint()
    for field in ("image", "text"):  # a first, a middle and a last row are among the sampled ones
        for other in (POOL.with_rows(field, r0=1), POOL.with_rows(field, r60=1)):
            folder = tmp_path / f"{field} {other.image[0, 0]} {other.text[0, 0]}"
            assert open_store(write_npy(folder, other)).fingerprint() != stores["npy"].fingerprint()
    renamed = Pool(POOL.image, POOL.text, [*POOL.keys[:-1], "other"], POOL.captions)
    assert open_store(write_npy(tmp_path / "renamed", renamed)).fingerprint() != stores["npy"].fingerprint()


def test_version_changes_with_the_files(tmp_path: Path) -> None:
    place = write_npy(tmp_path, POOL)
    before = open_store(place).version()
    assert open_store(place).version() == before
    write_npy(tmp_path, POOL.with_rows("image", r3=0.5))
    assert open_store(place).version() != before


@pytest.mark.parametrize("write", [write_npy, write_parquet])
def test_long_pools_keep_their_order(tmp_path: Path, write: Any) -> None:
    pool = make(20_000, 1)
    options = {"row_group": 700} if write is write_parquet else {}
    store = open_store(write(tmp_path, pool, [8192, 16_384, 16_385], **options))
    blocks = list(store.blocks("image"))
    assert [len(block) for block in blocks] == [16_384, 20_000 - 16_384]
    found = np.concatenate([store.raw("image", block) for block in blocks])
    assert found.tobytes() == pool.image.tobytes()
    rows = np.array([0, 699, 700, 8191, 8192, 16_384, 19_999])
    assert store.raw_at("image", rows).tobytes() == pool.image[rows].tobytes()


def test_whereabouts_and_files(tmp_path: Path) -> None:
    store = open_store(write_npy(tmp_path, POOL, [13], [50]))
    assert store.location_of("image", 12).endswith("image_0.npy row 12")
    assert store.location_of("text", 13).endswith("text_1.npy row 0")
    assert store.location_of("metadata", 60).endswith("metadata_1.parquet row 10")
    names = [Path(path).name for _, path in store.files()]
    assert names == [
        "image_0.npy",
        "image_1.npy",
        "text_0.npy",
        "text_1.npy",
        "metadata_0.parquet",
        "metadata_1.parquet",
    ]


def test_wrong_questions_are_usage_errors(tmp_path: Path) -> None:
    store = open_store(write_npy(tmp_path, POOL, table_cuts=None))
    with pytest.raises(UsageError, match=r"a mask of \(3,\) rows for a store of 61"):
        store.where(np.ones(3, bool))
    with pytest.raises(UsageError, match="needs the metadata column 'size'; .* has no metadata"):
        store.require(["size"], "filter")
    with pytest.raises(UsageError, match="has no audio embeddings; it has image, text, joint"):
        store.dim("audio")
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(np.ones(12, "f4")), 4)
    pq.write_table(pa.table({"uid": ["a", "b", "c"], "mine": vectors, "other": vectors}), tmp_path / "named.parquet")
    with pytest.raises(UsageError, match="no image embeddings; name their column with --image or --text: mine, other"):
        open_store(str(tmp_path / "named.parquet")).dim("image")
    pq.write_table(pa.table({"uid": ["a", "b"], "embedding": ["1 2", "3 4"]}), tmp_path / "text.parquet")
    with pytest.raises(
        UsageError, match="no image embeddings; none of its columns has lists of numbers; give the files"
    ):
        open_store(str(tmp_path / "text.parquet")).dim("image")
    with pytest.raises(UsageError, match="'uid' is not numeric"):
        open_store(write_parquet(tmp_path / "parquet", POOL)).column("uid")


@pytest.mark.parametrize(("dtype", "value"), [("float64", np.inf), ("float32", np.inf), ("float16", np.nan)])
def test_a_row_without_direction_is_named_and_only_when_read(tmp_path: Path, dtype: str, value: float) -> None:
    pool = POOL.stored(dtype).with_rows("text", r20=value)
    store = open_store(write_npy(tmp_path, pool, [13]))
    with pytest.raises(BadRowsError, match=r"text_1\.npy row 7: the text embedding has NaN or inf.*row 20 of the pool"):
        store.vectors_at("text", np.array([3, 20]))
    view = store.where(np.arange(ROWS) != 20)
    assert np.isfinite(view.vectors_at("joint", np.arange(60))).all()


@pytest.mark.parametrize("write", [write_parquet, write_npy])
def test_a_file_that_changes_after_opening_is_noticed(tmp_path: Path, write: Any) -> None:
    store = open_store(write(tmp_path, POOL, [13]))
    write(tmp_path, POOL.at(range(50)), [13])
    with pytest.raises(PoolError, match="_1.npy: can no longer be read|00001-of-00002.parquet: had 48 rows when"):
        [store.raw("image", block) for block in store.blocks("image", size=10)]


BIG = 2**53 + 1  # float64 has no such number


@pytest.mark.parametrize(
    ("values", "kind", "wanted"),
    [
        ([BIG, 2, 3], pa.int64(), [BIG, 2, 3]),
        ([2**64 - 1, 2, 3], pa.uint64(), [2**64 - 1, 2, 3]),
        ([5, None, 3], pa.int64(), [5.0, math.nan, 3.0]),
        ([BIG, None, -BIG], pa.int64(), [BIG, None, -BIG]),
        ([2**64 - 1, None, 3], pa.uint64(), [2**64 - 1, None, 3]),
        ([-(2**63), None, 3], pa.int64(), [-(2**63), None, 3]),
        ([True, None, False], pa.bool_(), [1.0, math.nan, 0.0]),
        ([True, True, False], pa.bool_(), [True, True, False]),
        ([0.5, None, math.inf], pa.float32(), [0.5, math.nan, math.inf]),
        ([np.float16(0.5), None, np.float16(2)], pa.float16(), [0.5, math.nan, 2.0]),
        ([None, None, None], pa.null(), [math.nan] * 3),
    ],
)
def test_numbers_keep_all_their_digits(tmp_path: Path, values: list[Any], kind: pa.DataType, wanted: list[Any]) -> None:
    rows = np.ones((3, 2), np.float32)
    pq.write_table(pa.table({"n": pa.array(values, kind), "embedding": list(rows)}), tmp_path / "a.parquet")
    column = open_store(str(tmp_path)).column("n")
    empty = [i for i, value in enumerate(values) if value is None]
    assert missing(column).tolist() == empty
    assert repr(column.tolist()) == repr(wanted)


def test_numbers_of_files_of_several_types_keep_their_digits(tmp_path: Path) -> None:
    rows = list(np.ones((2, 2), np.float32))
    for name, column in (("a", pa.array([BIG, BIG])), ("b", pa.array([None, 1], pa.int32())), ("c", pa.nulls(2))):
        pq.write_table(pa.table({"n": column, "embedding": rows}), tmp_path / f"{name}.parquet")
    assert open_store(str(tmp_path)).column("n").tolist() == [BIG, BIG, None, 1, None, None]


@pytest.mark.parametrize("kind", [pa.timestamp("ns"), pa.date32(), pa.decimal128(10, 2), pa.string()])
def test_what_is_no_number_is_refused_with_its_type(tmp_path: Path, kind: pa.DataType) -> None:
    column = pa.nulls(3, kind)
    pq.write_table(pa.table({"n": column, "embedding": list(np.ones((3, 2), np.float32))}), tmp_path / "a.parquet")
    with pytest.raises(UsageError, match=f"'n' is not numeric, it contains {re.escape(str(kind))}"):
        open_store(str(tmp_path)).column("n")
