"""The peak memory that ``inspect`` foretells, against that of real runs; pools and raw data that are confused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.common import picture, sample_tar
from tests.pools import (
    make,
    write_clip_retrieval,
    write_datacomp,
    write_img2dataset,
    write_npy,
    write_parquet,
)
from thresher import PoolError, UsageError
from thresher.cli.main import main
from thresher.data import open_data
from thresher.pool.store import open_store

METHODS = {
    "clip-score": "clip-score --keep 50%",
    "density": "density --keep 50% --iterations 3",
    "semdedup": "semdedup --eps 0.3 --iterations 3",
    "clipcov": "clipcov --keep 50% --iterations 3",
}


def run(folder: Path, words: str) -> dict[str, Any]:
    line = [sys.executable, "-m", "thresher", *words.split(), "--workers", "2", "--json", "--quiet"]
    line += ["--cache", f"cache-{words.split()[1]}"]
    done = subprocess.run(line, cwd=folder, capture_output=True, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def write(folder: Path, rows: int, dim: int, dtype: str) -> None:
    (folder / "pool").mkdir()
    rng = np.random.default_rng(0)
    for name in ("image", "text"):
        np.save(folder / "pool" / f"{name}.npy", rng.standard_normal((rows, dim), np.float32).astype(dtype))
    table = {"uid": [f"k{i}" for i in range(rows)], "text": [f"caption {i}" for i in range(rows)]}
    pq.write_table(pa.table(table), folder / "pool" / "meta.parquet")


@pytest.mark.slow
def test_memory_is_foretold_for_each_method(tmp_path: Path) -> None:
    write(tmp_path, 3_000, 32, "float32")
    cost = run(tmp_path, "inspect pool")["cost"]
    assert set(METHODS) < set(cost["memory"]) == set(cost["seconds"])
    assert cost["memory_bytes"] == max(cost["memory"].values()) > 195_000_000
    peak = run(tmp_path, "select density pool -o sel --keep 50%")["peak_memory_bytes"]
    assert 0.8 <= cost["memory"]["density"] / peak <= 1.6


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_memory_is_foretold_within_a_third(tmp_path: Path, dtype: str) -> None:
    write(tmp_path, 200_000, 128, dtype)
    foretold = run(tmp_path, "inspect pool")["cost"]["memory"]
    for name, words in METHODS.items():
        peak = run(tmp_path, f"select {words} pool -o {name}")["peak_memory_bytes"]
        assert 0.75 <= foretold[name] / peak <= 1.6, (name, foretold[name], peak)


def _raw(folder: Path, kind: str) -> Path:
    """Raw data of a kind; the path of it."""
    rows = {"key": ["a", "b"], "caption": ["x", "y"]}
    if kind == "tars":
        (folder / "in").mkdir()
        (folder / "in" / "0.tar").write_bytes(sample_tar(["a", "b"]))
        return folder / "in"
    if kind == "pictures":
        (folder / "in").mkdir()
        (folder / "in" / "a.jpg").write_bytes(picture(0, "JPEG"))
        return folder / "in"
    if kind == "bitmaps, deep":
        (folder / "in/a/b/c").mkdir(parents=True)
        (folder / "in/a/b/c/a.bmp").write_bytes(picture(0, "BMP"))
        return folder / "in"
    if kind == "mds":
        from streaming import MDSWriter

        with MDSWriter(out=str(folder / "in"), columns={"image": "bytes", "text": "str"}, compression="zstd") as out:
            out.write({"image": picture(0), "text": "x"})
        return folder / "in"
    if kind == "lance of images":
        from lance import write_dataset

        write_dataset(pa.table({**rows, "image": [picture(0), picture(1)]}), str(folder / "in.lance"))
        return folder / "in.lance"
    if kind in ("csv", "jsonl"):
        words = "filepath\ttitle\na.jpg\tx\n" if kind == "csv" else '{"image": "a.jpg", "caption": "x"}\n'
        (folder / f"in.{kind}").write_text(words)
        return folder / f"in.{kind}"
    table = pa.table({**rows, **({"image": [picture(0), picture(1)]} if "images" in kind else {})})
    if "arrow" in kind:
        with pa.ipc.new_stream(str(folder / "in.arrow"), table.schema) as file:
            file.write_table(table)
        return folder / "in.arrow"
    pq.write_table(table, folder / "in.parquet")
    return folder / "in.parquet"


@pytest.mark.parametrize(
    "kind",
    [
        *("tars", "pictures", "bitmaps, deep", "csv", "jsonl", "mds"),
        *("parquet of captions", "parquet of images", "arrow of images", "lance of images"),
    ],
)
@pytest.mark.filterwarnings("ignore")  # of streaming
def test_inspecting_raw_data_says_what_to_type(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    place = _raw(tmp_path, kind)
    code = main(["inspect", str(place)])
    said = capsys.readouterr()
    assert f"type thresher doctor {place}" in said.out + said.err
    assert code == (0 if "of" in kind else 2)


def test_raw_data_are_named_where_a_pool_is_wanted(tmp_path: Path) -> None:
    place = _raw(tmp_path, "pictures").parent
    with pytest.raises(PoolError, match=r"looks like raw data \(found: a.jpg\), read as folder .* thresher embed "):
        open_store(str(place / "in"))
    (place / "00.tar").write_bytes(b"")
    with pytest.raises(PoolError, match=r"\{00..00\}.tar: looks like raw data, read as webdataset"):
        open_store(str(place / "{00..00}.tar"))
    with pytest.raises(PoolError, match=r"none.tar: nothing is there"):
        open_store(str(place / "none.tar"))


def test_a_key_is_asked_for_only_if_there_are_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, columns in (("with", {"caption": ["a", "b"]}), ("without", {})):
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "image.npy", np.eye(2, dtype="f4"))
        if columns:
            pq.write_table(pa.table(columns), tmp_path / name / "meta.parquet")
        assert main(["inspect", str(tmp_path / name), "--json", "--quiet"]) == 0
        (warning,) = [text for text in json.loads(capsys.readouterr().out)["warnings"] if "no key column" in text]
        assert ("name one with --key" in warning) == (name == "with")


def test_what_is_skipped_is_in_the_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pool = make(20)
    pool.keys[3] = "../../etc"
    write_clip_retrieval(tmp_path / "pool", pool, [10])
    (bad,) = (tmp_path / "pool" / "img_emb").glob("*_1.npy")
    bad.write_bytes(b"no array")
    assert main(["inspect", str(tmp_path / "pool"), "--skip-bad", "--json", "--quiet"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["rows"], found["keys"]["unsafe"], found["keys"]["repeated"]) == (10, 1, 0)
    assert [one["path"] for one in found["skipped"]] == [str(bad)]
    assert "1 file was skipped" in found["warnings"]


POOLS_AT = {
    "clip-retrieval": write_clip_retrieval,
    "datacomp": write_datacomp,
    "npy": write_npy,
    "parquet": write_parquet,
    "img2dataset": write_img2dataset,
}


def _pool(folder: Path, kind: str) -> Path:
    POOLS_AT.get(kind, write_clip_retrieval)(folder, make(20))
    if kind == "laion":
        (folder / "metadata").rename(folder / "laion2B-en-metadata")
    if kind == "unfinished":
        (folder / "pool.json").write_text(json.dumps({"format": 1, "shards": [["x.tar", 0]]}))
    return folder


@pytest.mark.parametrize("kind", [*POOLS_AT, "laion", "unfinished"])
def test_a_pool_given_to_doctor_says_what_to_type(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pool = _pool(tmp_path / "pool", kind)
    assert main(["doctor", str(pool)]) == 2
    assert f"type thresher inspect {pool}" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["clip-retrieval", "datacomp", "laion"])
def test_a_pool_of_others_is_not_raw_data(tmp_path: Path, kind: str) -> None:
    pool = _pool(tmp_path / "pool", kind)
    with pytest.raises(UsageError, match="is a pool, not raw data; give the data it was made from"):
        open_data(str(pool))


def test_tars_next_to_their_vectors_are_raw_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_clip_retrieval(tmp_path / "both", make(20))
    (tmp_path / "both" / "0.tar").write_bytes(sample_tar(["a", "b"]))
    assert main(["doctor", str(tmp_path / "both")]) == 0
    assert "webdataset" in capsys.readouterr().out


def add_empty(pool: Path) -> list[str]:
    """Add a file without rows for each file of a pool; return their paths."""
    made = []
    for path in [one for one in pool.rglob("*") if one.suffix in (".npy", ".parquet")]:
        new = path.with_name(f"{path.stem.removesuffix('0')}1{path.suffix}")
        if path.suffix == ".npy":
            np.save(new, np.load(path)[:0])
        else:
            pq.write_table(pq.read_table(path).slice(0, 0), new)
        made.append(str(new))
    return sorted(made)


@pytest.mark.parametrize("write", [write_npy, write_clip_retrieval, write_parquet])
def test_files_without_rows_are_counted_and_named(
    tmp_path: Path, write: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """They may be what is left of a writer that was stopped."""
    write(tmp_path / "pool", make(20))
    where, empty = str(tmp_path / "pool"), add_empty(tmp_path / "pool")
    assert main(["inspect", where, "--json", "--cache", str(tmp_path / "cache")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["rows"] == 20
    assert sorted(found["empty"]) == empty
    has = "file has" if len(empty) == 1 else "files have"
    (said,) = (one for one in found["warnings"] if "no rows" in one)
    assert said.startswith(f"{len(empty)} {has} no rows: {empty[0]}")
    assert main(["inspect", where, "--cache", str(tmp_path / "cache")]) == 0
    assert f"! {said}" in capsys.readouterr().out


def test_a_stream_that_may_be_cut_off_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pool = make(20)
    table = pa.table({"uid": pool.keys, "image_embedding": pool.image.astype("f4").tolist()})
    for name, end in (("a", 0), ("b", 8)):
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table.slice(0 if name == "a" else 10, 10))
        content = sink.getvalue().to_pybytes()
        (tmp_path / f"{name}.arrow").write_bytes(content[: len(content) - end])
    assert main(["inspect", str(tmp_path), "--json", "--cache", str(tmp_path / "cache")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["rows"], found["cut_off"]) == (20, [str(tmp_path / "b.arrow")])
    assert (
        f"1 file does not have the end mark of the format and may be cut off: {tmp_path}/b.arrow" in found["warnings"]
    )
