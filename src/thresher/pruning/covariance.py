"""The covariance error: how well selections preserve the cross-covariance of images and captions of their pool.

This is ClipCov's criterion (arXiv 2403.12267). One pass over the pool, class by class, gives the error
within classes and also the overall error, because the moments of all rows are the sum of those of the classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from thresher.errors import UsageError
from thresher.ops.covariance import Moments, Spread, Sum, deviations, moments
from thresher.ops.cut import pack
from thresher.pool.store import EmbeddingStore, same_pool
from thresher.pruning.audit import audited
from thresher.pruning.run import Run
from thresher.runtime.checksums import ArraySpec
from thresher.runtime.engine import reduced
from thresher.runtime.memory import require
from thresher.runtime.process import one_blas_thread
from thresher.runtime.random import digest
from thresher.selection import Selection

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]
Rows = npt.NDArray[np.int64]

_TASK = 8_192  # rows of a task; a larger class is split into parts of this size


@dataclass(frozen=True)
class Deviation:
    """A relative error: 0 is a perfect match, 1 is as bad as keeping no rows at all.

    Attributes:
        error: The error of the selection; None if the pool's covariance is zero.
        random: The expected error of a uniformly random subset of the same size; None in the same case.
    """

    error: float | None
    random: float | None

    @property
    def ratio(self) -> float | None:
        """The error divided by the random one; below 1 is better than random. None if undefined."""
        return self.error / self.random if self.error is not None and self.random else None

    def header(self) -> dict[str, float | None]:
        """Return the values for JSON."""
        return {"error": self.error, "random": self.random, "ratio": self.ratio}


@dataclass(frozen=True)
class ClassError:
    """A class and its part of the error within classes.

    Attributes:
        label: Number of the class.
        rows: Rows of the class in the pool.
        kept: Rows of the class that the selection keeps.
        error: ||C_k - C_k(S)|| / ||C_k||; None if C_k is zero.
        share: Its share of the error summed over all classes.
    """

    label: int
    rows: int
    kept: int
    error: float | None
    share: float


@dataclass(frozen=True, eq=False)
class CovarianceError:
    """How far the cross-covariance of a selection is from that of its pool.

    Attributes:
        rows: n, rows of the pool, without those the audit dropped.
        kept: Distinct rows of the selection.
        overall: ||C - C_S|| / ||C||, Frobenius norms, each matrix centred by its own means.
        within: sum_k n_k ||C_k - C_k(S)|| / sum_k n_k ||C_k|| over classes, each centred by its own means; None
            without classes. A class with no row kept has C_k(S) = 0.
        overall_uncentred: The same for M = mean of v t^T, without subtracting means.
        within_uncentred: The same for M_k, without subtracting means.
        classes: Classes with rows in the pool.
        classed: Rows of the pool that are in a class.
        classes_lost: Classes with no row kept.
        sizes_K: (K,) rows of every class in the pool.
        kept_K: (K,) rows of every class that are kept.
        norms_K: (K,) ||C_k||.
        errors_K: (K,) ||C_k - C_k(S)||.
    """

    rows: int
    kept: int
    overall: Deviation
    within: Deviation | None
    overall_uncentred: Deviation
    within_uncentred: Deviation | None
    sizes_K: Rows
    kept_K: Rows
    norms_K: Floats
    errors_K: Floats

    @property
    def classes(self) -> int:
        """Classes with rows in the pool."""
        return int(np.count_nonzero(self.sizes_K))

    @property
    def classed(self) -> int:
        """Rows of the pool that are in a class."""
        return int(self.sizes_K.sum())

    @property
    def classes_lost(self) -> int:
        """Classes with no row kept."""
        return int(np.count_nonzero((self.sizes_K > 0) & (self.kept_K == 0)))

    def worst(self, count: int) -> list[ClassError]:
        """Return the ``count`` classes that add most to the error within classes, largest first."""
        parts_K = self.sizes_K * self.errors_K
        order = np.argsort(-parts_K, kind="stable")[:count]
        return [
            ClassError(
                label=int(k),
                rows=int(self.sizes_K[k]),
                kept=int(self.kept_K[k]),
                error=_over(self.errors_K[k], self.norms_K[k]),
                share=float(parts_K[k] / parts_K.sum()),
            )
            for k in order
            if parts_K[k] > 0
        ]

    def header(self, worst: int = 10) -> dict[str, Any]:
        """Return the values for JSON, with the ``worst`` classes that add most to the error."""
        deviations = {
            name: None if value is None else value.header()
            for name in ("overall", "within", "overall_uncentred", "within_uncentred")
            for value in [getattr(self, name)]
        }
        counts = {name: getattr(self, name) for name in ("rows", "kept", "classes", "classed", "classes_lost")}
        return {**counts, **deviations, "worst": [asdict(entry) for entry in self.worst(worst)]}


def covariance_errors(
    run: Run, selections: Mapping[str, Selection], labels_N: Array | None = None
) -> dict[str, CovarianceError]:
    """Compare the image-text cross-covariance of selections with that of their pool.

    Results are cached by pool, classes and rows; one pass computes all selections that are not in the cache.

    Args:
        run: A run on the pool of the selections; rows that their audit dropped are left out.
        selections: Name -> selection. Repeats count as weights.
        labels_N: (N,) integer classes of the rows; -1 for rows in no class, which count in the overall error only.

    Returns:
        Name -> error.

    Raises:
        UsageError: The pool has no image or no text embeddings, no usable rows, or is not the pool of the selections;
            or ``labels_N`` does not have one label per row.
    """
    if "joint" not in run.store.fields:
        raise UsageError(
            f"the cross-covariance needs image and text embeddings; {run.store.layout.location} has "
            f"{' and '.join(run.store.fields) or 'none'}"
        )
    first = next(iter(selections.values()))
    same_pool(first, run.store)
    pool_N = np.logical_and.reduce([audited(first.same_store(selection)) for selection in selections.values()])
    if not pool_N.any():
        raise UsageError(f"no row of {run.store.layout.location} passed the audit, so there is nothing to compare with")
    run = replace(run, store=run.store.where(pool_N))
    if labels_N is not None and len(labels_N) != len(pool_N):
        raise UsageError(f"{len(labels_N):,} labels for a pool of {len(pool_N):,} rows")
    groups_n = np.zeros(len(run.store), np.int32)  # 0: in no class; k + 1: in class k
    if labels_N is not None:
        groups_n = np.maximum(np.asarray(labels_N)[pool_N], -1).astype(np.int32) + np.int32(1)
    weights = {name: _weights(selection)[pool_N] for name, selection in selections.items()}
    pool_G4, errors = _tables(run, groups_n, weights)

    sizes_G = np.bincount(groups_n, minlength=len(pool_G4))
    kept_G = {name: np.bincount(groups_n[weights[name] > 0], minlength=len(pool_G4)) for name in selections}
    run.store.check_unchanged("its cross-covariance was computed")
    return {name: _error(sizes_G, kept_G[name], pool_G4, errors[name]) for name in selections}


def _weights(selection: Selection) -> Array:
    """Return how often each row is used, (N,)."""
    return selection.mask() if selection.repeats is None else selection.repeats


def _error(sizes_G: Rows, kept_G: Rows, pool_G4: Floats, errors_G2: Floats) -> CovarianceError:
    """Combine a selection's numbers; entry 0 of the tables is the whole pool, entry k + 1 is class k."""
    rows, kept = int(sizes_G.sum()), int(kept_G.sum())
    spreads = [Spread(int(n), *values) for n, values in zip([rows, *sizes_G[1:]], pool_G4.tolist(), strict=True)]
    whole = spreads[0].expected(np.array([kept]))
    overall = [Deviation(_over(errors_G2[0, j], pool_G4[0, j]), _over(whole[j][0], pool_G4[0, j])) for j in (0, 1)]
    sizes_K = sizes_G[1:]
    within: list[Deviation | None] = [None, None]
    if sizes_K.any():
        random_K2 = np.array([spread.by_chance(rows, kept) if spread.rows else (0.0, 0.0) for spread in spreads[1:]])
        error, random, norm = (sizes_K @ table for table in (errors_G2[1:], random_K2, pool_G4[1:, :2]))
        within = [Deviation(_over(error[j], norm[j]), _over(random[j], norm[j])) for j in (0, 1)]
    return CovarianceError(
        rows=rows,
        kept=kept,
        overall=overall[0],
        within=within[0],
        overall_uncentred=overall[1],
        within_uncentred=within[1],
        sizes_K=sizes_K,
        kept_K=kept_G[1:],
        norms_K=pool_G4[1:, 0],
        errors_K=errors_G2[1:, 0],
    )


