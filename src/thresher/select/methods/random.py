"""Random subset: the baseline every other method must beat."""

from __future__ import annotations

from dataclasses import dataclass, field

from thresher.ops.cut import top
from thresher.select.registry import method
from thresher.select.run import Run
from thresher.selection import Keep, Selection


@method("random")
@dataclass(frozen=True, kw_only=True)
class Random:
    """Keep a uniformly random subset; with one seed, smaller ones are parts of larger ones."""

    keep: Keep = field(metadata={"help": "share or number of rows to keep"})

    def select(self, run: Run) -> Selection:
        """Keep the rows with the highest random numbers, which are tied to global row ids."""
        ranks = run.random_ranks("random")
        mask = top(ranks, self.keep.of(len(ranks)))
        return run.selection(self, mask, reasons=("not drawn",))
