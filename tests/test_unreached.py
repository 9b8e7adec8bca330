"""Pools, resharding and training never skip what was not reached, not even with --skip-bad."""

from __future__ import annotations

import hashlib
import itertools
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests import faulty_fs
from tests.embedding.raw import tars
from thresher import Cache, Options, Serial, build, open_store, run_steps
from thresher.errors import AccessError, UnreachedError
from thresher.resharding import reshard
from thresher.runtime.progress import Silent
from thresher.train.data import open_pairs

Plan = Callable[[dict[str, Any]], None]
ROWS, DIM = 60, 8


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    path = tmp_path / "plan.json"
    monkeypatch.setenv(faulty_fs.PLAN, str(path))
    monkeypatch.setenv("THRESHER_NETWORK_TRIES", "1")

    def write(what: dict[str, Any]) -> None:
        for old in tmp_path.glob("plan.json.*"):
            old.unlink()
        path.write_text(json.dumps(what))

    return write


def pool(folder: Path, kind: str) -> list[str]:
    """Write a pool of three files and return their names."""
    vectors = np.random.default_rng(0).standard_normal((ROWS, DIM)).astype(np.float32)
    folder.mkdir()
    names = []
    for i, rows in enumerate(np.array_split(np.arange(ROWS), 3)):
        columns: dict[str, Any] = {"uid": [f"k{row}" for row in rows], "text": ["a caption"] * len(rows)}
        if kind == "parquet":
            columns["image_embedding"] = pa.FixedSizeListArray.from_arrays(pa.array(vectors[rows].ravel()), DIM)
            columns["text_embedding"] = columns["image_embedding"]
            names.append(f"part-{i}.parquet")
        else:
            for what in ("image", "text"):
                np.save(folder / f"{what}-{i}.npy", vectors[rows])
            names.append(f"image-{i}.npy")
        pq.write_table(pa.table(columns), folder / f"part-{i}.parquet")
    return names


EVERY = set(itertools.product(["npy", "parquet"], ["expired", "reset", "memory", "bug"], [False, True]))
FEW = {("npy", "expired", True), ("npy", "memory", False), ("npy", "bug", True), ("parquet", "reset", False)}


@pytest.mark.parametrize(
    ("kind", "error", "skip_bad"),
    [pytest.param(*case, marks=() if case in FEW else pytest.mark.slow) for case in sorted(EVERY)],
)
def test_a_pool_without_one_of_its_files(tmp_path: Path, plan: Plan, kind: str, error: str, skip_bad: bool) -> None:
    """Whichever read fails, the run stops: it never goes on with fewer rows."""
    names = pool(tmp_path / "pool", kind)
    expected = {"expired": AccessError, "reset": UnreachedError, "memory": MemoryError, "bug": RuntimeError}[error]
    steps = [build("semdedup", {"eps": 0.5, "clusters": 3})]

    def run(cache: str) -> list[int]:
        cached = Cache.at(tmp_path / cache)
        store = open_store(f"faulty://{tmp_path}/pool", Options(skip_bad=skip_bad), scratch=str(tmp_path / cache))
        return run_steps(store, steps, engine=Serial(), cache=cached).rows().tolist()

    plan({})
    whole = run("clean")
    reads = 0
    for after in range(200):
        plan({names[1]: {"error": error, "after": after, "times": 1}})
        try:
            assert run(f"cache-{after}") == whole  # it was read often enough before
            break
        except expected:
            reads += 1
    assert reads >= 1
    plan({})
    assert run("cache-0") == whole  # nothing was remembered of the failure


@pytest.mark.parametrize("error", ["expired", "reset"])
def test_reshard_stops_and_the_same_call_finishes(tmp_path: Path, plan: Plan, error: str) -> None:
    data = tars(tmp_path / "tars", 40)
    keys = tmp_path / "keys.txt"
    keys.write_text("".join(f"{i:06d}\n" for i in range(0, 40, 2)))

    def run(out: str) -> None:
        reshard(f"faulty://{data}", str(keys), tmp_path / out, per_shard=5, workers=1)

    def content(out: str) -> list[str]:
        paths = sorted((tmp_path / out).glob("*.tar"))
        assert all(tarfile.is_tarfile(path) for path in paths)
        return [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]

    plan({})
    run("undisturbed")
    failed = 0
    for after in range(30):
        plan({"00002.tar": {"error": error, "after": after}})
        try:
            run(f"out-{after}")
            break
        except UnreachedError:
            failed += 1
        plan({})
        run(f"out-{after}")
        assert content(f"out-{after}") == content("undisturbed")
        assert not (tmp_path / f"out-{after}" / "set-aside.txt").exists()
    assert failed >= 2


def test_training_does_not_skip_what_was_not_reached(tmp_path: Path, plan: Plan) -> None:
    data = tars(tmp_path / "tars", 20)
    for after in (0, 1, 2, 5):
        plan({"00001.tar": {"error": "expired", "after": after}})
        with pytest.raises(AccessError):
            open_pairs(
                f"faulty://{data}", tmp_path, side=8, resize="squash", captions=True, progress=Silent(), workers=1
            )
    plan({})
    pairs = open_pairs(
        f"faulty://{data}", tmp_path, side=8, resize="squash", captions=True, progress=Silent(), workers=1
    )
    assert len(pairs) == 20
    assert pairs.skipped == ()


@pytest.mark.parametrize("side", ["pool", "metadata"])
def test_a_join_reports_what_was_not_reached(tmp_path: Path, plan: Plan, side: str) -> None:
    """DuckDB wraps an error in reading in one of its own, which is not about writing the result."""
    names = pool(tmp_path / "pool", "parquet")
    keys = [f"k{row}" for row in range(ROWS)][::-1]
    pq.write_table(pa.table({"uid": keys, "score": list(range(ROWS))}), tmp_path / "more.parquet")
    failing = names[1] if side == "pool" else "more.parquet"

    def opened(cache: str) -> list[Any]:
        options = Options(metadata=f"faulty://{tmp_path}/more.parquet")
        store = open_store(f"faulty://{tmp_path}/pool", options, scratch=str(tmp_path / cache))
        return [value for _, part in store.scan(["score"]) for value in part.column(0).to_pylist()]

    plan({})
    assert opened("clean") == list(range(ROWS))[::-1]
    failed = 0
    for after in range(60):
        plan({failing: {"error": "expired", "after": after}})
        try:
            opened(f"cache-{after}")
            break
        except AccessError:
            failed += 1
    assert failed >= 2
    plan({})
    assert opened("cache-1") == list(range(ROWS))[::-1]
