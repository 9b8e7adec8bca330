"""C-RHO: keep pairs that a trained CLIP model matches well and an early one does not: reducible loss for pairs.

RHO-loss (arXiv 2206.07137) trains on rows whose loss is still high although a reference model shows that it can
be low. A version for image-caption pairs is a baseline in the ClipCov paper (arXiv 2403.12267): the CLIP
score of a trained reference model minus the CLIP score of a proxy model early in training.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from thresher.errors import UsageError
from thresher.pruning.registry import method
from thresher.pruning.run import Run
from thresher.pruning.scores import Score, Scored, by_rows, clip_scores


@method("c-rho")
@dataclass(frozen=True, kw_only=True)
class CRho(Scored):
    """Keep the pairs that a trained model matches better than an early one."""

    meaning: ClassVar[str] = "reducible clip score"
    example: ClassVar[dict[str, Any]] = {"proxy": "width", "keep": "30%"}

    reference: str = field(
        default="clip-score",
        metadata={
            "metavar": "COLUMN",
            "help": "CLIP score of a trained model: column, 'clip-score', scores.parquet, or the folder of a pool",
        },
    )
    proxy: str = field(
        metadata={
            "metavar": "COLUMN",
            "help": "CLIP score of a model early in training: column, 'clip-score', scores.parquet, or a pool",
        }
    )

    def __post_init__(self) -> None:
        """Validate the parameters."""
        super().__post_init__()
        if self.reference == self.proxy:
            raise UsageError(f"reference and proxy are both {self.proxy!r}; use the scores of two models")

    @property
    def by_rows(self) -> bool:
        """Whether jobs can share the rows: unless one of the two is a method that compares rows."""
        return by_rows(self.reference) and by_rows(self.proxy)

    def score(self, run: Run) -> Score:
        """Return the score of the reference minus that of the proxy."""
        reference, proxy = (clip_scores(run, getattr(self, name), name) for name in ("reference", "proxy"))
        notes = [f"reference: {note}" for note in reference.notes] + [f"proxy: {note}" for note in proxy.notes]
        return Score(np.subtract(reference.values_N, proxy.values_N, dtype=np.float64), tuple(notes))
