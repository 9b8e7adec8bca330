"""Streams of Hugging Face: filtered without decoding dropped rows, resumed, shared by nodes and workers."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from datasets.distributed import split_dataset_by_node

import thresher as th
from thresher.testing.data_reader import pairs

N, SHARDS = 48, 4
PAIRS = pairs(N)
FEATURES = datasets.Features(
    {"image": datasets.Image(), "text": datasets.Value("string"), "key": datasets.Value("string")}
)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("stream")
    for i in range(SHARDS):
        some = PAIRS[i * N // SHARDS : (i + 1) * N // SHARDS]
        rows = {
            "image": [{"bytes": pair.picture, "path": None} for pair in some],
            "text": [pair.text for pair in some],
            "key": [pair.key for pair in some],
        }
        datasets.Dataset.from_dict(rows, features=FEATURES).to_parquet(str(folder / f"train-{i}.parquet"), batch_size=5)
    return sorted(map(str, folder.glob("*.parquet")))


@pytest.fixture(scope="module")
def load(files: list[str], tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Any]:
    cache = str(tmp_path_factory.mktemp("cache"))
    return lambda: datasets.load_dataset(
        "parquet", data_files=files, split="train", streaming=True, cache_dir=cache, features=FEATURES
    )


@pytest.fixture(scope="module")
def kept() -> th.Selection:
    vectors = np.random.default_rng(0).standard_normal((N, 8)).astype(np.float32)
    pool = th.from_arrays(image=vectors, keys=[pair.key for pair in PAIRS])
    return th.run_steps(pool, [th.build("random", {"keep": "30%"})])


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with every image that is decoded."""
    calls: list[int] = []
    original = datasets.Image.decode_example

    def counting(self: Any, value: Any, **more: Any) -> Any:
        calls.append(1)
        return original(self, value, **more)

    monkeypatch.setattr(datasets.Image, "decode_example", counting)
    return calls


def wanted(kept: th.Selection) -> list[str]:
    return [PAIRS[row].key for row in kept.rows().tolist()]


def keys(stream: Any) -> list[str]:
    return [row["key"] for row in stream]


def test_only_kept_rows_are_decoded_in_order(load: Callable[[], Any], kept: th.Selection, decoded: list[int]) -> None:
    stream = kept.filter(load(), keys="key")
    rows = list(stream)
    assert [row["key"] for row in rows] == wanted(kept)
    assert len(decoded) == len(kept)
    assert rows[0]["image"].size == (8, 6)
    assert stream.features == FEATURES
    assert keys(pickle.loads(pickle.dumps(stream))) == wanted(kept)  # noqa: S301 - pickled above


@pytest.mark.parametrize("at", [0, 1, 5, 13])
def test_a_stream_resumes_where_it_was(load: Callable[[], Any], kept: th.Selection, at: int) -> None:
    stream = kept.filter(load(), keys="key")
    read = keys(itertools.islice(iter(stream), at))
    state = pickle.loads(pickle.dumps(stream.state_dict()))  # noqa: S301 - pickled above
    again = kept.filter(load(), keys="key")
    again.load_state_dict(state)
    assert read + keys(again) == wanted(kept)


@pytest.mark.parametrize("nodes", [2, 3, 4])
@pytest.mark.parametrize("first", ["filter", "split"])
def test_nodes_share_a_stream(load: Callable[[], Any], kept: th.Selection, nodes: int, first: str) -> None:
    parts = []
    for rank in range(nodes):
        if first == "filter":
            part = split_dataset_by_node(kept.filter(load(), keys="key"), rank, nodes)
        else:
            part = kept.filter(split_dataset_by_node(load(), rank, nodes), keys="key")
        parts.append(keys(part))
    assert sorted(itertools.chain(*parts)) == sorted(wanted(kept))
    assert all(part == [key for key in wanted(kept) if key in part] for part in parts)


def test_workers_share_a_stream(load: Callable[[], Any], kept: th.Selection) -> None:
    stream = kept.filter(load(), keys="key").select_columns(["key"])
    loader = torch.utils.data.DataLoader(stream, batch_size=None, num_workers=2)
    assert sorted(keys(loader)) == sorted(wanted(kept))


def test_the_format_and_later_steps_stay(load: Callable[[], Any], kept: th.Selection, decoded: list[int]) -> None:
    stream = kept.filter(load().with_format("numpy"), keys="key")
    assert isinstance(next(iter(stream))["image"], np.ndarray)
    decoded.clear()
    sizes = kept.filter(load(), keys="key").map(lambda row: {"width": row["image"].width}, remove_columns=["image"])
    assert [row["width"] for row in sizes] == [8] * len(kept)
    assert len(decoded) == len(kept)
    lost = kept.filter(load().map(lambda row: {"key": row["key"].upper()}), keys="key")  # Python objects
    assert keys(lost) == []


