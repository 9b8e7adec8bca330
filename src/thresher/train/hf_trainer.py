"""Pruning with the ``Trainer`` of Hugging Face transformers.

The Trainer reads the length of an epoch once, and counts epochs and batches by it. Here epochs differ in length, so the
sampler counts:

- :meth:`PruningTrainer.get_train_dataloader` returns a loader without a length, whose iterator is the rest of the
  current epoch of the sampler, divided into the parts of ``gradient_accumulation_steps``. So every epoch is a whole
  number of steps.
- :class:`_Position` corrects the Trainer's ``epoch`` and ``max_steps`` after every step, and ends its epochs.
- A checkpoint has the state of the sampler next to that of the Trainer, and a resumed run continues at its position:
  the Trainer need not skip batches.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from thresher import __version__
from thresher.dynamic.loop import describe
from thresher.dynamic.policies.full import Full
from thresher.dynamic.run_folder import MARK, ROWS, Training, save_state
from thresher.dynamic.sampler import PruningSampler, collated_with_rows, with_rows
from thresher.errors import MissingExtraError, OutputError, PoolError, UsageError
from thresher.pool.store import EmbeddingStore, absolute, open_store
from thresher.runtime.files import writing
from thresher.runtime.untrusted import read_npz

try:
    import torch
    from torch.optim.lr_scheduler import LambdaLR
    from torch.utils.data import DataLoader
    from transformers import Trainer, TrainerCallback
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

    from thresher.dynamic.loss import clip_losses, siglip_losses
except ImportError:
    raise MissingExtraError("pruning with the Trainer of Hugging Face", "trainer") from None

STATE = "pruning.npz"  # in a checkpoint of the Trainer
_ROWS = "row_ids"  # of a batch


def sample_losses(model: Any, outputs: Any, labels: torch.Tensor | None = None, *, gather: bool = False) -> Any:
    """Return the losses per sample of a batch, for models of transformers.

    - A model of images and texts with ``image_embeds`` and ``text_embeds`` in its outputs, such as ``CLIPModel`` and
      ``VisionTextDualEncoderModel``: :func:`thresher.dynamic.loss.clip_losses`, (B, 2). With a ``logit_bias``, such as
      ``SiglipModel``: :func:`thresher.dynamic.loss.siglip_losses`, (B, 2).
    - A classifier with ``logits`` (B, C) and ``labels`` (B,): the cross-entropy, (B, 1).

    Their mean is the loss of the model.

    Args:
        model: The model, not wrapped.
        outputs: What it returned for the batch.
        labels: (B,) classes, if any.
        gather: Contrast with the rows of all processes. The models of transformers do not: each process contrasts its
            own rows.

    Raises:
        UsageError: The outputs are of another kind.
    """
    named = _named(outputs)
    image, text, logits = (named.get(name) for name in ("image_embeds", "text_embeds", "logits"))
    if image is not None and text is not None and hasattr(model, "logit_scale"):
        scale = model.logit_scale.exp()
        if hasattr(model, "logit_bias"):
            return siglip_losses(image, text, scale, model.logit_bias, gather=gather)
        return clip_losses(image, text, scale, gather=gather)
    if logits is not None and labels is not None and logits.ndim == 2 and labels.ndim == 1 and logits.shape[1] > 1:
        return torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none")[:, None]
    raise UsageError(
        f"{type(model).__name__} returns {', '.join(named) or type(outputs).__name__}, of which the losses per sample "
        "are not known; override losses_per_sample of the PruningTrainer"
    )


def _named(outputs: Any) -> Mapping[str, Any]:
    return outputs if isinstance(outputs, Mapping) else vars(outputs) if hasattr(outputs, "__dict__") else {}


class PruningTrainer(Trainer):
    """A Trainer of transformers that trains on the rows that a sampler keeps.

    Pass it the arguments of a Trainer, and the sampler. Evaluation, prediction, logging, saving and the optimizer are
    those of the Trainer. The learning rate follows the share of the run that is done, so that its schedule ends with
    the run. The folder ``output_dir`` gets what ``thresher report``, ``explain``, ``compare`` and ``coreset`` read.

    ``resume_from_checkpoint`` continues with the next batch, also in the middle of an epoch: with the same result bit
    for bit on a CPU, unless worker processes draw augmentations.

    Attributes:
        sampler: The sampler. Its ``batch_size`` is ``per_device_train_batch_size`` times
            ``gradient_accumulation_steps`` times the number of processes; its ``epochs`` is ``num_train_epochs``, or
            its ``samples`` is ``max_steps`` times its batch size.
        gather: Whether contrastive losses are computed over the rows of all processes.
    """

    loss_is_scaled_for_ga = False  # losses are means of a batch, which the Trainer divides by the number of parts

    def __init__(
        self,
        *args: Any,
        sampler: PruningSampler,
        gather: bool = False,
        keys: Sequence[str] | None = None,
        pool: str | os.PathLike[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Create the Trainer.

        Args:
            *args: Arguments of a Trainer.
            sampler: The sampler, see the attributes.
            gather: Compute contrastive losses over the rows of all processes. The models of transformers contrast
                only the rows of each process, which is the default.
            keys: The N keys of the rows, for reports and exports; by default they are the row numbers.
            pool: The pool whose rows are those of the dataset, in place of keys.
            **kwargs: Arguments of a Trainer.

        Raises:
            UsageError: A setting would train on other batches than those of the sampler, or is not supported.
            PoolError: The pool cannot be read.
        """
        if (dataset := kwargs.get("train_dataset", args[3] if len(args) > 3 else None)) is not None:
            with_rows(dataset)  # refuses a stream, for which the Trainer would ask for max_steps in vain
        super().__init__(*args, **kwargs)
        self.sampler, self.gather = sampler, gather
        self._check()
        if keys is not None and (pool is not None or len(keys) != sampler.rows):
            raise UsageError(f"{len(keys):,} keys for {sampler.rows:,} rows; give one for each row, or a pool")
        self._keys, self._pool = keys, None if pool is None else open_store(absolute(os.fspath(pool)))
        if self._pool is not None and self._pool.total != sampler.rows:
            raise UsageError(f"{pool}: has {self._pool.total:,} rows, the dataset {sampler.rows:,}; give its own pool")
        self._compared = False  # its losses with the loss of the model
        self._total = sampler.total_steps()  # a forecast, the length of the schedule
        self.args = copy.copy(self.args)  # the arguments are the caller's
        self.args.ignore_data_skip = True
        if self.args.max_steps <= 0:
            self.args.max_steps = self._total
        self.add_callback(_Position(sampler, self._end_epoch))

    def train(
        self, resume_from_checkpoint: Any = None, trial: Any = None, ignore_keys_for_eval: list[str] | None = None
    ) -> Any:
        """Train to the end of the sampler's run; see ``Trainer.train``.

        Raises:
            UsageError: The sampler has been used, the checkpoint is of another run, or was saved without pruning.
            PoolError: The state in the checkpoint is damaged.
            OutputError: ``output_dir`` has a training run already, which is not resumed.
        """
        if trial is not None:
            raise UsageError("a hyperparameter search changes the length of the run; create a PruningTrainer per trial")
        if resume_from_checkpoint is True:
            resume_from_checkpoint = get_last_checkpoint(str(self._folder))  # type: ignore[no-untyped-call]
            if resume_from_checkpoint is None:
                raise UsageError(f"{self._folder}: has no checkpoint to resume from; call train()")
        if resume_from_checkpoint:
            self._load(Path(resume_from_checkpoint))
        elif self.sampler.epoch or self.sampler.step:
            raise UsageError(
                f"the sampler is in epoch {self.sampler.epoch}; for a new run create a sampler and a PruningTrainer"
            )
        elif (self._folder / MARK).exists():
            raise OutputError(
                f"{self._folder}: has a training run already; pass resume_from_checkpoint=True to continue it, "
                "or choose another output_dir"
            )
        return super().train(resume_from_checkpoint or None, None, ignore_keys_for_eval)

    def get_train_dataloader(self) -> Any:
        """Return a loader whose iterator yields the rest of the sampler's current epoch."""
        plain = super().get_train_dataloader()  # for the dataset and the collator without unused columns
        args, generator = self.args, torch.Generator()
        loader = DataLoader(
            with_rows(plain.dataset),
            batch_sampler=_Parts(self.sampler, args.gradient_accumulation_steps),
            collate_fn=_Collate(plain.collate_fn),
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory and torch.cuda.is_available(),
            persistent_workers=args.dataloader_persistent_workers and args.dataloader_num_workers > 0,
            prefetch_factor=args.dataloader_prefetch_factor,
            multiprocessing_context=plain.multiprocessing_context,
            worker_init_fn=plain.worker_init_fn,
            generator=generator,  # of its own: the global one is the same in a resumed run
        )
        return _Rest(loader, self.sampler, generator)

    def create_scheduler(self, num_training_steps: int, *args: Any, **kwargs: Any) -> Any:
        """Create the schedule of the Trainer for the length of the sampler's run, and let it follow the progress."""
        own = self.lr_scheduler is None
        scheduler = super().create_scheduler(self._total, *args, **kwargs)
        if own and isinstance(scheduler, LambdaLR) and not isinstance(self.sampler.policy, Full):
            follow = [functools.partial(_at_progress, rate, self.sampler, self._total) for rate in scheduler.lr_lambdas]
            scheduler.lr_lambdas = follow
        return scheduler

    def losses_per_sample(self, model: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, Any]:
        """Return the losses (B, R) of a batch, and the outputs of the model; override it for other models.

        Args:
            model: The model, as ``compute_loss`` of a Trainer gets it.
            inputs: The batch.

        Raises:
            UsageError: The losses are not known, or the model adds terms to them, such as the losses of experts.
        """
        outputs = model(**inputs)
        bare = self.accelerator.unwrap_model(model)
        losses_BR = sample_losses(bare, outputs, inputs.get("labels"), gather=self.gather)
        if not (self._compared or self.gather):
            self._compared = True
            self._compare(bare, outputs, losses_BR)
        return losses_BR, outputs

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Compute the loss of a batch, and record its losses if it is one to train on; see ``Trainer``."""
        rows = inputs.pop(_ROWS, None)
        if rows is None:  # evaluation
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        losses_BR, outputs = self.losses_per_sample(model, inputs)
        loss = self.sampler.reduce_part(rows, losses_BR) * self.args.gradient_accumulation_steps
        return (loss, outputs) if return_outputs else loss

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model, and in a checkpoint the state of the sampler; see ``Trainer``."""
        super().save_model(output_dir, _internal_call)
        if _internal_call and output_dir and os.path.basename(output_dir).startswith(f"{PREFIX_CHECKPOINT_DIR}-"):
            state = self.sampler.state_dict()  # all ranks
            if self.args.should_save:
                save_state(Path(output_dir) / STATE, {**state, "total": np.array(self._total)})

    def _compare(self, model: Any, outputs: Any, losses_BR: torch.Tensor) -> None:
        """Refuse a model whose loss is not the mean of the losses: the difference would not be trained."""
        loss = _named(outputs).get("loss")
        if loss is None or loss.numel() != 1:
            return
        given, mean = float(loss.detach()), float(losses_BR.detach().mean())
        exact = loss.dtype == torch.float32 and self.accelerator.mixed_precision == "no"

        def differs(other: float) -> bool:
            return abs(given - other) > (1e-3 if exact else 2e-2) * max(abs(given), abs(other))

        if differs(mean) and ((rounded := _mean_of_logits(model, outputs, exact)) is None or differs(rounded)):
            raise UsageError(
                f"{type(model).__name__} returns a loss of {given:.6g}, the mean of its losses per sample is "
                f"{mean:.6g}: the difference would not be trained; override losses_per_sample of the "
                "PruningTrainer, and compute_loss to add it (docs/hf-trainer.md)"
            )

    @property
    def _folder(self) -> Path:
        return Path(str(self.args.output_dir))

    def _load(self, checkpoint: Path) -> None:
        """Continue from the state in a checkpoint."""
        path = checkpoint / STATE
        try:
            state = read_npz(path)
            self._total = int(state.pop("total"))
        except FileNotFoundError:
            raise UsageError(
                f"{path}: no such file; the checkpoint was saved without pruning, or not completely. Resume from "
                "another one"
            ) from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise PoolError(f"{path}: cannot be read, it may be damaged ({error}); resume from another one") from None
        self.sampler.load_state_dict(state)

    def _end_epoch(self) -> None:
        """Log the epoch, and write the folder of the run."""
        log = self.sampler.log()
        values = {f"pruning_{name}": log[-1][name] for name in ("rows", "pruned_so_far", "loss")}
        self.log({name: value for name, value in values.items() if value is not None})
        if not self.args.should_save:
            return
        if self._pool is None:
            self._pool = _rows_as_pool(self._folder / ROWS, self.sampler.rows, self._keys)
        training = Training(
            folder=self._folder,
            task="trainer",
            data=self._pool.layout.location,
            pool=absolute(self._pool.layout.location),
            store=self._pool.fingerprint(),
            rows=self.sampler.rows,
            policy=self.sampler.policy.name,
            settings=self._settings(),
            version=__version__,
        )
        training.save()
        training.record(log, self.sampler.ledger)

    def _settings(self) -> dict[str, Any]:
        """Return the settings to write to the folder of the run."""
        sampler, args = self.sampler, self.args
        return {
            "epochs": None if sampler.samples is not None else sampler.epochs, "samples": sampler.samples,
            "seed": sampler.seed, "prune": None, "batch_size": sampler.batch_size, "lr": args.learning_rate,
            "model": type(self.accelerator.unwrap_model(self.model)).__name__,
            "options": {"policy": describe(sampler.policy)}, "selection": None,
        }  # fmt: skip

    def _check(self) -> None:
        """Raise UsageError for settings that would train on other batches, or with other losses."""
        args, sampler = self.args, self.sampler
        if self.train_dataset is None:
            raise UsageError("a PruningTrainer without a train_dataset; give one")
        rows = len(with_rows(self.train_dataset))
        if rows != sampler.rows:
            raise UsageError(f"a dataset of {rows:,} rows for a sampler of {sampler.rows:,}; give both the same number")
        config: Any = args.accelerator_config
        wanted: dict[str, tuple[Any, Any]] = {
            "train_sampling_strategy": (getattr(args, "train_sampling_strategy", "random"), "random"),
            "group_by_length": (bool(getattr(args, "group_by_length", False)), False),
            "auto_find_batch_size": (bool(args.auto_find_batch_size), False),
            "label_smoothing_factor": (args.label_smoothing_factor, 0.0),
            "split_batches": (bool(config.split_batches), False),
            "dispatch_batches": (bool(config.dispatch_batches), False),
        }
        wrong = [(name, *values) for name, values in wanted.items() if values[0] != values[1]]
        if wrong:
            current = ", ".join(f"{name}={value!r}" for name, value, _ in wrong)
            needed = ", ".join(f"{name}={value!r}" for name, _, value in wrong)
            raise UsageError(f"{current}: the sampler makes the batches and needs the losses; give {needed}")
        if self.compute_loss_func is not None:
            raise UsageError("compute_loss_func returns a mean; override losses_per_sample of the PruningTrainer")
        parallel = getattr(args, "parallelism_config", None)
        if self.is_deepspeed_enabled or self.is_fsdp_enabled or args.n_gpu > 1 or parallel is not None:
            raise UsageError(
                "a PruningTrainer runs on one device or with DistributedDataParallel (torchrun, accelerate launch); "
                "for DeepSpeed, FSDP and other parallel training write the loop, see docs/port-a-loop.md"
            )
        parts = args.per_device_train_batch_size, args.gradient_accumulation_steps, args.world_size
        batch = parts[0] * parts[1] * parts[2]
        if sampler.batch_size != batch:
            raise UsageError(
                f"a sampler with batches of {sampler.batch_size:,}; per_device_train_batch_size x "
                f"gradient_accumulation_steps x processes is {parts[0]} x {parts[1]} x {parts[2]}: give "
                f"batch_size={batch}"
            )
        if args.max_steps > 0:
            samples = args.max_steps * batch
            if sampler.samples is None or sampler.samples // batch != args.max_steps or not sampler.drop_last:
                raise UsageError(
                    f"max_steps={args.max_steps}; create the sampler with samples={samples}, drop_last=True"
                )
            if (steps := sampler.total_steps()) != args.max_steps:
                raise UsageError(
                    f"max_steps={args.max_steps}, but the {sampler.samples:,} samples of the sampler are {steps:,} "
                    f"steps, because its epochs do not fill a batch of {batch}; give a smaller batch"
                )
        elif sampler.samples is not None or sampler.epochs != args.num_train_epochs:
            length = f"{sampler.epochs} epochs" if sampler.samples is None else f"{sampler.samples:,} samples"
            raise UsageError(
                f"num_train_epochs={args.num_train_epochs:g} for a sampler of {length}; give both the same number of "
                "epochs, or max_steps and samples"
            )


