"""A cache that runs, users and hosts share: nothing in use is lost, and what is not ours is read and left alone."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.runtime.common import as_nobody, begin, end_of, killed_at, needs_root, no_locks, run, wait_for
from thresher import Cache, OutputError, build, open_store, run_steps
from thresher.runtime.checksums import CacheWarning, append_checksum
from thresher.runtime.config import cache_folder
from thresher.runtime.engines.serial import Serial

pytest.importorskip("fcntl")

KEY = {"what": "numbers"}
DTYPES = {"a": "float32", "b": "int64"}


def fill(start: int) -> Iterator[tuple[Any, ...]]:
    for lo in range(start, 100, 10):
        yield np.arange(lo, lo + 10, dtype=np.float32), np.arange(lo, lo + 10)


def numbers(cache: Cache) -> dict[str, Any]:
    return cache.columns("numbers", KEY, DTYPES, 100, fill)


def right(found: dict[str, Any]) -> bool:
    return found["a"].tolist() == found["b"].tolist() == list(range(100))


@pytest.fixture
def open_path(tmp_path: Path) -> Iterator[Path]:
    """A folder that every user can reach."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))  # noqa: S108
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == str(tmp_path / "thresher")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    if sys.platform == "linux":
        assert cache_folder() == str(tmp_path / ".cache" / "thresher")
    assert Cache.at().folder == Path(cache_folder())


@pytest.mark.parametrize(
    "array",
    [np.arange(6).reshape(2, 3), np.asfortranarray(np.eye(3)), np.zeros((0, 4), np.float32), np.array(3.5)],
    ids=["rows", "columns", "empty", "scalar"],
)
def test_arrays_are_mapped_as_they_were(tmp_path: Path, array: np.ndarray) -> None:
    found = Cache(tmp_path).save(tmp_path / "a.npy", array)
    assert isinstance(found, np.memmap)
    np.testing.assert_array_equal(found, array)
    assert (found.dtype, found.shape) == (array.dtype, array.shape)


def test_objects_are_never_loaded(tmp_path: Path) -> None:
    with open(tmp_path / "a.npy", "w+b") as file:
        np.save(file, np.array([{}], object), allow_pickle=True)
        append_checksum(file)
    with pytest.warns(CacheWarning, match="contains Python objects"):
        assert Cache(tmp_path).load(tmp_path / "a.npy") is None


def test_what_a_run_uses_is_not_trimmed_nor_cleared(tmp_path: Path) -> None:
    cache = Cache(tmp_path, limit=1)
    view = np.asarray(cache.array("x", {}, lambda: np.arange(1000)))[10:20]
    path = cache.path("x", {})
    assert run(lambda: cache.trim() == 0 or os._exit(3)) == 0
    assert cache.clear() == 0
    assert path.exists()
    del view
    gc.collect()
    assert run(lambda: cache.trim() > 0 or os._exit(3)) == 0
    assert not path.exists()


def test_caches_trim_while_others_read_and_make(tmp_path: Path) -> None:
    cache = Cache(tmp_path, limit=1, flush_seconds=-1)

    def trim() -> None:
        while not (tmp_path / "end").exists():
            cache.trim()

    def use() -> None:
        for turn in range(80):
            number = turn % 3
            found = cache.array("x", {"i": number}, lambda number=number: np.full(50, number))  # type: ignore[misc]
            assert found.tolist() == [number] * 50
            del found
            held = numbers(cache)
            assert right(held)
            for column in DTYPES:
                assert cache.path(f"numbers.{column}", KEY).exists()

    trimming, using = [begin(trim) for _ in range(2)], [begin(use) for _ in range(2)]
    ends = [end_of(one) for one in using]
    (tmp_path / "end").touch()
    assert ends + [end_of(one) for one in trimming] == [0] * 4


