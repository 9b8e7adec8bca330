"""Sift against its rules written out with loops, and on losses with planted mismatched rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from thresher.dynamic.ledger import ILL_MATCHED, REDUNDANT, Ledger
from thresher.dynamic.mismatch import mismatched_humps
from thresher.dynamic.policies.sift import Sift
from thresher.dynamic.policy import Plan
from thresher.errors import UsageError


class WrittenOut:
    """The rules, one row at a time; only the number of mismatched rows is given."""

    def __init__(self, rows: int, wrong: int, redundant: int, cycle: int, warmup: int) -> None:
        self.rows, self.wrong, self.redundant, self.cycle, self.warmup = rows, wrong, redundant, cycle, warmup
        self.memory: dict[int, float] = {}
        self.ill: set[int] = set()
        self.easy: set[int] = set()

    def full(self, epoch: int) -> bool:
        return epoch < self.warmup or (epoch - self.warmup) % (self.cycle + 1) == self.cycle

    def learn(self, epoch: int, losses: dict[int, float]) -> None:
        if not self.full(epoch):
            return
        for row, loss in losses.items():
            below = sum(other < loss for other in losses.values())
            equal = sum(other == loss for other in losses.values())
            rank = (below + equal / 2) / len(losses)
            self.memory[row] = (self.memory[row] + rank) / 2 if row in self.memory else rank
        if epoch >= self.warmup - 1:
            order = sorted(self.memory, key=lambda row: (-np.float32(self.memory[row]), row))
            self.ill = set(order[: self.wrong])
            order = sorted(losses.keys() - self.ill, key=lambda row: (losses[row], row))
            self.easy = set(order[: self.redundant])


@pytest.mark.parametrize("redundant", [None, 0.15])
@pytest.mark.parametrize(("cycle", "warmup"), [(3, 2), (1, 1), (2, 3)])
def test_it_is_what_the_rules_say(
    redundant: float | None, cycle: int, warmup: int, play: Callable[..., Plan], losses: Callable[..., np.ndarray]
) -> None:
    rows, epochs = 120, 14
    policy = Sift(mismatched=0.2, redundant=redundant, cycle=cycle, warmup=warmup)
    slow = WrittenOut(rows, 24, round((redundant or 0) * rows), cycle, warmup)
    ledger, table = policy.ledger(rows), losses(rows, epochs)
    table[3, :10] = 1.0  # ties
    for epoch in range(epochs):
        plan = play(policy, ledger, table[epoch], epoch, 30)
        out = set() if plan.kept_N is None else set(np.flatnonzero(~plan.kept_N).tolist())
        if slow.full(epoch):
            assert not out
        else:
            assert slow.ill <= out <= slow.ill | slow.easy
            e = (epoch - warmup) % (cycle + 1) + 1
            share = 0.5 * (1 + np.cos(np.pi * (cycle - e) / cycle))
            assert len(out & slow.easy) == int(round(share * len(slow.easy), 6))
        mean = table[epoch].mean(axis=1)
        slow.learn(epoch, {row: float(mean[row]) for row in set(range(rows)) - out})
        assert ledger.memory_N is not None
        np.testing.assert_allclose(ledger.memory_N, [slow.memory[row] for row in range(rows)], rtol=1e-5)
        assert plan.pruned == pytest.approx(policy.forecast(epoch), abs=2 / rows)


def planted(rows: int, share: float, epochs: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Losses (epochs, rows, 1) of pairs of which a share is wrong and learned late; which are wrong."""
    rng = np.random.default_rng(seed)
    wrong = rng.permutation(rows) < share * rows
    hard = rng.normal(0, 0.4, rows) + 3.5 * wrong
    noise = rng.normal(0, 0.8, (epochs, rows))
    falling = 3 * 0.8 ** np.arange(epochs)[:, None]
    return (falling + hard + noise + 5).astype(np.float32)[:, :, None], wrong


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5])
def test_it_finds_how_many_are_mismatched(share: float, play: Callable[..., Plan]) -> None:
    rows, epochs = 4000, 7
    table, wrong = planted(rows, share, epochs, seed=1)
    policy = Sift()
    ledger = policy.ledger(rows)
    plans = [play(policy, ledger, table[epoch], epoch, 500) for epoch in range(epochs)]
    assert [plan.phase for plan in plans] == ["warm-up"] * 2 + ["mutation"] * 3 + ["preparation", "mutation"]
    for plan in plans[2:5] + plans[6:]:
        assert plan.kept_N is not None
        out = ~plan.kept_N
        assert out.mean() == pytest.approx(share, abs=0.04)
        assert wrong[out].mean() > 0.9
        assert out[wrong].mean() > 0.9
    found = mismatched_humps(ledger.memory_N)
    assert found is not None
    assert found.share == pytest.approx(share, abs=0.04)


