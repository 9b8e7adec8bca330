"""Train on all rows: the baseline without pruning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from thresher.dynamic.ledger import Ledger
from thresher.dynamic.policy import Plan, Policy
from thresher.dynamic.registry import policy
from thresher.errors import UsageError


@policy("full")
@dataclass(frozen=True, kw_only=True)
class Full(Policy):
    """Train on all rows in every epoch."""

    @classmethod
    def for_budget(cls, pruned: float, epochs: int, *args: Any, **options: Any) -> NoReturn:
        """Raise UsageError: this policy does not prune."""
        raise UsageError("policy full does not prune; to leave out a share use a policy such as scan")

    def plan(self, ledger: Ledger, epoch: int, rng: np.random.Generator) -> Plan:
        """Keep all rows."""
        return Plan(epoch=epoch, phase="everything", total=len(ledger))

    def forecast(self, epoch: int) -> float:
        """Return 0."""
        return 0.0
