"""Remote places: what a path is, atomic uploads, copies of small results, requests."""

from __future__ import annotations

import io
import pickle
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from thresher import open_store
from thresher.errors import MissingExtraError, OutputError, PoolError, UnreachedError, UsageError
from thresher.io.places import FsspecPath, local_copy, located, place
from thresher.runtime.files import UNFINISHED, check_writable, refuse_foreign_files, writing, writing_folder
from thresher.runtime.locks import holding
from thresher.runtime.places import RemotePath, as_path, files_below, remove_tree, sizes_in
from thresher.runtime.results import record_in, result_file, result_folder


@pytest.fixture(autouse=True)
def _empty() -> Iterator[None]:
    yield
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


def test_what_a_place_is(tmp_path: Path) -> None:
    assert place(str(tmp_path)) == place(tmp_path) == place(f"file://{tmp_path}") == tmp_path
    remote = place("memory://top/out/")
    assert isinstance(remote, FsspecPath)
    assert str(remote) == "memory://top/out"
    assert str(remote / "a/b.npy") == "memory://top/out/a/b.npy"
    assert ((remote / "b.npy").suffix, (remote / "b.npy").name, str((remote / "b").parent)) == (
        ".npy",
        "b.npy",
        str(remote),
    )
    assert str((remote / "b.npy").with_suffix(".txt")) == "memory://top/out/b.txt"
    assert pickle.loads(pickle.dumps(remote)) == remote
    assert place(remote) is remote
    assert located("memory://top/x.npy") == ("memory", "/top/x.npy")
    assert located("x.npy") == ("file", "x.npy")
    with pytest.raises(UsageError, match="names no file or folder"):
        place("s3://")
    with pytest.raises(UsageError, match="cannot be written to; give a folder"):
        place("https://example.org/out")
    with pytest.raises(UsageError, match="is an address; here only"):
        as_path("memory://out")


def test_a_missing_extra_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any, **__: Any) -> Any:
        raise ImportError("install it")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    for address, extra in (("s3://b/x", "s3"), ("gs://b/x", "gcs"), ("gcs://b/x", "gcs"), ("hf://datasets/a/b", "hf")):
        with pytest.raises(MissingExtraError, match=rf"type: pip install '\.\[{extra}\]'"):
            place(address)
        with pytest.raises(MissingExtraError, match=rf"pip install '\.\[{extra}\]'"):
            open_store(address)


def test_files_and_folders_like_local_ones(tmp_path: Path) -> None:
    for top in (tmp_path / "out", place("memory://top/out")):
        assert not top.exists()
        for name, content in (("a.json", '{"x": 1}'), ("deep/b.npy", "bb"), ("deep/c.txt", "ccc")):
            with writing(top / name) as scratch:
                Path(scratch).write_text(content)
                assert not (top / name).exists()
        assert files_below(top) == ["a.json", "deep/b.npy", "deep/c.txt"]
        assert sizes_in(top / "deep") == {"b.npy": 2, "c.txt": 3}
        assert sorted(path.name for path in top.iterdir()) == ["a.json", "deep"]
        assert sorted(path.name for path in top.glob("*/*.npy")) == ["b.npy"]
        assert ((top / "deep").is_dir(), (top / "deep").is_file(), (top / "a.json").is_file()) == (True, False, True)
        assert record_in(top / "a.json") == {"x": 1}
        assert record_in(top / "none.json") == {}
        assert (top / "deep" / "c.txt").read_text() == "ccc"
        assert (top / "a.json").stat().st_size == 8
        with pytest.raises(FileNotFoundError):
            (top / "none").stat()
        (top / "none").unlink(missing_ok=True)
        (top / "a.json").unlink()
        assert not (top / "a.json").exists()
        remove_tree(top)
        assert not files_below(top)


def test_a_file_that_failed_is_not_there() -> None:
    target = place("memory://top/x.txt")
    with suppress(RuntimeError), writing(target) as scratch:
        Path(scratch).write_text("half")
        raise RuntimeError
    assert not target.exists()
    assert not Path(scratch).exists()


