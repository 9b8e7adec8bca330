"""The run: everything that a method is given."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from thresher.errors import BadRowsError
from thresher.io.npy import NpyPiece, npy_piece
from thresher.io.places import place
from thresher.ops.products import ON_CPU, Products
from thresher.ops.torch_products import check_devices, products_on
from thresher.ops.vectors import F32
from thresher.pool.spill import Ordered, Spill, is_consecutive, is_large
from thresher.pool.store import Block, EmbeddingStore
from thresher.runtime.cache import Cache
from thresher.runtime.checksums import ArraySpec
from thresher.runtime.code import code_version
from thresher.runtime.engine import Engine, check_files, device_of, nodes_of, reduced
from thresher.runtime.parameters import recorded
from thresher.runtime.plugins import origin_of
from thresher.runtime.process import matrix_kernels
from thresher.runtime.progress import Progress, Silent
from thresher.runtime.random import digest, generator, permutation
from thresher.selection import Selection, Step

R = TypeVar("R")
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Run:
    """A view of a store, the selection so far, an engine, a cache and a seed.

    Attributes:
        store: The rows that the method may select from.
        so_far: The selection that kept exactly these rows.
        engine: Where work runs.
        cache: Where computed arrays are kept.
        seed: Seed of all randomness, together with a purpose.
        progress: Where progress and notes are reported.
    """

    store: EmbeddingStore
    so_far: Selection
    engine: Engine
    cache: Cache
    seed: int = 0
    progress: Progress = field(default_factory=Silent)

    def __post_init__(self) -> None:
        """Check the engine's device and that its workers can read the files, not in the middle of the work."""
        if self.device != "auto":
            check_devices(self.device, here=nodes_of(self.engine) == 1)
        check_files(self.engine, self.store.files)

    def rng(self, *purpose: str | int) -> np.random.Generator:
        """Return a generator keyed by the seed and a purpose, so that adding a step never changes another step."""
        return generator(self.seed, *purpose)

    def random_ranks(self, *purpose: str | int) -> npt.NDArray[np.uint32] | npt.NDArray[np.uint64]:
        """Return distinct random numbers for the view's rows, (n,), tied to global row ids.

        They are uint32, or uint64 if the store has more than 2^32 rows.

        A row has the same number in every view, so the rows of a smaller budget are a subset of those of a larger one.
        """
        ranks = permutation(self.rng(*purpose), self.store.total)
        return ranks if self.store.rows is None else ranks[self.store.rows]

    @cached_property
    def version(self) -> str:
        """Version of the store's files."""
        return self.store.version()

    @cached_property
    def view(self) -> str:
        """Hash of the rows in the view."""
        if self.store.rows is None:
            return "all"
        return digest(self.store.rows)

    @cached_property
    def kernels(self) -> list[str]:
        """Names of the matrix kernels in use; the last bits of a product depend on them."""
        found = matrix_kernels()
        return found if self.products is ON_CPU else [*found, self.device]

    @property
    def device(self) -> str:
        """Where the engine wants products of many rows: auto, cpu, or devices of torch."""
        return device_of(self.engine)

    @cached_property
    def products(self) -> Products:
        """Computes products of many rows in float32: on the CPU, unless the engine names devices."""
        return products_on(self.device)

    def key(self, made_by: Callable[..., Any], **what: Any) -> dict[str, Any]:
        """Return the cache key of something computed from these rows, with these matrix kernels and this code.

        Args:
            made_by: The function that computes it; the code of its module is part of the key, see
                :func:`~thresher.runtime.plugins.code_version`.
            **what: Everything else that the values depend on.
        """
        return {
            "store": self.version,
            "view": self.view,
            "block": self.store.block,
            "kernels": self.kernels,
            "code": code_version(made_by),
            **what,
        }

    def remembered(self, key: Hashable, make: Callable[[], R]) -> R:
        """Return ``make()``. A run of which several cuts are made keeps it, see :class:`thresher.pruning.recut.Recut`.

        Args:
            key: What the result depends on, other than the rows of the view.
            make: Computes it; the result must not be changed afterwards.
        """
        del key
        return make()

    def blocks(self, name: str, start: int = 0) -> Iterator[Block]:
        """Return the blocks of a field, for the engine; of a remote pool many are read ahead, unless by the nodes."""
        return self.store.blocks(name, start, ahead=nodes_of(self.engine) == 1)

    def over_blocks(
        self, label: str, name: str, fn: Callable[[EmbeddingStore, Block], R], start: int = 0
    ) -> Iterator[R]:
        """Yield ``fn(store, block)`` for the blocks of a field, in order, computed on the engine."""
        with self.progress.task(label, len(self.store)) as advance:
            advance(start)
            done = start
            for result in self.engine.map(partial(fn, self.store), self.blocks(name, start)):
                after = min(done + self.store.block, len(self.store))
                advance(after - done)
                done = after
                yield result

    def sum_over_blocks(
        self, label: str, name: str, fn: Callable[[EmbeddingStore, Block], R], add: Callable[[R, R], R]
    ) -> R | None:
        """Return the sum of ``fn(store, block)`` over the blocks of a field, computed and added up on the engine.

        ``add`` adds two of them, and may change the first; see :func:`~thresher.runtime.engine.reduced`.
        """
        with self.progress.task(label, len(self.store)) as advance:
            done = reduced(self.engine, partial(_with_rows, fn, self.store), self.blocks(name), add)
            for rows in done:
                advance(rows)
        return done.total

    def column(
        self,
        name: str,
        of: str,
        fn: Callable[[EmbeddingStore, Block], tuple[Array, ...]],
        dtypes: Mapping[str, str | ArraySpec],
        **what: Any,
    ) -> dict[str, Array]:
        """Return columns (n,) that are computed block by block and cached; an interrupted pass resumes.

        Args:
            name: Name of the computation, for progress and the cache.
            of: Field whose blocks are passed to ``fn``.
            fn: Picklable function that returns one array per column. If its code changes, the values are computed
                again.
            dtypes: Column name -> dtype, or dtype and range: a cached column outside the range counts as missing.
            **what: Everything else that the values depend on.
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
        """Return a run in which single rows of a field can be read; copies the vectors to the cache once if needed."""
        if self.store.mapped(name):
            return self
        pieces: dict[str, NpyPiece] = {}
        copies = []  # keeps the files in use until the store holds them
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
        return SameKeys(
            self.store.local(name, pieces),
            self.so_far,
            self.engine,
            self.cache,
            self.seed,
            self.progress,
            origin=self.version,
        )

    @contextmanager
    def in_order(self, name: str, order_M: npt.NDArray[np.int64]) -> Iterator[Callable[[], Ordered]]:
        """Yield a function that returns the vectors of a field for reading in an order, such as cluster by cluster.

        If single rows are slow to read, because they are in Parquet, compressed, remote, in large files, or on the
        storage that the nodes of a cluster share, the first call writes the vectors once more in this order; they are
        removed at the end of the block. See :class:`~thresher.pool.spill.Spill`.

        Args:
            name: The field.
            order_M: (M,) positions in the view, each at most once.

        Raises:
            BadRowsError: A row that is read in the block is zero or not finite; names the first such row of the view.
        """
        spill: Spill | None = None
        made: list[Ordered] = []
        slow = not self.store.in_memory and (nodes_of(self.engine) > 1 or not self._quick(name))
        large = not self.store.in_memory and is_large(self.store, name, len(order_M))
        in_file_order = (slow or large) and self.store.seekable(name) and is_consecutive(order_M)
        if (slow or large) and not in_file_order:
            key = {"store": self.version, "view": self.view, "of": name, "order": digest(order_M)}
            path = self.cache.path(f"order.{name}", key, ".partial")
            scratch = self.cache.scratch
            folder = path if scratch is None else place(scratch) / f"thresher-{path.name}"
            spill = Spill(self.store, name, order_M, folder, self.engine, self.progress)
        with ExitStack() as stack:

            def opened() -> Ordered:
                if not made and spill is not None and (slow or spill.fits()):
                    made.append(Ordered(stack.enter_context(spill.written())))
                elif not made:
                    made.append(Ordered(self.store if in_file_order else self.local(name).store, order_M))
                return made[0]

            try:
                yield opened
            except BadRowsError:
                if made:  # it may name a row of the copy: name the first one of the pool
                    for block in self.blocks(name):
                        self.store.vectors(name, block)
                raise
            if not made and spill is not None:
                spill.discard()

    def _quick(self, name: str) -> bool:
        """Return whether single rows of a field can be read quickly: from the pool, or from copies in the cache."""
        return all(
            piece.mapped or self.cache.path(f"local.{part}.vectors", {"store": self.version}).exists()
            for part in self.store.parts(name)
            for piece in self.store.layout.vectors[part]
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
        """Return the selection so far, with one more step.

        Args:
            method: The method that selected; its fields are recorded.
            keep_n: (n,) bool, True for the rows of the view to keep.
            reasons: Templates of the reasons of dropped rows, see :class:`Step`.
            score: What the score means.
            cut: The score at which rows were cut.
            notes: What the user should know.
            rows: Evidence per row of the view.
            groups: Evidence per cluster.
            repeats: (n,) how often to use each row of the view, 0 where dropped; once by default.
            reference: Evidence per row of a reference pool that dropped rows duplicate, see :class:`Step`.
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
class SameKeys(Run):
    """A run on other files, such as local copies, whose results are cached under the version of the original ones."""

    origin: str = ""

    @cached_property
    def version(self) -> str:
        """Version of the original files."""
        return self.origin


def _with_rows(fn: Callable[[EmbeddingStore, Block], R], store: EmbeddingStore, block: Block) -> tuple[int, R]:
    return len(block), fn(store, block)


def _raw(name: str, store: EmbeddingStore, block: Block) -> Array:
    return store.raw(name, block)


def unit(name: str, store: EmbeddingStore, block: Block) -> F32:
    """Return the unit vectors of a block, (B, D) float32; a picklable function for engines."""
    return store.vectors(name, block)
