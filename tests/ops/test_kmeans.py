from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from thresher.ops import kmeans
from thresher.ops.kmeans import STRIPE, TILE, Assign, TallyBlock, fit, nearest_centroid


def units(n: int, dim: int, seed: int) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(n, dim))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def passes(rows: np.ndarray, block: int = 4 * STRIPE) -> Callable[..., Iterator[kmeans.Tally]]:
    def each(fn: Callable[..., kmeans.Tally]) -> Iterator[kmeans.Tally]:
        for lo in range(0, len(rows), block):
            hi = min(lo + block, len(rows))
            yield fn(rows[a : min(a + STRIPE, hi)] for a in range(lo, hi, STRIPE))

    return each


def cosine_of_best(rows: np.ndarray, centroids: np.ndarray) -> float:
    return float((rows.astype(np.float64) @ centroids.T.astype(np.float64)).max(axis=1).mean())


@pytest.mark.parametrize("n", [0, 1, STRIPE - 1, STRIPE + 1, 2 * STRIPE + 5])
@pytest.mark.parametrize("k", [1, 7, TILE, TILE + 1, 2 * TILE + 3])
def test_the_nearest_is_the_argmax_of_the_whole_product(n: int, k: int) -> None:
    rows, centroids = units(n, 4, 1) * 3, units(k, 4, 2)
    labels, products = nearest_centroid(rows, centroids)
    full = rows.astype(np.float64) @ centroids.T.astype(np.float64)
    assert (labels.dtype, products.dtype) == (np.int32, np.float32)
    np.testing.assert_allclose(full[np.arange(n), labels], full.max(axis=1), atol=1e-6)
    np.testing.assert_allclose(products, full.max(axis=1), atol=1e-6)


def test_ties_go_to_the_lower_centroid_within_a_tile_and_across() -> None:
    """Small whole numbers, so that products are exact."""
    rng = np.random.default_rng(0)
    rows = rng.integers(-2, 3, (STRIPE + 9, 4)).astype(np.float32)
    centroids = rng.integers(-1, 2, (TILE + 40, 4)).astype(np.float32)
    labels, _ = nearest_centroid(rows, centroids)
    for row, label in list(zip(rows, labels, strict=True))[::50]:
        products = [float(sum(a * b for a, b in zip(row, c, strict=True))) for c in centroids]
        assert label == products.index(max(products))


@given(st.integers(1, 3), st.integers(1, 60), st.integers(1, 5), st.integers(0, 1000))
def test_a_tally_is_the_sum_of_each_group(stripes: int, size: int, k: int, seed: int) -> None:
    rows, centroids = units(stripes * size, 3, seed), units(k, 3, seed + 1)
    tally = TallyBlock(centroids)(rows[lo : lo + size] for lo in range(0, len(rows), size))
    sums: dict[int, np.ndarray] = {}
    for row, label in zip(rows.astype(np.float64), tally.labels_B, strict=True):
        sums[int(label)] = sums.get(int(label), 0) + row
    assert tally.groups_J.tolist() == sorted(sums)
    np.testing.assert_allclose(tally.sums_JD, [sums[j] for j in sorted(sums)], atol=1e-5)
    assert tally.sums_JD.dtype == np.float64
    cosines = [float(row @ centroids[label]) for row, label in zip(rows, tally.labels_B, strict=True)]
    np.testing.assert_allclose(tally.cosines_B, cosines, atol=1e-6)


def test_one_iteration_is_a_step_of_lloyd() -> None:
    rows, start = units(300, 5, 0), units(7, 5, 1)
    found, mean_cosine = fit(passes(rows), rows.__getitem__, start, 1)
    nearest = [max(range(7), key=lambda j, row=row: float(row @ start[j])) for row in rows.astype(np.float64)]
    for j in range(7):
        total = sum(rows[i].astype(np.float64) for i in range(300) if nearest[i] == j)
        np.testing.assert_allclose(found[j], total / np.linalg.norm(total), atol=1e-6)
    assert mean_cosine == pytest.approx(cosine_of_best(rows, start), abs=1e-6)
    assert found.dtype == np.float32


@pytest.mark.parametrize("seed", range(3))
def test_the_objective_never_falls(seed: int) -> None:
    rows = units(2500, 6, seed)
    seen: list[float] = []
    fit(passes(rows), rows.__getitem__, rows[:20], 12, after=lambda _, __, cosine: seen.append(cosine))
    assert len(seen) == 12
    assert (np.diff(seen) >= -1e-7).all()
    assert seen[-1] > seen[0] + 0.01


