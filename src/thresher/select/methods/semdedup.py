"""SemDeDup (arXiv 2303.09540): drop semantic duplicates inside clusters.

In each cluster rows are ordered by distance to the centroid, farthest first ("hard"), and a row is
dropped when its cosine with an earlier row exceeds 1 - eps. A LARGER eps drops more. As released,
earlier rows count even when they were dropped themselves; with ``against="kept"`` only kept rows
count, so that every dropped row has a kept representative.

With a reference - an evaluation set, an older release - rows with a cosine above 1 - reference_eps to ANY
row of that other pool go first, whatever their cluster. What is left is then searched for its own duplicates,
unless neither eps nor keep is given.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from thresher.errors import BudgetError, UsageError
from thresher.ops.cut import order_by_group, top
from thresher.ops.neighbors import duplicates_of_kept, nearest_earlier
from thresher.ops.vectors import F32
from thresher.pool.store import EmbeddingStore
from thresher.runtime.random import digest
from thresher.select.clusters import Clustered
from thresher.select.reference import nearest, open_reference
from thresher.select.registry import method
from thresher.select.run import Run
from thresher.selection import Keep, Selection

Rows = npt.NDArray[np.int64]

_HELD = 65_536  # rows of a cluster held at a time; those of a larger one are read again in chunks


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

    reference: str | None = field(
        default=None,
        metadata={
            "metavar": "POOL",
            "help": "another pool, such as an evaluation set: drop rows that nearly repeat any of its rows",
        },
    )
    reference_eps: float | None = field(
        default=None,
        metadata={
            "help": "eps for the reference (default: eps); with neither eps nor keep, the pool's own duplicates stay"
        },
    )

    def __post_init__(self) -> None:
        """One of eps and keep, or a reference alone; a kept-only walk depends on its threshold."""
        super().__post_init__()
        if self.eps is not None and self.keep is not None:
            raise UsageError("semdedup needs either eps (such as 0.05) or keep (such as 60%); not both")
        for name in ("eps", "reference_eps"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 2:
                raise UsageError(f"{name} = {value}: between 0 (drop nothing but rounding) and 2 (drop all but one)")
        if self.keep is not None and self.against == "kept":
            raise UsageError("against = 'kept' needs eps: which rows are kept depends on the threshold")
        if self.reference is None:
            if self.reference_eps is not None:
                raise UsageError("reference_eps is for a reference; name one, or say eps for the pool's own duplicates")
            if not self._own:
                raise UsageError("semdedup needs either eps (such as 0.05) or keep (such as 60%), or a reference")
            return
        if self.eps is None and self.reference_eps is None:
            both = "" if self._own else ", or eps to drop the pool's own duplicates as well"
            raise UsageError(f"what repeats the reference? give reference_eps (such as 0.05){both}")
        unused = [f.name for f in fields(self) if f.name not in _OF_REFERENCE and getattr(self, f.name) != f.default]
        if not self._own and unused:
            raise UsageError(
                f"{', '.join(unused)}: for the pool's own duplicates, which are left alone without eps and keep; "
                "give one of these, or leave that out"
            )

    @property
    def _own(self) -> bool:
        return self.eps is not None or self.keep is not None

    def select(self, run: Run) -> Selection:
        """Drop what repeats the reference; order each cluster, find every row's nearest earlier row, cut by that."""
        found = None if self.reference is None else self._repeats(run)
        if found is not None and (not self._own or found.mask_N.all()):
            return run.selection(
                self,
                ~found.mask_N,
                reasons=found.reasons,
                score="cosine to the nearest row of the reference",
                cut=found.threshold,
                notes=found.notes,
                rows={"score": found.cosines_N, **found.rows},
                reference=found.told,
            )
        groups = self.groups(run)
        n = len(groups.labels_N)
        at = np.arange(n) if found is None else np.flatnonzero(~found.mask_N)
        priority: npt.NDArray[Any] = groups.distances_N
        if self.order == "easy":
            priority = -np.asarray(groups.distances_N)
        elif self.order == "random":
            priority = run.random_ranks("semdedup")
        labels = groups.labels_N[at]
        order_N = at[order_by_group(priority[at], labels)]  # positions of the rows to judge
        sizes_K = np.bincount(labels, minlength=len(groups.centroids_KD))
        threshold = np.float32(1 - self.eps) if self.eps is not None else np.float32(np.inf)
        here = run.local(self.embedding)
        judge = partial(_judge, here.store, self.embedding, self.against, float(threshold))
        tasks = list(_tasks(sizes_K, order_N, self.against, max(run.store.block // 2, 1)))

        def fill(start: int) -> Iterator[tuple[Any, ...]]:
            with run.progress.task("semdedup: compare", len(at)) as advance:
                advance(start)
                for cosine, twin in run.engine.map(judge, (task for task in tasks if task.first >= start)):
                    advance(len(cosine))
                    yield cosine, twin

        key = run.key(
            _judge,
            of=self.embedding,
            order=digest(order_N),
            clusters=digest(sizes_K),
            against=self.against,
            threshold=float(threshold) if self.against == "kept" else None,
        )
        made = run.cache.columns("semdedup", key, {"cosine": "float32", "twin": "int64"}, len(at), fill)
        cosine, twin = np.full(n, -1, np.float32), np.full(n, -1, np.int64)
        cosine[order_N], twin[order_N] = made["cosine"], made["twin"]
        cosine = np.maximum(cosine, np.float32(-1))  # rows without an earlier one
        mask = np.zeros(n, np.bool_)
        if self.keep is not None:
            count = self.keep.of(n)
            if count > len(at):
                raise BudgetError(f"cannot keep {count:,} rows: only {len(at):,} of {n:,} do not repeat the reference")
            mask[at] = top(-cosine[at], count)
            cut = float(cosine[mask].max())
            reason = "duplicate of row {duplicate_of}: cosine {score:.4f}, rows kept have at most {cut:.4f}"
        else:
            mask[at], cut = ~(cosine[at] > threshold), float(threshold)
            reason = "duplicate of row {duplicate_of}: cosine {score:.4f} > {cut:.4f}"
        twin = np.where(twin >= 0, run.store.ids[np.maximum(twin, 0)], -1)
        reasons = [reason, "duplicates no earlier row of its cluster, but more rows were to go"]
        score = "cosine to the nearest earlier row"
        code = (twin < 0).astype(np.uint8)
        if found is not None:
            code[found.mask_N] = len(reasons)
            reasons += found.reasons
            cosine = np.where(found.mask_N, found.cosines_N, cosine)
            score += ", or to the reference row repeated"
        return run.selection(
            self,
            mask,
            reasons=reasons,
            score=score,
            cut=cut,
            notes=(*(found.notes if found is not None else ()), *groups.notes),
            rows={
                "score": cosine,
                "duplicate_of": np.where(mask, -1, twin),
                "cluster": groups.labels_N,
                "code": code,
                **(found.rows if found is not None else {}),
            },
            groups={
                "size": groups.sizes_K,
                "kept": np.bincount(groups.labels_N[mask], minlength=len(groups.centroids_KD)),
                "d_intra": groups.d_intra_K,
            },
            reference=None if found is None else found.told,
        )

    def _repeats(self, run: Run) -> _Repeats:
        """Find the rows that repeat one of the reference."""
        location = str(self.reference)
        reference = open_reference(run, location, self.embedding)
        cosines, rows = nearest(run, reference, self.embedding)
        eps = self.reference_eps if self.reference_eps is not None else self.eps
        threshold = np.float32(1 - float(eps if eps is not None else 0))
        mask = cosines > threshold
        hits = np.unique(rows[mask])
        told = reference.told(hits) if len(hits) else {}
        key = " (key {reference_key})" if "key" in told else ""
        named = location.replace("{", "{{").replace("}", "}}")
        reason = f"repeats row {{reference}} of {named}{key}: cosine {{reference_cosine:.4f}} > {float(threshold):.4f}"
        note = (
            f"reference: {location}, {len(reference.store):,} rows, fingerprint {reference.fingerprint}; "
            f"{np.count_nonzero(mask):,} rows repeat {len(hits):,} of them"
        )
        evidence = {"reference": np.where(mask, rows, -1), "reference_cosine": cosines}
        return _Repeats(mask, cosines, float(threshold), (reason,) if len(hits) else (), (note,), evidence, told)


_OF_REFERENCE = ("embedding", "eps", "keep", "reference", "reference_eps")  # parameters that count without clusters


@dataclass(frozen=True, eq=False)
class _Repeats:
    """What repeats the reference: which rows (n,), by which cosine (n,), and the evidence."""

    mask_N: npt.NDArray[np.bool_]
    cosines_N: F32
    threshold: float
    reasons: tuple[str, ...]
    notes: tuple[str, ...]
    rows: dict[str, npt.NDArray[Any]]
    told: dict[str, npt.NDArray[Any]]


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


def _tasks(sizes_K: Rows, order_N: Rows, against: str, most: int) -> Iterator[_Task]:
    """Cut the ordered rows into tasks of up to ``most`` rows, but for a walk against kept rows, which cannot be split.

    A larger cluster is cut into parts of as many.
    """
    small: list[int] = []
    end = 0
    for size in sizes_K.tolist():
        start, end = end, end + size
        held = sum(small)
        if small and held + size > most:
            yield _Task(start - held, order_N[start - held : start], tuple(small))
            small = []
        if size <= most:
            small.append(size)
        elif against == "kept":
            yield _Task(start, order_N[start:end], (size,))
        else:
            for part in range(start, end, most):
                stop = min(part + most, end)
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
