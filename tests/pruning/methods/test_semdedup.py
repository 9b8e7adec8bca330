from __future__ import annotations

import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest

from thresher import Cache, Run, Selection, Serial, Threads, UsageError, build
from thresher.pruning import clusters


def twins(rows, n: int, seed: int) -> np.ndarray:
    """Rows of which about half lie close to another one."""
    rng = np.random.default_rng(seed)
    found = rows(n, dim=6, groups=4, spread=1.0, seed=seed)
    found[n // 2 :] = found[rng.integers(0, n // 2, n - n // 2)] + 0.12 * rng.normal(size=(n - n // 2, 6))
    return found[rng.permutation(n)].astype(np.float32)


def centroids_of(rows, seed: int) -> np.ndarray:
    """Six, one of which no row is nearest to."""
    found = rows(6, dim=6, groups=6, seed=seed + 100)
    found[4] = -found[:4].sum(axis=0) * 0 + [0, 0, 0, 0, 0, -1]
    return found


class Reference:
    """The definition, n^2 and row by row."""

    def __init__(self, image, centroids, order, seed=0) -> None:
        unit = image.astype(np.float64) / np.linalg.norm(image.astype(np.float64), axis=1, keepdims=True)
        centres = centroids.astype(np.float64) / np.linalg.norm(centroids.astype(np.float64), axis=1, keepdims=True)
        self.cosines = unit @ unit.T
        to_centre = unit @ centres.T
        self.labels = to_centre.argmax(axis=1)
        distance = 1 - to_centre.max(axis=1)
        key = np.frombuffer(hashlib.sha256(json.dumps([seed, "semdedup"]).encode()).digest()[:16], np.uint64)
        drawn = np.random.Generator(np.random.Philox(key=key)).permutation(len(image))
        first = {"hard": -distance, "easy": distance, "random": -drawn}[order]
        self.order = sorted(range(len(image)), key=lambda i: (first[i], i))

    def walk(self, eps: float, against: str) -> dict[int, tuple[float, int]]:
        """Row -> (largest cosine to an earlier row that counts, that row), for dropped rows."""
        dropped: dict[int, tuple[float, int]] = {}
        seen: list[int] = []
        for i in self.order:
            same = [j for j in seen if self.labels[j] == self.labels[i]]
            nearest = max(((float(self.cosines[i, j]), j) for j in same), default=(-np.inf, -1))
            if nearest[0] > 1 - eps:
                dropped[i] = nearest
            if against == "all" or i not in dropped:
                seen.append(i)
        return dropped


@pytest.mark.parametrize("against", ["all", "kept"])
@pytest.mark.parametrize("order", ["hard", "easy", "random"])
@pytest.mark.parametrize("seed", range(3))
def test_it_is_the_definition(pool, rows, centroid_file, select, seed, order, against) -> None:
    image, centroids = twins(rows, 160 + 31 * seed, seed), centroids_of(rows, seed)
    store, reference = pool(image), Reference(image, centroids, order)
    for eps in (0.01, 0.05, 0.3):
        step = build(
            "semdedup", {"eps": eps, "order": order, "against": against, "centroids": centroid_file(centroids)}
        )
        selection = select(store, step)
        expected = reference.walk(eps, against)
        assert 0 < len(expected) < len(image)
        assert np.flatnonzero(~selection.mask()).tolist() == sorted(expected)
        evidence = selection.steps[0].rows
        assert evidence["cluster"].tolist() == reference.labels.tolist()
        for i in range(len(image)):
            cosine, twin = expected.get(i, (None, -1))
            assert evidence["duplicate_of"][i] == twin
            assert cosine is None or evidence["score"][i] == pytest.approx(cosine, abs=1e-6)


@pytest.mark.parametrize("against", ["all", "kept"])
def test_it_is_the_definition_in_the_clusters_of_a_tree(pool, rows, select, tmp_path, monkeypatch, against) -> None:
    """Of more rows than here; the clusters are those of the step, the order that by the distance to their centroids."""
    monkeypatch.setattr(clusters, "_TREE_FROM", 200)
    monkeypatch.setattr(clusters, "_TREE_EACH", 20)
    image, step = twins(rows, 400, 5), build("semdedup", {"eps": 0.05, "against": against})
    store, cache = pool(image), Cache.at(tmp_path / "cache")
    selection = select(store, step, cache=cache)
    assert "20 clusters chosen for 400 rows" in selection.steps[0].notes[0]
    everything = Selection.everything(store.fingerprint(), "", {}, len(store))
    groups = step.groups(Run(store, everything, Serial(), cache))
    reference = Reference(image, centroids_of(rows, 0), "hard")
    reference.labels = np.asarray(groups.labels_N)
    assert np.asarray(selection.steps[0].rows["cluster"]).tolist() == reference.labels.tolist()
    reference.order = sorted(range(len(image)), key=lambda i: (-groups.distances_N[i], i))
    expected = reference.walk(0.05, against)
    assert 0 < len(expected) < len(image)
    assert np.flatnonzero(~selection.mask()).tolist() == sorted(expected)


def test_every_dropped_row_has_a_kept_representative_when_only_kept_rows_count(pool, rows, select) -> None:
    image = twins(rows, 300, 0)
    selection = select(pool(image), build("semdedup", {"eps": 0.2, "against": "kept", "clusters": 3}))
    evidence, mask = selection.steps[0].rows, selection.mask()
    assert 20 < (~mask).sum() < 280
    assert mask[evidence["duplicate_of"][~mask]].all()
    assert (evidence["score"][~mask] > 0.8).all()


def test_of_exact_copies_one_stays(pool, rows, select) -> None:
    image = np.repeat(rows(60, dim=6, spread=2.0), 4, axis=0)[np.random.default_rng(0).permutation(240)]
    for against in ("all", "kept"):
        selection = select(
            pool(image, name=against), build("semdedup", {"eps": 1e-4, "clusters": 5, "against": against})
        )
        stay = image[selection.mask()]
        assert len(stay) == len(np.unique(stay, axis=0)) == 60


def test_a_larger_eps_drops_more(pool, rows, select) -> None:
    """The released README says the reverse."""
    store = pool(twins(rows, 200, 1))
    masks = [
        select(store, build("semdedup", {"eps": eps, "clusters": 4})).mask() for eps in (0, 0.01, 0.05, 0.2, 0.5, 2)
    ]
    for larger, smaller in zip(masks, masks[1:], strict=False):
        assert not (smaller & ~larger).any()
    counts = [int(mask.sum()) for mask in masks]
    assert counts == sorted(set(counts), reverse=True)
    assert counts[0] == 200
    assert counts[-1] == 4  # all but one of each cluster


def test_keep_drops_the_nearest_duplicates_to_meet_the_budget(pool, rows, centroid_file, select) -> None:
    image, centroids = twins(rows, 180, 2), centroids_of(rows, 2)
    reference = Reference(image, centroids, "hard")
    nearest = reference.walk(9, "all")  # every row that has an earlier one
    for keep in (1, 60, 120, 180):
        step = build("semdedup", {"keep": keep, "centroids": centroid_file(centroids)})
        selection = select(pool(image, name=f"p{keep}"), step)
        cosines = [nearest.get(i, (-np.inf, -1))[0] for i in range(180)]
        expected = sorted(range(180), key=lambda i: (cosines[i], i))[:keep]
        assert selection.rows().tolist() == sorted(expected)


def test_another_clustering_with_the_same_order_of_rows_is_not_answered_from_the_cache(pool, select, tmp_path) -> None:
    """Rows 0 and 1 come in this order whether they share a cluster or not."""
    store = pool(np.array([[1, 0], [0.99, 0.14]], np.float32))
    cache = Cache.at(tmp_path / "shared")
    step = {"eps": 0.1, "order": "random"}
    orders = [
        len(select(store, build("semdedup", {**step, "clusters": k}), cache=cache, seed=seed))
        for seed in range(6)
        for k in (2, 1)
    ]
    assert orders == [2, 1] * 6


def test_clusters_larger_than_a_task_are_judged_in_parts(pool, rows, select, monkeypatch) -> None:
    from thresher.pruning.methods import semdedup as module

    image = twins(rows, 700, 3)
    step = build("semdedup", {"eps": 0.05, "clusters": 2})
    whole = select(pool(image), step)
    monkeypatch.setattr(module, "_HELD", 128)
    parts = select(replace(pool(image, name="again"), block=128), step)  # tasks of 64 rows
    assert parts.dropped_by.tolist() == whole.dropped_by.tolist()
    assert parts.steps[0].rows["duplicate_of"].tolist() == whole.steps[0].rows["duplicate_of"].tolist()


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({}, "either eps .* or keep"),
        ({"eps": 0.1, "keep": "50%"}, "either eps .* or keep"),
        ({"keep": "50%", "against": "kept"}, "needs eps"),
        ({"eps": -0.1}, "between 0|finite"),
        ({"eps": float("nan")}, "between 0|finite"),
    ],
)
def test_parameters_that_make_no_sense(given, text) -> None:
    with pytest.raises(UsageError, match=text):
        build("semdedup", given)


