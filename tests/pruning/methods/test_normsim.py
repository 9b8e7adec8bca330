from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from thresher import Cache, PoolError, Processes, Serial, Threads, UsageError, build, open_store, run_steps
from thresher.pruning.methods import normsim as module

NORMS = ("max", "rms", "mean")


def unit(rows: np.ndarray) -> np.ndarray:
    rows = rows.astype(np.float64)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def brute(image: np.ndarray, target: np.ndarray, norm: str) -> np.ndarray:
    """The definition: all cosines, in float64."""
    cosines = unit(image) @ unit(target).T
    if norm == "rms":
        return np.linalg.norm(cosines, axis=1) / np.sqrt(len(target))
    return cosines.max(axis=1) if norm == "max" else cosines.mean(axis=1)


def own_subset(image: np.ndarray, size: int, rounds: int, norm: str) -> np.ndarray:
    """The rows left after all rounds."""
    rows = np.arange(len(image))
    for done in range(1, rounds + 1):
        left = len(image) - (len(image) - size) * done // rounds
        similarity = brute(image[rows], image[rows], norm)
        rows = np.sort(rows[np.argsort(-similarity, kind="stable")[:left]])
    assert len(rows) == size
    return rows


def scores(selection) -> np.ndarray:
    return selection.steps[-1].rows["score"]


@pytest.fixture
def target(tmp_path) -> Callable[..., str]:
    """Write target embeddings and return the file's name."""

    def write(rows: np.ndarray, name: str = "target.npy") -> str:
        np.save(tmp_path / name, rows)
        return str(tmp_path / name)

    return write


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_it_is_the_definition(pool, rows, select, target, monkeypatch, norm, dtype) -> None:
    monkeypatch.setattr("thresher.pool.store._CHUNK", 10)
    rng = np.random.default_rng(0)
    image = rows(211, seed=1) * rng.uniform(0.1, 20, (211, 1)).astype(np.float32)  # need not be units
    wanted = (rows(37, seed=1, spread=1.0) * rng.uniform(0.1, 20, (37, 1))).astype(dtype)
    found = select(pool(image), build("normsim", {"keep": 60, "norm": norm, "target": target(wanted)}))
    expected = brute(image, wanted, norm)
    np.testing.assert_allclose(scores(found), expected, atol=1e-6)
    assert found.rows().tolist() == sorted(np.argsort(-expected, kind="stable")[:60])
    assert found.steps[0].notes == (f"target: 37 rows of {target(wanted)}",)


def test_the_images_near_the_target_stay(pool, rows, select, target) -> None:
    """The property: from five groups, those that the target has examples of."""
    image = rows(500, groups=5, spread=0.3)
    wanted = rows(10, groups=5, spread=0.3)[[1, 3]]  # the same two of the same centres
    found = select(pool(image), build("normsim", {"keep": "40%", "target": target(wanted)}))
    assert set((found.rows() % 5).tolist()) == {1, 3}


@pytest.mark.parametrize("norm", ["rms", pytest.param("mean", marks=pytest.mark.slow), None])
@pytest.mark.parametrize(("size", "rounds"), [(0.1, 7), (0.5, 1), (0.3, 400), (0.001, 5), (1.0, 3)])
def test_without_a_target_it_is_the_pools_own_best_subset(pool, rows, select, norm, size, rounds) -> None:
    image = rows(151, spread=1.5) + np.float32([0.3, *[0] * 7])
    step = {"keep": 50, "target_share": size, "rounds": rounds, **({"norm": norm} if norm else {})}
    found = select(pool(image), build("normsim", step))
    subset = own_subset(image, max(round(size * 151), 1), rounds, norm or "rms")
    np.testing.assert_allclose(scores(found), brute(image, image[subset], norm or "rms"), atol=2e-6)
    assert found.steps[0].notes == (f"target: the pool's own best {len(subset):,} of 151 rows, in {rounds} rounds",)


def test_the_own_subset_is_where_most_rows_are_alike(pool, rows, select) -> None:
    """Two thirds are of one kind; what is left of the others after the first rounds counts for nothing."""
    image = np.concatenate([rows(200, groups=1, spread=0.5), rows(100, groups=20, spread=0.5, seed=3)])
    found = select(pool(image), build("normsim", {"keep": "50%"}))
    assert (found.rows() < 200).mean() > 0.95


