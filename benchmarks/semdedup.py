"""SemDeDup inside one cluster: blocks with a running maximum beside the dense way of the released code."""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
from functools import partial

from common import embeddings, kernel, median, ratio, side_by_side, table  # chooses the kernels before NumPy loads

# isort: split
import numpy as np
import threadpoolctl

from thresher.ops.neighbors import nearest_earlier


def dense(rows: np.ndarray) -> np.ndarray:
    """The released procedure: all pairs, upper triangle, maximum over each column."""
    cosines = rows @ rows.T
    return np.triu(cosines, 1).max(axis=0)


def blocked(rows: np.ndarray) -> np.ndarray:
    return nearest_earlier(lambda lo, hi: rows[lo:hi], 0, len(rows))[0]


def torch_dense(rows: np.ndarray) -> np.ndarray:
    """The same through torch, as released."""
    import torch

    torch.set_num_threads(1)
    found = torch.from_numpy(rows)
    return torch.max(torch.triu(found @ found.T, diagonal=1), dim=0)[0].numpy()


def peak(rows: int, dim: int) -> str:
    """Peak memory of one cluster beyond an idle process, in a process of its own."""
    command = [sys.executable, __file__, "--peak", str(rows), "--dim", str(dim)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[2_000, 8_000, 20_000])
    parser.add_argument("--large", type=int, default=50_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peak", type=int)
    given = parser.parse_args()
    if given.peak:
        rows = np.empty((given.peak, given.dim), np.float32)
        for lo in range(0, len(rows), 1_000):
            rows[lo : lo + 1_000] = embeddings(min(1_000, len(rows) - lo), given.dim, 10, seed=lo)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with threadpoolctl.threadpool_limits(1):
            blocked(rows)
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(f"{(after - before) / 1024:.0f} MB beyond the cluster's own {rows.nbytes / 2**20:.0f} MB")
        return
    contestants = {"dense, NumPy": dense, "thresher": blocked}
    try:
        import torch  # noqa: F401

        contestants["released (dense, torch)"] = torch_dense
    except ImportError:
        pass
    lines = []
    with threadpoolctl.threadpool_limits(1):
        for n in given.rows:
            rows = embeddings(n, given.dim, 10)
            times = side_by_side({name: partial(fn, rows) for name, fn in contestants.items()}, given.rounds)
            lines += [
                [f"{n:,}", name, f"{median(times[name]):.3f}", f"{ratio(times, name, 'thresher'):.1f}x"]
                for name in contestants
            ]
    print(
        f"SemDeDup inside one cluster, {given.dim} dimensions, one thread, {given.rounds} rounds, {kernel()} kernels\n"
    )
    print(table(["rows", "", "seconds", "time against thresher"], lines))
    print(f"\nA cluster of {given.large:,} rows: {peak(given.large, given.dim)}.")


if __name__ == "__main__":
    main()
