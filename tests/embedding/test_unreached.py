"""Data that is not reached, that is damaged, or that changes: what is embedded, what is tried again, what is told."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import thresher
from tests import faulty_fs, plugin_package
from tests.embedding.raw import caption, files, open_clip_csv, parquet, picture, tars, write_tar
from tests.embedding.test_pipeline import TOY, digests, one_by_one, rows_of, vectors
from thresher import ChangedError
from thresher.cli.main import main
from thresher.data import DataOptions
from thresher.embedding.pipeline import embed
from thresher.embedding.pool import SET_ASIDE, shard_path
from thresher.errors import AccessError, OutputError, PoolError, UnreachedError, UsageError
from thresher.io.plan import PLAN

Plan = Callable[..., None]
SOURCES = [str(Path(thresher.__file__).parents[1]), str(Path(__file__).parents[2])]
FAULTY = dataclasses.replace(TOY, encoder="tests.faulty_fs:FaultyToy")  # decode workers know faulty:// by its module


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    """A function that says which files of ``faulty://`` fail, by number of the tar."""
    faulty_fs.register()
    path = tmp_path / "plan.json"
    monkeypatch.setenv(faulty_fs.PLAN, str(path))
    monkeypatch.setenv("THRESHER_NETWORK_TRIES", "1")

    def write(what: dict[int, dict[str, Any]]) -> None:
        for old in tmp_path.glob("plan.json.*"):
            old.unlink()
        path.write_text(json.dumps({f"{number:05d}.tar": fault for number, fault in what.items()}))

    return write


def shards(pool: Path) -> list[int]:
    return sorted(int(path.stem[-5:]) for path in (pool / "metadata").glob("*.parquet"))


@pytest.mark.parametrize(
    ("error", "workers"),
    [
        *((error, 0) for error in ("expired", "reset", "io", "busy")),
        ("busy", 2),
        *(pytest.param(error, 2, marks=pytest.mark.slow) for error in ("expired", "reset", "io")),
    ],
)
def test_a_tar_that_is_not_reached_is_embedded_by_the_next_call(
    tmp_path: Path, plan: Plan, error: str, workers: int
) -> None:
    data, pool, how = tars(tmp_path / "tars", 50), tmp_path / "pool", dataclasses.replace(FAULTY, workers=workers)
    plan({1: {"error": error}, 3: {"error": error}})
    with pytest.raises(UnreachedError) as found:
        embed(f"faulty://{data}", pool, how)
    assert "2 of 5 shards are missing, because their data was not reached; run the same command" in str(found.value)
    assert "00001.tar" in str(found.value)
    assert shards(pool) == [0, 2, 4]
    assert "rows" not in json.loads((pool / PLAN).read_text())  # not finished
    assert not (pool / SET_ASIDE).exists()
    before = digests(pool / "metadata")
    plan({})
    result = embed(f"faulty://{data}", pool, how)
    assert (result.rows, result.new, result.skipped, result.damaged) == (50, 20, 0, 0)
    assert before.items() <= digests(pool / "metadata").items()
    for folder, stored in vectors(pool).items():
        np.testing.assert_array_equal(stored, one_by_one(list(range(50)))[folder])


@pytest.mark.parametrize("after", [0, 1, 2, 3, 4])
def test_access_that_ends_after_some_reads(tmp_path: Path, plan: Plan, after: int) -> None:
    """Whichever read fails, the shard is not written, and nothing is called damaged."""
    samples = [(f"{i:03d}", {"png": picture(i), "txt": caption(i).encode(), "bin": bytes(400_000)}) for i in range(6)]
    write_tar(tmp_path / "tars" / "00000.tar", samples)
    write_tar(tmp_path / "tars" / "00001.tar", [("last", samples[0][1])])
    plan({0: {"error": "expired", "after": after}})
    with pytest.raises(UnreachedError, match="1 of 2 shards are missing"):
        embed(f"faulty://{tmp_path}/tars", tmp_path / "pool", TOY)
    assert shards(tmp_path / "pool") == [1]
    plan({})
    assert embed(f"faulty://{tmp_path}/tars", tmp_path / "pool", TOY).rows == 7


