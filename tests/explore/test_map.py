"""A map is deterministic, near rows stay near, and memory and files are bounded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from thresher import Cache, EmbeddingStore, Processes, UsageError, from_arrays, open_store
from thresher.explore import map as maps
from thresher.explore.map import map_of, principal, sample_rows
from thresher.testing.pools import clustered


def blobs(n: int = 300, k: int = 5, dim: int = 16, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, k, n)
    return (rng.standard_normal((k, dim))[labels] + 0.15 * rng.standard_normal((n, dim))).astype("f4"), labels


def apart(found: maps.PoolMap, labels: np.ndarray) -> float:
    """Share of rows whose nearest other row on the map has the same label."""
    xy = np.stack([found.x, found.y], axis=1).astype("f8")
    distances = ((xy[:, None] - xy[None]) ** 2).sum(axis=2)
    np.fill_diagonal(distances, np.inf)
    return float((labels[distances.argmin(axis=1)] == labels).mean())


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache.at(tmp_path / "cache")


def test_principal_components_are_those_of_the_covariance() -> None:
    rng = np.random.default_rng(0)
    rows = (rng.standard_normal((500, 20)) * np.geomspace(5, 0.5, 20)).astype("f4")
    rows[3] = np.nan
    basis, mean = principal(rows, 4)
    good = np.delete(rows, 3, axis=0).astype("f8")
    _, vectors = np.linalg.eigh(np.cov(good.T))
    assert mean == pytest.approx(good.mean(axis=0), abs=1e-5)
    assert np.abs((basis.T @ vectors[:, ::-1][:, :4]).diagonal()) == pytest.approx(1, abs=1e-3)
    assert basis.T @ basis == pytest.approx(np.eye(4), abs=1e-5)
    assert (basis[np.abs(basis).argmax(axis=0), range(4)] > 0).all()


@pytest.mark.parametrize("method", ["t-SNE", "PCA"])
def test_near_rows_stay_near_and_others_are_placed_beside_them(
    method: str, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    if method == "PCA":
        monkeypatch.setattr(maps, "installed", lambda _: False)
    vectors, labels = blobs(k=3)
    store = from_arrays(vectors)
    found = map_of(store, cache, sample=120)
    assert found.method == method
    assert len(found.x) == 300
    assert apart(found, labels) > 0.97
    assert max(np.abs(found.x).max(), np.abs(found.y).max()) < 1.2
    assert ("pip install" in found.note) == (method == "PCA")
    # Every row is beside its nearest row of the sample.
    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    nearest = found.sample[(units @ units[found.sample].T).argmax(axis=1)]
    steps = np.hypot(found.x - found.x[nearest], found.y - found.y[nearest])
    assert np.median(steps) < 0.05


def test_a_map_is_the_same_every_time_with_any_engine_and_cut_of_files(tmp_path: Path) -> None:
    from tests.pools import make, write_npy

    one = make(400)
    found = []
    for i, (cuts, engine) in enumerate([([], None), ([100, 250], None), ([], Processes(2))]):
        store = open_store(write_npy(tmp_path / str(i), one, cuts))
        found.append(map_of(store, Cache.at(tmp_path / f"cache{i}"), sample=100, engine=engine))
    for other in found[1:]:
        assert (np.asarray(other.x) == found[0].x).all()
        assert (np.asarray(other.y) == found[0].y).all()


@pytest.mark.parametrize("kind", ["datacomp", "clip_retrieval", "parquet"])
def test_every_layout_gives_the_same_map_and_names(kind: str, tmp_path: Path) -> None:
    from tests import pools
    from thresher.explore.names import cluster_names

    one = pools.make(120)
    plain = open_store(pools.write_npy(tmp_path / "npy", one))
    other = open_store(getattr(pools, f"write_{kind}")(tmp_path / kind, one, [50]))
    a, b = (map_of(store, Cache.at(tmp_path / f"cache{i}"), sample=60) for i, store in enumerate((plain, other)))
    assert (np.asarray(a.x) == b.x).all()
    labels = np.arange(120) % 5
    assert (cluster_names(plain, labels).row_K == cluster_names(other, labels).row_K).all()


def test_the_second_map_comes_from_the_cache(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    store = from_arrays(blobs()[0])
    first = map_of(store, cache, sample=100)
    monkeypatch.setattr(maps, "_laid_out", lambda *_: pytest.fail("laid out again"))
    monkeypatch.setattr(maps, "_placed_block", lambda *_: pytest.fail("placed again"))
    again = map_of(store, cache, sample=100)
    assert (np.asarray(first.x) == again.x).all()
    with pytest.raises(pytest.fail.Exception, match="again"):
        map_of(store, cache, sample=100, seed=1)


def test_some_rows_are_where_the_whole_map_has_them(cache: Cache) -> None:
    store = from_arrays(blobs()[0])
    rows = np.array([0, 5, 6, 250])
    some, whole = map_of(store, cache, rows=rows, sample=100), map_of(store, cache, sample=100)
    assert some.x == pytest.approx(whole.x[rows], abs=1e-4)
    assert some.y == pytest.approx(whole.y[rows], abs=1e-4)
    assert some.rows is rows


def test_bad_rows_have_no_position(cache: Cache) -> None:
    vectors = blobs()[0]
    vectors[7] = 0
    vectors[8, 2] = np.nan
    for sample in (100, 1_000):
        found = map_of(from_arrays(vectors), cache, sample=sample)
        assert np.flatnonzero(np.isnan(found.x)).tolist() == [7, 8]
        assert np.flatnonzero(np.isnan(found.y)).tolist() == [7, 8]


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 9])
def test_tiny_pools_and_equal_rows(rows: int, cache: Cache) -> None:
    for vectors in (np.ones((rows, 3), "f4"), np.eye(rows, 12, dtype="f4"), np.ones((rows, 1), "f4")):
        found = map_of(from_arrays(vectors), cache)
        assert np.isfinite(found.x).all()
        assert np.isfinite(found.y).all()


def test_every_cluster_is_in_the_sample() -> None:
    labels = np.repeat(np.arange(40), np.r_[np.full(39, 3), 5_000])
    rows = sample_rows(len(labels), 200, labels, 0)
    assert len(rows) == 200
    assert set(labels[rows]) == set(range(40))
    assert (np.diff(rows) > 0).all()
    labels[::2] = -1
    assert (labels[sample_rows(len(labels), 200, labels, 0)] >= 0).all()
    assert len(sample_rows(1_000, 30, np.arange(1_000), 0)) == 30  # more clusters than rows: random ones
    assert (sample_rows(1_000, 30, None, 0) == sample_rows(1_000, 30, None, 0)).all()


def test_joint_embeddings_and_wrong_requests(cache: Cache) -> None:
    vectors = clustered(200)
    store: EmbeddingStore = from_arrays(vectors, vectors[::-1])
    found = map_of(store, cache, embedding="joint", sample=50)
    assert np.isfinite(found.x).all()
    with pytest.raises(UsageError, match="has no sound embeddings"):
        map_of(store, cache, embedding="sound")
    with pytest.raises(UsageError, match="must be at least 1"):
        map_of(store, cache, sample=0)


def test_large_samples_are_interpolated(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maps, "_FEW", 50)
    monkeypatch.setattr(maps, "_EARLY", 40)
    monkeypatch.setattr(maps, "_LATE", 60)
    vectors, labels = blobs(k=3)
    assert apart(map_of(from_arrays(vectors), cache), labels) > 0.9
