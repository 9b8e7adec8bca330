"""Vectors in another order: the same rows for every format and engine, each read once, and nothing left behind."""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from tests.objects import put
from tests.pools import WRITERS, make, write_datacomp, write_npy, write_parquet
from thresher import EmbeddingStore, Processes, Run, Selection, Serial, Threads, open_store
from thresher.errors import OutputError, UnreachedError
from thresher.io.places import place
from thresher.pool import spill
from thresher.pool.spill import Spill, rows_of_part
from thresher.runtime.cache import Cache
from thresher.runtime.checksums import CacheWarning
from thresher.runtime.locks import LOCK
from thresher.runtime.places import files_below

N = 1_000


class Counted(MemoryFileSystem):
    """Memory that counts requests for content and their bytes."""

    protocol = "counted"
    reads: list[int] = []  # noqa: RUF012
    store: dict[str, Any] = {}  # noqa: RUF012
    pseudo_dirs = [""]  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return MemoryFileSystem._strip_protocol(path.replace("counted://", "memory://"))

    def cat_file(self, path: str, start: Any = None, end: Any = None, **_: Any) -> bytes:
        data = super().cat_file(path, start=start, end=end)
        self.reads.append(len(data))
        return data


@pytest.fixture
def counted() -> Iterator[type[Counted]]:
    fsspec.register_implementation("counted", Counted, clobber=True)
    Counted.store.clear()
    Counted.pseudo_dirs[:] = [""]
    Counted.reads.clear()
    yield Counted
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


def order_of(n: int, seed: int = 0, share: float = 0.9) -> np.ndarray:
    """Some rows, in random order."""
    return np.random.default_rng(seed).permutation(n)[: int(n * share)]


def check(store: EmbeddingStore, spilled: EmbeddingStore, order: np.ndarray, name: str = "joint") -> None:
    assert len(spilled) == len(order)
    for part in store.parts(name):
        raw = np.concatenate([np.asarray(store.raw(part, block)) for block in store.blocks(part)])
        at = np.arange(len(order))
        assert spilled.raw_at(part, at).tobytes() == np.ascontiguousarray(raw[order]).tobytes()
    some = np.random.default_rng(1).permutation(len(order))[:50]
    expected = open_all(store, name)[order[some]]
    assert spilled.vectors_at(name, some).tobytes() == np.ascontiguousarray(expected).tobytes()


def open_all(store: EmbeddingStore, name: str) -> np.ndarray:
    return np.concatenate([store.vectors(name, block) for block in store.blocks(name)])


