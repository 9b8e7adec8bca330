"""Sift: leave out the pairs whose loss ranks high in epoch after epoch, which are probably mismatched.

A pair with a wrong caption is learned late: its loss ranks high in every epoch, while the rank of a right one changes.
This is ours; it is related to small-loss selection and to learning with noisy correspondence, such as NCR (NeurIPS
2021).

1. Memory: after every epoch on all rows, memory <- (memory + rank) / 2, where the rank is the share of the rows of the
   epoch with a lower loss. The first rank is the first memory. A row that the epoch did not have keeps its memory.
2. After ``warmup`` epochs on all rows, the rows with the highest memory are left out for ``cycle`` epochs. Then an
   epoch on all rows updates the memory, and so on.
3. How many: ``mismatched``, or as many as the data show. Wrong captions form a second hump at the upper end of the
   memory; a mixture of two normal distributions gives where it begins (:mod:`thresher.ops.humps`). If there is
   no second hump, or it has more than 60% of the rows, nothing is left out, and the next epoch, on all rows, tries
   again.
4. ``redundant`` adds SCAN's other side: of this share of the rows, those with the lowest loss in the last epoch on all
   rows, a growing random part is left out too. If the data show how many are mismatched, these are at most half of
   the others.

The humps are those of any two kinds of pairs of which one has higher losses: mismatched pairs, but also, for example,
captions in a rare language. Look at them before you leave them out for good.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np

from thresher.dynamic.ledger import ILL_MATCHED, REDUNDANT, Ledger, Losses, Marks
from thresher.dynamic.mismatch import mismatched_humps
from thresher.dynamic.pick import draw, growing, lowest, ranks, whole
from thresher.dynamic.policy import Plan, Policy, share_for
from thresher.dynamic.registry import policy
from thresher.errors import UsageError
from thresher.runtime.parameters import Share

_MOST_REDUNDANT = 0.4


@policy("sift")
@dataclass(frozen=True, kw_only=True)
class Sift(Policy):
    """Leave out the pairs whose loss ranks high in epoch after epoch, which are probably mismatched.

    Attributes:
        mismatched: Share of the rows to leave out as mismatched; None for as many as the losses show.
        redundant: Share of the rows, those with the lowest losses, that are candidates for pruning too; None for 0.
        cycle: Epochs that leave rows out, between two on all rows.
        warmup: Epochs on all rows before the first choice, at least 1.
    """

    marks_candidates: ClassVar[bool] = True
    memory_of_mismatch: ClassVar[bool] = True

    mismatched: Share | None = field(
        default=None,
        metadata={
            "help": "share of rows to leave out as mismatched; found from the losses if not given",
            "follows": True,
        },
    )
    redundant: Share | None = field(
        default=None, metadata={"help": "share of rows to mark as redundant too", "follows": True}
    )
    cycle: int = field(
        default=3, metadata={"help": "epochs that leave rows out (mutation) after one on all rows", "least": 1}
    )
    warmup: int = field(
        default=2, metadata={"help": "epochs on all rows before pruning", "flag": "full-epochs", "least": 1}
    )

    def __post_init__(self) -> None:
        """Validate the parameters."""
        for name in ("mismatched", "redundant"):
            share = getattr(self, name)
            if share is not None and not 0 < share < 1:
                raise UsageError(f"{name} = {share}; give a share strictly between 0 and 1, like 0.3")
        if self._mismatched + self._redundant >= 1 or self._redundant > _MOST_REDUNDANT:
            raise UsageError(
                f"mismatched = {self.mismatched}, redundant = {self.redundant}; give less than 1 in total, and at most "
                f"{_MOST_REDUNDANT} for redundant: rows must be left"
            )
        if self.cycle < 1 or self.warmup < 1:
            raise UsageError(f"cycle = {self.cycle}, warmup = {self.warmup}; give 1 epoch or more for each")

    @classmethod
    def for_budget(cls, pruned: float, epochs: int, *, cycle: int = 3, warmup: int = 2) -> Sift:
        """Choose ``mismatched`` so that the run leaves out ``pruned`` of its samples, including the full epochs."""
        half = cls(mismatched=0.5, cycle=cycle, warmup=warmup)
        return replace(half, mismatched=share_for(pruned, epochs, half))

    def ledger(self, rows: int) -> Ledger:
        """Return a ledger with a memory."""
        return Ledger(rows, memory=True)

    def plan(self, ledger: Ledger, epoch: int, rng: np.random.Generator) -> Plan:
        """Keep all rows, or leave out those that the last epoch on all rows marked."""
        if epoch < self.warmup:
            return Plan(epoch=epoch, phase="warm-up", total=len(ledger))
        e = (epoch - self.warmup) % (self.cycle + 1)
        if e == self.cycle:
            return Plan(epoch=epoch, phase="preparation", total=len(ledger))
        marked = int(ledger.marked_N.max())
        if marked < epoch - e - 1:  # that epoch, and those since, found nothing
            return Plan(epoch=epoch, phase="everything", total=len(ledger))
        left_out_N = ledger.candidates(marked, REDUNDANT)
        left_out_N = draw(left_out_N, whole(growing(e + 1, self.cycle) * np.count_nonzero(left_out_N)), rng)
        left_out_N |= ledger.candidates(marked, ILL_MATCHED)
        return Plan(epoch=epoch, phase="mutation", total=len(ledger), kept_N=~left_out_N)

    def remember(self, ledger: Ledger, plan: Plan) -> Losses | None:
        """After an epoch on all rows, move the memory halfway to the ranks of the losses."""
        if plan.kept_N is not None:
            return None
        memory_N, seen_N = _memory(ledger).copy(), ledger.seen_N == plan.epoch
        ranks_M, before_M = ranks(ledger.loss_N[seen_N]), memory_N[seen_N]
        memory_N[seen_N] = np.where(np.isnan(before_M), ranks_M, (before_M + ranks_M) / 2)
        return memory_N

    def finish(self, ledger: Ledger, plan: Plan, rng: np.random.Generator) -> Marks | None:
        """After an epoch on all rows, mark the rows with the highest memory, and those with the lowest losses."""
        if plan.kept_N is not None or plan.epoch < self.warmup - 1:
            return None
        memory_N = _memory(ledger)
        if self.mismatched is not None:
            scores_N = np.nan_to_num(-memory_N, nan=np.inf)  # rows that were never seen last
            wrong_N = lowest(scores_N, whole(self.mismatched * len(ledger))) & (scores_N < np.inf)
        else:
            found = mismatched_humps(memory_N)
            wrong_N = np.zeros(len(ledger), np.bool_) if found is None else memory_N >= found.cut
        marks_N = wrong_N * np.uint8(ILL_MATCHED)
        if self.redundant is not None:
            losses_N = np.where(wrong_N | (ledger.seen_N < 0), np.inf, ledger.loss_N)
            count = whole(self.redundant * len(ledger))
            if self.mismatched is None:  # else they could be all the rest
                count = min(count, int(np.count_nonzero(~wrong_N)) // 2)
            chosen_N = lowest(losses_N, count) & (losses_N < np.inf)
            marks_N |= chosen_N * np.uint8(REDUNDANT)
        return marks_N

    def forecast(self, epoch: int) -> float:
        """Return the share expected to be left out; nothing as mismatched if that depends on the losses."""
        e = (epoch - self.warmup) % (self.cycle + 1)
        if epoch < self.warmup or e == self.cycle:
            return 0.0
        return self._mismatched + self._redundant * growing(e + 1, self.cycle)

    @property
    def _mismatched(self) -> float:
        return self.mismatched or 0.0

    @property
    def _redundant(self) -> float:
        return self.redundant or 0.0


def _memory(ledger: Ledger) -> Losses:
    if ledger.memory_N is None:
        raise UsageError("this ledger has no memory; create it with Sift(...).ledger(rows)")
    return ledger.memory_N
