"""Methods that read the rows of one cluster: the same bytes from any format, place and engine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from tests.objects import put
from tests.pools import WRITERS, Pool, float32, make
from thresher import Cache, EmbeddingStore, Processes, Selection, Serial, Threads, open_store, run_steps
from thresher.errors import BadRowsError
from thresher.pool import spill
from thresher.pruning import class_statistics
from thresher.pruning.covariance import covariance_errors
from thresher.pruning.methods import semdedup
from thresher.pruning.registry import build
from thresher.pruning.run import Run
from thresher.runtime.progress import Silent

N = 700
STEPS = {
    "semdedup": {"eps": 0.1, "clusters": 5},
    "semdedup kept": {"eps": 0.1, "clusters": 5, "against": "kept"},
    "semdedup best": {"eps": 0.1, "clusters": 5, "prefer": "clip-score"},
    "semdedup reference": {"eps": 0.1, "clusters": 5, "reference": "OTHER", "reference_eps": 0.05, "order": "random"},
    "clipcov": {"keep": "30%", "clusters": 5},
    "clipcov plain": {"keep": "30%", "clusters": 5, "clamp": "none"},
    "herd": {"keep": "40%", "clusters": 5},
    "density": {"keep": "40%", "clusters": 5},
}


QUICK = ("semdedup", "clipcov")
NAMES = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in STEPS]


class Told(Silent):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


def pairs() -> Pool:
    """Rows with near-duplicates, and one cluster much larger than the others."""
    pool = make(N, dim=16)
    image = pool.image.astype(np.float32)
    image[:400] += 6
    image[500:600] = image[300:400] + 0.1 * image[500:600]
    return replace(pool, image=image.astype("<f2"))


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(spill, "PART", 64 * 32)
    monkeypatch.setattr(spill, "SPAN", 1)
    monkeypatch.setattr(semdedup, "_HELD", 100)  # clusters larger than that are read in parts
    monkeypatch.setattr(class_statistics, "_held", lambda store: 50)
    yield
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


def opened(tmp_path: Path, kind: str) -> EmbeddingStore:
    where = tmp_path / kind
    if not where.exists():
        WRITERS["npy" if kind == "memory" else kind](where, pairs(), cuts=[250, 251])
    return replace(open_store(put(where, "memory://top/pool") if kind == "memory" else str(where)), block=64)


def chosen(
    store: EmbeddingStore, name: str, tmp_path: Path, cache: Cache, engine: Any = None, **more: Any
) -> Selection:
    given = {key: str(tmp_path / "other") if value == "OTHER" else value for key, value in STEPS[name].items()}
    if not (tmp_path / "other").exists():
        WRITERS["npy"](tmp_path / "other", pairs().at(range(30, 60)))
    method = build(name.partition(" ")[0], given)
    return run_steps(
        store, [build("clip-score", {"keep": "90%"}), method], engine=engine or Serial(), cache=cache, **more
    )


def same(found: Selection, expected: Selection) -> None:
    assert found.mask().tobytes() == expected.mask().tobytes()
    one, other = found.steps[1], expected.steps[1]
    for arrays, others in ((one.rows, other.rows), (one.groups, other.groups), (one.reference, other.reference)):
        assert list(arrays) == list(others)
        assert all(np.asarray(arrays[name]).tobytes() == np.asarray(others[name]).tobytes() for name in arrays)
    assert one.notes == other.notes


@pytest.mark.parametrize("name", NAMES)
def test_every_format_and_place_gives_the_same_bytes(tmp_path: Path, name: str) -> None:
    expected = chosen(opened(tmp_path, "npy"), name, tmp_path, Cache.at(tmp_path / "a"))
    assert 0 < len(expected) < 630
    for number, (kind, scratch) in enumerate(
        (("parquet", None), ("datacomp", tmp_path / "scratch"), ("memory", "memory://top/scratch"))
    ):
        told, cache = Told(), Cache.at(tmp_path / f"cache-{number}", scratch=scratch)
        same(chosen(opened(tmp_path, kind), name, tmp_path, cache, progress=told), expected)
        said = [line for line in told.lines if "written once more" in line]
        assert len(said) == (name != "density")
        assert all(str(scratch or cache.folder) in line and "removed at the end" in line for line in said)
        left = [path.name for path in (tmp_path / f"cache-{number}" / "arrays").iterdir()]
        assert not [one for one in left if one.startswith(("local.", "order."))]
        assert not (tmp_path / "scratch").exists() or not list((tmp_path / "scratch").iterdir())
    assert not [path for path in MemoryFileSystem.store if "/scratch/" in path]


@pytest.mark.parametrize("name", ["semdedup", "clipcov"])
def test_vectors_in_large_local_files_are_written_in_order_if_there_is_space(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = opened(tmp_path, "npy")

    def said(cache: str, free: int | None = None) -> list[str]:
        told = Told()
        if free is not None:
            monkeypatch.setattr(spill.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
        same(chosen(store, name, tmp_path, Cache.at(tmp_path / cache), progress=told), expected)
        assert not list((tmp_path / cache).rglob("*order.*.partial"))
        return [line for line in told.lines if "vectors:" in line]

    expected = chosen(store, name, tmp_path, Cache.at(tmp_path / "small"))
    size = 630 * 16 * 2 * (2 if name == "clipcov" else 1)  # clip-score keeps 630 rows
    monkeypatch.setattr(spill, "LARGE", size + 1)
    assert said("below") == []
    monkeypatch.setattr(spill, "LARGE", size)
    (line,) = said("large")
    assert "written once more in cluster order" in line
    (line,) = said("full", free=2 * size - 1)
    assert "read row by row, which is slower" in line
    assert "--scratch" in line
    (line,) = said("enough", free=2 * size)
    assert "written once more in cluster order" in line


@pytest.mark.parametrize("engine", [Threads(3), Processes(2)], ids=lambda engine: engine.name)
def test_every_engine_gives_the_same_bytes(tmp_path: Path, engine: Any) -> None:
    for number, name in enumerate(("semdedup", "clipcov")):
        expected = chosen(opened(tmp_path, "npy"), name, tmp_path, Cache.at(tmp_path / "a"))
        cache = Cache.at(tmp_path / f"{number}")
        same(chosen(opened(tmp_path, "parquet"), name, tmp_path, cache, engine), expected)


def test_the_covariance_of_a_selection(tmp_path: Path) -> None:
    found = []
    for kind in ("npy", "parquet", "memory"):
        store = opened(tmp_path, kind)
        selection = chosen(store, "density", tmp_path, Cache.at(tmp_path / kind / "cache"))
        run = Run(
            store, Selection.everything(store.fingerprint(), "", {}, N), Serial(), Cache.at(tmp_path / kind / "cache")
        )
        found.append(repr(covariance_errors(run, {"a": selection}, np.arange(N) % 7)["a"].header()))
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize(
    "name", ["semdedup", "clipcov", *(pytest.param(name, marks=pytest.mark.slow) for name in ("semdedup best", "herd"))]
)
def test_a_killed_step_goes_on_without_writing_again(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while the rows are compared: the files in cluster order are used again, and removed at the end."""
    store, written, real = opened(tmp_path, "parquet"), [], spill._save
    expected = chosen(opened(tmp_path, "npy"), name, tmp_path, Cache.at(tmp_path / "a"))

    def save(part: Any, name: str, *more: Any) -> None:
        written.append(name)
        real(part, name, *more)

    class Killed(Silent):
        def task(self, label: str, total: int, unit: str = "rows") -> Any:
            from contextlib import nullcontext

            steps = []

            def advance(_: int) -> None:
                steps.append(1)
                if label in ("semdedup: compare", "class products", "herd") and len(steps) == 4:
                    raise KeyboardInterrupt

            return nullcontext(advance)

    monkeypatch.setattr(spill, "_save", save)
    cache = Cache.at(tmp_path / "cache")
    with pytest.raises(KeyboardInterrupt):
        chosen(store, name, tmp_path, cache, progress=Killed())
    count = len(written)
    assert count > 5
    assert list((tmp_path / "cache" / "arrays").glob("order.*"))
    same(chosen(store, name, tmp_path, cache), expected)
    assert len(written) == count
    assert not list((tmp_path / "cache" / "arrays").glob("order.*"))


