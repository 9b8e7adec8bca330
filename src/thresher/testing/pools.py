"""Small pools for tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from thresher.pool.store import EmbeddingStore, open_store


def clustered(n: int, dim: int = 8, groups: int = 5, spread: float = 0.6, seed: int = 0) -> npt.NDArray[np.float32]:
    """Return unit vectors around random centres, (n, dim) float32; row i belongs to centre i % groups."""
    rng = np.random.Generator(np.random.Philox(seed))
    centres = rng.normal(size=(groups, dim))
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    rows = centres[np.arange(n) % groups] + spread / np.sqrt(dim) * rng.normal(size=(n, dim))
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), np.float32)


def write_pool(
    folder: Path,
    image: npt.NDArray[Any] | None,
    text: npt.NDArray[Any] | None = None,
    table: Mapping[str, Sequence[Any]] | None = None,
    *,
    files: int = 1,
    parquet: bool = False,
) -> EmbeddingStore:
    """Write a pool of ``files`` .npy files, or parquet files with list columns, and open it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True)
    arrays = {name: array for name, array in (("image", image), ("text", text)) if array is not None}
    n = len(next(iter(arrays.values()))) if arrays else len(next(iter((table or {}).values())))
    cuts = np.linspace(0, n, files + 1).astype(int)
    for i, (lo, hi) in enumerate(zip(cuts[:-1], cuts[1:], strict=True)):
        columns: dict[str, Any] = {name: values[lo:hi] for name, values in (table or {}).items()}
        if parquet:
            columns |= {f"{name}_embedding": list(array[lo:hi]) for name, array in arrays.items()}
        else:
            for name, array in arrays.items():
                np.save(folder / f"{name}_{i}.npy", array[lo:hi])
        if columns:
            pq.write_table(pa.table(columns), folder / f"part_{i}.parquet")
    return open_store(str(folder))
