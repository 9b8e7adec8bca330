"""SemDeDup (arXiv 2303.09540): drop semantic duplicates within clusters.

The rows of each cluster are ordered by distance to the centroid, farthest first ("hard"). A row is
dropped if its cosine similarity with an earlier row is above 1 - eps, so a LARGER eps drops more. As in the released
code, earlier rows count even if they were dropped themselves. With ``against="kept"`` only kept rows
count, so that every dropped row has a kept representative.

With a reference, such as an evaluation set or an older release, rows with a cosine similarity above 1 - reference_eps
to ANY row of that pool are dropped first, whatever their cluster. The remaining rows are then searched for duplicates
among themselves, unless neither eps nor keep is given.
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
from thresher.runtime.checksums import ArraySpec
from thresher.runtime.random import digest
from thresher.select.clusters import Clustered
from thresher.select.reference import nearest, open_reference
from thresher.select.registry import method
from thresher.select.run import Run
from thresher.selection import Budget, Selection

Rows = npt.NDArray[np.int64]

_HELD = 65_536  # rows of a cluster held in memory; a larger cluster is read in chunks, several times


@method("semdedup")
@dataclass(frozen=True, kw_only=True)
class SemDeDup(Clustered):
    """Drop near-duplicates; every dropped row records which row it duplicates."""

    eps: float | None = field(
        default=None, metadata={"help": "duplicates are pairs with cosine similarity above 1 - eps; larger drops more"}
    )
    keep: Budget | None = field(
        default=None, metadata={"help": "instead of eps: keep this share, dropping the closest duplicates first"}
    )
    against: Literal["all", "kept"] = field(
        default="all", metadata={"help": "compare with all earlier rows (as in the paper) or only with kept ones"}
    )
    order: Literal["hard", "easy", "random"] = field(
        default="hard", metadata={"help": "row of a pair that comes first: farthest from the centroid, nearest, random"}
    )

    reference: str | None = field(
        default=None,
        metadata={
            "metavar": "POOL",
            "help": "another pool, such as an evaluation set: drop near-duplicates of its rows",
        },
    )
    reference_eps: float | None = field(
        default=None,
        metadata={
            "help": "eps for the reference (default: eps); without eps and keep, duplicates within the pool stay"
        },
    )

    def __post_init__(self) -> None:
        """Validate the parameters: one of ``eps`` and ``keep``, or only a reference."""
        super().__post_init__()
        if self.eps is not None and self.keep is not None:
            raise UsageError("semdedup needs either eps (such as 0.05) or keep (such as 60%); not both")
        for name in ("eps", "reference_eps"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 2:
                raise UsageError(f"{name} = {value}: must be between 0 (drops almost no row) and 2 (drops almost all)")
        if self.keep is not None and self.against == "kept":
            raise UsageError("against = 'kept' needs eps: which rows are kept depends on the threshold")
        if self.reference is None:
            if self.reference_eps is not None:
                raise UsageError("reference_eps needs reference; for duplicates within the pool use eps")
            if not self._own:
                raise UsageError("semdedup needs either eps (such as 0.05) or keep (such as 60%), or a reference")
            return
        if self.eps is None and self.reference_eps is None:
            both = "" if self._own else ", or eps to also drop duplicates within the pool"
            raise UsageError(f"reference needs a threshold: give reference_eps (such as 0.05){both}")
        unused = [f.name for f in fields(self) if f.name not in _OF_REFERENCE and getattr(self, f.name) != f.default]
        if not self._own and unused:
            raise UsageError(
                f"{', '.join(unused)}: only for duplicates within the pool, which stay without eps and keep; give one "
                f"of these, or leave out {', '.join(unused)}"
            )

    @property
    def _own(self) -> bool:
        return self.eps is not None or self.keep is not None

    def select(self, run: Run) -> Selection:
        """Drop duplicates of the reference, then rows that are too close to an earlier row of their cluster."""
        repeats = None if self.reference is None else self._repeats(run)
        if repeats is not None and (not self._own or repeats.mask_N.all()):
            return run.selection(
                self,
                ~repeats.mask_N,
                reasons=repeats.reasons,
                score="cosine to the nearest row of the reference",
                cut=repeats.threshold,
                notes=repeats.notes,
                rows={"score": repeats.cosines_N, **repeats.rows},
                reference=repeats.reference,
            )
        groups = self.groups(run)
        n = len(groups.labels_N)
        at = np.arange(n) if repeats is None else np.flatnonzero(~repeats.mask_N)
        priority: npt.NDArray[Any] = groups.distances_N
        if self.order == "easy":
            priority = -np.asarray(groups.distances_N)
        elif self.order == "random":
            priority = run.random_ranks("semdedup")
        labels = groups.labels_N[at]
        of_order = {"labels": digest(labels), "priority": digest(priority[at])}
        if repeats is not None:
            of_order["at"] = digest(at)
        # Positions of the rows to compare. To sort takes most of the time of another cut.
        order_N = run.cache.columns(
            "semdedup-order",
            run.key(order_by_group, **of_order),
            {"order": ArraySpec("int64", least=0, most=n - 1)},
            len(at),
            lambda start: iter([(at[order_by_group(priority[at], labels)][start:],)]),
        )["order"]
        sizes_K = np.bincount(labels, minlength=len(groups.centroids_KD))
        threshold = np.float32(1 - self.eps) if self.eps is not None else np.float32(np.inf)
        tasks = list(_tasks(sizes_K, order_N, self.against, max(run.store.block // 2, 1)))

        def fill(start: int) -> Iterator[tuple[Any, ...]]:
            store = run.local(self.embedding).store
            judge = partial(_judge, store, self.embedding, self.against, float(threshold))
            with run.progress.task("semdedup: compare", len(at)) as advance:
                advance(start)
                for cosine, twin in run.engine.map(judge, (task for task in tasks if task.first >= start)):
                    advance(len(cosine))
                    yield cosine, twin

        key = run.key(
            _judge,
            of=self.embedding,
            **of_order,
            against=self.against,
            threshold=float(threshold) if self.against == "kept" else None,
        )
        specs = {"cosine": ArraySpec("float32", most=2), "twin": ArraySpec("int64", least=-1, most=n - 1)}
        made = run.cache.columns("semdedup", key, specs, len(at), fill)
        cosine, twin = np.full(n, -1, np.float32), np.full(n, -1, np.int64)
        cosine[order_N], twin[order_N] = made["cosine"], made["twin"]
        cosine = np.maximum(cosine, np.float32(-1))  # rows without an earlier row
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
        if run.store.rows is not None:  # else positions are row ids
            twin = np.where(twin >= 0, run.store.ids[np.maximum(twin, 0)], -1)
        reasons = [reason, "no earlier row in its cluster, but dropped to meet the budget"]
        score = "cosine to the nearest earlier row"
        code = (twin < 0).astype(np.uint8)
        if repeats is not None:
            code[repeats.mask_N] = len(reasons)
            reasons += repeats.reasons
            cosine = np.where(repeats.mask_N, repeats.cosines_N, cosine)
            score += ", or to the duplicated row of the reference"
        return run.selection(
            self,
            mask,
            reasons=reasons,
            score=score,
            cut=cut,
            notes=(*(repeats.notes if repeats is not None else ()), *groups.notes),
            rows={
                "score": cosine,
                "duplicate_of": np.where(mask, -1, twin),
                "cluster": groups.labels_N,
                "code": code,
                **(repeats.rows if repeats is not None else {}),
            },
            groups={
                "size": groups.sizes_K,
                "kept": np.bincount(groups.labels_N[mask], minlength=len(groups.centroids_KD)),
                "d_intra": groups.d_intra_K,
            },
            reference=None if repeats is None else repeats.reference,
        )

    def _repeats(self, run: Run) -> _Repeats:
        """Return the rows that duplicate a row of the reference."""
        location = str(self.reference)
        reference = open_reference(run, location, self.embedding)
        cosines, rows = nearest(run, reference, self.embedding)
        eps = self.reference_eps if self.reference_eps is not None else self.eps
        threshold = np.float32(1 - float(eps if eps is not None else 0))
        mask = cosines > threshold
        hits = np.unique(rows[mask])
        duplicated = reference.evidence(hits) if len(hits) else {}
        key = " (key {reference_key})" if "key" in duplicated else ""
        named = location.replace("{", "{{").replace("}", "}}")
        reason = f"repeats row {{reference}} of {named}{key}: cosine {{reference_cosine:.4f}} > {float(threshold):.4f}"
        note = (
            f"reference: {location}, {len(reference.store):,} rows, fingerprint {reference.fingerprint}; "
            f"{np.count_nonzero(mask):,} rows repeat {len(hits):,} of them"
        )
        evidence = {"reference": np.where(mask, rows, -1), "reference_cosine": cosines}
        return _Repeats(mask, cosines, float(threshold), (reason,) if len(hits) else (), (note,), evidence, duplicated)


_OF_REFERENCE = ("embedding", "eps", "keep", "reference", "reference_eps")  # parameters that are used without clusters


@dataclass(frozen=True, eq=False)
class _Repeats:
    """Duplicates of a reference: mask and cosines (n,), evidence per row, and the duplicated rows of the reference."""

    mask_N: npt.NDArray[np.bool_]
    cosines_N: F32
    threshold: float
    reasons: tuple[str, ...]
    notes: tuple[str, ...]
    rows: dict[str, npt.NDArray[Any]]
    reference: dict[str, npt.NDArray[Any]]


@dataclass(frozen=True, eq=False)
class _ClusterRows:
    """Rows to compare: some small clusters, or a part of a large one with the rows before it.

    Attributes:
        first: Place of the first compared row in the order of the rows of all clusters.
        rows: Positions in the view of the rows to read, in order.
        sizes: Number of rows of each cluster in ``rows``.
        skip: How many of ``rows``, at the start, are only read as earlier rows.
    """

    first: int
    rows: Rows
    sizes: tuple[int, ...]
    skip: int = 0


def _tasks(sizes_K: Rows, order_N: Rows, against: str, most: int) -> Iterator[_ClusterRows]:
    """Split the ordered rows into tasks of up to ``most`` rows; larger clusters are split into parts.

    With ``against="kept"`` a larger cluster stays one task, because every row depends on the rows kept before it.
    """
    small: list[int] = []
    end = 0
    for size in sizes_K.tolist():
        start, end = end, end + size
        held = sum(small)
        if small and held + size > most:
            yield _ClusterRows(start - held, order_N[start - held : start], tuple(small))
            small = []
        if size <= most:
            small.append(size)
        elif against == "kept":
            yield _ClusterRows(start, order_N[start:end], (size,))
        else:
            for part in range(start, end, most):
                stop = min(part + most, end)
                yield _ClusterRows(part, order_N[start:stop], (stop - start,), part - start)
    if sum(small):
        yield _ClusterRows(end - sum(small), order_N[end - sum(small) : end], tuple(small))


def _judge(store: EmbeddingStore, name: str, against: str, threshold: float, task: _ClusterRows) -> tuple[F32, Rows]:
    """Return, for each compared row, the cosine to its nearest earlier row and that row's position (-1: none)."""
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