@pytest.mark.parametrize(
    ("error", "kind"), [("memory", MemoryError), ("full", OutputError), ("key", KeyError), ("bug", RuntimeError)]
)
@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_that_is_not_about_the_data_stops_the_run(
    tmp_path: Path, plan: Plan, error: str, kind: type[Exception], workers: int
) -> None:
    data, pool = tars(tmp_path / "tars", 40), tmp_path / "pool"
    plan({2: {"error": error, "after": 1}})
    with pytest.raises(kind):
        embed(f"faulty://{data}", pool, dataclasses.replace(FAULTY, workers=workers, batch_size=4))
    assert 2 not in shards(pool)
    plan({})
    result = embed(f"faulty://{data}", pool, FAULTY)
    assert (result.rows, result.damaged, result.skipped) == (40, 0, 0)


def test_after_three_tars_in_a_row_the_rest_is_not_tried(tmp_path: Path, plan: Plan) -> None:
    data = tars(tmp_path / "tars", 80)
    plan({number: {"error": "expired"} for number in range(2, 8)})
    with pytest.raises(UnreachedError, match="6 of 8 shards are missing"):
        embed(f"faulty://{data}", tmp_path / "pool", TOY)
    assert shards(tmp_path / "pool") == [0, 1]
    assert not (tmp_path / "plan.json.00007.tar.reads").exists() or (
        (tmp_path / "plan.json.00007.tar.reads").stat().st_size <= 2  # read once to see which columns there are
    )


def test_nothing_was_reached(tmp_path: Path, plan: Plan) -> None:
    data = tars(tmp_path / "tars", 20)
    plan({0: {"error": "expired"}, 1: {"error": "expired"}})
    with pytest.raises(AccessError, match="access was denied .The provided token has expired"):
        embed(f"faulty://{data}", tmp_path / "pool", TOY)
    plan({})
    assert embed(f"faulty://{data}", tmp_path / "pool", TOY).rows == 20


