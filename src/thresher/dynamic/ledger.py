"""The training history of every row: the only state of dynamic pruning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from thresher.errors import UsageError

Array = npt.NDArray[Any]
Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]
Marks = npt.NDArray[np.uint8]
Losses = npt.NDArray[np.float32]

# Why a row is a candidate for pruning, as bits: a row may have both of the first two (in one direction each).
REDUNDANT = 1
ILL_MATCHED = 2
LEFT_OUT = 4

_ALWAYS = ("losses_NR", "seen_N", "marks_N", "marked_N", "times_N")
_OPTIONAL = ("means_N", "variances_N", "memory_N", "references_N")

MOST_ROWS = 10**9 - 1
LAST_EPOCH = int(np.iinfo(np.int16).max)


class Ledger:
    """The training history of every row, as arrays: 11 bytes per row.

    4 more with both directions, 8 with moments, 4 with a memory, 4 with references.

    Attributes:
        losses_NR: (N, R) float32, the latest loss of each row in each direction; with R = 1 the mean of
            the directions; NaN before a row was seen.
        seen_N: (N,) int16, the epoch in which a row was last trained on, -1 for never.
        marks_N: (N,) uint8, the marks a row got when it was last a candidate (bits: 1 redundant, 2 ill-matched, 4 left
            out).
        marked_N: (N,) int16, the epoch in which a row was last a candidate, -1 for never.
        times_N: (N,) uint16, the number of epochs in which a row was a candidate.
        means_N: (N,) float32, exponential moving mean of the loss, or None without ``decay``.
        variances_N: (N,) float32, exponential moving variance of the loss, or None without ``decay``.
        decay: Weight of the latest loss in these moments.
        memory_N: (N,) float32, what :meth:`Policy.remember` has returned, NaN before a row was seen; or None.
        references_N: (N,) float32, the loss of each row under a reference model, NaN if unknown; or None. It is given
            and does not change.
    """

    def __init__(
        self,
        rows: int,
        *,
        directions: int = 1,
        decay: float | None = None,
        memory: bool = False,
        references: bool = False,
    ) -> None:
        """Create an empty ledger; use :meth:`Policy.ledger` to get what a policy needs.

        Args:
            rows: N, 1 to 10^9 - 1.
            directions: 1 to keep the mean of the directions, 2 to keep both.
            decay: Weight of the latest loss in the moving mean and variance, above 0 and at most 1;
                None to keep neither.
            memory: Whether to keep a memory.
            references: Whether to keep references.

        Raises:
            UsageError: A value is not allowed.
        """
        if not 0 < rows <= MOST_ROWS:
            raise UsageError(f"a ledger of {rows:,} rows; give 1 to {MOST_ROWS:,}")
        if directions not in (1, 2):
            raise UsageError(f"directions = {directions}; give 1 (their mean) or 2")
        if decay is not None and not 0 < decay <= 1:
            raise UsageError(f"decay = {decay}; give the weight of the latest loss, above 0 and at most 1")
        self.decay = decay
        self.losses_NR: Losses = np.full((rows, directions), np.nan, np.float32)
        self.seen_N = np.full(rows, -1, np.int16)
        self.marks_N: Marks = np.zeros(rows, np.uint8)
        self.marked_N = np.full(rows, -1, np.int16)
        self.times_N = np.zeros(rows, np.uint16)
        self.means_N: Losses | None = None if decay is None else np.zeros(rows, np.float32)
        self.variances_N: Losses | None = None if decay is None else np.zeros(rows, np.float32)
        self.memory_N: Losses | None = np.full(rows, np.nan, np.float32) if memory else None
        self.references_N: Losses | None = np.full(rows, np.nan, np.float32) if references else None
        self._sums: list[float] = []
        self._counts: list[int] = []

    def __len__(self) -> int:
        """Return N."""
        return len(self.seen_N)

    @property
    def loss_N(self) -> Losses:
        """(N,) float32, the latest loss of each row, averaged over directions; NaN before it was seen."""
        return self.losses_NR[:, 0] if self.losses_NR.shape[1] == 1 else self.losses_NR.mean(axis=1)

    def epoch_losses(self) -> npt.NDArray[np.float64]:
        """Return the mean loss of every epoch up to the last recorded one, (E,); NaN where nothing was recorded.

        Sums are float64, in the order of recording: the same batches in the same order give identical results.
        """
        counts = np.array(self._counts, np.int64)
        means = np.full(len(counts), np.nan)
        np.divide(np.array(self._sums, np.float64), counts, out=means, where=counts > 0)
        return means

    def record(self, rows_B: npt.ArrayLike, losses_BR: npt.ArrayLike, epoch: int, marks_B: Marks | None = None) -> None:
        """Record the losses of a batch, and its candidates.

        Args:
            rows_B: (B,) row ids, integers. A repeated row counts once, with its last loss.
            losses_BR: (B, R) finite losses per row and direction, R = 1 or 2.
            epoch: The epoch the batch belongs to, 0 to 32,767.
            marks_B: (B,) uint8 from :meth:`Policy.marks`, if the plan has ``collects=True``.

        Raises:
            UsageError: The ledger does not have a row, or losses have another shape or are not finite.
        """
        rows = np.asarray(rows_B)
        losses = np.asarray(losses_BR, np.float32)
        _check_epoch(epoch)
        if rows.ndim != 1 or rows.dtype.kind not in "iu":
            raise UsageError(f"row ids of shape {rows.shape} and type {rows.dtype}; give integers, one per loss")
        if losses.ndim != 2 or len(losses) != len(rows) or losses.shape[1] not in (1, 2):
            raise UsageError(f"losses of shape {losses.shape}; give ({len(rows)}, 1) or ({len(rows)}, 2)")
        if len(rows) == 0:
            return
        if rows.min() < 0 or rows.max() >= len(self):
            raise UsageError(f"row ids {rows.min():,} to {rows.max():,}; the ledger has 0 to {len(self) - 1:,}")
        if not np.isfinite(losses).all():
            i = int(np.flatnonzero(~np.isfinite(losses).all(axis=1))[0])
            raise UsageError(f"the loss of row {int(rows[i]):,} is {losses[i].tolist()}; record finite losses only")
        loss_B = losses.mean(axis=1)
        self.losses_NR[rows] = losses if self.losses_NR.shape[1] == 2 else loss_B[:, None]
        if self.decay is not None and self.means_N is not None and self.variances_N is not None:
            new = self.seen_N[rows] < 0
            step = np.where(new, 0, loss_B - self.means_N[rows])
            self.means_N[rows] = np.where(new, loss_B, self.means_N[rows] + self.decay * step)
            self.variances_N[rows] = (1 - self.decay) * (self.variances_N[rows] + self.decay * step**2)
        self.seen_N[rows] = epoch
        while len(self._sums) <= epoch:
            self._sums.append(0.0)
            self._counts.append(0)
        self._sums[epoch] += float(loss_B.sum(dtype=np.float64))
        self._counts[epoch] += len(rows)
        if marks_B is not None:
            self._mark(rows[marks_B != 0], marks_B[marks_B != 0], epoch)

    def mark(self, marks_N: Marks, epoch: int) -> None:
        """Record the candidates of a whole epoch, (N,) uint8 from :meth:`Policy.finish`."""
        _check_epoch(epoch)
        rows = np.flatnonzero(marks_N)
        self._mark(rows, marks_N[rows], epoch)

    def remember(self, memory_N: Losses) -> None:
        """Replace the memory, (N,) float32 from :meth:`Policy.remember`.

        Raises:
            UsageError: The ledger has none, or the array has another shape or type.
        """
        if self.memory_N is None or (memory_N.shape, memory_N.dtype) != (self.memory_N.shape, np.dtype(np.float32)):
            raise UsageError(
                f"a memory of shape {memory_N.shape} and type {memory_N.dtype}; give ({len(self)},) float32, for a "
                "ledger that was created with memory=True"
            )
        self.memory_N = memory_N

    def refer(self, references_N: npt.NDArray[Any]) -> None:
        """Set the references: (N,) losses of the rows under a reference model, NaN if unknown.

        Raises:
            UsageError: The ledger keeps none, they have another shape or type, or none is finite.
        """
        if self.references_N is None or references_N.shape != (len(self),) or references_N.dtype.kind not in "fiu":
            raise UsageError(
                f"references of shape {references_N.shape} and type {references_N.dtype}; give ({len(self)},) numbers, "
                "for a ledger that was created with references=True"
            )
        finite_N = np.isfinite(references_N)
        if not finite_N.any():
            raise UsageError("no row has a finite reference loss; give at least one")
        self.references_N = np.where(finite_N, references_N, np.nan).astype(np.float32)

    def _mark(self, rows_M: Ints, marks_M: Marks, epoch: int) -> None:
        again = self.marked_N[rows_M] == epoch
        self.marks_N[rows_M] = np.where(again, self.marks_N[rows_M] | marks_M, marks_M)
        self.times_N[rows_M] += ~again
        self.marked_N[rows_M] = epoch

    def candidates(self, epoch: int, bits: int) -> Bools:
        """Return the rows that were last marked in ``epoch``, with any of ``bits``; (N,) bool."""
        found_N: Bools = self.marks_N & np.uint8(bits) != 0
        found_N &= self.marked_N == epoch
        return found_N

    def grown(self, rows: int, at_N: Ints) -> Ledger:
        """Return a larger ledger of ``rows`` rows: row i of this one becomes row ``at_N[i]``, the others are unseen."""
        ledger = Ledger(
            rows,
            directions=self.losses_NR.shape[1],
            decay=self.decay,
            memory=self.memory_N is not None,
            references=self.references_N is not None,
        )
        for name in (*_ALWAYS, *_OPTIONAL):
            array = getattr(self, name)
            if array is not None:
                getattr(ledger, name)[at_N] = array
        ledger._sums, ledger._counts = list(self._sums), list(self._counts)
        return ledger

    def state(self) -> dict[str, Array]:
        """Return copies of all arrays, for a checkpoint."""
        arrays: dict[str, Array | None] = {
            "losses": self.losses_NR,
            "seen": self.seen_N,
            "marks": self.marks_N,
            "marked": self.marked_N,
            "times": self.times_N,
            "means": self.means_N,
            "variances": self.variances_N,
            "memory": self.memory_N,
            "references": self.references_N,
            "decay": None if self.decay is None else np.array(self.decay, np.float64),
            "epoch_sums": np.array(self._sums, np.float64),
            "epoch_counts": np.array(self._counts, np.int64),
        }
        return {name: array.copy() for name, array in arrays.items() if array is not None}

    @classmethod
    def from_state(cls, state: Mapping[str, Array]) -> Ledger:
        """Restore a ledger from :meth:`state`, also of an earlier version, which has neither memory nor references.

        Raises:
            UsageError: Arrays are missing, or have shapes or types that a ledger does not have.
        """
        if "losses" not in state or np.ndim(state["losses"]) != 2:
            raise UsageError("not the state of a ledger: it has no losses of shape (rows, directions)")
        rows, directions = state["losses"].shape
        decay = state.get("decay")
        if decay is not None and (np.shape(decay) or np.asarray(decay).dtype != np.float64):
            raise UsageError("not the state of a ledger: decay is not a number")
        ledger = cls(
            rows,
            directions=directions,
            decay=None if decay is None else float(decay),
            memory="memory" in state,
            references="references" in state,
        )
        for name, like in ledger.state().items():
            if name not in state:
                raise UsageError(f"not the state of a ledger: {name} is missing")
            array = np.asarray(state[name])
            if name in ("epoch_sums", "epoch_counts"):  # as long as the run, and each other
                like = np.empty(np.size(state["epoch_sums"]), like.dtype)
            if array.dtype != like.dtype or array.shape != like.shape:
                raise UsageError(
                    f"not the state of a ledger: {name} is {array.dtype} {array.shape}, not {like.dtype} {like.shape}"
                )
        epochs, marks, counts = (-1, LAST_EPOCH), (0, REDUNDANT | ILL_MATCHED | LEFT_OUT), (0, 2**62)
        limits = {"seen": epochs, "marked": epochs, "marks": marks, "epoch_counts": counts}
        for name, (low, high) in limits.items():
            least, most = int(state[name].min(initial=0)), int(state[name].max(initial=0))
            if least < low or most > high:
                raise UsageError(f"not the state of a ledger: {name} has values from {least:,} to {most:,}")
        for name in ("memory", "references"):
            if name in state and np.isinf(state[name]).any():
                raise UsageError(f"not the state of a ledger: {name} has infinite values")
        for name in (*_ALWAYS, *_OPTIONAL):
            if getattr(ledger, name) is not None:
                setattr(ledger, name, np.array(state[name.rpartition("_")[0]]))
        ledger._sums = state["epoch_sums"].tolist()
        ledger._counts = state["epoch_counts"].tolist()
        return ledger


def coreset_ranks(ledger: Ledger) -> Ints:
    """Rank rows for a coreset: 0 is the row to keep first, the highest ranks were most redundant.

    Rows that were a candidate fewest times come first, then those for which it was longest ago, then the lowest loss,
    then the lower row id; rows never seen come last. Ranks are nested: the rows ranked below k are a coreset of k rows,
    for any k. The published code does not combine the candidates of several cycles; this order is ours.

    Returns:
        (N,) int64, a permutation of 0 .. N - 1.
    """
    order = np.lexsort((ledger.loss_N, ledger.marked_N, ledger.times_N, ledger.seen_N < 0))
    ranks_N = np.empty(len(order), np.int64)
    ranks_N[order] = np.arange(len(order))
    return ranks_N


def check_length(epochs: int) -> None:
    """Raise UsageError if a run has fewer than 1 epoch, or more than a ledger counts."""
    if not 1 <= epochs <= LAST_EPOCH + 1:
        raise UsageError(f"a run of {epochs:,} epochs; give 1 to {LAST_EPOCH + 1:,}")


def _check_epoch(epoch: int) -> None:
    if not 0 <= epoch <= LAST_EPOCH:
        raise UsageError(f"epoch {epoch:,}; epochs are 0 to {LAST_EPOCH:,}")
