"""Soft-cap sampling, SCS: a training set with repeats, drawn by score, each draw making the next less likely.

From "Filter Like You Test" (arXiv 2503.08805): batches of rows are drawn without replacement with the
probabilities softmax(score); after each batch the scores of its rows go down by a penalty. Good rows come
more than once, none is cut off by a threshold, and none takes over.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from thresher.errors import UsageError
from thresher.ops.cut import top
from thresher.select.registry import method
from thresher.select.run import Run
from thresher.select.scores import column
from thresher.selection import Keep, Selection

Floats = npt.NDArray[np.float64]

_ROUNDS = 1280  # the released code draws 128 million rows 100,000 at a time


@method("scs")
@dataclass(frozen=True, kw_only=True)
class SoftCapSampling:
    """Draw rows by score, with repeats, each draw making the row less likely."""

    name: ClassVar[str]
    example: ClassVar[dict[str, Any]] = {"draws": "30%", "temperature": 0.1}

    draws: Keep = field(metadata={"help": "rows to train on, repeats counted: a share of the rows, or any number"})
    column: str = field(
        default="clip-score",
        metadata={"metavar": "COLUMN", "help": "score to draw by: column, scoring method or scores.parquet:column"},
    )
    temperature: float = field(
        default=1.0, metadata={"help": "probabilities are softmax(score / temperature); higher is more even"}
    )
    penalty: float = field(
        default=0.15, metadata={"help": "what a draw takes off the row's score / temperature; 0 for nothing"}
    )
    batch: int | None = field(
        default=None, metadata={"help": "rows drawn at a time, each at most once (default: 1/1280 of the draws)"}
    )

    def __post_init__(self) -> None:
        """Refuse what would be no sampling."""
        if self.temperature <= 0:
            raise UsageError(f"temperature = {self.temperature}; give a number above 0")
        if self.penalty < 0:
            raise UsageError(f"penalty = {self.penalty}; give 0 or more: a draw makes the next one less likely")
        if self.batch is not None and self.batch < 1:
            raise UsageError(f"batch = {self.batch}; draw at least 1 row at a time")

    def select(self, run: Run) -> Selection:
        """Draw, and keep the rows that were drawn at least once."""
        if run.so_far.repeats is not None:
            raise UsageError("the rows given are repeated by an earlier step already; draw once")
        found = column(run, self.column, "column", finite=True)
        rows = len(found.values_N)
        draws = self.draws.of(rows, repeats=True)
        batch = min(-(-draws // _ROUNDS), rows) if self.batch is None else self.batch
        if batch > rows:
            raise UsageError(f"batch = {batch:,} of {rows:,} rows: a row comes at most once a batch")
        with np.errstate(over="ignore"):
            scaled = found.values_N.astype(np.float64) / self.temperature
        if np.isinf(scaled).any():
            raise UsageError(f"temperature = {self.temperature} makes scores infinite; give a larger one")
        with run.progress.task("scs", draws) as advance:
            counts = sample(run.rng(self.name), scaled, draws, batch, self.penalty, advance)
        odds = np.exp(min(float(scaled.max() - np.median(scaled)), 700.0))
        return run.selection(
            self,
            counts > 0,
            reasons=(f"never drawn in {draws:,} draws; its score is {{score:.4f}}",),
            score=f"score drawn by ({self.column})",
            notes=(
                *found.notes,
                f"{draws:,} draws, {batch:,} at a time; a row was drawn up to {counts.max():,} times; the best row was "
                f"{odds:.3g} times as likely as the median row to come first",
            ),
            rows={"score": found.values_N.astype(np.float32)},
            repeats=counts,
        )


def sample(
    rng: np.random.Generator,
    scores_N: Floats,
    draws: int,
    batch: int,
    penalty: float,
    advance: Callable[[int], None] = lambda _: None,
) -> npt.NDArray[np.int32]:
    """Return how often each row is drawn, (N,); they sum to ``draws``.

    The batches are drawn as a race: a row arrives after an exponential time of rate exp(score), and the first
    ``batch`` to arrive are a draw without replacement from the softmax (the Gumbel-top-k trick, in logarithms).
    What time is left to the others is exponential again, with the same rates: they run on, and only the rows
    drawn start anew, from the time of the last arrival. That is the same as new times for all, at the cost of
    the rows drawn.

    Args:
        rng: Of the arrivals.
        scores_N: (N,) finite.
        draws: Rows to draw, repeats counted.
        batch: Rows at a time, at most N.
        penalty: Taken off the score of a row that is drawn.
        advance: Is told of every batch.
    """
    counts_N = np.zeros(len(scores_N), np.int32)
    arrival_N = _waits(rng, len(scores_N)) - scores_N  # logarithms of times
    left = draws
    while left:
        some = int(np.sqrt(len(scores_N) * batch)) - 1  # looking all through and looking again cost the same
        horizon = np.partition(arrival_N, some)[some]
        near = np.flatnonzero(arrival_N <= horizon)  # whoever is drawn next is among these
        while left:
            size = min(batch, left)
            due = near[arrival_N[near] <= horizon]
            if len(due) < size:
                break
            drawn = due[top(-arrival_N[due], size)]
            now = arrival_N[drawn].max()
            counts_N[drawn] += 1
            again = _waits(rng, size) - (scores_N[drawn] - penalty * counts_N[drawn])
            arrival_N[drawn] = np.logaddexp(now, again)
            left -= size
            advance(size)
    return counts_N


def _waits(rng: np.random.Generator, n: int) -> Floats:
    """Return logarithms of exponential times; minus a Gumbel variable each."""
    return np.log(np.maximum(rng.standard_exponential(n), np.finfo(np.float64).tiny))
