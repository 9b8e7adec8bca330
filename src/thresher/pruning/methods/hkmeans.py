"""Hierarchical balanced k-means (arXiv 2405.15613): the same number of rows of every concept, at several scales.

The rows are clustered, the centroids are clustered again, and so on. At each level k-means is repeated on a part of its
input: the members of every cluster that are closest to the centroid. Frequent concepts have then no more weight than
rare ones, so the centroids spread evenly over what is in the pool rather than by how often it is there.

The budget is divided from the top: a group with a budget gives each of its parts min(c, size) rows, with the one cap c
for which this sums to the budget. In the clusters of the lowest level the closest rows are kept, or random ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from thresher.errors import UsageError
from thresher.io.paths import cut
from thresher.ops.cut import allocate, top_per_group
from thresher.ops.kmeans import nearest_centroid
from thresher.ops.vectors import F32
from thresher.pruning.clusters import Clustered, Groups, assign, centroids_of_array
from thresher.pruning.registry import method
from thresher.pruning.run import Run
from thresher.selection import Budget, Keep, Selection

Ints = npt.NDArray[np.int64]

_LEVELS = ("two", "three", "four", "five", "six")  # names of the levels above the first, in the evidence
_PARTS = 10  # clusters per cluster of the next level, if levels are chosen


@method("hkmeans")
@dataclass(frozen=True, kw_only=True)
class HierarchicalKMeans(Clustered):
    """Keep equally many rows of every concept, at several scales."""

    example: ClassVar[dict[str, Any]] = {"keep": "30%", "resample": 2}
    other: ClassVar[dict[str, Any]] = {"levels": "20,5", "closest": 3}

    keep: Budget = field(metadata={"help": "share or number of rows to keep"})
    levels: str | None = field(
        default=None,
        metadata={"metavar": "K,K,K", "help": "clusters of each level, such as 1000,100,10 (default: chosen)"},
    )
    resample: int = field(default=10, metadata={"help": "how often each level repeats k-means on its closest members"})
    closest: int | None = field(
        default=None, metadata={"help": "members of a cluster to resample (default: half of the mean size)"}
    )
    order: Literal["easy", "hard", "random"] = field(
        default="easy", metadata={"help": "rows of a cluster to keep: nearest to the centroid, farthest, or random"}
    )

    def __post_init__(self) -> None:
        """Validate the parameters."""
        super().__post_init__()
        if self.resample < 0:
            raise UsageError(f"resample = {self.resample}: must be at least 0 (plain k-means at every level)")
        if self.closest is not None and self.closest < 1:
            raise UsageError(f"closest = {self.closest}: must be at least 1")
        if self.levels is None:
            return
        counts = parse_levels(self.levels)
        if self.clusters not in (None, counts[0]):
            raise UsageError(
                f"levels = {cut(self.levels, 100)!r}: begins with {counts[0]:,} clusters, but clusters is "
                f"{self.clusters:,}"
            )

    def select(self, run: Run) -> Selection:
        """Cluster level by level, divide the budget from the top, and keep that many rows of each cluster."""
        wide = self.fitted_on(run)
        groups, tree = self._clustered(wide)
        groups = groups.within(wide, run)
        sizes = groups.sizes_K
        budget = Keep.parse(self.keep).of(len(groups.labels_N))
        quotas = divided(sizes, tree, budget)
        priority: npt.NDArray[Any] = np.asarray(groups.distances_N)
        if self.order == "random":
            priority = run.random_ranks("hkmeans")
        elif self.order == "easy":
            priority = -priority
        mask = top_per_group(priority, groups.labels_N, quotas)
        of_level = list(ancestors(tree, len(sizes)))
        return run.selection(
            self,
            mask,
            reasons=("cluster {cluster} keeps {quota:,} of its {size:,} rows; distance to its centroid {score:.4f}",),
            score="distance to the cluster's centroid",
            notes=(*groups.notes, *_spread(of_level, sizes, quotas)),
            rows={"score": groups.distances_N, "cluster": groups.labels_N},
            groups={
                "size": sizes,
                "quota": quotas,
                "kept": quotas,
                **{f"level_{name}": parents for name, parents in zip(_LEVELS, of_level[1:], strict=False)},
            },
        )

    def _clustered(self, run: Run) -> tuple[Groups, list[Ints]]:
        """Return the clusters of the lowest level, and for each level the group of the next one of every cluster."""
        first = None if self.levels is None else parse_levels(self.levels)[0]
        how = replace(self, clusters=first or self.clusters)
        groups = how.groups_of_view(run)
        if self.centroids is None:
            groups = how._resampled(run, groups)
        counts = parse_levels(self.levels) if self.levels is not None else chosen_levels(len(groups.centroids_KD))
        notes = [*groups.notes, f"clusters of each level: {', '.join(f'{k:,}' for k in counts)}"]
        tree, rows_MD = [], groups.centroids_KD
        for level, k in enumerate(counts[1:], 2):
            rows_MD, labels_M = self._clustered_array(run, rows_MD, k, level)
            tree.append(labels_M)
        return replace(groups, notes=tuple(notes)), tree

    def _resampled(self, run: Run, groups: Groups) -> Groups:
        """Repeat k-means on the closest rows of each cluster, and assign all rows again."""
        k, notes = len(groups.centroids_KD), groups.notes
        for _ in range(self.resample):
            near = closest_members(groups.distances_N, groups.labels_N, k, self.closest)
            part = replace(run, store=replace(run.store, rows=run.store.ids_at(near)))
            centroids = replace(self, clusters=k).groups_of_view(part).centroids_KD
            groups = assign(run, self.embedding, centroids)
        return replace(groups, notes=notes)

    def _clustered_array(self, run: Run, rows_MD: F32, k: int, level: int) -> tuple[F32, Ints]:
        """Return the centroids of the centroids of a level, (K, D), and the group of each, (M,)."""
        centroids = centroids_of_array(run, rows_MD, k, self.iterations, f"level {level}")
        labels, cosines = nearest_centroid(rows_MD, centroids)
        for _ in range(self.resample):
            near = closest_members(-cosines, labels, k, self.closest)
            centroids = centroids_of_array(run, rows_MD[near], k, self.iterations, f"level {level}")
            labels, cosines = nearest_centroid(rows_MD, centroids)
        return centroids, labels.astype(np.int64)


def parse_levels(text: str) -> list[int]:
    """Return the number of clusters of each level, lowest first.

    Raises:
        UsageError: They are not one to six falling whole numbers from 1 up.
    """
    parts = [part.strip() for part in str(text).split(",")]
    if not all(part.isdecimal() and part.isascii() and len(part) < 10 for part in parts):
        raise UsageError(
            f"levels = {cut(text, 100)!r}: must be numbers of clusters with commas between, such as 1000,100,10"
        )
    counts = [int(part) for part in parts]
    if counts[-1] < 1 or any(low <= high for low, high in zip(counts, counts[1:], strict=False)):
        raise UsageError(
            f"levels = {cut(text, 100)!r}: each level must have fewer clusters than the one before, and at least 1"
        )
    if len(counts) > 1 + len(_LEVELS):
        raise UsageError(f"levels = {cut(text, 100)!r}: {len(counts)} levels; there may be at most {1 + len(_LEVELS)}")
    return counts


def chosen_levels(clusters: int) -> list[int]:
    """Return the number of clusters of each level: a tenth of the level below, as long as that is at least 4."""
    counts = [clusters]
    while counts[-1] >= 4 * _PARTS and len(counts) <= len(_LEVELS):
        counts.append(counts[-1] // _PARTS)
    return counts


def closest_members(distances_N: F32, labels_N: npt.NDArray[Any], k: int, closest: int | None) -> Ints:
    """Return the members closest to the centroid of each cluster, ascending.

    Args:
        distances_N: (N,) float32 distance of each member to its centroid.
        labels_N: (N,) cluster of each member.
        k: Number of clusters, at most N.
        closest: Members of each cluster; half of the mean size by default. More are taken if all clusters together
            have fewer than ``k`` of them.
    """
    sizes_K = np.bincount(labels_N, minlength=k)
    most = max(len(labels_N) // (2 * k), 1) if closest is None else closest
    while np.minimum(sizes_K, most).sum() < k:  # because some clusters are empty
        most += 1
    return np.flatnonzero(top_per_group(-np.asarray(distances_N), labels_N, np.minimum(sizes_K, most)))


def divided(sizes_K: Ints, tree: list[Ints], budget: int) -> Ints:
    """Return the rows to keep of each cluster, (K,): at every level min(cap, size), with the cap that the budget gives.

    Args:
        sizes_K: (K,) rows of each cluster of the lowest level.
        tree: For each level but the last, the group of the next level of each of its clusters.
        budget: Rows to keep, at most the sum of the sizes.
    """
    sizes = [sizes_K]
    for level, labels in enumerate(tree, 1):
        groups = len(tree[level]) if level < len(tree) else 0  # the last of them may be empty
        sizes.append(np.bincount(labels, sizes[-1], minlength=groups).astype(np.int64))
    zeros = np.zeros_like(sizes[-1])
    # The point closest to equal shares, here 0, that the sizes allow and that meets the budget is min(cap, size).
    quotas = allocate(zeros, zeros, sizes[-1], budget)
    for labels, parts in zip(reversed(tree), reversed(sizes[:-1]), strict=True):
        order = np.argsort(labels, kind="stable")
        ends = np.cumsum(np.bincount(labels, minlength=len(quotas)))
        inner = np.zeros_like(parts)
        for group, (lo, hi) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
            if quotas[group]:
                own = order[lo:hi]
                zeros = np.zeros(len(own), np.int64)
                inner[own] = allocate(zeros, zeros, parts[own], int(quotas[group]))
        quotas = inner
    return quotas


def ancestors(tree: list[Ints], clusters: int) -> Iterator[Ints]:
    """Yield for each level the group that each cluster of the lowest level is in, (K,); the lowest level first."""
    at = np.arange(clusters)
    yield at
    for labels in tree:
        at = labels[at]
        yield at


def _spread(of_level: list[Ints], sizes_K: Ints, quotas_K: Ints) -> Iterator[str]:
    """Yield a note for each level: the rows of its groups before and after, in the smallest and the largest."""
    for level, groups in enumerate(of_level, 1):
        before, after = (
            np.bincount(groups, counts)[np.bincount(groups, sizes_K) > 0] for counts in (sizes_K, quotas_K)
        )
        yield (
            f"level {level}: {before.min():,.0f} to {before.max():,.0f} rows in a cluster before, "
            f"{after.min():,.0f} to {after.max():,.0f} after"
        )
