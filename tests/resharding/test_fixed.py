"""Samples that open_clip leaves out, written so that it trains on them."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.kills import forked
from tests.loaded import loaded
from thresher.check.data import doctor
from thresher.cli.main import main
from thresher.data import open_data
from thresher.errors import OutputError, PoolError, UsageError
from thresher.io.pictures import open_rgb
from thresher.resharding import job, reshard

from .common import hashes, keys_file, listed, picture, plain, pool, tar

pytestmark = pytest.mark.filterwarnings("ignore")  # webdataset's own


def image(number: int, kind: str, mode: str = "RGB", **more: object) -> bytes:
    """An image with many colours."""
    pixels = np.random.default_rng(number).integers(0, 256, (9, 12, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(out, kind, **more)
    return out.getvalue()


def animation() -> bytes:
    frames = [Image.new("RGB", (6, 5), colour) for colour in ("red", "blue")]
    out = io.BytesIO()
    frames[0].save(out, "GIF", save_all=True, append_images=frames[1:])
    return out.getvalue()


def clear() -> bytes:
    """A GIF with a transparent corner."""
    made = Image.new("P", (4, 4), 1)
    made.putpalette([0, 0, 0, 255, 0, 0])
    made.putpixel((0, 0), 0)
    out = io.BytesIO()
    made.save(out, "GIF", transparency=0)
    return out.getvalue()


TEXT = {"txt": b"a text"}
META = {"json": json.dumps({"caption": "of the json", "uid": "0" * 32}).encode()}
JPG = image(1, "JPEG")
# key: the members, what they become ("" for the same), and whether the image is converted
FIXED: Mapping[str, tuple[dict[str, bytes], dict[str, bytes | None]]] = {
    "caption in json": ({"jpg": JPG, **META}, {"jpg": JPG, **META, "txt": b"of the json"}),
    "json first": ({**META, "jpg": JPG}, {**META, "jpg": JPG, "txt": b"of the json"}),
    "text": ({"jpg": JPG, "text": b"other"}, {"jpg": JPG, "text": b"other", "txt": b"other"}),
    "gif": ({"gif": image(2, "GIF"), **TEXT}, {"png": None, **TEXT}),
    "animation": ({"gif": animation(), **META}, {"png": None, **META, "txt": b"of the json"}),
    "clear": ({"gif": clear(), **TEXT}, {"png": None, **TEXT}),
    "bmp": ({**TEXT, "BMP": image(3, "BMP")}, {**TEXT, "png": None}),
    "tif": ({"tif": image(4, "TIFF", compression="tiff_lzw"), **TEXT}, {"png": None, **TEXT}),
    "tiff": ({"tiff": image(4, "TIFF", "L"), **TEXT}, {"png": None, **TEXT}),
    "ppm": ({"ppm": image(4, "PPM"), **TEXT}, {"png": None, **TEXT}),
    "jfif": ({"jfif": JPG, **TEXT}, {"jpg": JPG, **TEXT}),
    "wrong ending": ({"gif": image(5, "WEBP"), **TEXT}, {"webp": image(5, "WEBP"), **TEXT}),
    "latin-1": ({"jpg": JPG, "txt": "café".encode("latin-1")}, {"jpg": JPG, "txt": "caf�".encode()}),
}
SAME: Mapping[str, dict[str, bytes]] = {
    "jpg": {"jpg": JPG, **TEXT},
    "upper": {"JPG": JPG, "TXT": b"a text"},
    "jpeg": {"jpeg": JPG, **TEXT, **META},
    "webp": {"webp": image(6, "WEBP"), **TEXT},
    "png named jpg": {"jpg": image(7, "PNG"), **TEXT},
    "gif named jpg": {"jpg": image(7, "GIF"), **TEXT},
    "also a gif": {"gif": image(7, "GIF"), "png": image(7, "PNG"), **TEXT},
    "cut off": {"jpg": JPG[:200], **TEXT},
}
SKIPPED: Mapping[str, tuple[dict[str, bytes], str]] = {
    "no caption": ({"jpg": JPG}, "has no caption"),
    "no image": ({**TEXT, **META}, "has no image"),
    "damaged gif": ({"gif": image(8, "GIF")[:40], **TEXT}, "is not a readable image"),
    "no gif": ({"gif": b"<svg/>", **TEXT}, "is not in a supported image format"),
    "bad json": ({"jpg": JPG, **TEXT, "json": b"{"}, "has a .json that webdataset cannot decode"),
}
ALL = {
    **{key: one[0] for key, one in FIXED.items()}, **SAME, **{key: one[0] for key, one in SKIPPED.items()},
}  # fmt: skip


def named(key: str) -> str:
    return key.replace(" ", "_")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Three tars with all samples, some of them apart from one another."""
    rows = [(named(key), contents) for key, contents in ALL.items()]
    for number in range(3):
        tar(tmp_path / "in" / f"{number}.tar", rows[number::3])
    return tmp_path / "in"


