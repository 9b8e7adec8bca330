"""JEST: joint example selection, batches chosen out of super-batches by a learner and a reference.

Published as "Data curation via joint example selection further accelerates multimodal learning" (arXiv 2406.17711,
NeurIPS 2024). The rows of a super-batch are scored by the model in training; a batch is drawn from them in chunks, each
by what the rows would add to the loss of the batch, minus what they would add to it under a reference model. The
choice itself is in :mod:`thresher.dynamic.jest`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np

from thresher.dynamic.ledger import Ledger
from thresher.dynamic.policy import Plan, Policy
from thresher.dynamic.registry import policy
from thresher.errors import UsageError
from thresher.runtime.parameters import Share

Score = Literal["learnability", "easy-reference", "hard-learner"]


@policy("jest")
@dataclass(frozen=True, kw_only=True)
class Jest(Policy):
    """Choose every batch out of a super-batch, by the losses now and under a reference model.

    Its plans have all rows: the choice is made for every step, by
    :class:`thresher.dynamic.jest.JestSampler`, and scoring a super-batch costs a forward pass of each of its rows.

    Attributes:
        reference: For the trainers: a pool with embeddings of the reference, or a file of reference losses, or
            ``column:NAME``. A sampler gets them in Python.
        keep: Share of a super-batch to train on; 0.2 as published, so a super-batch has five times the rows of a batch.
        chunks: Number of draws that make a batch; each takes the rows before it into account.
        score: What is drawn by: the loss now minus that of the reference, the negative loss of the reference, or the
            loss now.
    """

    chooses_batches: ClassVar[bool] = True

    reference: str = field(
        default="", repr=False, metadata={"help": "a pool with embeddings, a file of losses, or column:NAME"}
    )
    keep: Share = field(default=0.2, metadata={"help": "share of a super-batch to train on"})
    chunks: int = field(default=16, metadata={"help": "draws that make a batch", "least": 1})
    score: Score = field(default="learnability", metadata={"help": "what batches are drawn by"})

    def __post_init__(self) -> None:
        """Validate the parameters."""
        if not 0 < self.keep < 1:
            raise UsageError(f"keep = {self.keep}; give a share strictly between 0 and 1, like 0.2")
        if self.chunks < 1:
            raise UsageError(f"chunks = {self.chunks}; give 1 or more")

    @classmethod
    def for_run(cls, epochs: int, *, reference: str = "", score: Score = "learnability", **options: Any) -> Jest:
        """Use the published defaults; refuse a run without a reference, unless only the loss now counts."""
        if not reference and score != "hard-learner":
            raise UsageError(
                "policy jest needs a reference; give its option reference: a pool with embeddings of these data, or a "
                "file of reference losses as 'thresher reference' writes it"
            )
        return cls(reference=reference, score=score, **options)

    def references(self) -> str:
        """Return where the embeddings or losses of the reference are."""
        return self.reference

    def plan(self, ledger: Ledger, epoch: int, rng: np.random.Generator) -> Plan:
        """Use all rows, in super-batches."""
        return Plan(epoch=epoch, phase="everything", total=len(ledger))

    def forecast(self, epoch: int) -> float:
        """Return 0: an epoch scores all rows; how many it trains on is a matter of the sampler."""
        return 0.0
