"""SemDeDup (arXiv 2303.09540): drop semantic duplicates within clusters.

The rows of each cluster are ordered by distance to the centroid, farthest first ("hard"). A row is
dropped if its cosine similarity with an earlier row is above 1 - eps, so a LARGER eps drops more. As in the released
code, earlier rows count even if they were dropped themselves. With ``against="kept"`` only kept rows
count, so that every dropped row has a kept representative.

With a reference, such as an evaluation set or an older release, rows with a cosine similarity above 1 - reference_eps
to ANY row of that pool are dropped first, whatever their cluster. The remaining rows are then searched for duplicates
among themselves, unless neither eps nor keep is given.

With ``prefer``, rows of a cluster that are linked by pairs above 1 - eps, directly or by way of others, are a group,
and the row of each group with the highest score stays, whatever the order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from thresher.errors import BudgetError, UsageError
from thresher.ops.components import find, unite
from thresher.ops.cut import by_group, order_by_group, sizes_of, slices, top
from thresher.ops.neighbors import Load, duplicates_of_kept, linked_to_earlier, nearest_earlier
from thresher.ops.products import Products
from thresher.ops.vectors import F32
from thresher.pool.spill import Ordered
from thresher.pool.store import EmbeddingStore
from thresher.pruning.clusters import Clustered, Groups
from thresher.pruning.reference import nearest, open_reference
from thresher.pruning.registry import method
from thresher.pruning.run import Run
from thresher.pruning.scores import Score, column
from thresher.runtime.checksums import ArraySpec
from thresher.runtime.format import counted
from thresher.runtime.random import digest
from thresher.selection import Budget, Keep, Selection

Rows = npt.NDArray[np.int64]

_HELD = 65_536  # rows of a cluster held in memory; a larger cluster is read in chunks, several times


@method("semdedup")
@dataclass(frozen=True, kw_only=True)
class SemDeDup(Clustered):
    """Drop near-duplicates; every dropped row records which row it duplicates."""

    compares: ClassVar[bool] = True
    other: ClassVar[dict[str, Any]] = {"prefer": {"keep": None, "eps": 0.2, "prefer": "similarity"}}

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

    prefer: str | None = field(
        default=None,
        metadata={
            "metavar": "COLUMN",
            "help": "keep the best of each group of duplicates: column, scoring method or scores.parquet:column",
        },
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
        if self.prefer is not None:
            self._check_prefer()
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

    def _check_prefer(self) -> None:
        """Refuse parameters that say in another way which row of a group stays."""
        if self.eps is None:
            raise UsageError("prefer needs eps (such as 0.05): which rows are a group depends on the threshold")
        if self.order != "hard":
            raise UsageError(
                "prefer replaces order: the row that stays is the best by the score; leave out one of both"
            )
        if self.against == "kept":
            raise UsageError(
                "prefer keeps one row of each group, so there are no kept rows to compare with; leave out "
                "against = 'kept' or prefer"
            )

    @property
    def _own(self) -> bool:
        return self.eps is not None or self.keep is not None

    def select(self, run: Run) -> Selection:
        """Drop duplicates of the reference, then rows that are too close to an earlier row of their cluster."""
        # First, because a column that does not exist should not be found out after hours of comparisons.
        scored = None if self.prefer is None else column(run, self.prefer, "prefer", finite=True)
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
        at: Any = slice(None) if repeats is None else np.flatnonzero(~repeats.mask_N)
        if scored is not None:
            return self._select_best(run, groups, at, repeats, scored)
        priority: npt.NDArray[Any] = groups.distances_N
        if self.order == "easy":
            priority = -np.asarray(groups.distances_N)
        elif self.order == "random":
            priority = run.random_ranks("semdedup")
        labels = groups.labels_N[at]
        of_order = {"labels": digest(labels), "priority": digest(priority[at])}
        if repeats is not None:
            of_order["at"] = digest(at)
        count = len(labels)

        def in_order(start: int) -> Iterator[tuple[Rows]]:
            done = 0
            for part in order_by_group(priority[at], labels, run.cache.space):
                rows = part if repeats is None else at[part]
                if done + len(rows) > start:
                    yield (rows[max(start - done, 0) :],)
                done += len(rows)

        # Positions of the rows to compare. To sort takes most of the time of another cut.
        order_N = run.cache.columns(
            "semdedup-order",
            run.key(order_by_group, **of_order),
            {"order": ArraySpec("int64", least=0, most=n - 1)},
            count,
            in_order,
        )["order"]
        sizes_K = sizes_of(labels, len(groups.centroids_KD))
        threshold = np.float32(1 - self.eps) if self.eps is not None else np.float32(np.inf)
        tasks = list(_tasks(sizes_K, self.against, max(run.store.block // 2, 1)))

        def fill(start: int) -> Iterator[tuple[Any, ...]]:
            vectors = ordered()
            judge = partial(_judge, vectors.store, self.embedding, self.against, float(threshold), run.products)
            left = (task.reading(vectors) for task in tasks if task.first >= start)
            with run.progress.task("semdedup: compare", count) as advance:
                advance(start)
                for cosine, twin in run.engine.map(judge, left):
                    advance(len(cosine))
                    yield cosine, np.where(twin >= 0, order_N[twin], -1)

        key = run.key(
            _judge,
            of=self.embedding,
            **of_order,
            against=self.against,
            threshold=float(threshold) if self.against == "kept" else None,
        )
        specs = {"cosine": ArraySpec("float32", most=2), "twin": ArraySpec("int64", least=-1, most=n - 1)}
        with run.in_order(self.embedding, order_N) as ordered:
            made = run.cache.columns("semdedup", key, specs, count, fill)
        cosine, twin = run.cache.space(n, np.float32), run.cache.space(n)
        if count < n:
            cosine[:], twin[:] = -1, -1
        for here in slices(count):
            rows = order_N[here]
            cosine[rows] = np.maximum(made["cosine"][here], np.float32(-1))  # of rows without an earlier row
            twin[rows] = made["twin"][here]
        mask = np.zeros(n, np.bool_)
        if self.keep is not None:
            budget = Keep.parse(self.keep).of(n)
            if budget > count:
                raise BudgetError(f"cannot keep {budget:,} rows: only {count:,} of {n:,} do not repeat the reference")
            mask[at] = top(-cosine[at], budget)
            cut = float(cosine[mask].max())
            reason = "duplicate of row {duplicate_of}: cosine {score:.4f}, rows kept have at most {cut:.4f}"
        else:
            mask[at], cut = ~(cosine[at] > threshold), float(threshold)
            reason = "duplicate of row {duplicate_of}: cosine {score:.4f} > {cut:.4f}"
        reasons = [reason, "no earlier row in its cluster, but dropped to meet the budget"]
        code = np.zeros(n, np.uint8)
        for here in slices(n):
            alone = twin[here] < 0
            ids = run.store.ids_at(np.maximum(twin[here], 0))
            code[here], twin[here] = alone, np.where(alone | mask[here], -1, ids)
        score = "cosine to the nearest earlier row"
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
                "duplicate_of": twin,
                "cluster": groups.labels_N,
                "code": code,
                **(repeats.rows if repeats is not None else {}),
            },
            groups={
                "size": groups.sizes_K,
                "kept": sizes_of(groups.labels_N, len(groups.centroids_KD), mask),
                "d_intra": groups.d_intra_K,
            },
            reference=None if repeats is None else repeats.reference,
        )

    def _select_best(self, run: Run, groups: Groups, at: Any, repeats: _Repeats | None, scored: Score) -> Selection:
        """Keep the best row of each group of duplicates."""
        values_N, n = scored.values_N, len(groups.labels_N)
        threshold = np.float32(1 - float(self.eps or 0))
        labels = groups.labels_N if repeats is None else groups.labels_N[at]
        count = len(labels)
        order_N, sizes_K = by_group(labels, run.cache.space), sizes_of(labels, len(groups.centroids_KD))
        for here in slices(count if repeats is not None else 0):
            order_N[here] = at[order_N[here]]
        group_N, counts_N = run.cache.space(n), run.cache.space(n)
        for here in slices(n):
            group_N[here] = _places(here)
        with run.in_order(self.embedding, order_N) as ordered:
            first = _components(run, self.embedding, order_N, sizes_K, float(threshold), ordered)
            for here in slices(count):
                group_N[order_N[here]] = order_N[first[here]]
            for here in slices(n):
                np.add.at(counts_N, group_N[here], 1)
            stays_N = _best(run, values_N, group_N, counts_N)
            mask = np.empty(n, np.bool_)
            for here in slices(n):
                mask[here] = stays_N[here] == _places(here)
            pairs_P = run.cache.space(n - int(np.count_nonzero(mask)))  # places of dropped rows, cluster by cluster
            done = 0
            for here in slices(count):
                places = here.start + np.flatnonzero(~mask[order_N[here]])
                pairs_P[done : done + len(places)] = places
                done += len(places)
            found = _cosines(run, self.embedding, order_N, pairs_P, stays_N, ordered)
        cosine, twin, sizes_N = run.cache.space(n, np.float32), run.cache.space(n), run.cache.space(n)
        cosine[:] = -1
        for here in slices(len(pairs_P)):
            cosine[order_N[pairs_P[here]]] = found[here]
        worst, lowest = -1, np.inf
        for here in slices(n):
            dropped = here.start + np.flatnonzero(~mask[here])
            if len(dropped) and (least := float(cosine[dropped].min())) < lowest:
                worst, lowest = int(dropped[cosine[dropped].argmin()]), least
            twin[here] = np.where(mask[here], -1, run.store.ids_at(stays_N[here]))
            sizes_N[here] = counts_N[group_N[here]]
        notes = (*groups.notes, *scored.notes, *_size_notes(counts_N))
        if worst >= 0:
            one, other = run.store.ids_at(np.array([worst, stays_N[worst]])).tolist()
            notes += (
                f"the least similar of the dropped rows to the best of its group: row {one:,} to row {other:,}, cosine "
                f"{lowest:.4f}",
            )
        for here in slices(n):
            group_N[here] = run.store.ids_at(group_N[here])
        best = str(self.prefer).replace("{", "{{").replace("}", "}}")
        reasons = [f"in a group of {{group_size:,}} duplicates, of which row {{duplicate_of}} is the best by {best}"]
        score, code, evidence = "cosine to the best row of its group", np.zeros(n, np.uint8), {}
        if repeats is not None:
            mask &= ~repeats.mask_N
            code[repeats.mask_N] = len(reasons)
            reasons += repeats.reasons
            cosine = np.where(repeats.mask_N, repeats.cosines_N, cosine)
            score += ", or to the duplicated row of the reference"
            notes, evidence = (*repeats.notes, *notes), repeats.rows
        return run.selection(
            self,
            mask,
            reasons=reasons,
            score=score,
            cut=float(threshold),
            notes=notes,
            rows={
                "score": cosine,
                "duplicate_of": twin,
                "cluster": groups.labels_N,
                "code": code,
                "duplicate_group": group_N,
                "group_size": sizes_N,
                "value": np.asarray(values_N),
                **evidence,
            },
            groups={
                "size": groups.sizes_K,
                "kept": sizes_of(groups.labels_N, len(groups.centroids_KD), mask),
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
        sizes: Number of rows of each cluster that are read.
        skip: How many of these rows, at the start, are only read as earlier rows.
        rows: Positions in a store of the rows to read, in order; none yet in a list of tasks.
    """

    first: int
    sizes: tuple[int, ...]
    skip: int = 0
    rows: Rows | None = None

    @property
    def start(self) -> int:
        """Place of the first row that is read."""
        return self.first - self.skip

    @property
    def compared(self) -> int:
        """Number of rows that are compared with the rows before them."""
        return sum(self.sizes) - self.skip

    def reading(self, vectors: Ordered) -> _ClusterRows:
        """Return the task with the rows to read."""
        return replace(self, rows=vectors.rows(self.start, self.start + sum(self.sizes)))


