"""Effect of the sampled first half of k-means on the objective, compared with all iterations on all rows, by seed."""

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
    """Return time and result of one call."""
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
    args = parser.parse_args()
    lines, differences = [], []
    for clusters, groups in ((200, 600), (200, 200), (60, 600)):
        rows = embeddings(args.rows, args.dim, groups)
        percent, faster = [], []
        for seed in range(args.seeds):
            start = rows[np.sort(np.random.default_rng(seed).choice(args.rows, clusters, replace=False))]
            plain, warm = (partial(ours, rows, start, args.iterations, warm=flag) for flag in (False, True))
            (a, first), (b, second) = timed(plain), timed(warm)
            faster.append(a / b)
            percent.append(100 * (objective(rows, second) / objective(rows, first) - 1))
        differences += percent
        changes = ", ".join(f"{value:+.3f}%" for value in percent)
        lines.append([f"{clusters} of {groups} groups", changes, f"{median(faster):.2f}x"])
    print(f"{args.rows:,} x {args.dim}, {args.iterations} iterations, {args.seeds} starts each\n")
    print(table(["clusters", "objective, warm relative to plain", "speed"], lines))
    print(f"\nMean difference of the objective: {np.mean(differences):+.3f}%")


if __name__ == "__main__":
    main()