# --- the best of each group -----------------------------------------------------------------------


def groups_of(cosines: np.ndarray, labels: np.ndarray, eps: float) -> list[list[int]]:
    """The connected components of the pairs of a cluster above 1 - eps, by walking from row to row."""
    seen: set[int] = set()
    found = []
    for start in range(len(labels)):
        group, left = [], [start]
        while left:
            i = left.pop()
            if i not in seen:
                seen.add(i)
                group.append(i)
                left += [j for j in range(len(labels)) if j != i and labels[j] == labels[i] and cosines[i, j] > 1 - eps]
        found += [sorted(group)] if group else []
    return found


@pytest.mark.parametrize("kind", ["float64", "int64", "uint8", "bool"])
@pytest.mark.parametrize("seed", range(3))
def test_the_best_of_each_group_stays(pool, rows, centroid_file, select, seed, kind) -> None:
    image, centroids = twins(rows, 120 + 31 * seed, seed), centroids_of(rows, seed)
    values = (np.random.default_rng(seed).random(len(image)) * 9).astype(kind)  # with ties, except for floats
    store = pool(image, table={"aes": values.tolist()})
    reference = Reference(image, centroids, "hard")
    for eps in (0.01, 0.05, 0.3):
        step = build("semdedup", {"eps": eps, "prefer": "aes", "centroids": centroid_file(centroids)})
        selection = select(store, step)
        groups = groups_of(reference.cosines, reference.labels, eps)
        best = {i: max(group, key=lambda i: (values[i], -i)) for group in groups for i in group}
        assert 3 < len(groups) < len(image)
        assert selection.rows().tolist() == sorted({*best.values()})
        evidence = selection.steps[0].rows
        for group in groups:
            for i in group:
                stays = best[i] == i
                assert evidence["duplicate_group"][i] == group[0]
                assert evidence["group_size"][i] == len(group)
                assert evidence["duplicate_of"][i] == (-1 if stays else best[i])
                cosine = -1 if stays else reference.cosines[i, best[i]]
                assert evidence["score"][i] == pytest.approx(cosine, abs=1e-6)
        assert evidence["value"].tolist() == values.tolist()
        larger = [group for group in groups if len(group) > 1]
        told = " ".join(selection.steps[0].notes)
        assert f"{len(larger):,} groups of duplicates with {sum(map(len, larger)):,} rows" in told
        assert f"the largest has {max(map(len, larger)):,}" in told
        assert f"{evidence['score'][~selection.mask()].min():.4f}" in told