def test_results_are_compared_and_replaced_only_if_asked() -> None:
    target, said = place("memory://top/x.txt"), list[str]()

    def made(content: str, overwrite: bool = False) -> None:
        with result_file(target, overwrite=overwrite, say=said.append) as scratch:
            Path(scratch).write_text(content)

    made("one")
    made("one")
    assert said == ["memory://top/x.txt: already done; nothing was changed"]
    with pytest.raises(OutputError, match="exists already; choose another name or pass --overwrite"):
        made("two")
    made("two", overwrite=True)
    assert target.read_text() == "two"


def test_an_interrupted_upload_is_no_result_and_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    target = place("memory://top/out")
    assert isinstance(target, FsspecPath)

    def save(content: str) -> None:
        with result_folder(target, marker="mark.json", overwrite=True) as folder:
            for name in ("mark.json", "a", "sub/b"):
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).write_text(content)

    save("old")
    (target / "sub").exists()
    upload, left = FsspecPath.upload, 1

    def fails(path: FsspecPath, scratch: Path) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        upload(path, scratch)

    with monkeypatch.context() as patch:
        patch.setattr(FsspecPath, "upload", fails)
        with pytest.raises(KeyboardInterrupt):
            save("new")
    assert not (target / "mark.json").exists()
    assert (target / UNFINISHED).exists()
    refuse_foreign_files(target, ("mark.json", "a", "sub"))
    with result_folder(target, marker="mark.json", overwrite=False) as folder:  # the same without asking
        (folder / "mark.json").write_text("new")
        (folder / "a").write_text("new")
    assert files_below(target) == ["a", "mark.json"]
    assert (target / "mark.json").read_text() == "new"


def test_the_marker_comes_last(monkeypatch: pytest.MonkeyPatch) -> None:
    order, upload = [], FsspecPath.upload
    monkeypatch.setattr(FsspecPath, "upload", lambda path, scratch: (order.append(path.name), upload(path, scratch))[1])
    with writing_folder(place("memory://top/out"), marker="a.json") as folder:
        for name in ("a.json", "b", "c"):
            (folder / name).write_text(name)
    assert order == ["b", "c", "a.json"]


class Failing(MemoryFileSystem):
    """Memory whose first requests to write fail as a network does, or for ever."""

    protocol = "failing"
    left = 0
    denied = False

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(MemoryFileSystem._strip_protocol(path.replace("failing://", "memory://")))

    def put_file(self, *args: Any, **how: Any) -> None:
        self._fail()
        super().put_file(*args, **how)

    def pipe_file(self, *args: Any, **how: Any) -> None:
        self._fail()
        super().pipe_file(*args, **how)

    def _fail(self) -> None:
        if Failing.denied:
            raise PermissionError("Access Denied")
        Failing.left -= 1
        if Failing.left >= 0:
            raise ConnectionError("reset by peer")


def test_writes_are_tried_again_but_not_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec.register_implementation("failing", Failing, clobber=True)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    target = place("failing://top/x")
    Failing.left = 3
    with writing(target) as scratch:
        Path(scratch).write_text("x")
    assert target.read_text() == "x"
    monkeypatch.setenv("THRESHER_NETWORK_TRIES", "2")
    Failing.left = 10
    with pytest.raises(UnreachedError, match="failing://top/y: network or system error"):
        with writing(place("failing://top/y")) as scratch:
            Path(scratch).write_text("y")
    Failing.left, Failing.denied = 0, True
    with pytest.raises(UnreachedError, match="failing://top.*access was denied"):
        check_writable(place("failing://top/z"))
    Failing.denied = False
    check_writable(place("failing://top/z"))
    assert [path.name for path in place("failing://top").iterdir()] == ["x"]


def test_copies_of_small_results(tmp_path: Path) -> None:
    with local_copy(tmp_path) as same:
        assert same == tmp_path
    for name in ("a.json", "deep/b.json"):
        with writing(place("memory://top/sel") / name) as scratch:
            Path(scratch).write_text(name)
    with local_copy("memory://top/sel") as copy:
        assert files_below(copy) == ["a.json", "deep/b.json"]
        assert (copy / "deep" / "b.json").read_text() == "deep/b.json"
    with local_copy("memory://top/sel/a.json") as copy:
        assert copy.read_text() == "a.json"
    with pytest.raises(PoolError, match="memory://top/none: nothing is there"), local_copy("memory://top/none"):
        pass
    with pytest.raises(PoolError, match="memory://top/sel: has no x.json"), local_copy("memory://top/sel", "x.json"):
        pass
    with pytest.raises(PoolError, match=r"^memory://top/sel/a.json: bad$"), local_copy("memory://top/sel") as copy:
        raise PoolError(f"{copy}/a.json: bad")


