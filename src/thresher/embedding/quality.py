"""Columns computed from every image while it is embedded: hashes to find duplicates by, sharpness and brightness."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from hashlib import sha256
from typing import Any

import numpy as np
import numpy.typing as npt

from thresher.errors import UsageError, suggest

QUALITY = {"sha256": "string", "phash": "string", "sharpness": "float", "brightness": "float"}  # name -> Arrow type

_SIDE, _LOW = 32, 8  # pixels of a side of the small copy, and frequencies of a side, of a perceptual hash
_LARGEST = 512  # pixels of the longer side of the copy whose sharpness is measured


def quality_columns(names: str) -> tuple[str, ...]:
    """Return the names of a list separated by commas.

    Raises:
        UsageError: One is unknown or repeated; the message lists what there is.
    """
    found = tuple(name.strip() for name in names.split(","))
    for name in found:
        if name not in QUALITY:
            raise UsageError(f"--quality {name}: there are {', '.join(QUALITY)}.{suggest(name, QUALITY)}")
    if len(set(found)) < len(found):
        raise UsageError(f"--quality {names}: names a column twice")
    return found


def measured(names: Sequence[str], data: bytes, picture: Any) -> dict[str, Any]:
    """Return the values of some columns for one image.

    Args:
        names: Of :data:`QUALITY`.
        data: The image as stored.
        picture: The decoded PIL image, of mode RGB.
    """
    values: dict[str, Any] = {}
    grey = picture.convert("L") if set(names) - {"sha256"} else None
    for name in names:
        if name == "sha256":
            values[name] = sha256(data).hexdigest()
        elif name == "phash":
            values[name] = perceptual_hash(grey)
        elif name == "sharpness":
            values[name] = sharpness(grey)
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


@cache
def _cosines() -> npt.NDArray[np.float64]:
    """Return the lowest frequencies of the cosine transform, (8, 32)."""
    return 2 * np.cos(np.pi * np.arange(_LOW)[:, None] * (2 * np.arange(_SIDE) + 1) / (2 * _SIDE))
