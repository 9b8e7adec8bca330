"""SemDeDup inside one cluster: blocks with a running maximum, compared with the dense computation of the released code.

Also rows against a reference: all cosines with a running maximum, compared with the bare products.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

from common import (  # chooses the kernels before NumPy loads
    bare_products,
    embeddings,
    kernel,
    median,
    pool_of,
    ratio,
    seconds,
    side_by_side,
    table,
)

# isort: split
import numpy as np
import threadpoolctl

from thresher import Cache, build, open_store, run_steps
from thresher.ops.neighbors import nearest_earlier
from thresher.runtime.engine import cores


def dense(rows: np.ndarray) -> np.ndarray:
    """The released procedure: all pairs, upper triangle, maximum over each column."""
    cosines = rows @ rows.T
    return np.triu(cosines, 1).max(axis=0)


def blocked(rows: np.ndarray) -> np.ndarray:
    return nearest_earlier(lambda lo, hi: rows[lo:hi], 0, len(rows))[0]


def torch_dense(rows: np.ndarray) -> np.ndarray:
    """The released procedure in torch."""
    import torch

    torch.set_num_threads(1)
    tensor = torch.from_numpy(rows)
    return torch.max(torch.triu(tensor @ tensor.T, diagonal=1), dim=0)[0].numpy()


def against_reference(rows: int, others: int, dim: int, rounds: int, folder: Path) -> list[str]:
    """Time a whole step with a reference, from files to selection, and bare products of the same size."""
    store = open_store(str(pool_of(rows, dim, folder)))
    step = build("semdedup", {"reference": str(pool_of(others, dim, folder)), "reference_eps": 0.05})

    def run() -> None:
        with tempfile.TemporaryDirectory(dir=folder) as cache:
            run_steps(store, [step], cache=Cache.at(cache))

    run()  # reads the files into memory
    spent, bare = [], []
    for _ in range(rounds):
        spent.append(seconds(run))
        bare.append(bare_products(min(rows, 65_536), dim, 1_024) * rows / min(rows, 65_536) * others / 1_024)
    work = 2 * rows * others * dim / 1e9
    share = median([b / s for b, s in zip(bare, spent, strict=True)])
    return [
        f"{rows:,} x {others:,}",
        f"{median(spent):.2f}",
        f"{work / median(spent):.0f}",
        f"{work / median(bare):.0f}",
        f"{share:.0%}",
    ]


def peak(rows: int, dim: int) -> str:
    """Peak memory of one cluster above that of an idle process, in a separate process."""
    command = [sys.executable, __file__, "--peak", str(rows), "--dim", str(dim)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[2_000, 8_000, 20_000])
    parser.add_argument("--large", type=int, default=50_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--reference", type=int, nargs="+", default=[200, 2_000, 20_000], help="rows of references")
    parser.add_argument("--pool", type=int, default=100_000, help="rows compared with references")
    parser.add_argument("--pools", type=Path, default=Path(tempfile.gettempdir()) / "thresher-bench")
    parser.add_argument("--peak", type=int)
    args = parser.parse_args()
    if args.peak:
        rows = np.empty((args.peak, args.dim), np.float32)
        for lo in range(0, len(rows), 1_000):
            rows[lo : lo + 1_000] = embeddings(min(1_000, len(rows) - lo), args.dim, 10, seed=lo)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with threadpoolctl.threadpool_limits(1):
            blocked(rows)
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(f"{(after - before) / 1024:.0f} MB in addition to the {rows.nbytes / 2**20:.0f} MB of its rows")
        return
    contestants = {"dense, NumPy": dense, "thresher": blocked}
    try:
        import torch  # noqa: F401

        contestants["released (dense, torch)"] = torch_dense
    except ImportError:
        pass
    lines = []
    with threadpoolctl.threadpool_limits(1):
        for n in args.rows:
            rows = embeddings(n, args.dim, 10)
            times = side_by_side({name: partial(fn, rows) for name, fn in contestants.items()}, args.rounds)
            lines += [
                [f"{n:,}", name, f"{median(times[name]):.3f}", f"{ratio(times, name, 'thresher'):.1f}x"]
                for name in contestants
            ]
    print(f"SemDeDup inside one cluster, {args.dim} dimensions, one thread, {args.rounds} rounds, {kernel()} kernels\n")
    print(table(["rows", "", "seconds", "time against thresher"], lines))
    print(f"\nA cluster of {args.large:,} rows: {peak(args.large, args.dim)}.")
    lines = [against_reference(args.pool, n, args.dim, args.rounds, args.pools) for n in args.reference]
    print(f"\nAgainst a reference, {args.dim} dimensions, {cores()} threads\n")
    print(table(["rows x reference rows", "seconds", "GFLOP/s", "of bare products", "share"], lines))


if __name__ == "__main__":
    main()