@pytest.mark.slow
def test_columns_killed_at_any_moment_go_on_to_the_same(tmp_path: Path) -> None:

    def thirds(start: int) -> Iterator[tuple[Any, ...]]:
        for lo in range(start, 100, 40):
            yield np.arange(lo, min(lo + 40, 100), dtype=np.float32), np.arange(lo, min(lo + 40, 100))

    point = 0
    while True:
        cache = Cache(tmp_path / f"{point}", flush_seconds=-1)
        if not killed_at(point, lambda cache=cache: cache.columns("numbers", KEY, DTYPES, 100, thirds)):  # type: ignore[misc]
            break
        begun: list[int] = []

        def noted(start: int, begun: list[int] = begun) -> Iterator[tuple[Any, ...]]:
            begun.append(start)
            return thirds(start)

        assert right(cache.columns("numbers", KEY, DTYPES, 100, noted))
        assert all(start in (0, 40, 80, 100) for start in begun)
        cache.clear()
        assert [path for path in cache.folder.rglob("*") if path.is_file()] == []
        point += 1
    assert point > 30
    # One after the other, each a little further: what one has saved the next does not do again.
    cache = Cache(tmp_path / "all", flush_seconds=-1)
    for point in range(20, 60, 6):
        killed_at(point, lambda: numbers(cache))
    assert right(numbers(cache))


