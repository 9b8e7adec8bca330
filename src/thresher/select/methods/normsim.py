"""NormSim (arXiv 2405.19547): how similar a row's image is to the images of a target set.

The score is a norm of the cosines of an image with all images of the target: their maximum, their root mean square
(the paper's 2-norm divided by the square root of the target's size, which gives the same ranking) or their mean.
Without a target, the pool's own best subset is the target (NormSim-D): starting from all rows, the rows least similar
to the remaining rows are removed repeatedly.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from thresher.errors import UsageError
from thresher.ops.cut import top
from thresher.ops.kmeans import nearest_centroid
from thresher.ops.vectors import F32
from thresher.pool.store import Block, EmbeddingStore, vectors_from_npy
from thresher.runtime.checksums import ArraySpec, report_damage
from thresher.select.registry import method
from thresher.select.run import Run
from thresher.select.scores import Score, Scored

F64 = npt.NDArray[np.float64]


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
        if self.rounds < 1:
            raise UsageError(f"rounds = {self.rounds}: must be at least 1")

    def score(self, run: Run) -> Score:
        """Read or compute the target, then return the similarity of each row to it."""
        norm = self.norm or ("rms" if self.target is None else "max")
        digest, size, moment = hashlib.sha256(norm.encode()), 0, np.zeros(())
        if self.target is None:
            size = max(round(self.target_share * len(run.store)), 1)
            moment = _own_subset(run, norm, size, self.rounds)
            note = f"target: the pool's own best {size:,} of {len(run.store):,} rows, in {self.rounds} rounds"
        else:
            for rows in vectors_from_npy(self.target, "target images", run.store, "image"):
                digest.update(np.ascontiguousarray(rows).data)
                size += len(rows)
                if norm != "max":
                    moment = moment + _moment(norm, rows)
            moment /= size
            note = f"target: {size:,} rows of {self.target}"
        digest.update(np.ascontiguousarray(moment).data)
        measure = partial(_similar, norm, moment.astype(np.float32))
        if self.target is not None and norm == "max":
            measure = partial(_nearest, self.target)
        spec = ArraySpec("float32", least=-2, most=2)
        scores = run.column("normsim", "image", measure, {"score": spec}, target=digest.hexdigest())
        return Score(np.asarray(scores["score"]), (note,))


def _nearest(path: str, store: EmbeddingStore, block: Block) -> tuple[F32]:
    """Return each row's largest cosine with the target, (B,) float32."""
    rows, best = store.vectors("image", block), np.full(len(block), -np.inf, np.float32)
    for units in vectors_from_npy(path, "target images", store, "image"):
        np.maximum(best, nearest_centroid(rows, units)[1], out=best)
    return (best,)


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

    The remaining rows are saved every few seconds, so that a killed run can resume.
    """
    n, dim = len(run.store), run.store.dim("image")
    path = run.cache.path("normsim.target", run.key(_own_subset, norm=norm, size=size, rounds=rounds))
    known = run.cache.load(path, ArraySpec("float64", (dim,) if norm == "mean" else (dim, dim), least=-2, most=2))
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
        total = sum(left.over_blocks(f"{label}, target", "image", partial(_block_moment, norm)))
        moment: F64 = np.asarray(total) / len(left.store)
        if done == rounds or size == n:
            break
        measure = partial(_similar, norm, moment.astype(np.float32))
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
