from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from thresher.ops import neighbors
from thresher.ops.neighbors import (
    CHUNK,
    MeanNearestDistance,
    duplicates_of_kept,
    linked_to_earlier,
    nearest_earlier,
)

PANEL = 1024  # columns of a product: sizes around it and around CHUNK meet every edge


def units(n: int, dim: int, seed: int, copies: int = 0) -> np.ndarray:
    """Random unit rows, the last ``copies`` of them repeats of random earlier ones, shuffled."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(n, dim))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    if copies:
        rows[n - copies :] = rows[rng.integers(0, n - copies, copies)]
        rng.shuffle(rows)
    return rows.astype(np.float32)


def loader(rows: np.ndarray) -> Callable[[int, int], np.ndarray]:
    def load(lo: int, hi: int) -> np.ndarray:
        assert 0 <= lo <= hi <= len(rows)
        return rows[lo:hi]

    return load


@pytest.mark.parametrize(("k", "neighbors"), [(1, 20), (2, 1), (5, 20), (40, 7), (PANEL + 3, 20)])
def test_mean_distance_to_the_nearest_other_centroids(k: int, neighbors: int) -> None:
    centroids = units(k, 4, 0)
    rule = MeanNearestDistance(centroids, neighbors)
    found = np.concatenate([rule(panel) for panel in rule.panels()])
    assert found.dtype == np.float64
    wide = centroids.astype(np.float64)
    for j in range(0, k, max(k // 40, 1)):
        others = sorted(1 - float(wide[j] @ wide[i]) for i in range(k) if i != j)[:neighbors]
        assert found[j] == pytest.approx(sum(others) / len(others) if others else 0, abs=1e-6)


def check_nearest_earlier(rows: np.ndarray, start: int, stop: int) -> None:
    best, where = nearest_earlier(loader(rows), start, stop)
    assert (best.dtype, where.dtype, len(best), len(where)) == (np.float32, np.int64, stop - start, stop - start)
    wide = rows.astype(np.float64)
    for i in range(start, stop):
        if i == 0:
            assert (best[0], where[0]) == (-np.inf, -1)
            continue
        cosines = wide[:i] @ wide[i]
        assert best[i - start] == pytest.approx(cosines.max(), abs=1e-6)
        assert 0 <= where[i - start] < i
        assert cosines[where[i - start]] == pytest.approx(cosines.max(), abs=1e-6)


@given(st.integers(1, 40), st.data())
def test_nearest_earlier_row_of_any_part(n: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, n))
    check_nearest_earlier(units(n, 3, n, copies=n // 3), start, data.draw(st.integers(start, n)))


@pytest.mark.parametrize(
    ("n", "start"),
    [(PANEL + 5, 0), (CHUNK + 3, 0), (CHUNK + 3, CHUNK), (CHUNK + 60, 50), (2 * CHUNK + 9, CHUNK + 7)],
)
def test_nearest_earlier_row_beyond_a_chunk(n: int, start: int) -> None:
    check_nearest_earlier(units(n, 4, 0, copies=n // 4), start, n)


def test_the_earliest_of_equals_is_named() -> None:
    """Whole numbers, so that products are exact; copies far enough apart to meet in different products."""
    rows = np.tile(np.eye(4, dtype=np.float32), (CHUNK // 4 + 2, 1))
    best, where = nearest_earlier(loader(rows), 0, len(rows))
    assert where[4:].tolist() == (np.arange(4, len(rows)) % 4).tolist()
    assert best[4:].tolist() == [1.0] * (len(rows) - 4)
    best, where = duplicates_of_kept(loader(rows), len(rows), 0.5)
    assert where[4:].tolist() == (np.arange(4, len(rows)) % 4).tolist()


def sequential(rows: np.ndarray, threshold: float) -> list[int]:
    """The definition: walk the rows, keep one unless a kept one is nearer than the threshold."""
    kept: list[int] = []
    wide = rows.astype(np.float64)
    for i in range(len(rows)):
        if not kept or (wide[kept] @ wide[i]).max() <= threshold:
            kept.append(i)
    return kept


def check_duplicates_of_kept(rows: np.ndarray, threshold: float) -> None:
    best, where = duplicates_of_kept(loader(rows), len(rows), threshold)
    kept = sequential(rows, threshold)
    assert np.flatnonzero(~(best > threshold)).tolist() == kept
    wide = rows.astype(np.float64)
    for i in range(len(rows)):
        earlier = [j for j in kept if j < i]
        if not earlier:
            assert (best[i], where[i]) == (-np.inf, -1)
            continue
        cosines = wide[earlier] @ wide[i]
        assert where[i] in earlier
        assert best[i] == pytest.approx(cosines.max(), abs=1e-6)
        assert float(wide[where[i]] @ wide[i]) == pytest.approx(cosines.max(), abs=1e-6)


@given(st.integers(1, 60), st.sampled_from([-1.5, -0.21, 0.3, 0.77, 0.95, 0.999, 1.5]), st.integers(0, 99))
def test_duplicates_of_kept_rows(n: int, threshold: float, seed: int) -> None:
    check_duplicates_of_kept(units(n, 3, seed, copies=n // 3), threshold)


@pytest.mark.parametrize("threshold", [0.5, 0.97, 0.9999])
def test_duplicates_of_kept_rows_beyond_a_panel(threshold: float) -> None:
    check_duplicates_of_kept(units(2 * PANEL + 9, 4, 1, copies=PANEL // 2), threshold)


def test_a_chain_of_near_duplicates_tells_the_two_rules_apart() -> None:
    """b is near a, c near b but not near a: against all, both go; against the kept, c stays."""
    angles = np.array([0.0, 0.2, 0.4])
    rows = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    threshold = float(np.cos(0.3))
    assert (nearest_earlier(loader(rows), 0, 3)[0] > threshold).tolist() == [False, True, True]
    best, where = duplicates_of_kept(loader(rows), 3, threshold)
    assert (best > threshold).tolist() == [False, True, False]
    assert where.tolist() == [-1, 0, 0]


@given(n=st.integers(0, 40), pieces=st.lists(st.integers(0, 30), max_size=5), seed=st.integers(0, 9))
def test_the_nearest_other_row_is_that_of_a_plain_loop(n, pieces, seed) -> None:
    """Over pieces of any length; the first of equal ones, of which there are many on a coarse grid."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(-1, 2, (n, 3)).astype(np.float32)
    others = [rng.integers(-1, 2, (size, 3)).astype(np.float32) for size in pieces]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neighbors, "_PANEL", 7)
        best, where = neighbors.nearest_other(rows, iter(others))
    assert (best.dtype, where.dtype, len(best), len(where)) == (np.float32, np.int64, n, n)
    flat = [other for piece in others for other in piece]
    for i in range(n):
        value, number = -np.inf, -1
        for j, other in enumerate(flat):
            product = sum(float(a) * float(b) for a, b in zip(rows[i], other, strict=True))
            if product > value:
                value, number = product, j
        assert (best[i], where[i]) == (value, number)


