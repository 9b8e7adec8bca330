from __future__ import annotations

import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest

from thresher import Cache, UsageError, build


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
    from thresher.select.methods import semdedup as module

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