def test_a_single_row_and_rows_that_repeat(pool, rows, select, target) -> None:
    alone = pool(rows(1), name="alone")
    assert scores(select(alone, build("normsim", {"keep": 1}))) == pytest.approx([1], abs=1e-6)
    near = target(np.stack([rows(1)[0], -rows(1)[0]]))
    assert scores(select(alone, build("normsim", {"keep": 1, "target": near}))) == pytest.approx([1], abs=1e-6)
    image = np.tile(rows(40), (2, 1))
    twice = scores(select(pool(image), build("normsim", {"keep": 9})))
    np.testing.assert_allclose(twice[:40], twice[40:], atol=1e-6)


def test_after_an_earlier_step_only_its_rows_make_the_subset(pool, rows, select) -> None:
    image = rows(300)
    found = select(pool(image), build("random", {"keep": "40%"}), build("normsim", {"keep": "50%"}))
    given = image[found.given(1)]
    subset = own_subset(given, 24, 20, "rms")
    np.testing.assert_allclose(scores(found), brute(given, given[subset], "rms"), atol=2e-6)


@pytest.mark.parametrize(
    ("norm", "given"),
    [
        ("max", True),
        ("mean", False),
        *(
            pytest.param(norm, given, marks=pytest.mark.slow)
            for norm, given in (("rms", True), ("mean", True), ("rms", False))
        ),
    ],
)
def test_every_engine_gives_the_same_bytes(pool, rows, select, target, tmp_path, norm, given) -> None:
    image = rows(17_000, dim=16)
    step = {"keep": "30%", "norm": norm, **({"target": target(rows(50, dim=16))} if given else {"rounds": 3})}
    found = []
    for i, engine in enumerate([Serial(), Threads(3), Processes(2)]):
        store = pool(image, name=f"pool{i}", files=i + 1, parquet=i == 2)
        selection = select(store, build("normsim", step), engine=engine, cache=Cache.at(tmp_path / str(i)))
        found.append(scores(selection).tobytes())
    assert found[0] == found[1] == found[2]


def test_what_the_file_holds_counts_and_not_its_name(pool, rows, select, target) -> None:
    """All answers come from one cache."""
    store, a, b = pool(rows(60)), rows(9, seed=1), rows(9, seed=2)
    for norm in NORMS:
        one, other = ({"keep": 9, "norm": norm, "target": target(x, f"{i}.npy")} for i, x in enumerate((a, b)))
        first, second = (scores(select(store, build("normsim", step))) for step in (one, other))
        assert not np.allclose(first, second)
        target(b, "0.npy")
        assert scores(select(store, build("normsim", one))).tobytes() == second.tobytes()
        target(a * 4, "0.npy")
        assert scores(select(store, build("normsim", one))).tobytes() == first.tobytes()


def test_a_killed_search_goes_on_with_the_round_it_had_come_to(pool, rows, select, monkeypatch, tmp_path) -> None:
    store, step = pool(rows(200)), build("normsim", {"keep": 9, "rounds": 10})
    whole = select(store, step, cache=Cache.at(tmp_path / "whole"))
    inner = module._similar
    calls: list[int] = []

    def similar(stop: int) -> Any:
        def run(norm: str, moment: Any, store: Any, block: Any) -> Any:
            calls.append(len(store))
            if len(calls) == stop:
                raise KeyboardInterrupt
            return inner(norm, moment, store, block)

        return run

    cache = Cache(tmp_path / "resumed", flush_seconds=-1)
    monkeypatch.setattr(module, "_similar", similar(7))
    with pytest.raises(KeyboardInterrupt):
        select(store, step, cache=cache)
    assert calls == [200, 184, 168, 152, 136, 120, 104]
    calls.clear()
    monkeypatch.setattr(module, "_similar", similar(0))
    assert scores(select(store, step, cache=cache)).tobytes() == scores(whole).tobytes()
    assert calls == [104, 88, 72, 56, 200]
    calls.clear()
    select(store, build("normsim", {"keep": 20, "rounds": 10}), cache=cache)
    assert calls == []  # another budget costs the cut
    assert not list((tmp_path / "resumed").rglob("*.state.npz"))


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"norm": "max"}, "'max' needs a target"),
        ({"norm": "2"}, "allowed: max, rms, mean"),
        ({"target_share": 0.0}, "target_share = 0.0: must be above 0"),
        ({"target_share": 1.5}, "target_share = 1.5"),
        ({"rounds": 0}, "rounds = 0: must be from 1 to 10,000"),
        ({"threshold": 0.1}, "either keep"),
    ],
)
def test_parameters_that_make_no_sense(given, text) -> None:
    with pytest.raises(UsageError, match=text):
        build("normsim", {"keep": "50%", **given})