def _over(part: float, whole: float) -> float | None:
    return float(part / whole) if whole > 0 else None


# --- the pass -------------------------------------------------------------------------------------


def _tables(
    run: Run, groups_n: npt.NDArray[np.int32], weights: Mapping[str, Array]
) -> tuple[Floats, dict[str, Floats]]:
    """Return the pool's spread (G, 4) and each selection's deviations (G, 2), from the cache or in one pass."""
    about = {"of": "joint", "classes": digest(groups_n)}
    paths = {
        name: run.cache.path("covariance", run.key(_judge, **about, rows=digest(w))) for name, w in weights.items()
    }
    pool = run.cache.path("covariance", run.key(_judge, **about, rows="pool"))
    groups = int(groups_n.max(initial=0)) + 1
    pairs, fours = ArraySpec("float64", (groups, 2)), ArraySpec("float64", (groups, 4))
    tables = {name: known for name, path in paths.items() if (known := run.cache.load(path, pairs)) is not None}
    missing = [name for name in weights if name not in tables]
    spread = run.cache.load(pool, fours)
    if missing or spread is None:
        matrix = 8 * run.store.dim("image") * run.store.dim("text")
        require(
            matrix * (2 * len(missing) + run.engine.workers + 6),
            f"the cross-covariance of {run.store.dim('image'):,} by {run.store.dim('text'):,} dimensions",
            "leave out the covariance, or reduce the dimensions of the embeddings",
        )
        with one_blas_thread:  # as in engines: results must not depend on the number of cores
            made, rest = _pass(run, groups_n, [weights[name] for name in missing])
        spread = run.cache.save(pool, made)
        tables |= {name: run.cache.save(paths[name], table) for name, table in zip(missing, rest, strict=True)}
    return np.asarray(spread), {name: np.asarray(tables[name]) for name in weights}


