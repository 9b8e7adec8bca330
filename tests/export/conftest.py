"""A pool and a selection to export."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from thresher import Cache, Selection, build, open_store, run_steps

ROWS = 200


@pytest.fixture
def uid_pool(tmp_path: Path) -> Path:
    """A parquet pool with shuffled DataComp uids, captions, paths and addresses."""
    rng = np.random.default_rng(3)
    image = rng.standard_normal((ROWS, 8)).astype(np.float32)
    image[100:] = image[:100] + 0.01  # near-duplicates
    uids = [hashlib.md5(str(i).encode()).hexdigest() for i in range(ROWS)]
    table = pa.table(
        {
            "uid": uids,
            "text": [f"caption\t{i}\nof two lines" for i in range(ROWS)],
            "filepath": [f"images/{i}.jpg" for i in range(ROWS)],
            "url": [f"https://example.org/{i}" if i % 10 else None for i in range(ROWS)],
            "image_embedding": pa.array(list(image), pa.list_(pa.float32(), 8)),
        }
    )
    (tmp_path / "pool").mkdir()
    pq.write_table(table, tmp_path / "pool" / "pool.parquet", row_group_size=64)
    return tmp_path / "pool"


@pytest.fixture
def selection(uid_pool: Path, tmp_path: Path) -> Selection:
    steps = [build("semdedup", {"eps": 0.01, "clusters": 4}), build("random", {"keep": "50%"})]
    return run_steps(open_store(str(uid_pool)), steps, cache=Cache.at(tmp_path / "cache"))
