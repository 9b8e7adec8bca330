"""Pictures as a person sees them, whatever they are stored as; damaged ones are refused, never black."""

from __future__ import annotations

import io
import struct
import sys
import tracemalloc
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, features

from tests.data.common import picture, told
from thresher.errors import PoolError
from thresher.io.pictures import ENDINGS, FORMATS, PIXELS, decode, kind_of, open_rgb

SOFT = np.asarray(Image.open(io.BytesIO(picture(1, size=(40, 30)))).convert("RGB"))


def saved(image: Image.Image, kind: str = "PNG", **how: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **how)
    return file.getvalue()


def seen(data: bytes) -> np.ndarray:
    found = open_rgb(data)
    assert found.mode == "RGB"
    return np.asarray(found)


def off(found: np.ndarray, expected: np.ndarray) -> int:
    assert found.shape == expected.shape
    return int(np.abs(found.astype(int) - expected).max())


def png(width: int, height: int, depth: int, colour: int, raw: bytes, *more: tuple[bytes, bytes]) -> bytes:
    """A PNG written by hand: pixels as rows, each after the byte of its filter."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)), *more]
    chunks += [(b"IDAT", zlib.compress(raw)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "JPEG2000", "ICO"])
def test_kinds_without_loss_are_exact(kind: str) -> None:
    how = {"sizes": [(40, 30)]} if kind == "ICO" else {}
    assert off(seen(saved(Image.fromarray(SOFT), kind, **how)), SOFT) == 0


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        ("JPEG", {"quality": 95}),
        ("JPEG", {"quality": 95, "progressive": True}),
        ("JPEG", {"quality": 95, "icc_profile": b"no profile at all" * 9}),
        ("WEBP", {"quality": 95}),
        ("WEBP", {"lossless": True}),
        ("AVIF", {"quality": 95}),
        ("MPO", {"quality": 95}),
        ("MPO", {"quality": 95, "save_all": True, "append_images": [Image.new("RGB", (40, 30))]}),
    ],
)
def test_kinds_with_loss_are_close(kind: str, how: dict[str, Any]) -> None:
    assert np.abs(seen(saved(Image.fromarray(SOFT), kind, **how)).astype(int) - SOFT).mean() < 4


@pytest.mark.parametrize("adobe", [True, False])
def test_cmyk_is_no_negative(adobe: bool) -> None:
    """Adobe writes CMYK upside down and says so in a marker; without the marker it is taken the same way."""
    data = saved(Image.fromarray(SOFT).convert("CMYK"), "JPEG", quality=95, subsampling=0)
    assert b"Adobe" in data
    if not adobe:
        at = data.index(b"Adobe") - 4
        data = data[:at] + data[at + 2 + int.from_bytes(data[at + 2 : at + 4], "big") :]
    assert np.abs(seen(data).astype(int) - SOFT).mean() < 8


def test_sixteen_bits() -> None:
    grey = (np.arange(40 * 30, dtype=np.uint32) * 65_535 // 1199).astype(">u2").reshape(30, 40)
    rows = b"".join(b"\0" + row.tobytes() for row in grey)
    assert off(seen(png(40, 30, 16, 0, rows)), np.repeat((grey // 257)[..., None], 3, 2)) <= 1
    colours = (SOFT.astype(">u2") * 257).reshape(30, -1)
    assert off(seen(png(40, 30, 16, 2, b"".join(b"\0" + row.tobytes() for row in colours))), SOFT) <= 1
    pgm = b"P5 40 30 65535\n" + grey.tobytes()
    assert off(seen(pgm), np.repeat((grey // 257)[..., None], 3, 2)) <= 1
    tiff = saved(Image.fromarray(grey.astype("<u2")), "TIFF")
    assert off(seen(tiff), np.repeat((grey // 257)[..., None], 3, 2)) <= 1


def test_one_bit_grey_and_palettes() -> None:
    black = Image.fromarray(SOFT).convert("1")
    assert off(seen(saved(black)), np.repeat(np.asarray(black)[..., None] * np.uint8(255), 3, 2)) == 0
    grey = Image.fromarray(SOFT).convert("L")
    assert off(seen(saved(grey)), np.repeat(np.asarray(grey)[..., None], 3, 2)) == 0
    few = Image.fromarray(SOFT).quantize(16)
    for kind in ("PNG", "GIF", "BMP"):
        assert off(seen(saved(few, kind)), np.asarray(few.convert("RGB"))) == 0


def test_what_is_transparent_is_white() -> None:
    clear = np.dstack([SOFT, np.full((30, 40), 255, np.uint8)])
    clear[:15, :, 3] = 0
    clear[15:20, :, 3] = 51
    white = SOFT.astype(float)
    white[:15] = 255
    white[15:20] = 255 * 0.8 + 0.2 * white[15:20]
    for kind, how in (("PNG", {}), ("WEBP", {"lossless": True, "exact": True}), ("TIFF", {})):
        assert off(seen(saved(Image.fromarray(clear), kind, **how)), white.round().astype(int)) <= 1
    grey = Image.fromarray(clear).convert("LA")
    found = seen(saved(grey))
    assert (found[:15] == 255).all()
    assert off(found[20:], np.repeat(np.asarray(grey)[20:, :, :1], 3, 2)) == 0


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_a_transparent_colour_of_a_palette_is_white(kind: str) -> None:
    few = Image.fromarray(SOFT).quantize(8)
    which = int(np.asarray(few)[0, 0])
    found = seen(saved(few, kind, transparency=which))
    holes = np.asarray(few) == which
    assert (found[holes] == 255).all()
    assert (found[~holes] == np.asarray(few.convert("RGB"))[~holes]).all()


def test_a_transparent_grey_is_white() -> None:
    rows = b"\0\x10\x80" + b"\0\x80\x20"
    assert seen(png(2, 2, 8, 0, rows, (b"tRNS", b"\0\x80")))[..., 0].tolist() == [[0x10, 255], [255, 0x20]]


TURNED = {  # orientation: what the stored pixels become
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF", "MPO"])
@pytest.mark.parametrize("orientation", TURNED)
def test_pictures_lie_as_the_camera_was_held(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    how: dict[str, Any] = {"quality": 95} if kind in ("JPEG", "MPO") else {"lossless": True} if kind == "WEBP" else {}
    how |= {"quality": 100, "subsampling": "4:4:4"} if kind == "AVIF" else {}
    data = saved(Image.fromarray(SOFT), kind, exif=exif, **how)
    plain = seen(saved(Image.fromarray(SOFT), kind, **how))
    assert off(seen(data), TURNED[orientation](plain)) <= (8 if kind == "AVIF" else 0)


@pytest.mark.parametrize("orientation", [0, 9, 60_000])
def test_an_orientation_there_is_not_turns_nothing(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert off(seen(saved(Image.fromarray(SOFT), "PNG", exif=exif)), SOFT) == 0


@pytest.mark.parametrize(
    "notes", [b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\x01\x12" * 9]
)
def test_damaged_notes_of_a_camera_do_not_cost_the_picture(notes: bytes) -> None:
    plain = saved(Image.fromarray(SOFT), "JPEG")
    data = plain[:2] + b"\xff\xe1" + struct.pack(">H", len(notes) + 2) + notes + plain[2:]
    assert off(seen(data), seen(plain)) == 0


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF", "AVIF"])
def test_of_animations_it_is_the_first_picture(kind: str) -> None:
    frames = [Image.new("RGB", (9, 7), colour) for colour in ("red", "lime", "blue")]
    how = {"lossless": True} if kind == "WEBP" else {"quality": 100, "subsampling": "4:4:4"} if kind == "AVIF" else {}
    data = saved(frames[0], kind, save_all=True, append_images=frames[1:], **how)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert off(seen(data), np.asarray(frames[0])) <= (8 if kind == "AVIF" else 0)


def test_of_icons_it_is_the_largest() -> None:
    data = saved(Image.new("RGB", (32, 32), "red"), "ICO", sizes=[(16, 16), (32, 32)])
    assert off(seen(data), np.asarray(Image.new("RGB", (32, 32), "red"))) == 0


# --- refused --------------------------------------------------------------------------------------


def tiff(width: int, height: int) -> bytes:
    tags = [
        (256, 4, width),
        (257, 4, height),
        (258, 3, 8),
        (259, 3, 1),
        (262, 3, 1),
        (273, 4, 8),
        (277, 3, 1),
        (279, 4, 9),
    ]
    body = struct.pack("<H", len(tags)) + b"".join(
        struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags
    )
    return b"II*\0\x08\0\0\0" + body + bytes(4)


def jpeg(width: int, height: int) -> bytes:
    data = saved(Image.fromarray(SOFT), "JPEG")
    at = data.index(b"\xff\xc0")
    return data[: at + 5] + struct.pack(">HH", height, width) + data[at + 9 :]


def icon(inner: bytes) -> bytes:
    """An ICO with one picture, of which it says that it is of 16 pixels."""
    return struct.pack("<HHHBBBBHHII", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(inner), 22) + inner


def avif(width: int, height: int) -> bytes:
    data = saved(Image.fromarray(SOFT), "AVIF")
    at = data.index(b"ispe") + 8
    return data[:at] + struct.pack(">II", width, height) + data[at + 8 :]


BIG = 50_000
BOMBS = {
    "jpeg": jpeg(BIG, BIG),
    "png": png(BIG, BIG, 1, 0, bytes(99)),
    "gif": b"GIF89a" + struct.pack("<HH", BIG, BIG) + b"\0\0\0," + struct.pack("<HHHH", 0, 0, BIG, BIG) + b"\0\2\0;",
    "tiff": tiff(BIG, BIG),
    "bmp": b"BM" + struct.pack("<IIIIiiHHIIiiII", 54, 0, 54, 40, BIG, BIG, 1, 24, 0, 0, 0, 0, 0, 0),
    "ppm": b"P6 50000 50000 255\n",
    "webp": b"RIFF\x1e\0\0\0WEBPVP8L\x11\0\0\0\x2f" + struct.pack("<I", 16_382 | 16_382 << 14) + bytes(12),
    "png, more than there can be": png(2**31 - 1, 2**31 - 1, 8, 2, b""),
    "png in an icon": icon(png(BIG, BIG, 1, 0, bytes(99))),
    "png in an icon, just within Pillow's limit": icon(png(12_000, 12_000, 1, 0, bytes(99))),
    "avif": avif(BIG, BIG),
    "jpeg 2000": b"\xff\x4f\xff\x51\x00\x29\x00\x00"
    + struct.pack(">8I", BIG, BIG, 0, 0, BIG, BIG, 0, 0)
    + b"\0\1\7\1\1",
}


@pytest.mark.parametrize("kind", BOMBS)
def test_enormous_pictures_are_refused_by_their_headers(kind: str) -> None:
    with pytest.raises(PoolError, match=r"is an image of|is not a readable image") as error:
        open_rgb(BOMBS[kind])
    told(error.value)


def test_the_limit_of_pixels_is_exact() -> None:
    assert PIXELS == 2**27
    data = saved(Image.fromarray(SOFT))
    assert off(np.asarray(open_rgb(data, limit=1200)), SOFT) == 0
    with pytest.raises(PoolError, match="is an image of 40 x 30 pixels"):
        open_rgb(data, limit=1199)


BOMB = zlib.compress(bytes(1 << 26), 1)


@pytest.mark.parametrize("chunk", ["iCCP", "zTXt", "iTXt"])
def test_notes_that_unpack_to_much_more_are_not_unpacked(chunk: str) -> None:
    head = {"iCCP": b"name\0\0", "zTXt": b"name\0\0", "iTXt": b"name\0\1\0\0\0"}[chunk]
    rows = b"".join(b"\0" + row.tobytes() for row in SOFT)
    data = png(40, 30, 8, 2, rows, (chunk.encode(), head + BOMB))
    tracemalloc.start()
    try:
        assert off(seen(data), SOFT) == 0
    except PoolError as error:
        told(error)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0",
        b"x" * 1000,
        b"<!DOCTYPE html><html>no such picture</html>",
        b'<svg xmlns="http://www.w3.org/2000/svg"/>',
        b"%PDF-1.4",
        b"P6 0 0 255\n",
        b"P6 9 0 255\n",
        b"Pf 1 1 -1.0\n\0\0\0\0",
        tiff(0, 0),
        jpeg(0, 0),
        jpeg(0, 30),
        png(0, 0, 8, 2, b""),
        b"GIF89a\0\0\0\0\0\0\0;",
    ],
)
def test_what_is_no_picture_is_refused(data: bytes) -> None:
    for read in (lambda: open_rgb(data), lambda: decode(data, 8), lambda: decode(data, 8, "squash")):
        with pytest.raises(PoolError) as error:
            read()
        assert "is not a readable image" in told(error.value) or "is an image" in told(error.value)


MANY = {
    "jpeg": saved(Image.fromarray(SOFT), "JPEG", quality=90),
    "progressive jpeg": saved(Image.fromarray(SOFT), "JPEG", quality=90, progressive=True),
    "png": saved(Image.fromarray(SOFT)),
    "png, palette": saved(Image.fromarray(SOFT).quantize(32)),
    "gif": saved(Image.fromarray(SOFT), "GIF"),
    "webp": saved(Image.fromarray(SOFT), "WEBP"),
    "webp, lossless": saved(Image.fromarray(SOFT), "WEBP", lossless=True),
    "webp, animated": saved(Image.fromarray(SOFT), "WEBP", save_all=True, append_images=[Image.new("RGB", (40, 30))]),
    "bmp": saved(Image.fromarray(SOFT), "BMP"),
    "tiff": saved(Image.fromarray(SOFT), "TIFF"),
    "tiff, deflated": saved(Image.fromarray(SOFT), "TIFF", compression="tiff_adobe_deflate"),
    "tiff, lzw": saved(Image.fromarray(SOFT), "TIFF", compression="tiff_lzw"),
    "tiff, jpeg": saved(Image.fromarray(SOFT), "TIFF", compression="jpeg"),
    "ppm": saved(Image.fromarray(SOFT), "PPM"),
    "avif": saved(Image.fromarray(SOFT), "AVIF"),
    "jpeg 2000": saved(Image.fromarray(SOFT), "JPEG2000"),
    "ico": saved(Image.fromarray(SOFT), "ICO", sizes=[(40, 30)]),
    "ico, bitmap": saved(Image.fromarray(SOFT), "ICO", sizes=[(40, 30)], bitmap_format="bmp"),
    "mpo": saved(Image.fromarray(SOFT), "MPO", save_all=True, append_images=[Image.new("RGB", (40, 30))]),
    "pgm of 16 bits": b"P5 20 15 65535\n" + SOFT[:15, :20].astype(">u2").tobytes()[:600],
}


@pytest.mark.parametrize("kind", MANY)
@pytest.mark.parametrize("draft", [None, 16])
def test_a_picture_cut_off_is_refused_or_whole(kind: str, draft: int | None) -> None:
    whole = np.asarray(open_rgb(MANY[kind], draft=draft))
    refused = 0
    for end in [*range(0, len(MANY[kind]), 10), len(MANY[kind]) - 1]:
        try:
            found = np.asarray(open_rgb(MANY[kind][:end], draft=draft))
        except PoolError as error:
            told(error)
            refused += 1
            continue
        assert off(found, whole) == 0, f"cut at byte {end} of {len(MANY[kind])}"
    assert refused > 10


@given(st.sampled_from(list(MANY)), st.data())
def test_mutated_pictures_are_read_or_refused(kind: str, draw: st.DataObject) -> None:
    data = bytearray(MANY[kind])
    for _ in range(draw.draw(st.integers(1, 5))):
        at = draw.draw(st.integers(0, min(len(data) - 1, 200)) | st.integers(0, len(data) - 1))
        data[at] = draw.draw(st.integers(0, 255))
    try:
        pixels = np.asarray(open_rgb(bytes(data), limit=1 << 20))
    except PoolError as error:
        told(error)
    else:
        assert pixels.ndim == 3
        assert pixels.dtype == np.uint8


# --- for training ---------------------------------------------------------------------------------


def test_the_middle_is_cut_out_or_all_is_squashed() -> None:
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = 200
    data = saved(Image.fromarray(wide))
    assert (decode(data, 10) == 200).all()
    squashed = decode(data, 10, "squash")
    assert squashed.shape == (10, 10, 3)
    assert (squashed[:, 0] < 20).all()
    assert (squashed[:, 5] > 180).all()


def test_a_picture_of_one_pixel_and_a_very_long_one() -> None:
    assert (decode(saved(Image.new("RGB", (1, 1), "red")), 16) == [255, 0, 0]).all()
    assert (decode(saved(Image.new("RGB", (20_000, 1), "red")), 16) == [255, 0, 0]).all()


def test_decoding_in_less_detail_is_close() -> None:
    large = picture(3, "JPEG", (400, 300), quality=95)
    exact = open_rgb(large).resize((32, 32), Image.Resampling.BICUBIC)
    assert np.abs(decode(large, 32, "squash").astype(int) - np.asarray(exact)).mean() < 3


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000", "ICO", "MPO"])
def test_kinds_by_their_first_bytes(kind: str) -> None:
    data = saved(Image.new("RGB", (3, 2)), kind)
    usual = {"JPEG": "jpg", "TIFF": "tif", "JPEG2000": "jp2", "MPO": "jpg"}
    assert kind_of(data) == usual.get(kind, kind.lower())
    assert kind_of(data[:64]) == kind_of(data)


@pytest.mark.parametrize("mode", ["1", "L", "RGB"])
def test_all_kinds_of_portable_maps(mode: str) -> None:
    data = saved(Image.fromarray(SOFT).convert(mode), "PPM")
    assert kind_of(data) == "ppm"
    assert off(seen(data), np.asarray(Image.fromarray(SOFT).convert(mode).convert("RGB"))) == 0


# --- kinds that need a package, or are not read -----------------------------------------------------


def box(brand: bytes, *more: bytes) -> bytes:
    """The beginning of a file of ISO's base media format."""
    return struct.pack(">I", 16 + 4 * len(more)) + b"ftyp" + brand + bytes(4) + b"".join(more) + bytes(40)