def _pass(run: Run, groups_n: npt.NDArray[np.int32], weights: list[Array]) -> tuple[Floats, list[Floats]]:
    sizes_G = np.bincount(groups_n)
    pool_G4 = np.zeros((len(sizes_G), 4))
    errors_G2 = [np.zeros((len(sizes_G), 2)) for _ in weights]

    def note(group: int, statistics: _ClassStatistics) -> None:
        pool_G4[group] = statistics.spread
        for table, deviation in zip(errors_G2, statistics.deviations, strict=True):
            table[group] = deviation

    large = _Sums(len(weights))
    order_n = np.argsort(groups_n, kind="stable")
    tasks = list(_tasks(sizes_G, order_n))
    with run.in_order("joint", order_n) as ordered, run.progress.task("covariance", len(groups_n)) as advance:
        vectors = ordered()
        judge = partial(_judge, vectors.store, weights)
        reads = ((task, vectors.rows(task.start, task.start + len(task.rows))) for task in tasks)
        done = reduced(run.engine, judge, reads, _Sums.plus)
        for task, (statistics, parts) in zip(tasks, done, strict=True):
            if task.whole:
                for group, entry in zip(task.groups, statistics, strict=True):
                    note(group, entry)
            else:
                large.add(parts)
                if task.last:
                    note(task.groups[0], _statistics(large.moments()))
                    large = _Sums(len(weights))
            advance(len(task.rows))
    if done.total is not None:
        note(0, _statistics(done.total.moments()))
    return pool_G4, errors_G2


