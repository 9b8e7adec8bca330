"""The sampler for pruning in the training loop, for map-style datasets, on one process or several.

Every rank holds the same plan, the same order and the same ledger, so row ids are never sent. The order of an epoch is
cut into global batches, and each rank takes its slice of every batch: the batches do not depend on the number of ranks.
Losses stay on the rank that computed them until the epoch ends (or a checkpoint is taken), are gathered once, and are
recorded batch by batch in step order, so the ledger does not depend on the number of ranks either.
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from thresher.dynamic.ledger import LAST_EPOCH, Ints, Ledger, Losses, check_length
from thresher.dynamic.loop import (
    PruningLoop,
    accelerate_loader,
    all_gather,
    as_array,
    check_references,
    rank_and_world_size,
    record_epoch,
    refuse_chosen,
    refuse_fractions,
    refuse_shorter,
    untraced,
    warn_of_length,
)
from thresher.dynamic.policy import Plan, Policy
from thresher.errors import UsageError

if TYPE_CHECKING:
    import torch  # noqa: TID253
    from torch.utils.data import Dataset  # noqa: TID253

    from thresher.dynamic.cabs import Cabs

    _Dataset: TypeAlias = Dataset[tuple[int, Any]]
else:
    _Dataset = object  # all that a DataLoader needs; torch loads slowly


class with_rows(_Dataset):  # type: ignore[misc] # noqa: N801 - reads as the verb it is
    """A map-style dataset whose items come with their row ids: ``(row, item)``."""

    def __init__(self, dataset: Any) -> None:
        """Wrap ``dataset``, any object with ``len`` and integer indices, unless it is wrapped already.

        Raises:
            UsageError: It is iterable only, or a dictionary of splits.
        """
        if isinstance(dataset, Mapping):
            names = ", ".join(map(repr, list(dataset)[:3]))
            raise UsageError(f"a {type(dataset).__name__} of {names}; give one of its datasets, with integer indices")
        if not _has_rows(dataset):
            raise UsageError(
                f"{type(dataset).__name__} has no row numbers: it can only be iterated over; prune it as a stream, "
                "with StreamPruner and prune_stream of thresher.dynamic.stream"
            )
        self.dataset: Any = dataset.dataset if isinstance(dataset, with_rows) else dataset

    def __len__(self) -> int:
        """Return the number of rows of the dataset."""
        return len(self.dataset)

    def __getitem__(self, row: int) -> tuple[int, Any]:
        """Return the row id and the item."""
        return row, self.dataset[row]

    def __getitems__(self, rows: Sequence[int]) -> list[tuple[int, Any]]:
        """Return a batch; it is read with one call if the dataset has ``__getitems__``."""
        many = getattr(self.dataset, "__getitems__", None)
        return list(zip(rows, many(rows) if many else (self.dataset[row] for row in rows), strict=True))


class collated_with_rows:  # noqa: N801 - reads as what it returns
    """A collate function for items of :class:`with_rows`: returns row ids (B,) int64 as a NumPy array, and the batch.

    A class, so that it can be pickled for the workers of a DataLoader.
    """

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        """Combine the items with ``collate``, which does not see the row ids."""
        self.collate = collate

    def __call__(self, batch: list[tuple[int, Any]]) -> tuple[Ints, Any]:
        """Return the row ids and the batch."""
        return np.array([row for row, _ in batch], np.int64), self.collate([item for _, item in batch])


def _has_rows(dataset: Any) -> bool:
    """Return whether a dataset has a length and indices; those of torch inherit indices that only raise an error."""
    base = getattr(sys.modules.get("torch.utils.data"), "Dataset", None)
    index = getattr(type(dataset), "__getitem__", None)
    return hasattr(type(dataset), "__len__") and index not in (None, getattr(base, "__getitem__", None))


def _of_rows(plan: Plan, rows_M: Ints) -> Plan:
    """Return a plan with only some of its rows, as often as they are listed."""
    times_N = np.bincount(rows_M, minlength=plan.total).astype(np.int32)
    return replace(plan, kept_N=times_N > 0, repeats_N=None if plan.repeats_N is None else times_N)


class PruningSampler(PruningLoop):
    """A batch sampler of the rows that a policy keeps in each epoch, which also records their losses.

    Pass it to a DataLoader as ``batch_sampler``. A step is one batch. It is done when its losses are passed to
    :meth:`reduce`, however far ahead the loader has read; the last step ends the epoch and plans the next.

    Attributes:
        rows: N, the number of rows of the dataset.
        policy: The policy that chooses the rows of each epoch.
        batch_size: Rows of a batch over all ranks.
        epochs: Length of the run, up to 32,768, used by schedules; with ``samples``, a forecast.
        samples: Length of the run in samples, or None. The run ends with the last batch within this number, which may
            be in the middle of an epoch.
        seed: Seed of orders, draws and ties; the same on all ranks.
        composition: Composes the batches by the concepts of their rows, or None.
        drop_last: Whether to leave out the last rows of an epoch if they do not fill a batch. If False, the epoch has
            one batch more, and its batches differ in size by at most one row. (An epoch shorter than a batch is one
            batch.)
        epoch: The current epoch, from 0; ``epochs`` when the run is done.
        step: Number of batches of this epoch that are done; iteration starts after them.
        ledger: The record of the finished epochs.
        plan: The current plan; None when all epochs are done.
    """

    ledger: Ledger
    _kind = "sampler"
    _chooses = False  # whether it chooses batches, for a policy that does
    _of_policy: Plan | None  # the current plan before the composition left rows out
    _order: Ints  # the self._samples rows of the epoch, batch after batch
    _samples: int
    _later: tuple[int, int]  # steps and samples forecast for the epochs after this one
    _fewest: int  # steps of the shortest of these and of this one
    _since: int
    _filled: int
    _directions: int  # R, 0 before it is known
    _known: list[Losses]  # losses of all ranks for the steps before self._since, in their order
    _parts: list[torch.Tensor]  # losses of the parts of the current batch that are done
    _own_BR: torch.Tensor | None  # a buffer for this rank's losses since then; self._filled rows are used

    def __new__(cls, rows: Any = 0, *args: Any, **kwargs: Any) -> PruningSampler:
        """Raise UsageError if ``rows`` is a sampler: Lightning passes one, without the other arguments."""
        if hasattr(rows, "__iter__"):
            raise UsageError(
                f"a {type(rows).__name__} instead of the number of rows; with Lightning, set "
                "use_distributed_sampler=False: the sampler gives each process its rows"
            )
        return super().__new__(cls)

    def __init__(
        self,
        rows: int,
        *,
        policy: Policy,
        batch_size: int,
        epochs: int | None = None,
        samples: int | None = None,
        seed: int = 0,
        drop_last: bool = True,
        references_N: npt.ArrayLike | None = None,
        composition: Cabs | None = None,
    ) -> None:
        """Plan epoch 0; see the attributes. Give the length of the run either as ``epochs`` or as ``samples``.

        With ``samples``, runs of different policies have the same length. The fair comparison for a pruned run is
        full training on as many samples.

        ``references_N`` is for a policy that needs it, such as ``Rho``: (N,) losses of the rows under a reference
        model, NaN if unknown.

        ``composition`` chooses every batch from several times as many rows of the plan, by their concepts; rows that it
        leaves out count as pruned.

        Raises:
            UsageError: A value is not allowed.
        """
        if (epochs is None) == (samples is None):
            raise UsageError(f"{epochs=}, {samples=}; give exactly one of the two")
        if batch_size < 1 or not 0 <= seed < 2**63:
            raise UsageError(f"{batch_size=}, {seed=}; give 1 or more, and 0 to 2^63 - 1")
        refuse_fractions(rows=rows, batch_size=batch_size, epochs=epochs, samples=samples, seed=seed)
        if epochs is not None:
            check_length(epochs := int(epochs))
            warn_of_length(policy, epochs)
        if samples is not None and samples < min(batch_size, rows):
            raise UsageError(f"a run of {samples:,} samples in batches of {batch_size:,}; give 1 batch or more")
        refuse_chosen(policy, "PruningSampler", self._chooses)
        if composition is not None and len(composition.concepts) != rows:
            raise UsageError(
                f"concepts of {len(composition.concepts):,} rows for {rows:,} rows; give those of these data"
            )
        self.composition = composition
        # The log is JSON, which has no integers of NumPy.
        self.rows, self.policy, self.batch_size = int(rows), policy, int(batch_size)
        self.samples, self.seed, self.drop_last = None if samples is None else int(samples), int(seed), drop_last
        self.epochs, self._epochs = epochs or 0, epochs
        self.ledger = policy.ledger(rows)
        if policy.needs_references != (references_N is not None):
            needs = "needs references_N, the losses of all rows under a reference model"
            raise UsageError(
                f"policy {policy.name} {needs if policy.needs_references else 'has no use for references_N'}"
            )
        if references_N is not None:
            self.ledger.refer(np.asarray(references_N))
        self._log: list[dict[str, Any]] = []
        self._steps_before, self._samples_before, self._progress_before = 0, 0, 0.0  # at the start of the epoch
        self._begin(0)
        if self.epochs > LAST_EPOCH + 1:
            raise UsageError(
                f"{samples:,} samples are more than {LAST_EPOCH + 1:,} epochs of {rows:,} rows, the most that are "
                "counted; give fewer"
            )

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the row ids of this rank's slice of every batch left in the epoch.

        Raises:
            UsageError: Batches have fewer rows than there are ranks, or accelerate would divide them again.
        """
        self._in_force()
        self._parts = []  # of a batch that is started again
        order, (rank, ranks) = self._order, rank_and_world_size()
        if ranks > 1 and self._prepared():
            raise UsageError(
                f"the loader was prepared by accelerate, which divides the batches among the {ranks} processes again; "
                "leave it out of accelerator.prepare: the sampler gives each process its rows"
            )
        if self._samples // self._steps < ranks:
            raise UsageError(
                f"batches of {self._samples // self._steps} rows for {ranks} ranks; give {ranks} rows or more"
            )
        spans = [self._span(step, rank, ranks) for step in range(self.step, self._steps)]
        return (order[lo:hi].tolist() for lo, hi in spans)

    def set_epoch(self, epoch: int) -> None:
        """Check that ``epoch`` is the current one; the sampler starts new epochs by itself.

        Raises:
            UsageError: It is another epoch.
        """
        self._in_force()
        if epoch != self.epoch and not self._prepared():  # loaders of accelerate count from 0, in a resumed run too
            raise UsageError(
                f"set_epoch({epoch}), but epoch {self.epoch} is at step {self.step} of {self._steps}; loop over "
                "range(sampler.epoch, sampler.epochs), and call end_epoch() to end an epoch early"
            )

    def reorder(self, rows_M: npt.ArrayLike) -> None:
        """Use another order of the rows of this epoch; call it before the first step, with the same order on all ranks.

        Args:
            rows_M: (M,) rows of the plan, batch after batch; a few may be missing or repeated, for example if another
                sampler pads them. Rows that do not fill a batch are left out, as usual.

        Raises:
            UsageError: A row is not in the plan, or the epoch has started.
        """
        plan, order = self._in_force(), np.asarray(rows_M)
        kept = order.ndim == 1 and order.dtype.kind in "iu" and len(order) and order.min() >= 0
        if not kept or order.max() >= self.rows or (plan.kept_N is not None and not plan.kept_N[order].all()):
            raise UsageError(
                f"an order of shape {order.shape} and type {order.dtype}; give rows that the plan keeps, (M,) integers"
            )
        if self.step:
            raise UsageError(f"epoch {self.epoch} is at step {self.step}; set its order before the first step")
        self._steps, self._samples = self._cut(len(order), self._samples_before)
        self._order = order[: self._samples].astype(np.int64)

    @untraced
    def reduce(self, rows_B: Any, losses_BR: torch.Tensor) -> torch.Tensor:
        """Record the losses of this rank's batch and return their weighted mean, to call ``backward`` on.

        Losses stay on their device until the epoch ends, so there is no synchronization. At the first step of an epoch
        the ranks check that they use the same order; at the last they gather their losses.

        Args:
            rows_B: (B,) integer row ids, as the loader returned them; best left on the CPU.
            losses_BR: (B, R) losses, R = 1 or 2, of any function of :mod:`thresher.dynamic.loss`.

        Returns:
            The mean over the batch, each row times its weight in the plan. If the slices of the ranks differ by a row,
            they are weighted so that gradients averaged over the ranks are those of the whole batch.

        Raises:
            UsageError: The rows are not those of the next batch, the losses have another shape, or the ranks use
                different orders.
        """
        return self._recorded(rows_B, losses_BR)

    @untraced
    def reduce_part(self, rows_B: Any, losses_BR: torch.Tensor) -> torch.Tensor:
        """Record the losses of a part of this rank's batch, for gradient accumulation over the parts of a batch.

        Call it once for every part, in order, each with the rows that follow those of the part before. The last part
        completes the batch, whose losses are then ranked together. Save checkpoints between batches. A batch that was
        left between its parts starts again when the sampler is iterated over again.

        Args:
            rows_B: (B,) integer row ids of the part.
            losses_BR: (B, R) their losses.

        Returns:
            The part of the weighted mean, to call ``backward`` on: those of all parts add up to what :meth:`reduce`
            returns for the batch.

        Raises:
            UsageError: The rows are not the next ones of the batch, or see :meth:`reduce`.
        """
        import torch

        from thresher.dynamic.loss import reduce

        self._in_force()
        if self._chooses:
            raise UsageError(f"a {type(self).__name__} chooses rows of a batch; call reduce with these")
        rank, ranks = rank_and_world_size()
        lo, hi = self._span(self.step, rank, ranks)
        own, at, rows = self._order[lo:hi], sum(map(len, self._parts)), as_array(rows_B)
        self._check_rows(rows, own[at : at + len(rows)])
        shape, known = tuple(losses_BR.shape), [self._parts[0].shape[1]] if self._parts else [1, 2]
        if shape not in [(len(rows), directions) for directions in known]:
            wanted = " or ".join(f"({len(rows)}, {directions})" for directions in known)
            raise UsageError(f"losses of shape {shape}; give {wanted}, the same for all parts")
        part = reduce(losses_BR, self._weights(rows, losses_BR.device)) * (len(rows) / len(own))
        self._parts.append(losses_BR.detach())
        if at + len(rows) == len(own):
            self._recorded(own, torch.cat(self._parts))
        return part

    def _check_rows(self, rows: npt.NDArray[Any], own: Ints) -> None:
        """Raise UsageError if row ids are not those of this rank's batch, or of the chosen part of it."""
        if rows.dtype.kind not in "iu" or not np.array_equal(rows, own):
            first = f", the first {own[0]:,}" if len(own) else ""
            raise UsageError(
                f"row ids of type {rows.dtype} and shape {rows.shape} are not those of step {self.step} of epoch "
                f"{self.epoch}, {len(own)} ids{first}; give every batch of the loader once, in order, with "
                "unchanged ids"
            )

    def _recorded(
        self, rows_B: Any, losses_BR: torch.Tensor, at_B: Ints | None = None, count: int | None = None
    ) -> torch.Tensor:
        """Record the losses of this rank's batch and return their weighted mean, see :meth:`reduce`.

        Args:
            rows_B: (B,) the rows.
            losses_BR: (B, R) their losses.
            at_B: Their positions in this rank's slice of the batch; None for the whole slice. The others are recorded
                as NaN, and losses of these that are not finite as infinity.
            count: Rows at such positions over all ranks.
        """
        import torch

        from thresher.dynamic.loss import reduce

        self._in_force()
        rank, ranks = rank_and_world_size()
        lo, hi = self._span(self.step, rank, ranks)
        own = self._order[lo:hi] if at_B is None else self._order[lo:hi][at_B]
        rows, shape = as_array(rows_B), tuple(losses_BR.shape)
        self._check_rows(rows, own)
        if shape not in ((len(own), 1), (len(own), 2)) or self._directions not in (0, shape[1]):
            raise UsageError(
                f"losses of shape {shape}; give ({len(own)}, 1) or ({len(own)}, 2), the same for the whole epoch"
            )
        if self._own_BR is None:
            self._agree(losses_BR.device)
            most = len(self) * (-(-self._samples // self._steps) // ranks + 1)
            self._own_BR = torch.empty((most, shape[1]), dtype=torch.float32, device=losses_BR.device)
            self._directions = shape[1]
        here_BR = self._own_BR[self._filled : self._filled + hi - lo]
        if at_B is None:
            here_BR.copy_(losses_BR.detach())
        else:
            here_BR.fill_(torch.nan)
            finite_BR = torch.nan_to_num(losses_BR.detach().float(), torch.inf, torch.inf, torch.inf)
            here_BR[torch.from_numpy(at_B).to(here_BR.device)] = finite_BR
        self._filled += hi - lo
        weights_B = self._weights(rows, losses_BR.device, None if count is None else len(own) * ranks / count)
        self.step, self._parts = self.step + 1, []
        if self.step == self._steps:
            self.end_epoch()
        return reduce(losses_BR, weights_B)

    def _weights(
        self, rows_B: npt.NDArray[Any], device: torch.device, of_mean: float | None = None
    ) -> torch.Tensor | None:
        """Return the weights of rows of this rank's batch, (B,); None if all are 1.

        They are those of the plan, times ``of_mean``: what makes the mean over ranks that of the whole batch.
        """
        import torch

        plan = self._in_force()
        if of_mean is None:
            rank, ranks = rank_and_world_size()
            lo, hi = self._span(self.step, rank, ranks)
            of_mean = (hi - lo) * ranks / (self._bound(self.step + 1) - self._bound(self.step))
        if plan.weights_N is None and of_mean == 1:
            return None
        weights_B = torch.full((len(rows_B),), of_mean, dtype=torch.float32, device="cpu")
        if plan.weights_N is not None:
            weights_B *= torch.from_numpy(plan.weights_N[rows_B])
        return weights_B.to(device, non_blocking=True)

    def fewest_steps(self) -> int:
        """Return the number of steps of the shortest epoch: this one, exactly, or a later one, as forecast."""
        return self._fewest

    def end_epoch(self) -> None:
        """End the epoch early, on all ranks together: record the losses and plan the next epoch.

        The last step of an epoch calls this automatically.
        """
        plan, losses_MR = self._in_force(), self._gathered()
        of_policy = plan if self._of_policy is None else self._of_policy
        bounds = [self._bound(step) for step in range(self.step + 1)]
        batches = (
            self._trained(self._order[lo:hi], losses_MR[lo:hi]) for lo, hi in zip(bounds, bounds[1:], strict=False)
        )
        recorded = record_epoch(self.policy, self.ledger, of_policy, batches, self._rng)
        rows, recorded = self._entry(plan, recorded, len(losses_MR))
        planned = [*(entry["rows"] for entry in self._log), rows]
        self._samples_before += len(losses_MR)
        self._next(plan, rows, self.rows, 1 - sum(planned) / (self.rows * len(planned)), recorded)

    def state_dict(self) -> dict[str, Any]:
        """Return the state, at any step of an epoch: CPU tensors and text, for ``torch.save`` or ``numpy.savez``.

        All ranks must call it; each gets the same, complete state, so save it on one. It contains the ledger, the
        current plan, the order of this epoch and the losses recorded in it.
        """
        where = [self.epoch, self.step, self._steps_before, self._samples_before]
        arrays = {"order": self._order.astype(np.int32), "losses": self._gathered()}
        return self._state([*self._same().values(), *where], arrays, self.ledger, self._of_policy)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state of :meth:`state_dict`, on any number of ranks; every rank loads the same state.

        The length of the run may differ. The current epoch keeps its number of steps and samples, so the run must be
        long enough to finish it.

        Raises:
            UsageError: The state has another dataset, policy, batch size or seed, or this run is too short for it.
        """
        loaded = self._loaded(state, {"order", "losses", "ledger.times"}, self._same(), more=4)
        epoch, step, steps_before, samples_before = loaded.numbers
        order, losses = loaded.arrays["order"], loaded.arrays["losses"]
        rows = (
            order.dtype.kind == "i"
            and order.ndim == 1
            and 0 <= order.min(initial=0) <= order.max(initial=0) < self.rows
        )
        if not rows or losses.dtype.kind != "f" or losses.ndim != 2 or min(loaded.numbers) < 0:
            raise UsageError("not the state of a PruningSampler: its order or its losses are not those of an epoch")
        if self._epochs is not None:
            refuse_shorter(epoch + bool(step), self._epochs, "epochs")
        else:
            refuse_shorter(samples_before + (len(order) if step else 0), self.samples, "samples")
        if loaded.ledger is not None:
            check_references(self.ledger.references_N, loaded.ledger)
            self.ledger = loaded.ledger
        self._log, self._progress_before = loaded.log, loaded.progress
        self._steps_before, self._samples_before = steps_before, samples_before
        self._begin(epoch, loaded.plan, order.astype(np.int64))
        if step:
            self.step = self._since = step
            self._known, self._directions = [losses.copy()], losses.shape[1]

    def _trained(self, rows_B: Ints, losses_BR: Losses) -> tuple[Ints, Losses]:
        """Return the rows of a batch that were trained on, and their losses."""
        return rows_B, losses_BR

    def _entry(self, plan: Plan, recorded: dict[str, Any], passed: int) -> tuple[int, dict[str, Any]]:
        """Return the rows of an epoch and its other fields for the log; ``passed`` rows were in its batches."""
        return len(plan), recorded

    def _prepared(self) -> bool:
        """Return whether the loader that is being iterated over was made from this sampler by accelerate."""
        inner = accelerate_loader()
        while inner is not None and inner is not self:
            inner = getattr(inner, "batch_sampler", None)
        return inner is self

    def _same(self) -> dict[str, int]:
        """Return the values that must be equal in a state, by name."""
        return {
            "rows": self.rows,
            "batch_size": self.batch_size,
            "drop_last": int(self.drop_last),
            "seed": self.seed,
        }

    def _described(self) -> str:
        composed = "" if self.composition is None else f" {self.composition.described()}"
        return f"{super()._described()}{composed}"

    def _share_done(self) -> float:
        return self._bound(self.step) / (self._samples + self._later[1])

    def _steps_later(self) -> int:
        return self._later[0]

    def _length(self) -> str:
        return f"{self.epochs} epochs" if self.samples is None else f"{self.samples:,} samples"

    def _begin(self, epoch: int, plan: Plan | None = None, order: Ints | None = None) -> None:
        """Start an epoch, with this plan and order or with new ones."""
        self.epoch, self.step, self._since, self._filled, self._directions = epoch, 0, 0, 0, 0
        self._known, self._own_BR, self._parts, self.plan, self._of_policy = [], None, [], None, None
        self._order, self._steps, self._samples = np.empty(0, np.int64), 0, 0
        self._later, self._fewest = (0, 0), 0
        before = self._samples_before
        planned = None if self._over(epoch, before) else self._planned(epoch, plan, order)
        if planned is None or self._over(epoch, before, len(planned[1])):
            self.epochs = self._epochs or epoch
            return
        new, order = planned
        self._steps, self._samples = self._cut(len(order), before)
        self._order = order[: self._samples].copy()
        self._of_policy = new  # a policy must not take the rows that a composition leaves out for its own choice
        self.plan = new if self.composition is None else _of_rows(new, self._order)
        steps, seen, self.epochs, self._fewest = self._steps, before + self._samples, epoch + 1, self._steps
        while self.epochs <= LAST_EPOCH + 1 and not self._over(self.epochs, seen, kept := self._forecast(self.epochs)):
            more = self._cut(kept, seen)
            steps, seen, self.epochs = steps + more[0], seen + more[1], self.epochs + 1
            self._fewest = min(self._fewest, more[0])
        self._later = steps - self._steps, seen - before - self._samples

    def _planned(self, epoch: int, plan: Plan | None, order: Ints | None) -> tuple[Plan, Ints]:
        """Return the plan of an epoch and the order of its rows: these, or new ones."""
        new = self.policy.plan(self.ledger, epoch, self._rng("plan", epoch)) if plan is None else plan
        if not len(new):
            raise UsageError(f"the plan of epoch {epoch} keeps none of {self.rows:,} rows; prune less")
        if plan is None or order is None:
            order = self._rng("order", epoch).permutation(new.rows())
            if self.composition is not None:
                order = self.composition.arranged(order, self.batch_size)
        return new, order

    def _forecast(self, epoch: int) -> int:
        """Return how many samples a later epoch is expected to have, before they are cut into batches."""
        kept = round((1 - self.policy.forecast(epoch)) * self.rows)
        return max(1, kept if self.composition is None else self.composition.length(kept, self.batch_size))

    def _over(self, epoch: int, seen: int, samples: int = 1) -> bool:
        """Whether the run is over before ``epoch``, which has ``samples`` samples, after ``seen``."""
        if self._epochs is not None or self.samples is None:
            return epoch >= (self._epochs or 0)
        return self.samples - seen < (min(samples, self.batch_size) if self.drop_last and seen else 1)

    def _cut(self, samples: int, seen: int) -> tuple[int, int]:
        """Return the number of batches of an epoch of ``samples`` samples, after ``seen``, and of samples in them."""
        if self.samples is not None:
            samples = min(samples, self.samples - seen)
        if not self.drop_last:
            return -(-samples // self.batch_size), samples
        steps = max(1, samples // self.batch_size)
        return steps, min(samples, steps * self.batch_size)

    def _bound(self, step: int) -> int:
        """Return the position in the order where batch ``step`` starts."""
        return step * self._samples // self._steps if step else 0

    def _span(self, step: int, rank: int, ranks: int) -> tuple[int, int]:
        """Return the positions in the order where a rank's slice of a batch starts and ends."""
        lo, rows = self._bound(step), self._bound(step + 1) - self._bound(step)
        return lo + rank * rows // ranks, lo + (rank + 1) * rows // ranks

    def _agree(self, device: torch.device) -> None:
        """Raise UsageError if the ranks are not at the same position of the same order."""
        import torch

        here = torch.tensor([self.epoch, self.step, zlib.crc32(np.ascontiguousarray(self._order).data)], device=device)
        first, *others = all_gather(here)
        if not all(torch.equal(first, other) for other in others):
            raise UsageError("the ranks use different orders; give all of them the same arguments, seed and state")

    def _gathered(self) -> Losses:
        """Return the losses of all ranks for the epoch so far, in the order of its rows; gathers new ones."""
        if self._own_BR is not None and self.step > self._since:
            ranks, start, end = rank_and_world_size()[1], self._bound(self._since), self._bound(self.step)
            spans = [[self._span(s, rank, ranks) for s in range(self._since, self.step)] for rank in range(ranks)]
            at_ranks = [np.concatenate([np.arange(*span) for span in of_rank]) - start for of_rank in spans]
            losses_MR = np.empty((end - start, self._directions), np.float32)
            for at, part in zip(at_ranks, all_gather(self._own_BR[: max(map(len, at_ranks))]), strict=True):
                losses_MR[at] = part[: len(at)].cpu().numpy()
            self._known, self._since, self._filled = [*self._known, losses_MR], self.step, 0
        return np.concatenate(self._known) if self._known else np.empty((0, 1), np.float32)
