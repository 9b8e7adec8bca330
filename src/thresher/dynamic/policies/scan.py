"""SCAN: prune the pairs training has no more use for, and those it cannot use yet, a little more each epoch.

Published as "SCAN: Bootstrapping Contrastive Pre-training for Data Efficiency" (arXiv 2411.09126, ICCV 2025).

1. Warm-up: everything, until the epoch loss stops falling fast: (previous - current) / previous < threshold.
2. Then cycles of T + 1 epochs. The first (preparation) trains on everything and collects candidates: per
   direction of the loss, the rho lowest losses of a batch are redundant and the rho highest ill-matched; the
   directions are intersected, and topped up at random from the rest of their union to the size of one
   direction where fewer than 0.9 of that are left.
3. Epoch e = 1 .. T of a cycle (mutation) leaves out a fresh random share 0.5 * (1 + cos(pi * (T - e) / T)) of
   the candidates: 0.25, 0.75, 1 for T = 3. The mean over a cycle is one half for every T.

Where we differ from the released code: the modes "redundant" and "ill-matched" take effect; rows have integer
ids; equal losses go to the lower row as redundant and to the higher as ill-matched, so that the two do not meet
in one direction; a rho too small for one row of a batch marks none, not all; the candidates may also be ranked
over the whole preparation epoch at once (scope "epoch"), which does not depend on the size of a batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, get_args

import numpy as np

from thresher.dynamic.ledger import ILL_MATCHED, REDUNDANT, Ledger, Losses, Marks
from thresher.dynamic.pick import Bools, draw, lowest, whole
from thresher.dynamic.policy import Plan, Policy, check_budget
from thresher.errors import UsageError, suggest
from thresher.runtime.parameters import Share

Mode = Literal["both", "redundant", "ill-matched"]
Scope = Literal["batch", "epoch"]
SIDES = {"both": (REDUNDANT, ILL_MATCHED), "redundant": (REDUNDANT,), "ill-matched": (ILL_MATCHED,)}
SCOPES: tuple[Scope, ...] = get_args(Scope)

_FEWEST = 2  # epochs the threshold can take: it compares two
_USUAL = 0.35  # the rho up to which for_budget keeps to its first choice


def _above(rho: float) -> int:
    """Return how far rho is above the usual, in steps of 0.05: what is in the same step is as good."""
    return max(0, math.ceil((rho - _USUAL) / 0.05 - 1e-9))


@dataclass(frozen=True, kw_only=True)
class Scan(Policy):
    """Leave out a growing share of the pairs with the lowest and the highest losses, in cycles.

    Attributes:
        rho: Share of the rows that are candidates on each side; above 0 and at most 0.5, below it with both sides.
        cycle: T, the mutation epochs of a cycle; one of preparation comes before.
        warmup: Epochs on everything before the first cycle; None to watch the loss.
        threshold: With ``warmup=None``, the warm-up is over after the first epoch whose mean loss is lower than
            the one before by less than this share.
        mode: Which sides are pruned.
        scope: What losses are ranked within.
        top_up: Share of the rho rows below which the intersection of the directions is topped up; 1 always.
    """

    name: ClassVar[str] = "scan"
    marks_candidates: ClassVar[bool] = True

    rho: Share = field(default=0.3, metadata={"help": "share of candidates a side", "follows": True})
    cycle: int = field(default=3, metadata={"help": "mutation epochs of a cycle", "least": 1})
    warmup: int | None = field(
        default=None, metadata={"help": "epochs on everything at first", "flag": "full-epochs", "least": 0}
    )
    threshold: Share = field(default=0.3, metadata={"help": "fall of the loss that ends the warm-up", "follows": True})
    mode: Mode = field(default="both", metadata={"help": "which candidates"})
    scope: Scope = field(default="batch", metadata={"help": "what losses are ranked within"})
    top_up: float = field(default=0.9, metadata={"option": False})

    def __post_init__(self) -> None:
        """Refuse what cannot be carried out."""
        if self.mode not in SIDES:
            raise UsageError(f"mode = {self.mode!r}; give one of {', '.join(SIDES)}.{suggest(self.mode, SIDES)}")
        if self.scope not in SCOPES:
            raise UsageError(f"scope = {self.scope!r}; give one of {', '.join(SCOPES)}.{suggest(self.scope, SCOPES)}")
        if not 0 < self.rho <= 0.5 or (self.rho == 0.5 and self.mode == "both"):
            raise UsageError(
                f"rho = {self.rho}; give a share per side above 0 and at most 0.5, and below 0.5 for both sides: "
                "the last epoch of a cycle would have no rows"
            )
        if self.cycle < 1:
            raise UsageError(f"cycle = {self.cycle}; give 1 mutation epoch or more")
        if self.warmup is not None and self.warmup < 0:
            raise UsageError(f"warmup = {self.warmup}; give 0 epochs or more, or None to watch the loss")
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
        """Choose rho so that ``pruned`` of the samples of the run are left out, warm-up and preparation included.

        The warm-up is a number of epochs, as the end of one that watches the loss cannot be foreseen. As far as these
        are not given, it is 2, with cycles of 3 mutation epochs, where rho is at most 0.35 so. Elsewhere it is 1, or
        cycles are of 2 or 1: the first of these ways that keeps rho so low. If none does, the first with rho at most
        0.4; then 0.45; then below 0.5. Candidates that an untrained net ranks mean little, so a run without warm-up
        comes after all of these: only where no other reaches the share.

        The intersection is always topped up: as published, up to a tenth of the candidates, and so of the pruning, may
        be missing. What remains is the rounding of rho to whole rows of a batch, and rows that one direction puts on
        the low side and the other on the high side, which count once.

        Raises:
            UsageError: The share cannot be reached; says what can be, and how.
        """
        ways = [
            cls(rho=0.25, cycle=c, warmup=w, mode=mode, scope=scope, top_up=1.0)
            for c in ((3, 2, 1) if cycle is None else (cycle,))
            for w in (range(_FEWEST, -1, -1) if warmup is None else (warmup,))
        ]
        reach = [0.5 * way.expected_pruned(epochs) / way.rho for way in ways]
        shorter = "" if warmup is None else f", or warm up for fewer than {warmup}"
        more = "" if mode == "both" else ", or prune both sides"
        check_budget(pruned, epochs, max(reach), f"rho stays below 0.5; train for more epochs{shorter}{more}")
        reaching = [
            replace(way, rho=0.5 * pruned / most) for way, most in zip(ways, reach, strict=True) if pruned < most
        ]
        return min(reaching, key=lambda way: (way.warmup == 0, _above(way.rho)))  # the first of equals

    def ledger(self, rows: int) -> Ledger:
        """Return a ledger; one that keeps both directions where they are ranked after the epoch."""
        return Ledger(rows, directions=2 if self.scope == "epoch" else 1)

    def plan(self, ledger: Ledger, epoch: int, rng: np.random.Generator) -> Plan:
        """Train on everything, or leave out a fresh sample of the candidates of the cycle, rounded down."""
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
        """Mark the redundant and the ill-matched of the rows given."""
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
        """Return the share of the candidates left out in epoch ``e`` of a cycle, 0 for the preparation."""
        return 0.0 if e == 0 else 0.5 * (1 + math.cos(math.pi * (self.cycle - e) / self.cycle))

    def forecast(self, epoch: int) -> float:
        """Return the share expected to be left out; a warm-up that watches the loss is reckoned at its shortest."""
        start = _FEWEST if self.warmup is None else self.warmup
        return len(SIDES[self.mode]) * self.rho * self.share(max(epoch - start, 0) % (self.cycle + 1))

    def _start(self, ledger: Ledger) -> int | None:
        """Return the first preparation epoch, None while the loss falls fast."""
        if self.warmup is not None:
            return self.warmup
        losses_E = ledger.epoch_losses()
        slow = np.flatnonzero(losses_E[:-1] - losses_E[1:] < self.threshold * losses_E[:-1])
        return int(slow[0]) + 2 if len(slow) else None

    def _side(self, losses_BR: Losses, k: int, side: int, rng: np.random.Generator) -> Bools:
        chosen = [lowest(loss_B, k) if side == REDUNDANT else lowest(-loss_B[::-1], k)[::-1] for loss_B in losses_BR.T]
        both_B: Bools = np.logical_and.reduce(chosen)
        missing = k - int(np.count_nonzero(both_B))
        if k - missing < self.top_up * k:
            both_B |= draw(np.logical_or.reduce(chosen) & ~both_B, missing, rng)
        return both_B
