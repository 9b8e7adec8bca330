from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

import thresher.groups as module
from thresher import Cache, Clustered, MissingExtraError, PoolError, Run, Selection, Serial, UsageError, build
from thresher.groups import automatic, read_labels, write_groups


class Counting:
    """A serial engine that counts calls, and stops after some."""

    workers = 1

    def __init__(self, stop_after: int | None = None) -> None:
        self.calls, self.stop_after = 0, stop_after

    def map(self, fn, tasks):
        return Serial().map(partial(self._call, fn), tasks)

    def _call(self, fn, task):
        if self.calls == self.stop_after:
            raise KeyboardInterrupt
        self.calls += 1
        return fn(task)


@pytest.fixture
def run(pool, rows, tmp_path):
    """Make a run over a pool of 600 rows, or of those marked."""
    store = pool(rows(600, dim=8, groups=12), rows(600, dim=4, groups=12, seed=1), files=3)

    def make(mask=None, engine=None, cache="cache", seed=0) -> Run:
        selection = Selection.everything(store.fingerprint(), "", {}, 600)
        if mask is not None:
            selection = replace(selection, dropped_by=np.where(mask, -1, 0).astype(np.int16))
        view = store if mask is None else store.where(mask)
        return Run(view, selection, engine or Serial(), Cache(tmp_path / cache, flush_seconds=-1), seed)

    return make


def bits(groups) -> tuple[bytes, ...]:
    return groups.labels_N.tobytes(), groups.distances_N.tobytes(), groups.centroids_KD.tobytes()


@pytest.fixture
def third() -> np.ndarray:
    return np.arange(600) % 3 != 1


@pytest.mark.parametrize("embedding", ["image", "text", "joint"])
def test_labels_and_distances_are_those_of_the_nearest_centroid(run, embedding) -> None:
    r = run()
    groups = Clustered(embedding=embedding, clusters=7).groups(r)
    units = [r.store.vectors(embedding, block) for block in r.store.blocks(embedding)]
    cosines = np.concatenate(units).astype(np.float64) @ groups.centroids_KD.T.astype(np.float64)
    assert groups.labels_N.tolist() == cosines.argmax(axis=1).tolist()
    np.testing.assert_allclose(groups.distances_N, 1 - cosines.max(axis=1), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(groups.centroids_KD, axis=1), 1, atol=1e-6)
    sizes = [groups.labels_N.tolist().count(j) for j in range(7)]
    assert groups.sizes_K.tolist() == sizes
    means = [groups.distances_N[groups.labels_N == j].mean() for j in range(7)]
    np.testing.assert_allclose(groups.d_intra_K, means, rtol=1e-5)


@pytest.mark.parametrize("rows", [1, 49, 600, 5_000, 10**6, 4 * 10**8, 10**12])
def test_a_number_of_clusters_is_chosen_with_a_reason(rows) -> None:
    k, why = automatic(rows)
    assert 1 <= k <= min(50_000, max(rows // 50, 1))
    assert f"{k:,} clusters chosen for {rows:,} rows" in why


def test_the_chosen_number_is_noted(run) -> None:
    groups = Clustered().groups(run())
    assert len(groups.centroids_KD) == automatic(600)[0] == 12
    assert "12 clusters chosen for 600 rows" in groups.notes[0]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"clusters": 601}, "601 clusters of 600 rows"),
        ({"embedding": "text", "clusters": 900}, "900 clusters"),
        ({"clusters": 20, "sample": "19"}, "at least as many rows as clusters"),
    ],
)
def test_what_this_pool_cannot_give(run, given, told) -> None:
    with pytest.raises(UsageError, match=told):
        Clustered(**given).groups(run())


def test_as_many_clusters_as_rows_and_one(run) -> None:
    assert len(np.unique(Clustered(clusters=600, iterations=1).groups(run()).labels_N)) > 590
    assert Clustered(clusters=1).groups(run()).labels_N.tolist() == [0] * 600


@pytest.mark.parametrize(
    "given", [{"clusters": 0}, {"iterations": -1}, {"sample": "0"}, {"sample": "most"}, {"sample": "-5"}]
)
def test_what_no_pool_could_give(given) -> None:
    with pytest.raises(UsageError, match=next(iter(given))):
        Clustered(**given)


def test_given_centroids_are_used_as_they_are(run, centroid_file, rows) -> None:
    centroids = rows(5, groups=5, seed=9)
    path = centroid_file(centroids * 7)
    groups = Clustered(centroids=path).groups(run())
    np.testing.assert_allclose(groups.centroids_KD, centroids, atol=1e-6)
    assert groups.notes == (f"centroids given: {path}",)
    assert bits(Clustered(centroids=path, clusters=5).groups(run())) == bits(groups)


