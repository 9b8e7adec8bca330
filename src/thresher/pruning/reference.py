"""A reference: another pool to compare rows with, such as an evaluation set or an older release.

All rows of the reference are compared. The comparison works in blocks, one of the pool and one of the reference at a
time, and keeps a running maximum, so memory use depends on the size of neither.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from thresher.errors import PoolError, UsageError
from thresher.ops.neighbors import nearest_other
from thresher.ops.products import Products
from thresher.ops.vectors import F32, without_direction
from thresher.pool.layout import Options, texts
from thresher.pool.store import Block, EmbeddingStore, open_store
from thresher.pruning.audit import BAD
from thresher.pruning.run import Run
from thresher.runtime.checksums import ArraySpec
from thresher.runtime.format import duration
from thresher.runtime.process import one_blas_thread
from thresher.selection import Selection, packed

Rows = npt.NDArray[np.int64]
_BlockPair = tuple[Block, int, int]  # a block of the pool, and the bounds of a block of the reference

_CAPTION = 200  # characters of a reference row's caption that a selection stores
_SLOW = 2e13  # multiply-adds above which the time is estimated first: a minute or more on two cores
_NAMES = ("image", "text", "key", "caption")


@dataclass(frozen=True, eq=False)
class Reference:
    """An open pool that other pools are compared with.

    Attributes:
        location: Where it is, as the user wrote it.
        store: Its rows, without skipped ones.
        run: A run on these rows; its vectors can be read in any order.
        fingerprint: Fingerprint of its store.
        version: Version of its files when it was opened.
    """

    location: str
    store: EmbeddingStore
    run: Run
    fingerprint: str
    version: str

    def evidence(self, rows: Rows) -> dict[str, npt.NDArray[Any]]:
        """Return what a selection stores about some rows, in the form of ``reference`` of a step.

        See :class:`~thresher.selection.Step`.

        Args:
            rows: Their global ids, sorted and unique.
        """
        roles = {"key": self.store.layout.key, "caption": self.store.layout.caption}
        names = list(dict.fromkeys(name for name in roles.values() if name in self.store.columns))
        cells: dict[str, list[str]] = {name: [] for name in names}
        for part in self.store.lookup(names, rows) if names else ():
            for name, column in zip(names, part.columns, strict=True):
                cells[name] += texts(column, None if name == roles["key"] else _CAPTION)
        arrays: dict[str, npt.NDArray[Any]] = {"row": rows}
        for role, named in roles.items():
            if named in cells:
                shown = cells[named] if role == "key" else [text[:_CAPTION] for text in cells[named]]
                arrays[role], arrays[f"{role}_ends"] = packed(shown)
        return arrays


def ways_to_open(options: Options) -> list[Options]:
    """Return the options to open a reference with, in order: the names of the pool's ``options``, then the defaults."""
    plain = Options(dtype=options.dtype, skip_bad=options.skip_bad)
    ways = (replace(plain, **{role: getattr(options, role) for role in roles}) for roles in (_NAMES, _NAMES[:2], ()))
    return list(dict.fromkeys(ways))


def open_reference(run: Run, location: str, name: str) -> Reference:
    """Open a pool to compare a run's rows with.

    Args:
        run: The run whose rows are compared; the names of arrays and columns of its pool are tried first.
        location: The other pool, in any known layout.
        name: Field to compare by.

    Raises:
        UsageError: The reference does not have the field, has a different dimension, or is the run's own pool.
        PoolError: Its files are damaged, or all its embeddings are zero or not finite.
    """
    scratch, tries = str(run.cache.folder), ways_to_open(run.store.options)
    for options in tries:
        try:
            store = open_store(location, options, scratch=scratch)
            break
        except UsageError:  # the pool's names do not exist there
            if options == tries[-1]:
                raise
    for part in run.store.parts(name):
        if name not in store.fields:
            raise UsageError(
                f"reference: {location} has no {name} embeddings to compare with; it has "
                f"{', '.join(store.fields) or 'none'}"
            )
        if store.dim(part) != run.store.dim(part):
            raise UsageError(
                f"reference: {location} has {part} embeddings of {store.dim(part)} dimensions, "
                f"{run.store.layout.location} of {run.store.dim(part)}; both must come from the same encoder"
            )
    fingerprint, version = store.fingerprint(), store.version()
    if fingerprint == run.store.fingerprint():
        raise UsageError(f"reference: {location} is the pool itself, so every row would be a duplicate")
    store = replace(store, block=run.store.block)
    start = Selection.everything(fingerprint, location, {}, store.total)
    own = replace(run, store=store, so_far=start).local(name)
    if run.store.options.skip_bad:
        bad = own.column("reference check", name, partial(_no_direction, name), {"bad": BAD})["bad"]
        if np.all(bad):
            raise PoolError(
                f"{location}: no row of the reference has a usable {name} embedding; all are zero, NaN or infinite"
            )
        own = replace(own, store=own.store.where(np.asarray(bad) == 0))
        store = store.where(np.asarray(bad) == 0)
    return Reference(location, store, own, fingerprint, version)


