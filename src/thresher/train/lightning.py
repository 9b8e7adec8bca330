"""Pruning with a Lightning Trainer: the ``Trainer`` of ``lightning`` or of ``pytorch_lightning``.

The sampler and Lightning each count epochs and batches. Three things keep the counts equal:

- Lightning expects the length of a loader to be that of the whole epoch, and its iterator, in a resumed epoch, to yield
  the rest. :class:`PruningLoader` does so; the length of a DataLoader over the sampler is the number of batches left.
- Lightning reads the length once, unless it reloads the loader every epoch (which, for a loader given to ``fit``,
  does not read data again).
- In a checkpoint saved in the last step of an epoch, the sampler is in the next epoch and Lightning still in the old
  one. :func:`_reconcile` corrects Lightning's count when the checkpoint is loaded.
"""

from __future__ import annotations

import functools
import importlib
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

from thresher.dynamic.sampler import PruningSampler, collated_with_rows, with_rows
from thresher.errors import MissingExtraError, UsageError, installed

try:
    from torch.utils.data import DataLoader, default_collate  # noqa: TID253
except ImportError:
    raise MissingExtraError("pruning with Lightning", "lightning") from None

if TYPE_CHECKING:
    _Callback: TypeAlias = Any  # of the package in use, which checkers cannot know
else:
    _Callback = object

_FLAVOURS = ("lightning.pytorch", "pytorch_lightning")


class PruningLoader(DataLoader):
    """A DataLoader for Lightning that yields ``(rows, items)`` of the rows that the sampler keeps.

    ``rows`` is a NumPy array (B,) int64, which Lightning leaves on the CPU; ``items`` is the result of ``collate_fn``
    for the items of the dataset, so collate functions of lightly or your own work unchanged.
    """

    def __init__(
        self,
        dataset: Any,
        sampler: PruningSampler,
        *,
        collate_fn: Callable[[list[Any]], Any] = default_collate,
        **options: Any,
    ) -> None:
        """Create the loader.

        Args:
            dataset: Any object with ``len`` and integer indices, such as a LightlyDataset; it need not be wrapped in
                ``with_rows``.
            sampler: The sampler; the same object that the callback has.
            collate_fn: Combines a list of items into a batch.
            **options: Other arguments of a DataLoader: ``num_workers``, ``pin_memory``, ``persistent_workers``.

        Raises:
            UsageError: The dataset and the sampler have different numbers of rows, or the dataset has no row numbers.
        """
        rows = with_rows(dataset)
        if len(rows) != sampler.rows:
            raise UsageError(
                f"a dataset of {len(rows):,} rows for a sampler of {sampler.rows:,}; give both the same number"
            )
        super().__init__(rows, batch_sampler=sampler, collate_fn=collated_with_rows(collate_fn), **options)

    def __len__(self) -> int:
        """Return the number of batches of the current epoch, including those that are done."""
        return int(self.batch_sampler.step) + len(self.batch_sampler)

    def __iter__(self) -> Iterator[Any]:
        """Yield the batches left in the epoch; none when all epochs are done.

        Reading starts with the first batch requested: Lightning creates two iterators per epoch and drops one.
        """
        if self.batch_sampler.plan is not None:
            yield from super().__iter__()

    def state_dict(self) -> dict[str, Any]:
        """Return an empty state: the callback saves it. Lightning checks that this method exists to allow resuming."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Do nothing: the state is empty."""


