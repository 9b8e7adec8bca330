"""Herding: keep, of each class, the rows whose mean of v t^T is closest to that of the class.

This lowers the cross-covariance error itself, for which ClipCov (arXiv 2403.12267) has an objective of similarities.
Each class keeps the same share of its rows. They are taken one by one; each is the one that leaves the mean of v t^T
over the rows taken closest to the mean over the class (kernel herding, arXiv 1203.3472).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import numpy.typing as npt

from thresher.ops.cut import allocate
from thresher.ops.herding import herd
from thresher.pool.store import EmbeddingStore
from thresher.pruning.class_statistics import Classes
from thresher.pruning.clusters import Clustered
from thresher.pruning.registry import method
from thresher.pruning.run import Run
from thresher.runtime.checksums import ArraySpec
from thresher.runtime.random import digest
from thresher.selection import Budget, Keep, Selection

Rows = npt.NDArray[np.int64]

_PART = 8_192  # rows that are chosen from together; a larger class is split, so that time and memory are bounded


@method("herd")
@dataclass(frozen=True, kw_only=True)
class Herd(Clustered):
    """Keep the rows that preserve the image-text covariance of their class."""

    keep: Budget = field(metadata={"help": "share or number of rows to keep"})

    def select(self, run: Run) -> Selection:
        """Divide the budget over the classes by their sizes, and take rows of each one by one."""
        for name in ("image", "text"):
            run.store.dim(name)  # both must exist; their widths may differ
        groups = self.groups(run)
        sizes, n = groups.sizes_K, len(groups.labels_N)
        budget = Keep.parse(self.keep).of(n)
        quotas = allocate(sizes * (budget / n), np.zeros_like(sizes), sizes, budget)
        classes = zip(Classes.of(groups).rows(), quotas.tolist(), strict=True)
        tasks = [task for own, quota in classes if len(own) for task in _parts(own, quota)]
        order_N = np.concatenate([rows for rows, _ in tasks])

        def fill(start: int) -> Iterator[tuple[npt.NDArray[np.int32]]]:
            vectors = ordered()
            ends = np.cumsum([len(rows) for rows, _ in tasks]).tolist()
            left = (
                (vectors.rows(end - len(rows), end), count)
                for (rows, count), end in zip(tasks, ends, strict=True)
                if end > start
            )
            with run.progress.task("herd", n) as advance:
                advance(start)
                for turns in run.engine.map(partial(_turns, vectors.store), left):
                    advance(len(turns))
                    yield (turns,)

        key = run.key(_turns, rows=digest(order_N), counts=digest(np.array([(len(rows), m) for rows, m in tasks])))
        with run.in_order("joint", order_N) as ordered:
            made = run.cache.columns("herd", key, {"turn": ArraySpec("int32", least=0, most=_PART)}, n, fill)
        turn = np.empty(n, np.int32)
        turn[order_N] = made["turn"]
        return run.selection(
            self,
            turn > 0,
            reasons=("cluster {cluster} keeps {quota:,} of its {size:,} rows; others preserve its covariance better",),
            notes=groups.notes,
            rows={"turn": turn, "cluster": groups.labels_N},
            groups={"size": sizes, "quota": quotas, "kept": quotas},
        )


def _parts(own: Rows, quota: int) -> list[tuple[Rows, int]]:
    """Return the parts of a class that rows are chosen from: positions, ascending, and rows to keep of each.

    Every m-th row of the class is in the same part, so that the parts are alike.
    """
    m = -(-len(own) // _PART)
    found = [own[i::m] for i in range(m)]
    sizes = np.array([len(rows) for rows in found])
    counts = allocate(sizes * (quota / len(own)), np.zeros_like(sizes), sizes, quota)
    return list(zip(found, counts.tolist(), strict=True))


def _turns(store: EmbeddingStore, task: tuple[Rows, int]) -> npt.NDArray[np.int32]:
    """Return for each row of a part in which turn it is taken, from 1; 0 if it is not."""
    rows, count = task
    turns = np.zeros(len(rows), np.int32)
    if count:
        taken = herd(store.vectors_at("image", rows), store.vectors_at("text", rows), count)
        turns[taken] = np.arange(1, count + 1)
    return turns
