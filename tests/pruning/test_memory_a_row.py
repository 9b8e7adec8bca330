"""Memory of a step for each row: what is in no file, as benchmarks/scale.py measures it with millions of rows."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace

import pytest

from thresher import Cache, Serial, build, run_steps
from thresher.ops import cut
from thresher.pruning import class_statistics
from thresher.runtime import files

STEPS = {
    "semdedup": {"eps": 0.05},
    "semdedup prefer": {"eps": 0.05, "prefer": "clip-score"},
    "clipcov": {"keep": "30%"},
}


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of few rows, and files for few numbers, so that what is left grows with the rows."""
    monkeypatch.setattr(class_statistics, "_FORECAST", 512)
    monkeypatch.setattr(cut, "_BLOCK", 512)
    monkeypatch.setattr(cut, "_SORTED", 512)
    monkeypatch.setattr(files, "_SMALL", 1024)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name == "clipcov" else ()) for name in STEPS]
)
def test_own_memory_is_below_32_bytes_a_row(pool, rows, tmp_path, centroid_file, small_blocks, name) -> None:
    method, peaks, centroids = name.partition(" ")[0], {}, centroid_file(rows(60, dim=8, groups=60, seed=3))
    for n in (6_000, 18_000):
        image = rows(n, dim=8, groups=60)
        image[n // 2 :] = image[: n - n // 2] + 0.01
        store = replace(pool(image, image + 0.5 * rows(n, dim=8, groups=60, seed=1), name=f"pool{n}"), block=256)
        step = build(method, {**STEPS[name], "centroids": centroids})
        tracemalloc.start()
        selection = run_steps(store, [step], engine=Serial(), cache=Cache.at(tmp_path / f"cache{n}"))
        peaks[n] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert 0 < len(selection) < n
    assert (peaks[18_000] - peaks[6_000]) / 12_000 < 32
