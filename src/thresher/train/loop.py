"""The loop of the reference trainers: epochs, log, checkpoints and progress; the model and its losses are a task."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import IO, Any, Literal, Protocol, cast

import numpy as np
import numpy.typing as npt

from thresher import __version__
from thresher.data import DataOptions
from thresher.data.location import refuse_inside
from thresher.dynamic.cabs import Cabs, Kind
from thresher.dynamic.jest import JestSampler
from thresher.dynamic.loop import describe
from thresher.dynamic.policies.jest import Jest
from thresher.dynamic.policy import Policy
from thresher.dynamic.reference_features import COPIES, ReferenceFeatures
from thresher.dynamic.references import References
from thresher.dynamic.registry import POLICIES, check_selection, epochs_for, policy_named
from thresher.dynamic.run_folder import CHECKPOINT, MARK, ROWS, Training
from thresher.dynamic.sampler import PruningSampler
from thresher.dynamic.schedule import cosine_by_progress
from thresher.errors import MissingExtraError, OutputError, PoolError, ThresherError, UsageError, installed
from thresher.evaluation.sets import EvalSet, read_eval
from thresher.export.keys import read_keys
from thresher.io.open import trusting
from thresher.io.pictures import Resize, decode
from thresher.pool.store import absolute, open_store
from thresher.runtime import locks
from thresher.runtime.files import writing
from thresher.runtime.format import counted, duration
from thresher.runtime.kernels import has_bfloat16
from thresher.runtime.places import local_path
from thresher.runtime.process import no_warnings
from thresher.runtime.progress import Progress
from thresher.runtime.untrusted import parse_json
from thresher.selection import Selection
from thresher.train.data import (
    COLUMN,
    PICTURES,
    SET_ASIDE,
    Pairs,
    concepts_of,
    has_losses,
    open_pairs,
    reference_of,
    references_of,
    times_of,
)

try:
    import torch
    from torch import nn
except ImportError:
    raise MissingExtraError("training", "train") from None

LOCK = ".lock"  # in the folder of a run
Precision = Literal["auto", "float32", "bfloat16"]
Reduce = Callable[[torch.Tensor], torch.Tensor]
Scores = dict[str, dict[str, float]]

_LONG_RUN = 1_000  # epochs
_EARLY = (ROWS, PICTURES, SET_ASIDE, *COPIES)  # files written before a run has started

# Settings that may change when a run is resumed.
_MOST, _MOST_WORKERS = 1e6, 4_096  # of a rate and of minutes; each worker is a process
_FREE = ("evals", "eval_every", "eval_labels", "eval_group", "templates", "checkpoint_minutes", "workers", "device")


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Settings that all trainers have: length, batches, policy and optimization.

    Attributes:
        epochs: Length of the run in epochs, or None.
        samples: Length of the run in samples seen, or None. Give exactly one of the two.
        batch_size: Rows of a batch.
        policy: Name of the pruning policy.
        prune: Share of the run's samples to leave out, None for the published defaults of the policy.
        options: Options of the policy, by field.
        selection: For a policy that needs one: a selection folder, or a file of keys.
        compose: "diversity" or "frequency" to compose every batch by the concepts of its rows, see
            :class:`thresher.dynamic.cabs.Cabs`; None for random batches.
        concepts: For ``compose``, where the concepts are, see :func:`thresher.train.data.concepts_of`.
        super_batch: For ``compose``, how many batches of rows a batch is chosen from; None for 5.
        seed: Seed of weights, orders, draws and augmentations.
        lr: Peak learning rate, None for the default of the model (:func:`prepared`). It rises during ``warmup`` and
            then falls to 0 by half a cosine, by samples seen.
        weight_decay: Weight decay of parameters with two dimensions or more.
        warmup: Share of the run over which the learning rate rises.
        precision: Precision of matrix products; "auto" is bfloat16 where the device has instructions for it (a GPU,
            or a CPU with avx512_bf16 or amx_bf16), else float32. Weights and losses are float32.
        device: "auto", "cpu", "cuda" and so on.
        workers: Processes that read images which are not kept in memory.
        evals: Parquet files to evaluate on.
        eval_every: Epochs between evaluations; 0 for only at the end.
        checkpoint_minutes: Minutes between checkpoints within an epoch; there is one after every epoch too.
    """

    epochs: int | None = None
    samples: int | None = None
    batch_size: int = 256
    policy: str = "full"
    prune: float | None = None
    options: Mapping[str, Any] | None = None
    selection: str | None = None
    compose: Kind | None = None
    concepts: str | None = None
    super_batch: int | None = None
    seed: int = 0
    lr: float | None = None
    weight_decay: float = 0.1
    warmup: float = 0.05
    precision: Precision = "auto"
    device: str = "auto"
    workers: int = 2
    evals: tuple[str, ...] = ()
    eval_every: int = 5
    checkpoint_minutes: float = 5.0

    def __post_init__(self) -> None:
        """Validate the parameters."""
        if (self.epochs is None) == (self.samples is None):
            raise UsageError("give the length of the run either in epochs or in samples")
        if (
            self.batch_size < 2
            or not 0 <= self.seed < 2**63
            or not 0 <= self.warmup < 1
            or not 0 <= self.checkpoint_minutes <= _MOST
        ):
            raise UsageError(
                f"batch size = {self.batch_size}, seed = {self.seed}, warmup = {self.warmup}, checkpoint minutes = "
                f"{self.checkpoint_minutes}; give a batch size of 2 or more, a seed from 0 to 2^63 - 1, a warmup of 0 "
                f"or more and below 1, and 0 to {_MOST:,.0f} minutes"
            )
        check_selection(self.policy, self.selection is not None)
        if (self.compose is None) != (self.concepts is None) or (self.super_batch is not None and not self.compose):
            raise UsageError("compose and concepts need each other, and super_batch needs both")
        if self.compose is not None and POLICIES.find(self.policy).chooses_batches:
            raise UsageError(f"policy {self.policy} chooses batches, which cannot be composed too; leave out compose")
        if (
            not 0 < (1.0 if self.lr is None else self.lr) <= _MOST
            or not 0 <= self.weight_decay <= _MOST
            or not 0 <= self.workers <= _MOST_WORKERS
            or self.eval_every < 0
        ):
            raise UsageError(
                f"lr = {self.lr}, weight decay = {self.weight_decay}, workers = {self.workers}, evaluation every "
                f"{self.eval_every} epochs; give a rate above 0 and up to {_MOST:,.0f}, and for the others 0 or more, "
                f"with at most {_MOST_WORKERS:,} workers"
            )

    def check(self) -> None:
        """Check policy and selection, as far as that is possible without the data.

        Raises:
            UsageError: Policy, options and share to prune do not fit together, or the selection has no keys.
            PoolError: The selection cannot be read.
        """
        # A longer run can reach more, so that what is refused for this one is refused for any number of samples.
        length = self.epochs or _LONG_RUN
        times_N = None if self.selection is None else np.ones(1, np.int32)
        policy = policy_named(self.policy, length, prune=self.prune, times_N=times_N, options=self.options)
        if (reference := policy.references()) and not reference.startswith(COLUMN):
            if policy.needs_references or has_losses(reference):
                References.read(reference)
            else:
                open_store(absolute(reference)).require_joint(f"policy {policy.name}")
        if self.selection is not None:
            if os.path.isdir(self.selection):
                Selection.load(self.selection)
            else:
                read_keys(self.selection)

    def policy_for(self, rows: int, times_N: npt.NDArray[np.int32] | None) -> Policy:
        """Return the policy for data of ``rows`` rows."""
        length = self.epochs
        if length is None and self.samples is not None:
            length = 1
            if times_N is None:
                length = epochs_for(self.samples, rows, self.policy, prune=self.prune, options=self.options)
        return policy_named(self.policy, length or 1, prune=self.prune, times_N=times_N, options=self.options)


