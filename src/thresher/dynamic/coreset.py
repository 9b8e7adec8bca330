"""The coreset of a training run: a selection that leaves out the rows which were most redundant in training.

During training the policy marks rows as candidates for pruning, again in every cycle. Rows are ranked by how often
they were candidates (fewest first), then by how long ago, then by their last loss: see
:func:`thresher.dynamic.ledger.coreset_ranks`. SCAN (arXiv 2411.09126) calls the coreset its by-product. The paper does
not say how to combine the candidates of several cycles; this order is ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt

from thresher.dynamic.ledger import Bools, Ledger, coreset_ranks
from thresher.dynamic.registry import POLICIES
from thresher.dynamic.run_folder import Training
from thresher.errors import UsageError
from thresher.pool.layout import Options
from thresher.pool.store import absolute
from thresher.runtime.format import counted
from thresher.selection import Keep, Selection, Step

NAME = "coreset"
SCORE = "epochs in which the row was a candidate"

_WHEN = "a candidate {score:.0f}\u00d7, last in epoch {marked}; last loss {loss:.4f}, in epoch {seen}"
# Indexed by the ledger's marks (bits: 1 redundant, 2 ill-matched, 4 left out); 0 for rows that were never a candidate.
REASONS = (
    "never a candidate, but its last loss is high ({loss:.4f}, in epoch {seen})",
    f"redundant: {_WHEN}",
    f"ill-matched: {_WHEN}",
    f"redundant in one direction and ill-matched in the other: {_WHEN}",
    f"left out: {_WHEN}",
    "never trained on: there is no loss to rank it by",
)
_LUCK = 0.1  # overlap of two searches, from 0 (chance) to 1 (the same candidates), below which a ranking says little
_UNSEEN = len(REASONS) - 1


def coreset(training: Training, keep: str | int | float | Keep, *, pool: str | None = None) -> Selection:
    """Keep the rows of a run's pool that were candidates for pruning least often.

    Budgets are exact and nested: a smaller one keeps a subset of what a larger one keeps. The evidence of every row,
    kept or not, is its history: "score" (number of epochs in which it was a candidate), "marked" (the last of them, -1
    for none), "marks" (the kind, bits: 1 redundant, 2 ill-matched, 4 left out), "loss" (the last, NaN before the row
    was trained on), "seen" (the epoch of this loss, -1 for never), and "code" (the number of its reason).

    Args:
        training: A run, finished or not; the ledger is that of its last finished epoch.
        keep: How many rows to keep.
        pool: The current location of the pool, if it was moved; its fingerprint is checked.

    Returns:
        A selection of the pool with the step "coreset".

    Raises:
        UsageError: The policy does not mark candidates, or has not marked any yet.
        BudgetError: More rows than there are, or less than one.
        PoolError: The pool is another one, or the folder is damaged.
    """
    budget = Keep.parse(keep)
    ledger, log = training.ledger(), training.log()
    count = budget.of(len(ledger))
    _refuse_without_candidates(training, ledger, len(log))
    keep_N = coreset_ranks(ledger) < count
    step = Step(
        method=NAME,
        parameters={
            "keep": str(budget),
            "run": absolute(str(training.folder)),
            "policy": training.policy,
            "epochs": len(log),
        },
        seed=training.seed,
        rows_in=len(ledger),
        rows_out=count,
        reasons=REASONS,
        score=SCORE,
        notes=tuple(_notes(training, ledger, keep_N, log)),
        rows={
            "score": ledger.times_N.astype(np.float32),
            "marked": ledger.marked_N,
            "marks": ledger.marks_N,
            "loss": np.asarray(ledger.loss_N, np.float32),
            "seen": ledger.seen_N,
            "code": _codes(ledger),
        },
    )
    where, options = training.location, asdict(Options())
    if pool is not None:
        training.open_pool(pool)
        where = absolute(pool)
    return Selection.everything(training.store, where, options, len(ledger)).then(step, keep_N)


def _refuse_without_candidates(training: Training, ledger: Ledger, epochs: int) -> None:
    if ledger.times_N.any():
        return
    marking = [name for name, cls in POLICIES.all().items() if cls.marks_candidates]
    if training.policy in marking:
        raise UsageError(
            f"{training.folder}: in {counted(epochs, 'epoch')} no row was a candidate for pruning yet, so "
            "rows cannot be ranked; "
            "train for more epochs, past the warm-up and the first preparation epoch"
        )
    raise UsageError(
        f"{training.folder}: the policy {training.policy} marks no candidates for pruning, so rows cannot be ranked; "
        f"train with --policy {' or '.join(marking)}"
    )


def _codes(ledger: Ledger) -> npt.NDArray[np.uint8]:
    """Return the index of each row's reason, (N,) uint8; rows with mark 4 get reason 4 whatever their other marks."""
    codes_N = ledger.marks_N.copy()
    codes_N[ledger.marks_N > 3] = 4
    codes_N[ledger.times_N == 0] = 0
    codes_N[ledger.seen_N < 0] = _UNSEEN
    return codes_N


def _notes(training: Training, ledger: Ledger, keep_N: Bools, log: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return notes on where the cut is, and on the limits of the ranking."""
    notes = []
    searches = sum(1 for entry in log if entry.get("candidates"))
    times_N = ledger.times_N
    most = int(times_N[keep_N].max())
    tied_N = times_N == most
    tied, went = int(np.count_nonzero(tied_N)), int(np.count_nonzero(tied_N & ~keep_N))
    unseen = int(np.count_nonzero(ledger.seen_N < 0))
    more = int(np.count_nonzero(times_N > most))
    notes.append(
        f"candidates were found in {searches} of {counted(len(log), 'epoch')}; dropped {went:,} of the "
        f"{counted(tied, 'row that was', 'rows that were')} a "
        f"candidate {counted(most, 'time')}" + (f", and all {more:,} that were a candidate more often" if more else "")
    )
    last = next((entry for entry in reversed(log) if entry.get("overlap") is not None), None)
    if last is not None:
        again, chance = last["overlap"], last["candidates"] / last["total"]
        if again - chance < _LUCK * (1 - chance):
            notes.append(
                f"of the candidates of epoch {last['epoch'] + 1}, {again:.1%} were candidates in the previous search "
                f"too, {chance:.1%} would be by chance: this ranking is close to random"
            )
    if unseen:
        notes.append(f"{counted(unseen, 'row was', 'rows were')} never trained on; they rank last")
    if far := training.unfinished(log):
        notes.append(f"the run has finished {far}; the ranking may still change")
    return notes
