"""Pruning under a Lightning Trainer: the ``Trainer`` of ``lightning`` or of ``pytorch_lightning``.

A sampler and Lightning each know where a run is, by their own count. Three things keep the two counts one:

- Lightning takes the length of a loader for that of the whole epoch, and of an epoch that it resumes it expects the
  rest from the iterator. A :class:`PruningLoader` is like that; a DataLoader over the sampler tells what is left.
- It measures the loader once and goes by that, unless it reloads the loader every epoch (which, for a loader given
  to ``fit``, reads nothing again).
- A checkpoint taken in the last step of an epoch has the sampler in the next epoch and Lightning in the old one. Which
  of them is right is settled when it is loaded, by :func:`_reconcile`.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from thresher.dynamic.sampler import PruningSampler, with_rows
from thresher.errors import MissingExtraError, UsageError, installed

try:
    from torch.utils.data import DataLoader, default_collate  # noqa: TID253
except ImportError:
    raise MissingExtraError("pruning under Lightning", "lightning") from None

_FLAVOURS = ("lightning.pytorch", "pytorch_lightning")


class PruningLoader(DataLoader):
    """A DataLoader of ``(rows, items)`` over what the sampler keeps, as Lightning wants it.

    ``rows`` is a NumPy array (B,) int64, which Lightning leaves on the CPU; ``items`` is what ``collate_fn`` makes of
    the items of the dataset, so a collate function of lightly or of your own stays as it is.
    """

    def __init__(
        self,
        dataset: Any,
        sampler: PruningSampler,
        *,
        collate_fn: Callable[[list[Any]], Any] = default_collate,
        **options: Any,
    ) -> None:
        """Make the loader.

        Args:
            dataset: Anything with ``len`` and whole-number indices, a LightlyDataset for one; not ``with_rows`` of it.
            sampler: Decides on the batches; the same object that the callback has.
            collate_fn: Makes a batch of a list of items.
            **options: Other arguments of a DataLoader: ``num_workers``, ``pin_memory``, ``persistent_workers``.

        Raises:
            UsageError: The dataset has not the rows of the sampler.
        """
        if len(dataset) != sampler.rows:
            raise UsageError(f"a dataset of {len(dataset):,} rows for a sampler of {sampler.rows:,}; give it all")
        dataset = dataset if isinstance(dataset, with_rows) else with_rows(dataset)
        super().__init__(dataset, batch_sampler=sampler, collate_fn=_Collate(collate_fn), **options)

    def __len__(self) -> int:
        """Return the batches of the epoch in progress, those that are done included."""
        return int(self.batch_sampler.step) + len(self.batch_sampler)

    def __iter__(self) -> Iterator[Any]:
        """Yield the batches that are still to come in the epoch; none when all epochs are done.

        Nothing is read before the first is asked for: Lightning makes two iterators for an epoch and drops one.
        """
        if self.batch_sampler.plan is not None:
            yield from super().__iter__()

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the callback keeps the state. That there is a method tells Lightning that we can resume."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Do nothing, as there is nothing in the state."""


class _Collate:
    """Row ids apart from the items; a class, for workers that are sent it."""

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, batch: list[tuple[int, Any]]) -> tuple[npt.NDArray[np.int64], Any]:
        return np.array([row for row, _ in batch], np.int64), self.collate([item for _, item in batch])


