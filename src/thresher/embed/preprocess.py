"""From a picture to the pixels an encoder looks at: the resizing and cropping of the library it comes from."""

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
_MOST = 2**26  # pixels after resizing: a picture of 1 x 60,000 is not made 224 x 13 million


@dataclass(frozen=True)
class Preprocess:
    """Makes an upright 8-bit RGB picture what an encoder was trained on; picklable, needs only PIL and NumPy.

    The picture is resized, then cut or filled up around its middle.

    Attributes:
        height: Of the result.
        width: Of the result.
        scaled: (height, width) to resize to; of those, "shortest" takes the first alone.
        resize: "shortest": the shorter side becomes ``scaled[0]``, the longer one is rounded down (torchvision,
            transformers). "cover" and "longest": the picture just covers, or just fits into, ``scaled``, sides rounded
            to the nearest (open_clip, timm). "squash": to ``scaled`` whatever its shape. "none": left as it is.
        interpolation: PIL's name of the filter.
        fill: Value of all three colours where the result is larger than the picture.
        odd: Where an odd number of pixels is cut off: "nearest" as torchvision rounds, "down" as transformers does.
        mean: Of the pixels of a colour, 0 to 1, which the encoder subtracts.
        std: Likewise, by which it divides.
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
        """Refuse what no picture could be made into."""
        if min(self.height, self.width, *self.scaled) < 1 or self.interpolation not in _FILTERS:
            raise UsageError(
                f"pictures of {self.height} x {self.width}, resized to {self.scaled} by {self.interpolation!r}; sides "
                f"are at least 1, filters {', '.join(_FILTERS)}"
            )
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise UsageError(f"mean {self.mean} and deviation {self.std}; give three numbers each, deviations above 0")

    def __call__(self, picture: Image.Image) -> Pixels:
        """Return the pixels, (height, width, 3) uint8, of a picture in mode RGB.

        Raises:
            ValueError: The picture is so narrow that it cannot be resized sensibly.
        """
        height, width = self.size_of(picture.height, picture.width)
        if height * width > _MOST:
            raise ValueError(f"a picture of {picture.width} x {picture.height} would become {width} x {height}")
        if (width, height) != picture.size:
            from PIL import Image

            picture = picture.resize((width, height), Image.Resampling(_FILTERS.index(self.interpolation)))
        pixels = np.asarray(picture)
        above, from_above = self._placed(height, self.height)
        left, from_left = self._placed(width, self.width)
        if above or left or height < self.height or width < self.width:
            found = np.empty((self.height, self.width, 3), np.uint8)
            found[:] = self.fill
            part = pixels[from_above : from_above + self.height, from_left : from_left + self.width]
            found[above : above + part.shape[0], left : left + part.shape[1]] = part
            return found
        return np.array(pixels[from_above : from_above + self.height, from_left : from_left + self.width], order="C")

    def size_of(self, height: int, width: int) -> tuple[int, int]:
        """Return the (height, width) that a picture of these sides is resized to."""
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
        # The libraries stop at a picture one of whose sides would vanish.
        return max(1, round(height / ratio)), max(1, round(width / ratio))

    def _placed(self, have: int, want: int) -> tuple[int, int]:
        """Return where the picture begins in the result, and where the result begins in the picture."""
        if have < want:
            more = want - have
            return (more // 2 if self.odd == "nearest" else (more + 1) // 2), 0
        less = have - want
        return 0, (int(round(less / 2.0)) if self.odd == "nearest" else less // 2)


def of_open_clip(found: Mapping[str, Any]) -> Preprocess:
    """Return what open_clip's evaluation transform does, from ``open_clip.get_model_preprocess_cfg(model)``."""
    height, width = pair(found.get("size") or 224)
    mode = found.get("resize_mode") or "shortest"
    interpolation: Interpolation = "bilinear" if found.get("interpolation") == "bilinear" else "bicubic"
    resize: Resize = {"shortest": "shortest", "longest": "longest", "squash": "squash"}[mode]  # type: ignore[assignment]
    if mode == "shortest" and height != width:
        resize, interpolation = "cover", "bicubic"
    return Preprocess(
        height,
        width,
        (height, width),
        resize,
        interpolation,
        fill=(int(found.get("fill_color") or 0),) * 3 if mode == "longest" else (0, 0, 0),
        mean=three(found.get("mean"), (0.48145466, 0.4578275, 0.40821073)),
        std=three(found.get("std"), (0.26862954, 0.26130258, 0.27577711)),
    )


