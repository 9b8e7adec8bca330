from __future__ import annotations

import itertools

import numpy as np
import pytest

from thresher import UsageError, build
from thresher.errors import ThresherError
from thresher.pruning.methods.match import gains


def clusters(image: np.ndarray, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    cosines = image.astype(np.float64) @ centroids.T.astype(np.float64)
    return cosines.argmax(axis=1), 1 - cosines.max(axis=1)


def closest(share: np.ndarray, sizes: np.ndarray, budget: int) -> int:
    """The least squared distance of integer quotas to the targets, by trying all of them."""
    return min(
        sum((x - p * budget) ** 2 for x, p in zip(quota, share, strict=True))
        for quota in itertools.product(*(range(size + 1) for size in sizes))
        if sum(quota) == budget
    )


@pytest.mark.parametrize("order", ["easy", "hard"])
@pytest.mark.parametrize(("seed", "keep"), [(0, 12), (1, 25), (2, 3)])
def test_each_cluster_gets_the_share_of_the_target(pool, rows, centroid_file, select, seed, keep, order) -> None:
    image, centroids = rows(30, groups=4, seed=seed), rows(4, groups=4, seed=seed)
    other = rows(50, groups=4, seed=seed, spread=0.2)[:: seed + 1]
    target = pool(other, name="target")
    given = {"keep": keep, "centroids": centroid_file(centroids), "target": target.layout.location, "order": order}
    selection = select(pool(image), build("match", given))
    labels, distances = clusters(image, centroids)
    share = np.bincount(clusters(other, centroids)[0], minlength=4) / len(other)
    sizes = np.bincount(labels, minlength=4)
    group = selection.steps[0].groups
    np.testing.assert_allclose(group["target_share"], share)
    assert group["quota"].sum() == keep == len(selection)
    squared = float(((group["quota"] - share * keep) ** 2).sum())
    assert squared == pytest.approx(closest(share, sizes, keep))
    sign = -1 if order == "hard" else 1
    expected: list[int] = []
    for j, count in enumerate(group["quota"]):
        of = [i for i in range(len(labels)) if labels[i] == j]
        expected += sorted(of, key=lambda i: (sign * distances[i], i))[:count]
    assert selection.rows().tolist() == sorted(expected)


def test_without_a_target_all_clusters_have_equal_shares_and_small_ones_all_they_have(
    pool, centroid_file, select
) -> None:
    image = np.repeat(np.eye(3, dtype=np.float32), [100, 100, 4], axis=0)
    given = {"keep": 60, "centroids": centroid_file(np.eye(3, dtype=np.float32)), "order": "random"}
    selection = select(pool(image), build("match", given))
    assert selection.steps[0].groups["kept"].tolist() == [28, 28, 4]


def test_the_best_of_a_cluster_by_a_column(pool, rows, select) -> None:
    image = rows(90, groups=3, seed=4)
    score = np.random.default_rng(0).random(90)
    store = pool(image, table={"similarity": score.tolist()})
    selection = select(store, build("match", {"keep": 30, "clusters": 3, "column": "similarity"}))
    step, mask = selection.steps[0], selection.mask()
    for j in range(3):
        of = step.rows["cluster"] == j
        assert score[of & mask].min() > score[of & ~mask].max()


@pytest.mark.parametrize("seed", range(6))
def test_the_soft_match_is_the_best_of_all_subsets(seed) -> None:
    rng = np.random.default_rng(seed)
    scores, labels = rng.random(9).astype(np.float32), rng.integers(0, 3, 9)
    weights = rng.random(3) * rng.choice([0.1, 1, 10])

    def value(chosen: tuple[int, ...]) -> float:
        counts = np.bincount(labels[list(chosen)], minlength=3)
        return float(scores[list(chosen)].sum(dtype=np.float64) + (weights * np.log1p(counts)).sum())

    best = max(itertools.combinations(range(9), 4), key=value)
    taken = np.argsort(-gains(scores, labels, weights), kind="stable")[:4]
    assert value(tuple(taken)) == pytest.approx(value(best))


def test_the_weight_moves_from_the_best_scores_to_the_shares(pool, rows, select) -> None:
    image = rows(300, groups=5, seed=5)
    store = pool(image, table={"similarity": np.random.default_rng(1).random(300).tolist()})

    def kept(**given):
        return select(store, build("match", {"keep": 100, "clusters": 5, "column": "similarity", **given}))

    best = select(store, build("clip-score", {"keep": 100, "column": "similarity"}))
    assert kept(weight=0).rows().tolist() == best.rows().tolist()
    apart = [np.ptp(kept(weight=weight).steps[0].groups["kept"]) for weight in (0, 0.1, 1, 100)]
    assert apart == sorted(apart, reverse=True)
    assert apart[-1] <= 1


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"weight": 1.0}, "weight is for the scores of a column"),
        ({"column": "similarity", "weight": -1.0}, "must be from 0"),
        ({"column": "similarity", "order": "hard"}, "leave out one of both"),
    ],
)
def test_what_does_not_fit_together(given, said) -> None:
    with pytest.raises(UsageError, match=said):
        build("match", {"keep": 5, **given})


def test_the_pool_itself_is_no_target(pool, rows, select) -> None:
    store = pool(rows(40))
    with pytest.raises(UsageError, match="is the pool itself"):
        select(store, build("match", {"keep": 5, "clusters": 3, "target": store.layout.location}))


@pytest.mark.parametrize("given", [{"column": "nowhere"}, {"target": "/no/such/pool"}])
def test_what_is_missing_is_found_before_the_clustering(pool, rows, select, monkeypatch, given) -> None:
    monkeypatch.setattr("thresher.pruning.methods.match.Match.groups", lambda *_: pytest.fail("clusters are made"))
    with pytest.raises(ThresherError, match=next(iter(given.values()))):
        select(pool(rows(30)), build("match", {"keep": 10, "clusters": 3, **given}))
