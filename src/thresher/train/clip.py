"""``thresher train clip``: contrastive training of an image and a text tower, with pruning in the loop."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from thresher.data import DataOptions
from thresher.dynamic.loss import clip_losses, distill_losses, drrho_losses, siglip_losses
from thresher.dynamic.reference_features import ReferenceFeatures
from thresher.errors import MissingExtraError, UsageError
from thresher.evaluation.retrieval import retrieval
from thresher.evaluation.sets import EvalSet
from thresher.evaluation.zero_shot import class_embeddings, zero_shot
from thresher.pool.store import absolute, open_store
from thresher.runtime.progress import Progress, Silent
from thresher.train.augment import Normalise, crops, to_device
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
from thresher.train.models import Clip, Tokens, clip_model

try:
    import torch
    from torch.nn import functional as F
except ImportError:
    raise MissingExtraError("training", "train") from None

ClipLoss = Literal["clip", "siglip", "drrho", "distill"]

AGAINST = ("drrho", "distill")  # losses against a reference
_TEMPERATURE = 0.01  # of drrho and of the teacher of distill, as published
_TEXTS = 1024  # captions encoded at a time


@dataclass(frozen=True, kw_only=True)
class ClipSettings:
    """Settings of :func:`train_clip`.

    Attributes:
        model: "tiny", "small", the name of an open_clip configuration, or the path of one.
        loss: "clip" (softmax), "siglip" (sigmoid), "drrho", see :func:`thresher.dynamic.loss.drrho_losses`, or
            "distill", see :func:`thresher.dynamic.loss.distill_losses`.
        reference: For "drrho" and "distill", the location of a pool with embeddings of the same rows, found by key.
        temperature: For "drrho" the divisor of the cosines, for "distill" that of the teacher's; it is not learned.
            None for 0.01.
        distill_weight: For "distill", the share of the distillation; the rest is the softmax loss. None for 1.
        chunk: Number of rows to process at once, None for the whole batch. Fewer rows need less memory and give the
            same gradients; features are computed twice (gradient caching, 2101.06983).
        eval_labels: Columns of the evaluation sets with class names, for zero-shot classification.
        eval_group: Column of groups; rows of a group count as the same in retrieval.
        templates: Prompts for class names; "{}" stands for the name.
        schedule: Length, batches, policy and optimization.
    """

    model: str = "tiny"
    loss: ClipLoss = "clip"
    reference: str | None = None
    temperature: float | None = None
    distill_weight: float | None = None
    chunk: int | None = None
    eval_labels: tuple[str, ...] = ()
    eval_group: str | None = None
    templates: tuple[str, ...] = ("{}", "a photo of a {}.")
    schedule: Schedule = field(default_factory=lambda: Schedule(epochs=10))

    def __post_init__(self) -> None:
        """Validate the parameters."""
        if self.chunk is not None and self.chunk < 1:
            raise UsageError(f"chunk = {self.chunk}; give 1 row or more")
        if self.reference is None and self.loss in AGAINST:
            raise UsageError(f"loss {self.loss} needs a reference: a pool with embeddings of the same rows")
        if self.reference is not None and self.loss not in AGAINST:
            raise UsageError(f"loss {self.loss} has no reference; leave it out, or give loss drrho or distill")
        if self.temperature is not None and (self.loss not in AGAINST or not self.temperature > 0):
            raise UsageError(
                f"temperature = {self.temperature}; give a number above 0, and only with loss drrho or distill"
            )
        if self.distill_weight is not None and (self.loss != "distill" or not 0 < self.distill_weight <= 1):
            raise UsageError(
                f"distill weight = {self.distill_weight}; give a number above 0 and up to 1, and only with loss distill"
            )
        if not self.templates or any("{}" not in template for template in self.templates):
            raise UsageError(f"templates {self.templates}; give one or more, each with {{}} for the name of a class")


@random_state_kept()
def train_clip(
    data: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    settings: ClipSettings,
    *,
    resume: bool = False,
    progress: Progress | None = None,
    reading: DataOptions | None = None,
) -> list[dict[str, Any]]:
    """Train a CLIP model on image-text pairs.

    Args:
        data: The data, see :func:`thresher.train.data.open_pairs`.
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
    clip = model_of(settings)
    store = None if settings.reference is None else open_store(absolute(settings.reference))
    if store is not None:
        store.require_joint(f"loss {settings.loss}")
    sets = [
        _named_classes(eval_set, settings)
        for eval_set in eval_sets(schedule, settings.eval_group, settings.eval_labels)
    ]
    for eval_set in sets:
        if not eval_set.texts and not eval_set.labels:
            raise UsageError(
                f"{eval_set.path}: has neither captions nor class names; give a label column with --eval-label"
            )
    sizes: dict[str, Any] = {"side": stored_side(clip.side), "resize": clip.resize, "captions": True}
    opened = open_run("clip", data, folder, settings, **sizes, resume=resume, progress=progress, reading=reading)
    with opened as (training, pairs):
        reference = None if store is None else ReferenceFeatures.of_pool(store, pairs.keys_in(store), training.folder)
        task = clip_task(clip, pairs, device, settings, sets, reference)
        return fit(task, pairs, schedule, training, progress)


