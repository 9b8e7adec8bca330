"""Measures the constants of :mod:`thresher.check.cost` on this machine, in about ten seconds."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from thresher.check.cost import Constants
from thresher.ops.kmeans import nearest_centroid
from thresher.ops.neighbors import nearest_earlier
from thresher.pool.store import open_store
from thresher.runtime.engine import Engine
from thresher.runtime.process import one_blas_thread

_SECONDS = 1.0  # for each constant
_PAIRS = 2048  # rows that are compared with each other


def calibrated(engine: Engine, dim: int, workers: int | None = None, seconds: float = _SECONDS) -> Constants:
    """Return constants measured with all cores at work.

    Args:
        engine: Where tasks run that measure the time of a task.
        dim: D: short rows take longer for each number.
        workers: Cores that work at the same time (default: those of the engine).
        seconds: How long each constant is measured.
    """
    cores = workers or engine.workers
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((2048, dim), dtype=np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    group = rows[:_PAIRS]
    with one_blas_thread, tempfile.TemporaryDirectory() as folder:
        pairs = _rate(
            lambda: nearest_earlier(lambda lo, hi: group[lo:hi], 0, len(group)),
            len(group) ** 2 / 2 * dim,
            cores,
            seconds,
        )
        np.save(os.path.join(folder, "image.npy"), rows.astype(np.float16))
        store = open_store(str(Path(folder)))
        block = next(store.blocks("image"))
        prepared = _rate(lambda: store.vectors("image", block), rows.size, cores, seconds)
        sums = np.zeros((512, dim))
        added = _rate(lambda: np.add(sums, 1.0, out=sums), sums.nbytes, 1, seconds)
    begin = time.perf_counter()
    tasks = 2_000
    for _ in engine.map(abs, range(tasks)):
        pass
    task = (time.perf_counter() - begin) / tasks
    return Constants(products=product_speed(dim, cores, seconds), pairs=pairs, prepared=prepared, sums=added, task=task)


def product_speed(dim: int, cores: int, seconds: float = _SECONDS) -> float:
    """Return the multiply-adds a second of assigning rows to centroids, of one core while all work."""
    rng = np.random.default_rng(0)
    narrow = min(1, 2048 / dim)  # fewer if they are very wide
    rows = rng.standard_normal((max(int(2048 * narrow), 64), dim), dtype=np.float32)
    centroids = rng.standard_normal((max(int(512 * narrow), 64), dim), dtype=np.float32)
    with one_blas_thread:
        return _rate(lambda: nearest_centroid(rows, centroids), rows.size * len(centroids), cores, seconds)


def _rate(work: Callable[[], object], size: float, cores: int, seconds: float) -> float:
    """Return how much of ``size`` one core does in a second while others do the same."""
    work()

    def repeated(_: int) -> float:
        # Time of the processor: other programs that are running now will not slow down the run.
        end, begin, count = time.perf_counter() + seconds, time.thread_time(), 0
        while time.perf_counter() < end:
            work()
            count += 1
        return count * size / (time.thread_time() - begin)

    with ThreadPoolExecutor(cores) as threads:
        return sum(threads.map(repeated, range(cores))) / cores
