"""Preprocessing of images: the resizing and cropping that an encoder's library does."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from thresher.errors import UsageError

if TYPE_CHECKING:
    from PIL import Image

Pixels = npt.NDArray[np.uint8]
Resize = Literal["shortest", "cover", "longest", "squash", "none"]
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"]

_FILTERS: tuple[Interpolation, ...] = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # by PIL's number
_MOST = 2**26  # most pixels after resizing: an image of 1 x 60,000 would become 224 x 13 million


@dataclass(frozen=True)
class Preprocess:
    """Converts an upright 8-bit RGB image to the input of an encoder; picklable, needs only PIL and NumPy.

    The image is resized, then cropped or padded around its centre.

    Attributes:
        height: Height of the result.
        width: Width of the result.
        scaled: (height, width) to resize to; "shortest" uses only the first.
        resize: "shortest": the shorter side becomes ``scaled[0]``, the longer one is rounded down (torchvision,
            transformers). "cover" and "longest": the image just covers, or just fits into, ``scaled``, sides rounded
            to the nearest integer (open_clip, timm). "squash": to ``scaled``, ignoring the aspect ratio. "none": not
            resized.
        interpolation: PIL's name of the filter.
        fill: Colour of the padding, used if the result is larger than the image.
        odd: How the offset is rounded if an odd number of pixels is cropped: "nearest" as in torchvision, "down" as in
            transformers.
        mean: Mean of the pixels of each colour, 0 to 1, which the encoder subtracts.
        std: Standard deviation of the pixels of each colour, by which the encoder divides.
    """

    height: int
    width: int
    scaled: tuple[int, int]
    resize: Resize = "shortest"
    interpolation: Interpolation = "bicubic"
    fill: tuple[int, int, int] = (0, 0, 0)
    odd: Literal["nearest", "down"] = "nearest"
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)

    def __post_init__(self) -> None:
        """Validate the parameters."""
        if min(self.height, self.width, *self.scaled) < 1 or self.interpolation not in _FILTERS:
            raise UsageError(
                f"images of {self.height} x {self.width}, resized to {self.scaled} by {self.interpolation!r}; sides "
                f"must be at least 1, allowed filters: {', '.join(_FILTERS)}"
            )
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise UsageError(
                f"mean {self.mean} and standard deviation {self.std}; give three numbers each, deviations above 0"
            )

    def __call__(self, picture: Image.Image) -> Pixels:
        """Return the pixels, (height, width, 3) uint8, of an image in mode RGB.

        Raises:
            ValueError: The image is so narrow that resizing it would make it too large.
        """
        height, width = self.size_of(picture.height, picture.width)
        if height * width > _MOST:
            raise ValueError(f"an image of {picture.width} x {picture.height} would become {width} x {height}")
        if (width, height) != picture.size:
            from PIL import Image

            picture = picture.resize((width, height), Image.Resampling(_FILTERS.index(self.interpolation)))
        pixels = np.asarray(picture)
        top, crop_top = self._offsets(height, self.height)
        left, crop_left = self._offsets(width, self.width)
        if top or left or height < self.height or width < self.width:
            padded = np.empty((self.height, self.width, 3), np.uint8)
            padded[:] = self.fill
            part = pixels[crop_top : crop_top + self.height, crop_left : crop_left + self.width]
            padded[top : top + part.shape[0], left : left + part.shape[1]] = part
            return padded
        return np.array(pixels[crop_top : crop_top + self.height, crop_left : crop_left + self.width], order="C")

    def size_of(self, height: int, width: int) -> tuple[int, int]:
        """Return the (height, width) that an image of this height and width is resized to."""
        if self.resize == "none":
            return height, width
        if self.resize == "squash":
            return self.scaled
        if self.resize == "shortest":
            short, long = sorted((height, width))
            longer = max(1, int(self.scaled[0] * long / short))
            return (self.scaled[0], longer) if height <= width else (longer, self.scaled[0])
        ratios = height / self.scaled[0], width / self.scaled[1]
        ratio = max(ratios) if self.resize == "longest" else min(ratios)
        # The libraries fail on an image with a side that would become 0.
        return max(1, round(height / ratio)), max(1, round(width / ratio))

    def _offsets(self, have: int, want: int) -> tuple[int, int]:
        """Return the offset of the image in the result (padding), and of the result in the image (cropping)."""
        if have < want:
            padding = want - have
            return (padding // 2 if self.odd == "nearest" else (padding + 1) // 2), 0
        cropped = have - want
        return 0, (int(round(cropped / 2.0)) if self.odd == "nearest" else cropped // 2)


def of_open_clip(config: Mapping[str, Any]) -> Preprocess:
    """Return the equivalent of open_clip's evaluation transform, from ``open_clip.get_model_preprocess_cfg(model)``."""
    height, width = pair(config.get("size") or 224)
    mode = config.get("resize_mode") or "shortest"
    interpolation: Interpolation = "bilinear" if config.get("interpolation") == "bilinear" else "bicubic"
    resize: Resize = {"shortest": "shortest", "longest": "longest", "squash": "squash"}[mode]  # type: ignore[assignment]
    if mode == "shortest" and height != width:
        resize, interpolation = "cover", "bicubic"
    return Preprocess(
        height,
        width,
        (height, width),
        resize,
        interpolation,
        fill=(int(config.get("fill_color") or 0),) * 3 if mode == "longest" else (0, 0, 0),
        mean=three(config.get("mean"), (0.48145466, 0.4578275, 0.40821073)),
        std=three(config.get("std"), (0.26862954, 0.26130258, 0.27577711)),
    )


