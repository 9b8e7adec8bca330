from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from thresher.dynamic.ledger import ILL_MATCHED, REDUNDANT, Ledger, coreset_ranks
from thresher.dynamic.policies.d_pruning import DPruning
from thresher.dynamic.policies.infobatch import InfoBatch
from thresher.dynamic.policies.scan import Scan
from thresher.dynamic.policies.sift import Sift
from thresher.dynamic.policy import Plan, Policy, end_epoch
from thresher.errors import UsageError


def through_a_file(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    file = io.BytesIO()
    np.savez(file, **state)
    file.seek(0)
    return dict(np.load(file, allow_pickle=False))


def test_a_new_ledger_knows_nothing() -> None:
    ledger = Ledger(3)
    assert len(ledger) == 3
    assert np.isnan(ledger.loss_N).all()
    assert ledger.seen_N.tolist() == [-1, -1, -1]
    assert len(ledger.epoch_losses()) == 0
    assert not ledger.candidates(0, 7).any()


@pytest.mark.parametrize("directions", [1, 2])
def test_records_the_latest_loss_and_the_epochs(directions: int) -> None:
    ledger = Ledger(4, directions=directions)
    ledger.record([2, 0], [[1.0, 3.0], [5.0, 5.0]], 0)
    ledger.record([2], [[0.5]], 2)
    assert ledger.loss_N.tolist()[::2] == [5.0, 0.5]
    assert np.isnan(ledger.loss_N[[1, 3]]).all()
    assert ledger.seen_N.tolist() == [0, -1, 2, -1]
    np.testing.assert_array_equal(ledger.epoch_losses(), [3.5, np.nan, 0.5])


def test_epoch_losses_are_float64_sums_in_order() -> None:
    values = np.random.Generator(np.random.Philox(1)).random(1000, np.float32)
    ledger, total = Ledger(1000), 0.0
    for lo in range(0, 1000, 64):
        batch = values[lo : lo + 64]
        ledger.record(np.arange(lo, lo + len(batch)), batch[:, None], 0)
        total += float(batch.sum(dtype=np.float64))
    assert ledger.epoch_losses()[0] == total / 1000


@given(st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=12), st.floats(0.05, 1))
def test_moments_follow_the_recurrence(losses: list[float], decay: float) -> None:
    ledger, mean, variance = Ledger(2, decay=decay), losses[0], 0.0
    for epoch, loss in enumerate(losses):
        ledger.record([1], [[loss]], epoch)
        variance = (1 - decay) * (variance + decay * (loss - mean) ** 2)
        mean += decay * (loss - mean)
    assert ledger.means_N is not None
    assert ledger.variances_N is not None
    assert ledger.means_N[1] == pytest.approx(mean, rel=1e-4, abs=1e-3)
    assert ledger.variances_N[1] == pytest.approx(variance, rel=1e-4, abs=1e-2)
    assert ledger.means_N[0] == ledger.variances_N[0] == 0


def test_a_row_is_a_candidate_once_an_epoch_and_its_marks_join() -> None:
    ledger = Ledger(3)
    marks = np.array([REDUNDANT, 0], np.uint8)
    ledger.record([0, 1], np.ones((2, 1)), 4, marks)
    ledger.record([1, 0], np.ones((2, 1)), 4, np.array([ILL_MATCHED, ILL_MATCHED], np.uint8))
    assert ledger.times_N.tolist() == [1, 1, 0]
    assert ledger.candidates(4, REDUNDANT).tolist() == [True, False, False]
    assert ledger.candidates(4, ILL_MATCHED).tolist() == [True, True, False]
    ledger.mark(np.array([0, REDUNDANT, 0], np.uint8), 8)
    assert ledger.times_N.tolist() == [1, 2, 0]
    assert ledger.candidates(8, ILL_MATCHED | REDUNDANT).tolist() == [False, True, False]
    assert ledger.candidates(4, ILL_MATCHED | REDUNDANT).tolist() == [True, False, False]
    assert not ledger.candidates(8, ILL_MATCHED).any()


def test_row_ids_beyond_the_reach_of_float32_are_exact() -> None:
    first = 2**24
    ledger = Ledger(first + 4)
    ledger.record(np.array([first + 1, first + 3]), np.array([[1.0], [2.0]]), 0, np.array([0, REDUNDANT], np.uint8))
    assert np.flatnonzero(ledger.seen_N == 0).tolist() == [first + 1, first + 3]
    plan = Scan(warmup=0, cycle=1).plan(ledger, 1, np.random.Generator(np.random.Philox(0)))
    assert plan.kept_N is not None
    assert np.flatnonzero(~plan.kept_N).tolist() == [first + 3]
    assert plan.rows().dtype == np.int64
    assert plan.rows()[-2:].tolist() == [first + 1, first + 2]