class PruningCallback:
    """A Lightning callback that keeps the Trainer and a sampler together.

    Made by ``PruningCallback(sampler)``, it is a ``Callback`` of the Lightning that is imported. It

    - refuses settings of the Trainer, and loaders, that would train on other batches than the sampler's;
    - puts the sampler's state into every checkpoint (at ``["callbacks"]["PruningCallback"]``) and takes it from there
      in ``fit(ckpt_path=...)``, in mid-epoch as well: the run goes on with the next batch;
    - logs ``pruning/rows``, ``pruning/pruned_so_far`` and ``pruning/loss`` of every epoch through the module;
    - stops the Trainer when the sampler's epochs are done.

    The Trainer needs ``reload_dataloaders_every_n_epochs=1`` and ``use_distributed_sampler=False``, and
    ``max_epochs=-1`` as it cannot know better; the module calls ``sampler.reduce(rows, losses)`` once in every
    ``training_step``, with automatic or manual optimisation.

    Attributes:
        sampler: The sampler, of which the module and the loader have the same object.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> PruningCallback:
        """Make a callback that is one to the Lightning in use."""
        plain: Any = cls  # a class is Hashable, but not to mypy
        new: PruningCallback = super().__new__(_callback_class(plain, _flavours()))
        return new

    def __init__(self, sampler: PruningSampler) -> None:
        """Keep ``sampler``."""
        self.sampler = sampler
        self._logged = 0
        self._before = (0, 0)

    def __reduce__(self) -> Any:
        """Pickle as the class that has a name, for processes that are spawned."""
        return _restore, (type(self).__mro__[1], vars(self))

    @property
    def state_key(self) -> str:
        """Where checkpoints keep the state."""
        return "PruningCallback"

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse settings that would train on other batches than the sampler's."""
        if stage != "fit":
            return
        wanted: dict[str, tuple[Any, Any]] = {
            "use_distributed_sampler": (trainer._accelerator_connector.use_distributed_sampler, False),
            "reload_dataloaders_every_n_epochs": (trainer.reload_dataloaders_every_n_epochs, 1),
            "overfit_batches": (trainer.overfit_batches, 0),
        }
        if not trainer.fast_dev_run:
            wanted["limit_train_batches"] = (trainer.limit_train_batches, 1.0)
            wanted["max_steps"] = (trainer.max_steps, -1)
        wrong = [(name, *values) for name, values in wanted.items() if values[0] != values[1]]
        if wrong:
            current = ", ".join(f"{name}={value!r}" for name, value, _ in wrong)
            needed = ", ".join(f"{name}={value!r}" for name, _, value in wrong)
            raise UsageError(f"a Trainer with {current}; to run the sampler's epochs to their end, give {needed}")

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Refuse a loader that is not one of this sampler."""
        self._logged = len(self.sampler.log())
        self._check_loader(trainer)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Refuse to begin an epoch in the middle of one of the sampler, or with another loader."""
        self._check_loader(trainer)
        if self.sampler.step:
            raise UsageError(
                f"the Trainer begins an epoch, but epoch {self.sampler.epoch} of the sampler is at step "
                f"{self.sampler.step} of {self.sampler.step + len(self.sampler)}; to cut an epoch short, call "
                "sampler.end_epoch() on all ranks"
            )

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Remember where the sampler is."""
        self._before = (self.sampler.epoch, self.sampler.step)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Refuse a step whose losses did not come back."""
        if self._before == (self.sampler.epoch, self.sampler.step):
            raise UsageError(
                f"training_step did not record the losses of batch {batch_idx}; return sampler.reduce(rows, losses) "
                "from it, of the sampler that the callback has"
            )

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log the epoch, and stop the Trainer after the last."""
        log = self.sampler.log()
        if len(log) > self._logged:
            metrics = {f"pruning/{name}": log[-1][name] for name in ("rows", "pruned_so_far", "loss")}
            known = {name: float(value) for name, value in metrics.items() if value is not None}
            # the same on all ranks, and of no batch: both arguments only spare warnings of Lightning's
            pl_module.log_dict(known, sync_dist=True, batch_size=1)
            self._logged = len(log)
        if self.sampler.plan is None:
            trainer.should_stop = True

    def state_dict(self) -> dict[str, Any]:
        """Return the sampler's state. Lightning asks all ranks, as it must: they exchange losses here."""
        return self.sampler.state_dict()

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Go on where the checkpoint was taken; nothing for a Trainer that only validates or tests.

        Raises:
            UsageError: A checkpoint without a sampler's state, or with that of another run.
        """
        if not trainer.training:
            return
        state = checkpoint["callbacks"].get(self.state_key)
        if state is None:
            raise UsageError(
                "the checkpoint was saved without a PruningCallback; to start from its weights alone, load them with "
                "load_from_checkpoint and call fit without ckpt_path"
            )
        self.sampler.load_state_dict(state)
        _reconcile(checkpoint["loops"]["fit_loop"], self.sampler)

    def _check_loader(self, trainer: Any) -> None:
        loader = trainer.train_dataloader
        if not isinstance(loader, PruningLoader):
            raise UsageError(
                f"the Trainer trains on a {type(loader).__name__}; give it one PruningLoader(dataset, sampler)"
            )
        if loader.batch_sampler is not self.sampler:
            raise UsageError("the loader has another sampler than the callback; give both the same object")


def _reconcile(loops: dict[str, Any], sampler: PruningSampler) -> None:
    """Change Lightning's count of epochs and batches in a checkpoint where it is not the sampler's.

    The two differ in what is saved in the last step of an epoch, in what is saved after the Trainer was stopped in
    mid-epoch, which Lightning takes for the end of one, and in what is saved when a step fails. The sampler is right.
    """
    batches, epochs = loops["epoch_loop.batch_progress"], loops["epoch_progress"]
    batch, over = batches["current"], epochs["current"]["processed"] == epochs["current"]["ready"]
    last = batches["is_last_batch"] and batch["started"] == batch["ready"]
    if sampler.step == 0 and last and not over:
        loops["epoch_loop.state_dict"]["_batches_that_stepped"] += 1  # the step that loggers go by
        for scope in ("total", "current"):
            batches[scope]["processed"] = batches[scope]["completed"] = batches[scope]["ready"]
            epochs[scope]["processed"] += 1
    elif sampler.step and over:
        for scope in ("total", "current"):
            epochs[scope]["processed"] -= 1
            epochs[scope]["completed"] = min(epochs[scope]["completed"], epochs[scope]["processed"])
    elif sampler.step > batch["processed"]:  # an exception between the losses and the optimizer
        for scope in ("total", "current"):
            batches[scope]["processed"] = batches[scope]["completed"] = batches[scope]["ready"]


def _flavours() -> tuple[type, ...]:
    """Return the Callback class of the Lightning that is imported (both, if both are), else of an installed one."""
    names = [name for name in _FLAVOURS if name in sys.modules]
    names = names or [name for name in _FLAVOURS if installed(name.partition(".")[0])][:1]
    if not names:
        raise MissingExtraError("pruning under Lightning", "lightning")
    return tuple(importlib.import_module(name).Callback for name in names)


@functools.cache
def _callback_class(cls: Any, bases: tuple[Any, ...]) -> Any:
    return type(cls.__name__, (cls, *bases), {"__doc__": cls.__doc__, "__module__": cls.__module__})


def _restore(cls: type[PruningCallback], attributes: dict[str, Any]) -> PruningCallback:
    new = cls.__new__(cls)
    vars(new).update(attributes)
    return new
