"""The trainer of open_clip with pruning in its loop: ``python -m thresher.train.open_clip ... --prune scan``.

All arguments except those that start with ``--prune`` are passed to ``open_clip_train.main``. Its loop runs unchanged.
While it runs, five names in that module are replaced (:data:`SEAM`), because it has no other interface for them.
Nothing else of open_clip or torch is changed. The release 3.3 and the ``main`` branch differ in one of the names;
batches of the latter are dictionaries:

- ``get_data`` returns the data of open_clip, but the training loader leaves out the rows that the current plan leaves
  out, and remembers the ids of every batch it yields. Map-style datasets (csv, synthetic) are read through a
  :class:`PruningSampler`, webdataset through a :class:`prune_stream` stage in open_clip's pipeline, before its shuffle
  buffer.
- ``create_loss`` (3.3) returns the loss of open_clip; in addition the losses per sample are computed and recorded. If
  the plan has weights (InfoBatch), the loss is the weighted mean of the losses per sample instead. ``create_task``
  (``main``) returns the task of open_clip, with that loss.
- ``cosine_lr``, ``const_lr`` and ``const_lr_cooldown`` return the schedules of open_clip. If epochs are shorter, they
  get the step of a full run with the same progress, so that they end with the run.

With ``--prune full`` batches and losses are exactly those of open_clip.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import io
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from thresher import __version__
from thresher.data.streams import PATIENCE, Seen
from thresher.data.trainable import CAPTION, TAKEN, phrase, why_left_out
from thresher.dynamic.ledger import Ints
from thresher.dynamic.loop import as_array, describe, refuse_chosen
from thresher.dynamic.policies.full import Full
from thresher.dynamic.policies.static import Static
from thresher.dynamic.policy import Policy
from thresher.dynamic.reference_features import KeyedFeatures, ReferenceFeatures
from thresher.dynamic.references import References, check_found
from thresher.dynamic.registry import POLICIES, Flag, check_options, flags, policy_named
from thresher.dynamic.run_folder import ROWS, Training, save_state
from thresher.dynamic.sampler import PruningSampler, collated_with_rows, with_rows
from thresher.dynamic.stream import AUTO, ID, KEY, UID, StaticKeys, StreamPruner, prune_stream
from thresher.errors import MissingExtraError, ThresherError, UsageError, installed, suggest
from thresher.export.keys import each_key, key_batches, keys_are_of_rows, read_keys
from thresher.io.key_forms import difference
from thresher.pool.layout import texts
from thresher.pool.store import EmbeddingStore, absolute, open_store, reopen
from thresher.runtime import locks
from thresher.runtime.files import writing
from thresher.runtime.parameters import Share, read
from thresher.runtime.untrusted import cut
from thresher.selection import Selection

SEAM = ("get_data", "cosine_lr", "const_lr", "const_lr_cooldown")
LOSS = ("create_loss", "create_task")  # the fifth name: of 3.3, of main
KEYS = {"auto": AUTO, "key": KEY, "uid": UID, "url+key": ("__url__", KEY)}

OWN = (
    "share",
    "selection",
    "seed",
    "key",
    "patience",
    "fresh",
    "loss",
)  # flags --prune-share and so on; others are options of policies
_OF_POLICY = "of policy: "
_LOG = "pruning.jsonl"
_LEDGER = "pruning-ledger.npz"
_LOCK = ".pruning.lock"
_BUFFER = 5_000  # samples in open_clip's shuffle buffer
_SHARDS = 1_000  # opened without a sample, after which to stop


@dataclasses.dataclass(frozen=True, kw_only=True)
class PruneOptions:
    """The values of the arguments that start with ``--prune``.

    Attributes:
        policy: Name of the policy.
        share: Share of the samples of the run to leave out, including the warm-up; None for the published defaults.
        parameters: Options of the policy, by field.
        selection: For a policy that needs one, a selection folder or a text file of keys.
        seed: Seed of draws and orders; None for open_clip's seed.
        key: What identifies a sample of a webdataset, one of :data:`KEYS`.
        patience: Samples of a webdataset of which none is trained on, after which the run stops; None for the default.
        fresh: Start to prune from a checkpoint without a pruning state.
        loss: "drrho" to train with :func:`thresher.dynamic.loss.drrho_losses`, "distill" with
            :func:`thresher.dynamic.loss.distill_losses`; None for the loss of open_clip.
        reference: For these losses, a pool with embeddings of the same samples, by key.
    """

    policy: str = "full"
    share: float | None = None
    parameters: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    selection: str | None = None
    seed: int | None = None
    key: str = "auto"
    patience: int | None = None
    fresh: bool = False
    loss: str | None = None
    reference: str | None = None

    def make(self, epochs: int) -> Policy:
        """Return the policy for a run of ``epochs`` epochs; ``Full`` for one that needs a selection (and the data)."""
        if POLICIES.find(self.policy).needs_selection:
            return Full()
        return policy_named(self.policy, epochs, prune=self.share, options=self.parameters)


def main(arguments: Sequence[str]) -> int:
    """Run the trainer of open_clip with these arguments, including those that start with ``--prune``.

    Returns:
        0, or 1 if the trainer failed; 2 for invalid arguments or data, after a message on standard error.
    """
    try:
        options, rest = parse(arguments)
        with pruning(options) as trainer:
            return 0 if trainer.main(rest) is None else 1
    except ThresherError as error:
        sys.stderr.write(f"Error: {_message(error)}\n")
        return 2


def _message(error: ThresherError) -> str:
    """Return the message of an error; that of a worker of a DataLoader is the last line of a traceback."""
    text = str(error)
    if not text.startswith("Caught ") or "Traceback" not in text:
        return text
    return text.rstrip().rpartition("\n")[2].partition(": ")[2]


def parse(arguments: Sequence[str]) -> tuple[PruneOptions, list[str]]:
    """Return the pruning options, and the arguments for open_clip.

    Raises:
        UsageError: A policy, an option or a combination is not valid, including options of open_clip that cannot be
            combined with pruning.
        SystemExit: For ``--help``, or for an argument that open_clip does not have.
        MissingExtraError: open_clip is not installed.
    """
    # Options of policies that choose batches alone are left out: this trainer refuses these policies.
    offered = [flag for flag in flags(OWN) if not all(POLICIES.find(name).chooses_batches for name in flag.of)]
    args, rest = _parser(offered).parse_known_args(list(arguments))
    named = dict(vars(args))
    of_policy = {flag.flag: named.pop(_OF_POLICY + flag.flag) for flag in offered}
    known = {"--prune", *(f"--prune-{name.replace('_', '-')}" for name in (*named, *of_policy) if name != "policy")}
    for argument in rest:
        flag = argument.partition("=")[0]
        if flag.startswith("--prune") and flag not in known:
            raise UsageError(f"no option {flag}; --help lists those that start with --prune.{suggest(flag, known)}")
    try:
        refuse_chosen(POLICIES.find(args.policy), "the trainer of open_clip")
    except UsageError as error:
        raise UsageError(f"--prune {args.policy}: {error}") from None
    if not installed("open_clip_train"):
        raise MissingExtraError("training with open_clip", "train")
    if named["loss"] is not None:
        named["reference"] = of_policy.pop("reference")
    parameters = check_options(args.policy, of_policy, prune=args.share, flags=True)
    options = PruneOptions(**named, parameters=parameters)
    _check(options)
    _refuse_absent(rest, _trainer())
    from open_clip_train.params import parse_args

    open_clip_args = parse_args(rest)
    options.make(open_clip_args.epochs)
    refused = {
        "--horovod": getattr(open_clip_args, "horovod", False),
        "--distill-model": open_clip_args.distill_model,
        "--model coca...": "coca" in open_clip_args.model.lower(),
        "--use-naflex, or a model with it,": getattr(open_clip_args, "use_naflex", False),
        f"--dataset-type {open_clip_args.dataset_type}": "audio" in open_clip_args.dataset_type,
    }
    if options.loss == "distill" and open_clip_args.siglip:
        raise UsageError("--prune-loss distill is of the softmax loss; leave out --siglip, or give --prune-loss drrho")
    for flag in (flag for flag, is_given in refused.items() if is_given):
        raise UsageError(
            f"{flag} cannot be combined with pruning, which needs the loss of every pair; use open_clip_train.main"
        )
    return options, rest


def _refuse_absent(arguments: Sequence[str], trainer: Any) -> None:
    """Raise UsageError for an option that this version of open_clip does not have and users of others expect."""
    instead = {"--grad-cache": "--accum-freq N caches features: the loss is that of the whole batch of N parts"}
    if not hasattr(trainer, "create_task"):
        instead["--fsdp"] = "its main branch has it, and your own loop may use it, see docs/port-a-loop.md"
    for flag in (argument.partition("=")[0] for argument in arguments):
        if flag in instead:
            raise UsageError(f"{flag}: open_clip {_version()} has no such option; {instead[flag]}")


def _version() -> str:
    import open_clip

    return str(open_clip.__version__)


def static_keys(sel: str | os.PathLike[str], total: int, *, weigh: bool = False) -> StaticKeys:
    """Return the policy that keeps the samples of a stream which a selection keeps; reads its keys once.

    Args:
        sel: A selection folder or a file of keys, see :func:`thresher.export.keys.read_keys`.
        total: Number of samples of the stream.
        weigh: Multiply losses by weights instead of repeating samples.

    Raises:
        PoolError: The selection cannot be read.
        UsageError: A key belongs to several rows, or :meth:`StaticKeys.of_keys` refuses the keys.
    """
    read = 0

    def batches() -> Iterator[tuple[list[str], Ints | None]]:
        nonlocal read
        for keys, times in key_batches(sel):
            read += len(keys)
            yield keys, times

    policy = StaticKeys.of_batches(batches(), total, weigh=weigh)
    if read > len(policy.ids_M) and keys_are_of_rows(sel):
        read_keys(sel)  # raises, and names the key
    return policy


@contextmanager
def pruning(options: PruneOptions) -> Iterator[Any]:
    """Yield the module ``open_clip_train.main``, with the names of :func:`seam` replaced until the block ends."""
    trainer = _trainer()
    own = {name: getattr(trainer, name) for name in seam(trainer)}
    run = _Run(options, own)
    try:
        for name in own:
            setattr(trainer, name, getattr(run, name, None) or run.schedule(name))
        yield trainer
    finally:
        for name, value in own.items():
            setattr(trainer, name, value)
        run.lock.close()


def _trainer() -> Any:
    """Return the module ``open_clip_train.main``.

    Raises:
        UsageError: It cannot be imported, or it is that of another version.
    """
    try:
        from open_clip_train import main as trainer
    except ImportError as error:
        raise UsageError(
            f"open_clip's trainer cannot be imported ({error}); type: pip install 'open_clip_torch[training]'"
        ) from None
    seam(trainer)
    return trainer


def seam(trainer: Any) -> tuple[str, ...]:
    """Return the five names of ``open_clip_train.main`` that are replaced: :data:`SEAM`, and one of :data:`LOSS`.

    Raises:
        UsageError: It has others.
    """
    loss = next((name for name in LOSS if hasattr(trainer, name)), " or ".join(LOSS))
    if missing := [name for name in (*SEAM, loss) if not hasattr(trainer, name)]:
        raise UsageError(
            f"open_clip {_version()} has another trainer (no {', '.join(missing)} in open_clip_train.main), "
            "which is not supported; type: pip install 'open_clip_torch[training]==3.3.0'"
        )
    return (*SEAM, loss)


class _Run:
    """The state shared by data, loss and schedule of a run: the pruner, and the batches without losses yet."""

    def __init__(self, options: PruneOptions, own: Mapping[str, Any]) -> None:
        self.options, self.own = options, own
        self.args: Any = None
        self.pruner: PruningSampler | StreamPruner | None = None
        self.reference: ReferenceFeatures | KeyedFeatures | None = None
        self.start = 0  # the epoch of open_clip in which pruning started
        self.rows: dict[str, list[str]] | None = None  # key, path and caption of the rows of a csv
        self.warmed = 0.0  # progress at the end of the schedule's warm-up
        self.handed: list[npt.NDArray[Any]] = []  # ids of the batches without losses yet
        self.lock = ExitStack()  # holds the lock of the folder of the run

    # Called by open_clip's trainer

    def get_data(self, args: Any, preprocess_fns: Any, epoch: int = 0, **more: Any) -> dict[str, Any]:
        try:
            data: dict[str, Any] = self.own["get_data"](args, preprocess_fns, epoch=epoch, **more)
        except AssertionError as error:
            if "number of shards" not in str(error):
                raise
            raise UsageError(
                f"{args.train_data}: fewer tars than the {max(1, args.workers) * args.world_size} workers of all "
                "processes; give fewer --workers, or write more tars"
            ) from None
        if "train" in data:
            self.args = args
            self._hold()
            state = self._state_before(epoch)
            self.start = int(state["start"]) if state else epoch
            info = data["train"]
            streams = info.shared_epoch is not None
            loader = (self._streamed if streams else self._mapped)(info)
            if state:
                self.warmed = float(state["warmed"])
                self.in_force.load_state_dict(state)
            if args.rank == 0:
                logging.info(f"Pruning Policy: {describe(self.in_force.policy, defaults=True)}")
            data["train"] = dataclasses.replace(info, dataloader=loader)
        return data

    def create_loss(self, args: Any) -> Any:
        return _Loss(self, self.own["create_loss"](args))

    def create_task(self, args: Any, **of_task: Any) -> Any:
        task = self.own["create_task"](args, **of_task)
        if task.data_keys != ("image", "text"):
            raise UsageError(f"--model {args.model} is not trained on images with captions; use open_clip_train.main")
        recorded: Any = _Loss(self, task.loss)
        if args.torchcompile:  # the task may be compiled, without what records
            import torch

            recorded = torch.compiler.disable(recorded.__call__)
        del task.loss  # a torch module, which only another may replace
        task.loss = recorded
        return task

    def schedule(self, name: str) -> Callable[..., Any]:
        def make(optimizer: Any, base_lr: float, warmup: int, steps: int, *more: Any) -> Callable[[int], Any]:
            own = self.own[name](optimizer, base_lr, warmup, steps, *more)
            pruner = self.in_force

            def adjust(step: int) -> Any:
                done = pruner.total_steps() - pruner.steps_left()
                if self.start:  # pruning started later: add the steps of the full epochs before
                    done += self.start * (steps // self.args.epochs)
                if done < warmup or warmup >= steps:
                    self.warmed = pruner.progress
                    return own(done)
                went = (pruner.progress - self.warmed) / (1 - self.warmed)
                first = max(warmup, self.start * (steps // self.args.epochs))
                return own(first + went * (steps - first))

            return own if isinstance(pruner.policy, Full) else adjust

        return make

    @property
    def _saves(self) -> bool:
        return bool(self.args.logs) and self.args.logs.lower() != "none"

    def _hold(self) -> None:
        """Lock the folder of the run, on the first rank.

        Raises:
            OutputError: Another process is training there.
        """
        if self._saves and self.args.rank == 0:
            folder = Path(self.args.checkpoint_path).parent
            self.lock.close()
            self.lock.enter_context(locks.holding(folder / _LOCK, f"the run {folder}", wait=False))

    @property
    def _folder(self) -> Path | None:
        return Path(self.args.checkpoint_path).parent if self._saves else None

    @property
    def _in_worker(self) -> Callable[[int], None]:
        lock = Path(self.args.checkpoint_path).parent / _LOCK if self._saves else None
        return partial(locks.set_up_worker, lock)

    # The two kinds of data

    def _mapped(self, info: Any) -> _Loader:
        from torch.utils.data import DataLoader

        args, loader = self.args, info.dataloader
        batch = args.batch_size * args.accum_freq
        if loader.num_batches < args.accum_freq:
            raise UsageError(
                f"{loader.num_samples:,} rows do not fill a batch of {batch:,} on each process; give a smaller batch"
            )
        if self.options.key not in ("auto", "key"):
            raise UsageError(
                f"--prune-key {self.options.key} is for webdataset; the key of a csv is its column --csv-img-key"
            )
        policy = self._policy(loader)
        sampler = PruningSampler(
            len(loader.dataset),
            policy=policy,
            batch_size=batch * args.world_size,
            epochs=args.epochs - self.start,
            seed=self._seed(),
            references_N=self._references_of(policy, loader),
        )
        if (images := getattr(loader.dataset, "images", None)) is not None:
            keys = list(map(str, images))
            self.rows = {"key": keys, "filepath": keys, "text": list(map(str, loader.dataset.captions))}
        order = self._own_order(loader, info.sampler) if isinstance(policy, Full) else None
        self.pruner = sampler
        if self.options.reference is not None:
            if getattr(loader.dataset, "images", None) is None:
                raise UsageError("a synthetic dataset has no keys; use --prune-loss with csv or webdataset")
            keys = list(map(str, loader.dataset.images))
            self.reference = ReferenceFeatures.of_pool(open_store(absolute(self.options.reference)), keys, self._folder)
        mine = DataLoader(
            with_rows(loader.dataset),
            batch_sampler=_Batches(sampler, args.batch_size, args.accum_freq, loader.num_batches, args.rank, order),
            num_workers=loader.num_workers,
            pin_memory=loader.pin_memory,
            collate_fn=collated_with_rows(loader.collate_fn),
            worker_init_fn=self._in_worker,
        )
        return _Loader(self, loader, mine)

    def _streamed(self, info: Any) -> _Loader:
        args, loader = self.args, info.dataloader
        policy = self._policy(loader)
        pruner = StreamPruner(
            policy=policy,
            batch_size=args.batch_size * args.accum_freq * args.world_size,
            epochs=args.epochs - self.start,
            samples=loader.num_samples,
            seed=self._seed(),
            references=References.read(policy.references()) if policy.needs_references else None,
        )
        self.pruner = pruner
        if self.options.reference is not None:
            self.reference = KeyedFeatures.of_pool(open_store(absolute(self.options.reference)), self._folder)
        stage = prune_stream(pruner, KEYS[self.options.key], patience=self.options.patience)
        stages = stages_of(loader)
        insert_stage(stages, stage)
        _Watch(stage, args.batch_size, args.workers).insert(stages)
        loader.pipeline[0].worker_init_fn = self._in_worker
        return _Loader(self, loader, _Parted(loader))

    def _own_order(self, loader: Any, distributed: Any) -> Callable[[], list[Ints]]:
        """Return a function that returns the rows of every rank in the order of open_clip's sampler."""
        from torch.utils.data.distributed import DistributedSampler

        def of_ranks() -> list[Ints]:
            if distributed is None:
                return [np.array(list(loader.sampler), np.int64)]
            rows = []
            for rank in range(self.args.world_size):
                like = DistributedSampler(
                    loader.dataset, self.args.world_size, rank, shuffle=distributed.shuffle, seed=distributed.seed
                )
                like.set_epoch(distributed.epoch)
                rows.append(np.array(list(like), np.int64))
            return rows

        return of_ranks

    def _policy(self, loader: Any) -> Policy:
        policy, args = self._made(loader), self.args
        if (
            (policy.weighs() or self.options.loss)
            and args.world_size > 1
            and not args.siglip
            and not (args.local_loss and args.gather_with_grad)
        ):
            what = (
                f"policy {policy.name} uses weights, which" if policy.weighs() else f"--prune-loss {self.options.loss}:"
            )
            raise UsageError(
                f"{what} on several processes need{'' if policy.weighs() else 's'} --local-loss and --gather-with-grad "
                "of open_clip; give both"
            )
        return policy

    def _made(self, loader: Any) -> Policy:
        options, args = self.options, self.args
        if not POLICIES.find(options.policy).needs_selection:
            return options.make(args.epochs - self.start)
        path = Path(options.selection or "")
        dataset = getattr(loader, "dataset", None)
        if dataset is None:
            if POLICIES.find(options.policy) is not Static:
                raise UsageError(
                    f"--prune {options.policy} uses row numbers, which a stream does not have; use --prune static"
                )
            return static_keys(path, loader.num_samples, **options.parameters)
        if getattr(dataset, "images", None) is None:
            raise UsageError("a synthetic dataset has no keys; use --prune-selection with csv or webdataset")
        return policy_named(
            options.policy,
            args.epochs - self.start,
            times_N=self._times_of(path, dataset),
            options=options.parameters,
        )

    def _times_of(self, path: Path, dataset: Any) -> npt.NDArray[Any]:
        """Return how often a selection has each row of a csv: by key, or by row number if the rows are the same."""
        name, column = self.args.csv_img_key, list(map(str, dataset.images))
        wanted = read_keys(path)
        times_N = wanted.times_many(column)
        if times_N.any():
            found_M = np.zeros(len(wanted), np.bool_)
            found_M[wanted.find_many(column)[times_N > 0]] = True
            if not found_M.all() and self.args.rank == 0:
                missing = next(key for key, _ in each_key(path) if not found_M[wanted.find(key)])
                logging.warning(
                    f"Pruning Selection: {np.count_nonzero(~found_M):,} keys of {path} are not in the column {name}, "
                    f"such as {missing!r}"
                )
            return times_N
        if path.is_dir():
            chosen = Selection.load(path)
            if _same_rows(reopen(chosen), column, list(map(str, dataset.captions))):
                return np.asarray(chosen.mask() if chosen.repeats is None else chosen.repeats)
        example = next((key for key, _ in each_key(path)), "")
        like = f", such as {example!r}," if example else ""
        rows = ", and the rows of its pool are not those of the csv by key or caption" if path.is_dir() else ""
        raise UsageError(
            f"{path}: none of its keys{like} is in the column {name} of {self.args.train_data}, such as "
            f"{column[0]!r}{rows}{difference(example, column[0])}; give a text file with values of that column, one "
            "per line"
        )

    def _references_of(self, policy: Policy, loader: Any) -> npt.NDArray[np.float32] | None:
        """Return the reference loss of each row of a csv, by key; None for a policy that needs none."""
        if not policy.needs_references:
            return None
        if getattr(loader.dataset, "images", None) is None:
            raise UsageError("a synthetic dataset has no keys; use --prune-reference with csv or webdataset")
        references, keys = References.read(policy.references()), list(map(str, loader.dataset.images))
        references_N = references.of_keys(keys)
        where = f"the column {self.args.csv_img_key} of {self.args.train_data}"
        check_found(references_N, policy.references(), where, keys, references.example)
        if (unknown := int(np.count_nonzero(np.isnan(references_N)))) and self.args.rank == 0:
            logging.warning(
                f"Pruning Reference: {unknown:,} of {len(keys):,} rows have no reference loss; they come first"
            )
        return references_N

    # Losses

    @property
    def in_force(self) -> PruningSampler | StreamPruner:
        if self.pruner is None:
            raise UsageError("there are no training data; give --train-data, or --dataset-type synthetic")
        return self.pruner

    def take(self) -> npt.NDArray[Any]:
        """Return the ids of the batches without losses yet, which are those of one step."""
        return np.concatenate(self.handed)

    def weights(self, ids: npt.NDArray[Any]) -> Any:
        """Return the weights of the losses, a tensor (B,), or None."""
        import torch

        pruner = self.in_force
        if isinstance(pruner, StreamPruner):
            weights_B = pruner.weights(ids)
        else:
            of_plan = pruner.plan.weights_N if pruner.plan else None
            weights_B = None if of_plan is None else of_plan[ids]
        return None if weights_B is None else torch.from_numpy(weights_B)

    def record(self, ids: npt.NDArray[Any], losses_BR: Any) -> None:
        """Pass the losses of a step to the pruner."""
        self.handed.clear()
        self.in_force.reduce(ids, losses_BR)

    # The end of an epoch

    def end(self, epoch: int) -> None:
        """End the pruner's epoch unless it has ended, log it, and save the state for a checkpoint of open_clip."""
        pruner, args = self.in_force, self.args
        self.handed.clear()
        if pruner.epoch == epoch:
            if not pruner.step:
                raise UsageError(
                    f"epoch {epoch + self.start} had no batch; prune less, or give a smaller batch or fewer workers"
                )
            pruner.end_epoch()
        done = pruner.epoch + self.start
        due = (
            args.save_most_recent or done == args.epochs or (args.save_frequency > 0 and not done % args.save_frequency)
        )
        state = pruner.state_dict() if due and self._saves else None  # all ranks together
        if args.rank != 0:
            return
        entry = {**pruner.log()[-1], "epoch": done - 1}
        loss = "none" if entry["loss"] is None else f"{entry['loss']:.5g}"
        logging.info(
            f"Pruning Epoch: {done - 1} {entry['phase']}, {entry['rows']:,} of {entry['total']:,} rows kept, "
            f"{entry['samples']:,} samples, mean loss {loss}, {entry['pruned_so_far']:.1%} pruned so far"
        )
        if not self._saves:
            return
        folder = Path(args.checkpoint_path)
        with writing(folder.parent / _LOG) as scratch:
            lines = (json.dumps({**entry, "epoch": entry["epoch"] + self.start}) for entry in pruner.log())
            Path(scratch).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        if pruner.ledger is not None:
            arrays = pruner.ledger.state()
            if isinstance(pruner, StreamPruner):
                arrays |= {"hashes": pruner.hashes_N, "checks": pruner.checks_N}
            save_state(folder.parent / _LEDGER, arrays)
            self._record(folder.parent, pruner)
        if state is not None:
            state |= {"start": np.array(self.start), "warmed": np.array(self.warmed)}
            save_state(folder / _state_name(done), state)
            # Older states go, but not the last: its checkpoint is open_clip's latest until this one is saved.
            for path in folder.glob(_state_name("*")):
                of = int(re.sub(r"\D", "", path.name))
                kept = (folder / f"epoch_{of}.pt", folder / f"epoch_{of}")  # the latter in the shards of FSDP
                if of < done - 1 and not any(each.exists() for each in kept):
                    path.unlink()

    def _record(self, folder: Path, pruner: PruningSampler | StreamPruner) -> None:
        """Write the folder as trainers of thresher do, so that coreset, report, explain and compare read the run.

        The rows of a stream are hashes of keys, so that their pool is not recorded: report and compare show its
        numbers.
        """
        ledger, args = pruner.ledger, self.args
        if ledger is None or not len(ledger):
            return
        import pyarrow as pa
        import pyarrow.parquet as pq

        rows, store = folder / ROWS, ""
        if self.rows is not None:
            if not rows.exists():
                with writing(rows) as scratch:
                    pq.write_table(pa.table(self.rows), scratch)
            store = open_store(absolute(str(rows))).fingerprint()
        settings = {
            "epochs": args.epochs, "samples": None, "seed": self._seed(), "prune": self.options.share,
            "batch_size": args.batch_size * args.accum_freq * args.world_size, "lr": args.lr, "model": args.model,
            "options": dict(self.options.parameters), "selection": self.options.selection,
        }  # fmt: skip
        training = Training(
            folder=folder,
            task="open_clip",
            data=str(args.train_data),
            pool=absolute(str(rows)) if self.rows is not None else "",
            store=store,
            rows=len(ledger),
            policy=self.options.policy,
            settings=settings,
            version=__version__,
        )
        training.save()
        training.record([{**entry, "epoch": entry["epoch"] + self.start} for entry in pruner.log()], ledger)

    def _state_before(self, epoch: int) -> dict[str, Any] | None:
        """Return the pruning state of the checkpoint that open_clip resumes from; None for a new start."""
        if not epoch:
            return None
        import fsspec

        path = os.path.join(os.path.dirname(self.args.resume.rstrip("/")), _state_name(epoch))
        try:
            with fsspec.open(path, "rb") as file, np.load(io.BytesIO(file.read()), allow_pickle=False) as arrays:
                return dict(arrays)
        except FileNotFoundError:
            if self.options.fresh:
                return None
            raise UsageError(
                f"{path}: no such file; the checkpoint was saved without pruning. Give --prune-fresh to start pruning "
                f"in epoch {epoch}"
            ) from None

    def _seed(self) -> int:
        return int(self.args.seed) if self.options.seed is None else self.options.seed


