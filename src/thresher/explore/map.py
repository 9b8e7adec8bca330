"""A map of a pool: a position in two dimensions for each row, near those of similar rows.

A sample of rows is laid out by t-SNE (van der Maaten and Hinton 2008, as in the package openTSNE) on its first 50
principal components. Every other row is placed next to the nearest row of the sample. Without the extra ``view``, the
map is the first two principal components, and says so. Positions are cached, and the same pool gives the same map with
the same version of openTSNE and the same matrix kernels.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from thresher.errors import INSTALL_EXTRA, UsageError, installed
from thresher.explore.names import sampled
from thresher.ops.cut import allocate
from thresher.ops.neighbors import nearest_other
from thresher.ops.vectors import F32, units_of
from thresher.pool.store import Block, EmbeddingStore
from thresher.runtime.cache import Cache
from thresher.runtime.checksums import ArraySpec
from thresher.runtime.code import code_version
from thresher.runtime.engine import Engine
from thresher.runtime.engines.serial import Serial
from thresher.runtime.process import matrix_kernels, no_warnings, thread_pools
from thresher.runtime.random import digest, generator, permutation

Array = npt.NDArray[Any]
Ints = npt.NDArray[np.int64]

SAMPLE = 10_000  # rows that are laid out
_COMPONENTS = 50
_FEW = 4_000  # points up to which the exact tree is faster than interpolation
_EARLY, _LATE = 250, 500  # iterations, with and without exaggeration
_PERPLEXITY = 30
_POWER = 8  # iterations of the subspace
_BYTES = 256 * 2**20  # of the sampled vectors, at most
_SPREAD = 0.5  # of the distance between neighbours on the map, for rows next to one of the sample


@dataclass(frozen=True, eq=False)
class PoolMap:
    """Positions of rows on a map.

    Attributes:
        rows: (n,) int64 global ids of the rows, ascending; None for all N rows.
        x: (n,) float32; the sample lies within -1 to 1, other rows at most a little outside. NaN for a row whose
            vector is zero or not finite.
        y: (n,) float32, likewise.
        sample: (M,) int64 global ids of the rows that were laid out.
        method: "t-SNE", or "PCA" without the extra ``view``.
        note: What a reader of the map should know, in one or two sentences.
    """

    rows: Ints | None
    x: Array
    y: Array
    sample: Ints
    method: Literal["t-SNE", "PCA"]
    note: str


def map_of(
    store: EmbeddingStore,
    cache: Cache,
    *,
    embedding: str | None = None,
    labels_N: Array | None = None,
    rows: Ints | None = None,
    sample: int = SAMPLE,
    engine: Engine | None = None,
    seed: int = 0,
) -> PoolMap:
    """Return a map of a pool, or of some of its rows.

    At most 256 MB of vectors are in memory, and two numbers per row are written to the cache.

    Args:
        store: The whole pool.
        cache: Where the sample's positions, and those of all rows, are kept.
        embedding: Which embeddings (default: "image" if there are any).
        labels_N: (N,) clusters, negative for none: each cluster with rows has a row in the sample at least, if there
            are fewer clusters than half the sample.
        rows: (n,) ascending global ids to place; all by default. Up to rounding, positions do not
            depend on it.
        sample: Number of rows to lay out.
        engine: Where rows are placed (default: in this process).
        seed: Seed of the sample and the layout.

    Raises:
        UsageError: The pool has no such embeddings, or ``sample`` is below 1.
    """
    if sample < 1:
        raise UsageError(f"sample = {sample}: must be at least 1")
    field = embedding or ("image" if "image" in store.fields else next(iter(store.fields), "image"))
    store.parts(field)  # checks that there is one
    method: Literal["t-SNE", "PCA"] = "t-SNE" if installed("openTSNE") else "PCA"
    sample = max(min(sample, _BYTES // (4 * store.dim(field)), store.total), 1)
    sample_M = sample_rows(store.total, sample, labels_N, seed)
    key = {
        "store": store.version(),
        "field": field,
        "sample": digest(sample_M),
        "method": f"{method} {metadata.version('openTSNE')}" if method == "t-SNE" else method,
        "kernels": matrix_kernels(),
        "code": code_version(map_of),
        "seed": seed,
    }
    with thread_pools().limit(limits=1):
        units_MD = _vectors(store, field, sample_M)
        basis_DC, mean_D = principal(units_MD, _COMPONENTS, seed)
        points_MC = np.asarray((units_MD - mean_D) @ basis_DC, np.float32)
        bad = np.isnan(points_MC[:, 0])
        placed_M2 = cache.array(
            "map-sample",
            key,
            lambda: _with_nan(_laid_out(points_MC[~bad], method, seed), bad),
            ArraySpec("float32", (len(sample_M), 2)),
        )
        place = _Place.of(basis_DC, mean_D, points_MC[~bad], np.asarray(placed_M2)[~bad])
        if rows is not None:
            made = [
                _placed(field, place, store, rows[lo : lo + store.block]) for lo in range(0, len(rows), store.block)
            ]
            x, y = (np.concatenate([np.empty(0, np.float32), *(part[i] for part in made)]) for i in (0, 1))
        else:
            work = partial(_placed_block, field, place)
            engine = engine or Serial()

            def fill(start: int) -> Iterator[tuple[Array, ...]]:
                yield from engine.map(partial(work, store), store.blocks(field, start))

            made_N = cache.columns("map", key, {"x": "float32", "y": "float32"}, store.total, fill)
            x, y = made_N["x"], made_N["y"]
    return PoolMap(rows, x, y, sample_M, method, _note(method, len(sample_M), store.total))


def _note(method: str, sample: int, total: int) -> str:
    if method == "PCA":
        return (
            "The first two principal components: rows that differ in other directions may be next to each other. "
            f"For a better map type: {INSTALL_EXTRA.format(extra='view')}"
        )
    rest = f" {sample:,} rows were laid out, and every other row is next to the most similar of these." * (
        sample < total
    )
    return f"t-SNE: near rows are similar; distances between groups, and their sizes, mean little.{rest}"


def sample_rows(total: int, size: int, labels_N: Array | None, seed: int) -> Ints:
    """Return the rows to lay out, ascending: random ones, or from each cluster in proportion, one at least."""
    if size >= total:
        return np.arange(total)
    if labels_N is not None and (k := int(labels_N.max(initial=-1)) + 1):
        sizes_K = np.bincount(labels_N[labels_N >= 0], minlength=k)
        filled = np.flatnonzero(sizes_K)
        inside = int(sizes_K.sum())
        if len(filled) <= size // 2:
            count = min(size, inside)
            low = np.minimum(sizes_K, 1)
            take_K = allocate(sizes_K * (count / inside), low, sizes_K, count)
            return _some_of_each(labels_N, k, take_K)
    ranks = permutation(generator(seed, "map"), total)
    return np.flatnonzero(ranks < size)


def _some_of_each(labels_N: Array, clusters: int, take_K: Ints) -> Ints:
    parts = [np.empty(0, np.int64)]
    most = int(take_K.max(initial=0))
    rows = sampled(labels_N, clusters, most) if most else parts[0]
    labels = labels_N[rows]
    order = np.argsort(labels, kind="stable")
    ends = np.searchsorted(labels[order], np.arange(clusters + 1))
    for j in np.flatnonzero(take_K).tolist():
        own = order[ends[j] : ends[j + 1]]
        at = (2 * np.arange(take_K[j]) + 1) * len(own) // (2 * int(take_K[j]))
        parts.append(rows[own[at]])
    return np.sort(np.concatenate(parts))


def _vectors(store: EmbeddingStore, field: str, rows: Ints) -> F32:
    """Return unit vectors of rows by ascending id, (n, D) float32; NaN for those without a direction."""
    return _joined([_units(store.raw_at(part, rows)) for part in store.parts(field)])


def _units(raw: Array) -> F32:
    units, bad = units_of(raw, np.empty(raw.shape, np.float32))
    units[bad] = np.nan
    return units


def _joined(units: list[F32]) -> F32:
    return units[0] if len(units) == 1 else np.concatenate(units, axis=1) * np.float32(np.sqrt(0.5))


def principal(rows_MD: F32, count: int, seed: int = 0) -> tuple[F32, F32]:
    """Return the first principal components of rows, (D, C) float32 orthonormal, and the mean (D,); without bad rows.

    By subspace iteration (Halko et al., arXiv:0909.4061): no D x D or M x M matrix. The largest entry of a component is
    positive.
    """
    good = rows_MD[~np.isnan(rows_MD[:, 0])]
    dim = rows_MD.shape[1]
    if not len(good):
        return np.eye(dim, min(count, dim), dtype=np.float32), np.zeros(dim, np.float32)
    mean = good.mean(axis=0, dtype=np.float64).astype(np.float32)
    centred = good - mean
    width = min(count + 10, dim)
    basis = np.linalg.qr(generator(seed, "components").standard_normal((dim, width)))[0]
    for _ in range(_POWER):
        basis = np.linalg.qr(centred.T @ (centred @ basis.astype(np.float32)).astype(np.float32))[0]
    projected = (centred @ basis.astype(np.float32)).astype(np.float64)
    _, vectors = np.linalg.eigh(projected.T @ projected)
    found = (basis @ vectors[:, ::-1])[:, : min(count, dim)]
    signs = np.sign(found[np.abs(found).argmax(axis=0), np.arange(found.shape[1])])
    return np.asarray(found * np.where(signs == 0, 1, signs), np.float32), mean


def _laid_out(points_MC: F32, method: str, seed: int) -> F32:
    """Lay out the sample, (M, 2) float32 within -1 to 1."""
    flat = np.zeros((len(points_MC), 2))
    flat[:, : min(2, points_MC.shape[1])] = points_MC[:, :2]
    if method == "t-SNE" and len(points_MC) > 4:
        flat = _tsne(points_MC.astype(np.float64), flat, seed)
    if not len(flat):
        return flat.astype(np.float32)
    middle = (flat.max(axis=0) + flat.min(axis=0)) / 2
    half = float(np.abs(flat - middle).max())
    return np.asarray((flat - middle) / (half or 1.0), np.float32)


def _tsne(points_MC: npt.NDArray[np.float64], start_M2: Array, seed: int) -> Array:
    # What it loads changes the filters of warnings, draws random numbers, and sets variables for OpenMP.
    state, known = random.getstate(), set(os.environ)
    with no_warnings:
        from openTSNE import TSNEEmbedding
        from openTSNE.affinity import PerplexityBasedNN
    random.setstate(state)
    for name in set(os.environ) - known:
        del os.environ[name]

    near = PerplexityBasedNN(
        points_MC,
        perplexity=min(_PERPLEXITY, (len(points_MC) - 1) / 3),
        metric="euclidean",
        method="exact",
        n_jobs=1,
        random_state=seed,
    )
    # Rows that are equal need different starts, or they could never part.
    start = start_M2 / (start_M2[:, 0].std() or 1.0) + 1e-3 * generator(seed, "start").standard_normal(start_M2.shape)
    few = len(points_MC) <= _FEW
    made = TSNEEmbedding(
        start * 1e-4, near, negative_gradient_method="bh" if few else "fft", n_jobs=1, random_state=seed
    )
    made = made.optimize(_EARLY, exaggeration=12, momentum=0.5)
    return np.asarray(made.optimize(_LATE, momentum=0.8), np.float64)


def _with_nan(placed: F32, bad: npt.NDArray[np.bool_]) -> F32:
    out = np.full((len(bad), 2), np.nan, np.float32)
    out[~bad] = placed
    return out


@dataclass(frozen=True, eq=False)
class _Place:
    """Places rows next to the nearest row of the sample, in principal components.

    Attributes:
        basis_DC: Principal components.
        mean_D: Mean of the sample.
        points_MC: The sample in these.
        placed_M2: Its positions.
        offset_C2: From a difference in principal components to one on the map.
        limit: Largest offset on the map.
    """

    basis_DC: F32
    mean_D: F32
    points_MC: F32
    placed_M2: F32
    offset_C2: F32
    limit: float

    @classmethod
    def of(cls, basis_DC: F32, mean_D: F32, points_MC: F32, placed_M2: F32) -> _Place:
        """Find the two directions in which near rows differ most, and how far a difference reaches on the map."""
        c = points_MC.shape[1]
        offset, limit = np.zeros((c, 2), np.float32), 0.0
        some: Any = np.unique(np.linspace(0, len(points_MC) - 1, 1_000).astype(np.int64)) if len(points_MC) else []
        if len(some) > 2:
            near = np.array([_nearest_but(points_MC, i) for i in some])
            differences = points_MC[some] - points_MC[near]
            steps = np.linalg.norm(placed_M2[some] - placed_M2[near], axis=1)
            directions, _ = principal(differences, 2)
            reach = float(np.median(np.abs(differences @ directions)))
            limit = _SPREAD * float(np.median(steps))
            if reach > 0:
                offset[:, : directions.shape[1]] = directions * np.float32(limit / (2 * reach))
        return cls(basis_DC, mean_D, points_MC, placed_M2, offset, limit)

    def __call__(self, units_BD: F32) -> tuple[Array, Array]:
        """Return the positions of unit rows, x and y (B,) float32 each; NaN for NaN."""
        placed = np.full((len(units_BD), 2), np.nan, np.float32)
        points = np.asarray((units_BD - self.mean_D) @ self.basis_DC, np.float32)
        good = np.flatnonzero(~np.isnan(points[:, 0]))
        if len(self.points_MC) and len(good):
            points = points[good]
            # The largest x * y - |y|^2 / 2 is the smallest distance.
            lengths = (self.points_MC**2).sum(axis=1, keepdims=True) / 2
            others = np.concatenate([self.points_MC, -lengths], axis=1)
            _, nearest = nearest_other(
                np.concatenate([points, np.ones((len(points), 1), np.float32)], axis=1), [others]
            )
            offset = (points - self.points_MC[nearest]) @ self.offset_C2
            if self.limit > 0:
                offset = self.limit * np.tanh(offset / self.limit)
            placed[good] = self.placed_M2[nearest] + offset
        return np.ascontiguousarray(placed[:, 0]), np.ascontiguousarray(placed[:, 1])


def _nearest_but(points_MC: F32, i: int) -> int:
    distances = ((points_MC - points_MC[i]) ** 2).sum(axis=1)
    distances[i] = np.inf
    return int(distances.argmin())


def _placed(field: str, place: _Place, store: EmbeddingStore, rows: Ints) -> tuple[Array, Array]:
    return place(_vectors(store, field, rows))


def _placed_block(field: str, place: _Place, store: EmbeddingStore, block: Block) -> tuple[Array, Array]:
    return place(_joined([_units(store.raw(part, block)) for part in store.parts(field)]))
