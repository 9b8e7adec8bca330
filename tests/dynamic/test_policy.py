"""Plans, and the policies that record nothing: full, static, dynamic random."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from thresher.dynamic.ledger import Ledger
from thresher.dynamic.policies.dynamic_random import DynamicRandom
from thresher.dynamic.policies.full import Full
from thresher.dynamic.policies.infobatch import InfoBatch
from thresher.dynamic.policies.static import Static
from thresher.dynamic.policy import Plan, Policy
from thresher.errors import UsageError


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(seed))


def test_full_keeps_everything() -> None:
    plan = Full().plan(Ledger(5), 3, generator())
    assert (plan.phase, len(plan), plan.pruned, plan.rows().tolist()) == ("everything", 5, 0, [0, 1, 2, 3, 4])
    assert Full().expected_pruned(10) == 0


def test_dynamic_random_keeps_exactly_a_fresh_share() -> None:
    policy, rng = DynamicRandom(keep=0.29), generator()
    plans = [policy.plan(Ledger(100), epoch, rng) for epoch in range(30)]
    assert {len(plan) for plan in plans} == {29}
    assert set(np.concatenate([plan.rows() for plan in plans]).tolist()) == set(range(100))
    assert (
        policy.plan(Ledger(100), 0, generator(1)).rows().tolist()
        == policy.plan(Ledger(100), 0, generator(1)).rows().tolist()
    )
    assert policy.expected_pruned(30) == pytest.approx(0.71)


def test_static_keeps_a_mask_or_rows() -> None:
    mask = np.array([True, False, True, True])
    for policy in (Static(times_N=mask), Static.of_rows([3, 0, 2], 4)):
        plan = policy.plan(Ledger(4), 7, generator())
        assert plan.rows().tolist() == [0, 2, 3]
        assert (plan.weights_N, plan.repeats_N) == (None, None)
        assert plan.pruned == policy.expected_pruned(9) == 0.25


def test_static_repeats_rows_or_weighs_them() -> None:
    repeated = Static.of_rows([2, 0, 2, 2], 3)
    plan = repeated.plan(Ledger(3), 0, generator())
    assert plan.rows().tolist() == [0, 2, 2, 2]
    assert plan.rows().dtype == np.int64
    assert len(plan) == 4
    assert plan.pruned == repeated.expected_pruned(3) == pytest.approx(-1 / 3)
    weighed = Static(times_N=np.array([1, 0, 3]), weigh=True)
    plan = weighed.plan(Ledger(3), 0, generator())
    assert plan.rows().tolist() == [0, 2]
    assert plan.weights_N is not None
    assert plan.weights_N.tolist() == [1, 0, 3]
    assert plan.pruned == pytest.approx(1 / 3)
    assert weighed.expected_pruned(3) == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    "policy",
    [Full(), InfoBatch(epochs=9), Static.of_rows([0, 8, 8], 9), Static.of_rows([0, 8, 8], 9, weigh=True)],
    ids=["full", "weights", "repeats", "weighed"],
)
def test_a_plan_survives_a_checkpoint(policy: Policy) -> None:
    ledger = policy.ledger(9)
    ledger.record(np.arange(9), np.arange(9.0)[:, None], 0)
    plan = policy.plan(ledger, 1, generator())
    again = Plan.from_state(plan.state())
    assert (again.epoch, again.phase, again.total, again.collects) == (1, plan.phase, 9, False)
    assert again.rows().tolist() == plan.rows().tolist()
    for name in ("kept_N", "weights_N", "repeats_N"):
        np.testing.assert_array_equal(getattr(again, name), getattr(plan, name))
    assert Plan.from_state(Plan(epoch=4, phase="preparation", total=9, collects=True).state()).collects


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: DynamicRandom(keep=1.0), "keep = 1.0; give a share strictly between 0 and 1"),
        (lambda: Full().expected_pruned(0), "epochs = 0"),
        (lambda: Plan.from_state({}), "not the state of a plan"),
        (lambda: Static(times_N=np.array([0.5])), "type float64; give booleans or integers"),
        (lambda: Static(times_N=np.zeros(3, bool)), "no row is kept"),
        (lambda: Static(times_N=np.array([1, -1])), "used -1 to 1 times"),
        (lambda: Static.of_rows([], 4), "row ids of shape"),
        (lambda: Static.of_rows([4], 4), "row ids 4 to 4; there are rows 0 to 3"),
        (
            lambda: Static.of_rows([1], 4).plan(Ledger(5), 0, generator()),
            "the selection has 4 rows, but the dataset has 5",
        ),
    ],
)
def test_refusals(make: Callable[[], Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        make()
