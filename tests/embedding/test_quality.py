"""Quality columns: each as a slow loop computes it, the same for any workers and after an interruption."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import numpy as np
import pytest
import scipy.fft
from PIL import Image, ImageDraw, ImageFont

from tests.embedding.raw import files, parquet, picture, tars
from tests.embedding.test_pipeline import TOY, digests, rows_of, vectors
from thresher import PoolError, UsageError, build, open_store, run_steps
from thresher.data import DataOptions
from thresher.embedding.pipeline import embed
from thresher.embedding.quality import QUALITY, measured, perceptual_hash, sharpness, text_area
from thresher.errors import MissingExtraError
from thresher.io.pictures import open_rgb

ALL = ",".join(name for name in QUALITY if name != "text_area")


def phash_of(image: Image.Image) -> str:
    """The hash as it is usually published, with SciPy's transform."""
    small = np.asarray(image.convert("L").resize((32, 32), Image.Resampling.LANCZOS), np.float64)
    low = scipy.fft.dctn(small, type=2)[:8, :8]
    bits = "".join("1" if value > np.median(low) else "0" for value in low.flat)
    return f"{int(bits, 2):016x}"


def sharpness_of(image: Image.Image) -> float:
    pixels = np.asarray(image.convert("L")).astype(int).tolist()
    found = [
        pixels[y - 1][x] + pixels[y + 1][x] + pixels[y][x - 1] + pixels[y][x + 1] - 4 * pixels[y][x]
        for y in range(1, len(pixels) - 1)
        for x in range(1, len(pixels[0]) - 1)
    ]
    return float(np.var(found))


def expected(i: int) -> dict[str, object]:
    image = open_rgb(picture(i))
    return {
        "sha256": hashlib.sha256(picture(i)).hexdigest(),
        "phash": phash_of(image),
        "sharpness": sharpness_of(image),
        "brightness": float(np.mean(np.asarray(image.convert("L")) / 255)),
    }


@pytest.mark.parametrize(
    ("layout", "workers"),
    [
        *((layout, 0) for layout in ("tars", "parquet", "folder")),
        ("tars", 2),
        *(pytest.param(layout, 2, marks=pytest.mark.slow) for layout in ("parquet", "folder")),
    ],
)
def test_every_row_has_the_values_of_its_image(tmp_path: Path, layout: str, workers: int) -> None:
    made = {"tars": tars, "folder": files, "parquet": lambda folder, rows: parquet(folder / "rows.parquet", rows)}
    (tmp_path / "data").mkdir()
    data = made[layout](tmp_path / "data", 23)
    how = dataclasses.replace(TOY, quality=ALL, workers=workers, data=DataOptions(per_part=10))
    embed(str(data), tmp_path / "pool", how)
    rows = rows_of(tmp_path / "pool")
    assert len(rows) == 23
    for i, row in enumerate(rows):
        for name, value in expected(i).items():
            assert row[name] == (pytest.approx(value, rel=1e-6) if isinstance(value, float) else value), (i, name)


def test_an_interrupted_pool_ends_with_the_same_bytes(tmp_path: Path) -> None:
    data = parquet(tmp_path / "rows.parquet", 30)
    how = dataclasses.replace(TOY, quality="phash,sharpness", data=DataOptions(per_part=10))
    embed(str(data), tmp_path / "pool", how)
    before = digests(tmp_path / "pool")
    for path in (tmp_path / "pool").glob("*/*_00001.*"):
        path.unlink()
    for other in (None, "phash", ALL):
        with pytest.raises(UsageError, match="columns"):
            embed(str(data), tmp_path / "pool", dataclasses.replace(how, quality=other))
    assert embed(str(data), tmp_path / "pool", how).new == 10
    assert digests(tmp_path / "pool") == before
    assert open_store(str(tmp_path / "pool")).columns[:7] == (
        *("key", "text", "width", "height", "phash", "sharpness", "shard"),
    )


