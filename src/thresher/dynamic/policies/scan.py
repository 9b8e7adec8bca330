"""SCAN: leave out pairs with very low losses, already learned, and with very high losses, not learnable yet.

Published as "SCAN: Bootstrapping Contrastive Pre-training for Data Efficiency" (arXiv 2411.09126, ICCV 2025).

1. Warm-up: all rows, until the epoch loss falls slowly: (previous - current) / |previous| < threshold.
2. Then cycles of T + 1 epochs. The first (preparation) trains on all rows and collects candidates: in each
   direction of the loss, the rho lowest losses of a batch are redundant and the rho highest are ill-matched. A
   candidate is marked in both directions. If fewer than 0.9 of the size of one direction are left, rows marked in one
   direction only are added at random, up to that size.
3. Epoch e = 1 .. T of a cycle (mutation) leaves out a new random share 0.5 * (1 + cos(pi * (T - e) / T)) of
   the candidates: 0.25, 0.75, 1 for T = 3. The mean over a cycle is one half for every T.

Differences from the released code: the modes "redundant" and "ill-matched" take effect; rows have integer
ids; of equal losses the lower row is redundant first and the higher row ill-matched first, so that no row is both in
one direction; if rho is less than one row of a batch, no row is marked, not all; the candidates may also be ranked
over the whole preparation epoch (scope "epoch"), which does not depend on the batch size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import numpy as np

from thresher.dynamic.ledger import ILL_MATCHED, REDUNDANT, Ledger, Losses, Marks
from thresher.dynamic.pick import Bools, draw, growing, lowest, whole
from thresher.dynamic.policy import Plan, Policy, check_budget
from thresher.dynamic.registry import policy
from thresher.errors import UsageError
from thresher.runtime.parameters import Share

Mode = Literal["both", "redundant", "ill-matched"]
Scope = Literal["batch", "epoch"]
SIDES = {"both": (REDUNDANT, ILL_MATCHED), "redundant": (REDUNDANT,), "ill-matched": (ILL_MATCHED,)}

_FEWEST = 2  # the shortest warm-up by threshold: it compares two epochs
_USUAL = 0.35  # the rho up to which for_budget keeps its first choice


def _above(rho: float) -> int:
    """Return how far rho is above the usual, in steps of 0.05; values within one step count as equally good."""
    return max(0, math.ceil((rho - _USUAL) / 0.05 - 1e-9))


@policy("scan")
@dataclass(frozen=True, kw_only=True)
class Scan(Policy):
    """Leave out a growing share of the pairs with the lowest and the highest losses, in cycles.

    Attributes:
        rho: Share of the rows that are candidates on each side; above 0 and at most 0.5, below 0.5 with both sides.
        cycle: T, the number of mutation epochs in a cycle, after one preparation epoch.
        warmup: Epochs on all rows before the first cycle; None to decide by the loss.
        threshold: With ``warmup=None``, the warm-up ends after the first epoch whose mean loss is lower than
            the one before by less than this share.
        mode: Which candidates to prune: redundant (lowest losses), ill-matched (highest losses) or both.
        scope: Whether losses are ranked within a batch or within an epoch.
        top_up: If fewer candidates than this share of rho are marked in both directions, others are added; 1 for
            always.
    """

    marks_candidates: ClassVar[bool] = True

    rho: Share = field(
        default=0.3, metadata={"help": "share of rows to mark as redundant, and as ill-matched", "follows": True}
    )
    cycle: int = field(
        default=3, metadata={"help": "epochs that leave rows out (mutation) after one on all rows", "least": 1}
    )
    warmup: int | None = field(
        default=None, metadata={"help": "epochs on all rows before pruning", "flag": "full-epochs", "least": 0}
    )
    threshold: Share = field(
        default=0.3, metadata={"help": "relative fall of the loss below which the warm-up ends", "follows": True}
    )
    mode: Mode = field(
        default="both", metadata={"help": "prune redundant rows (lowest losses), ill-matched (highest losses) or both"}
    )
    scope: Scope = field(default="batch", metadata={"help": "rank losses within a batch or an epoch"})
    top_up: float = field(default=0.9, metadata={"option": False})

    def __post_init__(self) -> None:
        """Validate the parameters."""
        if not 0 < self.rho <= 0.5 or (self.rho == 0.5 and self.mode == "both"):
            raise UsageError(
                f"rho = {self.rho}; give a share per side above 0 and at most 0.5, and below 0.5 for both sides: "
                "the last epoch of a cycle would have no rows"
            )
        if self.cycle < 1:
            raise UsageError(f"cycle = {self.cycle}; give 1 mutation epoch or more")
        if self.warmup is not None and self.warmup < 0:
            raise UsageError(f"warmup = {self.warmup}; give 0 epochs or more, or None to decide by the loss")
        if not 0 < self.threshold < 1:
            raise UsageError(f"threshold = {self.threshold}; give a share of the loss strictly between 0 and 1")
        if not 0 <= self.top_up <= 1:
            raise UsageError(f"top_up = {self.top_up}; give a share from 0 (never) to 1 (always)")

    @classmethod
    def for_budget(
        cls,
        pruned: float,
        epochs: int,
        *,
        cycle: int | None = None,
        warmup: int | None = None,
        mode: Mode = "both",
        scope: Scope = "batch",
    ) -> Scan:
        """Choose rho so that the run leaves out ``pruned`` of its samples, including warm-up and preparation.

        The warm-up has a fixed number of epochs, because the end of one that depends on the loss cannot be predicted.
        Parameters that are not given are chosen: a warm-up of 2 epochs and cycles of 3 mutation epochs if rho is then
        at most 0.35. Otherwise the warm-up is 1 epoch, or cycles have 2 or 1 mutation epochs: the first combination
        with rho at most 0.35. If there is none, the first with rho at most 0.4; then 0.45; then below 0.5. Losses of
        an untrained model rank rows poorly, so a run without warm-up is used only if nothing else reaches the share.

        Candidates are always topped up: as published, up to a tenth of them, and so of the pruning, may be missing.
        Small differences remain: rho is rounded to whole rows of a batch, and a row that is low in one direction and
        high in the other counts once.

        Raises:
            UsageError: The share cannot be reached; states the limit, and how to raise it.
        """
        ways = [
            cls(rho=0.25, cycle=c, warmup=w, mode=mode, scope=scope, top_up=1.0)
            for c in ((3, 2, 1) if cycle is None else (cycle,))
            for w in (range(_FEWEST, -1, -1) if warmup is None else (warmup,))
        ]
        reach = [0.5 * way.expected_pruned(epochs) / way.rho for way in ways]
        shorter = "" if warmup is None else f", or use a warm-up of fewer than {warmup}"
        more = "" if mode == "both" else ", or prune both sides"
        check_budget(pruned, epochs, max(reach), f"rho stays below 0.5; train for more epochs{shorter}{more}")
        reaching = [
            replace(way, rho=0.5 * pruned / most) for way, most in zip(ways, reach, strict=True) if pruned < most
        ]
        return min(reaching, key=lambda way: (way.warmup == 0, _above(way.rho)))  # the first of equals

    def ledger(self, rows: int) -> Ledger:
        """Return a ledger; with scope "epoch" it keeps the losses of both directions."""
        return Ledger(rows, directions=2 if self.scope == "epoch" else 1)

    def plan(self, ledger: Ledger, epoch: int, rng: np.random.Generator) -> Plan:
        """Keep all rows, or leave out a new random sample of the candidates of the cycle, rounded down."""
        start = self._start(ledger)
        if start is None or epoch < start:
            return Plan(epoch=epoch, phase="warm-up", total=len(ledger))
        e = (epoch - start) % (self.cycle + 1)
        if e == 0:
            return Plan(epoch=epoch, phase="preparation", total=len(ledger), collects=self.scope == "batch")
        candidates_N = ledger.candidates(epoch - e, REDUNDANT | ILL_MATCHED)
        kept_N = draw(candidates_N, whole(self.share(e) * np.count_nonzero(candidates_N)), rng)
        np.logical_not(kept_N, out=kept_N)
        return Plan(epoch=epoch, phase="mutation", total=len(ledger), kept_N=kept_N)

    def marks(self, losses_BR: Losses, rng: np.random.Generator) -> Marks:
        """Mark redundant and ill-matched rows among the rows of a batch."""
        rows = len(losses_BR)
        marks_B = np.zeros(rows, np.uint8)
        for side in SIDES[self.mode]:
            marks_B |= self._side(losses_BR, whole(self.rho * rows), side, rng) * np.uint8(side)
        return marks_B

    def finish(self, ledger: Ledger, plan: Plan, rng: np.random.Generator) -> Marks | None:
        """With scope "epoch", mark the candidates among all rows seen in a preparation epoch."""
        if self.scope == "batch" or plan.phase != "preparation":
            return None
        seen_N = ledger.seen_N == plan.epoch
        if seen_N.all():
            return self.marks(ledger.losses_NR, rng)
        marks_N = np.zeros(len(ledger), np.uint8)
        marks_N[seen_N] = self.marks(ledger.losses_NR[seen_N], rng)
        return marks_N

    def share(self, e: int) -> float:
        """Return the share of the candidates left out in epoch ``e`` of a cycle; 0 for the preparation epoch."""
        return 0.0 if e == 0 else growing(e, self.cycle)

    def forecast(self, epoch: int) -> float:
        """Return the share expected to be left out; assumes the shortest warm-up if it depends on the loss."""
        start = _FEWEST if self.warmup is None else self.warmup
        return len(SIDES[self.mode]) * self.rho * self.share(max(epoch - start, 0) % (self.cycle + 1))

    def _start(self, ledger: Ledger) -> int | None:
        """Return the first preparation epoch; None during a warm-up whose end is not known yet."""
        if self.warmup is not None:
            return self.warmup
        losses_E = ledger.epoch_losses()
        # Losses may be negative: those of DRRho are, once they are learned.
        slow = np.flatnonzero(losses_E[:-1] - losses_E[1:] < self.threshold * np.abs(losses_E[:-1]))
        return int(slow[0]) + 2 if len(slow) else None

    def _side(self, losses_BR: Losses, k: int, side: int, rng: np.random.Generator) -> Bools:
        chosen = [lowest(loss_B, k) if side == REDUNDANT else lowest(-loss_B[::-1], k)[::-1] for loss_B in losses_BR.T]
        both_B: Bools = np.logical_and.reduce(chosen)
        missing = k - int(np.count_nonzero(both_B))
        if k - missing < self.top_up * k:
            both_B |= draw(np.logical_or.reduce(chosen) & ~both_B, missing, rng)
        return both_B
