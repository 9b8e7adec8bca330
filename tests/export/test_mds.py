"""A StreamingDataset of a selection has its samples and no others, for any shuffle, worker, rank and checkpoint."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from streaming import MDSWriter, Stream, StreamingDataset
from streaming.base.batching import generate_work
from streaming.base.util import clean_stale_shared_memory
from streaming.base.world import World
from torch.utils.data import DataLoader

from tests.objects import put, s3_environment
from thresher import Selection, build, embed, open_store, run_steps
from thresher.errors import UsageError
from thresher.export.mds import KeptStream, _rows_of
from thresher.testing.data_reader import DATA, pairs

# The library leaves files open that it has decompressed.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
N, PER_SHARD = 60, 10
KEPT = [3, 4, 17, 31, 33, 38, 39]  # of the shards 0, 1 and 3, and none of 2, 4 and 5


@pytest.fixture(autouse=True)
def _shared_memory() -> Iterator[None]:
    yield
    clean_stale_shared_memory()


def written(folder: Path, *, key: bool = False, broken: int = -1, digits: int = 3, **options: Any) -> str:
    """Sample ``i`` has the number ``i``; shards have about PER_SHARD samples, of which one may have no good image."""
    columns = {"number": "int", "text": "str", "image": "bytes", **({"key": "str"} if key else {})}
    samples = [
        {
            "number": i,
            "text": f"caption {i:02d}",
            "image": b"x" if i == broken else one.picture,
            "key": f"k{i:0{digits}d}",
        }
        for i, one in enumerate(pairs(N))
    ]
    most = 48 * PER_SHARD + sum(len(one.picture) for one in pairs(N)[:PER_SHARD]) + 500
    with MDSWriter(out=str(folder), columns=columns, size_limit=most, **options) as out:
        for sample in samples:
            out.write({name: sample[name] for name in columns})
    return str(folder)


def keys_of(folder: str, rows: Sequence[int]) -> list[str]:
    sizes = [shard["samples"] for shard in json.loads(Path(folder, "index.json").read_text())["shards"]]
    at = np.searchsorted(np.cumsum(sizes), rows, side="right")
    return [f"shard.{n:05d}-{row - sum(sizes[:n])}" for n, row in zip(at.tolist(), rows, strict=True)]


def keys_file(path: Path, keys: Sequence[str]) -> str:
    path.write_text("".join(f"{key}\n" for key in keys))
    return str(path)


def loaded(dataset: Any, workers: int = 0) -> list[int]:
    batches = DataLoader(dataset, batch_size=dataset.batch_size, num_workers=workers)
    return [int(number) for batch in batches for number in batch["number"]]


@pytest.fixture
def data(tmp_path: Path) -> str:
    return written(tmp_path / "data")


@pytest.fixture
def subset(tmp_path: Path, data: str) -> str:
    return keys_file(tmp_path / "keys.txt", keys_of(data, KEPT))


@pytest.mark.parametrize("shuffle", [None, "py1s", "py1br", "py1e", "py2s", "naive"])
@pytest.mark.parametrize("compression", [None, "zstd"])
def test_kept_samples_are_loaded_and_no_other_shard_is(tmp_path: Path, shuffle: str | None, compression: Any) -> None:
    data = written(tmp_path / "data", compression=compression)
    kept = keys_file(tmp_path / "keys.txt", keys_of(data, KEPT))
    stream = KeptStream(kept, remote=data, local=str(tmp_path / "cache"))
    how: Any = {} if shuffle is None else {"shuffle": True, "shuffle_algo": shuffle, "num_canonical_nodes": 1}
    dataset = StreamingDataset(streams=[stream], batch_size=2, **how)
    assert (len(dataset), dataset.size, dataset[4]["number"]) == (len(KEPT), len(KEPT), KEPT[4])
    for _ in range(2):
        numbers = loaded(dataset)
        assert sorted(numbers) == KEPT
        if shuffle is None:
            assert numbers == KEPT
    downloaded = {name.split(".")[1] for name in os.listdir(tmp_path / "cache")} - {"json"}
    at = {key.split("-")[0].split(".")[1] for key in keys_of(data, KEPT)}
    assert downloaded == at
    assert len(at) < len(json.loads(Path(data, "index.json").read_text())["shards"])


def test_requests_are_for_the_index_and_shards_with_kept_samples(
    tmp_path: Path, data: str, subset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted at an S3 server."""
    from botocore.client import BaseClient

    asked: list[str] = []
    call = BaseClient._make_api_call

    def counting(self: Any, operation: str, arguments: Any) -> Any:
        asked.append(f"{operation} {arguments.get('Key', '')}")
        return call(self, operation, arguments)

    with s3_environment(monkeypatch) as server:
        monkeypatch.setenv("S3_ENDPOINT_URL", server["AWS_ENDPOINT_URL"])
        remote = put(Path(data), "s3://bucket/data")
        monkeypatch.setattr(BaseClient, "_make_api_call", counting)
        dataset = StreamingDataset(
            streams=[KeptStream(subset, remote=remote, local=str(tmp_path / "cache"))], batch_size=2, shuffle=True
        )
        assert sorted(loaded(dataset)) == KEPT
    shards = sorted({f"data/{key.split('-')[0]}.mds" for key in keys_of(data, KEPT)})
    keys = sorted({one.split(" ")[1] for one in asked} - {""})
    assert keys == ["data/index.json", *shards]


