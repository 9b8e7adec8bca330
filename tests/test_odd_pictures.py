"""Odd pictures are the same to embed, doctor, reports and trainers: as a person sees them, or damaged."""

from __future__ import annotations

import io
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.toy import Toy, preprocess
from thresher.check.data import doctor
from thresher.cli.main import main
from thresher.embedding.pipeline import EmbedSettings, embed
from thresher.io.pictures import open_rgb
from thresher.runtime.progress import Silent
from thresher.train.data import open_pairs

SIDE = 16
UPPER = np.arange(SIDE)[:, None] < SIDE // 2
FLAG = np.where(UPPER[..., None], np.uint8([200, 40, 40]), np.uint8([40, 40, 200])).repeat(SIDE, 1)  # red above blue
WHITE = np.where(UPPER[..., None], FLAG, np.uint8(255))


def saved(image: Image.Image, kind: str, **how: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **how)
    return file.getvalue()


def flag(kind: str = "PNG", mode: str = "RGB", **how: Any) -> bytes:
    return saved(Image.fromarray(FLAG).convert(mode), kind, **how)


def turned(kind: str, **how: Any) -> bytes:
    """Stored upside down, with the orientation that says so."""
    exif = Image.Exif()
    exif[0x0112] = 3
    return saved(Image.fromarray(FLAG[::-1, ::-1].copy()), kind, exif=exif, **how)


def deep() -> bytes:
    """A PNG with 16 bits for each colour."""
    rows = b"".join(b"\0" + row.tobytes() for row in (FLAG.astype(">u2") * 257).reshape(SIDE, -1))
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", SIDE, SIDE, 16, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )


def clear(kind: str, mode: str) -> bytes:
    """The lower half is transparent."""
    image = Image.fromarray(np.dstack([FLAG, np.where(UPPER, 255, 0).repeat(SIDE, 1).astype(np.uint8)]))
    if mode == "P":
        few = Image.fromarray(FLAG).quantize(4)
        return saved(few, kind, transparency=few.getpixel((0, SIDE - 1)))
    return saved(image, kind)


def bomb() -> bytes:
    data = flag("BMP")
    return data[:18] + struct.pack("<ii", 20_000, 20_000) + data[26:]


