"""DISSect: keep the pairs whose score fell against their own history; a wrong pair is learned late.

Published as "Differential-informed Sample Selection Accelerates Multimodal Contrastive Learning" (arXiv 2507.12998,
ICCV 2025). A right pair is learned early and its score then stays; a wrong one is memorised late, so its score still
rises. With the score now s and the score in the past h, the rows with the highest gap are kept:

- history "warm-up" (the released default): h is the score at the end of the warm-up, a quarter of the run as published,
  and gap = (h - mean h) - (s - mean s);
- history "momentum": h <- 0.9 h + 0.1 s, and gap = h - s.

Differences from the paper and its code: they score every pair of a batch with an extra forward pass, choose within the
batch, and use the cosine similarity. Here the score is the negative of the last recorded loss, so nothing is computed
in addition, and rows are chosen for the whole epoch: after an epoch on all rows, for the ``cycle`` epochs that follow.
The warm-up is on all rows, not on a random part. Means of batches become those of all rows, which do not change the
order. The gap in losses is now - past: the rows whose loss fell most are left out.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import numpy as np

from thresher.dynamic.ledger import LEFT_OUT, Ledger, Losses, Marks
from thresher.dynamic.pick import lowest, whole
from thresher.dynamic.policy import PRUNE, Plan, Policy, share_for
from thresher.dynamic.registry import policy
from thresher.errors import UsageError
from thresher.runtime.parameters import Share

History = Literal["warm-up", "momentum"]


@policy("dissect")
@dataclass(frozen=True, kw_only=True)
class Dissect(Policy):
    """Keep the pairs whose loss has risen most, or fallen least, against their own history.

    Attributes:
        keep: Share of the rows to keep after the warm-up.
        history: What a row's loss is compared with: its loss at the end of the warm-up, or a moving mean.
        momentum: With "momentum", the weight of the past in the moving mean.
        cycle: Epochs that leave rows out, between two on all rows.
        warmup: Epochs on all rows before the first that leaves rows out, at least 1.
    """

    marks_candidates: ClassVar[bool] = True

    keep: Share = field(default=1 - PRUNE, metadata={"help": "share of an epoch to keep", "follows": True})
    history: History = field(default="warm-up", metadata={"help": "what a loss is compared with"})
    momentum: float = field(default=0.9, metadata={"option": False})
    cycle: int = field(
        default=3, metadata={"help": "epochs that leave rows out (mutation) after one on all rows", "least": 1}
    )
    warmup: int = field(
        default=2,
        metadata={
            "help": "epochs on all rows before pruning",
            "flag": "full-epochs",
            "least": 1,
            "usual": "a quarter of the run",
        },
    )

    def __post_init__(self) -> None:
        """Validate the parameters."""
        if not 0 < self.keep < 1:
            raise UsageError(f"keep = {self.keep}; give a share strictly between 0 and 1, like 0.7")
        if not 0 <= self.momentum < 1:
            raise UsageError(f"momentum = {self.momentum}; give the weight of the past, from 0 and below 1")
        if self.cycle < 1 or self.warmup < 1:
            raise UsageError(f"cycle = {self.cycle}, warmup = {self.warmup}; give 1 epoch or more for each")

    @classmethod
    def for_run(cls, epochs: int, **options: Any) -> Dissect:
        """Warm up for a quarter of the run, as published, and keep 70% of the rows by default."""
        return cls(**{"warmup": max(1, epochs // 4), **options})

    @classmethod
    def for_budget(
        cls, pruned: float, epochs: int, *, history: History = "warm-up", cycle: int = 3, warmup: int | None = None
    ) -> Dissect:
        """Choose ``keep`` so that the run leaves out ``pruned`` of its samples, including the epochs on all rows."""
        warmup = max(1, epochs // 4) if warmup is None else warmup
        half = cls(keep=0.5, history=history, cycle=cycle, warmup=warmup)
        return replace(half, keep=1 - share_for(pruned, epochs, half))

    def ledger(self, rows: int) -> Ledger:
        """Return a ledger with a memory: the past loss of each row."""
        return Ledger(rows, memory=True)

    def plan(self, ledger: Ledger, epoch: int, rng: np.random.Generator) -> Plan:
        """Keep all rows, or those that the last epoch on all rows chose."""
        if epoch < self.warmup:
            return Plan(epoch=epoch, phase="warm-up", total=len(ledger))
        e = (epoch - self.warmup) % (self.cycle + 1)
        if e == 0:
            return Plan(epoch=epoch, phase="preparation", total=len(ledger))
        return Plan(epoch=epoch, phase="pruned", total=len(ledger), kept_N=~ledger.candidates(epoch - e, LEFT_OUT))

    def remember(self, ledger: Ledger, plan: Plan) -> Losses | None:
        """Record the past losses: in the warm-up, and, with "momentum", after every epoch on all rows."""
        if plan.kept_N is not None:
            return None
        past_N, loss_N = _past(ledger).copy(), ledger.loss_N
        now_N = ledger.seen_N == plan.epoch
        new_N = now_N & np.isnan(past_N)
        past_N[new_N] = loss_N[new_N]
        if self.history == "warm-up":
            again_N = now_N if plan.phase == "warm-up" else np.zeros(len(ledger), np.bool_)
            past_N[again_N] = loss_N[again_N]
        else:
            again_N = now_N & ~new_N
            past_N[again_N] = self.momentum * past_N[again_N] + (1 - self.momentum) * loss_N[again_N]
        return past_N

    def finish(self, ledger: Ledger, plan: Plan, rng: np.random.Generator) -> Marks | None:
        """After an epoch on all rows, mark the rows to leave out until the next; they rank a coreset too."""
        if plan.phase != "preparation":
            return None
        # The moving mean has moved towards the loss already, which scales all gaps, so that their order is the same.
        gaps_N = ledger.loss_N - _past(ledger)
        keep = max(1, whole(self.keep * len(ledger)))
        kept_N = lowest(np.nan_to_num(-gaps_N, nan=-np.inf), keep)  # rows that were never seen first
        return np.where(kept_N, np.uint8(0), np.uint8(LEFT_OUT))

    def forecast(self, epoch: int) -> float:
        """Return the share left out; 0 in epochs on all rows."""
        pruned = epoch >= self.warmup and (epoch - self.warmup) % (self.cycle + 1)
        return 1 - self.keep if pruned else 0.0


def _past(ledger: Ledger) -> Losses:
    if ledger.memory_N is None:
        raise UsageError("this ledger has no past losses; create it with Dissect(...).ledger(rows)")
    return ledger.memory_N
