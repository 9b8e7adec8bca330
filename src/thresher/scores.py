"""Scores: one number a row, computed or stored, and cut by a budget or a threshold."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from thresher.errors import BadRowsError, UsageError
from thresher.ops.cut import top
from thresher.registry import methods
from thresher.run import Run
from thresher.selection import Keep, Selection

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class Score:
    """One number for every row of a view; higher is better.

    Attributes:
        values_N: (n,) numbers, none of them NaN.
        notes: Where they come from.
    """

    values_N: Array
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Scored:
    """Parameters of every method that gives each row a number and cuts by it.

    A method has ``meaning``, the name of its number in words, and ``score(run) -> Score``; parameters that
    only cut are ``keep`` and ``threshold``.
    """

    name: ClassVar[str]
    meaning: ClassVar[str]

    keep: Keep | None = field(default=None, metadata={"help": "share or number of rows to keep"})
    threshold: float | None = field(default=None, metadata={"help": "keep rows with a score of at least this"})

    def __post_init__(self) -> None:
        """Exactly one of keep and threshold."""
        if (self.keep is None) == (self.threshold is None):
            raise UsageError(f"{self.name} needs either keep (such as 30%) or threshold (such as 0.28)")

    def score(self, run: Run) -> Score:
        """Return every row's number."""
        raise NotImplementedError

    def select(self, run: Run) -> Selection:
        """Cut by the score; equal scores at a budget go to the lower row."""
        found = self.score(run)
        scores = found.values_N
        if self.keep is not None:
            mask = top(scores, self.keep.of(len(scores)))
            cut: float | None = float(scores[mask].min())
            reason = f"{self.meaning} {{score:.4f}} is below the cut at {{cut:.4f}}"
        else:
            mask, cut = scores >= self.threshold, self.threshold
            reason = f"{self.meaning} {{score:.4f}} is below the threshold {{cut}}"
        return run.selection(
            self,
            mask,
            reasons=(reason,),
            score=self.meaning,
            cut=cut,
            notes=found.notes,
            rows={"score": scores.astype(np.float32)},
        )


def scoring_methods() -> dict[str, type[Scored]]:
    """Return the methods that give each row a number, by name."""
    return {name: cls for name, cls in methods().items() if issubclass(cls, Scored)}


def column(run: Run, source: str, why: str) -> Score:
    """Return a column to judge by, wherever it is.

    Args:
        run: Whose rows.
        source: A metadata column of the pool, or the name of a scoring method, which is then computed with
            its defaults.
        why: What needs it, for messages.

    Raises:
        UsageError: No such column; says what there is.
        BadRowsError: A row has no number; names the first.
    """
    known = scoring_methods()
    if source in known and source not in run.store.columns:
        made: Any = known[source]
        found: Score = made(keep=Keep.parse("100%")).score(run)
        return Score(found.values_N, tuple(f"{source}: {note}" for note in found.notes))
    run.store.require([source], why)
    values = run.store.column(source)
    missing = np.flatnonzero(np.isnan(values)) if values.dtype.kind == "f" else np.empty(0, np.int64)
    if len(missing):
        row = int(run.store.ids[missing[0]])
        raise BadRowsError(
            f"{run.store.whereabouts('metadata', row)}: the score column {source!r} is empty or NaN "
            f"({len(missing):,} such rows); filter them out first, with where = 'NOT isnan({source})'"
        )
    return Score(values, (f"taken from the column {source}",))
