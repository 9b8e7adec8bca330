"""CLIP score: the cosine of image and caption; keeps the top share, or all rows above a threshold.

DataComp keeps the top 30% by ViT-L/14; LAION kept all pairs with a ViT-B/32 score of at least 0.28.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from thresher.errors import UsageError
from thresher.pool.store import Block, EmbeddingStore
from thresher.pruning.registry import method
from thresher.pruning.run import Run
from thresher.pruning.scores import Score, Scored, by_rows, column
from thresher.runtime.checksums import ArraySpec


@method("clip-score")
@dataclass(frozen=True, kw_only=True)
class ClipScore(Scored):
    """Keep the pairs whose image and caption match best."""

    meaning: ClassVar[str] = "clip score"

    column: str = field(
        default="auto",
        metadata={
            "metavar": "COLUMN",
            "help": "score column; 'embeddings' to compute it; 'auto': compute if both embeddings exist",
        },
    )

    @property
    def by_rows(self) -> bool:
        """Whether jobs can share the rows: unless the column is a method that compares rows."""
        return by_rows(self.column)

    def score(self, run: Run) -> Score:
        """Return the cosine of the image and text embedding, or a stored score."""
        stored = run.store.layout.scores
        source = self.column
        if source == "auto":
            if "joint" in run.store.fields:
                source = "embeddings"
            elif stored:
                source = stored[0]
            else:
                columns = ", ".join(run.store.columns)
                raise UsageError(
                    f"{run.store.layout.location} has neither both embeddings nor a known score column; "
                    + (f"set column to one of its columns: {columns}" if columns else "it has no other columns")
                )
        if source != "embeddings":
            return column(run, source, "column")
        run.store.require_joint("a clip score")
        scores = run.column("clip score", "joint", cosines, {"score": ArraySpec("float32", least=-2, most=2)})
        return Score(np.asarray(scores["score"]), ("computed from the image and text embeddings",))


def cosines(store: EmbeddingStore, block: Block) -> tuple[npt.NDArray[np.float32]]:
    """Return the cosines of the image and text embeddings of a block, (B,) float32."""
    image, text = store.vectors("image", block), store.vectors("text", block)
    return (np.einsum("ij,ij->i", image, text),)