@pytest.mark.parametrize("seed", range(2))
def test_a_path_of_duplicates_leads_from_every_dropped_row_to_the_one_that_stays(pool, rows, select, seed) -> None:
    image = twins(rows, 300, seed)
    store = pool(image, table={"aes": np.random.default_rng(seed).random(300).tolist()})
    selection = select(store, build("semdedup", {"eps": 0.1, "prefer": "aes", "clusters": 3}))
    evidence, mask = selection.steps[0].rows, selection.mask()
    unit = image.astype(np.float64) / np.linalg.norm(image.astype(np.float64), axis=1, keepdims=True)
    near = (unit @ unit.T > 0.9) & (evidence["cluster"][:, None] == evidence["cluster"][None, :])
    assert 20 < (~mask).sum() < 280
    for i in np.flatnonzero(~mask):
        reached = np.zeros(300, bool)
        reached[i] = True
        while (more := near[reached].any(axis=0) & ~reached).any():
            reached |= more
        assert reached[evidence["duplicate_of"][i]]
        assert mask[reached].sum() == 1
        assert evidence["value"][evidence["duplicate_of"][i]] == evidence["value"][reached].max()


def test_a_chain_is_one_group_and_its_loosest_link_is_told(pool, select) -> None:
    """Eleven rows, 10 degrees apart: neighbours are duplicates, the ends are more than a right angle apart."""
    angles = np.deg2rad(10 * np.arange(11))
    image = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    store = pool(image, table={"aes": [9.0, *range(8), 0.0, 8.0]})
    selection = select(store, build("semdedup", {"eps": 0.02, "prefer": "aes", "clusters": 1}))
    assert selection.rows().tolist() == [0]
    assert selection.steps[0].notes[-2:] == (
        "1 group of duplicates with 11 rows: 1 of 8 to 15 rows; the largest has 11",
        "the least similar of the dropped rows to the best of its group: row 10 to row 0, cosine -0.1736",
    )
    assert selection.steps[0].why(10) == "in a group of 11 duplicates, of which row 0 is the best by aes"


