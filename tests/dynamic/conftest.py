"""A training loop without a model: losses are given, everything else is as it will be."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from thresher.dynamic.policy import Plan
from thresher.testing.policy import play_epoch, simulated


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


@pytest.fixture
def play() -> Callable[..., Plan]:
    """:func:`play_epoch`, for tests."""
    return play_epoch


@pytest.fixture
def losses() -> Callable[..., np.ndarray]:
    """:func:`simulated`, for tests."""
    return simulated
