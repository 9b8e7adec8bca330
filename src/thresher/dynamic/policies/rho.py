"""RHO: train on the rows whose loss can still be reduced: high now, but low under a reference model.

Published as "Prioritized Training on Points that are Learnable, Worth Learning, and Not Yet Learnt" (RHO-LOSS, arXiv
2206.07137, ICML 2022). The reducible loss of a row is its loss now minus its loss under a reference model. Rows that
are learned already have a low loss now; mismatched pairs and other noise have a high loss under both models. The
reference loss is one number per row, computed once: by a model trained on other data, or by two models that were each
trained on half of the rows and score the other half.

Differences from the paper: it scores every row of a large batch with an extra forward pass and trains on the best of
them. Here the loss now is the last recorded one, so nothing is computed in addition, and rows are chosen for a whole
epoch: after ``warmup`` epochs on all rows for ``cycle`` epochs, then again after an epoch on all rows, which updates
all losses. The choice is soft, so that no row is left out for ever: each epoch draws without replacement, with a
probability that grows with exp(rank / softness), where the rank of the reducible loss is 0 for the lowest and 1 for
the highest.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np

from thresher.dynamic.ledger import LEFT_OUT, Ledger, Marks
from thresher.dynamic.pick import lowest, ranks, whole
from thresher.dynamic.policy import PRUNE, Plan, Policy, share_for
from thresher.dynamic.registry import policy
from thresher.errors import UsageError
from thresher.runtime.parameters import Share


@policy("rho")
@dataclass(frozen=True, kw_only=True)
class Rho(Policy):
    """Keep the rows whose loss is high now but low under a reference model: those that can still be learned.

    Rows without a reference loss, and rows never seen, come first.

    Attributes:
        reference: For the trainers, where the reference losses are: see :mod:`thresher.dynamic.references`. A sampler
            gets them as an array.
        keep: Share of the rows to keep after the warm-up.
        softness: How soft the choice is, in ranks; 0 for the highest reducible losses.
        cycle: Epochs that leave rows out, between two on all rows.
        warmup: Epochs on all rows before pruning, at least 1.
    """

    marks_candidates: ClassVar[bool] = True
    needs_references: ClassVar[bool] = True

    reference: str = field(
        default="", repr=False, metadata={"help": "parquet file with a key and a loss per row, or column:NAME"}
    )
    keep: Share = field(default=1 - PRUNE, metadata={"help": "share of an epoch to keep", "follows": True})
    softness: float = field(default=0.1, metadata={"help": "how soft the choice is, in ranks; 0 for the highest only"})
    cycle: int = field(
        default=3, metadata={"help": "epochs that leave rows out (mutation) after one on all rows", "least": 1}
    )
    warmup: int = field(
        default=1, metadata={"help": "epochs on all rows before pruning", "flag": "full-epochs", "least": 1}
    )

    def __post_init__(self) -> None:
        """Validate the parameters."""
        if not 0 < self.keep < 1:
            raise UsageError(f"keep = {self.keep}; give a share strictly between 0 and 1, like 0.7")
        if not 0 <= self.softness < np.inf:
            raise UsageError(f"softness = {self.softness}; give 0 or more")
        if self.cycle < 1 or self.warmup < 1:
            raise UsageError(f"cycle = {self.cycle}, warmup = {self.warmup}; give 1 epoch or more for each")

    @classmethod
    def for_run(cls, epochs: int, *, reference: str = "", **options: Any) -> Rho:
        """Keep 70% of the rows by default; refuse a run without a reference."""
        _require(reference)
        return cls(reference=reference, **options)

    @classmethod
    def for_budget(
        cls,
        pruned: float,
        epochs: int,
        *,
        reference: str = "",
        softness: float = 0.1,
        cycle: int = 3,
        warmup: int = 1,
    ) -> Rho:
        """Choose ``keep`` so that the run leaves out ``pruned`` of its samples, including the epochs on all rows."""
        _require(reference)
        half = cls(keep=0.5, reference=reference, softness=softness, cycle=cycle, warmup=warmup)
        return replace(half, keep=1 - share_for(pruned, epochs, half))

    def references(self) -> str:
        """Return where the reference losses are."""
        return self.reference

    def ledger(self, rows: int) -> Ledger:
        """Return a ledger with references, which whoever creates it fills."""
        return Ledger(rows, references=True)

    def plan(self, ledger: Ledger, epoch: int, rng: np.random.Generator) -> Plan:
        """Keep all rows, or draw rows by their reducible loss."""
        if epoch < self.warmup:
            return Plan(epoch=epoch, phase="warm-up", total=len(ledger))
        if (epoch - self.warmup) % (self.cycle + 1) == self.cycle:
            return Plan(epoch=epoch, phase="preparation", total=len(ledger))
        if ledger.references_N is None:
            raise UsageError("this ledger has no references; create it with Rho(...).ledger(rows)")
        reducible_N = ledger.loss_N - ledger.references_N
        known_N = ~np.isnan(reducible_N)
        if np.isnan(ledger.references_N).all() and (ledger.seen_N >= 0).any():
            raise UsageError(
                f"none of {len(ledger):,} rows has a reference loss; give the reference losses of these data, with the "
                "same keys"
            )
        scores_N = np.full(len(ledger), -np.inf)
        if self.softness:
            draws_M = rng.gumbel(size=np.count_nonzero(known_N))
            scores_N[known_N] = -(ranks(reducible_N[known_N]) / self.softness + draws_M)
        else:
            scores_N[known_N] = -reducible_N[known_N]
        kept_N = lowest(scores_N, max(1, whole(self.keep * len(ledger))))
        return Plan(epoch=epoch, phase="pruned", total=len(ledger), kept_N=kept_N)

    def finish(self, ledger: Ledger, plan: Plan, rng: np.random.Generator) -> Marks | None:
        """Mark the rows that the epoch left out: a coreset is ranked by how often that was."""
        return None if plan.kept_N is None else np.where(plan.kept_N, np.uint8(0), np.uint8(LEFT_OUT))

    def forecast(self, epoch: int) -> float:
        """Return the share left out; 0 in epochs on all rows."""
        pruned = epoch >= self.warmup and (epoch - self.warmup) % (self.cycle + 1) != self.cycle
        return 1 - self.keep if pruned else 0.0


def _require(reference: str) -> None:
    if not reference:
        raise UsageError(
            "policy rho needs the loss of every row under a reference model; give its option reference: a parquet file "
            "with a column of keys and a column loss (in Python: create Rho, and give the sampler references_N)"
        )
