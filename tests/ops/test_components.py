from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from thresher.ops.components import find, unite


def joined(n: int, pairs: list[tuple[int, int]]) -> list[int]:
    """The lowest member of each member's set, by renaming a whole set at every pair."""
    names = list(range(n))
    for a, b in pairs:
        low, high = sorted((names[a], names[b]))
        names = [low if name == high else name for name in names]
    return names


@given(st.integers(1, 30), st.data())
def test_sets_are_those_of_renaming_member_by_member(n: int, data: st.DataObject) -> None:
    member = st.integers(0, n - 1)
    pairs = data.draw(st.lists(st.tuples(member, member), max_size=60))
    parents = np.arange(n)
    for lo in range(0, len(pairs), 7):
        some = np.array(pairs[lo : lo + 7])
        unite(parents, some[:, 0], some[:, 1])
        assert (parents <= np.arange(n)).all()
    assert find(parents, np.arange(n)).tolist() == joined(n, pairs)


def test_long_chains_and_stars_take_few_rounds() -> None:
    n = 200_000
    for one, other in ((np.arange(n - 1), np.arange(1, n)), (np.arange(1, n), np.full(n - 1, n - 1))):
        parents = np.arange(n)
        unite(parents, one, other)
        start = int(one.min())
        assert (find(parents, np.arange(start, n)) == start).all()