def model_of(settings: ClipSettings) -> Clip:
    """Return a new model for these settings."""
    return clip_model(settings.model, "siglip" if settings.loss == "siglip" else "clip")


def clip_task(
    clip: Clip,
    pairs: Pairs,
    device: torch.device,
    settings: ClipSettings,
    sets: Sequence[EvalSet] = (),
    reference: ReferenceFeatures | None = None,
) -> ClipTask:
    """Move a model to its device, tokenize all captions, and return the task of training it."""
    clip.model.to(device)
    chunks = (pairs.captions[lo : lo + _TEXTS] for lo in range(0, len(pairs), _TEXTS))
    tokens_NT = np.concatenate([clip.tokenize(chunk) for chunk in chunks])
    return ClipTask(clip, tokens_NT, device, settings, sets, reference)


def _named_classes(eval_set: EvalSet, settings: ClipSettings) -> EvalSet:
    """Leave out label columns of numbers, unless the user named them: a number is not a useful prompt."""
    labels = {
        column: labels
        for column, labels in eval_set.labels.items()
        if column in settings.eval_labels or not all(name.lstrip("-").isdigit() for name in labels.names)
    }
    return replace(eval_set, labels=labels)


class ClipTask:
    """Trains a CLIP model; see :class:`thresher.train.loop.TrainingTask`."""

    name = "clip"

    def __init__(
        self,
        clip: Clip,
        tokens_NT: Tokens,
        device: torch.device,
        settings: ClipSettings,
        sets: Sequence[EvalSet] = (),
        reference: ReferenceFeatures | None = None,
    ) -> None:
        """Create the task.

        Args:
            clip: The model, already on ``device``.
            tokens_NT: (N, T) the tokens of all rows.
            device: The device.
            settings: The settings of the run.
            sets: The evaluation sets.
            reference: The embeddings of all rows under a reference model, for the losses "drrho" and "distill".
        """
        self.clip, self.model, self.device, self.settings = clip, clip.model, device, settings
        self.tokens_NT, self.sets, self.reference = tokens_NT, sets, reference
        self.autocast = autocast(device, settings.schedule.precision)
        self.crop, self.normalise = crops(clip.side), Normalise(clip.mean, clip.std, white=255).to(device)

    def step(self, rows_B: npt.NDArray[np.int64], pixels_BHWC: torch.Tensor, reduce: Reduce) -> None:
        """Compute the losses of a batch, and backpropagate their ``reduce``."""
        tokens_BT = to_device(torch.from_numpy(self.tokens_NT[rows_B]), self.device)
        image_BCHW = self.crop(self.normalise(pixels_BHWC.permute(0, 3, 1, 2)))
        chunk = self.settings.chunk
        if chunk is None or chunk >= len(rows_B):
            reduce(self.losses(rows_B, *self.features(image_BCHW, tokens_BT))).backward()
            return
        parts = list(zip(image_BCHW.split(chunk), tokens_BT.split(chunk), strict=True))
        states, features = [], []
        with torch.no_grad():
            for part in parts:
                states.append(_draws(self.device))
                features.append(self.features(*part))
        image_BD, text_BD = (torch.cat(of).requires_grad_() for of in zip(*features, strict=True))
        reduce(self.losses(rows_B, image_BD, text_BD)).backward()
        gradients = zip(image_BD.grad.split(chunk), text_BD.grad.split(chunk), strict=True)
        for part, state, gradient in zip(parts, states, gradients, strict=True):
            _draw_again(self.device, state)  # dropout uses the same mask as in the first pass
            torch.autograd.backward(self.features(*part), gradient)

    @property
    def _temperature(self) -> float:
        return _TEMPERATURE if self.settings.temperature is None else self.settings.temperature

    def features(self, image_BCHW: torch.Tensor, tokens_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the features of images and captions, (B, D) each."""
        with self.autocast():
            image_BD, text_BD = self.model.encode_image(image_BCHW), self.model.encode_text(tokens_BT)
        return image_BD.float(), text_BD.float()

    def losses(self, rows_B: npt.NDArray[np.int64], image_BD: torch.Tensor, text_BD: torch.Tensor) -> torch.Tensor:
        """Return the losses of the features of rows, (B, 2)."""
        if self.reference is not None:
            known_image, known_text = (
                torch.from_numpy(each).to(image_BD.device) for each in self.reference.gather(rows_B)
            )
            if self.settings.loss == "drrho":
                return drrho_losses(image_BD, text_BD, known_image, known_text, self._temperature)
            weight = 1.0 if self.settings.distill_weight is None else self.settings.distill_weight
            scale = self.model.logit_scale.exp()
            return distill_losses(image_BD, text_BD, known_image, known_text, scale, self._temperature, weight)
        scale = self.model.logit_scale.exp()
        if self.settings.loss == "siglip":
            return siglip_losses(image_BD, text_BD, scale, self.model.logit_bias)
        return clip_losses(image_BD, text_BD, scale)

    def scored(self, rows_B: npt.NDArray[np.int64], pixels_BHWC: torch.Tensor) -> tuple[Any, ...]:
        """Return the features of whole images and captions, (B, D) without gradients, with scale and bias."""
        training = self.model.training
        self.model.eval()  # batch statistics of a super-batch are not those of a batch
        with torch.no_grad():
            whole, chunk = self._whole(rows_B, pixels_BHWC), self.settings.chunk or self.settings.schedule.batch_size
            parts = [self.features(*part) for part in zip(*(each.split(chunk) for each in whole), strict=True)]
            features = [torch.cat(of) for of in zip(*parts, strict=True)]
            scale, bias = self.model.logit_scale.exp(), None
            if self.settings.loss == "drrho":
                scale = 1 / self._temperature
            if self.settings.loss == "siglip":
                bias = self.model.logit_bias.detach()
        self.model.train(training)
        return (*features, scale, bias)

    def _whole(self, rows_B: npt.NDArray[np.int64], pixels_BHWC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return whole images instead of random crops, (B, 3, H, W), and tokens (B, T)."""
        image_BCHW, size = self.normalise(pixels_BHWC.permute(0, 3, 1, 2)), (self.clip.side, self.clip.side)
        tokens_BT = to_device(torch.from_numpy(self.tokens_NT[rows_B]), self.device)
        return F.interpolate(image_BCHW, size, mode="bilinear", antialias=True), tokens_BT

    def score(self, rows_B: npt.NDArray[np.int64], pixels_BHWC: torch.Tensor) -> torch.Tensor:
        """Return the losses of a batch, (B, 2) without gradients, on whole images."""
        with torch.inference_mode():
            return self.losses(rows_B, *self.features(*self._whole(rows_B, pixels_BHWC)))

    def after_step(self, progress: float) -> None:
        """Clamp the logit scale to at most 100, as CLIP does."""
        with torch.no_grad():
            self.model.logit_scale.clamp_(0, math.log(100))

    def evaluate(self) -> Scores:
        """Return retrieval and zero-shot metrics by evaluation set."""
        return {eval_set.name: self._evaluate(eval_set) for eval_set in self.sets}

    def _evaluate(self, eval_set: EvalSet) -> dict[str, float]:
        image_ND = features_of(eval_set, self.clip.side, self.clip.resize, self._pictures)
        scores: dict[str, float] = {}
        if eval_set.texts:
            groups = {"image_group_N": eval_set.group_N, "text_group_M": eval_set.text_group_M}
            result = retrieval(image_ND, self._texts(eval_set.texts), **groups, ks=(1, 5))
            scores |= {name: value for name, value in result.items() if name not in ("images", "texts")}
        for column, labels in eval_set.labels.items():
            templates = self.settings.templates
            prompts = [template.replace("{}", name) for name in labels.names for template in templates]
            class_CD = class_embeddings(self._texts(prompts).reshape(len(labels.names), len(templates), -1))
            result = zero_shot(image_ND, class_CD, labels.index_N)
            scores |= {
                f"zero_shot_{column}_{name}": result[name] for name in ("top1", "top5", "mean_per_class", "majority")
            }
        return scores

    def _pictures(self, pixels_BHWC: torch.Tensor) -> torch.Tensor:
        image_BCHW = self.normalise(pixels_BHWC.to(self.device).permute(0, 3, 1, 2))
        with self.autocast():
            return self.model.encode_image(image_BCHW).float()

    def _texts(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        parts = []
        for lo in range(0, len(texts), _TEXTS):
            tokens_BT = torch.from_numpy(self.clip.tokenize(texts[lo : lo + _TEXTS])).to(self.device)
            with torch.inference_mode(), self.autocast():
                parts.append(self.model.encode_text(tokens_BT).float().cpu())
        features: npt.NDArray[np.float32] = torch.cat(parts).numpy()
        return features


def _draws(device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the states of the random generators that dropout uses."""
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _draw_again(device: torch.device, state: tuple[torch.Tensor, torch.Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