POLICIES: list[Policy] = [
    Scan(warmup=1, cycle=2),
    Scan(scope="epoch", warmup=0),
    InfoBatch(epochs=9),
    DPruning(keep=0.6, rule="epsilon-greedy", period=3),
    Sift(mismatched=0.3, redundant=0.1, warmup=1),
]


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_training_goes_on_from_a_checkpoint(
    policy: Policy, play: Callable[..., Plan], losses: Callable[..., np.ndarray]
) -> None:
    told = losses(97, 9)
    ledger = policy.ledger(97)
    for epoch in range(5):
        play(policy, ledger, told[epoch], epoch, 16)
    state = ledger.state()
    other = Ledger.from_state(through_a_file(state))
    for epoch in range(5, 9):
        plan = play(policy, ledger, told[epoch], epoch, 16)
        again = play(policy, other, told[epoch], epoch, 16)
        assert plan.rows().tolist() == again.rows().tolist()
    for name, array in ledger.state().items():
        np.testing.assert_array_equal(array, other.state()[name])
    assert (state["seen"] <= 4).all(), "a state is a copy"


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_a_ledger_and_its_plan_take_less_than_32_bytes_a_row(policy: Policy) -> None:
    import tracemalloc

    rows = 2_000_000
    rng = np.random.Generator(np.random.Philox(0))
    ledger = policy.ledger(rows)
    told, marks = rng.random((rows, 1), np.float32), np.zeros(rows, np.uint8)
    marks[::2] = REDUNDANT
    ledger.record(np.arange(rows), told, 1, marks)
    held = sum(array.nbytes for array in ledger.state().values()) / rows
    tracemalloc.start()
    for epoch in (1, 2):
        end_epoch(policy, ledger, policy.plan(ledger, epoch, rng), rng)
    peak = tracemalloc.get_traced_memory()[1] / rows
    tracemalloc.stop()
    assert held + peak < 32


def test_a_memory_is_kept_where_there_is_one() -> None:
    ledger, memory = Ledger(3, memory=True), np.array([0.5, np.nan, 1], np.float32)
    assert ledger.memory_N is not None
    assert np.isnan(ledger.memory_N).all()
    ledger.remember(memory)
    again = Ledger.from_state(through_a_file(ledger.state()))
    np.testing.assert_array_equal(again.memory_N, memory)
    larger = ledger.grown(5, np.array([4, 0, 2]))
    np.testing.assert_array_equal(larger.memory_N, np.array([np.nan, np.nan, 1, np.nan, 0.5], np.float32))
    for other, values in ((Ledger(3), memory), (ledger, memory[:2]), (ledger, memory.astype(np.float64))):
        with pytest.raises(UsageError, match=r"a memory of shape .*; give \(3,\) float32, for a ledger that was"):
            other.remember(values)


def test_a_ledger_of_earlier_versions_has_no_memory() -> None:
    ledger = Ledger.from_state(through_a_file(Ledger(3).state()))
    assert ledger.memory_N is None
    assert ledger.references_N is None
    assert not {"memory", "references"} & set(ledger.state())


def test_a_memory_takes_4_bytes_a_row() -> None:
    def size(ledger: Ledger) -> int:
        return sum(array.nbytes for array in ledger.state().values())

    assert size(Sift().ledger(1000)) - size(Ledger(1000)) == 4000


def test_coreset_ranks() -> None:
    ledger = Ledger(7)
    marks = np.array([1, 0, 0, 1, 2, 0], np.uint8)
    ledger.record([0, 1, 2, 3, 4, 5], np.array([[1.0], [9.0], [2.0], [1.0], [1.0], [2.0]]), 0, marks)
    ledger.mark(np.array([1, 0, 0, 0, 0, 0, 0], np.uint8), 4)
    ledger.mark(np.array([0, 0, 0, 1, 0, 0, 0], np.uint8), 8)
    # Never a candidate, by loss, then by id: 2, 5, 1; once: 4; twice, the longest ago first: 0, 3; never seen: 6.
    assert np.argsort(coreset_ranks(ledger)).tolist() == [2, 5, 1, 4, 0, 3, 6]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Ledger(0), "0 rows; give 1 to 999,999,999"),
        (lambda: Ledger(10**9), "1,000,000,000 rows"),
        (lambda: Ledger(2, directions=3), "directions = 3"),
        (lambda: Ledger(2, decay=0.0), "decay = 0.0"),
        (lambda: Ledger(2).record([0.0], [[1.0]], 0), "type float64; give integers"),
        (lambda: Ledger(2).record([0], [1.0], 0), r"losses of shape \(1,\); give \(1, 1\)"),
        (lambda: Ledger(2).record([0], [[1.0, 1.0, 1.0]], 0), r"losses of shape \(1, 3\)"),
        (lambda: Ledger(2).record([2], [[1.0]], 0), "row ids 2 to 2; the ledger has 0 to 1"),
        (lambda: Ledger(2).record([-1], [[1.0]], 0), "row ids -1"),
        (lambda: Ledger(2).record([0, 1], [[1.0], [np.nan]], 0), r"loss of row 1 is \[nan\]"),
        (lambda: Ledger(2).record([0], [[1.0]], 40_000), "epoch 40,000; epochs are 0 to 32,767"),
        (lambda: Ledger.from_state({}), "no losses"),
        (lambda: Ledger.from_state({"losses": np.zeros((2, 1), np.float32)}), "seen is missing"),
        (lambda: Ledger.from_state({**Ledger(2).state(), "seen": np.zeros(3, np.int16)}), r"seen is int16 \(3,\)"),
        (lambda: Ledger.from_state({**Ledger(2).state(), "times": np.zeros(2)}), "times is float64"),
        (lambda: Ledger.from_state({**Ledger(2).state(), "memory": np.zeros(2)}), "memory is float64"),
        (lambda: Ledger.from_state({**Ledger(2).state(), "references": np.zeros(1, "f4")}), r"references is .* \(1,\)"),
        (lambda: Ledger.from_state({**Ledger(2).state(), "memory": np.full(2, np.inf, "f4")}), "memory has infinite"),
    ],
)
def test_refusals(make: Callable[[], Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        make()


def test_an_empty_batch_is_nothing() -> None:
    ledger = Ledger(2)
    ledger.record(np.zeros(0, np.int64), np.zeros((0, 2)), 0)
    assert len(ledger.epoch_losses()) == 0
