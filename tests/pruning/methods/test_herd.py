from __future__ import annotations

import numpy as np
import pytest

from thresher import Cache, Selection, Serial, UsageError, build
from thresher.pruning.covariance import covariance_errors
from thresher.pruning.run import Run


def one_by_one(image: np.ndarray, text: np.ndarray, rows: list[int], count: int) -> list[int]:
    """The definition: the row that leaves the mean of v t^T of the rows taken closest to that of all rows."""
    each = {i: np.outer(image[i], text[i]) for i in rows}
    goal, taken = sum(each.values()) / len(rows), []
    for _ in range(count):
        left = [i for i in rows if i not in taken]
        taken.append(
            min(left, key=lambda i: np.linalg.norm(goal - sum(each[j] for j in [*taken, i]) / (len(taken) + 1)))
        )
    return taken


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)


@pytest.mark.parametrize("part", [1000, 17])
def test_it_is_the_definition(pool, rows, centroid_file, select, monkeypatch, part) -> None:
    """Also for classes that are split: of three parts, rows 0, 3, 6, ... are the first."""
    monkeypatch.setattr("thresher.pruning.methods.herd._PART", part)
    image, text, centroids = rows(90, groups=3, seed=1), rows(90, dim=5, seed=2), rows(3, groups=3, seed=1)
    selection = select(pool(image, text), build("herd", {"keep": 33, "centroids": centroid_file(centroids)}))
    labels = (unit(image) @ unit(centroids).T).argmax(axis=1)
    step, expected = selection.steps[0], []
    quotas = step.groups["quota"]
    assert quotas.sum() == len(selection) == 33
    assert np.abs(quotas - np.bincount(labels) * 33 / 90).max() <= 1
    for k, quota in enumerate(quotas.tolist()):
        own = np.flatnonzero(labels == k).tolist()
        m = -(-len(own) // part)
        for i in range(m):
            some = own[i::m]
            count = int((step.rows["turn"][some] > 0).sum())
            assert abs(count - quota * len(some) / len(own)) <= 1
            taken = one_by_one(unit(image), unit(text), some, count)
            assert step.rows["turn"][taken].tolist() == list(range(1, count + 1))
            expected += taken
    assert selection.rows().tolist() == sorted(expected)


def test_the_covariance_error_is_far_below_that_of_random_rows(pool, rows, select, tmp_path) -> None:
    image, text = rows(600, dim=8, groups=4, seed=1), rows(600, dim=8, groups=4, seed=1, spread=0.8)
    store = pool(image, text)
    selection = select(store, build("herd", {"keep": "20%", "clusters": 4}))
    start = Selection.everything(store.fingerprint(), store.layout.location, dict(selection.options), store.total)
    run = Run(store, start, Serial(), Cache.at(tmp_path / "own"))
    error = covariance_errors(run, {"herd": selection}, selection.steps[0].rows["cluster"])["herd"]
    assert error.within is not None
    assert error.within_uncentred is not None
    assert error.overall_uncentred.ratio < 0.3
    assert error.within_uncentred.ratio < 0.3
    assert error.within.ratio < 0.8


def test_images_alone_have_no_covariance(pool, rows, select) -> None:
    with pytest.raises(UsageError, match="has no text embeddings"):
        select(pool(rows(20)), build("herd", {"keep": 5}))