def test_planted_clusters_are_found() -> None:
    centres = np.eye(6, dtype=np.float32)
    truth = np.arange(900) % 6
    noise = 0.05 * np.random.default_rng(0).normal(size=(900, 6))
    rows = ((centres[truth] + noise) / np.linalg.norm(centres[truth] + noise, axis=1)[:, None]).astype(np.float32)
    found, mean_cosine = fit(passes(rows), rows.__getitem__, rows[:6], 5)
    labels, distances = Assign(found)(rows[lo : lo + STRIPE] for lo in range(0, 900, STRIPE))
    assert labels.tolist() == truth.tolist()  # rows 0..5 start one cluster each
    assert (centres * found).sum(axis=1).min() > 0.999
    np.testing.assert_allclose(distances, 1 - (rows * found[truth]).sum(axis=1), atol=1e-6)
    assert mean_cosine == pytest.approx(1 - float(distances.mean()), abs=1e-5)


def test_empty_clusters_take_over_the_rows_farthest_from_their_centroids() -> None:
    rows = np.concatenate([np.tile(np.eye(4, dtype=np.float32)[0], (50, 1)), np.eye(4, dtype=np.float32)[1:3]])
    start = np.tile(np.eye(4, dtype=np.float32)[0], (3, 1))  # two of three start empty
    found, _ = fit(passes(rows), rows.__getitem__, start, 1)
    assert found[1:].tolist() == rows[50:].tolist()
    found, mean_cosine = fit(passes(rows), rows.__getitem__, start, 3)
    assert mean_cosine == pytest.approx(1)
    assert np.bincount(Assign(found)([rows])[0], minlength=3).tolist() == [50, 1, 1]


@pytest.mark.parametrize(("n", "k"), [(1, 1), (40, 1), (40, 40), (3, 5)])
def test_few_rows_and_identical_rows(n: int, k: int) -> None:
    rows = units(n, 4, 0)
    found, cosine = fit(passes(rows), rows.__getitem__, rows[np.arange(k) % n], 4)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    assert k == 1 or cosine == pytest.approx(1, abs=1e-6)
    same = np.tile(rows[:1], (n, 1))
    found, cosine = fit(passes(same), same.__getitem__, same[np.arange(k) % n], 4)
    np.testing.assert_allclose(found, np.tile(rows[:1], (k, 1)), atol=1e-6)
    assert cosine == pytest.approx(1, abs=1e-6)


def test_a_group_whose_rows_cancel_stays_where_it_was() -> None:
    rows = np.array([[1, 0], [-1, 0]], np.float32)
    start = np.array([[0, 1]], np.float32)
    assert fit(passes(rows), rows.__getitem__, start, 3)[0].tolist() == start.tolist()


def test_no_iterations_return_the_start() -> None:
    rows = units(10, 3, 0)
    found, cosine = fit(passes(rows), rows.__getitem__, rows[:2], 0)
    assert found.tolist() == rows[:2].tolist()
    assert np.isnan(cosine)


@pytest.mark.parametrize("stop", [1, 4, 6])
def test_resuming_after_any_iteration_gives_the_same_bits(stop: int) -> None:
    rows, saved = units(3000, 6, 0), {}
    whole, cosine = fit(
        passes(rows), rows.__getitem__, rows[:30], 6, after=lambda done, found, _: saved.update({done: found.copy()})
    )
    again, cosine_again = fit(passes(rows), rows.__getitem__, saved[stop], 6, start=stop)
    assert again.tobytes() == whole.tobytes()
    assert cosine_again == cosine or stop == 6


def test_blocks_of_whole_stripes_agree_to_rounding() -> None:
    """Promised bit for bit: the same stripes and blocks. Another cut may only move the last digits."""
    rows = units(5 * STRIPE + 77, 6, 3)
    one, _ = fit(passes(rows, STRIPE), rows.__getitem__, rows[:10], 5)
    same, _ = fit(passes(rows, STRIPE), rows.__getitem__, rows[:10], 5)
    other, _ = fit(passes(rows, 3 * STRIPE), rows.__getitem__, rows[:10], 5)
    assert one.tobytes() == same.tobytes()
    np.testing.assert_allclose(one, other, atol=1e-6)