QUICK = (("npy", "float16"), ("parquet", "bfloat16"), ("datacomp", "float32"))


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        pytest.param(kind, dtype, marks=() if (kind, dtype) in QUICK else pytest.mark.slow)
        for kind in ("npy", "parquet", "datacomp")
        for dtype in ("float16", "float32", "bfloat16")
    ],
)
def test_the_rows_are_those_of_the_view_in_the_order(tmp_path: Path, kind: str, dtype: str) -> None:
    mark = {"mark": "_bf16" if kind == "npy" else dtype} if dtype == "bfloat16" and kind != "datacomp" else {}
    location = WRITERS[kind](tmp_path / "pool", make(N).stored(dtype), cuts=[300, 301], **mark)
    options = spill.Options(dtype="bfloat16") if dtype == "bfloat16" else None
    store = replace(open_store(location, options), block=64)
    for view in (store, store.where(np.random.default_rng(0).random(N) < 0.7)):
        order = order_of(len(view))
        for part in (64, 192, 2 * N):  # many files, some, one
            folder = tmp_path / f"spill-{len(view)}-{part}"
            with Spill(view, "joint", order, folder, Serial(), part=part).written() as spilled:
                check(view, spilled, order)
                assert len(spilled.layout.vectors["image"]) == (1 if part > N else -(-len(order) // part))
                assert not list(folder.glob("*run*"))
            assert not folder.exists()


@pytest.mark.parametrize("engine", [Serial(), Threads(3), Processes(2)], ids=lambda engine: engine.name)
@pytest.mark.parametrize("kind", ["parquet", "datacomp"])
def test_every_engine_writes_the_same_files(tmp_path: Path, kind: str, engine: Any) -> None:
    store = replace(open_store(WRITERS[kind](tmp_path / "pool", make(N), cuts=[400])), block=64)
    order = order_of(N)
    with Spill(store, "image", order, tmp_path / "spill", engine, part=128).written() as spilled:
        check(store, spilled, order, "image")


def test_remote_vectors_are_read_once_in_few_requests(tmp_path: Path, counted: type[Counted]) -> None:
    pool = make(N, dim=32)
    write_npy(tmp_path / "pool", pool, cuts=[500])
    store = replace(open_store(put(tmp_path / "pool", "counted://bucket/pool")), block=64)
    order, size = order_of(N, share=1), N * 32 * 2
    counted.reads.clear()
    with Spill(store, "image", order, tmp_path / "spill", Serial(), part=128).written() as spilled:
        assert sum(counted.reads) == size
        assert len(counted.reads) == 9  # eight parts, one of which is in two files
        check(store, spilled, order, "image")
    counted.reads.clear()
    remote = place("counted://bucket/spill")
    with Spill(store, "image", order, remote, Serial(), part=128).written() as spilled:
        assert sum(counted.reads) == 2 * size  # the pool once, and the runs once
        counted.reads.clear()
        spilled.vectors_at("image", np.arange(100, 228))
        assert counted.reads == [28 * 64, 100 * 64]  # a range of the order is one request for each file
    assert files_below(remote) == []


@pytest.mark.parametrize("scratch", ["local", "memory"])
def test_a_killed_spill_goes_on_with_the_first_missing_file(
    tmp_path: Path, scratch: str, counted: type[Counted], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = replace(open_store(write_parquet(tmp_path / "pool", make(N))), block=64)
    order, real = order_of(N), spill._save
    files = 2 * (4 + 4)  # runs and files, of image and text
    for kill in (0, 2, 4, 7, 8, 14):
        folder = tmp_path / f"spill-{kill}" if scratch == "local" else place(f"memory://top/spill-{kill}")
        made: list[str] = []

        def save(part: Any, name: str, *more: Any, made: list[str] = made, kill: int = kill) -> None:
            if len(made) == kill:
                raise KeyboardInterrupt
            made.append(name)
            real(part, name, *more)

        job = Spill(store, "joint", order, folder, Serial(), part=256)
        monkeypatch.setattr(spill, "_save", save)
        with pytest.raises(KeyboardInterrupt), job.written():
            pass
        assert len(made) == kill

        def save_all(part: Any, name: str, *more: Any, made: list[str] = made) -> None:
            made.append(name)
            real(part, name, *more)

        monkeypatch.setattr(spill, "_save", save_all)
        with job.written() as spilled:
            check(store, spilled, order)
        assert len(made) == len(set(made)) == files
        assert not files_below(folder) if scratch == "memory" else not folder.exists()


@pytest.mark.parametrize("scratch", ["local", "memory"])
def test_the_files_go_after_an_error_and_stay_after_an_interrupt(
    tmp_path: Path, scratch: str, counted: type[Counted]
) -> None:
    store = open_store(write_parquet(tmp_path / "pool", make(100)))
    folder = tmp_path / "spill" if scratch == "local" else place("memory://top/spill")
    job = Spill(store, "image", order_of(100), folder, Serial())
    with pytest.raises(ValueError, match="later"), job.written():
        raise ValueError("later")
    assert not folder.exists()
    with pytest.raises(KeyboardInterrupt), job.written():
        raise KeyboardInterrupt
    assert [name for name in files_below(folder) if name != LOCK] == ["image-00000.npy"]
    job.discard()
    assert not folder.exists()


@pytest.mark.parametrize("scratch", ["local", "memory"])
def test_a_second_run_waits_for_the_first(tmp_path: Path, scratch: str, counted: type[Counted]) -> None:
    store = open_store(write_parquet(tmp_path / "pool", make(100)))
    folder = tmp_path / "spill" if scratch == "local" else place("memory://top/spill")
    order, done = order_of(100), []

    def second() -> None:
        with Spill(store, "image", order, folder, Serial()).written() as spilled:
            check(store, spilled, order, "image")
            done.append(True)

    with Spill(store, "image", order, folder, Serial()).written() as spilled:
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(0.3)
        assert not done
        Spill(store, "image", order, folder, Serial()).discard()  # in use
        check(store, spilled, order, "image")
    thread.join(20)
    assert done == [True]
    assert not folder.exists()


def test_files_that_another_process_took_over_stay(tmp_path: Path, counted: type[Counted]) -> None:
    """After this process was suspended for longer than its lease, another one reads the files."""
    store = open_store(write_parquet(tmp_path / "pool", make(100)))
    folder = place("memory://top/spill")
    with Spill(store, "image", order_of(100), folder, Serial()).written():
        (folder / LOCK).unlink()
        (folder / LOCK).create(b"another process")
    assert files_below(folder) == ["image-00000.npy", LOCK]


def test_remote_files_go_before_their_lock(tmp_path: Path, counted: type[Counted]) -> None:
    """A process that waits for the lock would take the files that are still there for its own."""
    store = open_store(write_parquet(tmp_path / "pool", make(100)))
    folder, gone = place("counted://top/spill"), []

    class Watched(Counted):
        def rm_file(self, path: str) -> None:
            gone.append(path.rpartition("/")[2])
            super().rm_file(path)

    fsspec.register_implementation("counted", Watched, clobber=True)
    with Spill(store, "joint", order_of(100), folder, Serial()).written():
        pass
    assert [name for name in gone if name[0] != "."] == ["image-00000.npy", "text-00000.npy", LOCK]


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(write_parquet(tmp_path / "pool", make(100)))
    job = Spill(store, "image", order_of(100), tmp_path / "spill", Serial())

    def full(_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(spill, "sync", full)
        with (
            pytest.raises(OutputError, match=r"image-00000.npy: cannot be written \(No space left on device\); free"),
            job.written(),
        ):
            pass
    assert not (tmp_path / "spill").exists()
    monkeypatch.setattr(spill.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10}))
    with (
        pytest.raises(OutputError, match=r"take .*, 10 bytes are free\); free some space, or .*--scratch"),
        job.written(),
    ):
        pass
    assert not (tmp_path / "spill").exists()


@pytest.mark.parametrize("moment", ["runs", "files"])
def test_damaged_files_are_written_again(tmp_path: Path, moment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a kill, files that are shorter, or have another bit, are reported and made again."""
    store = replace(open_store(write_parquet(tmp_path / "pool", make(N))), block=64)
    order, real = order_of(N), spill._save
    job = Spill(store, "image", order, tmp_path / "spill", Serial(), part=128)

    def save(part: Any, name: str, *more: Any) -> None:
        if moment == "runs" and "run" not in name:
            raise KeyboardInterrupt
        real(part, name, *more)

    monkeypatch.setattr(spill, "_save", save)

    def killed() -> None:
        with job.written():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        killed()
    monkeypatch.undo()
    one, other = sorted((tmp_path / "spill").glob("*.npy"))[2:4]
    with open(one, "r+b") as file:
        file.truncate(200)
    content = bytearray(other.read_bytes())
    content[-50] ^= 1
    other.write_bytes(content)
    with pytest.warns(CacheWarning, match="is damaged") as told, job.written() as spilled:
        check(store, spilled, order, "image")
    assert len(told) == 2


def test_a_file_that_a_killed_process_was_writing_goes_without_a_word(tmp_path: Path, recwarn: Any) -> None:
    store = open_store(write_parquet(tmp_path / "pool", make(100)))
    order, left = order_of(100), tmp_path / "spill" / ".image-00000.npy.0123abcd.tmp.npy"
    left.parent.mkdir()
    left.write_bytes(b"the first half")
    with Spill(store, "image", order, left.parent, Serial()).written() as spilled:
        assert not left.exists()
        check(store, spilled, order, "image")
    assert not recwarn.list


def test_the_size_of_a_part() -> None:
    """At least 64 MiB, and parts of files that are read at once of at least 256 KiB."""
    for rows in (10**5, 10**8, 10**10):
        part = rows_of_part(rows, 1_024, 16_384)
        assert part % 16_384 == 0
        files = -(-rows // part)
        assert files == 1 or part * 1_024 >= 48 * 2**20
        assert files < 100 or part / files * 1_024 > 0.8 * 256 * 2**10
    assert rows_of_part(10**6, 2**30, 16) == 16


def run_on(store: EmbeddingStore, cache: Cache, engine: Any = None) -> Run:
    return Run(store, Selection.everything("", "", {}, store.total), engine or Serial(), cache)


def test_only_what_is_slow_to_read_is_written_again(tmp_path: Path, counted: type[Counted]) -> None:
    """Local arrays are read where they are, except on several nodes; copies in the cache are used."""
    order = order_of(100)

    def spills(store: EmbeddingStore, cache: str, engine: Any = None, order: np.ndarray = order) -> bool:
        with run_on(store, Cache.at(tmp_path / cache), engine).in_order("image", order) as ordered:
            vectors = ordered()
            assert ordered() is vectors
            found = vectors.store.vectors_at("image", vectors.rows(10, 30))
            assert found.tobytes() == open_all(store, "image")[order[10:30]].tobytes()
            assert vectors.store.vectors_at("image", vectors.at(np.arange(30, 10, -1))).shape == (20, 8)
        assert not list((tmp_path / cache).rglob("order.*"))
        return vectors.order_M is None

    npy = open_store(write_npy(tmp_path / "npy", make(100)))
    parquet = open_store(write_parquet(tmp_path / "parquet", make(100)))
    remote = open_store(put(tmp_path / "npy", "memory://top/pool"))
    compressed = open_store(write_datacomp(tmp_path / "datacomp", make(100)))
    assert not spills(npy, "a")
    assert spills(parquet, "a")
    assert spills(remote, "a")
    assert spills(compressed, "a")
    assert not spills(remote, "a", order=np.arange(2, 90))  # in the order of the file
    assert spills(compressed, "a", order=np.arange(2, 90))

    class Cluster(Serial):
        nodes = 2

    assert spills(npy, "a", Cluster())
    run_on(parquet, Cache.at(tmp_path / "a")).local("image")
    assert not spills(parquet, "a")
    assert spills(parquet, "a", Cluster())


def test_what_a_killed_command_left_goes_when_it_is_not_needed(tmp_path: Path) -> None:
    store = open_store(write_parquet(tmp_path / "pool", make(100)))
    run, order = run_on(store, Cache.at(tmp_path / "cache")), order_of(100)

    def killed() -> None:
        with run.in_order("image", order) as ordered:
            ordered()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        killed()
    assert list((tmp_path / "cache").rglob("image-*.npy"))
    with run.in_order("image", order):
        pass
    assert not list((tmp_path / "cache").rglob("*.partial*"))


def test_a_folder_that_the_nodes_do_not_see_is_said_before_anything_is_written(tmp_path: Path) -> None:
    store = open_store(write_parquet(tmp_path / "pool", make(100)))

    class Cluster(Serial):
        nodes = 2

        def check_files(self, paths: Any) -> None:
            (path,) = paths
            raise UnreachedError(f"{path}: cannot be read on node 10.0.0.7 (No such file or directory)")

    job = Spill(store, "image", order_of(100), tmp_path / "spill", Cluster())
    with pytest.raises(UnreachedError, match=r"node 10.0.0.7 .*; choose a folder that all nodes share with --scratch$"):
        with job.written():
            pass
    assert not (tmp_path / "spill").exists()