LATER = [Image.new("RGB", (SIDE, SIDE), "lime")]
GOOD: dict[str, tuple[bytes, np.ndarray]] = {
    "plain.png": (flag(), FLAG),
    "animated.png": (flag(save_all=True, append_images=LATER), FLAG),
    "animated.gif": (flag("GIF", save_all=True, append_images=LATER), FLAG),
    "animated.webp": (flag("WEBP", lossless=True, save_all=True, append_images=LATER), FLAG),
    "pages.tiff": (flag("TIFF", save_all=True, append_images=LATER), FLAG),
    "phone.jpg": (flag("MPO", save_all=True, append_images=LATER, quality=95, subsampling=0), FLAG),
    "print.jpg": (flag("JPEG", "CMYK", quality=95, subsampling=0), FLAG),
    "progressive.JPEG": (flag("JPEG", progressive=True, quality=95, subsampling=0), FLAG),
    "deep.png": (deep(), FLAG),
    "palette.png": (clear("PNG", "P"), WHITE),
    "palette.gif": (clear("GIF", "P"), WHITE),
    "clear.webp": (saved(Image.open(io.BytesIO(clear("PNG", "RGBA"))), "WEBP", lossless=True), WHITE),
    "clear.tif": (clear("TIFF", "RGBA"), WHITE),
    "turned.jpg": (turned("JPEG", quality=95, subsampling=0), FLAG),
    "turned.png": (turned("PNG"), FLAG),
    "turned.webp": (turned("WEBP", lossless=True), FLAG),
    "turned.tif": (turned("TIFF"), FLAG),
    "small.ico": (flag("ICO", sizes=[(SIDE, SIDE)]), FLAG),
    "film.jp2": (flag("JPEG2000"), FLAG),
    "new.avif": (flag("AVIF", quality=100, subsampling="4:4:4"), FLAG),
    "liar.png": (flag("BMP"), FLAG),
    "IMG_0001": (flag("JPEG", quality=95, subsampling=0), FLAG),
    "one.png": (saved(Image.new("RGB", (1, 1), (200, 40, 40)), "PNG"), np.uint8([[[200, 40, 40]]])),
}
BAD = {
    "empty.jpg": b"",
    "cut.jpg": flag("JPEG")[:-40],
    "cut.png": flag()[:-30],
    "bomb.bmp": bomb(),
    "page.jpg": b"<!DOCTYPE html><html>not found</html>",
    "new.jxl": b"\xff\x0a" + bytes(30),
    "camera.cr2": b"II*\0\x10\0\0\0CR\2\0" + bytes(30),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    top = tmp_path_factory.mktemp("odd") / "pictures"
    top.mkdir()
    for name, data in {**{name: data for name, (data, _) in GOOD.items()}, **BAD}.items():
        (top / name).write_bytes(data)
        (top / f"{name}.txt").write_text(f"a picture called {name}")
    return top


def close(found: np.ndarray, expected: np.ndarray) -> bool:
    return found.shape == expected.shape and np.abs(found.astype(int) - expected).max() <= 24


@pytest.mark.parametrize("name", GOOD)
def test_each_is_seen_as_it_is(name: str) -> None:
    data, expected = GOOD[name]
    assert close(np.asarray(open_rgb(data)), expected)


def test_all_paths_agree(folder: Path, tmp_path: Path) -> None:
    names = {path.name for path in folder.iterdir() if not path.name.endswith(".txt")}
    assert names == {*GOOD, *BAD}
    seen = doctor(str(folder))
    assert (seen["pictures"]["looked_at"], seen["pictures"]["broken"] + seen["pictures"]["enormous"]) == (30, len(BAD))
    note = "2 images in a format that cannot be read (.cr2 1, .jxl 1): convert to JPEG or PNG"
    assert note in seen["warnings"]

    pool = tmp_path / "pool"
    settings = EmbedSettings(encoder="tests.toy:Toy", workers=0, thumbnails=SIDE)
    result = embed(str(folder), str(pool), settings)
    assert note in result.notes
    table = pq.read_table(pool / "metadata" / "metadata_00000.parquet").to_pylist()
    paths = {Path(row["filepath"]).name: row for row in table}
    assert paths.keys() == GOOD.keys()
    assert (result.rows, result.skipped) == (len(GOOD), len(BAD))

    pairs = open_pairs(str(folder), tmp_path, side=SIDE, resize="squash", captions=True, progress=Silent())
    assert len(pairs.skipped) == len(BAD)

    vectors = np.load(pool / "img_emb" / "img_emb_00000.npy").astype(np.float32)
    by_name = {Path(row["filepath"]).name: vector for row, vector in zip(table, vectors, strict=True)}
    order = [name for name in (Path(path).name for _, path in pairs.files) if name in GOOD]
    trained = dict(zip(order, pairs.pixels_NHWC, strict=True))
    for name, (data, expected) in GOOD.items():
        picture = open_rgb(data)
        assert (paths[name]["width"], paths[name]["height"]) == picture.size
        assert np.allclose(by_name[name], Toy().encode_images(preprocess(picture)[None])[0], atol=0.01, rtol=0.01)
        small = np.asarray(Image.open(io.BytesIO(paths[name]["thumbnail"]["bytes"])).convert("RGB"))
        assert small.shape == expected.shape
        assert np.abs(small.astype(int) - expected).mean() < 16
        whole = expected if len(expected) > 1 else np.broadcast_to(expected, (SIDE, SIDE, 3))
        assert close(trained[name], whole), name


def test_the_command_line_tells_of_what_is_not_read(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "film.mp4").write_bytes(b"x")
    pool, out, shards = (str(tmp_path / name) for name in ("pool", "sel", "shards"))
    told = "not read: 1 file (.mp4 1)"
    assert main(["doctor", str(folder)]) == 0
    assert told in capsys.readouterr().out
    assert main(["embed", str(folder), "-o", pool, "--encoder", "tests.toy:Toy", "--workers", "0", "--quiet"]) == 0
    assert told in capsys.readouterr().out
    assert main(["select", "random", pool, "-o", out, "--keep", "5"]) == 0
    capsys.readouterr()
    for _ in range(2):  # written, and found to be written
        assert main(["reshard", str(folder), out, "-o", shards, "--quiet"]) == 0
        assert told in capsys.readouterr().out
    assert "notes" not in json.loads((tmp_path / "shards" / "reshard.json").read_text())

    class Told(Silent):
        lines: list[str] = []  # noqa: RUF012

        def say(self, line: str) -> None:
            self.lines.append(line)

    open_pairs(str(folder), tmp_path, side=SIDE, resize="squash", captions=True, progress=Told())
    assert told in Told.lines
