from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from thresher.dynamic import pick
from thresher.dynamic.pick import draw, growing, lowest, ranks, whole


def generator(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(seed))


@pytest.mark.parametrize(("number", "rows"), [(0.29 * 100, 29), (28.9, 28), (0.0, 0), (0.3 * 10**9, 300_000_000)])
def test_whole_rounds_down_but_not_for_want_of_a_digit(number: float, rows: int) -> None:
    assert whole(number) == rows


@given(hnp.arrays(np.float32, st.integers(1, 40), elements=st.sampled_from([-1, -0.0, 0.0, 0.5, 3, 1e30])), st.data())
def test_lowest_is_the_head_of_a_sort(scores: np.ndarray, data: st.DataObject) -> None:
    k = data.draw(st.integers(0, len(scores)))
    head = sorted(range(len(scores)), key=lambda i: (float(scores[i]), i))[:k]
    assert np.flatnonzero(lowest(scores, k)).tolist() == sorted(head)


@given(hnp.arrays(np.bool_, st.integers(1, 50)), st.data(), st.integers(0, 2**32))
def test_draw_takes_exactly_so_many_of_the_rows_marked(marked: np.ndarray, data: st.DataObject, seed: int) -> None:
    k = data.draw(st.integers(0, int(marked.sum())))
    drawn = draw(marked, k, generator(seed))
    assert drawn.sum() == k
    assert not (drawn & ~marked).any()
    assert (drawn == draw(marked, k, generator(seed))).all()


@pytest.mark.parametrize("block", [1, 2, 3, 100])
def test_draw_makes_every_set_equally_likely(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pick, "_BLOCK", block)
    rng = generator(block)
    marked = np.array([1, 0, 1, 1, 0, 1, 1, 0], bool)
    seen = Counter(tuple(np.flatnonzero(draw(marked, 2, rng)).tolist()) for _ in range(4000))
    assert len(seen) == 10
    assert sum((n - 400) ** 2 / 400 for n in seen.values()) < 33.7  # chi-squared with 9 degrees, p = 0.0001


@given(hnp.arrays(np.float32, st.integers(0, 40), elements=st.sampled_from([-1, -0.0, 0.0, 0.5, 3, 1e30])))
def test_ranks_are_the_share_below_and_half_of_the_equal(values: np.ndarray) -> None:
    slow = [(np.sum(values < value) + np.sum(values == value) / 2) / len(values) for value in values]
    found = ranks(values)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, slow, rtol=1e-6)


def test_a_growing_share_ends_at_all() -> None:
    assert [growing(e, 3) for e in (1, 2, 3)] == pytest.approx([0.25, 0.75, 1])
    assert growing(1, 1) == 1
