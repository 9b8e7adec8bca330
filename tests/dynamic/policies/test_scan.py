from __future__ import annotations

import contextlib
import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from thresher.dynamic.ledger import ILL_MATCHED, REDUNDANT, Ledger
from thresher.dynamic.policies.scan import Scan
from thresher.dynamic.policy import Plan
from thresher.errors import UsageError


class Published:
    """The published procedure written out with sets and loops, one epoch at a time; nothing shared with Scan."""

    def __init__(self, rows: int, rho: float, cycle: int, threshold: float, mode: str, scope: str) -> None:
        self.rows, self.rho, self.cycle, self.threshold = rows, rho, cycle, threshold
        self.mode, self.scope = mode, scope
        self.start: int | None = None
        self.previous = math.inf
        self.redundant: set[int] = set()
        self.ill_matched: set[int] = set()

    def sample(self, found: set[int], n: int, rng: np.random.Generator) -> set[int]:
        return {int(i) for i in rng.choice(sorted(found), n, replace=False, shuffle=False)} if n else set()

    def left_out(self, epoch: int, rng: np.random.Generator) -> set[int]:
        if self.start is None or epoch < self.start:
            return set()
        e = (epoch - self.start) % (self.cycle + 1)
        if e == 0:
            self.redundant, self.ill_matched = set(), set()
            return set()
        dump = {"redundant": self.redundant, "ill-matched": self.ill_matched}.get(
            self.mode, self.redundant | self.ill_matched
        )
        share = 0.5 * (1 + math.cos(math.pi * (self.cycle - e) / self.cycle))
        return self.sample(dump, int(len(dump) * share), rng)

    def collect(self, rows: list[int], losses: list[list[float]], rng: np.random.Generator) -> None:
        k = int(len(rows) * self.rho)
        for name in ("redundant", "ill-matched"):
            if self.mode not in ("both", name):
                continue
            sides = []
            for direction in range(len(losses[0])):
                order = sorted(range(len(rows)), key=lambda i: (losses[i][direction], i))
                sides.append(set(order[:k] if name == "redundant" else order[len(order) - k :]))
            found = set.intersection(*sides)
            if len(found) < 0.9 * k:
                found |= self.sample(set.union(*sides) - found, k - len(found), rng)
            (self.redundant if name == "redundant" else self.ill_matched).update(rows[i] for i in found)

    def train(self, epoch: int, losses: np.ndarray, batch: int, order: np.ndarray, rng: np.random.Generator) -> None:
        preparing = self.start is not None and epoch >= self.start and (epoch - self.start) % (self.cycle + 1) == 0
        batches = [order[lo : lo + batch].tolist() for lo in range(0, len(order), batch)]
        if preparing:
            for rows in batches if self.scope == "batch" else [sorted(order.tolist())]:
                self.collect(rows, losses[rows].tolist(), rng)
        current = float(np.mean([np.mean(losses[row]) for row in order]))
        if self.start is None:
            if self.previous < math.inf and (self.previous - current) / self.previous < self.threshold:
                self.start = epoch + 1
            self.previous = current


