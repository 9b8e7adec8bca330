"""Commands that write to object storage and read from it: the bytes of disk, also after kills."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from tests.embedding.raw import parquet, tars
from tests.objects import hashes_at, put, s3_server
from tests.pools import make, write_npy
from tests.resharding.common import hashes, keys_file
from thresher import Density, Selection, api, open_store
from thresher.cli.main import main
from thresher.errors import OutputError, PoolError, UsageError
from thresher.io.places import FsspecPath, place
from thresher.pool import spill
from thresher.runtime import remote_locks
from thresher.runtime.leases import Lease
from thresher.runtime.places import files_below

SLOW_S3 = pytest.param("s3", marks=pytest.mark.slow)


@pytest.fixture
def memory() -> Iterator[str]:
    """An empty folder in memory."""
    yield "memory://bucket/top"
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


@pytest.fixture(params=["memory", SLOW_S3])
def top(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An empty folder in object storage."""
    if request.param == "memory":
        yield request.getfixturevalue("memory")
        return
    with s3_server() as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        fsspec.filesystem("s3").clear_instance_cache()
        yield "s3://bucket/top"
        fsspec.filesystem("s3").clear_instance_cache()


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def pool(tmp_path: Path) -> str:
    return write_npy(tmp_path / "pool", make(300, 16), cuts=[100, 200])


RECIPE = """
[[step]]
method = "clip-score"
keep = "80%"
[[step]]
method = "density"
keep = "50%"
clusters = 8
"""
EMBED = ["--encoder", "tests.toy:Toy", "--workers", "0", "--batch-size", "8", "--quiet"]


def run(*words: str, code: int = 0) -> None:
    assert main([*words]) == code, words


def test_selections_clusters_and_scores(tmp_path: Path, pool: str, top: str) -> None:
    (tmp_path / "r.toml").write_text(RECIPE)
    pool = put(Path(pool), f"{top}/pool")
    for command, out in (
        (["select", "random", pool, "--keep", "30%"], "random"),
        (["run", str(tmp_path / "r.toml"), pool], "run"),
        (["cluster", pool, "--clusters", "6"], "clusters"),
        (["score", "clip-score", pool], "scores.parquet"),
    ):
        run(*command, "-o", str(tmp_path / out), "--quiet")
        for _ in range(2):  # again: already done
            run(*command, "-o", f"{top}/{out}", "--quiet")
        here = {"": hashes(tmp_path)[out]} if "." in out else hashes(tmp_path / out)
        assert hashes_at(f"{top}/{out}") == here, command
    run("select", "random", pool, "--keep", "40%", "-o", f"{top}/random", "--quiet", code=2)
    assert len(Selection.load(f"{top}/random")) == 90
    run("select", "random", pool, "--keep", "40%", "-o", f"{top}/random", "--quiet", "--overwrite")
    assert len(Selection.load(f"{top}/random")) == 120
    fsspec.core.url_to_fs(top)[0].pipe_file(f"{top}/other/notes.txt", b"mine")
    run("select", "random", pool, "--keep", "40%", "-o", f"{top}/other", "--quiet", "--overwrite", code=2)
    run("cluster", pool, "-o", f"{top}/pool/image_0.npy", "--quiet", code=2)