def dng(*tags: tuple[int, int, int]) -> bytes:
    """A thumbnail as a TIFF, with tags that say that the picture is elsewhere."""
    entries = sorted([(256, 4, 1), (257, 4, 1), (258, 3, 8), (259, 3, 1), (262, 3, 1), (273, 4, 8), (277, 3, 1),
                      (279, 4, 1), *tags])  # fmt: skip
    body = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in entries)
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + body + bytes(8)


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b"\xff\x0a" + bytes(40), "JPEG XL"),
        (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(40), "JPEG XL"),
        (b"8BPS\0\1" + bytes(40), "Photoshop"),
        (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "SVG"),
        (b'<?xml version="1.0"?>\n<!-- a drawing -->\n<svg/>', "SVG"),
        (b"II*\0\x10\0\0\0CR\2\0" + bytes(40), "camera raw"),
        (box(b"crx ", b"crx ", b"isom"), "camera raw"),
        (b"FUJIFILMCCD-RAW 0201" + bytes(40), "camera raw"),
        (dng((50706, 1, 0x0401)), "camera raw"),
        (dng((254, 4, 1), (330, 4, 8)), "camera raw"),
    ],
)
def test_kinds_that_are_not_read_are_named(data: bytes, name: str) -> None:
    with pytest.raises(PoolError, match=rf"is not a readable image \({name}: convert to JPEG or PNG\)"):
        open_rgb(data)


