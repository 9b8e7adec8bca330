"""Decoding of images in all supported formats, as a person would see them."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from thresher.errors import PoolError, UsageError, installed
from thresher.runtime.process import no_warnings
from thresher.runtime.untrusted import open_regular

Pixels = npt.NDArray[np.uint8]
Resize = Literal["squash", "shortest"]

NARROW = 200  # maximum aspect ratio: a longer image is a line or a scroll, and huge once its short side fits
PIXELS = 2**27  # maximum per image: more counts as a decompression bomb


@dataclass(frozen=True)
class Format:
    """A format of image files.

    Attributes:
        name: Its name, for messages.
        endings: Usual extensions of its files, the first one for files that are written.
        reader: Name of the reader in Pillow, "" if there is none.
        feature: Name in ``PIL.features`` of the library that the reader needs, "" for none.
        package: Another package that reads it, "" for none.
        instead: What to do if it cannot be read.
    """

    name: str
    endings: tuple[str, ...]
    reader: str = ""
    feature: str = ""
    package: str = ""
    instead: str = "convert to JPEG or PNG"

    @property
    def is_known(self) -> bool:
        """Whether it can be read, perhaps after something is installed."""
        return bool(self.reader or self.package)

    @property
    def is_read(self) -> bool:
        """Whether it can be read with the installed packages."""
        if self.package:
            return installed(self.package)
        if not self.feature:
            return bool(self.reader)
        from PIL import features

        known = self.feature in (*features.modules, *features.codecs)  # not in old versions of Pillow
        return known and bool(features.check(self.feature))


# Only decoders in C without subprocesses, for formats that are recognised by their first bytes.
_JPEG = Format("JPEG", ("jpg", "jpeg", "jpe", "jfif", "jif", "pjpeg", "pjp", "mpo"), "JPEG")
_PNG = Format("PNG", ("png", "apng"), "PNG")
_WEBP = Format("WebP", ("webp",), "WEBP")
_GIF = Format("GIF", ("gif",), "GIF")
_BMP = Format("BMP", ("bmp", "dib"), "BMP")
_TIFF = Format("TIFF", ("tif", "tiff"), "TIFF")
_PPM = Format("PPM", ("ppm", "pgm", "pbm", "pnm"), "PPM")
_AVIF = Format("AVIF", ("avif",), "AVIF", "avif", instead="type pip install 'pillow>=11.3'")
_JPEG_2000 = Format(
    "JPEG 2000", ("jp2", "j2k", "jpf", "jpx", "j2c"), "JPEG2000", "jpg_2000", instead="type pip install pillow"
)
_ICO = Format("ICO", ("ico",), "ICO")
_HEIC = Format(
    "HEIC", ("heic", "heif", "hif", "heics", "heifs"), package="pillow_heif", instead="type pip install pillow-heif"
)
_JPEG_XL = Format("JPEG XL", ("jxl",))
_RAW = Format(
    "camera raw",
    tuple("3fr arw cr2 cr3 crw dng erf iiq kdc mrw nef nrw orf pef raf rw2 rwl sr2 srf srw x3f".split()),
)
_PSD = Format("Photoshop", ("psd", "psb"))
_SVG = Format("SVG", ("svg", "svgz"))
_OTHER = Format(
    "another image format", ("dds", "eps", "exr", "hdr", "icns", "jxr", "pcx", "pfm", "qoi", "sgi", "tga", "xcf")
)
FORMATS = (
    _JPEG,
    _PNG,
    _WEBP,
    _GIF,
    _BMP,
    _TIFF,
    _PPM,
    _AVIF,
    _JPEG_2000,
    _ICO,
    _HEIC,
    _JPEG_XL,
    _RAW,
    _PSD,
    _SVG,
    _OTHER,
)
"""All formats that count as images; those that can be read come first."""

BY_ENDING = {ending: one for one in FORMATS for ending in one.endings}
ENDINGS = tuple(BY_ENDING)
"""Extensions of image files, in the order in which one of several in a sample is chosen."""

_DNG_VERSION, _SUBFILE_TYPE, _SUB_IFDS = 50706, 254, 330  # TIFF tags
_MAGIC = (
    (b"\xff\xd8\xff", _JPEG),
    (b"\x89PNG\r\n\x1a\n", _PNG),
    (b"GIF87a", _GIF),
    (b"GIF89a", _GIF),
    (b"II*\0", _TIFF),
    (b"MM\0*", _TIFF),
    (b"II+\0", _TIFF),
    (b"MM\0+", _TIFF),
    (b"\0\0\0\x0cjP  \r\n\x87\n", _JPEG_2000),
    (b"\xff\x4f\xff\x51", _JPEG_2000),
    (b"\0\0\1\0", _ICO),
    (b"\xff\x0a", _JPEG_XL),
    (b"\0\0\0\x0cJXL \r\n\x87\n", _JPEG_XL),
    (b"FUJIFILMCCD-RAW", _RAW),
    (b"IIU\0", _RAW),
    (b"IIRO", _RAW),
    (b"8BPS", _PSD),
    (b"<svg", _SVG),
)
_XML = 1024  # bytes of an XML file in which <svg is looked for
_BMP_HEADERS = (12, 16, 40, 52, 56, 64, 108, 124)  # lengths
_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1")


def format_of(data: bytes) -> Format | None:
    """Return the format of an image from its first bytes, None if they are not those of an image.

    Args:
        data: The encoded image, or at least its first 64 bytes.
    """
    if data[:4] == b"RIFF":
        return _WEBP if data[8:12] == b"WEBP" else None
    if data[4:8] == b"ftyp":
        brands = data[8 : min(int.from_bytes(data[:4], "big"), 64)]
        if b"avif" in brands or b"avis" in brands:
            return _AVIF
        return _RAW if data[8:12] == b"crx " else _HEIC if data[8:12] in _HEIC_BRANDS else None
    if data[:2] == b"BM":
        return _BMP if int.from_bytes(data[14:18], "little") in _BMP_HEADERS else None
    if data[:1] == b"P" and data[1:2] in (b"1", b"2", b"3", b"4", b"5", b"6"):
        return _PPM if data[2:3].isspace() else None
    if data[:4] == b"II*\0" and data[8:10] == b"CR":
        return _RAW
    if data[:5] == b"<?xml" and b"<svg" in data[:_XML]:
        return _SVG
    return next((one for begins, one in _MAGIC if data.startswith(begins)), None)


def kind_of(data: bytes) -> str:
    """Return the usual file extension of an image, from its first bytes: "jpg", "png" ...

    Raises:
        PoolError: The format is not supported.
    """
    one = format_of(data)
    if one is None:
        raise PoolError(f"is not in a supported image format (it begins with {data[:8]!r})")
    if not one.is_known:
        raise PoolError(f"is not in a supported image format ({one.name}: {one.instead})")
    return one.endings[0]


def open_encoded(data: bytes) -> Any:
    """Open an encoded image as a PIL image whose pixels are not decoded yet; a context manager.

    Raises:
        PoolError: It is in a format that cannot be read.
        Exception: Pillow raises many kinds of errors for damaged images.
    """
    from PIL import Image

    one = format_of(data)
    if one is None:
        raise PoolError("is not a readable image (unsupported format)")
    if not one.is_read:
        raise PoolError(f"is not a readable image ({one.name}: {one.instead})")
    if one is _HEIC:
        import pillow_heif

        return pillow_heif.HeifImageFile(io.BytesIO(data))
    source: Any = Image.open(io.BytesIO(data), formats=(one.reader,))
    if one is _TIFF and _is_raw(source.tag_v2):
        raise PoolError(f"is not a readable image ({_RAW.name}: {_RAW.instead})")  # its first image is a thumbnail
    return source


def _is_raw(tags: Any) -> bool:
    """Return whether a TIFF is of a camera, with the image elsewhere than in its first directory."""
    return _DNG_VERSION in tags or (_SUB_IFDS in tags and tags.get(_SUBFILE_TYPE) == 1)


def open_rgb(data: bytes, *, limit: int = PIXELS, draft: int | None = None) -> Any:
    """Decode an image as a PIL image of mode RGB: upright, transparent parts white, 16 bits scaled to 8.

    For animations it is the first frame.

    Args:
        data: The encoded image, in one of the :data:`FORMATS` that are read.
        limit: Maximum number of pixels; Pillow's own limit of 178,956,970 always applies.
        draft: Decode JPEG at a lower size whose sides are at least this long: faster, with slightly different pixels.

    Raises:
        PoolError: The data is not an image, is damaged, or has too many pixels; the message says which.
        MemoryError: There is too little memory to decode it.
    """
    from PIL import Image

    try:
        with no_warnings:  # Pillow warns about sizes, which are checked here
            with open_encoded(data) as source:
                _check_pixels(source, limit)
                if draft and source.format in ("JPEG", "MPO"):  # others would decode a thumbnail, or raise
                    source.draft("RGB", (draft, draft))
                source.load()
                _check_pixels(source, limit)  # ICO and HEIC may turn out larger than their headers say
                picture = _eight_bit(_upright(source))
                if picture.has_transparency_data:
                    picture = picture.convert("RGBA")
                    picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
                return picture if picture.mode == "RGB" else picture.convert("RGB")
    except (PoolError, MemoryError, ImportError):
        raise
    except Exception as error:  # Pillow's parsers raise many kinds of errors
        if str(error).startswith("out of memory"):  # an OSError of a decoder of Pillow
            raise MemoryError(str(error)) from error
        if isinstance(error, OSError) and error.errno is not None:  # of the system: the data is in memory
            raise
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        reason = "unsupported format" if "BytesIO" in reason else reason
        raise PoolError(f"is not a readable image ({reason})") from None


def as_png(data: bytes) -> bytes:
    """Return an image as a PNG with the pixels of :func:`open_rgb`, without profiles and comments.

    Raises:
        PoolError: As for :func:`open_rgb`.
    """
    picture = open_rgb(data)
    picture.info.clear()
    buffer = io.BytesIO()
    picture.save(buffer, "png")
    return buffer.getvalue()


def _check_pixels(picture: Any, limit: int) -> None:
    if not 0 < picture.width * picture.height <= limit:
        raise PoolError(f"is an image of {picture.width:,} x {picture.height:,} pixels")


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
    return square(open_rgb(data, draft=2 * side), side, resize)


def square(picture: Any, side: int, resize: Resize) -> Pixels:
    """Return the pixels of an image from :func:`open_rgb`, (side, side, 3) uint8, resized as :func:`decode` says."""
    from PIL import Image

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


def small_picture(data: bytes, side: int) -> bytes:
    """Return a thumbnail of an encoded image as WebP, see :func:`thumbnail`; b"" for anything that is not an image."""
    try:
        return thumbnail(open_rgb(data, draft=2 * side), side) if data else b""
    except PoolError:
        return b""


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
