"""SSP-Pruning (Sorscher et al. 2022, arXiv 2206.14486): keep the rows farthest from their prototypes.

The baseline of density-based pruning: the same clusters, but the hardest rows of the whole pool are kept,
whatever their cluster. ``balance`` first guarantees each cluster a fraction of an equal split.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from thresher.errors import UsageError
from thresher.ops.cut import sizes_of, top, top_per_group
from thresher.pruning.clusters import Clustered
from thresher.pruning.registry import method
from thresher.pruning.run import Run
from thresher.selection import Budget, Keep, Selection


@method("ssp")
@dataclass(frozen=True, kw_only=True)
class Ssp(Clustered):
    """Keep the least prototypical rows of the pool."""

    keep: Budget = field(metadata={"help": "share or number of rows to keep"})
    balance: float = field(
        default=0.0, metadata={"help": "fraction of an equal split that each cluster is guaranteed, 0 to 1"}
    )
    order: Literal["hard", "easy"] = field(
        default="hard", metadata={"help": "rows to keep: farthest from the centroid, or nearest"}
    )

    def __post_init__(self) -> None:
        """Validate the parameters."""
        super().__post_init__()
        if not 0 <= self.balance <= 1:
            raise UsageError(f"balance = {self.balance}: must be between 0 and 1")

    def select(self, run: Run) -> Selection:
        """Give each cluster its guaranteed rows, then fill the budget with the hardest rows of the pool."""
        groups = self.groups(run)
        sizes = groups.sizes_K
        budget = Keep.parse(self.keep).of(len(groups.labels_N))
        distances: npt.NDArray[Any] = np.asarray(groups.distances_N)
        priority = distances if self.order == "hard" else -distances
        sure = np.minimum(int(self.balance * budget / len(sizes)), sizes)
        mask = top_per_group(priority, groups.labels_N, sure)
        rest = np.flatnonzero(~mask)
        chosen = rest[top(priority[rest], budget - int(sure.sum()))]
        mask[chosen] = True
        cut = (
            float(distances[chosen].min() if self.order == "hard" else distances[chosen].max()) if len(chosen) else None
        )
        reason = "distance to its centroid {score:.4f}, "
        reason += "the cut is at {cut:.4f}" if cut is not None else "cluster {cluster} keeps {quota:,} of {size:,}"
        return run.selection(
            self,
            mask,
            reasons=(reason,),
            score="distance to the cluster's centroid",
            cut=cut,
            notes=groups.notes,
            rows={"score": distances, "cluster": groups.labels_N},
            groups={
                "size": sizes,
                "quota": sure,
                "kept": sizes_of(groups.labels_N, len(sizes), mask),
                "d_intra": groups.d_intra_K,
            },
        )
