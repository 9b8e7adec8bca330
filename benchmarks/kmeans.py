"""Spherical k-means on all rows: time and objective of thresher in float32 and bfloat16, compared with faiss."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial

from common import (  # chooses the kernels before NumPy loads
    bare_products,
    embeddings,
    kernel,
    median,
    ratio,
    side_by_side,
    table,
    without_groups,
)

# isort: split
import numpy as np

from thresher.ops import kmeans
from thresher.pruning.clusters import _moves, _on_held
from thresher.runtime.engine import cores
from thresher.runtime.engines.threads import Threads

_NUMPY = kmeans.NumpyNearest()


def ours(
    rows: np.ndarray, start: np.ndarray, iterations: int, nearest: kmeans.Nearest = _NUMPY,
    slack: float = kmeans.SLACK, warm: bool = True,
) -> np.ndarray:  # fmt: skip
    """The k-means of thresher on rows in memory."""
    engine = Threads(cores())

    def each_block(rule: kmeans.Rule, state: kmeans.State) -> Iterator[kmeans.Moves]:
        tasks = ((rows[lo : lo + 16_384], state.bounds(lo, lo + 16_384)) for lo in range(0, len(rows), 16_384))
        return _moves(engine, partial(_on_held, rule), tasks)

    few = 512 * len(start)
    if warm and len(rows) > 2 * few:  # the first half on a sample, as `thresher cluster` does
        chosen = np.sort(np.random.default_rng(2).choice(len(rows), few, replace=False))
        start = ours(rows[chosen], start, iterations // 2, nearest, slack)
        iterations -= iterations // 2
    state = kmeans.State.start(start, len(rows))
    return kmeans.fit(each_block, rows.__getitem__, state, iterations, nearest=nearest, slack=slack)


def faiss_kmeans(rows: np.ndarray, start: np.ndarray, iterations: int) -> np.ndarray:
    import faiss

    model = faiss.Kmeans(
        rows.shape[1], len(start), niter=iterations, spherical=True, max_points_per_centroid=len(rows), verbose=False
    )
    model.train(rows, init_centroids=start)
    return model.centroids


def objective(rows: np.ndarray, centroids: np.ndarray) -> float:
    """Mean cosine to the nearest centroid."""
    total = sum(
        (rows[lo : lo + 65_536] @ centroids.T).max(axis=1).sum(dtype=np.float64) for lo in range(0, len(rows), 65_536)
    )
    return float(total / len(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--clusters", type=int, default=500)
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shape", choices=("groups", "none"), default="groups", help="cluster structure of the data")
    args = parser.parse_args()
    if args.shape == "groups":
        rows = embeddings(args.rows, args.dim, 3 * args.clusters)
    else:
        rows = without_groups(args.rows, args.dim)
    start = rows[np.sort(np.random.default_rng(1).choice(args.rows, args.clusters, replace=False))]
    result: dict[str, np.ndarray] = {}
    bare: list[float] = []

    def keep(name: str, centroids: np.ndarray) -> None:
        result[name] = centroids

    contestants = {
        "faiss-cpu": lambda: keep("faiss-cpu", faiss_kmeans(rows, start, args.iterations)),
        "thresher float32": lambda: keep("thresher float32", ours(rows, start, args.iterations)),
        "bare products": lambda: bare.append(bare_products(args.rows, args.dim, args.clusters) * args.iterations),
    }
    try:
        from thresher.ops.torch_products import SLACK, nearest_bfloat16

        nearest = nearest_bfloat16("cpu")
        contestants["thresher bfloat16"] = lambda: keep(
            "thresher bfloat16", ours(rows, start, args.iterations, nearest, SLACK)
        )
    except ImportError:
        pass
    times = side_by_side(contestants, args.rounds)
    times["bare products"] = bare
    lines = []
    for name in contestants:
        lines.append(
            [
                name,
                f"{median(times[name]):.1f}",
                f"{ratio(times, 'faiss-cpu', name):.2f}x",
                f"{ratio(times, 'bare products', name):.0%}",
                f"{objective(rows, result[name]):.5f}" if name in result else "",
            ]
        )
    size = f"{args.rows:,} x {args.dim}, K = {args.clusters:,}, {args.iterations} iterations, all rows"
    print(f"k-means, shape {args.shape}, {size}, {cores()} cores, {args.rounds} rounds, {kernel()} kernels\n")
    print(table(["", "seconds", "speed against faiss", "of the product peak", "mean cosine"], lines))


if __name__ == "__main__":
    main()
