"""Pictures decoded as a person would see them, whatever they are stored as."""

from __future__ import annotations

import contextlib
import io
import warnings
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from thresher.errors import PoolError

Pixels = npt.NDArray[np.uint8]
Resize = Literal["squash", "shortest"]

NARROW = 200  # times as long as wide: such a picture is a line or a scroll, and enormous once its short side fits
PIXELS = 2**27  # of one picture: more is taken for a decompression bomb
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # decoders of pictures only, none that runs programs
ENDINGS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm")  # of files that hold pictures
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
    """Return the usual ending of a picture's name, by its first bytes: "jpg", "png" ...

    Raises:
        PoolError: It is no kind of picture that is known.
    """
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    for begins, ending in _MAGIC:
        if data.startswith(begins):
            return ending
    raise PoolError(f"is no kind of picture that is known (it begins with {data[:8]!r})")


def open_rgb(data: bytes, *, limit: int = PIXELS, draft: int | None = None) -> Any:
    """Return a picture as a PIL image of mode RGB: upright, transparent parts white, 16 bits scaled to 8.

    Of animations it is the first picture.

    Args:
        data: The picture as stored: JPEG, PNG, WebP, GIF, BMP, TIFF or PPM.
        limit: Pixels it may have; above Pillow's own limit, 178,956,970, none may.
        draft: Decode JPEG at a lower size where sides stay this long: quicker, and slightly other pixels.

    Raises:
        PoolError: Not a picture, a damaged or an enormous one; says which.
    """
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's about sizes: they are checked here
            with Image.open(io.BytesIO(data), formats=FORMATS) as source:
                if not 0 < source.width * source.height <= limit:
                    raise PoolError(f"is a picture of {source.width:,} x {source.height:,} pixels")
                if draft:
                    source.draft("RGB", (draft, draft))
                source.load()
                picture = _eight_bit(_upright(source))
                if picture.has_transparency_data:
                    picture = picture.convert("RGBA")
                    picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
                return picture if picture.mode == "RGB" else picture.convert("RGB")
    except PoolError:
        raise
    except Exception as error:  # whatever Pillow's many parsers come upon
        told = next(iter(str(error).splitlines()), "") or type(error).__name__
        told = "no kind that is known" if "BytesIO" in told else told
        raise PoolError(f"is no picture that can be read ({told})") from None


def _upright(picture: Any) -> Any:
    """Turn a picture as its camera was held; it stays as it is where what it says of that is damaged."""
    from PIL import ImageOps

    with contextlib.suppress(Exception):  # Pillow has no one error for notes that make no sense
        ImageOps.exif_transpose(picture, in_place=True)  # else it would copy those that stand upright
    return picture


def decode(data: bytes, side: int, resize: Resize = "shortest") -> Pixels:
    """Return a picture for training, (side, side, 3) uint8, as :func:`open_rgb` shows it.

    Args:
        data: The picture as stored.
        side: Pixels of a side.
        resize: "shortest": the shorter side becomes ``side`` and the middle is cut out; "squash": both do.

    Raises:
        PoolError: Not a picture, a damaged or an enormous one; says which.
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
    """Return a small copy of a picture of :func:`open_rgb` as WebP, its longer side at most ``side`` pixels."""
    copy = picture.copy()
    copy.thumbnail((side, side))
    copy.info.clear()  # no profile or comment of the original travels along
    buffer = io.BytesIO()
    copy.save(buffer, "webp", quality=80)
    return buffer.getvalue()


def _eight_bit(picture: Any) -> Any:
    """Return a picture of 16 bits a pixel as one of 8; others as they are."""
    from PIL import Image

    if picture.mode == "F":
        raise PoolError("is a picture of floating-point pixels, of which nobody can tell what is white")
    if not picture.mode.startswith("I"):
        return picture
    pixels = np.asarray(picture)
    if pixels.min() < 0 or pixels.max() > 65_535:
        raise PoolError("is a picture of more than 16 bits a pixel")
    return Image.fromarray((pixels // 257).astype(np.uint8))
