from __future__ import annotations

import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import clustered, write_pool
from thresher import (
    Cache,
    Clustered,
    MissingExtraError,
    PoolError,
    Run,
    Selection,
    Serial,
    Threads,
    UsageError,
    build,
    open_store,
    run_steps,
)
from thresher.cli.main import main
from thresher.pruning import clusters as module
from thresher.pruning.clusters import automatic, grow, read_groups, read_labels, write_groups
from thresher.runtime.engine import SumTree
from thresher.runtime.format import counted
from thresher.runtime.process import one_blas_thread


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


class Adding(Counting):
    """A serial engine that adds up sums where its tasks run, and notes how many groups arrive with each task."""

    def __init__(self) -> None:
        super().__init__()
        self.with_tasks, self.at_the_end = [], []

    def reduce(self, fn, tasks, add):
        tree = SumTree(lambda part: part, add, lambda part: part)
        for kept, part in self.map(fn, tasks):
            tree.push(part)
            self.with_tasks.append(len(kept.groups_J))
            yield kept
        total = tree.total()
        self.at_the_end.append(len(total.groups_J))
        return total


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
    assert f"{counted(k, 'cluster')} chosen for {counted(rows, 'row')}" in why


def test_the_chosen_number_is_noted(run) -> None:
    groups = Clustered().groups(run())
    assert len(groups.centroids_KD) == automatic(600)[0] == 12
    assert "12 clusters chosen for 600 rows" in groups.notes[0]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"clusters": 601}, "601 clusters from 600 rows"),
        ({"embedding": "text", "clusters": 900}, "900 clusters"),
        ({"clusters": 20, "sample": "19"}, "at least the number of clusters"),
    ],
)
def test_what_this_pool_cannot_give(run, given, told) -> None:
    with pytest.raises(UsageError, match=told):
        Clustered(**given).groups(run())


class Comparing(Clustered):
    """Parameters of a method that compares the rows of each cluster."""

    compares = True


def test_of_many_rows_clusters_are_of_one_size() -> None:
    """Methods that compare rows have a tree then, unless the user says what to do."""
    how = Comparing()
    assert how.tree_for(10**6) == (0, 0)
    assert how.tree_for(10**7) == (7_072, 84)
    assert how.tree_for(10**8) == how.tree_for(10**10) == (50_000, 224)
    for rows in (10**6 + 1, 3 * 10**6, 10**7, 7 * 10**7):
        clusters, coarse = how.tree_for(rows)
        assert 1_400 < rows / clusters < 1_420
        assert coarse + 4 * clusters / coarse < 1_200  # products of a row
    assert Clustered().tree_for(10**8) == (0, 0)
    for given in ({"clusters": 500}, {"centroids": "c.npy"}, {"sample": "all"}, {"sample": "100000"}):
        assert Comparing(**given).tree_for(10**8) == (0, 0)


@pytest.fixture
def small_trees(monkeypatch) -> None:
    """Of 100 rows, 30 a cluster, with few training rows."""
    for name, value in (("_TREE_FROM", 100), ("_TREE_EACH", 30), ("_TREE_SAMPLE", 16), ("_TREE_TASK", 90)):
        monkeypatch.setattr(module, name, value)


