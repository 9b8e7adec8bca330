"""Connected components by union-find: each set is named by its lowest member, so the order of the pairs is irrelevant.

A forest is an array of parents: the parent of a member is a lower member of its set, or itself if it is the lowest.
It starts as ``np.arange(N)``, every member by itself.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


def find(parents_N: Ints, members_M: Ints) -> Ints:
    """Return the lowest member of the set of each of some members, (M,); shortens their paths in the forest."""
    while True:
        up = parents_N[members_M]
        further = parents_N[up]
        if np.array_equal(up, further):
            return up
        parents_N[members_M] = further


def unite(parents_N: Ints, one_P: Ints, other_P: Ints) -> None:
    """Join the sets of the two members of each pair, in place.

    Args:
        parents_N: (N,) int64, the forest.
        one_P: (P,) int64, one member of each pair.
        other_P: (P,) int64, the other.
    """
    while True:
        apart = one_P != other_P
        one_P, other_P = find(parents_N, one_P[apart]), find(parents_N, other_P[apart])
        low, high = np.minimum(one_P, other_P), np.maximum(one_P, other_P)
        if np.array_equal(low, high):
            return
        # A set that meets several others is joined to the lowest of them; the others follow in the next round.
        np.minimum.at(parents_N, high, low)
        one_P, other_P = low, high
