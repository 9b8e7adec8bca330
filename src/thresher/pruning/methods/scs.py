"""Soft-cap sampling, SCS: draws a training set with repeats by score; each draw makes the row less likely.

From "Filter Like You Test" (arXiv 2503.08805): batches of rows are drawn without replacement with probabilities
softmax(score); after each batch the scores of its rows are reduced by a penalty. Good rows are drawn
several times, no row is excluded by a threshold, and no row dominates. ``cap`` is the hard cap of the same paper (HCS):
a row that was drawn so often is not drawn again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from thresher.errors import BudgetError, UsageError
from thresher.ops.cut import top
from thresher.pruning.registry import method
from thresher.pruning.run import Run
from thresher.pruning.scores import column
from thresher.selection import Budget, Keep, Selection

Floats = npt.NDArray[np.float64]

_MOST_USES = 10_000  # draws for each row, on average
_HEAVY = 1e6  # a larger penalty has no other effect: no row is drawn twice before all are drawn once
_ROUNDS = 1280  # the released code draws 128 million rows 100,000 at a time


@method("scs")
@dataclass(frozen=True, kw_only=True)
class SoftCapSampling:
    """Draw rows by score, with repeats; each draw makes the row less likely."""

    name: ClassVar[str]
    example: ClassVar[dict[str, Any]] = {"draws": "30%", "temperature": 0.1}

    draws: Budget = field(metadata={"help": "rows to train on, counting repeats: a share of the rows, or any number"})
    column: str = field(
        default="clip-score",
        metadata={"metavar": "COLUMN", "help": "score to draw by: column, scoring method or scores.parquet:column"},
    )
    temperature: float = field(
        default=1.0, metadata={"help": "probabilities are softmax(score / temperature); higher is more even"}
    )
    penalty: float = field(
        default=0.15, metadata={"help": "how much a draw reduces the row's score / temperature; 0 for no effect"}
    )
    cap: int | None = field(default=None, metadata={"help": "most draws of a row (hard cap; 15 in the paper's HCS)"})
    batch: int | None = field(
        default=None, metadata={"help": "rows drawn at a time, each at most once (default: 1/1280 of the draws)"}
    )

    def __post_init__(self) -> None:
        """Validate the parameters."""
        if not self.temperature > 0:
            raise UsageError(f"temperature = {self.temperature}: must be above 0")
        if not 0 <= self.penalty <= _HEAVY:
            raise UsageError(f"penalty = {self.penalty}: must be from 0 to {_HEAVY:,.0f}")
        if self.cap is not None and self.cap < 1:
            raise UsageError(f"cap = {self.cap}: must be at least 1")
        if self.batch is not None and self.batch < 1:
            raise UsageError(f"batch = {self.batch}: must be at least 1")

    def select(self, run: Run) -> Selection:
        """Draw rows, and keep those that were drawn at least once."""
        if run.so_far.repeats is not None:
            raise UsageError("rows are already repeated by an earlier step; use only one step that repeats rows")
        scored = column(run, self.column, "column", finite=True)
        rows = len(scored.values_N)
        draws = Keep.parse(self.draws).of(rows, repeats=True)
        if draws > _MOST_USES * rows:
            raise BudgetError(
                f"draws = {draws:,}: must be at most {_MOST_USES * rows:,}, {_MOST_USES:,} for each of the {rows:,} "
                "rows"
            )
        if self.cap is not None and draws > self.cap * rows:
            raise BudgetError(
                f"draws = {draws:,}: must be at most {self.cap * rows:,}, {self.cap:,} for each of the {rows:,} rows "
                "(cap)"
            )
        batch = min(-(-draws // _ROUNDS), rows) if self.batch is None else self.batch
        if batch > rows:
            raise UsageError(f"batch = {batch:,}: must be at most {rows:,}, the number of rows; a batch has no repeats")
        with np.errstate(over="ignore"):
            scaled = scored.values_N.astype(np.float64) / self.temperature
        if np.isinf(scaled).any():
            raise UsageError(f"temperature = {self.temperature}: makes scores infinite; use a larger one")
        with run.progress.task("scs", draws) as advance:
            counts = sample(run.rng(self.name), scaled, draws, batch, self.penalty, advance, self.cap)
        odds = np.exp(min(float(scaled.max() - np.median(scaled)), 700.0))
        return run.selection(
            self,
            counts > 0,
            reasons=(f"never drawn in {draws:,} draws; its score is {{score:.4f}}",),
            score=f"score drawn by ({self.column})",
            notes=(
                *scored.notes,
                f"{draws:,} draws, {batch:,} at a time; a row was drawn up to {counts.max():,} times; the best row was "
                f"{odds:.3g} times as likely as the median row to be drawn first",
            ),
            rows={"score": scored.values_N.astype(np.float32)},
            repeats=counts,
        )


def sample(
    rng: np.random.Generator,
    scores_N: Floats,
    draws: int,
    batch: int,
    penalty: float,
    advance: Callable[[int], None] = lambda _: None,
    cap: int | None = None,
) -> npt.NDArray[np.int32]:
    """Return how often each row is drawn, (N,); they sum to ``draws``.

    A batch is drawn as a race: each row arrives after an exponential time with rate exp(score), and the first
    ``batch`` rows to arrive are a draw without replacement from the softmax (the Gumbel-top-k trick, in logarithms).
    The remaining times of the other rows are again exponential with the same rates. So the others keep their times,
    and only drawn rows get new times, counted from the last arrival. The distribution is the same as with new times
    for all rows, but the cost depends only on the rows drawn.

    Args:
        rng: Generator of the arrival times.
        scores_N: (N,) float64, finite.
        draws: Number of rows to draw, counting repeats.
        batch: Rows to draw at a time, at most N.
        penalty: How much a draw reduces the score of a row.
        advance: Called with the number of rows after each batch.
        cap: Most draws of a row; ``draws`` is at most cap * N. A batch has fewer rows if fewer can be drawn again.
    """
    counts_N = np.zeros(len(scores_N), np.int32)
    arrival_N = _waits(rng, len(scores_N)) - scores_N  # logarithms of times
    left, room = draws, len(scores_N)  # rows that can be drawn again
    while left:
        some = int(np.sqrt(len(scores_N) * batch)) - 1  # balances the cost of scanning all rows and of scanning again
        horizon = np.partition(arrival_N, some)[some]
        near = np.flatnonzero(arrival_N <= horizon)  # the next rows to be drawn are among these
        while left:
            size = min(batch, left, room)
            due = near[arrival_N[near] <= horizon]
            if len(due) < size:
                break
            drawn = due[top(-arrival_N[due], size)]
            now = arrival_N[drawn].max()
            counts_N[drawn] += 1
            again = _waits(rng, size) - (scores_N[drawn] - penalty * counts_N[drawn])
            arrival_N[drawn] = np.logaddexp(now, again)
            if cap is not None:
                full = drawn[counts_N[drawn] == cap]
                arrival_N[full] = np.inf
                room -= len(full)
            left -= size
            advance(size)
    return counts_N


def _waits(rng: np.random.Generator, n: int) -> Floats:
    """Return logarithms of exponential times, (n,): each is minus a Gumbel variable."""
    return np.log(np.maximum(rng.standard_exponential(n), np.finfo(np.float64).tiny))
