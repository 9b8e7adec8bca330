"""Columns computed from every image while it is embedded: hashes, sharpness, brightness, text, and scores of heads."""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from importlib.util import find_spec
from typing import Any

import numpy as np
import numpy.typing as npt

from thresher.errors import MissingExtraError, PoolError, UsageError, suggest
from thresher.runtime.format import counted
from thresher.runtime.untrusted import read_exactly, read_npy_header

# name -> Arrow type
QUALITY = {
    "sha256": "string", "phash": "string", "sharpness": "float", "brightness": "float", "text_area": "float",
}  # fmt: skip

_SIDE, _LOW = 32, 8  # pixels of a side of the small copy, and frequencies of a side, of a perceptual hash
_LARGEST = 512  # pixels of the longer side of the copy whose sharpness is measured
_READ = 640  # pixels of the longer side of the copy in which text is found


@dataclass(frozen=True, eq=False)
class Head:
    """A linear score of the embeddings of images, such as one of aesthetics.

    Attributes:
        name: Its column.
        weights_D: (D,) float64.
        bias: Added to every score.
        digest: SHA-256 of its file.
    """

    name: str
    weights_D: npt.NDArray[np.float64]
    bias: float
    digest: str

    @classmethod
    def read(cls, name: str, path: str, dimension: int) -> Head:
        """Read a .npy file: D weights, or D weights and a bias.

        Args:
            name: Name of the column.
            path: The file.
            dimension: D, of the embeddings of images.

        Raises:
            UsageError: It has another number of values, or they are not finite numbers.
            PoolError: It cannot be read.
        """
        try:
            if not os.path.isfile(path):
                raise FileNotFoundError(errno.ENOENT, "there is no such file")
            with open(path, "rb") as file:
                header = read_npy_header(file)
                count = math.prod(header.shape)
                if header.dtype.kind != "f" or len(header.shape) > 2 or max(header.shape, default=0) != count:
                    raise UsageError(
                        f"{path}: has {header.dtype} of shape {header.shape}; give D floats, or D + 1 with a bias"
                    )
                if count not in (dimension, dimension + 1):
                    raise UsageError(
                        f"{path}: has {counted(count, 'value')}, and images have {dimension:,} dimensions; give a head "
                        "for this encoder"
                    )
                data = read_exactly(file, header.bytes)
        except (OSError, EOFError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise PoolError(f"{path}: cannot be read ({reason}); save the weights with np.save") from None
        values = np.frombuffer(data, header.dtype).astype(np.float64)
        if not np.isfinite(values).all():
            raise UsageError(f"{path}: has NaN or infinite values; give finite weights")
        bias = float(values[dimension]) if count > dimension else 0.0
        return cls(name, values[:dimension], bias, sha256(data).hexdigest())

    def scores(self, stored_ND: npt.NDArray[Any]) -> list[Any]:
        """Return the score of each embedding: of the vector as stored, divided by its length."""
        rows_ND = stored_ND.astype(np.float64)
        lengths_N = np.sqrt((rows_ND * rows_ND).sum(axis=1))
        found: list[Any] = ((rows_ND * self.weights_D).sum(axis=1) / lengths_N + self.bias).tolist()
        return found


@dataclass(frozen=True)
class Quality:
    """Columns to compute.

    Attributes:
        measured: Names of :data:`QUALITY`.
        heads: Names of columns and the files of their heads.
    """

    measured: tuple[str, ...] = ()
    heads: tuple[tuple[str, str], ...] = ()

    @classmethod
    def parse(cls, text: str | None) -> Quality:
        """Read a list separated by commas of names, and of NAME=HEAD.npy; None for nothing.

        Raises:
            UsageError: A name is unknown or repeated; the message lists what there is.
            MissingExtraError: ``text_area`` needs the extra ``ocr``.
        """
        if text is None:
            return cls()
        parts = [tuple(map(str.strip, part.partition("="))) for part in text.split(",")]
        measured = tuple(name.replace("-", "_") for name, equals, _ in parts if not equals)
        heads = tuple((name, path) for name, equals, path in parts if equals)
        for name in measured:
            if name not in QUALITY:
                raise UsageError(
                    f"--quality {name}: there are {', '.join(QUALITY)}, and NAME=HEAD.npy.{suggest(name, QUALITY)}"
                )
        for name, path in heads:
            if not name.isidentifier() or not path or name in QUALITY:
                raise UsageError(f"--quality {name}={path}: give NAME=HEAD.npy with a name of letters, digits and _")
        names = [*measured, *(name for name, _ in heads)]
        if len(set(names)) < len(names):
            raise UsageError(f"--quality {text}: names a column twice")
        if "text_area" in measured and None in (find_spec("rapidocr"), find_spec("onnxruntime")):
            raise MissingExtraError("--quality text_area", "ocr")
        return cls(measured, heads)

    def text(self) -> str | None:
        """Return the list again, with absolute paths."""
        return ",".join([*self.measured, *(f"{name}={os.path.abspath(path)}" for name, path in self.heads)]) or None

    def types(self) -> dict[str, str]:
        """Return the Arrow type of each column, by name."""
        return {name: QUALITY[name] for name in self.measured} | {name: "float" for name, _ in self.heads}

    def read_heads(self, dimension: int) -> tuple[Head, ...]:
        """Read the heads for image embeddings of D = ``dimension``; raises as :meth:`Head.read`."""
        return tuple(Head.read(name, path, dimension) for name, path in self.heads)


def measured(names: Sequence[str], data: bytes, picture: Any) -> dict[str, Any]:
    """Return the values of some columns for one image.

    Args:
        names: Of :data:`QUALITY`.
        data: The image as stored.
        picture: The decoded PIL image, of mode RGB.
    """
    values: dict[str, Any] = {}
    grey = picture.convert("L") if set(names) - {"sha256", "text_area"} else None
    for name in names:
        if name == "sha256":
            values[name] = sha256(data).hexdigest()
        elif name == "phash":
            values[name] = perceptual_hash(grey)
        elif name == "sharpness":
            values[name] = sharpness(grey)
        elif name == "text_area":
            values[name] = text_area(picture)
        else:
            values[name] = float(np.asarray(grey).mean(dtype=np.float64) / 255)
    return values


def perceptual_hash(grey: Any) -> str:
    """Return the perceptual hash of a grey PIL image: 64 bits as 16 hexadecimal digits.

    The image is reduced to 32 x 32 pixels (Lanczos). A bit is 1 where one of the 8 x 8 lowest frequencies of its
    two-dimensional cosine transform (DCT-II) is above their median; row by row, the highest bit first. Frequencies are
    rounded to 6 decimals, so that an image of one colour does not depend on rounding errors.
    """
    from PIL import Image

    pixels = np.asarray(grey.resize((_SIDE, _SIDE), Image.Resampling.LANCZOS), np.float64)
    low = np.round(_cosines() @ pixels @ _cosines().T, 6)
    return np.packbits(low > np.median(low)).tobytes().hex()


def sharpness(grey: Any) -> float:
    """Return how sharp a grey PIL image is: the variance of its Laplacian, for pixels from 0 to 255.

    Images with a side above 512 pixels are first reduced so that the longer side is 512 (box filter), to compare them
    with others. The Laplacian of a pixel is the sum of its four neighbours minus four times the pixel; pixels at the
    edge have none. An image with a side below 3 pixels has sharpness 0.
    """
    from PIL import Image

    if max(grey.size) > _LARGEST:
        scale = _LARGEST / max(grey.size)
        grey = grey.resize(tuple(max(round(side * scale), 1) for side in grey.size), Image.Resampling.BOX)
    pixels = np.asarray(grey, np.int64)
    if min(pixels.shape) < 3:
        return 0.0
    inner = pixels[1:-1, 1:-1]
    laplacian = pixels[:-2, 1:-1] + pixels[2:, 1:-1] + pixels[1:-1, :-2] + pixels[1:-1, 2:] - 4 * inner
    mean = laplacian.sum() / laplacian.size
    return float((laplacian**2).sum() / laplacian.size - mean**2)


def text_area(picture: Any) -> float:
    """Return the share of an RGB PIL image that is text, from 0 to 1: the union of the boxes that a detector finds.

    The detector is the small one of PP-OCRv6 (rapidocr; differentiable binarization, arXiv 1911.08947), on one CPU
    thread. It sees a copy whose longer side is 640 pixels.
    """
    from PIL import Image, ImageDraw

    scale = _READ / max(picture.size)
    width, height = (max(round(side * scale), 1) for side in picture.size)
    small = picture.resize((width, height), Image.Resampling.BILINEAR)
    pixels = np.ascontiguousarray(np.asarray(small)[:, :, ::-1])  # it expects blue first
    boxes = _detector()(pixels, use_det=True, use_cls=False, use_rec=False).boxes
    mask = Image.new("1", small.size)
    draw = ImageDraw.Draw(mask)
    for box in boxes if boxes is not None else ():
        draw.polygon([(float(x), float(y)) for x, y in box], fill=1)
    return float(np.asarray(mask).mean())


@cache
def _detector() -> Any:
    """Return the text detector of this process; its model is in the package."""
    from rapidocr import RapidOCR

    threads = {f"EngineConfig.onnxruntime.{kind}_op_num_threads": 1 for kind in ("intra", "inter")}
    sides = {"Det.limit_type": "max", "Det.limit_side_len": _READ}
    return RapidOCR(params={"Global.log_level": "critical", **sides, **threads})


@cache
def _cosines() -> npt.NDArray[np.float64]:
    """Return the lowest frequencies of the cosine transform, (8, 32)."""
    return 2 * np.cos(np.pi * np.arange(_LOW)[:, None] * (2 * np.arange(_SIDE) + 1) / (2 * _SIDE))