@pytest.mark.slow
def test_a_token_that_expires_on_the_command_line(tmp_path: Path) -> None:
    """Exit code 2, the rest embedded, and the same command with a new token gives the pool of an undisturbed run."""
    tars(tmp_path / "tars", 40)
    plugin_package.install(
        tmp_path,
        "faulty_module",
        "from tests.faulty_fs import FaultyFileSystem\n",
        '[project.entry-points."fsspec.specs"]\nfaulty = "faulty_module:FaultyFileSystem"\n',
    )
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(tmp_path), *SOURCES]),
        faulty_fs.PLAN: str(tmp_path / "plan.json"),
        "THRESHER_NETWORK_TRIES": "1",
    }

    def run(pool: str, *more: str) -> subprocess.CompletedProcess[str]:
        command = ["embed", f"faulty://{tmp_path}/tars", "-o", pool, "--encoder", "tests.toy:Toy", "--workers", "2"]
        return subprocess.run(
            [sys.executable, "-m", "thresher", *command, "--quiet", *more],
            cwd=tmp_path, env=env, capture_output=True, text=True, check=False,
        )  # fmt: skip

    (tmp_path / "plan.json").write_text(json.dumps({"00002.tar": {"error": "expired", "after": 1}}))
    first = run("pool")
    assert first.returncode == 2, first.stderr
    assert "1 of 4 shards are missing" in first.stderr
    assert "access was denied (The provided token has expired.)" in first.stderr
    assert "Traceback" not in first.stderr
    (tmp_path / "plan.json").write_text("{}")
    second = run("pool")
    assert second.returncode == 0, second.stderr
    assert "40 rows" in second.stdout.replace(",", "")
    assert run("undisturbed").returncode == 0
    assert digests(tmp_path / "pool") == digests(tmp_path / "undisturbed")
    (tmp_path / "plan.json").write_text(json.dumps({"00001.tar": {"error": "memory", "after": 1}}))
    third = run("other")
    assert third.returncode == 2
    assert "out of memory" in third.stderr
    assert "Traceback" not in third.stderr


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can become another user")
def test_a_picture_that_may_not_be_read_is_not_damaged(public: Path) -> None:
    """As another user: a caption, a picture and a tar without the permission to read them."""
    script = """
import os, sys
from thresher.embedding import pipeline
from thresher.data import DataOptions
from thresher.errors import ThresherError
how = pipeline.EmbedSettings(encoder="tests.toy:Toy", workers=0, batch_size=16, data=DataOptions(per_part=5))
for data in sys.argv[3:]:  # loads all modules: the other user cannot
    pipeline.embed(data, data + ".pool", how, overwrite=True)
os.setgroups([]); os.setgid(65534); os.setuid(65534)
try:
    print(pipeline.embed(sys.argv[1], sys.argv[2], how).rows)
except ThresherError as error:
    print(type(error).__name__, error)
"""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(SOURCES), "HOME": str(public)}
    good = [files(public / "good" / "pictures", 2), tars(public / "good" / "tars", 2)]

    def run(data: Path, pool: str) -> str:
        out = public / pool
        out.mkdir(exist_ok=True)
        os.chown(out, 65534, 65534)
        done = subprocess.run(
            [sys.executable, "-c", script, str(data), str(out), *map(str, good)],
            env=env, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert not done.stderr, done.stderr
        return done.stdout.strip()

    folder = files(public / "pictures", 20)
    (folder / "000007.png").chmod(0)
    said = run(folder, "pool")
    assert said.startswith("UnreachedError")
    assert "1 of 4 shards are missing" in said
    assert "000007.png: not reached: access was denied (" in said
    (folder / "000007.png").chmod(0o644)
    assert run(folder, "pool") == "20"
    captions = public / "captions"
    captions.mkdir()
    for i in range(10):
        (captions / f"{i}.png").write_bytes(picture(i))
        (captions / f"{i}.txt").write_text(caption(i))
    (captions / "3.txt").chmod(0)
    assert "3.txt: not reached" in run(captions, "pool2")
    (captions / "3.txt").chmod(0o644)
    (captions / "below").mkdir(mode=0o700)
    assert "below: not reached" in run(captions, "pool2")  # not an empty folder
    (captions / "below").rmdir()
    assert run(captions, "pool2") == "10"
    data = tars(public / "tars", 30)
    (data / "00001.tar").chmod(0)
    assert "1 of 3 shards are missing" in run(data, "pool3")
    (data / "00001.tar").chmod(0o644)
    assert run(data, "pool3") == "30"


def test_doctor_names_what_was_not_reached(tmp_path: Path, plan: Plan, capsys: pytest.CaptureFixture[str]) -> None:
    data = tars(tmp_path / "tars", 40)
    plan({1: {"error": "expired"}, 2: {"error": "reset", "after": 1}})
    assert main(["doctor", f"faulty://{data}", "--json"]) == 2
    report = json.loads(capsys.readouterr().out)
    assert [Path(one["path"]).name for one in report["unreached"]] == ["00001.tar", "00002.tar"]
    assert report["damaged"] == []
    assert not report["exact"]
    assert "access was denied" in report["warnings"][0]
    plan({})
    assert main(["doctor", f"faulty://{data}", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["unreached"] == []
    plan({number: {"error": "expired"} for number in range(4)})
    assert main(["doctor", f"faulty://{data}"]) == 2
    assert "access was denied" in capsys.readouterr().err


# --- damage that is repaired ----------------------------------------------------------------------


def test_damaged_shards_are_embedded_again_when_asked(tmp_path: Path) -> None:
    data, pool = tars(tmp_path / "tars", 40), tmp_path / "pool"
    good = {path.name: path.read_bytes() for path in data.glob("*.tar")}
    (data / "00001.tar").write_bytes(good["00001.tar"][:6_000])
    (data / "00002.tar").write_bytes(b"x" * 2_000)
    found = embed(str(data), pool, TOY)
    assert found.damaged == 2
    assert found.rows < 30
    assert embed(str(data), pool, TOY).new == 0
    (data / "00001.tar").write_bytes(good["00001.tar"])
    with pytest.raises(UsageError, match="00001.tar: has changed since .* pass --retry-damaged to embed it again"):
        embed(str(data), pool, TOY)
    found = embed(str(data), pool, TOY, retry_damaged=True)
    assert (found.rows, found.new, found.damaged) == (30, 10, 1)
    (data / "00002.tar").write_bytes(good["00002.tar"])
    found = embed(str(data), pool, TOY, retry_damaged=True)
    assert (found.rows, found.new, found.damaged) == (40, 10, 0)
    assert not (pool / SET_ASIDE).exists()
    embed(str(data), tmp_path / "undisturbed", TOY)
    for kind in ("img_emb", "text_emb", "metadata"):
        assert digests(pool / kind) == digests(tmp_path / "undisturbed" / kind)
    (data / "00003.tar").write_bytes(good["00003.tar"][:-700])
    os.utime(data / "00003.tar", ns=(1, 1))
    with pytest.raises(UsageError, match="00003.tar: has changed since") as told:
        embed(str(data), pool, TOY, retry_damaged=True)  # it was not damaged
    assert "--retry-damaged" not in str(told.value)


def test_a_missing_picture_is_looked_for_again_when_asked(tmp_path: Path) -> None:
    data, pool = files(tmp_path / "pictures", 12), tmp_path / "pool"
    (data / "000003.png").rename(tmp_path / "away.png")
    (data / "000003.png").symlink_to("nowhere.png")
    how = dataclasses.replace(TOY, data=DataOptions(per_part=4))
    found = embed(str(data), pool, how)
    assert (found.rows, found.skipped) == (11, 1)
    (data / "000003.png").unlink()
    (tmp_path / "away.png").rename(data / "000003.png")
    found = embed(str(data), pool, how, retry_damaged=True)
    assert (found.rows, found.new, found.skipped) == (12, 4, 0)


def test_a_shard_that_is_not_reached_again_stays_as_it_was(tmp_path: Path, plan: Plan) -> None:
    data, pool = tars(tmp_path / "tars", 20), tmp_path / "pool"
    whole = (data / "00001.tar").read_bytes()
    (data / "00001.tar").write_bytes(whole[:6_000])
    embed(f"faulty://{data}", pool, TOY)
    before = digests(pool / "metadata") | digests(pool / "img_emb")
    plan({1: {"error": "reset"}})
    with pytest.raises(UnreachedError):
        embed(f"faulty://{data}", pool, TOY, retry_damaged=True)
    assert digests(pool / "metadata") | digests(pool / "img_emb") == before


# --- data that changes ----------------------------------------------------------------------------


def other(data: Path, kind: str) -> None:
    """Replace data by other data of the same shape and size in bytes as far as possible."""
    if kind == "webdataset":
        for number in range(3):
            there = [(f"{i:06d}", {"png": picture(i + 1), "txt": caption(i + 1).encode()}) for i in range(10)]
            write_tar(data / f"{number:05d}.tar", there)
    elif kind == "parquet":
        data.write_bytes(data.read_bytes())  # the same bytes at another time
    elif kind == "csv":
        data.write_text(data.read_text())
    else:
        for path in sorted(data.glob("*.png")):
            path.write_bytes(path.read_bytes())


class Waiting:
    """Replaces the data when the model gets its first batch."""

    def __init__(self, change: Callable[[], None]) -> None:
        self.change, self.lock, self.done = change, threading.Lock(), False

    def __call__(self) -> None:
        with self.lock:
            if not self.done:
                self.done = True
                self.change()


@pytest.fixture
def at_first_batch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[[], None]], None]]:
    from tests.toy import Toy

    encode = Toy.encode_images

    def install(change: Callable[[], None]) -> None:
        waiting = Waiting(change)

        def encode_images(self: Toy, pixels: Any) -> Any:
            waiting()
            return encode(self, pixels)

        monkeypatch.setattr(Toy, "encode_images", encode_images)

    yield install
    monkeypatch.undo()


