"""Train on everything: what pruning is measured against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn

import numpy as np

from thresher.dynamic.ledger import Ledger
from thresher.dynamic.policy import Plan, Policy
from thresher.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Full(Policy):
    """Train on all rows in every epoch."""

    name: ClassVar[str] = "full"

    @classmethod
    def for_budget(cls, pruned: float, epochs: int, *args: Any, **options: Any) -> NoReturn:
        """Refuse a share."""
        raise UsageError("policy full leaves out nothing, not a share; for a share give a policy such as scan")

    def plan(self, ledger: Ledger, epoch: int, rng: np.random.Generator) -> Plan:
        """Keep everything."""
        return Plan(epoch=epoch, phase="everything", total=len(ledger))

    def forecast(self, epoch: int) -> float:
        """Return 0."""
        return 0.0
