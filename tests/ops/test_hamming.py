from __future__ import annotations

import numpy as np
import pytest

from thresher.ops import hamming
from thresher.ops.hamming import MOST, first_kept_within


def brute_force(values: list[int], distance: int) -> list[int]:
    """Each hash is compared with all kept before it."""
    first, kept = [], []
    for i, value in enumerate(values):
        found = next((j for j in kept if (value ^ values[j]).bit_count() <= distance), -1)
        first.append(found)
        if found < 0:
            kept.append(i)
    return first


def similar(count: int, flips: int, seed: int, centres: int) -> np.ndarray:
    """Different hashes around some centres, with up to so many bits flipped; some with nearly all bits 0."""
    rng = np.random.default_rng(seed)
    base = rng.integers(0, 2**64, centres, np.uint64)
    base[0] = 0
    values = base[rng.integers(0, centres, count)]
    for _ in range(flips):
        values ^= np.where(rng.random(count) < 0.7, np.uint64(1) << rng.integers(0, 64, count, np.uint64), np.uint64(0))
    _, first = np.unique(values, return_index=True)
    return values[np.sort(first)]


@pytest.mark.parametrize("distance", [0, 1, 2, 4, 7, MOST])
@pytest.mark.parametrize(("count", "flips", "centres"), [(1, 1, 1), (300, 4, 5), (1200, 6, 80), (600, 7, 3)])
def test_the_same_as_comparing_with_all_kept_ones(distance, count, flips, centres, monkeypatch) -> None:
    values = similar(count, flips, seed=distance, centres=centres)
    expected = brute_force(values.tolist(), distance)
    assert distance == 0 or count == 1 or -1 < max(expected)
    for chunk, pairs in ((1024, 2**21), (100, 2**21), (100, 1_009)):
        monkeypatch.setattr(hamming, "_CHUNK", chunk)
        assert first_kept_within(values, distance, pairs=pairs).tolist() == expected


def test_chains_do_not_join_their_ends() -> None:
    values = np.array([0b0, 0b1, 0b11, 0b111, 0b1111], np.uint64)
    assert first_kept_within(values, 1).tolist() == [-1, 0, -1, 2, -1]
    assert first_kept_within(values[[1, 0, 2, 3, 4]], 1).tolist() == [-1, 0, 0, -1, 3]


def test_none() -> None:
    assert first_kept_within(np.empty(0, np.uint64), 3).tolist() == []
