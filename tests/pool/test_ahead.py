"""Remote pools are read ahead: many requests at the same time, a bounded number of bytes."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from tests.objects import put
from tests.pools import WRITERS, make
from thresher import Cache, Processes, Serial, Threads, open_store, run_steps
from thresher.io import npy, remote
from thresher.pruning.registry import build

N = 1_600


class Slow(MemoryFileSystem):
    """Memory that answers after a while, and counts how many requests wait at the same time."""

    protocol = "slow"
    store: dict[str, Any] = {}  # noqa: RUF012
    pseudo_dirs = [""]  # noqa: RUF012
    pause, at_once, most, requests, bytes = 0.0, 0, 0, 0, 0
    lock = threading.Lock()

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(MemoryFileSystem._strip_protocol(path.replace("slow://", "memory://")))

    def _waited(self, answer: Any) -> Any:
        with Slow.lock:
            Slow.at_once += 1
            Slow.requests += 1
            Slow.most = max(Slow.most, Slow.at_once)
        time.sleep(self.pause)
        with Slow.lock:
            Slow.at_once -= 1
        return answer()

    def cat_file(self, path: str, start: Any = None, end: Any = None, **_: Any) -> bytes:
        data = self._waited(lambda: MemoryFileSystem.cat_file(self, path, start=start, end=end))
        Slow.bytes += len(data)
        return bytes(data)

    def open(self, path: str, mode: str = "rb", **how: Any) -> Any:
        return self._waited(lambda: MemoryFileSystem.open(self, path, mode, **how))


@pytest.fixture
def slow() -> Iterator[type[Slow]]:
    fsspec.register_implementation("slow", Slow, clobber=True)
    yield Slow
    Slow.store.clear()
    Slow.pseudo_dirs[:] = [""]
    Slow.pause = 0.0


@pytest.mark.parametrize("kind", ["npy", "parquet", "datacomp", "clip-retrieval"])
def test_requests_overlap(tmp_path: Path, kind: str, slow: type[Slow]) -> None:
    """100 blocks, or 32 files that are streamed, are requested many at a time."""
    cuts = [50 * i for i in range(1, 6 if kind == "datacomp" else 32)]
    location = WRITERS[kind](tmp_path / "pool", make(N), cuts=cuts)
    here = replace(open_store(location), block=16)
    store = replace(open_store(put(tmp_path / "pool", "slow://bucket/pool")), block=16)
    expected = [np.asarray(here.raw("image", block)) for block in here.blocks("image")]
    slow.pause, slow.requests, slow.most = 0.1 if kind == "datacomp" else 0.03, 0, 0
    found = [np.asarray(store.raw("image", block)) for block in store.blocks("image", ahead=True)]
    assert [part.tobytes() for part in found] == [part.tobytes() for part in expected]
    assert (4 if kind == "datacomp" else 8) < slow.most <= 64


def test_the_bytes_that_wait_are_bounded(tmp_path: Path, slow: type[Slow], monkeypatch: pytest.MonkeyPatch) -> None:
    WRITERS["npy"](tmp_path / "pool", make(N))
    store = replace(open_store(put(tmp_path / "pool", "slow://bucket/pool")), block=16)
    monkeypatch.setattr(remote, "_AHEAD", 16 * 2 * 8 * 5)  # five blocks
    slow.pause, slow.most = 0.002, 0
    read = 0
    for _ in store.blocks("image", ahead=True):
        slow.bytes, read = 0, read + 1
        time.sleep(0.01)
        assert slow.bytes <= 5 * 256  # what is read while nobody takes more
    assert read == 100
    assert slow.most <= 5


def test_the_bytes_that_are_read_for_few_rows_are_bounded(
    tmp_path: Path, slow: type[Slow], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a view with every 20th row, all rows between are read, too: they count."""
    WRITERS["npy"](tmp_path / "pool", make(N))
    store = replace(open_store(put(tmp_path / "pool", "slow://bucket/pool")), block=16)
    view = store.where(np.arange(N) % 20 == 0)
    width = 2 * 8
    monkeypatch.setattr(npy, "_SPAN", 40 * width)
    monkeypatch.setattr(remote, "_AHEAD", 160 * width)
    slow.pause, slow.most = 0.01, 0
    found = [np.asarray(view.raw("image", block)) for block in view.blocks("image", ahead=True)]
    assert np.array_equal(np.concatenate(found), make(N).image[::20])
    assert slow.most * 21 <= 2 * 160  # two blocks at a time, and what is read of each takes no more than that


def test_an_abandoned_pass_ends_its_requests(tmp_path: Path, slow: type[Slow]) -> None:
    WRITERS["npy"](tmp_path / "pool", make(N))
    store = replace(open_store(put(tmp_path / "pool", "slow://bucket/pool")), block=16)
    slow.pause, before = 0.01, threading.active_count()
    blocks = store.blocks("image", ahead=True)
    next(blocks)
    blocks.close()
    assert slow.at_once == 0
    assert threading.active_count() == before


@pytest.mark.parametrize(
    ("kind", "engine"),
    [
        ("npy", Threads(2)),
        pytest.param("parquet", Processes(2), marks=pytest.mark.slow),
        *(pytest.param(kind, Serial(), marks=pytest.mark.slow) for kind in ("npy", "parquet")),
        pytest.param("npy", Processes(2), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_results_are_those_of_disk(tmp_path: Path, kind: str, engine: Any, slow: type[Slow]) -> None:
    WRITERS[kind](tmp_path / "pool", make(N), cuts=[500, 501])
    steps = [build("clip-score", {"keep": "80%"}), build("density", {"keep": "50%", "clusters": 5})]
    found = []
    for number, location in enumerate((str(tmp_path / "pool"), put(tmp_path / "pool", "slow://bucket/pool"))):
        store = replace(open_store(location), block=64)
        found.append(run_steps(store, steps, engine=engine, cache=Cache.at(tmp_path / f"{number}")))
    assert found[0].mask().tobytes() == found[1].mask().tobytes()
    for one, other in zip(found[0].steps, found[1].steps, strict=True):
        assert all(np.array_equal(one.rows[name], other.rows[name]) for name in one.rows)
