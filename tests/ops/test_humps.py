"""One hump or two, and where the upper one begins."""

from __future__ import annotations

import numpy as np
import pytest

from thresher.ops.humps import humps


def two(
    rows: int, share: float, seed: int, low: tuple[int, int] = (4, 6), high: tuple[int, int] = (22, 3)
) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.where(rng.random(rows) < share, rng.beta(*high, rows), rng.beta(*low, rows))


@pytest.mark.parametrize("rows", [1, 20, 300, 3000, 30000])
def test_one_hump_is_one(rows: int) -> None:
    """Flat, round, skewed to either side, all equal, and flat with ragged ends."""
    rng = np.random.default_rng(rows)
    for seed in range(20):
        rng = np.random.default_rng([rows, seed])
        for values in (
            rng.random(rows),
            rng.beta(3, 3, rows),
            rng.beta(2, 6, rows),
            rng.beta(6, 2, rows),
            np.full(rows, 0.5),
            (rng.random((2, rows))).mean(axis=0),
        ):
            assert humps(values) is None


@pytest.mark.parametrize(("share", "rows"), [(0.1, 4000), (0.3, 4000), (0.5, 4000), (0.3, 40000), (0.03, 40000)])
def test_two_humps_are_found_with_their_share(share: float, rows: int) -> None:
    found = humps(two(rows, share, seed=1))
    assert found is not None
    assert found.share == pytest.approx(share, abs=0.02)
    assert found.means == pytest.approx((0.4, 0.88), abs=0.02)
    assert found.means[0] < found.valley < found.means[1]
    assert found.means[0] < found.cut < found.means[1]


def written_out(values: np.ndarray, rounds: int = 400) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The fit on the values themselves, with a loop over them."""
    low, high = values[values < 0.65], values[values >= 0.65]
    means, deviations = [low.mean(), high.mean()], [low.std(), high.std()]
    shares = [len(low) / len(values), len(high) / len(values)]
    for _ in range(rounds):
        densities = [
            share / deviation * np.exp(-0.5 * ((values - mean) / deviation) ** 2)
            for mean, deviation, share in zip(means, deviations, shares, strict=True)
        ]
        parts = [density / sum(densities) for density in densities]
        shares = [part.mean() for part in parts]
        means = [(part * values).sum() / part.sum() for part in parts]
        deviations = [
            np.sqrt((part * (values - mean) ** 2).sum() / part.sum()) for part, mean in zip(parts, means, strict=True)
        ]
    return np.array(means), np.array(deviations), parts[1]


def test_the_fit_is_that_of_the_values_themselves() -> None:
    """But for the width of a bin."""
    values = two(3000, 0.25, seed=3)
    found = humps(values)
    assert found is not None
    means, deviations, parts = written_out(values)
    assert found.means == pytest.approx(means, abs=0.004)
    assert found.deviations == pytest.approx(deviations, abs=0.004)
    between = (values > means[0]) & (values < means[1])
    np.testing.assert_allclose(found.chance(values)[between], parts[between], atol=0.05)
    agree = (values >= found.cut) == (parts > 0.5)
    assert agree[values > means[0]].mean() > 0.99


def test_order_and_what_is_no_share_make_no_difference() -> None:
    values = two(3000, 0.3, seed=5)
    shuffled = np.random.default_rng(0).permutation(np.concatenate([values, [np.nan, np.inf, -np.inf, -1, 2, np.nan]]))
    assert humps(shuffled) == humps(values)
    assert humps(shuffled.astype(np.float32)) is not None
    assert humps(np.full(10, np.nan)) is None
    assert humps([]) is None


def test_chances_are_between_0_and_1_and_rise_across_the_cut() -> None:
    found = humps(two(5000, 0.3, seed=7))
    assert found is not None
    chance = found.chance(np.array([0.0, found.means[0], found.cut - 0.02, found.cut + 0.02, found.means[1], 1.0]))
    assert ((chance >= 0) & (chance <= 1)).all()
    assert (np.diff(chance) >= 0).all()
    assert chance[1] < 0.01
    assert chance[2] < 0.5 < chance[3]
    assert chance[4] > 0.99
