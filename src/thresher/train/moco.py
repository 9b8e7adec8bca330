"""``thresher train moco``: momentum contrast of pictures with themselves, with pruning in the loop.

Version 2 (He et al., 1911.05722; Chen et al., 2003.04297) contrasts with a queue of earlier keys; version 3 (Chen et
al., 2104.02057) with the batch, both ways, through a predictor.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from thresher.dynamic.loss import moco_v2_losses, moco_v3_losses
from thresher.errors import MissingExtraError, UsageError
from thresher.evaluate.knn import knn
from thresher.evaluate.linear_probe import linear_probe
from thresher.evaluate.sets import EvalSet, Labels, read_eval
from thresher.evaluate.split import split
from thresher.run import Progress, Silent
from thresher.train.augment import normalised, views
from thresher.train.data import Pairs
from thresher.train.loop import (
    Reduce,
    Schedule,
    Scores,
    adamw,
    autocast,
    device_named,
    features_of,
    fit,
    opened,
    rate_of,
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
            GPUs: else the model can tell the right key by its batch's statistics. 1 for models without batch norm.
        eval_labels: Columns of the evaluation sets with classes.
        eval_group: Column that joins what must not be on both sides of a split.
        schedule: The rest.
    """

    model: str = "resnet18"
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
    """Train a picture encoder, and leave in ``folder`` what :mod:`thresher.training` reads; return the log.

    Evaluation learns from up to 20,000 rows of the data where they have the label column, and else from half of the
    evaluation set, and tests on the rest.

    Args:
        data: See :func:`thresher.train.data.open_pairs`; captions are not needed.
        folder: Of the run.
        settings: What is trained, and how.
        resume: Go on with the run that lies there, if one does.
        progress: What to tell while it takes time.

    Raises:
        UsageError, PoolError, OutputError: Before any training begins; says what to do.
    """
    progress, schedule = progress or Silent(), settings.schedule
    device = device_named(schedule.device)
    torch.manual_seed(schedule.seed)
    encoder, width = backbone(settings.model, settings.side)
    how: dict[str, Any] = {"group": settings.eval_group, "labels": settings.eval_labels or None, "needs": ("labels",)}
    sets = [read_eval(path, **how) for path in schedule.evals]
    sizes: dict[str, Any] = {"side": stored_side(settings.side), "resize": "shortest", "captions": False}
    training, pairs = opened("moco", data, folder, settings, **sizes, resume=resume, progress=progress)
    queue = settings.queue or min(_QUEUE, max(len(pairs) // 4, 1))
    model = (MocoV2(encoder, width, settings, queue) if settings.version == 2 else MocoV3(encoder, width, settings)).to(
        device
    )
    task = MocoTask(model, device, settings, pairs, sets)
    optimizer = adamw(model, schedule.lr or rate_of(settings.model), schedule.weight_decay)
    return fit(task, pairs, schedule, training, optimizer, progress)


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
        """Return (B, 1) losses, and put the keys into the queue."""
        query_BD = torch.cat([self.encoder(part) for part in view1.chunk(self.groups)]).float()
        with torch.no_grad():
            order = torch.randperm(len(view2), device=view2.device)
            shuffled = torch.cat([self.follower(part) for part in view2[order].chunk(self.groups)]).float()
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
        """Return (B, 2) losses."""
        q1_BD, q2_BD = (self.predictor(self.encoder(view)).float() for view in (view1, view2))
        with torch.no_grad():
            k1_BD, k2_BD = (self.follower(view).float() for view in (view1, view2))
        return moco_v3_losses(q1_BD, q2_BD, k1_BD, k2_BD, self.settings.temperature)

    def after_step(self, progress: float) -> None:
        """Let the follower follow, less and less."""
        self.follow(1 - (1 - self.settings.momentum) * 0.5 * (1 + math.cos(math.pi * progress)))


def _mlp(width: int, hidden: int, dim: int, *, layers: int, norm: bool) -> nn.Sequential:
    """Return a head: linear layers, with batch norm (after the last without scale) in MoCo v3."""
    parts: list[nn.Module] = []
    for layer in range(layers):
        last = layer == layers - 1
        given, out = width if layer == 0 else hidden, dim if last else hidden
        parts.append(nn.Linear(given, out, bias=not norm))
        if norm:
            parts.append(nn.BatchNorm1d(out, affine=not last))
        if not last:
            parts.append(nn.ReLU(inplace=True))
    return nn.Sequential(*parts)


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
        """Take a model on its device."""
        self.model, self.device, self.settings, self.pairs, self.sets = model, device, settings, pairs, sets
        self.autocast = autocast(device, settings.schedule.precision)
        self.views = views(settings.side, settings.version)

    def step(self, rows_B: npt.NDArray[np.int64], pixels_BHWC: torch.Tensor, reduce: Reduce) -> None:
        """Compute the losses of a batch and the gradients of what ``reduce`` makes of them."""
        image_BCHW = normalised(pixels_BHWC, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
        view1, view2 = (_normal(view(image_BCHW)) for view in self.views)
        with self.autocast():
            losses_BR = self.model.losses(view1, view2)
        reduce(losses_BR).backward()

    def after_step(self, progress: float) -> None:
        """Let the follower follow."""
        self.model.after_step(progress)

    def evaluate(self) -> Scores:
        """Return the accuracy of nearest neighbours and linear probes by evaluation set."""
        return {found.name: self._evaluate(found) for found in self.sets}

    def _evaluate(self, found: EvalSet) -> dict[str, float]:
        test_ND = features_of(found, self.settings.side, "shortest", self.features)
        scores: dict[str, float] = {}
        for column, labels in found.labels.items():
            index_N = labels.index_N
            given = self._training(column, labels)
            if given is None:
                first_N = split(len(found), groups_N=found.group_N)
                given, test_N = (test_ND[first_N], index_N[first_N]), np.flatnonzero(~first_N)
            else:
                test_N = np.arange(len(found))
            test = test_ND[test_N], index_N[test_N]
            found_by = {"knn": knn(*given, *test), "linear": linear_probe(*given, *test, device=str(self.device))}
            for name, told in found_by.items():
                scores |= {f"{name}_{column}_{metric}": told[metric] for metric in ("top1", "top5", "mean_per_class")}
        return scores

    def _training(self, column: str, labels: Labels) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]] | None:
        """Return features and classes of some rows of the training data, None where they have no such labels."""
        if column not in self.pairs.store.columns:
            return None
        number = {name: i for i, name in enumerate(labels.names)}
        index_N = np.array([number.get(str(value), -1) for value in self.pairs.column(column)], np.int64)
        known = np.flatnonzero(index_N >= 0)
        if not len(known):
            return None
        rows = known[np.unique(np.linspace(0, len(known) - 1, _PROBED).astype(np.int64))]
        margin = (self.pairs.side - self.settings.side) // 2
        inside = slice(margin, margin + self.settings.side)
        parts = []
        for lo in range(0, len(rows), _ENCODED):
            pixels = self.pairs.pixels(rows[lo : lo + _ENCODED].tolist())[:, inside, inside]
            parts.append(self.features(torch.from_numpy(np.ascontiguousarray(pixels))).cpu())
        features: npt.NDArray[np.float32] = torch.cat(parts).numpy()
        return features, index_N[rows]

    def features(self, pixels_BHWC: torch.Tensor) -> torch.Tensor:
        """Return the features of pictures as they are, (B, D)."""
        with torch.inference_mode(), self.autocast():
            image_BCHW = normalised(pixels_BHWC.to(self.device), _MEAN, _STD)
            features: torch.Tensor = self.model.encoder[0](image_BCHW).float()
        return features


def _normal(image_BCHW: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(values, device=image_BCHW.device).view(3, 1, 1) for values in (_MEAN, _STD))
    return (image_BCHW - mean) / std