def _mean_of_logits(model: Any, outputs: Any, exact: bool) -> float | None:
    """Return the mean loss of the logits that a model of images and texts returns; None if it returns no such logits.

    The logits of a model in half precision are rounded: with a scale of 100 by up to 0.25, which changes a small loss
    by a tenth. So they need only be the products of the features up to rounding. ``exact``: the model is not rounded.
    """
    named = _named(outputs)
    image, text, logits = (named.get(name) for name in ("image_embeds", "text_embeds", "logits_per_image"))
    if image is None or text is None or logits is None or not hasattr(model, "logit_scale"):
        return None
    with torch.no_grad(), torch.autocast(image.device.type, enabled=False):
        logits_BB, bias = logits.float(), getattr(model, "logit_bias", None)
        image_BD, text_BD = (torch.nn.functional.normalize(each.float(), dim=1) for each in (image, text))
        own_BB = model.logit_scale.exp().float() * image_BD @ text_BD.T + (0 if bias is None else bias.float())
        rounding = 1e-3 if exact else 2**-5
        if logits_BB.shape != own_BB.shape or (logits_BB - own_BB).abs().max() > rounding * own_BB.abs().max():
            return None
        if bias is not None:
            sign_BB = 1 - 2 * torch.eye(len(logits_BB), device=logits_BB.device)
            return float(torch.nn.functional.softplus(sign_BB * logits_BB).sum(1).mean())
        target_B = torch.arange(len(logits_BB), device=logits_BB.device)
        both = [torch.nn.functional.cross_entropy(each, target_B) for each in (logits_BB, logits_BB.T)]
        return float(sum(both)) / 2


