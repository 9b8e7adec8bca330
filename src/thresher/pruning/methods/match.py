"""Match: keep of each concept cluster the share that a target pool has there.

The rows of the target are assigned to the clusters of the pool. A cluster's target is the target pool's share of it
times the budget; quotas are the closest integers that the cluster sizes allow and that sum exactly to the budget.
Within a cluster the rows with the highest score of a column are kept, or the rows nearest to the centroid, farthest
from it, or random ones.

With ``weight`` the match is soft. Of all subsets of the budget, the one is kept that maximises the sum of the scores
plus weight * budget * sum over clusters of share * log(1 + rows kept). In this sum the n-th row of a cluster adds
log((n + 1) / n), which falls with n, so taking the rows with the largest gains is exact and needs no search.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from thresher.errors import UsageError
from thresher.ops.cut import allocate, order_by_group, sizes_of, top, top_per_group
from thresher.pruning.clusters import Clustered, Groups, assign
from thresher.pruning.reference import Reference, open_reference
from thresher.pruning.registry import method
from thresher.pruning.run import Run
from thresher.pruning.scores import Score, column
from thresher.selection import Budget, Keep, Selection

Floats = npt.NDArray[np.float64]


@method("match")
@dataclass(frozen=True, kw_only=True)
class Match(Clustered):
    """Keep of each concept cluster the share that another pool has there."""

    other: ClassVar[dict[str, Any]] = {"weight": {"column": "similarity", "weight": 0.5}, "column": "similarity"}

    keep: Budget = field(metadata={"help": "share or number of rows to keep"})
    target: str | None = field(
        default=None,
        metadata={
            "metavar": "POOL",
            "help": "pool of the same encoder to match, such as a downstream training set (default: equal shares)",
        },
    )
    column: str | None = field(
        default=None,
        metadata={
            "metavar": "COLUMN",
            "help": "keep the highest of a cluster: column, scoring method or scores.parquet:column",
        },
    )
    order: Literal["easy", "hard", "random"] = field(
        default="easy", metadata={"help": "without column: keep the rows nearest to the centroid, farthest, or random"}
    )
    weight: float | None = field(
        default=None,
        metadata={
            "help": "soft match: score that a row may lack if its cluster is below its share (default: shares are met)"
        },
    )

    def __post_init__(self) -> None:
        """Validate the parameters."""
        super().__post_init__()
        if self.column is not None and self.order != "easy":
            raise UsageError("order is for rows without a column; leave out one of both")
        if self.weight is not None:
            if self.column is None:
                raise UsageError("weight is for the scores of a column: give column, such as clip-score")
            if not 0 <= self.weight <= 1e6:
                raise UsageError(f"weight = {self.weight}: must be from 0 (only the scores count) to 1,000,000")

    def select(self, run: Run) -> Selection:
        """Assign the target to the clusters, and keep its share of each."""
        # The column is read and the target opened before the clustering, which may take hours: either may be refused.
        scored = None if self.column is None else column(run, self.column, "column", finite=True)
        target = None if self.target is None else open_reference(run, self.target, self.embedding)
        groups = self.groups(run)
        labels, sizes = groups.labels_N, groups.sizes_K
        budget = Keep.parse(self.keep).of(len(labels))
        share, notes = self._share(target, groups)
        score, meaning, more = self._priority(run, groups, scored)
        if self.weight is None:
            quotas = allocate(share * budget, np.zeros_like(sizes), sizes, budget)
            mask = top_per_group(score, labels, quotas)
        else:
            mask = top(gains(score, labels, share * budget * self.weight), budget)
            quotas = np.bincount(labels[mask], minlength=len(sizes))
        before, after = _apart(sizes / sizes.sum(), share), _apart(quotas / budget, share)
        notes += (f"total variation distance from the shares of the target: {before:.3f} before, {after:.3f} after",)
        shown = score if self.column is not None else groups.distances_N
        return run.selection(
            self,
            mask,
            reasons=(f"cluster {{cluster}} keeps {{quota:,}} of its {{size:,}} rows; {meaning} {{score:.4f}}",),
            score=meaning,
            notes=(*groups.notes, *more, *notes),
            rows={"score": shown, "cluster": labels},
            groups={"size": sizes, "quota": quotas, "kept": quotas, "target_share": share},
        )

    def _share(self, target: Reference | None, groups: Groups) -> tuple[Floats, tuple[str, ...]]:
        """Return the target's share of each cluster, (K,), that sums to 1, and notes."""
        if target is None:
            filled = groups.sizes_K > 0
            return filled / filled.sum(), ()
        there = assign(target.run, self.embedding, groups.centroids_KD)
        counts = there.sizes_K
        notes = [
            f"target: {self.target}, {len(there.labels_N):,} rows, fingerprint {target.fingerprint}; mean distance to "
            f"the nearest centroid {there.distances_N.mean(dtype=np.float64):.4f}, of the pool "
            f"{groups.distances_N.mean(dtype=np.float64):.4f}"
        ]
        missing = int(counts[groups.sizes_K == 0].sum())
        if missing:
            notes.append(f"{missing:,} rows of the target are in clusters without a row of the pool")
        return counts / counts.sum(), tuple(notes)

    def _priority(
        self, run: Run, groups: Groups, scored: Score | None
    ) -> tuple[npt.NDArray[Any], str, tuple[str, ...]]:
        """Return what the rows of a cluster are ranked by, (n,), its meaning, and notes."""
        if scored is not None:
            return scored.values_N.astype(np.float32), str(self.column), scored.notes
        meaning = "distance to the cluster's centroid"
        if self.order == "random":
            return run.random_ranks("match"), meaning, ()
        distances = np.asarray(groups.distances_N)
        return (distances if self.order == "hard" else -distances), meaning, ()


def gains(scores_N: npt.NDArray[np.float32], labels_N: npt.NDArray[Any], weights_K: Floats) -> Floats:
    """Return what each row adds to the sum of scores + weights * log(1 + rows kept of the group), best rows first.

    Args:
        scores_N: (N,) float32, finite.
        labels_N: (N,) group of each row.
        weights_K: (K,) weight of each group's logarithm, at least 0.

    Returns:
        (N,) float64. In a group they fall with the score, so the best rows of all groups are also the best rows of
        each group.
    """
    sizes_K = sizes_of(labels_N, len(weights_K))
    starts_K = np.cumsum(sizes_K) - sizes_K
    gain_N = np.empty(len(scores_N), np.float64)
    place = 0
    for rows in order_by_group(scores_N, labels_N):
        groups = labels_N[rows]
        turns = np.arange(place, place + len(rows)) - starts_K[groups] + 1  # 1 for the best row of its group
        gain_N[rows] = scores_N[rows] + weights_K[groups] * np.log1p(1 / turns)
        place += len(rows)
    return gain_N


def _apart(one_K: npt.NDArray[Any], other_K: Floats) -> float:
    """Return the total variation distance of two distributions: 0 if they are equal, 1 if disjoint."""
    return float(np.abs(one_K - other_K).sum() / 2)