def of_timm(config: Mapping[str, Any]) -> Preprocess:
    """Return the equivalent of timm's evaluation transform, from ``timm.data.resolve_data_config``."""
    height, width = config["input_size"][-2:]
    share = config.get("crop_pct") or 0.875
    scaled = (math.floor(height / share), math.floor(width / share))
    mode = config.get("crop_mode") or "center"
    mean = three(config.get("mean"), (0.485, 0.456, 0.406))
    resize: Resize = "shortest" if scaled[0] == scaled[1] else "cover"
    fill = (0, 0, 0)
    if mode == "squash":
        resize = "squash"
    elif mode == "border":
        resize, fill = "longest", tuple(round(255 * value) for value in mean)  # type: ignore[assignment]
    return Preprocess(
        height,
        width,
        scaled,
        resize,
        filter_by_name(config.get("interpolation") or "bilinear"),
        fill=fill,
        mean=mean,
        std=three(config.get("std"), (0.229, 0.224, 0.225)),
    )


def of_torchvision(preset: Any) -> Preprocess:
    """Return the equivalent of the transforms of a torchvision weights enum (``ImageClassification``)."""
    side, cut = preset.resize_size, preset.crop_size
    sides = list(side) if isinstance(side, (list, tuple)) else [side]
    height, width = pair(cut if not isinstance(cut, (list, tuple)) or len(cut) > 1 else cut[0])
    scaled = (int(sides[0]), int(sides[-1]))
    return Preprocess(
        height,
        width,
        scaled,
        "squash" if len(sides) == 2 else "shortest",
        filter_by_name(getattr(preset.interpolation, "value", preset.interpolation)),
        mean=three(preset.mean, (0.485, 0.456, 0.406)),
        std=three(preset.std, (0.229, 0.224, 0.225)),
    )


def of_transformers(config: Mapping[str, Any]) -> Preprocess:
    """Return the equivalent of a transformers image processor, from its ``to_dict()``.

    Raises:
        UsageError: It does more than resize, crop, rescale and normalise.
    """
    kind = config.get("image_processor_type", "the image processor")
    factor = float(config.get("rescale_factor", 1 / 255))
    if not config.get("do_rescale", True) or abs(factor * 255 - 1) > 1e-3 or config.get("do_pad"):
        raise UsageError(
            f"{kind}: rescales by {factor:g}, or pads; only rescaling by 1/255 without padding is supported"
        )
    size, cut = dict(config.get("size") or {}), dict(config.get("crop_size") or {})
    resize: Resize
    if not config.get("do_resize", True):
        resize, scaled = "none", (0, 0)
    elif size.get("shortest_edge") and not size.get("longest_edge"):
        resize, scaled = "shortest", (int(size["shortest_edge"]),) * 2
    elif size.get("height") and size.get("width"):
        resize, scaled = "squash", (int(size["height"]), int(size["width"]))
    else:
        raise UsageError(f"{kind}: resizes to {size}; only shortest_edge, or height and width, is supported")
    if config.get("do_center_crop") and cut:
        sides = (int(cut["height"]), int(cut["width"]))
    elif resize == "squash":
        sides = scaled
    else:
        raise UsageError(f"{kind}: returns images of several sizes; only images of one size can be embedded")
    number = config.get("resample", 3)
    normalised = config.get("do_normalize", True)
    return Preprocess(
        *sides,
        sides if resize == "none" else scaled,
        resize,
        _FILTERS[int(number)] if int(number) in range(len(_FILTERS)) else filter_by_name(str(number)),
        odd="down",
        mean=three(config.get("image_mean"), (0.5,) * 3) if normalised else (0.0,) * 3,
        std=three(config.get("image_std"), (0.5,) * 3) if normalised else (1.0,) * 3,
    )


def filter_by_name(name: str) -> Interpolation:
    """Return the filter of PIL with a name.

    Raises:
        UsageError: There is no such filter.
    """
    for known in _FILTERS:
        if name == known:
            return known
    raise UsageError(f"no filter {name!r} for resizing images; allowed: {', '.join(_FILTERS)}")


def pair(size: Any) -> tuple[int, int]:
    """Return (height, width) of a size that may be one number."""
    if isinstance(size, (list, tuple)):
        return int(size[0]), int(size[1])
    return int(size), int(size)


def three(value: Any, default: tuple[float, float, float]) -> tuple[float, float, float]:
    """Return one number per colour from three numbers, one number for all, or None (``default``)."""
    if value is None:
        return default
    values = [float(item) for item in value] if isinstance(value, (list, tuple)) else [float(value)] * 3
    if len(values) == 1:
        values *= 3
    if len(values) != 3:
        raise UsageError(f"{len(values)} channels; only encoders for images with three colours can be used")
    return values[0], values[1], values[2]