def test_kinds_that_are_not_copied_are_named() -> None:
    with pytest.raises(PoolError, match=r"is not in a supported image format \(JPEG XL: convert to JPEG or PNG\)"):
        kind_of(b"\xff\x0a" + bytes(40))
    with pytest.raises(PoolError, match="is not in a supported image format .it begins with"):
        kind_of(b"no picture")


def test_a_thumbnail_in_front_of_pages_is_a_picture() -> None:
    assert open_rgb(dng((254, 4, 1))).size == (1, 1)
    assert kind_of(dng()) == "tif"


@pytest.mark.parametrize("brand", [b"heic", b"heix", b"mif1", b"msf1", b"hevc"])
def test_heic_without_its_package_says_what_to_type(monkeypatch: pytest.MonkeyPatch, brand: bytes) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    data = box(brand, b"mif1", b"heic")
    assert kind_of(data) == "heic"
    with pytest.raises(PoolError, match=r"is not a readable image \(HEIC: type pip install pillow-heif\)"):
        open_rgb(data)


def test_avif_with_an_old_pillow_says_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    data = saved(Image.fromarray(SOFT), "AVIF")
    monkeypatch.delitem(features.modules, "avif")
    with pytest.raises(PoolError, match=r"is not a readable image \(AVIF: type pip install 'pillow>=11.3'\)"):
        open_rgb(data)