MAKE = {
    "webdataset": lambda folder: tars(folder / "tars", 30),
    "parquet": lambda folder: parquet(folder / "rows.parquet", 30),
    "csv": lambda folder: open_clip_csv(folder, 30),
    "folder": lambda folder: files(folder / "pictures", 30),
}


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("batch", [5, 64])
def test_data_replaced_while_it_is_embedded(
    tmp_path: Path, at_first_batch: Callable[[Callable[[], None]], None], kind: str, batch: int
) -> None:
    """No pool of old pictures with new captions: the run stops, and what it wrote is of unchanged data."""
    data, pool = MAKE[kind](tmp_path), tmp_path / "pool"
    how = dataclasses.replace(TOY, batch_size=batch, data=DataOptions(per_part=10))
    at_first_batch(lambda: other(data, kind))
    with pytest.raises(ChangedError, match="changed while it was (embedded|read); run"):
        embed(str(data), pool, how)
    assert "rows" not in json.loads((pool / PLAN).read_text())
    done = shards(pool)
    if kind != "webdataset":
        return
    assert done == []
    result = embed(str(data), pool, how)  # nothing of the old data was written
    assert result.rows == 30
    assert {row["text"] for row in rows_of(pool)} == {caption(i + 1) for i in range(10)}


def test_captions_replaced_while_a_folder_is_embedded(
    tmp_path: Path, at_first_batch: Callable[[Callable[[], None]], None]
) -> None:
    data = files(tmp_path / "pictures", 20)
    table = data / "metadata.jsonl"
    at_first_batch(lambda: table.write_text(table.read_text().replace("number", "n.")) and None)
    with pytest.raises(ChangedError, match="changed while it was embedded"):
        embed(str(data), tmp_path / "pool", TOY)