def test_without_duplicates_all_rows_stay(pool, select) -> None:
    store = pool(np.eye(5, dtype=np.float32), table={"aes": [1.0] * 5})
    selection = select(store, build("semdedup", {"eps": 0.1, "prefer": "aes", "clusters": 2}))
    assert len(selection) == 5
    assert selection.steps[0].notes[-1] == "no two rows of a cluster are duplicates"


def test_the_best_of_groups_after_repeats_of_a_reference(pool, rows, select) -> None:
    """Rows that repeat the reference are dropped first, and link no group."""
    angles = np.deg2rad(8 * np.arange(5))
    image = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    store = pool(image, table={"aes": [1.0, 2.0, 9.0, 4.0, 3.0]})
    other = pool(image[2:3], name="other")
    given = {"reference": other.layout.location, "reference_eps": 0.001, "eps": 0.02, "clusters": 1, "prefer": "aes"}
    selection = select(store, build("semdedup", given))
    evidence = selection.steps[0].rows
    assert selection.rows().tolist() == [1, 3]
    assert evidence["duplicate_group"].tolist() == [0, 0, 2, 3, 3]
    assert evidence["reference"].tolist() == [-1, -1, 0, -1, -1]
    assert evidence["duplicate_of"].tolist() == [1, -1, -1, -1, 3]
    assert "repeats row 0" in selection.steps[0].why(2)


def test_groups_of_clusters_larger_than_a_task_and_of_any_engine(pool, rows, select, monkeypatch) -> None:
    import thresher.pruning.methods.semdedup as module

    image = twins(rows, 700, 3)
    table = {"aes": np.random.default_rng(3).random(700).tolist()}
    step = build("semdedup", {"eps": 0.02, "prefer": "aes", "clusters": 2})
    whole = select(pool(image, table=table), step)
    assert 20 < (~whole.mask()).sum() < 650
    monkeypatch.setattr(module, "_HELD", 128)
    store = replace(pool(image, table=table, name="again"), block=128)  # tasks of 64 rows
    for number, engine in enumerate((Serial(), Threads(3))):
        parts = select(store, step, engine=engine, cache=Cache.at(f"{store.layout.location}-{number}"))
        assert parts.dropped_by.tolist() == whole.dropped_by.tolist()
        for name in ("duplicate_group", "group_size", "duplicate_of"):
            assert parts.steps[0].rows[name].tolist() == whole.steps[0].rows[name].tolist()


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"keep": "50%"}, "prefer needs eps"),
        ({"eps": 0.1, "order": "easy"}, "prefer replaces order"),
        ({"eps": 0.1, "against": "kept"}, "leave out against"),
        ({"reference": "x", "reference_eps": 0.1}, "prefer needs eps"),
    ],
)
def test_what_prefer_does_not_go_with(given, text) -> None:
    with pytest.raises(UsageError, match=text):
        build("semdedup", {"prefer": "clip-score", **given})
