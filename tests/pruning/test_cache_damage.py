"""A cache whose files are damaged, or were written by somebody else, gives the same result as an empty one."""

from __future__ import annotations

import errno
import io
import os
import random
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.runtime.common import as_nobody, begin, end_of, needs_root, small_disk
from thresher import Cache, Options, OutputError, Serial, build, open_store, run_steps
from thresher.pool.store import EmbeddingStore
from thresher.pruning.covariance import covariance_errors
from thresher.pruning.run import Run
from thresher.runtime.checksums import CacheWarning, append_checksum
from thresher.runtime.progress import Advance, Silent
from thresher.selection import Selection

pytest.importorskip("fcntl")

ROWS = 200
BLOCK = 64  # rows of a block: passes have several
WORK: dict[str, tuple[str, dict[str, Any]]] = {
    "semdedup": ("semdedup", {"eps": 0.5, "clusters": 6}),
    "prefer": ("semdedup", {"eps": 0.5, "clusters": 6, "prefer": "width"}),
    "herd": ("herd", {"keep": "40%", "clusters": 6}),
    "hkmeans": ("hkmeans", {"keep": "40%", "levels": "12,3", "resample": 1}),
    "density": ("density", {"keep": "40%", "clusters": 6}),
    "negclip": ("negclip", {"keep": "40%", "batch_size": 120, "repeats": 2}),
    "normsim": ("normsim", {"keep": "40%", "rounds": 3}),
    "clipcov": ("clipcov", {"keep": "40%", "clusters": 6}),
    "filter": ("filter", {"where": "width > 60 AND aes > 10"}),
    "clip-score": ("clip-score", {"keep": "30%"}),
    "reference": ("semdedup", {"reference": "other", "reference_eps": 0.5}),
    "covariance": ("random", {"keep": "50%"}),
    "cluster": ("semdedup", {"eps": 0.5, "clusters": 6, "embedding": "joint", "fit": "pool", "sample": "100"}),
}
# What each may leave in the cache, by the first word of the file's name: a kind that is not listed fails the test.
KINDS = {
    "arrays": {
        *("assign.labels", "assign.distances", "kmeans", "semdedup.cosine", "semdedup.twin", "negclip.score"),
        *("semdedup-order.order", "semdedup.groups", "semdedup.best.cosine", "kmeans.array", "herd.turn"),
        *(
            "normsim.score",
            "normsim.target",
            "class-means",
            "class-products",
            "similarities.own",
            "similarities.mean",
            "similarities.inter",
        ),
        *("filter.failed", "clip score.score", "reference.cosine", "reference.row", "reference check.bad"),
        *("check image.bad", "check text.bad", "covariance", "keys", "local.image.vectors", "local.text.vectors"),
    },
    "joined": {".parquet", ".json"},
}