def test_an_array_of_others_may_be_written_over_once_the_next_is_asked_for() -> None:
    buffer = np.empty((2, 2), np.float32)

    def others():
        for piece in ([[1, 0], [0, 1]], [[0, -1], [-1, 0]]):
            buffer[:] = piece
            yield buffer

    best, where = neighbors.nearest_other(np.array([[0, -1], [1, 0], [-1, 0]], np.float32), others())
    assert (best.tolist(), where.tolist()) == ([1, 1, 1], [2, 0, 3])


def check_linked(rows: np.ndarray, start: int, stop: int, threshold: float) -> None:
    """Against paths that are followed pair by pair; pairs before the first compared row do not count."""
    found = linked_to_earlier(loader(rows), start, stop, threshold)
    cosines = rows[:stop].astype(np.float64) @ rows[:stop].T.astype(np.float64)
    near = cosines > threshold
    near[:start, :start] = False
    expected = np.full(stop, -1)
    for first in range(stop):
        if expected[first] < 0:
            left = [first]
            while left:
                i = left.pop()
                expected[i] = first
                left += [j for j in np.flatnonzero(near[i]).tolist() if expected[j] < 0]
    assert found.dtype == np.int64
    assert found.tolist() == expected.tolist()


@given(st.integers(1, 50), st.sampled_from([-1.5, 0.3, 0.77, 0.95, 1.5]), st.data())
def test_linked_rows_of_any_part(n: int, threshold: float, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, n))
    check_linked(units(n, 3, n, copies=n // 3), start, data.draw(st.integers(start, n)), threshold)


@pytest.mark.parametrize(("panel", "chunk"), [(4, 8), (7, 21), (16, 16)])
@pytest.mark.parametrize("threshold", [0.5, 0.9, 0.99])
def test_linked_rows_in_any_panels(panel: int, chunk: int, threshold: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbors, "_PANEL", panel)
    monkeypatch.setattr(neighbors, "CHUNK", chunk)
    rows = units(100, 3, panel, copies=20)
    for start, stop in ((0, 100), (60, 100), (9, 64)):
        check_linked(rows, start, stop, threshold)
