"""A new random subset in every epoch: the baseline that dynamic pruning must beat."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from thresher.dynamic.ledger import Ledger
from thresher.dynamic.pick import draw, whole
from thresher.dynamic.policy import PRUNE, Plan, Policy, check_budget
from thresher.dynamic.registry import policy
from thresher.errors import UsageError
from thresher.runtime.parameters import Share


@policy("dynamic-random")
@dataclass(frozen=True, kw_only=True)
class DynamicRandom(Policy):
    """Train on a new random share of the rows in every epoch, including the first: the baseline to beat.

    Attributes:
        keep: Share of the rows to keep.
    """

    keep: Share = field(metadata={"help": "share of an epoch to keep", "follows": True, "usual": 1 - PRUNE})

    def __post_init__(self) -> None:
        """Validate the parameters."""
        if not 0 < self.keep < 1:
            raise UsageError(f"keep = {self.keep}; give a share strictly between 0 and 1, like 0.7")

    @classmethod
    def for_run(cls, epochs: int, *, keep: float = 1 - PRUNE) -> DynamicRandom:
        """Leave out 30% of every epoch by default."""
        return cls(keep=keep)

    @classmethod
    def for_budget(cls, pruned: float, epochs: int) -> DynamicRandom:
        """Leave out ``pruned`` of every epoch."""
        check_budget(pruned, epochs, 1, "give a smaller share")
        return cls(keep=1 - pruned)

    def plan(self, ledger: Ledger, epoch: int, rng: np.random.Generator) -> Plan:
        """Keep a random share of the rows, rounded down, but at least one row."""
        everything = np.ones(len(ledger), np.bool_)
        kept_N = draw(everything, max(1, whole(self.keep * len(ledger))), rng)
        return Plan(epoch=epoch, phase="pruned", total=len(ledger), kept_N=kept_N)

    def forecast(self, epoch: int) -> float:
        """Return the share left out; it is the same in every epoch."""
        return 1 - self.keep
