from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from thresher.dynamic.ledger import Ledger
from thresher.dynamic.policies.infobatch import InfoBatch
from thresher.dynamic.policy import Plan
from thresher.errors import UsageError


def recorded(losses_N: np.ndarray) -> Ledger:
    ledger = Ledger(len(losses_N))
    ledger.record(np.arange(len(losses_N)), losses_N[:, None], 0)
    return ledger


def generator(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(seed))


@given(st.integers(2, 60), st.floats(0.05, 0.95), st.integers(0, 10**6))
def test_rows_below_the_mean_are_dropped_and_the_others_of_them_weigh_more(rows: int, r: float, seed: int) -> None:
    losses_N = generator(seed).gamma(2, 1, rows).astype(np.float32)
    plan = InfoBatch(epochs=10, r=r).plan(recorded(losses_N), 1, generator(seed))
    assert plan.kept_N is not None
    assert plan.weights_N is not None
    below = losses_N < losses_N.mean(dtype=np.float64)
    assert plan.kept_N[~below].all()
    assert (plan.weights_N[~below] == 1).all()
    dropped = int(r * below.sum() + 1e-9)
    assert np.count_nonzero(~plan.kept_N) == dropped
    assert plan.weights_N[below].sum() / below.sum() * (below.sum() - dropped) == pytest.approx(below.sum(), rel=1e-5)
    assert (np.abs(plan.weights_N[below] - 1 / (1 - r)) <= 1 / (1 - r) / (below.sum() - dropped) + 1e-5).all()


def test_the_weighted_sum_of_losses_is_that_of_all_rows_in_expectation() -> None:
    rows, runs = 301, 2000
    losses_N = generator(5).gamma(2, 1, rows).astype(np.float32)
    ledger, policy, rng = recorded(losses_N), InfoBatch(epochs=10, r=0.6), generator(6)
    sums = []
    for _ in range(runs):
        plan = policy.plan(ledger, 1, rng)
        assert plan.weights_N is not None
        kept = plan.rows()
        sums.append(float((plan.weights_N[kept] * losses_N[kept]).sum(dtype=np.float64)))
    error = np.std(sums) / np.sqrt(runs)
    assert 0 < error < 0.01 * losses_N.sum()
    assert abs(np.mean(sums) - losses_N.sum(dtype=np.float64)) < 4 * error


def test_the_first_and_the_last_epochs_train_on_everything(
    play: Callable[..., Plan], losses: Callable[..., np.ndarray]
) -> None:
    policy, told = InfoBatch(epochs=16), losses(100, 16)
    ledger = policy.ledger(100)
    phases = [play(policy, ledger, told[epoch], epoch, 10).phase for epoch in range(16)]
    assert phases == ["everything", *["pruned"] * 13, "everything", "everything"]


def test_rows_never_seen_are_kept_and_have_no_part_in_the_mean() -> None:
    ledger = Ledger(6)
    ledger.record([0, 1, 2, 3], [[1.0], [1.0], [1.0], [5.0]], 0)
    plan = InfoBatch(epochs=10, r=0.7).plan(ledger, 1, generator(0))
    assert plan.kept_N is not None
    assert plan.weights_N is not None
    assert plan.kept_N[3:].all()
    assert np.count_nonzero(plan.kept_N[:3]) == 1
    assert plan.weights_N.tolist() == [3, 3, 3, 1, 1, 1]


def test_equal_losses_leave_nothing_to_prune() -> None:
    assert InfoBatch(epochs=10).plan(recorded(np.ones(8, np.float32)), 1, generator(0)).pruned == 0


@pytest.mark.parametrize("skew", [0.1, 1.0, 3.0])
def test_a_budget_is_met_whatever_share_of_the_rows_lies_below_the_mean(play: Callable[..., Plan], skew: float) -> None:
    policy = InfoBatch.for_budget(0.3, 30)
    assert policy.expected_pruned(30) == pytest.approx(0.3)
    ledger = policy.ledger(4000)
    losses_NR = generator(0).random((4000, 1), np.float32) ** skew
    plans = [play(policy, ledger, losses_NR, e, 500) for e in range(30)]
    below = np.mean(losses_NR < losses_NR.mean())
    reached = min(policy.share or 0, 0.9 * below) * 25 / 30  # 25 epochs prune
    assert np.mean([plan.pruned for plan in plans]) == pytest.approx(reached, abs=1e-3)
    assert reached == pytest.approx(0.3) if skew >= 1 else reached < 0.3
    assert plans[5].weights_N is not None
    kept_N = plans[5].kept_N
    assert kept_N is not None
    assert plans[5].weights_N[kept_N].sum() == pytest.approx(4000, rel=1e-4)  # those kept stand for all


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"epochs": 0}, "epochs = 0"),
        ({"epochs": 8, "r": 1.0}, "r = 1.0; give a share strictly between 0 and 1"),
        ({"epochs": 8, "delta": 1.5}, "delta = 1.5"),
        ({"epochs": 8, "share": 1.0}, "share = 1.0; give a share of the rows"),
    ],
)
def test_refusals(options: dict, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        InfoBatch(**options)


def test_a_budget_out_of_reach_is_refused() -> None:
    with pytest.raises(UsageError, match=r"cannot prune 50\.0% over 16 epochs: it must stay below 36\.6%"):
        InfoBatch.for_budget(0.5, 16)
    with pytest.raises(UsageError, match="cannot prune 30 of the samples; give a share"):
        InfoBatch.for_budget(30, 16)