def _tasks(sizes_K: Rows, against: str, most: int) -> Iterator[_ClusterRows]:
    """Split the rows, ordered by cluster, into tasks of up to ``most`` rows; larger clusters are split into parts.

    With ``against="kept"`` a larger cluster stays one task, because every row depends on the rows kept before it.
    """
    small: list[int] = []
    end = 0
    for size in sizes_K.tolist():
        start, end = end, end + size
        held = sum(small)
        if small and held + size > most:
            yield _ClusterRows(start - held, tuple(small))
            small = []
        if size <= most:
            small.append(size)
        elif against == "kept":
            yield _ClusterRows(start, (size,))
        else:
            for part in range(start, end, most):
                yield _ClusterRows(part, (min(part + most, end) - start,), part - start)
    if sum(small):
        yield _ClusterRows(end - sum(small), tuple(small))


def _each_cluster(store: EmbeddingStore, name: str, task: _ClusterRows) -> Iterator[tuple[int, int, Load]]:
    """Yield the place of the first row of each cluster of a task, the number of its rows, and how to load them."""
    read = np.empty(0, np.int64) if task.rows is None else task.rows
    held = store.vectors_at(name, read) if len(read) <= _HELD else None
    start = 0
    for size in task.sizes:
        rows = read[start : start + size]

        def load(lo: int, hi: int, rows: Rows = rows, start: int = start) -> F32:
            return store.vectors_at(name, rows[lo:hi]) if held is None else held[start + lo : start + hi]

        yield task.start + start, size, load
        start += size