def test_several_workers_share_the_samples(tmp_path: Path, data: str, subset: str) -> None:
    stream = KeptStream(subset, remote=data, local=str(tmp_path / "cache"))
    dataset = StreamingDataset(streams=[stream], batch_size=1, shuffle=True)
    assert sorted(loaded(dataset, workers=2)) == KEPT
    assert sorted(loaded(dataset, workers=2)) == KEPT


@pytest.mark.parametrize("batching", ["random", "stratified", "per_stream", "device_per_stream"])
def test_ranks_share_the_samples(tmp_path: Path, data: str, subset: str, batching: str) -> None:
    """The work of all ranks and workers, as the library divides it, is the kept samples; some twice to fill up."""
    stream = KeptStream(subset, local=data)
    dataset = StreamingDataset(streams=[stream], batch_size=1, shuffle=True, batching_method=batching)
    dataset.num_canonical_nodes, dataset.shuffle_block_size = 2, 100
    world = World(num_nodes=2, ranks_per_node=2, workers_per_rank=2, worker=0)
    work = generate_work(batching, dataset, world, 0, 0)
    assert work.shape[:3] == (2, 2, 2)
    found = sorted(set(work.ravel().tolist()) - {-1})
    assert set(found) <= set(range(len(KEPT)))
    assert len(found) == len(KEPT)


@pytest.mark.slow
def test_two_ranks_load_all_samples_once(tmp_path: Path, data: str, subset: str) -> None:
    code = (
        "import sys; from streaming import StreamingDataset; from thresher.export.mds import KeptStream\n"
        f"stream = KeptStream({subset!r}, remote={data!r}, local={str(tmp_path / 'cache')!r})\n"
        "dataset = StreamingDataset(streams=[stream], batch_size=1, shuffle=True)\n"
        "print(len(dataset), *[sample['number'] for sample in dataset])"
    )
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = str(one.getsockname()[1])
    ranks = []
    for rank in range(2):
        env = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "PYTHONPATH": os.pathsep.join(sys.path)}
        ranks.append(
            subprocess.Popen([sys.executable, "-c", code], env={**os.environ, **env}, stdout=subprocess.PIPE, text=True)
        )
    results = [[int(number) for number in process.communicate(timeout=300)[0].split()] for process in ranks]
    assert {result[0] for result in results} == {4}
    assert sorted(set(results[0][1:] + results[1][1:])) == KEPT


def test_a_checkpoint_goes_on_with_the_next_sample(tmp_path: Path, data: str, subset: str) -> None:
    def dataset() -> Any:
        clean_stale_shared_memory()
        stream = KeptStream(subset, remote=data, local=str(tmp_path / "cache"))
        return StreamingDataset(streams=[stream], batch_size=1, shuffle=True, num_canonical_nodes=1)

    whole = dataset()
    epochs = [loaded(whole), loaded(whole)]
    first = dataset()
    assert loaded(first) == epochs[0]
    begun = iter(first)
    assert [next(begun)["number"] for _ in range(3)] == epochs[1][:3]
    state = first.state_dict(3, from_beginning=True)
    assert (state["epoch"], state["sample_in_epoch"]) == (1, 3)
    begun.close()
    again = dataset()
    again.load_state_dict(state)
    assert loaded(again) == epochs[1][3:]