@pytest.mark.parametrize(
    ("embedding", "every"),
    [("joint", 5), *(pytest.param(name, 1, marks=pytest.mark.slow) for name in ("image", "joint"))],
)
def test_a_tree_is_the_same_for_all_engines_and_after_every_kill(run, small_trees, third, embedding, every) -> None:
    how = Comparing(embedding=embedding)
    groups = how.groups(run(cache="fresh"))
    assert "20 clusters chosen for 600 rows" in groups.notes[0]
    assert groups.centroids_KD.shape == (20, 8 if embedding == "image" else 12)
    np.testing.assert_allclose(np.linalg.norm(groups.centroids_KD, axis=1), 1, atol=1e-6)
    assert np.count_nonzero(groups.sizes_K) >= 18
    flat = Clustered(embedding=embedding, clusters=20).groups(run(cache="flat"))
    assert groups.distances_N.mean() < 1.2 * flat.distances_N.mean()
    with one_blas_thread:
        vectors = np.concatenate([run().store.vectors(embedding, b) for b in run().store.blocks(embedding)])
    own = np.einsum("ij,ij->i", vectors, groups.centroids_KD[groups.labels_N])
    np.testing.assert_allclose(groups.distances_N, 1 - own, atol=1e-6)
    assert bits(how.groups(run(engine=Threads(3), cache="threads"))) == bits(groups)
    counting = Counting()
    assert bits(how.groups(run(engine=counting, cache="counted"))) == bits(groups)
    assert bits(how.groups(run(engine=Counting(0), cache="counted"))) == bits(groups)  # all from the cache
    for stop in range(0, counting.calls, every):
        with pytest.raises(KeyboardInterrupt):
            how.groups(run(engine=Counting(stop), cache=f"killed-{stop}"))
        left = Counting()
        assert bits(how.groups(run(engine=left, cache=f"killed-{stop}"))) == bits(groups)
        assert left.calls <= counting.calls - stop + 2
    part = how.groups(run(third))
    assert len(part.labels_N) == 400
    assert len(part.centroids_KD) == 13


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
        (UsageError, "has 3 centroids, but clusters = 2", np.ones((3, 8)), {"clusters": 2}),
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
    assert not run().store.changed()
    np.save(tmp_path / "pool" / "image_0.npy", rows(200, dim=8, groups=12, seed=77))
    assert run().store.changed()  # the store goes by its files as they were when it was opened
    now = replace(run(), store=open_store(str(tmp_path / "pool")))
    assert bits(Clustered(clusters=5).groups(now)) != bits(before)


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
    assert warm.notes == ("the first 10 k-means iterations use 120 rows, the others all",)
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


@pytest.mark.parametrize("held", [True, False])
def test_an_iteration_sends_one_sum_to_the_driver_however_many_tasks_it_has(run, monkeypatch, held) -> None:
    """20 tasks of 31 rows, of which 16 are added up before the others; every engine has the same bits."""
    if not held:
        monkeypatch.setattr(module, "_IN_MEMORY", 0)
    how = Clustered(clusters=9, iterations=8)

    def made(engine, cache):
        whole = run(engine=engine, cache=cache)
        return how.groups(replace(whole, store=replace(whole.store, block=31)))

    adding = Adding()
    expected = bits(made(Serial(), "serial"))
    assert bits(made(adding, "adding")) == expected
    assert len(adding.with_tasks) == 20 * len(adding.at_the_end)
    assert set(adding.with_tasks) == {0}
    assert 2 <= len(adding.at_the_end) <= 8
    assert adding.at_the_end[0] == 9
    for workers in (1, 2, 3, 8):
        assert bits(made(Threads(workers), f"threads-{workers}")) == expected


def test_rows_are_not_sent_to_workers_that_can_read_them(run) -> None:
    """In every iteration: blocks and bounds are sent, rows only within one process."""
    sent = {True: [], False: []}

    class Watching(Counting):
        def map(self, fn, tasks):
            sent[self.shares_memory].extend(tasks := list(tasks))
            return super().map(fn, tasks)

    made = {}
    for shared in sent:
        engine = Watching()
        engine.shares_memory = shared
        made[shared] = bits(Clustered(clusters=9).groups(run(engine=engine, cache=str(shared))))
    assert made[True] == made[False]
    arrays = {shared: sum(isinstance(task, tuple) and isinstance(task[0], np.ndarray) for task in sent[shared])
              for shared in sent}  # fmt: skip
    assert arrays[True] > 0
    assert arrays[False] == 0