@pytest.mark.parametrize("brand", [b"avif", b"avis", b"mif1"])
def test_avif_in_all_its_brands(brand: bytes) -> None:
    assert kind_of(box(brand, b"mif1", b"avif")) == "avif"


def heic(image: Image.Image, **how: Any) -> bytes:
    import pillow_heif as package

    file = io.BytesIO()
    package.from_pillow(image).save(file, **how)
    return file.getvalue()


def test_heic_with_its_package() -> None:
    data = heic(Image.fromarray(SOFT), quality=95)
    assert kind_of(data) == "heic"
    assert np.abs(seen(data).astype(int) - SOFT).mean() < 6
    assert "HEIF" not in Image.OPEN, "the reader of a package became Pillow's for the whole process"
    large = picture(3, "PNG", (400, 300))
    data = heic(Image.open(io.BytesIO(large)), quality=95, thumbnails=[128])
    assert np.abs(decode(data, 32, "squash").astype(int) - decode(large, 32, "squash")).mean() < 3


def test_heic_cut_off_is_refused_or_whole() -> None:
    data = heic(Image.fromarray(SOFT), quality=95)
    whole, refused = seen(data), 0
    for end in range(0, len(data), 20):
        try:
            assert off(seen(data[:end]), whole) == 0
        except PoolError as error:
            told(error)
            refused += 1
    assert refused > 5


def test_enormous_heic_is_refused_by_its_header() -> None:
    data = heic(Image.fromarray(SOFT))
    at = data.index(b"ispe") + 8
    with pytest.raises(PoolError, match=r"is an image of|is not a readable image") as error:
        open_rgb(data[:at] + struct.pack(">II", BIG, BIG) + data[at + 8 :])
    told(error.value)


def test_no_ending_belongs_to_two_formats() -> None:
    endings = [ending for one in FORMATS for ending in one.endings]
    assert len(set(endings)) == len(endings) == len(ENDINGS)
    assert ENDINGS[:2] == ("jpg", "jpeg")
    assert all(ending == ending.lower() for ending in ENDINGS)


def test_a_decoder_without_memory_is_not_a_damaged_image(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(self: Any) -> None:
        raise OSError("out of memory error when reading image file")  # what Pillow raises for its status -9

    data = saved(Image.new("RGB", (8, 8)))
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", load)
    with pytest.raises(MemoryError):
        open_rgb(data)
