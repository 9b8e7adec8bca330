"""Shared by all benchmarks: pools, timing side by side, and the matrix product speed of the machine."""

from __future__ import annotations

import concurrent.futures
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from thresher.runtime.kernels import prefer_avx512

# Do not measure with a kernel pinned for reproducible results; faiss ignores it.
os.environ.pop("OPENBLAS_CORETYPE", None)
prefer_avx512()

import numpy as np  # noqa: E402 - after the kernels are chosen
import threadpoolctl  # noqa: E402


def embeddings(rows: int, dim: int, groups: int, seed: int = 0) -> np.ndarray:
    """Unit rows (rows, dim) float32, similar to encoder outputs: overlapping groups, variances that fall as 1 / i.

    k-means on them still improves after 20 iterations; on well separated groups it converges in ten.
    """
    rng = np.random.default_rng(0)
    scales = np.arange(1, dim + 1, dtype=np.float32) ** np.float32(-0.5)
    centers = rng.standard_normal((groups, dim), dtype=np.float32) * scales
    rng = np.random.default_rng([1, seed])
    out = np.empty((rows, dim), np.float32)
    for lo in range(0, rows, 65_536):
        hi = min(lo + 65_536, rows)
        noise = rng.standard_normal((hi - lo, dim), dtype=np.float32) * scales
        out[lo:hi] = 1.5 * centers[rng.integers(0, groups, hi - lo)] + 0.9 * noise
        out[lo:hi] /= np.linalg.norm(out[lo:hi], axis=1, keepdims=True)
    return out


def without_groups(rows: int, dim: int, seed: int = 0) -> np.ndarray:
    """Unit rows (rows, dim) float32 without cluster structure: Gaussian, variances that fall as 1 / i."""
    scales = np.arange(1, dim + 1, dtype=np.float32) ** np.float32(-0.5)
    out = np.random.default_rng([2, seed]).standard_normal((rows, dim), dtype=np.float32)
    out *= scales
    out /= np.linalg.norm(out, axis=1, keepdims=True)
    return out


def pool_of(rows: int, dim: int, folder: Path) -> Path:
    """A pool of one float16 .npy file, created once."""
    path = folder / f"pool-{rows}x{dim}" / "image.npy"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_name("part.npy")
        file = np.lib.format.open_memmap(scratch, mode="w+", dtype=np.float16, shape=(rows, dim))
        for lo in range(0, rows, 1_000_000):
            hi = min(lo + 1_000_000, rows)
            file[lo:hi] = embeddings(hi - lo, dim, 1_500, seed=lo)
        file.flush()
        scratch.rename(path)
    return path.parent


def seconds(fn: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """Time one call."""
    begin = clock()
    fn()
    return clock() - begin


def side_by_side(
    contestants: dict[str, Callable[[], object]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Time contestants in turn, A B C A B C ..., so that changes of the machine speed affect all alike."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, fn in contestants.items():
            times[name].append(seconds(fn, clock))
    return times


def ratio(times: dict[str, list[float]], a: str, b: str) -> float:
    """Median over rounds of the time of a divided by that of b."""
    return statistics.median(x / y for x, y in zip(times[a], times[b], strict=True))


def median(values: list[float]) -> float:
    """Median."""
    return statistics.median(values)


def bare_products(rows: int, dim: int, columns: int) -> float:
    """Seconds for the bare float32 products of rows x dim by dim x columns on all cores, one stripe at a time."""
    cores = len(os.sched_getaffinity(0))
    rng = np.random.default_rng(0)
    stripes = [rng.standard_normal((1024, dim), dtype=np.float32) for _ in range(16 * cores)]
    others = rng.standard_normal((columns, dim), dtype=np.float32)
    turns = max(rows // (1024 * 16 * cores), 1)

    def work(core: int) -> None:
        out = np.empty((1024, columns), np.float32)
        for _ in range(turns):
            for stripe in stripes[core::cores]:
                np.matmul(stripe, others.T, out=out)

    with threadpoolctl.threadpool_limits(1), concurrent.futures.ThreadPoolExecutor(cores) as pool:
        spent = seconds(lambda: list(pool.map(work, range(cores))))
    return spent * rows / (turns * 1024 * 16 * cores)


def kernel() -> str:
    """The matrix kernels NumPy uses."""
    return ", ".join(
        sorted({library["architecture"] for library in threadpoolctl.threadpool_info() if "architecture" in library})
    )


def table(head: list[str], rows: list[list[str]]) -> str:
    """A markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])
