"""Pools that cannot be trusted: every fault names its file and says what to do, and none is passed over."""

import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.pools import (
    WRITERS,
    Pool,
    make,
    vectors,
    write_clip_retrieval,
    write_datacomp,
    write_img2dataset,
    write_npy,
    write_parquet,
)
from thresher import (
    BadRowsError,
    Cache,
    EmbeddingStore,
    Options,
    PoolError,
    Selection,
    Serial,
    ThresherError,
    UsageError,
    build,
    from_arrays,
    open_store,
    run_steps,
)
from thresher.runtime.format import counted

ROWS, CUTS = 60, [20, 40]
SECOND = range(20, 40)  # the rows of the second of three shards
POOL = make(ROWS)
ADVICE = "replace|remove|save|convert|copy|create|name|give|fetch|say|finished|missing|number"  # what to do
STEPS = [
    ("semdedup", {"eps": 0.3, "clusters": 3, "iterations": 2}),
    ("random", {"keep": "50%"}),
    ("clip-score", {"keep": "50%"}),
    ("density", {"keep": "50%", "clusters": 3, "iterations": 2}),
]
SKIP = Options(skip_bad=True)


def select(store: EmbeddingStore, folder: Path, step: tuple[str, dict[str, Any]] = STEPS[0]) -> Selection:
    return run_steps(store, [build(*step)], engine=Serial(), cache=Cache.at(folder))


def kept_keys(store: EmbeddingStore, selection: Selection) -> list[str]:
    return [key for _, keys in store.where(selection.mask()).keys() for key in keys]


def refused(place: str, tmp_path: Path, file: str, options: Options | None = None) -> str:
    """Opening, or else running, raises a PoolError that names the file and says what to do."""
    with pytest.raises(PoolError) as error:
        select(open_store(place, options), tmp_path / "cache", ("clip-score", {"keep": "50%"}))
    told = str(error.value)
    assert file in told
    assert re.search(rf"[;,] .*\b({ADVICE})\b", told.replace(file, ""))
    return told


def same_without(
    place: str, tmp_path: Path, rows: list[int], listed: str, clean: Pool = POOL, steps: list[Any] = STEPS[:1]
) -> Selection:
    """With skip_bad a method keeps what it keeps of a clean pool without the rows, and says what was left out."""
    store = open_store(place, SKIP)
    good = clean.at([row for row in range(len(clean)) if row not in rows])
    assert good.keys  # or there is nothing to compare
    dtype = "bfloat16" if good.image.dtype == np.uint16 else None
    reference = open_store(WRITERS[store.layout.kind](tmp_path / "clean", good), Options(dtype=dtype))
    for step in steps:
        selection = select(store, tmp_path / "cache", step)
        wanted = kept_keys(reference, select(reference, tmp_path / "cache", step))
        if step[0] == "random":  # tied to row numbers: only the size can be the same
            assert len(selection) == len(wanted)
        else:
            assert kept_keys(store, selection) == wanted
        assert set(kept_keys(store, selection)) <= set(good.keys)
        first = selection.steps[0]
        assert first.method == "skip-bad"
        assert first.rows_out == len(good)
        assert listed in " ".join(first.notes)
    return selection


def left_out(place: str, path: Path) -> None:
    """With skip_bad the pool is the one without the shard of a file, which is listed."""
    store = open_store(place, SKIP)
    assert [key for _, keys in store.keys() for key in keys] == [*POOL.keys[:20], *POOL.keys[40:]]
    good = [*range(20), *range(40, ROWS)]
    for field in ("image", "text"):
        assert store.raw_at(field, np.arange(40)).tobytes() == getattr(POOL, field)[good].tobytes()
    assert [aside.path for aside in store.layout.skipped] == [str(path)]
    assert store.layout.skipped[0].why


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda file: None)


# --- shards that cannot be read -------------------------------------------------------------------


