"""Decoding of images in all supported formats, as a person would see them."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from thresher.errors import PoolError, UsageError
from thresher.runtime.process import no_warnings
from thresher.runtime.untrusted import open_regular

Pixels = npt.NDArray[np.uint8]
Resize = Literal["squash", "shortest"]

NARROW = 200  # maximum aspect ratio: a longer image is a line or a scroll, and huge once its short side fits
PIXELS = 2**27  # maximum per image: more counts as a decompression bomb
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # image decoders only, none that runs programs
ENDINGS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm")  # of image files
_MAGIC = (
    (b"\xff\xd8\xff", "jpg"),
    (b"\x89PNG\r\n\x1a\n", "png"),
    (b"GIF8", "gif"),
    (b"BM", "bmp"),
    (b"II*\0", "tif"),
    (b"MM\0*", "tif"),
    (b"P5", "ppm"),
    (b"P6", "ppm"),
)


def kind_of(data: bytes) -> str:
    """Return the usual file extension of an image, from its first bytes: "jpg", "png" ...

    Raises:
        PoolError: The format is not supported.
    """
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    for begins, ending in _MAGIC:
        if data.startswith(begins):
            return ending
    raise PoolError(f"is not in a supported image format (it begins with {data[:8]!r})")


def open_rgb(data: bytes, *, limit: int = PIXELS, draft: int | None = None) -> Any:
    """Decode an image as a PIL image of mode RGB: upright, transparent parts white, 16 bits scaled to 8.

    For animations it is the first frame.

    Args:
        data: The encoded image: JPEG, PNG, WebP, GIF, BMP, TIFF or PPM.
        limit: Maximum number of pixels; Pillow's own limit of 178,956,970 always applies.
        draft: Decode JPEG at a lower size whose sides are at least this long: faster, with slightly different pixels.

    Raises:
        PoolError: The data is not an image, is damaged, or has too many pixels; the message says which.
        MemoryError: There is too little memory to decode it.
    """
    from PIL import Image

    try:
        with no_warnings:  # Pillow warns about sizes, which are checked here
            with Image.open(io.BytesIO(data), formats=FORMATS) as source:
                if not 0 < source.width * source.height <= limit:
                    raise PoolError(f"is an image of {source.width:,} x {source.height:,} pixels")
                if draft:
                    source.draft("RGB", (draft, draft))
                source.load()
                picture = _eight_bit(_upright(source))
                if picture.has_transparency_data:
                    picture = picture.convert("RGBA")
                    picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
                return picture if picture.mode == "RGB" else picture.convert("RGB")
    except (PoolError, MemoryError, ImportError):
        raise
    except Exception as error:  # Pillow's parsers raise many kinds of errors
        if isinstance(error, OSError) and error.errno is not None:  # of the system: the data is in memory
            raise
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        reason = "unsupported format" if "BytesIO" in reason else reason
        raise PoolError(f"is not a readable image ({reason})") from None


def _upright(picture: Any) -> Any:
    """Rotate an image by its EXIF orientation; unchanged if that is damaged."""
    from PIL import ImageOps

    with contextlib.suppress(Exception):  # Pillow raises many kinds of errors for invalid EXIF data
        ImageOps.exif_transpose(picture, in_place=True)  # otherwise it copies upright images
    return picture


def decode(data: bytes, side: int, resize: Resize = "shortest") -> Pixels:
    """Decode an image for training, (side, side, 3) uint8, with :func:`open_rgb`.

    Args:
        data: The encoded image.
        side: Side length in pixels.
        resize: "shortest" resizes the shorter side to ``side`` and crops the centre; "squash" resizes both sides.

    Raises:
        PoolError: The data is not an image, is damaged, or has too many pixels; the message says which.
    """
    from PIL import Image

    picture = open_rgb(data, draft=2 * side)
    box = None
    if resize == "shortest":
        short = min(picture.size)
        left, top = (picture.width - short) / 2, (picture.height - short) / 2
        box = (left, top, left + short, top + short)
    return np.asarray(picture.resize((side, side), Image.Resampling.BICUBIC, box=box, reducing_gap=2.0))


def thumbnail(picture: Any, side: int) -> bytes:
    """Return a small WebP copy of an image from :func:`open_rgb`, its longer side at most ``side`` pixels."""
    copy = picture.copy()
    copy.thumbnail((side, side))
    copy.info.clear()  # do not copy profiles or comments of the original
    buffer = io.BytesIO()
    copy.save(buffer, "webp", quality=80)
    return buffer.getvalue()


def _eight_bit(picture: Any) -> Any:
    """Convert an image with 16 bits per channel to 8; return others unchanged."""
    from PIL import Image

    if picture.mode == "F":
        raise PoolError("is an image with floating-point pixels, whose value range is unknown")
    if not picture.mode.startswith("I"):
        return picture
    pixels = np.asarray(picture)
    if pixels.min() < 0 or pixels.max() > 65_535:
        raise PoolError("is an image with more than 16 bits a pixel")
    return Image.fromarray((pixels // 257).astype(np.uint8))


def bytes_of(value: Any, what: str) -> bytes:
    """Return an image that a caller gave as the bytes of a file, b"" for None.

    Args:
        value: Bytes, a path, an image of PIL (written without loss, with its orientation), or a dictionary with "bytes"
            or "path", as Hugging Face Datasets have it.
        what: What it is, for messages.

    Raises:
        UsageError: It is something else.
        PoolError: The file cannot be read.
    """
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if value is None or isinstance(value, bytes):
        return value or b""
    if isinstance(value, (str, os.PathLike)):
        try:
            with open_regular(value) as opened:
                return opened.read()
        except OSError as error:
            raise PoolError(f"{os.fspath(value)}: {what} cannot be read ({error.strerror or error})") from None
    if not (hasattr(value, "save") and hasattr(value, "getexif")):
        raise UsageError(f"{what} is {type(value).__name__}; give a path, bytes or a PIL image")
    file = io.BytesIO()
    exif = value.getexif()
    try:
        value.save(file, "TIFF" if value.mode in ("CMYK", "F") else "PNG", exif=exif)
    except OSError:  # a mode that the format does not have
        value.convert("RGB").save(file := io.BytesIO(), "PNG", exif=exif)
    return file.getvalue()
