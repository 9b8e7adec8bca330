"""Moments and deviations against sums over rows, the expected error against all subsets there are."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import hypergeom

from thresher.ops.covariance import Moments, Spread, Sum, deviations, hypergeometric, moments


def pairs(n: int, seed: int = 0, dim: int = 6, text_dim: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Unit rows that share a signal, around means as far apart as those of encoders; float32."""
    rng = np.random.default_rng([seed, n])
    signal = rng.normal(size=(n, max(dim, text_dim)))
    image, text = signal[:, :dim] + 1, signal[:, :text_dim] - 0.8 + 0.5 * rng.normal(size=(n, text_dim))
    image, text = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (image, text))
    return image.astype(np.float32), text.astype(np.float32)


def slow(image: np.ndarray, text: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """C and M, row by row in float64."""
    image, text, total = image.astype(float), text.astype(float), float(weights.sum())
    shape = image.shape[1], text.shape[1]
    if not total:
        return np.zeros(shape), np.zeros(shape)
    uncentred = np.zeros(shape)
    for v, t, w in zip(image, text, weights, strict=True):
        uncentred += w * v[:, None] * t / total
    means = [sum(w * row for w, row in zip(weights, rows, strict=True)) / total for rows in (image, text)]
    return uncentred - np.outer(*means), uncentred


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(0, 5))
def test_moments_and_deviations_are_those_of_sums_over_rows(counts: list[int], seed: int) -> None:
    image, text = pairs(len(counts), seed)
    weights = np.array(counts, np.int32)
    found = moments(image, text, weights)
    centred, uncentred = slow(image, text, weights)
    assert found.weight == weights.sum()
    np.testing.assert_allclose(found.centred_DE, centred, atol=3e-7)
    pool, whole = moments(image, text), slow(image, text, np.ones(len(counts)))
    expected = [np.linalg.norm(a - b) for a, b in zip(whole, (centred, uncentred), strict=True)]
    np.testing.assert_allclose(deviations(pool, found), expected, atol=2e-6)


def test_numpy_agrees() -> None:
    image, text = pairs(50)
    whole = np.cov(image.T, text.T, bias=True, dtype=np.float64)[:6, 6:]
    np.testing.assert_allclose(moments(image, text).centred_DE, whole, atol=1e-7)


@pytest.mark.parametrize("weights", [np.ones(300, np.bool_), np.full(300, 2, np.int32)])
def test_all_rows_deviate_by_nothing_at_all(weights: np.ndarray) -> None:
    image, text = pairs(300)
    assert max(deviations(moments(image, text), moments(image, text, weights))) < 1e-12


@given(st.lists(st.integers(0, 30), min_size=1, max_size=8))
def test_a_sum_of_groups_is_the_whole(sizes: list[int]) -> None:
    image, text = pairs(sum(sizes))
    total, parts, lo = Sum(), [Sum(), Sum(), Sum()], 0
    for i, size in enumerate(sizes):
        group = moments(image[lo : lo + size], text[lo : lo + size])
        total.add(group)
        parts[3 * i // len(sizes)].add(group)
        lo += size
    found, whole = total.moments(), moments(image, text)
    added = parts[0].plus(parts[1].plus(parts[2])).moments()  # as workers do
    assert added.weight == found.weight
    np.testing.assert_allclose(added.scatter_DE, found.scatter_DE, atol=1e-9)
    assert found.weight == whole.weight == sum(sizes)
    assert found.scatter_DE.dtype == np.float64
    np.testing.assert_allclose(found.centred_DE, whole.centred_DE, atol=3e-7)
    np.testing.assert_allclose(found.image_D, whole.image_D, atol=1e-7)


@pytest.mark.parametrize("n", range(1, 8))
def test_the_expected_error_is_exact_for_every_size_of_subset(n: int) -> None:
    image, text = pairs(n)
    pool = slow(image, text, np.ones(n))
    spread = Spread.of(moments(image, text))
    assert spread.rows == n
    found = spread.expected(np.arange(n + 1))
    for m in range(n + 1):
        errors = []
        for rows in combinations(range(n), m):
            drawn = np.isin(np.arange(n), rows)
            errors.append([np.linalg.norm(a - b) ** 2 for a, b in zip(pool, slow(image, text, drawn), strict=True)])
        expected = np.sqrt(np.mean(errors, axis=0))
        np.testing.assert_allclose([found[0][m], found[1][m]], expected, atol=2e-4 if m == n - 1 else 2e-5)
    assert found[0][n] == found[1][n] == 0


def test_the_spread_of_unit_rows_follows_from_their_moments() -> None:
    image, text = pairs(80)
    found = Spread.of(moments(image, text))
    squares = [((rows - rows.mean(0)).astype(float) ** 2).sum(axis=1) for rows in (image, text)]
    assert found.separate == pytest.approx(squares[0].mean() * squares[1].mean(), rel=1e-5)
    assert found.paired == pytest.approx((squares[0] * squares[1]).mean(), rel=1e-5)


@pytest.mark.parametrize(
    ("total", "marked", "drawn"),
    [(1000, 100, 50), (10, 3, 10), (5, 5, 2), (10, 1, 0), (1_000_000, 100_000, 300_000), (10**9, 3, 10**8)],
)
def test_chances_of_a_draw(total: int, marked: int, drawn: int) -> None:
    counts, chances = hypergeometric(total, marked, drawn)
    assert chances.sum() == pytest.approx(1)
    np.testing.assert_allclose(chances, hypergeom.pmf(counts, total, marked, drawn), atol=1e-7)
    assert counts @ chances == pytest.approx(drawn * marked / total, rel=1e-6)


def test_no_rows_and_one_row() -> None:
    image, text = pairs(20)
    pool, none = moments(image, text), moments(image, text, np.zeros(20, np.bool_))
    assert isinstance(none, Moments)
    assert none.weight == 0
    norms = Spread.of(pool)
    np.testing.assert_allclose(deviations(pool, none), [norms.centred, norms.uncentred], rtol=1e-6)
    one = moments(image[:1], text[:1])
    assert not one.centred_DE.any()
    assert Spread.of(one).centred == 0