def garbage(path: Path) -> None:
    path.write_bytes(np.random.default_rng(0).bytes(path.stat().st_size))


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def folder_instead(path: Path) -> None:
    path.unlink()
    path.mkdir()


def dangling(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def cut(share: float) -> Callable[[Path], None]:
    def truncated(path: Path) -> None:
        data = path.read_bytes()
        path.write_bytes(data[: min(int(len(data) * share), len(data) - 1)])

    return truncated


HARMS = {
    "garbage": garbage,
    "empty": emptied,
    "folder": folder_instead,
    "dangling": dangling,
    **{f"cut at {share}": cut(share) for share in (0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 1.0)},
}

SHARDED: dict[str, tuple[Callable[[Path], str], str]] = {
    "npy": (lambda folder: write_npy(folder, POOL, CUTS, CUTS), "image_1.npy"),
    "npy text": (lambda folder: write_npy(folder, POOL, CUTS, CUTS), "text_1.npy"),
    "npy table": (lambda folder: write_npy(folder, POOL, CUTS, CUTS), "metadata_1.parquet"),
    "datacomp": (lambda folder: write_datacomp(folder, POOL, CUTS), "b*.npz"),
    "datacomp stored": (lambda folder: write_datacomp(folder, POOL, CUTS, compressed=False), "b*.npz"),
    "datacomp table": (lambda folder: write_datacomp(folder, POOL, CUTS), "b*.parquet"),
    "clip-retrieval": (lambda folder: write_clip_retrieval(folder, POOL, CUTS), "img_emb_1.npy"),
    "clip-retrieval table": (lambda folder: write_clip_retrieval(folder, POOL, CUTS), "metadata_1.parquet"),
    "parquet": (lambda folder: write_parquet(folder, POOL, CUTS), "train-00001*.parquet"),
}


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("kind", SHARDED)
def test_an_unreadable_shard_is_refused(tmp_path: Path, kind: str, harm: str) -> None:
    write, pattern = SHARDED[kind]
    place = write(tmp_path / "pool")
    (path,) = (tmp_path / "pool").rglob(pattern)
    HARMS[harm](path)
    refused(place, tmp_path, str(path))
    left_out(place, path)


@pytest.mark.parametrize("kind", SHARDED)
def test_an_unreadable_shard_is_set_aside(tmp_path: Path, kind: str) -> None:
    write, pattern = SHARDED[kind]
    place = write(tmp_path / "pool")
    (path,) = (tmp_path / "pool").rglob(pattern)
    cut(0.5)(path)
    same_without(place, tmp_path, list(SECOND), f"skipped {path}: ", steps=STEPS)


WIDE = make(ROWS, 700)  # more than a header's read of zipfile takes in


def flip(path: Path, array: str, at: float) -> None:
    """Flip a bit of a member of an .npz, at a share of its length."""
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(f"{array}.npy")
    data = bytearray(path.read_bytes())
    data[info.header_offset + 30 + len(info.filename) + 20 + int(info.compress_size * at)] ^= 0x10  # 20: zip64 field
    path.write_bytes(data)


@pytest.mark.parametrize("at", [0.0, 0.003, 0.2, 0.5, 0.8, 0.999])
@pytest.mark.parametrize("array", ["l14_img", "l14_txt"])
def test_a_flipped_bit_in_compressed_data_is_found(tmp_path: Path, array: str, at: float) -> None:
    place = write_datacomp(tmp_path / "pool", WIDE, CUTS)
    (path,) = (tmp_path / "pool").rglob("b*.npz")
    flip(path, array, at)
    refused(place, tmp_path, str(path))
    same_without(place, tmp_path, list(SECOND), f"skipped {path}: ", WIDE)


@pytest.mark.parametrize("last", [39, 37])
def test_a_checksum_counts_even_if_the_end_of_a_file_is_not_needed(tmp_path: Path, last: int) -> None:
    place = write_datacomp(tmp_path / "pool", WIDE, CUTS)
    (path,) = (tmp_path / "pool").rglob("b*.npz")
    flip(path, "l14_img", 0.999)
    view = open_store(place).where(np.arange(ROWS) <= last)
    with pytest.raises(PoolError, match=str(path)):
        [view.raw("image", block) for block in view.blocks("image", size=last + 1)]
    with pytest.raises(PoolError, match=str(path)):
        view.vectors_at("image", np.array([20]))


@pytest.mark.parametrize("compressed", [True, False])
def test_no_truncation_of_an_npz_gives_other_values(tmp_path: Path, compressed: bool) -> None:
    place = write_datacomp(tmp_path / "pool", make(4, 4), compressed=compressed)
    (path,) = (tmp_path / "pool").rglob("*.npz")
    data = path.read_bytes()
    for length in range(0, len(data), 37):
        path.write_bytes(data[:length])
        with pytest.raises(PoolError, match=str(path)):
            open_store(place).fingerprint()


@pytest.mark.slow
def test_flipped_bits_in_a_parquet_file_never_raise_anything_else(tmp_path: Path) -> None:
    place = write_parquet(tmp_path / "pool", POOL, CUTS)
    (path,) = (tmp_path / "pool").rglob("train-00001*")
    data = path.read_bytes()
    for at in np.random.default_rng(0).integers(0, len(data), 150):
        path.write_bytes(data[:at] + bytes([data[at] ^ 0x40]) + data[at + 1 :])
        try:
            store = open_store(place)
            [store.raw(field, block) for field in ("image", "text") for block in store.blocks(field, size=16)]
            list(store.scan([*store.columns]))
        except ThresherError as error:
            assert str(path) in str(error) or "row counts differ" in str(error) or "has no" in str(error)  # noqa: PT017


# --- arrays that are no embeddings ----------------------------------------------------------------


def pickled(path: Path) -> None:
    np.save(path, np.array([[{"a": 1}] * 8] * 20, object), allow_pickle=True)


def header(path: Path, **fields: Any) -> None:
    array = {"descr": "<f2", "fortran_order": False, "shape": (20, 8), **fields}
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, array)
        file.write(bytes(1000))


