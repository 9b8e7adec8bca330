"""D-Pruning: keep the rows with the highest loss, or with the highest upper bound of it.

After "Accelerating Deep Learning with Dynamic Data Pruning" (Raju, Daruwalla and Lipasti, arXiv 2111.12621),
which treats the rows as arms of a bandit. The exact algorithm here:

- After every batch the moving mean and variance of a row's loss x are updated with ``decay`` d:
  step = x - mean; mean += d * step; variance = (1 - d) * (variance + d * step^2). The first loss sets mean = x,
  variance = 0.
- The first ``warmup`` epochs train on all rows. Then, every ``period`` epochs, floor(keep * N) rows are chosen
  and used until the next choice. Rows that are left out keep their moments.
- rule "uncertainty": the rows with the highest upper bound mean + bound * sqrt(variance).
- rule "epsilon-greedy": a share ``epsilon`` of the rows at random, the others by the highest mean.
- Rows never seen count as highest; among equals the lower row id wins.

The loss is that of the training task, per pair and averaged over both directions. The standard deviation, not the
variance, is added, so that ``bound`` has no unit and does not depend on the scale of the loss.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import numpy as np

from thresher.dynamic.ledger import LEFT_OUT, Ledger, Losses, Marks
from thresher.dynamic.pick import draw, lowest, whole
from thresher.dynamic.policy import PRUNE, Plan, Policy, share_for
from thresher.dynamic.registry import policy
from thresher.errors import UsageError
from thresher.runtime.parameters import Share

Rule = Literal["uncertainty", "epsilon-greedy"]


@policy("d-pruning")
@dataclass(frozen=True, kw_only=True)
class DPruning(Policy):
    """Keep the rows with the highest moving mean of the loss, or with the highest upper bound of it.

    Attributes:
        keep: Share of the rows to keep after the warm-up.
        rule: How rows are chosen.
        bound: With "uncertainty", the number of standard deviations added to the mean.
        epsilon: With "epsilon-greedy", the share of the kept rows that is drawn at random.
        decay: Weight of the latest loss in the moving mean and variance.
        period: Epochs from one choice to the next.
        warmup: Epochs on all rows before the first choice, at least 1.
    """

    marks_candidates: ClassVar[bool] = True

    keep: Share = field(metadata={"help": "share of an epoch to keep", "follows": True, "usual": 1 - PRUNE})
    rule: Rule = field(default="uncertainty", metadata={"help": "how rows are ranked"})
    bound: float = field(default=1.0, metadata={"option": False})
    epsilon: float = field(default=0.1, metadata={"option": False})
    decay: float = field(default=0.2, metadata={"option": False})
    period: int = field(default=1, metadata={"option": False})
    warmup: int = field(
        default=1, metadata={"help": "epochs on all rows before pruning", "flag": "full-epochs", "least": 1}
    )

    def __post_init__(self) -> None:
        """Validate the parameters."""
        if not 0 < self.keep < 1:
            raise UsageError(f"keep = {self.keep}; give a share strictly between 0 and 1, like 0.7")
        if not self.bound >= 0:
            raise UsageError(f"bound = {self.bound}; give 0 or more standard deviations")
        if not 0 <= self.epsilon <= 1:
            raise UsageError(f"epsilon = {self.epsilon}; give a share from 0 to 1")
        if not 0 < self.decay <= 1:
            raise UsageError(f"decay = {self.decay}; give the weight of the latest loss, above 0 and at most 1")
        if self.period < 1 or self.warmup < 1:
            raise UsageError(f"period = {self.period}, warmup = {self.warmup}; give 1 epoch or more for each")

    @classmethod
    def for_run(cls, epochs: int, **options: Any) -> DPruning:
        """Leave out 30% of every epoch after the warm-up by default."""
        return cls(**{"keep": 1 - PRUNE, **options})

    @classmethod
    def for_budget(cls, pruned: float, epochs: int, *, rule: Rule = "uncertainty", warmup: int = 1) -> DPruning:
        """Choose ``keep`` so that the run leaves out ``pruned`` of its samples, including the warm-up."""
        half = cls(keep=0.5, rule=rule, warmup=warmup)
        return replace(half, keep=1 - share_for(pruned, epochs, half))

    def ledger(self, rows: int) -> Ledger:
        """Return a ledger with the moving mean and variance of the loss."""
        return Ledger(rows, decay=self.decay)

    def plan(self, ledger: Ledger, epoch: int, rng: np.random.Generator) -> Plan:
        """Choose rows at the start of a period, and keep them until its end."""
        if epoch < self.warmup:
            return Plan(epoch=epoch, phase="warm-up", total=len(ledger))
        start = self._start(epoch)
        if epoch > start:
            kept_N = ~ledger.candidates(start, LEFT_OUT)
        else:
            keep = max(1, whole(self.keep * len(ledger)))
            chance = whole(self.epsilon * keep) if self.rule == "epsilon-greedy" else 0
            kept_N = lowest(self._negative_scores(ledger), keep - chance)
            if chance:
                kept_N |= draw(~kept_N, chance, rng)
        return Plan(epoch=epoch, phase="pruned", total=len(ledger), kept_N=kept_N)

    def finish(self, ledger: Ledger, plan: Plan, rng: np.random.Generator) -> Marks | None:
        """Mark the rows that a choice leaves out: the next epochs reuse the marks, and a coreset is ranked by them."""
        if plan.kept_N is None or plan.epoch > self._start(plan.epoch):
            return None
        return np.where(plan.kept_N, np.uint8(0), np.uint8(LEFT_OUT))

    def forecast(self, epoch: int) -> float:
        """Return the share left out; 0 in the warm-up."""
        return 0.0 if epoch < self.warmup else 1 - self.keep

    def _start(self, epoch: int) -> int:
        return epoch - (epoch - self.warmup) % self.period

    def _negative_scores(self, ledger: Ledger) -> Losses:
        if ledger.means_N is None or ledger.variances_N is None:
            raise UsageError("this ledger has no moving mean of the loss; create it with DPruning(...).ledger(rows)")
        if self.rule == "uncertainty":
            scores_N = np.sqrt(ledger.variances_N)
            scores_N *= -self.bound
            scores_N -= ledger.means_N
        else:
            scores_N = -ledger.means_N
        scores_N[ledger.seen_N < 0] = -np.inf
        return scores_N