@pytest.mark.parametrize("rows", [40, 4000])
def test_where_nothing_is_mismatched_nothing_is_left_out(rows: int, play: Callable[..., Plan]) -> None:
    table, _ = planted(rows, 0.0, 10, seed=2)
    policy = Sift()
    ledger = policy.ledger(rows)
    plans = [play(policy, ledger, table[epoch], epoch, rows) for epoch in range(10)]
    assert all(len(plan) == rows for plan in plans)
    assert [plan.phase for plan in plans][2:6] == ["everything"] * 3 + ["preparation"]
    assert not ledger.times_N.any()


def test_what_one_epoch_does_not_show_the_next_may(play: Callable[..., Plan]) -> None:
    """Ranks of a single epoch are flat. Each full epoch looks again, so pruning starts after the second."""
    table, wrong = planted(4000, 0.3, 6, seed=3)
    policy = Sift(warmup=1, cycle=3)
    ledger = policy.ledger(4000)
    plans = [play(policy, ledger, table[epoch], epoch, 500) for epoch in range(6)]
    assert [plan.phase for plan in plans] == [
        "warm-up", "everything", "mutation", "mutation", "preparation", "mutation",
    ]  # fmt: skip
    assert plans[2].kept_N is not None
    assert wrong[~plans[2].kept_N].mean() > 0.9


def test_a_hump_of_most_rows_is_not_left_out(play: Callable[..., Plan]) -> None:
    """A third of the rows are easy, for example repeats: the rest is not mismatched."""
    table, easy = planted(4000, 0.3, 4, seed=4)
    policy = Sift()
    ledger = policy.ledger(4000)
    for epoch in range(4):
        assert len(play(policy, ledger, -table[epoch] + 20, epoch, 500)) == 4000
    assert mismatched_humps(ledger.memory_N) is None


def test_rows_that_were_never_seen_are_kept() -> None:
    policy, ledger = Sift(mismatched=0.6, warmup=1), Sift().ledger(10)
    ledger.record(np.arange(4), np.arange(4.0)[:, None], 0)
    first = Plan(epoch=0, phase="warm-up", total=10)
    memory_N = policy.remember(ledger, first)
    assert memory_N is not None
    ledger.remember(memory_N)
    np.testing.assert_allclose(memory_N[:4], [0.125, 0.375, 0.625, 0.875])
    assert np.isnan(memory_N[4:]).all()
    marks_N = policy.finish(ledger, first, np.random.default_rng(0))
    assert marks_N is not None
    np.testing.assert_array_equal(marks_N, [ILL_MATCHED] * 4 + [0] * 6)


def test_redundant_rows_are_not_mismatched_ones_too(play: Callable[..., Plan]) -> None:
    table, _ = planted(1000, 0.3, 2, seed=5)
    policy = Sift(mismatched=0.5, redundant=0.4)
    ledger = policy.ledger(1000)
    for epoch in range(2):
        play(policy, ledger, table[epoch], epoch, 100)
    assert np.count_nonzero(ledger.marks_N == ILL_MATCHED) == 500
    assert np.count_nonzero(ledger.marks_N == REDUNDANT) == 400


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"mismatched": 0.0}, "mismatched = 0.0"),
        ({"mismatched": 1.0}, "mismatched = 1.0"),
        ({"redundant": -0.1}, "redundant = -0.1"),
        ({"redundant": 0.5}, "at most 0.4 for redundant"),
        ({"mismatched": 0.7, "redundant": 0.3}, "less than 1 in total"),
        ({"cycle": 0}, "cycle = 0"),
        ({"warmup": 0}, "warmup = 0"),
    ],
)
def test_parameters_out_of_range_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Sift(**wrong)


def test_a_ledger_without_a_memory_is_refused() -> None:
    ledger = Ledger(3)
    ledger.record(np.arange(3), np.ones((3, 1)), 0)
    with pytest.raises(UsageError, match=r"no memory; create it with Sift\(...\).ledger\(rows\)"):
        Sift().remember(ledger, Plan(epoch=0, phase="warm-up", total=3))


def test_some_rows_are_left_however_many_are_found_mismatched() -> None:
    """With 60% mismatched, the lowest 40% of all rows would be all the others."""
    for seed in range(100):
        rng = np.random.default_rng(seed)
        wrong_N = rng.random(200) < rng.uniform(0.57, 0.63)
        policy = Sift(redundant=0.4, warmup=1, cycle=1)
        ledger = policy.ledger(200)
        memory_N = np.where(wrong_N, 0.7, 0.2) + 0.06 * rng.standard_normal(200)
        ledger.record(np.arange(200), memory_N[:, None], 0)
        ledger.remember(memory_N.astype(np.float32))
        ledger.mark(policy.finish(ledger, Plan(epoch=0, phase="warm-up", total=200), rng), 0)
        plan = policy.plan(ledger, 1, rng)
        matched = 200 - np.count_nonzero(ledger.candidates(0, ILL_MATCHED))
        assert len(plan) >= matched / 2 > 0
