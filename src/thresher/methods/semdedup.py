"""SemDeDup (arXiv 2303.09540): drop semantic duplicates inside clusters.

In each cluster rows are ordered by distance to the centroid, farthest first ("hard"), and a row is
dropped when its cosine with an earlier row exceeds 1 - eps. A LARGER eps drops more. As released,
earlier rows count even when they were dropped themselves; with ``against="kept"`` only kept rows
count, so that every dropped row has a kept representative.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from thresher.errors import UsageError
from thresher.groups import Clustered
from thresher.ops.cut import order_by_group, top
from thresher.ops.neighbors import CHUNK, duplicates_of_kept, nearest_earlier
from thresher.ops.vectors import F32
from thresher.registry import method
from thresher.run import Run
from thresher.selection import Keep, Selection
from thresher.store import EmbeddingStore

Rows = npt.NDArray[np.int64]

_HELD = 65_536  # rows of a cluster held at a time; those of a larger one are read again in chunks
_TASK = 2 * CHUNK  # rows of a task, and of a part of a large cluster


@method("semdedup")
@dataclass(frozen=True, kw_only=True)
class SemDeDup(Clustered):
    """Drop rows that nearly repeat another; every dropped row records which one."""

    eps: float | None = field(
        default=None, metadata={"help": "drop rows with a cosine above 1 - eps to an earlier row; larger drops more"}
    )
    keep: Keep | None = field(
        default=None, metadata={"help": "instead of eps: keep this share, dropping the nearest duplicates"}
    )
    against: Literal["all", "kept"] = field(
        default="all", metadata={"help": "compare with all earlier rows (paper) or only with kept ones"}
    )
    order: Literal["hard", "easy", "random"] = field(
        default="hard", metadata={"help": "which row of a pair comes first: farthest from the centroid, nearest, any"}
    )

    def __post_init__(self) -> None:
        """One of eps and keep; a kept-only walk depends on its threshold."""
        super().__post_init__()
        if (self.eps is None) == (self.keep is None):
            raise UsageError("semdedup needs either eps (such as 0.05) or keep (such as 60%)")
        if self.eps is not None and not 0 <= self.eps <= 2:
            raise UsageError(f"eps = {self.eps}: between 0 (drop nothing but rounding) and 2 (drop all but one)")
        if self.keep is not None and self.against == "kept":
            raise UsageError("against = 'kept' needs eps: which rows are kept depends on the threshold")

    def select(self, run: Run) -> Selection:
        """Order each cluster, find every row's nearest earlier row, cut by the similarity."""
        groups = self.groups(run)
        n = len(groups.labels_N)
        priority: npt.NDArray[Any] = groups.distances_N
        if self.order == "easy":
            priority = -np.asarray(groups.distances_N)
        elif self.order == "random":
            priority = run.random_ranks("semdedup")
        order_N = order_by_group(priority, groups.labels_N)
        ends_K = np.cumsum(groups.sizes_K)
        threshold = np.float32(1 - self.eps) if self.eps is not None else np.float32(np.inf)
        here = run.local(self.embedding)
        judge = partial(_judge, here.store, self.embedding, self.against, float(threshold))
        tasks = list(_tasks(groups.sizes_K, order_N, self.against))

        def fill(start: int) -> Iterator[tuple[Any, ...]]:
            with run.progress.task("semdedup: compare", n) as advance:
                advance(start)
                for cosine, twin in run.engine.map(judge, (task for task in tasks if task.first >= start)):
                    advance(len(cosine))
                    yield cosine, twin

        key = run.key(
            of=self.embedding,
            order=_digest(order_N),
            clusters=_digest(groups.sizes_K),
            against=self.against,
            threshold=float(threshold) if self.against == "kept" else None,
        )
        found = run.cache.columns("semdedup", key, {"cosine": "float32", "twin": "int64"}, n, fill)
        cosine, twin = np.empty(n, np.float32), np.empty(n, np.int64)
        cosine[order_N], twin[order_N] = found["cosine"], found["twin"]
        cosine = np.maximum(cosine, np.float32(-1))  # rows without an earlier one
        if self.keep is not None:
            mask = top(-cosine, self.keep.of(n))
            cut = float(cosine[mask].max())
            reason = "duplicate of row {duplicate_of}: cosine {score:.4f}, rows kept have at most {cut:.4f}"
        else:
            mask, cut = ~(cosine > threshold), float(threshold)
            reason = "duplicate of row {duplicate_of}: cosine {score:.4f} > {cut:.4f}"
        twin = np.where(twin >= 0, run.store.ids[np.maximum(twin, 0)], -1)
        return run.selection(
            self,
            mask,
            reasons=(reason, "duplicates no earlier row of its cluster, but more rows were to go"),
            score="cosine to the nearest earlier row",
            cut=cut,
            notes=groups.notes,
            rows={
                "score": cosine,
                "duplicate_of": np.where(mask, -1, twin),
                "cluster": groups.labels_N,
                "code": (twin < 0).astype(np.uint8),
            },
            groups={
                "size": groups.sizes_K,
                "kept": np.bincount(groups.labels_N[mask], minlength=len(ends_K)),
                "d_intra": groups.d_intra_K,
            },
        )


def _digest(order: Rows) -> str:
    return hashlib.sha256(np.ascontiguousarray(order).tobytes()).hexdigest()


@dataclass(frozen=True, eq=False)
class _Task:
    """Rows to judge: whole small clusters, or a part of a large one with the rows before it.

    Attributes:
        first: Place of the first judged row in the order of all clusters' rows.
        rows: Positions in the view of the rows to read, in order.
        sizes: Rows of each cluster in ``rows``.
        skip: How many of ``rows`` are only read.
    """

    first: int
    rows: Rows
    sizes: tuple[int, ...]
    skip: int = 0


def _tasks(sizes_K: Rows, order_N: Rows, against: str) -> Iterator[_Task]:
    """Cut the ordered rows into tasks of about equal work; a walk against kept rows cannot be split."""
    small: list[int] = []
    end = 0
    for size in sizes_K.tolist():
        start, end = end, end + size
        held = sum(small)
        if small and held + size > _TASK:
            yield _Task(start - held, order_N[start - held : start], tuple(small))
            small = []
        if size <= _TASK:
            small.append(size)
        elif against == "kept":
            yield _Task(start, order_N[start:end], (size,))
        else:
            for part in range(start, end, _TASK):
                stop = min(part + _TASK, end)
                yield _Task(part, order_N[start:stop], (stop - start,), part - start)
    if sum(small):
        yield _Task(end - sum(small), order_N[end - sum(small) : end], tuple(small))


def _judge(store: EmbeddingStore, name: str, against: str, threshold: float, task: _Task) -> tuple[F32, Rows]:
    """Return, for every judged row, the cosine to its nearest earlier row and that row's position (-1: none)."""
    held = store.vectors_at(name, task.rows) if len(task.rows) <= _HELD else None
    cosines, twins = [], []
    start = 0
    for size in task.sizes:
        rows = task.rows[start : start + size]

        def load(lo: int, hi: int, rows: Rows = rows, start: int = start) -> F32:
            return store.vectors_at(name, rows[lo:hi]) if held is None else held[start + lo : start + hi]

        if against == "kept":
            cosine, twin = duplicates_of_kept(load, size, threshold)
        else:
            cosine, twin = nearest_earlier(load, task.skip, size)
        cosines.append(cosine)
        twins.append(np.where(twin >= 0, rows[twin], -1))
        start += size
    return np.concatenate(cosines), np.concatenate(twins)
