from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from thresher import UsageError, build
from thresher.pruning.methods.hkmeans import chosen_levels, closest_members, divided, parse_levels
from thresher.runtime.progress import Lines
from thresher.runtime.random import generator

# --- budgets --------------------------------------------------------------------------------------


def one_by_one(sizes: list[int], budget: int) -> list[int]:
    """Give one row at a time to the part that has the fewest and can take one more, the first of equal ones."""
    quotas = [0] * len(sizes)
    for _ in range(budget):
        quotas[min((j for j in range(len(sizes)) if quotas[j] < sizes[j]), key=lambda j: (quotas[j], j))] += 1
    return quotas


def from_the_top(sizes: list[int], tree: list[list[int]], budget: int) -> list[int]:
    """Divide the budget level by level, each group among its parts."""
    if not tree:
        return one_by_one(sizes, budget)
    groups = len(tree[1]) if len(tree) > 1 else max(tree[0]) + 1
    above = [sum(size for size, group in zip(sizes, tree[0], strict=True) if group == j) for j in range(groups)]
    quotas = [0] * len(sizes)
    for j, quota in enumerate(from_the_top(above, tree[1:], budget)):
        parts = [i for i, group in enumerate(tree[0]) if group == j]
        for i, rows in zip(parts, one_by_one([sizes[i] for i in parts], quota), strict=True):
            quotas[i] = rows
    return quotas


@given(st.data())
def test_the_budget_is_divided_as_row_by_row_from_the_top(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(0, 20), min_size=1, max_size=12).filter(sum))
    tree, below = [], len(sizes)
    for _ in range(data.draw(st.integers(0, 3))):
        groups = data.draw(st.integers(1, below))
        tree.append(data.draw(st.lists(st.integers(0, groups - 1), min_size=below, max_size=below)))
        below = groups
    budget = data.draw(st.integers(1, sum(sizes)))
    found = divided(np.array(sizes), [np.array(labels) for labels in tree], budget)
    assert found.tolist() == from_the_top(sizes, tree, budget)
    assert found.sum() == budget
    assert (found <= sizes).all()


def test_a_large_budget_is_exact() -> None:
    sizes = np.random.default_rng(0).integers(0, 10**7, 300)
    tree = [np.arange(300) % 20]
    for budget in (1, 7, 10**8 + 3, int(sizes.sum()) - 1, int(sizes.sum())):
        quotas = divided(sizes, tree, budget)
        assert quotas.sum() == budget
        assert (quotas <= sizes).all()


# --- clusters -------------------------------------------------------------------------------------


def nearest(rows: np.ndarray, centroids: np.ndarray) -> tuple[list[int], list[float]]:
    cosines = [[float(row @ centroid) for centroid in centroids] for row in rows]
    labels = [max(range(len(centroids)), key=lambda j: (each[j], -j)) for each in cosines]
    return labels, [each[j] for each, j in zip(cosines, labels, strict=True)]


def lloyd(rows: np.ndarray, k: int, purpose: str, iterations: int) -> np.ndarray:
    """Spherical k-means, cluster by cluster."""
    start = generator(0, "kmeans-init", purpose, k).choice(len(rows), k, replace=False, shuffle=False)
    centroids = rows[np.sort(start)]
    for _ in range(iterations):
        labels, _ = nearest(rows, centroids)
        assert len(set(labels)) == k
        sums = [sum(row for row, label in zip(rows, labels, strict=True) if label == j) for j in range(k)]
        centroids = np.array([each / np.linalg.norm(each) for each in sums])
    return centroids


