"""Random subset: the baseline for all other methods."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from thresher.ops.cut import top
from thresher.pruning.registry import method
from thresher.pruning.run import Run
from thresher.selection import Budget, Keep, Selection


@method("random")
@dataclass(frozen=True, kw_only=True)
class Random:
    """Keep a uniformly random subset; with the same seed, a smaller subset is a part of a larger one."""

    name: ClassVar[str]
    only_columns: ClassVar[tuple[str, ...]] = ()

    keep: Budget = field(metadata={"help": "share or number of rows to keep"})

    def select(self, run: Run) -> Selection:
        """Keep the rows with the highest random numbers, which depend on the seed and the row id."""
        ranks = run.random_ranks("random")
        mask = top(ranks, Keep.parse(self.keep).of(len(ranks)))
        return run.selection(self, mask, reasons=("not drawn",))
