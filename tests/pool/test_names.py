"""Folders and files with unusual names, names in capitals, and more files than a process may open."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.pools import make, write_clip_retrieval, write_datacomp, write_npy, write_parquet
from thresher import PoolError, open_store
from thresher.cli.main import main
from thresher.data import DataOptions, open_data
from thresher.io.listing import Files, file_system
from thresher.pool.store import absolute

POOL = make(20)
NAMES = [
    "a::b", "simplecache::x", "zip::s3:", "file:", "local:", "memory:", "a#b", "a%20b", "a*b", "a?b", "a[1]", "{a,b}",
    "a b", "new\nline", "-lead", "~", "~home", "c:\\x", "$HOME", "`id`", "q'uo\"te", "ünï😀", "trail ", "\udcff",
    "x" * 200,
]  # fmt: skip


HARD = ("a::b", "a%20b", "new\nline", "\udcff")  # for which what takes longer is tried by default


@pytest.fixture(params=NAMES, ids=[ascii(name)[:20] for name in NAMES])
def named(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    made = Path(write_npy(tmp_path / "made", POOL, [7]))  # Arrow itself writes only to names in UTF-8
    return made.rename(tmp_path / request.param)


def run(*words: object) -> int:
    return main([*map(str, words)])


def test_a_local_folder_may_have_any_name(
    named: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(open_store(str(named))) == 20
    monkeypatch.chdir(tmp_path)
    relative = named.name if not named.name.startswith("-") else f"./{named.name}"
    assert {os.path.dirname(path) for _, path in open_store(relative).files()} == {str(named)}
    cache, out = ("--cache", f"{named}cache"), f"{named}sel"
    assert run("select", "random", named, "-o", out, "--keep", "50%", *cache) == 0
    assert run("explain", out, "row:3") == 0
    for form in ("keys", "parquet"):
        assert run("export", out, "--as", form, "-o", f"{named}.{form}") == 0
        manifest = json.loads(Path(f"{named}.{form}.manifest.json").read_bytes())
        assert manifest["selection"]["pool"] == str(named)
    assert run("score", "clip-score", named, "-o", f"{named}s.parquet", *cache) == 0
    assert Path(f"{named}s.parquet").exists()
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "named",
    [pytest.param(name, marks=[] if name in HARD else [pytest.mark.slow], id=ascii(name)[:20]) for name in NAMES],
    indirect=True,
)
def test_a_report_on_a_local_folder_of_any_name(named: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache, out = ("--cache", f"{named}cache"), f"{named}sel"
    assert run("select", "random", named, "-o", out, "--keep", "50%", *cache) == 0
    assert run("report", out, "-o", f"{named}.html") == 0
    assert Path(f"{named}.html").exists()
    assert "Traceback" not in capsys.readouterr().err


def test_what_is_a_local_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/somebody")
    assert file_system("file:x")[1] == str(tmp_path / "file:x")
    assert file_system("~/pool")[1] == "/home/somebody/pool"
    (tmp_path / "~").mkdir()
    assert file_system("~")[1] == str(tmp_path / "~")
    assert absolute("a::b") == str(tmp_path / "a::b")
    assert absolute("s3://bucket/pool") == "s3://bucket/pool"
    for chain in ("simplecache::s3://bucket/pool", "zip://x::file.zip", "filecache::file:///x"):
        with pytest.raises(PoolError, match="chained URLs are not supported; give the location of the files, such as"):
            Files.at(chain)
    assert Files.at(f"file://{write_npy(tmp_path / 'pool', POOL, [7])}").protocol == "file"


def test_links_in_circles_are_passed_over(tmp_path: Path) -> None:
    write_npy(tmp_path, POOL, [7])
    (tmp_path / "self").symlink_to(".")
    (tmp_path / "knot").symlink_to("knot")
    assert len(open_store(str(tmp_path))) == 20


def test_file_names_that_are_not_utf8(tmp_path: Path) -> None:
    write_npy(tmp_path, POOL, [7])
    for path in list(tmp_path.iterdir()):
        path.rename(tmp_path / path.name.replace("_", "\udcff_"))
    assert len(open_store(str(tmp_path))) == 20
    assert run("select", "random", tmp_path, "-o", tmp_path / "sel", "--keep", "5", "--cache", tmp_path / "cache") == 0


# --- capitals -------------------------------------------------------------------------------------

WRITERS: dict[str, Any] = {
    "npy": lambda folder: write_npy(folder, POOL, [7], [11]),
    "clip-retrieval": lambda folder: write_clip_retrieval(folder, POOL, [7]),
    "datacomp": lambda folder: write_datacomp(folder, POOL, [7]),
    "parquet": lambda folder: write_parquet(folder, POOL, [7]),
}


@pytest.mark.parametrize("some", [False, True], ids=["all", "some"])
@pytest.mark.parametrize("kind", WRITERS)
def test_endings_in_capitals(tmp_path: Path, kind: str, some: bool) -> None:
    plain = open_store(str(WRITERS[kind](tmp_path / "plain")))
    folder = Path(WRITERS[kind](tmp_path / "capitals"))
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files[:: 2 if some else 1]:
        path.rename(path.with_suffix(path.suffix.upper()))
    store = open_store(str(folder))
    assert store.layout.kind == plain.layout.kind == kind
    assert store.fingerprint() == plain.fingerprint()
    assert [keys for _, keys in store.keys()] == [keys for _, keys in plain.keys()]
    for name in store.layout.vectors:
        assert np.array_equal(store.raw_at(name, np.arange(20)), plain.raw_at(name, np.arange(20)))


@pytest.mark.parametrize("ending", ["PARQUET", "Pq"])
def test_a_table_of_raw_data_in_capitals(tmp_path: Path, ending: str) -> None:
    pq.write_table(pa.table({"image": [b"x"], "text": ["a"]}), tmp_path / f"a.{ending}")
    for location in (tmp_path, tmp_path / f"a.{ending}"):
        assert [part.path for part in open_data(str(location), DataOptions()).parts] == [str(tmp_path / f"a.{ending}")]


# --- open files -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["npy", "parquet"])
def test_more_files_than_a_process_may_open(tmp_path: Path, kind: str) -> None:
    pool = make(400)
    write = write_npy if kind == "npy" else write_parquet
    location = write(tmp_path / "pool", pool, list(range(4, 400, 4)))
    common = f"--cache {tmp_path}/cache --quiet"
    lines = [
        f"select semdedup {location} -o {tmp_path}/sel --eps 0.3 --clusters 4 {common}",
        f"inspect {location} {common}",
        f"export {tmp_path}/sel --as parquet -o {tmp_path}/out.parquet",
    ]
    for words in lines:
        line = f"ulimit -n 64; {sys.executable} -m thresher {words}"
        done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert pq.read_table(tmp_path / "out.parquet").num_rows == 400