def test_two_at_once_are_refused() -> None:
    lock = place("memory://top/lock")
    with holding(lock, "the pool x", wait=False):
        with pytest.raises(OutputError, match=r"the pool x: process \d+ on .* is using it"):
            with holding(lock, "the pool x", wait=False):
                pass
    assert not lock.exists()
    with holding(lock, "the pool x", wait=False):
        assert lock.exists()


def test_one_after_the_other_if_they_wait() -> None:
    inside, most = 0, 0

    def work() -> None:
        nonlocal inside, most
        with holding(place("memory://top/lock"), "x"):
            inside += 1
            most = max(most, inside)
            time.sleep(0.02)
            inside -= 1

    threads = [threading.Thread(target=work) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert (inside, most) == (0, 1)


# --- requests -------------------------------------------------------------------------------------


class Counting(MemoryFileSystem):
    """Memory that counts what would be a request, and answers after a while."""

    protocol = "counting"
    requests: Counter[str] = Counter()
    at_once = most_at_once = 0
    lock = threading.Lock()

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(MemoryFileSystem._strip_protocol(path.replace("counting://", "memory://")))

    def counted(self, what: str, answer: Callable[[], Any]) -> Any:
        with Counting.lock:
            Counting.requests[what] += 1
            Counting.at_once += 1
            Counting.most_at_once = max(Counting.most_at_once, Counting.at_once)
        time.sleep(0.001)
        result = answer()
        with Counting.lock:
            Counting.at_once -= 1
        return result

    def find(self, path: str, **how: Any) -> Any:
        return self.counted("list", lambda: MemoryFileSystem("x").find(path, **how))

    def ls(self, path: str, **how: Any) -> Any:
        return self.counted("list", lambda: super(Counting, self).ls(path, **how))

    def info(self, path: str, **how: Any) -> Any:
        return self.counted("info", lambda: super(Counting, self).info(path, **how))

    def _open(self, path: str, mode: str = "rb", **how: Any) -> Any:
        content = super()._open(path, mode, **how)
        if mode != "rb":
            return content
        fs = self

        class File(io.BytesIO):
            def read(self, *size: int) -> bytes:
                return bytes(fs.counted("read", lambda: io.BytesIO.read(self, *size)))

        return File(content.getvalue())


@pytest.mark.parametrize(
    ("kind", "shards"),
    [("clip-retrieval", 300), ("parquet", 300), pytest.param("parquet", 10_000, marks=pytest.mark.slow)],
)
def test_opening_a_pool_is_a_listing_and_a_read_for_each_file(kind: str, shards: int) -> None:
    fsspec.register_implementation("counting", Counting, clobber=True)
    memory, buffer = fsspec.filesystem("memory"), [io.BytesIO() for _ in range(3)]
    np.save(buffer[0], np.ones((3, 4), np.float16))
    pq.write_table(pa.table({"key": list("abc"), "caption": list("xyz")}), buffer[1])
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(np.ones(12, np.float32)), 4)
    pq.write_table(pa.table({"key": list("abc"), "image_embedding": vectors}), buffer[2])
    for i in range(shards):
        if kind == "parquet":
            memory.pipe_file(f"/pool/data/train-{i:05d}.parquet", buffer[2].getvalue())
        else:
            memory.pipe_file(f"/pool/img_emb/img_emb_{i:05d}.npy", buffer[0].getvalue())
            memory.pipe_file(f"/pool/metadata/metadata_{i:05d}.parquet", buffer[1].getvalue())
    Counting.requests.clear()
    store = open_store("counting://pool")
    assert store.total == 3 * shards
    files = shards if kind == "parquet" else 2 * shards
    assert Counting.requests["list"] == 1
    assert Counting.requests["read"] == files
    assert Counting.requests["info"] == 0
    assert 16 < Counting.most_at_once <= 64
    same = open_store("memory://pool")
    assert same.fingerprint() == store.fingerprint()


def test_remote_paths_have_no_path_of_this_machine() -> None:
    remote = place("memory://top/out")
    assert isinstance(remote, RemotePath)
    with pytest.raises(TypeError):
        Path(remote)  # type: ignore[arg-type]
