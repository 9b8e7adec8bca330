"""A training loop without a model: losses are given, everything else is as it will be."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from thresher.dynamic.ledger import Ledger
from thresher.dynamic.policy import Plan, Policy


@pytest.fixture(autouse=True)
def _one_torch_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _strict() -> Iterator[None]:
    with np.errstate(all="raise", under="ignore"):
        yield


def play_epoch(policy: Policy, ledger: Ledger, losses_NR: np.ndarray, epoch: int, batch: int, seed: int = 0) -> Plan:
    """One epoch: plan, batches in an order of their own, record, finish."""
    rng = np.random.Generator(np.random.Philox([seed, epoch, 1]))
    plan = policy.plan(ledger, epoch, rng)
    rows = np.random.Generator(np.random.Philox([seed, epoch, 2])).permutation(plan.rows())
    for lo in range(0, len(rows), batch):
        rows_B = rows[lo : lo + batch]
        marks_B = policy.marks(losses_NR[rows_B], rng) if plan.collects else None
        ledger.record(rows_B, losses_NR[rows_B], epoch, marks_B)
    marks_N = policy.finish(ledger, plan, rng)
    if marks_N is not None:
        ledger.mark(marks_N, epoch)
    return plan


@pytest.fixture
def play() -> Callable[..., Plan]:
    """:func:`play_epoch`, for tests."""
    return play_epoch


def simulated(rows: int, epochs: int, *, agree: float = 0.9, seed: int = 0) -> np.ndarray:
    """(epochs, rows, 2) float32 losses: falling, skewed, two directions that mostly agree."""
    rng = np.random.Generator(np.random.Philox(seed))
    own = rng.gamma(2.0, 1.0, (rows, 1))
    noise = rng.gamma(2.0, 1.0, (epochs, rows, 2))
    falling = 2.0 ** -np.arange(epochs)[:, None, None] + 0.5
    return (falling * (agree * own + (1 - agree) * noise)).astype(np.float32)


@pytest.fixture
def losses() -> Callable[..., np.ndarray]:
    """:func:`simulated`, for tests."""
    return simulated