def test_a_part_embedded_before_the_change_counts_as_changed(tmp_path: Path) -> None:
    """The last check is after the last shard: a tar may change when its shard is written already."""
    data, pool = tars(tmp_path / "tars", 30), tmp_path / "pool"
    from tests.toy import Toy

    class Late:
        calls = 0

    encode = Toy.encode_images

    def encode_images(self: Toy, pixels: Any) -> Any:
        Late.calls += 1
        if Late.calls == 3:  # of the last shard
            os.utime(data / "00000.tar")
        return encode(self, pixels)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Toy, "encode_images", encode_images)
        with pytest.raises(ChangedError, match="00000.tar: changed while it was embedded"):
            embed(str(data), pool, TOY)
    with pytest.raises(UsageError, match="00000.tar: has changed since it was embedded"):
        embed(str(data), pool, TOY)


def test_a_remote_tar_replaced_while_it_is_embedded(
    tmp_path: Path, plan: Plan, at_first_batch: Callable[[Callable[[], None]], None]
) -> None:
    """Its file system remembers the size and time from the beginning, until it is told to forget them."""
    data = tars(tmp_path / "tars", 30)
    new = write_tar(tmp_path / "new.tar", [("new", {"png": picture(77), "txt": b"new"})]).read_bytes()
    at_first_batch(lambda: (data / "00002.tar").write_bytes(new) and None)
    with pytest.raises(ChangedError, match="00002.tar: changed while it was embedded"):
        embed(f"faulty://{data}", tmp_path / "pool", TOY)


def test_pictures_replaced_between_two_calls(tmp_path: Path) -> None:
    data, pool = files(tmp_path / "pictures", 20), tmp_path / "pool"
    embed(str(data), pool, TOY)
    assert embed(str(data), pool, TOY).new == 0
    (data / "000004.png").write_bytes(picture(99))
    with pytest.raises(UsageError, match="has changed since it was embedded"):
        embed(str(data), pool, TOY)


def test_pools_of_folders_made_by_older_versions_still_grow(tmp_path: Path) -> None:
    """They have the hash of names and captions only."""
    data, pool = files(tmp_path / "pictures", 20), tmp_path / "pool"
    embed(str(data), pool, TOY)
    content = json.loads((pool / PLAN).read_text())
    for shard in content["shards"]:
        assert len(shard[4]) == 2
        del shard[4][1]
    (pool / PLAN).write_text(json.dumps(content))
    assert embed(str(data), pool, TOY).new == 0


def test_unwritten_shards_take_the_data_as_it_is_now(tmp_path: Path, plan: Plan) -> None:
    """A tar that was not reached and was replaced meanwhile is embedded as it is."""
    data, pool = tars(tmp_path / "tars", 30), tmp_path / "pool"
    plan({1: {"error": "reset"}})
    with pytest.raises(UnreachedError):
        embed(f"faulty://{data}", pool, TOY)
    write_tar(data / "00001.tar", [("new", {"png": picture(77), "txt": b"new"})])
    plan({})
    result = embed(f"faulty://{data}", pool, TOY)
    assert (result.rows, result.damaged) == (21, 0)
    assert hashlib.sha256(shard_path(pool, "table", 1).read_bytes()).hexdigest()
    assert [row["key"] for row in rows_of(pool)][10] == "new"


def test_no_data_at_all_is_still_an_error(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(b"")
    with pytest.raises(PoolError):
        embed(str(tmp_path / "x.tar"), tmp_path / "pool", TOY)
