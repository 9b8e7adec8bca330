"""The model of a training run of ``thresher train``: CLIP encodes images and captions, MoCo images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

from thresher.dynamic.run_folder import CHECKPOINT, Training
from thresher.embedding.encoders.base import TorchKind, Towers, library, loading, state_of
from thresher.embedding.preprocess import Pixels, Preprocess
from thresher.errors import PoolError, UsageError
from thresher.io.pictures import Resize, square


@dataclass(frozen=True, kw_only=True)
class Decoded(Preprocess):
    """Resizes an image as the trainers decode it, and crops its centre.

    Attributes:
        side: Side that the image is resized to in pixels; the result may be smaller, a crop of it.
        how: How it is made square.
    """

    side: int = 0
    how: Resize = "squash"

    def __call__(self, picture: Any) -> Pixels:
        """Return the pixels, (height, width, 3) uint8."""
        pixels, cut = square(picture, self.side, self.how), (self.side - self.height) // 2
        return pixels[cut : cut + self.height, cut : cut + self.width].copy()


@dataclass(frozen=True)
class TrainedRun(TorchKind):
    """The model of a training run of ``thresher train``."""

    name: ClassVar[str] = "run"
    form: ClassVar[str] = "run:FOLDER"
    extra: ClassVar[str] = "train"

    folder: str = field(metadata={"help": "folder of a training run of thresher train"})

    @classmethod
    def parse(cls, rest: str) -> dict[str, str]:
        """Take the text as a path, with all its slashes."""
        return {"folder": rest}

    def towers(self) -> Towers:
        """Load the model of the checkpoint.

        Raises:
            UsageError: It is not the folder of a run, or the run has no checkpoint.
        """
        library("torch", self.spec, self.extra)
        try:
            training = Training.load(self.folder)
        except PoolError as error:
            raise UsageError(f"{self.spec}: {error}") from None
        if training.task not in ("clip", "moco"):
            raise UsageError(f"{self.spec}: is a run of {training.task}; give one of thresher train clip or moco")
        state = state_of(str(training.folder / CHECKPOINT), self.spec)
        with loading(self.spec):
            return (_clip if training.task == "clip" else _moco)(training.settings, state)


def _clip(settings: Any, state: dict[str, Any]) -> Towers:
    from thresher.train.models import clip_model

    clip = clip_model(str(settings.get("model")), settings.get("loss") or "clip")
    clip.model.load_state_dict(state)
    model: Any = clip.model
    return Towers(
        modules={"model": model},
        image=model.encode_image,
        text=lambda tokens: model.encode_text(tokens["tokens"]),
        preprocess=_preprocess(clip.side, clip.side, clip.resize, clip.mean, clip.std),
        tokenize=partial(_tokens, clip.tokenize),
    )


def _moco(settings: Any, state: dict[str, Any]) -> Towers:
    from thresher.train.loop import stored_side
    from thresher.train.moco import MEAN, STD
    from thresher.train.models import backbone

    side = int(settings.get("side"))
    model, _ = backbone(str(settings.get("model")), side)
    own = {name.removeprefix("encoder.0."): value for name, value in state.items() if name.startswith("encoder.0.")}
    model.load_state_dict(own)
    return Towers(
        modules={"model": model}, image=model, preprocess=_preprocess(side, stored_side(side), "shortest", MEAN, STD)
    )


def _preprocess(side: int, stored: int, how: Resize, mean: Any, std: Any) -> Decoded:
    return Decoded(height=side, width=side, scaled=(stored, stored), side=stored, how=how, mean=mean, std=std)


def _tokens(tokenize: Callable[[list[str]], Any], texts: Any) -> dict[str, Any]:
    return {"tokens": tokenize(list(texts))}