def test_dedup_finds_copies_by_the_columns(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    rng = np.random.default_rng(0)
    for i in range(6):
        coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8)).resize((240, 240), Image.Resampling.BICUBIC)
        coarse.save(tmp_path / "data" / f"{i}-a.png")
        coarse.resize((120, 120)).save(tmp_path / "data" / f"{i}-b.jpg", quality=70)
        (tmp_path / "data" / f"{i}-c.png").write_bytes((tmp_path / "data" / f"{i}-a.png").read_bytes())
    embed(str(tmp_path / "data"), tmp_path / "pool", dataclasses.replace(TOY, only="image", quality="sha256,phash"))
    store = open_store(str(tmp_path / "pool"))

    def kept(**given: object) -> list[int]:
        return run_steps(store, [build("dedup", given)]).rows().tolist()

    assert kept() == [row for row in range(18) if row % 3 < 2]
    assert kept(by="phash") == list(range(0, 18, 3))
    assert kept(by="phash", prefer="width") == list(range(0, 18, 3))


def test_images_of_one_colour() -> None:
    for colour in ((0, 0, 0), (7, 7, 7), (255, 255, 255), (13, 200, 90)):
        grey = Image.new("RGB", (50, 31), colour).convert("L")
        assert perceptual_hash(grey) == ("0" * 16 if colour == (0, 0, 0) else "8" + "0" * 15)
        assert sharpness(grey) == 0


@pytest.mark.parametrize(
    "size", [(1, 1), *(pytest.param(size, marks=pytest.mark.slow) for size in ((2, 9), (9, 2), (3, 3), (1, 150)))]
)
def test_small_and_narrow_images(size: tuple[int, int]) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), np.uint8))
    values = measured(tuple(QUALITY), b"x", image)
    assert len(values["phash"]) == 16
    assert values["sharpness"] == (pytest.approx(sharpness_of(image)) if min(size) > 2 else 0)


def test_sharpness_of_a_large_image_is_that_of_its_small_copy() -> None:
    small = Image.fromarray(np.random.default_rng(0).integers(0, 256, (256, 512), np.uint8))
    large = small.resize((2048, 1024), Image.Resampling.NEAREST)
    assert sharpness(large) == sharpness(small) == pytest.approx(sharpness_of(small))


