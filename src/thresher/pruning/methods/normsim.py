"""NormSim (arXiv 2405.19547): how similar a row's image is to the images of a target set.

The score is a norm of the cosines of an image with all images of the target: their maximum, their root mean square
(the paper's 2-norm divided by the square root of the target's size, which gives the same ranking) or their mean.
Without a target, the pool's own best subset is the target (NormSim-D): starting from all rows, the rows least similar
to the remaining rows are removed repeatedly.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from thresher.errors import UsageError
from thresher.io.npy import npy_piece
from thresher.io.places import located
from thresher.ops.cut import top
from thresher.ops.products import Products
from thresher.ops.vectors import F32
from thresher.pool.store import Block, EmbeddingStore, vectors_from_npy
from thresher.pruning.registry import method
from thresher.pruning.run import Run
from thresher.pruning.scores import Score, Scored
from thresher.runtime.checksums import ArraySpec, report_damage

F64 = npt.NDArray[np.float64]

_MOST_ROUNDS = 10_000
_TARGET_ROWS = 1_024  # rows of the target held at a time
_MOMENT = 256 * 2**20  # bytes of a (D, D) second moment; for a larger one, few rows are compared one by one


@method("normsim")
@dataclass(frozen=True, kw_only=True)
class NormSim(Scored):
    """Keep the rows whose images are most similar to a target set, or to the pool's own best subset."""

    meaning: ClassVar[str] = "similarity to the target"

    target: str | None = field(
        default=None,
        metadata={"metavar": "FILE", "help": ".npy of (M, D) image embeddings; by default the pool's own best subset"},
    )
    norm: Literal["max", "rms", "mean"] | None = field(
        default=None,
        metadata={"help": "of the cosines: max, rms (the paper's 2-norm) or mean; default: max, or rms without target"},
    )
    target_share: float = field(
        default=0.2, metadata={"help": "without target: share of the rows in the pool's own best subset"}
    )
    rounds: int = field(default=20, metadata={"help": "without target: number of steps in which the subset shrinks"})

    def __post_init__(self) -> None:
        """Validate the parameters."""
        super().__post_init__()
        if self.target is None and self.norm == "max":
            raise UsageError(
                "norm = 'max' needs a target: in the pool's own subset every row is most similar to itself"
            )
        if not 0 < self.target_share <= 1:
            raise UsageError(f"target_share = {self.target_share}: must be above 0 and at most 1 (all rows, no rounds)")
        if self.target is not None and (self.target_share, self.rounds) != (NormSim.target_share, NormSim.rounds):
            raise UsageError("target_share and rounds are for the pool's own best subset; leave target out")
        if not 1 <= self.rounds <= _MOST_ROUNDS:
            raise UsageError(f"rounds = {self.rounds:,}: must be from 1 to {_MOST_ROUNDS:,}; each reads all rows twice")

    @property
    def by_rows(self) -> bool:
        """Whether jobs can share the rows: with a target."""
        return self.target is not None

    def score(self, run: Run) -> Score:
        """Read or compute the target, then return the similarity of each row to it."""
        norm = self.norm or ("rms" if self.target is None else "max")
        digest, size, moment = hashlib.sha256(norm.encode()), 0, np.zeros(())
        dim, rows_in = run.store.dim("image"), len(run.store)
        if self.target is None:
            size = max(round(self.target_share * len(run.store)), 1)
            pairs = _by_pairs(norm, dim, rows_in)
            moment = _own_subset(run, "pairs" if pairs else norm, size, self.rounds)
            note = f"target: the pool's own best {size:,} of {len(run.store):,} rows, in {self.rounds} rounds"
        else:
            pairs = _by_pairs(norm, dim, npy_piece(*located(self.target)).rows)
            for rows in vectors_from_npy(self.target, "target images", run.store, "image"):
                digest.update(np.ascontiguousarray(rows).data)
                size += len(rows)
                if norm != "max" and not pairs:
                    moment = moment + _moment(norm, rows)
            moment /= size
            note = f"target: {size:,} rows of {self.target}"
        digest.update(np.ascontiguousarray(moment).data)
        if self.target is not None and (norm == "max" or pairs):
            measure: Any = partial(_similar_to_file, self.target)
            if norm == "max":
                measure = partial(_nearest, self.target, run.products)
        elif pairs:
            measure = partial(_similar_to_rows, replace(run.store, rows=moment.astype(np.int64)))
        else:
            measure = partial(_similar, norm, moment.astype(np.float32))
        spec = ArraySpec("float32", least=-2, most=2)
        scores = run.column("normsim", "image", measure, {"score": spec}, target=digest.hexdigest())
        return Score(np.asarray(scores["score"]), (note,))


def _nearest(path: str, products: Products, store: EmbeddingStore, block: Block) -> tuple[F32]:
    """Return each row's largest cosine with the target, (B,) float32."""
    rows, best = store.vectors("image", block), np.full(len(block), -np.inf, np.float32)
    for units in vectors_from_npy(path, "target images", store, "image"):
        np.maximum(best, products.nearest(rows, units, second=False)[1], out=best)
    return (best,)