def nearest(run: Run, reference: Reference, name: str) -> tuple[F32, Rows]:
    """Return each row's largest cosine with any row of a reference, and which row that is; cached, resumable.

    Args:
        run: The run whose rows are compared.
        reference: The reference; all of its rows are compared.
        name: Field to compare by.

    Returns:
        Cosines, (n,) float32, and global ids in the reference, (n,) int64; the lowest id where several are equal.

    Raises:
        PoolError: A file of the reference changed during the comparison.
    """
    n, other = len(run.store), reference.run
    m = len(other.store)
    size, step = run.store.block, other.store.block
    starts = range(0, m, step)

    def fill(start: int) -> Iterator[tuple[Any, ...]]:
        store = run.local(name).store if len(starts) > 1 else run.store  # read once for each block of the reference
        work = float(n - start) * m * run.store.dim(name)
        if work > _SLOW:
            left = duration(work / _speed(run.store.dim(name), run.engine.workers))
            run.progress.say(f"comparing {n - start:,} rows with {m:,} of {reference.location}: about {left}")
        tasks = ((block, lo, min(lo + step, m)) for block in store.blocks(name, start) for lo in starts)
        results = run.engine.map(partial(_compare, store, other.store, name, run.products), tasks)
        with run.progress.task(f"compare with {reference.location}", n) as advance:
            advance(start)
            for lo in range(start, n, size):
                rows, done = min(size, n - lo), 0
                best, where = np.full(rows, -np.inf, np.float32), np.full(rows, -1, np.int64)
                for number, first in enumerate(starts, 1):
                    cosines, at = next(results)
                    better = cosines > best
                    best[better], where[better] = cosines[better], first + at[better]
                    advance(rows * number // len(starts) - done)
                    done = rows * number // len(starts)
                yield best, where
        next(results, None)

    key = run.key(_compare, of=name, reference=reference.fingerprint, files=reference.version, rows=other.view)
    specs = {"cosine": ArraySpec("float32", least=-2, most=2), "row": ArraySpec("int64", least=0, most=m - 1)}
    result = run.cache.columns("reference", key, specs, n, fill)
    if reference.store.changed():
        raise PoolError(
            f"{reference.location}: a file of the reference changed while it was read; run again once writing has "
            "finished"
        )
    return np.asarray(result["cosine"]), other.store.ids[np.asarray(result["row"])]


def _compare(
    store: EmbeddingStore, other: EmbeddingStore, name: str, products: Products, pair: _BlockPair
) -> tuple[F32, Rows]:
    block, lo, hi = pair
    return nearest_other(store.vectors(name, block), other.stripes(name, Block(lo, hi), products.panel), products)


def _no_direction(name: str, store: EmbeddingStore, block: Block) -> tuple[npt.NDArray[np.uint8]]:
    """Return 1 for rows of a block with a zero or non-finite vector in any part of a field, else 0."""
    bad = np.zeros(len(block), np.bool_)
    for part in store.parts(name):
        bad |= without_direction(store.raw(part, block))
    return (bad.astype(np.uint8),)


def _speed(dim: int, workers: int) -> float:
    """Measure the multiply-adds per second of the comparison on this machine."""
    rows = np.random.default_rng(0).standard_normal((1024, dim), dtype=np.float32)
    with one_blas_thread:
        nearest_other(rows, [rows])
        begin, turns = time.perf_counter(), 0
        while time.perf_counter() - begin < 0.1:
            nearest_other(rows, [rows])
            turns += 1
        spent = time.perf_counter() - begin
    return turns * len(rows) * rows.size * workers / spent