def test_rows_of_shards_have_no_numbers(load: Callable[[], Any], kept: th.Selection) -> None:
    """Each worker would count from 0: without keys, wrong rows would be kept."""
    with pytest.raises(th.UsageError, match="the stream has 4 shards, and no column of keys"):
        kept.filter(load().remove_columns("key"))


def test_one_shard_is_filtered_by_row(files: list[str], tmp_path: Path, decoded: list[int]) -> None:
    one = datasets.load_dataset("parquet", data_files=files[:1], split="train", streaming=True, cache_dir=str(tmp_path))
    rows = N // SHARDS
    pool = th.from_arrays(image=np.random.default_rng(0).standard_normal((rows, 8)).astype(np.float32))
    kept = th.run_steps(pool, [th.build("random", {"keep": "50%"})])
    wanted = [PAIRS[row].key for row in kept.rows().tolist()]
    assert keys(kept.filter(one)) == wanted
    assert len(decoded) == len(kept)
    for same in (one.remove_columns("image"), one.select_columns(["key"]), one.rename_column("text", "caption"),
                 one.map(lambda row: {"text": row["text"].upper()}), one.take(rows), one.with_format("numpy"),
                 split_dataset_by_node(one, 0, 1),
                 datasets.Dataset.from_list(list(one)).to_iterable_dataset()):  # fmt: skip
        assert keys(kept.filter(same)) == wanted
    for other in (one.skip(1), one.shuffle(seed=0), one.filter(lambda row: row["key"] != "x"), one.repeat(2),
                  one.map(lambda rows: rows, batched=True), datasets.concatenate_datasets([one]),
                  datasets.interleave_datasets([one, one.skip(1)])):  # fmt: skip
        with pytest.raises(th.UsageError, match="shards, and no column|other numbers than those of the pool"):
            keys(kept.filter(other.rename_column("text", "caption")))


HOW: dict[str, Any] = {"encoder": "tests.toy:Toy", "batch_size": 8, "workers": 0, "progress": False}


def test_a_stream_is_embedded_like_its_files(
    load: Callable[[], Any], files: list[str], tmp_path: Path, decoded: list[int]
) -> None:
    store = th.embed(load(), **HOW)
    loaded = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path))
    same = th.embed(loaded, **HOW)
    for name in ("image", "text"):
        vectors, others = (
            np.concatenate([np.asarray(one.raw(name, block)) for block in one.blocks(name)]) for one in (store, same)
        )
        np.testing.assert_array_equal(vectors, others)
    assert [key for _, part in store.scan(["key"]) for key in part.column("key").to_pylist()] == [p.key for p in PAIRS]
    assert not decoded
    on_disk = th.embed(load(), tmp_path / "pool", **HOW)
    assert on_disk.fingerprint() == store.fingerprint() == same.fingerprint()


def test_a_stream_of_python_objects_is_embedded(load: Callable[[], Any]) -> None:
    def samples() -> Any:
        for row in load():
            yield {"image": row["image"], "caption": row["text"]}

    store = th.embed(datasets.IterableDataset.from_generator(samples), **HOW)
    assert len(store) == N
    texts = [text for _, part in store.scan(["text"]) for text in part.column("text").to_pylist()]
    assert texts == [pair.text for pair in PAIRS]


def test_streams_that_cannot_be_embedded(load: Callable[[], Any]) -> None:
    with pytest.raises(th.UsageError, match="captions= is for data with a length"):
        th.embed(load(), captions=["x"], **HOW)
    with pytest.raises(th.UsageError, match="no column 'picture'; the stream has image, text, key"):
        th.embed(load(), image="picture", **HOW)
    with pytest.raises(th.UsageError, match="there are no samples"):
        th.embed(datasets.IterableDataset.from_generator(lambda: iter(())), **HOW)
    with pytest.raises(th.UsageError, match="no column of images"):
        th.embed(load().remove_columns("image"), **HOW)


def test_a_stream_with_mixed_values_is_one_line(load: Callable[[], Any]) -> None:
    def samples() -> Any:
        for i, row in enumerate(load()):
            yield {"image": row["image"], "key": i if i % 2 else [i]}

    with pytest.raises(th.UsageError, match="the column 'key' of the stream has values of several types"):
        th.embed(datasets.IterableDataset.from_generator(samples), **HOW)
