from __future__ import annotations

import numpy as np
import pytest

from thresher import UsageError, build


def reference(image, centroids, keep: int, balance: float, order: str) -> list[int]:
    cosines = image.astype(np.float64) @ centroids.T.astype(np.float64)
    labels, distance = cosines.argmax(axis=1), 1 - cosines.max(axis=1)
    sign = -1 if order == "hard" else 1
    ranked = sorted(range(len(image)), key=lambda i: (sign * distance[i], i))
    sure: list[int] = []
    for j in range(len(centroids)):
        sure += [i for i in ranked if labels[i] == j][: int(balance * keep / len(centroids))]
    rest = [i for i in ranked if i not in sure]
    return sorted(sure + rest[: keep - len(sure)])


@pytest.mark.parametrize("order", ["hard", "easy"])
@pytest.mark.parametrize("balance", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("seed", "keep"), [(0, 40), (1, 150), (2, 7)])
def test_it_is_the_definition(pool, rows, centroid_file, select, seed, keep, balance, order) -> None:
    image = rows(190, seed=seed)
    centroids = np.concatenate([rows(6, groups=6, seed=seed), -np.ones((1, 8)) / 8**0.5]).astype(np.float32)
    given = {"keep": keep, "balance": balance, "order": order, "centroids": centroid_file(centroids)}
    selection = select(pool(image), build("ssp", given))
    assert selection.rows().tolist() == reference(image, centroids, keep, balance, order)


def test_without_balance_the_hardest_rows_of_the_whole_pool_stay_and_with_it_every_cluster_has_its_share(
    pool, rows, select
) -> None:
    loose, tight = rows(150, groups=3, spread=0.9, seed=1), rows(150, groups=3, spread=0.1, seed=2)
    store = pool(np.concatenate([loose, tight]))
    plain = select(store, build("ssp", {"keep": 60, "clusters": 6}))
    distance, mask = plain.steps[0].rows["score"], plain.mask()
    assert distance[mask].min() > distance[~mask].max()
    assert plain.steps[0].cut == distance[mask].min()
    shared = select(store, build("ssp", {"keep": 60, "clusters": 6, "balance": 0.8}))
    guaranteed = np.minimum(8, shared.steps[0].groups["size"])  # 0.8 of an equal split of 60 over 6
    assert (shared.steps[0].groups["kept"] >= guaranteed).all()
    assert (plain.steps[0].groups["kept"] < guaranteed).any()


@pytest.mark.parametrize("balance", [-0.1, 1.1, float("nan")])
def test_balance_is_a_fraction(balance) -> None:
    with pytest.raises(UsageError, match="between 0 and 1|finite"):
        build("ssp", {"keep": 5, "balance": balance})