@pytest.mark.parametrize(
    ("error", "told", "centroids", "given"),
    [
        (UsageError, "4 dimensions for image embeddings of 8", np.ones((3, 4)), {}),
        (UsageError, "8 dimensions for text embeddings of 4", np.ones((3, 8)), {"embedding": "text"}),
        (UsageError, "holds 3 centroids, but clusters = 2", np.ones((3, 8)), {"clusters": 2}),
        (PoolError, "row 1 of the centroids is zero or not finite", np.eye(3, 8) * [[1], [0], [1]], {}),
        (PoolError, "row 0 of the centroids is zero or not finite", np.full((2, 8), np.nan), {}),
        (PoolError, "centroids.npy", np.ones(8), {}),
        (PoolError, "centroids.npy", np.ones((0, 8)), {}),
        (PoolError, "centroids.npy", np.array([["a"] * 8]), {}),
    ],
)
def test_given_centroids_are_checked(run, centroid_file, error, told, centroids, given) -> None:
    with pytest.raises(error, match=told):
        Clustered(centroids=centroid_file(centroids), **given).groups(run())


def test_a_file_of_centroids_that_is_not_there(run, tmp_path) -> None:
    with pytest.raises(PoolError, match="nowhere.npy"):
        Clustered(centroids=str(tmp_path / "nowhere.npy")).groups(run())


def test_the_second_time_nothing_is_computed(run, third) -> None:
    for mask in (None, third):
        first, second = Counting(), Counting()
        one = Clustered(clusters=6).groups(run(mask, first))
        assert first.calls > 0
        assert bits(Clustered(clusters=6).groups(run(mask, second))) == bits(one)
        assert second.calls == 0


@pytest.mark.parametrize(
    "other", [{"clusters": 7}, {"iterations": 3}, {"embedding": "text"}, {"sample": "500"}, {"embedding": "joint"}]
)
def test_other_parameters_are_other_entries(run, other) -> None:
    base = Clustered(clusters=6, iterations=5).groups(run())
    found = Clustered(**{"clusters": 6, "iterations": 5, **other}).groups(run())
    assert bits(found)[2] != bits(base)[2]
    assert bits(found) == bits(Clustered(**{"clusters": 6, "iterations": 5, **other}).groups(run(cache="fresh")))


def test_another_seed_is_another_clustering(run) -> None:
    assert bits(Clustered(clusters=9).groups(run(seed=1))) != bits(Clustered(clusters=9).groups(run(seed=2)))


def test_a_changed_file_is_computed_anew(run, tmp_path, rows) -> None:
    before = Clustered(clusters=5).groups(run())
    np.save(tmp_path / "pool" / "image_0.npy", rows(200, dim=8, groups=12, seed=77))
    assert bits(Clustered(clusters=5).groups(run())) != bits(before)


def test_centroids_fitted_on_the_pool_are_shared_by_its_parts(run, third) -> None:
    whole = Clustered(clusters=6).groups(run())
    part = Clustered(clusters=6, fit="pool").groups(run(third))
    assert part.centroids_KD.tobytes() == whole.centroids_KD.tobytes()
    assert part.labels_N.tolist() == whole.labels_N[third].tolist()
    own = Clustered(clusters=6, fit="given").groups(run(third))
    assert own.centroids_KD.tobytes() != whole.centroids_KD.tobytes()


def test_labels_of_the_whole_pool_serve_its_parts_without_computing(run, third) -> None:
    whole = Clustered(clusters=6).groups(run())
    counting = Counting()
    part = Clustered(clusters=6, fit="pool").groups(run(third, counting))
    assert counting.calls == 0
    assert part.labels_N.tolist() == whole.labels_N[third].tolist()
    assert part.distances_N.tobytes() == np.ascontiguousarray(whole.distances_N[third]).tobytes()


@pytest.mark.parametrize("k", [6, 37])
def test_what_is_in_the_cache_changes_no_bit_of_a_part(run, third, k) -> None:
    """A row's product may differ in its last bit by its place in the product."""
    shared = Clustered(clusters=k, fit="pool")
    cold = bits(shared.groups(run(third, cache="cold")))
    shared.groups(run(cache="warm"))
    assert bits(shared.groups(run(third, cache="warm"))) == cold


@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize("stop_after", [1, 3, 7, 10])
def test_an_interrupted_run_goes_on_to_the_same_bytes(run, monkeypatch, held, stop_after) -> None:
    if not held:
        monkeypatch.setattr(module, "_IN_MEMORY", 0)
    how = Clustered(clusters=9, iterations=10)
    undisturbed = how.groups(run(cache="fresh"))
    with pytest.raises(KeyboardInterrupt):
        how.groups(run(engine=Counting(stop_after)))
    second = Counting()
    assert bits(how.groups(run(engine=second))) == bits(undisturbed)
    assert second.calls <= 13 - stop_after  # an iteration is one call here, as are reading (twice) and labelling