@dataclass(frozen=True, eq=False)
class _ClassRows:
    """The rows of some small classes, or a part of the rows of a large one.

    Attributes:
        groups: Numbers of the classes, 0 for rows in no class.
        sizes: Rows of each class in ``rows``.
        start: Place of the first row in the order of all classes.
        rows: Positions in the view, class by class.
        whole: Whether these are all rows of the classes.
        last: Whether this is the last part of a large class.
    """

    groups: tuple[int, ...]
    sizes: tuple[int, ...]
    start: int
    rows: Rows
    whole: bool = True
    last: bool = True


def _tasks(sizes_G: Rows, order_n: Rows) -> Iterator[_ClassRows]:
    """Split the ordered rows into tasks of at most ``_TASK`` rows."""
    ends_G = np.cumsum(sizes_G)
    for first, last in pack(sizes_G, _TASK):
        groups = first + np.flatnonzero(sizes_G[first:last])
        start, end = int(ends_G[first] - sizes_G[first]), int(ends_G[last - 1])
        if end - start <= _TASK:
            yield _ClassRows(tuple(groups.tolist()), tuple(sizes_G[groups].tolist()), start, order_n[start:end])
            continue
        for lo in range(start, end, _TASK):
            hi = min(lo + _TASK, end)
            yield _ClassRows(tuple(groups.tolist()), (hi - lo,), lo, order_n[lo:hi], whole=False, last=hi == end)


@dataclass(frozen=True)
class _ClassStatistics:
    """The spread of one class in the pool, and the deviation of each selection."""

    spread: tuple[float, float, float, float]
    deviations: tuple[tuple[float, float], ...]


class _Sums:
    """Sums of moments of the pool and of each selection."""

    def __init__(self, selections: int) -> None:
        self._each = [Sum() for _ in range(1 + selections)]

    def add(self, group: list[Moments]) -> None:
        for total, part in zip(self._each, group, strict=True):
            total.add(part)

    def plus(self, other: _Sums) -> _Sums:
        """Add the groups of other sums, after those of these."""
        for total, more in zip(self._each, other._each, strict=True):
            total.plus(more)
        return self

    def moments(self) -> list[Moments]:
        return [total.moments() for total in self._each]


def _statistics(moments_of_each: list[Moments]) -> _ClassStatistics:
    pool, *selections = moments_of_each
    spread = Spread.of(pool)
    return _ClassStatistics(
        (spread.centred, spread.uncentred, spread.separate, spread.paired),
        tuple(deviations(pool, part) for part in selections),
    )


def _judge(
    store: EmbeddingStore, weights: list[Array], given: tuple[_ClassRows, Rows]
) -> tuple[tuple[list[_ClassStatistics], list[Moments]], _Sums]:
    """Return the statistics of the task's classes or, of a part of a class, its moments; and the sums for all rows."""
    task, read = given  # read: positions of the rows in the store
    image_ND, text_NE = store.vectors_at("image", read), store.vectors_at("text", read)
    counts = [w[task.rows] for w in weights]
    statistics, total = [], _Sums(len(weights))
    lo = 0
    for size in task.sizes:
        rows = slice(lo, lo + size)
        lo += size
        parts = [moments(image_ND[rows], text_NE[rows], w) for w in (None, *(count[rows] for count in counts))]
        total.add(parts)
        if task.whole:
            statistics.append(_statistics(parts))
    made, overall = total.moments(), _Sums(len(weights))
    overall.add(made)
    return (statistics, [] if task.whole else made), overall
