"""Parquet from parquet and Arrow: the same rows with all their columns."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from thresher.data import DataOptions, open_data
from thresher.errors import PoolError, UsageError
from thresher.resharding import reshard
from thresher.testing.readers import bytes_read

from .common import hashes, keys_file, picture, pool

FEATURES = datasets.Features(
    {
        "image": datasets.Image(),
        "text": datasets.Value("string"),
        "key": datasets.Value("string"),
        "label": datasets.ClassLabel(names=["no", "yes"]),
        "seen": datasets.Sequence(datasets.Value("float32")),
    }
)


def made(rows: range) -> datasets.Dataset:
    """Rows of pictures, captions and whatever else."""
    return datasets.Dataset.from_dict(
        {
            "image": [{"bytes": picture(i), "path": f"{i}.png"} for i in rows],
            "text": [f"picture {i}" for i in rows],
            "key": [f"k{i}" for i in rows],
            "label": [i % 2 for i in rows],
            "seen": [[float(i)] * (i % 3) for i in rows],
        },
        features=FEATURES,
    )


def parquet(folder: Path, counts: tuple[int, ...] = (7, 1, 12), group: int = 5) -> Path:
    """The rows in files of so many, in row groups of a few."""
    folder.mkdir(parents=True)
    at = 0
    for i, count in enumerate(counts):
        made(range(at, at + count)).to_parquet(folder / f"{i}.parquet", batch_size=group)
        at += count
    return folder


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [row for path in sorted(folder.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def slowly(every: list[dict[str, Any]], times: Counter[str]) -> list[dict[str, Any]]:
    chosen = {row["key"] for row in every if times[row["key"]]}
    out = []
    for row in every:
        names = [row["key"], *(name for n in range(1, 99) if (name := f"{row['key']}-{n}") not in chosen)]
        out += [{**row, "key": name} for name in names[: times[row["key"]]]]
    return out


@pytest.mark.parametrize("per_shard", [4, 100])
@pytest.mark.parametrize("per_part", [3, 10_000])
def test_rows_are_copied_with_all_columns(tmp_path: Path, per_shard: int, per_part: int) -> None:
    data = parquet(tmp_path / "in")
    times = Counter({"k0": 1, "k5": 3, "k7": 1, "k8": 2, "k19": 1})
    sel = keys_file(tmp_path / "k", times.elements())
    done = reshard(str(data), sel, str(tmp_path / "out"), per_shard=per_shard, options=DataOptions(per_part=per_part))
    assert rows_of(tmp_path / "out") == slowly(rows_of(data), times)
    assert (done.form, done.samples, done.shards, done.by) == ("parquet", 8, -(-8 // per_shard), "key")
    first = pq.read_schema(tmp_path / "out" / f"train-00000-of-{done.shards:05d}.parquet")
    assert first.equals(pq.read_schema(data / "0.parquet"), check_metadata=True)
    assert sorted(path.name for path in (tmp_path / "out").iterdir())[0] == "reshard.json"


def test_datasets_loads_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = parquet(tmp_path / "in")
    sel = keys_file(tmp_path / "k", ["k3", "k3", "k11", "nowhere"])
    reshard(str(data), sel, str(tmp_path / "out"), per_shard=2, shuffle=0)
    assert (tmp_path / "out" / "missing.txt").read_text() == "nowhere\n"
    names = [str(path) for path in (tmp_path / "out").glob("*.parquet")]
    for given in ({"path": str(tmp_path / "out")}, {"path": "parquet", "data_files": names}):
        found = datasets.load_dataset(**given, split="train", cache_dir=str(tmp_path / "cache"))
        assert found.features == FEATURES
        assert sorted(found["key"]) == ["k11", "k3", "k3-1"]
        assert {image.getpixel((0, 0))[0] for image in found["image"]} == {3, 11}


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
@pytest.mark.parametrize("per_shard", [3, 7])
def test_shuffled_is_the_same_rows_for_any_workers(tmp_path: Path, kind: str, per_shard: int) -> None:
    if kind == "parquet":
        data = parquet(tmp_path / "in")
    else:
        made(range(20)).save_to_disk(tmp_path / "in", num_shards=2)
        data = tmp_path / "in"
    times = Counter({f"k{i}": 1 + i % 3 for i in range(0, 20, 3)})
    sel = keys_file(tmp_path / "k", times.elements())
    for workers in (1, 2):
        reshard(str(data), sel, str(tmp_path / f"out{workers}"), per_shard=per_shard, shuffle=5, workers=workers)
        (tmp_path / f"out{workers}" / "reshard.json").unlink()
    assert hashes(tmp_path / "out1") == hashes(tmp_path / "out2")
    straight = slowly(made(range(20)).with_format("arrow")[:].to_pylist(), times)
    found = rows_of(tmp_path / "out1")
    assert found != straight
    assert sorted(found, key=lambda row: row["key"]) == sorted(straight, key=lambda row: row["key"])


def test_a_dataset_saved_to_disk_becomes_parquet(tmp_path: Path) -> None:
    made(range(30)).save_to_disk(tmp_path / "in", num_shards=3)
    times = Counter({"k2": 2, "k29": 1})
    reshard(str(tmp_path / "in"), keys_file(tmp_path / "k", times.elements()), str(tmp_path / "out"))
    assert rows_of(tmp_path / "out") == slowly(made(range(30)).with_format("arrow")[:].to_pylist(), times)
    schema = pq.read_schema(tmp_path / "out" / "train-00000-of-00001.parquet")
    assert datasets.Features.from_arrow_schema(schema) == FEATURES


def test_rows_without_keys_go_by_file_and_number(tmp_path: Path) -> None:
    """As ``thresher embed`` names them; a copy has no name to be given."""
    (tmp_path / "in").mkdir()
    for name in ("a", "b"):
        table = pa.table({"image": [picture(i) for i in range(6)], "text": [f"{name}{i}" for i in range(6)]})
        pq.write_table(table, tmp_path / "in" / f"{name}.parquet")
    reshard(str(tmp_path / "in"), keys_file(tmp_path / "k", ["b-4", "a-0", "a-0"]), str(tmp_path / "out"))
    assert [row["text"] for row in rows_of(tmp_path / "out")] == ["a0", "a0", "b4"]


def test_numbers_are_keys_too(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    pq.write_table(
        pa.table({"image": [picture(i) for i in range(6)], "id": range(10, 16)}), tmp_path / "in" / "0.parquet"
    )
    reshard(str(tmp_path / "in"), keys_file(tmp_path / "k", ["12", "15", "15"]), str(tmp_path / "out"))
    assert [row["id"] for row in rows_of(tmp_path / "out")] == [12, 15, 15]


def test_known_places_tell_apart_rows_of_one_key(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in "ab":
        table = pa.table(
            {"image": [picture(i) for i in range(6)], "key": ["same"] * 6, "text": [f"{name}{i}" for i in range(6)]}
        )
        pq.write_table(table, tmp_path / "in" / f"{name}.parquet", row_group_size=2)
    rows = [("same", f"{name}.parquet", i) for name in "ab" for i in range(6)]
    sel = pool(tmp_path, rows, [1, 7, 10], {1: 2, 7: 1, 10: 1})
    done = reshard(str(tmp_path / "in"), sel, str(tmp_path / "out"), options=DataOptions(per_part=4))
    found = [(row["key"], row["text"]) for row in rows_of(tmp_path / "out")]
    assert found == [("same", "a1"), ("same-1", "a1"), ("same-2", "b1"), ("same-3", "b4")]
    assert done.by == "place"
    with pytest.raises(UsageError, match="has the same key as another chosen sample"):
        reshard(str(tmp_path / "in"), keys_file(tmp_path / "k", ["same"]), str(tmp_path / "out2"))


def test_places_of_a_table_with_other_rows_are_not_trusted(tmp_path: Path) -> None:
    data = parquet(tmp_path / "in", (6,))
    sel = pool(tmp_path, [(f"k{5 - i}", "0.parquet", i) for i in range(6)], [0, 1])
    done = reshard(str(data), sel, str(tmp_path / "out"))
    assert done.by == "key"
    assert [row["key"] for row in rows_of(tmp_path / "out")] == ["k4", "k5"]


def test_files_of_other_columns_are_refused(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name, more in (("a", {"x": [1.0]}), ("b", {"x": ["one"]})):
        pq.write_table(pa.table({"image": [picture(1)], "key": [name], **more}), tmp_path / "in" / f"{name}.parquet")
    with pytest.raises(PoolError, match=r"b\.parquet: has other columns"):
        reshard(str(tmp_path / "in"), keys_file(tmp_path / "k", ["a", "b"]), str(tmp_path / "out"))


def test_row_groups_are_modest_and_the_same_however_rows_were_cut(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "many").mkdir()
    table = pa.table({"image": [bytes(100)] * 2_500, "key": [f"k{i}" for i in range(2_500)]})
    pq.write_table(table, tmp_path / "one" / "0.parquet")
    for i in range(5):
        pq.write_table(table.slice(500 * i, 500), tmp_path / "many" / f"{i}.parquet", row_group_size=77)
    sel = keys_file(tmp_path / "k", [f"k{i}" for i in range(2_500)])
    for name in ("one", "many"):
        reshard(str(tmp_path / name), sel, str(tmp_path / f"out-{name}"))
    one, many = (tmp_path / f"out-{name}" / "train-00000-of-00001.parquet" for name in ("one", "many"))
    assert one.read_bytes() == many.read_bytes()
    meta = pq.read_metadata(one)
    assert [meta.row_group(i).num_rows for i in range(meta.num_row_groups)] == [1_000, 1_000, 500]
    for shuffle in (None, 0):  # copies are renamed in the row group that they are in
        sel = keys_file(tmp_path / "k", [f"k{i}" for i in range(2_500)] + ["k7", "k2400"])
        out = tmp_path / f"again-{shuffle}"
        reshard(str(tmp_path / "one"), sel, str(out), shuffle=shuffle)
        found = Counter(row["key"] for row in rows_of(out))
        assert found == Counter([f"k{i}" for i in range(2_500)] + ["k7-1", "k2400-1"])


def test_images_in_a_table_are_not_read_to_look_for_files(tmp_path: Path) -> None:
    """Their paths are read; only where there is such a file, the cell shows if the image is in the table."""
    (tmp_path / "in").mkdir()
    for name in ("a.png", "b.png"):
        (tmp_path / "in" / name).write_bytes(picture(0))
    names = ["a.png", "b.png", "c.png", "../x.png"]
    cells = [{"bytes": None if i in (1, 2) else picture(i), "path": name} for i, name in enumerate(names)]
    more = [{"bytes": picture(0) * 1000, "path": f"{i}.png"} for i in range(200)]
    path = tmp_path / "in" / "x.parquet"
    pq.write_table(pa.table({"image": cells + more}), path, compression="none", row_group_size=50, use_dictionary=False)
    (part,) = open_data(str(path)).parts
    found, read = bytes_read(lambda: list(part.separate_files(np.arange(204))))
    assert list(map(list, found)) == [[], [str(tmp_path / "in" / "b.png")], *[[]] * 202]
    assert read < path.stat().st_size / 3
    pq.write_table(pa.table({"image": cells, "image.path": ["x"] * 4}), path)
    (part,) = open_data(str(path)).parts
    assert [len(found) for found in part.separate_files(np.arange(4))] == [0, 1, 1, 0]