def _judge(
    store: EmbeddingStore, name: str, against: str, threshold: float, products: Products, task: _ClusterRows
) -> tuple[F32, Rows]:
    """Return, for each compared row, the cosine to its nearest earlier row and that row's place (-1: none)."""
    cosines, twins = [], []
    for first, size, load in _each_cluster(store, name, task):
        if against == "kept":
            cosine, twin = duplicates_of_kept(load, size, threshold, products)
        else:
            cosine, twin = nearest_earlier(load, task.skip, size, products)
        cosines.append(cosine)
        twins.append(np.where(twin >= 0, first + twin, -1))
    return np.concatenate(cosines), np.concatenate(twins)


# --- the best of each group -----------------------------------------------------------------------


def _components(
    run: Run, name: str, order_N: Rows, sizes_K: Rows, threshold: float, ordered: Callable[[], Ordered]
) -> Rows:
    """Return the first place that each place in the order is linked to in its cluster, (n,); cached, resumable.

    Tasks return links, not groups, because the rows of a large cluster are compared by several tasks. The links are
    joined here in one array, whose result does not depend on their order.
    """
    count = len(order_N)
    tasks = list(_tasks(sizes_K, "all", max(run.store.block // 2, 1)))
    key = run.key(_links, of=name, order=digest(order_N), clusters=digest(sizes_K), threshold=threshold)
    path = run.cache.path("semdedup.groups", key)
    spec = ArraySpec("int64", (count,), least=0, most=count - 1)
    first = run.cache.load(path, spec)
    if first is None:
        saved = run.cache.resumable(path)
        state = saved.load({"parents": spec, "done": ArraySpec("int64", (), least=0, most=len(tasks))})
        parents, done = run.cache.space(count), 0
        if state is not None and not any((state["parents"][here] > _places(here)).any() for here in slices(count)):
            parents[:], done = state["parents"], int(state["done"])
        else:
            for here in slices(count):
                parents[here] = _places(here)
        state = None  # it has as many numbers
        vectors = ordered()
        links = partial(_links, vectors.store, name, threshold, run.products)
        left = (task.reading(vectors) for task in tasks[done:])
        with run.progress.task("semdedup: compare", count) as advance:
            advance(sum(task.compared for task in tasks[:done]))
            for task, (rows, linked) in zip(tasks[done:], run.engine.map(links, left), strict=True):
                unite(parents, rows, linked)
                done += 1
                saved.offer(partial(dict, parents=parents, done=done))
                advance(task.compared)
        for here in slices(count):
            parents[here] = find(parents, _places(here))
        first = run.cache.save(path, parents)
        saved.remove()
    return np.asarray(first)


def _links(
    store: EmbeddingStore, name: str, threshold: float, products: Products, task: _ClusterRows
) -> tuple[Rows, Rows]:
    """Return links between rows, as places in the order of the rows of all clusters: (L,) and (L,) earlier ones."""
    linked = [
        first + linked_to_earlier(load, task.skip, size, threshold, products)
        for first, size, load in _each_cluster(store, name, task)
    ]
    earlier = np.concatenate(linked)
    places = np.arange(task.start, task.start + len(earlier))
    moved = earlier != places
    return places[moved], earlier[moved]


def _best(run: Run, values_N: npt.NDArray[Any], group_N: Rows, counts_N: Rows) -> Rows:
    """Return the row with the highest value of each row's group, (n,); among equal values the lowest row.

    Args:
        run: The run.
        values_N: (n,) values.
        group_N: (n,) the lowest row of each row's group.
        counts_N: (n,) number of rows of the group that is named by a row.
    """
    n = len(group_N)
    best_N = run.cache.space(n)
    for here in slices(n):
        best_N[here] = _places(here)
    for here in slices(n):
        some = here.start + np.flatnonzero(counts_N[group_N[here]] > 1)
        groups = group_N[some]
        order = np.lexsort((-some, values_N[some], groups))
        last = order[np.flatnonzero(np.diff(groups[order], append=-1))]  # the best of each group in these rows
        better = values_N[some[last]] > values_N[best_N[groups[last]]]
        best_N[groups[last][better]] = some[last][better]
    stays_N = run.cache.space(n)
    for here in slices(n):
        stays_N[here] = best_N[group_N[here]]
    return stays_N


def _places(here: slice) -> Rows:
    """Return the numbers of the rows of a slice."""
    return np.arange(here.start, here.stop)


def _cosines(run: Run, name: str, order_N: Rows, pairs_P: Rows, stays_N: Rows, ordered: Callable[[], Ordered]) -> F32:
    """Return the cosine of each dropped row to the row of its group that stays, (P,); cached, resumable.

    Args:
        run: The run.
        name: The field.
        order_N: The rows, cluster by cluster.
        pairs_P: Places of the dropped rows in the order.
        stays_N: The row that stays, of each row.
        ordered: Returns the vectors in the order.
    """
    rows_P, others_P = run.cache.space(len(pairs_P)), run.cache.space(len(pairs_P))
    for here in slices(len(pairs_P)):
        rows_P[here] = order_N[pairs_P[here]]
        others_P[here] = stays_N[rows_P[here]]
    size = max(run.store.block // 2, 1)

    def fill(start: int) -> Iterator[tuple[F32]]:
        vectors = ordered()
        place_N = run.cache.space(len(stays_N))
        for here in slices(len(order_N)):
            place_N[order_N[here]] = _places(here)
        tasks = (
            (vectors.at(pairs_P[lo : lo + size]), vectors.at(place_N[others_P[lo : lo + size]]))
            for lo in range(start, len(pairs_P), size)
        )
        with run.progress.task("semdedup: cosines", len(pairs_P)) as advance:
            advance(start)
            for cosines in run.engine.map(partial(_cosines_of, vectors.store, name), tasks):
                advance(len(cosines))
                yield (cosines,)

    key = run.key(_cosines_of, of=name, rows=digest(rows_P), others=digest(others_P))
    specs = {"cosine": ArraySpec("float32", least=-2, most=2)}
    return np.asarray(run.cache.columns("semdedup.best", key, specs, len(pairs_P), fill)["cosine"])


def _cosines_of(store: EmbeddingStore, name: str, task: tuple[Rows, Rows]) -> F32:
    rows, others = task
    return np.asarray(np.einsum("ij,ij->i", store.vectors_at(name, rows), store.vectors_at(name, others)))


def _size_notes(counts_N: Rows) -> Iterator[str]:
    """Yield a note on the number and sizes of groups, the numbers above 1."""
    sizes = np.concatenate([counts_N[here][counts_N[here] > 1] for here in slices(len(counts_N))])
    if not len(sizes):
        yield "no two rows of a cluster are duplicates"
        return
    parts, low = [], 2
    while low <= sizes.max():
        high = 2 * low - 1
        if count := np.count_nonzero((sizes >= low) & (sizes <= high)):
            parts.append(f"{count:,} of {low:,} or {high:,}" if low == 2 else f"{count:,} of {low:,} to {high:,}")
        low *= 2
    yield (
        f"{counted(len(sizes), 'group')} of duplicates with {sizes.sum():,} rows: {', '.join(parts)} rows; the largest "
        f"has {sizes.max():,}"
    )