class PruningCallback(_Callback):
    """A Lightning callback that keeps the Trainer and a sampler in sync.

    ``PruningCallback(sampler)`` creates a ``Callback`` of the Lightning package that is imported. It

    - raises an error for settings of the Trainer, and for loaders, that would train on other batches;
    - saves the sampler's state in every checkpoint (at ``["callbacks"]["PruningCallback"]``) and restores it in
      ``fit(ckpt_path=...)``, also in the middle of an epoch: the run continues with the next batch;
    - logs ``pruning/rows``, ``pruning/pruned_so_far`` and ``pruning/loss`` of every epoch with the module;
    - stops the Trainer when all epochs of the sampler are done.

    The Trainer needs ``reload_dataloaders_every_n_epochs=1``, ``use_distributed_sampler=False`` and ``max_epochs=-1``,
    because the sampler decides when the run ends. A number of batches as ``val_check_interval`` must fit the shortest
    epoch, unless ``check_val_every_n_epoch=None``. The module calls ``sampler.reduce(rows, losses)`` once in every
    ``training_step``, with automatic or manual optimization.

    Attributes:
        sampler: The sampler; the same object that the module and the loader have.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> PruningCallback:
        """Create a callback that derives from the ``Callback`` of the Lightning package in use."""
        plain: Any = cls  # mypy does not know that a class is hashable
        new: PruningCallback = super().__new__(_callback_class(plain, _flavours()))
        return new

    def __init__(self, sampler: PruningSampler) -> None:
        """Create the callback for ``sampler``."""
        self.sampler = sampler
        self._logged = 0
        self._before = (0, 0)

    def __reduce__(self) -> Any:
        """Pickle as the importable class, for spawned processes."""
        return _restore, (type(self).__mro__[1], vars(self))

    @property
    def state_key(self) -> str:
        """The key of the state in checkpoints."""
        return "PruningCallback"

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Raise UsageError for settings that would train on other batches than the sampler's."""
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
            # A sampler with a number of samples only forecasts its epochs.
            least = math.inf if self.sampler.samples is not None else self.sampler.epochs
            if trainer.max_epochs != -1 and trainer.max_epochs < least:
                wanted["max_epochs"] = (trainer.max_epochs, -1)
        wrong = [(name, *values) for name, values in wanted.items() if values[0] != values[1]]
        if wrong:
            current = ", ".join(f"{name}={value!r}" for name, value, _ in wrong)
            needed = ", ".join(f"{name}={value!r}" for name, _, value in wrong)
            raise UsageError(f"a Trainer with {current}; to run all epochs of the sampler, give {needed}")
        every, fewest = getattr(trainer, "val_check_interval", 1.0), self.sampler.fewest_steps()  # absent if by time
        within_epochs = trainer.check_val_every_n_epoch is not None and trainer.limit_val_batches > 0
        if isinstance(every, int) and within_epochs and every > fewest:
            raise UsageError(
                f"a Trainer with val_check_interval={every}, but the shortest epoch of the sampler has {fewest} "
                "batches: Lightning would stop there; give a share of an epoch such as val_check_interval=0.5, or "
                "check_val_every_n_epoch=None too, which counts the batches of the run"
            )

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Raise UsageError if the loader does not use this sampler."""
        self._logged = len(self.sampler.log())
        self._check_loader(trainer)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Raise UsageError if the sampler is in the middle of an epoch, or if the loader does not use it."""
        self._check_loader(trainer)
        if self.sampler.step:
            raise UsageError(
                f"the Trainer starts an epoch, but epoch {self.sampler.epoch} of the sampler is at step "
                f"{self.sampler.step} of {self.sampler.step + len(self.sampler)}; to end an epoch early, call "
                "sampler.end_epoch() on all ranks"
            )

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Remember the position of the sampler."""
        self._before = (self.sampler.epoch, self.sampler.step)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Raise UsageError if the step did not record its losses."""
        if self._before == (self.sampler.epoch, self.sampler.step):
            raise UsageError(
                f"training_step did not record the losses of batch {batch_idx}; return sampler.reduce(rows, losses) "
                "from it, with the sampler of the callback"
            )

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log the epoch, and stop the Trainer after the last."""
        log = self.sampler.log()
        if len(log) > self._logged:
            metrics = {f"pruning/{name}": log[-1][name] for name in ("rows", "pruned_so_far", "loss")}
            known = {name: float(value) for name, value in metrics.items() if value is not None}
            # The values are the same on all ranks; both arguments only avoid warnings of Lightning.
            pl_module.log_dict(known, sync_dist=True, batch_size=1)
            self._logged = len(log)
        if self.sampler.plan is None:
            trainer.should_stop = True

    def state_dict(self) -> dict[str, Any]:
        """Return the sampler's state. Lightning calls this on all ranks, which is required: they gather losses here."""
        return self.sampler.state_dict()

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Restore the sampler from the checkpoint; does nothing if the Trainer only validates or tests.

        Raises:
            UsageError: The checkpoint has no state of a sampler, or that of another run.
        """
        if not trainer.training:
            return
        state = checkpoint["callbacks"].get(self.state_key)
        if state is None:
            raise UsageError(
                "the checkpoint was saved without a PruningCallback; to start from its weights only, load them with "
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
            raise UsageError("the loader and the callback have different samplers; give both the same object")


def _reconcile(loops: dict[str, Any], sampler: PruningSampler) -> None:
    """Correct Lightning's count of epochs and batches in a checkpoint if it differs from the sampler's.

    They differ if a checkpoint is saved in the last step of an epoch, after the Trainer was stopped in the middle of an
    epoch (Lightning counts the epoch as done), or when a step fails. The sampler is right.
    """
    batches, epochs = loops["epoch_loop.batch_progress"], loops["epoch_progress"]
    batch, over = batches["current"], epochs["current"]["processed"] == epochs["current"]["ready"]
    last = batches["is_last_batch"] and batch["started"] == batch["ready"]
    if sampler.step == 0 and last and not over:
        loops["epoch_loop.state_dict"]["_batches_that_stepped"] += 1  # the step number of loggers
        for scope in ("total", "current"):
            batches[scope]["processed"] = batches[scope]["completed"] = batches[scope]["ready"]
            epochs[scope]["processed"] += 1
    elif sampler.step and over:
        for scope in ("total", "current"):
            epochs[scope]["processed"] -= 1
            epochs[scope]["completed"] = min(epochs[scope]["completed"], epochs[scope]["processed"])
    elif sampler.step > batch["processed"]:  # an exception after reduce, before the optimizer's step
        for scope in ("total", "current"):
            batches[scope]["processed"] = batches[scope]["completed"] = batches[scope]["ready"]


def _flavours() -> tuple[type, ...]:
    """Return the Callback class of the imported Lightning package (both, if both are), else of an installed one."""
    names = [name for name in _FLAVOURS if name in sys.modules]
    names = names or [name for name in _FLAVOURS if installed(name.partition(".")[0])][:1]
    if not names:
        raise MissingExtraError("pruning with Lightning", "lightning")
    return tuple(importlib.import_module(name).Callback for name in names)


@functools.cache
def _callback_class(cls: Any, bases: tuple[Any, ...]) -> Any:
    return type(cls.__name__, (cls, *bases), {"__doc__": cls.__doc__, "__module__": cls.__module__})


def _restore(cls: type[PruningCallback], attributes: dict[str, Any]) -> PruningCallback:
    new = cls.__new__(cls)
    new.__dict__.update(attributes)
    return new
