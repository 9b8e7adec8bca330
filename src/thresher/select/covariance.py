"""The covariance error: how well selections preserve the cross-covariance of images and captions of their pool.

That is ClipCov's criterion (arXiv 2403.12267). One pass over the pool, class by class, gives the error
inside the classes and, as the moments of all rows are the sum of those of the classes, the overall one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import threadpoolctl

from thresher.errors import UsageError
from thresher.ops.covariance import Moments, Spread, Sum, deviations, moments
from thresher.ops.cut import pack
from thresher.pool.store import EmbeddingStore, same_pool
from thresher.runtime.random import digest
from thresher.select.audit import audited
from thresher.select.run import Run
from thresher.selection import Selection

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]
Rows = npt.NDArray[np.int64]

_TASK = 8_192  # rows of a task, and of a part of a large class


@dataclass(frozen=True)
class Deviation:
    """A relative error: 0 preserves everything, 1 is as far off as no rows at all.

    Attributes:
        error: Of the selection; None where the pool has nothing to preserve.
        random: To be expected of a uniformly random subset of as many rows.
    """

    error: float | None
    random: float | None

    @property
    def ratio(self) -> float | None:
        """The error as a multiple of the random one: below 1 is better than chance. None where chance makes none."""
        return self.error / self.random if self.error is not None and self.random else None

    def header(self) -> dict[str, float | None]:
        """For JSON."""
        return {"error": self.error, "random": self.random, "ratio": self.ratio}


@dataclass(frozen=True)
class ClassError:
    """A class and what it adds to the error within classes.

    Attributes:
        label: Its number.
        rows: Of the pool.
        kept: How many of them the selection keeps.
        error: ||C_k - C_k(S)|| / ||C_k||; None where the pool has nothing to preserve.
        share: Of the sum over all classes.
    """

    label: int
    rows: int
    kept: int
    error: float | None
    share: float


@dataclass(frozen=True, eq=False)
class CovarianceError:
    """How far the cross-covariance of a selection lies from its pool's.

    Attributes:
        rows: n, of the pool: those the audit left.
        kept: Different rows of the selection.
        overall: ||C - C_S|| / ||C||, Frobenius norms, every matrix centred by its own means.
        within: sum_k n_k ||C_k - C_k(S)|| / sum_k n_k ||C_k|| over classes, each centred by itself; None
            without classes. A class of which no row was kept has C_k(S) = 0.
        overall_uncentred: The same of M = mean of v t^T, from which no means are taken.
        within_uncentred: So.
        classes: Classes with rows in the pool.
        classed: Rows of the pool in a class.
        classes_lost: Classes of which no row was kept.
        sizes_K: (K,) rows of every class in the pool.
        kept_K: (K,) rows of every class kept.
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
        """Rows of the pool in a class."""
        return int(self.sizes_K.sum())

    @property
    def classes_lost(self) -> int:
        """Classes of which no row was kept."""
        return int(np.count_nonzero((self.sizes_K > 0) & (self.kept_K == 0)))

    def worst(self, count: int) -> list[ClassError]:
        """Return the classes with the largest part of the error within classes, largest first."""
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
        """For JSON, with some of the classes."""
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

    What was computed for a pool, classes and rows is cached; one pass serves all selections that are new.

    Args:
        run: Of the selections' pool; which of its rows count is taken from the selections' audit.
        selections: Name -> selection. Repeats count as weights.
        labels_N: (N,) classes of the rows, 0 or more, -1 for rows in none, which count overall only.

    Returns:
        Name -> error.

    Raises:
        UsageError: The pool has no image or no text embeddings, no rows, or is another than the selections';
            the labels are not one a row.
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
        raise UsageError(f"no row of {run.store.layout.location} passed the audit: there is nothing to compare with")
    run = replace(run, store=run.store.where(pool_N))
    if labels_N is not None and len(labels_N) != len(pool_N):
        raise UsageError(f"{len(labels_N):,} labels for a pool of {len(pool_N):,} rows")
    groups_n = np.zeros(len(run.store), np.int32)  # 0: in no class; k + 1: in class k
    if labels_N is not None:
        groups_n = np.maximum(np.asarray(labels_N)[pool_N], -1).astype(np.int32) + np.int32(1)
    weights = {name: _weights(selection)[pool_N] for name, selection in selections.items()}
    pool_G4, found = _tables(run, groups_n, weights)

    sizes_G = np.bincount(groups_n, minlength=len(pool_G4))
    kept_G = {name: np.bincount(groups_n[weights[name] > 0], minlength=len(pool_G4)) for name in selections}
    return {name: _error(sizes_G, kept_G[name], pool_G4, found[name]) for name in selections}


def _weights(selection: Selection) -> Array:
    """(N,) how often each row is used."""
    return selection.mask() if selection.repeats is None else selection.repeats