def test_an_error_while_rows_are_compared_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise ValueError("later")

    monkeypatch.setattr(semdedup, "nearest_earlier", fails)
    with pytest.raises(ValueError, match="later"):
        chosen(opened(tmp_path, "parquet"), "semdedup", tmp_path, Cache.at(tmp_path / "cache"))
    assert not list((tmp_path / "cache" / "arrays").glob("order.*"))


def test_the_vectors_are_right() -> None:
    """The pool of these tests has duplicates, and a cluster that is larger than a task."""
    image = float32(pairs().image)
    unit = image / np.linalg.norm(image, axis=1, keepdims=True)
    assert (np.einsum("ij,ij->i", unit[500:600], unit[300:400]) > 0.95).mean() > 0.9


@pytest.mark.parametrize("kind", ["npy", "parquet"])
def test_a_bad_row_is_named_by_its_place_in_the_pool(tmp_path: Path, kind: str) -> None:
    """Not by its place in the copy in cluster order, which is removed after the error."""
    text = pairs().text.copy()
    text[[377, 650]] = np.nan
    WRITERS[kind](tmp_path / "pool", replace(pairs(), text=text), cuts=[250, 251])
    store = replace(open_store(str(tmp_path / "pool")), block=64)
    assert store.location_of("text", 377).endswith("row 126")
    with pytest.raises(BadRowsError) as caught:
        run_steps(store, [build("herd", STEPS["herd"])], engine=Serial(), cache=Cache.at(tmp_path / "cache"))
    assert str(caught.value).startswith(f"{store.location_of('text', 377)}: ")
    assert "(row 377 of the pool)" in str(caught.value)