def test_vectors_in_cluster_order_can_be_at_an_address(
    tmp_path: Path, pool: str, top: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The pool and the scratch are remote: the arrays are those of disk, and nothing is left."""
    monkeypatch.setattr(spill, "PART", 100)
    monkeypatch.setattr("thresher.pool.store.BLOCK", 64)
    remote = put(Path(pool), f"{top}/pool")
    for words in (["semdedup", "--eps", "0.6"], ["clipcov", "--keep", "30%"], ["herd", "--keep", "30%"]):
        command, out = ["select", *words, "--clusters", "4"], tmp_path / words[0]
        run(*command, pool, "-o", str(out), "--quiet")
        run(*command, remote, "-o", f"{out}-remote", "--scratch", f"{top}/scratch", "--workers", "2")
        told = capsys.readouterr().err
        assert f"vectors: written once more in cluster order, to {top}/scratch/thresher-order." in told
        found, expected = hashes(Path(f"{out}-remote")), hashes(out)
        del found["selection.json"], expected["selection.json"]  # it has the location
        assert found == expected
    assert files_below(place(f"{top}/scratch")) == []
    given = ["select", "semdedup", "--eps", "0.6", remote, "-o", str(tmp_path / "more"), "--quiet"]
    run(*given, "--scratch", "https://example.org/x", code=2)
    run(*given, "--scratch", "nothing://x/y", code=2)
    (tmp_path / "file").write_text("")
    run(*given, "--scratch", str(tmp_path / "file"), "--cache", str(tmp_path / "new"), code=2)
    said = capsys.readouterr().err.splitlines()
    assert len([line for line in said if line.startswith("Error:")]) == 3, said


def test_exports_and_reports(tmp_path: Path, pool: str, top: str) -> None:
    run("select", "clip-score", pool, "--keep", "30%", "-o", f"{top}/sel", "--quiet")
    run("select", "clip-score", pool, "--keep", "30%", "-o", str(tmp_path / "sel"), "--quiet")
    for words, out in (
        (["export", "--as", "keys"], "keys.txt"),
        (["export", "--as", "parquet"], "table.parquet"),
        (["export", "--as", "datacomp"], "subset.npy"),
        (["report"], "page.html"),
    ):
        for _ in range(2):
            run(words[0], f"{top}/sel", *words[1:], "-o", f"{top}/{out}", "--quiet")
        run(words[0], str(tmp_path / "sel"), *words[1:], "-o", str(tmp_path / out), "--quiet")
        assert hashes_at(f"{top}/{out}") == {"": hashes(tmp_path)[out]}, out
    manifest = json.loads((place(f"{top}/keys.txt.manifest.json")).read_bytes())
    assert manifest["outputs"][0]["path"] == f"{top}/keys.txt"
    run("export", f"{top}/sel", "--as", "keys", "-o", f"{top}/sel/keys.txt", "--quiet", code=2)  # in a selection
    run("compare", f"{top}/sel", str(tmp_path / "sel"))
    run("explain", f"{top}/sel", make(300, 16).keys[0])


def test_inputs_at_addresses(tmp_path: Path, pool: str, top: str) -> None:
    vectors = np.random.default_rng(0).standard_normal((4, 16)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    (tmp_path / "in").mkdir()
    np.save(tmp_path / "in" / "c.npy", vectors)
    (tmp_path / "in" / "names.txt").write_text("one\ntwo\n")
    (tmp_path / "in" / "templates.txt").write_text("a {}\n")
    put(tmp_path / "in", f"{top}/in")
    for words in (["cluster", pool, "--centroids"], ["score", "normsim", pool, "--target"]):
        ending = ".parquet" if words[0] == "score" else ""
        run(*words, f"{top}/in/c.npy", "-o", f"{top}/{words[0]}{ending}", "--quiet")
        run(*words, str(tmp_path / "in" / "c.npy"), "-o", str(tmp_path / f"{words[0]}{ending}"), "--quiet")
    labels = np.load(tmp_path / "cluster" / "labels.npy")
    from thresher.pruning.clusters import read_groups

    np.testing.assert_array_equal(read_groups(f"{top}/cluster").labels_N, labels)
    run("select", "random", pool, "--keep", "50%", "-o", f"{top}/half", "--quiet")
    run("select", "random", pool, "--keep", "20%", "--within", f"{top}/half", "-o", f"{top}/tenth", "--quiet")
    assert len(Selection.load(f"{top}/tenth")) == 30
    kept = api.select(pool, Density(keep="50%", centroids=f"{top}/in/c.npy"), progress=False)
    assert len(kept) == 150
    words = ["embed-classes", "--encoder", "tests.toy:Toy", "--templates"]
    run(*words, f"{top}/in/templates.txt", f"{top}/in/names.txt", "-o", f"{top}/classes.npy")
    run(
        *words,
        str(tmp_path / "in" / "templates.txt"),
        str(tmp_path / "in" / "names.txt"),
        "-o",
        str(tmp_path / "classes.npy"),
    )
    assert hashes_at(f"{top}/classes.npy")[""] == hashes(tmp_path)["classes.npy"]
    for name in ("in", "none"):
        with pytest.raises(PoolError, match=rf"{top}/{name}: has no selection.json; check the address"):
            Selection.load(f"{top}/{name}")


@pytest.mark.parametrize("kind", ["tars", pytest.param("parquet", marks=pytest.mark.slow)])
def test_embed(tmp_path: Path, top: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = str(tars(tmp_path / "tars", 43) if kind == "tars" else parquet(tmp_path / "rows.parquet", 43))
    words = ["embed", data, *EMBED, "--per-shard", "10"]
    run(*words, "-o", str(tmp_path / "whole"))
    run(*words, "-o", f"{top}/pool")
    assert hashes_at(f"{top}/pool") == hashes(tmp_path / "whole")
    run(*words, "-o", f"{top}/pool")
    for number in (2, 1):
        run(*words, "-o", f"{top}/jobs", "--shard", f"{number}/2")
    run(*words, "-o", f"{top}/jobs")
    assert hashes_at(f"{top}/jobs") == hashes(tmp_path / "whole")
    assert open_store(f"{top}/pool").fingerprint() == open_store(str(tmp_path / "whole")).fingerprint()
    if kind == "tars":
        inside = put(Path(data), f"{top}/tars")
        with pytest.raises(OutputError, match="is inside the data folder"):
            api.embed(inside, f"{inside}/pool", encoder="tests.toy:Toy", progress=False)


class Killed(BaseException):
    """Stands for a kill: nothing is written after it."""


@pytest.mark.parametrize("command", ["embed", "reshard"])
def test_killed_at_every_upload(tmp_path: Path, memory: str, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    upload, unlink, left, life = FsspecPath.upload, FsspecPath.unlink, 0, 0
    data = str(tars(tmp_path / "tars", 20))
    if command == "embed":
        words = ["embed", data, *EMBED]
    else:
        sel = keys_file(tmp_path / "k", [f"{i:06d}" for i in range(0, 20, 2)])
        words = ["reshard", data, sel, "--per-shard", "4", "--workers", "1", "--quiet"]
    run(*words, "-o", str(tmp_path / "whole"))

    def put_in_place(path: FsspecPath, scratch: Path) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise Killed
        upload(path, scratch)

    def kept(path: FsspecPath, missing_ok: bool = False) -> None:
        if left >= 0:
            unlink(path, missing_ok)

    # The lease of the killed process stays, and this process counts as another one afterwards.
    monkeypatch.setattr(remote_locks, "_started", lambda process: str(life))
    for kills in itertools.count():
        out, left, life = f"{memory}/{kills}", kills, 2 * kills
        with monkeypatch.context() as patch, suppress(Killed):
            patch.setattr(FsspecPath, "upload", put_in_place)
            patch.setattr(FsspecPath, "unlink", kept)
            main([*words, "-o", out])
        if left >= 0:
            break
        life += 1
        run(*words, "-o", out)
        assert hashes_at(out) == hashes(tmp_path / "whole"), kills
    assert kills > 7


@pytest.mark.parametrize(
    ("more", "form"),
    [
        ([], "tars"),
        pytest.param(["--shuffle", "3"], "tars", marks=pytest.mark.slow),
        pytest.param(["--trainable"], "tars", marks=pytest.mark.slow),
        (["--shuffle", "3"], "parquet"),
        pytest.param(["--as", "webdataset"], "parquet", marks=pytest.mark.slow),
        pytest.param(["--as", "webdataset", "--shuffle", "3"], "parquet", marks=pytest.mark.slow),
    ],
)
def test_reshard(tmp_path: Path, top: str, more: list[str], form: str) -> None:
    data = str(tars(tmp_path / "tars", 43) if form == "tars" else parquet(tmp_path / "rows.parquet", 43))
    (tmp_path / "in").mkdir()
    sel = keys_file(tmp_path / "in" / "k.txt", [f"{i:06d}" for i in range(0, 43, 2)])
    words = ["--per-shard", "5", "--quiet", *more]
    run("reshard", data, sel, *words, "-o", str(tmp_path / "whole"))
    put(tmp_path / "in", f"{top}/in")
    for _ in range(2):
        run("reshard", data, sel, *words, "-o", f"{top}/out")
    assert hashes_at(f"{top}/out") == hashes(tmp_path / "whole")
    run("reshard", data, f"{top}/in/k.txt", *words, "-o", f"{top}/again")
    found = hashes_at(f"{top}/again")
    assert {**found, "reshard.json": ""} == {**hashes(tmp_path / "whole"), "reshard.json": ""}
    jobs = ["reshard", data, sel, *words, "-o", f"{top}/jobs"]
    if "--trainable" not in more and (form == "tars" or "--shuffle" not in more):
        for number in (2, 1):
            run(*jobs, "--shard", f"{number}/2")
        run(*jobs)
        assert hashes_at(f"{top}/jobs") == hashes(tmp_path / "whole")
    else:
        with pytest.raises(UsageError, match="need files that all jobs share"):
            api.reshard(data, sel, f"{top}/jobs", per_shard=5, shard="1/2", progress=False, **_options(more))
        run(*jobs)  # as the message says: no job has begun
        assert hashes_at(f"{top}/jobs") == hashes(tmp_path / "whole")
    run("reshard", data, sel, "--per-shard", "6", "--quiet", *more, "-o", f"{top}/out", code=2)
    run("reshard", data, sel, "--per-shard", "6", "--quiet", *more, "-o", f"{top}/out", "--overwrite")


@pytest.mark.parametrize("form", ["tars", "parquet"])
def test_the_data_are_never_the_result(tmp_path: Path, top: str, form: str) -> None:
    """Shards that an earlier reshard wrote have names that --overwrite removes."""
    data = str(tars(tmp_path / "tars", 20) if form == "tars" else parquet(tmp_path / "rows.parquet", 20))
    sel = keys_file(tmp_path / "k", [f"{i:06d}" for i in range(20)])
    run("reshard", data, sel, "--per-shard", "4", "--quiet", "-o", f"{top}/in/shards")
    before = hashes_at(f"{top}/in")
    some = f"{top}/in/shards/" + ("00000003.tar" if form == "tars" else "train-00003-of-00005.parquet")
    every = f"{top}/in/shards/" + ("*.tar" if form == "tars" else "*.parquet")
    for given in (f"{top}/in/shards", f"{top}/in/shards/", some, every):
        for out in (f"{top}/in/shards", f"{top}/in/shards/", f"{top}/in"):
            with pytest.raises(OutputError, match="(is inside|contains) the data folder"):
                api.reshard(given, sel, out, per_shard=3, overwrite=True, progress=False)
    assert hashes_at(f"{top}/in") == before


def _options(more: list[str]) -> dict[str, Any]:
    form = {"form": "webdataset"} if "--as" in more else {}
    return {"trainable": True} if more == ["--trainable"] else {"shuffle": 3, **form}


# --- leases ---------------------------------------------------------------------------------------


@pytest.mark.slow  # in small on a disk: tests/runtime/test_leases.py
def test_the_lease_of_a_killed_process(top: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lock, short = place(f"{top}/lock"), Lease(0.2, 2.0)
    assert isinstance(lock, FsspecPath)
    release = remote_locks.hold(lock, "x", False, None, short).release
    time.sleep(3)  # it is renewed
    with pytest.raises(OutputError, match="is using it"):
        remote_locks.hold(lock, "x", False, None, short)
    release()
    assert not lock.exists()
    text = {**remote_locks._own(), "token": "1"}
    lock.create(json.dumps({**text, "process": 2**22 + 5, "started": "7"}).encode())  # of this machine, and gone
    remote_locks.hold(lock, "x", False, None, short).release()
    lock.create(json.dumps({**text, "host": "elsewhere"}).encode())
    with pytest.raises(OutputError, match=r"process \d+ on elsewhere is using it"):
        remote_locks.hold(lock, "x", False, None, short)
    begin = time.monotonic()
    remote_locks.hold(lock, "x", True, None, short).release()
    assert 0.5 < time.monotonic() - begin < 20
    lock.create(b"\xff not json")
    with pytest.raises(OutputError, match="another process is using it"):
        remote_locks.hold(lock, "x", False, None, short)


@pytest.mark.parametrize("command", ["select", "cluster", "export", "embed", "embed --shard", "reshard"])
def test_a_holder_that_lost_its_lease_does_not_finish(
    pool: str,
    tmp_path: Path,
    memory: str,
    command: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Another process took over, because this one was suspended: the result is not marked as complete."""
    data, out = str(tars(tmp_path / "tars", 20)), f"{memory}/out"
    run("select", "random", pool, "--keep", "30%", "-o", str(tmp_path / "sel"), "--quiet")
    keys = keys_file(tmp_path / "k", [f"{i:06d}" for i in range(0, 20, 2)])
    words, first, lock, marker = {
        "select": (["select", "random", pool, "--keep", "30%"], "mask.npy", "/.lock", "/selection.json"),
        "cluster": (["cluster", pool, "--clusters", "4"], "labels.npy", "/.lock", "/cluster.json"),
        "export": (["export", str(tmp_path / "sel"), "--as", "keys"], "", "", ""),
        "embed": (["embed", data, *EMBED[:-1]], "img_emb_00000.npy", "/.embed.lock", ""),
        "embed --shard": (
            ["embed", data, *EMBED[:-1], "--shard", "1/1"],
            "img_emb_00000.npy", "/.jobs/00001.lock", "/.jobs/00001.json",
        ),
        "reshard": (["reshard", data, keys, "--workers", "1"], "00000000.tar", "/.reshard/lock", "/reshard.json"),
    }[command]  # fmt: skip
    other, upload = b'{"process": 7, "host": "elsewhere"}', FsspecPath.upload
    fs, where = fsspec.core.url_to_fs(f"{memory}/.out.lock" if command == "export" else f"{out}{lock}")

    def robbed(path: FsspecPath, scratch: Path) -> None:
        upload(path, scratch)
        if path.name == first:
            assert fs.exists(where)
            fs.pipe_file(where, other)

    with monkeypatch.context() as patch:
        patch.setattr(FsspecPath, "upload", robbed)
        if command == "export":
            patch.setattr("thresher.export.write._inputs", lambda *_: fs.pipe_file(where, other))
        run(*words, "-o", out, "--quiet", code=2)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert "another process took it over, because this one did not renew its lease for 300 s" in said[0]
    assert fs.cat_file(where) == other, "the lock of the other process is gone"
    known = hashes_at(out)
    assert marker not in known if command == "export" else marker.lstrip("/") not in known
    if command == "embed":
        assert "rows" not in json.loads((place(out) / "pool.json").read_bytes())
    fs.rm_file(where)
    run(*words, "-o", out, "--quiet")  # the other one is gone
    assert hashes_at(out)


class Moving(MemoryFileSystem):
    """A file system where a file appears while it is written, such as SFTP."""

    protocol = "moving"
    store: dict[str, Any] = {}
    pseudo_dirs = [""]
    dies = False

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.replace("moving://", "memory://", 1)))

    def mv(self, path1: str, path2: str, **kwargs: Any) -> None:
        if type(self).dies:
            raise Killed
        super().mv(path1, path2, **kwargs)


