"""DISSect against its rules written out with loops, and on pairs that are learned early or late."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from thresher.dynamic.ledger import Ledger
from thresher.dynamic.policies.dissect import Dissect, History
from thresher.dynamic.policy import Plan
from thresher.errors import UsageError


@pytest.mark.parametrize("history", ["warm-up", "momentum"])
@pytest.mark.parametrize(("cycle", "warmup"), [(3, 2), (1, 1), (2, 4)])
def test_it_keeps_what_the_published_gap_keeps(
    history: History, cycle: int, warmup: int, play: Callable[..., Plan], losses: Callable[..., np.ndarray]
) -> None:
    """Scores and gaps as published, one row at a time; a score is the negative of a loss."""
    rows, epochs, keep = 90, 13, 0.6
    policy = Dissect(keep=keep, history=history, cycle=cycle, warmup=warmup)
    ledger, table = policy.ledger(rows), losses(rows, epochs)
    past: list[float | None] = [None] * rows
    chosen = set(range(rows))
    for epoch in range(epochs):
        plan = play(policy, ledger, table[epoch], epoch, 30)
        e = (epoch - warmup) % (cycle + 1)
        full = epoch < warmup or e == 0
        assert set(plan.rows().tolist()) == (set(range(rows)) if full else chosen)
        assert plan.pruned == pytest.approx(policy.forecast(epoch), abs=1 / rows)
        if not full:
            continue
        score = [-float(loss) for loss in table[epoch].mean(axis=1)]
        if epoch >= warmup:
            known = [value for value in past if value is not None]
            assert len(known) == rows
            gap = [h - s for h, s in zip(known, score, strict=True)]
            if history == "warm-up":
                gap = [g - (np.mean(known) - np.mean(score)) for g in gap]
            order = sorted(range(rows), key=lambda row: -gap[row])
            chosen = set(order[: int(round(keep * rows, 6))])
        for row in range(rows):
            before = past[row]
            if before is None or (history == "warm-up" and epoch < warmup):
                past[row] = score[row]
            elif history == "momentum":
                past[row] = 0.9 * before + 0.1 * score[row]


def test_pairs_that_are_learned_late_are_left_out(play: Callable[..., Plan]) -> None:
    """Right pairs fall during the warm-up and then stay; wrong ones fall afterwards."""
    rng = np.random.default_rng(0)
    rows, wrong = 1000, np.arange(1000) % 4 == 0
    policy = Dissect(keep=0.75, warmup=3)
    ledger = policy.ledger(rows)
    for epoch in range(5):
        right, late = [5, 2, 1, 0.9, 0.9][epoch], [5, 5, 4.9, 3, 2][epoch]
        told = np.where(wrong, late, right)[:, None] + rng.normal(0, 0.2, (rows, 2))
        plan = play(policy, ledger, told.astype(np.float32), epoch, 100)
    assert plan.phase == "pruned"
    assert plan.kept_N is not None
    assert wrong[~plan.kept_N].mean() > 0.95


def test_a_quarter_of_the_run_is_the_warm_up() -> None:
    assert Dissect.for_run(40) == Dissect(warmup=10)
    assert Dissect.for_run(2) == Dissect(warmup=1)
    assert Dissect.for_budget(0.2, 40).warmup == 10
    assert Dissect.for_budget(0.2, 40, warmup=2).warmup == 2


def test_rows_that_come_later_have_their_first_loss_as_their_past() -> None:
    policy, ledger = Dissect(keep=0.5, warmup=1), Dissect().ledger(4)
    ledger.record([0, 1], [[3.0], [2.0]], 0)
    memory_N = policy.remember(ledger, Plan(epoch=0, phase="warm-up", total=4))
    assert memory_N is not None
    np.testing.assert_array_equal(memory_N, np.array([3, 2, np.nan, np.nan], np.float32))
    ledger.remember(memory_N)
    ledger.record([0, 1, 2], [[1.0], [1.5], [9.0]], 1)
    prepared = Plan(epoch=1, phase="preparation", total=4)
    memory_N = policy.remember(ledger, prepared)
    assert memory_N is not None
    np.testing.assert_array_equal(memory_N, np.array([3, 2, 9, np.nan], np.float32))
    ledger.remember(memory_N)
    marks_N = policy.finish(ledger, prepared, np.random.default_rng(0))
    assert marks_N is not None
    assert marks_N.tolist() == [4, 4, 0, 0], "the row never seen and the one whose loss fell least stay"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"keep": 0}, "keep = 0"),
        ({"keep": 1.0}, "keep = 1.0"),
        ({"history": "momentun"}, "'momentun'; allowed: warm-up, momentum.* Did you mean 'momentum'"),
        ({"momentum": 1.0}, "momentum = 1.0"),
        ({"cycle": 0}, "cycle = 0"),
        ({"warmup": 0}, "warmup = 0"),
    ],
)
def test_parameters_out_of_range_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Dissect(**wrong)


def test_a_ledger_without_a_memory_is_refused() -> None:
    with pytest.raises(UsageError, match="no past losses"):
        Dissect().remember(Ledger(3), Plan(epoch=0, phase="warm-up", total=3))