def test_nothing_unfinished_is_left_in_the_cache(run, tmp_path) -> None:
    Clustered(clusters=9).groups(run())
    names = sorted(path.name.split("-")[0] for path in (tmp_path / "cache" / "arrays").iterdir())
    assert names == ["assign.distances", "assign.labels", "kmeans"]


def test_a_sample_is_drawn_and_noted(run) -> None:
    groups = Clustered(clusters=4, sample="100").groups(run())
    assert groups.notes == ("k-means trained on 100 of 600 rows; use sample = all for all rows",)
    assert len(groups.labels_N) == 600
    everything = Clustered(clusters=4, sample="all").groups(run())
    assert everything.notes == ()
    assert bits(Clustered(clusters=4, sample="10000").groups(run())) == bits(everything)
    assert bits(groups)[2] != bits(everything)[2]


def test_bfloat16_without_torch_says_what_to_type(run, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingExtraError, match=r"pip install '\.\[torch\]'"):
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


def test_unit_centroids_stay_as_they_are_to_the_last_bit(run, tmp_path) -> None:
    groups = Clustered(clusters=9).groups(run())
    folder = write_groups(groups, tmp_path / "out", {})
    again = Clustered(centroids=str(folder / "centroids.npy")).groups(run())
    assert bits(again) == bits(groups)


# --- a pool that grew -------------------------------------------------------------------------------

OLD, NEW = 17_900, 33_500  # rows before and after: in the second and the third block


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    found = clustered(NEW, dim=8, groups=30, spread=0.9)
    found[OLD:] += 0.3  # what comes later is a little different
    return found.astype(np.float16)


@pytest.fixture(scope="module")
def grown_pool(vectors, tmp_path_factory) -> Path:
    """A folder with ``old`` and ``new``, the same pool before and after it grew, and ``clusters`` of the old one."""
    folder = tmp_path_factory.mktemp("grown")
    write_pool(folder / "old", vectors[:OLD], vectors[:OLD, :4].copy(), files=3)
    write_pool(folder / "new", vectors, vectors[:, :4].copy(), files=7)
    words = ["cluster", str(folder / "old"), "-o", str(folder / "clusters"), "--clusters", "13", "--iterations", "4"]
    assert main([*words, "--cache", str(folder / "cache-old"), "--quiet"]) == 0
    return folder


def on(store, cache: Path, engine=None) -> Run:
    start = Selection.everything("", "", {}, store.total)
    return Run(store, start, engine or Serial(), Cache(cache, flush_seconds=-1))


def assigned(folder: Path, cache: Path):
    """The slow way: every row to the old centroids."""
    how = Clustered(centroids=str(folder / "clusters" / "centroids.npy"))
    return how.groups(on(open_store(str(folder / "new")), cache))


@pytest.mark.parametrize("kernels", [True, False])
def test_a_grown_clustering_is_that_of_assigning_all_rows_bit_for_bit(grown_pool, tmp_path, kernels) -> None:
    old = read_groups(grown_pool / "clusters")
    if not kernels:  # made by a version that did not say, or on another machine
        old = replace(old, info={name: value for name, value in old.info.items() if name != "kernels"})
    counting = Counting()
    store = open_store(str(grown_pool / "new"))
    groups = grow(on(store, tmp_path / "cache", counting), old)
    assert bits(groups) == bits(assigned(grown_pool, tmp_path / "fresh"))
    assert counting.calls == 2  # the block in which the new rows begin, and the last; not the first
    before, after = (1 - part.mean(dtype=np.float64) for part in (groups.distances_N[:OLD], groups.distances_N[OLD:]))
    assert groups.notes == (
        f"centroids, and labels of 17,900 rows, kept from {grown_pool / 'clusters'}",
        f"mean cosine to the centroid: {after:.4f} for 15,600 new rows, {before:.4f} for the others",
    )
    # Methods that are given the centroids find the labels, where it is certain that they are the same bits.
    later = Counting()
    how = Clustered(centroids=str(grown_pool / "clusters" / "centroids.npy"))
    assert bits(how.groups(on(store, tmp_path / "cache", later))) == bits(groups)
    assert (later.calls == 0) == kernels