def test_what_a_killed_upload_left_is_removed(pool: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec.register_implementation("moving", Moving, clobber=True)
    monkeypatch.setattr(Moving, "dies", True)
    words = ["select", "random", pool, "--keep", "30%", "-o", "moving://top/sel", "--quiet"]
    with pytest.raises(Killed):
        main(words)
    fs = fsspec.filesystem("moving")
    assert [path for path in fs.find("/top") if path.endswith(".tmp")]
    monkeypatch.setattr(Moving, "dies", False)
    run(*words)
    assert not [path for path in fs.find("/top") if ".tmp" in path]
    assert len(Selection.load("moving://top/sel")) == 90
    fs.pipe_file("/top/keys.txt", b"old")
    fs.pipe_file("/top/.keys.txt.0123abcd.tmp", b"half of it")
    fs.pipe_file("/top/.keys.txt.more.tmp", b"of someone else")
    run("export", "moving://top/sel", "--as", "keys", "-o", "moving://top/keys.txt", "--quiet", "--overwrite")
    assert [path for path in fs.find("/top") if ".tmp" in path] == ["/top/.keys.txt.more.tmp"]


def test_what_is_on_this_machine_only(
    pool: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is written to a folder with the name of an address."""
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    for words in (
        ["select", "random", pool, "--keep", "10%", "-o", "out", "--cache", "memory://c"],
        ["train", "clip", pool, "-o", "memory://run", "--epochs", "1"],
        ["coreset", "memory://run", "-o", "out"],
        ["report", "memory://run", "-o", "page.html"],
        ["lab", "scan-clip", "-o", "memory://lab", "--train", pool, "--eval", "other.parquet"],
        ["prove", pool, "-o", "memory://proof", "--eval", "other.parquet"],
        ["evaluate", "nothing", "--data", pool, "-o", "memory://results.jsonl"],
        ["reference", "--from", pool, "-o", "memory://reference.parquet"],
        ["view", pool, "--out", "memory://selections", "--no-browser"],
        ["advise", pool, "--samples-seen", "9", "--runs", "memory://lab"],
    ):
        run(*words, code=2)
        assert "is an address; here only a folder or file on this machine can be used" in capsys.readouterr().err or (
            words[0] in ("select", "report")
        )
    assert sorted(tmp_path.iterdir()) == before


def test_a_lease_whose_answer_was_lost(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    create, lock = FsspecPath.create, place(f"{memory}/lock")
    assert isinstance(lock, FsspecPath)
    monkeypatch.setattr(FsspecPath, "create", lambda path, content: create(path, content) and False)
    release = remote_locks.hold(lock, "x", False, None).release
    assert lock.exists()
    release()
    assert not lock.exists()


def test_a_claim_whose_answer_was_lost(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the file by which one of several processes removes the lease of one that is gone."""
    create, lock = FsspecPath.create, place(f"{memory}/lock")
    assert isinstance(lock, FsspecPath)
    lock.create(json.dumps({**remote_locks._own(), "process": 2**22 + 5, "started": "7"}).encode())
    monkeypatch.setattr(
        FsspecPath, "create", lambda path, content: create(path, content) and path.name.startswith("lock")
    )
    remote_locks.hold(lock, "x", False, None).release()
    assert lock.parent.entries() == {}
