"""Density-based pruning, DBP (arXiv 2401.04578): keep fewer rows from dense clusters.

The complexity of a cluster is d_inter * d_intra. Its target share is the softmax of complexity / ``temperature``.
Quotas are the integers closest to the targets that the cluster sizes allow and that sum exactly to the budget.
In each cluster the rows farthest from the centroid are kept ("hard").

``released=True`` reproduces the released code instead: temperature 0.5 unless given; at least
min(m, size - 1) rows of each cluster, with m half of an equal share; the mean complexity for clusters whose
own is undefined; quotas from OSQP, rounded to the nearest integer. As published, these quotas miss the budget and can
exceed the size of a cluster. Needs the extra ``released``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from thresher.errors import MissingExtraError, UsageError, installed
from thresher.ops.cut import allocate, sizes_of, softmax, top_per_group
from thresher.pruning.clusters import Clustered, Groups
from thresher.pruning.registry import method
from thresher.pruning.run import Run
from thresher.runtime.format import counted
from thresher.selection import Budget, Keep, Selection

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@method("density")
@dataclass(frozen=True, kw_only=True)
class Density(Clustered):
    """Prune each concept cluster according to its complexity."""

    keep: Budget = field(metadata={"help": "share or number of rows to keep"})
    temperature: float | None = field(
        default=None, metadata={"help": "of the softmax over complexity; higher is more even (0.1; released: 0.5)"}
    )
    neighbors: int = field(default=20, metadata={"help": "number of nearest centroids for d_inter"})
    order: Literal["hard", "easy", "random"] = field(
        default="hard", metadata={"help": "rows of a cluster to keep: farthest from the centroid, nearest, or random"}
    )
    min_per_cluster: int = field(default=1, metadata={"help": "rows to keep of each cluster at least, if it has them"})
    released: bool = field(
        default=False, metadata={"help": "reproduce the released code, which can miss the budget (extra: released)"}
    )

    def __post_init__(self) -> None:
        """Validate the parameters."""
        super().__post_init__()
        if self.temperature is not None and not 1e-6 <= self.temperature <= 1e6:
            raise UsageError(f"temperature = {self.temperature}: must be from 0.000001 to 1,000,000")
        if self.released and not (installed("qpsolvers") and installed("osqp")):
            raise MissingExtraError("density with released = true", "released")
        if self.neighbors < 1:
            raise UsageError(f"neighbors = {self.neighbors}: must be at least 1")
        if self.min_per_cluster < 0:
            raise UsageError(f"min_per_cluster = {self.min_per_cluster}: must be at least 0")

    def select(self, run: Run) -> Selection:
        """Compute the complexity and quota of each cluster, and keep that many rows of each."""
        groups = self.groups(run)
        sizes = groups.sizes_K
        budget = Keep.parse(self.keep).of(len(groups.labels_N))
        notes = list(groups.notes)
        d_intra, d_inter = groups.d_intra_K, groups.d_inter_K(run.engine, self.neighbors)
        if self.released:
            complexity = d_inter * d_intra
            quotas = _released_quotas(complexity, sizes, budget, self.temperature or 0.5)
            kept = int(np.minimum(quotas, sizes).sum())
            if kept != budget:
                notes.append(f"as released: {kept - budget:+,} rows off the budget of {budget:,}")
            counts = np.clip(quotas, 0, sizes)
            if self.order == "easy":
                counts = np.where(quotas == 0, sizes, counts)  # [-0:] in the released code keeps the whole cluster
        else:
            complexity = d_inter * np.nan_to_num(d_intra)
            counts, note = _quotas(complexity, sizes, budget, self.temperature or 0.1, self.min_per_cluster)
            notes += note
            quotas = counts
        mask = top_per_group(_priority(self, run, groups), groups.labels_N, counts)
        return run.selection(
            self,
            mask,
            reasons=("cluster {cluster} keeps {quota:,} of its {size:,} rows; distance to its centroid {score:.4f}",),
            score="distance to the cluster's centroid",
            notes=notes,
            rows={"score": groups.distances_N, "cluster": groups.labels_N},
            groups={
                "size": sizes,
                "quota": np.asarray(quotas, np.int64),
                "kept": sizes_of(groups.labels_N, len(sizes), mask),
                "complexity": complexity,
                "d_intra": d_intra,
                "d_inter": d_inter,
            },
        )


def _priority(how: Density, run: Run, groups: Groups) -> npt.NDArray[Any]:
    if how.order == "random":
        return run.random_ranks("density")
    return groups.distances_N if how.order == "hard" else -np.asarray(groups.distances_N)


def _quotas(complexity: Floats, sizes: Ints, budget: int, temperature: float, least: int) -> tuple[Ints, list[str]]:
    """Return the quotas, (K,), and notes; empty clusters are not part of the softmax."""
    filled = sizes > 0
    target = np.zeros(len(sizes), np.float64)
    target[filled] = softmax(complexity[filled], temperature) * budget
    low = np.minimum(least, sizes)
    notes = []
    if low.sum() > budget:
        notes.append(
            f"a budget of {counted(budget, 'row')} is too small for {least} of each of {int(filled.sum()):,} clusters: "
            "no minimum is applied"
        )
        low = np.zeros_like(sizes)
    return allocate(target, low, sizes, budget), notes


def _released_quotas(complexity: Floats, sizes: Ints, budget: int, temperature: float) -> Ints:
    """Return the quotas of the released code, (K,): float32 softmax, OSQP, rounded to the nearest integer."""
    from qpsolvers import solve_qp
    from scipy.sparse import csc_matrix, identity

    k = len(sizes)
    undefined = np.isnan(complexity) | (sizes <= 1)
    filled = np.where(undefined, np.nan, complexity)
    filled = np.where(undefined, np.nanmean(filled) if (~undefined).any() else 1.0, filled)
    scaled = (filled.astype(np.float32) / np.float32(temperature)).astype(np.float32)
    weights = np.exp(scaled - scaled.max())
    target = (weights / weights.sum()).astype(np.float32) * budget
    least = int(budget / k * 0.5)
    solution = solve_qp(
        P=identity(k, format="csc"),
        q=-target.astype(np.float64),
        A=csc_matrix(np.ones((1, k))),
        b=np.array([float(budget)]),
        lb=np.minimum(least, sizes - 1).astype(np.float64),
        ub=sizes.astype(np.float64),
        solver="osqp",
    )
    if solution is None:
        raise UsageError("the solver of the released code finds no solution for these clusters; leave out released")
    return np.asarray(np.rint(solution), np.int64)
