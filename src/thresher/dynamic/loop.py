"""The code shared by the sampler (datasets with row numbers) and the stream pruner.

:class:`PruningLoop` keeps the position in a run: the epoch, the current plan, the steps done and left, the log, and the
part of the state that both save. :func:`record_epoch` records an epoch in the ledger.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
import numpy.typing as npt

from thresher.dynamic.histogram import LossHistogram
from thresher.dynamic.ledger import ILL_MATCHED, LEFT_OUT, REDUNDANT, Bools, Ints, Ledger, Losses
from thresher.dynamic.policy import Plan, Policy, end_epoch
from thresher.errors import UsageError
from thresher.runtime.random import digest, generator
from thresher.runtime.untrusted import parse_json

if TYPE_CHECKING:
    import torch  # noqa: TID253

M = TypeVar("M", bound=Callable[..., Any])

_VERSION = 1
_ANY = REDUNDANT | ILL_MATCHED | LEFT_OUT


class PruningLoop(ABC):
    """Base class that keeps the position in a run that prunes.

    Attributes:
        policy: The policy that chooses the rows of each epoch.
        batch_size: Rows of a batch over all ranks.
        epochs: Length of the run.
        seed: Seed of orders, draws and ties; the same on all ranks.
        epoch: The current epoch, from 0; ``epochs`` when the run is done.
        step: Number of batches of this epoch that are done.
        plan: The current plan; None when all epochs are done.
    """

    policy: Policy
    batch_size: int
    epochs: int
    seed: int
    epoch: int
    step: int
    plan: Plan | None
    _kind: str  # its name in messages
    _steps: int  # steps of the current epoch
    _steps_before: int  # steps of the run before the current epoch
    _progress_before: float  # progress at the start of the current epoch
    _log: list[dict[str, Any]]

    @abstractmethod
    def end_epoch(self) -> None:
        """End the epoch early, on all ranks together: record the losses and plan the next epoch.

        The last step of an epoch calls this automatically.
        """

    @abstractmethod
    def _begin(self, epoch: int) -> None:
        """Plan an epoch."""

    @abstractmethod
    def _share_done(self) -> float:
        """Return how much of what was left at the start of the epoch is done, 0 to 1."""

    @abstractmethod
    def _steps_later(self) -> int:
        """Return the number of steps forecast for the epochs after this one."""

    @abstractmethod
    def _length(self) -> str:
        """Return the length of the run in words, such as "9 epochs"."""

    def __len__(self) -> int:
        """Return the number of batches left in the epoch."""
        return self._steps - self.step

    def log(self) -> list[dict[str, Any]]:
        """Return one entry per finished epoch, of plain values that can be written as JSON.

        The plan kept ``rows`` of ``total``; ``pruned_so_far`` is the share that the plans left out since epoch 0.
        ``samples`` were trained on; ``not_finite`` of them had no finite loss and were not recorded. ``overlap`` is
        the share of the ``candidates`` that were also candidates in the previous epoch with candidates. ``histogram``
        counts losses in bins that are the same for all epochs, see
        :class:`thresher.dynamic.histogram.LossHistogram`.
        """
        return [dict(entry) for entry in self._log]

    @property
    def progress(self) -> float:
        """The share of the run that is done, 0 to 1.

        Errors of the forecasts are spread over the rest of the run, so that progress never jumps, never decreases, and
        ends at 1.
        """
        if self.plan is None:
            return 1.0
        return self._progress_before + (1 - self._progress_before) * self._share_done()

    def steps_left(self) -> int:
        """Return the number of steps left: exact for this epoch, forecast by the policy for later ones."""
        return len(self) + self._steps_later()

    def total_steps(self) -> int:
        """Return the number of steps of the whole run: those done plus :meth:`steps_left`."""
        return self._steps_before + self.step + self.steps_left()

    def _in_force(self) -> Plan:
        if self.plan is None:
            raise UsageError(f"all {self._length()} are done; to continue, create the {self._kind} with a longer run")
        return self.plan

    def _described(self) -> str:
        """Return what decides the plans, as text that must be equal in a state."""
        return describe(self.policy)

    def _rng(self, *purpose: str | int) -> np.random.Generator:
        return generator(self.seed, *purpose)

    def _next(self, plan: Plan, rows: int, total: int, pruned_so_far: float, recorded: Mapping[str, Any]) -> None:
        """Add the epoch to the log, and begin the next one."""
        self._log.append(
            {
                "epoch": self.epoch,
                "phase": plan.phase,
                "rows": rows,
                "total": total,
                "pruned_so_far": pruned_so_far,
                "steps": self.step,
                **recorded,
            }
        )
        self._progress_before, self._steps_before = self.progress, self._steps_before + self.step
        self._begin(self.epoch + 1)

    # Checkpoints

    def _state(
        self, numbers: list[int], arrays: Mapping[str, npt.NDArray[Any]], ledger: Ledger | None, plan: Plan | None
    ) -> dict[str, Any]:
        """Return the state: the version and ``numbers``, ``arrays``, progress, ledger, plan, policy and log."""
        import torch

        arrays = {
            "numbers": np.array([_VERSION, *numbers], np.int64),
            "progress": np.array(self._progress_before),
            **arrays,
            **{f"ledger.{name}": array for name, array in (ledger.state() if ledger is not None else {}).items()},
            **{f"plan.{name}": array for name, array in (plan.state() if plan is not None else {}).items()},
        }
        if ledger is not None:
            arrays["ledger.times"] = arrays["ledger.times"].view(np.int16)  # some versions of torch have no uint16
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        return {**tensors, "policy": self._described(), "log": json.dumps(self._log)}

    def _loaded(self, state: Mapping[str, Any], needed: set[str], same: Mapping[str, Any], more: int) -> LoadedState:
        """Check a state and return its contents.

        Args:
            state: The result of :meth:`_state`.
            needed: Names of arrays it must have, in addition to those that every state has.
            same: Values that must be equal in the state, by name, in the order of the numbers; the policy is compared
                too.
            more: How many numbers follow these.

        Raises:
            UsageError: The state is of another kind or of another run.
        """
        arrays = {name: as_array(state[name]) for name in state}
        needed = needed | {"numbers", "progress", "policy", "log"}
        count = 1 + len(same) + more
        if not needed <= set(arrays) or arrays["numbers"].shape != (count,) or arrays["numbers"][0] != _VERSION:
            raise UsageError(f"not the state of a {type(self).__name__} of version {_VERSION}")
        if arrays["numbers"].dtype.kind != "i" or arrays["progress"].shape or arrays["progress"].dtype.kind not in "fi":
            raise UsageError(f"not the state of a {type(self).__name__}: its numbers are not numbers")
        log = parse_json(str(arrays["log"]))
        entries = log if isinstance(log, list) else [None]
        if not all(isinstance(one, dict) and _counts(one, "epoch", "rows", "total") for one in entries):
            raise UsageError(f"not the state of a {type(self).__name__}: its log is not a list of epochs")
        numbers = arrays["numbers"].tolist()[1:]
        here = {**same, "policy": self._described()}
        there = (*numbers[: len(same)], str(arrays["policy"]))
        for (name, mine), theirs in zip(here.items(), there, strict=True):
            if mine != theirs:
                raise UsageError(f"the state of a {self._kind} with {name} = {theirs}; this one has {mine}")
        of_ledger = {name[7:]: array for name, array in arrays.items() if name.startswith("ledger.")}
        if "times" in of_ledger:
            of_ledger["times"] = of_ledger["times"].view(np.uint16)
        of_plan = {name[5:]: array for name, array in arrays.items() if name.startswith("plan.")}
        return LoadedState(
            numbers=numbers[len(same) :],
            arrays=arrays,
            ledger=Ledger.from_state(of_ledger) if of_ledger else None,
            plan=Plan.from_state(of_plan) if of_plan else None,
            log=log,
            progress=float(arrays["progress"]),
        )


def _counts(entry: Mapping[str, Any], *names: str) -> bool:
    """Return whether the named fields of a log entry are integers of at least 0, and its total above 0."""
    return all(type(entry.get(name)) is int and entry[name] >= 0 for name in names) and entry["total"] > 0


@dataclasses.dataclass(frozen=True)
class LoadedState:
    """The contents of a checked state; see :meth:`PruningLoop._loaded`."""

    numbers: list[int]
    arrays: Mapping[str, npt.NDArray[Any]]
    ledger: Ledger | None
    plan: Plan | None
    log: list[dict[str, Any]]
    progress: float


def refuse_chosen(policy: Policy | type[Policy], what: str, chooses: bool = False) -> None:
    """Raise UsageError if a policy chooses the rows of every batch, and what is to run it does not.

    Args:
        policy: The policy.
        what: What is to run it, for the message.
        chooses: Whether it lets the policy choose batches.
    """
    if policy.chooses_batches and not chooses:
        raise UsageError(
            f"policy {policy.name} chooses every batch by scoring a super-batch, which {what} does not; use "
            "'thresher train clip', or thresher.dynamic.jest.JestSampler in your own loop"
        )


def untraced(method: M) -> M:
    """Return a method that ``torch.compile`` leaves out of its graphs: it records, with NumPy, which a graph cannot."""

    outside: list[Callable[..., Any]] = []  # made when it is first needed, because it needs torch

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        import torch

        if not torch.compiler.is_compiling():  # else torch loads its compiler
            return method(*args, **kwargs)
        if not outside:
            outside.append(torch.compiler.disable(method))
        return outside[0](*args, **kwargs)

    return cast(M, call)


def refuse_fractions(**numbers: Any) -> None:
    """Raise UsageError for named numbers that are not whole, such as a batch size of 51.2; None is allowed."""
    if wrong := [
        f"{name}={value}" for name, value in numbers.items() if not (value is None or float(value).is_integer())
    ]:
        raise UsageError(f"{', '.join(wrong)}; give whole numbers")


def warn_of_length(policy: Policy, epochs: int) -> None:
    """Warn if a policy was made for a run of another length, so that its last epochs are not those of the run."""
    planned = getattr(policy, "epochs", epochs)
    if planned != epochs:
        warnings.warn(
            f"policy {policy.name} was made for {planned:,} epochs, but the run has {epochs:,}: what it does in its "
            f"last epochs does not come at the end of the run; give {type(policy).__name__}(epochs={epochs})",
            stacklevel=3,
        )


def refuse_shorter(needed: int, length: int | None, unit: str) -> None:
    """Raise UsageError if this run is too short to finish the current epoch of a loaded state."""
    if length is not None and needed > length:
        raise UsageError(
            f"the state is of a run of {needed:,} {unit}, including its current epoch, but this run ends after "
            f"{length:,}; give {unit}={needed} or more"
        )


def check_references(given_N: Losses | None, loaded: Ledger) -> None:
    """Raise UsageError if the ledger of a state has other references than those given for the same rows."""
    if given_N is not None and not np.array_equal(given_N, loaded.references_N, equal_nan=True):  # type: ignore[arg-type]
        raise UsageError("the state has other reference losses; give those of the run that is resumed")


def record_epoch(
    policy: Policy,
    ledger: Ledger,
    plan: Plan,
    batches: Iterable[tuple[Ints, Losses]],
    rng: Callable[..., np.random.Generator],
) -> dict[str, Any]:
    """Record the losses of an epoch in the ledger, and mark its candidates.

    Args:
        policy: The policy that planned the epoch.
        ledger: The ledger; changed in place.
        plan: The plan of the epoch.
        batches: The rows (B,) of every global batch and their losses (B, R), in step order.
        rng: Returns the generator for a purpose, given as strings and integers.

    Returns:
        The entry of the log, as far as it depends on the losses; see :meth:`PruningLoop.log`.
    """
    epoch = plan.epoch
    last = int(ledger.marked_N.max())
    before_N = ledger.candidates(last, _ANY) if last >= 0 else None
    samples, finite, total, histogram = 0, 0, 0.0, LossHistogram()
    for step, (rows_B, losses_BR) in enumerate(batches):
        finite_B: Bools = np.logical_and.reduce(np.isfinite(losses_BR), axis=1)
        samples += len(rows_B)
        rows_B, losses_BR = rows_B[finite_B], losses_BR[finite_B]
        marks_B = policy.marks(losses_BR, rng("marks", epoch, step)) if plan.collects and len(rows_B) else None
        ledger.record(rows_B, losses_BR, epoch, marks_B)
        loss_B = losses_BR.mean(axis=1)
        histogram.add(loss_B)
        finite, total = finite + len(rows_B), total + float(loss_B.sum(dtype=np.float64))
    end_epoch(policy, ledger, plan, rng("finish", epoch))
    now_N = ledger.candidates(epoch, _ANY)
    candidates = int(np.count_nonzero(now_N))
    return {
        "samples": samples,
        "loss": total / finite if finite else None,
        "histogram": histogram.as_dict(),
        "not_finite": samples - finite,
        "redundant": int(np.count_nonzero(ledger.candidates(epoch, REDUNDANT))),
        "ill_matched": int(np.count_nonzero(ledger.candidates(epoch, ILL_MATCHED))),
        "candidates": candidates,
        "overlap": int((now_N & before_N).sum()) / candidates if candidates and before_N is not None else None,
    }


def rank_and_world_size() -> tuple[int, int]:
    """Return the rank of this process and the number of processes."""
    import torch.distributed as dist

    together = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if together else (0, 1)


def accelerate_loader() -> Any:
    """Return the loader prepared by Hugging Face accelerate that is being iterated over, or None."""
    state = sys.modules.get("accelerate.state")
    return None if state is None else state.GradientState().active_dataloader


def all_gather(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Return the tensors of all ranks, by rank; they must have the same shape."""
    import torch
    import torch.distributed as dist

    if rank_and_world_size()[1] == 1:
        return [tensor]
    tensor = tensor.cpu() if dist.get_backend() == "gloo" else tensor
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor)
    return parts


def as_array(values: Any) -> npt.NDArray[Any]:
    """Return a tensor, an array or a list of numbers as a NumPy array."""
    return np.asarray(values.cpu() if hasattr(values, "cpu") else values)


def describe(policy: Any, *, defaults: bool = False) -> str:
    """Return the policy as text, with the parameters that differ from their defaults, and arrays by their digest.

    Args:
        policy: A dataclass; fields with ``repr=False`` are left out.
        defaults: Include every parameter, for people: floats to four digits.
    """
    parts = []
    for item in (each for each in dataclasses.fields(policy) if each.repr):
        value = getattr(policy, item.name)
        if isinstance(value, np.ndarray):
            parts.append(f"{item.name}={value.dtype}{value.shape}:{digest(value)[:16]}")
        elif defaults and isinstance(value, float):
            parts.append(f"{item.name}={value:.4g}")
        elif defaults or value != item.default:
            parts.append(f"{item.name}={value!r}")
    return f"{type(policy).__name__}({', '.join(parts)})"