def _by_pairs(norm: str, dim: int, rows: int) -> bool:
    """Return whether cosines with each row of a target take less memory than its second moment, which is then large."""
    return norm == "rms" and dim * dim * 8 > _MOMENT and rows < dim


def _similar_to_file(path: str, store: EmbeddingStore, block: Block) -> tuple[F32]:
    """Return the root mean square of each row's cosines with the rows of a file, (B,) float32."""
    return _root_mean_square(store.vectors("image", block), vectors_from_npy(path, "target images", store, "image"))


def _similar_to_rows(target: EmbeddingStore, store: EmbeddingStore, block: Block) -> tuple[F32]:
    """Return the root mean square of each row's cosines with the rows of a view, (B,) float32."""
    units = (target.vectors("image", part) for part in target.blocks("image", size=_TARGET_ROWS))
    return _root_mean_square(store.vectors("image", block), units)


def _root_mean_square(rows: F32, target: Iterable[F32]) -> tuple[F32]:
    total, count = np.zeros(len(rows)), 0
    for units in target:
        cosines = rows @ units.T
        total += np.einsum("ij,ij->i", cosines, cosines, dtype=np.float64)
        count += len(units)
    return (np.sqrt(total / count).astype(np.float32),)


def _similar(norm: str, moment: F32, store: EmbeddingStore, block: Block) -> tuple[F32]:
    """Return the root mean square of each row's cosines, from (D, D) second moments, or their mean, from (D,)."""
    rows = store.vectors("image", block)
    if norm == "mean":
        return (rows @ moment,)
    return (np.sqrt(np.maximum(np.einsum("ij,ij->i", rows @ moment, rows), 0)),)


def _moment(norm: str, rows: F32) -> F64:
    if norm == "mean":
        return np.asarray(rows.sum(axis=0, dtype=np.float64))
    return (rows.T @ rows).astype(np.float64)


def _block_moment(norm: str, store: EmbeddingStore, block: Block) -> F64:
    return _moment(norm, store.vectors("image", block))


def _own_subset(run: Run, norm: str, size: int, rounds: int) -> F64:
    """Shrink the rows to the ``size`` rows most similar to each other; return the moment of this subset, cached.

    With the norm "pairs", which is "rms" without moments, the global ids of the subset are returned instead, (size,).

    The remaining rows are saved every few seconds, so that a killed run can resume.
    """
    n, dim = len(run.store), run.store.dim("image")
    rounds = min(rounds, max(n - size, 1))  # a round that removes no row would change nothing
    path = run.cache.path("normsim.target", run.key(_own_subset, norm=norm, size=size, rounds=rounds))
    spec = ArraySpec("float64", (dim,) if norm == "mean" else (dim, dim), least=-2, most=2)
    if norm == "pairs":
        spec = ArraySpec("float64", (size,), least=0, most=run.store.total - 1)
    known = run.cache.load(path, spec)
    if known is not None:
        return np.asarray(known)
    saved = run.cache.resumable(path)
    before = saved.load(
        {
            "rows": ArraySpec("int64", (None,), least=0, most=run.store.total - 1),
            "done": ArraySpec("int64", (), least=0, most=rounds),
        }
    )
    if before and not _fits(before["rows"], run.store.ids, _left_after(int(before["done"]), n, size, rounds)):
        report_damage(saved.path, "its rows are not those of this round")
        before = None
    state: dict[str, Any] = before or {"rows": run.store.ids, "done": 0}
    run = run.local("image")
    for done in range(int(state["done"]), rounds + 1):
        left = replace(run, store=replace(run.store, rows=state["rows"]))
        label = f"normsim: round {done} of {rounds}"
        if norm == "pairs":
            moment: F64 = np.asarray(left.store.ids, np.float64)
            measure: Any = partial(_similar_to_rows, left.store)
        else:
            total = sum(left.over_blocks(f"{label}, target", "image", partial(_block_moment, norm)))
            moment = np.asarray(total) / len(left.store)
            measure = partial(_similar, norm, moment.astype(np.float32))
        if done == rounds or size == n:
            break
        scores = np.concatenate([part for (part,) in left.over_blocks(f"{label}, rows", "image", measure)])
        state = {"rows": state["rows"][top(scores, _left_after(done + 1, n, size, rounds))], "done": done + 1}
        saved.offer(state.copy)
    run.cache.save(path, moment)
    saved.remove()
    return moment


def _left_after(done: int, n: int, size: int, rounds: int) -> int:
    """Return how many of n rows are left after some rounds."""
    return n - (n - size) * done // rounds


def _fits(rows: npt.NDArray[np.int64], ids: npt.NDArray[np.int64], count: int) -> bool:
    """Return whether rows are ``count`` of the ids, each once and ascending."""
    at = np.minimum(np.searchsorted(ids, rows), len(ids) - 1)
    return len(rows) == count and bool((np.diff(rows) > 0).all()) and np.array_equal(ids[at], rows)
