"""Which pairs a run found mismatched: those whose loss ranks high in epoch after epoch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from thresher.dynamic.ledger import Ledger
from thresher.dynamic.registry import POLICIES
from thresher.ops.humps import Humps, humps

_MOST = 0.6  # an upper hump with more of the rows is the data, not their errors


def mismatched_humps(memory_N: npt.NDArray[np.float32]) -> Humps | None:
    """Return the humps of the ranks if the upper one is that of mismatched pairs; None if there is no such hump.

    Args:
        memory_N: (N,) mean rank of each row's loss, 0 to 1; NaN where unknown.
    """
    found = humps(memory_N)
    return found if found is not None and found.share <= _MOST else None


def looks_for_mismatch(policy: str) -> bool:
    """Return whether the policy of this name keeps ranks of the losses, by which mismatched pairs are found."""
    known = POLICIES.all().get(policy)
    return known is not None and known.memory_of_mismatch


@dataclass(frozen=True, eq=False)
class Mismatch:
    """What the ranks of a run's losses say of its rows.

    Attributes:
        ranks_N: (N,) float32, mean rank of the loss: 0 is the lowest loss of all rows, 1 the highest; NaN if unknown.
        found: The two humps of the ranks, or None if they form only one: then nothing says that rows are mismatched.
    """

    ranks_N: npt.NDArray[np.float32]
    found: Humps | None

    @classmethod
    def of(cls, policy: str, ledger: Ledger) -> Mismatch | None:
        """Return what the ledger of a run says; None if its policy does not keep such ranks."""
        if ledger.memory_N is None or not looks_for_mismatch(policy):
            return None
        return cls(ledger.memory_N, mismatched_humps(ledger.memory_N))

    @property
    def wrong_N(self) -> npt.NDArray[np.bool_]:
        """(N,) bool, the rows that are probably mismatched."""
        if self.found is None:
            return np.zeros(len(self.ranks_N), np.bool_)
        return np.asarray(self.ranks_N >= self.found.cut, np.bool_)

    @property
    def chance_N(self) -> npt.NDArray[np.float32]:
        """(N,) float32, the probability that each row is mismatched, by the two humps; 0 without a second hump."""
        if self.found is None:
            return np.zeros(len(self.ranks_N), np.float32)
        return self.found.chance(np.nan_to_num(self.ranks_N, nan=0.0)).astype(np.float32)

    def order(self, ledger: Ledger) -> npt.NDArray[np.int64]:
        """Return the rows from the lowest rank to the highest, (N,); then by loss and row; unknown ranks come last."""
        return np.lexsort((ledger.loss_N, self.ranks_N))  # NaN sorts last
