"""Train on a selection made before training: the same rows in every epoch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, NoReturn

import numpy as np
import numpy.typing as npt

from thresher.dynamic.ledger import Ledger
from thresher.dynamic.policy import Plan, Policy
from thresher.dynamic.registry import policy
from thresher.errors import UsageError


@policy("static")
@dataclass(frozen=True, kw_only=True, eq=False)
class Static(Policy):
    """Train on a selection made before training: the same rows in every epoch, repeats as repeats or as weights.

    With ``weigh`` a row that the selection has c times is used once and its loss is multiplied by c. Over an epoch the
    gradients have the same sum, except for the effect of the other rows in a batch, in fewer steps.

    Attributes:
        times_N: (N,) how often each row is used: a boolean mask, or integers.
        weigh: Multiply losses by weights instead of repeating rows.
    """

    needs_selection: ClassVar[bool] = True

    times_N: npt.NDArray[Any] = field(metadata={"option": False})
    weigh: bool = field(default=False, metadata={"help": "use repeats as weights of the loss"})

    def __post_init__(self) -> None:
        """Validate the parameters."""
        times_N = np.asarray(self.times_N)
        if times_N.ndim != 1 or times_N.dtype.kind not in "biu":
            raise UsageError(
                f"times of shape {times_N.shape} and type {times_N.dtype}; give booleans or integers, (N,)"
            )
        if not times_N.any():
            raise UsageError("no row is kept; keep at least one")
        if times_N.min() < 0 or times_N.max() > np.iinfo(np.int32).max:
            raise UsageError(f"rows used {times_N.min()} to {times_N.max()} times; give 0 or more, below 2^31")

    @classmethod
    def for_selection(cls, times_N: npt.NDArray[Any], *, weigh: bool = False) -> Static:
        """Train on the rows of a selection, as often as it has them."""
        return cls(times_N=times_N if np.max(times_N) > 1 else np.asarray(times_N, np.bool_), weigh=weigh)

    @classmethod
    def for_budget(cls, pruned: float, epochs: int, *args: Any, **options: Any) -> NoReturn:
        """Raise UsageError: the selection decides what is left out."""
        raise UsageError(
            "policy static leaves out what the selection leaves out, not a share; for a share use a policy such as scan"
        )

    @classmethod
    def of_rows(cls, rows_M: npt.ArrayLike, total: int, *, weigh: bool = False) -> Static:
        """Train on the rows with these ids, out of ``total``; an id listed several times is used as often.

        Raises:
            UsageError: The ids are not a list of integers, or not in 0 .. total - 1.
        """
        rows = np.asarray(rows_M)
        if rows.ndim != 1 or rows.dtype.kind not in "iu" or len(rows) == 0:
            raise UsageError(f"row ids of shape {rows.shape} and type {rows.dtype}; give a list of integers")
        if rows.min() < 0 or rows.max() >= total:
            raise UsageError(f"row ids {rows.min():,} to {rows.max():,}; there are rows 0 to {total - 1:,}")
        return cls(times_N=np.bincount(rows, minlength=total).astype(np.int32), weigh=weigh)

    def plan(self, ledger: Ledger, epoch: int, rng: np.random.Generator) -> Plan:
        """Keep the rows of the selection."""
        if len(self.times_N) != len(ledger):
            raise UsageError(
                f"the selection has {len(self.times_N):,} rows, but the dataset has {len(ledger):,}; give a selection "
                "of this dataset"
            )
        kept_N = self.times_N > 0
        repeats = self.times_N.dtype.kind != "b" and self.times_N.max() > 1
        return Plan(
            epoch=epoch,
            phase="pruned",
            total=len(ledger),
            kept_N=kept_N,
            weights_N=self.times_N.astype(np.float32) if repeats and self.weigh else None,
            repeats_N=self.times_N.astype(np.int32) if repeats and not self.weigh else None,
        )

    def weighs(self) -> bool:
        """Return whether losses are multiplied by weights."""
        return self.weigh

    def forecast(self, epoch: int) -> float:
        """Return the share left out, the same in every epoch; negative if repeats make epochs longer."""
        samples = np.count_nonzero(self.times_N) if self.weigh else self.times_N.sum(dtype=np.int64)
        return 1 - float(samples) / len(self.times_N)
