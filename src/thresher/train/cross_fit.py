"""Losses of rows under models that were not trained on them: cross-fitting, for the policy ``rho``.

The rows are divided at random into folds. For every fold a model is trained on all others, and scores the fold once.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from thresher.data import DataOptions
from thresher.dynamic.run_folder import Training
from thresher.errors import MissingExtraError, UsageError
from thresher.pool.store import absolute
from thresher.runtime.files import writing
from thresher.runtime.format import counted
from thresher.runtime.progress import Progress, Silent
from thresher.runtime.random import generator
from thresher.train.clip import AGAINST, ClipSettings, ClipTask, clip_task, model_of
from thresher.train.data import Pairs
from thresher.train.loop import LOCK, fit, loader_of, open_run, prepared, random_state_kept, stored_side, sweep_scratch

try:
    import torch
except ImportError:
    raise MissingExtraError("training", "train") from None

_TRAIN = "train.parquet"  # the keys that the model of a fold is trained on


@dataclass(frozen=True, kw_only=True)
class CrossFitSettings(ClipSettings):
    """Settings of :func:`cross_fit`: those of a CLIP run, which every fold has, and the number of folds.

    Attributes:
        folds: Number of models, 2 or more; each is trained on all folds but one.
    """

    folds: int = 2

    def __post_init__(self) -> None:
        """Validate the parameters."""
        super().__post_init__()
        if self.folds < 2:
            raise UsageError(f"folds = {self.folds}; give 2 or more, so that no model scores what it was trained on")
        if self.loss in AGAINST:
            raise UsageError(f"loss {self.loss} needs a reference itself; give clip or siglip")
        if self.schedule.policy != "full":
            raise UsageError(f"policy = {self.schedule.policy!r}; a reference model trains on all rows of its folds")

    def request(self, data: str | os.PathLike[str]) -> dict[str, Any]:
        """Return what decides the losses, by name, to compare with a file that is there already."""
        schedule = self.schedule
        return {
            "source": "cross-fit",
            "data": absolute(os.fspath(data)),
            "folds": self.folds,
            "model": self.model,
            "loss": self.loss,
            "epochs": schedule.epochs,
            "samples": schedule.samples,
            "batch_size": schedule.batch_size,
            "seed": schedule.seed,
            "lr": schedule.lr,
        }


@dataclass(frozen=True, eq=False)
class CrossFitted:
    """The result of :func:`cross_fit`.

    Attributes:
        keys: The keys of the N rows.
        losses_N: (N,) float32, the mean over both directions; NaN where it is not finite.
        fold_N: (N,) the fold of each row.
        gradient_samples: Samples that the models were trained on, all together.
        scored_forwards: Rows that were scored; each takes one forward pass of an image and a caption.
        seconds: Seconds of training and scoring.
    """

    keys: list[str]
    losses_N: npt.NDArray[np.float32]
    fold_N: npt.NDArray[np.int64]
    gradient_samples: int
    scored_forwards: int
    seconds: float

    def cost(self) -> dict[str, Any]:
        """Return what the losses cost, by name."""
        return {name: getattr(self, name) for name in ("gradient_samples", "scored_forwards", "seconds")}


@random_state_kept()
def cross_fit(
    data: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    settings: CrossFitSettings,
    *,
    progress: Progress | None = None,
    reading: DataOptions | None = None,
) -> CrossFitted:
    """Train a model without each fold, and return the loss of every row under the model of its fold.

    The losses of a fold are computed in random batches of the size of training, without gradients and augmentation.
    The same data and settings give the same losses, and a run that was killed resumes: bit for bit on a CPU with the
    same number of threads.

    Args:
        data: The data, see :func:`thresher.train.data.open_pairs`.
        folder: The folder of the run; it gets a folder of a training run for every fold.
        settings: Model, loss, schedule and folds.
        progress: Where to report progress.
        reading: How to read the data.

    Raises:
        UsageError, PoolError, OutputError: Settings, data or folder cannot be used; raised before training starts.
    """
    progress = progress or Silent()
    schedule, device = prepared(settings.schedule, settings.model)
    settings = replace(settings, schedule=schedule)
    clip = model_of(settings)
    sizes: dict[str, Any] = {"side": stored_side(clip.side), "resize": clip.resize, "captions": True}
    opened = open_run("reference", data, folder, settings, **sizes, resume=True, progress=progress, reading=reading)
    with opened as (training, pairs):
        keys, rows = pairs.keys(), len(pairs)
        key, times = Counter(keys).most_common(1)[0]
        if times > 1:
            raise UsageError(f"{data}: {times:,} rows have the key {key!r}; name a column of unique keys with --key")
        if rows < 2 * settings.folds:
            give = "fewer folds" if settings.folds > 2 else "more rows: a fold needs two"
            raise UsageError(f"{data}: {counted(rows, 'row')} in {settings.folds:,} folds; give {give}")
        fold_N = np.empty(rows, np.int64)
        fold_N[generator(schedule.seed, "folds").permutation(rows)] = np.arange(rows) % settings.folds
        training.save()
        losses_N, samples, seconds = np.empty(rows, np.float32), 0, 0.0
        for fold in range(settings.folds):
            progress.say(f"fold {fold + 1} of {settings.folds}: training without it")
            torch.manual_seed(schedule.seed)
            task = clip_task(model_of(settings), pairs, device, settings)
            log = _trained(task, pairs, training, settings, fold, np.flatnonzero(fold_N != fold), progress)
            samples, seconds = samples + sum(e["samples"] for e in log), seconds + sum(e["seconds"] for e in log)
            started = time.monotonic()
            held_n = generator(schedule.seed, "scored", fold).permutation(np.flatnonzero(fold_N == fold))
            losses_N[held_n] = _scored(task, pairs, training, settings, held_n, progress)
            seconds += time.monotonic() - started
        return CrossFitted(keys, losses_N, fold_N, samples, rows, round(seconds, 3))


def _trained(
    task: ClipTask,
    pairs: Pairs,
    training: Training,
    settings: CrossFitSettings,
    fold: int,
    rows_n: npt.NDArray[np.int64],
    progress: Progress,
) -> list[dict[str, Any]]:
    """Train the model of a fold on other rows, or load it if it is trained already; return the log."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = training.folder / f"fold-{fold}"
    folder.mkdir(exist_ok=True)
    sweep_scratch(folder)
    keys = pairs.keys()
    with writing(folder / _TRAIN) as scratch, open(scratch, "wb") as file:
        pq.write_table(pa.table({"key": pa.array([keys[row] for row in rows_n], pa.string())}), file)
    schedule = replace(settings.schedule, policy="static", selection=str(folder / _TRAIN))
    own = {**training.settings, "policy": "static", "selection": schedule.selection}
    part = replace(training, folder=folder, task="clip", policy="static", settings=own)
    return fit(task, pairs, schedule, part, progress, held_out=True)


def _scored(
    task: ClipTask,
    pairs: Pairs,
    training: Training,
    settings: CrossFitSettings,
    rows_n: npt.NDArray[np.int64],
    progress: Progress,
) -> npt.NDArray[np.float32]:
    """Return the losses of rows, (n,) float32, in batches of nearly equal size in the given order."""
    task.model.eval()
    batches = np.array_split(rows_n, max(1, round(len(rows_n) / settings.schedule.batch_size)))
    loader = loader_of(
        pairs, [part.tolist() for part in batches], settings.schedule.workers, task.device, training.folder / LOCK
    )
    losses = []
    with progress.task("score", len(rows_n)) as advance:
        for rows_B, pixels_BHWC in loader:
            losses.append(task.score(rows_B, pixels_BHWC.to(task.device, non_blocking=True)).mean(1).cpu())
            advance(len(rows_B))
    losses_n: npt.NDArray[np.float32] = torch.cat(losses).numpy()
    return np.where(np.isfinite(losses_n), losses_n, np.float32(np.nan))