class TrainingTask(Protocol):
    """What a trainer trains: a model, the losses of a batch, and the evaluation of the model."""

    model: nn.Module
    device: torch.device

    def step(self, rows_B: npt.NDArray[np.int64], pixels_BHWC: torch.Tensor, reduce: Reduce) -> None:
        """Compute the losses of a batch, and backpropagate their ``reduce``.

        Args:
            rows_B: (B,) row ids.
            pixels_BHWC: (B, H, W, 3) uint8 images.
            reduce: Turns losses (B, R) into a scalar, and records them.
        """
        ...

    def after_step(self, progress: float) -> None:
        """Update the model after the optimizer's step; ``progress`` is the share of the run that is done."""
        ...

    def evaluate(self) -> Scores:
        """Return metrics by evaluation set."""
        ...


class ScoringTask(TrainingTask, Protocol):
    """A task that can score super-batches, for a policy that chooses batches; trainers without it refuse the policy."""

    def scored(self, rows_B: npt.NDArray[np.int64], pixels_BHWC: torch.Tensor) -> tuple[Any, ...]:
        """Return what :meth:`JestSampler.choose` takes: features (B, D) without gradients, scale and bias."""
        ...


@contextmanager
def open_run(
    task: str,
    data: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    settings: Any,
    *,
    side: int,
    resize: Resize,
    captions: bool,
    resume: bool,
    progress: Progress,
    reading: DataOptions | None = None,
) -> Iterator[tuple[Training, Pairs]]:
    """Lock and check the folder of a run, read its data, and describe the run; the lock ends with the block.

    Args:
        task: "clip", "moco" or "reference".
        data: The data, see :func:`thresher.train.data.open_pairs`.
        folder: The folder of the run.
        settings: A dataclass with all settings; its ``schedule`` is a :class:`Schedule`.
        side: Height and width of the stored images in pixels.
        resize: How images are made square.
        captions: Whether every row needs a caption.
        resume: Whether to resume the run in the folder, if there is one.
        progress: Where to report progress.
        reading: How to read the data.

    Yields:
        The run, not saved yet, and its data.

    Raises:
        OutputError: The folder has a run already, or other files, or another process is training there.
        UsageError: The run to resume has other settings, or its data have changed.
        PoolError: The data cannot be read.
    """
    out, schedule = local_path(folder), settings.schedule
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError(
            "the reference trainers run on one process; for several, use python -m thresher.train.open_clip, which "
            "prunes in the trainer of open_clip"
        )
    schedule.check()
    requested = json.loads(json.dumps({**asdict(schedule), **_flat(settings), "data": absolute(os.fspath(data))}))
    with _locked(out):
        earlier = _earlier(out, task, requested, resume)
        if earlier is None:
            refuse_inside(data, out)
        with _removed_unless_started(out):
            options: dict[str, Any] = {
                "side": side,
                "resize": resize,
                "captions": captions,
                "workers": max(schedule.workers, 1),
                "options": reading,
            }
            pairs = open_pairs(os.fspath(data), out, **options, progress=progress)
            if pairs.skipped:
                progress.say(f"{counted(len(pairs.skipped), 'row')} cannot be used, listed in {out / SET_ASIDE}")
            content = _content_of(pairs)
            training = Training(
                folder=out,
                task=task,
                data=os.fspath(data),
                pool=pairs.store.layout.location,
                store=pairs.store.fingerprint(),
                rows=len(pairs),
                policy=schedule.policy,
                settings={**requested, "content": content},
                version=__version__,
            )
            if earlier is not None and _content(earlier) != _content(training):
                raise UsageError(f"{data}: has changed since {out} was started; use the same data, or start a new run")
            yield training, pairs


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lock the folder of a run; a folder that did not exist is removed again if nothing was written to it."""
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder}: is a file; name a folder")
    new = not folder.exists()
    try:
        with locks.holding(folder / LOCK, f"the run {folder}", wait=False) as still_held:
            yield
            still_held()
    finally:
        if new:
            with suppress(OSError):
                folder.rmdir()


@contextmanager
def _removed_unless_started(folder: Path) -> Iterator[None]:
    """Remove the files of a run that did not start because of an error."""
    try:
        yield
    except ThresherError:
        if not (folder / MARK).exists():
            for name in _EARLY:
                (folder / name).unlink(missing_ok=True)
        raise


def _content_of(pairs: Pairs) -> str:
    """Return a hash of the sizes of the images and of the captions; nothing is copied."""
    sha = hashlib.sha256(np.ascontiguousarray(pairs.size_N).data)
    for caption in pairs.captions:
        sha.update(f"{caption}\0".encode("utf-8", "surrogatepass"))
    return sha.hexdigest()[:32]


def _content(training: Training) -> tuple[str, int, Any]:
    """Return what identifies the data: keys, number of rows, captions and sizes of images."""
    return training.store, training.rows, training.settings.get("content")


def _flat(settings: Any) -> dict[str, Any]:
    return {name: value for name, value in asdict(settings).items() if name != "schedule"}


def _earlier(folder: Path, task: str, requested: Mapping[str, Any], resume: bool) -> Training | None:
    """Return the run in a folder, or None; check that it may be resumed with these settings."""
    names = {path.name for path in folder.iterdir()} - {LOCK}
    if MARK not in names:
        # A run that was killed while it read the data may have left these files; others are not allowed.
        if any(name not in _EARLY and not _scratch(name) for name in names):
            raise OutputError(f"{folder}: exists and is not a training run; choose another name")
        sweep_scratch(folder)
        return None
    if not resume:
        raise OutputError(f"{folder}: has a training run already; pass --resume to continue it, or choose another name")
    earlier = Training.load(folder)
    known = {**earlier.settings, "task": earlier.task}
    for name, asked in {**requested, "task": task}.items():
        if asked != known.get(name) and name not in _FREE:
            raise UsageError(
                f"{folder}: was started with {name.replace('_', ' ')} {known.get(name)}, not {asked}; "
                "give the same value to continue, or choose another name for a new run"
            )
    sweep_scratch(folder)
    return earlier


def _scratch(name: str) -> bool:
    """Return whether a file is a temporary one, left by a process that was killed."""
    return name.startswith(".") and ".tmp" in name


def sweep_scratch(folder: Path) -> None:
    """Remove the temporary files that a killed process left in the folder of a run."""
    locks.sweep(path for path in folder.iterdir() if _scratch(path.name) and path.is_file())


def fit(
    task: TrainingTask,
    pairs: Pairs,
    schedule: Schedule,
    training: Training,
    progress: Progress,
    *,
    held_out: bool = False,
) -> list[dict[str, Any]]:
    """Train to the end of the schedule, from the run's checkpoint if there is one; return the log.

    The same arguments give the same run, however often it was interrupted: bit for bit on a CPU with the same number
    of threads.

    Args:
        task: What is trained.
        pairs: The data.
        schedule: Length, policy and rows.
        training: The folder of the run.
        progress: Where to report progress.
        held_out: Whether rows outside the selection are held out, to be scored afterwards, and not pruned: the lines
            on epochs then say nothing of pruning.
    """
    times_N = None
    if schedule.selection is not None:
        times_N, missing = times_of(schedule.selection, pairs)
        if missing:
            progress.say(f"{counted(missing, 'key')} of {schedule.selection} not found in the data")
    sampler = _sampler(schedule, schedule.policy_for(len(pairs), times_N), pairs, training.folder, progress)
    optimizer = _adamw(task.model, schedule)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, cosine_by_progress(sampler, warmup=schedule.warmup))
    checkpointer = _Checkpointer(
        training.folder / CHECKPOINT, task.model, optimizer, sampler, schedule.checkpoint_minutes
    )
    log, seconds = checkpointer.load()
    training.save()  # only now that all settings are validated
    loader = loader_of(pairs, sampler, schedule.workers, task.device, training.folder / LOCK)
    progress.say(f"policy: {describe(sampler.policy, defaults=True)}")
    if len(pairs) < schedule.batch_size:
        progress.say(
            f"{counted(len(pairs), 'row does', 'rows do')} not fill a batch of {schedule.batch_size:,}; "
            "all rows are in one batch"
        )
    if log or sampler.step:
        where = f"resuming in epoch {sampler.epoch + 1}, after step {sampler.step}"
        progress.say("the run is finished" if sampler.plan is None else where)
        log = _evaluated(task, schedule, sampler, log, progress)
        training.record(log, sampler.ledger)  # the run may have been killed before it recorded the epoch
    while sampler.plan is not None:
        epoch, rate = sampler.epoch, 0.0
        label = f"epoch {epoch + 1} of {sampler.epochs}, {sampler.plan.phase}"
        task.model.train()
        started = time.monotonic() - seconds
        with progress.task(label, len(sampler) * sampler.batch_size) as advance:
            for rows_B, pixels_BHWC in loader:
                torch.manual_seed(_number(schedule.seed, epoch, sampler.step))  # the same draws in a resumed run
                optimizer.zero_grad(set_to_none=True)
                passed, pixels_BHWC = len(rows_B), pixels_BHWC.to(task.device, non_blocking=True)
                if isinstance(sampler, JestSampler):
                    scored = cast(ScoringTask, task).scored(rows_B, pixels_BHWC)
                    at = sampler.choose(rows_B, *scored)
                    rows_B, pixels_BHWC = rows_B[at.numpy()], pixels_BHWC[at.to(task.device)]
                task.step(rows_B, pixels_BHWC, _reduce(sampler, rows_B))
                rate = optimizer.param_groups[0]["lr"]
                optimizer.step()
                task.after_step(sampler.progress)
                rates.step()
                advance(passed)
                if sampler.epoch == epoch and checkpointer.due():
                    checkpointer.save(log, time.monotonic() - started)
        if task.device.type == "cuda":
            torch.cuda.synchronize(task.device)
        seconds = time.monotonic() - started
        entry = {**sampler.log()[-1], "seconds": round(seconds, 3), "lr": rate}
        entry["samples_per_second"] = round(entry["samples"] / seconds, 1)
        log, seconds = [*log, entry], 0.0
        checkpointer.save(log, seconds)
        training.record(log, sampler.ledger)
        evaluated = _evaluated(task, schedule, sampler, log, progress)
        if evaluated is not log:
            log = evaluated
            checkpointer.save(log, seconds)
            training.record(log, sampler.ledger)
        for line in _epoch_lines(log, sampler, held_out):
            progress.say(line)
    return log


def _sampler(schedule: Schedule, policy: Policy, pairs: Pairs, folder: Path, progress: Progress) -> PruningSampler:
    """Return the sampler of a run, with the reference that its policy needs."""
    how: dict[str, Any] = {
        "batch_size": min(schedule.batch_size, len(pairs)),
        "epochs": schedule.epochs,
        "samples": schedule.samples,
        "seed": schedule.seed,
    }
    where, reference = policy.references(), cast(Any, None)
    if where:
        reference = references_of(where, pairs) if policy.needs_references else reference_of(where, pairs, folder)
        unknown = 0 if isinstance(reference, ReferenceFeatures) else int(np.count_nonzero(~np.isfinite(reference)))
        if unknown:
            then = "they come first" if policy.needs_references else "they count as the mean"
            progress.say(f"{counted(unknown, 'row has', 'rows have')} no reference loss; {then}")
    if isinstance(policy, Jest):
        return JestSampler(len(pairs), policy=policy, reference=reference, **how)
    composition = None
    if schedule.compose is not None and schedule.concepts is not None:
        concepts = concepts_of(schedule.concepts, pairs)
        if without := int(np.count_nonzero(concepts.counts() == 0)):
            progress.say(f"{counted(without, 'row has', 'rows have')} no concept; batches take them last")
        wide = 5 if schedule.super_batch is None else schedule.super_batch
        composition = Cabs(concepts=concepts, kind=schedule.compose, super_batch=wide)
    return PruningSampler(len(pairs), policy=policy, references_N=reference, composition=composition, **how)


def _evaluated(
    task: TrainingTask, schedule: Schedule, sampler: PruningSampler, log: list[dict[str, Any]], progress: Progress
) -> list[dict[str, Any]]:
    """Return the log with an evaluation of the last epoch; the same object if the epoch needs none.

    If an evaluation fails, for example because the model diverged, training continues; the log has the reason.
    """
    if not log or not schedule.evals or sampler.step or {"eval", "eval_failed"} & set(log[-1]):
        return log
    every, done = schedule.eval_every, len(log)
    if sampler.plan is not None and not (every and done % every == 0):
        return log
    task.model.eval()
    try:
        return [*log[:-1], {**log[-1], "eval": task.evaluate()}]
    except ThresherError as error:
        progress.say(f"epoch {done}: the evaluation failed: {error}")
        return [*log[:-1], {**log[-1], "eval_failed": str(error)}]


def _reduce(sampler: PruningSampler, rows_B: npt.NDArray[np.int64]) -> Reduce:
    return lambda losses_BR: sampler.reduce(rows_B, losses_BR)


def _number(*what: int) -> int:
    return int.from_bytes(hashlib.sha256(repr(what).encode()).digest()[:8], "little") >> 1


def _epoch_lines(log: Sequence[Mapping[str, Any]], sampler: PruningSampler, held_out: bool) -> list[str]:
    """Return the lines to print after an epoch: its summary, the remaining time and its evaluation."""
    entry = log[-1]
    spent, seen = sum(e["seconds"] for e in log), sum(e.get("scored", e["samples"]) for e in log)
    loss = "no finite loss" if entry["loss"] is None else f"loss {entry['loss']:.4f}"
    line = (
        f"epoch {entry['epoch'] + 1}: {entry['phase']}, {entry['rows']:,} of {counted(entry['total'], 'row')}, {loss}, "
        f"{entry['samples_per_second']:,.0f} samples/s"
    )
    if entry["pruned_so_far"] > 0 and not held_out:
        pruned = sum(e["total"] - e["rows"] for e in log)
        line += f"; {entry['pruned_so_far']:.1%} pruned so far, about {duration(pruned * spent / seen)} saved"
    if sampler.plan is not None:
        line += f"; ETA {duration(sampler.steps_left() * sampler.batch_size * spent / seen)}"
        evaluations = entry.get("eval", {})
        return [line, *(each for name, scores in evaluations.items() for each in (f"{name}:", *table_of(scores)))]
    return [line]


def table_of(scores: Mapping[str, float]) -> list[str]:
    """Return the metrics of an evaluation as lines, with the chance level next to the metric."""
    lines = []
    for name, value in scores.items():
        if not name.endswith("_chance"):
            text = f"{value:,.0f}" if "_rows_" in name or name.endswith("_halves") else f"{value:.3f}"
            chance = scores.get(f"{name}_chance")
            lines.append(f"  {name:40} {text}" + ("" if chance is None else f"  (chance {chance:.3f})"))
    return lines


@dataclass
class _Checkpointer:
    """Saves the state of the run atomically, and loads it."""

    path: Path
    model: nn.Module
    optimizer: torch.optim.Optimizer
    sampler: PruningSampler
    minutes: float

    def __post_init__(self) -> None:
        self._last = time.monotonic()

    def due(self) -> bool:
        return time.monotonic() - self._last >= 60 * self.minutes

    def save(self, log: Sequence[Mapping[str, Any]], seconds: float) -> None:
        """Save the state that a resumed run needs; ``seconds`` is the time spent in the current epoch."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "sampler": self.sampler.state_dict(),
            "log": json.dumps(list(log)),
            "seconds": seconds,
        }
        with writing(self.path) as scratch, open(scratch, "wb") as file:
            _save(state, file)
        self._last = time.monotonic()

    def load(self) -> tuple[list[dict[str, Any]], float]:
        """Load the checkpoint, if there is one; return the log, and the seconds spent in the current epoch."""
        if not self.path.exists():
            return [], 0.0
        try:
            return trusting(str(self.path), self._loaded)
        except PoolError as error:
            raise PoolError(f"{self.path}: cannot be read, it may be damaged; start the run again") from error

    def _loaded(self) -> tuple[list[dict[str, Any]], float]:
        try:
            # To the CPU: the optimizer reads its step counts there, and they stay on the device they are loaded to.
            with no_warnings:  # of torch, about files that are not its own
                state = torch.load(self.path, map_location="cpu", weights_only=True)
            self.sampler.load_state_dict(state["sampler"])
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            return parse_json(state["log"]), float(state["seconds"])
        except (RuntimeError, LookupError, TypeError, AttributeError, OverflowError, UnpicklingError) as error:
            if "allocate memory" in str(error):  # torch raises RuntimeError for it
                raise MemoryError(str(error)) from error
            raise ValueError(str(error)) from error