def test_the_first_half_may_see_a_sample_only(run, monkeypatch) -> None:
    plain = Clustered(clusters=6, sample="all").groups(run(cache="plain"))
    monkeypatch.setattr(module, "_WARM_ROWS", 20)
    how = Clustered(clusters=6, sample="all")
    warm = how.groups(run(cache="warm"))
    assert warm.notes == ("the first 10 k-means iterations see 120 rows, the others all",)
    assert plain.notes == ()
    assert bits(warm)[2] != bits(plain)[2]
    assert warm.distances_N.mean() < 1.1 * plain.distances_N.mean()
    with pytest.raises(KeyboardInterrupt):
        how.groups(run(engine=Counting(15), cache="killed"))
    assert bits(how.groups(run(cache="killed"))) == bits(warm)


def test_rows_in_memory_or_streamed_are_the_same(run, monkeypatch, third) -> None:
    for mask in (None, third):
        held = Clustered(clusters=9).groups(run(mask, cache="held"))
        monkeypatch.setattr(module, "_IN_MEMORY", 0)
        assert bits(Clustered(clusters=9).groups(run(mask, cache="streamed"))) == bits(held)
        monkeypatch.undo()


def test_nothing_unfinished_is_left_in_the_cache(run, tmp_path) -> None:
    Clustered(clusters=9).groups(run())
    names = sorted(path.name.split("-")[0] for path in (tmp_path / "cache" / "arrays").iterdir())
    assert names == ["assign.distances", "assign.labels", "kmeans"]


def test_a_sample_is_drawn_and_noted(run) -> None:
    groups = Clustered(clusters=4, sample="100").groups(run())
    assert groups.notes == ("k-means trained on 100 of 600 rows; say sample = all for every row",)
    assert len(groups.labels_N) == 600
    everything = Clustered(clusters=4, sample="all").groups(run())
    assert everything.notes == ()
    assert bits(Clustered(clusters=4, sample="10000").groups(run())) == bits(everything)
    assert bits(groups)[2] != bits(everything)[2]


def test_bfloat16_without_torch_says_what_to_type(run, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'thresher\[torch\]'"):
        Clustered(clusters=3, precision="bfloat16").groups(run())
    auto = Clustered(clusters=3, precision="auto").groups(run())
    assert bits(auto) == bits(Clustered(clusters=3).groups(run(cache="fresh")))


def test_a_clustering_is_written_and_its_labels_read_back(run, tmp_path) -> None:
    groups = Clustered(clusters=4).groups(run())
    folder = write_groups(groups, tmp_path / "out", {"seed": 0})
    assert read_labels(folder).tolist() == groups.labels_N.tolist()
    assert np.load(folder / "centroids.npy").tolist() == groups.centroids_KD.tolist()
    again = Clustered(centroids=str(folder / "centroids.npy")).groups(run())
    assert again.labels_N.tolist() == groups.labels_N.tolist()
    for array in (np.zeros(3), np.zeros((3, 1), int)):
        np.save(folder / "labels.npy", array)
        with pytest.raises(PoolError, match="labels"):
            read_labels(folder)
    with pytest.raises(PoolError, match="labels"):
        read_labels(tmp_path)


def test_steps_on_the_same_rows_share_a_clustering(pool, rows, tmp_path, select) -> None:
    store = pool(rows(500), files=2)
    first, second, third_step = Counting(), Counting(), Counting()
    cache = Cache.at(tmp_path / "shared")
    select(store, build("density", {"keep": "50%", "clusters": 5}), engine=first, cache=cache)
    select(store, build("ssp", {"keep": "20%", "clusters": 5}), engine=second, cache=cache)
    assert second.calls == 0
    select(store, build("density", {"keep": "10%", "clusters": 5}), engine=third_step, cache=cache)
    assert third_step.calls == 1  # only d_inter, of 5 centroids


def test_centroids_in_bfloat16_are_read_as_what_they_are(run, tmp_path) -> None:
    rows = np.random.default_rng(0).normal(size=(7, 8)).astype(np.float32)
    bits = (rows.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    plain, coded = tmp_path / "c.npy", tmp_path / "c.bf16.npy"
    dim = run().store.dim("image")
    bits = np.resize(bits, (7, dim)).astype(np.float32)
    np.save(plain, bits)
    np.save(coded, (bits.view(np.uint32) >> 16).astype(np.uint16))
    first, second = (Clustered(centroids=str(path)).groups(run()) for path in (plain, coded))
    np.testing.assert_array_equal(first.labels_N, second.labels_N)
    np.testing.assert_array_equal(first.distances_N, second.distances_N)