def test_repeats_and_weights_of_streams(tmp_path: Path, data: str) -> None:
    """A key that is listed twice is used twice; other streams are mixed in by the usual weights."""
    twice = keys_file(tmp_path / "twice.txt", keys_of(data, [5, 20, 5]))
    dataset = StreamingDataset(streams=[KeptStream(twice, local=data)], batch_size=1)
    assert sorted(loaded(dataset)) == [5, 5, 20]
    clean_stale_shared_memory()
    other = written(tmp_path / "other")
    dataset = StreamingDataset(streams=[KeptStream(twice, local=data, repeat=2), Stream(local=other)], batch_size=1)
    assert len(loaded(dataset)) == 6 + N


def _selection(pool: str, kept: Sequence[int]) -> Selection:
    store = open_store(pool)
    dropped = np.zeros(len(store), np.int16)
    dropped[list(kept)] = -1
    made = run_steps(store, [build("random", {"keep": "50%"})])
    return replace(made, dropped_by=dropped, steps=(replace(made.steps[0], rows_out=len(kept)),))


@pytest.mark.parametrize("key", [True, False])
def test_a_pool_that_was_embedded_of_the_data_says_where_samples_are(
    tmp_path: Path, key: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where samples have keys, and where some could not be embedded; no shard is read for it."""
    data = written(tmp_path / "data", key=key, broken=2)
    pool = tmp_path / "pool"
    embed(data, out=str(pool), encoder="tests.toy:Toy", workers=0)
    selection = _selection(str(pool), [row - 1 for row in KEPT])
    assert selection.total == N - 1
    selection.save(str(tmp_path / "subset"))
    monkeypatch.setattr("thresher.export.mds.open_data", None)
    repeats = np.where(selection.mask(), 1, 0).astype(np.int32)
    repeats[KEPT[0] - 1] = 3
    for chosen, wanted in (
        (selection, KEPT),
        (str(tmp_path / "subset"), KEPT),
        (replace(selection, repeats=repeats), [KEPT[0]] * 2 + KEPT),
    ):
        clean_stale_shared_memory()
        dataset = StreamingDataset(streams=[KeptStream(chosen, local=data)], batch_size=1)
        assert loaded(dataset) == wanted
    shutil.rmtree(data)
    written(Path(data), key=key, broken=30)  # the same names, other samples
    with pytest.raises(UsageError, match=r"shard.0\d+.mds has [\d,]+ bytes, but had \d+ when .*pool was made of it"):
        StreamingDataset(streams=[KeptStream(selection, local=data)], batch_size=1)


def test_a_pool_of_tars_fits_by_key(tmp_path: Path) -> None:
    """Places are those of other files, so keys are looked up."""
    DATA["webdataset"](tmp_path / "tars", pairs(N), 2)
    data = written(tmp_path / "data", key=True)
    embed(str(tmp_path / "tars"), out=str(tmp_path / "pool"), encoder="tests.toy:Toy", workers=0)
    selection = _selection(str(tmp_path / "pool"), KEPT)
    with pytest.raises(UsageError, match="has keys such as 'k000', the selection such as 'k0003'"):
        StreamingDataset(streams=[KeptStream(selection, local=data)], batch_size=1)
    clean_stale_shared_memory()
    data = written(tmp_path / "same", key=True, digits=4)
    assert loaded(StreamingDataset(streams=[KeptStream(selection, local=data)], batch_size=1)) == KEPT


def test_a_split_is_a_folder_of_its_own(tmp_path: Path) -> None:
    written(tmp_path / "data" / "train")
    embed(str(tmp_path / "data" / "train"), out=str(tmp_path / "pool"), encoder="tests.toy:Toy", workers=0)
    chosen = _selection(str(tmp_path / "pool"), KEPT)
    whole = {"remote": str(tmp_path / "data"), "local": str(tmp_path / "cache"), "split": "train"}
    assert loaded(StreamingDataset(streams=[KeptStream(chosen, **whole)], batch_size=1)) == KEPT
    clean_stale_shared_memory()
    keys = keys_file(tmp_path / "keys.txt", [f"train/{key}" for key in keys_of(str(tmp_path / "data" / "train"), KEPT)])
    assert loaded(StreamingDataset(streams=[KeptStream(keys, **whole)], batch_size=1)) == KEPT


def test_keys_in_local_shards_are_read_and_those_in_remote_shards_are_not(tmp_path: Path) -> None:
    data = written(tmp_path / "data", key=True)
    kept = keys_file(tmp_path / "keys.txt", [f"k{i:03d}" for i in KEPT])
    dataset = StreamingDataset(streams=[KeptStream(kept, remote=data, local=str(tmp_path / "cache"))], batch_size=1)
    assert loaded(dataset) == KEPT
    clean_stale_shared_memory()
    more = keys_file(tmp_path / "more.txt", ["k001", "gone"])
    with pytest.warns(UserWarning, match="1 key of 2 not in"):
        assert loaded(StreamingDataset(streams=[KeptStream(more, local=data)], batch_size=1)) == [1]
    clean_stale_shared_memory()
    other = keys_file(tmp_path / "other.txt", ["a/k001.jpg"])
    with pytest.raises(UsageError, match=r"other.txt: .* has keys such as 'k000', the selection such as 'a/k001.jpg'"):
        StreamingDataset(streams=[KeptStream(other, local=data)], batch_size=1)
    shards = Stream(local=data).get_shards(World(1, 1, 1, 0), False)
    with pytest.raises(UsageError, match="are in its shards, which would all be downloaded; give a selection folder"):
        _rows_of(kept, shards, "s3://bucket/data")


def test_a_pool_without_keys_has_the_order_of_the_samples(tmp_path: Path, data: str) -> None:
    vectors = np.random.default_rng(0).standard_normal((N, 4)).astype(np.float32)
    np.save(tmp_path / "image.npy", vectors)
    chosen = _selection(str(tmp_path / "image.npy"), KEPT)
    assert loaded(StreamingDataset(streams=[KeptStream(chosen, local=data)], batch_size=1)) == KEPT


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            ["shard.00000-3", "shard.77777-1"],
            r"keeps a sample of 'shard.77777-1', but .* has shards such as 'shard.0000",
        ),
        (["shard.00000-3", "shard.00001-99"], r"keeps sample 99 of shard.00001.mds, which has \d+"),
        (["shard.00000-3", "shard.00001--1"], "keeps a sample of 'shard.00001--1'"),
        ([], "keeps no sample of|has no keys"),
    ],
)
def test_selections_of_other_data_are_refused(tmp_path: Path, data: str, keys: list[str], message: str) -> None:
    kept = keys_file(tmp_path / "keys.txt", keys)
    with pytest.raises(UsageError, match=message) as caught:
        StreamingDataset(streams=[KeptStream(kept, local=data)], batch_size=1)
    assert "\n" not in str(caught.value)


def test_a_pool_of_other_shards_is_refused(tmp_path: Path, data: str) -> None:
    table = pa.table({"key": ["a", "b"], "shard": ["x/other.tar", "x/other.tar"], "offset": [0, 1]})
    (tmp_path / "pool").mkdir()
    pq.write_table(table, tmp_path / "pool" / "p.parquet")
    with pytest.raises(UsageError, match="has keys such as 'shard.00000-0', the selection such as 'a'"):
        StreamingDataset(streams=[KeptStream(_selection(str(tmp_path / "pool"), [0]), local=data)], batch_size=1)


def test_the_package_is_named_if_it_is_missing(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['streaming'] = None\n"
        "from thresher.errors import MissingExtraError\n"
        "try:\n    import thresher.export.mds\nexcept MissingExtraError as error:\n    print(error)"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "filtering a StreamingDataset needs an extra" in told
    assert "[mds]" in told
