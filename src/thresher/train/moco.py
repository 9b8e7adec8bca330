"""``thresher train moco``: momentum contrast (MoCo) of images without labels or captions, with pruning in the loop.

Version 2 (He et al., 1911.05722; Chen et al., 2003.04297) contrasts with a queue of earlier keys; version 3 (Chen et
al., 2104.02057) with the batch, in both directions, through a predictor.
"""

from __future__ import annotations

import copy
import hashlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from thresher.data import DataOptions
from thresher.dynamic.loop import refuse_chosen
from thresher.dynamic.loss import moco_v2_losses, moco_v3_losses
from thresher.dynamic.registry import POLICIES
from thresher.errors import MissingExtraError, UsageError
from thresher.evaluation.knn import knn
from thresher.evaluation.linear_probe import linear_probe
from thresher.evaluation.sets import EvalSet
from thresher.evaluation.split import split
from thresher.runtime.progress import Progress, Silent
from thresher.train.augment import Normalise, views
from thresher.train.data import Pairs
from thresher.train.loop import (
    Reduce,
    Schedule,
    Scores,
    autocast,
    eval_sets,
    features_of,
    fit,
    open_run,
    prepared,
    random_state_kept,
    stored_side,
)
from thresher.train.models import backbone

try:
    import torch
    from torch import nn
except ImportError:
    raise MissingExtraError("training", "train") from None

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_QUEUE = 65_536  # keys, as published
_MOST_TEMPERATURE, _MOST_SIDE, _MOST_QUEUE = 1e6, 8_192, 2**31
_PROBED = 20_000  # the most rows of the training data to fit kNN and probes on
_ENCODED = 256  # images encoded at a time


@dataclass(frozen=True, kw_only=True)
class MocoSettings:
    """Settings of :func:`train_moco`.

    Attributes:
        model: "tiny", or a timm model.
        version: 2 or 3.
        side: Height and width of the model's input images in pixels.
        queue: Version 2: number of keys to contrast with; None for 65,536, but at most a quarter of the rows.
        momentum: Momentum of the key encoder: 0.999 as published for long runs, less for short ones. Version 3 raises
            it to 1 during the run.
        temperature: The divisor of the cosines.
        dim: Dimension of the embeddings that are compared.
        groups: Version 2: number of parts of a batch for batch norm, with the keys shuffled among them, as on that
            many GPUs (shuffling BN). Otherwise the model can recognize the right key by its batch statistics. A part
            has 2 rows or more, so small batches have fewer parts; 1 for models without batch norm.
        eval_labels: Columns of the evaluation sets with classes.
        eval_group: Column of groups; rows of a group are not both learned from and tested.
        schedule: Length, batches, policy and optimization.
    """

    model: str = "tiny"
    version: Literal[2, 3] = 2
    side: int = 48
    queue: int | None = None
    momentum: float = 0.99
    temperature: float = 0.2
    dim: int = 128
    groups: int = 4
    eval_labels: tuple[str, ...] = ()
    eval_group: str | None = None
    schedule: Schedule = field(default_factory=lambda: Schedule(epochs=10))

    def __post_init__(self) -> None:
        """Validate the parameters."""
        if self.version not in (2, 3):
            raise UsageError(f"MoCo version {self.version}; give 2 or 3")
        refuse_chosen(POLICIES.find(self.schedule.policy), "the trainer of MoCo")
        queue = 1 if self.queue is None else self.queue
        if (
            not 0 <= self.momentum < 1
            or not 0 < self.temperature <= _MOST_TEMPERATURE
            or self.groups < 1
            or not 16 <= self.side <= _MOST_SIDE
            or not 1 <= queue <= _MOST_QUEUE
        ):
            raise UsageError(
                f"momentum = {self.momentum}, temperature = {self.temperature}, groups = {self.groups}, side = "
                f"{self.side}, queue = {queue}; give a momentum of 0 or more and below 1, a temperature above 0 and up "
                f"to {_MOST_TEMPERATURE:,.0f}, 1 group or more, a side of 16 to {_MOST_SIDE:,}, and a queue of 1 to "
                f"{_MOST_QUEUE:,}"
            )


