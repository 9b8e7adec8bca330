"""Statistics of classes for ClipCov: similarities within and between classes, and the greedy selection.

These are the passes over vectors; the arithmetic is in :mod:`thresher.ops.crosscov`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from thresher.ops import crosscov
from thresher.ops.cut import by_group, pack, slices
from thresher.ops.kmeans import add_by_group, sums_by_group
from thresher.ops.products import Products
from thresher.ops.vectors import F32
from thresher.pool.spill import Ordered
from thresher.pool.store import Block, EmbeddingStore
from thresher.pruning.clusters import Groups
from thresher.pruning.run import Run
from thresher.runtime.checksums import ArraySpec
from thresher.runtime.random import digest

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

_IN_MEMORY = 512 * 2**20  # a large class is held in memory up to this many bytes, if its losses are cheap sums
_FORECAST = 2**18  # rows by which it is foreseen how many each class keeps
_STRIPE = 1_024  # rows read at a time where each is used once, so that they stay in the CPU cache


@dataclass(frozen=True, eq=False)
class Classes:
    """The rows of a view, sorted by class.

    Attributes:
        order_N: (n,) positions in the view, sorted by class, ascending within a class.
        sizes_K: (K,) number of rows of each class.
    """

    order_N: Ints
    sizes_K: Ints

    @classmethod
    def of(cls, groups: Groups, space: Callable[[int], Ints] | None = None) -> Classes:
        """Sort the rows of a clustering; ``space`` as for :func:`thresher.ops.cut.by_group`."""
        return cls(by_group(groups.labels_N, space), groups.sizes_K)

    @property
    def starts_K(self) -> Ints:
        """(K,) where each class begins in ``order_N``."""
        return np.asarray(np.cumsum(self.sizes_K) - self.sizes_K, np.int64)

    def slices(self) -> list[slice]:
        """The slice of ``order_N`` that holds each class."""
        return [slice(lo, lo + n) for lo, n in zip(self.starts_K.tolist(), self.sizes_K.tolist(), strict=True)]

    def rows(self) -> list[Ints]:
        """The positions of the rows of each class, ascending."""
        return [self.order_N[own] for own in self.slices()]


# --- similarities ---------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Similarities:
    """Similarities of the rows, (n,) float64 each, in the order of :class:`Classes`.

    Attributes:
        own: s(i, i), the CLIP score.
        cross: Mean similarity to the rows of the class, image to text plus text to image, clamped.
        mean: The same without a clamp.
        inter: Mean similarity to the rows of all other classes, in both directions; 0 if there are none.
        toward_K2D: (K, 2, D) float32, mean text and mean image of each class.
    """

    own: Floats
    cross: Floats
    mean: Floats
    inter: Floats
    toward_K2D: F32


def similarities(
    run: Run, groups: Groups, classes: Classes, clamp: float | None, ordered: Callable[[], Ordered]
) -> Similarities:
    """Compute the similarities, cached: two passes over the rows, and products within classes if clamped.

    ``ordered`` returns the vectors in the order of the classes, see :meth:`thresher.pruning.run.Run.in_order`.
    """
    labels = np.asarray(groups.labels_N)
    what = {"labels": digest(labels), "classes": len(classes.sizes_K)}
    shape = (2, len(classes.sizes_K), 2, run.store.dim("image"))
    means = run.cache.array(
        "class-means",
        run.key(_means, **what),
        lambda: _means(run, labels, classes.sizes_K),
        ArraySpec("float32", shape, least=-2, most=2),
    )
    number = ArraySpec("float32", least=-5, most=5)
    specs = {"own": number, "mean": number, "inter": number}
    columns = run.column("similarities", "joint", partial(_judge, labels, np.asarray(means)), specs, **what)
    own, mean, inter = (run.cache.space(len(labels), np.float64) for _ in specs)
    for name, column in zip(specs, (own, mean, inter), strict=True):
        for here in slices(len(labels)):
            column[here] = columns[name][classes.order_N[here]]
    cross = mean if clamp is None else _cross(run, classes, run.key(_cross, clamp=clamp, **what), clamp, ordered)
    return Similarities(own, cross, mean, inter, np.asarray(means)[0])


def _means(run: Run, labels_N: npt.NDArray[np.int32], sizes_K: Ints) -> F32:
    """Return the mean (text, image) of each class and of all rows outside it, (2, K, 2, D) float32."""
    k, d = len(sizes_K), run.store.dim("image")
    sums = np.zeros((k, 2, d))
    made = run.sum_over_blocks("class means", "joint", partial(_sums, np.asarray(labels_N)), add_by_group)
    if made is not None:
        sums[made[0]] = made[1]
    total, n = sums.sum(axis=0), int(sizes_K.sum())
    out = np.empty((2, k, 2, d), np.float32)
    for j, size in enumerate(sizes_K.tolist()):  # one at a time: K may be large
        out[0, j] = sums[j] / max(size, 1)
        out[1, j] = (total - sums[j]) / (n - size) if size < n else 0
    return out


def _sums(labels_N: npt.NDArray[np.int32], store: EmbeddingStore, block: Block) -> tuple[Any, ...]:
    """Return the J classes present in a block and the sums of their texts and images, (J, 2, D) float64."""
    labels = labels_N[block.lo : block.hi]
    present, at = np.unique(labels, return_inverse=True)
    sums = np.zeros((len(present), 2, store.dim("image")))
    for side, name in enumerate(("text", "image")):
        lo = 0
        for rows in store.stripes(name, block):
            part = sums_by_group(rows, at[lo : lo + len(rows)].astype(np.int32))
            sums[part.groups_J, side] += part.sums_JD
            lo += len(rows)
    return present.astype(np.int64), sums


def _judge(
    labels_N: npt.NDArray[np.int32], means_2K2D: F32, store: EmbeddingStore, block: Block
) -> tuple[F32, F32, F32]:
    """Return own, mean and inter of a block's rows, (B,) float32; see :class:`Similarities`."""
    out = np.empty((3, len(block)), np.float32)
    lo = 0
    for image, text in zip(store.stripes("image", block), store.stripes("text", block), strict=True):
        here = slice(lo, lo + len(image))
        label = labels_N[block.lo + lo : block.lo + lo + len(image)]
        out[0, here] = np.einsum("ij,ij->i", image, text)
        for side in (0, 1):
            out[1 + side, here] = np.einsum("ij,ij->i", image, means_2K2D[side, label, 0])
            out[1 + side, here] += np.einsum("ij,ij->i", text, means_2K2D[side, label, 1])
        lo += len(image)
    return out[0], out[1], out[2]


