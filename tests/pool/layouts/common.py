"""What every layout has to fulfil, for the tests of each."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.pools import Pool, float32
from thresher import EmbeddingStore

CUTS: list[list[int]] = [[], [20], [1, 2, 19, 33]]  # 1, 2 and 5 uneven files of ROWS rows
ROWS = 41


def whole(store: EmbeddingStore, field: str) -> np.ndarray:
    """All vectors of a field as float32, by blocks of an odd size."""
    return np.concatenate([float32(store.raw(field, block)) for block in store.blocks(field, size=6)])


def metadata(store: EmbeddingStore, column: str | None) -> list[Any]:
    """A metadata column by one scan; ids have to be in order."""
    found, next_id = [], 0
    for ids, part in store.scan([column]):
        assert ids.tolist() == list(range(next_id, next_id + len(part)))
        next_id += len(part)
        found += part.column(0).to_pylist()
    return found


def check(store: EmbeddingStore, pool: Pool, kind: str) -> None:
    """The store holds exactly the pool, in its order, read every way there is."""
    assert store.layout.kind == kind
    assert len(store) == store.total == len(pool)
    assert store.fields == ("image", "text", "joint")
    some = np.array([0, 1, 2, 19, 20, len(pool) - 1])
    for field in ("image", "text"):
        wanted = float32(getattr(pool, field))
        np.testing.assert_array_equal(whole(store, field), wanted)
        np.testing.assert_array_equal(float32(store.raw_at(field, some)), wanted[some])
        assert store.stored_bytes(field) == getattr(pool, field).nbytes
    if store.layout.key:
        assert metadata(store, store.layout.key) == [k for _, keys in store.keys() for k in keys] == pool.keys
        assert [k for part in store.lookup([store.layout.key], some) for k in part.column(0).to_pylist()] == [
            pool.keys[row] for row in some
        ]
        assert metadata(store, store.layout.caption) == pool.captions
