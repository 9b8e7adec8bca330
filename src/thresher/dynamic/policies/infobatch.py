"""InfoBatch: leave out some of the rows with low loss, and increase the weight of the others.

Published as "InfoBatch: Lossless Training Speed Up by Unbiased Dynamic Data Pruning" (arXiv 2303.04947,
ICLR 2024). Before each epoch a random share r of the rows whose latest loss is below the mean is left out;
the other rows below the mean get the weight 1 / (1 - r). The last epochs train on all rows.

With these weights the expected *sum* of the losses of an epoch equals that over all rows, in fewer steps.
That holds if the loss of a row does not depend on the other rows of its batch. A contrastive loss does: pruning
also changes the negatives, so it is not exactly unbiased.

Differences from the released code: the weight is (rows below the mean) / (those of them kept), which equals
1 / (1 - r) up to the rounding to whole rows and is exactly unbiased; rows never seen are kept and do not count in
the mean, instead of having a made-up loss of 3; row ids are integers, not floats. How many rows r leaves out is known
only during training, because skewed losses have many rows below their mean. So for a budget the number of rows to
leave out replaces r, and the weights follow from it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from thresher.dynamic.ledger import Ledger
from thresher.dynamic.pick import draw, whole
from thresher.dynamic.policy import Plan, Policy, check_budget
from thresher.dynamic.registry import policy
from thresher.errors import UsageError
from thresher.runtime.parameters import WholeShare

_BELOW = 0.5  # the share of rows below the mean loss that forecasts assume
_MOST = 0.9  # the largest share of the rows below the mean to leave out, which limits the weights of the rest


@policy("infobatch")
@dataclass(frozen=True, kw_only=True)
class InfoBatch(Policy):
    """Leave out a share of the rows below the mean loss, and increase the weight of the others below it.

    Attributes:
        epochs: Length of the run.
        r: Share of the rows below the mean loss to leave out.
        delta: Share of the epochs that prune; the epochs after it train on all rows.
        share: Share of all rows to leave out, instead of r; taken from the rows below the mean, up to nine tenths of
            them. None for r, as published.
    """

    epochs: int = field(metadata={"option": False})
    r: float = field(default=0.5, metadata={"option": False})
    delta: WholeShare = field(default=0.875, metadata={"help": "share of the epochs that prune; the rest use all rows"})
    share: float | None = field(default=None, metadata={"option": False})

    def __post_init__(self) -> None:
        """Validate the parameters."""
        if self.epochs < 1:
            raise UsageError(f"epochs = {self.epochs}; give 1 or more")
        if not 0 < self.r < 1:
            raise UsageError(f"r = {self.r}; give a share strictly between 0 and 1")
        if self.share is not None and not 0 < self.share < 1:
            raise UsageError(f"share = {self.share}; give a share of the rows strictly between 0 and 1")
        if not 0 <= self.delta <= 1:
            raise UsageError(f"delta = {self.delta}; give a share of the epochs from 0 to 1")

    @classmethod
    def for_run(cls, epochs: int, **options: Any) -> InfoBatch:
        """Leave out half of the rows below the mean loss, as published."""
        return cls(epochs=epochs, **options)

    @classmethod
    def for_budget(cls, pruned: float, epochs: int, *, delta: float = 0.875) -> InfoBatch:
        """Leave out ``pruned`` of the samples of the run, including the epochs on all rows.

        This assumes that half of the rows are below the mean loss, which limits the share; an epoch with fewer leaves
        out nine tenths of them.
        """
        shares = cls(epochs=epochs, share=0.5, delta=delta).expected_pruned(epochs) / 0.5
        check_budget(pruned, epochs, _BELOW * _MOST * shares, "train for more epochs, or raise delta")
        return cls(epochs=epochs, share=pruned / shares, delta=delta)

    def plan(self, ledger: Ledger, epoch: int, rng: np.random.Generator) -> Plan:
        """Leave out exactly r of the rows below the mean, or ``share`` of all rows, rounded down to whole rows."""
        loss_N = ledger.loss_N
        seen_N = ledger.seen_N >= 0
        if not self._prunes(epoch) or not seen_N.any():
            return Plan(epoch=epoch, phase="everything", total=len(ledger))
        below_N = seen_N
        below_N &= loss_N < loss_N.mean(dtype=np.float64, where=seen_N)
        below = int(np.count_nonzero(below_N))
        dropped = whole(self.r * below)
        if self.share is not None:
            dropped = min(whole(self.share * len(ledger)), whole(_MOST * below))
        kept_N = draw(below_N, dropped, rng)
        np.logical_not(kept_N, out=kept_N)
        weights_N = np.ones(len(ledger), np.float32)
        if dropped:
            weights_N[below_N] = below / (below - dropped)
        return Plan(epoch=epoch, phase="pruned", total=len(ledger), kept_N=kept_N, weights_N=weights_N)

    def forecast(self, epoch: int) -> float:
        """Return the share expected to be left out; with r this assumes that half the rows are below the mean."""
        share = self.r * _BELOW if self.share is None else self.share
        return share if self._prunes(epoch) else 0.0

    def weighs(self) -> bool:
        """Return True: rows below the mean that are kept have larger weights."""
        return True

    def _prunes(self, epoch: int) -> bool:
        return 0 < epoch < math.floor(round(self.delta * self.epochs, 6))
