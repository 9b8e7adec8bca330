"""What the sampled first half of k-means costs in the objective: against all iterations on everything, by seed."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

from common import embeddings, median, table  # chooses the kernels before NumPy loads

# isort: split
import numpy as np
from kmeans import objective, ours


def timed(fn: Callable[[], np.ndarray]) -> tuple[float, np.ndarray]:
    """Seconds and result of one call."""
    begin = time.perf_counter()
    result = fn()
    return time.perf_counter() - begin, result


def main() -> None:
    """Print the relative objective and time for several pools and seeds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=300_000)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=4)
    given = parser.parse_args()
    lines, differences = [], []
    for clusters, groups in ((200, 600), (200, 200), (60, 600)):
        rows = embeddings(given.rows, given.dim, groups)
        found, faster = [], []
        for seed in range(given.seeds):
            start = rows[np.sort(np.random.default_rng(seed).choice(given.rows, clusters, replace=False))]
            plain, warm = (partial(ours, rows, start, given.iterations, warm=flag) for flag in (False, True))
            (a, first), (b, second) = timed(plain), timed(warm)
            faster.append(a / b)
            found.append(100 * (objective(rows, second) / objective(rows, first) - 1))
        differences += found
        told = ", ".join(f"{value:+.3f}%" for value in found)
        lines.append([f"{clusters} of {groups} groups", told, f"{median(faster):.2f}x"])
    print(f"{given.rows:,} x {given.dim}, {given.iterations} iterations, {given.seeds} starts each\n")
    print(table(["clusters", "objective, warm against plain", "speed"], lines))
    print(f"\nMean difference of the objective: {np.mean(differences):+.3f}%")


if __name__ == "__main__":
    main()
