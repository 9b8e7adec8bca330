"""A pool given where raw data are wanted: every command refuses it and names the data it was made from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.embedding.raw import parquet, tars
from thresher import Selection, open_store
from thresher.cli.main import main
from thresher.data import DataOptions, open_data
from thresher.embedding.pipeline import EmbedSettings, embed
from thresher.errors import UsageError

ROWS = 12


def pool_of(data: Path, pool: Path, thumbnails: int = 64) -> Path:
    embed(str(data), pool, EmbedSettings(encoder="tests.toy:Toy", workers=0, thumbnails=thumbnails))
    return pool


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    return pool_of(tars(tmp_path / "raw", ROWS, 6), tmp_path / "pool")


def commands(pool: Path, tmp_path: Path) -> dict[str, list[str]]:
    keys = tmp_path / "keys.txt"
    keys.write_text("000001\n000002\n", encoding="ascii")
    out = str(tmp_path / "out")
    return {
        "embed": ["embed", str(pool), "-o", out, "--encoder", "tests.toy:Toy", "--workers", "0"],
        "doctor": ["doctor", str(pool), "--sample", "3"],
        "reshard": ["reshard", str(pool), str(keys), "-o", out],
        "train clip": ["train", "clip", str(pool), "-o", out, "--epochs", "1", "--batch-size", "4"],
        "train moco": ["train", "moco", str(pool), "-o", out, "--epochs", "1", "--batch-size", "4"],
    }


@pytest.mark.parametrize("name", ["embed", "doctor", "reshard", "train clip", "train moco"])
def test_a_pool_is_not_data(name: str, pool: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = commands(pool, tmp_path)[name]
    assert main(command) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"{pool}: is a pool, not raw data; give {tmp_path / 'raw'}, which it was made from" in said
    assert "--thumbnails-as-data" in said
    assert f"type thresher inspect {pool}" in said
    assert not (tmp_path / "out").exists()
    assert main([*command, "--thumbnails-as-data"]) == 0


def test_every_way_to_name_a_pool_is_recognised(pool: Path, tmp_path: Path) -> None:
    table = next((pool / "metadata").iterdir())
    for location in (pool, f"{pool}/", pool / "metadata", table):
        with pytest.raises(UsageError, match=rf"is a pool, not raw data; give {tmp_path / 'raw'},"):
            open_data(str(location))
    copy = shutil.copytree(pool / "metadata", tmp_path / "elsewhere")  # its pool.json was left behind
    for location in (copy, copy / table.name):
        with pytest.raises(UsageError, match="is a pool, not raw data; give the data it was made from; to use its"):
            open_data(str(location))
    assert sum(1 for _ in open_data(str(pool), DataOptions(thumbnails_as_data=True)).samples()) == ROWS


def test_a_pool_without_thumbnails_and_one_of_a_file(tmp_path: Path) -> None:
    data = parquet(tmp_path / "raw.parquet", 5)
    bare = pool_of(data, tmp_path / "bare", thumbnails=0)
    with pytest.raises(UsageError, match=rf"give {data}, which it was made from; to look at the pool"):
        open_data(str(bare))
    unfinished = tmp_path / "begun"
    unfinished.mkdir()
    plan = json.loads((bare / "pool.json").read_text())
    del plan["rows"]
    (unfinished / "pool.json").write_text(json.dumps(plan))
    with pytest.raises(UsageError, match=rf"begun: is a pool, not raw data; give {data}"):
        open_data(str(unfinished))


def test_data_beside_a_file_of_the_same_name_are_data(tmp_path: Path) -> None:
    raw = tars(tmp_path / "raw", 3)
    for content in ('{"shards": 3}', "[]", "{", ""):
        (raw / "pool.json").write_text(content)
        assert sum(1 for _ in open_data(str(raw)).samples()) == 3


def test_a_selection_of_the_pool_takes_the_original_pictures(pool: Path, tmp_path: Path) -> None:
    store = open_store(str(pool))
    selection = Selection.everything(store.fingerprint(), str(pool), {}, store.total)
    selection.save(tmp_path / "sel")
    code = main(["reshard", str(pool), str(tmp_path / "sel"), "-o", str(tmp_path / "shards")])
    assert code == 2
    assert main(["reshard", str(tmp_path / "raw"), str(tmp_path / "sel"), "-o", str(tmp_path / "shards")]) == 0
    assert sum(1 for _ in open_data(str(tmp_path / "shards")).samples()) == ROWS
