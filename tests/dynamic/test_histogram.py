"""The histogram against numpy's own, on the same edges."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from thresher.dynamic import histogram as module
from thresher.dynamic.histogram import LOSS_EDGES, LossHistogram, on_all_bins

batches = st.lists(st.lists(st.floats(-(2.0**10), 2.0**10, width=32), max_size=20), max_size=5)


def expected(losses: np.ndarray) -> list[int]:
    return np.histogram(np.clip(losses.astype(np.float64), 0, np.nextafter(64, 0)), LOSS_EDGES)[0].tolist()


@given(batches, st.lists(st.sampled_from([-0.0, *LOSS_EDGES.tolist()]), max_size=5))
def test_bins_are_those_of_numpy(values: list[list[float]], edges: list[float]) -> None:
    histogram, parts = LossHistogram(), [np.array(part, np.float32) for part in (*values, edges)]
    for part in parts:
        histogram.add(part)
    found, everything = histogram.as_dict(), np.concatenate(parts)
    if not len(everything):
        assert found is None
        return
    assert found is not None
    assert on_all_bins(found).tolist() == expected(everything)
    assert len(found["edges"]) == len(found["counts"]) + 1
    assert found["counts"][0] > 0 < found["counts"][-1]


def test_many_batches_are_counted_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    losses = np.random.default_rng(0).gamma(2, 1, 1000).astype(np.float32)
    monkeypatch.setattr(module, "_BLOCK", 64)
    histogram = LossHistogram()
    for lo in range(0, 1000, 13):
        histogram.add(losses[lo : lo + 13])
    found = histogram.as_dict()
    assert found is not None
    assert on_all_bins(found).tolist() == expected(losses)
    assert histogram.as_dict() == found


def test_edges_are_round_and_rise_by_a_fifth() -> None:
    assert LOSS_EDGES[[0, 1, -1]].tolist() == [0, 2**-10, 64]
    assert set(LOSS_EDGES.tolist()) > {1.0, 1.25, 1.5, 1.75, 2.0, 2.5}
    steps = LOSS_EDGES[2:] / LOSS_EDGES[1:-1]
    assert steps.min() > 1.14
    assert steps.max() <= 1.25
