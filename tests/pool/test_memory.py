"""Pools in memory: no copies, the results of the same values in files, and messages that say what to give."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas
import polars
import pyarrow as pa
import pytest
import torch
from PIL import Image
from pyarrow import parquet

import thresher as th
from tests.golden.update import chains, golden_store
from thresher.io.npy import NpyPiece
from thresher.pool.memory import from_arrays
from thresher.report.examples import look_up

N = 300


@pytest.fixture
def data(rows: Callable[..., np.ndarray]) -> dict[str, Any]:
    return {
        "image": rows(N, 8, seed=1),
        "text": rows(N, 8, seed=2),
        "keys": [f"k{i}" for i in range(N)],
        "captions": [f"caption {i}" for i in range(N)],
    }


def frame_of(data: dict[str, Any]) -> Any:
    vectors = {f"{name}_embedding": list(data[name]) for name in ("image", "text")}
    return pandas.DataFrame({"key": data["keys"], "text": data["captions"], **vectors})


def same(a: th.Selection, b: th.Selection) -> None:
    """Everything but the location of the pool is the same, to the last bit."""
    heads = [{k: v for k, v in one.header().items() if k not in ("pool", "options")} for one in (a, b)]
    assert heads[0] == heads[1]
    np.testing.assert_array_equal(a.dropped_by, b.dropped_by)
    for one, other in zip(a.steps, b.steps, strict=True):
        for kind in ("rows", "groups", "reference"):
            for name, array in getattr(one, kind).items():
                np.testing.assert_array_equal(array, getattr(other, kind)[name])


@pytest.fixture(scope="module")
def pools(tmp_path_factory: pytest.TempPathFactory) -> tuple[th.EmbeddingStore, th.EmbeddingStore, Path]:
    """The pool of the golden selections, and the same rows in memory."""
    folder = tmp_path_factory.mktemp("golden")
    disk = golden_store(folder / "pool")
    vectors = {
        name: np.concatenate([np.array(disk.raw(name, block)) for block in disk.blocks(name)])
        for name in ("image", "text")
    }
    table = pa.Table.from_batches([part for _, part in disk.scan(disk.columns)])
    return disk, from_arrays(**vectors, table=table, cache=folder / "cache"), folder


@pytest.mark.parametrize("name", list(chains()))
def test_every_method_selects_the_same_bytes_as_from_disk(name: str, pools: Any) -> None:
    disk, memory, folder = pools
    assert memory.fingerprint() == disk.fingerprint()
    steps, seed = chains()[name]
    how = {"seed": seed, "engine": th.Serial()}
    found: dict[str, Any] = {}
    for store in (disk, memory):
        cache = th.Cache.at(folder / store.layout.kind)
        try:
            found[store.layout.kind] = th.run_steps(store, steps, cache=cache, **how)
        except th.UsageError as error:  # a recipe that this pool is too small for
            found[store.layout.kind] = str(error).replace(store.layout.location, "")
    if isinstance(found["npy"], str):
        assert found["arrays"] == found["npy"]
    else:
        same(found["arrays"], found["npy"])


def in_memory_of(store: th.EmbeddingStore) -> np.ndarray:
    (piece,) = store.layout.vectors["image"]
    return piece.values_ND  # type: ignore[attr-defined, no-any-return]


def test_arrays_and_tensors_are_not_copied(data: dict[str, Any]) -> None:
    image = data["image"]
    for given in (image, image[::2], np.asfortranarray(image), torch.from_numpy(image), torch.from_numpy(image).half()):
        store = from_arrays(given)
        owner = given.numpy() if isinstance(given, torch.Tensor) else given
        assert np.shares_memory(in_memory_of(store), owner)
        assert not in_memory_of(store).flags.writeable
        assert len(store) == len(given)
    whole = torch.from_numpy(image).bfloat16()
    (piece,) = from_arrays(whole).layout.vectors["image"]
    assert piece.dtype == "bfloat16"
    assert np.shares_memory(piece.values_ND, whole.view(torch.uint16).numpy())  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", ["pandas", "polars", "arrow", "datasets", "dict"])
def test_columns_of_frames_are_the_same_pool(kind: str, data: dict[str, Any], select: Any) -> None:
    expected = from_arrays(**data)
    frame = frame_of(data)
    if kind == "polars":
        frame = polars.from_pandas(frame)
    elif kind == "arrow":
        frame = pa.Table.from_pandas(frame)
    elif kind == "datasets":
        frame = datasets.Dataset.from_pandas(frame)
    elif kind == "dict":
        frame = {
            **frame[["key", "text"]].to_dict("list"),
            "image_embedding": data["image"],
            "text_embedding": data["text"],
        }
    for given in ({"image": frame}, {"table": frame, "image": "image_embedding", "text": "text_embedding"}):
        store = from_arrays(**given)
        assert store.fingerprint() == expected.fingerprint()
        assert store.columns == ("key", "text")
        assert store.layout.caption == "text"
        same(select(store, th.Density(keep="30%", clusters=4)), select(expected, th.Density(keep="30%", clusters=4)))


def test_vectors_of_arrow_polars_and_datasets_are_not_copied(data: dict[str, Any]) -> None:
    table = pa.Table.from_pandas(frame_of(data))
    values = table.column("image_embedding").chunk(0).flatten().to_numpy()
    for given in (table, polars.from_arrow(table).to_arrow(), table.to_batches()[0]):
        assert np.shares_memory(in_memory_of(from_arrays(given)), values) or given is not table
    column = table.column("image_embedding")
    assert np.shares_memory(in_memory_of(from_arrays(column)), values)
    halves = pa.concat_tables([table.slice(0, 100), table.slice(100)])
    assert len(from_arrays(halves).layout.vectors["image"]) == 1, "short chunks are copied together"


def test_the_hash_of_values_does_not_depend_on_chunks(data: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from thresher.pool import memory

    monkeypatch.setattr(memory, "_SHORT", 1)
    monkeypatch.setattr(memory, "_CHUNK", 8 * 4 * 70)
    whole = from_arrays(data["image"])
    column = pa.array(list(data["image"]))
    for cuts in ([N], [3, 200, N], [70, 140, N], [1, 2, 71, 72, N]):
        parts = [column[lo:hi] for lo, hi in zip([0, *cuts[:-1]], cuts, strict=True)]
        store = from_arrays(pa.chunked_array(parts))
        assert len(store.layout.vectors["image"]) == len(cuts)
        assert store.version() == whole.version()
        np.testing.assert_array_equal(store.vectors_at("image", np.arange(N)), whole.vectors_at("image", np.arange(N)))


def test_masked_values_are_no_values(data: dict[str, Any], select: Any) -> None:
    masked = np.ma.MaskedArray(data["image"], np.zeros((N, 8), np.bool_))
    masked.mask[3, 0] = True
    with pytest.raises(th.BadRowsError, match="row 3 of the pool"):
        select(from_arrays(masked), th.SemDeDup(eps=0.1, clusters=2))


def test_single_columns_are_vectors_too(data: dict[str, Any]) -> None:
    frame = frame_of(data)
    expected = from_arrays(data["image"]).fingerprint()
    for given in (
        frame["image_embedding"],
        polars.from_pandas(frame)["image_embedding"],
        [list(map(np.float32, row)) for row in data["image"]],
    ):
        assert from_arrays(given).fingerprint() == expected


def test_vectors_one_by_one_are_vectors_too(data: dict[str, Any], tmp_path: Path) -> None:
    """Objects of any library in a column, tensors as extension types, and views of lists."""
    image, expected = data["image"], from_arrays(data["image"]).fingerprint()
    objects = np.empty(N, object)
    objects[:] = [*image]
    tensors = list(torch.tensor(image))
    lists = [row.tolist() for row in image]
    for given in (
        objects,
        tensors,
        pandas.DataFrame({"v": tensors}),
        pandas.Series(tensors),
        polars.DataFrame({"v": polars.Series(tensors, dtype=polars.Object)}),
        polars.DataFrame({"v": image}),
        {"v": torch.tensor(image)},
        {"v": tensors},
        pa.table({"v": pa.FixedShapeTensorArray.from_numpy_ndarray(image)}),
        pa.table({"v": pa.array(lists, pa.list_view(pa.float32()))}),
    ):
        assert from_arrays(given).fingerprint() == expected
    table = pa.table({"image_embedding": pa.FixedShapeTensorArray.from_numpy_ndarray(image)})
    parquet.write_table(table, tmp_path / "tensors.parquet")
    np.testing.assert_array_equal(th.open(tmp_path / "tensors.parquet").raw_at("image", np.arange(N)), image)
    gaps = from_arrays([*image[:3], None, *image[4:]])
    assert np.isnan(gaps.layout.raw_at("image", np.array([3]))).all()


def test_a_tensor_on_another_device_is_copied_once(data: dict[str, Any]) -> None:
    """The path of CUDA tensors, with a tensor that says it is elsewhere: NumPy cannot read it before ``cpu()``."""

    class Elsewhere(torch.Tensor):
        copies: list[str] = []  # noqa: RUF012

        def cpu(self, *args: Any, **options: Any) -> torch.Tensor:
            self.copies.append(str(self.dtype))
            return self.as_subclass(torch.Tensor).clone()

        def numpy(self, *args: Any, **options: Any) -> Any:
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor.")

        __array__ = numpy

    for dtype in (torch.float16, torch.float32, torch.float64, torch.bfloat16):
        here = torch.tensor(data["image"]).to(dtype)
        there = here.clone().as_subclass(Elsewhere).requires_grad_()
        assert from_arrays(there, there).fingerprint() == from_arrays(here, here).fingerprint()
        kept = th.select(there, th.Random(keep="30%"), progress=False)
        assert torch.equal(kept.filter(there), here[kept.rows()])
    assert len(Elsewhere.copies) == 12


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_tensor_on_a_gpu_is_copied(data: dict[str, Any]) -> None:
    for dtype in (torch.float16, torch.float32, torch.bfloat16):
        here = torch.tensor(data["image"]).to(dtype)
        kept = th.select(here.cuda(), th.SemDeDup(eps=0.1), progress=False)
        same(kept, th.select(here, th.SemDeDup(eps=0.1), progress=False))
        assert kept.filter(here.cuda()).device.type == "cuda"


def test_a_pool_says_what_to_type_in_python(data: dict[str, Any], select: Any) -> None:
    broken = data["image"].copy()
    broken[3] = 0
    with pytest.raises(th.BadRowsError, match=r"^the image vectors, row 3: .* all zeros .* give skip_bad=True to"):
        select(from_arrays(broken), th.SemDeDup(eps=0.1, clusters=2))
    again = {**data, "keys": ["k0", *data["keys"][1:-1], "k0"]}
    with pytest.raises(th.BadRowsError, match=r"the table, row 299: .*'k0'.* or give other keys= \('row'"):
        select(from_arrays(**again), th.Random(keep=3))
    assert len(select(from_arrays(**again, skip_bad=True), th.Random(keep=3))) == 3
    assert len(select(from_arrays(**{**again, "keys": None}), th.Random(keep=3))) == 3


def test_keys_that_are_numbers_are_given_as_numbers(data: dict[str, Any], select: Any) -> None:
    kept = select(from_arrays(data["image"], keys=range(1000, 1000 + N)), th.Random(keep="30%"))
    assert kept.explain(1005) == kept.explain(np.int64(1005)) == kept.explain("1005") == kept.explain("row:5")
    for given in (None, 3.5, True, b"1005"):
        with pytest.raises(th.UsageError, match="a key is text or a whole number, not"):
            kept.explain(given)


def test_rows_without_a_vector_are_refused_or_skipped(data: dict[str, Any], select: Any) -> None:
    frame = frame_of(data)
    frame.at[7, "image_embedding"] = None
    with pytest.raises(th.BadRowsError, match=r"row 7 of the pool"):
        select(from_arrays(frame), th.SemDeDup(eps=0.1, clusters=2))
    kept = select(from_arrays(frame, skip_bad=True), th.SemDeDup(eps=0.1, clusters=2))
    assert kept.dropped_by[7] == 0
    assert kept.steps[0].method == "skip-bad"


def test_the_same_values_are_found_in_the_cache(data: dict[str, Any], tmp_path: Path) -> None:
    said: list[str] = []

    class Note(th.Serial):  # counts what is computed
        def map(self, fn: Any, tasks: Any) -> Any:
            said.append(str(fn))
            return super().map(fn, tasks)

    cache = th.Cache.at(tmp_path / "cache")
    th.run_steps(from_arrays(**data), [th.ClipScore(keep="30%")], engine=Note(), cache=cache)
    assert said
    said.clear()
    again = {**data, "image": data["image"].copy()}
    th.run_steps(from_arrays(**again), [th.ClipScore(keep="40%")], engine=Note(), cache=cache)
    assert said == []
    again["image"][5] *= -1
    th.run_steps(from_arrays(**again), [th.ClipScore(keep="40%")], engine=Note(), cache=cache)
    assert said, "other values are computed"


def test_a_change_of_the_values_during_use_is_noticed(data: dict[str, Any], select: Any) -> None:
    store = from_arrays(**data)
    select(store, th.Random(keep="30%"))
    data["image"][0] *= -1
    assert store.changed()
    with pytest.raises(th.PoolError, match="changed while random ran"):
        select(store, th.Random(keep="30%"))


def test_workers_read_a_file_that_is_written_once(data: dict[str, Any], tmp_path: Path) -> None:
    store = from_arrays(np.asfortranarray(data["image"]), data["text"], keys=data["keys"], cache=tmp_path / "c")
    assert not list((tmp_path / "c" / "joined").glob("*.npy"))
    copy = pickle.loads(pickle.dumps(store))  # noqa: S301
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "c" / "joined").glob("*.npy")}
    assert len(files) == 2
    assert len(pickle.dumps(store)) < 20_000
    assert all(isinstance(piece, NpyPiece) for pieces in copy.layout.vectors.values() for piece in pieces)
    assert (copy.version(), copy.fingerprint(), len(copy)) == (store.version(), store.fingerprint(), N)
    assert not copy.changed()
    np.testing.assert_array_equal(copy.vectors_at("joint", np.arange(N)), store.vectors_at("joint", np.arange(N)))
    pickle.dumps(store)
    assert files == {path: path.stat().st_mtime_ns for path in (tmp_path / "c" / "joined").glob("*.npy")}
    how = {"cache": th.Cache.at(tmp_path / "d")}
    engine = th.Processes(1)
    try:
        same(
            th.run_steps(store, [th.ClipScore(keep="30%")], engine=engine, **how),
            th.run_steps(store, [th.ClipScore(keep="30%")], engine=th.Serial()),
        )
    finally:
        engine.close()


def test_a_saved_selection_says_that_its_pool_was_in_memory(data: dict[str, Any], select: Any, tmp_path: Path) -> None:
    kept = select(from_arrays(**data), th.Density(keep="30%", clusters=3))
    assert kept.explain("k5")["caption"] == "caption 5"
    kept.save(tmp_path / "kept")
    loaded = th.Selection.load(tmp_path / "kept")
    assert loaded.to_table(["kept", "reason"]).num_rows == N
    for use in (lambda: loaded.explain("k5"), loaded.to_table, lambda: loaded.export("keys", tmp_path / "keys.txt")):
        with pytest.raises(th.PoolError, match=r"was in memory.*with_pool\(thresher.from_arrays"):
            use()
    again = loaded.with_pool(from_arrays(**data))
    assert again.explain("k5") == kept.explain("k5")
    assert loaded.explain("k5", pool=from_arrays(**data)) == kept.explain("k5")
    frame = frame_of(data)
    framed = select(from_arrays(frame), th.Random(keep="30%"))
    framed.save(tmp_path / "framed")
    assert th.Selection.load(tmp_path / "framed").with_pool(frame).explain("k5") == framed.explain("k5")
    assert again.recut(keep=7, cache=tmp_path / "cache").rows().tolist() == kept.recut(keep=7).rows().tolist()
    with pytest.raises(th.UsageError, match="another pool"):
        loaded.with_pool(from_arrays(data["text"], data["image"], keys=data["keys"]))
    with pytest.raises(th.UsageError, match="another pool"):
        loaded.explain("k5", pool=from_arrays(data["text"], data["image"], keys=data["keys"]))


def test_pictures_are_shown_in_reports(data: dict[str, Any], select: Any, tmp_path: Path) -> None:
    pictures = [Image.new("RGB", (40, 30), (i % 256, 80, 200 - i % 200)) for i in range(N)]
    file = io.BytesIO()
    pictures[0].save(file, "PNG")
    (tmp_path / "0.png").write_bytes(file.getvalue())
    for given in (
        pictures,
        pictures.__getitem__,
        [file.getvalue()] * N,
        [tmp_path / "0.png"] * N,
        [{"bytes": file.getvalue()}] * N,
    ):
        shown = look_up(from_arrays(**data, images=given), [3, 5])
        assert all(one.picture.startswith("data:image/webp;base64,") for one in shown.values())
    dataset = datasets.Dataset.from_dict(
        {"picture": [{"bytes": file.getvalue()}] * N, "image_embedding": list(data["image"])}
    )
    dataset = dataset.cast_column("picture", datasets.Image()).shuffle(seed=1)
    for given in ({}, {"images": "picture"}, {"images": [file.getvalue()] * N}):
        store = from_arrays(dataset, **given)
        assert look_up(store, [3])[3].picture.startswith("data:image/webp;base64,")
        assert store.columns == ()
    labelled = pandas.Series(pictures[::-1], index=range(N)[::-1])  # by position, not by label
    assert (
        look_up(from_arrays(**data, images=labelled), [3])[3]
        == look_up(from_arrays(**data, images=pictures[::-1]), [3])[3]
    )
    with pytest.raises(th.UsageError, match="the image of row 3: ZeroDivisionError: "):
        from_arrays(**data, images=lambda row: row // 0).show(3)
    missing = look_up(from_arrays(data["image"], images=[None, tmp_path / "no", b""] * 100), range(3))
    assert [one.picture for one in missing.values()] == ["", "", ""]
    kept = select(from_arrays(**data, images=pictures), th.Density(keep="30%", clusters=3))
    assert kept.report(tmp_path / "page.html").read_text().count("data:image/webp") > 10
    with pytest.raises(th.UsageError, match="3 images for 300 rows"):
        from_arrays(**data, images=pictures[:3])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "no vectors: give a NumPy array"),
        ({"image": np.ones((3, 4), np.int64)}, "image: ndarray of int64"),
        ({"image": np.ones(4, np.float32)}, r"has shape \(4,\); give \(rows, dimensions\)"),
        ({"image": np.ones((2, 3, 4), np.float32)}, r"has shape \(2, 3, 4\)"),
        ({"image": np.ones((0, 4), np.float32)}, "there are no rows"),
        ({"image": [[1.0], [1.0, 2.0]]}, "the vectors differ in length"),
        ({"image": object()}, "image: object of object"),
        ({"image": "column"}, "names a column; give its table too"),
        ({"image": np.ones((3, 4), np.float32), "text": np.ones((2, 4), np.float32)}, "image has 3, text has 2"),
        ({"image": np.ones((3, 4), np.float32), "keys": ["a"]}, "1 keys for 3 rows"),
        ({"image": np.ones((3, 4), np.float32), "keys": ["a", 1, 2.5]}, "not values of one type"),
        ({"image": np.ones((3, 4), np.float32), "keys": "uid"}, "no column 'uid' for the keys"),
        ({"image": np.ones((3, 4), np.float32), "table": {"key": [1, 2]}}, "image has 3, table has 2"),
        ({"image": np.ones((3, 4), np.float32), "table": {"key": [1, 2, 3]}, "keys": [1, 2, 3]}, "keys='key'"),
        ({"image": np.ones((3, 4), np.float32), "table": 3}, "table: int; give a pandas or polars frame"),
        ({"table": {"n": [1, 2]}}, "no column has vectors, .*; there are 'n', of int64; give image=numpy.asarray"),
        ({"table": {"n": [[1], [2]]}}, r"no column has vectors, .*; there are 'n', of list<item: int64>"),
        ({"table": {}}, "the table has no columns"),
        ({"table": pandas.DataFrame({"n": []})}, "there are no rows"),
        ({"image": []}, "there are no rows"),
        ({"table": pandas.DataFrame([[[1.0], 2], [[1.0], 3]], columns=["v", "v"])}, "several columns 'v'; rename"),
        ({"table": {"v": [[1.0]] * 2, "m": [1, "a"]}}, "the column 'm' has values of several types.*leave it out"),
        ({"table": pandas.DataFrame({"v": [[1.0]] * 2, "m": [1, "a"]})}, "the column 'm' has values of several types"),
        ({"table": datasets.DatasetDict({"train": datasets.Dataset.from_dict({"v": []})})}, "has the splits 'train'"),
        ({"table": datasets.Dataset.from_dict({"v": [[[1.0]]]})}, "no column has vectors, .*'v', of list<"),
        ({"image": datasets.Dataset.from_dict({"v": [1]}).to_iterable_dataset()}, "without streaming=True"),
        ({"image": torch.eye(3).to_sparse()}, "cannot read a tensor of torch.float32, sparse_coo, on cpu"),
        ({"image": torch.eye(3).to("meta")}, "cannot read a tensor of .* on meta"),
        ({"image": torch.eye(3).bfloat16().to_sparse()}, "cannot read a tensor of torch.bfloat16, sparse_coo"),
        ({"image": torch.eye(3).bfloat16().to("meta")}, "cannot read a tensor of torch.bfloat16, .* on meta"),
        ({"table": {"v": [[1.0]] * 2, "m": [1, 10**30]}}, "the column 'm' has values of several types"),
        ({"image": torch.eye(3).to(torch.float8_e4m3fn)}, "torch.float8_e4m3fn, .* give a dense one of float16"),
        ({"table": {"a": [[1.0], [2.0]], "b": [[1.0], [2.0]]}}, "'a', 'b' have vectors; say which column has"),
        ({"table": {"n": [1, 2]}, "image": "m"}, "image = 'm': no such column"),
        ({"table": {"n": [1, 2]}, "image": "n"}, "image = 'n': contains int64"),
    ],
)  # fmt: skip
def test_what_cannot_be_a_pool_is_named(given: dict[str, Any], said: str) -> None:
    with pytest.raises(th.UsageError, match=said) as error:
        from_arrays(**given)
    assert "\n" not in str(error.value)


def test_open_store_of_an_array_names_from_arrays(data: dict[str, Any]) -> None:
    for given in (data["image"], frame_of(data), 3):
        with pytest.raises(th.UsageError, match=r"type thresher.from_arrays\(...\)$") as error:
            th.open_store(given)
        assert len(str(error.value)) < 200


def test_two_fields_and_metadata_are_like_those_of_files(data: dict[str, Any], select: Any) -> None:
    store = from_arrays(**data, table={"width": list(range(N))})
    assert repr(store) == f"EmbeddingStore({store.layout.location}: 300 rows, image 8, text 8, key 'key')"
    kept = select(store, th.Filter(where="width < 20"))
    assert kept.rows().tolist() == list(range(20))
    assert json.loads(json.dumps(kept.header()))["pool"].startswith("arrays://")