@random_state_kept()
def train_moco(
    data: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    settings: MocoSettings,
    *,
    resume: bool = False,
    progress: Progress | None = None,
    reading: DataOptions | None = None,
) -> list[dict[str, Any]]:
    """Train an image encoder with MoCo.

    The evaluation fits kNN and a linear probe on up to 20,000 labelled rows of the training data, and tests them on all
    of an evaluation set. Rows that share a group with the set (if both have the column) are not used for fitting, nor
    are rows whose stored image is byte for byte in the set; an image that was encoded again is only recognized by its
    group. If this leaves too few rows, they are fitted on half of the set and tested on the other half, no group in
    both. For each label column the log has the metrics, ``probe_COLUMN_rows_learnt``, ``probe_COLUMN_rows_tested`` and
    ``probe_COLUMN_halves``: 1 if the set was halved, else 0.

    Args:
        data: The data, see :func:`thresher.train.data.open_pairs`; captions are not needed.
        folder: The folder of the run, see :mod:`thresher.dynamic.run_folder`.
        settings: Model, loss, evaluation and schedule.
        resume: Resume the run in the folder, if there is one.
        progress: Where to report progress.
        reading: How to read the data.

    Returns:
        The log, one entry per epoch.

    Raises:
        UsageError, PoolError, OutputError: Settings, data or folder cannot be used; raised before training starts.
    """
    progress = progress or Silent()
    schedule, device = prepared(settings.schedule, settings.model)
    settings = replace(settings, schedule=schedule)
    encoder, width = backbone(settings.model, settings.side)
    sets = eval_sets(schedule, settings.eval_group, settings.eval_labels, needs=("labels",))
    sizes: dict[str, Any] = {"side": stored_side(settings.side), "resize": "shortest", "captions": False}
    opened = open_run("moco", data, folder, settings, **sizes, resume=resume, progress=progress, reading=reading)
    with opened as (training, pairs):
        if len(pairs) < 2:
            raise UsageError(f"{data}: has one row that can be used; MoCo contrasts images, give 2 rows or more")
        queue = settings.queue or min(_QUEUE, max(len(pairs) // 4, 1))
        model = (
            MocoV2(encoder, width, settings, queue) if settings.version == 2 else MocoV3(encoder, width, settings)
        ).to(device)
        task = MocoTask(model, device, settings, pairs, sets)
        return fit(task, pairs, schedule, training, progress)


class _Moco(nn.Module):
    """An encoder and its momentum encoder (``follower``, as it is named in checkpoints)."""

    def __init__(self, encoder: nn.Module, projector: nn.Module, settings: MocoSettings) -> None:
        super().__init__()
        self.settings = settings
        self.encoder = nn.Sequential(encoder, projector)
        self.follower = copy.deepcopy(self.encoder).requires_grad_(False)

    def follow(self, momentum: float) -> None:
        """Update the momentum encoder: an exponential moving average of the encoder."""
        with torch.no_grad():
            torch._foreach_lerp_(list(self.follower.parameters()), list(self.encoder.parameters()), 1 - momentum)


class MocoV2(_Moco):
    """MoCo v2: contrasts queries with their keys and with a queue of earlier keys."""

    queue_KD: torch.Tensor
    at: torch.Tensor

    def __init__(self, encoder: nn.Module, width: int, settings: MocoSettings, queue: int) -> None:
        """Create projector and queue; the queue starts with random unit rows."""
        super().__init__(encoder, _mlp(width, width, settings.dim, layers=2, norm=False), settings)
        self.register_buffer("queue_KD", nn.functional.normalize(torch.randn(queue, settings.dim), dim=1))
        self.register_buffer("at", torch.zeros((), dtype=torch.int64))
        norms = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in encoder.modules())
        self.groups = settings.groups if norms else 1

    def losses(self, view1: torch.Tensor, view2: torch.Tensor) -> torch.Tensor:
        """Return (B, 1) losses, and add the keys to the queue.

        Args:
            view1: (B, 3, H, W), views for the queries.
            view2: (B, 3, H, W), views of the same images for the keys.

        Raises:
            UsageError: There are fewer than 2 rows.
        """
        _check_rows(view1)
        groups = min(self.groups, len(view1) // 2)  # batch norm needs 2 rows or more
        query_BD = torch.cat([self.encoder(part) for part in view1.tensor_split(groups)]).float()
        with torch.no_grad():
            order = torch.randperm(len(view2), device=view2.device)
            shuffled = torch.cat([self.follower(part) for part in view2[order].tensor_split(groups)]).float()
            key_BD = torch.empty_like(shuffled)
            key_BD[order] = nn.functional.normalize(shuffled, dim=1)
        losses_B1 = moco_v2_losses(query_BD, key_BD, self.queue_KD, self.settings.temperature)
        with torch.no_grad():
            places = (self.at + torch.arange(len(key_BD), device=key_BD.device)) % len(self.queue_KD)
            self.queue_KD[places[-len(self.queue_KD) :]] = key_BD[-len(self.queue_KD) :]
            self.at += len(key_BD)
        return losses_B1

    def after_step(self, progress: float) -> None:
        """Update the momentum encoder."""
        self.follow(self.settings.momentum)


class MocoV3(_Moco):
    """MoCo v3: contrasts the predictions of each view with the keys of the other view in the batch."""

    def __init__(self, encoder: nn.Module, width: int, settings: MocoSettings) -> None:
        """Create projector and predictor."""
        super().__init__(encoder, _mlp(width, 4 * width, settings.dim, layers=3, norm=True), settings)
        self.predictor = _mlp(settings.dim, 4 * width, settings.dim, layers=2, norm=True)

    def losses(self, view1: torch.Tensor, view2: torch.Tensor) -> torch.Tensor:
        """Return (B, 2) losses.

        Args:
            view1: (B, 3, H, W).
            view2: (B, 3, H, W), other views of the same images.

        Raises:
            UsageError: There are fewer than 2 rows.
        """
        _check_rows(view1)
        q1_BD, q2_BD = (self.predictor(self.encoder(view)).float() for view in (view1, view2))
        with torch.no_grad():
            k1_BD, k2_BD = (self.follower(view).float() for view in (view1, view2))
        return moco_v3_losses(q1_BD, q2_BD, k1_BD, k2_BD, self.settings.temperature)

    def after_step(self, progress: float) -> None:
        """Update the momentum encoder; its momentum rises to 1 during the run."""
        self.follow(1 - (1 - self.settings.momentum) * 0.5 * (1 + math.cos(math.pi * progress)))


def _check_rows(view_BCHW: torch.Tensor) -> None:
    if len(view_BCHW) < 2:
        raise UsageError(
            f"a batch of {len(view_BCHW)} row: MoCo contrasts the rows of a batch and normalizes over them; give "
            "batches of 2 rows or more, or prune less"
        )


def _mlp(width: int, hidden: int, dim: int, *, layers: int, norm: bool) -> nn.Sequential:
    """Return a projection head: linear layers, with batch norm in MoCo v3 (the last one without scale and bias)."""
    parts: list[nn.Module] = []
    for layer in range(layers):
        last = layer == layers - 1
        inputs, outputs = width if layer == 0 else hidden, dim if last else hidden
        parts.append(nn.Linear(inputs, outputs, bias=not norm))
        if norm:
            parts.append(nn.BatchNorm1d(outputs, affine=not last))
        if not last:
            parts.append(nn.ReLU(inplace=True))
    return nn.Sequential(*parts)


@dataclass(frozen=True, eq=False)
class _Probe:
    """The rows on which classifiers for a label column are fitted and tested.

    Attributes:
        rows_N: (N,) int64, rows to fit on: of the evaluation set if it is halved, else of the training data.
        index_N: (N,) int64, their classes.
        group_N: (N,) int64, their groups.
        test_M: (M,) int64, rows of the evaluation set to test on.
        halves: Whether the evaluation set is halved.
    """

    rows_N: npt.NDArray[np.int64]
    index_N: npt.NDArray[np.int64]
    group_N: npt.NDArray[np.int64]
    test_M: npt.NDArray[np.int64]
    halves: bool

    def learnable(self) -> bool:
        """Return whether there are two classes or more, and two groups or more, so that some can be held out."""
        return len(np.unique(self.index_N)) > 1 and len(np.unique(self.group_N)) > 1


class MocoTask:
    """Trains an image encoder with MoCo; see :class:`thresher.train.loop.TrainingTask`."""

    def __init__(
        self,
        model: MocoV2 | MocoV3,
        device: torch.device,
        settings: MocoSettings,
        pairs: Pairs,
        sets: Sequence[EvalSet] = (),
    ) -> None:
        """Create the task for a model that is already on ``device``.

        Raises:
            UsageError: There are no rows to fit the classes of an evaluation set on.
        """
        self.model, self.device, self.settings, self.pairs, self.sets = model, device, settings, pairs, sets
        self.autocast = autocast(device, settings.schedule.precision)
        self.views = views(settings.side, settings.version)
        self.normalise = Normalise(MEAN, STD).to(device)
        self._probes = [_probes(pairs, eval_set) for eval_set in sets]  # before training, because it may raise

    def step(self, rows_B: npt.NDArray[np.int64], pixels_BHWC: torch.Tensor, reduce: Reduce) -> None:
        """Compute the losses of a batch, and backpropagate their ``reduce``."""
        image_BCHW = _scaled(pixels_BHWC)
        view1, view2 = (self.normalise(view(image_BCHW)) for view in self.views)
        with self.autocast():
            losses_BR = self.model.losses(view1, view2)
        reduce(losses_BR).backward()

    def after_step(self, progress: float) -> None:
        """Update the momentum encoder."""
        self.model.after_step(progress)

    def evaluate(self) -> Scores:
        """Return the accuracy of kNN and linear probes by evaluation set; see :func:`train_moco`."""
        return {
            eval_set.name: self._evaluate(eval_set, probes)
            for eval_set, probes in zip(self.sets, self._probes, strict=True)
        }

    def _evaluate(self, eval_set: EvalSet, probes: dict[str, _Probe]) -> dict[str, float]:
        eval_ND = features_of(eval_set, self.pairs.side, self.pairs.resize, self.features)
        scores: dict[str, float] = {}
        for column, probe in probes.items():
            learnt = (eval_ND[probe.rows_N] if probe.halves else self._learnt(probe.rows_N)), probe.index_N
            test = eval_ND[probe.test_M], eval_set.labels[column].index_N[probe.test_M]
            options: dict[str, Any] = {"train_group_N": probe.group_N, "device": str(self.device)}
            for name, result in (("knn", knn(*learnt, *test)), ("linear", linear_probe(*learnt, *test, **options))):
                scores |= {f"{name}_{column}_{metric}": result[metric] for metric in ("top1", "top5", "mean_per_class")}
            sizes = {"rows_learnt": len(probe.rows_N), "rows_tested": len(probe.test_M), "halves": probe.halves}
            scores |= {f"probe_{column}_{name}": float(value) for name, value in sizes.items()}
        return scores

    def _learnt(self, rows_N: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Return the features of rows of the training data, (N, D)."""
        parts = []
        for lo in range(0, len(rows_N), _ENCODED):
            pixels_BHWC = self.pairs.pixels(rows_N[lo : lo + _ENCODED].tolist())
            parts.append(self.features(torch.from_numpy(pixels_BHWC)).cpu())
        features: npt.NDArray[np.float32] = torch.cat(parts).numpy()
        return features

    def features(self, pixels_BHWC: torch.Tensor) -> torch.Tensor:
        """Return the features of center crops, (B, D) float32.

        Training and evaluation images have the same scale: a center crop of the stored image, as usual for models
        that are trained on random crops.

        Args:
            pixels_BHWC: (B, H, W, 3) uint8, stored images.
        """
        side = self.settings.side
        top, left = ((size - side) // 2 for size in pixels_BHWC.shape[1:3])
        middle_BHWC = pixels_BHWC[:, top : top + side, left : left + side].to(self.device)
        with torch.inference_mode(), self.autocast():
            features: torch.Tensor = self.model.encoder[0](self.normalise(_scaled(middle_BHWC))).float()
        return features


def _scaled(pixels_BHWC: torch.Tensor) -> torch.Tensor:
    """Convert (B, H, W, 3) uint8 to (B, 3, H, W) float32 from 0 to 1."""
    return pixels_BHWC.permute(0, 3, 1, 2).float() / 255


def _probes(pairs: Pairs, eval_set: EvalSet) -> dict[str, _Probe]:
    """Return the rows to fit and test on by label column, without overlap.

    Raises:
        UsageError: Neither the training data nor half of the set has two classes and two groups.
    """
    by = eval_set.group or "group"
    cells = pairs.column(by) if by in pairs.store.columns else [None] * len(pairs)
    codes: dict[Any, int] = {}
    # A row without a group has its own: its number, which is not text, so it differs from all names.
    names = [row if cell is None else str(cell) for row, cell in enumerate(cells)]
    group_N = np.array([codes.setdefault(name, len(codes)) for name in names], np.int64)
    eval_groups = set(map(str, eval_set.column(eval_set.group))) if eval_set.group else set()
    apart_N = np.array([name not in eval_groups for name in names], np.bool_)
    pictures: set[bytes] = set()
    probes = {}
    for column, labels in eval_set.labels.items():
        test_M = np.flatnonzero(labels.index_N >= 0)
        if column in pairs.store.columns:
            pictures = pictures or {_hash(picture) for _, part in eval_set.batches() for picture in part}
            number = {name: i for i, name in enumerate(labels.names)}
            values = pairs.column(column)
            index_N = np.array([-1 if value is None else number.get(str(value), -1) for value in values], np.int64)
            rows_N = np.flatnonzero((index_N >= 0) & apart_N)
            rows_N = rows_N[np.linspace(0, len(rows_N) - 1, min(_PROBED, len(rows_N))).astype(np.int64)]
            new = [_hash(pairs.encoded(row)) not in pictures for row in rows_N.tolist()]
            rows_N = rows_N[np.array(new, np.bool_)]
            probes[column] = _Probe(rows_N, index_N[rows_N], group_N[rows_N], test_M, halves=False)
            if probes[column].learnable():
                continue
        groups_M = eval_set.group_N[test_M]
        first_M = split(len(test_M), groups_N=groups_M) if len(np.unique(groups_M)) > 1 else groups_M < 0
        rows_N = test_M[first_M]
        probes[column] = _Probe(rows_N, labels.index_N[rows_N], eval_set.group_N[rows_N], test_M[~first_M], halves=True)
        if not probes[column].learnable():
            raise UsageError(
                f"{eval_set.path}: neither the training data without the rows of this set nor half of the set has rows "
                f"of two classes of {column!r} in two groups to learn from; give a larger set, or data with {column!r}"
            )
    return probes


def _hash(picture: bytes) -> bytes:
    return hashlib.sha256(picture).digest()