def of_timm(found: Mapping[str, Any]) -> Preprocess:
    """Return what timm's evaluation transform does, from ``timm.data.resolve_data_config``."""
    height, width = found["input_size"][-2:]
    share = found.get("crop_pct") or 0.875
    scaled = (math.floor(height / share), math.floor(width / share))
    mode = found.get("crop_mode") or "center"
    mean = three(found.get("mean"), (0.485, 0.456, 0.406))
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
        filter_called(found.get("interpolation") or "bilinear"),
        fill=fill,
        mean=mean,
        std=three(found.get("std"), (0.229, 0.224, 0.225)),
    )


def of_torchvision(preset: Any) -> Preprocess:
    """Return what the transforms of a torchvision weights enum do (``ImageClassification``)."""
    side, cut = preset.resize_size, preset.crop_size
    sides = list(side) if isinstance(side, (list, tuple)) else [side]
    height, width = pair(cut if not isinstance(cut, (list, tuple)) or len(cut) > 1 else cut[0])
    scaled = (int(sides[0]), int(sides[-1]))
    return Preprocess(
        height,
        width,
        scaled,
        "squash" if len(sides) == 2 else "shortest",
        filter_called(getattr(preset.interpolation, "value", preset.interpolation)),
        mean=three(preset.mean, (0.485, 0.456, 0.406)),
        std=three(preset.std, (0.229, 0.224, 0.225)),
    )


def of_transformers(found: Mapping[str, Any]) -> Preprocess:
    """Return what a transformers image processor does, from its ``to_dict()``.

    Raises:
        UsageError: It does something else than resize, cut, scale and normalise.
    """
    kind = found.get("image_processor_type", "the image processor")
    factor = float(found.get("rescale_factor", 1 / 255))
    if not found.get("do_rescale", True) or abs(factor * 255 - 1) > 1e-3 or found.get("do_pad"):
        raise UsageError(f"{kind}: rescales by {factor:g}, or pads; only pixels scaled by 1/255 and cut can be made")
    size, cut = dict(found.get("size") or {}), dict(found.get("crop_size") or {})
    resize: Resize
    if not found.get("do_resize", True):
        resize, scaled = "none", (0, 0)
    elif size.get("shortest_edge") and not size.get("longest_edge"):
        resize, scaled = "shortest", (int(size["shortest_edge"]),) * 2
    elif size.get("height") and size.get("width"):
        resize, scaled = "squash", (int(size["height"]), int(size["width"]))
    else:
        raise UsageError(f"{kind}: resizes to {size}; only shortest_edge, or height and width, can be made")
    if found.get("do_center_crop") and cut:
        sides = (int(cut["height"]), int(cut["width"]))
    elif resize == "squash":
        sides = scaled
    else:
        raise UsageError(f"{kind}: leaves pictures of several sizes; only those of one size can be embedded")
    number = found.get("resample", 3)
    normalised = found.get("do_normalize", True)
    return Preprocess(
        *sides,
        sides if resize == "none" else scaled,
        resize,
        _FILTERS[int(number)] if int(number) in range(len(_FILTERS)) else filter_called(str(number)),
        odd="down",
        mean=three(found.get("image_mean"), (0.5,) * 3) if normalised else (0.0,) * 3,
        std=three(found.get("image_std"), (0.5,) * 3) if normalised else (1.0,) * 3,
    )


def filter_called(name: str) -> Interpolation:
    """Return PIL's filter of a name.

    Raises:
        UsageError: There is none.
    """
    for known in _FILTERS:
        if name == known:
            return known
    raise UsageError(f"no filter {name!r} to resize pictures with; there are {', '.join(_FILTERS)}")


def pair(size: Any) -> tuple[int, int]:
    """Return (height, width) of a size that may be one number."""
    if isinstance(size, (list, tuple)):
        return int(size[0]), int(size[1])
    return int(size), int(size)


def three(given: Any, default: tuple[float, float, float]) -> tuple[float, float, float]:
    """Return one number a colour, of three, of one for all, or of none."""
    if given is None:
        return default
    values = [float(value) for value in given] if isinstance(given, (list, tuple)) else [float(given)] * 3
    if len(values) == 1:
        values *= 3
    if len(values) != 3:
        raise UsageError(f"{len(values)} channels; only encoders of pictures in three colours can be used")
    return values[0], values[1], values[2]