def keys(folder: Path, *names: str) -> str:
    return keys_file(folder / "k", map(named, names or ALL))


def members_of(folder: Path) -> dict[str, dict[str, bytes]]:
    found: dict[str, dict[str, bytes]] = {}
    for name, content in listed(folder):
        key, _, ending = name.partition(".")
        found.setdefault(key, {})[ending] = content
    return found


@pytest.mark.parametrize("shuffle", [None, 5])
@pytest.mark.parametrize("workers", [1, 2])
def test_every_sample_trains_or_is_listed(data: Path, tmp_path: Path, shuffle: int | None, workers: int) -> None:
    out = tmp_path / "out"
    done = reshard(
        str(data), keys(tmp_path), str(out), per_shard=4, trainable=True, shuffle=shuffle, workers=workers
    )  # fmt: skip
    found = members_of(out)
    for key, contents in SAME.items():
        assert list(found.pop(named(key)).items()) == list(contents.items())
    for key, (before, after) in FIXED.items():
        one = found.pop(named(key))
        assert list(one) == list(after), key
        assert all(one[ending] == content for ending, content in after.items() if content is not None)
        if None in after.values():
            stored = next(content for ending, content in before.items() if ending not in ("txt", "json"))
            shown = Image.open(io.BytesIO(one["png"]))
            assert (shown.format, shown.mode) == ("PNG", "RGB")
            assert np.array_equal(np.asarray(shown), np.asarray(open_rgb(stored)))
    assert not found
    lines = [line.split("\t") for line in (out / "set-aside.txt").read_text().splitlines()]
    assert {key: path for path, key, _ in lines} == {
        named(key): str(data / f"{list(ALL).index(key) % 3}.tar") for key in SKIPPED
    }
    for _, key, why in lines:
        assert why.startswith(next(expected for name, (_, expected) in SKIPPED.items() if named(name) == key))
    converted = sum(None in after.values() for _, after in FIXED.values())
    assert (done.samples, done.aside, done.missing) == (len(FIXED) + len(SAME), len(SKIPPED), 0)
    assert (done.converted, done.renamed, done.captioned, done.blank, done.left_out) == (converted, 2, 5, 0, {})
    assert sum(json.loads((out / "sizes.json").read_text()).values()) == done.samples
    assert not (out / ".reshard").exists()
    trained = {key: text for key, _, text in loaded(sorted(out.glob("*.tar")))}
    assert set(trained) == {named(key) for key in (*FIXED, *SAME)} - {"cut_off"}
    assert trained["caption_in_json"] == "of the json"
    about = doctor(str(out))["open_clip"]
    assert about == {"trained": done.samples, "left_out": {}}


def test_repeats_keep_their_names(data: Path, tmp_path: Path) -> None:
    sel = keys(tmp_path, "gif", "gif", "gif", "jpg", "jpg", "no caption", "no caption", "caption in json")
    done = reshard(str(data), sel, str(tmp_path / "out"), trainable=True)
    found = members_of(tmp_path / "out")
    assert set(found) == {"gif", "gif-1", "gif-2", "jpg", "jpg-1", "caption_in_json"}
    assert found["gif"] == found["gif-1"] == found["gif-2"]
    assert set(found["gif-2"]) == {"png", "txt"}
    assert (done.samples, done.aside, done.converted, done.captioned) == (6, 1, 3, 1)


def test_samples_found_by_place(tmp_path: Path) -> None:
    """Two samples with one key, in two tars; only one of them has to be changed."""
    tar(tmp_path / "in" / "0.tar", [("a", {"jpg": JPG, **META}), ("b", {"jpg": JPG, **TEXT})])
    tar(tmp_path / "in" / "1.tar", [("a", {"gif": image(2, "GIF"), **TEXT})])
    parts = open_data(str(tmp_path / "in")).parts
    places = [(sample.key, Path(part.path).name, sample.at) for part in parts for sample in part.samples()]
    sel = pool(tmp_path, places, [0, 1, 2])
    done = reshard(str(tmp_path / "in"), sel, str(tmp_path / "out"), trainable=True)
    assert done.by == "place"
    assert {key: set(one) for key, one in members_of(tmp_path / "out").items()} == {
        "a": {"jpg", "json", "txt"}, "b": {"jpg", "txt"}, "a-1": {"png", "txt"},
    }  # fmt: skip