@pytest.mark.parametrize(
    ("quality", "said"),
    [
        (
            "sharpnes",
            "there are sha256, phash, sharpness, brightness, text_area, and NAME=HEAD.npy. Did you mean 'sharpness'",
        ),
        ("", "there are sha256"),
        ("phash,,sha256", "there are sha256"),
        ("phash, phash", "twice"),
        ("text-area,text_area", "twice"),
        ("phash=head.npy", "give NAME=HEAD.npy"),
        ("my score=head.npy", "give NAME=HEAD.npy"),
        ("score=", "give NAME=HEAD.npy"),
        ("score=a.npy,score=b.npy", "twice"),
    ],
)
def test_names_that_there_are_not(quality: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        dataclasses.replace(TOY, quality=quality)


def test_what_cannot_be_computed(tmp_path: Path) -> None:
    data = parquet(tmp_path / "rows.parquet", 5)
    with pytest.raises(UsageError, match="computed from images"):
        embed(str(data), tmp_path / "pool", dataclasses.replace(TOY, only="text", quality="phash"))
    assert not (tmp_path / "pool").exists()


def test_a_column_that_the_data_has_is_not_replaced(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    path = parquet(tmp_path / "rows.parquet", 5)
    made = pq.read_table(path)
    pq.write_table(made.append_column("sha256", made["key"]), path)
    with pytest.raises(UsageError, match="has a column sha256 already; leave it out"):
        embed(str(path), tmp_path / "pool", dataclasses.replace(TOY, quality="phash,sha256"))
    embed(str(path), tmp_path / "pool", dataclasses.replace(TOY, quality="phash"))
    assert rows_of(tmp_path / "pool")[0]["sha256"] == "000000"


def words(size: int, count: int) -> Image.Image:
    """Lines of text on a plain image."""
    image = Image.new("RGB", (640, 480), (250, 250, 245))
    draw = ImageDraw.Draw(image)
    for line in range(count):
        draw.text((30, 20 + line * (size + 20)), "Summer sale: half price", font=ImageFont.load_default(size), fill=0)
    return image


def test_text_area_is_the_share_of_the_image_that_is_text() -> None:
    one, three = text_area(words(48, 1)), text_area(words(48, 3))
    left, top, right, bottom = ImageDraw.Draw(words(48, 0)).textbbox(
        (30, 20), "Summer sale: half price", font=ImageFont.load_default(48)
    )
    assert one == pytest.approx((right - left) * (bottom - top) / (640 * 480), rel=0.35)
    assert three == pytest.approx(3 * one, rel=0.1)
    assert text_area(words(48, 0)) == 0
    # A copy of twice the size has about the same share.
    assert text_area(words(48, 3).resize((1280, 960))) == pytest.approx(three, rel=0.1)


@pytest.mark.slow
def test_text_area_is_computed_by_workers_too(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for name, lines in (("a", 3), ("b", 0)):
        words(48, lines).save(tmp_path / "data" / f"{name}.png")
    for workers in (0, 1):
        how = dataclasses.replace(TOY, only="image", quality="text-area", workers=workers)
        embed(str(tmp_path / "data"), tmp_path / f"pool-{workers}", how)
    assert digests(tmp_path / "pool-0") == digests(tmp_path / "pool-1")
    found = [row["text_area"] for row in rows_of(tmp_path / "pool-0")]
    assert found == [pytest.approx(text_area(words(48, 3))), 0]


def test_text_area_needs_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("thresher.embedding.quality.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"\[ocr\]"):
        dataclasses.replace(TOY, quality="text-area")


@pytest.mark.parametrize("bias", [False, True])
def test_a_head_scores_the_stored_vectors(tmp_path: Path, bias: bool) -> None:
    data, dimension = parquet(tmp_path / "rows.parquet", 30), 24
    weights = np.random.default_rng(0).standard_normal(dimension + bias).astype(np.float32)
    np.save(tmp_path / "head.npy", weights)
    how = dataclasses.replace(TOY, quality=f"phash,aesthetic={tmp_path}/head.npy", data=DataOptions(per_part=10))
    embed(str(data), tmp_path / "pool", how)
    stored = vectors(tmp_path / "pool")["img_emb"].astype(np.float64)
    found = [row["aesthetic"] for row in rows_of(tmp_path / "pool")]
    for vector, score in zip(stored, found, strict=True):
        unit = vector / np.sqrt(sum(value * value for value in vector))
        slow = sum(float(a) * float(b) for a, b in zip(unit, weights[:dimension], strict=True))
        assert score == pytest.approx(slow + (float(weights[-1]) if bias else 0.0), rel=1e-6)
    # Another head does not continue the same pool.
    for path in (tmp_path / "pool").glob("*/*_00001.*"):
        path.unlink()
    before = digests(tmp_path / "pool")
    np.save(tmp_path / "head.npy", weights * 2)
    with pytest.raises(UsageError, match="heads"):
        embed(str(data), tmp_path / "pool", how)
    assert digests(tmp_path / "pool") == before


@pytest.mark.parametrize(
    ("head", "error", "said"),
    [
        (np.zeros(5), UsageError, "has 5 values, and images have 24 dimensions"),
        (np.zeros((3, 3)), UsageError, "give D floats"),
        (np.zeros(24, np.int64), UsageError, "give D floats"),
        (np.full(24, np.nan), UsageError, "NaN or infinite"),
        (b"x", PoolError, "cannot be read"),
        (None, PoolError, "there is no such file"),
    ],
)
def test_a_head_that_does_not_fit(tmp_path: Path, head: object, error: type[Exception], said: str) -> None:
    path = tmp_path / "head.npy"
    if isinstance(head, bytes):
        path.write_bytes(head)
    elif head is not None:
        np.save(path, head)
    data = parquet(tmp_path / "rows.parquet", 5)
    with pytest.raises(error, match=said):
        embed(str(data), tmp_path / "pool", dataclasses.replace(TOY, quality=f"score={path}"))
    assert not (tmp_path / "pool").exists()
