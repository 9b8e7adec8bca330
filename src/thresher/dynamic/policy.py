"""The interface of a policy, and the plan it makes for an epoch.

One epoch in a training loop::

    plan = policy.plan(ledger, epoch, rng)
    for rows_B in batches(plan.rows()):
        losses_BR = ...
        marks_B = policy.marks(losses_BR, rng) if plan.collects else None
        ledger.record(rows_B, losses_BR, epoch, marks_B)
    end_epoch(policy, ledger, plan, rng)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, Self, get_args

import numpy as np
import numpy.typing as npt

from thresher.dynamic.ledger import LAST_EPOCH, Ledger, Marks
from thresher.errors import UsageError

Array = npt.NDArray[Any]
Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]

Phase = Literal["everything", "warm-up", "preparation", "mutation", "pruned"]
PHASES: tuple[Phase, ...] = get_args(Phase)
PRUNE = 0.3  # the default share to leave out, for policies that were published with several shares


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """The rows to train on in one epoch, and their weights.

    A checkpoint in the middle of an epoch must contain the current plan (:meth:`state`): the ledger may have changed
    since, and planning again would choose other rows.

    Attributes:
        epoch: The epoch of the plan.
        phase: The kind of epoch, one of :data:`PHASES`.
        total: N, the number of rows of the dataset.
        kept_N: (N,) bool, the rows to train on; None for all.
        weights_N: (N,) float32, the factor of each row's loss; None for 1.
        repeats_N: (N,) int32, how often each row is used, 0 where it is not kept; None for once.
        collects: Whether the policy marks candidates in every batch of this epoch.
    """

    epoch: int
    phase: Phase
    total: int
    kept_N: Bools | None = None
    weights_N: npt.NDArray[np.float32] | None = None
    repeats_N: npt.NDArray[np.int32] | None = None
    collects: bool = False

    def __len__(self) -> int:
        """Return the number of samples of the epoch, including repeats."""
        if self.repeats_N is not None:
            return int(self.repeats_N.sum(dtype=np.int64))
        return self.total if self.kept_N is None else int(np.count_nonzero(self.kept_N))

    @property
    def pruned(self) -> float:
        """The share of samples saved: 1 - samples / rows; negative if repeats make the epoch longer."""
        return 1 - len(self) / self.total

    def rows(self) -> Ints:
        """Return the row ids of the samples of the epoch, int64, ascending; repeated rows are listed repeatedly."""
        if self.repeats_N is not None:
            return np.repeat(np.arange(self.total, dtype=np.int64), self.repeats_N)
        if self.kept_N is None:
            return np.arange(self.total, dtype=np.int64)
        return np.flatnonzero(self.kept_N).astype(np.int64, copy=False)

    def state(self) -> dict[str, Array]:
        """Return the plan as plain arrays, for a checkpoint; the mask takes one bit per row."""
        numbers = [self.epoch, PHASES.index(self.phase), self.total, self.collects]
        arrays: dict[str, Array] = {"numbers": np.array(numbers, np.int64)}
        if self.kept_N is not None:
            arrays["kept"] = np.packbits(self.kept_N)
        if self.weights_N is not None:
            arrays["weights"] = self.weights_N.copy()
        if self.repeats_N is not None:
            arrays["repeats"] = self.repeats_N.copy()
        return arrays

    @classmethod
    def from_state(cls, state: Mapping[str, Array]) -> Plan:
        """Restore a plan from :meth:`state`.

        Raises:
            UsageError: The arrays are not the state of a plan.
        """
        if "numbers" not in state or np.shape(state["numbers"]) != (4,):
            raise UsageError("not the state of a plan: 'numbers' is missing or does not have shape (4,)")
        epoch, phase, total, collects = (int(number) for number in state["numbers"])
        if not (0 <= epoch <= LAST_EPOCH and 0 <= phase < len(PHASES) and 0 < total < 2**40 and collects in (0, 1)):
            raise UsageError(f"not the state of a plan: its numbers are {(epoch, phase, total, collects)}")
        for name, kind, length in (("kept", "u", -(-total // 8)), ("weights", "f", total), ("repeats", "i", total)):
            if name not in state:
                continue
            array = np.asarray(state[name])
            if array.dtype.kind != kind or array.shape != (length,):
                raise UsageError(f"not the state of a plan: {name} is {array.dtype} {array.shape}")
            if not np.isfinite(array).all() or array.min(initial=0) < 0:
                raise UsageError(f"not the state of a plan: {name} has values that are negative or not finite")
        kept = np.unpackbits(np.asarray(state["kept"]), count=total).astype(np.bool_) if "kept" in state else None
        return cls(
            epoch=epoch,
            phase=PHASES[phase],
            total=total,
            kept_N=kept,
            weights_N=np.array(state["weights"], np.float32) if "weights" in state else None,
            repeats_N=np.array(state["repeats"], np.int32) if "repeats" in state else None,
            collects=bool(collects),
        )


class Policy(Protocol):
    """A rule that chooses the rows of each epoch: frozen parameters and pure methods, all state in the ledger.

    The same ledger, epoch and generator state give the same result.

    A policy is a frozen dataclass in its own file, marked ``@policy("name")`` of :mod:`thresher.dynamic.registry`,
    which checks and converts its options whenever it is made. Its fields are its options, and become command line flags
    of the same names. Their ``metadata`` may have: ``help``, one line without a full stop; ``flag``, the name of the
    flag if it differs from the field's; ``least``, the smallest integer allowed; ``follows``, True if the value is
    computed from the share to prune, so that the two cannot be combined; ``usual``, the default that help texts show,
    if :meth:`for_run` has another one than the field; ``option``, False for a field that is not an option, such as the
    length of the run.

    Attributes:
        name: The name on command lines.
        marks_candidates: Whether it marks rows as candidates for pruning; a coreset is ranked by these marks.
        memory_of_mismatch: Whether a high memory in its ledger means that a pair is probably mismatched; a coreset then
            drops the rows with the highest memory first, and reports show them.
        needs_selection: Whether it is built from a selection, by :meth:`for_selection`.
        needs_references: Whether its ledger must have the loss of rows under a reference model; :meth:`references`
            says where trainers find them.
        chooses_batches: Whether it chooses the rows of every batch out of a super-batch, with a sampler of its own.
    """

    name: ClassVar[str] = ""
    marks_candidates: ClassVar[bool] = False
    memory_of_mismatch: ClassVar[bool] = False
    needs_selection: ClassVar[bool] = False
    needs_references: ClassVar[bool] = False
    chooses_batches: ClassVar[bool] = False

    @classmethod
    def for_run(cls, epochs: int, *args: Any, **options: Any) -> Self:
        """Return the policy for a run of ``epochs`` epochs with its published defaults, without a share to prune.

        Override this if the policy needs the length of the run or has an option without a default. Options are passed
        by name; ``*args`` is only there so that an override may declare its own parameters.
        """
        return cls(**options)

    @classmethod
    def for_budget(cls, pruned: float, epochs: int, *args: Any, **options: Any) -> Self:
        """Return the policy that leaves out ``pruned`` of the samples of a run of ``epochs`` epochs.

        Raises:
            UsageError: The policy cannot reach the share, or does not accept one.
        """
        raise UsageError(f"policy {cls.name} does not accept a share to prune; use a policy such as scan")

    @classmethod
    def for_selection(cls, times_N: Array, *args: Any, **options: Any) -> Self:
        """Return the policy that trains on a selection; ``times_N`` (N,) is how often each row is used."""
        raise UsageError(f"policy {cls.name} does not accept a selection")

    def references(self) -> str:
        """Return where trainers find the reference losses: a file, or ``column:NAME`` of the data; "" for none.

        For a policy that chooses batches it may be a pool with embeddings instead.
        """
        return ""

    def weighs(self) -> bool:
        """Return whether its plans may multiply losses by weights."""
        return False

    def ledger(self, rows: int) -> Ledger:
        """Return an empty ledger for ``rows`` rows with the arrays that this policy needs."""
        return Ledger(rows)

    def plan(self, ledger: Ledger, epoch: int, rng: np.random.Generator) -> Plan:
        """Return the rows to train on in ``epoch``, given what was recorded before it."""
        ...

    def marks(self, losses_BR: npt.NDArray[np.float32], rng: np.random.Generator) -> Marks:
        """Mark the candidates among the rows of a batch, (B,) uint8; called if the plan has ``collects=True``."""
        return np.zeros(len(losses_BR), np.uint8)

    def finish(self, ledger: Ledger, plan: Plan, rng: np.random.Generator) -> Marks | None:
        """Mark the candidates of a whole epoch at its end, (N,) uint8; None if there are none to add."""
        return None

    def remember(self, ledger: Ledger, plan: Plan) -> npt.NDArray[np.float32] | None:
        """Return the memory after an epoch that is recorded, (N,) float32 of its own; None to leave it as it is.

        Called before :meth:`finish`. The ledger has a memory if :meth:`ledger` creates it with ``memory=True``.
        """
        return None

    def forecast(self, epoch: int) -> float:
        """Return the share of samples that ``epoch`` is expected to leave out, as known before training."""
        ...

    def expected_pruned(self, epochs: int) -> float:
        """Return the share of samples that a run of ``epochs`` epochs is expected to leave out."""
        if epochs < 1:
            raise UsageError(f"epochs = {epochs}; give 1 or more")
        return math.fsum(self.forecast(epoch) for epoch in range(epochs)) / epochs  # sum differs between Pythons


def end_epoch(policy: Policy, ledger: Ledger, plan: Plan, rng: np.random.Generator) -> None:
    """Update the memory of the ledger, and mark the candidates of a whole epoch, after its losses are recorded."""
    memory_N = policy.remember(ledger, plan)
    if memory_N is not None:
        ledger.remember(memory_N)
    marks_N = policy.finish(ledger, plan, rng)
    if marks_N is not None:
        ledger.mark(marks_N, plan.epoch)


def check_budget(pruned: float, epochs: int, most: float, hint: str) -> None:
    """Raise if a share to prune is outside 0 .. ``most`` (both exclusive).

    Raises:
        UsageError: States the limit and ``hint``, how to raise it.
    """
    if not 0 < pruned < 1:
        raise UsageError(f"cannot prune {pruned} of the samples; give a share strictly between 0 and 1, like 0.3")
    if pruned >= most:
        raise UsageError(f"cannot prune {pruned:.1%} over {epochs} epochs: it must stay below {most:.1%}; {hint}")


def share_for(pruned: float, epochs: int, half: Policy) -> float:
    """Return the share that the pruned epochs must leave out so that a run leaves out ``pruned`` of its samples.

    Args:
        pruned: Share of the samples of the run, 0 to 1 (exclusive).
        epochs: Length of the run.
        half: The policy, if its pruned epochs leave out half of the rows.

    Raises:
        UsageError: The run cannot leave out so much.
    """
    most = half.expected_pruned(epochs) / 0.5
    check_budget(pruned, epochs, most, "train for more epochs, or use a shorter warm-up")
    return pruned / most
