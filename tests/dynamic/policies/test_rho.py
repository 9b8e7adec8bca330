"""RHO against its rule written out, and on rows that are learned, learnable or noise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from thresher.dynamic.ledger import Ledger
from thresher.dynamic.policies.rho import Rho
from thresher.dynamic.policy import Plan
from thresher.errors import UsageError


def referred(policy: Rho, references: np.ndarray) -> Ledger:
    ledger = policy.ledger(len(references))
    ledger.refer(references)
    return ledger


@pytest.mark.parametrize(("cycle", "warmup"), [(3, 1), (1, 2), (2, 3)])
def test_hard_it_keeps_the_highest_reducible_losses(
    cycle: int, warmup: int, play: Callable[..., Plan], losses: Callable[..., np.ndarray]
) -> None:
    rows, epochs, keep = 90, 12, 0.6
    policy = Rho(keep=keep, softness=0, cycle=cycle, warmup=warmup)
    references = np.random.default_rng(0).gamma(2.0, 1.0, rows)
    references[[3, 50]] = np.nan  # unknown: kept
    ledger, table = referred(policy, references), losses(rows, epochs)
    last = [0.0] * rows
    for epoch in range(epochs):
        plan = play(policy, ledger, table[epoch], epoch, 30)
        kept = set(plan.rows().tolist())
        if epoch < warmup or (epoch - warmup) % (cycle + 1) == cycle:
            assert kept == set(range(rows))
        else:
            gain = [np.inf if np.isnan(references[row]) else last[row] - references[row] for row in range(rows)]
            order = sorted(range(rows), key=lambda row: -gain[row])
            assert kept == set(order[: int(round(keep * rows, 6))])
        assert plan.pruned == pytest.approx(policy.forecast(epoch), abs=1 / rows)
        for row in kept:
            last[row] = float(table[epoch, row].mean())


def test_what_can_be_learned_is_kept_not_what_is_learned_or_noise() -> None:
    """Learned: low now. Noise: high now and under the reference. Worth learning: high now, low under the reference."""
    kinds = np.arange(300) % 3
    now, reference = np.array([0.2, 5.0, 5.0])[kinds], np.array([0.3, 5.0, 0.5])[kinds]
    policy = Rho(keep=0.34, softness=0)
    ledger = referred(policy, reference)
    ledger.record(np.arange(300), now[:, None], 0)
    kept_N = policy.plan(ledger, 1, np.random.default_rng(0)).kept_N
    assert kept_N is not None
    assert kept_N[kinds == 2].all()


def test_softly_every_row_has_a_chance_that_grows_with_its_rank() -> None:
    rows = 200
    policy = Rho(keep=0.5, softness=0.3)
    ledger = referred(policy, np.zeros(rows))
    ledger.record(np.arange(rows), np.arange(rows)[:, None], 0)
    times = np.zeros(rows)
    for seed in range(600):
        plan = policy.plan(ledger, 1, np.random.default_rng(seed))
        assert len(plan) == 100
        times += plan.kept_N
    assert times.min() > 0
    quarters = times.reshape(4, -1).mean(axis=1) / 600
    assert (np.diff(quarters) > 0.1).all()


def test_softly_the_draw_is_that_of_one_row_after_the_other() -> None:
    """Of three rows, by chances in proportion to exp(rank / softness), without replacement."""
    policy = Rho(keep=0.67, softness=0.5)
    ledger = referred(policy, np.zeros(3))
    ledger.record(np.arange(3), np.array([[1.0], [2.0], [3.0]]), 0)
    weight = np.exp(np.array([1 / 6, 3 / 6, 5 / 6]) / 0.5)
    left_out = np.zeros(3)
    for first in range(3):
        for second in set(range(3)) - {first}:
            chance = weight[first] / weight.sum() * weight[second] / (weight.sum() - weight[first])
            left_out[3 - first - second] += chance
    counts = np.zeros(3)
    for seed in range(4000):
        plan = policy.plan(ledger, 1, np.random.default_rng(seed))
        assert plan.kept_N is not None
        counts += ~plan.kept_N
    np.testing.assert_allclose(counts / 4000, left_out, atol=0.03)


def test_rows_never_seen_are_kept() -> None:
    policy = Rho(keep=0.5)
    ledger = referred(policy, np.zeros(6))
    ledger.record(np.arange(4), np.ones((4, 1)), 0)
    plan = policy.plan(ledger, 1, np.random.default_rng(0))
    assert {4, 5} <= set(plan.rows().tolist())


def test_without_references_it_says_what_it_needs() -> None:
    for make in (lambda: Rho.for_run(9), lambda: Rho.for_budget(0.2, 9)):
        with pytest.raises(
            UsageError, match="needs the loss of every row under a reference model; give its option ref"
        ):
            make()
    policy = Rho()
    ledger = policy.ledger(3)
    assert policy.plan(ledger, 0, np.random.default_rng(0)).kept_N is None
    ledger.record(np.arange(3), np.ones((3, 1)), 0)
    with pytest.raises(UsageError, match="none of 3 rows has a reference loss"):
        policy.plan(ledger, 1, np.random.default_rng(0))
    with pytest.raises(UsageError, match="no row has a finite reference loss"):
        ledger.refer(np.full(3, np.nan))
    for wrong in (np.zeros(2), np.zeros((3, 1)), np.full(3, "x")):
        with pytest.raises(UsageError, match=r"references of shape .*; give \(3,\) numbers"):
            ledger.refer(wrong)
    with pytest.raises(UsageError, match="created with references=True"):
        Ledger(3).refer(np.zeros(3))
    with pytest.raises(UsageError, match="no references"):
        policy.plan(Ledger(3), 1, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"keep": 1.0}, "keep = 1.0"),
        ({"softness": -0.1}, "softness = -0.1"),
        ({"softness": float("nan")}, "softness = nan"),
        ({"cycle": 0}, "cycle = 0"),
        ({"warmup": 0}, "warmup = 0"),
    ],
)
def test_parameters_out_of_range_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Rho(**wrong)