def _rows_as_pool(path: Path, rows: int, keys: Sequence[str] | None) -> EmbeddingStore:
    """Write the keys of the rows, by default their numbers, to a parquet file, and open it as a pool."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    column = pa.array(np.arange(rows)).cast(pa.string()) if keys is None else pa.array(list(map(str, keys)))
    with writing(path) as scratch:
        pq.write_table(pa.table({"key": column}), scratch)
    return open_store(absolute(str(path)))


class _Position(TrainerCallback):
    """Keeps the Trainer's count of epochs and steps equal to that of the sampler."""

    def __init__(self, sampler: PruningSampler, end_epoch: Callable[[], None]) -> None:
        self.sampler, self.end_epoch = sampler, end_epoch
        self.epoch = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.epoch = self.sampler.epoch
        state.max_steps = state.global_step + self.sampler.steps_left()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        sampler = self.sampler
        whole = sampler.step + len(sampler)
        state.epoch = sampler.epoch + (sampler.step / whole if whole else 0.0)
        state.max_steps = state.global_step + sampler.steps_left()
        if sampler.epoch != self.epoch:
            self.epoch = sampler.epoch
            control.should_epoch_stop, logs = True, control.should_log
            self.end_epoch()
            control.should_log = logs  # which a log of the epoch turns off, for the step too
        if sampler.plan is None:
            control.should_training_stop = True