def test_what_is_for_the_own_subset_is_refused_with_a_target() -> None:
    for given in ({"rounds": 3}, {"target_share": 0.5}):
        with pytest.raises(UsageError, match="leave target out"):
            build("normsim", {"keep": "50%", "target": "t.npy", **given})


@pytest.mark.parametrize(
    ("wrong", "error", "text"),
    [
        (np.ones((3, 5)), UsageError, "target images of 5 dimensions for image embeddings of 8"),
        (np.ones((0, 8)), PoolError, "contains no target images"),
        (np.ones(8), PoolError, r"has shape \(8,\); save embeddings as \(rows, dimensions\)"),
        (np.ones((3, 8), np.int32), PoolError, "contains int32"),
        (np.eye(8)[[0, 1, 1]] * [[1], [1], [0]], PoolError, "row 2 of the target images is zero or not finite"),
        (np.where(np.eye(8) > 0, np.nan, 1.0), PoolError, "row 0 of the target images is zero or not finite"),
        (np.array([{"pickled": 1}], object), PoolError, "never read"),
        (b"embeddings", PoolError, "not a .npy file"),
        (b"", PoolError, "ends within its header"),
        (None, PoolError, "no such file"),
    ],
)
@pytest.mark.parametrize("norm", NORMS)
def test_a_target_that_is_none_is_refused_before_any_work(
    pool, rows, select, tmp_path, monkeypatch, norm, wrong, error, text
) -> None:
    path = tmp_path / "wrong.npy"
    if isinstance(wrong, bytes):
        path.write_bytes(wrong)
    elif wrong is not None:
        np.save(path, wrong, allow_pickle=True)
    monkeypatch.setattr(module, "_similar", None)
    monkeypatch.setattr(module, "_nearest", None)
    with pytest.raises(error, match=text) as told:
        select(pool(rows(4)), build("normsim", {"keep": "50%", "norm": norm, "target": str(path)}))
    assert str(path) in str(told.value)


def test_an_archive_is_no_target(pool, rows, select, tmp_path) -> None:
    np.savez(tmp_path / "target.npz", rows(4))
    with pytest.raises(PoolError, match=r"target.npz: cannot be read .it is not a .npy file"):
        select(pool(rows(4)), build("normsim", {"keep": "50%", "target": str(tmp_path / "target.npz")}))


def test_a_pool_without_images_is_refused(pool, rows, select) -> None:
    with pytest.raises(UsageError, match="has no image embeddings"):
        select(pool(None, rows(4)), build("normsim", {"keep": "50%"}))


@pytest.mark.parametrize("target", [False, True])
def test_few_wide_rows_need_no_square_matrix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: bool) -> None:
    """The same scores row by row as with second moments."""
    rows = np.random.default_rng(0).standard_normal((40, 64)).astype(np.float32)
    np.save(tmp_path / "image.npy", rows)
    np.save(tmp_path / "target.npy", rows[5:12] * 3)
    how = {"target": str(tmp_path / "target.npy"), "norm": "rms"} if target else {"rounds": 4}
    (tmp_path / "pool").mkdir()
    (tmp_path / "image.npy").rename(tmp_path / "pool" / "image.npy")
    store = replace(open_store(str(tmp_path / "pool"), scratch=str(tmp_path / "cache")), block=16)
    found = []
    for limit in (2**40, 0):
        monkeypatch.setattr(module, "_MOMENT", limit)
        selection = run_steps(
            store,
            [build("normsim", {"keep": "30%", **how})],
            engine=Serial(),
            cache=Cache.at(str(tmp_path / f"cache-{limit}")),
        )
        found.append(np.asarray(selection.steps[-1].rows["score"], np.float64))
    np.testing.assert_allclose(found[0], found[1], rtol=2e-6)
    if target:
        units = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        np.testing.assert_allclose(found[1], np.sqrt(np.mean((units @ units[5:12].T) ** 2, axis=1)), rtol=1e-5)


def test_65536_dimensions_take_little_memory(tmp_path: Path) -> None:
    (tmp_path / "pool").mkdir()
    np.save(tmp_path / "pool" / "image.npy", np.random.default_rng(0).standard_normal((12, 65_536)).astype(np.float32))
    words = ["select", "normsim", "pool", "-o", "sel", "--keep", "50%", "--cache", "cache", "--json"]
    done = subprocess.run([sys.executable, "-m", "thresher", *words], cwd=tmp_path, capture_output=True, check=True)
    assert json.loads(done.stdout)["peak_memory_bytes"] < 600e6
