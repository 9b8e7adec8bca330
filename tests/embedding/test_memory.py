"""``thresher.embed`` of data in memory: the vectors that embedding the same files gives."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
from PIL import Image

import thresher as th

N = 20
HOW: dict[str, Any] = {"encoder": "tests.toy:Toy", "workers": 0, "progress": False}


@pytest.fixture(scope="module")
def images() -> list[Any]:
    rng = np.random.default_rng(0)
    made = [Image.fromarray(rng.integers(0, 255, (20 + i, 24, 3), dtype=np.uint8)) for i in range(N)]
    made[1] = made[1].convert("L")
    made[2] = made[2].convert("P")
    made[3] = made[3].convert("RGBA")
    made[4].getexif()[274] = 6  # turned by its orientation
    return made


CAPTIONS = [f"caption {i}" for i in range(N)]


@pytest.fixture(scope="module")
def disk(images: list[Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, th.EmbeddingStore]:
    folder = tmp_path_factory.mktemp("disk") / "images"
    folder.mkdir()
    for i, image in enumerate(images):
        image.save(folder / f"{i:03}.png", exif=image.getexif())
        (folder / f"{i:03}.txt").write_text(CAPTIONS[i])
    return folder, th.embed(folder, folder.parent / "pool", **HOW)


def vectors(store: th.EmbeddingStore, name: str) -> np.ndarray:
    return np.concatenate([np.array(store.raw(name, block)) for block in store.blocks(name)])


def given(kind: str, images: list[Any], folder: Path) -> tuple[Any, dict[str, Any]]:
    paths = [folder / f"{i:03}.png" for i in range(N)]
    if kind == "pairs":
        return list(zip(images, CAPTIONS, strict=True)), {}
    if kind == "dictionaries":
        return [{"image": image, "text": text, "id": f"id{i}"} for i, (image, text) in enumerate(zip(images, CAPTIONS, strict=True))], {}  # noqa: E501  # fmt: skip
    if kind == "paths":
        return paths, {"captions": CAPTIONS}
    if kind == "series":  # in another order of labels
        return pandas.Series(images, index=range(N)[::-1]), {"captions": pandas.Series(CAPTIONS, index=range(N)[::-1])}
    if kind == "bytes":
        return [path.read_bytes() for path in paths], {"captions": CAPTIONS}
    if kind.startswith("datasets"):
        import datasets as hf

        columns = {"image": list(map(str, paths)), "text": CAPTIONS, "n": list(range(N)), "id": list(range(N))}
        made = hf.Dataset.from_dict(columns).cast_column("image", hf.Image())
        return made.with_format("torch") if kind == "datasets of tensors" else made, {}
    return images, {"captions": CAPTIONS}


@pytest.mark.parametrize(
    "kind", ["images", "pairs", "dictionaries", "paths", "series", "bytes", "datasets", "datasets of tensors"]
)
def test_the_vectors_are_those_of_the_same_files(kind: str, images: list[Any], disk: Any) -> None:
    folder, expected = disk
    data, more = given(kind, images, folder)
    store = th.embed(data, **HOW, **more)
    assert store.layout.location.startswith("arrays://")
    for name in ("image", "text"):
        np.testing.assert_array_equal(vectors(store, name), vectors(expected, name))
    ids = {"dictionaries": [f"id{i}" for i in range(N)]}.get(kind, [str(i) for i in range(N)])
    assert [key for _, keys in store.keys() for key in keys] == ids
    assert store.layout.caption == "text"
    assert store.layout.pictures is not None
    shown = Image.open(io.BytesIO(store.layout.pictures(5)))
    assert np.array_equal(np.asarray(shown.convert("RGB")), np.asarray(images[5]))
    if kind.startswith("datasets"):
        assert store.column("n").tolist() == list(range(N))


def test_a_pool_on_disk_is_finished_by_the_same_call(images: list[Any], disk: Any, tmp_path: Path) -> None:
    store = th.embed(images, tmp_path / "pool", captions=CAPTIONS, **HOW)
    assert store.layout.location == str(tmp_path / "pool")
    np.testing.assert_array_equal(vectors(store, "image"), vectors(disk[1], "image"))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "pool").rglob("*.npy")}
    again = th.embed(list(images), tmp_path / "pool", captions=CAPTIONS, **HOW)
    assert again.fingerprint() == store.fingerprint()
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "pool").rglob("*.npy")}


def test_images_that_cannot_be_used_are_listed(images: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    store = th.embed([images[0], b"nothing", None, images[5]], **{**HOW, "progress": True})
    assert [key for _, keys in store.keys() for key in keys] == ["0", "3"]
    assert [(one.path, one.why) for one in sorted(store.layout.skipped, key=lambda one: one.path)] == [
        ("sample 1, key 1", "is not a readable image (unsupported format)"),
        ("sample 2, key 2", "has no image"),
    ]
    assert "2 samples cannot be used and have no row" in capsys.readouterr().err
    shown = Image.open(io.BytesIO(store.layout.pictures(1)))  # type: ignore[misc]
    assert shown.size == images[5].size


@pytest.mark.parametrize(
    ("data", "more", "said"),
    [
        ([], {}, "there are no samples"),
        (3, {}, "cannot embed int; give a path or URL"),
        ({"image": []}, {}, "cannot embed dict"),
        (pandas.DataFrame({"image": [b"x"]}), {}, "cannot embed a DataFrame; give its rows as dictionaries"),
        ([3], {}, "the image of sample 0 is int"),
        ([(1, 2, 3)], {}, "the first sample has 3 parts"),
        ([b"x"], {"captions": ["a", "b"]}, "2 captions for 1 images"),
        ([{"n": 1}], {}, "no column of images; there are n"),
        ("somewhere", {"captions": ["a"]}, "captions= is for images in a list"),
        ([b"x"], {"encoded": 1}, "embed has no option 'encoded'"),
    ],
)
def test_what_cannot_be_embedded_is_named(data: Any, more: dict[str, Any], said: str) -> None:
    with pytest.raises(th.UsageError, match=said):
        th.embed(data, **HOW, **more)
    with pytest.raises(th.PoolError, match=r"no/such.png: the image of sample 0 cannot be read"):
        th.embed(["no/such.png"], **HOW)
