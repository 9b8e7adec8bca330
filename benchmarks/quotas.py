"""Quotas of density-based pruning: exact allocation compared with OSQP and rounding."""

from __future__ import annotations

import argparse
from functools import partial

from common import median, seconds, table  # chooses the kernels before NumPy loads

# isort: split
import numpy as np

from thresher.ops.cut import allocate, softmax


def osqp_rounded(target: np.ndarray, low: np.ndarray, high: np.ndarray, total: int) -> np.ndarray:
    from qpsolvers import solve_qp
    from scipy.sparse import csc_matrix, identity

    k = len(target)
    result = solve_qp(
        identity(k, format="csc"), -target, A=csc_matrix(np.ones((1, k))), b=np.array([float(total)]),
        lb=low.astype(float), ub=high.astype(float), solver="osqp",
    )  # fmt: skip
    return np.rint(result).astype(np.int64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clusters", type=int, nargs="+", default=[500, 5_000, 50_000])
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    lines = []
    for k in args.clusters:
        rng = np.random.default_rng(k)
        sizes = np.maximum((rng.pareto(1.2, k) * 200).astype(np.int64), 1)
        total = int(sizes.sum() * 0.3)
        target = softmax(rng.uniform(0.05, 0.5, k), 0.1) * total
        low = np.minimum(1, sizes)
        for name, fn in (("thresher", allocate), ("OSQP, rounded", osqp_rounded)):
            counts = fn(target, low, sizes, total)
            spent = median([seconds(partial(fn, target, low, sizes, total)) for _ in range(args.rounds)])
            broken = int(((counts < low) | (counts > sizes)).sum())
            lines.append([f"{k:,}", name, f"{spent * 1e3:.1f}", f"{counts.sum() - total:+,}", f"{broken:,}"])
    print(f"Quotas, {args.rounds} rounds\n")
    print(table(["clusters", "", "milliseconds", "off the budget", "bounds broken"], lines))


if __name__ == "__main__":
    main()
