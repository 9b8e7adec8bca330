"""``thresher train moco``: momentum contrast of pictures with themselves, with pruning in the loop.

Version 2 (He et al., 1911.05722; Chen et al., 2003.04297) contrasts with a queue of earlier keys; version 3 (Chen et
al., 2104.02057) with the batch, both ways, through a predictor.
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

from thresher.dynamic.loss import moco_v2_losses, moco_v3_losses
from thresher.errors import MissingExtraError, UsageError
from thresher.evaluate.knn import knn
from thresher.evaluate.linear_probe import linear_probe
from thresher.evaluate.sets import EvalSet
from thresher.evaluate.split import split
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
    stored_side,
)
from thresher.train.models import backbone

try:
    import torch
    from torch import nn
except ImportError:
    raise MissingExtraError("training", "train") from None

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_QUEUE = 65_536  # keys, as published
_PROBED = 20_000  # rows of the training data that neighbours and probes learn from, where it has labels
_ENCODED = 256  # pictures at a time


@dataclass(frozen=True, kw_only=True)
class MocoSettings:
    """What is trained, and how.

    Attributes:
        model: "tiny", or a model of timm.
        version: 2 or 3.
        side: Pixels of a side of the pictures the model is given.
        queue: Version 2: keys to contrast with; None for 65,536, but at most a quarter of the rows.
        momentum: Of the encoder of keys: 0.999 as published for long runs, less for short ones. Version 3 raises it
            to 1 along the run.
        temperature: What cosines are divided by.
        dim: Dimensions in which views are compared.
        groups: Version 2: parts of a batch that batch norm sees apart, keys shuffled among them, as on that many
            GPUs: else the model can tell the right key by its batch's statistics. A part has 2 rows or more, so that
            small batches have fewer; 1 for models without batch norm.
        eval_labels: Columns of the evaluation sets with classes.
        eval_group: Column that joins what must not be on both sides of a split.
        schedule: The rest.
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
        """Refuse what cannot be carried out."""
        if self.version not in (2, 3):
            raise UsageError(f"MoCo version {self.version}; give 2 or 3")
        if not 0 <= self.momentum < 1 or not self.temperature > 0 or self.groups < 1 or self.side < 16:
            raise UsageError(
                f"momentum = {self.momentum}, temperature = {self.temperature}, groups = {self.groups}, side = "
                f"{self.side}; give 0 or more and below 1, above 0, 1 or more, and 16 or more"
            )