class _Batches:
    """The batches of a sampler on one rank, split into batches of open_clip: ``accum`` of them are one step."""

    def __init__(
        self,
        sampler: PruningSampler,
        size: int,
        accum: int,
        most: int,
        rank: int,
        order: Callable[[], list[Ints]] | None,
    ) -> None:
        self.sampler, self.size, self.accum, self.most, self.rank, self.order = sampler, size, accum, most, rank, order

    def __iter__(self) -> Iterator[list[int]]:
        rest: list[list[int]] = []
        if self.order is not None:
            of_ranks, size = self.order(), self.size * self.accum
            edges = range(0, self.most // self.accum * size + 1, size)
            steps = [rows[lo:hi] for lo, hi in zip(edges, edges[1:], strict=False) for rows in of_ranks]
            self.sampler.reorder(np.concatenate(steps))
            # open_clip reads the batches after the last full step, but does not train on them.
            ends = range(edges[-1], self.most * self.size, self.size)
            rest = [of_ranks[self.rank][lo : lo + self.size].tolist() for lo in ends]
        for rows in self.sampler:
            for i in range(self.accum):
                yield rows[i * len(rows) // self.accum : (i + 1) * len(rows) // self.accum]
        yield from rest


class _Parted:
    """Converts the loader of a stream, whose batches contain ids, to one of ``(ids, batch of open_clip)``."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        for batch in self.loader:
            if isinstance(batch, dict):
                yield batch[ID], {name: part for name, part in batch.items() if name != ID}
            else:
                yield batch[0], batch[1:]


class _Loader:
    """The loader for open_clip: yields batches without ids, and keeps the ids until the losses are known.

    ``num_batches`` and ``num_samples`` are always those of a full epoch: open_clip computes step numbers in its logs
    from them, and these must not decrease when an epoch is shorter.
    """

    def __init__(self, run: _Run, loader: Any, batches: Iterable[Any]) -> None:
        self.run, self.batches = run, batches
        self.num_batches, self.num_samples = loader.num_batches, loader.num_samples

    def __iter__(self) -> Iterator[Any]:
        run, pruner = self.run, self.run.in_force
        epoch, number = pruner.epoch, 0
        most = self.num_batches if isinstance(pruner.policy, Full) else len(pruner) * run.args.accum_freq
        run.handed.clear()
        while number < most:
            before = number
            for ids, batch in self.batches:
                number += 1
                run.handed.append(as_array(ids))
                yield batch
                if number == most:
                    break
            if number == before or isinstance(pruner, PruningSampler):
                break  # a stream is read again until the epoch has its steps, as in open_clip, unless it is empty
        run.end(epoch)


class _Watch:
    """Stages in open_clip's pipeline that stop a run for which no batch will come, and say what they saw.

    Without them open_clip reads for ever: a worker reads its shards again until the epoch has its batches. Each worker
    has its own copy, whose counts are those of its process.
    """

    def __init__(self, stage: prune_stream, batch: int, workers: int) -> None:
        self.stage, self.batch, self.workers = stage, batch, workers
        self.patience = stage.patience or PATIENCE
        self.warned = False
        self.wanted: Callable[[Any], bool] = bool
        self.needs_text = False  # whether captions that are empty are left out too, as by the main branch
        self.images, self.captions = TAKEN, (CAPTION,)
        self._begin()

    def _begin(self) -> None:
        """Count from 0."""
        self.shards = self.trainable = self.decoded = 0
        self.seen = Seen()  # samples that the pruning stage passed, up to the first one to train on
        self.before = self.stage.seen, self.stage.passed

    def insert(self, stages: list[Any]) -> None:
        """Insert the stages into the pipeline of open_clip, which has the pruning stage, and ends with batches."""
        import webdataset as wds

        at = next(i for i, each in enumerate(stages) if each is self.stage)
        rules = [each.args[0] for each in stages[at:] if getattr(each, "f", None) is wds.select.f]
        self.wanted, self.needs_text = rules[0], len(rules) > 1
        self.images = getattr(self.wanted, "image_keys", TAKEN)
        self.captions = getattr(self.wanted, "text_keys", (CAPTION,)) or ("json",)  # None with --json-text-key
        stages.insert(-1, self.of_decoded)
        stages.append(self.of_batches)
        stages.insert(at + 1, self.of_passed)
        stages.insert(at - 1, self.of_shards)

    def of_shards(self, shards: Iterable[Any]) -> Iterator[Any]:
        for shard in shards:
            if self.shards >= _SHARDS and self.stage.seen == self.before[0]:
                raise UsageError(self._no_sample())
            self.shards += 1
            yield shard

    def of_passed(self, samples: Iterable[Any]) -> Iterator[Any]:
        for sample in samples:
            if self.wanted(sample):
                self.trainable += 1
                if not self.decoded and self.trainable >= self.patience + _BUFFER:
                    raise UsageError(self._no_image())
            else:
                self._warn(sample)
                if not self.trainable:
                    self.seen.add(sample, str(sample["__key__"]))
                    if self.seen.samples >= self.patience:
                        raise UsageError(self._no_pair())
            yield sample

    def _warn(self, sample: Mapping[str, Any]) -> None:
        """Log a warning about the first sample that open_clip leaves out."""
        if self.warned:
            return
        self.warned = True
        if self.as_usual:
            why = phrase(why_left_out(tuple(name for name in sample if not name.startswith("__"))))
            why += "; thresher doctor DATA counts them, thresher reshard --trainable fixes them"
        else:
            has_image = any(name in sample for name in self.images)
            why = f"has no {' or '.join(self.captions if has_image else self.images)}"
        key = cut(str(sample["__key__"]))
        logging.warning(f"Pruning Data: open_clip leaves out samples, such as {key!r}, which {why}")

    @property
    def as_usual(self) -> bool:
        """Whether images and captions have the endings of open_clip 3.3, which are those of doctor and reshard."""
        return (self.images, self.captions) == (TAKEN, (CAPTION,))

    def of_decoded(self, samples: Iterable[Any]) -> Iterator[Any]:
        for sample in samples:
            self.decoded += 1
            yield sample

    def of_batches(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Yield the batches of a pass over the shards of a worker; raise if there is none.

        The worker would read the same shards again, while the trainer waits for its batches.
        """
        self._begin()
        count = 0
        for batch in batches:
            count += 1
            yield batch
        if not count:
            raise UsageError(self._no_batch())

    def _no_batch(self) -> str:
        seen, passed = self.stage.seen - self.before[0], self.stage.passed - self.before[1]
        if not seen:
            return self._no_sample()
        fewer = ". If tars of other workers have samples to train on, give fewer --workers" if self.workers > 1 else ""
        if not passed:
            nothing = self.stage.nothing() or f"the plan has none of the {seen:,} samples of all tars; prune less"
            return f"{nothing}{fewer}"
        if not self.trainable:
            return self._no_pair()
        if not self.decoded:
            return self._no_image()
        return (
            f"{self.decoded:,} of {seen:,} samples in {self.shards:,} tars can be trained on, which do not fill a "
            f"batch of {self.batch:,}; give a smaller --batch-size or keep more samples{fewer}"
        )

    def _no_sample(self) -> str:
        return f"no sample in {self.shards:,} tars of --train-data; the warnings above say why"

    def _no_pair(self) -> str:
        if all(set(names) & self.seen.members.keys() for names in (self.images, self.captions)):
            hint = "; members of a sample must lie next to each other: sort the tars by name"
        elif self.as_usual:
            hint = "; thresher doctor DATA shows what there is, thresher reshard --trainable writes tars to train on"
        else:
            hint = ""
        return (
            f"open_clip can train on none of {self.seen}; a sample needs an image ({_either(self.images)}) and a "
            f"caption ({_either(self.captions)}){hint}"
        )

    def _no_image(self) -> str:
        what = "has an image that can be decoded and a caption with text" if self.needs_text else "can be decoded"
        return f"none of {self.trainable:,} samples {what}; the warnings above say why"


def _either(names: Sequence[str]) -> str:
    """Return names as text: "jpg, png or webp"."""
    return " or ".join(filter(None, (", ".join(names[:-1]), names[-1])))


class _Loss:
    """The loss of open_clip, which also passes the losses per sample to the pruner."""

    def __init__(self, run: _Run, own: Any) -> None:
        self.run, self.own, self.calls = run, own, 0

    def __call__(self, *, output_dict: bool = False, **outputs: Any) -> Any:
        import torch

        from thresher.dynamic.loss import reduce

        run, ids = self.run, self.run.take()
        weights_B = run.weights(ids)
        if weights_B is None and run.reference is None:
            result = self.own(**outputs, output_dict=output_dict)
        else:
            losses_BR = self._losses(outputs, ids)
            if weights_B is not None:
                weights_B = weights_B.to(losses_BR.device, non_blocking=True)
            loss = reduce(losses_BR, weights_B)
            result = {"contrastive_loss": loss} if output_dict else loss
        self.calls += 1
        if self.calls % run.args.accum_freq == 0:  # with accumulation it is called once per part of a step
            with torch.no_grad():
                run.record(ids, self._losses({name: value.detach() for name, value in outputs.items()}, ids))
        return result

    def _losses(self, outputs: Mapping[str, Any], ids: npt.NDArray[Any]) -> Any:
        import torch

        from thresher.dynamic.loss import clip_losses, distill_losses, drrho_losses, siglip_losses

        image, text, scale = (outputs[name] for name in ("image_features", "text_features", "logit_scale"))
        together = self.run.args.world_size > 1
        if self.run.reference is not None:
            known = [torch.from_numpy(each).to(image.device) for each in self.run.reference.gather(ids)]
            if self.run.options.loss == "drrho":
                return drrho_losses(image, text, known[0], known[1], gather=together)
            return distill_losses(image, text, known[0], known[1], scale, gather=together)
        if self.run.args.siglip:
            return siglip_losses(image, text, scale, outputs["logit_bias"], gather=together)
        return clip_losses(image, text, scale, gather=together)


def insert_stage(stages: list[Any], stage: Any, *, ids: bool = True) -> None:
    """Insert a :class:`prune_stream` or a :class:`thresher.export.webdataset.keep` into open_clip's pipeline, in place.

    It is inserted after the stage that reads samples from tar files, before the shuffle buffer.

    Args:
        stages: The stages of the pipeline, see :func:`stages_of`.
        stage: A function from samples to samples.
        ids: Whether the stage that chooses image and text also chooses the id from :class:`prune_stream`; False for a
            stage without ids.

    Raises:
        UsageError: The pipeline has other stages, for example in another version of open_clip.
    """
    from open_clip_train.data import tar_file_expander, tarfile_to_samples_nothrow

    tars = [i for i, each in enumerate(stages) if each is tarfile_to_samples_nothrow]
    chosen = [(i, with_id) for i, each in enumerate(stages) if (with_id := _with_id(each)) is not None]
    if len(tars) != 1 or len(chosen) != 1 or tars[0] > chosen[0][0]:
        raise UsageError(
            "the training pipeline of this version of open_clip is not supported; install open_clip_torch 3.3.0"
        )
    if ids:
        stages[chosen[0][0]] = chosen[0][1]
    if "eof_value" in inspect.signature(tar_file_expander).parameters:
        stages[tars[0]] = samples_of_tars
    stages.insert(tars[0] + 1, stage)


def _with_id(stage: Any) -> Any:
    """Return a stage that chooses image and text of a sample, with the id as well; None for any other stage."""
    import webdataset as wds

    args, kw = getattr(stage, "args", ()), getattr(stage, "kw", {})
    if args == ("image", "text"):  # 3.3
        return wds.to_tuple(ID, *args)
    if kw.get("keep") is False and {"image", "text"} <= kw.keys():  # main
        return wds.rename(**kw, **{ID: ID})
    return None


def samples_of_tars(shards: Iterable[Any]) -> Iterator[Any]:
    """Yield the samples of tar files, like open_clip's stage ``tarfile_to_samples_nothrow``.

    Since 0.2.90 webdataset yields a marker at the end of a tar, and the stage of open_clip 3.3 then stops with
    ``KeyError: 'fname'``. This one turns the markers off, so open_clip reads the same as with older versions.
    """
    from open_clip_train import data

    opened = data.url_opener(shards, handler=data.log_and_continue)
    files = data.tar_file_expander(opened, handler=data.log_and_continue, eof_value=None)
    return data.group_by_keys_nothrow(files, handler=data.log_and_continue)  # type: ignore[no-any-return]


def stages_of(loader: Any) -> list[Any]:
    """Return the pipeline stages of an open_clip loader, to change in place before the first batch."""
    stages: list[Any] = loader.pipeline[0].dataset.pipeline
    return stages


def _same_rows(store: EmbeddingStore, column: Sequence[str], captions: Sequence[str]) -> bool:
    """Return whether every row of a pool is the row of the csv with the same number.

    Its key must be the name of the file, with or without extension, or its caption must be equal. More than half of the
    names or captions must be distinct, so that a pool in another order does not match by chance.
    """
    if len(store) != len(column):
        return False
    names = [os.path.basename(name) for name in column]
    if store.layout.key:
        keys = (key for _, part in store.keys() for key in part)
        if all(key in (name, os.path.splitext(name)[0]) for key, name in zip(keys, names, strict=True)):
            return len(set(names)) > len(names) / 2
    if not store.layout.caption:
        return False
    shown = (text for _, part in store.scan([store.layout.caption]) for text in texts(part.column(0)))
    # A csv has captions on one line, so white space may differ.
    alike = (one.split() == two.split() for one, two in zip(shown, captions, strict=True))
    return all(alike) and len(set(captions)) > len(captions) / 2


def _state_name(epoch: int | str) -> str:
    """Return the file name of the pruning state of a checkpoint; not ``.pt``, or open_clip would resume from it."""
    return f"epoch_{epoch}.pruning.npz"


def _check(options: PruneOptions) -> None:
    """Raise UsageError for options that cannot be combined."""
    needs = POLICIES.find(options.policy).needs_selection
    if needs != (options.selection is not None):
        need = " or ".join(name for name, cls in POLICIES.all().items() if cls.needs_selection)
        raise UsageError(f"--prune {need} and --prune-selection need each other; give both or neither")
    if options.patience is not None and options.patience < 1:
        raise UsageError(f"--prune-patience {options.patience}; give 1 or more samples")
    if options.loss is not None:
        if POLICIES.find(options.policy).needs_references:
            raise UsageError(f"--prune-loss {options.loss} and --prune {options.policy} need two references; give one")
        if options.reference is None:
            raise UsageError(f"--prune-loss {options.loss} needs --prune-reference: a pool of the same samples")
        open_store(absolute(options.reference)).require_joint(f"--prune-loss {options.loss}")
    if needs and options.share is not None:
        raise UsageError(f"--prune {options.policy} trains on the selection; leave out --prune-share")


class _Parser(argparse.ArgumentParser):
    """A parser that reports errors in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def _value(kind: Any, text: str) -> Any:
    """Parse text as a value of a type."""
    try:
        return read(kind, text)
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from None  # argparse adds the name of the argument


def _parser(offered: Sequence[Flag]) -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m thresher.train.open_clip",
        usage="%(prog)s [arguments of open_clip_train.main] [--prune POLICY] [--prune-... ...]",
        description="Train with the trainer of open_clip, with pruning in its loop. Arguments that start with --prune "
        "are listed below; all others are those of open_clip: python -m open_clip_train.main --help.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    policies = POLICIES.all()
    need = ", ".join(name for name, cls in policies.items() if cls.needs_selection)
    add("--prune", dest="policy", metavar="POLICY", default="full", help=f"one of {', '.join(policies)} (full)")
    add(
        "--prune-share",
        dest="share",
        type=partial(_value, Share),
        metavar="SHARE",
        help="share of the run's samples to leave out, like 30%% or 0.3",
    )
    for flag in offered:
        kwargs: dict[str, Any] = {"dest": _OF_POLICY + flag.flag, "default": None, "help": flag.help.replace("%", "%%")}
        if flag.kind is bool:
            kwargs["action"] = argparse.BooleanOptionalAction
        else:
            kwargs |= {"type": partial(_value, flag.kind), "metavar": flag.metavar}
        add(f"--prune-{flag.flag}", **kwargs)
    add(
        "--prune-loss", dest="loss", choices=("drrho", "distill"), metavar="LOSS",
        help="drrho: contrast with a reference; distill: learn from it as a teacher; "
        "--prune-reference is a pool of the same samples",
    )  # fmt: skip
    add("--prune-selection", dest="selection", help=f"{need}: a selection folder, or a file of keys")
    add("--prune-seed", dest="seed", type=int, help="seed of draws and orders (default: --seed of open_clip)")
    add(
        "--prune-key",
        dest="key",
        choices=tuple(KEYS),
        default="auto",
        help="webdataset: what identifies a sample; uid is that in its json (auto: uid if the selection has uids)",
    )
    add(
        "--prune-patience",
        dest="patience",
        type=int,
        metavar="SAMPLES",
        help="webdataset: stop if none of this number of samples can be used (10000, or more for a small selection)",
    )
    add(
        "--prune-fresh", dest="fresh", action="store_true", help="start pruning from a checkpoint saved without pruning"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