class _Parts:
    """The batches of a sampler on this process, each in ``parts`` parts that differ in size by at most one row."""

    def __init__(self, sampler: PruningSampler, parts: int) -> None:
        self.sampler, self.parts = sampler, parts

    def __iter__(self) -> Iterator[list[int]]:
        for rows in self.sampler:
            if len(rows) < self.parts:
                raise UsageError(
                    f"a batch of {len(rows)} rows for gradient_accumulation_steps={self.parts}; prune less, or "
                    "accumulate fewer batches"
                )
            for part in range(self.parts):
                yield rows[part * len(rows) // self.parts : (part + 1) * len(rows) // self.parts]


class _Collate(collated_with_rows):
    """Adds the row ids to the batch, a dictionary."""

    def __call__(self, batch: list[tuple[int, Any]]) -> Any:
        rows, inputs = super().__call__(batch)
        if not isinstance(inputs, Mapping):
            raise UsageError(f"the data_collator returns a {type(inputs).__name__}; return a dictionary")
        return {**inputs, _ROWS: rows}


@dataclasses.dataclass(frozen=True, eq=False)
class _Rest:
    """A loader without a length, so that the Trainer takes as many batches as there are; one iterator an epoch."""

    loader: Any
    sampler: PruningSampler
    generator: torch.Generator

    @property
    def dataset(self) -> Any:
        return self.loader.dataset

    def __iter__(self) -> Iterator[dict[str, Any]]:
        sampler = self.sampler
        if sampler.plan is not None:
            self.generator.manual_seed(zlib.crc32(repr((sampler.seed, sampler.epoch, sampler.step)).encode()))
            yield from self.loader


def _at_progress(rate: Callable[[float], float], sampler: PruningSampler, total: int, step: int) -> float:
    """Return the rate at the step of a run of ``total`` steps that has the sampler's progress."""
    return rate(sampler.progress * total)