@given(
    rows=st.integers(8, 90),
    batch=st.integers(5, 40),
    rho=st.floats(0.05, 0.49),
    cycle=st.integers(1, 4),
    mode=st.sampled_from(["both", "redundant", "ill-matched"]),
    scope=st.sampled_from(["batch", "epoch"]),
    directions=st.integers(1, 2),
    agree=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    ties=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_is_the_published_procedure(
    losses: Callable[..., np.ndarray],
    rows: int,
    batch: int,
    rho: float,
    cycle: int,
    mode: str,
    scope: str,
    directions: int,
    agree: float,
    ties: bool,
    seed: int,
) -> None:
    epochs = 2 * cycle + 5
    told = losses(rows, epochs, agree=agree, seed=seed)[..., :directions]
    told = np.round(told, 1) if ties else told
    scan = Scan(rho=rho, cycle=cycle, mode=mode, scope=scope)  # type: ignore[arg-type]
    ledger, slow = scan.ledger(rows), Published(rows, rho, cycle, 0.3, mode, scope)
    phases = []
    for epoch in range(epochs):
        rng, other = (np.random.Generator(np.random.Philox([seed, epoch])) for _ in range(2))
        plan = scan.plan(ledger, epoch, rng)
        expected = set(range(rows)) - slow.left_out(epoch, other)
        assert set(plan.rows().tolist()) == expected
        order = np.random.Generator(np.random.Philox([seed, epoch, 9])).permutation(plan.rows())
        for lo in range(0, len(order), batch):
            some = order[lo : lo + batch]
            marks = scan.marks(told[epoch][some], rng) if plan.collects else None
            ledger.record(some, told[epoch][some], epoch, marks)
        marks_N = scan.finish(ledger, plan, rng)
        if marks_N is not None:
            ledger.mark(marks_N, epoch)
        slow.train(epoch, told[epoch], batch, order, other)
        phases.append(plan.phase)
    start = phases.index("preparation")
    assert start >= 2
    assert phases[:start] == ["warm-up"] * start
    assert phases[start : start + cycle + 2] == ["preparation", *["mutation"] * cycle, "preparation"]


def test_the_warm_up_ends_after_the_first_epoch_that_falls_slowly() -> None:
    scan, ledger = Scan(), Ledger(1)
    rng = np.random.Generator(np.random.Philox(0))
    for epoch, loss in enumerate([8.0, 4.0, 2.5, 2.0, 0.1]):  # falls by 50%, 37.5%, 20%, then fast again
        assert scan.plan(ledger, epoch, rng).phase == ("warm-up" if epoch < 4 else "preparation")
        ledger.record([0], [[loss]], epoch)
    assert scan.plan(ledger, 5, rng).phase == "mutation"


@pytest.mark.parametrize("scope", ["batch", "epoch"])
def test_half_of_the_candidates_are_pruned_over_a_cycle(
    scope: str, play: Callable[..., Plan], losses: Callable[..., np.ndarray]
) -> None:
    scan = Scan(rho=0.3, warmup=0, scope=scope)  # type: ignore[arg-type]
    ledger = scan.ledger(4000)
    told = losses(4000, 8)
    pruned = []
    for epoch in range(8):
        pruned.append(play(scan, ledger, told[epoch], epoch, 200).pruned)
        if epoch == 0:
            candidates = np.count_nonzero(ledger.candidates(0, REDUNDANT | ILL_MATCHED)) / 4000
    assert 0.53 < candidates <= 0.6
    np.testing.assert_allclose(pruned[:4], np.array([0, 0.25, 0.75, 1]) * candidates, atol=1 / 4000)
    assert np.mean(pruned[:4]) == pytest.approx(candidates / 2, abs=1 / 4000)
    assert pruned[4] == 0


def test_every_mutation_epoch_draws_afresh_from_the_candidates(play: Callable[..., Plan]) -> None:
    rng = np.random.Generator(np.random.Philox(0))
    told = rng.random((500, 2), np.float32)
    scan = Scan(rho=0.2, warmup=0, cycle=4)
    ledger = scan.ledger(500)
    play(scan, ledger, told, 0, 100)
    candidates = ledger.candidates(0, REDUNDANT | ILL_MATCHED)
    masks = [play(scan, ledger, told, epoch, 100).kept_N for epoch in range(1, 5)]
    for kept in masks:
        assert kept is not None
        assert not (~kept & ~candidates).any()
    first, second = masks[0], masks[1]
    assert first is not None
    assert second is not None
    assert (~first & second).any(), "what was left out comes back"


def test_the_modes_differ(play: Callable[..., Plan], losses: Callable[..., np.ndarray]) -> None:
    told = losses(300, 2, agree=1.0)
    left_out = {}
    for mode in ("both", "redundant", "ill-matched"):
        scan = Scan(rho=0.2, warmup=0, cycle=1, mode=mode, scope="epoch")  # type: ignore[arg-type]
        ledger = scan.ledger(300)
        plans = [play(scan, ledger, told[0], epoch, 50) for epoch in range(2)]
        left_out[mode] = set(range(300)) - set(plans[1].rows().tolist())
    by_loss = np.argsort(told[0][:, 0], kind="stable").tolist()
    assert left_out["redundant"] == set(by_loss[:60])
    assert left_out["ill-matched"] == set(by_loss[-60:])
    assert left_out["both"] == left_out["redundant"] | left_out["ill-matched"]


def test_equal_losses_do_not_put_a_row_on_both_sides() -> None:
    marks = Scan(rho=0.4).marks(np.ones((10, 2), np.float32), np.random.Generator(np.random.Philox(0)))
    assert marks.tolist() == [REDUNDANT] * 4 + [0, 0] + [ILL_MATCHED] * 4


def test_a_rho_below_one_row_of_a_batch_marks_none() -> None:
    """The released code slices [-0:], and so takes the whole batch for redundant."""
    marks = Scan(rho=0.05).marks(np.arange(19, dtype=np.float32)[:, None], np.random.Generator(np.random.Philox(0)))
    assert not marks.any()


@pytest.mark.parametrize(("top_up", "expected"), [(0.9, 2), (0.5, 2), (0.0, 0), (1.0, 2)])
def test_topping_up(top_up: float, expected: int) -> None:
    both_ways = np.array([[0, 9], [1, 8], [5, 5], [4, 4], [8, 1], [9, 0]], np.float32)
    scan = Scan(rho=1 / 3, mode="redundant", top_up=top_up)
    assert np.count_nonzero(scan.marks(both_ways, np.random.Generator(np.random.Philox(0)))) == expected


def test_the_intersection_is_left_alone_when_nine_tenths_of_it_are_there() -> None:
    losses_BR = np.tile(np.arange(40, dtype=np.float32)[:, None], 2)
    losses_BR[[9, 10], 1] = [10, 9]  # nine of the ten lowest are the same in both directions
    rng = np.random.Generator(np.random.Philox(0))
    assert np.count_nonzero(Scan(rho=0.25, mode="redundant").marks(losses_BR, rng)) == 9
    assert np.count_nonzero(Scan(rho=0.25, mode="redundant", top_up=1.0).marks(losses_BR, rng)) == 10


@pytest.mark.parametrize(
    ("pruned", "epochs", "options"),
    [
        (0.30, 30, {}),
        (0.25, 14, {"warmup": 3, "scope": "epoch"}),
        (0.15, 20, {"mode": "ill-matched", "cycle": 4}),
        (0.35, 33, {"warmup": 0, "cycle": 5}),
    ],
)
def test_a_budget_is_met_within_a_hundredth(
    pruned: float, epochs: int, options: dict, play: Callable[..., Plan], losses: Callable[..., np.ndarray]
) -> None:
    scan = Scan.for_budget(pruned, epochs, **options)
    told = losses(10_000, epochs)
    ledger = scan.ledger(10_000)
    share = np.mean([play(scan, ledger, told[epoch], epoch, 500).pruned for epoch in range(epochs)])
    assert share == pytest.approx(pruned, rel=0.01)


@given(
    st.floats(0.01, 0.5),
    st.integers(1, 60),
    st.integers(1, 6),
    st.integers(0, 6),
    st.sampled_from(["both", "redundant"]),
)
def test_a_budget_is_forecast_exactly_or_refused(
    pruned: float, epochs: int, cycle: int, warmup: int, mode: str
) -> None:
    options = {"cycle": cycle, "warmup": warmup, "mode": mode}
    sides = 2 if mode == "both" else 1
    shares = [0.0, *(0.5 * (1 + math.cos(math.pi * (cycle - e) / cycle)) for e in range(1, cycle + 1))]
    most = sides * 0.5 * sum(shares[i % (cycle + 1)] for i in range(epochs - warmup)) / epochs
    if pruned < most - 1e-9:
        scan = Scan.for_budget(pruned, epochs, **options)  # type: ignore[arg-type]
        assert scan.expected_pruned(epochs) == pytest.approx(pruned, abs=1e-9)
    elif pruned > most + 1e-9:
        with pytest.raises(UsageError, match="train for more epochs"):
            Scan.for_budget(pruned, epochs, **options)  # type: ignore[arg-type]


def test_the_largest_budget_is_named() -> None:
    with pytest.raises(UsageError, match=r"below 42\.9%; rho stays below 0.5; .* or use a warm-up of fewer than 2$"):
        Scan.for_budget(0.6, 14, warmup=2, cycle=3)
    with pytest.raises(UsageError, match=r"cannot prune 60\.0% over 14 epochs: it must stay below 50\.0%"):
        Scan.for_budget(0.6, 14)
    with pytest.raises(UsageError, match=r"below 25\.0%.*or prune both sides"):
        Scan.for_budget(0.6, 14, mode="redundant")


@pytest.mark.parametrize(
    ("epochs", "given", "warmup", "cycle"),
    [
        (100, {}, 2, 3),
        (30, {}, 2, 3),
        (14, {}, 2, 3),
        (9, {}, 1, 3),
        (7, {}, 1, 2),
        (6, {}, 2, 3),  # rho is 0.45 with any warm-up
        (5, {}, 1, 3),
        (4, {}, 1, 2),
        (3, {}, 1, 1),
        (2, {}, 0, 1),
        (4, {"cycle": 2}, 1, 2),
        (9, {"warmup": 3}, 3, 2),
        (4, {"warmup": 0}, 0, 3),
    ],
)
def test_short_runs_warm_up_for_less(epochs: int, given: dict[str, int], warmup: int, cycle: int) -> None:
    scan = Scan.for_budget(0.3, epochs, **given)
    assert (scan.warmup, scan.cycle) == (warmup, cycle)
    assert scan.expected_pruned(epochs) == pytest.approx(0.3)


@given(st.floats(0.01, 0.49), st.integers(2, 60))
def test_the_way_chosen_is_the_first_of_those_with_a_warm_up_and_a_usual_rho(pruned: float, epochs: int) -> None:
    found = {}
    for cycle in (3, 2, 1):
        for warmup in (2, 1, 0):
            with contextlib.suppress(UsageError):
                found[warmup, cycle] = Scan.for_budget(pruned, epochs, cycle=cycle, warmup=warmup).rho
    if not found:
        with pytest.raises(UsageError, match="cannot prune"):
            Scan.for_budget(pruned, epochs)
        return
    scan = Scan.for_budget(pruned, epochs)
    assert scan.rho == found[scan.warmup, scan.cycle]
    warm = {way: rho for way, rho in found.items() if way[0] > 0}
    assert (scan.warmup > 0) == bool(warm)
    usual = [way for way, rho in (warm or found).items() if rho <= 0.35]
    if usual:
        assert (scan.warmup, scan.cycle) == usual[0]
    else:
        assert scan.rho < min((warm or found).values()) + 0.05 + 1e-9


def test_a_warm_up_that_watches_the_loss_is_forecast_at_its_shortest() -> None:
    assert Scan(rho=0.3).expected_pruned(10) == Scan(rho=0.3, warmup=2).expected_pruned(10) == pytest.approx(0.24)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"rho": 0.0}, "rho = 0.0; give a share per side above 0"),
        ({"rho": 0.6, "mode": "redundant"}, "rho = 0.6"),
        ({"rho": 0.5}, "below 0.5 for both sides"),
        ({"rho": math.nan}, "rho = nan"),
        ({"cycle": 0}, "cycle = 0"),
        ({"warmup": -1}, "warmup = -1"),
        ({"threshold": 1.0}, "threshold = 1.0"),
        (
            {"mode": "ill_match"},
            "mode = 'ill_match'; allowed: both, redundant, ill-matched. Did you mean 'ill-matched'",
        ),
        ({"scope": "cycle"}, "scope = 'cycle'; allowed: batch, epoch"),
        ({"top_up": 1.1}, "top_up = 1.1"),
    ],
)
def test_refusals(options: dict, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        Scan(**options)
    with pytest.raises(UsageError, match="epochs = 0"):
        Scan.for_budget(0.3, 0)


def test_a_warm_up_by_losses_below_zero_ends_too() -> None:
    """Those of DRRho are negative once they are learned: the fall counts against their size."""
    policy = Scan(rho=0.25)
    ledger, rng = policy.ledger(10), np.random.default_rng(0)
    phases = []
    for epoch, mean in enumerate([0.02, -0.02, -0.03, -0.036, -0.04, -0.042]):
        phases.append(policy.plan(ledger, epoch, rng).phase)
        ledger.record(np.arange(10), np.full((10, 1), mean), epoch)
    assert phases == [*["warm-up"] * 4, "preparation", "mutation"]  # the fall from -0.03 is a fifth