def test_headers_keep_what_they_say_of_the_file(tmp_path: Path) -> None:
    long = "folder/" + "k" * 150
    rows = [(long, {"gif": image(2, "GIF"), **META}), ("ä", {"jfif": JPG, **META})]
    tar(tmp_path / "in" / "0.tar", rows, tarfile.PAX_FORMAT)
    reshard(str(tmp_path / "in"), keys_file(tmp_path / "k", [long, "ä"]), str(tmp_path / "out"), trainable=True)
    with tarfile.open(tmp_path / "out" / "00000000.tar") as file:
        found = [(one.name, one.mode, one.mtime, one.uname) for one in file]
    assert found == [
        (f"{key}.{ending}", 0o640, 1_000 + i, "someone")
        for i, (key, endings) in enumerate([(long, ("png", "json", "txt")), ("ä", ("jpg", "json", "txt"))])
        for ending in endings
    ]


def test_by_default_tars_are_copied_and_what_will_not_train_is_counted(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["reshard", str(data), keys(tmp_path), "--quiet", "-o"]
    assert main([*command, str(tmp_path / "out")]) == 0
    found = members_of(tmp_path / "out")
    assert found == {named(key): contents for key, contents in ALL.items()}
    out = capsys.readouterr().out
    assert "! open_clip will leave out 16 samples: " in out
    assert "; --trainable fixes what can be fixed\n" in out
    assert "4 have no .txt" in out
    assert "6 have their image as .gif" in out
    assert "1 has its image as .jfif" in out
    assert main([*command, str(tmp_path / "out"), "--json"]) == 0
    counts = json.loads(capsys.readouterr().out)["left_out"]
    named_only = {"undecodable"}
    told = doctor(str(data))["open_clip"]["left_out"]
    assert counts == {why: one["count"] for why, one in told.items() if why not in named_only}


def test_what_was_found_is_kept_with_its_counts(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = reshard(str(data), keys(tmp_path), str(tmp_path / "whole"))
    monkeypatch.setattr(job, "_KEPT", 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(job, "_tar", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            reshard(str(data), keys(tmp_path), str(tmp_path / "out"))
    monkeypatch.setattr(job, "_find", lambda *_, **__: 1 / 0)
    assert replace(reshard(str(data), keys(tmp_path), str(tmp_path / "out")), out=whole.out) == whole
    assert whole.left_out["no_txt"] == 4


def test_samples_that_moved_are_counted_once(tmp_path: Path) -> None:
    """They are looked up by place first, then by key."""
    rows = [("a", {"gif": JPG, **TEXT}), ("b", {"jpg": JPG, **TEXT}), ("c", {"jpg": JPG, **TEXT})]
    path = tar(tmp_path / "in" / "0.tar", rows)
    sel = pool(tmp_path, [(sample.key, "0.tar", sample.at) for sample in open_data(str(path)).samples()], [0, 1])
    tar(tmp_path / "in" / "0.tar", [rows[0], rows[2], rows[1]])
    done = reshard(str(tmp_path / "in"), sel, str(tmp_path / "out"))
    assert (done.by, done.samples, done.left_out) == ("key", 2, {"format.gif": 1})


def test_the_summary(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sel = keys(tmp_path, "gif", "jfif", "caption in json", "json first", "no caption", "jpg")
    assert main(["reshard", str(data), sel, "-o", str(tmp_path / "out"), "--trainable", "--quiet"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0] == "5 of 6 samples in 1 tar, found by key"
    assert f"1 file or sample skipped, listed in {tmp_path / 'out'}/set-aside.txt\n" in out
    assert "1 image converted to PNG, 1 image renamed, 2 captions written to .txt\n" in out
    assert "!" not in out


def test_nothing_to_train_on_is_an_error(data: Path, tmp_path: Path) -> None:
    sel = keys(tmp_path, "no caption", "no image")
    with pytest.raises(PoolError, match=r"the sample no_.* open_clip can train on none of the 2 chosen samples"):
        reshard(str(data), sel, str(tmp_path / "out"), trainable=True)


def test_other_options_are_refused(data: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    reshard(str(data), keys(tmp_path), out, trainable=True)
    again = reshard(str(data), keys(tmp_path), out, trainable=True)
    assert again.converted == 7
    with pytest.raises(OutputError, match="other data or options"):
        reshard(str(data), keys(tmp_path), out)
    with pytest.raises(UsageError, match="--trainable is for tars: add --as webdataset"):
        reshard(str(data), keys(tmp_path), out, form="parquet", trainable=True)


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], pytest.param(["--shuffle", "1"], marks=pytest.mark.slow)])
def test_killed_at_every_change_of_a_file(data: Path, tmp_path: Path, more: list[str]) -> None:
    sel = keys(tmp_path, *ALL, "gif", "jfif")
    asked = ["reshard", str(data), sel, "--per-shard", "9", "--trainable", "--quiet", "--workers", "1", *more, "-o"]
    assert main([*asked, str(tmp_path / "whole")]) == 0
    again = 0
    while (code := forked([*asked, str(tmp_path / "killed")], 2 * again + 1)) != 0:
        assert os.WIFSIGNALED(code)
        again += 1
    assert again > 5
    assert hashes(tmp_path / "killed") == hashes(tmp_path / "whole")


def test_data_that_change_are_refused(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from thresher.errors import ChangedError
    from thresher.resharding import fixed

    def write(part: object, *rest: object) -> object:
        done = whole(part, *rest)  # type: ignore[arg-type]
        os.utime(data / "1.tar", (1, 1))
        return done

    whole = fixed.write
    monkeypatch.setattr(fixed, "write", write)
    with pytest.raises(ChangedError, match=r"1\.tar: was changed while it was copied"):
        reshard(str(data), keys(tmp_path), str(tmp_path / "out"), trainable=True, workers=1)


@pytest.mark.parametrize("shuffle", [None, 2])
@pytest.mark.parametrize("trainable", [None, False])
def test_folders(tmp_path: Path, shuffle: int | None, trainable: bool | None) -> None:
    images = {
        "a.gif": animation(), "b.bmp": image(3, "BMP"), "c.jpg": image(7, "PNG"), "d.tif": image(4, "TIFF"),
        "e.webp": image(6, "WEBP"), "f.gif": image(8, "GIF")[:40], "g.jpg": JPG[:200], "h.png": image(9, "JPEG"),
    }  # fmt: skip
    (tmp_path / "in").mkdir()
    for name, content in images.items():
        (tmp_path / "in" / name).write_bytes(content)
        if name != "h.png":
            (tmp_path / "in" / name).with_suffix(".txt").write_text(f"caption {name[0]}")
    sel, out = keys_file(tmp_path / "k", [name[0] for name in images]), tmp_path / "out"
    done = reshard(str(tmp_path / "in"), sel, str(out), per_shard=3, shuffle=shuffle, trainable=trainable)
    found = {
        key: next(ending for ending in one if ending not in ("txt", "json")) for key, one in members_of(out).items()
    }
    if trainable is None:
        assert found == {"a": "png", "b": "png", "c": "png", "d": "png", "e": "webp", "g": "jpg", "h": "jpg"}
        assert (done.samples, done.converted, done.blank, done.aside) == (7, 3, 1, 1)
        trained = {key: text for key, _, text in loaded(sorted(out.glob("*.tar")))}
        assert set(trained) == set(found) - {"g"}
        assert "\tf\tis not a readable image" in (out / "set-aside.txt").read_text()
    else:
        assert found == {
            "a": "gif", "b": "bmp", "c": "png", "d": "tif", "e": "webp", "f": "gif", "g": "jpg", "h": "jpg"
        }  # fmt: skip
        assert (done.samples, done.converted, done.blank, done.aside) == (8, 0, 1, 0)
    same = members_of(out)
    assert same["c"]["png"] == images["c.jpg"]
    assert same["h"]["jpg"] == images["h.png"]


def test_another_caption_is_another_result(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from thresher.data import DataOptions

    table = pa.table({"image": [picture(1)], "key": ["a"], "text": ["one"], "alt": ["two"]})
    (tmp_path / "in").mkdir()
    pq.write_table(table, tmp_path / "in" / "0.parquet")
    sel, out = keys_file(tmp_path / "k", ["a"]), str(tmp_path / "out")
    reshard(str(tmp_path / "in"), sel, out, form="webdataset")
    with pytest.raises(OutputError, match="other data or options"):
        reshard(str(tmp_path / "in"), sel, out, form="webdataset", options=DataOptions(caption="alt"))


def test_captions_in_utf_16(tmp_path: Path) -> None:
    """As they are read, whatever that is."""
    path = tar(tmp_path / "in" / "0.tar", [("a", {"jpg": JPG, "txt": "café".encode("utf-16")})])
    reshard(str(path), keys_file(tmp_path / "k", ["a"]), str(tmp_path / "out"), trainable=True)
    (sample,) = open_data(str(path)).samples()
    assert members_of(tmp_path / "out")["a"] == {"jpg": JPG, "txt": sample.text.encode()}


def test_good_tars_are_copied_as_without_it(tmp_path: Path) -> None:
    tar(tmp_path / "in" / "0.tar", plain(20))
    sel = keys_file(tmp_path / "k", [f"{i:06d}" for i in range(0, 20, 3)])
    for name, trainable in (("with", True), ("without", False)):
        reshard(str(tmp_path / "in"), sel, str(tmp_path / name), trainable=trainable)
    assert (tmp_path / "with" / "00000000.tar").read_bytes() == (tmp_path / "without" / "00000000.tar").read_bytes()