def test_two_runs_that_need_the_same_fill_it_once(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    filled = tmp_path / "filled"

    def slow(start: int) -> Iterator[tuple[Any, ...]]:
        with open(filled, "a") as file:
            file.write("x")
        for batch in fill(start):
            time.sleep(0.02)
            yield batch

    def use() -> None:
        assert right(cache.columns("numbers", KEY, DTYPES, 100, slow))

    assert [end_of(one) for one in [begin(use) for _ in range(4)]] == [0] * 4
    assert filled.read_text() == "x"


def test_one_that_waits_says_so_and_goes_on_when_the_other_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("thresher.runtime.locks._FIRST_WORD", 0.1)
    cache, said = Cache(tmp_path), list[str]()

    def endless(start: int) -> Iterator[tuple[Any, ...]]:
        (tmp_path / "begun").touch()
        time.sleep(60)
        yield from fill(start)

    other = begin(lambda: cache.columns("numbers", KEY, DTYPES, 100, endless))
    wait_for(tmp_path / "begun")

    def say(line: str) -> None:
        said.append(line)
        os.kill(other, signal.SIGKILL)
        end_of(other)

    assert right(cache.columns("numbers", KEY, DTYPES, 100, fill, say=say))
    assert len(said) == 1
    assert said[0].startswith(f"waiting for numbers in the cache {tmp_path}: process {other} on ")


def test_without_locks_runs_do_not_disturb_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fcntl.flock", no_locks)
    cache = Cache(tmp_path, limit=1, flush_seconds=-1)

    def slow(start: int) -> Iterator[tuple[Any, ...]]:
        for batch in fill(start):
            time.sleep(0.01)
            yield batch

    def use() -> None:
        for _ in range(3):
            assert right(cache.columns("numbers", KEY, DTYPES, 100, slow))
            cache.trim()

    assert [end_of(one) for one in [begin(use) for _ in range(3)]] == [0] * 3
    copy = cache.path("local.image.vectors", {})
    cache.save(copy, np.zeros(10))
    cache.trim()
    assert copy.exists(), "what might be read by its path stays for a day"
    os.utime(copy, (1, 1))
    cache.trim()
    assert not copy.exists()


def pool(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    folder.mkdir()
    for name in ("image", "text"):
        np.save(folder / f"{name}.npy", rng.standard_normal((200, 8)).astype(np.float32))
    return folder


def joined_pool(folder: Path) -> tuple[Path, Path]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = np.random.default_rng(0)
    folder.mkdir()
    keys = [f"k{i}" for i in range(200)]
    vectors = {
        f"{name}_embedding": list(rng.standard_normal((200, 8)).astype(np.float32)) for name in ("image", "text")
    }
    pq.write_table(pa.table({"key": keys, **vectors}), folder / "pool.parquet")
    pq.write_table(pa.table({"key": keys, "width": list(range(200))}), folder / "more.parquet")
    return folder / "pool.parquet", folder / "more.parquet"


def test_a_joined_table_outlives_a_full_cache(tmp_path: Path) -> None:
    from thresher.pool.layout import Options

    here, more = joined_pool(tmp_path / "pool")
    cache = Cache(tmp_path / "cache", limit=1)
    for _ in range(2):
        store = open_store(str(here), Options(metadata=str(more)), scratch=str(cache.folder))
        (table,) = (cache.folder / "joined").glob("*.parquet")
        os.utime(table, (1, 1))  # the oldest there is
        view = store.where(np.arange(200) < 100)
        del store
        gc.collect()
        step = build("filter", {"where": "width < 50"})
        view = open_store(str(here), Options(metadata=str(more)), scratch=str(cache.folder))
        assert time.time() - table.stat().st_mtime < 60, "opening it does not count as using it"
        assert len(run_steps(view, [step], engine=Serial(), cache=cache)) == 50
        assert run(lambda: cache.trim() and None) == 0
        assert table.exists()
    del view
    gc.collect()
    cache.trim()
    assert not table.exists()


def test_a_local_copy_is_kept_as_long_as_a_store_reads_it(tmp_path: Path) -> None:
    from thresher.pruning.run import Run
    from thresher.selection import Selection

    here, _ = joined_pool(tmp_path / "pool")
    cache = Cache(tmp_path / "cache", limit=1)
    store = open_store(str(here))
    everything = Selection.everything(store.fingerprint(), str(here), {}, store.total)
    local = Run(store, everything, Serial(), cache).local("image").store
    (copy,) = (cache.folder / "arrays").glob("local.image*")
    os.utime(copy, (1, 1))
    cache.trim()
    assert len(local.vectors_at("image", np.arange(5))) == 5
    part = local.where(np.arange(200) < 100)
    del local
    gc.collect()
    cache.trim()
    assert copy.exists()
    del part
    gc.collect()
    cache.trim()
    assert not copy.exists()


@needs_root
def test_the_cache_of_another_user_is_read_and_left_alone(open_path: Path) -> None:
    cache = Cache(open_path / "cache", limit=1)
    cache.array("x", {}, lambda: np.arange(5))
    assert right(numbers(cache))
    cache.path("bad", {}).write_bytes(b"damaged")

    def other() -> None:
        assert cache.array("x", {}, lambda: np.zeros(5)).tolist() == list(range(5))
        assert right(numbers(cache))
        with pytest.warns(CacheWarning, match="its checksum is wrong"):
            assert cache.load(cache.path("bad", {})) is None
        assert cache.trim() == 0
        assert cache.clear() == 0
        with pytest.raises(OutputError, match=r"cannot be written .* choose another cache folder with --cache"):
            cache.array("y", {}, lambda: np.arange(5))
        with pytest.raises(OutputError, match=r"cannot be written .* choose another cache folder with --cache"):
            cache.columns("more", KEY, DTYPES, 100, fill)

    assert run(as_nobody(other)) == 0
    assert cache.size()


@needs_root
def test_a_cache_of_several_users(open_path: Path) -> None:
    """What another user left half filled is in nobody's way."""
    cache = Cache(open_path / "cache")
    (cache.folder / "arrays").mkdir(parents=True)
    (cache.folder / "arrays").chmod(0o777)

    def killed(start: int) -> Iterator[tuple[Any, ...]]:
        yield next(fill(start))
        os._exit(9)

    assert run(lambda: cache.columns("numbers", KEY, DTYPES, 100, killed)) == 9
    assert list(cache.folder.rglob("*.partial"))
    assert run(as_nobody(lambda: right(numbers(cache)) or os._exit(3))) == 0
    assert right(numbers(cache))


@needs_root
def test_a_folder_that_cannot_be_written_matters_only_when_something_is_written(open_path: Path) -> None:
    here = pool(open_path / "pool")

    Cache(open_path / "cache").array("x", {}, lambda: np.arange(5))

    def other() -> None:
        cache, store = Cache(open_path / "cache"), open_store(str(here))
        assert cache.array("x", {}, lambda: np.zeros(5)).tolist() == list(range(5))
        assert len(run_steps(store, [build("random", {"keep": "50%"})], engine=Serial(), cache=cache)) == 100
        with pytest.raises(OutputError, match=r"cannot be written .*; choose another cache folder with --cache"):
            run_steps(store, [build("clip-score", {"keep": "50%"})], engine=Serial(), cache=cache)

    assert run(as_nobody(other)) == 0
