from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from thresher.dynamic.ledger import Ledger, coreset_ranks
from thresher.dynamic.policies.d_pruning import DPruning
from thresher.dynamic.policy import Plan
from thresher.errors import UsageError


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(seed))


@given(
    rows=st.integers(3, 40),
    keep=st.floats(0.1, 0.9),
    rule=st.sampled_from(["uncertainty", "epsilon-greedy"]),
    period=st.integers(1, 3),
    warmup=st.integers(1, 2),
    seed=st.integers(0, 10**6),
)
def test_keeps_what_a_slow_transcription_keeps(
    play: Callable[..., Plan],
    losses: Callable[..., np.ndarray],
    rows: int,
    keep: float,
    rule: str,
    period: int,
    warmup: int,
    seed: int,
) -> None:
    told = losses(rows, 8, agree=0.3, seed=seed)
    policy = DPruning(keep=keep, rule=rule, epsilon=0.0, period=period, warmup=warmup)  # type: ignore[arg-type]
    ledger = policy.ledger(rows)
    mean, variance = {}, dict.fromkeys(range(rows), 0.0)
    held = list(range(rows))
    for epoch in range(8):
        if epoch >= warmup and (epoch - warmup) % period == 0:
            bound = 1.0 if rule == "uncertainty" else 0.0
            score = {row: mean[row] + bound * variance[row] ** 0.5 for row in range(rows)}
            held = sorted(sorted(range(rows), key=lambda row: (-score[row], row))[: max(1, int(keep * rows + 1e-9))])
        assert play(policy, ledger, told[epoch], epoch, 7).rows().tolist() == held
        for row in held:
            loss = float(told[epoch][row].mean())
            step = loss - mean.setdefault(row, loss)
            mean[row] += 0.2 * step
            variance[row] = 0.8 * (variance[row] + 0.2 * step**2)


def test_epsilon_of_the_kept_rows_are_drawn_at_random() -> None:
    policy = DPruning(keep=0.5, rule="epsilon-greedy", epsilon=0.4)
    ledger = policy.ledger(20)
    ledger.record(np.arange(20), np.arange(20.0)[:, None], 0)
    drawn = set()
    for seed in range(30):
        rows = policy.plan(ledger, 1, generator(seed)).rows().tolist()
        assert len(rows) == 10
        assert set(range(14, 20)) <= set(rows)
        drawn |= set(rows)
    assert drawn == set(range(20))


def test_the_rules_differ() -> None:
    kept = {}
    for rule in ("uncertainty", "epsilon-greedy"):
        policy = DPruning(keep=0.5, rule=rule, epsilon=0.0, bound=2.0, decay=0.5)  # type: ignore[arg-type]
        ledger = policy.ledger(2)
        for epoch, losses in enumerate([[3.0, 0.0], [3.0, 4.0]]):  # steady at 3; moving, with a mean of 2
            ledger.record([0, 1], np.array(losses)[:, None], epoch)
        kept[rule] = policy.plan(ledger, 2, generator()).rows().tolist()
    assert kept == {"uncertainty": [1], "epsilon-greedy": [0]}


def test_rows_never_seen_come_first() -> None:
    policy = DPruning(keep=0.5)
    ledger = policy.ledger(4)
    ledger.record([0, 1, 2], [[9.0], [8.0], [7.0]], 0)
    assert policy.plan(ledger, 1, generator()).rows().tolist() == [0, 3]


def test_rows_often_left_out_rank_last(play: Callable[..., Plan]) -> None:
    policy, told = DPruning(keep=0.5), np.arange(10.0, dtype=np.float32)[:, None]
    ledger = policy.ledger(10)
    for epoch in range(3):
        play(policy, ledger, told, epoch, 4)
    assert ledger.times_N.tolist() == [2] * 5 + [0] * 5
    assert np.argsort(coreset_ranks(ledger)).tolist() == [5, 6, 7, 8, 9, 0, 1, 2, 3, 4]


def test_a_budget_is_met_exactly(play: Callable[..., Plan], losses: Callable[..., np.ndarray]) -> None:
    policy, told = DPruning.for_budget(0.3, 12, warmup=2), losses(1000, 12)
    assert policy.expected_pruned(12) == pytest.approx(0.3)
    ledger = policy.ledger(1000)
    assert np.mean([play(policy, ledger, told[e], e, 100).pruned for e in range(12)]) == pytest.approx(0.3, abs=1e-3)
    with pytest.raises(UsageError, match=r"must stay below 75\.0%"):
        DPruning.for_budget(0.8, 4)


def test_a_ledger_without_moments_is_refused() -> None:
    with pytest.raises(UsageError, match="has no moving mean"):
        DPruning(keep=0.5).plan(Ledger(4), 1, generator())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"keep": 1}, "keep = 1.0; give a share strictly between 0 and 1"),
        ({"keep": 0.5, "rule": "ucb"}, "rule = 'ucb'; allowed: uncertainty, epsilon-greedy"),
        ({"keep": 0.5, "bound": -1}, "bound = -1"),
        ({"keep": 0.5, "epsilon": 2}, "epsilon = 2"),
        ({"keep": 0.5, "decay": 0}, "decay = 0"),
        ({"keep": 0.5, "period": 0}, "period = 0, warmup = 1"),
        ({"keep": 0.5, "warmup": 0}, "period = 1, warmup = 0"),
    ],
)
def test_refusals(options: dict, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        DPruning(**options)