IMAGE = POOL.image[20:40]
ARRAYS: dict[str, tuple[Callable[[Path], None], str]] = {
    "pickle": (pickled, "pickled Python objects, which are never read"),
    "Fortran order": (lambda path: np.save(path, np.asfortranarray(IMAGE)), "Fortran order; save it with"),
    "1-D": (lambda path: np.save(path, IMAGE.ravel()), r"has shape \(160,\)"),
    "3-D": (lambda path: np.save(path, IMAGE[None]), r"has shape \(1, 20, 8\)"),
    "no width": (lambda path: np.save(path, IMAGE[:, :0]), r"has shape \(20, 0\)"),
    "negative": (lambda path: header(path, shape=(-20, 8)), r"has shape \(-20, 8\)"),
    "huge": (lambda path: header(path, shape=(10**12, 10**6)), "it is truncated"),
    "integers": (lambda path: np.save(path, np.ones((20, 8), int)), "contains int64; embeddings are float16"),
    "uint16": (lambda path: np.save(path, IMAGE.view("u2")), "for bfloat16 bits pass --dtype bfloat16"),
    "complex": (lambda path: np.save(path, IMAGE.astype("c8")), "contains complex64"),
    "big-endian": (
        lambda path: np.save(path, IMAGE.astype(">f4")),
        r"save it little-endian: np.save\(path, array.astype\('<f4'\)\)",
    ),
    "two arrays": (lambda path: path.write_bytes(path.read_bytes() * 2), "another array begins at byte .* is not read"),
    "strings": (lambda path: np.save(path, np.full((20, 8), "a")), "contains str"),
    "records": (lambda path: np.save(path, np.ones((20, 8), "f2,f2")), "embeddings are float16"),
    "other type": (lambda path: np.save(path, IMAGE.astype("f4")), "8 x float32.*convert"),
    "other width": (lambda path: np.save(path, IMAGE[:, :6]), "6 x float16.*convert"),
    "version 9": (lambda path: path.write_bytes(b"\x93NUMPY\x09\x00" + path.read_bytes()[8:]), "cannot be read"),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_that_are_no_embeddings(tmp_path: Path, name: str) -> None:
    place = write_npy(tmp_path / "pool", POOL, CUTS, CUTS)
    path = tmp_path / "pool" / "image_1.npy"
    spoil, said = ARRAYS[name]
    spoil(path)
    with pytest.raises(PoolError, match=f"{path}.*{said}"):
        open_store(place)
    left_out(place, path)


@pytest.mark.parametrize("compressed", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("name", ARRAYS)
def test_members_that_are_no_embeddings(tmp_path: Path, name: str, compressed: int) -> None:
    place = write_datacomp(tmp_path / "pool", POOL, CUTS)
    (path,) = (tmp_path / "pool").rglob("b*.npz")
    spoil, said = ARRAYS[name]
    member = tmp_path / "l14_img.npy"
    np.save(member, IMAGE)
    spoil(member)
    with np.load(path) as arrays:
        np.savez(path, l14_txt=arrays["l14_txt"])
    with zipfile.ZipFile(path, "a", compressed) as archive:
        archive.write(member, "l14_img.npy")
    with pytest.raises(PoolError, match=f"{path}.*({said}|does not have the length that its header says)"):
        open_store(place)
    left_out(place, path)


def _tables(folder: Path, form: str, vectors: pa.Array) -> EmbeddingStore:
    """Open a pool of one table of 20 vectors, in a form of tables."""
    table, folder = pa.table({"uid": [f"k{i}" for i in range(20)], "embedding": vectors}), folder / "pool"
    if form == "memory":
        return from_arrays(table=table, skip_bad=True, cache=folder.parent)
    folder.mkdir(parents=True)
    if form == "parquet":
        pq.write_table(table, folder / "a.parquet")
    elif form == "arrow":
        with pa.ipc.new_file(folder / "a.arrow", table.schema) as file:
            file.write(table)
    else:
        lance.write_dataset(table, folder / "a.lance")
    return open_store(str(folder / "a.lance" if form == "lance" else folder), SKIP)


TABLES = ["parquet", "arrow", "lance", "memory"]
KIND = pa.list_(pa.float32())


@pytest.mark.parametrize("form", TABLES)
def test_columns_without_a_vector_are_refused(tmp_path: Path, form: str) -> None:
    empty = {"lists": pa.array([[]] * 20, KIND), "large": pa.array([None, []] * 10, pa.large_list(pa.float32()))}
    for name, cells in empty.items():
        with pytest.raises(ThresherError, match="no (usable file .*no row has an embedding|row has a vector)"):
            _tables(tmp_path / name, form, cells)


@pytest.mark.parametrize("form", TABLES)
def test_an_empty_list_is_a_missing_vector_and_does_not_give_the_width(tmp_path: Path, form: str) -> None:
    cells = [*([[]] * 2), [], None, *IMAGE[4:].tolist()]
    store = _tables(tmp_path, form, pa.array(cells, KIND))
    assert store.dim("image") == 8
    whole = select(store, tmp_path / "cache", ("semdedup", {"eps": 1e-6, "clusters": 2, "iterations": 2}))
    assert np.flatnonzero(~whole.mask()).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("form", TABLES)
def test_vectors_that_are_too_long_are_refused(tmp_path: Path, form: str) -> None:
    long = pa.ListArray.from_arrays(pa.array([0, *[2**20 + 1] * 20], pa.int32()), pa.array(np.ones(2**20 + 1, "f4")))
    with pytest.raises(ThresherError, match="has 1,048,577 dimensions; embeddings have at most 1,048,576"):
        _tables(tmp_path, form, long)


def test_two_archives_in_one_file_are_refused(tmp_path: Path) -> None:
    place = write_datacomp(tmp_path / "pool", POOL, CUTS)
    (path,) = (tmp_path / "pool").rglob("b*.npz")
    path.write_bytes(path.read_bytes() * 2)
    with pytest.raises(PoolError, match=f"{path}: its arrays begin at byte .*, and what comes before them is not read"):
        open_store(place)
    left_out(place, path)


@pytest.mark.parametrize("member", ["../x.npy", "/x.npy", "a/x.npy", "..\\x.npy", "C:x.npy"])
def test_members_that_climb_out_are_refused(tmp_path: Path, member: str) -> None:
    place = write_datacomp(tmp_path / "pool", POOL, CUTS)
    (path,) = (tmp_path / "pool").rglob("b*.npz")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(zipfile.ZipInfo(member), b"")
    with pytest.raises(PoolError, match=rf"{path}: has a member named .*x\.npy'; refused"):
        open_store(place)


# --- shards that do not fit each other ------------------------------------------------------------


def change_rows(path: Path, change: Callable[[Any], Any]) -> None:
    """Rewrite a file with other rows."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(change(pq.read_table(path).to_pylist())), path)
    elif path.suffix == ".npy":
        np.save(path, change(np.load(path)))
    else:
        with np.load(path) as arrays:
            found = {name: change(array) for name, array in arrays.items()}
        np.savez(path, **found)


@pytest.mark.parametrize("kind", [kind for kind in SHARDED if kind != "parquet"])
@pytest.mark.parametrize("change", [lambda rows: rows[:-1], lambda rows: [*rows, rows[0]]], ids=["less", "more"])
def test_row_counts_that_differ(tmp_path: Path, kind: str, change: Any) -> None:
    write, pattern = SHARDED[kind]
    place = write(tmp_path / "pool")
    (path,) = (tmp_path / "pool").rglob(pattern)
    change_rows(path, change)
    assert "row" in refused(place, tmp_path, str(path.parent))
    same_without(place, tmp_path, list(SECOND), "which belongs to it, has ")


def test_row_counts_that_differ_in_total_only_when_cut_differently(tmp_path: Path) -> None:
    place = write_npy(tmp_path / "pool", POOL, CUTS, [])
    change_rows(tmp_path / "pool" / "metadata_0.parquet", lambda rows: rows[1:])
    for options in (None, SKIP):  # what belongs to what cannot be told, so that nothing is set aside
        told = refused(place, tmp_path, str(tmp_path / "pool"), options)
        assert "image has 60 rows" in told
        assert "metadata has 59 rows" in told


def test_files_cut_differently_are_no_fault(tmp_path: Path) -> None:
    """As many files of each kind, but other rows in each: nothing may be set aside."""
    write_npy(tmp_path / "pool", POOL, CUTS, [10, 30])
    for i, rows in enumerate((slice(0, 5), slice(5, 25), slice(25, None))):
        np.save(tmp_path / "pool" / f"text_{i}.npy", POOL.text[rows])
    for options in (None, SKIP):
        store = open_store(str(tmp_path / "pool"), options)
        assert (len(store), store.layout.skipped) == (ROWS, ())
        assert store.raw_at("text", np.arange(ROWS)).tobytes() == POOL.text.tobytes()


@pytest.mark.parametrize("lost", ["image_1.npy", "metadata_1.parquet"])
def test_a_missing_file_of_a_plain_folder_is_refused(tmp_path: Path, lost: str) -> None:
    place = write_npy(tmp_path / "pool", POOL, CUTS, CUTS)
    (tmp_path / "pool" / lost).unlink()
    for options in (None, SKIP):
        assert "row counts differ" in refused(place, tmp_path, str(tmp_path / "pool"), options)


@pytest.mark.parametrize(
    ("write", "pattern"),
    [
        (write_datacomp, "b*.npz"),
        (write_datacomp, "b*.parquet"),
        (write_clip_retrieval, "img_emb/*_1.*"),
        (write_clip_retrieval, "metadata/*_1.*"),
    ],
)
def test_a_missing_file_of_a_shard(tmp_path: Path, write: Any, pattern: str) -> None:
    place = write(tmp_path / "pool", POOL, CUTS)
    (path,) = (tmp_path / "pool").rglob(pattern)
    path.unlink()
    refused(place, tmp_path, str(tmp_path / "pool"))
    same_without(place, tmp_path, list(SECOND), "skipped ")


@pytest.mark.parametrize("write", [write_datacomp, write_parquet])
def test_a_shard_without_texts(tmp_path: Path, write: Any) -> None:
    place = write(tmp_path / "pool", POOL, CUTS)
    if write is write_datacomp:
        (path,) = (tmp_path / "pool").rglob("b*.npz")
        with np.load(path) as arrays:
            np.savez(path, l14_img=arrays["l14_img"])
    else:
        (path,) = (tmp_path / "pool").rglob("train-00001*")
        pq.write_table(pq.read_table(path).drop(["text_embedding"]), path)
    with pytest.raises(PoolError, match=f"{path}: has image .*most files have .*text .*; convert or remove"):
        open_store(place)
    same_without(place, tmp_path, list(SECOND), f"skipped {path}: ")


# --- rows ------------------------------------------------------------------------------------------

BAD = {"r3": np.nan, "r25": np.inf, "r26": -np.inf, "r59": 0}


@pytest.mark.parametrize("field", ["image", "text"])
@pytest.mark.parametrize("kind", WRITERS)
def test_rows_without_direction(tmp_path: Path, kind: str, field: str) -> None:
    for row, value in BAD.items():
        place = WRITERS[kind](tmp_path / f"one {row}", POOL.with_rows(field, **{row: value}), CUTS)
        store = open_store(place)
        with pytest.raises(
            BadRowsError, match=rf"\(row {row[1:]} of the pool\); fix the file, or pass --skip-bad"
        ) as error:
            select(store, tmp_path / "cache", STEPS[2])
        name, _, within = store.location_of(field, int(row[1:])).partition(" row ")
        assert f"{name} row {within}: the {field} embedding" in str(error.value)
    place = WRITERS[kind](tmp_path / "pool", POOL.with_rows(field, **BAD), CUTS)
    selection = same_without(
        place, tmp_path, [3, 25, 26, 59], f"skipped 4 rows because their {field} embedding is zero"
    )
    assert "rows 3, 25, 26, 59" in " ".join(selection.steps[0].notes)
    assert [selection.steps[0].why(row) for row in (3, 59)] == [f"its {field} embedding is zero, NaN or infinite"] * 2
    assert selection.dropped_by[[3, 25, 26, 59]].tolist() == [0] * 4


def rekeyed(**keys: Any) -> Pool:
    return Pool(POOL.image, POOL.text, [keys.get(f"r{row}", key) for row, key in enumerate(POOL.keys)], POOL.captions)


KEYS: dict[str, tuple[Pool, list[int], str]] = {
    "repeated": (rekeyed(r30=POOL.keys[3], r31=POOL.keys[3]), [30, 31], "also belongs to an earlier row"),
    "repeated across shards": (rekeyed(r59=POOL.keys[0]), [59], "also belongs to an earlier row"),
    "climbing": (
        rekeyed(r30="../etc", r31="a/../../b", r32="..", r33="a\\..\\b"),
        [30, 31, 32, 33],
        "contains '..' as a part of a path",
    ),
    "empty": (rekeyed(r30="", r31=""), [30, 31], "is empty"),
}


@pytest.mark.parametrize("name", KEYS)
@pytest.mark.parametrize("kind", WRITERS)
def test_keys_that_repeat_or_climb(tmp_path: Path, kind: str, name: str) -> None:
    pool, rows, reason = KEYS[name]
    place = WRITERS[kind](tmp_path / "pool", pool, CUTS)
    store = open_store(place)
    told = refused(place, tmp_path, store.location_of("metadata", rows[0]))
    assert f"the key {reason}" in told
    assert repr(pool.keys[rows[0]]) in told
    assert f"({counted(len(rows), 'such row')} in the pool); fix the file, pass --skip-bad" in told
    said = f"skipped {counted(len(rows), 'row')} because {'its' if len(rows) == 1 else 'their'} key {reason}"
    selection = same_without(place, tmp_path, rows, said, steps=STEPS[2:])
    assert selection.steps[0].why(rows[0]).startswith(f"its key {reason}")


@pytest.mark.parametrize(
    "keys", [lambda keys: pa.array(keys).dictionary_encode(), lambda keys: pa.array(keys, pa.binary())]
)
def test_keys_of_other_types_are_looked_at_as_text(tmp_path: Path, keys: Any) -> None:
    write_parquet(tmp_path / "pool", rekeyed(r30="../etc"), CUTS)
    for path in (tmp_path / "pool").rglob("*.parquet"):
        found = pq.read_table(path)
        pq.write_table(found.set_column(0, "uid", keys(found["uid"].combine_chunks())), path)
    assert "the key contains '..'" in refused(str(tmp_path / "pool"), tmp_path, "train-00001")


def test_keys_that_are_null(tmp_path: Path) -> None:
    place = write_clip_retrieval(tmp_path / "pool", POOL, CUTS)
    change_rows(
        tmp_path / "pool" / "metadata" / "metadata_1.parquet",
        lambda rows: [{**row, "image_path": None if i == 5 else row["image_path"]} for i, row in enumerate(rows)],
    )
    assert "the key is empty" in refused(place, tmp_path, "metadata_1.parquet row 5")
    same_without(place, tmp_path, [25], "skipped 1 row because its key is empty: row 25")


CELLS: dict[str, tuple[str, Callable[[list[Any]], list[Any]]]] = {
    "null list": ("list", lambda cells: [*cells[:5], None, *cells[6:]]),
    "null first": ("list", lambda cells: [None, *cells[1:]]),
    "short list": ("list", lambda cells: [*cells[:5], cells[5][:-1], *cells[6:]]),
    "empty list": ("large", lambda cells: [*cells[:5], [], *cells[6:]]),
    "compensating": ("list", lambda cells: [*cells[:5], cells[5][:-1], [*cells[6], cells[5][0]], *cells[7:]]),
    "null value": ("list", lambda cells: [*cells[:5], [*cells[5][:-1], None], *cells[6:]]),
    "null value of a fixed list": ("fixed", lambda cells: [*cells[:5], [*cells[5][:-1], None], *cells[6:]]),
    "null fixed list": ("fixed", lambda cells: [*cells[:5], None, *cells[6:]]),
    "odd bytes": ("binary", lambda cells: [*cells[:5], cells[5][:-1], *cells[6:]]),
    "long bytes": ("binary", lambda cells: [*cells[:5], cells[5] + b"ab", *cells[6:]]),
    "null bytes": ("fixed binary", lambda cells: [*cells[:5], None, *cells[6:]]),
}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", CELLS)
def test_cells_that_hold_no_vector(tmp_path: Path, name: str, dtype: str) -> None:
    kind, change = CELLS[name]
    pool = POOL.stored(dtype)
    place = write_parquet(tmp_path / "pool", pool, CUTS, kind, mark=dtype)
    (path,) = (tmp_path / "pool").rglob("train-00001*")
    found = pq.read_table(path)
    at = found.schema.names.index("image_embedding")
    cells = pa.array(change(found.column(at).to_pylist()), found.schema.field(at).type)
    pq.write_table(found.set_column(at, found.schema.field(at), cells), path, row_group_size=7)
    bad = [row for row in SECOND if cells[row - 20].as_py() != vectors(pool.image[[row]], kind)[0].as_py()]
    assert "is missing or has another width" in refused(
        place, tmp_path, f"{path} row {bad[0] - 20}: the image embedding"
    )
    said = f"skipped {counted(len(bad), 'row')} because {'its' if len(bad) == 1 else 'their'} image embedding"
    same_without(place, tmp_path, bad, said, pool)


def test_binary_of_odd_length_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"uid": ["a"], "embedding": [b"abc"]}), tmp_path / "a.parquet")
    with pytest.raises(
        PoolError, match=r"a\.parquet \[embedding\]: 3 bytes a row is not a multiple of float16; is --dt"
    ):
        open_store(str(tmp_path), Options(dtype="float16"))


# --- nothing there ---------------------------------------------------------------------------------


def test_places_without_a_pool(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("no pool")
    for name, said in {
        "missing": "missing: nothing is there; give a folder or file",
        "empty": "empty: it is an empty folder; give a folder or file",
        "other": r"other: no known layout of embeddings \(found: notes.txt\). Known: datacomp",
        "other/notes.txt": r"looks like raw data \(found: notes.txt\), read as csv .* thresher doctor",
    }.items():
        with pytest.raises(PoolError, match=said):
            open_store(str(tmp_path / name))
    with pytest.raises(UsageError, match="nowhere://x: cannot be opened"):
        open_store("nowhere://x")


@pytest.mark.parametrize("kind", [*WRITERS, "img2dataset"])
def test_pools_without_rows(tmp_path: Path, kind: str) -> None:
    write = {**WRITERS, "img2dataset": write_img2dataset}[kind]
    place = write(tmp_path / "pool", POOL.at([]))
    for options in (None, SKIP):
        with pytest.raises(PoolError, match="pool: the pool has no rows; is it finished"):
            open_store(place, options)


def test_a_saved_dataset_without_rows(tmp_path: Path) -> None:
    (tmp_path / "dataset_info.json").write_text("{}")
    (tmp_path / "state.json").write_text('{"_data_files": []}')
    with pytest.raises(PoolError, match="the pool has no rows; is it finished"):
        open_store(str(tmp_path))


def test_a_pool_without_any_good_file(tmp_path: Path) -> None:
    place = write_datacomp(tmp_path / "pool", POOL, CUTS)
    for path in (tmp_path / "pool").rglob("*.npz"):
        garbage(path)
    with pytest.raises(PoolError, match=r"no usable file is left of the 3 found; the first: .*\.npz: cannot be read"):
        open_store(place, SKIP)


def test_a_pool_that_cannot_be_divided_is_not_guessed_at(tmp_path: Path) -> None:
    """A damaged npz beside one table for all: which rows went is not known."""
    for i, rows in enumerate((slice(0, 30), slice(30, None))):
        (tmp_path / "pool").mkdir(exist_ok=True)
        np.savez_compressed(tmp_path / "pool" / f"image_{i}.npz", WIDE.image[rows])
    pq.write_table(pa.table({"uid": POOL.keys}), tmp_path / "pool" / "all.parquet")
    path = tmp_path / "pool" / "image_1.npz"
    flip(path, "arr_0", 0.9)
    with pytest.raises(PoolError, match=rf"{path}: .*it cannot be skipped, other files are cut differently"):
        open_store(str(tmp_path / "pool"), SKIP)


def test_rows_that_were_mended_come_back(tmp_path: Path) -> None:
    """What skip_bad found is remembered for the files as they were."""
    place = write_datacomp(tmp_path / "pool", WIDE, CUTS)
    (path,) = (tmp_path / "pool").rglob("b*.npz")
    shutil.copy(path, tmp_path / "good")
    flip(path, "l14_img", 0.9)
    assert len(open_store(place, SKIP)) == len(open_store(place, SKIP)) == 40
    shutil.copy(tmp_path / "good", path)
    assert len(open_store(place, SKIP)) == ROWS
