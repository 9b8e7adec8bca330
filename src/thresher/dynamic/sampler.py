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
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from thresher.dynamic.ledger import ILL_MATCHED, LEFT_OUT, REDUNDANT, Ints, Ledger, Losses
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

    Give it to a DataLoader as ``batch_sampler``. A step is one batch, counted when its losses come back through
    :meth:`reduce` (or :meth:`record`), however far ahead the loader has read. The last one ends the epoch and makes
    the plan of the next.

    Attributes:
        rows: N, the rows of the dataset.
        policy: What says which rows to train on.
        batch_size: Rows of a batch over all ranks.
        epochs: Length of the run, which schedules go by.
        seed: Of orders, draws and ties; the same on all ranks.
        drop_last: Whether the rows that fill no batch are left for another epoch. If not, the epoch has one batch
            more and all its batches are the same size but for one row. (An epoch shorter than a batch is one batch.)
        epoch: The epoch in progress; ``epochs`` when all is done.
        step: Batches of it that are done, by which the loader goes on after a checkpoint.
        ledger: What was recorded in the epochs before.
        plan: The plan in force; None when all is done.
    """

    def __init__(
        self, rows: int, *, policy: Policy, batch_size: int, epochs: int, seed: int = 0, drop_last: bool = True
    ) -> None:
        """Make the plan of epoch 0; see the attributes."""
        if batch_size < 1 or epochs < 1:
            raise UsageError(f"batch_size = {batch_size}, epochs = {epochs}; give 1 or more for each")
        if not 0 <= seed < 2**63:
            raise UsageError(f"seed = {seed}; give a whole number from 0, below 2^63")
        self.rows, self.policy, self.batch_size = rows, policy, batch_size
        self.epochs, self.seed, self.drop_last = epochs, seed, drop_last
        self.ledger = policy.ledger(rows)
        self._log: list[dict[str, Any]] = []
        self._steps_before, self._progress_before = 0, 0.0
        self._begin(0)

    def __len__(self) -> int:
        """Return the batches of the epoch that are still to come."""
        return self._steps - self.step

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the row ids of this rank's slice of every batch that is still to come in the epoch."""
        if self.plan is None:
            raise UsageError(f"all {self.epochs} epochs are done; make the sampler with more to go on")
        rank, ranks = _place()
        if min(self.batch_size, self._samples // self._steps) < ranks:
            raise UsageError(f"batches of {self._samples // self._steps} rows for {ranks} ranks; give each a row")
        order, spans = self._order, [self._span(step, rank, ranks) for step in range(self.step, self._steps)]
        return (order[lo:hi].tolist() for lo, hi in spans)

    def set_epoch(self, epoch: int) -> None:
        """Check that ``epoch`` is the one in progress: epochs follow one another by themselves."""
        if epoch != self.epoch or self.plan is None:
            doing = f"epoch {self.epoch} is at step {self.step} of {self._steps}"
            hint = "loop over range(sampler.epoch, sampler.epochs), or end_epoch() to cut an epoch short"
            raise UsageError(f"set_epoch({epoch}), but {doing if self.plan else 'all epochs are done'}; {hint}")

    def reduce(self, rows_B: Any, losses_BR: torch.Tensor) -> torch.Tensor:
        """Record the losses of this rank's batch and return their weighed mean, to call ``backward`` on.

        Args:
            rows_B: (B,) the row ids, as the loader gave them; best left on the CPU.
            losses_BR: (B, R) losses, R = 1 or 2, of any function of :mod:`thresher.dynamic.loss`.

        Returns:
            The mean over the batch, each row times its weight in the plan. Where the ranks' slices differ by a row
            they are weighed so that gradients averaged over the ranks are those of the whole batch.
        """
        import torch

        from thresher.dynamic.loss import reduce

        plan, (lo, hi), whole = self.plan, self._span(self.step, *_place()), self._span(self.step, 0, 1)
        of_whole = (hi - lo) * _place()[1] / (whole[1] - whole[0]) if plan is not None else 1.0
        self.record(rows_B, losses_BR)
        if plan is None or (plan.weights_N is None and of_whole == 1):
            return reduce(losses_BR)
        weights_B = torch.full((hi - lo,), of_whole, dtype=torch.float32)
        if plan.weights_N is not None:
            weights_B *= torch.from_numpy(plan.weights_N[_array(rows_B)])
        return reduce(losses_BR, weights_B.to(losses_BR.device, non_blocking=True))

    def record(self, rows_B: Any, losses_BR: torch.Tensor) -> None:
        """Record the losses of this rank's batch; for loops that average, or weigh, by themselves.

        The losses stay on their device until the epoch ends, so that nothing waits for them. At the first step of
        an epoch the ranks make sure that their orders agree; at the last they exchange their losses.
        """
        import torch

        if self.plan is None:
            raise UsageError(f"all {self.epochs} epochs are done; make the sampler with more to go on")
        lo, hi = self._span(self.step, *_place())
        rows = _array(rows_B)
        if rows.dtype.kind not in "iu" or not np.array_equal(rows, self._order[lo:hi]):
            raise UsageError(
                f"these {rows.shape} row ids of type {rows.dtype} are not step {self.step} of epoch {self.epoch}, "
                f"{hi - lo} rows from {self._order[lo]:,} on; give every batch of the loader once, in its order"
            )
        columns = losses_BR.shape[1] if losses_BR.ndim == 2 else 0
        if self._own is not None:
            fits = columns == self._own.shape[1]
        else:
            fits = columns in ([self._known[0].shape[1]] if self._known else (1, 2))
        if not fits or len(losses_BR) != hi - lo:
            raise UsageError(
                f"losses of shape {tuple(losses_BR.shape)}; give ({hi - lo}, 1) or ({hi - lo}, 2), the same all epoch"
            )
        if self._own is None:
            self._agree(losses_BR.device)
            most = (self._steps - self.step) * (-(-self._samples // self._steps) // _place()[1] + 1)
            self._own = torch.empty((most, columns), dtype=torch.float32, device=losses_BR.device)
        self._own[self._filled : self._filled + hi - lo].copy_(losses_BR.detach(), non_blocking=True)
        self._filled += hi - lo
        self.step += 1
        if self.step == self._steps:
            self.end_epoch()

    def end_epoch(self) -> None:
        """Cut the epoch short: record what was trained on and plan the next. All ranks together.

        The last step of an epoch does this by itself.
        """
        if self.plan is None:
            raise UsageError(f"all {self.epochs} epochs are done")
        self._gather()
        epoch, ledger, seen = self.epoch, self.ledger, self._bound(self.step)
        last = int(ledger.marked_N.max())
        before_N = ledger.candidates(last, _ANY) if last >= 0 else None
        losses_MR = self._recorded()
        finite_M = np.isfinite(losses_MR).all(axis=1)
        for step in range(self.step):
            at = np.arange(*self._span(step, 0, 1))
            at = at[finite_M[at]]
            rng = self._rng("marks", epoch, step)
            marks_B = self.policy.marks(losses_MR[at], rng) if self.plan.collects and len(at) else None
            ledger.record(self._order[at], losses_MR[at], epoch, marks_B)
        marks_N = self.policy.finish(ledger, self.plan, self._rng("finish", epoch))
        if marks_N is not None:
            ledger.mark(marks_N, epoch)
        now_N = ledger.candidates(epoch, _ANY)
        found = int(np.count_nonzero(now_N))
        past = [*(entry["rows"] for entry in self._log), len(self.plan)]
        mean = float(losses_MR[finite_M].mean(dtype=np.float64)) if finite_M.any() else None
        self._log.append(
            {
                "epoch": epoch,
                "phase": self.plan.phase,
                "rows": len(self.plan),
                "total": self.rows,
                "pruned_so_far": 1 - sum(past) / (self.rows * len(past)),
                "steps": self.step,
                "samples": seen,
                "loss": mean,
                "not_finite": int(seen - np.count_nonzero(finite_M)),
                "redundant": int(np.count_nonzero(ledger.candidates(epoch, REDUNDANT))),
                "ill_matched": int(np.count_nonzero(ledger.candidates(epoch, ILL_MATCHED))),
                "candidates": found,
                "overlap": np.count_nonzero(now_N & before_N) / found if found and before_N is not None else None,
            }
        )
        self._progress_before, self._steps_before = self.progress, self._steps_before + self.step
        self._begin(epoch + 1)

    def log(self) -> list[dict[str, Any]]:
        """Return what happened, one entry per finished epoch, of plain values that go into JSON.

        epoch, phase; rows of the plan, out of total; pruned_so_far, the share of rows that the plans left out since
        epoch 0; steps and samples trained on; the mean loss, and the rows whose loss was not finite and so not
        recorded; redundant and ill_matched candidates found, candidates of any kind, and overlap, the share of them
        that the last epoch to find any had found too.
        """
        return [dict(entry) for entry in self._log]

    @property
    def progress(self) -> float:
        """The share of the run that is done, 0 to 1, by samples.

        An epoch moves it by its samples out of those left when it began; what the forecasts had wrong is spread
        over what is left, so progress never jumps, never falls, and ends at 1.
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

        self._gather()
        numbers = [_VERSION, self.rows, self.batch_size, self.drop_last, self.seed]
        arrays: dict[str, npt.NDArray[Any]] = {
            "numbers": np.array([*numbers, self.epoch, self.step, self._steps_before], np.int64),
            "progress": np.array(self._progress_before, np.float64),
            "order": self._order.astype(np.int32),
            "losses": self._recorded(),
        }
        arrays |= {f"ledger.{name}": array for name, array in self.ledger.state().items()}
        arrays["ledger.times"] = arrays["ledger.times"].view(np.int16)  # not all of torch knows uint16
        if self.plan is not None:
            arrays |= {f"plan.{name}": array for name, array in self.plan.state().items()}
        tensors: dict[str, Any] = {name: torch.from_numpy(array) for name, array in arrays.items()}
        return tensors | {"policy": _describe(self.policy), "log": json.dumps(self._log)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was called, on any number of ranks; every rank loads the same state.

        Raises:
            UsageError: The state of another dataset, policy, batch size or seed. ``epochs`` may differ.
        """
        if "numbers" not in state or np.shape(state["numbers"]) != (8,):
            raise UsageError("not the state of a PruningSampler: it has no eight numbers")
        version, *same, epoch, step, steps_before = np.asarray(state["numbers"]).tolist()
        if version != _VERSION:
            raise UsageError(f"a state of version {version}; this is version {_VERSION}")
        mine: list[Any] = [self.rows, self.batch_size, int(self.drop_last), self.seed, _describe(self.policy)]
        names = ("rows", "batch_size", "drop_last", "seed", "policy")
        for name, here, there in zip(names, mine, [*same, str(state["policy"])], strict=True):
            if here != there:
                raise UsageError(f"the state of a sampler with {name} = {there}; this one has {here}")
        parts: dict[str, dict[str, npt.NDArray[Any]]] = {"ledger": {}, "plan": {}}
        for name in state:
            part, _, inner = name.partition(".")
            if inner:
                parts[part][inner] = np.asarray(state[name])
        parts["ledger"]["times"] = parts["ledger"]["times"].view(np.uint16)
        ledger = Ledger.from_state(parts["ledger"])
        plan = Plan.from_state(parts["plan"]) if parts["plan"] else None
        self.ledger, self._log = ledger, json.loads(str(state["log"]))
        self._progress_before, self._steps_before = float(state["progress"]), steps_before
        self._begin(epoch, plan, np.array(state["order"], np.int64))
        if step:
            self.step = self._since = step
            self._known = [np.array(state["losses"], np.float32)]

    def _begin(self, epoch: int, plan: Plan | None = None, order: Ints | None = None) -> None:
        """Start an epoch, by the plan and in the order given or by new ones."""
        self.epoch, self.step, self._filled, self._since = epoch, 0, 0, 0
        self._known: list[Losses] = []  # all ranks' losses of the steps before self._since, in the order of rows
        self._own: torch.Tensor | None = None  # this rank's of those since
        self._later = [sum(x) for x in zip((0, 0), *map(self._forecast, range(epoch + 1, self.epochs)), strict=True)]
        self.plan, self._order, self._steps, self._samples = None, np.empty(0, np.int64), 0, 0
        if epoch >= self.epochs:
            return
        self.plan = plan or self.policy.plan(self.ledger, epoch, self._rng("plan", epoch))
        if not len(self.plan):
            raise UsageError(f"the plan of epoch {epoch} keeps no row of {self.rows:,}; prune less")
        self._steps, self._samples = self._cut(len(self.plan))
        if order is None:
            order = self._rng("order", epoch).permutation(self.plan.rows())[: self._samples].copy()
        self._order = order

    def _cut(self, samples: int) -> tuple[int, int]:
        """Return the number of batches that make up an epoch of ``samples``, and the samples in them."""
        if self.drop_last:
            steps = max(1, samples // self.batch_size)
            return steps, min(samples, steps * self.batch_size)
        return -(-samples // self.batch_size), samples

    def _forecast(self, epoch: int) -> tuple[int, int]:
        return self._cut(max(1, round((1 - self.policy.forecast(epoch)) * self.rows)))

    def _bound(self, step: int) -> int:
        """Where in the order batch ``step`` begins."""
        return step * self._samples // max(1, self._steps)

    def _span(self, step: int, rank: int, ranks: int) -> tuple[int, int]:
        """Where in the order a rank's slice of a batch begins and ends."""
        lo, hi = self._bound(step), self._bound(step + 1)
        return lo + rank * (hi - lo) // ranks, lo + (rank + 1) * (hi - lo) // ranks

    def _rng(self, *purpose: str | int) -> np.random.Generator:
        text = json.dumps([self.seed, *purpose])
        return np.random.Generator(
            np.random.Philox(key=np.frombuffer(hashlib.sha256(text.encode()).digest()[:16], "<u8"))
        )

    def _agree(self, device: torch.device) -> None:
        """Refuse to train where the ranks are not in the same place of the same order."""
        import torch

        here = torch.tensor([self.epoch, self.step, zlib.crc32(self._order)], device=device)
        for rank, there in enumerate(_exchange(here)):
            if not torch.equal(there.cpu(), here.cpu()):
                raise UsageError(
                    f"rank {rank} is at epoch {there[0]}, step {there[1]} of another order than this rank, at epoch "
                    f"{self.epoch}, step {self.step}; give all ranks the same arguments, seed and state"
                )

    def _gather(self) -> None:
        """Exchange the losses of the steps since the last exchange."""
        if self._own is None or self.step == self._since:
            return
        steps, start = range(self._since, self.step), self._bound(self._since)
        ranks = _place()[1]
        spans = [[self._span(step, rank, ranks) for step in steps] for rank in range(ranks)]
        longest = max(sum(hi - lo for lo, hi in of_rank) for of_rank in spans)
        losses_MR = np.empty((self._bound(self.step) - start, self._own.shape[1]), np.float32)
        for of_rank, part in zip(spans, _exchange(self._own[:longest]), strict=True):
            at, part_R = 0, part.cpu().numpy()
            for lo, hi in of_rank:
                losses_MR[lo - start : hi - start] = part_R[at : at + hi - lo]
                at += hi - lo
        self._known.append(losses_MR)
        self._since, self._filled = self.step, 0

    def _recorded(self) -> Losses:
        return np.concatenate(self._known) if self._known else np.empty((0, 1), np.float32)


class CosineByProgress:
    """Warm-up, then half a cosine down, by the progress of the sampler: epochs may shrink as they like.

    It holds no state: the rates it scales are kept in the optimizer, as ``initial_lr``. Call :meth:`step` after
    every ``optimizer.step()``.
    """

    def __init__(self, optimizer: Any, sampler: PruningSampler, *, warmup: float = 0.05, final: float = 0.0) -> None:
        """Set the rates for the next step.

        Args:
            optimizer: A torch optimizer; each of its groups keeps its own rate.
            sampler: Whose progress counts.
            warmup: Share of the run's samples over which rates rise from 0, below 1.
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
            return progress / self.warmup
        down = (progress - self.warmup) / (1 - self.warmup)
        return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * down))

    def step(self) -> None:
        """Set the rates for the next step."""
        for group in self.optimizer.param_groups:
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * self.factor()


def _place() -> tuple[int, int]:
    """Return this process's rank, and how many there are."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def _exchange(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Return the tensors of all ranks, which have one shape."""
    import torch
    import torch.distributed as dist

    if _place()[1] == 1:
        return [tensor]
    tensor = tensor.cpu() if dist.get_backend() == "gloo" else tensor
    parts = [torch.empty_like(tensor) for _ in range(_place()[1])]
    dist.all_gather(parts, tensor)
    return parts


def _array(rows: Any) -> npt.NDArray[Any]:
    return np.asarray(rows.cpu() if hasattr(rows, "cpu") else rows)


def _describe(policy: Policy) -> str:
    """Return the policy and every parameter that is not its default; an array by its digest."""
    if not dataclasses.is_dataclass(policy):
        return repr(policy)
    told = []
    for item in dataclasses.fields(policy):
        value = getattr(policy, item.name)
        if isinstance(value, np.ndarray):
            told.append(f"{item.name}={value.dtype}{value.shape}:{hashlib.sha256(value.tobytes()).hexdigest()[:16]}")
        elif value != item.default:
            told.append(f"{item.name}={value!r}")
    return f"{type(policy).__name__}({', '.join(told)})"