@dataclass(frozen=True)
class _Tile:
    """Rows lo to hi of the order: whole classes of ``sizes`` rows, or a part of the class that spans first to last."""

    lo: int
    hi: int
    sizes: tuple[int, ...] = ()
    first: int = 0
    last: int = 0


def _cross(run: Run, classes: Classes, key: dict[str, Any], clamp: float, ordered: Callable[[], Ordered]) -> Floats:
    """Return the clamped cross, (n,) float64; sums are saved every few seconds, so that a killed run can resume."""
    path = run.cache.path("class-products", key)
    n = len(classes.order_N)
    known = run.cache.load(path, ArraySpec("float64", (n,), least=-5, most=5))
    if known is not None:
        return np.asarray(known)
    tiles = list(_tiles(classes.sizes_K, _held(run.store)))
    saved = run.cache.resumable(path)
    state = saved.load(
        {
            "sums": ArraySpec("float64", (n,), least=-5 * n, most=5 * n),
            "done": ArraySpec("int64", (), least=0, most=len(tiles)),
        }
    )
    sums, done = run.cache.space(n, np.float64), 0
    if state is not None:
        sums[:], done = state["sums"], int(state["done"])
    state = None  # it has as many numbers
    with run.progress.task("class products", n) as advance:
        advance(sum(tile.hi - tile.lo for tile in tiles[:done]))
        rule = partial(_products, ordered(), run.products, clamp)
        for tile, (rows, columns) in zip(tiles[done:], run.engine.map(rule, tiles[done:]), strict=True):
            sums[tile.lo : tile.hi] += rows
            sums[tile.first : tile.last] += columns
            done += 1
            advance(tile.hi - tile.lo)
            saved.offer(partial(dict, sums=sums, done=done))
    for own, size in zip(classes.slices(), classes.sizes_K.tolist(), strict=True):
        sums[own] /= size
    cross = run.cache.save(path, sums)
    saved.remove()
    return np.asarray(cross)