def _error(sizes_G: Rows, kept_G: Rows, pool_G4: Floats, errors_G2: Floats) -> CovarianceError:
    """Put a selection's figures together; entry 0 of tables is the whole pool, k + 1 class k."""
    rows, kept = int(sizes_G.sum()), int(kept_G.sum())
    spreads = [Spread(int(n), *figures) for n, figures in zip([rows, *sizes_G[1:]], pool_G4.tolist(), strict=True)]
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
    """Return the pool's spread (G, 4) and every selection's deviations (G, 2), from the cache or one pass."""
    about = {"of": "joint", "classes": digest(groups_n)}
    paths = {
        name: run.cache.path("covariance", run.key(_judge, **about, rows=digest(w))) for name, w in weights.items()
    }
    pool = run.cache.path("covariance", run.key(_judge, **about, rows="pool"))
    found = {name: known for name, path in paths.items() if (known := run.cache.load(path)) is not None}
    missing = [name for name in weights if name not in found]
    spread = run.cache.load(pool)
    if missing or spread is None:
        with threadpoolctl.threadpool_limits(1):  # as in engines: bits must not depend on the cores
            made, rest = _pass(run, groups_n, [weights[name] for name in missing])
        spread = run.cache.save(pool, made)
        found |= {name: run.cache.save(paths[name], table) for name, table in zip(missing, rest, strict=True)}
    return np.asarray(spread), {name: np.asarray(found[name]) for name in weights}


def _pass(run: Run, groups_n: npt.NDArray[np.int32], weights: list[Array]) -> tuple[Floats, list[Floats]]:
    sizes_G = np.bincount(groups_n)
    pool_G4 = np.zeros((len(sizes_G), 4))
    errors_G2 = [np.zeros((len(sizes_G), 2)) for _ in weights]

    def note(group: int, figures: _Figures) -> None:
        pool_G4[group] = figures.spread
        for table, deviation in zip(errors_G2, figures.deviations, strict=True):
            table[group] = deviation

    here = run.local("joint")
    overall, large = _Sums(len(weights)), _Sums(len(weights))
    tasks = list(_tasks(sizes_G, np.argsort(groups_n, kind="stable")))
    judge = partial(_judge, here.store, weights)
    with run.progress.task("covariance", len(groups_n)) as advance:
        for task, (figures, parts) in zip(tasks, run.engine.map(judge, tasks), strict=True):
            overall.add(parts)
            if task.whole:
                for group, entry in zip(task.groups, figures, strict=True):
                    note(group, entry)
            else:
                large.add(parts)
                if task.last:
                    note(task.groups[0], _figures(large.moments()))
                    large = _Sums(len(weights))
            advance(len(task.rows))
    note(0, _figures(overall.moments()))
    return pool_G4, errors_G2


@dataclass(frozen=True, eq=False)
class _Task:
    """Whole small classes, or a part of a large one.

    Attributes:
        groups: Whose rows these are.
        sizes: Rows of each here.
        rows: Positions in the view, group by group.
        whole: Whether these are all rows of the groups.
        last: Whether no more rows of the last group follow.
    """

    groups: tuple[int, ...]
    sizes: tuple[int, ...]
    rows: Rows
    whole: bool = True
    last: bool = True


def _tasks(sizes_G: Rows, order_n: Rows) -> Iterator[_Task]:
    """Cut the ordered rows into tasks of at most ``_TASK`` rows."""
    ends_G = np.cumsum(sizes_G)
    for first, last in pack(sizes_G, _TASK):
        groups = first + np.flatnonzero(sizes_G[first:last])
        start, end = int(ends_G[first] - sizes_G[first]), int(ends_G[last - 1])
        if end - start <= _TASK:
            yield _Task(tuple(groups.tolist()), tuple(sizes_G[groups].tolist()), order_n[start:end])
            continue
        for lo in range(start, end, _TASK):
            hi = min(lo + _TASK, end)
            yield _Task(tuple(groups.tolist()), (hi - lo,), order_n[lo:hi], whole=False, last=hi == end)


@dataclass(frozen=True)
class _Figures:
    """Numbers about one class: its spread in the pool, and the deviation of each selection."""

    spread: tuple[float, float, float, float]
    deviations: tuple[tuple[float, float], ...]


class _Sums:
    """Sums of moments, of the pool and of every selection."""

    def __init__(self, selections: int) -> None:
        self._each = [Sum() for _ in range(1 + selections)]

    def add(self, group: list[Moments]) -> None:
        for total, found in zip(self._each, group, strict=True):
            total.add(found)

    def moments(self) -> list[Moments]:
        return [total.moments() for total in self._each]


def _figures(found: list[Moments]) -> _Figures:
    pool, *selections = found
    spread = Spread.of(pool)
    return _Figures(
        (spread.centred, spread.uncentred, spread.separate, spread.paired),
        tuple(deviations(pool, part) for part in selections),
    )


def _judge(store: EmbeddingStore, weights: list[Array], task: _Task) -> tuple[list[_Figures], list[Moments]]:
    """Return the figures of the task's classes, where they are whole, and the moments of all its rows."""
    image_ND, text_NE = store.vectors_at("image", task.rows), store.vectors_at("text", task.rows)
    counts = [w[task.rows] for w in weights]
    figures, total = [], _Sums(len(weights))
    lo = 0
    for size in task.sizes:
        rows = slice(lo, lo + size)
        lo += size
        found = [moments(image_ND[rows], text_NE[rows], w) for w in (None, *(count[rows] for count in counts))]
        total.add(found)
        if task.whole:
            figures.append(_figures(found))
    return figures, total.moments()