def train_moco(
    data: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    settings: MocoSettings,
    *,
    resume: bool = False,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Train a picture encoder, and leave in ``folder`` what :mod:`thresher.dynamic.run_folder` reads; return the log.

    Neighbours and probes learn from up to 20,000 rows of the data that have the label, and are tested on all of an
    evaluation set. Not learnt from are rows that share a group with the set, where both have the column, and those
    whose stored picture is one of the set's, byte for byte; a picture stored anew is only known by its group. Where
    that leaves nothing to learn from they learn from half of the set, and are tested on the other, no group in both.
    For each label column the log has, beside what was reached, ``probe_COLUMN_rows_learnt``,
    ``probe_COLUMN_rows_tested``, and ``probe_COLUMN_halves``: 1 where the set was halved, else 0.

    Args:
        data: See :func:`thresher.train.data.open_pairs`; captions are not needed.
        folder: Of the run.
        settings: What is trained, and how.
        resume: Go on with the run that lies there, if one does.
        progress: What to tell while it takes time.

    Raises:
        UsageError, PoolError, OutputError: Before any training begins; says what to do.
    """
    progress = progress or Silent()
    schedule, device = prepared(settings.schedule, settings.model)
    settings = replace(settings, schedule=schedule)
    encoder, width = backbone(settings.model, settings.side)
    sets = eval_sets(schedule, settings.eval_group, settings.eval_labels, needs=("labels",))
    sizes: dict[str, Any] = {"side": stored_side(settings.side), "resize": "shortest", "captions": False}
    training, pairs = open_run("moco", data, folder, settings, **sizes, resume=resume, progress=progress)
    if len(pairs) < 2:
        raise UsageError(f"{data}: has one row that can be used; MoCo tells pictures from each other, give 2 or more")
    queue = settings.queue or min(_QUEUE, max(len(pairs) // 4, 1))
    model = (MocoV2(encoder, width, settings, queue) if settings.version == 2 else MocoV3(encoder, width, settings)).to(
        device
    )
    task = MocoTask(model, device, settings, pairs, sets)
    return fit(task, pairs, schedule, training, progress)


class _Moco(nn.Module):
    """An encoder, and one that follows it."""

    def __init__(self, encoder: nn.Module, projector: nn.Module, settings: MocoSettings) -> None:
        super().__init__()
        self.settings = settings
        self.encoder = nn.Sequential(encoder, projector)
        self.follower = copy.deepcopy(self.encoder).requires_grad_(False)

    def follow(self, momentum: float) -> None:
        """Bring the follower nearer to the encoder."""
        with torch.no_grad():
            torch._foreach_lerp_(list(self.follower.parameters()), list(self.encoder.parameters()), 1 - momentum)


class MocoV2(_Moco):
    """MoCo v2: queries against their keys and a queue of earlier ones."""

    queue_KD: torch.Tensor
    at: torch.Tensor

    def __init__(self, encoder: nn.Module, width: int, settings: MocoSettings, queue: int) -> None:
        """Fill the queue with keys of nothing, unit rows at random."""
        super().__init__(encoder, _mlp(width, width, settings.dim, layers=2, norm=False), settings)
        self.register_buffer("queue_KD", nn.functional.normalize(torch.randn(queue, settings.dim), dim=1))
        self.register_buffer("at", torch.zeros((), dtype=torch.int64))
        norms = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in encoder.modules())
        self.groups = settings.groups if norms else 1

    def losses(self, view1: torch.Tensor, view2: torch.Tensor) -> torch.Tensor:
        """Return (B, 1) losses, and put the keys into the queue.

        Args:
            view1: (B, 3, H, W), views whose queries learn.
            view2: (B, 3, H, W), views of the same pictures for keys.

        Raises:
            UsageError: Fewer than 2 rows.
        """
        _check_rows(view1)
        groups = min(self.groups, len(view1) // 2)  # a part of one row has no statistics
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
        """Let the follower follow."""
        self.follow(self.settings.momentum)


class MocoV3(_Moco):
    """MoCo v3: predictions of either view against the other's keys in the batch."""

    def __init__(self, encoder: nn.Module, width: int, settings: MocoSettings) -> None:
        """Add projector and predictor."""
        super().__init__(encoder, _mlp(width, 4 * width, settings.dim, layers=3, norm=True), settings)
        self.predictor = _mlp(settings.dim, 4 * width, settings.dim, layers=2, norm=True)

    def losses(self, view1: torch.Tensor, view2: torch.Tensor) -> torch.Tensor:
        """Return (B, 2) losses.

        Args:
            view1: (B, 3, H, W).
            view2: (B, 3, H, W), other views of the same pictures.

        Raises:
            UsageError: Fewer than 2 rows.
        """
        _check_rows(view1)
        q1_BD, q2_BD = (self.predictor(self.encoder(view)).float() for view in (view1, view2))
        with torch.no_grad():
            k1_BD, k2_BD = (self.follower(view).float() for view in (view1, view2))
        return moco_v3_losses(q1_BD, q2_BD, k1_BD, k2_BD, self.settings.temperature)

    def after_step(self, progress: float) -> None:
        """Let the follower follow, less and less."""
        self.follow(1 - (1 - self.settings.momentum) * 0.5 * (1 + math.cos(math.pi * progress)))


def _check_rows(view_BCHW: torch.Tensor) -> None:
    if len(view_BCHW) < 2:
        raise UsageError(
            f"a batch of {len(view_BCHW)} row: MoCo contrasts the rows of a batch and takes their statistics; give "
            "batches of 2 rows or more, or prune less"
        )


def _mlp(width: int, hidden: int, dim: int, *, layers: int, norm: bool) -> nn.Sequential:
    """Return a head: linear layers, with batch norm (after the last without scale) in MoCo v3."""
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
    """What the classes of a label column are learnt from, and tested on.

    Attributes:
        rows_N: Rows learnt from: of the evaluation set where it is halved, else of the training data.
        index_N: (N,) int64, their classes.
        group_N: (N,) int64, their groups.
        test_M: Rows of the evaluation set that are tested.
        halves: Whether the evaluation set is halved.
    """

    rows_N: npt.NDArray[np.int64]
    index_N: npt.NDArray[np.int64]
    group_N: npt.NDArray[np.int64]
    test_M: npt.NDArray[np.int64]
    halves: bool

    def learnable(self) -> bool:
        """Whether there are classes to tell apart, and groups of which some can be held out."""
        return len(np.unique(self.index_N)) > 1 and len(np.unique(self.group_N)) > 1


class MocoTask:
    """A picture encoder in training."""

    def __init__(
        self,
        model: MocoV2 | MocoV3,
        device: torch.device,
        settings: MocoSettings,
        pairs: Pairs,
        sets: Sequence[EvalSet] = (),
    ) -> None:
        """Take a model on its device.

        Raises:
            UsageError: There is nothing to learn the classes of an evaluation set from.
        """
        self.model, self.device, self.settings, self.pairs, self.sets = model, device, settings, pairs, sets
        self.autocast = autocast(device, settings.schedule.precision)
        self.views = views(settings.side, settings.version)
        self.normalise = Normalise(_MEAN, _STD).to(device)
        self._probes = [_probes(pairs, eval_set) for eval_set in sets]  # before training: they may be refused

    def step(self, rows_B: npt.NDArray[np.int64], pixels_BHWC: torch.Tensor, reduce: Reduce) -> None:
        """Compute the losses of a batch and the gradients of what ``reduce`` makes of them."""
        image_BCHW = _bright(pixels_BHWC)
        view1, view2 = (self.normalise(view(image_BCHW)) for view in self.views)
        with self.autocast():
            losses_BR = self.model.losses(view1, view2)
        reduce(losses_BR).backward()

    def after_step(self, progress: float) -> None:
        """Let the follower follow."""
        self.model.after_step(progress)

    def evaluate(self) -> Scores:
        """Return the accuracy of nearest neighbours and linear probes by evaluation set; see :func:`train_moco`."""
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
        """Return the features of the middle of pictures, (B, D).

        What is trained on and what is evaluated on come at the same scale: pictures of the size that is stored, of
        which the middle is cut out, as is usual for models that learn from random crops.

        Args:
            pixels_BHWC: (B, H, W, 3) uint8, of the stored side.
        """
        side = self.settings.side
        top, left = ((size - side) // 2 for size in pixels_BHWC.shape[1:3])
        middle_BHWC = pixels_BHWC[:, top : top + side, left : left + side].to(self.device)
        with torch.inference_mode(), self.autocast():
            features: torch.Tensor = self.model.encoder[0](self.normalise(_bright(middle_BHWC))).float()
        return features


def _bright(pixels_BHWC: torch.Tensor) -> torch.Tensor:
    """Return (B, 3, H, W) float32 from 0 to 1, of (B, H, W, 3) uint8."""
    return pixels_BHWC.permute(0, 3, 1, 2).float() / 255


def _probes(pairs: Pairs, eval_set: EvalSet) -> dict[str, _Probe]:
    """Return what is learnt from and tested by label column, nothing of the one in the other.

    Raises:
        UsageError: Neither the training data nor half of the set have two classes and two groups.
    """
    by = eval_set.group or "group"
    cells = pairs.column(by) if by in pairs.store.columns else [None] * len(pairs)
    codes: dict[Any, int] = {}
    # A row without a group is one of its own: its number is no text.
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
