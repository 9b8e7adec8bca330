"""The run: all that a method is given."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import threadpoolctl

from thresher.io.npy import NpyPiece, npy_piece
from thresher.ops.vectors import F32
from thresher.pool.store import Block, EmbeddingStore
from thresher.runtime.cache import Cache
from thresher.runtime.engine import Engine
from thresher.runtime.parameters import recorded
from thresher.runtime.plugins import code_version, origin_of
from thresher.runtime.progress import Progress, Silent
from thresher.runtime.random import digest, generator
from thresher.selection import Selection, Step

R = TypeVar("R")
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Run:
    """A view of a store, an engine, a seed and a cache; and the selection so far.

    Attributes:
        store: The rows the method may look at.
        so_far: The selection that left exactly those rows.
        engine: Where work runs.
        seed: Of all randomness, together with a purpose.
        cache: Arrays already computed.
        progress: Where to tell.
    """

    store: EmbeddingStore
    so_far: Selection
    engine: Engine
    cache: Cache
    seed: int = 0
    progress: Progress = field(default_factory=Silent)

    def rng(self, *purpose: str | int) -> np.random.Generator:
        """Return a generator keyed by the seed and a purpose: adding a step never reseeds another."""
        return generator(self.seed, *purpose)

    def random_ranks(self, *purpose: str | int) -> npt.NDArray[np.uint32]:
        """Return distinct random numbers for the view's rows, (n,) uint32, tied to global row ids.

        A row has the same number in every view, so that a smaller budget is a part of a larger one.
        """
        ranks = self.rng(*purpose).permutation(self.store.total).astype(np.uint32)
        return ranks if self.store.rows is None else ranks[self.store.rows]

    @cached_property
    def version(self) -> str:
        """Version of the store's files."""
        return self.store.version()

    @cached_property
    def view(self) -> str:
        """Hash of which rows the view holds."""
        if self.store.rows is None:
            return "all"
        return digest(self.store.rows)

    @cached_property
    def kernels(self) -> list[str]:
        """Names of the matrix kernels at work here: the last bits of a product depend on them."""
        return sorted({info.get("architecture", "") for info in threadpoolctl.threadpool_info()} - {""})

    def key(self, made_by: Callable[..., Any], **what: Any) -> dict[str, Any]:
        """Return the cache key of something computed from these rows, with these matrix kernels and this code.

        Args:
            made_by: The function that computes it; its module's code is part of the key, see
                :func:`~thresher.runtime.plugins.code_version`.
            **what: Whatever else the values depend on.
        """
        return {
            "store": self.version,
            "view": self.view,
            "block": self.store.block,
            "kernels": self.kernels,
            "code": code_version(made_by),
            **what,
        }

    def over_blocks(
        self, label: str, name: str, fn: Callable[[EmbeddingStore, Block], R], start: int = 0
    ) -> Iterator[R]:
        """Yield ``fn(store, block)`` for the view's blocks of a field, in order, on the engine."""
        with self.progress.task(label, len(self.store)) as advance:
            advance(start)
            done = start
            for result in self.engine.map(partial(fn, self.store), self.store.blocks(name, start)):
                after = min(done + self.store.block, len(self.store))
                advance(after - done)
                done = after
                yield result

    def column(
        self,
        name: str,
        of: str,
        fn: Callable[[EmbeddingStore, Block], tuple[Array, ...]],
        dtypes: Mapping[str, str],
        **what: Any,
    ) -> dict[str, Array]:
        """Return cached columns (n,) computed block by block; an interrupted pass is taken up again.

        Args:
            name: Of the computation, for messages and the cache.
            of: Field whose blocks are passed to ``fn``.
            fn: Picklable; returns one array per column. The values are computed again once its code changes.
            dtypes: Column name -> dtype.
            **what: Whatever else the values depend on.
        """
        return self.cache.columns(
            name,
            self.key(fn, of=of, **what),
            dtypes,
            len(self.store),
            lambda start: self.over_blocks(name, of, fn, start),
            say=self.progress.say,
        )

    def local(self, name: str) -> Run:
        """Return a run whose vectors of a field can be read row by row, copying them once if need be."""
        if self.store.mapped(name):
            return self
        pieces: dict[str, NpyPiece] = {}
        copies = []  # in use until the store holds them
        for part in self.store.parts(name):
            base = EmbeddingStore(self.store.layout, self.store.options)
            whole = Run(base, self.so_far, self.engine, self.cache, self.seed, self.progress)
            first = base.layout.vectors[part][0]
            stored = "<u2" if first.dtype == "bfloat16" else np.dtype(first.dtype).str
            copy = self.cache.columns(
                f"local.{part}",
                {"store": self.version},
                {"vectors": stored},
                base.total,
                lambda start, whole=whole, part=part: (  # type: ignore[misc]
                    (raw,) for raw in whole.over_blocks(f"copy {part}", part, partial(_raw, part), start)
                ),
                width=first.dim,
                say=self.progress.say,
            )
            copies.append(copy)
            path = self.cache.path(f"local.{part}.vectors", {"store": self.version})
            pieces[part] = npy_piece("file", str(path), first.dtype)
        return _SameKeys(
            self.store.local(name, pieces),
            self.so_far,
            self.engine,
            self.cache,
            self.seed,
            self.progress,
            origin=self.version,
        )

    def selection(
        self,
        method: Any,
        keep_n: npt.NDArray[np.bool_],
        *,
        reasons: Iterable[str],
        score: str = "",
        cut: float | None = None,
        notes: Iterable[str] = (),
        rows: Mapping[str, Array] | None = None,
        groups: Mapping[str, Array] | None = None,
        repeats: npt.NDArray[np.int32] | None = None,
        reference: Mapping[str, Array] | None = None,
    ) -> Selection:
        """Return the selection so far with one more step.

        Args:
            method: The frozen dataclass that judged; its fields are recorded.
            keep_n: (n,) bool over the view.
            reasons: Templates of the reasons of dropped rows, see :class:`Step`.
            score: What the score means.
            cut: Where it was cut.
            notes: What the user should know.
            rows: Evidence per row of the view.
            groups: Evidence per cluster.
            repeats: (n,) how often to use each row of the view, 0 where dropped; by default once.
            reference: Evidence per row of a reference pool that dropped rows repeat, see :class:`Step`.
        """
        origin = origin_of(type(method))
        step = Step(
            method=method.name,
            parameters=recorded(method),
            package={"name": origin.package, "version": origin.version},
            seed=self.seed,
            rows_in=len(keep_n),
            rows_out=int(np.count_nonzero(keep_n)),
            reasons=tuple(reasons),
            score=score,
            cut=cut,
            notes=tuple(notes),
            rows=dict(rows or {}),
            groups=dict(groups or {}),
            reference=dict(reference or {}),
        )
        return self.so_far.then(step, keep_n, repeats)


@dataclass(frozen=True)
class _SameKeys(Run):
    """A run over local copies: what it computes is cached under the original files' version."""

    origin: str = ""

    @cached_property
    def version(self) -> str:
        """Version of the files the copies were made from."""
        return self.origin


def _raw(name: str, store: EmbeddingStore, block: Block) -> Array:
    return store.raw(name, block)


def unit(name: str, store: EmbeddingStore, block: Block) -> F32:
    """Return the unit vectors of a block; a picklable function for engines."""
    return store.vectors(name, block)
