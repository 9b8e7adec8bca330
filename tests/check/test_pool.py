"""The peak memory that ``inspect`` foretells, against that of real runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

METHODS = {
    "clip-score": "clip-score --keep 50%",
    "density": "density --keep 50% --iterations 3",
    "semdedup": "semdedup --eps 0.3 --iterations 3",
    "clipcov": "clipcov --keep 50% --iterations 3",
}


def run(folder: Path, words: str) -> dict[str, Any]:
    line = [sys.executable, "-m", "thresher", *words.split(), "--workers", "2", "--json", "--quiet"]
    line += ["--cache", f"cache-{words.split()[1]}"]
    done = subprocess.run(line, cwd=folder, capture_output=True, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def write(folder: Path, rows: int, dim: int, dtype: str) -> None:
    (folder / "pool").mkdir()
    rng = np.random.default_rng(0)
    for name in ("image", "text"):
        np.save(folder / "pool" / f"{name}.npy", rng.standard_normal((rows, dim), np.float32).astype(dtype))
    table = {"uid": [f"k{i}" for i in range(rows)], "text": [f"caption {i}" for i in range(rows)]}
    pq.write_table(pa.table(table), folder / "pool" / "meta.parquet")


def test_memory_is_foretold_for_each_method(tmp_path: Path) -> None:
    write(tmp_path, 3_000, 32, "float32")
    cost = run(tmp_path, "inspect pool")["cost"]
    assert set(METHODS) < set(cost["memory"])
    assert cost["memory_bytes"] == max(cost["memory"].values()) > 195_000_000
    peak = run(tmp_path, "select density pool -o sel --keep 50%")["peak_memory_bytes"]
    assert 0.8 <= cost["memory"]["density"] / peak <= 1.6


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_memory_is_foretold_within_a_third(tmp_path: Path, dtype: str) -> None:
    write(tmp_path, 200_000, 128, dtype)
    foretold = run(tmp_path, "inspect pool")["cost"]["memory"]
    for name, words in METHODS.items():
        peak = run(tmp_path, f"select {words} pool -o {name}")["peak_memory_bytes"]
        assert 0.75 <= foretold[name] / peak <= 1.6, (name, foretold[name], peak)