def write_pool(folder: Path, rows: int, seed: int) -> Path:
    """Vectors in parquet, so that methods need local copies."""
    rng = np.random.default_rng(seed)
    image = rng.standard_normal((rows, 16)).astype(np.float32)
    image[rows // 2 :] += image[: rows // 2]
    text = (image + rng.standard_normal((rows, 16))).astype(np.float32)
    columns = {"uid": [f"k{i}" for i in range(rows)], "text": ["a"] * rows, "width": list(range(rows))}
    for name, array in (("image", image), ("text", text)):
        columns[f"{name}_embedding"] = pa.FixedSizeListArray.from_arrays(pa.array(array.ravel()), 16)
    folder.mkdir()
    pq.write_table(pa.table(columns), folder / "a.parquet")
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("damage")
    write_pool(folder / "pool", ROWS, 0)
    write_pool(folder / "other", 90, 0)
    columns = {"uid": [f"k{i}" for i in range(5, ROWS)], "aes": [float(i % 97) for i in range(5, ROWS)]}
    pq.write_table(pa.table(columns), folder / "meta.parquet")
    return folder


class Stop(Silent):
    """Interrupts a run after a number of steps."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    @contextmanager
    def task(self, label: str, total: int, unit: str = "rows") -> Iterator[Advance]:
        def advance(_: int) -> None:
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt

        yield advance


def opened(place: Path, cache: Path, skip: bool) -> EmbeddingStore:
    options = Options(metadata=str(place / "meta.parquet"), skip_bad=skip)
    store = open_store(str(place / "pool"), options, scratch=str(cache))
    return EmbeddingStore(store.layout, store.options, block=BLOCK, held=store.held)


def work(name: str, place: Path, cache: Path, skip: bool = False, progress: Silent | None = None) -> list[Any]:
    """Do the work of a method; returns all that it decided."""
    method, parameters = WORK[name]
    if "reference" in parameters:
        parameters = {**parameters, "reference": str(place / parameters["reference"])}
    store, here = opened(place, cache, skip), Cache(cache, flush_seconds=-1)
    progress = progress or Silent()
    made = run_steps(store, [build(method, parameters)], engine=Serial(), cache=here, progress=progress)
    told: list[Any] = [made.dropped_by.tolist(), [{k: v.tolist() for k, v in s.rows.items()} for s in made.steps]]
    if name == "covariance":
        start = Selection.everything(store.fingerprint(), "", {}, store.total)
        run = Run(store, start, Serial(), here, progress=progress)
        labels = np.arange(store.total) % 3
        told.append(covariance_errors(run, {"a": made}, labels)["a"].header())
    return told


# --- damage ---------------------------------------------------------------------------------------


def damages(path: Path) -> Iterator[tuple[str, bytes]]:
    """Damage of any file, without its checksum being right."""
    data, rng = path.read_bytes(), random.Random(1)
    yield "empty", b""
    yield "half", data[: len(data) // 2]
    yield "one byte less", data[:-1]
    yield "one byte more", data + b"\0"
    yield "garbage", rng.randbytes(min(len(data), 4000))
    yield "zeros", data[:128] + bytes(max(0, len(data) - 128))
    for place in (0, 4, 40, 130, len(data) // 2, len(data) - 25, len(data) - 14, len(data) - 1):
        at = min(max(place, 0), len(data) - 1)
        yield f"bit at {at}", data[:at] + bytes([data[at] ^ 0x40]) + data[at + 1 :]
    if is_array(path):
        for what, array in others(np.load(path, allow_pickle=False)):
            yield what, saved(array)


def is_array(path: Path) -> bool:
    """Whether a file holds a whole array."""
    return path.suffix == ".npy" and path.parent.suffix != ".partial"


def others(array: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Arrays that are not what was saved."""
    yield "shorter", array[:-1] if array.ndim else np.zeros(0, array.dtype)
    yield "longer", np.concatenate([array, array[:1]]) if array.ndim else np.zeros(2, array.dtype)
    yield "another width", array.astype(np.float32 if array.dtype == np.float64 else np.float64)
    yield "big-endian", array.astype(array.dtype.newbyteorder(">")) if array.itemsize > 1 else array[::2]
    yield "strings", array.astype("U4")
    yield "2d", array[..., None]
    yield "nothing", np.zeros(0, array.dtype)
    yield "objects", np.array([{"a": 1}], object)


def out_of_range(array: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Values that the array cannot have."""
    if array.dtype.kind in "iu":
        yield "huge", np.full_like(array, np.iinfo(array.dtype).max)
        if array.dtype.kind == "i":
            yield "negative", np.full_like(array, -7)
    else:
        yield "NaN", np.full_like(array, np.nan)
        yield "infinite", np.full_like(array, np.inf)


def saved(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def crafted(path: Path) -> Iterator[tuple[str, Callable[[], None]]]:
    """Files with a right checksum and other content, as another program could write them."""

    def write(save: Callable[[Any], None]) -> None:
        with open(path, "w+b") as file:
            save(file)
            append_checksum(file)

    def text(data: bytes) -> Callable[[], None]:
        return lambda: write(lambda file: file.write(data))

    if is_array(path):
        array = np.load(path, allow_pickle=False)
        free = path.name.startswith(("covariance", "local"))  # any number is allowed there
        for what, other in [*others(array), *([] if free else out_of_range(array))]:
            yield f"crafted {what}", text(saved(other))
    elif path.suffix == ".npz":
        arrays = dict(np.load(path, allow_pickle=False))
        for name, array in arrays.items():
            for what, other in others(array):
                if (other.dtype, other.shape) != (array.dtype, array.shape):
                    changed = {**arrays, name: other}
                    yield f"crafted {name} {what}", lambda changed=changed: write(lambda f: np.savez(f, **changed))
        yield "crafted without arrays", lambda: write(lambda f: np.savez(f))
        yield "crafted text", text(b"PK\5\6 is no archive")
    elif path.suffix == ".json":
        for data in (b"", b"{", b"5", b'{"a": 1}', b"[1]", b"[[[", b"[" * 100_000, b"\xff", b"null", b'"text"'):
            yield f"crafted {data[:8]!r}", text(data)


def cases(path: Path) -> Iterator[tuple[str, Callable[[], None]]]:
    for what, data in damages(path):
        yield what, lambda data=data: path.write_bytes(data)
    yield from crafted(path)


def kind_of(path: Path) -> str:
    """The kind of a cached file: its name without what it depends on."""
    return path.suffix if path.parent.name == "joined" else path.name.rpartition("-")[0]


def copied(source: Path, target: Path) -> Path:
    shutil.rmtree(target, ignore_errors=True)
    return Path(shutil.copytree(source, target, copy_function=shutil.copy2))


def check(name: str, place: Path, tmp_path: Path, skip: bool, quick: bool) -> tuple[int, set[str]]:
    """Damage each file of a full cache, in one way or in all; returns how often, and the kinds that were reported."""
    full, cache = tmp_path / "full", tmp_path / "cache"
    expected = work(name, place, cache, skip)
    copied(cache, full)  # keys depend on the place of the joined table, so that it is always the same
    count, told = 0, set[str]()
    for path in sorted(path for path in full.rglob("*") if path.is_file()):
        again = cache / path.relative_to(full)
        copied(full, cache)
        every = list(cases(again))  # made before the first damage
        for what, damage in [every[5 * count % len(every)]] if quick else every:
            copied(full, cache)
            if path.name.startswith("local."):  # read only if something is computed from it
                for other in (cache / "arrays").iterdir():
                    if not other.name.startswith("local."):
                        other.unlink()
            damage()
            with warnings.catch_warnings(record=True) as raised:
                warnings.simplefilter("always")
                found = work(name, place, cache, skip)
            assert found == expected, f"{name}: {path.name}, {what}"
            assert {warning.category for warning in raised} <= {CacheWarning}
            if any(path.name in str(warning.message) for warning in raised):
                told.add(kind_of(path))
            count += 1
    return count, told


@pytest.mark.parametrize(("name", "skip"), [("filter", False), ("clip-score", True), ("density", False)])
def test_some_damage_changes_no_result(name: str, skip: bool, place: Path, tmp_path: Path) -> None:
    count, told = check(name, place, tmp_path, skip, quick=True)
    assert count > 2
    assert told


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "skip"),
    [*((name, False) for name in WORK), *((name, True) for name in ("semdedup", "clip-score", "reference"))],
)
def test_damage_of_every_kind_changes_no_result(name: str, skip: bool, place: Path, tmp_path: Path) -> None:
    count, told = check(name, place, tmp_path, skip, quick=False)
    assert count > 40
    left = {kind_of(path) for path in (tmp_path / "full").rglob("*") if path.is_file()}
    assert told == left
    assert left <= set().union(*KINDS.values())
    print(f"{name}{' with skip_bad' if skip else ''}: {count} cases of {len(left)} kinds")


# --- what an interrupted run left -----------------------------------------------------------------


def interrupted(name: str, place: Path, cache: Path, steps: int) -> list[Path]:
    """Interrupt a run after some steps; returns the unfinished files."""
    shutil.rmtree(cache, ignore_errors=True)
    try:
        work(name, place, cache, progress=Stop(steps))
    except KeyboardInterrupt:
        pass
    else:
        return []
    unfinished = [*cache.glob("arrays/*.npz"), *cache.glob("arrays/*.partial/*")]
    return sorted(path for path in unfinished if path.name != "lock")


def check_unfinished(name: str, place: Path, tmp_path: Path, moments: range, quick: bool) -> int:
    """Damage each file that interrupted runs left, in one way or in all; returns how often."""
    expected = work(name, place, tmp_path / "whole")
    count = 0
    for steps in moments:
        left, cache = tmp_path / "left", tmp_path / "cache"
        unfinished = interrupted(name, place, cache, steps)
        copied(cache, left)
        for path in unfinished:
            copied(left, cache)
            every = list(cases(path))  # made before the first damage
            for what, damage in [every[5 * count % len(every)]] if quick else every:
                copied(left, cache)
                damage()
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", CacheWarning)
                    found = work(name, place, cache)
                assert found == expected, f"{name} after {steps} steps: {path.name}, {what}"
                count += 1
    return count


@pytest.mark.slow
@pytest.mark.parametrize("name", ["semdedup", "prefer"])
def test_unfinished_files_that_are_damaged(name: str, place: Path, tmp_path: Path) -> None:
    assert check_unfinished(name, place, tmp_path, range(1, 40, 5), quick=True) > 5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["semdedup", "prefer", "negclip", "normsim", "clipcov", "reference"])
def test_unfinished_files_that_are_damaged_in_every_way(name: str, place: Path, tmp_path: Path) -> None:
    count = check_unfinished(name, place, tmp_path, range(1, 60, 4), quick=False)
    assert count > 40
    print(f"{name}: {count} cases of unfinished files")


# --- a disk that is full or read-only, file systems without locks, other users --------------------


def no_temporary_files(cache: Path) -> bool:
    return not [path for path in cache.rglob(".*") if path.is_file()]


@needs_root
@pytest.mark.parametrize("size", ["8k", "20k", "32k", "44k"])
def test_a_full_disk_gives_one_line_and_no_damaged_entry(size: str, place: Path, tmp_path: Path) -> None:
    expected = work("semdedup", place, tmp_path / "whole")
    with small_disk(tmp_path / "cache", size) as disk:
        with pytest.raises(OutputError, match=r"^[^\n]*(cannot be written|could not be joined)[^\n]*$"):
            work("semdedup", place, disk)
        assert no_temporary_files(disk)
        copied(disk, tmp_path / "larger")
    copied(tmp_path / "larger", tmp_path / "cache")
    assert work("semdedup", place, tmp_path / "cache") == expected  # no warning: nothing is damaged


@needs_root
def test_a_read_only_disk(place: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "cache", "4m") as disk:
        expected = work("semdedup", place, disk, skip=True)
        if subprocess.run(["mount", "-o", "remount,ro", str(disk)], capture_output=True).returncode:
            pytest.skip("cannot be mounted read-only")
        assert work("semdedup", place, disk, skip=True) == expected
        said = r"^[^\n]*cannot be written \(Read-only file system\); choose another cache folder with --cache$"
        for name in ("clip-score", "negclip"):
            with pytest.raises(OutputError, match=said):
                work(name, place, disk, skip=True)
    with small_disk(tmp_path / "empty", "4m") as disk:
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        for skip in (False, True):
            with pytest.raises(OutputError, match=said):
                work("clip-score", place, disk, skip)


@pytest.mark.parametrize(
    "number",
    [errno.ENOLCK, *(pytest.param(number, marks=pytest.mark.slow) for number in (errno.ENOSYS, errno.EOPNOTSUPP))],
)
def test_without_locks(number: int, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [work(name, place, tmp_path / "whole", skip=True) for name in ("semdedup", "clip-score", "covariance")]

    def none(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", none)
    for _ in range(2):
        found = [work(name, place, tmp_path / "new", skip=True) for name in ("semdedup", "clip-score", "covariance")]
        assert found == expected
    cache = Cache(tmp_path / "new", limit=1)
    cache.trim()
    assert work("semdedup", place, tmp_path / "new", skip=True) == expected[0]
    cache.clear()
    assert work("semdedup", place, tmp_path / "new", skip=True) == expected[0]


def copy_vectors(folder: Path) -> None:
    store = opened(folder, folder / "cache", False)
    Run(store, Selection.everything("", "", {}, store.total), Serial(), Cache(folder / "cache")).local("image")


@needs_root
def test_a_run_of_another_user_uses_what_this_one_may_remove(place: Path) -> None:
    """Neither a full cache nor a day removes what it reads: the joined table, local copies, arrays."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))  # noqa: S108 - that every user can reach
    try:
        folder.chmod(0o755)
        for name in ("pool", "meta.parquet", "other"):
            here, there = place / name, folder / name
            shutil.copytree(here, there) if here.is_dir() else shutil.copy(here, there)
        expected = work("semdedup", folder, folder / "cache")
        copy_vectors(folder)
        entries = sorted(path for path in (folder / "cache").rglob("*.*") if path.is_file())

        def use() -> None:
            store, cache = opened(folder, folder / "cache", False), Cache(folder / "cache")
            start = Selection.everything(store.fingerprint(), "", {}, store.total)
            local = Run(store, start, Serial(), cache).local("image")
            arrays = [cache.load(path) for path in entries if path.suffix == ".npy"]
            os.write(ready[1], b"1")
            os.read(go[0], 1)
            assert len(local.store.vectors_at("image", np.arange(5))) == 5
            assert len(list(local.store.scan(["aes", "width"]))) == 1
            assert all(array is not None for array in arrays)
            assert work("semdedup", folder, folder / "cache") == expected

        ready, go = os.pipe(), os.pipe()
        other = begin(as_nobody(use))
        os.close(ready[1])
        assert os.read(ready[0], 1)
        for path in entries:
            os.utime(path, (1, 1))
        mine = Cache(folder / "cache", limit=1)
        assert mine.trim() == mine.clear() == 0
        assert all(path.exists() for path in entries)
        os.write(go[1], b"1")
        assert end_of(other) == 0
        assert mine.trim() > 0
        assert not any(path.exists() for path in entries)
    finally:
        shutil.rmtree(folder)