def test_old_vectors_are_not_read_but_for_the_check(grown_pool, tmp_path, monkeypatch) -> None:
    store = open_store(str(grown_pool / "new"))
    read: list[int] = []
    whole = type(store).raw

    def raw(self, name, block):
        read.append(block.lo)
        return whole(self, name, block)

    monkeypatch.setattr(type(store), "raw", raw)
    grow(on(store, tmp_path / "cache"), read_groups(grown_pool / "clusters"))
    assert read == [16_384, 32_768]


def test_an_interrupted_growth_goes_on_and_a_pool_that_did_not_grow_needs_nothing(grown_pool, tmp_path) -> None:
    old, store = read_groups(grown_pool / "clusters"), open_store(str(grown_pool / "new"))
    with pytest.raises(KeyboardInterrupt):
        grow(on(store, tmp_path / "cache", Counting(1)), old)
    second = Counting()
    found = grow(on(store, tmp_path / "cache", second), old)
    assert second.calls == 1
    assert bits(found) == bits(assigned(grown_pool, tmp_path / "fresh"))
    third = Counting()
    same = grow(on(open_store(str(grown_pool / "old")), tmp_path / "cache", third), old)
    assert (third.calls, len(same.notes)) == (0, 1)
    assert same.labels_N.tolist() == old.labels_N.tolist()
    assert same.distances_N.tobytes() == np.asarray(old.distances_N).tobytes()


def test_a_clustering_of_other_rows_is_refused(grown_pool, vectors, tmp_path) -> None:
    old = read_groups(grown_pool / "clusters")
    swapped = np.concatenate([vectors[5_000:10_000], vectors[:5_000], vectors[10_000:]])
    part = vectors.copy()
    part[3_000:3_300] = vectors[20_000:20_300]
    for name, rows, text in [
        ("swapped", swapped, "not a clustering of the first 17,900 rows"),
        ("part", part, "not a clustering of the first 17,900 rows"),
        ("fewer", vectors[:100], "of 17,900 rows, but .* has only 100"),
        ("narrow", vectors[:, :5], "of 8 dimensions, but the image embeddings have 5"),
    ]:
        store = write_pool(tmp_path / name, np.ascontiguousarray(rows))
        with pytest.raises(UsageError, match=text):
            grow(on(store, tmp_path / "cache"), old)
    labels = np.array(old.labels_N)
    labels[7_000:12_000] = (labels[7_000:12_000] + 1) % 13
    with pytest.raises(UsageError, match="not a clustering of the first"):
        grow(on(open_store(str(grown_pool / "new")), tmp_path / "cache"), replace(old, labels_N=labels))
    with pytest.raises(UsageError, match="no text embeddings"):
        grow(on(open_store(str(tmp_path / "part")), tmp_path / "cache"), replace(old, info={"embedding": "text"}))


def test_rows_set_aside_stay_so(tmp_path, capsys) -> None:
    rows = clustered(900, dim=8).astype(np.float32)
    rows[[17, 720]] = np.nan
    for name, n in (("old", 600), ("new", 900)):
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "image.npy", rows[:n])
    cluster = partial(_cluster, tmp_path)
    assert cluster("old", "--clusters", "5", "--skip-bad") == 0
    assert cluster("new", "--grow", str(tmp_path / "of-old"), "--skip-bad") == 0
    found = read_groups(tmp_path / "of-new")
    assert np.flatnonzero(found.labels_N < 0).tolist() == [17, 720]
    rows[17] = 1  # mended since
    np.save(tmp_path / "new" / "image.npy", rows)
    assert cluster("new", "--grow", str(tmp_path / "of-old"), "--skip-bad", "--overwrite") == 2
    assert "the same --skip-bad and --key" in capsys.readouterr().err


def _cluster(folder: Path, pool: str, *words: str) -> int:
    return main(["cluster", str(folder / pool), "-o", str(folder / f"of-{pool}"), *words])


