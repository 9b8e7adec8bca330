"""A fresh random subset every epoch: the baseline that dynamic pruning must beat."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from thresher.dynamic.ledger import Ledger
from thresher.dynamic.pick import draw, whole
from thresher.dynamic.policy import Plan, Policy
from thresher.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class DynamicRandom(Policy):
    """Train on a fresh random share of the rows in every epoch, the first included."""

    keep: float

    def __post_init__(self) -> None:
        """Refuse what is no share."""
        if not 0 < self.keep < 1:
            raise UsageError(f"keep = {self.keep}; give a share strictly between 0 and 1, like 0.7")

    def plan(self, ledger: Ledger, epoch: int, rng: np.random.Generator) -> Plan:
        """Keep a random share, rounded down to whole rows, but at least one."""
        everything = np.ones(len(ledger), np.bool_)
        kept_N = draw(everything, max(1, whole(self.keep * len(ledger))), rng)
        return Plan(epoch=epoch, phase="pruned", total=len(ledger), kept_N=kept_N)

    def forecast(self, epoch: int) -> float:
        """Return the share left out, the same in every epoch."""
        return 1 - self.keep
