from __future__ import annotations

import numpy as np
import pytest

from thresher import build


@pytest.fixture
def store(pool, rows):
    return pool(rows(500))


def kept(select, store, keep, **options):
    return set(select(store, build("random", {"keep": keep}), **options).rows().tolist())


def test_smaller_subsets_are_parts_of_larger_ones(select, store) -> None:
    subsets = [kept(select, store, keep) for keep in (1, 10, "30%", "30.4%", 499, "100%")]
    assert [len(s) for s in subsets] == [1, 10, 150, 152, 499, 500]
    for small, large in zip(subsets, subsets[1:], strict=False):
        assert small < large


def test_a_seed_gives_one_subset_and_another_seed_an_unrelated_one(select, store) -> None:
    a, b, again = (kept(select, store, "50%", seed=seed) for seed in (0, 1, 0))
    assert a == again
    assert 95 < len(a & b) < 155  # 125 expected; within five standard deviations


def test_every_row_is_as_likely(select, store) -> None:
    times = np.zeros(500)
    for seed in range(40):
        times[list(kept(select, store, "50%", seed=seed))] += 1
    assert 2 < times.min() < times.max() < 38
    assert times.std() == pytest.approx(np.sqrt(40 * 0.25), rel=0.2)  # binomial


@pytest.mark.slow
def test_in_a_view_the_ranking_of_rows_is_the_same(select, store) -> None:
    half = select(store, build("random", {"keep": "50%"}), seed=9)
    ranking = [kept(select, store, k) for k in range(1, 500)]
    place = {row: k for k, rows in reversed(list(enumerate(ranking))) for row in rows}
    expected = sorted(half.rows().tolist(), key=lambda row: place.get(row, 500))[:40]
    assert kept(select, store, 40, within=half) == set(expected)
