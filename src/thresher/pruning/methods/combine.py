"""Combine several scores into one: a weighted sum of their ranks or z-scores.

Scores have different scales, so each is first converted to a common scale: ranks, which are robust to outliers, or
z-scores, which preserve distances between rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from thresher.errors import UsageError
from thresher.pruning.registry import method
from thresher.pruning.run import Run
from thresher.pruning.scores import Score, Scored, column

Floats = npt.NDArray[np.float64]

_HEAVY = 1e30  # scores are stored as float32


@method("combine")
@dataclass(frozen=True, kw_only=True)
class Combine(Scored):
    """Keep the rows with the highest weighted sum of several scores."""

    meaning: ClassVar[str] = "combined score"
    example: ClassVar[dict[str, Any]] = {"columns": "clip-score, width=-0.5", "keep": "30%"}

    columns: str = field(
        metadata={
            "metavar": "COLUMN=X,COLUMN=X",
            "help": "scores and weights: 'clip-score=1, scores.parquet:aesthetic=0.5, width=-1'; default weight 1",
        }
    )
    by: Literal["rank", "zscore"] = field(
        default="rank", metadata={"help": "common scale: ranks from 0 to 1, or z-scores"}
    )

    def __post_init__(self) -> None:
        """Validate the parameters."""
        super().__post_init__()
        weighted(self.columns)

    def score(self, run: Run) -> Score:
        """Return the weighted sum of the columns on their common scale."""
        total = np.zeros(len(run.store))
        notes = []
        for source, weight in weighted(self.columns).items():
            scored = column(run, source, "columns", finite=self.by == "zscore")
            total += weight * (ranks(scored.values_N) if self.by == "rank" else zscores(scored.values_N))
            notes += [f"weight {weight:g}: {note}" for note in scored.notes]
        return Score(total, tuple(notes))


def weighted(columns: str) -> dict[str, float]:
    """Read ``source=weight, source, ...``: the weight follows the last ``=``; it is 1 if there is none.

    Raises:
        UsageError: A source is missing or appears twice, a weight is not a finite number, or all weights are zero.
    """
    hint = "use the form 'clip-score=1, scores.parquet:aesthetic=0.5, width=-1'"
    weights: dict[str, float] = {}
    for part in columns.split(","):
        source, equals, text = (
            (word.strip() for word in part.rpartition("=")) if "=" in part else (part.strip(), "", "")
        )
        if not source:
            raise UsageError(f"columns = {columns!r} names no column in {part!r}; {hint}")
        try:
            weight = float(text) if equals else 1.0
        except ValueError:
            weight = math.nan
        if not math.isfinite(weight):
            raise UsageError(f"columns = {columns!r}: the weight {text!r} of {source} is not a finite number; {hint}")
        if weight and not 1 / _HEAVY <= abs(weight) <= _HEAVY:
            raise UsageError(
                f"columns = {columns!r}: the weight {text} of {source} must be from {1 / _HEAVY:g} to {_HEAVY:g} in "
                "size; only the ratios of weights matter"
            )
        if source in weights:
            raise UsageError(f"columns = {columns!r} names {source} twice; give it one weight")
        weights[source] = weight
    if not any(weights.values()):
        raise UsageError(f"columns = {columns!r}: all weights are zero; at least one must not be")
    return weights


def ranks(values_N: npt.NDArray[Any]) -> Floats:
    """Return ranks from 0 (lowest) to 1 (highest), (N,); equal values share their mean rank."""
    _, place_N, counts = np.unique(values_N, return_inverse=True, return_counts=True)
    mean_rank = np.cumsum(counts) - (counts + 1) / 2
    return np.asarray(mean_rank[place_N] / max(len(values_N) - 1, 1), np.float64)


def zscores(values_N: npt.NDArray[Any]) -> Floats:
    """Return z-scores, (N,); 0 if all values are equal."""
    values = np.asarray(values_N, np.float64)
    if values.min() == values.max():
        return np.zeros(len(values))
    centred = values - values.mean()
    centred /= np.abs(centred).max()  # so that no square overflows
    return np.asarray(centred / np.sqrt(np.mean(centred**2)), np.float64)