def level(rows: np.ndarray, k: int, purpose: str, resample: int, closest: int | None) -> tuple[np.ndarray, list[int]]:
    """The centroids of a level and the label of every row, after k-means on the closest of each cluster."""
    centroids = lloyd(rows, k, purpose, 20)
    for _ in range(resample):
        labels, cosines = nearest(rows, centroids)
        part: list[int] = []
        for j in range(k):
            own = sorted((i for i in range(len(rows)) if labels[i] == j), key=lambda i: (-cosines[i], i))
            part += own[: closest or max(len(rows) // (2 * k), 1)]
        centroids = lloyd(rows[sorted(part)], k, purpose, 20)
    return centroids, nearest(rows, centroids)[0]


@pytest.mark.parametrize(("levels", "resample", "closest"), [("12,3", 0, None), ("12,3", 2, None), ("10,4,2", 3, 4)])
def test_it_is_the_definition(pool, rows, select, levels, resample, closest) -> None:
    image = rows(240, dim=5, groups=14, spread=1.0, seed=3)
    values = {"keep": 70, "levels": levels, "resample": resample, "closest": closest}
    selection = select(pool(image), build("hkmeans", values))
    unit = image.astype(np.float64) / np.linalg.norm(image.astype(np.float64), axis=1, keepdims=True)
    first, *others = [int(k) for k in levels.split(",")]
    centroids, labels = level(unit, first, "image", resample, closest)
    tree, points = [], centroids
    for number, k in enumerate(others, 2):
        points, parents = level(points, k, f"level {number}", resample, closest)
        tree.append(parents)
    step, sizes = selection.steps[0], [labels.count(j) for j in range(first)]
    assert step.rows["cluster"].tolist() == labels
    above = list(range(first))
    for name, parents in zip(("two", "three"), tree, strict=False):
        above = [parents[j] for j in above]
        assert step.groups[f"level_{name}"].tolist() == above
    quotas = from_the_top(sizes, tree, 70)
    assert step.groups["quota"].tolist() == step.groups["kept"].tolist() == quotas
    cosines = [float(unit[i] @ centroids[labels[i]]) for i in range(len(unit))]
    expected: list[int] = []
    for j, quota in enumerate(quotas):
        own = sorted((i for i in range(len(unit)) if labels[i] == j), key=lambda i: -cosines[i])
        expected += own[:quota]
    assert selection.rows().tolist() == sorted(expected)
    assert step.notes[-len(others) - 2] == f"clusters of each level: {levels.replace(',', ', ')}"


def test_rounds_that_are_all_in_the_cache_say_so_once(pool, rows, select, capsys) -> None:
    store, step = pool(rows(60, groups=6)), build("hkmeans", {"keep": 1, "levels": "6,2"})
    select(store, step)
    select(store, step, progress=Lines())
    lines = capsys.readouterr().err.splitlines()
    assert "k-means: 6 centroids found in the cache" in lines
    assert len(lines) == len(set(lines))


def test_rare_concepts_keep_far_more_than_their_share(pool, select) -> None:
    """Of concepts of 1,000, 40 and 40 rows; of 90 rows an equal share is 30 of each, and a random choice has 3."""
    image = np.repeat(np.eye(5)[:3], [1000, 40, 40], axis=0) + 0.1 * np.random.default_rng(0).standard_normal((1080, 5))
    store = pool(image.astype(np.float32))
    for seed in range(3):
        step = build("hkmeans", {"keep": 90, "levels": "60,3", "order": "random"})
        kept = np.bincount(np.searchsorted([1000, 1040], select(store, step, seed=seed).rows(), side="right"))
        assert kept[1:].min() > 20, kept


def test_other_centroids_are_the_lowest_level(pool, rows, centroid_file, select) -> None:
    image, centroids = rows(60, groups=6, seed=1), rows(6, groups=6, seed=1)
    step = build("hkmeans", {"keep": 20, "centroids": centroid_file(centroids), "levels": "6,2"})
    store = pool(image)
    selection = select(store, step)
    unit = image / np.linalg.norm(image, axis=1, keepdims=True)
    assert selection.steps[0].rows["cluster"].tolist() == (unit @ centroids.T).argmax(axis=1).tolist()
    with pytest.raises(UsageError, match="has 6 centroids, but clusters = 5"):
        select(store, build("hkmeans", {"keep": 20, "centroids": centroid_file(centroids), "levels": "5,2"}))


def test_the_closest_members_are_enough_for_a_cluster_each() -> None:
    """Of six clusters two are empty; one member of each other is too few for six."""
    labels, distances = np.array([0, 0, 0, 1, 3, 4, 4]), np.array([3, 1, 2, 5, 5, 9, 8], np.float32)
    assert closest_members(distances, labels, 6, 1).tolist() == [1, 2, 3, 4, 5, 6]
    assert closest_members(distances, labels, 4, 1).tolist() == [1, 3, 4, 6]
    assert closest_members(np.arange(40, dtype=np.float32), np.repeat([0, 1], 20), 2, None).tolist() == [
        *range(10),
        *range(20, 30),
    ]


def test_levels_are_chosen() -> None:
    assert chosen_levels(39) == [39]
    assert chosen_levels(44) == [44, 4]
    assert chosen_levels(50_000) == [50_000, 5_000, 500, 50, 5]
    assert parse_levels(" 1000, 100 ,10") == [1000, 100, 10]


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"levels": "10,20"}, "fewer clusters than the one before"),
        ({"levels": "10,10"}, "fewer clusters than the one before"),
        ({"levels": "10,0"}, "at least 1"),
        ({"levels": ""}, "such as 1000,100,10"),
        ({"levels": "ten"}, "such as 1000,100,10"),
        ({"levels": "9" * 30}, "such as 1000,100,10"),
        ({"levels": "70,60,50,40,30,20,10"}, "at most 6"),
        ({"levels": "20,4", "clusters": 10}, "begins with 20 clusters, but clusters is 10"),
        ({"resample": -1}, "resample"),
        ({"closest": 0}, "closest"),
    ],
)
def test_parameters_that_make_no_sense(values, text) -> None:
    with pytest.raises(UsageError, match=text):
        build("hkmeans", {"keep": "50%", **values})


def test_more_clusters_than_rows(pool, rows, select) -> None:
    with pytest.raises(UsageError, match="cannot make 50 clusters from 20 rows"):
        select(pool(rows(20)), build("hkmeans", {"keep": 5, "levels": "50,2"}))
