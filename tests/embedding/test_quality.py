"""Quality columns: each as a slow loop computes it, the same for any workers and after an interruption."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import numpy as np
import pytest
import scipy.fft
from PIL import Image

from tests.embedding.raw import files, parquet, picture, tars
from tests.embedding.test_pipeline import TOY, digests, rows_of
from thresher import UsageError, build, open_store, run_steps
from thresher.data import DataOptions
from thresher.embedding.pipeline import embed
from thresher.embedding.quality import QUALITY, measured, perceptual_hash, sharpness
from thresher.io.pictures import open_rgb

ALL = ",".join(QUALITY)


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


@pytest.mark.parametrize("layout", ["tars", "parquet", "folder"])
@pytest.mark.parametrize("workers", [0, 2])
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


@pytest.mark.parametrize("size", [(1, 1), (2, 9), (9, 2), (3, 3), (1, 150)])
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
        ("sharpnes", "there are sha256, phash, sharpness, brightness. Did you mean 'sharpness'"),
        ("", "there are sha256"),
        ("phash,,sha256", "there are sha256"),
        ("phash, phash", "twice"),
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
