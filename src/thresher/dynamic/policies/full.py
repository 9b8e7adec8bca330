"""Train on everything: what pruning is measured against."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from thresher.dynamic.ledger import Ledger
from thresher.dynamic.policy import Plan, Policy


@dataclass(frozen=True, kw_only=True)
class Full(Policy):
    """All rows, every epoch."""

    def plan(self, ledger: Ledger, epoch: int, rng: np.random.Generator) -> Plan:
        """Keep everything."""
        return Plan(epoch=epoch, phase="everything", total=len(ledger))

    def forecast(self, epoch: int) -> float:
        """Return 0."""
        return 0.0