@dataclass(frozen=True, eq=False)
class _Rows:
    """A dataset of (row ids, images), read a batch at a time."""

    pairs: Pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitems__(self, rows: Sequence[int]) -> tuple[npt.NDArray[np.int64], torch.Tensor]:
        return np.array(rows, np.int64), torch.from_numpy(self.pairs.pixels(rows))


def _same(items: Any) -> Any:
    return items


def _save(state: Mapping[str, Any], file: IO[bytes]) -> None:
    """Write a state; an error in writing it stays an OSError, which torch hides behind a RuntimeError."""
    try:
        torch.save(state, file)
    except RuntimeError as error:
        hidden: BaseException | None = error
        while hidden is not None and not isinstance(hidden, OSError):
            hidden = hidden.__cause__ or hidden.__context__
        raise hidden or error from None


def loader_of(pairs: Pairs, batches: Iterable[Sequence[int]], workers: int, device: torch.device, lock: Path) -> Any:
    """Return a loader of the row ids and images of batches: (B,) int64, (B, H, W, 3) uint8."""
    from torch.utils.data import DataLoader

    workers = 0 if pairs.pixels_NHWC is not None else workers
    rows: Any = _Rows(replace(pairs, captions=()))  # it may be pickled for the workers
    options: dict[str, Any] = {"num_workers": workers, "persistent_workers": workers > 0}
    options["worker_init_fn"] = partial(locks.set_up_worker, lock)
    return DataLoader(rows, batch_sampler=batches, collate_fn=_same, pin_memory=device.type == "cuda", **options)


