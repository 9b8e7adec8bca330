"""Several scores as one: a weighted sum of their ranks, or of their distances to the mean in standard deviations.

A pool has more than one number that says something. Scales differ, so that each is first brought to a common
one: ranks, which outliers cannot move, or z-scores, which keep how far apart rows are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from thresher.errors import UsageError
from thresher.select.registry import method
from thresher.select.run import Run
from thresher.select.scores import Score, Scored, column

Floats = npt.NDArray[np.float64]


@method("combine")
@dataclass(frozen=True, kw_only=True)
class Combine(Scored):
    """Keep the rows that several weighted scores together rate highest."""

    meaning: ClassVar[str] = "combined score"
    example: ClassVar[dict[str, Any]] = {"columns": "clip-score, width=-0.5", "keep": "30%"}

    columns: str = field(
        metadata={
            "metavar": "COLUMN=X,COLUMN=X",
            "help": "scores and weights: 'clip-score=1, scores.parquet:aesthetic=0.5, width=-1'; weight 1 if none",
        }
    )
    by: Literal["rank", "zscore"] = field(
        default="rank", metadata={"help": "common scale: ranks from 0 to 1, or standard deviations from the mean"}
    )

    def __post_init__(self) -> None:
        """Refuse columns and weights that make no score."""
        super().__post_init__()
        weighted(self.columns)

    def score(self, run: Run) -> Score:
        """Return the weighted sum of the columns on their common scale."""
        total = np.zeros(len(run.store))
        notes = []
        for source, weight in weighted(self.columns).items():
            found = column(run, source, "columns", finite=self.by == "zscore")
            total += weight * (ranks(found.values_N) if self.by == "rank" else zscores(found.values_N))
            notes += [f"weight {weight:g}: {note}" for note in found.notes]
        return Score(total, tuple(notes))


def weighted(columns: str) -> dict[str, float]:
    """Read ``source=weight, source, ...``: the weight stands after the last ``=`` and is 1 where there is none.

    Raises:
        UsageError: No sources, one that stands twice, a weight that is no number, or nothing but zeros.
    """
    hint = "write them like 'clip-score=1, scores.parquet:aesthetic=0.5, width=-1'"
    found: dict[str, float] = {}
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
            raise UsageError(f"columns = {columns!r}: the weight {text!r} of {source} is no finite number; {hint}")
        if source in found:
            raise UsageError(f"columns = {columns!r} names {source} twice; give it one weight")
        found[source] = weight
    if not any(found.values()):
        raise UsageError(f"columns = {columns!r}: all weights are zero, so that no row is better than another")
    return found


def ranks(values_N: npt.NDArray[Any]) -> Floats:
    """Return ranks from 0 (lowest) to 1 (highest), (N,); equal values share their mean rank."""
    _, place_N, counts = np.unique(values_N, return_inverse=True, return_counts=True)
    mean_rank = np.cumsum(counts) - (counts + 1) / 2
    return np.asarray(mean_rank[place_N] / max(len(values_N) - 1, 1), np.float64)


def zscores(values_N: npt.NDArray[Any]) -> Floats:
    """Return standard deviations from the mean, (N,); 0 where all values are equal."""
    values = np.asarray(values_N, np.float64)
    if values.min() == values.max():
        return np.zeros(len(values))
    centred = values - values.mean()
    centred /= np.abs(centred).max()  # so that no square overflows
    return np.asarray(centred / np.sqrt(np.mean(centred**2)), np.float64)
