"""The coreset of a training run: a selection that leaves out the rows which training needed least.

During training the policy marks rows as candidates for pruning, again in every cycle. Rows are ranked by how often
they were candidates (fewest first), then by how long ago, then by their last loss: see
:func:`thresher.dynamic.ledger.coreset_ranks`. SCAN (arXiv 2411.09126) calls the coreset its by-product. The paper does
not say how to combine the candidates of several cycles; this order is ours.

A run whose policy remembers how high the losses of a row rank (``sift``) is cut by that instead: the rows that are most
probably mismatched are left out first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt

from thresher.dynamic.ledger import Bools, Ledger, coreset_ranks
from thresher.dynamic.mismatch import Mismatch
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
_RANK = (
    "the mean rank of its loss is {score:.3f}, from 0 (lowest) to 1 (highest); last loss {loss:.4f}, in epoch {seen}"
)
REASONS_BY_RANK = (
    f"not clearly mismatched: {_RANK}",
    f"probably mismatched, {{chance:.0%}} sure: {_RANK}",
    "never trained on in an epoch on all rows: there is no rank of its loss",
)
ALL_MATCHED = "all but the probably mismatched"
RANK = "mean rank of the loss over epochs on all rows, 0 (lowest) to 1 (highest)"
_LUCK = 0.1  # overlap of two searches, from 0 (chance) to 1 (the same candidates), below which a ranking says little
_UNSEEN = len(REASONS) - 1


def coreset(training: Training, keep: str | int | float | Keep | None = None, *, pool: str | None = None) -> Selection:
    """Keep the rows of a run's pool that were candidates for pruning least often.

    Budgets are exact and nested: a smaller one keeps a subset of what a larger one keeps. The evidence of every row,
    kept or not, is its history: "score" (number of epochs in which it was a candidate), "marked" (the last of them, -1
    for none), "marks" (the kind, bits: 1 redundant, 2 ill-matched, 4 left out), "loss" (the last, NaN before the row
    was trained on), "seen" (the epoch of this loss, -1 for never), and "code" (the number of its reason).

    Args:
        training: A run, finished or not; the ledger is that of its last finished epoch.
        keep: How many rows to keep; None for all that are not probably mismatched, for a run with ``sift``.
        pool: The current location of the pool, if it was moved; its fingerprint is checked.

    Returns:
        A selection of the pool with the step "coreset".

    Raises:
        UsageError: The policy does not mark candidates, or has not marked any yet; or ``keep`` is None for a run that
            does not look for mismatched pairs.
        BudgetError: More rows than there are, or less than one.
        PoolError: The pool is another one, or the folder is damaged.
    """
    training.refuse_stream()
    ledger, log = training.ledger(), training.log()
    mismatch = Mismatch.of(training.policy, ledger)
    if keep is None and mismatch is None:
        raise UsageError(
            f"{training.folder}: the policy {training.policy} does not look for mismatched pairs; say how many rows to "
            "keep, such as 70%"
        )
    budget = None if keep is None else Keep.parse(keep)
    count = len(ledger) if budget is None else budget.of(len(ledger))
    reasons: tuple[str, ...]
    if mismatch is None:
        _refuse_without_candidates(training, ledger, len(log))
        keep_N = coreset_ranks(ledger) < count
        reasons, score, notes, evidence = REASONS, SCORE, _notes(training, ledger, keep_N, log), _evidence(ledger)
    else:
        _refuse_without_ranks(training, mismatch)
        keep_N = np.zeros(len(ledger), np.bool_)
        keep_N[mismatch.order(ledger)[:count]] = True
        if budget is None:
            keep_N = ~mismatch.wrong_N
        reasons, score = REASONS_BY_RANK, RANK
        notes, evidence = _notes_by_rank(training, mismatch, keep_N, log), _evidence_by_rank(ledger, mismatch)
    step = Step(
        method=NAME,
        parameters={
            "keep": ALL_MATCHED if budget is None else str(budget),
            "run": absolute(str(training.folder)),
            "policy": training.policy,
            "epochs": len(log),
        },
        seed=training.seed,
        rows_in=len(ledger),
        rows_out=int(np.count_nonzero(keep_N)),
        reasons=reasons,
        score=score,
        notes=tuple(notes),
        rows={"loss": np.asarray(ledger.loss_N, np.float32), "seen": ledger.seen_N, **evidence},
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
        f"train with --policy {', '.join(marking[:-1])} or {marking[-1]}"
    )


def _refuse_without_ranks(training: Training, mismatch: Mismatch) -> None:
    if np.isnan(mismatch.ranks_N).all():
        raise UsageError(f"{training.folder}: no losses are ranked yet; train for an epoch on all rows")


def _evidence(ledger: Ledger) -> dict[str, npt.NDArray[Any]]:
    return {
        "score": ledger.times_N.astype(np.float32),
        "marked": ledger.marked_N,
        "marks": ledger.marks_N,
        "code": _codes(ledger),
    }


def _evidence_by_rank(ledger: Ledger, mismatch: Mismatch) -> dict[str, npt.NDArray[Any]]:
    unknown_N = np.isnan(mismatch.ranks_N)
    codes_N = np.where(unknown_N, 2, mismatch.wrong_N).astype(np.uint8)
    return {"score": mismatch.ranks_N, "chance": mismatch.chance_N, "code": codes_N}


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
    return [*notes, *_note_unfinished(training, log)]


def _notes_by_rank(
    training: Training, mismatch: Mismatch, keep_N: Bools, log: Sequence[Mapping[str, Any]]
) -> list[str]:
    """Return notes on the rows that are probably mismatched, and on the limits of the ranking."""
    wrong_N, unknown = mismatch.wrong_N, int(np.isnan(mismatch.ranks_N).sum())
    wrong, left = int(np.count_nonzero(wrong_N)), int(np.count_nonzero(wrong_N & ~keep_N))
    notes = [
        f"{counted(wrong, 'row is', 'rows are')} probably mismatched; dropped {left:,} of them"
        if mismatch.found
        else "no rows stand out as mismatched: the ranks of the losses form one hump"
        + ("; the highest are dropped" if not keep_N.all() else "")
    ]
    if unknown:
        notes.append(f"{counted(unknown, 'row has', 'rows have')} no rank; they rank last")
    return [*notes, *_note_unfinished(training, log)]


def _note_unfinished(training: Training, log: Sequence[Mapping[str, Any]]) -> list[str]:
    far = training.unfinished(log)
    return [f"the run has finished {far}; the ranking may still change"] if far else []
