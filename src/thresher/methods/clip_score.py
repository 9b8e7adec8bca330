"""CLIP score: cosine of image and caption; the top share, or all above a threshold.

DataComp keeps the top 30% by L/14; LAION kept everything at or above 0.28 by B/32.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from thresher.errors import BadRowsError, UsageError
from thresher.ops.cut import top
from thresher.registry import method
from thresher.run import Run
from thresher.selection import Keep, Selection
from thresher.store import Block, EmbeddingStore


@method("clip-score")
@dataclass(frozen=True, kw_only=True)
class ClipScore:
    """Keep the pairs whose image and caption agree best."""

    keep: Keep | None = field(default=None, metadata={"help": "share or number of rows to keep"})
    threshold: float | None = field(default=None, metadata={"help": "keep rows with a score of at least this"})
    column: str = field(
        default="auto",
        metadata={"help": "stored score column; 'embeddings' to compute; 'auto': computed where both embeddings are"},
    )

    def __post_init__(self) -> None:
        """Exactly one of keep and threshold."""
        if (self.keep is None) == (self.threshold is None):
            raise UsageError("clip-score needs either keep (such as 30%) or threshold (such as 0.28)")

    def select(self, run: Run) -> Selection:
        """Cut by the score; equal scores at a budget go to the lower row."""
        scores, note = self._scores(run)
        if self.keep is not None:
            mask = top(scores, self.keep.of(len(scores)))
            cut: float | None = float(scores[mask].min())
            reason = "clip score {score:.4f} is below the cut at {cut:.4f}"
        else:
            mask, cut = scores >= self.threshold, self.threshold
            reason = "clip score {score:.4f} is below the threshold {cut}"
        return run.selection(
            self,
            mask,
            reasons=(reason,),
            score="clip score",
            cut=cut,
            notes=(note,),
            rows={"score": scores.astype(np.float32)},
        )

    def _scores(self, run: Run) -> tuple[npt.NDArray[Any], str]:
        stored = run.store.layout.scores
        column = self.column
        if column == "auto":
            if "joint" in run.store.fields:
                column = "embeddings"
            elif stored:
                column = stored[0]
            else:
                raise UsageError(
                    f"{run.store.layout.location} has neither both embeddings nor a known score column; "
                    f"name one of its columns with column: {', '.join(run.store.columns) or 'none'}"
                )
        if column == "embeddings":
            found = run.column("clip score", "joint", cosines, {"score": "float32"})
            return np.asarray(found["score"]), "computed from the image and text embeddings"
        run.store.require([column], "clip-score")
        scores = run.store.column(column)
        missing = np.flatnonzero(np.isnan(scores)) if scores.dtype.kind == "f" else np.empty(0, np.int64)
        if len(missing):
            row = int(run.store.ids[missing[0]])
            raise BadRowsError(
                f"{run.store.whereabouts('metadata', row)}: the score column {column!r} is empty or NaN "
                f"({len(missing):,} such rows); filter them out first, with where = 'NOT isnan({column})'"
            )
        return scores, f"taken from the column {column}"


def cosines(store: EmbeddingStore, block: Block) -> tuple[npt.NDArray[np.float32]]:
    """Return the cosine of image and text embedding of a block's rows, (B,) float32."""
    image, text = store.vectors("image", block), store.vectors("text", block)
    if image.shape != text.shape:
        raise UsageError(
            f"image embeddings have {image.shape[1]} dimensions, text embeddings {text.shape[1]}: "
            "a clip score needs both from one joint space"
        )
    return (np.einsum("ij,ij->i", image, text),)
