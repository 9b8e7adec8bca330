"""The sampler that prunes in the training loop, for map-style datasets, on one process or on several.

Every rank holds the same plan, the same order and the same ledger; no row id is ever sent. The order of an epoch is
cut into global batches, and each rank takes its slice of every one: any number of ranks sees the same batches. Losses
stay with the rank that computed them until the epoch ends (or a checkpoint is taken), are gathered once, and are
recorded batch by batch in step order, so ledgers do not depend on the number of ranks either.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from thresher.dynamic.histogram import LossHistogram
from thresher.dynamic.ledger import ILL_MATCHED, LEFT_OUT, REDUNDANT, Bools, Ints, Ledger, Losses
from thresher.dynamic.policy import Plan, Policy
from thresher.errors import UsageError

if TYPE_CHECKING:
    import torch  # noqa: TID253

_VERSION = 1
_ANY = REDUNDANT | ILL_MATCHED | LEFT_OUT


class with_rows:  # noqa: N801 - reads as the verb it is
    """A map-style dataset whose items come with their row ids: ``(row, item)``."""

    def __init__(self, dataset: Any) -> None:
        """Wrap ``dataset``, anything with ``len`` and whole-number indices."""
        self.dataset = dataset

    def __len__(self) -> int:
        """Return the rows of the dataset."""
        return len(self.dataset)

    def __getitem__(self, row: int) -> tuple[int, Any]:
        """Return the row id and the item."""
        return row, self.dataset[row]

    def __getitems__(self, rows: Sequence[int]) -> list[tuple[int, Any]]:
        """Return a batch, read in one go where the dataset can do that."""
        many = getattr(self.dataset, "__getitems__", None)
        return list(zip(rows, many(rows) if many else (self.dataset[row] for row in rows), strict=True))


class PruningSampler:
    """Batches of the rows that a policy keeps, epoch by epoch, and the record of their losses.

    Give it to a DataLoader as ``batch_sampler``. A step is one batch, done when its losses come back through
    :meth:`reduce`, however far ahead the loader has read; the last one ends the epoch and plans the next.

    Attributes:
        rows: N, the rows of the dataset.
        policy: What says which rows to train on.
        batch_size: Rows of a batch over all ranks.
        epochs: Length of the run, which schedules go by; with ``samples``, as many as these are expected to last.
        samples: What the run is to see in all, or None; it ends with the last batch within them, in mid-epoch or not.
        seed: Of orders, draws and ties; the same on all ranks.
        drop_last: Whether the rows that fill no batch are left for another epoch. If not, the epoch has one batch
            more and all its batches are the same size but for one row. (An epoch shorter than a batch is one batch.)
        epoch: The epoch in progress; the one after the last when the run is done.
        step: Batches of it that are done; iteration goes on from there.
        ledger: What was recorded in the epochs before.
        plan: The plan in force; None when all epochs are done.
    """

    step: int
    plan: Plan | None
    _order: Ints  # the self._samples rows of the epoch, batch after batch
    _samples: int
    _steps: int
    _later: tuple[int, int]  # steps and samples forecast for the epochs to come
    _since: int
    _filled: int
    _directions: int  # R, 0 before it is known
    _known: list[Losses]  # all ranks' losses of the steps before self._since, in that order
    _own_BR: torch.Tensor | None  # this rank's losses since; self._filled rows of it are

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
    ) -> None:
        """Make the plan of epoch 0; see the attributes. Give the length either by ``epochs`` or by ``samples``.

        By samples, runs of any two policies can be made equally long: full training on the samples that a pruned
        run saw is the fair rival of it.
        """
        if (epochs is None) == (samples is None):
            raise UsageError(f"{epochs=}, {samples=}; give one of the two, the other is None")
        if batch_size < 1 or not 0 <= seed < 2**63:
            raise UsageError(f"{batch_size=}, {seed=}; give 1 or more, and 0 to 2^63 - 1")
        if epochs is not None and epochs < 1 or samples is not None and samples < min(batch_size, rows):
            length = f"{epochs} epochs" if samples is None else f"{samples:,} samples in batches of {batch_size:,}"
            raise UsageError(f"a run of {length}; give 1 epoch or more, or samples for a batch or more")
        self.rows, self.policy, self.batch_size = rows, policy, batch_size
        self.samples, self.seed, self.drop_last = samples, seed, drop_last
        self.epochs, self._epochs = epochs or 0, epochs
        self.ledger = policy.ledger(rows)
        self._log: list[dict[str, Any]] = []
        self._steps_before, self._samples_before, self._progress_before = 0, 0, 0.0  # at the start of the epoch
        self._begin(0)

    def __len__(self) -> int:
        """Return the batches of the epoch that are still to come."""
        return self._steps - self.step

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the row ids of this rank's slice of every batch that is still to come in the epoch."""
        self._in_force()
        order, (rank, ranks) = self._order, place()
        if self._samples // self._steps < ranks:
            raise UsageError(f"batches of {self._samples // self._steps} rows for {ranks} ranks; give each a row")
        spans = [self._span(step, rank, ranks) for step in range(self.step, self._steps)]
        return (order[lo:hi].tolist() for lo, hi in spans)

    def set_epoch(self, epoch: int) -> None:
        """Check that ``epoch`` is the one in progress: epochs follow one another by themselves."""
        self._in_force()
        if epoch != self.epoch:
            raise UsageError(
                f"set_epoch({epoch}), but epoch {self.epoch} is at step {self.step} of {self._steps}; loop over "
                "range(sampler.epoch, sampler.epochs), and call end_epoch() to cut an epoch short"
            )

    def reorder(self, rows_M: npt.ArrayLike) -> None:
        """Train on the rows of this epoch in an order made elsewhere, before its first step; all ranks the same.

        Args:
            rows_M: (M,) rows of the plan, batch after batch; a few may be missing or come twice, as where a sampler
                pads them. What fills no batch is left out as ever.
        """
        plan, order = self._in_force(), np.asarray(rows_M)
        kept = order.ndim == 1 and order.dtype.kind in "iu" and len(order) and order.min() >= 0
        if not kept or order.max() >= self.rows or (plan.kept_N is not None and not plan.kept_N[order].all()):
            raise UsageError(
                f"an order of shape {order.shape}, type {order.dtype}; give rows that the plan keeps, (M,)"
            )
        if self.step:
            raise UsageError(f"epoch {self.epoch} is at step {self.step}; give its order before the first step")
        self._steps, self._samples = self._cut(len(order), self._samples_before)
        self._order = order[: self._samples].astype(np.int64)

    def reduce(self, rows_B: Any, losses_BR: torch.Tensor) -> torch.Tensor:
        """Record the losses of this rank's batch and return their weighed mean, to call ``backward`` on.

        Losses stay on their device until the epoch ends, so nothing waits for them. At the first step of an epoch
        the ranks make sure that they go by the same order; at the last they exchange their losses.

        Args:
            rows_B: (B,) the row ids, as the loader gave them; best left on the CPU.
            losses_BR: (B, R) losses, R = 1 or 2, of any function of :mod:`thresher.dynamic.loss`.

        Returns:
            The mean over the batch, each row times its weight in the plan. Where the ranks' slices differ by a row
            they are weighed so that gradients averaged over the ranks are those of the whole batch.
        """
        import torch

        from thresher.dynamic.loss import reduce

        plan, (rank, ranks) = self._in_force(), place()
        lo, hi = self._span(self.step, rank, ranks)
        rows, shape = as_array(rows_B), tuple(losses_BR.shape)
        if rows.dtype.kind not in "iu" or not np.array_equal(rows, self._order[lo:hi]):
            raise UsageError(
                f"row ids {rows.dtype} {rows.shape}: not those of step {self.step} of epoch {self.epoch}, {hi - lo} "
                f"from {self._order[lo]:,} on; give every batch of the loader once, in its order, ids as they are"
            )
        if shape not in ((hi - lo, 1), (hi - lo, 2)) or self._directions not in (0, shape[1]):
            raise UsageError(f"losses of shape {shape}; give ({hi - lo}, 1) or ({hi - lo}, 2), the same all epoch")
        if self._own_BR is None:
            self._agree(losses_BR.device)
            most = len(self) * (-(-self._samples // self._steps) // ranks + 1)
            self._own_BR = torch.empty((most, shape[1]), dtype=torch.float32, device=losses_BR.device)
            self._directions = shape[1]
        self._own_BR[self._filled : self._filled + hi - lo].copy_(losses_BR.detach())
        self._filled += hi - lo
        weights_B, of_mean = None, (hi - lo) * ranks / (self._bound(self.step + 1) - self._bound(self.step))
        if plan.weights_N is not None or of_mean != 1:
            weights_B = torch.full((hi - lo,), of_mean, dtype=torch.float32, device="cpu")
            if plan.weights_N is not None:
                weights_B *= torch.from_numpy(plan.weights_N[rows])
            weights_B = weights_B.to(losses_BR.device, non_blocking=True)
        self.step += 1
        if self.step == self._steps:
            self.end_epoch()
        return reduce(losses_BR, weights_B)

    def end_epoch(self) -> None:
        """Cut the epoch short, all ranks together: record what was trained on and plan the next.

        The last step of an epoch does this by itself.
        """
        plan, losses_MR = self._in_force(), self._gathered()
        bounds = [self._bound(step) for step in range(self.step + 1)]
        batches = ((self._order[lo:hi], losses_MR[lo:hi]) for lo, hi in zip(bounds, bounds[1:], strict=False))
        told = settle(self.policy, self.ledger, plan, batches, self._rng)
        planned = [*(entry["rows"] for entry in self._log), len(plan)]
        entry = {
            "epoch": self.epoch,
            "phase": plan.phase,
            "rows": len(plan),
            "total": self.rows,
            "pruned_so_far": 1 - sum(planned) / (self.rows * len(planned)),
            "steps": self.step,
            **told,
        }
        self._log.append(entry)
        self._progress_before, self._steps_before = self.progress, self._steps_before + self.step
        self._samples_before += len(losses_MR)
        self._begin(self.epoch + 1)

    def log(self) -> list[dict[str, Any]]:
        """Return what happened, one entry per finished epoch, of plain values that go into JSON.

        ``rows`` the plan kept of ``total``; ``pruned_so_far`` is the share the plans left out since epoch 0.
        ``samples`` were trained on, of which ``not_finite`` had no finite loss and were not recorded. ``overlap`` is
        the share of the ``candidates`` that the last epoch to find any had found as well. ``histogram`` counts the
        losses in bins that all epochs share, see :func:`thresher.dynamic.histogram.LossHistogram`.
        """
        return [dict(entry) for entry in self._log]

    @property
    def progress(self) -> float:
        """The share of the run that is done, 0 to 1, by samples.

        An epoch moves it by its samples out of those left when it began: what the forecasts had wrong is spread
        over what is left, so that progress never jumps, never falls, and ends at 1.
        """
        if self.plan is None:
            return 1.0
        done = self._bound(self.step) / (self._samples + self._later[1])
        return self._progress_before + (1 - self._progress_before) * done

    def steps_left(self) -> int:
        """Return the steps to come: exact for this epoch, for later ones by the forecast of the policy."""
        return len(self) + self._later[0]

    def total_steps(self) -> int:
        """Return the steps of the whole run: those done, and :meth:`steps_left`."""
        return self._steps_before + self.step + self.steps_left()

    def state_dict(self) -> dict[str, Any]:
        """Return the state, in mid-epoch too: tensors on the CPU and text, for ``torch.save`` or ``numpy.savez``.

        On several ranks all must call it; each gets the same, complete state, and one of them may save it. It has
        the ledger, the plan in force, the order of this epoch and the losses recorded in it.
        """
        import torch

        same = [_VERSION, self.rows, self.batch_size, self.drop_last, self.seed]
        where = [self.epoch, self.step, self._steps_before, self._samples_before]
        arrays = {
            "numbers": np.array([*same, *where], np.int64),
            "progress": np.array(self._progress_before),
            "order": self._order.astype(np.int32),
            "losses": self._gathered(),
            **{f"ledger.{name}": array for name, array in self.ledger.state().items()},
            **{f"plan.{name}": array for name, array in (self.plan.state() if self.plan else {}).items()},
        }
        arrays["ledger.times"] = arrays["ledger.times"].view(np.int16)  # not every torch knows uint16
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        return {**tensors, "policy": describe(self.policy), "log": json.dumps(self._log)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was called, on any number of ranks; every rank loads the same state.

        The length of the run may differ. An epoch in progress is finished as it was begun, with its steps and samples,
        so the run has to last as long.

        Raises:
            UsageError: The state of another dataset, policy, batch size or seed, or one that is further than this run
                goes.
        """
        arrays = {name: as_array(state[name]) for name in state}
        needed = {"numbers", "progress", "order", "losses", "policy", "log", "ledger.times"}
        if not needed <= set(arrays) or arrays["numbers"].shape != (9,) or arrays["numbers"][0] != _VERSION:
            raise UsageError(f"not the state of a PruningSampler of version {_VERSION}")
        *same, epoch, step, steps_before, samples_before = arrays["numbers"].tolist()[1:]
        here = (self.rows, self.batch_size, int(self.drop_last), self.seed, describe(self.policy))
        names = ("rows", "batch_size", "drop_last", "seed", "policy")
        for name, mine, theirs in zip(names, here, (*same, str(arrays["policy"])), strict=True):
            if mine != theirs:
                raise UsageError(f"the state of a sampler with {name} = {theirs}; this one has {mine}")
        self._check_length(epoch + bool(step), samples_before + (len(arrays["order"]) if step else 0))
        arrays["ledger.times"] = arrays["ledger.times"].view(np.uint16)
        ledger = Ledger.from_state({name[7:]: a for name, a in arrays.items() if name.startswith("ledger.")})
        of_plan = {name[5:]: array for name, array in arrays.items() if name.startswith("plan.")}
        plan = Plan.from_state(of_plan) if of_plan else None
        self.ledger, self._log = ledger, json.loads(str(arrays["log"]))
        self._steps_before, self._samples_before = steps_before, samples_before
        self._progress_before = float(arrays["progress"])
        self._begin(epoch, plan, arrays["order"].astype(np.int64))
        if step:
            self.step = self._since = step
            self._known, self._directions = [arrays["losses"].copy()], arrays["losses"].shape[1]

    def _begin(self, epoch: int, plan: Plan | None = None, order: Ints | None = None) -> None:
        """Start an epoch: by the plan and in the order given, or by new ones."""
        self.epoch, self.step, self._since, self._filled, self._directions = epoch, 0, 0, 0, 0
        self._known, self._own_BR, self.plan = [], None, None
        self._order, self._steps, self._samples = np.empty(0, np.int64), 0, 0
        self._later = 0, 0
        if self._over(epoch, self._samples_before):
            self.epochs = self._epochs or epoch
            return
        new = self.policy.plan(self.ledger, epoch, self._rng("plan", epoch)) if plan is None else plan
        if not len(new):
            raise UsageError(f"the plan of epoch {epoch} keeps none of {self.rows:,} rows; prune less")
        self.plan = new
        length = len(new) if plan is None or order is None else len(order)
        self._steps, self._samples = self._cut(length, self._samples_before)
        if plan is None or order is None:
            order = self._rng("order", epoch).permutation(new.rows())[: self._samples].copy()
        self._order = order
        steps, seen, self.epochs = self._steps, self._samples_before + self._samples, epoch + 1
        while not self._over(self.epochs, seen):
            kept = round((1 - self.policy.forecast(self.epochs)) * self.rows)
            more = self._cut(max(1, kept), seen)
            steps, seen, self.epochs = steps + more[0], seen + more[1], self.epochs + 1
        self._later = steps - self._steps, seen - self._samples_before - self._samples

    def _check_length(self, epochs: int, seen: int) -> None:
        """Refuse a state whose epochs, with the one in progress, are more than this run has, or whose samples are."""
        length, needed, unit = (self._epochs, epochs, "epochs") if self._epochs else (self.samples, seen, "samples")
        if length is not None and needed > length:
            raise UsageError(
                f"the state of a run of {needed:,} {unit}, with the epoch it is in, and this one ends after "
                f"{length:,}; give {unit}={needed} or more"
            )

    def _over(self, epoch: int, seen: int) -> bool:
        """Whether the run is over before ``epoch``, after ``seen`` samples."""
        if self._epochs is not None:
            return epoch >= self._epochs
        return self.samples is None or self.samples - seen < (self.batch_size if self.drop_last and seen else 1)

    def _in_force(self) -> Plan:
        if self.plan is None:
            length = f"{self.epochs} epochs" if self.samples is None else f"{self.samples:,} samples"
            raise UsageError(f"all {length} are done; make the sampler for more to go on")
        return self.plan

    def _cut(self, samples: int, seen: int) -> tuple[int, int]:
        """Return the batches of an epoch of ``samples``, after ``seen``, and the samples in them."""
        if self.samples is not None:
            samples = min(samples, self.samples - seen)
        if not self.drop_last:
            return -(-samples // self.batch_size), samples
        steps = max(1, samples // self.batch_size)
        return steps, min(samples, steps * self.batch_size)

    def _bound(self, step: int) -> int:
        """Where in the order batch ``step`` begins."""
        return step * self._samples // self._steps if step else 0

    def _span(self, step: int, rank: int, ranks: int) -> tuple[int, int]:
        """Where in the order a rank's slice of a batch begins and ends."""
        lo, rows = self._bound(step), self._bound(step + 1) - self._bound(step)
        return lo + rank * rows // ranks, lo + (rank + 1) * rows // ranks

    def _rng(self, *purpose: str | int) -> np.random.Generator:
        digest = hashlib.sha256(json.dumps([self.seed, *purpose]).encode()).digest()
        return np.random.Generator(np.random.Philox(key=np.frombuffer(digest[:16], "<u8")))

    def _agree(self, device: torch.device) -> None:
        """Refuse to go on where the ranks are not in the same place of the same order."""
        import torch

        here = torch.tensor([self.epoch, self.step, zlib.crc32(self._order.tobytes())], device=device)
        first, *others = exchange(here)
        if not all(torch.equal(first, other) for other in others):
            raise UsageError("the ranks go by different orders; give all the same arguments, seed and state")

    def _gathered(self) -> Losses:
        """Return all ranks' losses of the epoch so far, in the order of its rows; exchanges what is new."""
        if self._own_BR is not None and self.step > self._since:
            ranks, start, end = place()[1], self._bound(self._since), self._bound(self.step)
            spans = [[self._span(s, rank, ranks) for s in range(self._since, self.step)] for rank in range(ranks)]
            at_ranks = [np.concatenate([np.arange(*span) for span in of_rank]) - start for of_rank in spans]
            losses_MR = np.empty((end - start, self._directions), np.float32)
            for at, part in zip(at_ranks, exchange(self._own_BR[: max(map(len, at_ranks))]), strict=True):
                losses_MR[at] = part[: len(at)].cpu().numpy()
            self._known, self._since, self._filled = [*self._known, losses_MR], self.step, 0
        return np.concatenate(self._known) if self._known else np.empty((0, 1), np.float32)


class HasProgress(Protocol):
    """What schedules go by."""

    @property
    def progress(self) -> float:
        """The share of the run that is done, 0 to 1."""
        ...

    def steps_left(self) -> int:
        """Return the steps to come, 0 when all are done."""
        ...


class CosineByProgress:
    """Warm-up, then half a cosine down, by the progress of the sampler: epochs may shrink as they like.

    While rates rise, the batch at hand counts as done: the first step is taken at a rate above 0. They start to fall
    from their peak at the first batch after, and reach their end with the last: no step is taken at a rate of 0.

    It holds no state: the rates it scales are kept in the optimizer, as ``initial_lr``. Call :meth:`step` after
    every ``optimizer.step()``.
    """

    def __init__(self, optimizer: Any, sampler: HasProgress, *, warmup: float = 0.05, final: float = 0.0) -> None:
        """Set the rates for the next step.

        Args:
            optimizer: A torch optimizer; each of its groups keeps its own rate.
            sampler: Whose progress counts: a :class:`PruningSampler`, or a ``StreamPruner``.
            warmup: Share of the run's samples over which rates rise, below 1.
            final: What the rates end at, as a share of where they start.
        """
        if not 0 <= warmup < 1 or not 0 <= final <= 1:
            raise UsageError(f"warmup = {warmup}, final = {final}; give shares, the warm-up below 1")
        self.optimizer, self.sampler, self.warmup, self.final = optimizer, sampler, warmup, final
        self.step()

    def factor(self) -> float:
        """Return what rates are multiplied by now."""
        progress = self.sampler.progress
        if progress < self.warmup:
            ahead = progress + (1 - progress) / self.sampler.steps_left()  # with the batch at hand
            return min(1.0, ahead / self.warmup)
        down = (progress - self.warmup) / (1 - self.warmup)
        return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * down))

    def step(self) -> None:
        """Set the rates for the next step."""
        for group in self.optimizer.param_groups:
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * self.factor()


def settle(
    policy: Policy,
    ledger: Ledger,
    plan: Plan,
    batches: Iterable[tuple[Ints, Losses]],
    rng: Callable[..., np.random.Generator],
) -> dict[str, Any]:
    """Record an epoch in the ledger, batch by batch, with the candidates found in it; return what the log tells.

    Args:
        policy: What planned the epoch.
        ledger: Changed in place.
        plan: The plan of the epoch.
        batches: The rows of every global batch and their losses (B, R), in step order.
        rng: Makes the generator for a purpose, from words and numbers.
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
    marks_N = policy.finish(ledger, plan, rng("finish", epoch))
    if marks_N is not None:
        ledger.mark(marks_N, epoch)
    now_N = ledger.candidates(epoch, _ANY)
    found = int(np.count_nonzero(now_N))
    return {
        "samples": samples,
        "loss": total / finite if finite else None,
        "histogram": histogram.told(),
        "not_finite": samples - finite,
        "redundant": int(np.count_nonzero(ledger.candidates(epoch, REDUNDANT))),
        "ill_matched": int(np.count_nonzero(ledger.candidates(epoch, ILL_MATCHED))),
        "candidates": found,
        "overlap": int((now_N & before_N).sum()) / found if found and before_N is not None else None,
    }


def place() -> tuple[int, int]:
    """Return this process's rank, and how many there are."""
    import torch.distributed as dist

    together = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if together else (0, 1)


def exchange(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Return the tensors of all ranks, which have one shape."""
    import torch
    import torch.distributed as dist

    if place()[1] == 1:
        return [tensor]
    tensor = tensor.cpu() if dist.get_backend() == "gloo" else tensor
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor)
    return parts


def as_array(values: Any) -> npt.NDArray[Any]:
    """Return a tensor, an array or numbers as an array on the CPU."""
    return np.asarray(values.cpu() if hasattr(values, "cpu") else values)


def describe(policy: Any, *, defaults: bool = False) -> str:
    """Return the policy with the parameters that are not their defaults, an array by its digest.

    Args:
        policy: A dataclass.
        defaults: Tell every parameter, for people: fractions to four digits.
    """
    told = []
    for item in dataclasses.fields(policy):
        value = getattr(policy, item.name)
        if isinstance(value, np.ndarray):
            told.append(f"{item.name}={value.dtype}{value.shape}:{hashlib.sha256(value.tobytes()).hexdigest()[:16]}")
        elif defaults and isinstance(value, float):
            told.append(f"{item.name}={value:.4g}")
        elif defaults or value != item.default:
            told.append(f"{item.name}={value!r}")
    return f"{type(policy).__name__}({', '.join(told)})"
