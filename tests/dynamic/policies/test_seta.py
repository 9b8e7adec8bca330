"""SeTa against its rules written out with loops, and its levels against k-means on the values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from thresher.dynamic.policies.seta import Seta, levels
from thresher.dynamic.policy import Plan
from thresher.errors import UsageError


def slow_levels(values: list[float], k: int) -> list[int]:
    """Lloyd's iterations on a list."""
    ordered = sorted(values)
    centers = [ordered[(2 * j + 1) * len(values) // (2 * k)] for j in range(k)]
    before: list[int] = []
    while True:
        found = [sum(value >= (a + b) / 2 for a, b in zip(centers, centers[1:], strict=False)) for value in values]
        if found == before:
            return found
        before = found
        for j in range(k):
            members = [value for value, level in zip(values, found, strict=True) if level == j]
            centers[j] = sum(members) / len(members) if members else centers[j]


@given(
    hnp.arrays(np.float32, st.integers(1, 40), elements=st.integers(-40, 40).map(lambda n: n / 8)), st.integers(2, 6)
)
def test_levels_are_those_of_k_means(values: np.ndarray, k: int) -> None:
    """Eighths are exact, so that ties are too."""
    found = levels(values, k).tolist()
    expected = slow_levels([float(value) for value in values], k)
    assert len(set(zip(values.tolist(), found, strict=True))) == len(set(values.tolist())), "equal losses, equal levels"
    if len(set(values.tolist())) >= k:
        means = [np.mean(values[np.array(found) == j]) for j in sorted(set(found))]
        assert means == sorted(means)
    assert found == expected


def test_levels_of_separate_clumps_are_the_clumps() -> None:
    rng = np.random.default_rng(0)
    clump = rng.integers(0, 4, 500)
    values = (clump * 3 + rng.normal(0, 0.2, 500)).astype(np.float32)
    np.testing.assert_array_equal(levels(values, 4), clump)


@pytest.mark.parametrize(("groups", "alpha"), [(5, 0.6), (4, 0.5), (3, 1.0), (2, 0.4)])
def test_a_window_slides_from_easy_to_hard(
    groups: int, alpha: float, play: Callable[..., Plan], losses: Callable[..., np.ndarray]
) -> None:
    rows, epochs = 80, 16
    policy = Seta(epochs=epochs, groups=groups, alpha=alpha)
    ledger, table, last = policy.ledger(rows), losses(rows, epochs), [0.0] * rows
    window = round(groups * alpha)
    for epoch in range(epochs):
        plan = play(policy, ledger, table[epoch], epoch, 20)
        kept = set(plan.rows().tolist())
        if epoch == 0 or epoch + 1 > 0.875 * epochs:
            assert kept == set(range(rows))
        else:
            start = epoch % (groups - window + 1)
            found = slow_levels(last, groups)
            assert kept == {row for row in range(rows) if start <= found[row] < start + window}
        mean = table[epoch].mean(axis=1)
        for row in kept:
            last[row] = float(mean[row])


def test_a_random_share_is_left_out_of_every_epoch(
    play: Callable[..., Plan], losses: Callable[..., np.ndarray]
) -> None:
    policy = Seta(epochs=8, r=0.25, alpha=1.0)
    ledger, table = policy.ledger(100), losses(100, 8)
    plans = [play(policy, ledger, table[epoch], epoch, 20) for epoch in range(8)]
    assert len(plans[0]) == len(plans[7]) == 75
    assert len({tuple(plan.rows().tolist()) for plan in plans}) == 8
    for epoch in range(1, 7):  # of those seen so far; what was never seen is kept
        assert 75 <= len(plans[epoch]) <= 100


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"epochs": 0}, "epochs = 0"),
        ({"r": 1.0}, "r = 1.0"),
        ({"groups": 1}, "groups = 1"),
        ({"groups": 3, "alpha": 0.1}, "at least one level"),
        ({"delta": 1.5}, "delta = 1.5"),
    ],
)
def test_parameters_out_of_range_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Seta(**{"epochs": 8, **wrong})


def test_it_takes_no_share_to_prune() -> None:
    with pytest.raises(UsageError, match="leaves out whole levels of loss, however many rows they have; give r"):
        Seta.for_budget(0.3, 10)


def test_losses_that_are_all_equal_leave_a_row() -> None:
    policy = Seta(epochs=10, groups=5, alpha=0.2)
    ledger = policy.ledger(6)
    ledger.record(np.arange(6), np.ones((6, 1)), 0)
    rng = np.random.default_rng(0)
    for epoch in range(1, 6):
        assert 1 <= len(policy.plan(ledger, epoch, rng)) <= 6