def test_the_command_grows_a_folder_in_place_and_select_takes_it(grown_pool, tmp_path, capsys) -> None:
    pool, out = str(grown_pool / "new"), tmp_path / "clusters"
    places = ["--cache", str(tmp_path / "cache")]
    assert main(["cluster", pool, "-o", str(out), "--grow", str(grown_pool / "clusters"), *places]) == 0
    told, err = capsys.readouterr()
    assert "kept from" in told
    assert "mean cosine to the centroid" in told
    header = json.loads((out / "cluster.json").read_text())
    assert (header["rows"], header["clusters"], header["iterations"], header["grown"]) == (NEW, 13, 4, OLD)
    groups = assigned(grown_pool, tmp_path / "fresh")
    arrays = [np.load(out / f"{name}.npy") for name in ("labels", "distances", "centroids")]
    assert tuple(array.tobytes() for array in arrays) == bits(groups)
    # Once more, onto itself: nothing is new.
    assert main(["cluster", pool, "-o", str(out), "--grow", str(out), "--overwrite", *places]) == 0
    assert [np.load(out / f"{name}.npy").tobytes() for name in ("labels", "distances", "centroids")] == list(
        bits(groups)
    )
    # A method with these centroids assigns nothing.
    counting = Counting()
    step = build("ssp", {"keep": "20%", "centroids": str(out / "centroids.npy")})
    run_steps(open_store(pool), [step], engine=counting, cache=Cache.at(tmp_path / "cache"))
    assert counting.calls == 0
    for given in (["--clusters", "13"], ["--embedding", "image"], ["--seed", "0"], ["--sample", "all"]):
        words = ["cluster", pool, "-o", str(tmp_path / "x"), "--grow", str(out), *given]
        assert main([*words, *places]) == 2
        assert f"remove {given[0]}" in capsys.readouterr().err


def test_a_text_clustering_grows_by_text(grown_pool, tmp_path) -> None:
    for pool, words in (
        ("old", ["--embedding", "text", "--clusters", "5"]),
        ("new", ["--grow", str(tmp_path / "old")]),
    ):
        out = ["-o", str(tmp_path / pool), "--cache", str(tmp_path / "cache"), "--quiet"]
        assert main(["cluster", str(grown_pool / pool), *out, *words]) == 0
    store = open_store(str(grown_pool / "new"))
    how = Clustered(centroids=str(tmp_path / "old" / "centroids.npy"), embedding="text")
    expected = how.groups(on(store, tmp_path / "fresh"))
    found = read_groups(tmp_path / "new")
    assert found.embedding == "text"
    assert np.asarray(found.labels_N).tobytes() == expected.labels_N.tobytes()


@pytest.mark.parametrize(
    "damage", ["no distances", "other rows", "label beyond", "json", "header", "finite", "nan centroid"]
)
def test_a_damaged_folder_is_refused(run, tmp_path, damage) -> None:
    folder = write_groups(Clustered(clusters=4).groups(run()), tmp_path / "out", {})
    assert len(read_groups(folder).labels_N) == 600
    labels, distances, centroids = (np.load(folder / f"{name}.npy") for name in ("labels", "distances", "centroids"))
    if damage == "no distances":
        (folder / "distances.npy").unlink()
    elif damage == "other rows":
        np.save(folder / "distances.npy", distances[:-1])
    elif damage == "label beyond":
        labels[3] = 4
        np.save(folder / "labels.npy", labels)
    elif damage == "json":
        (folder / "cluster.json").write_text("{")
    elif damage == "header":
        (folder / "cluster.json").write_text("[]")
    elif damage == "finite":
        distances[3] = np.nan
        np.save(folder / "distances.npy", distances)
    else:
        centroids[1, 0] = np.nan
        np.save(folder / "centroids.npy", centroids)
    with pytest.raises(PoolError, match="out"):
        read_groups(folder)
