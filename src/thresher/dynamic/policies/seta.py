"""SeTa: train on rows of some levels of loss, sliding from the easy to the hard.

Published as "SeTa" (arXiv 2503.13385). Before each epoch:

1. a random share r of the rows is left out;
2. the rest are divided by their last loss into k groups, by k-means in one dimension;
3. of the groups in ascending order of their mean, a window of round(alpha k) consecutive ones is trained on. The window
   moves up by a group in every epoch, and starts again at the easiest.

The first epoch is on a random 1 - r of the rows, because no loss is known; the last epochs, from a share delta of the
run on, are too. Published settings: r = 0.1, k = 5, alpha = 0.9 (CIFAR); r = 0, k = 5, alpha = 0.6 (ImageNet), which
are the defaults here; delta = 0.875.

Differences from the released code: k-means starts from quantiles instead of random centers and is computed on the
sorted losses, so that the groups depend on the losses only and ten million rows take seconds; rows never seen are
kept, instead of having a made-up loss of 3. How many rows the window has depends on the losses, so there is no share to
prune; forecasts assume groups of equal size.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from thresher.dynamic.ledger import Ledger
from thresher.dynamic.pick import draw, whole
from thresher.dynamic.policy import Plan, Policy
from thresher.dynamic.registry import policy
from thresher.errors import UsageError
from thresher.runtime.parameters import WholeShare

_ROUNDS = 100  # of k-means, which converges long before


@policy("seta")
@dataclass(frozen=True, kw_only=True)
class Seta(Policy):
    """Train on a window of the levels of loss that slides from the easy to the hard rows.

    Attributes:
        epochs: Length of the run.
        r: Share of the rows to leave out at random, below 1.
        groups: k, the number of levels of loss, at least 2.
        alpha: Share of the levels that the window has; at least one level.
        delta: Share of the epochs with a window; the epochs after it only leave out a random r.
    """

    epochs: int = field(metadata={"option": False})
    r: float = field(default=0.0, metadata={"help": "share of the rows to leave out at random"})
    groups: int = field(default=5, metadata={"help": "levels of loss", "least": 2})
    alpha: WholeShare = field(default=0.6, metadata={"help": "share of the levels to train on"})
    delta: WholeShare = field(default=0.875, metadata={"help": "share of the epochs that prune; the rest use all rows"})

    def __post_init__(self) -> None:
        """Validate the parameters."""
        if self.epochs < 1:
            raise UsageError(f"epochs = {self.epochs}; give 1 or more")
        if not 0 <= self.r < 1:
            raise UsageError(f"r = {self.r}; give a share from 0 and below 1")
        if self.groups < 2 or not 0 < self.alpha <= 1 or not self.window:
            raise UsageError(
                f"groups = {self.groups}, alpha = {self.alpha}; give 2 levels or more, and a share of them that is at "
                "least one level"
            )
        if not 0 <= self.delta <= 1:
            raise UsageError(f"delta = {self.delta}; give a share of the epochs from 0 to 1")

    @classmethod
    def for_run(cls, epochs: int, **options: Any) -> Seta:
        """Train on three of five levels of loss, as published for ImageNet."""
        return cls(epochs=epochs, **options)

    @classmethod
    def for_budget(cls, pruned: float, epochs: int, *args: Any, **options: Any) -> NoReturn:
        """Raise UsageError: the losses decide how many rows a level has."""
        raise UsageError(
            "policy seta leaves out whole levels of loss, however many rows they have; give r, groups and alpha, or "
            "use a policy such as scan"
        )

    @property
    def window(self) -> int:
        """Number of levels trained on."""
        return round(self.alpha * self.groups)

    def plan(self, ledger: Ledger, epoch: int, rng: np.random.Generator) -> Plan:
        """Leave out a random share of the rows, and those outside the window."""
        seen_N = ledger.seen_N >= 0
        slides = self._slides(epoch) and bool(seen_N.any())
        if not self.r and not slides:
            return Plan(epoch=epoch, phase="everything", total=len(ledger))
        chosen_N = seen_N if slides else np.ones(len(ledger), np.bool_)
        keep = max(1, whole((1 - self.r) * np.count_nonzero(chosen_N)))
        kept_N = draw(chosen_N, keep, rng) if self.r else chosen_N.copy()
        if slides:
            rows = np.flatnonzero(kept_N)
            levels_M = levels(ledger.loss_N[rows], self.groups)
            start = epoch % (self.groups - self.window + 1)
            kept_N[rows[(levels_M < start) | (levels_M >= start + self.window)]] = False
            if not kept_N.any():  # the levels of the window are empty
                kept_N[rows[0]] = True
            kept_N |= ~seen_N
        return Plan(epoch=epoch, phase="pruned", total=len(ledger), kept_N=kept_N)

    def forecast(self, epoch: int) -> float:
        """Return the share expected to be left out; assumes levels of equal size."""
        return 1 - (1 - self.r) * (self.window / self.groups if self._slides(epoch) else 1)

    def _slides(self, epoch: int) -> bool:
        return 0 < epoch and epoch + 1 <= round(self.delta * self.epochs, 6)


def levels(losses_M: npt.NDArray[np.float32], k: int) -> npt.NDArray[np.int64]:
    """Return the group of each loss by k-means in one dimension, (M,) from 0 (lowest mean) to k - 1.

    Lloyd's iterations start from the middles of k parts of equal size. A loss midway between two centers belongs to the
    upper one. With fewer different losses than groups some groups are empty.
    """
    order = np.argsort(losses_M, kind="stable")
    ascending_M = losses_M[order].astype(np.float64)
    sums = np.concatenate([[0.0], np.cumsum(ascending_M)])
    centers_K = ascending_M[(np.arange(k) * 2 + 1) * len(order) // (2 * k)]
    edges = np.empty(0, np.int64)
    for _ in range(_ROUNDS):
        found = np.searchsorted(ascending_M, (centers_K[1:] + centers_K[:-1]) / 2)
        if np.array_equal(found, edges):
            break
        edges = found
        bounds = np.concatenate([[0], edges, [len(order)]])
        counts_K = np.diff(bounds)
        full_K = counts_K > 0
        centers_K = np.where(full_K, np.diff(sums[bounds]) / np.maximum(counts_K, 1), centers_K)
    levels_M = np.empty(len(order), np.int64)
    levels_M[order] = np.repeat(np.arange(k), np.diff(np.concatenate([[0], edges, [len(order)]])))
    return levels_M