def _held(store: EmbeddingStore) -> int:
    """Return how many rows a task holds in memory; larger classes are processed in parts of at most this size."""
    return max(store.block // 2, 1)


def _tiles(sizes_K: Ints, held: int) -> Iterator[_Tile]:
    ends = np.cumsum(sizes_K)
    for first, last in pack(sizes_K, held):
        lo, hi = int(ends[first] - sizes_K[first]), int(ends[last - 1])
        if hi - lo <= held:
            yield _Tile(lo, hi, tuple(sizes_K[first:last].tolist()))
        else:
            yield from (_Tile(lo + start, lo + end, (), lo, hi) for start, end in _parts(hi - lo, held))


def _parts(size: int, held: int) -> list[tuple[int, int]]:
    """Split a large class into equal parts, a multiple of four, so that a few workers finish together."""
    count = 4 * -(-size // (4 * held))
    return [(size * i // count, size * (i + 1) // count) for i in range(count)]


def _products(vectors: Ordered, products: Products, clamp: float, tile: _Tile) -> tuple[Floats, Floats]:
    """Return what a tile adds to the sums of its own rows and, for a part of a class, to the sums of the class."""
    store = vectors.store
    image = store.vectors_at("image", vectors.rows(tile.lo, tile.hi))
    if tile.sizes:
        text = store.vectors_at("text", vectors.rows(tile.lo, tile.hi))
        sums, lo = np.empty(len(image)), 0
        for size in tile.sizes:
            own = slice(lo, lo + size)
            sums[own] = np.add(*products.sums(image[own], text[own], clamp))
            lo += size
        return sums, np.empty(0)
    rows, columns = np.zeros(len(image)), np.empty(tile.last - tile.first)
    for lo in range(tile.first, tile.last, _STRIPE):
        hi = min(lo + _STRIPE, tile.last)
        by_row, by_column = products.sums(image, store.vectors_at("text", vectors.rows(lo, hi)), clamp)
        rows += by_row
        columns[lo - tile.first : hi - tile.first] = by_column
    return rows, columns


# --- greedy ---------------------------------------------------------------------------------------


def greedy(
    run: Run,
    classes: Classes,
    walks: list[crosscov.Walk],
    budget: int,
    clamp: float | None,
    refresh: int,
    ordered: Callable[[], Ordered],
) -> tuple[Ints, float]:
    """Repeatedly take the row with the largest gain of all classes, until the budget is used.

    Args:
        run: The run on these rows.
        classes: The rows of each class.
        walks: The walk of each class, before its first row. They are advanced as far as the budget may need, or a
            little farther.
        budget: Number of rows to take.
        clamp: See :func:`thresher.ops.crosscov.advance`.
        refresh: See :func:`thresher.ops.crosscov.advance`.
        ordered: Returns the vectors in the order of the classes.

    Returns:
        How many rows each class keeps, (K,), and the lowest gain of a kept row.
    """
    vectors = ordered()
    store, own, slices = vectors.store, classes.rows(), classes.slices()

    def read(k: Any) -> Ints:
        return vectors.rows(slices[k].start, slices[k].stop)

    every = max(len(classes.order_N) // _FORECAST, 1)  # of many rows, some are enough: no result depends on it
    score, cross, balance = (
        np.concatenate([getattr(walk, name)[::every] for walk in walks]) for name in ("gains_n", "drift_n", "balance_n")
    )
    some_K = -(-classes.sizes_K // every)
    least_K = crosscov.forecast(score, cross, balance, np.cumsum(some_K) - some_K, max(budget // every, 1))
    least_K = np.minimum(every * least_K, classes.sizes_K)
    held = _held(run.store)
    small_K = classes.sizes_K <= held
    least_K += np.where(small_K, least_K // 16 + 4, 0)  # a margin, so that their vectors are read only once
    floor, reported = -np.inf, 0
    with run.progress.task("greedy", budget) as advance:
        while True:
            small = np.flatnonzero((least_K > 0) & small_K)
            together = [small[lo:hi] for lo, hi in pack(classes.sizes_K[small], held)]
            tasks = ([(read(k), walks[k], int(least_K[k])) for k in some] for some in together)
            rule = partial(_advance, store, run.products, clamp, refresh, floor)
            for some, done in zip(together, run.engine.map(rule, tasks), strict=True):
                for k, walk in zip(some, done, strict=True):
                    walks[k].become(walk)
            for k in np.flatnonzero((least_K > 0) & ~small_K):
                _advance_large(run, store, read(k), walks[k], clamp, refresh, int(least_K[k]), floor)
            taken = [rows[walk.order] for rows, walk in zip(own, walks, strict=True)]
            kept_K, floor = crosscov.merge([walk.gains for walk in walks], taken, budget)
            advance(int(kept_K.sum()) - reported)
            reported = int(kept_K.sum())
            # If all rows that a walk has ordered so far are kept, the class may have more rows to keep.
            known_K = np.array([len(rows) for rows in taken])
            more = (kept_K == known_K) & (known_K < classes.sizes_K)
            if not more.any():
                return kept_K, floor
            least_K = np.where(more, known_K + known_K // 2 + 1, 0)


def _advance(
    store: EmbeddingStore,
    products: Products,
    clamp: float | None,
    refresh: int,
    floor: float,
    task: Sequence[tuple[Ints, crosscov.Walk, int]],
) -> list[crosscov.Walk]:
    """Advance the walks of classes whose vectors fit in memory together."""
    rows = np.concatenate([own for own, _, _ in task])
    image, text = _vectors(store, rows)
    lo = 0
    for own, walk, least in task:
        v, t = image[lo : lo + len(own)], text[lo : lo + len(own)]
        lo += len(own)

        def take(rows: Ints, v: F32 = v, t: F32 = t) -> tuple[F32, F32]:
            return v[rows], t[rows]

        def spend(
            rows: Ints, toward: F32 | None, v: F32 = v, t: F32 = t, clamped: Bools = walk.clamped_n
        ) -> tuple[Floats, Floats]:
            return crosscov.losses(v, t, clamped, crosscov.Taken.of(v[rows], t[rows], toward), clamp, products)

        crosscov.advance(walk, clamp, refresh, least, floor, take, spend)
    return [walk for _, walk, _ in task]


def _advance_large(
    run: Run,
    store: EmbeddingStore,
    own: Ints,
    walk: crosscov.Walk,
    clamp: float | None,
    refresh: int,
    least: int,
    floor: float,
) -> None:
    """Advance the walk of a large class: part by part on the engine, or in memory if its losses are cheap sums."""
    parts = [(own[lo:hi], walk.clamped_n[lo:hi]) for lo, hi in _parts(len(own), _held(run.store))]
    fits = len(own) * store.dim("joint") * 4 <= _IN_MEMORY
    held = _hold(run, store, own) if clamp is None and fits else None

    def take(rows: Ints) -> tuple[F32, F32]:
        return _vectors(store, own[rows]) if held is None else (held[0][rows], held[1][rows])

    def spend(rows: Ints, toward: F32 | None) -> tuple[Floats, Floats]:
        taken = crosscov.Taken.of(*take(rows), toward)
        if held is not None:
            return crosscov.losses(*held, walk.clamped_n, taken, clamp, run.products)
        loss, drift = zip(*run.engine.map(partial(_losses, store, run.products, taken, clamp), parts), strict=True)
        return np.concatenate(loss), np.concatenate(drift)

    crosscov.advance(walk, clamp, refresh, least, floor, take, spend)


def _hold(run: Run, store: EmbeddingStore, rows: Ints) -> tuple[F32, F32]:
    """Read rows into memory, one stripe at a time."""
    held = tuple(np.empty((len(rows), store.dim(name)), np.float32) for name in ("image", "text"))
    starts = range(0, len(rows), _STRIPE)
    stripes = run.engine.map(partial(_vectors, store), (rows[lo : lo + _STRIPE] for lo in starts))
    for lo, stripe in zip(starts, stripes, strict=True):
        for whole, part in zip(held, stripe, strict=True):
            whole[lo : lo + len(part)] = part
    return held[0], held[1]


def _vectors(store: EmbeddingStore, rows: Ints) -> tuple[F32, F32]:
    return store.vectors_at("image", rows), store.vectors_at("text", rows)


def _losses(
    store: EmbeddingStore, products: Products, taken: crosscov.Taken, clamp: float | None, part: tuple[Ints, Bools]
) -> tuple[Floats, Floats]:
    rows, clamped = part
    losses = np.empty((2, len(rows)))
    for lo in range(0, len(rows), _STRIPE):
        here = slice(lo, lo + _STRIPE)
        image, text = _vectors(store, rows[here])
        losses[:, here] = crosscov.losses(image, text, clamped[here], taken, clamp, products)
    return losses[0], losses[1]