def device_named(name: str) -> torch.device:
    """Return the device of this name; "auto" is the first GPU if there is one, else the CPU.

    Raises:
        UsageError: The device cannot be used.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device {name!r} cannot be used ({str(error).splitlines()[0]}); try cpu") from None
    return device


def precision_on(device: torch.device, precision: Precision) -> Precision:
    """Return the precision on a device: "bfloat16" or "float32"; "auto" depends on the device."""
    if precision != "auto":
        return precision
    return "bfloat16" if device.type == "cuda" or device.type == "cpu" and has_bfloat16() else "float32"


def autocast(device: torch.device, precision: Precision) -> Callable[[], AbstractContextManager[Any]]:
    """Return a function that creates the autocast context for this precision."""
    if precision_on(device, precision) == "bfloat16":
        return lambda: torch.autocast(device.type, torch.bfloat16)
    return nullcontext


def prepared(schedule: Schedule, model: str) -> tuple[Schedule, torch.device]:
    """Seed torch; return the schedule with a learning rate and a precision, and the device.

    The default rate is 2e-3 for "tiny" and 5e-4 for other models: small nets train with higher rates than transformers.
    """
    device = device_named(schedule.device)
    if not installed("kornia"):
        raise MissingExtraError("augmentation", "train")
    torch.manual_seed(schedule.seed)
    precision = precision_on(device, schedule.precision)  # a run that moves to another machine must keep it
    return replace(schedule, lr=schedule.lr or (2e-3 if model == "tiny" else 5e-4), precision=precision), device


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Restore torch's random state after a run: it belongs to the process of the caller."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        yield


def _adamw(model: nn.Module, schedule: Schedule) -> torch.optim.AdamW:
    """Return AdamW with weight decay only for parameters with two dimensions or more, like open_clip."""
    decayed = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    others = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": schedule.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=schedule.lr, betas=(0.9, 0.98), eps=1e-6
    )


def stored_side(side: int) -> int:
    """Return the side of stored images from which crops of ``side`` pixels are taken: an eighth larger."""
    return side + max(side // 8, 1)


def eval_sets(schedule: Schedule, group: str | None, labels: Sequence[str], needs: Sequence[str] = ()) -> list[EvalSet]:
    """Open the evaluation sets of a run under unique names, and check that all their images can be decoded.

    Raises:
        UsageError: A set lacks a column.
        PoolError: A set cannot be read, or an image cannot be decoded: evaluations do not skip rows.
    """
    sets: list[EvalSet] = []
    for path in schedule.evals:
        if not os.path.exists(path):
            raise PoolError(f"{path}: no such file; give --eval a parquet file with image and text, or with labels")
        one = read_eval(path, group=group, labels=labels or None, needs=needs)
        same = sum(other.name == one.name or other.name.startswith(f"{one.name}-") for other in sets)
        sets.append(replace(one, name=f"{one.name}-{same + 1}") if same else one)
        for _ in _decoded(one, 8, "shortest"):
            pass
    return sets


def _decoded(eval_set: EvalSet, side: int, resize: Resize) -> Iterator[npt.NDArray[np.uint8]]:
    """Yield the images of an evaluation set, (B, side, side, 3) uint8; an error names the row."""
    for ids, pictures in eval_set.batches():
        pixels = []
        for row, data in zip(ids, pictures, strict=True):
            try:
                pixels.append(decode(data, side, resize))
            except PoolError as error:
                raise PoolError(f"{eval_set.path}: row {row:,} {error}") from None
        yield np.stack(pixels)


def features_of(
    eval_set: EvalSet, side: int, resize: Resize, encode: Callable[[torch.Tensor], torch.Tensor]
) -> npt.NDArray[np.float32]:
    """Return the features of all images of an evaluation set, (N, D) float32.

    Args:
        eval_set: The evaluation set.
        side: Height and width of the images for ``encode`` in pixels.
        resize: How images are made square.
        encode: Maps images (B, side, side, 3) uint8 to features (B, D).

    Raises:
        PoolError: An image cannot be decoded; evaluations do not skip rows.
    """
    with torch.inference_mode():
        parts = [encode(torch.from_numpy(pixels)).cpu() for pixels in _decoded(eval_set, side, resize)]
    features: npt.NDArray[np.float32] = torch.cat(parts).numpy()
    return features
