"""The folder of a run: written whole, read back as it was, and what is damaged is told by file."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.runs import make_run
from thresher import EmbeddingStore, PoolError
from thresher.dynamic.run_folder import LEDGER, LOG, MARK, Training

N = 120


@pytest.fixture
def run(pool: Callable[..., EmbeddingStore], rows: Callable[..., np.ndarray], tmp_path: Path) -> Training:
    return make_run(tmp_path / "run", pool(rows(N)), epochs=5, prune=0.2, options={"warmup": 1})


def test_what_is_written_is_read(run: Training) -> None:
    found = Training.load(run.folder)
    assert found == run
    assert (found.rows, found.seed, found.promised, found.task) == (N, 3, 0.2, "clip")
    assert [entry["epoch"] for entry in found.log()] == list(range(5))
    again = found.ledger()
    run.record(found.log(), again)
    assert {k: v.tobytes() for k, v in run.ledger().state().items()} == {
        k: v.tobytes() for k, v in again.state().items()
    }
    assert found.open_pool().total == N
    assert sorted(path.name for path in run.folder.iterdir()) == sorted([MARK, LOG, LEDGER])


@pytest.mark.parametrize(
    ("settings", "samples", "told"),
    [
        ({"epochs": 5}, [], ""),
        ({"epochs": 6}, [], "5 of 6 epochs"),
        ({"epochs": None, "samples": 500, "batch_size": 50}, [100, 100, 100, 100, 60], ""),
        ({"epochs": None, "samples": 500, "batch_size": 50}, [100, 100, 100, 100, 50], "450 of 500 samples"),
        ({}, [], ""),
        ({"epochs": "many", "samples": True}, [], ""),
    ],
)
def test_how_far_it_is(run: Training, settings: dict, samples: list[int], told: str) -> None:
    log = [{"epoch": i, "samples": n} for i, n in enumerate(samples or [100] * 5)]
    assert dataclasses.replace(run, settings=settings).unfinished(log) == told


def test_settings_that_are_not_told(run: Training) -> None:
    bare = dataclasses.replace(run, settings={"prune": None})
    assert (bare.seed, bare.promised) == (0, None)
    assert dataclasses.replace(run, settings={"seed": True, "prune": True}).promised is None


def test_before_the_first_epoch(run: Training) -> None:
    (run.folder / LOG).unlink()
    (run.folder / LEDGER).unlink()
    assert run.log() == []
    with pytest.raises(PoolError, match=r"ledger.npz: no such file; the run has not finished an epoch"):
        run.ledger()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 9}, "is not in format 1"),
        ({"rows": "many"}, "may be damaged"),
        ({"rows": 0}, "may be damaged"),
        ({"settings": []}, "may be damaged"),
        ({"pool": 5}, "may be damaged"),
        ({"strange": 1}, "may be damaged"),
    ],
)
def test_a_damaged_description(run: Training, change: dict, message: str) -> None:
    told = json.loads((run.folder / MARK).read_text())
    (run.folder / MARK).write_text(json.dumps({**told, **change}))
    with pytest.raises(PoolError, match=message):
        Training.load(run.folder)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"format": 1}', "\xff"])
def test_a_description_that_is_none(run: Training, text: str) -> None:
    (run.folder / MARK).write_text(text, encoding="latin-1")
    with pytest.raises(PoolError, match="training.json: .*it may be damaged"):
        Training.load(run.folder)


def test_folders_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "nothing", tmp_path / "file"):
        with pytest.raises(PoolError, match="not the folder of a training run"):
            Training.load(path)


@pytest.mark.parametrize("text", ["{", "5\n", '{"epoch": 0}\n', "[1]\n"])
def test_a_damaged_log(run: Training, text: str) -> None:
    (run.folder / LOG).write_text(text)
    with pytest.raises(PoolError, match="log.jsonl: .*it may be damaged"):
        run.log()


def test_a_damaged_ledger(run: Training) -> None:
    path = run.folder / LEDGER
    good = path.read_bytes()
    objects = run.folder / "objects.npz"
    np.savez(objects, losses=np.array([{}], object))
    for bad in (b"", good[: len(good) // 2], b"no zip at all", objects.read_bytes()):
        path.write_bytes(bad)
        with pytest.raises(PoolError, match="ledger.npz: cannot be read, it may be damaged"):
            run.ledger()
    np.savez(objects, losses=np.zeros((N, 1), np.float32))
    path.write_bytes(objects.read_bytes())
    with pytest.raises(PoolError, match="seen is missing"):
        run.ledger()
    path.write_bytes(good)
    with pytest.raises(PoolError, match="has 120 rows, but the run had 121"):
        dataclasses.replace(run, rows=N + 1).ledger()


def test_another_pool(run: Training, tmp_path: Path) -> None:
    np.save(tmp_path / "other.npy", np.ones((N, 8), np.float32))
    with pytest.raises(PoolError, match="is not the pool of 120 rows that .* was trained on; give the location"):
        run.open_pool(str(tmp_path / "other.npy"))
    with pytest.raises(PoolError, match="if the pool was moved, give its location with --pool"):
        run.open_pool(str(tmp_path / "nothing"))
