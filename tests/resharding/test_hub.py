"""Parquet for the Hub: what ``datasets`` reads, row groups, and how many bytes two versions share."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from thresher import api
from thresher.cli.main import main
from thresher.errors import MissingPackageError, UsageError
from thresher.resharding.hub import with_features, writer_options
from thresher.testing.data_reader import DATA, pairs


def load(folder: Path, cache: Path) -> Any:
    return datasets.load_dataset("parquet", data_files=str(folder / "*.parquet"), split="train", cache_dir=str(cache))


def written(data: str, out: Path, wanted: Sequence[str], **more: Any) -> list[Path]:
    keys = out.with_suffix(".txt")
    keys.write_text("".join(f"{key}\n" for key in wanted))
    api.reshard(data, str(keys), out, form="parquet", for_hub=True, workers=1, progress=False, **more)
    return sorted(out.glob("*.parquet"))


@pytest.mark.parametrize("kind", ["webdataset", "parquet", "csv"])
@pytest.mark.parametrize("shuffle", [None, 3])
def test_datasets_reads_images_and_all_columns(tmp_path: Path, kind: str, shuffle: int | None) -> None:
    data = open_keys(DATA[kind](tmp_path / "data", pairs(9), 2))
    paths = written(data[0], tmp_path / "out", data[1][1:8], shuffle=shuffle)
    found = load(tmp_path / "out", tmp_path / "cache")
    assert isinstance(found.features["image"], datasets.Image)
    assert sorted(row["text"] for row in found) == [pair.text for pair in pairs(9)[1:8]]
    assert {row["image"].size for row in found} == {(8, 6)}
    for path in paths:
        column = pq.ParquetFile(path).metadata.row_group(0).column(0)
        assert column.has_offset_index
        assert column.has_column_index or column.physical_type == "BYTE_ARRAY"
    assert main(["doctor", str(tmp_path / "out"), "--quiet"]) == 0


def open_keys(location: str) -> tuple[str, list[str]]:
    from thresher.data import open_data

    return location, [sample.key for sample in open_data(location).samples()]


def versions(tmp_path: Path, hub: bool) -> tuple[bytes, bytes]:
    """Two versions of a table of captions; the second has a row more near its start."""
    rng = np.random.Generator(np.random.Philox(7))
    words = np.array([f"word{i}" for i in range(500)])
    rows = 6_000
    texts = [" ".join(some) for some in rng.choice(words, (rows + 1, 250))]
    made = []
    for name, chosen in (("one", [i for i in range(rows + 1) if i != 40]), ("two", list(range(rows + 1)))):
        folder = tmp_path / f"{name}-{hub}"
        folder.mkdir()
        table = {
            "key": [f"{i:06d}" for i in chosen],
            "text": [texts[i] for i in chosen],
            "path": ["a.jpg"] * len(chosen),
        }
        pq.write_table(pa.table(table), folder / "data.parquet")
        (folder / "keys.txt").write_text("".join(f"{key}\n" for key in table["key"]))
        api.reshard(
            folder, str(folder / "keys.txt"), folder.with_suffix(".out"), form="parquet", for_hub=hub, workers=1,
            progress=False,
        )  # fmt: skip
        (path,) = folder.with_suffix(".out").glob("*.parquet")
        made.append(path.read_bytes())
    return made[0], made[1]


def chunks(content: bytes) -> dict[bytes, int]:
    """Cut a file where its last 32 bytes have a sum that is rare, as a storage with deduplication does."""
    array = np.frombuffer(content, np.uint8).astype(np.int64)
    table = np.random.Generator(np.random.Philox(1)).integers(0, 1 << 30, 256)
    sums = np.cumsum(table[array])
    window = sums[32:] - sums[:-32]
    ends = [0, *(np.flatnonzero(window % 2048 == 7) + 33).tolist(), len(content)]
    return {content[lo:hi]: hi - lo for lo, hi in zip(ends, ends[1:], strict=False)}


@pytest.mark.slow
def test_a_row_more_changes_few_bytes(tmp_path: Path) -> None:
    shared = {}
    for hub in (False, True):
        old, new = map(chunks, versions(tmp_path, hub))
        shared[hub] = sum(size for chunk, size in new.items() if chunk in old) / sum(new.values())
    assert shared[True] > 0.8, shared
    assert shared[True] > 2 * shared[False], shared


def test_row_groups_are_large_but_have_a_limit(tmp_path: Path) -> None:
    table = pa.table({"key": [f"{i:06d}" for i in range(25_000)], "text": ["x"] * 25_000, "path": ["a.jpg"] * 25_000})
    pq.write_table(table, tmp_path / "data.parquet")
    keys = tmp_path / "keys.txt"
    keys.write_text("".join(f"{i:06d}\n" for i in range(25_000)))
    out = tmp_path / "out"
    how: dict[str, Any] = {"form": "parquet", "for_hub": True, "per_shard": 50_000, "workers": 1, "progress": False}
    api.reshard(tmp_path / "data.parquet", str(keys), out, **how)
    (path,) = out.glob("*.parquet")
    metadata = pq.ParquetFile(path).metadata
    assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [10_000, 10_000, 5_000]


IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
TYPES = {
    "image": IMAGE, "text": pa.string(), "many": pa.list_(pa.string()), "vector": pa.list_(pa.float32(), 3),
    "half": pa.float16(), "when": pa.timestamp("us", "UTC"), "day": pa.date32(), "much": pa.decimal128(10, 2),
    "inner": pa.struct([("a", pa.int8()), ("b", pa.list_(pa.int64()))]),
    "rows": pa.list_(pa.struct([("c", pa.bool_())])),
    "large": pa.large_string(), "long": pa.large_list(pa.float64()), "none": pa.null(),
}  # fmt: skip


def test_features_are_those_that_datasets_would_declare() -> None:
    schema = with_features(pa.schema(list(TYPES.items())), "image")
    features = datasets.Features.from_arrow_schema(schema)
    assert isinstance(features["image"], datasets.Image)
    plain = datasets.Features.from_arrow_schema(pa.schema(list(TYPES.items())))
    for name in TYPES:
        if name != "image":
            assert features[name] == plain[name], name
    assert features.arrow_schema.field("vector").type == TYPES["vector"]


def test_features_of_the_data_stay(tmp_path: Path) -> None:
    own = datasets.Features({"image": datasets.Value("binary"), "label": datasets.ClassLabel(names=["a", "b"])})
    kept = datasets.Features.from_arrow_schema(with_features(own.arrow_schema, "image"))
    assert (kept["label"], isinstance(kept["image"], datasets.Image)) == (own["label"], True)
    several = datasets.Features({"image": datasets.List(datasets.Image()), "x": datasets.Value("string")})
    assert datasets.Features.from_arrow_schema(with_features(several.arrow_schema, "image")) == several


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
def test_images_as_bytes_become_images_of_datasets(tmp_path: Path, kind: Any) -> None:
    some = pairs(4)
    images = pa.array([pair.picture for pair in some[:3]] + [None], kind)
    table = pa.table({"jpg": images, "text": [p.text for p in some], "key": [p.key for p in some]})
    pq.write_table(table, tmp_path / "data.parquet")
    written(str(tmp_path / "data.parquet"), tmp_path / "out", [pair.key for pair in some])
    found = load(tmp_path / "out", tmp_path / "cache")
    assert [None if row["jpg"] is None else row["jpg"].size for row in found] == [(8, 6)] * 3 + [None]


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"{", b"[]", b'{"info": 3}', b'{"info": {"features": {"other": 1}}}', b"[" * 100_000, b"\xff"),
        b'{"info": {"features": {"image": {"_type": "Image"}, "text": null}}}',
        b'{"info": {"features": {"image": %s, "text": %s}}}' % (b"[" * 900 + b"]" * 900, b'{"dtype": "string"}'),
    ],
)
def test_wrong_metadata_is_replaced(content: bytes) -> None:
    schema = pa.schema([("image", IMAGE), ("text", pa.string())], {b"huggingface": content, b"mine": b"1"})
    made = with_features(schema, "image")
    assert json.loads(made.metadata[b"huggingface"])["info"]["features"]["image"] == {"_type": "Image"}
    assert isinstance(json.loads(made.metadata[b"huggingface"])["info"]["features"]["text"], dict)
    assert made.metadata[b"mine"] == b"1"


def test_paths_and_types_that_datasets_lacks_stay_as_they_are() -> None:
    paths = with_features(pa.schema([("image", pa.string())]), "image")
    assert json.loads(paths.metadata[b"huggingface"])["info"]["features"]["image"]["_type"] == "Value"
    odd = pa.schema([("image", IMAGE), ("x", pa.month_day_nano_interval())])
    assert with_features(odd, "image") is odd


def test_other_forms_and_an_old_pyarrow_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = DATA["webdataset"](tmp_path / "data", pairs(3), 1)
    (tmp_path / "keys.txt").write_text("k0000\n")
    with pytest.raises(UsageError, match="--for-hub is for parquet: add --as parquet"):
        api.reshard(data, str(tmp_path / "keys.txt"), tmp_path / "out", for_hub=True, progress=False)

    def old(self: Any, where: Any, schema: Any) -> None:
        """The arguments that pyarrow 20 lacks are missing."""

    monkeypatch.setattr(pq.ParquetWriter, "__init__", old)
    with pytest.raises(MissingPackageError, match="--for-hub needs pyarrow 21"):
        writer_options()


def test_the_flag_of_the_command(tmp_path: Path) -> None:
    data = DATA["webdataset"](tmp_path / "data", pairs(5), 1)
    (tmp_path / "keys.txt").write_text("k0000\nk0003\n")
    words = ["reshard", data, str(tmp_path / "keys.txt"), "-o", str(tmp_path / "out"), "--as", "parquet", "--quiet"]
    assert main([*words, "--for-hub"]) == 0
    (path,) = (tmp_path / "out").glob("*.parquet")
    assert b"huggingface" in pq.read_schema(io.BytesIO(path.read_bytes())).metadata
    assert main(words) != 0  # other options: another result
