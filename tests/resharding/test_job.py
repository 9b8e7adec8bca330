"""The folder that is written: resumed after kills, refused where it is another's, the same in the end."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.kills import KILLED, forked
from thresher.cli.main import main
from thresher.errors import OutputError, PoolError, UsageError
from thresher.resharding import reshard

from .common import hashes, keys_file, picture, plain, tar


def data_of(folder: Path, kind: str) -> str:
    folder.mkdir()
    for i in range(3):
        if kind == "tars":
            tar(folder / f"{i}.tar", plain(20, 20 * i))
        else:
            rows = range(20 * i, 20 * i + 20)
            table = pa.table({"image": [picture(n) for n in rows], "key": [f"{n:06d}" for n in rows]})
            pq.write_table(table, folder / f"{i}.parquet", row_group_size=7)
    return str(folder)


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        pytest.param("tars", ["--workers", "1"], marks=pytest.mark.slow),  # in process: tests/resharding/test_jobs.py
        pytest.param("tars", ["--workers", "2", "--shuffle", "1"], marks=pytest.mark.slow),
        pytest.param("parquet", ["--workers", "1"], marks=pytest.mark.slow),
        pytest.param("parquet", ["--workers", "2", "--shuffle", "1"], marks=pytest.mark.slow),
        pytest.param("parquet", ["--workers", "2", "--shuffle", "1", "--as", "webdataset"], marks=pytest.mark.slow),
    ],
)
def test_killed_again_and_again_it_ends_with_the_same_files(tmp_path: Path, kind: str, more: list[str]) -> None:
    data = data_of(tmp_path / "in", kind)
    sel = keys_file(tmp_path / "k", [f"{i:06d}" for i in range(0, 60, 2)] + ["000004", "nowhere"])
    asked = ["reshard", data, sel, "--per-shard", "6", "--max-missing", "1", "--quiet", "-o"]
    assert main([*asked, str(tmp_path / "whole"), *more]) == 0
    dice = random.Random(str(more))
    killed = 0
    for kill in range(5):
        command = [sys.executable, "-W", "ignore", "-c", KILLED, str(dice.randint(1, 12 + 4 * kill)), *asked]
        done = subprocess.run([*command, str(tmp_path / "killed"), *more], capture_output=True, text=True)
        assert done.returncode in (0, -signal.SIGKILL), done.stderr
        killed += done.returncode != 0
    assert killed >= 3
    assert main([*asked, str(tmp_path / "killed"), *more]) == 0
    assert hashes(tmp_path / "killed") == hashes(tmp_path / "whole")


@pytest.mark.slow
def test_killed_at_every_change_of_a_file(tmp_path: Path) -> None:
    """Of a second reshard, which replaces a first one."""
    data = data_of(tmp_path / "in", "tars")
    sel = keys_file(tmp_path / "k", [f"{i:06d}" for i in range(12)])
    asked = [
        "reshard",
        data,
        sel,
        "--workers",
        "1",
        "--quiet",
        "--overwrite",
        "-o",
        str(tmp_path / "killed"),
        "--per-shard",
    ]
    assert main([*asked, "4"]) == 0
    again = 0
    while (code := forked([*asked, "6"], again + 1)) != 0:
        assert os.WIFSIGNALED(code)
        again += 1
    assert again > 15
    reshard(data, sel, str(tmp_path / "whole"), per_shard=6)
    found, wanted = hashes(tmp_path / "killed"), hashes(tmp_path / "whole")
    assert found == wanted


def test_two_at_once_do_not_mix(tmp_path: Path) -> None:
    import fcntl

    data, sel = data_of(tmp_path / "in", "tars"), keys_file(tmp_path / "k", ["000001"])
    (tmp_path / "out" / ".reshard").mkdir(parents=True)
    with open(tmp_path / "out" / ".reshard" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(OutputError, match="another process is using it"):
            reshard(data, sel, str(tmp_path / "out"))
    assert reshard(data, sel, str(tmp_path / "out")).samples == 1


def test_killed_from_outside(tmp_path: Path) -> None:
    data = data_of(tmp_path / "in", "tars")
    sel = keys_file(tmp_path / "k", [f"{i:06d}" for i in range(60)])
    asked = ["reshard", data, sel, "--per-shard", "1", "--quiet", "-o"]
    assert main([*asked, str(tmp_path / "whole")]) == 0
    going = subprocess.Popen([sys.executable, "-m", "thresher", *asked, str(tmp_path / "killed")])
    while going.poll() is None and not list(tmp_path.glob("killed/*.tar")):
        time.sleep(0.001)
    going.kill()
    going.wait()
    assert main([*asked, str(tmp_path / "killed")]) == 0
    assert hashes(tmp_path / "killed") == hashes(tmp_path / "whole")


def test_finished_shards_are_not_written_again(tmp_path: Path) -> None:
    data = data_of(tmp_path / "in", "tars")
    sel = keys_file(tmp_path / "k", [f"{i:06d}" for i in range(60)])
    reshard(data, sel, str(tmp_path / "out"), per_shard=20)
    before = {path.name: path.stat().st_ino for path in (tmp_path / "out").iterdir()}
    done = reshard(data, sel, str(tmp_path / "out"), per_shard=20)
    assert {path.name: path.stat().st_ino for path in (tmp_path / "out").iterdir()} == before
    assert (done.shards, done.samples) == (3, 60)
    (tmp_path / "out" / "00000001.tar").write_bytes(b"half")
    reshard(data, sel, str(tmp_path / "out"), per_shard=20)
    after = {path.name: path.stat().st_ino for path in (tmp_path / "out").iterdir()}
    assert {name for name in before if before[name] != after[name] and name.endswith("tar")} == {"00000001.tar"}


@pytest.mark.parametrize("change", [{"per_shard": 7}, {"shuffle": 1}, {"sel": "other"}])
def test_the_result_of_something_else_is_replaced_only_with_overwrite(tmp_path: Path, change: dict) -> None:
    data = data_of(tmp_path / "in", "tars")
    sel = keys_file(tmp_path / "k", [f"{i:06d}" for i in range(60)])
    reshard(data, sel, str(tmp_path / "out"), per_shard=20)
    kept = hashes(tmp_path / "out")
    given = {"per_shard": 20, **change}
    if given.pop("sel", ""):
        sel = keys_file(tmp_path / "k2", ["000001", "x"])
    with pytest.raises(OutputError, match="other data or options; choose another folder or pass --overwrite"):
        reshard(data, sel, str(tmp_path / "out"), **given)
    assert hashes(tmp_path / "out") == kept
    reshard(data, sel, str(tmp_path / "out"), **given, overwrite=True)
    reshard(data, sel, str(tmp_path / "fresh"), **given)
    for folder in ("out", "fresh"):
        (tmp_path / folder / "reshard.json").unlink()
    assert hashes(tmp_path / "out") == hashes(tmp_path / "fresh")


@pytest.mark.parametrize("overwrite", [False, True])
def test_files_of_others_are_never_touched(tmp_path: Path, overwrite: bool) -> None:
    data = data_of(tmp_path / "in", "tars")
    sel = keys_file(tmp_path / "k", ["000001"])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "00000000.tar").write_text("mine")
    with pytest.raises(OutputError):
        reshard(data, sel, str(tmp_path / "out"), overwrite=overwrite)
    assert hashes(tmp_path / "out").keys() == {"00000000.tar"}
    (tmp_path / "out" / "00000000.tar").unlink()
    reshard(data, sel, str(tmp_path / "out"))
    (tmp_path / "out" / "notes.md").write_text("mine")
    with pytest.raises(OutputError, match=r"notes\.md"):
        reshard(data, sel, str(tmp_path / "out"), shuffle=2, overwrite=overwrite)
    assert (tmp_path / "out" / "00000000.tar").exists()


def test_names_in_the_way_are_not_followed(tmp_path: Path) -> None:
    """A link where a shard is to be is replaced, not written through."""
    data = data_of(tmp_path / "in", "tars")
    sel = keys_file(tmp_path / "k", ["000001"])
    reshard(data, sel, str(tmp_path / "out"))
    canary = tmp_path / "canary"
    canary.write_text("here")
    (tmp_path / "out" / "00000000.tar").unlink()
    (tmp_path / "out" / "00000000.tar").symlink_to(canary)
    reshard(data, sel, str(tmp_path / "out"))
    assert canary.read_text() == "here"
    assert not (tmp_path / "out" / "00000000.tar").is_symlink()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    data = data_of(tmp_path / "in", "tars")
    sel = keys_file(tmp_path / "k", ["000001", "000001", "nowhere"])
    out = str(tmp_path / "out")
    assert main(["reshard", data, sel, "-o", out]) == 2
    said = capsys.readouterr()
    assert f"1 of 2 keys (50.0%) not found in {data}, more than --max-missing 1%" in said.err
    assert said.err.endswith("pass --max-missing 50%\n")
    assert said.out == (
        f"2 of 3 samples in 1 tar, found by key\n1 key not found in {data}, listed in {out}/missing.txt\n"
        f"written to {out}\n"
    )
    for allowed in ("50%", "0.5", "1", "100%"):
        assert main(["reshard", data, sel, "-o", out, "--max-missing", allowed]) == 0
    for allowed in ("49%", "0"):
        assert main(["reshard", data, sel, "-o", out, "--max-missing", allowed]) == 2
    assert main(["reshard", data, sel, "-o", out, "--max-missing", "101%"]) == 2
    capsys.readouterr()
    assert main(["reshard", data, sel, "-o", out, "--json"]) == 2
    told = json.loads(capsys.readouterr().out)
    assert ["--max-missing" in problem for problem in told["problems"]] == [True]
    assert (told["samples"], told["missing"], told["chosen"]) == (2, 1, 3)
    result = json.loads((tmp_path / "out" / "reshard.json").read_text())
    assert result["data"] == data
    assert result["inputs"] == [
        {"path": f"{data}/{i}.tar", "bytes": os.path.getsize(f"{data}/{i}.tar")} for i in range(3)
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--as", "csv"], "--as csv: .* is webdataset"),
        (["--workers", "0"], "--workers 0: at least 1"),
    ],
)
def test_what_cannot_be_is_refused(
    tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    data, sel = data_of(tmp_path / "in", "tars"), keys_file(tmp_path / "k", ["000001"])
    assert main(["reshard", data, sel, "-o", str(tmp_path / "out"), *arguments]) == 2
    assert __import__("re").search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_python_refuses_the_same(tmp_path: Path) -> None:
    data, sel = data_of(tmp_path / "in", "tars"), keys_file(tmp_path / "k", ["000001"])
    for given in ({"per_shard": 0}, {"shuffle": -1}):
        with pytest.raises(UsageError):
            reshard(data, sel, str(tmp_path / "out"), **given)
    with pytest.raises(UsageError, match="keeps nothing"):
        reshard(data, keys_file(tmp_path / "empty", []), str(tmp_path / "out"))
    with pytest.raises(PoolError):
        reshard(str(tmp_path / "nothing"), sel, str(tmp_path / "out"))


def test_a_damaged_tar_is_told_by_the_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = data_of(tmp_path / "in", "tars")
    sel = keys_file(tmp_path / "k", [f"{i:06d}" for i in range(2)])
    out = str(tmp_path / "out")
    last = max((tmp_path / "in").glob("*.tar"))
    os.truncate(last, last.stat().st_size // 2 // 512 * 512 + 100)
    assert main(["reshard", data, sel, "-o", out]) == 2
    said = capsys.readouterr()
    assert "2 of 2 samples in 1 tar" in said.out
    assert f"1 file of {data} damaged, listed in {out}/set-aside.txt: samples after the damage are missing" in said.err
    assert main(["reshard", data, sel, "-o", out, "--allow-damaged"]) == 0
    assert "damaged" not in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "reshard.json").read_text())["damaged"] == 1
